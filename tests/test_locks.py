"""Turns: of many processes one has the turn, whatever locks the disk has, and a dead one's is taken over."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from eventrun import locks
from eventrun.locks import STALE_S, Turn, owner


def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)


def age(path: Path, seconds: float) -> None:
    """Make a file look as if nobody had touched it for so long."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def the_file(folder: Path) -> Path:
    (path,) = folder.glob("turn.*")
    return path


@pytest.mark.parametrize("flock", [True, False])
def test_one_at_a_time(tmp_path: Path, flock: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one has the turn nobody else gets it; given back, the next one does; one file is left of all of them."""
    if not flock:
        without_flock(monkeypatch)
    first, second = Turn(tmp_path, "turn"), Turn(tmp_path, "turn")
    for one, other in ((first, second), (second, first)) * 3:
        assert one.take()
        assert [one.held, other.take(), other.held] == [True, False, False]
        assert other.holder()["pid"] == os.getpid()
        one.give_back()
        assert other.holder() == {}
        the_file(tmp_path)


def test_a_dead_holder_of_this_host_is_followed_at_once(tmp_path: Path) -> None:
    """The file lock of a killed process is free, so nobody waits; a living one keeps its turn without a beat."""
    code = "import sys, time; from pathlib import Path; from eventrun.locks import Turn\n"
    code += "t = Turn(Path(sys.argv[1]), 'turn'); print(t.take(), flush=True); time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        age(the_file(tmp_path), 1000)
        mine = Turn(tmp_path, "turn")
        assert not mine.take()
        process.kill()
    assert mine.take()


def test_a_holder_elsewhere_is_followed_when_its_beat_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without file locks the mtime decides; who was taken for dead notices, and its file is gone."""
    without_flock(monkeypatch)
    there, here = Turn(tmp_path, "turn"), Turn(tmp_path, "turn")
    assert there.take()
    path = the_file(tmp_path)
    age(path, STALE_S - 5)
    assert not here.take()
    age(path, STALE_S + 5)
    there.beat()
    assert not here.take()
    age(path, STALE_S + 5)
    assert here.take()
    assert here.held
    assert not there.held
    assert not path.exists()
    there.give_back()  # which is nothing any more
    assert here.held
    assert not there.take()


def test_who_was_slow_to_look_steps_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who saw a stale turn long ago doesn't get a number that was used and removed meanwhile."""
    without_flock(monkeypatch)
    gone, slow, others = (Turn(tmp_path, "turn") for _ in range(3))
    assert gone.take()
    age(the_file(tmp_path), STALE_S + 5)
    look = Turn._is_over
    first: list[int] = []

    def meanwhile(turn: Turn, number: int) -> bool:
        over = look(turn, number)
        if turn is slow and not first:
            first.append(number)
            assert others.take()
            others.give_back()
            assert others.take()
        return over

    monkeypatch.setattr(Turn, "_is_over", meanwhile)
    assert not slow.take()
    assert first == [1]
    assert others.held
    assert the_file(tmp_path).name == "turn.3"


RACE = """
import sys, time, eventrun.locks
from pathlib import Path
eventrun.locks.STALE_S = 1000
folder = Path(sys.argv[1])
if sys.argv[2] == "no flock":
    eventrun.locks.try_lock = lambda descriptor: None
turn = eventrun.locks.Turn(folder, "turn")
for _ in range(60):
    while not turn.take():
        time.sleep(0.001)
    count = folder / "count"
    number = int(count.read_text()) if count.exists() else 0
    time.sleep(0.0005)
    count.write_text(str(number + 1))
    assert turn.held
    turn.give_back()
"""


@pytest.mark.parametrize("flock", ["flock", "no flock"])
def test_processes_exclude_each_other(tmp_path: Path, flock: str) -> None:
    """Four processes that add to a number only in their turn lose none."""
    racing = [subprocess.Popen([sys.executable, "-c", RACE, tmp_path, flock]) for _ in range(4)]
    assert [process.wait(120) for process in racing] == [0] * 4
    assert (tmp_path / "count").read_text() == "240"


def test_a_forks_child_has_no_turn(tmp_path: Path) -> None:
    """The turn stays with the parent; the child's end doesn't give it back."""
    turn = Turn(tmp_path, "turn")
    assert turn.take()
    if (child := os.fork()) == 0:
        held = turn.held
        turn.give_back()
        os._exit(1 if held else 0)
    assert os.waitpid(child, 0)[1] == 0
    assert turn.held
    assert not Turn(tmp_path, "turn").take()


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    """The error is the disk's own."""
    with pytest.raises(OSError, match="No such file"):
        Turn(tmp_path / "missing", "turn").take()


def test_a_disks_time_is_that_of_its_files(tmp_path: Path) -> None:
    """The probe leaves nothing behind."""
    now = locks.now_ns(tmp_path)
    assert abs(now - time.time_ns()) < 60e9
    assert not any(tmp_path.iterdir())
    assert locks.is_owner_here({**owner()})
    assert not locks.is_owner_here({})
