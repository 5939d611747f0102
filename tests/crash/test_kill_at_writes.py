"""1. SIGKILL at every call that changes something, and, as the journal makes none, at every traced line.

A counter goes up by one, and the run is tried again, until it comes to its end without having been killed.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.crash.harness import FULL, Run, Table, Tally, needs, rounds, tally
from tests.crash.starter import Starter
from tests.crash.test_kill import RECOVER, RELEASE_BEFORE_COMMIT

KILLED = -9
END = 3  # so many runs in a row come to their end: the counter is past the last one, although runs differ a little


@pytest.fixture(scope="module")
def starter() -> Iterator[Starter]:
    """Give what forks the processes to be killed."""
    with Starter() as one:
        yield one


class Scene:
    """A store and a process that works on it, to be played again and again.

    The store is a new one, or a copy of another scene's, whose events must stay. `code` is run instead of a workload.
    """

    def __init__(
        self,
        starter: Starter,
        place: Path,
        after: Scene | None = None,
        *,
        code: str = "",
        trials: int = 1,
        **workload: Any,
    ) -> None:
        place.mkdir()
        self.store = place / "runs"
        self.run = Run(place.name, place / "counts", trials)
        self.runs: list[Run] = [*(after.runs if after else ()), self.run]
        self._after = after
        self._starter = starter
        self._code = code
        self._workload = workload

    def play(self, strace: Sequence[str] = (), prelude: str = "") -> int:
        """Begin anew, and give the process's return code."""
        shutil.rmtree(self.store, ignore_errors=True)
        self.run.counts.unlink(missing_ok=True)
        if self._after is not None:
            shutil.copytree(self._after.store, self.store)
        prelude += self._workload.get("prelude", "")
        command = ["-c", prelude + self._code, str(self.store)]
        if not self._code:
            command = self.run.command(self.store, python=(), **{**self._workload, "prelude": prelude})
        return self._starter.run(command, strace)

    def recover(self, strace: Sequence[str] = ()) -> int:
        """Let a process open the store and take in what was left there."""
        return self._starter.run(["-c", RECOVER, str(self.store)], strace)

    def look(self, *, verify: bool = True) -> Tally:
        """Open the store; of killed writers only a folder may be left whose lock was not there yet, or gone."""
        found = tally(self.store, self.runs, verify=verify)
        left = [path.name for path in self.store.glob("journals/*/*")]
        assert not [name for name in left if name != "lock.new"], left
        return found


def sweep(scene: Scene, play: Callable[[int], int], sample: Sequence[int]) -> tuple[int, Tally]:
    """Try 1, 2, ... until nothing is killed any more, in the full run; else a sample. Give the kills, and the sum.

    In a part of the rounds the process that recovers is killed as well, before the store is looked at.
    """
    total, kills, unhurt = Tally(), 0, 0
    for when in range(1, 1_000_000) if FULL else sample:
        code = play(when)
        assert code in (0, KILLED), (when, code)
        kills, unhurt = kills + (code == KILLED), 0 if code == KILLED else unhurt + 1
        if when % 3 == 0:
            assert scene.recover(at_call("pwrite64", 1 + when % 37)) in (0, KILLED), when
        found = scene.look(verify=not FULL or when % 10 == 0)
        assert found.good, (when, found)
        assert not found.reported, (when, found)
        total = total.plus(found)
        if unhurt == END:
            break
    return kills, total


def sample(total: int, count: int) -> list[int]:
    """Choose the first, the last and some between."""
    some = random.Random(total).sample(range(1, total + 1), min(total, max(count - 2, 0)))
    return sorted({1, total, *some})


# calls that change something -----------------------------------------------------------------------------------

# "?": some systems have only one of these. strace counts each call of a group, and of each thread, by itself.
CALLS = {
    "pwrite64": "pwrite64",
    "fdatasync": "fdatasync",
    "ftruncate": "ftruncate",
    "unlink": "?unlink,?unlinkat,?rmdir",
    "write": "write",
    "rename": "?rename,?renameat,?renameat2",
    "mkdir": "?mkdir,?mkdirat",
    "fallocate": "fallocate",
    "fcntl": "fcntl",  # SQLite's locks
    "flock": "flock",  # the writer's
}


