"""What the crash tests share: a process that logs, an oracle outside it, and the table of what came of it.

The oracle is a small file that the logging process maps (`workload.py`): after each log call that has returned it
counts up there, without a system call, so that the kernel keeps the count whatever becomes of the process. What the
store gives back is then compared with it: per stream `recovered == sent[:k]` and `k >= last acknowledged`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import eventrun
from eventrun.events import MetricsLogged, TrialCreated

WORKLOAD = Path(__file__).with_name("workload.py")
LONG_S = 120.0  # more than any child should ever take
FULL = os.environ.get("EVENTRUN_CRASH_FULL") == "1"


def rounds(quick: int, full: int) -> int:
    """Tell how often to try: few times in CI, often in the full run, or as EVENTRUN_CRASH_ROUNDS says."""
    asked = os.environ.get("EVENTRUN_CRASH_ROUNDS")
    return int(asked) if asked else full if FULL else quick


# what the machine can do -----------------------------------------------------------------------------------------


@cache
def _works(tool: str) -> bool:
    probes = {
        "strace": ["strace", "-f", "-o", "/dev/null", "-e", "trace=pwrite64", "true"],
        "faketime": ["faketime", "-f", "+1d", "true"],
        "setpriv": ["setpriv", "--reuid=65534", "--clear-groups", "true"],
        "mkfs.ext4": ["mkfs.ext4", "-V"],
    }
    if tool == "mount":
        with tempfile.TemporaryDirectory() as place:
            if not _runs(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]):
                return False
            return _runs(["umount", place])
    return _runs(probes[tool])


def _runs(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def needs(*tools: str) -> pytest.MarkDecorator:
    """Mark a test that can't be run without these; `dev.py crash --install` brings them, and CI fails if it skips."""
    missing = [tool for tool in tools if not _works(tool)]
    return pytest.mark.skipif(
        bool(missing), reason=f"needs {', '.join(missing)}: python3 tools/dev.py crash --install"
    )


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[Path]:
    """Mount something on a folder, like `mounted(place, "-t", "tmpfs", "-o", "size=4m", "tmpfs")`."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *options, str(place)], check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True, capture_output=True)


# the process that logs ---------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A workload that was or will be started: the trials' common name and the file that counts."""

    name: str
    counts: Path
    trials: int = 1

    def counted(self) -> list[tuple[int, int]]:
        """For each trial (log calls that have returned, events that a flush has made durable)."""
        data = self.counts.read_bytes() if self.counts.exists() else b""
        words = memoryview(data.ljust(16 * self.trials, b"\0")).cast("Q")
        return [(words[2 * i], words[2 * i + 1]) for i in range(self.trials)]

    def command(
        self,
        store: Path | str,
        *,
        events: int = 0,
        flush_every: int = 0,
        linger_ms: float = 20,
        item_bytes: int = 0,
        pause_s: float = 0,
        end: str = "close",
        patient: bool = False,
        prelude: str = "",
        python: Sequence[str] = (sys.executable,),
    ) -> list[str]:
        """Return the command line of a process that logs 0, 1, 2, ... to each of its trials (`events` 0: for ever).

        `end` is "close" or "exit" (os._exit without a close). If `patient` it goes on after a flush that failed.
        `prelude` is code that it runs first, for instance to
        break eventrun on purpose.
        """
        numbers = {
            "--events": events, "--flush-every": flush_every, "--linger-ms": linger_ms, "--item-bytes": item_bytes,
            "--pause-s": pause_s, "--trials": self.trials,
        }  # fmt: skip
        texts = {"--end": end, "--prelude": prelude}
        options = [f"{name}={value}" for name, value in {**numbers, **texts}.items()]
        options += ["--patient"] * patient
        return [*python, str(WORKLOAD), str(store), self.name, str(self.counts), *options]


# the comparison ------------------------------------------------------------------------------------------------------


