"""Projections: folding in any grouping gives the same bytes, and the states say what the design promises."""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrun import aggregators
from eventrun import events as ev
from eventrun.codec import StoredEvent, Stream
from eventrun.events import (
    Event,
    MetricsLogged,
    ParamsSet,
    StatusChanged,
    TrialCreated,
    TrialFinished,
    TrialStarted,
)
from eventrun.projections import (
    Held,
    ParamSource,
    Points,
    Projection,
    Slice,
    SubjectFold,
    TrialFold,
    TrialState,
    apply,
    decode_state,
    encode_state,
    fold,
    group_state,
    project_state,
    series_name,
    view_status,
)
from eventrun.projections.params import SOURCES_KEPT
from eventrun.projections.subject import VARYING_VALUES

A, B, CLAIMS = 7, 8, 0  # writers; 0 is the claim stream
SECOND = 1_000_000_000

Recorded = tuple[int, int, Event]  # writer, time_ns, event


def stored(recorded: Iterable[Recorded], subject: str = "t/x") -> list[StoredEvent]:
    """Number events as a log does."""
    sequences: dict[int, int] = {}
    log = []
    for position, (writer, time_ns, event) in enumerate(recorded, 1):
        sequences[writer] = sequences.get(writer, 0) + 1
        log.append(StoredEvent(position, Stream(subject, writer), sequences[writer], time_ns, event))
    return log


def slices_of(log: Sequence[StoredEvent], cut: Callable[[], bool]) -> Iterator[Slice]:
    """Cut a log into slices of one stream each, and where `cut` says so."""
    part: list[StoredEvent] = []
    for entry in log:
        if part and (part[0].stream != entry.stream or cut()):
            yield as_slice(part)
            part = []
        part.append(entry)
    if part:
        yield as_slice(part)


def as_slice(part: Sequence[StoredEvent]) -> Slice:
    return Slice(part[0].position, part[0].stream, part[0].sequence, [(e.time_ns, e.event) for e in part])


def folded(*recorded: Recorded) -> TrialState:
    """Fold events in one go; apply, which is the specification, must say the same."""
    log = stored(recorded)
    trial = TrialFold.new("x")
    fold(trial, list(slices_of(log, lambda: False)))
    assert trial.encode() == applied(log).encode()
    return trial.state()


def applied(log: Iterable[StoredEvent]) -> TrialFold:
    trial = TrialFold.new("x")
    for entry in log:
        assert apply(trial, entry) is trial
    return trial


def shown(state: object, names: str) -> tuple[Any, ...]:
    return tuple(getattr(state, name) for name in names.split())


def logged(*calls: MetricsLogged) -> TrialState:
    return folded(*((A, time_ns, call) for time_ns, call in enumerate(calls, 1)))


# any grouping ---------------------------------------------------------------------------------------------------

TIMES = st.integers(0, 9)
TEXTS = st.sampled_from(["", "a", "b", "a/b"])
SCALARS = st.one_of(
    st.floats(),
    st.sampled_from([0.1, 0.2, -0.0, 1, 1.0]),
    st.integers(-(2**63), 2**64 - 1),
    st.booleans(),
    st.none(),
    TEXTS,
)
STEPS = st.one_of(st.none(), st.integers(-1, 3), st.sampled_from([0.5, 1.0, math.nan, math.inf, -math.inf]))
CHOICES = st.sampled_from([
    *[None] * 6,
    ("ring", {"n": 2}), ("series", {}), ("stat", {"skip": 1}), ("value", {}), ("ring", {}), ("nonesuch", {}),
])  # fmt: skip
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
MAPPINGS = st.dictionaries(TEXTS, PLAIN, max_size=3)
ERRORS = st.sampled_from([None, None, "boom", "bang"])
WORDS = st.sampled_from(["completed", "FAILED", "Interrupted", "suspended", "running", "evaluating"])
CALLS = st.builds(
    MetricsLogged,
    st.dictionaries(st.sampled_from(["a", "b", "train/a"]), SCALARS, max_size=3),
    STEPS, STEPS, st.sampled_from([None, None, "train", ""]), CHOICES, st.booleans(),
)  # fmt: skip
EVENTS: st.SearchStrategy[Event] = st.one_of(
    CALLS,
    CALLS,
    st.builds(TrialCreated, TEXTS, TEXTS, TEXTS, TEXTS),
    st.builds(TrialStarted, st.booleans()),
    st.builds(TrialFinished, WORDS, ERRORS, st.none() | st.floats(0, 1e9)),
    st.builds(StatusChanged, WORDS, ERRORS),
    st.builds(ev.ChronoStarted, TEXTS, CHOICES),
    st.builds(ev.ChronoFinished, TEXTS, st.floats(0), ERRORS, CHOICES, st.booleans()),
    st.builds(ParamsSet, MAPPINGS, TEXTS),
    st.builds(ev.MetadataSet, MAPPINGS),
    st.builds(ev.TagsAdded, MAPPINGS),
    st.builds(ev.TagsRemoved, st.lists(TEXTS, max_size=2)),
    st.builds(ev.DescriptionSet, TEXTS),
    st.builds(ev.NoteAdded, TEXTS),
    st.builds(ev.InputMarked, PLAIN),
    st.builds(ev.OutputMarked, PLAIN),
    st.builds(ev.ChartAdded, PLAIN, st.none() | TEXTS),
    st.builds(ev.TableAdded, TEXTS, PLAIN, st.integers(0, 9), st.just({"a": "int"})),
    st.builds(
        ev.WriterEnded, st.sampled_from([A, B]), TIMES, st.sampled_from(["lost", "killed"]), st.integers(0, 9)
    ),
    st.builds(ev.Heartbeat, st.just(10.0)),
    st.builds(ev.TrialRenamed, TEXTS),
    st.builds(ev.Hidden, TEXTS),
    st.builds(ev.Restored),
    st.builds(ev.AttemptClaimed, TEXTS),
    st.builds(ev.ProjectCreated, TEXTS),
    st.builds(ev.GroupCreated, TEXTS, TEXTS),
)
WRITERS = st.sampled_from([A, A, A, B, CLAIMS])
ALIKE = st.builds(MetricsLogged, st.fixed_dictionaries({"a": SCALARS, "b": SCALARS}), STEPS, STEPS)
LOGS = st.one_of(
    [st.lists(st.tuples(WRITERS, TIMES, kind), max_size=30).map(stored) for kind in (EVENTS, CALLS, ALIKE)]
)