def at_call(group: str, when: int, path: Path | None = None) -> list[str]:
    """Return strace's options to kill at the first thread's `when`-th call of these, or of these on this file."""
    where = [] if path is None else ["-P", str(path)]
    return ["-o", "/dev/null", *where, "-e", f"trace={CALLS[group]}",
            "-e", f"inject={CALLS[group]}:signal=SIGKILL:when={when}"]  # fmt: skip


def count_calls(scene: Scene, files: Sequence[str]) -> dict[tuple[str, str], int]:
    """Play without a kill; give by group, and by group and file, how many calls the busiest thread makes."""
    trace = scene.store.with_name("trace")
    assert scene.play(["-y", "-o", str(trace), "-e", "trace=" + ",".join(CALLS.values())]) == 0
    groups = {name.strip("?"): group for group, names in CALLS.items() for name in names.split(",")}
    counts: Counter[tuple[str, str, str, str]] = Counter()
    for line in trace.read_text().splitlines():
        thread, _, rest = line.partition(" ")
        name, found, arguments = rest.strip().partition("(")
        if found and name in groups:
            counts[groups[name], "", name, thread] += 1
            for file in files:
                if f"<{scene.store / file}>" in arguments:
                    counts[groups[name], file, name, thread] += 1
    most: dict[tuple[str, str], int] = {}
    for (group, file, _, _), count in counts.items():
        most[group, file] = max(most.get((group, file), 0), count)
    return most


# As strace counts per thread, and kills at the first that gets there, what the second busiest thread writes needs a
# sweep of its own, by file: where the store is there already, each file of it has one thread that writes to it.
FILES = ("log.db", "log.db-wal", "log.mark")


def sweep_calls(scene: Scene, quick: int) -> tuple[int, Tally]:
    """Kill at each call of each group, and at each one on each of the store's files; or at so many of them."""
    most = count_calls(scene, FILES)
    wanted = [(group, file) for group, file in most if not file or group in ("pwrite64", "fdatasync")]
    points = [(group, file, when) for group, file in wanted for when in range(1, most[group, file] + 1)]
    chosen = random.Random(quick).sample(points, min(quick, len(points)))
    kills, total = 0, Tally()
    for group, file in wanted:
        path = scene.store / file if file else None

        def play(when: int, group: str = group, path: Path | None = path) -> int:
            return scene.play(at_call(group, when, path))

        found = sweep(scene, play, [when for *which, when in chosen if which == [group, file]])
        kills, total = kills + found[0], total.plus(found[1])
    return kills, total


# Settles and gives journals back at every turn, not after 32 MiB only.
OFTEN = """
import eventrun.recorder
eventrun.recorder.SETTLE_BYTES = 1
eventrun.recorder.MAX_OPEN_JOURNALS = 0
"""


@needs("strace")
@pytest.mark.crash
def test_a_kill_at_each_call_of_a_first_run(tmp_path: Path, table: Table, starter: Starter) -> None:
    """From the making of the store to the end of a clean close, no call is a bad moment for a kill."""
    scene = Scene(starter, tmp_path / "first", events=30, flush_every=10, linger_ms=2, item_bytes=3000)
    kills, found = sweep_calls(scene, quick=10)
    table.add(1, "SIGKILL at each call: first run, close", kills, found)
    assert kills


@needs("strace")
@pytest.mark.crash
def test_a_kill_at_each_call_in_a_store_that_is_there(tmp_path: Path, table: Table, starter: Starter) -> None:
    """The same with several trials, while the log is settled all the time, beside what is there from before."""
    first = Scene(starter, tmp_path / "first", events=20, flush_every=5)
    assert first.play() == 0
    scene = Scene(
        starter, tmp_path / "second", first, trials=3, events=20, flush_every=7, linger_ms=3, prelude=OFTEN
    )  # fmt: skip
    kills, found = sweep_calls(scene, quick=10)
    table.add(1, "SIGKILL at each call: three trials, always settling", kills, found)
    assert kills


WRITTEN = """
from eventrun import filesystems
filesystems.MAPPED = frozenset()
"""


