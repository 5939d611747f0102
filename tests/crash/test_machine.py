"""14. Any sequence of calls, kills, cut-off files, resumed trials and rebuilds, beside a model of plain lists."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, ClassVar
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import eventrun
from eventrun import exits
from eventrun.codec import StoredEvent, Stream
from eventrun.errors import LogDamaged
from eventrun.events import (
    DescriptionSet,
    Event,
    GroupCreated,
    MetricsLogged,
    NoteAdded,
    ParamsSet,
    ProjectCreated,
    StatusChanged,
    TagsAdded,
    TagsRemoved,
    TrialCreated,
    TrialFinished,
    TrialStarted,
    WriterEnded,
    group_subject,
    project_subject,
    trial_subject,
)
from eventrun.journal import scan
from eventrun.journal.scan import Found, Recovered
from eventrun.journal.writing import Chunk, Journal
from eventrun.testing import events, plain_values, scalars
from eventrun.trial import Trial
from tests.crash.folding import folded, runs_of
from tests.crash.harness import FULL, LONG_S, Table, Tally, rounds

NEVER_MS = 1e8  # nothing is flushed by itself: what is in the log at a kill is known
STEPS = 40
CUT = {"journal": "journals/*/*.arena", "wal": "log.db-wal"}
CLAIMS = 0  # the writer of claim streams

WORDS = st.sampled_from(["a", "b", "größe", "x/y"])
CHANGES: st.SearchStrategy[Event] = st.one_of(
    st.builds(ParamsSet, st.dictionaries(WORDS, plain_values(), min_size=1, max_size=3)),
    st.builds(TagsAdded, st.dictionaries(WORDS, st.none() | WORDS, min_size=1, max_size=3)),
    st.builds(TagsRemoved, st.lists(WORDS, min_size=1, max_size=3)),
    st.builds(DescriptionSet, WORDS),
    st.builds(NoteAdded, WORDS),
    st.builds(StatusChanged, st.sampled_from(["running", "suspended", "odd"])),
)


class Handle:
    """A trial that a client holds, and what the model knows of it."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.started = False
        self.finished = False


class Writer:
    """An open client."""

    def __init__(self, client: eventrun.Client) -> None:
        self.client = client
        self.id = client._recorder.writer
        self.handles: list[Handle] = []
        self.known: set[str] = set()

    def drop(self) -> None:
        """Leave all as a killed process does: its lock is free, nothing more is written."""
        exits.forget(self.client)
        self.client._closed = True
        recorder = self.client._recorder
        if not recorder.untouched:
            recorder.portal.call(self._abandon).result(LONG_S)
            recorder.portal.stop()
        else:
            recorder._folder.abandon()

    async def _abandon(self) -> None:
        recorder = self.client._recorder
        recorder._gave_up = recorder._closed = True
        recorder._folder.abandon()
        await recorder.store.aclose()


def plainly(event: Event) -> str:
    """Show an event; by representation, so that NaN is equal to itself."""
    # When the end was noticed the model can't know.
    return repr(WriterEnded(event.writer, 0, event.reason) if isinstance(event, WriterEnded) else event)


