"""10. Forks: children of every kind log to their parent's trial, end in every way, live on when it is killed."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

import eventrun
from eventrun.events import MetricsLogged
from tests.crash.forks import VOICES
from tests.crash.harness import LONG_S, Table, Tally, compare, rounds

FORKS = str(Path(__file__).with_name("forks.py"))


class Play:
    """A family of processes on a store of its own."""

    def __init__(self, place: Path) -> None:
        place.mkdir(parents=True)
        self.place = place
        self.store = place / "runs"
        self.counts = place / "counts"
        self.counts.write_bytes(bytes(8 * VOICES))

    def run(self, scene: str, prelude: str = "", code: int = 0) -> str:
        """Play a scene to its end; give what was said."""
        # From Python 3.12 on a fork beside threads warns.
        command = [sys.executable, "-W", "ignore::DeprecationWarning", FORKS]
        command += [str(self.store), str(self.counts), scene, prelude]
        said = self.place / "said"
        with said.open("w") as file:  # not a pipe: who lives on would hold it open
            done = subprocess.run(command, stdout=file, stderr=file, timeout=LONG_S)
        assert done.returncode == code, said.read_text()
        return said.read_text()

    def compare(self) -> tuple[Tally, str]:
        """Hold what each voice counted against what can be read; also the trial's status."""
        returned = memoryview(self.counts.read_bytes()).cast("Q")
        found: dict[int, list[object]] = {}
        writers: dict[int, set[int]] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the same texts are in the report
            with eventrun.open(self.store, quiet=True) as client:
                reported = list(client.recovery().result(LONG_S).problems)
                for stored in client.events():
                    if isinstance(stored.event, MetricsLogged):
                        values = stored.event.values
                        voice = values["voice"]
                        assert isinstance(voice, int)
                        found.setdefault(voice, []).append(values["i"])
                        writers.setdefault(voice, set()).add(stored.stream.writer)
                reported += map(str, client.verify().result(LONG_S).problems)
                status = next((state.status for state in client.trials()), "")
        total = Tally()
        for voice in range(VOICES):
            total = total.plus(compare(returned[voice] + 1, returned[voice], found.get(voice, [])))
        # Each process is one writer, and no writer is two.
        shared = sum(map(len, writers.values())) - len(set().union(*writers.values()))
        split = sum(len(names) - 1 for names in writers.values())
        return total._replace(doubled=total.doubled + shared + split, reported=tuple(reported)), status


SCENES = ["ends", "chain", "double fork", "storm", "fork", "spawn", "forkserver", "data loader"]


@pytest.mark.crash
@pytest.mark.parametrize("scene", SCENES)
def test_forks(tmp_path: Path, table: Table, scene: str) -> None:
    """Whoever forks, from whatever thread, in the middle of a commit, and however the children end: each process is a
    writer of its own, none of its events is lost or doubled, and none but the parent ends its trial."""
    times = rounds(1, 20)
    total = Tally()
    for turn in range(times):
        play = Play(tmp_path / str(turn))
        said = play.run(scene)
        if scene == "double fork":
            wait_for_voices(play, {2: 20})
        found, status = play.compare()
        total = total.plus(found)
        assert said == ""
        assert status == "completed"
    table.add(10, f"forks: {scene}", times, total)
    assert total.good, total
    assert not total.reported


def wait_for_voices(play: Play, counts: dict[int, int]) -> None:
    """Wait until these voices have logged so often, and are gone."""
    begun = time.monotonic()
    while time.monotonic() - begun < LONG_S:
        returned = memoryview(play.counts.read_bytes()).cast("Q")
        if all(returned[voice] >= count for voice, count in counts.items()):
            break
        time.sleep(0.02)
    while any((play.store / "journals").iterdir()) and time.monotonic() - begun < LONG_S:
        with eventrun.open(play.store, quiet=True) as client:
            client.recovery().result(LONG_S)
        time.sleep(0.02)


@pytest.mark.crash
def test_a_killed_parent_whose_children_live(tmp_path: Path, table: Table) -> None:
    """A parent that is killed is taken in while its children live, those that log, those that don't, and other programs
    that it started with its descriptors open; what a child logs afterwards is kept as well."""
    times = rounds(1, 20)
    total = Tally()
    for turn in range(times):
        play = Play(tmp_path / str(turn))
        play.run("parent killed", code=-9)
        with eventrun.open(play.store, quiet=True) as client:
            client.recovery().result(LONG_S)
            values = [e.event.values for e in client.events() if isinstance(e.event, MetricsLogged)]
            assert [v["i"] for v in values if v["voice"] == 0] == list(range(60))
        assert len(list((play.store / "journals").iterdir())) == 1  # of the child that logs
        (play.place / "go").touch()
        wait_for_voices(play, {1: 20})
        found, _ = play.compare()
        total = total.plus(found)
    table.add(10, "forks: a killed parent, living children", times, total)
    assert total.good, total
    assert not total.reported


SAME_WRITER = "from eventrun.recorder import Recorder; Recorder.forked = lambda self: None"


@pytest.mark.crash
def test_a_child_that_keeps_its_parents_journals_is_caught(tmp_path: Path, table: Table) -> None:
    """The tests above can fail: a child that goes on as its parent's writer overwrites what that logs."""
    play = Play(tmp_path / "broken")
    play.run("left only", SAME_WRITER)
    found, _ = play.compare()
    caught = not found.good or bool(found.reported)
    table.caught(10, "a child keeps its parent's journals", 1, caught)
    assert caught
    play = Play(tmp_path / "whole")
    play.run("left only")
    found, _ = play.compare()
    assert found.good, found
    assert not found.reported
