"""Trial and Chrono: what each call records, and what is refused."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Generator
from contextvars import copy_context
from typing import Any

import pytest
from msgspec import structs

from eventrun.codec import decode_items, encode, metric_values
from eventrun.errors import AlreadyFinished, InvalidType, InvalidValue
from eventrun.events import (
    ChartAdded,
    ChronoFinished,
    ChronoStarted,
    DescriptionSet,
    Event,
    InputMarked,
    MetadataSet,
    MetricsLogged,
    NoteAdded,
    OutputMarked,
    ParamsSet,
    StatusChanged,
    TagsAdded,
    TagsRemoved,
    TrialFinished,
    TrialStarted,
)
from eventrun.trial import ID_ALPHABET, Trial, active_trial, default_name, new_id


class Tape:
    """A recording that encodes as the real one does and keeps the events, and an owner that notes who finished."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.seconds: list[float | None] = []  # what finishes measured, taken out of the events
        self.ended: list[str] = []

    def record(self, event: Event) -> None:
        self.append(encode((0, event)))

    def append(self, item: bytes) -> None:
        event = decode_items(item, 1)[0][1]
        if isinstance(event, TrialFinished):
            self.seconds.append(event.seconds)
            event = structs.replace(event, seconds=None)
        self.events.append(event)

    def trial_started(self, trial: Trial) -> None: ...

    def trial_finished(self, trial: Trial) -> None:
        self.ended.append(trial.id)

    def check_trial(self, trial: Trial) -> Any: ...


@pytest.fixture
def tape() -> Tape:
    return Tape()


@pytest.fixture
def trial(tape: Tape) -> Trial:
    return Trial(tape, tape, new_id(), "project", "", "name", resumed=False)


def test_first_log_starts_the_trial(tape: Tape, trial: Trial) -> None:
    """The first log records started, once."""
    trial.log(loss=1.0)
    trial.log(loss=2.0)
    assert tape.events == [TrialStarted(), MetricsLogged({"loss": 1.0}), MetricsLogged({"loss": 2.0})]


def test_log_keeps_every_kind_of_value(tape: Tape, trial: Trial) -> None:
    """Floats, 64-bit ints, bools, text and None, NaN and infinity are kept as they are."""
    values = {"f": 0.1, "i": 2**64 - 1, "n": -(2**63), "b": True, "s": "ü", "none": None, "inf": -math.inf}
    trial.log(values)
    logged = tape.events[-1]
    assert isinstance(logged, MetricsLogged)
    assert logged.values == values
    assert [type(v) for v in logged.values.values()] == [type(v) for v in values.values()]


def test_values_by_mapping_and_by_name_are_one_call(tape: Tape, trial: Trial) -> None:
    """A mapping and keywords together make one event with step, epoch and subset."""
    trial.log({"loss": 1.0}, acc=0.5, step=3, epoch=1, subset="train")
    assert tape.events[-1] == MetricsLogged({"loss": 1.0, "acc": 0.5}, 3, 1, "train")


def test_nested_values_flatten(tape: Tape, trial: Trial) -> None:
    """Nested mappings flatten with "/", also as a keyword."""
    trial.log({"train": {"loss": 1.0, "deep": {"x": 2}}}, val={"loss": 3.0})
    assert tape.events[-1] == MetricsLogged({"train/loss": 1.0, "train/deep/x": 2, "val/loss": 3.0})