class Machine(RuleBasedStateMachine):
    """`sent` holds, by stream, what calls that returned have recorded; `durable` and `settled` how much of it a flush
    has brought to the log, and a checkpoint to log.db; `least` what must be found of a dead writer's."""

    total = Tally()  # over all examples
    chance: ClassVar[random.Random]  # of ids: an example that fails must fail again

    def __init__(self) -> None:
        super().__init__()
        Machine.chance = random.Random(0)
        self.place = Path(mkdtemp(prefix="machine-"))
        self.store = self.place / "0"
        self.crashes = 0
        self.writers: list[Writer] = []
        self.ids: list[str] = []
        self.sent: dict[Stream, list[Event]] = {}
        self.durable: Counter[Stream] = Counter()
        self.settled: Counter[Stream] = Counter()
        self.least: dict[Stream, int] = {}
        self.to_be_ended: set[Stream] = set()  # of dead writers
        self.cuts: set[str] = set()  # what was cut off since all was taken in
        self.cut = False  # a file was cut off: what is lost must be told
        self.told: list[str] = []
        self.looking = False

    @initialize(mapped=st.booleans())
    def choose_journals(self, mapped: bool) -> None:
        """Mapped where the file system keeps its word, else written."""
        self.mapped = mapped
        self.open_client()

    def teardown(self) -> None:
        try:
            if not self.looking:  # else that is what has failed
                self.look_at_all(0)
        finally:
            for writer in self.writers:
                writer.drop()
            shutil.rmtree(self.place, ignore_errors=True)

    # what a user does -------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.writers) < 3)
    @rule()
    def open_client(self) -> None:
        client = eventrun.open(self.store, linger_ms=NEVER_MS, close_timeout_s=LONG_S, quiet=True)
        client._recorder._mapped = client._recorder._folder.mapped = self.mapped
        self.writers.append(Writer(client))

    @precondition(lambda self: self.writers)
    @rule(of=st.integers(0, 2), group=st.sampled_from(["", "g"]))
    def create(self, of: int, group: str) -> None:
        writer = self.writers[of % len(self.writers)]
        trial = writer.client.trial("p", group=group, name="n", params={"lr": 0.1})
        places: list[tuple[str, Event]] = [(project_subject("p"), ProjectCreated("p"))]
        if group:
            places.append((group_subject("p", group), GroupCreated("p", group)))
        for subject, event in places:
            if subject not in writer.known:
                writer.known.add(subject)
                self.note(writer, subject, event)
        subject = trial_subject(trial.id)
        self.note(writer, subject, TrialCreated("p", group, "n"), ParamsSet({"lr": 0.1}))
        writer.handles.append(Handle(trial))
        self.ids.append(trial.id)

    @precondition(lambda self: self.writers and self.ids)
    @rule(of=st.integers(0, 2), which=st.integers(0, 9))
    def resume(self, of: int, which: int) -> None:
        writer = self.writers[of % len(self.writers)]
        trial = writer.client.trial("p", resume=self.ids[which % len(self.ids)], tags=["again"])
        self.note(writer, trial_subject(trial.id), TagsAdded({"again": None}))
        writer.handles.append(Handle(trial))

    @precondition(lambda self: any(writer.handles for writer in self.writers))
    @rule(
        at=st.integers(0, 99),
        values=st.dictionaries(WORDS, scalars(), min_size=1, max_size=3),
        step=st.none() | st.integers(0, 9) | st.floats(),
        times=st.sampled_from([1, 1, 2, 30]),
    )
    def log(self, at: int, values: dict[str, Any], step: Any, times: int) -> None:
        writer, handle = self.handle(at)
        for _ in range(times):
            handle.trial.log(values, step=step)
            self.begun(writer, handle)
            event = MetricsLogged(values, step, late=handle.finished)
            self.note(writer, trial_subject(handle.trial.id), event)

    @precondition(lambda self: any(writer.handles for writer in self.writers))
    @rule(at=st.integers(0, 99), some=st.lists(CHANGES | events(), min_size=1, max_size=5))
    def record(self, at: int, some: list[Event]) -> None:
        writer, handle = self.handle(at)
        for event in some:
            handle.trial.record(event)
            self.note(writer, trial_subject(handle.trial.id), event)

    @precondition(lambda self: any(writer.handles for writer in self.writers))
    @rule(at=st.integers(0, 99), status=st.sampled_from(["completed", "failed"]))
    def finish(self, at: int, status: str) -> None:
        writer, handle = self.handle(at)
        if handle.finished:
            return
        handle.trial.finish(status)
        handle.finished = True
        self.note(writer, trial_subject(handle.trial.id), TrialFinished(status))

    @precondition(lambda self: self.writers)
    @rule(of=st.integers(0, 2))
    def flush(self, of: int) -> None:
        writer = self.writers[of % len(self.writers)]
        writer.client.flush().result(LONG_S)
        self.is_durable(writer)

    @precondition(lambda self: self.writers)
    @rule(of=st.integers(0, 2))
    def settle(self, of: int) -> None:
        """As the flusher does after many bytes: what is durable must not need the write-ahead file any more."""
        recorder = self.writers[of % len(self.writers)].client._recorder

        async def settle() -> bool:
            return await recorder._begin_settling()

        assert recorder.portal.call(settle).result(LONG_S)
        self.settled |= self.durable

    @precondition(lambda self: self.writers)
    @rule(of=st.integers(0, 2))
    def close(self, of: int) -> None:
        writer = self.writers.pop(of % len(self.writers))
        for handle in writer.handles:
            if handle.started and not handle.finished:
                ended: Event = TrialFinished("interrupted", "no finish")
                if handle.trial.resumed:
                    ended = WriterEnded(writer.id, 0, "no finish")
                self.note(writer, trial_subject(handle.trial.id), ended)
        writer.client.close()
        for stream in self.streams(writer):
            self.durable[stream] = self.settled[stream] = self.least[stream] = len(self.sent[stream])

    @precondition(lambda self: self.writers)
    @rule(of=st.integers(0, 2), trial=st.integers(0, 9))
    def rebuild(self, of: int, trial: int) -> None:
        """Views made anew, all or one trial's, are those that catching up has made."""
        self.look_at_all(of)  # what dead writers left is taken in
        writer = self.writers[of % len(self.writers)]
        before = self.digest(writer)
        known = list(writer.client.trials())
        some = known[trial].id if trial < len(known) else None
        end = writer.client.rebuild(some).result(LONG_S)
        assert end == sum(1 for _ in writer.client.events())
        assert self.digest(writer) == before
        self.is_durable(writer)

    # what happens to a user -------------------------------------------------------------------------------------

    @precondition(lambda self: self.writers)
    @rule(of=st.integers(0, 2))
    def kill_one(self, of: int) -> None:
        writer = self.writers.pop(of % len(self.writers))
        writer.drop()
        self.is_dead(writer)

    @rule(
        more=st.sampled_from([0, 1, 10, 60]),
        then=st.sampled_from(["nothing", "flush", "look"]),
        cuts=st.dictionaries(st.sampled_from(sorted(CUT)), st.integers(0, 999)),
        look=st.booleans(),
    )
    def kill_all(self, more: int, then: str, cuts: dict[str, int], look: bool) -> None:
        """All processes are killed, perhaps in the middle of work, and perhaps the ends of files are gone."""
        if not self.writers:
            self.open_client()
        if more:
            if not any(writer.handles for writer in self.writers):
                self.create(more, "")
            self.log(more, {"text": "x" * 100}, None, more)
        if then == "flush":
            self.flush(more)
        elif then == "look":
            self.look_at_all(more)
        self.crashes += 1
        to = self.place / str(self.crashes)
        if self.store.exists():
            shutil.copytree(self.store, to)  # what lies there now
        for writer in self.writers:
            writer.drop()
            self.is_dead(writer)
        self.writers = []
        shutil.rmtree(self.store, ignore_errors=True)
        self.store = to
        self.cut_off(cuts)
        if look:
            self.look_at_all(0)

    def cut_off(self, cuts: dict[str, int]) -> None:
        """Cut off the ends of files, after so many thousandths; what may be lost then is what nothing else holds."""
        for what, thousandths in cuts.items():
            found = [file for file in sorted(self.store.glob(CUT[what])) if file.stat().st_size]
            if found:
                file = found[thousandths % len(found)]
                os.truncate(file, file.stat().st_size * thousandths // 1000)
                self.cuts.add(what)
        self.cut = self.cut or bool(self.cuts)
        for stream, least in self.least.items():  # also of those that died before, and were not taken in yet
            if self.cuts == {"journal", "wal"}:
                least = min(least, self.settled[stream])
            elif self.cuts == {"journal"}:
                least = min(least, self.durable[stream])
            self.least[stream] = least
        if "journal" in self.cuts:
            self.to_be_ended.clear()

    # what is found ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.sent)
    @rule(of=st.integers(0, 2))
    def look_at_all(self, of: int) -> None:
        """Each stream gives back what was sent, up to some point not before what was acknowledged; views agree."""
        if not self.writers:
            self.open_client()
        writer = self.writers[of % len(self.writers)]
        client = writer.client
        self.looking = True
        try:
            report = client.recovery().result(LONG_S)
        except LogDamaged as error:  # all of the log was in the write-ahead file; to do as the error says
            if "is missing or empty" not in str(error) or "wal" not in self.cuts:
                raise
            self.told.append(str(error))
            (self.store / "log.mark").unlink()
            report = client.recovery().result(LONG_S)
        self.told += report.problems
        self.cuts = set()
        found = list(client.events())
        self.is_durable(writer)
        self.compare(found)
        assert self.digest(writer) == folded(self.as_sent(found))
        self.states_agree(client, found)
        verified = client.verify(views=True).result(LONG_S)
        assert verified.views_ok is not False
        assert self.cut or verified.ok, verified.problems
        assert self.cut or not self.told, self.told
        assert len(found) == verified.end == verified.events or self.cut
        self.looking = False

    def compare(self, found: list[StoredEvent]) -> None:
        """Hold what is in the log against what was sent; what dead writers lost is lost from now on."""
        streams: dict[Stream, list[Event]] = {}
        for stored in found:
            log = streams.setdefault(stored.stream, [])
            log.append(stored.event)
            assert stored.sequence == len(log)
        claims = {stream: log for stream, log in streams.items() if stream.writer == CLAIMS}
        self.check_claims(claims)
        alive = {writer.id for writer in self.writers}
        lost = False
        for stream in (streams.keys() - claims.keys()) | self.sent.keys():
            log, sent = streams.get(stream, []), self.sent.get(stream, [])
            assert list(map(plainly, log)) == list(map(plainly, sent[: len(log)])), stream
            least = self.durable[stream] if stream.writer in alive else self.least[stream]
            type(self).total = self.total.plus(Tally(least, len(log), max(0, least - len(log))))
            assert len(log) >= least, stream
            if stream.writer not in alive:
                lost = lost or len(log) < len(sent)
                self.sent[stream] = sent[: len(log)]
                self.durable[stream] = self.settled[stream] = self.least[stream] = len(log)
        assert self.cut or not lost
        assert self.told or not lost, "events are lost, and nobody said so"

    def check_claims(self, claims: dict[Stream, list[Event]]) -> None:
        ended = Counter[Stream]()
        for stream, log in claims.items():
            for event in log:
                assert isinstance(event, WriterEnded)
                ended[Stream(stream.subject, event.writer)] += 1
        assert all(count == 1 for count in ended.values())
        assert ended.keys() <= self.sent.keys()
        assert self.to_be_ended <= ended.keys()
        alive = {writer.id for writer in self.writers}
        assert not any(stream.writer in alive for stream in ended)

    def states_agree(self, client: eventrun.Client, found: list[StoredEvent]) -> None:
        """What the views tell of each trial is what the model counts."""
        counts = Counter(stored.stream.subject for stored in found)
        values: dict[tuple[str, str], list[str]] = {}
        for stored in found:
            if isinstance(stored.event, MetricsLogged):
                for name, value in stored.event.values.items():
                    key = stored.event.subset + "/" + name if stored.event.subset else name
                    values.setdefault((stored.stream.subject, key), []).append(repr(value))
        states = {trial_subject(state.id): state for state in client.trials()}
        assert {subject: count for subject, count in counts.items() if subject[0] == "t"} == {
            subject: state.events for subject, state in states.items()
        }
        for (subject, name), logged in list(values.items())[:3]:
            assert states[subject].metrics[name].count == len(logged)
            series = client.history(subject[2:], name).result(LONG_S)
            assert list(map(repr, series.values)) == logged

    @invariant()
    def statistics_add_up(self) -> None:
        for writer in self.writers:
            counted = writer.client.statistics()
            streams = self.streams(writer)
            assert counted.recorded == sum(len(self.sent[stream]) for stream in streams)
            assert counted.durable == sum(self.durable[stream] for stream in streams)
            assert counted.dropped == counted.memory_bytes * self.mapped == 0
            assert bool(counted.held_bytes) == (counted.durable < counted.recorded)
            assert counted.acknowledgement == "crash_safe"

    # the model --------------------------------------------------------------------------------------------------

    def note(self, writer: Writer, subject: str, *some: Event) -> None:
        self.sent.setdefault(Stream(subject, writer.id), []).extend(some)

    def begun(self, writer: Writer, handle: Handle) -> None:
        if not handle.started:
            handle.started = True
            if not handle.finished:
                started = TrialStarted(handle.trial.resumed)
                self.note(writer, trial_subject(handle.trial.id), started)

    def handle(self, at: int) -> tuple[Writer, Handle]:
        some = [(writer, handle) for writer in self.writers for handle in writer.handles]
        return some[at % len(some)]

    def streams(self, writer: Writer) -> list[Stream]:
        return [stream for stream in self.sent if stream.writer == writer.id]

    def is_durable(self, writer: Writer) -> None:
        for stream in self.streams(writer):
            self.durable[stream] = len(self.sent[stream])

    def is_dead(self, writer: Writer) -> None:
        for stream in self.streams(writer):
            self.least[stream] = len(self.sent[stream])
            if stream.subject[0] == "t":
                self.to_be_ended.add(stream)

    def as_sent(self, found: list[StoredEvent]) -> Iterator[tuple[Stream, list[tuple[int, Event]]]]:
        """The log's order and times with the model's events: what a fold is made of that trusts no log."""
        return runs_of(
            stored
            if stored.stream.writer == CLAIMS or isinstance(stored.event, WriterEnded)
            else stored._replace(event=self.sent[stored.stream][stored.sequence - 1])
            for stored in found
        )

    @staticmethod
    def digest(writer: Writer) -> str:
        views = writer.client._reader().views

        def caught_up() -> str:
            views.catch_up()
            return views.digest()

        writer.client.flush().result(LONG_S)
        return writer.client._portal.read(caught_up).result(LONG_S)


@contextlib.contextmanager
def small_journals() -> Iterator[None]:
    """Segments so small that a few dozen events fill them, and some in each file."""
    sizes = mock.patch.multiple(
        "eventrun.journal.segments",
        SEGMENT_BYTES=(4096, 8192), WRITTEN_SEGMENT_BYTES=(4096, 8192), ARENA_BYTES=16384, WRITTEN_ARENA_BYTES=16384,
    )  # fmt: skip
    with sizes, mock.patch("eventrun.journal.writing.MARK_BYTES", 512), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", RuntimeWarning
        )  # of damaged journals: the same texts are in the report
        yield