@needs("strace")
@pytest.mark.crash
def test_a_kill_at_each_call_where_journals_are_written(
    tmp_path: Path, table: Table, starter: Starter
) -> None:
    """Where files can't be mapped, and a log call writes to its journal by system calls, none is a bad moment."""
    scene = Scene(
        starter, tmp_path / "written", events=12, flush_every=5, linger_ms=2, item_bytes=3000, prelude=WRITTEN
    )  # fmt: skip
    kills, found = sweep_calls(scene, quick=10)
    table.add(1, "SIGKILL at each call: journals not mapped", kills, found)
    assert kills


def killed_before(starter: Starter, place: Path) -> Scene:
    """Make a store with something in its log and its journals: what a process left that did not close."""
    scene = Scene(
        starter, place, trials=2, events=10, linger_ms=60_000, flush_every=6, end="exit", item_bytes=5000
    )
    assert scene.play() == 0
    return scene


@needs("strace")
@pytest.mark.crash
def test_a_kill_at_each_call_of_a_recovery(tmp_path: Path, table: Table, starter: Starter) -> None:
    """Dying while taking in what a killed writer left changes nothing, nor does dying a second time."""
    left = killed_before(starter, tmp_path / "left")
    scene = Scene(starter, tmp_path / "recovery", left, code=RECOVER)
    kills, found = sweep_calls(scene, quick=10)
    table.add(1, "SIGKILL at each call: recovery", kills, found)
    assert kills


@needs("strace")
@pytest.mark.crash
def test_a_release_before_the_commit_is_caught(tmp_path: Path, table: Table, starter: Starter) -> None:
    """The sweep can fail: it finds that a journal was given back before its batch was committed."""
    scene = Scene(
        starter, tmp_path / "broken", events=40, flush_every=20, item_bytes=5000, prelude=RELEASE_BEFORE_COMMIT
    )  # fmt: skip
    points = sample(count_calls(scene, ())["pwrite64", ""], rounds(6, 30))
    caught = 0
    for when in points:
        assert scene.play(at_call("pwrite64", when)) in (0, KILLED)
        caught += not tally(scene.store, scene.runs).good
    table.caught(1, "journal released before the commit", len(points), caught)
    assert caught


# lines -----------------------------------------------------------------------------------------------------------

# Counts lines (of some functions: instructions) of all threads in some files, and kills at one of them. Of loops only
# the first turns count. The count lies in a mapped file, so that it is known in the end, however the process ended.
TRACING = """
import collections, itertools, mmap, os, signal, sys, threading
with open({counter!r}, "w+b") as file:
    file.truncate(8)
    lines = memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")
numbers = itertools.count(1)
visits = collections.Counter()

def local(frame, event, argument):
    where = frame.f_code, frame.f_lasti
    if (event == "line" or event == "opcode") and visits[where] < {visits}:
        visits[where] += 1
        number = next(numbers)
        if number == {when}:
            os.kill(os.getpid(), signal.SIGKILL)
        lines[0] = max(number, lines[0])
    return local

def tracing(frame, event, argument):
    code = frame.f_code
    if not code.co_filename.endswith({files!r}):
        return None
    if code.co_qualname in {instructions!r}:
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
    return local

threading.settrace(tracing)
sys.settrace(tracing)
"""
VISITS = 4
JOURNAL = ("eventrun/journal/writing.py", "eventrun/journal/segments.py")
WRITING = (*JOURNAL, "eventrun/recorder.py")
RECOVERING = ("eventrun/recovery.py", "eventrun/journal/scan.py", "eventrun/journal/segments.py")
APPENDING = ("Journal.append", "Journal._turn", "Journal._enter")


def at_line(
    scene: Scene, files: Sequence[str], when: int, instructions: Sequence[str] = (), visits: int = VISITS
) -> str:
    """Return a prelude that kills at the `when`-th line of these files; 0: only counts."""
    counter = str(scene.store.with_name("lines"))
    return TRACING.format(
        counter=counter, when=when, visits=visits, files=tuple(files), instructions=tuple(instructions)
    )