def test_item_is_asked(tape: Tape, trial: Trial) -> None:
    """Whatever has .item() is asked for its plain value, for values and for steps."""
    numpy = pytest.importorskip("numpy")
    trial.log(loss=numpy.float32(0.5), n=numpy.array(3), b=numpy.bool_(True), step=numpy.int64(7))
    assert tape.events[-1] == MetricsLogged({"loss": 0.5, "n": 3, "b": True}, 7)
    assert {type(v) for v in tape.events[-1].values.values()} == {float, int, bool}


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda t: t.log(good=1.0, weights=[1.0]), InvalidType, "weights"),
        (lambda t: t.log(thing=object()), InvalidType, "thing"),
        (lambda t: t.log(big=2**64), InvalidValue, "big"),
        (lambda t: t.log(text="\ud800"), InvalidValue, "text"),
        (lambda t: t.log({"a": {"b": {1, 2}}}), InvalidType, "a/b"),
        (lambda t: t.log({1: 2.0}), InvalidType, "1"),
        (lambda t: t.log({"": 2.0}), InvalidValue, "empty"),
        (lambda t: t.log(**{"": 2.0}), InvalidValue, "empty"),
        (lambda t: t.log([1.0]), InvalidType, "mapping"),
        (lambda t: t.log(x=1.0, step="three"), InvalidType, "step"),
        (lambda t: t.log(x=1.0, step=True), InvalidType, "step"),
        (lambda t: t.log(x=1.0, epoch=[1]), InvalidType, "epoch"),
        (lambda t: t.log(x=1.0, subset=3), InvalidType, "subset"),
        (lambda t: t.log(x=1.0, aggregator="median"), InvalidValue, "median"),
        (lambda t: t.set_params(f=lambda: 1), InvalidType, "params/f"),
        (lambda t: t.set_params([1]), InvalidType, "params"),
        (lambda t: t.add_tags(""), InvalidValue, "tag"),
        (lambda t: t.add_tags(3), InvalidType, "tag"),
        (lambda t: t.set_status(" "), InvalidValue, "status"),
        (lambda t: t.chrono(""), InvalidValue, "chrono"),
        (lambda t: t.chrono("x" * 20_000), InvalidValue, "20,000"),
        (lambda t: t.set_description(3), InvalidType, "description"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(
    tape: Tape, trial: Trial, call: Callable[[Trial], None], error: type[Exception], named: str
) -> None:
    """A bad value fails at the call, names the key, and leaves nothing half-written."""
    trial.start()
    before = list(tape.events)
    with pytest.raises(error, match=named):
        call(trial)
    assert tape.events == before


def test_sizes(tape: Tape, trial: Trial) -> None:
    """No metric at all records nothing; ten thousand are one event; long text is kept whole."""
    trial.log()
    trial.log({})
    assert tape.events == []
    trial.log({f"m/{i}": i for i in range(10_000)}, note="ä" * 10_000)
    logged = tape.events[-1]
    assert isinstance(logged, MetricsLogged)
    assert len(logged.values) == 10_001


def test_a_value_changed_later_changes_nothing(tape: Tape, trial: Trial) -> None:
    """What was logged is a copy: changing the mapping afterwards doesn't reach the event."""
    values = {"loss": 1.0}
    params = {"nested": {"list": [1, 2]}}
    trial.log(values)
    trial.set_params(params)
    values["loss"] = 2.0
    params["nested"]["list"].append(3)
    assert tape.events[-2:] == [MetricsLogged({"loss": 1.0}), ParamsSet({"nested": {"list": [1, 2]}})]


def test_each_call_is_one_event(tape: Tape, trial: Trial) -> None:
    """Every method records the event of its name, and calls with nothing to say record nothing."""
    trial.set_params({"lr": 0.1}, momentum=0.9, source="config.yaml")
    trial.set_metadata(host="x")
    trial.add_tags("good", owner="me")
    trial.remove_tags("good")
    trial.set_description("what")
    trial.add_note("why")
    trial.add_chart({"mark": "line"}, "loss")
    trial.add_input("s3://data")
    trial.add_output({"path": b"x"})
    trial.set_status("paused", error=ValueError("broken"))
    trial.set_params()
    trial.set_metadata({})
    trial.add_tags()
    trial.remove_tags()
    assert tape.events == [
        ParamsSet({"lr": 0.1, "momentum": 0.9}, "config.yaml"),
        MetadataSet({"host": "x"}),
        TagsAdded({"good": None, "owner": "me"}),
        TagsRemoved(["good"]),
        DescriptionSet("what"),
        NoteAdded("why"),
        ChartAdded({"mark": "line"}, "loss"),
        InputMarked("s3://data"),
        OutputMarked({"path": b"x"}),
        StatusChanged("paused", "ValueError: broken"),
    ]


def test_a_block_finishes_its_trial(tape: Tape, trial: Trial) -> None:
    """Leaving the block records completed, and the trial is the current one only inside."""
    with trial as entered:
        assert entered is trial
        assert active_trial() is trial
    assert active_trial() is None
    assert tape.events == [TrialStarted(), TrialFinished("completed")]
    assert tape.ended == [trial.id]


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("bad lr"), "failed", "ValueError: bad lr"),
        (KeyError(), "failed", "KeyError"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (asyncio.CancelledError(), "interrupted", "CancelledError"),
        (SystemExit(3), "failed", "SystemExit: 3"),
        (SystemExit(0), "completed", None),
        (ValueError("lone \ud800"), "failed", "ValueError: lone \\ud800"),
    ],
)
def test_an_exception_is_recorded_and_goes_on(
    tape: Tape, trial: Trial, error: BaseException, status: str, text: str | None
) -> None:
    """What leaves the block by exception is recorded with its message and raised on unchanged."""
    with pytest.raises(type(error)) as caught, trial:
        raise error
    assert caught.value is error
    assert tape.events[-1] == TrialFinished(status, text)