def _id_bytes(count: int) -> bytes:
    return Machine.chance.randbytes(count)


@contextlib.contextmanager
def as_machines_need() -> Iterator[None]:
    """Small journals, and ids that are the same again."""
    ids = mock.patch("os.urandom", _id_bytes)
    with small_journals(), ids:
        yield


@pytest.mark.crash
def test_any_sequence_of_calls_and_kills(table: Table) -> None:
    """Whatever is called, killed, cut off and rebuilt in whatever order: each stream comes back as it was sent."""

    class Whole(Machine):
        total = Tally()

    examples = rounds(8, 1000)
    chosen = settings(
        max_examples=examples, stateful_step_count=STEPS, deadline=None, database=None, derandomize=not FULL,
        suppress_health_check=list(HealthCheck), print_blob=True,
    )  # fmt: skip
    with as_machines_need():
        run_state_machine_as_test(Whole, settings=chosen)
    table.add(14, "random calls, kills, cut-off files", examples, Whole.total)
    assert Whole.total.good


def released_at_once(self: Journal, chunk: Chunk) -> None:
    """Give segments back as soon as a batch is in the log, which the write-ahead file alone holds then."""
    CONFIRM(self, chunk)
    self.release(chunk.first + chunk.events - 1)


def all_but_the_last(segment: Found, logged: bytes, logged_count: int, **more: Any) -> Recovered:
    """Take the last item for one whose call had not returned."""
    found = RECOVER(segment, logged, logged_count, **more)
    if found.events < 2:
        return found
    _, end = scan.count_items(found.payload, 0, len(found.payload), most=found.events - 1)
    return found._replace(
        events=found.events - 1, payload=found.payload[:end], cuts=[(end, found.events - 1)]
    )