class Tally(NamedTuple):
    """What came of a fault, in events; `reported`: texts about damage that somebody would see."""

    acknowledged: int = 0
    recovered: int = 0
    lost: int = 0  # acknowledged, and not there in order
    doubled: int = 0  # there twice, or never sent, or out of order
    reported: tuple[str, ...] = ()

    def plus(self, other: Tally) -> Tally:
        """Add up."""
        return Tally(
            self.acknowledged + other.acknowledged,
            self.recovered + other.recovered,
            self.lost + other.lost,
            self.doubled + other.doubled,
            (*self.reported, *other.reported),
        )

    @property
    def good(self) -> bool:
        """Nothing acknowledged is lost, nothing is there that wasn't sent, nothing twice."""
        return not self.lost and not self.doubled


def compare(sent: int, acknowledged: int, found: Sequence[object]) -> Tally:
    """Hold what one stream gave back against 0, 1, 2, ...: `sent` is the most that may be there."""
    prefix = 0
    for value in found:
        if value != prefix:
            break
        prefix += 1
    doubled = len(found) - prefix + max(prefix - sent, 0)
    return Tally(acknowledged, prefix, max(acknowledged - prefix, 0), doubled)


def logged(client: eventrun.Client) -> dict[str, list[object]]:
    """Return the values of `i` in the log by the trial's name, in the order of the log."""
    names: dict[str, str] = {}
    values: dict[str, list[object]] = {}
    for stored in client.events():
        subject, event = stored.stream.subject, stored.event
        if isinstance(event, TrialCreated):
            names[subject] = event.name
        elif isinstance(event, MetricsLogged) and "i" in event.values:
            values.setdefault(subject, []).append(event.values["i"])
    return {names.get(subject, subject): found for subject, found in values.items()}


def tally(store: Path | str, runs: Sequence[Run], *, durable: bool = False, verify: bool = True) -> Tally:
    """Open the store as a user would, and hold what it gives back against the oracle's counts.

    Acknowledged is each log call that has returned, or with `durable` (after a power loss) what was flushed.
    """
    total = Tally()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the same texts are in the report
        with eventrun.open(store, quiet=True) as client:
            reported = list(client.recovery().result(LONG_S + 2 * len(runs)).problems)
            found = logged(client)
            if verify:
                reported += map(str, client.verify().result(LONG_S + 2 * len(runs)).problems)
    for run in runs:
        for trial, (returned, flushed) in enumerate(run.counted()):
            values = found.get(f"{run.name}-{trial}", [])
            # One more may be there than was counted: its call had all but returned.
            total = total.plus(compare(returned + 1, flushed if durable else returned, values))
    return total._replace(reported=tuple(map(str, reported)))


def copy_store(store: Path, to: Path) -> Path:
    """Copy a store's folder as it lies, for one more fault."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(store, to)
    return to


# the table -----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the table."""

    number: int  # in the list of faults, 1 to 18
    fault: str
    rounds: int
    tally: Tally | None  # None: of a variant that is broken on purpose
    caught: int = 0  # rounds that showed it


class Table:
    """Collects the lines; printed at the end of the run."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, number: int, fault: str, rounds: int, tally: Tally) -> None:
        """Note what came of a fault, over all its rounds."""
        self.rows.append(Row(number, fault, rounds, tally))

    def caught(self, number: int, broken: str, rounds: int, caught: int) -> None:
        """Note in how many rounds a variant that is broken on purpose was caught."""
        self.rows.append(Row(number, broken, rounds, None, caught))

    def lines(self) -> list[str]:
        """Draw it."""
        head = ["", "fault", "rounds", "acknowledged", "recovered", "lost", "doubled", "reported"]
        cells = [head]
        for row in sorted(self.rows, key=lambda row: (row.number, row.tally is None)):
            if row.tally is None:
                continue
            t = row.tally
            counts = (row.rounds, t.acknowledged, t.recovered, t.lost, t.doubled, len(t.reported))
            cells.append([str(row.number), row.fault, *(f"{count:,}" for count in counts)])
        lines = _aligned(cells) if len(cells) > 1 else []
        broken = [row for row in sorted(self.rows) if row.tally is None]
        if broken:
            cells = [["", "broken on purpose", "rounds", "caught"]]
            cells += [[str(row.number), row.fault, f"{row.rounds:,}", f"{row.caught:,}"] for row in broken]
            lines += ["", *_aligned(cells)]
        return lines


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place == 1 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
