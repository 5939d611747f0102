"""12. Clocks: the wall clock jumps by hours while a trial logs; order and durations don't come from it."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import eventrun
from eventrun.codec import StoredEvent
from eventrun.events import MetricsLogged
from tests.crash.harness import LONG_S, Table, Tally, compare, needs, rounds

pytestmark = [pytest.mark.crash, needs("faketime")]

HOUR_S = 3600
EVENTS = 10  # between two jumps
CLOCKS = {"1970": "@1970-01-01 00:00:02", "2200": "@2200-01-01 12:00:00"}

# Logs 0, 1, 2, ..., EVENTS after each setting of the clock, and tells what it has seen.
WORKLOAD = """
import json, os, sys, threading, time
store, settings, how, prelude = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
exec(prelude, {"__name__": "prelude"})
import eventrun
pause = threading.Event().wait  # libfaketime takes time.sleep(), which waits for a moment, for a long time or an error

def set_clock(setting):
    with open(os.environ["FAKETIME_TIMESTAMP_FILE"] + ".new", "w") as file:
        file.write(setting)
    os.rename(file.name, os.environ["FAKETIME_TIMESTAMP_FILE"])

client = eventrun.open(store, linger_ms=5, close_timeout_s=1 if how == "stuck" else 60, quiet=True)
trial = client.trial("clocks", name="t")
done = 0
trial.start()
for setting in settings:
    with trial.chrono("jump"):
        set_clock(setting)
        for _ in range(10):
            trial.log(i=done)
            done += 1
        pause(0.01)
    if how == "flush":
        client.flush().result()
    elif how == "linger":  # the flusher comes by itself, whatever the clock says
        deadline = time.monotonic() + 100
        while client.statistics().durable < client.statistics().recorded:
            assert time.monotonic() < deadline, "the flusher hangs"
            pause(0.005)
if how == "kill":
    print(done, flush=True)
    os.kill(os.getpid(), 9)
trial.finish()
if how == "stuck":
    print(done, flush=True)
client.close()
print(done, flush=True)
"""


class Seen(NamedTuple):
    """What a store holds of the one trial of a workload."""

    state: eventrun.TrialState
    logged: list[StoredEvent]  # the metrics, as they lie in the log
    history: list[Any]
    reported: tuple[str, ...]

    def tally(self, sent: int) -> Tally:
        """Compare with what was sent: in the order of the calls, in the log and in the history."""
        values = [
            stored.event.values["i"] for stored in self.logged if isinstance(stored.event, MetricsLogged)
        ]
        found = compare(sent, sent, values)
        return found._replace(
            reported=(*self.reported, *(["another history"] if self.history != values else []))
        )


def command(store: Path, settings: Sequence[str], how: str = "flush", prelude: str = "") -> list[str]:
    """Give the command line of a workload."""
    return [sys.executable, "-c", WORKLOAD, str(store), json.dumps(settings), how, prelude]


def environment(place: Path, begin: str) -> dict[str, str]:
    """Let a process live by a clock that it can set itself, but for the monotonic one."""
    clock = place / "clock"
    clock.write_text(begin)
    told = subprocess.run(["faketime", "-f", "+0", "env"], capture_output=True, text=True, check=True).stdout
    preload = dict(line.split("=", 1) for line in told.splitlines() if "=" in line)["LD_PRELOAD"]
    return {
        **os.environ,
        "LD_PRELOAD": preload,
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def run(place: Path, settings: Sequence[str], how: str = "flush", prelude: str = "") -> int:
    """Run a workload to its end, and return how many numbers it has logged."""
    done = subprocess.run(
        command(place / "runs", settings, how, prelude),
        env=environment(place, settings[0]), capture_output=True, text=True, timeout=LONG_S,
    )  # fmt: skip
    assert done.returncode == (-9 if how == "kill" else 0), done.stderr
    return int(done.stdout.split()[-1])


def look(store: Path) -> Seen:
    """Open a store by the true clock, and read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the same texts are in the report
        with eventrun.open(store, quiet=True) as client:
            reported = list(client.recovery().result(LONG_S).problems)
            logged = [stored for stored in client.events() if isinstance(stored.event, MetricsLogged)]
            history = list(client.history("t", "i").result(LONG_S).values)
            report = client.verify(views=True).result(LONG_S)
            reported += [
                *map(str, report.problems),
                *([] if report.views_ok else ["the views differ from the log"]),
            ]
            return Seen(client.get("t").result(LONG_S), logged, history, tuple(reported))


def jumps(chance: random.Random) -> list[str]:
    """Draw settings of the clock: hours forward and back, one time one of the far ends."""
    far = chance.choice([*CLOCKS.values(), "+0"])
    found = [f"{chance.choice('+-')}{chance.randint(2, 20)}h" for _ in range(2)] + [far, "+9h", "-9h", "+0"]
    chance.shuffle(found)
    return found


def absurd(seconds: float | None) -> bool:
    """Tell whether a duration can't have been: less than nothing, or longer than a test may take."""
    return seconds is None or not 0 <= seconds < LONG_S


def backwards(logged: Sequence[StoredEvent]) -> float:
    """Give the longest way back that the wall clock went from one event to the next, in seconds."""
    return max(before.time_ns - after.time_ns for before, after in pairwise(logged)) / 1e9


