"""11. Ways to end: exceptions, exits, signals, loops that end early, the interpreter's shutdown; what logs meanwhile.

Each end leaves each event whose call had returned, the status that the design gives it, and its own exit code.
"""

from __future__ import annotations

import re
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

import eventrun
from tests.crash.ends import SOURCES
from tests.crash.harness import Run, Table, Tally, rounds, tally
from tests.crash.starter import Starter

ENDS = str(Path(__file__).with_name("ends.py"))
LEFT = re.compile(
    r"eventrun: ([\d,]+) events are not in the log yet \(.+\); they are safe in (.+), and the next open .*"
)


@pytest.fixture(scope="module")
def starter() -> Iterator[Starter]:
    """Fork processes that have everything imported."""
    with Starter() as opened:
        yield opened


class End(NamedTuple):
    """How a process ended: its exit code, what it said, whether its journal stayed."""

    code: int
    said: str
    left: bool


class Lives:
    """Processes that end one after the other in one store."""

    def __init__(self, starter: Starter, place: Path) -> None:
        self._starter = starter
        self._place = place
        self.store = place / "runs"
        self.runs: list[Run] = []

    def live(self, scene: str, way: str = "return", prelude: str = "") -> End:
        """Have a process live and end."""
        run = Run(f"{len(self.runs)} {scene} {way}", self._place / f"{len(self.runs)}", trials=SOURCES)
        said = self._place / f"{len(self.runs)}.said"
        self.runs.append(run)
        before = self._journals()
        code = self._starter.run(
            [ENDS, str(self.store), run.name, str(run.counts), way, scene, prelude], stderr=said
        )
        return End(code, said.read_text(), bool(self._journals() - before))

    def _journals(self) -> set[str]:
        folder = self.store / "journals"
        return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()

    def compare(self) -> Tally:
        """Hold all that can be read now against what the processes counted."""
        return tally(self.store, self.runs)

    def statuses(self) -> list[list[str]]:
        """Return how the trials of each process ended, in order."""
        found: dict[str, str] = {}
        with eventrun.open(self.store, quiet=True) as client:
            for state in client.trials():
                found[state.name] = state.status
        names = [[f"{run.name}-{i}" for i in range(SOURCES)] for run in self.runs]
        return [[found[name] for name in each if name in found] for each in names]


# in the middle of blocks ---------------------------------------------------------------------------------------------

# way: (exit code, status of the trial, whether the journal stays for the next open)
Expected = dict[str, tuple[int, str, bool]]
IN_BLOCKS: Expected = {
    "return": (0, "completed", False),
    "exit 0": (0, "completed", False),
    "exit 3": (3, "failed", False),
    "error": (1, "failed", False),
    "os._exit": (7, "lost", True),
    "SIGINT": (-signal.SIGINT, "interrupted", False),
    "SIGTERM": (-signal.SIGTERM, "interrupted", True),
    "SIGHUP": (-signal.SIGHUP, "lost", True),
    "SIGQUIT": (-signal.SIGQUIT, "lost", True),
}


@pytest.mark.crash
@pytest.mark.parametrize("scene", ["sync", "asyncio", "trio"])
def test_ends_in_a_block(tmp_path: Path, table: Table, starter: Starter, scene: str) -> None:
    """However the `with` blocks of client and trial are left, by exits, errors and signals at random moments, nothing
    is lost, the exit code stays, and the trial's status says how."""
    times = rounds(1, 20)
    lives = Lives(starter, tmp_path)
    # What ends the process without asking doesn't ask for its loop either.
    ways = {way: IN_BLOCKS[way] for way in IN_BLOCKS if scene == "sync" or IN_BLOCKS[way][1] != "lost"}
    for way, (code, _, left) in ways.items():
        for _ in range(times):
            end = lives.live(scene, way)
            assert (end.code, end.left) == (code, left), (way, end)
            assert "not in the log" not in end.said
    found = lives.compare()
    statuses = [[status] for _, status, _ in ways.values() for _ in range(times)]
    for run, each, status in zip(lives.runs, lives.statuses(), statuses, strict=True):
        assert each == status, run.name
    table.add(11, f"exits, errors, signals in {scene} code", len(lives.runs), found)
    assert found.good, found
    assert not found.reported


# scene, way: (exit code, statuses, whether the journal stays)
OTHERS = {
    ("not closed", "return"): (0, ["interrupted"], False),
    ("not closed", "exit 3"): (3, ["interrupted"], False),
    ("not closed", "error"): (1, ["interrupted"], False),
    ("not closed", "SIGTERM"): (-signal.SIGTERM, ["interrupted"], True),
    ("dropped", "return"): (0, ["interrupted"], False),
    ("error in thread", "return"): (0, ["completed", "failed"], False),
    ("daemon threads", "return"): (0, ["interrupted"] * 3, False),
    ("daemon threads", "exit 3"): (3, ["interrupted"] * 3, False),
    ("cancelled group, asyncio", "return"): (0, ["interrupted"] * 3 + ["interrupted", "completed"], False),
    ("cancelled group, trio", "return"): (0, ["interrupted"] * 3 + ["interrupted", "completed"], False),
    ("cancelled task", "return"): (0, ["interrupted"], False),
    ("loop closed", "return"): (0, ["interrupted"], False),
    ("loop closed", "exit 3"): (3, ["interrupted"], False),
    ("loop blocked, asyncio", "return"): (0, ["completed"], False),
    ("loop blocked, trio", "return"): (0, ["completed"], False),
    ("finished at exit", "return"): (0, ["completed"] * 2, False),
    ("finished at exit", "error"): (1, ["completed"] * 2, False),
    ("finalizers at shutdown", "return"): (0, ["interrupted"] * 2, False),
    ("storm", "return"): (0, ["interrupted"] * 4, False),
    ("handler that ends", "return"): (5, ["interrupted", "completed"], False),
}


