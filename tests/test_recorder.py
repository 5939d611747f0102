"""The recorder: from record() to the log, whatever the store does, and what is left when it ends."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from eventrun import recorder as recorder_module
from eventrun.codec import Batch, ChainChecker, Stream, encode, items_of, seal
from eventrun.errors import Closed, StoreError, StoreUnavailable
from eventrun.events import Event, NoteAdded
from eventrun.journal import segments
from eventrun.portal import Portal
from eventrun.recorder import Recorder
from eventrun.stores import open_store
from eventrun.stores.base import READ_BYTES, Store, StoredBatch, Tip
from eventrun.stores.memory import MemoryStore

LONG = 30.0  # seconds: how long to wait for what comes at once unless something is wrong
NEVER_MS = 1e8  # a linger after which nothing is flushed by itself
Log = dict[str, list[Event]]


def note(number: int) -> NoteAdded:
    return NoteAdded(f"number {number}")


class Wrapped:
    """A store whose calls may fail, hang or lose their answer."""

    folder: Path | None = None

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.calls: list[str] = []

    async def before(self, call: str) -> None:
        """Come before each call that changes something."""

    async def after(self, call: str) -> None:
        """Come after it."""

    async def append(self, batches: Sequence[Batch], expected: Mapping[Stream, int] | None = None) -> int:
        self.calls.append("append")
        await self.before("append")
        end = await self.inner.append(batches, expected)
        await self.after("append")
        return end

    async def read(
        self, after: int = 0, *, subject: str | None = None, limit_bytes: int = READ_BYTES
    ) -> list[StoredBatch]:
        return await self.inner.read(after, subject=subject, limit_bytes=limit_bytes)

    async def tip(self, stream: Stream) -> Tip:
        return await self.inner.tip(stream)

    async def end(self) -> int:
        return await self.inner.end()

    async def settle(self) -> None:
        self.calls.append("settle")
        await self.before("settle")
        await self.inner.settle()

    async def aclose(self) -> None:
        self.calls.append("aclose")
        await self.before("aclose")


class Broken(Wrapped):
    """A store that isn't to be had, or whose answers get lost, for some calls or until it is mended."""

    def __init__(self, inner: Store, *, lost: bool = False, error: Exception | None = None) -> None:
        super().__init__(inner)
        self.lost = lost
        self.error = error or StoreUnavailable("the disk is on strike")
        self.failures = 1_000_000

    def mend(self) -> None:
        self.failures = 0

    def fail(self, lost: bool) -> None:
        if self.lost is lost and self.failures > 0:
            self.failures -= 1
            raise self.error

    async def before(self, call: str) -> None:
        if call == "append":
            self.fail(False)

    async def after(self, call: str) -> None:
        self.fail(True)


class Hanging(Wrapped):
    """A store whose calls of one kind never end."""

    def __init__(self, inner: Store, hangs: str) -> None:
        super().__init__(inner)
        self.hangs = hangs

    async def before(self, call: str) -> None:
        if call == self.hangs:
            await asyncio.sleep(3600)

    async def after(self, call: str) -> None:
        if call == self.hangs.removesuffix(", lost"):
            await asyncio.sleep(3600)


class Hindered(Wrapped):
    """A store that never settles."""

    async def before(self, call: str) -> None:
        if call == "settle":
            raise StoreUnavailable("a reader hinders")


@pytest.fixture
def portal() -> Iterator[Portal]:
    opened = Portal()
    yield opened
    opened.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "runs"
    path.mkdir()
    return path


Make = Callable[..., Recorder]


@pytest.fixture
def make(portal: Portal, folder: Path) -> Make:
    """Make a recorder for a store, by default one that flushes nothing by itself."""

    def made(store: Store, **settings: Any) -> Recorder:
        return Recorder(portal, lambda: store, **{"folder": folder, "linger_ms": NEVER_MS, **settings})

    return made


