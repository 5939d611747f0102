"""3. Power loss: of what was written but not synced any part may be on the disk."""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import eventrun
from eventrun import filesystems
from eventrun.errors import LogDamaged
from eventrun.projector import Views
from tests.crash.harness import LONG_S, Table, Tally, compare, copy_store, logged, needs, rounds
from tests.crash.power import Mark, Step, images, record
from tests.crash.power_workload import SCENARIOS, mounts

pytestmark = pytest.mark.crash

SHARED_MEMORY = Path("/dev/shm")
# What was not durable may be lost; journals and the write-ahead file show that, and it is told. Nothing else may be.
TOLD = re.compile(
    r"[0-9a-f]{16}: .*\(the machine went down.*\)|journals/[0-9a-f]{16}(\.damaged)?: (?!.*differ).*"
    r"|log\.db-wal bytes .*"
)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Give a folder in memory, where there is one: what counts is which syncs are asked for, not how long they take."""
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def recording(place: Path) -> list[Step]:
    """Record all scenarios in one go."""
    return record([sys.executable], place / "all", SCENARIOS)


def check(image: Path, marks: list[Mark], *, views: bool = False) -> Tally:
    """Open what a power cut has left, as a user would; hold it against what the workload had been told by then."""
    for file in image.rglob("collecting.*"):
        os.utime(file, (0, 0))  # it takes a while until the machine is there again
    durable = {mark.trial: mark.events for mark in marks if mark.kind == "durable"}
    sent = {mark.trial: mark.events for mark in marks if mark.kind == "sent"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the same texts are in the report
        with eventrun.open(image / "of" / "a" / "user" / "runs", quiet=True) as client:
            reported = list(client.recovery().result(LONG_S).problems)
            found = logged(client)
            folded = {
                trial.name: trial.metrics["i"].count for trial in client.trials() if "i" in trial.metrics
            }
            report = client.verify(views=views).result(LONG_S)
    reported += map(str, report.problems)
    counts = {trial: len(values) for trial, values in found.items()}
    if report.views_ok is False or folded != counts:
        reported.append(f"the views hold {folded}, the log {counts}")
    total = Tally(reported=tuple(reported))
    for trial in sent:
        total = total.plus(compare(sent[trial], durable.get(trial, 0), found.get(trial, [])))
    return total


def on_its_disk(scenario: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the images lie on a network disk, if the scenario did."""
    if scenario == "network":
        (place / "mounts").write_text(mounts(place))
        monkeypatch.setattr(filesystems, "MOUNTINFO", place / "mounts")
        monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))


@needs("strace")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_power_loss_costs_nothing_that_was_flushed(
    recording: list[Step], place: Path, table: Table, monkeypatch: pytest.MonkeyPatch, scenario: str
) -> None:
    """Wherever the power goes, the store opens, and all that a flush had acknowledged is there, in order, once.

    Nothing is reported but journals that were not whole, and the views hold what the log does.
    """
    times = rounds(15, 300)
    total = Tally()
    on_its_disk(scenario, place, monkeypatch)
    for image, marks in images(recording, place / "all" / scenario, place, times, random.Random(times)):
        found = check(image, marks, views=scenario == "views")
        assert found.good, (image, found)
        assert all(map(TOLD.fullmatch, found.reported)), (image, found)
        total = total.plus(found)
        shutil.rmtree(image)
    table.add(3, f"power loss: {scenario}", times, total)
    assert total.acknowledged > times


SYNCHRONOUS_NORMAL = """
from eventrun.stores.sqlite import connection
connection.DURABLE[:] = ["PRAGMA synchronous = NORMAL"]
connection.TO_APPEND[:] = [*connection.DURABLE, *connection.TO_APPEND[1:]]
"""
FRAGMENTS_NOT_SYNCED = """
from eventrun.journal.fragments import FragmentFolder
FragmentFolder.sync = lambda self: None
"""
PARENTS_NOT_SYNCED = """
from eventrun.stores.sqlite import connection
connection.sync_parents = lambda folder: None
"""


@needs("strace")
@pytest.mark.parametrize(
    ("broken", "scenario", "prelude"),
    [
        ("synchronous = NORMAL", "one_trial", SYNCHRONOUS_NORMAL),
        ("new parent folders not synced", "one_trial", PARENTS_NOT_SYNCED),
        ("fragments on a network disk not synced", "network", FRAGMENTS_NOT_SYNCED),
    ],
)
def test_a_sync_that_is_left_out_is_caught(
    place: Path, table: Table, monkeypatch: pytest.MonkeyPatch, broken: str, scenario: str, prelude: str
) -> None:
    """The test above can fail: without these syncs a power loss takes what a flush had acknowledged."""
    root, times = place / re.sub(r"\W", "", broken), rounds(20, 300)
    steps = record([sys.executable], root, [scenario], prelude)
    on_its_disk(scenario, place, monkeypatch)
    caught = 0
    for image, marks in images(steps, root / scenario, place, times, random.Random(times)):
        try:
            caught += not check(image, marks).good
        except LogDamaged:
            caught += 1
        shutil.rmtree(image)
    table.caught(3, broken, times, caught)
    assert caught


def views_that_outlived_the_log(place: Path) -> Path:
    """Make a store whose views have read events that the log has lost, and has others in the place of."""
    with eventrun.open(place / "runs", quiet=True) as client:
        trial = client.trial("crash", name="a")
        trial.log(i=0)
        client.flush().result(LONG_S)
        shorter = copy_store(place / "runs", place / "shorter")
        shutil.rmtree(shorter / "journals")
        for i in range(1, 10):
            trial.log(i=i)
        assert [found.metrics["i"].last for found in client.trials()] == [9]
        client.flush().result(LONG_S)
        trial.finish()
    for file in (place / "runs").glob("views*"):
        shutil.copy(file, shorter)
    (shorter / "log.mark").unlink()
    with eventrun.open(shorter, quiet=True) as client:
        other = client.trial("crash", resume=trial.id)
        for i in range(20):  # beyond the position that the views have reached
            other.log(i=100 + i)
        other.finish()
    return shorter


def test_views_that_outlive_the_end_of_the_log_are_not_believed(tmp_path: Path) -> None:
    """If the log has lost its end and the views have not, they are made anew, also when the log has grown past them."""
    store = views_that_outlived_the_log(tmp_path)
    with eventrun.open(store, quiet=True) as client:
        (trial,) = client.trials()
        assert (trial.metrics["i"].count, trial.metrics["i"].min) == (21, 0)
        assert list(client.history("a", "i").result(LONG_S).values) == [0, *range(100, 120)]
        assert client.verify(views=True).result(LONG_S).ok


def test_views_that_are_believed_are_caught(
    tmp_path: Path, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: views that aren't held against the log keep what it has lost."""
    monkeypatch.setattr(Views, "_check_same_log", lambda *_: None)
    store = views_that_outlived_the_log(tmp_path)
    with eventrun.open(store, quiet=True) as client:
        caught = not client.verify(views=True).result(LONG_S).ok
    table.caught(3, "views not held against the log", 1, caught)
    assert caught