@pytest.mark.crash
def test_other_ends(tmp_path: Path, table: Table, starter: Starter) -> None:
    """Clients that nobody closes, threads and finalizers that log through the shutdown, loops and task groups that end
    under them, handlers that log, flush, close: nothing hangs, nothing is lost, the status says how it ended."""
    times = rounds(1, 20)
    lives = Lives(starter, tmp_path)
    for (scene, way), (code, _, left) in OTHERS.items():
        for _ in range(times):
            end = lives.live(scene, way)
            assert (end.code, end.left) == (code, left), (scene, way, end)
            assert "not in the log" not in end.said
    found = lives.compare()
    statuses = [expected for _, expected, _ in OTHERS.values() for _ in range(times)]
    for run, each, expected in zip(lives.runs, lives.statuses(), statuses, strict=True):
        assert each == expected, run.name
    table.add(11, "other ends, what logs meanwhile", len(lives.runs), found)
    assert found.good, found
    assert not found.reported


# a store that hangs --------------------------------------------------------------------------------------------------


@contextmanager
def held(store: Path) -> Iterator[None]:
    """Hold the log's lock for writing, as another process that hangs would."""
    with eventrun.open(store, quiet=True) as client:
        client.trial("crash", name="first").finish()
    holder = sqlite3.connect(store / "log.db", isolation_level=None)
    try:
        holder.execute("BEGIN IMMEDIATE")
        yield
    finally:
        holder.close()


# scene, way: (exit code, status of the trial, Ctrl-C while it closes)
HANGING = {
    ("hanging, sync", "return"): (0, "completed"),
    ("hanging, sync", "exit 3"): (3, "failed"),
    ("hanging, not closed", "exit 3"): (3, "interrupted"),
    ("hanging, asyncio", "exit 3"): (3, "failed"),
    ("hanging, trio", "return"): (0, "completed"),
    ("interrupted, sync", "return"): (-signal.SIGINT, "completed"),
    ("interrupted, asyncio", "return"): (-signal.SIGINT, "completed"),
    ("interrupted, trio", "return"): (-signal.SIGINT, "completed"),
}


@pytest.mark.crash
def test_a_store_that_hangs(tmp_path: Path, table: Table, starter: Starter) -> None:
    """While another process holds the log for ever, an end is bounded by close_timeout_s, and by Ctrl-C, twice at most,
    where that is an hour: the exit code stays, one line says how many events stay in the journal, where, and that the
    next open takes them in; which it does."""
    times = rounds(1, 10)
    lives = Lives(starter, tmp_path)
    with held(lives.store):
        for (scene, way), (code, _) in HANGING.items():
            for _ in range(times):
                end = lives.live(scene, way)
                assert (end.code, end.left) == (code, True), (scene, way, end)
                (line,) = (line for line in end.said.splitlines() if line.startswith("eventrun"))
                matched = LEFT.fullmatch(line)
                assert matched, line
                # The project's and the trial's creation, its start, its 50 metrics, and its end.
                assert matched.groups() == ("54", str(lives.store / "journals")), line
    found = lives.compare()
    assert [status for (status,) in lives.statuses()] == [
        s for _, s in HANGING.values() for _ in range(times)
    ]
    table.add(11, "ends while the store hangs, Ctrl-C in close", len(lives.runs), found)
    assert found.good, found
    assert not found.reported
    assert not lives._journals()


# broken on purpose ---------------------------------------------------------------------------------------------------

SOON = "import signal; signal.alarm(5)\n"  # what hangs ends by this, which is no end of its own
NOT_WATCHED = "from eventrun import exits; exits.watch = lambda client: None"
PLAIN_LOCK = (
    SOON
    + """
import threading
from eventrun.journal.writing import Journal
append, lock = Journal.append, threading.Lock()
def locked(self, data):
    with lock:
        append(self, data)
Journal.append = locked
"""
)
NO_BOUND = (
    SOON
    + """
from eventrun import client
from eventrun.recorder import Recorder
close = Recorder.close
Recorder.close = lambda self, seconds=None: close(self, 3600)
client.STUCK_S = 3600
"""
)


@pytest.mark.crash
def test_a_client_that_nobody_closes_is_caught(tmp_path: Path, table: Table, starter: Starter) -> None:
    """The tests above can fail: without a function at exit the journal stays, and the trial counts as lost."""
    lives = Lives(starter, tmp_path)
    end = lives.live("not closed", "return", NOT_WATCHED)
    assert lives.compare().good  # it is in the journal all the same
    caught = (end.code, end.left, lives.statuses()) == (0, True, [["lost"]])
    table.caught(11, "nothing done at exit", 1, caught)
    assert caught


@pytest.mark.crash
def test_a_lock_in_the_log_call_is_caught(tmp_path: Path, table: Table, starter: Starter) -> None:
    """The tests above can fail: a plain lock in the log call hangs when a handler or finalizer logs inside."""
    end = Lives(starter, tmp_path).live("storm", "return", PLAIN_LOCK)
    caught = end.code == -signal.SIGALRM
    table.caught(11, "a plain lock in the log call", 1, caught)
    assert caught


@pytest.mark.crash
def test_a_close_without_a_bound_is_caught(tmp_path: Path, table: Table, starter: Starter) -> None:
    """The tests above can fail: a close that waits for the store as long as that takes doesn't end."""
    lives = Lives(starter, tmp_path)
    with held(lives.store):
        end = lives.live("hanging, sync", "return", NO_BOUND)
    caught = end.code == -signal.SIGALRM
    table.caught(11, "a close without a bound", 1, caught)
    assert caught
