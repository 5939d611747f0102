"""Recovery: what killed writers left gets into the log, once, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import eventrun
from eventrun import recovery
from eventrun.codec import CLAIM_WRITER, Batch, ChainChecker, Stream, digest, encode, items_of, seal
from eventrun.errors import StoreUnavailable
from eventrun.events import Event, NoteAdded, WriterEnded
from eventrun.journal import segments_in
from eventrun.journal.scan import Found
from eventrun.portal import Portal
from eventrun.recorder import Recorder, Recording
from eventrun.recovery import RecoveryReport, recover_dead_writers
from eventrun.stores.base import READ_BYTES, Store, StoredBatch, Tip
from eventrun.stores.memory import MemoryStore
from eventrun.stores.sqlite import SqliteStore

Run = Callable[..., Any]
NEVER_MS = 1e9  # a linger after which nothing is flushed by itself
Log = dict[Stream, list[Event]]


@pytest.fixture
def portal() -> Iterator[Portal]:
    opened = Portal()
    yield opened
    opened.stop()


@pytest.fixture
def run(portal: Portal) -> Run:
    """Call a coroutine function on a loop like eventrun's own."""
    return lambda function, *arguments: portal.call(function, *arguments).result(60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def note(number: int) -> NoteAdded:
    return NoteAdded(f"number {number}")


class Killed(BaseException):
    """Stands for the death of the recovering process: nothing of eventrun handles it."""


class Wrapped:
    """A store of which each call may be watched, or fail."""

    folder: Path | None = None

    def __init__(self, inner: Store) -> None:
        self.inner = inner

    async def before(self, call: str) -> None:
        """Come before each call."""

    async def after(self, call: str) -> None:
        """Come after each call."""

    async def append(self, batches: Sequence[Batch], expected: Mapping[Stream, int] | None = None) -> int:
        await self.before("append")
        end = await self.inner.append(batches, expected)
        await self.after("append")
        return end

    async def read(
        self, after: int = 0, *, subject: str | None = None, limit_bytes: int = READ_BYTES
    ) -> list[StoredBatch]:
        await self.before("read")
        found = await self.inner.read(after, subject=subject, limit_bytes=limit_bytes)
        await self.after("read")
        return found

    async def tip(self, stream: Stream) -> Tip:
        await self.before("tip")
        tip = await self.inner.tip(stream)
        await self.after("tip")
        return tip

    async def end(self) -> int:
        return await self.inner.end()

    async def settle(self) -> None:
        await self.before("settle")
        await self.inner.settle()
        await self.after("settle")

    async def aclose(self) -> None:
        await self.inner.aclose()


class Deadly(Wrapped):
    """A store whose user is killed at its n-th moment: before or after one of the calls."""

    def __init__(self, inner: Store, moment: int) -> None:
        super().__init__(inner)
        self.left = moment

    async def before(self, call: str) -> None:
        if not self.left:
            raise Killed
        self.left -= 1

    after = before


class Writer:
    """A writer with streams, to be killed. `sent` is what it recorded, by stream."""

    def __init__(self, portal: Portal, store: Store, folder: Path) -> None:
        self.recorder = Recorder(portal, lambda: store, folder=folder, linger_ms=NEVER_MS)
        self.sent: Log = {}
        self.folder = folder / "journals" / f"{self.recorder.writer:016x}"

    def record(self, subject: str, *events: Event) -> None:
        stream: Recording = self.recorder.stream(subject)
        for event in events:
            stream.record(event)
        self.sent.setdefault(Stream(subject, self.recorder.writer), []).extend(events)

    def flush(self) -> None:
        self.recorder.flush().result(60)

    def kill(self) -> Path:
        """Leave all as a killed process does: files as they are, the lock let go."""
        self.recorder._folder.abandon()
        return self.folder


Kill = Callable[..., Writer]


@pytest.fixture
def writer(portal: Portal, folder: Path) -> Kill:
    """Make a writer with `trials` streams, each of `logged` events that the log has and `left` that it lacks."""

    def make(store: Store, trials: int = 3, logged: int = 0, left: int = 10) -> Writer:
        made = Writer(portal, store, folder)
        for first, last in ((0, logged), (logged, logged + left)):
            for trial in range(trials if last > first else 0):
                made.record(f"t/{trial}", *map(note, range(first, last)))
            if first == 0 and logged:
                made.flush()
        if left:
            made.record("p/p", *map(note, range(left)))  # a project's stream is nobody's trial
        return made

    return make


async def all_events(store: Store) -> Log:
    """Read a log to its end, checked: chained, contiguous from 1, without gaps."""
    found: Log = {}
    checker = ChainChecker()
    position = 0
    while batches := await store.read(position):
        for stored in batches:
            assert stored.position == position + 1
            header = stored.batch.header
            checker.check(stored.batch)
            events = found.setdefault(header.stream, [])
            assert header.first == len(events) + 1
            events.extend(event for _, event in items_of(stored.batch))
            position = stored.last_position
    return found


def is_recovered(log: Log, *writers: Writer) -> None:
    """Check that a log holds what these writers sent, and the end of each of their trials, once, and nothing else."""
    claims = {stream: events for stream, events in log.items() if stream.writer == CLAIM_WRITER}
    assert {stream: events for stream, events in log.items() if stream not in claims} == {
        stream: events for writer in writers for stream, events in writer.sent.items()
    }
    ended = sorted(
        (stream.subject, event.writer)
        for stream, events in claims.items()
        for event in events
        if isinstance(event, WriterEnded)
    )
    assert ended == sorted((s.subject, s.writer) for w in writers for s in w.sent if s.subject[0] == "t")
    assert sum(map(len, claims.values())) == len(ended)


# once ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("logged", "left"), [(0, 1), (0, 10), (1, 0), (1, 1), (10, 0), (10, 10)])
def test_what_the_log_lacks_is_taken_in(folder: Path, run: Run, writer: Kill, logged: int, left: int) -> None:
    """What a killed writer logged gets into the log behind what was there, its end is noted, its folder removed."""
    store = MemoryStore()
    killed = writer(store, 3, logged, left)
    path = killed.kill()
    report = run(recover_dead_writers, store, folder / "journals")
    assert report == RecoveryReport(writers=1, events=4 * left, problems=[])
    is_recovered(run(all_events, store), killed)
    assert not path.exists()


def test_twice_changes_nothing(folder: Path, run: Run, writer: Kill, tmp_path: Path) -> None:
    """Recovering again, also when the folder is there again as if its removal had been lost, appends nothing."""
    store = MemoryStore()
    killed = writer(store, 3, 5, 5)
    path = killed.kill()
    shutil.copytree(path, tmp_path / "copy")
    run(recover_dead_writers, store, folder / "journals")
    end = run(store.end)
    assert run(recover_dead_writers, store, folder / "journals") == RecoveryReport()
    for _ in range(3):
        shutil.copytree(tmp_path / "copy", path)
        report = run(recover_dead_writers, store, folder / "journals")
        assert report == RecoveryReport(writers=1)
        assert not path.exists()
        assert run(store.end) == end
    is_recovered(run(all_events, store), killed)


def test_several_writers(folder: Path, run: Run, writer: Kill) -> None:
    """Several killed writers of the same trials are all taken in; each trial's claim stream tells of each of them."""
    store = MemoryStore()
    writers = [writer(store, 2, n, 5) for n in range(4)]
    for each in writers:
        each.kill()
    report = run(recover_dead_writers, store, folder / "journals")
    assert (report.writers, report.events) == (4, 4 * 3 * 5)
    is_recovered(run(all_events, store), *writers)


def test_several_segments_and_batches(
    folder: Path, run: Run, writer: Kill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams of many segments, of which the log has some, become several batches, contiguous and chained."""
    monkeypatch.setattr(recovery, "BATCH_BYTES", 100_000)
    store = MemoryStore()
    killed = writer(store, 2, 3000, 20_000)
    assert len(list(killed.folder.glob("*.arena"))) >= 2
    killed.kill()
    batches = len(store._log)
    report = run(recover_dead_writers, store, folder / "journals")
    assert (report.events, report.problems) == (3 * 20_000, [])
    assert len(store._log) - batches >= 10
    is_recovered(run(all_events, store), killed)


# dying in the middle -------------------------------------------------------------------------------------------


def test_killed_at_each_call_of_the_store(folder: Path, run: Run, writer: Kill) -> None:
    """Wherever recovery dies, before or after any call of the store, the next one ends what it began."""
    log = MemoryStore()
    killed = writer(log, 2, 3, 4)
    path = killed.kill()
    aside = folder.with_name("aside")
    shutil.copytree(path, aside)
    held = run(log.read)
    moment, over = 0, False
    while not over:
        store = MemoryStore()
        run(store.append, [stored.batch for stored in held])
        shutil.copytree(aside, path, dirs_exist_ok=True)
        try:
            run(recover_dead_writers, Deadly(store, moment), folder / "journals")
            over = True
        except Killed:
            assert path.exists()
        report = run(recover_dead_writers, store, folder / "journals")
        assert report.problems == []
        is_recovered(run(all_events, store), killed)
        assert not path.exists()
        moment += 1
    assert moment > 20


def test_killed_while_the_folder_is_removed(
    folder: Path, run: Run, writer: Kill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recovery that dies while it removes the folder, whatever is still there, is ended by the next one."""
    for gone in range(4):
        shutil.rmtree(folder, ignore_errors=True)
        store = MemoryStore()
        killed = writer(store, 2, 3, 2000)
        path = killed.kill()
        assert len(list(path.iterdir())) >= 3

        def die(path: Path, gone: int = gone) -> None:
            arenas = sorted(path.glob("*.arena"), key=lambda arena: random.random())
            for arena in arenas[:gone]:
                arena.unlink()
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(recovery, "remove_folder", die)
            with pytest.raises(Killed):
                run(recover_dead_writers, store, folder / "journals")
        report = run(recover_dead_writers, store, folder / "journals")
        assert report == RecoveryReport(writers=1)
        is_recovered(run(all_events, store), killed)
        assert not path.exists()


RECOVERING = """
import sys, eventrun
client = eventrun.open(sys.argv[1])
print("begins", flush=True)
print(client.recovery().result().events, flush=True)
"""


@pytest.mark.crash
def test_killed_at_random_moments(folder: Path, run: Run, writer: Kill) -> None:
    """Five recovering processes are killed at random moments; after the sixth all is there, each trial's end once."""
    store = SqliteStore(folder)
    killed = writer(store, 30, 20, 30)
    killed.kill()
    run(store.aclose)
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", RECOVERING, folder], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.random() * 0.15)
        process.kill()
        process.stdout.close()
        assert process.wait() in (-signal.SIGKILL, 0)  # it may have come to its end
    store = SqliteStore(folder)
    assert run(recover_dead_writers, store, folder / "journals").problems == []
    is_recovered(run(all_events, store), killed)
    run(store.aclose)
    assert not any((folder / "journals").iterdir())


def test_two_recover_at_once(folder: Path, run: Run, writer: Kill) -> None:
    """Of several that recover at the same time each killed writer is taken in by one."""
    log = MemoryStore()
    writers = [writer(log, 3, n, 5) for n in range(3)]
    for each in writers:
        each.kill()

    class Slow(Wrapped):
        async def before(self, call: str) -> None:
            await asyncio.sleep(0)

    async def at_once() -> list[RecoveryReport]:
        return await asyncio.gather(*(recover_dead_writers(Slow(log), folder / "journals") for _ in range(4)))

    reports: list[RecoveryReport] = run(at_once)
    assert sum(report.writers for report in reports) == 3
    assert sum(report.events for report in reports) == 3 * 4 * 5
    assert all(report.problems == [] for report in reports)
    is_recovered(run(all_events, log), *writers)


# a store that fails --------------------------------------------------------------------------------------------


def test_an_unavailable_store(folder: Path, run: Run, writer: Kill) -> None:
    """A store that fails ends the recovery with its error; nothing is lost, and the next one takes all in."""

    class Failing(Wrapped):
        failing = True

        async def before(self, call: str) -> None:
            if call == "append" and self.failing:
                raise StoreUnavailable("not now")

    store = Failing(MemoryStore())
    killed = writer(MemoryStore(), 3, 0, 5)
    path = killed.kill()
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="not now"):
            run(recover_dead_writers, store, folder / "journals")
        assert path.exists()
    store.failing = False
    run(recover_dead_writers, store, folder / "journals")
    is_recovered(run(all_events, store), killed)


def test_another_claims_at_the_same_time(folder: Path, run: Run, writer: Kill) -> None:
    """Who claims a sequence of the trial's claim stream in between loses nothing, and the end is noted all the same."""
    store = MemoryStore()
    killed = writer(store, 1, 0, 5)
    killed.kill()
    claims = Stream("t/0", CLAIM_WRITER)
    others = [WriterEnded(n, n) for n in range(1, 4)]

    class Contested(Wrapped):
        async def after(self, call: str) -> None:
            tip = await self.inner.tip(claims)
            if call == "tip" and tip.sequence < len(others):
                item = encode((1, others[tip.sequence]))
                await self.inner.append([seal(claims, tip.sequence + 1, 1, item, 1, 1, tip.digest)])

    assert run(recover_dead_writers, Contested(store), folder / "journals").problems == []
    log = run(all_events, store)
    assert log[claims][:3] == others
    assert [event.writer for event in log[claims][3:]] == [killed.recorder.writer]


# whom to leave alone -------------------------------------------------------------------------------------------


def is_left_alone(folder: Path, run: Run, path: Path) -> None:
    before = {entry: entry.read_bytes() for entry in path.iterdir()}
    store = MemoryStore()
    assert run(recover_dead_writers, store, folder / "journals") == RecoveryReport()
    assert run(store.end) == 0
    assert {entry: entry.read_bytes() for entry in path.iterdir()} == before


def test_a_living_writer(folder: Path, run: Run, writer: Kill) -> None:
    """A journal whose writer lives is left alone, in this process and seen from another one."""
    store = MemoryStore()
    living = writer(store)
    is_left_alone(folder, run, living.folder)
    done = subprocess.run([sys.executable, "-c", RECOVERING, folder], capture_output=True, timeout=60)
    assert (done.stdout, done.stderr) == (b"begins\n0\n", b"")
    is_left_alone(folder, run, living.folder)
    living.flush()
    assert run(all_events, store) == living.sent


def test_another_hosts_writer(folder: Path, run: Run, writer: Kill) -> None:
    """A folder of another host is left alone, though its lock seems to be free; when it is this host's, it is taken."""
    killed = writer(MemoryStore())
    path = killed.kill()
    lock = path / "lock"
    mine = json.loads(lock.read_text())
    lock.write_text(json.dumps({**mine, "host": "elsewhere", "boot": "another"}))
    is_left_alone(folder, run, path)
    lock.write_text(json.dumps({**mine, "boot": "another"}))  # before this host was started again
    store = MemoryStore()
    run(recover_dead_writers, store, folder / "journals")
    is_recovered(run(all_events, store), killed)


def test_a_writer_about_to_begin(folder: Path, run: Run, writer: Kill) -> None:
    """A folder with a lock that is not in place yet, `lock.new`, is left alone."""
    path = writer(MemoryStore()).kill()
    (path / "lock").rename(path / "lock.new")
    is_left_alone(folder, run, path)
    for entry in path.glob("*.arena"):
        entry.unlink()
    is_left_alone(folder, run, path)


# damage --------------------------------------------------------------------------------------------------------


def flip(segment: Found, place: int) -> None:
    """Change a byte of a segment's file."""
    with segment.path.open("r+b") as file:
        file.seek(segment.base + place)
        byte = file.read(1)[0]
        file.seek(segment.base + place)
        file.write(bytes([byte ^ 0x5A]))


def segments_of(path: Path, subject: str) -> list[Found]:
    streams, problems = segments_in(path)
    assert problems == []
    return next(found for stream, found in streams.items() if stream.subject == subject)


def test_damage_is_told_and_kept(folder: Path) -> None:
    """What lies before a changed byte is taken in; a warning reaches the reader, once, and the rest is kept."""
    code = """
        import os, sys, signal, eventrun
        client = eventrun.open(sys.argv[1], linger_ms=1e8)
        trial, other = client.trial("p", name="n"), client.trial("p", name="other")
        for i in range(12_000):
            trial.log(i=i, step=i)
            other.log(i=i, step=i)
        print(trial.id)
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    (path,) = (folder / "journals").iterdir()
    segments = segments_of(path, f"t/{done.stdout.strip()}")
    damaged = next(s for s in segments if len(s.points) > 2)
    end, count, _ = damaged.points[1]
    flip(damaged, end + 1000)
    vouched = damaged.first - 1 + count - 2  # "created" and "started" come first

    with eventrun.open(folder) as client:
        with pytest.warns(RuntimeWarning, match="journal is damaged") as warned:
            state = client.get("n").result(60)
        assert len(warned) == 1
        assert f"up to sequence {vouched + 2}" in str(warned[0].message)
        assert list(client.history("n", "i").result(60).values) == list(range(vouched))
        assert state.status == "lost"
        assert list(client.history("other", "i").result(60).values) == list(range(12_000))
        report = client.verify().result(60)
        assert any(".damaged" in problem.where for problem in report.problems)
    kept = path.with_name(path.name + ".damaged")
    assert [entry.name for entry in (folder / "journals").iterdir()] == [kept.name]
    assert len(segments_of(kept, f"t/{done.stdout.strip()}")) == len(segments)
    with eventrun.open(folder) as client:
        assert client.get("n").result(60) == state
        assert client.recovery().result(60) == RecoveryReport()


def test_a_lost_segment(folder: Path, run: Run, writer: Kill) -> None:
    """When a segment in the middle is gone nothing is put together that wasn't, the gap is told, and the rest kept."""
    store = MemoryStore()
    killed = writer(store, 2, 0, 20_000)
    path = killed.kill()
    first, second, third, *_ = segments_of(path, "t/0")
    flip(second, 8)  # its header, in more than the one byte that its checksum can tell
    flip(second, 20)
    report = run(recover_dead_writers, store, folder / "journals")
    gap = f"sequences {first.first + second.first - 1} to {third.first - 1} are missing"
    assert any(gap in problem for problem in report.problems)
    log = run(all_events, store)
    stream = first.stream
    assert log[stream] == killed.sent[stream][: second.first - 1]
    other = Stream("t/1", stream.writer)
    assert log[other] == killed.sent[other]
    assert path.with_name(path.name + ".damaged").exists()


def test_a_log_that_says_otherwise(folder: Path, run: Run, writer: Kill) -> None:
    """Where log and journal hold different bytes for the same sequences, nothing is overwritten, and it is told."""
    killed = writer(MemoryStore(), 1, 0, 5)
    path = killed.kill()
    store = MemoryStore()
    stream = Stream("t/0", killed.recorder.writer)
    item = encode((1, note(99)))
    forged = seal(stream, 1, 1, item, 1, 1, bytes(16))
    run(store.append, [forged])
    report = run(recover_dead_writers, store, folder / "journals")
    assert len(report.problems) == 1
    assert "differ from the log" in report.problems[0]
    log = run(all_events, store)
    assert log[stream][0] == note(99)
    assert run(store.tip, stream) != Tip(0, digest(forged))
    assert path.with_name(path.name + ".damaged").exists()


def test_events_of_a_newer_version(folder: Path, run: Run, writer: Kill) -> None:
    """A journal with events that this version doesn't know is left for one that does; others need not wait for it."""
    store = MemoryStore()
    newer, older = writer(store, 1), writer(store, 2)
    stream = newer.recorder.stream("t/0")
    stream.append(encode((1, ["something-new", 1])))
    path = newer.kill()
    older.kill()
    report = run(recover_dead_writers, store, folder / "journals")
    assert len(report.problems) == 1
    assert "left for the next open" in report.problems[0]
    assert "upgrade eventrun" in report.problems[0]
    assert path.exists()
    assert not older.folder.exists()
    log = run(all_events, store)
    assert {stream: log[stream] for stream in older.sent} == older.sent


class Unsound(Wrapped):
    """A store that lost its tail and is damaged inside: SQLite has laid older pages over newer ones."""

    async def lost_tail(self) -> tuple[int, int] | None:
        return 100, 50

    async def check(self) -> list[str]:
        return ["row 7 is missing from an index"]


def test_nothing_is_appended_to_a_log_that_is_damaged_inside(folder: Path, run: Run, writer: Kill) -> None:
    """Where the end of the log is lost and its inside is damaged, journals stay as they are, and salvage is named."""
    store = MemoryStore()
    killed = writer(store, 1)
    path = killed.kill()
    left = {file: file.read_bytes() for file in path.iterdir()}
    end = run(store.end)
    report = run(recover_dead_writers, Unsound(store), folder / "journals")
    assert (report.writers, report.events) == (0, 0)
    assert "row 7 is missing" in report.problems[0]
    assert "eventrun salvage OUT" in report.problems[0]
    assert {file: file.read_bytes() for file in path.iterdir()} == left
    assert run(store.end) == end


# seen by others, and what it costs -------------------------------------------------------------------------------


def test_a_reader_that_runs_already_sees_it(folder: Path) -> None:
    """A client that has been reading for a while sees a writer's death without being opened anew."""
    with eventrun.open(folder, quiet=True) as watcher:
        assert list(watcher.trials()) == []
        code = (
            "import sys, eventrun; t = eventrun.open(sys.argv[1]).trial('p', name='n'); t.log(i=1); input()"
        )
        command = [sys.executable, "-c", code, str(folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            while not list(watcher.trials()):
                time.sleep(0.05)
            assert watcher.get("n").result(60).status == "running"
            process.kill()
        while (status := watcher.get("n").result(60).status) != "lost":
            assert status == "running"
            time.sleep(0.05)
        assert list(watcher.history("n", "i").result(60).values) == [1]


class Counting(Wrapped):
    """A store that counts the bytes of batches that were read."""

    count = 0

    async def read(
        self, after: int = 0, *, subject: str | None = None, limit_bytes: int = READ_BYTES
    ) -> list[StoredBatch]:
        found = await super().read(after, subject=subject, limit_bytes=limit_bytes)
        self.count += sum(len(stored.batch.frame) for stored in found)
        return found


def test_only_the_end_of_a_long_log_is_read(
    folder: Path, run: Run, writer: Kill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a journal still has is compared with the log; what lies before it, however long, isn't read."""
    monkeypatch.setattr(recovery, "FIRST_LOOK", 16)
    store = Counting(MemoryStore())
    stream = Stream("t/0", 0xAB)
    previous = bytes(16)
    for n in range(2000):  # another writer's long history of the same trial
        item = encode((n + 1, note(n))) * 50
        batch = seal(stream, 50 * n + 1, 50, item, n + 1, n + 1, previous, pack=False)
        previous = digest(batch)
        run(store.append, [batch])
    killed = writer(store, 2, 30, 40)
    killed.kill()
    assert run(recover_dead_writers, store, folder / "journals").problems == []
    log = run(all_events, store.inner)
    assert {each: log[each] for each in killed.sent} == killed.sent
    assert isinstance(store.inner, MemoryStore)
    whole = sum(len(stored.batch.frame) for stored in store.inner._log)
    assert store.count < whole / 20
