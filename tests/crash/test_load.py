"""18. More than the store can take: a store that stalls, a million events a second, a thousand trials, many in a row.

The memory is what the kernel says of the process (/proc/PID/status), looked at from outside all the time.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest

import eventrun
from eventrun.recorder import RECORDING_BYTES
from tests.crash.harness import LONG_S, Table, Tally, compare, logged, rounds

WORKLOAD = Path(__file__).with_name("load_workload.py")
LOOK_EVERY_S = 0.02
LIMIT_S = 10 * LONG_S


class Load(NamedTuple):
    """What came of a workload: its end, memory at the beginning and at most, what it said of its backlog."""

    code: int
    base_bytes: int
    most_bytes: int
    held_bytes: int
    held_age_s: float
    journal_bytes: int
    dropped: int
    files: int
    counts: list[int]


class Memory:
    """Looks at the memory and the descriptors of a process until it ends."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.most_bytes = self.files = 0

    def now(self) -> int:
        """Bytes that are resident, of whatever kind; 0 when there is no such process any more."""
        try:
            lines = Path(f"/proc/{self._pid}/status").read_text().splitlines()
        except OSError:
            return 0
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Rss"))

    def _look(self) -> None:
        while not self._end.wait(LOOK_EVERY_S):
            self.most_bytes = max(self.most_bytes, self.now())
            try:
                self.files = max(self.files, len(list(Path(f"/proc/{self._pid}/fd").iterdir())))
            except OSError:
                pass

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


@contextmanager
def stalled(store: Path) -> Iterator[None]:
    """Hold the log's write lock, so that nothing can be appended."""
    with closing(sqlite3.connect(store / "log.db", isolation_level=None, timeout=60)) as held:
        held.execute("PRAGMA journal_mode = WAL")
        held.execute("BEGIN IMMEDIATE")
        yield
        held.execute("ROLLBACK")