def grouped(log: Sequence[StoredEvent], seed: int) -> Iterator[list[Slice]]:
    """Cut a log into slices and those into calls of fold, at random."""
    chance = random.Random(seed)
    call: list[Slice] = []
    for part in slices_of(log, lambda: chance.random() < 0.3):
        call.append(part)
        if chance.random() < 0.4:
            yield call
            call = []
    yield call


@given(LOGS, st.integers())
def test_any_grouping_gives_the_same_bytes(log: list[StoredEvent], seed: int) -> None:
    """fold over any slices in any calls, with the state written and read between them, is apply repeated."""
    trial = TrialFold.new("x")
    for call in grouped(log, seed):
        fold(trial, call)
        trial = TrialFold.decode("x", trial.encode())
    alone = applied(log)
    assert trial.encode() == alone.encode()
    assert encode_state(trial.state()) == encode_state(alone.state())


@given(LOGS, st.integers())
def test_points_are_every_value_in_arrival_order(log: list[StoredEvent], seed: int) -> None:
    """The points of all folds together are the log's values one by one, whatever kind they are."""
    trial, found = TrialFold.new("x"), dict[str, list[Any]]()
    for call in grouped(log, seed):
        for name, points in fold(trial, call).items():
            columns = points.values, points.steps, points.epochs, points.times_ns, points.sequences
            assert {len(points)} == {len(column) for column in columns}
            found.setdefault(name, []).extend(zip(*columns, strict=True))
    expected: dict[str, list[Any]] = {}
    for _, _, sequence, time_ns, event in log:
        if isinstance(event, MetricsLogged):
            for name, value in event.values.items():
                point = value, event.step, event.epoch, time_ns, sequence
                expected.setdefault(series_name(name, event.subset), []).append(point)
    assert repr(found) == repr(expected)  # NaN isn't equal to itself
    assert {name: metric.count for name, metric in trial.metrics.items()} == {
        k: len(v) for k, v in found.items()
    }


@given(LOGS)
def test_states_are_read_as_written(log: list[StoredEvent]) -> None:
    """A state survives its encoding, and its plain form holds no Struct."""
    state = applied(log).state()
    assert repr(decode_state(encode_state(state))) == repr(state)
    plain = state.to_dict()
    msgspec.json.encode(plain)
    assert plain.keys() - {"param_sources"} == set(TrialState.__struct_fields__) - {"packed_sources"}
    assert all(isinstance(metric, dict) for metric in plain["metrics"].values())


@given(LOGS, LOGS)
def test_a_state_stays_as_it_was_given(first: list[StoredEvent], second: list[StoredEvent]) -> None:
    """Folding on doesn't change a state that was handed out, nor the events."""
    before = repr(second)
    trial = applied(first)
    state = trial.state()
    text = repr(state)
    for entry in second:
        apply(trial, entry)
    assert repr(state) == text
    assert repr(second) == before


@given(
    st.lists(
        st.tuples(st.sampled_from([A, B]), EVENTS.filter(lambda e: not isinstance(e, ev.WriterEnded))),
        max_size=12,
    ),
    st.data(),
)
def test_status_last_and_latest_do_not_depend_on_arrival(
    recorded: list[tuple[int, Event]], data: st.DataObject
) -> None:
    """Streams that arrive in another order give the same status, times, last and latest."""
    times = data.draw(st.lists(TIMES, min_size=len(recorded), max_size=len(recorded)))
    log = stored((writer, time_ns, event) for (writer, event), time_ns in zip(recorded, times, strict=True))
    other = sorted(log, key=lambda entry: -entry.stream.writer)
    one, two = applied(log).state(), applied(other).state()
    for name in (
        "status",
        "raw_status",
        "error",
        "started_ns",
        "finished_ns",
        "modified_ns",
        "created_ns",
        "duration_s",
        "events",
        "late",
    ):
        assert getattr(one, name) == getattr(two, name)
    for name, metric in one.metrics.items():
        same = two.metrics[name]
        assert repr((metric.last, metric.latest)) == repr((same.last, same.latest))


