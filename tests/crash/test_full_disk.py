"""4. The disk is full: once, for ever, until space comes back; at whatever the process is just doing.

What the client called crash_safe, or a flush durable, is there after a SIGKILL; what it only accepted may be lost, and
nothing else. No log call fails, no process dies of SIGBUS, and when space comes back all is crash_safe again.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

import eventrun
from tests.crash.harness import FULL, LONG_S, Table, Tally, compare, logged, mounted, needs, rounds

WORKLOAD = Path(__file__).with_name("full_workload.py")
DISK_MIB = 48
ITEM_BYTES = 400
RETURNED, SAFE, DURABLE, DROPPED, STAGE = range(5)


class Disk(NamedTuple):
    """A small disk of its own, and a file on it that takes the space which the process shall not have."""

    path: Path
    ballast: Path

    @property
    def store(self) -> Path:
        return self.path / "runs"

    def free(self) -> int:
        """Bytes that can still be had."""
        found = os.statvfs(self.path)
        return found.f_bfree * found.f_frsize

    def leave(self, space: int) -> None:
        """Let the process have so many bytes."""
        with self.ballast.open("wb") as file:
            while (size := self.free() - space) > 0:
                try:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, max(size, 1))
                except OSError:  # less than it says can be had at once
                    step = max(size // 2, 4096)
                    space += step
        assert self.free() < space + 65536

    def clear(self) -> None:
        """Let space come back."""
        self.ballast.unlink(missing_ok=True)


@contextmanager
def disk(place: Path, kind: str) -> Iterator[Disk]:
    """Mount a disk of DISK_MIB: "tmpfs", or "ext4-1024" by the size of its blocks."""
    place.mkdir(parents=True)
    if kind == "tmpfs":
        with mounted(place / "disk", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs") as path:
            yield Disk(path, path / "ballast")
        return
    image = place / "image"
    with image.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    block = kind.partition("-")[2]
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-b", block, str(image)], check=True, capture_output=True)
    with mounted(place / "disk", "-o", "loop", str(image)) as path:
        yield Disk(path, path / "ballast")
    image.unlink()


class Outcome(NamedTuple):
    """How a process ended, what it counted, and what it said."""

    code: int
    counts: list[int]
    said: str


def run(
    disk: Disk, counts: Path, end: str, events: int, *, prelude: str = "", python: tuple[str, ...] = ()
) -> Outcome:
    """Start the workload; when the disk has been full for long enough, let space come back if `end` is "back"."""
    numbers = (f"--events={events}", f"--item-bytes={ITEM_BYTES}", f"--end={end}", f"--prelude={prelude}")
    command = [*python, sys.executable, str(WORKLOAD), str(disk.store), str(counts), *numbers]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    if end == "back":
        begun = time.monotonic()
        while read(counts)[STAGE] != 1 and process.poll() is None and time.monotonic() - begun < LONG_S:
            time.sleep(0.01)
        disk.clear()
        with counts.open("r+b") as file, mmap.mmap(file.fileno(), 40) as mapped:
            memoryview(mapped).cast("Q")[STAGE] = 2
    _, said = process.communicate(timeout=LONG_S)
    return Outcome(process.returncode, read(counts), said)


def read(counts: Path) -> list[int]:
    data = counts.read_bytes() if counts.exists() else b""
    return list(memoryview(data.ljust(40, b"\0")).cast("Q"))


def found_in(store: Path) -> list[object]:
    """What the store gives back, after recovery."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        with eventrun.open(store, quiet=True) as client:
            client.recovery().result(LONG_S)
            assert not client.verify().result(LONG_S).problems
            return logged(client).get("full-0", [])


def held_against(outcome: Outcome, found: list[object]) -> Tally:
    """Compare with what the client promised while the disk was filling up."""
    promised = max(outcome.counts[SAFE], outcome.counts[DURABLE])
    if outcome.counts[STAGE] == 2:  # space came back, and it said that all is crash_safe again
        promised = outcome.counts[RETURNED]
    return compare(outcome.counts[RETURNED] + 1, promised, found)


