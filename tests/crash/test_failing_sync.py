"""5. EIO of fsync and of writes: once, a few times, for ever.

After a failed fsync the kernel takes the pages for written, though they aren't on the disk: the next fsync succeeds. So
it must not be asked again: the connection is not used any more, and what is held is written again through another.
The trace of the calls shows whether that is so, and what a power cut would leave.
"""

from __future__ import annotations

import random
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

import eventrun
from tests.crash.harness import FULL, Table, Tally, compare, logged, needs, rounds
from tests.crash.starter import Starter
from tests.crash.test_kill import RECOVER
from tests.crash.test_kill_at_writes import starter as starter

EVENTS = 40

# The file `acknowledged` shows in the trace when a flush has returned.
LOGGING = f"""
import os, sys, eventrun
settle_bytes, end, store, acknowledged = sys.argv[1:]
eventrun.recorder.SETTLE_BYTES = int(settle_bytes)
client = eventrun.open(store, linger_ms=10_000, close_timeout_s=1, quiet=True)
told = os.open(acknowledged, os.O_CREAT | os.O_WRONLY)
trial = client.trial("crash", name=os.path.basename(acknowledged))
for i in range({EVENTS}):
    trial.log({{"i": i, "pad": "x" * 300}})
    if i % 4 == 3:
        try:
            client.flush().result()
            os.write(told, b"%d\\n" % (i + 1))
        except eventrun.StoreError:
            pass
if end == "exit":
    os._exit(0)
client.close()
"""


class Call(NamedTuple):
    """A call as strace saw it."""

    name: str
    descriptor: str
    file: str  # its name without the folder
    worked: bool
    data: bytes
    numbers: list[int]


def calls(trace: Path) -> Iterator[Call]:
    """Read strace's output (-y -xx)."""
    begun: dict[str, str] = {}
    for line in trace.read_text("ascii").splitlines():
        process, _, text = line.partition(" ")
        text = text.strip()
        if text.endswith("<unfinished ...>"):
            begun[process] = text.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>", text):
            text = begun.pop(process) + text[resumed.end() :]
        found = re.match(r"(\w+)\((?:(\d+)<([^>]*)>)?(.*)\) += (.*)", text)
        if found is None:  # "+++ killed by SIGKILL +++"
            continue
        name, descriptor, path, rest, result = found.groups()
        quoted = re.search(r'"([^"]*)"', rest)
        data = _unquoted(quoted[1]) if quoted else b""
        file = Path(_unquoted(path).decode() if path else data.decode() if name == "unlink" else "").name
        numbers = [int(number) for number in re.findall(r", (\d+)", rest)]
        worked = not result.startswith(("-", "?"))  # "?": killed in a sync that was to fail
        yield Call(name, descriptor or "", file, worked, data, numbers)