def test_numpy_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With numpy or without, a long column leaves the same state."""
    pytest.importorskip("numpy")
    chance = random.Random(5)
    log = stored(
        (A, n, MetricsLogged({"a": chance.gauss(0, 1), "b": chance.random() ** 9}, n)) for n in range(3000)
    )
    found = []
    for shortest in (1, 10**9):
        monkeypatch.setattr(aggregators, "NUMPY_FROM", shortest)
        trial = TrialFold.new("x")
        fold(trial, list(slices_of(log, lambda: False)))
        found.append(trial.encode())
    assert found[0] == found[1]


def test_nothing_to_fold() -> None:
    """No slices, and calls without values, change nothing that was counted before."""
    trial = TrialFold.new("x")
    assert fold(trial, []) == {}
    assert trial.encode() == TrialFold.new("x").encode()
    assert fold(trial, [as_slice(stored([(A, 1, MetricsLogged({}))]))]) == {}
    assert (trial.events, trial.metrics) == (1, {})


# metrics --------------------------------------------------------------------------------------------------------


def test_a_metric_in_short() -> None:
    """count, last, min, max, mean and sd of plain numbers are what they are called."""
    metric = logged(
        *(MetricsLogged({"loss": value}, step) for step, value in enumerate([4.0, 1.0, 2.0, 5.0]))
    ).metrics["loss"]
    assert shown(metric, "count last latest min max mean") == (4, 5.0, 5.0, 1.0, 5.0, 3.0)
    assert metric.sd == math.sqrt(2.5)
    assert (metric.first_step, metric.last_step) == (0, 3)


def test_every_kind_of_value() -> None:
    """NaN and infinities, text and None are counted apart; a bool counts as 0 or 1; each may be the last."""
    values: list[Any] = [math.nan, -math.inf, "text", None, True, 3]
    metric = logged(*(MetricsLogged({"m": value}) for value in values)).metrics["m"]
    assert (metric.count, metric.non_finite, metric.non_numeric) == (6, 2, 2)
    assert (metric.min, metric.max, metric.mean) == (1, 3, 2.0)
    last = logged(MetricsLogged({"m": 1.0}), MetricsLogged({"m": math.nan})).metrics["m"]
    assert math.isnan(last.last)  # type: ignore[arg-type]
    nothing = logged(MetricsLogged({"m": "text"})).metrics["m"]
    assert (nothing.last, nothing.min, nothing.mean, nothing.sd) == ("text", None, None, None)


def test_integers_are_exact() -> None:
    """64-bit integers stay what they were."""
    big = 2**63 + 1
    metric = logged(MetricsLogged({"n": big}, step=big), MetricsLogged({"n": -(2**63)})).metrics["n"]
    assert (metric.max, metric.min, metric.latest, metric.first_step) == (big, -(2**63), big, big)


def test_last_is_by_time_and_latest_by_step() -> None:
    """Out of order: `last` has the greatest time, `latest` the greatest step, whatever arrived last."""
    metric = folded(
        (A, 30, MetricsLogged({"m": "last"}, step=1)),
        (A, 20, MetricsLogged({"m": "latest"}, step=5)),
        (A, 10, MetricsLogged({"m": "arrived last"}, step=2)),
    ).metrics["m"]
    assert (metric.last, metric.latest) == ("last", "latest")
    assert (metric.first_step, metric.last_step) == (1, 2)


def test_ties_are_decided_by_stream_and_sequence() -> None:
    """At equal times the greater writer has the last word, then the greater sequence."""
    call = (B, 5, MetricsLogged({"m": "b"}, step=1))
    earlier, later = (A, 5, MetricsLogged({"m": "a1"}, step=1)), (A, 5, MetricsLogged({"m": "a2"}, step=1))
    for order in itertools.permutations([call, earlier, later]):
        metric = folded(*order).metrics["m"]
        assert (metric.last, metric.latest) == ("b", "b")
    assert folded(earlier, later).metrics["m"].latest == "a2"


def test_a_point_without_a_step_is_before_all_others() -> None:
    """None and NaN are no steps: any step is later, the smallest one too."""
    for none in (None, math.nan):
        calls = MetricsLogged({"m": "first"}, step=-math.inf), MetricsLogged({"m": "none"}, step=none)
        metric = logged(*calls).metrics["m"]
        assert (metric.last, metric.latest) == ("none", "first")
        assert (metric.first_step, metric.last_step) == (-math.inf, -math.inf)
    metric = logged(MetricsLogged({"m": 1}), MetricsLogged({"m": 2})).metrics["m"]
    assert (metric.latest, metric.first_step, metric.last_step) == (2, None, None)


def test_subsets_and_slashes_are_one_series() -> None:
    """subset "train" with "loss", and "train/loss", are one series; an empty subset is none."""
    state = logged(
        MetricsLogged({"loss": 1}, subset="train"),
        MetricsLogged({"train/loss": 2, "loss": 3}),
        MetricsLogged({"loss": 4}, subset=""),
    )
    assert {name: metric.count for name, metric in state.metrics.items()} == {"train/loss": 2, "loss": 2}
    assert (series_name("loss"), series_name("loss", "train"), series_name("a/b", "c")) == (
        "loss",
        "train/loss",
        "c/a/b",
    )


@pytest.mark.parametrize("first", [0, 1])
def test_calls_of_different_shapes_share_a_series(first: int) -> None:
    """A series that is logged alone, and now and then with others, keeps its order."""
    calls = [MetricsLogged({"val": -n, "loss": n} if n % 3 == first else {"loss": n}, n) for n in range(10)]
    trial = TrialFold.new("x")
    points = fold(trial, [as_slice(stored((A, n, call) for n, call in enumerate(calls)))])
    numbers: list[Any] = list(range(10))
    assert points["loss"] == Points(numbers, numbers, [None] * 10, numbers, list(range(1, 11)))
    assert points["val"].steps == numbers[first::3]
    assert list(points) == (["loss", "val"] if first else ["val", "loss"])


def test_an_aggregator_observes_from_where_it_is_named() -> None:
    """The first choice that can be made stands, and sees what came with it and after."""
    calls = [MetricsLogged({"m": n}, aggregator=choice) for n, choice in enumerate(
        [None, ("nonesuch", {}), ("ring", {"n": 2}), None, ("series", {})]
    )]  # fmt: skip
    assert logged(*calls).metrics["m"].value == [3, 4]
    assert logged(*calls[:3]).metrics["m"].value == [2]
    assert logged(*calls[:2]).metrics["m"].value is None


def test_late_events_are_kept_and_counted() -> None:
    """What a writer records after its finish is in the state, and in `late`."""
    state = folded(
        (A, 1, TrialStarted()),
        (A, 2, TrialFinished()),
        (A, 3, MetricsLogged({"m": 7}, late=True)),
        (A, 4, ev.ChronoFinished("c", 1.0, late=True)),
    )
    assert (state.late, state.events, state.position, state.status) == (2, 4, 4, "completed")
    assert (state.metrics["m"].last, state.chronos["c"].count) == (7, 1)
    assert shown(state, "finished_ns modified_ns") == (2, 4)


def test_chronos() -> None:
    """Seconds are summed exactly; a run that hasn't finished is running; other numbers than finite are but counted."""
    seconds = [0.1] * 10
    runs: list[Event] = [
        event for s in seconds for event in (ev.ChronoStarted("c"), ev.ChronoFinished("c", s))
    ]
    odd = [ev.ChronoFinished("odd", 1.0), ev.ChronoFinished("odd", math.inf, aggregator=("ring", {"n": 3}))]
    state = folded(*((A, n, event) for n, event in enumerate([*runs, ev.ChronoStarted("c"), *odd])))
    chrono = state.chronos["c"]
    assert shown(chrono, "count sum mean min max running") == (10, 1.0, 0.1, 0.1, 0.1, 1)
    assert chrono.value is None
    odds = state.chronos["odd"]
    assert (odds.count, odds.mean, odds.running) == (2, 1.0, 0)
    assert odds.value == [math.inf]