def run(
    store: Path, counts: Path, *options: str, stall: bool = False, prelude: str = "", end: bool = True
) -> Load:
    """Run the workload, with a store that stalls until it has recorded everything or one that doesn't.

    `end` False: it is killed instead of bringing everything to the log.
    """
    eventrun.open(store, quiet=True).close()
    with eventrun.open(store, quiet=True) as client:
        client.trial("load", name="before").finish()
    command = [sys.executable, str(WORKLOAD), str(store), str(counts), *options, f"--prelude={prelude}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with Memory(process.pid) as memory:
        assert process.stdout.readline() == "begun\n"
        base = memory.now()
        with stalled(store) if stall else nullcontext():
            process.stdin.write("\n")
            process.stdin.flush()
            said = process.stdout.readline()
        if not end:
            process.kill()
        process.communicate("\n", timeout=LIMIT_S)
    _, held, age, files, dropped = said.split()
    words = list(memoryview(counts.read_bytes()).cast("Q"))
    return Load(process.returncode, base, memory.most_bytes, int(held), float(age), int(files), int(dropped),
                memory.files, words)  # fmt: skip


def held_against(load: Load, store: Path) -> Tally:
    """All that was recorded is there, once, in order."""
    total = Tally()
    with eventrun.open(store, quiet=True) as client:
        assert not client.recovery().result(LONG_S).problems
        found = logged(client)
    for trial, count in enumerate(load.counts):
        total = total.plus(compare(count, count, found.get(f"load-{trial}", [])))
    return total


@pytest.mark.crash
def test_a_store_that_stalls(tmp_path: Path, table: Table) -> None:
    """While the store stalls at 20,000 calls a second memory stays below its bound, the size and the age of what waits
    are told, nothing is dropped, and all of it is there in the end."""
    seconds = rounds(4, 60)
    load = run(
        tmp_path / "runs", tmp_path / "counts", f"--seconds={seconds}", "--per-second=20000", stall=True
    )
    found = held_against(load, tmp_path / "runs")
    table.add(18, f"20,000 calls/s while the store stalls for {seconds} s", 1, found)
    assert load.code == 0
    assert load.dropped == 0
    assert found.good, found
    assert load.most_bytes - load.base_bytes < RECORDING_BYTES, load
    assert load.held_bytes > 20 * found.acknowledged
    assert load.journal_bytes >= load.held_bytes
    assert load.held_age_s > seconds / 2


@pytest.mark.crash
def test_more_than_can_be_taken(tmp_path: Path, table: Table) -> None:
    """Threads that log as fast as they can, to a store that is slower or stalls, don't make memory grow beyond its
    bound, and all is there in the end."""
    seconds = rounds(1, 10)
    total = Tally()
    for stall in (False, True):
        store = tmp_path / f"runs{stall}"
        load = run(store, tmp_path / "counts", f"--seconds={seconds}", "--threads=4", stall=stall)
        found = held_against(load, store)
        assert (load.code, load.dropped) == (0, 0)
        assert found.good, found
        assert load.most_bytes - load.base_bytes < RECORDING_BYTES, load
        total = total.plus(found)
    rate = total.acknowledged // (2 * seconds)
    table.add(18, f"as fast as can be, {rate:,} events/s for {seconds} s, and while it stalls", 2, total)


@pytest.mark.crash
def test_a_thousand_trials_at_once(tmp_path: Path, table: Table) -> None:
    """1,000 trials of one process under `ulimit -n 1024`, beside a main thread that is busy in Python, with a store
    that stalls or doesn't: all is crash_safe, nothing is dropped, the training can open files of its own."""
    seconds = rounds(1, 30)
    total = Tally()
    options = (
        f"--seconds={seconds}",
        "--threads=2",
        "--trials=500",
        "--files=1024",
        "--busy",
        "--calls=2500",
    )
    for stall in (False, True):
        store = tmp_path / f"runs{stall}"
        load = run(store, tmp_path / "counts", *options, stall=stall)
        found = held_against(load, store)
        assert (load.code, load.dropped) == (0, 0)
        assert found.good, found
        assert all(load.counts)
        assert load.most_bytes - load.base_bytes < RECORDING_BYTES, load
        assert load.files < 512, load
        total = total.plus(found)
    table.add(18, "1,000 trials, ulimit -n 1024, a busy main thread", 2, total)


IN_MEMORY = """
from eventrun.journal import JournalFolder
init = JournalFolder.__init__
JournalFolder.__init__ = lambda self, path, **_: init(self, None)
from eventrun.journal import segments
segments.MEMORY_BYTES = 1 << 40
"""

NEVER_TRIMMED = """
from eventrun.journal import segments
segments.CAN_TRIM = False
"""


@pytest.mark.crash
@pytest.mark.parametrize(
    ("broken", "prelude"), [("queue in memory", IN_MEMORY), ("pages kept", NEVER_TRIMMED)]
)
def test_a_backlog_in_memory_is_caught(tmp_path: Path, table: Table, broken: str, prelude: str) -> None:
    """The tests above can fail: what queues events in this process's memory outgrows the bound."""
    prelude += BIGGER
    load = run(tmp_path / "runs", tmp_path / "counts", *BACKLOG, stall=True, prelude=prelude, end=False)
    assert load.most_bytes - load.base_bytes > RECORDING_BYTES, load
    table.caught(18, f"backlog: {broken}", 1, 1)


@pytest.mark.crash
def test_the_bound_holds_where_the_broken_ones_break_it(tmp_path: Path) -> None:
    """The same backlog as in the broken variants stays below the bound as it is."""
    load = run(tmp_path / "runs", tmp_path / "counts", *BACKLOG, stall=True, prelude=BIGGER)
    assert (load.code, load.dropped) == (0, 0)
    assert load.held_bytes > RECORDING_BYTES
    assert load.most_bytes - load.base_bytes < RECORDING_BYTES, load


BACKLOG = ("--seconds=0", "--calls=8000")
BIGGER = """
import eventrun.trial
log = eventrun.trial.Trial.log
eventrun.trial.Trial.log = lambda self, values, step: log(self, {**values, "pad": "x" * 30_000}, step=step)
"""

A_FILE_EACH = """
from eventrun.journal import segments
segments.ARENA_BYTES = 1
segments.MANY_ARENAS = ()
"""


@pytest.mark.crash
def test_a_descriptor_for_each_trial_is_caught(tmp_path: Path, table: Table) -> None:
    """The test of 1,000 trials can fail: with a file for each of them the descriptors are used up."""
    options = ("--seconds=1", "--threads=2", "--trials=500", "--files=1024")
    load = run(tmp_path / "runs", tmp_path / "counts", *options, prelude=A_FILE_EACH)
    assert load.files >= 512, load
    table.caught(18, "a file for each trial", 1, 1)


MANY = """
import os, sys
import eventrun
def now():
    found = {line.split(":")[0]: int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("Rss")}
    return sum(found.values()) << 10
client = eventrun.open(sys.argv[1], quiet=True, linger_ms=20)
number = int(sys.argv[2])
seen = []
for i in range(number):
    with client.trial("many", name=f"many-{i}") as trial:
        trial.log({"i": 0})
        trial.log({"i": 1})
    if i % (number // 10) == number // 10 - 1:
        client.flush().result()
        statistics = client.statistics()
        seen.append((now(), len(os.listdir("/proc/self/fd")), statistics.journal_bytes, statistics.streams))
client.close()
for each in seen:
    print(*each)
"""
BYTES_PER_TRIAL = 4096  # that a process keeps of each trial that has ended, about, for as long as it lives


@pytest.mark.crash
def test_many_short_trials_one_after_another(tmp_path: Path, table: Table) -> None:
    """Of trials that have ended a process keeps a few hundred bytes each, and neither descriptors nor journals."""
    number = rounds(2_000, 20_000)
    done = subprocess.run(
        [sys.executable, "-c", MANY, str(tmp_path / "runs"), str(number)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    seen = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    with eventrun.open(tmp_path / "runs", quiet=True) as client:
        found = logged(client)
    tallies = [compare(2, 2, found.get(f"many-{i}", [])) for i in range(number)]
    total = Tally()
    for each in tallies:
        total = total.plus(each)
    first, last = seen[4], seen[-1]
    grown = (last[0] - first[0]) / (number / 2)
    table.add(18, f"{number:,} short trials, {grown:,.0f} bytes kept of each", 1, total)
    assert total.good, total
    assert grown < BYTES_PER_TRIAL, seen
    assert last[1] <= max(each[1] for each in seen[:5]) + 8, seen
    assert max(each[2] for each in seen) < 64 << 20, seen