def test_jumps_change_neither_order_nor_durations(tmp_path: Path, table: Table) -> None:
    """With a clock that jumps: all is there in the order of the calls, chronos and trial lasted as long as they did.

    `last` is that of the latest time, a past moment what had a time up to it, and nobody waits for the clock.
    """
    times, total = rounds(2, 60), Tally()
    for number in range(times):
        place = tmp_path / str(number)
        place.mkdir()
        sent = run(place, jumps(random.Random(number)), ("flush", "linger")[number % 2])
        seen = look(place / "runs")
        found = seen.tally(sent)
        assert found.good, found
        assert not found.reported
        assert backwards(seen.logged) > HOUR_S, "the clock didn't jump"
        assert seen.state.status == "completed"
        assert not absurd(seen.state.duration_s)
        assert not absurd(seen.state.chronos["jump"].min)
        assert not absurd(seen.state.chronos["jump"].max)
        latest = max(seen.logged, key=lambda stored: (stored.time_ns, stored.sequence))
        assert latest.event == MetricsLogged({"i": seen.state.metrics["i"].last})
        check_the_past(place / "runs", seen.logged)
        total = total.plus(found)
    table.add(12, "the wall clock jumps by hours", times, total)


def check_the_past(store: Path, logged: Sequence[StoredEvent]) -> None:
    """At a time there is what has a time up to it, wherever it stands in the log."""
    with eventrun.open(store, quiet=True) as client:
        for stored in logged[:: EVENTS * 2]:
            until = [each for each in logged if each.time_ns <= stored.time_ns]
            past = client.at(time=stored.time_ns)
            assert past.get("t").result(LONG_S).metrics["i"].count == len(until)
            values = [each.event.values["i"] for each in until if isinstance(each.event, MetricsLogged)]
            assert list(past.history("t", "i").result(LONG_S).values) == values


@pytest.mark.parametrize("year", CLOCKS)
def test_clocks_far_off(tmp_path: Path, table: Table, year: str) -> None:
    """A machine whose clock was never set, or is centuries ahead, records, and is read by one that goes right."""
    sent = run(tmp_path, [CLOCKS[year]] * 3, "linger")
    seen = look(tmp_path / "runs")
    found = seen.tally(sent)
    table.add(12, f"the clock stands at {year}", 1, found)
    assert found.good, found
    assert not found.reported
    assert not absurd(seen.state.duration_s)
    assert {time.gmtime(stored.time_ns // 10**9).tm_year for stored in seen.logged} == {int(year)}
    ls = [sys.executable, "-m", "eventrun", "--store", str(tmp_path / "runs"), "ls"]
    shown = subprocess.run(ls, capture_output=True, text=True, timeout=LONG_S)
    assert shown.returncode == 0, shown.stderr


@pytest.mark.parametrize("clock", ["+5h", "-5h"])
def test_a_killed_writer_is_lost_by_any_clock(tmp_path: Path, table: Table, clock: str) -> None:
    """Whether the clock was ahead or behind when it was killed: its events are taken in, and the trial is lost."""
    sent = run(tmp_path, ["+0", clock, "+3h"], "kill")
    seen = look(tmp_path / "runs")
    found = seen.tally(sent)
    table.add(12, f"killed while the clock jumped by {clock}", 1, found)
    assert found.good, found
    assert not found.reported
    assert seen.state.status == "lost"


@pytest.mark.parametrize("clock", ["+5h", "-5h"])
def test_close_waits_no_longer_because_of_a_clock(tmp_path: Path, table: Table, clock: str) -> None:
    """With the log held by another process, close gives up after its time, and the next open takes in what is left."""
    store = tmp_path / "runs"
    with eventrun.open(store, quiet=True) as client:
        client.trial("clocks", name="before").log(i=0)
    holder = sqlite3.connect(store / "log.db", isolation_level=None)
    try:
        holder.execute("BEGIN IMMEDIATE")
        done = subprocess.run(
            command(store, ["+0", clock], "stuck"),
            env=environment(tmp_path, "+0"), capture_output=True, text=True, timeout=LONG_S,
        )  # fmt: skip
    finally:
        holder.close()
    assert done.returncode == 0, done.stderr
    assert "are not in the log yet" in done.stderr
    with eventrun.open(store, quiet=True) as client:
        counts = sorted(trial.metrics["i"].count for trial in client.trials())
    table.add(12, f"closed while the clock jumped by {clock}", 1, Tally(1 + 2 * EVENTS, sum(counts)))
    assert counts == [1, 2 * EVENTS]


BY_THE_WALL = """
import time, eventrun.trial
eventrun.trial.monotonic_ns = time.time_ns
"""


def test_what_comes_from_the_wall_clock_is_caught(tmp_path: Path, table: Table) -> None:
    """The tests above can fail: by the wall clock a trial and a chrono take absurdly long, and the order is another."""
    sent = run(tmp_path, ["+0", "+5h", "-5h", "-9h", "+7h"], prelude=BY_THE_WALL)
    seen = look(tmp_path / "runs")
    chrono = seen.state.chronos["jump"]
    by_time = seen._replace(logged=sorted(seen.logged, key=lambda stored: stored.time_ns))
    caught = {
        "chrono measured by the wall clock": absurd(chrono.min) or absurd(chrono.max),
        "trial measured by the wall clock": absurd(seen.state.duration_s),
        "order by the wall clock": not by_time.tally(sent).good,
    }
    for broken, found in caught.items():
        table.caught(12, broken, 1, found)
    assert all(caught.values()), caught