# what is told about a trial -------------------------------------------------------------------------------------


def test_created() -> None:
    """The fields of a new trial, and the defaults of one of which nothing is known."""
    state = folded((A, 5, TrialCreated("mnist", "sweep", "fox", "why", "v1", 3)))
    assert shown(state, "id project group name description") == ("x", "mnist", "sweep", "fox", "why")
    assert (state.version, state.attempt, state.status, state.raw_status) == ("v1", 3, "created", "created")
    assert shown(state, "created_ns modified_ns") == (5, 5)
    assert shown(state, "started_ns finished_ns duration_s") == (None, None, None)
    unknown = TrialFold.new("x").state()
    assert shown(unknown, "name status created_ns modified_ns") == ("", "created", None, None)


def test_another_rank_arrives_before_the_creation() -> None:
    """A trial comes out the same when another rank's stream is appended first."""
    rank_0: list[Recorded] = [
        (A, 1, TrialCreated("p", "g", "n", "d")),
        (A, 2, TrialStarted()),
        (A, 9, TrialFinished()),
    ]
    rank_1: list[Recorded] = [
        (B, 3, TrialStarted(True)), (B, 4, ParamsSet({"lr": 1})), (B, 5, ev.DescriptionSet("better")),
        (B, 6, MetricsLogged({"m": 1}, 0)),
    ]  # fmt: skip
    assert encode_state(folded(*rank_0, *rank_1)) == encode_state(folded(*rank_1, *rank_0))