def ends_well(outcome: Outcome, end: str) -> bool:
    """Tell whether the process died of nothing but its own hand, and no log call failed."""
    expected = 0 if end == "close" else -signal.SIGKILL
    return outcome.code == expected and "Traceback" not in outcome.said


# journals, log and views take the space: where it ends the sweep moves through their first allocations, arena by arena,
# and the growth of the write-ahead file.
def steps(times: int) -> list[int]:
    if times <= 2:
        return [4_500_000, 1_500_000][:times]
    last = 14 << 20
    return [step * last // max(times - 1, 1) for step in range(times)]


@pytest.mark.crash
@needs("mount", "mkfs.ext4")
@pytest.mark.parametrize("kind", ["tmpfs", "ext4-1024", "ext4-4096"])
def test_a_disk_that_gets_full_costs_nothing_that_was_promised(
    tmp_path: Path, table: Table, kind: str
) -> None:
    """With any amount of space left, full for ever until a SIGKILL, or until space comes back: what was called
    crash_safe or durable is there, no log call fails, and all is crash_safe again when there is space."""
    total, times = Tally(), 0
    spaces = steps(rounds(1 if kind == "ext4-4096" else 2, 20))
    with disk(tmp_path / kind, kind) as place:
        for space in spaces:
            for end in ("kill", "back") if FULL else (("kill", "back")[times % 2],):
                place.store.mkdir()  # or there is no place to open, which is told
                place.leave(space)
                outcome = run(place, tmp_path / f"{kind}{times}", end, 8_000)
                assert ends_well(outcome, end), (space, end, outcome)
                place.clear()
                found = held_against(outcome, found_in(place.store))
                assert found.good, (space, end, outcome, found)
                total, times = total.plus(found), times + 1
                subprocess.run(["rm", "-r", str(place.store)], check=True)
    table.add(4, f"{kind}: full for ever, or until space comes back", times, total)
    assert total.acknowledged


HOLES = """
import os
from eventrun.journal import segments
os.posix_fallocate = lambda descriptor, start, size: os.ftruncate(descriptor, size)
segments._room = lambda folder: 1 << 40
"""


@pytest.mark.crash
@needs("mount")
def test_a_journal_with_holes_is_caught(tmp_path: Path, table: Table) -> None:
    """The test above can fail: where a journal's space isn't taken beforehand, a full disk ends the process."""
    with disk(tmp_path / "holes", "tmpfs") as place:
        place.store.mkdir()
        place.leave(1_500_000)
        outcome = run(place, tmp_path / "counts", "kill", 12_000, prelude=HOLES)
    assert outcome.code == -signal.SIGBUS
    table.caught(4, "journal with holes instead of space", 1, 1)


SAFE_TOO_EARLY = """
from eventrun.journal.segments import JournalFolder
JournalFolder.crash_safe = property(lambda folder: True)
"""


@pytest.mark.crash
@needs("mount")
def test_a_promise_that_is_not_kept_is_caught(tmp_path: Path, table: Table) -> None:
    """The test above can fail: a client that calls crash_safe what only its memory has is found out."""
    with disk(tmp_path / "early", "tmpfs") as place:
        place.store.mkdir()
        place.leave(500_000)
        outcome = run(place, tmp_path / "counts", "kill", 12_000, prelude=SAFE_TOO_EARLY)
        place.clear()
        found = held_against(outcome, found_in(place.store))
    assert ends_well(outcome, "kill")
    assert found.lost
    table.caught(4, "called crash_safe, and in memory", 1, 1)


LIMITED = """
import resource
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, hard))
def back():
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
"""


@pytest.mark.crash
@pytest.mark.parametrize("end", ["kill", "back"])
def test_a_limit_of_file_sizes(tmp_path: Path, table: Table, end: str) -> None:
    """Under `ulimit -f` the same holds: no signal ends the process, what was promised is there."""
    total = Tally()
    sizes = [50_000 * 3**step for step in range(rounds(2, 6))][1:]
    for size in sizes:
        place = Disk(tmp_path / f"{size}", tmp_path / "none")
        place.store.mkdir(parents=True)
        outcome = run(place, tmp_path / f"counts{size}", end, 5_000, prelude=LIMITED.format(size=size))
        assert ends_well(outcome, end), (size, outcome)
        found = held_against(outcome, found_in(place.store))
        assert found.good, (size, outcome, found)
        total = total.plus(found)
    table.add(4, f"ulimit -f, {'for ever' if end == 'kill' else 'then lifted'}", len(sizes), total)


WRITTEN = """
from eventrun.journal import segments
init = segments.JournalFolder.__init__
segments.JournalFolder.__init__ = lambda self, path, **_: init(self, path, mapped=False)
"""


@pytest.mark.crash
@needs("strace")
@pytest.mark.parametrize("journal", ["mapped", "written"])
def test_writes_that_find_no_space(tmp_path: Path, table: Table, journal: str) -> None:
    """From any write on the disk takes no more: log and journals, mapped or written, keep what was promised."""
    total = Tally()
    firsts = (60, 2, 11, 20, 37, 150, 400, 1000)[: rounds(1, 8)]
    for first in firsts:
        place = Disk(tmp_path / f"{first}", tmp_path / "none")
        place.store.mkdir(parents=True)
        strace = ("strace", "-qq", "-f", "-o", "/dev/null", "-e", "trace=pwrite64",
                  "-e", f"inject=pwrite64:error=ENOSPC:when={first}+")  # fmt: skip
        prelude = WRITTEN if journal == "written" else ""
        outcome = run(place, tmp_path / f"counts{first}", "kill", 2_000, prelude=prelude, python=strace)
        assert ends_well(outcome, "kill"), (first, outcome)
        found = held_against(outcome, found_in(place.store))
        assert found.good, (first, outcome, found)
        total = total.plus(found)
    table.add(4, f"ENOSPC at each write from the nth on, {journal} journal", len(firsts), total)
    assert total.acknowledged


LITTLE_MEMORY = """
from eventrun.journal import segments
segments.MEMORY_BYTES = 400_000
"""


@pytest.mark.crash
@needs("mount")
def test_what_is_dropped_is_counted(tmp_path: Path, table: Table) -> None:
    """When memory is full too, events are dropped, told of and counted: what is there and what is counted make up what
    was recorded, and the rest is in order."""
    with disk(tmp_path / "drop", "tmpfs") as place:
        place.store.mkdir()
        place.leave(100_000)
        outcome = run(place, tmp_path / "counts", "back", 6_000, prelude=LITTLE_MEMORY)
        assert ends_well(outcome, "back"), outcome
        found = found_in(place.store)
    returned, dropped = outcome.counts[RETURNED], outcome.counts[DROPPED]
    assert dropped > 0
    assert "events are lost" in outcome.said
    assert found == sorted(set(map(int, map(str, found))))
    assert len(found) + dropped == returned
    kept = returned - dropped
    table.add(4, "disk and memory full: dropped, and counted", 1, Tally(kept, len(found)))


@pytest.mark.crash
@needs("mount", "mkfs.ext4")
@pytest.mark.parametrize("kind", ["tmpfs", "ext4-1024"])
def test_reading_on_a_full_disk(tmp_path: Path, kind: str) -> None:
    """What the log holds can be read on a full disk, or a clear error says what is missing; closing there says what
    became of the events; when there is space, what a killed writer left is taken in."""
    with disk(tmp_path / kind, kind) as place:
        place.store.mkdir()
        place.leave(9_000_000)
        killed = run(place, tmp_path / "killed", "kill", 4_000)
        place.leave(0)
        closed = run(place, tmp_path / "closed", "close", 1_000)
        assert ends_well(closed, "close"), closed
        assert "events are lost" in closed.said
        shown = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "eventrun", "--store", str(place.store), "ls"],
            capture_output=True,
            text=True,
            timeout=LONG_S,
        )
        assert "Traceback" not in shown.stderr
        assert shown.returncode == 0 or "the disk is full; free some space" in shown.stderr, shown
        place.clear()
        found = held_against(killed, found_in(place.store))
    assert found.good, (killed, found)