@pytest.fixture
def logged(portal: Portal) -> Callable[[Store], Log]:
    """Read a log to its end, checked: chained, contiguous from 1; events by subject and writer."""

    async def read(store: Store) -> Log:
        found: Log = {}
        checker = ChainChecker()
        position = 0
        while batches := await store.read(position):
            for stored in batches:
                header = stored.batch.header
                checker.check(stored.batch)
                events = found.setdefault(f"{header.subject}@{header.writer:x}", [])
                assert header.first == len(events) + 1
                events.extend(event for _, event in items_of(stored.batch))
                position = stored.last_position
        return found

    return lambda store: portal.call(read, store).result(LONG)


Logged = Callable[[Store], Log]


def record(recorder: Recorder, subject: str, *numbers: int) -> None:
    stream = recorder.stream(subject)
    for number in numbers:
        stream.record(note(number))


def until(condition: Callable[[], object]) -> None:
    """Wait until something that happens on another thread is so."""
    waiting = threading.Event()
    for _ in range(3000):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it never became so")


def left_behind(folder: Path) -> list[Path]:
    return sorted((folder / "journals").glob("*"))


# flush and statistics ------------------------------------------------------------------------------------------


def test_flushed_is_seen_by_others(folder: Path, make: Make, logged: Logged, portal: Portal) -> None:
    """What was recorded before flush() is in the log for a second store that is open at the same time."""
    recorder = make(open_store(folder))
    other = open_store(folder)
    for end in range(1, 4):
        record(recorder, "t/a", *range(end * 10 - 10, end * 10))
        recorder.flush().result(LONG)
        assert logged(other) == {f"t/a@{recorder.writer:x}": [note(n) for n in range(end * 10)]}
    recorder.close().result(LONG)
    portal.call(other.aclose).result(LONG)


def test_all_is_flushed_by_itself(make: Make, logged: Logged) -> None:
    """Without any flush() what was recorded is durable soon."""
    store = MemoryStore()
    recorder = make(store, linger_ms=1.0)
    record(recorder, "t/a", 1, 2, 3)
    until(lambda: recorder.statistics().durable == 3)
    assert list(logged(store).values()) == [[note(1), note(2), note(3)]]


def test_nothing_is_begun_before_it_is_needed(portal: Portal, folder: Path) -> None:
    """A recorder asks for one store; until something is recorded it starts no thread and makes no folder."""
    opened: list[Store] = []

    def open_() -> Store:
        opened.append(Wrapped(MemoryStore()))
        return opened[-1]

    recorder = Recorder(portal, open_, folder=folder)
    assert (recorder.idle, recorder.untouched, recorder.statistics().recorded) == (True, True, 0)
    assert recorder.store is recorder.store
    assert (portal.started, left_behind(folder)) == (False, [])
    record(recorder, "t/a", 1)
    recorder.flush().result(LONG)
    assert (recorder.idle, recorder.untouched) == (False, False)
    assert recorder.close().result(LONG) == 0
    assert [recorder.store] == opened


def test_statistics_add_up(make: Make) -> None:
    """Recorded is durable or held; bytes held are those of the items; batches, commits and journals are counted."""
    recorder = make(MemoryStore())
    events = [note(n) for n in range(30)]
    for n, event in enumerate(events):
        recorder.stream(f"t/{n % 3}").record(event)
    before = recorder.statistics()
    size = sum(len(encode((2**62, event))) for event in events)
    assert (before.recorded, before.durable, before.dropped, before.streams) == (30, 0, 0, 3)
    assert (before.held_bytes, before.batches, before.commits) == (size, 0, 0)
    assert (before.acknowledgement, before.problem, before.last_error) == ("crash_safe", None, None)
    assert 0 < before.held_age_s < LONG
    assert before.journal_bytes > before.memory_bytes == 0
    assert before.writer == f"{recorder.writer:016x}"
    recorder.flush().result(LONG)
    flushed = recorder.statistics()
    assert (flushed.recorded, flushed.durable, flushed.held_bytes, flushed.held_age_s) == (30, 30, 0, 0.0)
    assert (flushed.batches, flushed.commits, flushed.failed_commits) == (3, 1, 0)
    record(recorder, "t/0", 1)
    assert (recorder.statistics().recorded, recorder.statistics().durable) == (31, 30)
    assert recorder.close().result(LONG) == 0
    closed = recorder.statistics()
    assert (closed.recorded, closed.durable, closed.batches, closed.commits, closed.settled) == (
        31,
        31,
        4,
        2,
        1,
    )