def test_params_merge_and_lists_are_replaced() -> None:
    """Nested mappings merge key by key, all else is replaced; metadata too."""
    state = folded(
        (A, 1, ParamsSet({"opt": {"name": "adam", "betas": [0.9, 0.99]}, "lr": 0.1, "net": 3})),
        (A, 2, ParamsSet({"opt": {"betas": [0.5]}, "lr": 0.2, "net": {"depth": 3}})),
        (A, 3, ev.MetadataSet({"git": {"commit": "a", "dirty": True}})),
        (A, 4, ev.MetadataSet({"git": {"commit": "b"}})),
    )
    assert state.params == {"opt": {"name": "adam", "betas": [0.5]}, "lr": 0.2, "net": {"depth": 3}}
    assert state.metadata == {"git": {"commit": "b", "dirty": True}}


def test_params_remember_where_they_came_from() -> None:
    """Each param tells who set it to what, newest last; repeating is no news, and only the last few are kept."""
    state = folded(
        (A, 1, ParamsSet({"lr": 0.1, "opt": {"name": "adam"}}, "config.yaml")),
        (A, 2, ParamsSet({"lr": 0.01}, "sweep")),
        (A, 3, ParamsSet({"lr": 0.01}, "sweep")),
    )
    assert state.param_sources == {
        "lr": [ParamSource("config.yaml", 0.1), ParamSource("sweep", 0.01)],
        "opt/name": [ParamSource("config.yaml", "adam")],
    }
    assert state.to_dict()["param_sources"]["lr"][-1] == {"source": "sweep", "value": 0.01}
    many = folded(*((A, n, ParamsSet({"n": n})) for n in range(9)))
    assert [value for _, value in many.param_sources["n"]] == list(range(9))[-SOURCES_KEPT:]
    typed = folded((A, 1, ParamsSet({"n": 1})), (A, 2, ParamsSet({"n": True})))
    assert [value for _, value in typed.param_sources["n"]] == [1, True]


def test_tags_notes_charts_tables() -> None:
    """Tags come and go, notes and tables add up, a chart takes the place of one of the same name."""
    state = folded(
        (A, 1, ev.TagsAdded({"good": None, "owner": "x"})),
        (A, 2, ev.TagsRemoved(["good", "unknown"])),
        (A, 3, ev.NoteAdded("hm")),
        (A, 4, ev.ChartAdded({"v": 1}, "c")),
        (A, 5, ev.ChartAdded({"v": 0})),
        (A, 6, ev.ChartAdded({"v": 0})),
        (A, 7, ev.ChartAdded({"v": 2}, "c")),
        (A, 8, ev.TableAdded("t", {"file": "f"}, 3, {"a": "int"})),
    )
    assert state.tags == {"owner": "x"}
    assert [(note.time_ns, note.text) for note in state.notes] == [(3, "hm")]
    assert [(chart.name, chart.spec["v"]) for chart in state.charts] == [("c", 2), (None, 0), (None, 0)]
    assert state.to_dict()["tables"] == [
        {"name": "t", "ref": {"file": "f"}, "rows": 3, "columns": {"a": "int"}}
    ]


def test_inputs_are_marked_once() -> None:
    """The same reference twice is one input, and an output may be the same thing as an input."""
    data = {"url": "s3://data", "rows": [1, 2]}
    state = folded(
        (A, 1, ev.InputMarked(data)), (A, 2, ev.InputMarked(dict(data))), (A, 3, ev.OutputMarked(data))
    )
    assert (state.inputs, state.outputs) == ((data,), (data,))


# status ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("view", "words"), [
    ("created", "CreatedGroup CREATED BUILT READY PENDING empty"),
    ("running", "RunningGroup Running RUNNING RESUME collecting post_processing anything"),
    ("suspended", "Suspended STOP STOPPED paused"),
    ("completed", "FinishedGroup Completed COMPLETED SUCCESS Complete completed"),
    ("failed", "ErrorGroup Exception Broken ERROR RUN_ERROR FSM_ERROR Error"),
    ("interrupted", "Interrupted CANCELLED cancelled"),
    ("lost", "lost"),
])  # fmt: skip
def test_words_of_other_trackers(view: str, words: str) -> None:
    """The words of Track, digitalhub, t9k and 3LC are seen as one of seven, in any case."""
    for word in words.split():
        assert {view_status(word), view_status(word.lower()), view_status(word.upper())} == {view}