def test_only_the_outermost_block_ends_the_trial(tape: Tape, trial: Trial) -> None:
    """A trial may be entered again inside its own block; it ends with the outermost."""
    with trial:
        with trial:
            pass
        assert [type(event) for event in tape.events] == [TrialStarted]
        assert active_trial() is trial
    assert trial.finished
    assert active_trial() is None


def test_a_block_left_in_another_context_ends_its_trial(tape: Tape, trial: Trial) -> None:
    """A generator that another context closes ends its trial all the same, without an error."""

    def steps() -> Generator[int, None, None]:
        with trial:
            yield 1

    generator = steps()
    copy_context().run(next, generator)
    generator.close()
    assert tape.events[-1] == TrialFinished("interrupted", "GeneratorExit")


def test_an_error_that_has_no_text(tape: Tape, trial: Trial) -> None:
    """An exception whose text can't be made is recorded by its name, and goes on its way."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("mute")

    with pytest.raises(Mute), trial:
        raise Mute
    assert tape.events[-1] == TrialFinished("failed", "Mute: (its text could not be made: RuntimeError)")


async def test_async_blocks(tape: Tape, trial: Trial) -> None:
    """Trial and chrono serve `async with` in the same way."""
    async with trial, trial.chrono("epoch"):
        trial.log(loss=1.0)
    assert [type(event) for event in tape.events] == [
        TrialStarted, ChronoStarted, MetricsLogged, ChronoFinished, TrialFinished,
    ]  # fmt: skip


def test_finish_twice_says_when(trial: Trial) -> None:
    """The second finish is an error that says when and how the trial ended; leaving the block isn't a second one."""
    with trial:
        trial.finish("done")
    with pytest.raises(AlreadyFinished, match=r"'name'.* ended already at 20\d\d-.* as 'done'.*resume="):
        trial.finish()


def test_logging_after_finish_is_late(tape: Tape, trial: Trial) -> None:
    """Metrics and chronos after the finish are kept and marked late."""
    chrono = trial.chrono("c")
    trial.log(loss=1.0)
    with chrono:
        trial.finish()
    trial.log(loss=2.0)
    assert tape.events[-2].late is True  # type: ignore[union-attr]
    assert tape.events[-1] == MetricsLogged({"loss": 2.0}, late=True)


def test_interrupt_ends_only_what_runs(tape: Tape, trial: Trial) -> None:
    """Interrupting records interrupted once, for a trial that runs; not for one never begun or ended already."""
    trial.interrupt("SIGTERM", 1)
    assert tape.events == []
    trial.start()
    trial.interrupt("SIGTERM", 1)
    trial.interrupt("again", 1)
    assert tape.events == [TrialStarted(), TrialFinished("interrupted", "SIGTERM")]


def test_a_finish_tells_how_long_it_was(tape: Tape, trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """From start to finish or interruption, by the monotonic clock; a trial that never began doesn't know."""
    monkeypatch.setattr("eventrun.trial.monotonic_ns", lambda: 5_000_000_000)
    trial.start()
    other = Trial(tape, tape, new_id(), "project", "", "other", resumed=False)
    other.start()
    monkeypatch.setattr("eventrun.trial.monotonic_ns", lambda: 7_500_000_000)
    trial.finish()
    other.interrupt("SIGTERM", 1)
    Trial(tape, tape, new_id(), "project", "", "third", resumed=False).finish()
    assert tape.seconds == [2.5, 2.5, None]


def test_chrono_measures_and_nests(tape: Tape, trial: Trial) -> None:
    """A chrono may be nested and used again; each use is a pair of events with a duration and the error, if any."""
    chrono = trial.chrono("c", aggregator=("stat", {"skip": 1}))
    with chrono, chrono:
        pass
    with pytest.raises(ZeroDivisionError), chrono:
        1 / 0  # noqa: B018 - it is the failure that matters
    finished = [event for event in tape.events if isinstance(event, ChronoFinished)]
    assert len(finished) == 3
    assert all(event.seconds >= 0 for event in finished)
    assert finished[0].seconds <= finished[1].seconds
    assert [event.error for event in finished] == [None, None, "ZeroDivisionError: division by zero"]
    assert finished[0].aggregator == ("stat", {"skip": 1})


def test_ids_and_names() -> None:
    """Ids are 16 letters of one alphabet and differ; a name follows from the id."""
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(i) == 16 and set(i) <= set(ID_ALPHABET) for i in ids)
    one = ids.pop()
    assert default_name(one) == default_name(one)
    assert default_name(one).count("-") == 2


def test_metric_values_stops_at_cycles() -> None:
    """A mapping that holds itself is refused, not followed for ever."""
    loop: dict[str, Any] = {}
    loop["again"] = loop
    with pytest.raises(InvalidValue, match="100 deep"):
        metric_values(loop)
