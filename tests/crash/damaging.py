"""Stores to be damaged, and what somebody sees who opens them afterwards."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import eventrun
from eventrun.codec import StoredEvent
from eventrun.errors import LogDamaged
from eventrun.events import WriterEnded
from eventrun.salvage import salvage
from tests.crash.harness import LONG_S

Said = tuple[
    str, int, int, str
]  # subject, writer, time and event: what stays the same wherever an event lies

# A small store whose writer is killed: part of it settled, part in the write-ahead file and journals, part in journals
# alone; small arenas, so that flips meet something.
WRITER = """
import os, random, signal, sys
import eventrun.journal.segments as segments
segments.ARENA_BYTES = 1 << 18
import eventrun
chance = random.Random(1)
client = eventrun.open(sys.argv[1], quiet=True, linger_ms=9e8)
store = client._recorder.store
trials = [client.trial("p", group="g", name=f"t{n}") for n in range(3)]
def log(calls, flush):
    for step in range(calls):
        for trial in trials:
            trial.log(loss=chance.random(), accuracy=chance.random(), step=step)
        if flush and step % flush == 0:
            client.flush().result()
log(60, 4)
trials[0].log(big=chance.randbytes(15_000).hex())
client.flush().result()
if sys.argv[2] == "closed":
    for trial in trials:
        trial.finish()
    list(client.trials())
    client.close()
    sys.exit()
client._portal.call(store.settle).result()
log(20, 5)
if sys.argv[2] == "hindered":
    import sqlite3
    reader = sqlite3.connect(store.folder / "log.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM batches").fetchall()
    log(20, 2)
    client._portal.call(store._keeper.run, store._keeper.log.checkpoint).result()
if sys.argv[2] == "flushed":
    client.flush().result()
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "killed":
    for step in range(600):
        trials[0].log(pad=chance.randbytes(100).hex(), step=step)
log(10, 0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def made(folder: Path, how: str) -> Path:
    """Have a store made: closed, killed, killed with all of it in the log (flushed), or after half a checkpoint."""
    command = [sys.executable, "-c", WRITER, str(folder), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == (0 if how == "closed" else -signal.SIGKILL), done.stderr
    return folder


class Look(NamedTuple):
    """What somebody sees who opens a store: events, and everything that tells of damage."""

    events: list[StoredEvent]
    reported: list[str]


def look(store: Path) -> Look:
    """Open a store as a user would: what killed writers left is taken in, all is read, all is checked."""
    events: list[StoredEvent] = []
    reported: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the same texts are in the report
        try:
            with eventrun.open(store, quiet=True, create=False) as client:
                reported += client.recovery().result(LONG_S).problems
                try:
                    events.extend(client.events())
                except LogDamaged as error:
                    reported.append(str(error))
                reported += map(str, client.verify().result(LONG_S).problems)
        except LogDamaged as error:
            reported.append(str(error))
    return Look(events, reported)


def said(events: Sequence[StoredEvent]) -> list[Said]:
    """What was recorded, in the order of the streams; ends that recovery noticed are left out."""
    ordered = sorted(events, key=lambda each: (each.stream, each.sequence))
    return [
        (each.stream.subject, each.stream.writer, each.time_ns, repr(each.event))
        for each in ordered
        if not isinstance(each.event, WriterEnded)
    ]


def salvaged(store: Path) -> list[StoredEvent]:
    """Salvage a store and return what the new one holds; it has to be sound."""
    out = store.with_name("salvaged")
    shutil.rmtree(out, ignore_errors=True)
    report = salvage(store, out)
    found = look(out)
    assert not found.reported
    assert len(found.events) >= report.events
    return found.events


def laid(store: Path, to: Path) -> Path:
    """Copy a store, without the index that the last one who had it open left; a copy has no lock either."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(store, to, ignore=shutil.ignore_patterns("*-shm")))