def test_the_way_of_a_trial() -> None:
    """created, running, the caller's own words, finished; times and duration follow."""
    way: list[Recorded] = [(A, 0, TrialCreated("p", "g", "n"))]
    assert folded(*way).status == "created"
    way.append((A, 1 * SECOND, TrialStarted()))
    assert folded(*way).status == "running"
    way.append((A, 2 * SECOND, StatusChanged("Evaluating")))
    state = folded(*way)
    assert shown(state, "status raw_status duration_s finished_ns") == ("running", "Evaluating", 1.0, None)
    way.append((A, 3 * SECOND, StatusChanged("paused")))
    assert folded(*way).status == "suspended"
    way.append((A, 4 * SECOND, TrialFinished("SUCCESS")))
    state = folded(*way, (A, 9 * SECOND, ev.NoteAdded("late")))
    assert shown(state, "status raw_status") == ("completed", "SUCCESS")
    assert shown(state, "finished_ns duration_s") == (4 * SECOND, 3.0)


def test_a_status_that_ends_is_a_finish() -> None:
    """`failed` by a status change has a time of finish, and the error stays when the finish tells none."""
    started: list[Recorded] = [(A, 1, TrialStarted()), (A, 5, StatusChanged("Broken", "out of memory"))]
    state = folded(*started)
    assert (state.status, state.error, state.finished_ns) == ("failed", "out of memory", 5)
    assert folded(*started, (A, 6, TrialFinished("failed"))).error == "out of memory"
    assert folded(*started, (A, 6, TrialStarted(True))).error is None


def test_a_finish_by_any_word_is_a_finish() -> None:
    """A finish with a word of the caller's own is completed, or failed if there is an error."""
    assert folded((A, 1, TrialStarted()), (A, 2, TrialFinished("great"))).status == "completed"
    state = folded((A, 1, TrialStarted()), (A, 2, TrialFinished("meh", "boom")))
    assert (state.status, state.raw_status, state.finished_ns) == ("failed", "meh", 2)


@pytest.mark.parametrize(("first", "second", "status"), [
    ("failed", "interrupted", "failed"),
    ("failed", "completed", "failed"),
    ("completed", "interrupted", "completed"),
    ("interrupted", "suspended", "suspended"),
])  # fmt: skip
def test_ranks_that_disagree(first: str, second: str, status: str) -> None:
    """Of several finishes a failure shows, then a completion, whichever came first; the last finish is the time."""
    starts: list[Recorded] = [(A, 1, TrialStarted()), (B, 2, TrialStarted(True))]
    state = folded(*starts, (A, 8, TrialFinished(first, "boom")), (B, 9, TrialFinished(second)))
    assert (state.status, state.error, state.finished_ns) == (status, "boom", 9)
    if second != "suspended":
        assert folded(*starts, (A, 8, TrialFinished(second)), (B, 9, TrialFinished(first))).status == status


def test_the_error_shown_is_that_of_the_finish_shown() -> None:
    """A later interruption doesn't hide why the other rank failed; without an error of its own the other's is shown."""
    starts: list[Recorded] = [(A, 1, TrialStarted()), (B, 2, TrialStarted(True))]
    failed, stopped = (
        (A, 8, TrialFinished("failed", "boom")),
        (B, 9, TrialFinished("interrupted", "signal 15")),
    )
    assert folded(*starts, failed, stopped).error == "boom"
    assert folded(*starts, (A, 8, TrialFinished("failed")), stopped).error == "signal 15"


def test_a_clock_set_back_does_not_undo_a_finish() -> None:
    """A writer's finish counts after its own start, although the clock says that it came before."""
    state = folded((A, 9, TrialStarted()), (A, 5, TrialFinished("completed")))
    assert (state.status, state.duration_s) == ("completed", 0.0)


HOUR = 3600 * SECOND


@pytest.mark.parametrize("jump", [-5 * HOUR, 0, 5 * HOUR])
def test_a_duration_does_not_come_from_a_clock_that_jumps(jump: int) -> None:
    """A trial that was started once lasted as long as its finish measured; of several starts, at least as long."""
    start, finish = (A, 9 * HOUR, TrialStarted()), (A, 9 * HOUR + jump, TrialFinished(seconds=2.0))
    assert folded(start, finish).duration_s == 2.0
    state = folded(
        start, (B, 9 * HOUR, TrialStarted(True)), finish, (B, 9 * HOUR, TrialFinished(seconds=3.0))
    )
    assert state.duration_s == max(3.0, jump / SECOND)
    assert folded(start, finish, (B, 20 * HOUR, TrialStarted(True))).duration_s == 11 * 3600


@pytest.mark.parametrize("noticed_ns", [3, 9, 30])
def test_lost_by_whatever_clock(noticed_ns: int) -> None:
    """Who knows a writer's last event can tell its end, whichever clock is behind; a later one shows that it lives."""
    way: list[Recorded] = [(A, 9, TrialStarted()), (A, 8, MetricsLogged({"m": 1}))]
    end = (CLAIMS, noticed_ns, ev.WriterEnded(A, noticed_ns, last=2))
    assert folded(*way, end).status == "lost"
    assert folded(*way, end, (A, 10, ev.Heartbeat(10.0))).status == "running"
    own = (A, noticed_ns, ev.WriterEnded(A, noticed_ns, "no finish"))
    assert folded(*way, own).status == "interrupted"