def test_streams_commit_together(make: Make, logged: Logged) -> None:
    """What many streams have is appended at once: a hundred batches, one commit."""
    store = Wrapped(MemoryStore())
    recorder = make(store)
    for n in range(100):
        record(recorder, f"t/{n}", *range(5))
    recorder.flush().result(LONG)
    found = recorder.statistics()
    assert (found.batches, found.commits, store.calls) == (100, 1, ["append"])
    assert list(logged(store).values()) == [[note(n) for n in range(5)]] * 100


def test_large_events_are_divided(make: Make, logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than fits into one batch becomes several, more than fits into one append several of these."""
    monkeypatch.setattr(recorder_module, "BATCH_BYTES", 200_000)
    monkeypatch.setattr(recorder_module, "COMMIT_BYTES", 1_000_000)
    store = MemoryStore()
    recorder = make(store)
    events = [NoteAdded(str(n) * 60_000) for n in range(60)]
    for event in events:
        recorder.stream("t/a").record(event)
    recorder.flush().result(LONG)
    assert list(logged(store).values()) == [events]
    found = recorder.statistics()
    assert found.batches >= 10
    assert 3 <= found.commits <= found.batches / 3


def test_many_threads(make: Make, logged: Logged) -> None:
    """What eight threads record, to one stream and to their own, is all there, each thread's in its order."""
    store = MemoryStore()
    recorder = make(store, linger_ms=1.0)

    def work(thread: int) -> None:
        for n in range(300):
            record(recorder, "t/all", thread * 1000 + n)
            record(recorder, f"t/{thread}", n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.flush().result(LONG)
    found = {key.partition("@")[0]: events for key, events in logged(store).items()}
    for number in range(8):
        assert found[f"t/{number}"] == [note(n) for n in range(300)]
        mine = {note(number * 1000 + n).text for n in range(300)}
        shared = [event for event in found["t/all"] if isinstance(event, NoteAdded) and event.text in mine]
        assert shared == [note(number * 1000 + n) for n in range(300)]
    assert len(found["t/all"]) == 8 * 300


# a store that fails --------------------------------------------------------------------------------------------

INNER: list[Any] = [
    pytest.param(lambda folder: MemoryStore(), id="memory"),
    pytest.param(open_store, id="sqlite"),
]


@pytest.mark.parametrize("lost", [False, True], ids=["unavailable", "answer-lost"])
@pytest.mark.parametrize("inner", INNER)
def test_an_append_that_fails(
    folder: Path, make: Make, logged: Logged, lost: bool, inner: Callable[[Path], Store]
) -> None:
    """A store that fails, or whose answers are lost, costs nothing and doubles nothing; why it fails is told."""
    store = Broken(inner(folder), lost=lost)
    recorder = make(store, linger_ms=1.0)
    record(recorder, "t/a", *range(10))
    until(lambda: recorder.statistics().failed_commits)
    assert recorder.last_error == "the disk is on strike"
    for n in range(10, 40):
        record(recorder, "t/a", n)
        record(recorder, "t/b", n)
        if n % 10 == 0:
            with pytest.raises(StoreUnavailable, match="on strike"):
                recorder.flush().result(LONG)
    found = recorder.statistics()
    assert (found.recorded, found.durable, found.last_error) == (70, 0, "the disk is on strike")
    assert found.failed_commits >= 4
    store.mend()
    recorder.flush().result(LONG)
    found = recorder.statistics()
    assert (found.recorded, found.durable, found.held_bytes, found.last_error) == (70, 70, 0, None)
    writer = recorder.writer
    assert logged(store) == {
        f"t/a@{writer:x}": [note(n) for n in range(40)],
        f"t/b@{writer:x}": [note(n) for n in range(10, 40)],
    }
    assert recorder.close().result(LONG) == 0
    assert left_behind(folder) == []


@pytest.mark.parametrize("lost", [False, True], ids=["unavailable", "answer-lost"])
@pytest.mark.parametrize(
    "error",
    [StoreUnavailable("gone"), StoreError("odd"), OSError("no space"), TypeError()],
    ids=lambda error: type(error).__name__,
)
def test_the_flusher_goes_on(make: Make, logged: Logged, error: Exception, lost: bool) -> None:
    """After any error of the store the flusher tries again by itself, and all gets there once."""
    store = Broken(MemoryStore(), lost=lost, error=error)
    recorder = make(store, linger_ms=1.0)
    record(recorder, "t/a", *range(10))
    until(lambda: recorder.statistics().failed_commits >= 2)
    assert recorder.statistics().last_error == (str(error) or repr(error))
    record(recorder, "t/a", *range(10, 20))
    store.mend()
    until(lambda: recorder.statistics().durable == 20)
    until(lambda: recorder.statistics().last_error is None)
    assert list(logged(store).values()) == [[note(n) for n in range(20)]]


def test_any_failures_in_any_order(make: Make, logged: Logged) -> None:
    """Appends that fail before or after they are done, at random, between any records and flushes, change nothing."""

    class Random(Broken):
        async def before(self, call: str) -> None:
            await asyncio.sleep(0)
            self.lost = random.random() < 0.5
            await super().before(call)

    store = Random(MemoryStore())
    recorder = make(store, linger_ms=1.0)
    sent: dict[str, list[Event]] = {f"t/{n}@{recorder.writer:x}": [] for n in range(5)}
    failed = 0
    for n in range(2000):
        subject = f"t/{random.randrange(5)}"
        record(recorder, subject, n)
        sent[f"{subject}@{recorder.writer:x}"].append(note(n))
        if n % 10 == 0:
            store.failures = random.randrange(3)
            try:
                recorder.flush().result(LONG)
            except StoreUnavailable:
                failed += 1
    store.mend()
    recorder.flush().result(LONG)
    assert failed > 50
    assert logged(store) == sent


def test_close_tries_again(folder: Path, make: Make, logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is unavailable for a moment while the recorder closes still gets all."""
    monkeypatch.setattr(recorder_module, "RETRY_MIN_S", 0.01)
    store = Broken(MemoryStore())
    store.failures = 3
    recorder = make(store)
    record(recorder, "t/a", *range(10))
    assert recorder.close().result(LONG) == 0
    assert list(logged(store).values()) == [[note(n) for n in range(10)]]
    assert left_behind(folder) == []


# the end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hangs", ["append", "append, lost", "failing"])
def test_what_is_left_when_the_store_hangs(folder: Path, make: Make, logged: Logged, hangs: str) -> None:
    """close() gives up in time and tells how many events the log may lack; the next open has each of them, once."""
    inner = MemoryStore()
    store = Broken(inner) if hangs == "failing" else Hanging(inner, hangs)
    recorder = make(store, close_timeout_s=0.1)
    record(recorder, "t/a", *range(10))
    record(recorder, "p/p", *range(5))
    assert recorder.close().result(LONG) == 15
    assert recorder.last_error is not None
    assert len(left_behind(folder)) == 1
    following = make(inner)
    done = following.portal.call(following.recover).result(LONG)
    assert (done.writers, done.problems) == (1, [])
    assert done.events == (0 if hangs == "append, lost" else 15)
    assert following.statistics().recovered == done.events
    assert logged(inner) == {  # and no word that the writer was lost: it was closed
        f"t/a@{recorder.writer:x}": [note(n) for n in range(10)],
        f"p/p@{recorder.writer:x}": [note(n) for n in range(5)],
    }
    assert left_behind(folder) == []


@pytest.mark.parametrize("hangs", ["settle", "aclose"])
def test_an_end_that_hangs(
    folder: Path, make: Make, logged: Logged, hangs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When settling or closing the store hangs, close() ends all the same, and nothing is left that the log lacks."""
    monkeypatch.setattr(recorder_module, "CLOSE_STORE_S", 0.1)
    inner = MemoryStore()
    recorder = make(Hanging(inner, hangs), close_timeout_s=0.1)
    record(recorder, "t/a", *range(10))
    assert recorder.close().result(LONG) == 0
    assert len(left_behind(folder)) == (1 if hangs == "settle" else 0)
    following = make(inner)
    report = following.portal.call(following.recover).result(LONG)
    assert (report.events, report.problems) == (0, [])
    assert logged(inner)[f"t/a@{recorder.writer:x}"] == [note(n) for n in range(10)]
    assert left_behind(folder) == []


def test_after_close(folder: Path, make: Make, logged: Logged) -> None:
    """After close() recording raises Closed, on streams old and new, and nothing is kept; closing again is one."""
    store = MemoryStore()
    recorder = make(store)
    record(recorder, "t/a", 1)
    closing = recorder.close()
    assert closing.result(LONG) == 0
    assert recorder.close() is closing
    for subject in ("t/a", "t/b"):
        with pytest.raises(Closed, match="open another"):
            record(recorder, subject, 2)
    assert recorder.statistics().recorded == 1
    assert left_behind(folder) == []


def test_closing_while_others_record(make: Make, portal: Portal) -> None:
    """While the recorder closes, each call that returns is in the log, and each that isn't raises Closed."""
    inner = MemoryStore()
    recorder = make(inner, linger_ms=1.0)
    returned = [0] * 4
    refused: list[int] = []
    began = threading.Barrier(5)

    def work(thread: int) -> None:
        record(recorder, f"t/{thread}", 0)
        returned[thread] = 1
        began.wait()
        try:
            while True:
                record(recorder, f"t/{thread}", returned[thread])
                returned[thread] += 1
        except Closed:
            refused.append(thread)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    began.wait()
    assert recorder.close().result(LONG) == 0
    for thread in threads:
        thread.join()
    assert sorted(refused) == [0, 1, 2, 3]
    writer = recorder.writer
    log = {stored.batch.header.subject: 0 for stored in inner._log}
    for stored in inner._log:
        assert stored.batch.header.writer == writer
        log[stored.batch.header.subject] += stored.batch.header.count
    assert [log[f"t/{n}"] for n in range(4)] == returned


def test_without_a_folder(make: Make) -> None:
    """Without a folder events are in memory alone: accepted, not crash_safe, and what is lost at close is told."""
    recorder = make(Hanging(MemoryStore(), "append"), folder=None, close_timeout_s=0.1)
    record(recorder, "t/a", *range(10))
    found = recorder.statistics()
    assert (found.acknowledgement, found.journal_bytes) == ("accepted", 0)
    assert found.memory_bytes > 0
    with pytest.warns(RuntimeWarning, match="events are lost"):
        assert recorder.close().result(LONG) == 0
    assert recorder.statistics().dropped == 10


# places that can't be written ----------------------------------------------------------------------------------


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_memory_is_saved_at_the_end(
    folder: Path, make: Make, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only memory holds when close() gives up is brought to a file, if one can be had by then."""
    inner = MemoryStore()
    recorder = make(Hanging(inner, "append"), close_timeout_s=0.1)
    record(recorder, "t/a", *range(10))
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.warns(RuntimeWarning, match="No space left"):
            record(recorder, "t/a", *range(10, 200_000))
        recorder.stream("t/b").record(NoteAdded("x" * 1_000_000))
        assert recorder.statistics().acknowledgement == "accepted"
    assert recorder.close().result(LONG) == 200_001
    assert recorder.statistics().dropped == 0
    following = make(inner)
    assert following.portal.call(following.recover).result(LONG).problems == []
    found = logged(inner)
    assert found[f"t/a@{recorder.writer:x}"] == [note(n) for n in range(200_000)]
    assert found[f"t/b@{recorder.writer:x}"] == [NoteAdded("x" * 1_000_000)]
    assert left_behind(folder) == []


def test_a_full_disk_makes_journals_give_back_what_they_can(
    make: Make, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When no more journals can be made, the log is settled, and what they hold already makes room: all is crash_safe
    again on a disk that stays full."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", (16 << 10,))
    monkeypatch.setattr(segments, "ARENA_BYTES", 64 << 10)
    monkeypatch.setattr(recorder_module, "RESCUE_S", 0.05)
    monkeypatch.setattr(recorder_module, "UPKEEP_S", 0.01)
    inner = MemoryStore()
    recorder = make(Wrapped(inner), linger_ms=1.0)
    record(recorder, "t/a", 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        record(recorder, "t/a", *range(1, 20_000))
    until(lambda: recorder.statistics().acknowledgement == "crash_safe")
    record(recorder, "t/a", *range(20_000, 20_100))
    assert recorder.statistics().acknowledgement == "crash_safe"
    assert recorder.close().result(LONG) == 0
    assert recorder.statistics().dropped == 0
    assert list(logged(inner).values()) == [[note(n) for n in range(20_100)]]


def test_no_room_anywhere(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With neither disk nor memory left a new stream's events are dropped, counted and told of; no call fails."""
    monkeypatch.setattr(segments, "MEMORY_BYTES", 20_000)
    recorder = make(MemoryStore(), folder=None)
    record(recorder, "t/a", 1, 2, 3)
    with pytest.warns(RuntimeWarning, match="events are lost"):
        record(recorder, "t/b", 1, 2, 3, 4)
    found = recorder.statistics()
    assert (found.recorded, found.dropped) == (3, 4)
    assert recorder.close().result(LONG) == 0


def test_a_journals_folder_that_cant_be_made(folder: Path, make: Make, logged: Logged) -> None:
    """Where journals can't be written events are accepted and become durable; why is in the statistics."""
    (folder / "journals").write_text("in the way")
    inner = MemoryStore()
    recorder = make(Wrapped(inner))
    with pytest.warns(RuntimeWarning, match="journals can't be written"):
        record(recorder, "t/a", *range(10))
    assert recorder.statistics().acknowledgement == "accepted"
    assert "journals" in (recorder.statistics().problem or "")
    assert recorder.close().result(LONG) == 0
    assert logged(inner)[f"t/a@{recorder.writer:x}"] == [note(n) for n in range(10)]


def test_journals_that_are_deleted(folder: Path, make: Make, logged: Logged) -> None:
    """Somebody deletes the journals while they are used: what is recorded reaches the log nevertheless."""
    inner = MemoryStore()
    recorder = make(Wrapped(inner))
    record(recorder, "t/a", *range(10))
    shutil.rmtree(folder)
    record(recorder, "t/a", *range(10, 50_000))
    assert recorder.close().result(LONG) == 0
    assert logged(inner)[f"t/a@{recorder.writer:x}"] == [note(n) for n in range(50_000)]


def test_no_thread_to_be_had(make: Make, logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started a log call works all the same; the flusher begins when one can."""
    inner = MemoryStore()
    recorder = make(inner)

    def no_thread(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        record(recorder, "t/a", *range(10))
        assert recorder.last_error == "can't start new thread"
    recorder.flush().result(LONG)
    assert logged(inner)[f"t/a@{recorder.writer:x}"] == [note(n) for n in range(10)]


def test_batches_are_chained_although_making_them_failed(
    make: Make, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the middle of making batches (no memory, say) leaves no gap in any stream's chain."""
    inner = MemoryStore()
    recorder = make(inner)
    for number in (1, 2):
        for subject in ("t/a", "t/b", "t/c"):
            record(recorder, subject, number)
        if number == 1:
            recorder.flush().result(LONG)
    calls = itertools.count()

    def failing(*arguments: Any, **options: Any) -> Batch:
        if next(calls) == 1:
            raise MemoryError
        return seal(*arguments, **options)

    monkeypatch.setattr(recorder_module, "seal", failing)
    with pytest.raises(MemoryError):
        recorder.flush().result(LONG)
    recorder.flush().result(LONG)
    assert set(map(len, logged(inner).values())) == {2}


def test_a_hindered_settle_hinders_nothing_else(
    folder: Path, make: Make, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that keeps the store from settling delays no flush and costs no event; the journals stay."""
    monkeypatch.setattr(recorder_module, "SETTLE_BYTES", 1000)
    inner = MemoryStore()
    recorder = make(Hindered(inner))
    for n in range(20):
        recorder.stream("t/a").record(NoteAdded("x" * 500))
        recorder.flush().result(LONG)
        assert recorder.statistics().durable == n + 1
    assert recorder.statistics().settled == 0
    assert recorder.close().result(LONG) == 0
    following = make(inner)
    report = following.portal.call(following.recover).result(LONG)
    assert (report.writers, report.events, report.problems) == (1, 0, [])
    assert left_behind(folder) == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells memory by /proc")
def test_a_backlog_doesnt_stay_in_memory(
    folder: Path, make: Make, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While an append hangs journals are made ahead all the same, and what they hold leaves this process's memory;
    all of it is appended in the end."""
    monkeypatch.setattr(recorder_module, "RESIDENT_BYTES", 2 << 20)
    monkeypatch.setattr(recorder_module, "UPKEEP_S", 0.01)
    inner = MemoryStore()
    store = Broken(inner)
    recorder = make(store, linger_ms=1.0)
    pad = "x" * 1000

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        found = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Rss"))
        return sum(int(found[kind].split()[0]) << 10 for kind in ("RssFile", "RssShmem"))

    before = resident()
    for n in range(64_000):
        recorder.stream(f"t/{n % 3}").record(NoteAdded(f"{n} {pad}"))
    assert recorder.statistics().held_bytes > 64_000_000
    until(lambda: resident() - before < 8 << 20)
    store.mend()
    recorder.flush().result(LONG)
    assert recorder.close().result(LONG) == 0
    found = logged(inner)
    for first in range(3):
        notes = [NoteAdded(f"{n} {pad}") for n in range(first, 64_000, 3)]
        assert found[f"t/{first}@{recorder.writer:x}"] == notes


def test_journals_are_made_ahead_while_an_append_hangs(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the store takes, the next segment is there before a log call needs it."""
    monkeypatch.setattr(recorder_module, "UPKEEP_S", 0.01)
    store = Hanging(MemoryStore(), "append")
    recorder = make(store, linger_ms=1.0, close_timeout_s=0.1)
    record(recorder, "t/a", 1)
    until(lambda: store.calls == ["append"])
    recorder.stream("t/a").record(NoteAdded("x" * 10_000))  # more than half of the first segment
    journal = recorder.stream("t/a").journal
    assert journal is not None
    until(lambda: journal._next is not None)
    assert recorder.close().result(LONG) == 2


# journals are given back ---------------------------------------------------------------------------------------


def test_an_ended_stream_gives_its_journal_back(
    folder: Path, make: Make, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the log is settled, streams that ended have no journal; a later record goes on with the next sequence."""
    monkeypatch.setattr(recorder_module, "SETTLE_BYTES", 1)
    store = Wrapped(MemoryStore())
    recorder = make(store)
    sent: list[Event] = []
    for round_ in range(3):
        events = [note(10 * round_ + n) for n in range(10)]
        for event in events:
            recorder.stream("t/ended").record(event)
        record(recorder, "t/goes-on", round_)
        sent += events
        recorder.flush().result(LONG)
        assert recorder.statistics().streams == 2
        recorder.end(recorder.stream("t/ended"))
        record(recorder, "t/goes-on", 100 + round_)  # something to settle
        recorder.flush().result(LONG)
        until(lambda: recorder.statistics().streams == 1)
        assert recorder.stream("t/ended").recorded == len(sent)
    assert store.calls.count("settle") >= 3
    assert logged(store)[f"t/ended@{recorder.writer:x}"] == sent
    assert (recorder.statistics().recorded, recorder.statistics().durable) == (36, 36)
    assert recorder.close().result(LONG) == 0


def test_a_killed_writer_had_ended_its_trial(
    folder: Path, make: Make, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that ended and was settled isn't told of its writer's death; one that goes on is."""
    monkeypatch.setattr(recorder_module, "SETTLE_BYTES", 1)
    store = MemoryStore()
    recorder = make(store)
    record(recorder, "t/ended", 1)
    record(recorder, "t/goes-on", 1)
    recorder.end(recorder.stream("t/ended"))
    recorder.flush().result(LONG)
    until(lambda: recorder.statistics().streams == 1)
    recorder._folder.abandon()  # as a kill does
    following = make(store)
    assert following.portal.call(following.recover).result(LONG).writers == 1
    assert {key for key in logged(store) if key.endswith("@0")} == {"t/goes-on@0"}


def test_a_stream_that_ended_but_isnt_settled_keeps_its_journal(make: Make) -> None:
    """As long as settling fails journals are kept, though the log holds all; then they are given back."""

    class Unsettled(Wrapped):
        failing = True

        async def before(self, call: str) -> None:
            if call == "settle" and self.failing:
                raise StoreUnavailable("somebody is reading")

    store = Unsettled(MemoryStore())
    recorder = make(store)
    for n in range(100):
        record(recorder, f"t/{n}", n)
        recorder.end(recorder.stream(f"t/{n}"))
    recorder.flush().result(LONG)
    until(lambda: recorder.last_error == "somebody is reading")
    assert recorder.statistics().streams == recorder.statistics().durable == 100
    store.failing = False
    record(recorder, "t/one-more", 1)
    recorder.flush().result(LONG)
    until(lambda: recorder.statistics().streams == 1)
    assert recorder.close().result(LONG) == 0


def test_idle_journals_are_given_back_when_there_are_many(
    make: Make, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above a bound of open journals idle streams give theirs back without having ended, and can go on."""
    monkeypatch.setattr(recorder_module, "MAX_OPEN_JOURNALS", 20)
    store = MemoryStore()
    recorder = make(store)
    for round_ in range(3):
        for n in range(30):
            record(recorder, f"t/{n}", round_)
        recorder.flush().result(LONG)
        until(lambda: recorder.statistics().streams <= 20)
    assert list(logged(store).values()) == [[note(0), note(1), note(2)]] * 30
    assert recorder.close().result(LONG) == 0


def test_while_journals_are_given_back(make: Make, logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records that come while their stream's journal is given back, again and again, are all there, in order."""
    monkeypatch.setattr(recorder_module, "SETTLE_BYTES", 1)
    store = MemoryStore()
    recorder = make(store, linger_ms=0.1)

    def work(thread: int) -> None:
        stream = recorder.stream(f"t/{thread}")
        for n in range(2000):
            stream.record(note(n))
            if n % 7 == 0:
                recorder.end(stream)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.flush().result(LONG)
    assert list(logged(store).values()) == [[note(n) for n in range(2000)]] * 4
    assert recorder.statistics().settled >= 1
    assert recorder.close().result(LONG) == 0