def _unquoted(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def retried(trace: Path) -> list[Call]:
    """Find the syncs of a descriptor on which one has failed."""
    failed: set[str] = set()
    making = False  # SQLite makes the database with a rollback journal, and after a failure rolls back and syncs that
    found = []
    for call in calls(trace):
        if call.file == "log.db-journal":
            making = call.name != "unlink"
        elif call.name == "close":
            failed.discard(call.descriptor)
        elif call.name in ("fdatasync", "fsync") and not making:
            if call.descriptor in failed:
                found.append(call)
            if not call.worked:
                failed.add(call.descriptor)
    return found


PAGE = 4096


class Disk:
    """What processes read of some files, and what a power cut leaves: what was synced, and nothing else.

    A failed sync takes the changed pages for written. They reach the disk only if they are written to once more.
    """

    def __init__(self) -> None:
        self.cache: dict[str, bytearray] = {}
        self.disk: dict[str, bytearray] = {}
        self.changed: dict[str, set[int]] = {}
        self.acknowledged: dict[str, int] = {}

    def replay(self, call: Call) -> bool:
        """Do what a call did; tell whether the disk is another now."""
        file = call.file
        if call.name == "write" and call.worked:
            self.acknowledged[file] = int(call.data)
        elif call.name == "pwrite64" and call.worked:
            self._write(file, call.data, call.numbers[-1])
        elif call.name == "ftruncate" and call.worked:
            cache = self.cache.setdefault(file, bytearray())
            del cache[call.numbers[-1] :]
            cache.extend(bytes(call.numbers[-1] - len(cache)))
        elif call.name in ("fdatasync", "fsync") and file.startswith("log.db"):
            changed = self.changed.pop(file, set())
            if call.worked:
                self._store(file, changed)
            return call.worked
        elif call.name == "unlink":
            for files in (self.cache, self.disk, self.changed):
                files.pop(file, None)
            return True
        return False

    def _write(self, file: str, data: bytes, at: int) -> None:
        cache = self.cache.setdefault(file, bytearray())
        cache.extend(bytes(max(at - len(cache), 0)))
        cache[at : at + len(data)] = data
        self.changed.setdefault(file, set()).update(range(at // PAGE, (at + len(data) - 1) // PAGE + 1))

    def _store(self, file: str, changed: set[int]) -> None:
        cache, disk = self.cache.setdefault(file, bytearray()), self.disk.setdefault(file, bytearray())
        disk.extend(bytes(max(len(cache) - len(disk), 0)))
        del disk[len(cache) :]
        for page in changed:
            disk[page * PAGE : (page + 1) * PAGE] = cache[page * PAGE : (page + 1) * PAGE]

    def look(self, place: Path) -> Tally:
        """Cut the power: open what is left then, and hold it against what had been acknowledged."""
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for file, data in self.disk.items():
            (place / file).write_bytes(data)
        found: dict[str, list[object]] = {}
        if self.disk.get("log.db"):
            with eventrun.open(place, quiet=True) as client:
                try:
                    found = logged(client)
                except eventrun.StoreError as error:
                    return Tally(sum(self.acknowledged.values()), lost=1, reported=(str(error),))
        total = Tally()
        for name, acknowledged in self.acknowledged.items():
            total = total.plus(compare(EVENTS, acknowledged, found.get(name, [])))
        return total


def cut(traces: Sequence[Path], place: Path, times: int, last: Mapping[str, int] | None = None) -> Tally:
    """Cut the power after some of the steps that have changed the disk, or something was acknowledged.

    After the last one as much must be there as `last` says, if it says anything.
    """
    count = sum(Disk().replay(call) or call.name == "write" for trace in traces for call in calls(trace))
    chosen = {count, *random.Random(count).sample(range(1, count + 1), min(count, times - 1))}
    disk, at, total = Disk(), 0, Tally()
    for trace in traces:
        for call in calls(trace):
            at += disk.replay(call) or call.name == "write"
            if at in chosen:
                chosen.discard(at)
                if at == count and last:
                    disk.acknowledged.update(last)
                total = total.plus(disk.look(place))
    return total


class Player:
    """Runs processes that log, with calls that fail."""

    def __init__(self, starter: Starter, place: Path, prelude: str = "") -> None:
        self._starter = starter
        self._prelude = prelude
        self.place = place
        self.store = place / "runs"
        self.traces: list[Path] = []
        self.names: list[str] = []

    def begin(self) -> None:
        """Have an empty store."""
        shutil.rmtree(self.store, ignore_errors=True)
        self.traces, self.names = [], []

    def play(self, inject: str = "", *, settle_bytes: int = 1 << 25, end: str = "close") -> int:
        """Log to a trial of its own, while calls on the files of the log fail; give the return code."""
        name = f"trial{len(self.names)}"
        told = self.place / name
        told.unlink(missing_ok=True)
        self.names.append(name)
        return self._run(
            inject, [self._prelude + LOGGING, str(settle_bytes), end, str(self.store), str(told)]
        )

    def recover(self, inject: str) -> int:
        """Open the store, and take in what was left in journals, while calls fail."""
        return self._run(inject, [self._prelude + RECOVER, str(self.store)])

    def _run(self, inject: str, command: list[str]) -> int:
        trace = self.place / f"{len(self.traces)}.trace"
        files = [self.store / file for file in ("log.db", "log.db-wal", "log.db-journal")]
        files += self.store.parents
        files += [self.place / name for name in self.names[-1:]]
        options = [option for path in files for option in ("-P", str(path))]
        traced = "trace=openat,close,unlink,pwrite64,ftruncate,fdatasync,fsync,write"
        options += ["-y", "-xx", "-s", "1000000", "-o", str(trace), "-e", traced]
        options += ["-e", f"inject={inject}"] if inject else []
        self.traces.append(trace)
        return self._starter.run(["-c", *command], options, stderr=self.place / "stderr")

    def look(self) -> Tally:
        """Open the store as these processes have left it: all that was logged is there, flushed or not."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            with eventrun.open(self.store, quiet=True) as client:
                reported = [*map(str, client.recovery().result().problems)]
                found = logged(client)
                reported += map(str, client.verify().result().problems)
        total = Tally(reported=tuple(reported))
        for name in self.names:
            total = total.plus(compare(EVENTS, EVENTS, found.get(name, [])))
        return total


def failures(call: str, last: int, ways: int = 5) -> list[str]:
    """List strace's ways to make calls fail: the N-th alone, with some that follow, for ever; so many of them each."""
    found = []
    for first in range(1, last + 1):
        more = ["", f"..{first + 1}", f"..{first + 3}", "+3", "+"]
        found += [f"{call}:error=EIO:when={first}{more[(first + i) % 5]}" for i in range(ways)]
    return found


def some(ways: list[str], quick: int) -> list[str]:
    """Choose all in the full run."""
    return ways if FULL else random.Random(quick).sample(ways, quick)


@needs("strace")
@pytest.mark.crash
def test_syncs_that_fail(tmp_path: Path, table: Table, starter: Starter) -> None:
    """A sync that failed isn't asked for again, and what flush had acknowledged outlives a power cut at any step.

    Nothing that was logged is lost when the process ends then, killed or by a close that couldn't bring it to the log.
    """
    player = Player(starter, tmp_path)
    ways = some(failures("fdatasync", 24), 6)
    here = after = Tally()
    for n, inject in enumerate(ways):
        player.begin()
        assert (
            player.play(inject, settle_bytes=(1 << 25, 2000)[n % 2], end=("close", "exit")[n % 3 == 0]) == 0
        )
        assert not retried(player.traces[0]), inject
        after = after.plus(cut(player.traces, tmp_path / "image", 100 if FULL else 4))
        assert after.good, (inject, after)
        here = here.plus(player.look())
        assert here.good, (inject, here)
    table.add(5, "EIO of the Nth fdatasync", len(ways), here)
    table.add(5, "EIO of the Nth fdatasync, power cut", len(ways), after)
    assert not here.reported
    assert after.acknowledged


@needs("strace")
@pytest.mark.crash
def test_folders_whose_sync_fails(tmp_path: Path, table: Table, starter: Starter) -> None:
    """As long as a new store's folder may be gone after a power cut, no flush returns."""
    player = Player(starter, tmp_path)
    player.begin()
    assert player.play("fsync:error=EIO:when=1+", end="exit") == 0
    assert any(call.name == "fsync" and not call.worked for call in calls(player.traces[0]))
    assert not (tmp_path / player.names[0]).read_bytes()
    found = player.look()
    table.add(5, "EIO of the fsync of folders", 1, found)
    assert found.good
    assert not found.reported


@needs("strace")
@pytest.mark.crash
def test_a_sync_that_fails_and_a_kill(tmp_path: Path, table: Table, starter: Starter) -> None:
    """If a process is killed when a sync has failed, the next one doesn't build on what the disk may not have.

    SQLite takes the last commit of the killed one, which it can read, for a good one.
    """
    player = Player(starter, tmp_path)
    numbers = range(1, 15) if FULL else (5, 8)
    kills, total = 0, Tally()
    for n in numbers:
        player.begin()
        kills += player.play(f"fdatasync:error=EIO:signal=SIGKILL:when={n}") == -9
        assert player.play(end="exit") == 0
        total = total.plus(cut(player.traces, tmp_path / "image", 100 if FULL else 8))
        assert total.good, (n, total)
        with eventrun.open(player.store, quiet=True) as client:
            assert len(logged(client)[player.names[1]]) == EVENTS
    table.add(5, "EIO of fdatasync, SIGKILL, next process, power cut", kills, total)
    assert kills
    assert total.acknowledged


@needs("strace")
@pytest.mark.crash
def test_a_recovery_on_a_failing_disk(tmp_path: Path, table: Table, starter: Starter) -> None:
    """Journals of a killed process are removed only when what they held would outlive a power cut."""
    player = Player(starter, tmp_path)
    ways = some(failures("fdatasync", 9) + failures("pwrite64", 20, 1), 5)
    here = after = Tally()
    for inject in ways:
        player.begin()
        assert player.play("fdatasync:error=EIO:when=9+", end="exit") == 0  # something is in the log, not all
        failed = player.recover(inject) != 0
        assert not retried(player.traces[1]), inject
        if not any((player.store / "journals").iterdir()):
            assert not failed
            after = after.plus(cut(player.traces, tmp_path / "image", 1, {player.names[0]: EVENTS}))
            assert after.good, (inject, after)
        here = here.plus(player.look())
        assert here.good, (inject, here)
    table.add(5, "EIO while a recovery goes on", len(ways), here)
    table.add(5, "EIO while a recovery goes on, power cut", len(ways), after)
    assert not here.reported


@needs("strace")
@pytest.mark.crash
def test_writes_that_fail(tmp_path: Path, table: Table, starter: Starter) -> None:
    """A write to the log or its write-ahead file that fails loses nothing, acknowledged or not."""
    player = Player(starter, tmp_path)
    ways = some(failures("pwrite64", 60, 2), 4)
    here = after = Tally()
    for n, inject in enumerate(ways):
        player.begin()
        assert (
            player.play(inject, settle_bytes=(1 << 25, 2000)[n % 2], end=("close", "exit")[n % 3 == 0]) == 0
        )
        after = after.plus(cut(player.traces, tmp_path / "image", 8 if FULL else 3))
        assert after.good, (inject, after)
        here = here.plus(player.look())
        assert here.good, (inject, here)
    table.add(5, "EIO of the Nth write", len(ways), here)
    table.add(5, "EIO of the Nth write, power cut", len(ways), after)
    assert not here.reported


SAME_CONNECTION = """
from eventrun.stores.sqlite.connection import Log
Log._set_aside = lambda self: None
"""
CLOSED_AT_ONCE = """
from eventrun.stores.sqlite.connection import Log
Log._set_aside = Log.close
Log.leave_found_wal = lambda self, raw: None
"""
BUILDS_ON_IT = """
from eventrun.stores.sqlite.connection import Log
Log.leave_found_wal = lambda self, raw: None
"""
NOT_LOOKED_AT = """
import sqlite3
from eventrun.stores.sqlite import batches
commit = batches.Appender.append
def append(self, raw, some, expected):
    try:
        return commit(self, raw, some, expected)
    except sqlite3.OperationalError:
        return self._end + sum(batch.header.count for batch in some)
batches.Appender.append = append
"""


@needs("strace")
@pytest.mark.crash
def test_a_connection_that_is_used_again_is_caught(tmp_path: Path, table: Table, starter: Starter) -> None:
    """The trace can show a fault: one goes on with a connection that has failed."""
    player = Player(starter, tmp_path, SAME_CONNECTION)
    times, caught = rounds(2, 10), 0
    for n in range(times):
        player.begin()
        player.play(f"fdatasync:error=EIO:when={6 + n % 5}")
        caught += bool(retried(player.traces[0]))
    table.caught(5, "goes on with the connection that failed", times, caught)
    assert caught


@needs("strace")
@pytest.mark.crash
@pytest.mark.parametrize(
    ("what", "broken", "kill"),
    [
        ("failed connection closed first, SQLite's own checkpoint fails too", CLOSED_AT_ONCE, False),
        ("builds on what a process left whose sync had failed", BUILDS_ON_IT, True),
        ("errors of a commit not looked at", NOT_LOOKED_AT, False),
    ],
    ids=["closed at once", "builds on it", "not looked at"],
)
def test_what_trusts_a_failed_sync_is_caught(
    tmp_path: Path, table: Table, starter: Starter, what: str, broken: str, kill: bool
) -> None:
    """The power cut can show a fault: what was acknowledged isn't on the disk."""
    player = Player(starter, tmp_path, broken)
    times, caught = rounds(3, 10), 0
    for n in range(times):
        player.begin()
        if kill:
            player.play(f"fdatasync:error=EIO:signal=SIGKILL:when={6 + n % 5}")
            player.play(end="exit")
        else:
            player.play(f"fdatasync:error=EIO:when={6 + n % 5}..{7 + n % 5}", end="exit")
        caught += not cut(player.traces, tmp_path / "image", 12).good
    table.caught(5, what, times, caught)
    assert caught