def count_lines(scene: Scene) -> int:
    """Tell how many lines the last process passed."""
    return int.from_bytes(scene.store.with_name("lines").read_bytes(), "little")


def sweep_lines(
    scene: Scene, files: Sequence[str], quick: int, instructions: Sequence[str] = (), visits: int = VISITS
) -> tuple[int, Tally]:
    """Kill at each line of these files, or at so many of them."""

    def play(when: int) -> int:
        return scene.play(prelude=at_line(scene, files, when, instructions, visits))

    assert play(0) == 0
    return sweep(scene, play, sample(count_lines(scene), quick))


@pytest.mark.crash
def test_a_kill_at_each_instruction_of_a_log_call(tmp_path: Path, table: Table, starter: Starter) -> None:
    """Within one log call, also one that turns to another segment or passes a mark, no moment is bad for a kill."""
    scene = Scene(starter, tmp_path / "calls", events=5, linger_ms=60_000, item_bytes=20_000, end="exit")
    kills, found = sweep_lines(scene, JOURNAL, 12, APPENDING, visits=8)
    table.add(1, "SIGKILL at each instruction of log calls", kills, found)
    assert kills


@pytest.mark.crash
def test_a_kill_at_each_line_of_flusher_and_close(tmp_path: Path, table: Table, starter: Starter) -> None:
    """While events are sealed, appended, confirmed, settled and released, no line is a bad moment for a kill."""
    scene = Scene(
        starter, tmp_path / "flush", trials=2, events=4, flush_every=2, linger_ms=5, item_bytes=6000, prelude=OFTEN
    )  # fmt: skip
    kills, found = sweep_lines(scene, WRITING, 8)
    table.add(1, "SIGKILL at each line: log, flush, settle, close", kills, found)
    assert kills


@pytest.mark.crash
def test_a_kill_at_each_line_of_a_recovery(tmp_path: Path, table: Table, starter: Starter) -> None:
    """While journals of a killed writer are read, taken in and removed, no line is a bad moment for a kill."""
    left = killed_before(starter, tmp_path / "left")
    scene = Scene(starter, tmp_path / "recovery", left, code=RECOVER)
    kills, found = sweep_lines(scene, RECOVERING, 8)
    table.add(1, "SIGKILL at each line: recovery", kills, found)
    assert kills


HEAD_FIRST = """
from eventrun.journal import writing
def append(self, data):
    while True:
        segment, start = self._segment, self._end
        end = start + len(data)
        check = writing.adler32(data, self._check)
        place = slice(self._base + start, self._base + end)
        if end <= self._limit:
            self._head[0] = check << 32 | end
            self._buffer[place] = data
            self._last, self._end, self._check = start, end, check
            self._count += 1
            return
        if segment is None:
            self.moved(data)
            return
        if not self._turn(len(data)):
            return
writing.Journal.append = append
"""
HEAD_LATE = HEAD_FIRST.replace(
    "self._head[0] = check << 32 | end", "self._head[0] = self._check << 32 | start"
)


@pytest.mark.crash
@pytest.mark.parametrize(
    ("what", "broken"), [("first", HEAD_FIRST), ("one call late", HEAD_LATE)], ids=["first", "late"]
)
def test_a_head_stored_at_a_wrong_moment_is_caught(
    tmp_path: Path, table: Table, starter: Starter, what: str, broken: str
) -> None:
    """The sweep can fail: a head stored before its bytes are copied is found, and one that lags behind too."""
    prelude = (
        f"exec(compile({broken!r}, 'broken.py', 'exec'), {{}})\n"  # so that its lines can be told from others
    )
    scene = Scene(starter, tmp_path / "broken", events=5, linger_ms=60_000, end="exit", prelude=prelude)

    def play(when: int) -> int:
        return scene.play(prelude=at_line(scene, ["broken.py"], when, visits=1000))

    assert play(0) == 0
    total = count_lines(scene)
    points = range(1, total + 1) if FULL else range(total // 2, total // 2 + 14)  # the lines of a call
    caught = 0
    for when in points:
        play(when)
        found = tally(scene.store, scene.runs)
        caught += not found.good or bool(found.reported)
    table.caught(1, f"head of the journal stored {what}", len(points), caught)
    assert caught