CONFIRM, RECOVER = Journal.confirm, scan.recover


def nothing_said(*_: object) -> None:
    """Find nothing wrong."""


BROKEN: dict[str, dict[str, Any]] = {
    "journal released before the checkpoint": {"eventrun.journal.writing.Journal.confirm": released_at_once},
    "last item of a journal not taken in": {"eventrun.recovery.recover": all_but_the_last},
    "views of another log kept": {
        "eventrun.projector.Views._check_same_log": nothing_said,
        "eventrun.projector.Views.drop_if_ahead": nothing_said,
    },
}


def one_sequence() -> None:
    """A sequence of calls in which each of these faults shows."""
    machine = Machine()
    machine.choose_journals(mapped=True)
    try:
        machine.create(0, "")
        machine.create(0, "g")
        machine.log(1, {"a": 1}, None, 1)
        machine.flush(0)
        machine.settle(0)  # or the log as such is in the write-ahead file too
        machine.log(1, {"a": 2}, None, 1)
        machine.flush(0)
        machine.log(0, {"a": 2}, None, 60)
        machine.look_at_all(0)
        machine.statistics_add_up()
        machine.kill_all(more=60, then="flush", cuts={"wal": 0}, look=True)
        machine.kill_all(more=10, then="nothing", cuts={}, look=True)
    finally:
        machine.teardown()


@pytest.mark.crash
@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_broken_is_caught(broken: str, table: Table) -> None:
    """The test above can fail: where something is broken the same sequence of calls shows it."""
    with as_machines_need(), contextlib.ExitStack() as patches:
        one_sequence()
        for place, instead in BROKEN[broken].items():
            patches.enter_context(mock.patch(place, instead))
        with pytest.raises(AssertionError):
            one_sequence()
    table.caught(14, broken, 1, 1)