def test_resumed_after_a_finish() -> None:
    """A start after the finish makes it run again, and the later finish is what counts."""
    way: list[Recorded] = [
        (A, 1, TrialStarted()),
        (A, 2, TrialFinished("failed", "boom")),
        (B, 3, TrialStarted(True)),
    ]
    state = folded(*way)
    assert (state.status, state.error, state.finished_ns, state.started_ns) == ("running", None, None, 1)
    assert folded(*way, (B, 9, TrialFinished())).status == "completed"


def ended(writer: int, noticed_ns: int, reason: str = "lost") -> Recorded:
    return CLAIMS, noticed_ns, ev.WriterEnded(writer, noticed_ns, reason)


def test_lost() -> None:
    """A trial whose writer ended without a finish is lost; its last sign of life is what the duration ends at."""
    way: list[Recorded] = [
        (A, 1 * SECOND, TrialStarted()),
        (A, 3 * SECOND, MetricsLogged({"m": 1})),
        ended(A, 99 * SECOND),
    ]
    state = folded(*way)
    assert (state.status, state.raw_status, state.error) == ("lost", "running", None)
    assert (state.finished_ns, state.modified_ns, state.duration_s) == (None, 3 * SECOND, 2.0)
    assert folded(*way[:2], ended(A, 99 * SECOND, "killed by signal 9")).error == "killed by signal 9"
    assert folded(*reversed(way)).status == "lost"
    assert folded((A, 1, TrialCreated("p", "g", "n")), ended(A, 2)).status == "lost"


@pytest.mark.parametrize(("why", "way"), [
    ("it has finished", [(A, 1, TrialStarted()), (A, 2, TrialFinished()), ended(A, 9)]),
    ("another has finished it", [(A, 1, TrialStarted()), (B, 1, TrialStarted()), (B, 2, TrialFinished()), ended(A, 9)]),
    ("another runs it", [(A, 1, TrialStarted()), (B, 1, TrialStarted(True)), ended(A, 9)]),
    ("it had finished before", [(A, 1, TrialStarted()), (A, 2, TrialFinished()), (B, 3, TrialStarted()), ended(A, 9)]),
    ("the writer is unknown", [(A, 1, TrialStarted()), ended(B, 9)]),
    ("it was resumed", [(A, 1, TrialStarted()), ended(A, 9), (B, 10, TrialStarted(True))]),
    ("the writer lives after all", [(A, 1, TrialStarted()), ended(A, 9), (A, 10, ev.Heartbeat(10.0))]),
    ("somebody has closed the case", [(A, 1, TrialStarted()), ended(A, 9), (B, 10, StatusChanged("failed"))]),
    ("somebody has said something since", [(A, 1, TrialStarted()), ended(A, 9), (B, 10, StatusChanged("queued"))]),
])  # fmt: skip
def test_not_lost(why: str, way: list[Recorded]) -> None:
    """The end of a writer loses a trial only if it was the last that ran it, and nobody has said anything since."""
    assert folded(*way).status != "lost", why


def test_an_end_is_noticed_before_the_events_arrive() -> None:
    """The end of a writer may stand in the log before the events that its journal still held."""
    way: list[Recorded] = [ended(A, 9), (CLAIMS, 10, ev.NoteAdded("recovered")), (A, 1, TrialStarted())]
    assert shown(folded(*way), "status modified_ns") == ("lost", 10)


def test_lost_when_all_ranks_are_gone() -> None:
    """Each rank's end is noticed; only the last one loses the trial."""
    ranks: list[Recorded] = [(A, 1, TrialStarted()), (B, 2, TrialStarted(True)), ended(A, 8)]
    assert folded(*ranks).status == "running"
    assert folded(*ranks, ended(B, 9)).status == "lost"


# groups and projects --------------------------------------------------------------------------------------------


def subject(*told: Event, of: str = "g/p/g") -> SubjectFold:
    own = SubjectFold.new(of)
    for entry in stored(((A, n, event) for n, event in enumerate(told, 1)), of):
        assert own.apply(entry) is own
    return own


@given(LOGS, st.integers())
def test_subjects_in_any_grouping(log: list[StoredEvent], seed: int) -> None:
    """A group's own events give the same bytes in any grouping, and survive their encoding."""
    alone, own = SubjectFold.new("g/p/g"), SubjectFold.new("g/p/g")
    for entry in log:
        alone.apply(entry)
    for call in grouped(log, seed):
        own.fold(call)
        own = SubjectFold.decode("g/p/g", own.encode())
    assert own.encode() == alone.encode()


def trial(name: str, *recorded: Recorded) -> TrialState:
    made = TrialFold.new(name)
    for entry in stored(recorded, f"t/{name}"):
        apply(made, entry)
    return made.state()


