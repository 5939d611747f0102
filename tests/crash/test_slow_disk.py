"""6. A slow disk: each fsync takes two seconds. Log calls don't notice, memory stays bounded, statistics tell."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import eventrun
from tests.crash.harness import FULL, LONG_S, Run, Table, needs, tally

DELAY_S = 2.0
CLOSE_DELAY_S = 6.0
EVENTS = 200_000 if FULL else 8_000
ITEM_BYTES = 2000
MEMORY_BYTES = (
    64 << 20
)  # a commit as it lies in the journal, its batches, SQLite's and zlib's buffers; not the backlog

# Logs, counts the calls that took as long as the disk, looks now and then, waits until all is durable, is gone.
LOGGING = """
import json, mmap, os, sys, time
from pathlib import Path
import eventrun

def anonymous_bytes():
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024

store, counts, events, item_bytes, long_s = sys.argv[1:]
events, item_bytes, long_s = int(events), int(item_bytes), float(long_s)
with open(counts, "w+b") as file:
    file.truncate(16)
    mapped = memoryview(mmap.mmap(file.fileno(), 16)).cast("Q")
client = eventrun.open(store, linger_ms=20, quiet=True)
trial = client.trial("crash", name="slow-0")
pad = os.urandom(item_bytes // 2).hex()
seen, long_calls = [], 0
before = anonymous_bytes()

def look():
    found = client.statistics()
    seen.append((found.held_bytes, found.journal_bytes, anonymous_bytes() - before, found.commits))

for i in range(events):
    begun = time.perf_counter()
    trial.log({"i": i, "pad": pad}, step=i)
    long_calls += time.perf_counter() - begun > long_s
    mapped[0] = i + 1
    if i % 200 == 199:
        time.sleep(0.06)
        look()
client.flush().result()
mapped[1] = events
look()
trial.finish()
client.flush().result()
print(json.dumps({"long_calls": long_calls, "seen": seen}), flush=True)
os._exit(0)
"""


CLOSING = """
import sys, time, eventrun
with open(sys.argv[2], "wb") as counts:
    counts.write((100).to_bytes(8, "little") + bytes(8))
client = eventrun.open(sys.argv[1], linger_ms=20, close_timeout_s=1, quiet=True)
trial = client.trial("crash", name="slow-0")
for i in range(100):
    trial.log(i=i)
begun = time.perf_counter()
client.close()
print(time.perf_counter() - begun, flush=True)
"""


WAITS = """
from eventrun.trial import Trial
log = Trial.log
def waits(self, *arguments, **options):
    log(self, *arguments, **options)
    if self._owner.statistics().held_bytes > 300_000:
        self._owner.flush().result()
Trial.log = waits
"""


class Slow:
    """A process on a slow disk: Python, and a store that was made while the disk was fast."""

    def __init__(self, place: Path, code: str, *more: str, delay_s: float = DELAY_S) -> None:
        place.mkdir()
        self.store = place / "runs"
        self.run = Run("slow", place / "counts")
        self._errors = place / "stderr"
        self._trace = place / "trace"
        with eventrun.open(self.store, quiet=True) as client:
            client.trial("crash", name="before").finish()
        # Apart from what strace itself has to say of a process that ends in a slow call.
        apart = f"import os; os.dup2(os.open({str(self._errors)!r}, os.O_CREAT | os.O_WRONLY), 2)\n"
        inject = f"inject=fsync,fdatasync:delay_enter={round(delay_s * 1e6)}"
        strace = ["strace", "-qq", "-f", "-o", str(self._trace), "-e", "trace=fsync,fdatasync", "-e", inject]
        python = [sys.executable, "-c", apart + code, str(self.store), str(self.run.counts), *more]
        self._process = subprocess.Popen(
            [*strace, *python],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def end(self) -> tuple[Any, list[str]]:
        """Wait for its end; give the JSON that it wrote to stdout, and the lines that it wrote to stderr."""
        out, _ = self._process.communicate(timeout=LONG_S * 3)
        errors = self._errors.read_text()
        assert not self._process.returncode, errors
        assert "sync(" in self._trace.read_text()
        return json.loads(out), errors.splitlines()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Slow]]:
    """Start all that this file is about at once: nothing but waiting is done there."""
    place = tmp_path_factory.mktemp("slow")
    numbers = [str(ITEM_BYTES), str(DELAY_S / 2)]
    some = {
        "log": Slow(place / "log", LOGGING, str(EVENTS), *numbers),
        "waits": Slow(place / "waits", WAITS + LOGGING, "200", *numbers),
        "close": Slow(place / "close", CLOSING, delay_s=CLOSE_DELAY_S),
    }
    yield some
    for each in some.values():
        each._process.wait(LONG_S * 3)


@needs("strace")
@pytest.mark.crash
def test_a_slow_disk(table: Table, started: dict[str, Slow]) -> None:
    """While each fsync takes two seconds, no log call waits for one, the backlog is told, and lies in journals.

    Memory doesn't grow with it. When the log has it all, nothing is held any more.
    """
    found, errors = started["log"].end()
    assert not errors
    assert found["long_calls"] == 0
    held, journals, memory, commits = zip(*found["seen"], strict=True)
    assert max(held) > EVENTS * ITEM_BYTES / 3
    assert all(journal >= backlog for backlog, journal in zip(held, journals, strict=True))
    assert max(memory) < MEMORY_BYTES
    assert held[-1] == 0
    assert commits[-1] > 1
    came = tally(started["log"].store, [started["log"].run])
    table.add(6, "each fsync takes 2 s", 1, came)
    assert came.good
    assert came.acknowledged == came.recovered == EVENTS
    assert not came.reported


@needs("strace")
@pytest.mark.crash
def test_closing_on_a_slow_disk(table: Table, started: dict[str, Slow]) -> None:
    """A close that needs several slow fsyncs gives up before the first one is through, and says so in one line."""
    took_s, errors = started["close"].end()
    assert took_s < CLOSE_DELAY_S
    assert len(errors) == 1
    assert "events are not in the log yet" in errors[0]
    assert "the next open of the store takes them in" in errors[0]
    came = tally(started["close"].store, [started["close"].run])
    table.add(6, "each fsync takes 6 s, close gives up after 1 s", 1, came)
    assert came.good
    assert came.acknowledged == came.recovered == 100
    assert not came.reported


@needs("strace")
@pytest.mark.crash
def test_a_log_call_that_waits_for_the_flusher_is_caught(table: Table, started: dict[str, Slow]) -> None:
    """The test above can fail: a log call that waits for room waits for the disk."""
    found, _ = started["waits"].end()
    table.caught(6, "log call waits for the flusher", 1, int(found["long_calls"] > 0))
    assert found["long_calls"]