def test_a_group_in_short() -> None:
    """Own fields, counts by status, what varies, the best and the last of each metric, and times."""
    own = subject(
        ev.GroupCreated("p", "g"),
        ev.DescriptionSet("why"),
        ev.TagsAdded({"t": 1}),
        ev.MetadataSet({"a": {"b": 1}}),
    )
    one = trial(
        "the first",
        (A, 10, TrialStarted()),
        (A, 11, ParamsSet({"lr": 0.1, "opt": {"name": "adam", "eps": 1}})),
        (A, 12, MetricsLogged({"loss": 3.0, "acc": 0.5})),
        (A, 20, MetricsLogged({"loss": 1.0})),
        (A, 21, TrialFinished()),
    )
    two = trial(
        "a second",
        (B, 5, TrialStarted()),
        (B, 6, ParamsSet({"lr": 0.01, "opt": {"name": "adam", "eps": 1.0}})),
        (B, 7, MetricsLogged({"loss": 2.0, "note": "text"})),
        (B, 30, TrialFinished("failed")),
    )
    group = group_state(own, "p", "g", [one, two])
    assert group == group_state(own, "p", "g", iter([two, one]))
    assert shown(group, "project name description tags metadata") == (
        "p",
        "g",
        "why",
        {"t": 1},
        {"a": {"b": 1}},
    )
    assert (group.trials, group.by_status) == (2, {"completed": 1, "failed": 1})
    assert group.params_varying == {"lr": [0.01, 0.1]}
    assert group.best == {
        "loss": {"min": Held(1.0, "the first"), "max": Held(3.0, "the first")},
        "acc": {"min": Held(0.5, "the first"), "max": Held(0.5, "the first")},
    }
    assert group.last == {
        "acc": Held(0.5, "the first"),
        "loss": Held(2.0, "a second"),
        "note": Held("text", "a second"),
    }
    assert (group.created_ns, group.modified_ns, group.started_ns, group.finished_ns) == (1, 30, 5, 30)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(group), type=type(group)) == group
    assert group.to_dict()["best"]["loss"]["min"] == {"value": 1.0, "trial": "the first"}


def test_a_group_that_runs_has_no_finish() -> None:
    """While one trial may go on, the group hasn't finished; a lost one doesn't go on."""
    done = trial("done", (A, 1, TrialStarted()), (A, 2, TrialFinished()))
    runs = trial("runs", (A, 1, TrialStarted()))
    lost = trial("lost", (A, 1, TrialStarted()), ended(A, 9))
    assert group_state(None, "p", "g", [done, runs]).finished_ns is None
    assert group_state(None, "p", "g", [done, lost]).finished_ns == 2


def test_a_group_without_trials() -> None:
    """A group that was only made, and one of which nothing was told."""
    empty = group_state(subject(ev.GroupCreated("p", "g")), "p", "g", [])
    assert shown(empty, "trials best created_ns started_ns finished_ns") == (0, {}, 1, None, None)
    assert group_state(None, "p", "g", []).modified_ns is None


def test_a_project_in_short() -> None:
    """A project counts the trials of each group."""
    trials = [
        trial(str(n), (A, n, TrialCreated("p", f"g{n % 2}", "n")), (A, n, TrialStarted())) for n in range(5)
    ]
    project = project_state(subject(ev.ProjectCreated("p"), of="p/p"), "p", reversed(trials))
    assert (project.groups, project.trials, project.by_status) == ({"g0": 3, "g1": 2}, 5, {"running": 5})
    assert (project.created_ns, project.started_ns) == (1, 0)


def test_what_varies_is_sorted_and_bounded() -> None:
    """Values of any types sort, equal numbers are one value, and no more than the limit are kept."""
    values: list[Any] = ["b", 2, None, True, 1.0, math.nan, [1], {}, "a", 1, math.nan]
    trials = [trial(str(n), (A, n, ParamsSet({"x": value, "n": n % 2}))) for n, value in enumerate(values)]
    varying = group_state(None, "p", "g", trials).params_varying
    assert repr(varying) == "{'n': [0, 1], 'x': [None, True, 1.0, 2, nan, 'a', 'b', {}, [1]]}"
    many = [trial(f"{n:04}", (A, n, ParamsSet({"seed": n}))) for n in range(VARYING_VALUES + 5)]
    assert group_state(None, "p", "g", many).params_varying == {"seed": list(range(VARYING_VALUES))}


# projections of the user's own ----------------------------------------------------------------------------------


class Longest(msgspec.Struct):
    seconds: float = 0.0
    name: str = ""


def longer(state: Longest, entry: StoredEvent) -> Longest:
    event = entry.event
    if isinstance(event, ev.ChronoFinished) and event.seconds > state.seconds:
        return Longest(event.seconds, event.name)
    return state


def test_a_projection_of_ones_own() -> None:
    """Two functions and a type make a projection; its states are written and read by msgspec."""
    projection = Projection("longest", 1, Longest, longer, Longest)
    state = projection.initial()
    for entry in stored(
        (A, n, ev.ChronoFinished(f"c{n}", seconds)) for n, seconds in enumerate([1.0, 3.0, 2.0])
    ):
        assert projection.key(entry) == ""
        state = projection.apply(state, entry)
    assert projection.decode(projection.encode(state)) == Longest(3.0, "c1")
