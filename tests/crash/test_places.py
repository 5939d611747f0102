"""13. Places: odd paths, disks that can't be written, folders that go away. Nothing is lost there without a word."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import eventrun
from eventrun.errors import StoreUnavailable
from tests.crash.harness import FULL, LONG_S, Run, Table, Tally, logged, mounted, needs, rounds, tally

# Without it root may write everywhere.
UNPRIVILEGED = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable)
NOBODY = 65534
CALLS = 1200


def run_and_kill(
    run: Run,
    store: Path | str,
    *,
    cwd: Path | None = None,
    prelude: str = "",
    calls: int = CALLS,
    far: bool = False,
) -> str:
    """Have a process log so often (`far`: without a flush, more than a journal's first file holds), kill it, and
    return what it said."""
    flush_every, item_bytes = (0, 20_000) if far else (1000, 20)
    command = run.command(store, prelude=prelude, flush_every=flush_every, item_bytes=item_bytes)
    process = subprocess.Popen(command, cwd=cwd, stderr=subprocess.PIPE, text=True)
    wait_for_calls(run, process, calls)
    process.kill()
    return process.communicate(timeout=LONG_S)[1]


def wait_for_calls(run: Run, process: subprocess.Popen[str], calls: int) -> None:
    deadline = time.monotonic() + LONG_S
    while run.counted()[0][0] < calls and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


# odd paths ---------------------------------------------------------------------------------------------------------


def long_path(folder: Path) -> Path:
    """Make a path as long as SQLite can open."""
    while len(os.fsencode(folder)) < 440:
        folder = folder / ("x" * min(200, 445 - len(os.fsencode(folder))))
    return folder


def linked(folder: Path) -> Path:
    """Make a link to a folder."""
    (folder / "there").mkdir()
    (folder / "link").symlink_to(folder / "there")
    return folder / "link"


PLACES: dict[str, Callable[[Path], Path]] = {
    "spaces": lambda folder: folder / " two  words ",
    "unicode": lambda folder: folder / "données 数据 \N{GRINNING FACE}",
    "newline": lambda folder: folder / "a\nb",
    "signs of URLs": lambda folder: folder / "a#b?c=d&e%20f%",
    "quotes": lambda folder: folder / 'it\'s "so" `here` \\ $HOME',
    "like an option": lambda folder: folder / "--store" / "-",
    "bytes that are not UTF-8": lambda folder: folder / os.fsdecode(b"caf\xe9"),
    "a very long path": long_path,
    "a link": linked,
    "below a link": lambda folder: linked(folder) / "deep" / "runs",
}


@pytest.mark.crash
def test_odd_paths(tmp_path: Path, table: Table) -> None:
    """Wherever a path can lead, a killed process's events are there."""
    total = Tally()
    for number, (name, place) in enumerate(PLACES.items()):
        home = tmp_path / f"{number}"
        home.mkdir()
        store, run = place(home), Run("place", tmp_path / f"counts{number}")
        said = run_and_kill(run, store)
        found = tally(store, [run])
        assert (found.good, found.reported, said) == (True, (), ""), name
        total = total.plus(found)
    table.add(13, "odd paths", len(PLACES), total)
    assert total.acknowledged >= len(PLACES) * CALLS


# The process goes elsewhere after its first file, and before its first batch.
CHDIR = """
import os
from eventrun.recorder import Recorder
begin = Recorder._begin_flushing
def elsewhere(self):
    os.chdir("/")
    begin(self)
Recorder._begin_flushing = elsewhere
"""


@pytest.mark.crash
def test_a_relative_path_and_another_directory_later(tmp_path: Path, table: Table) -> None:
    """A relative path means the directory in which the store was opened, for ever."""
    run = Run("relative", tmp_path / "counts")
    said = run_and_kill(run, "runs", cwd=tmp_path, prelude=CHDIR, far=True)
    found = tally(tmp_path / "runs", [run])
    table.add(13, "relative path, another directory later", 1, found)
    assert (found.good, found.reported, said) == (True, (), "")


RELATIVE = """
import pathlib
pathlib.Path.absolute = lambda path: path
from eventrun.journal import JournalFolder
JournalFolder.place = lambda folder: None  # or it would find its folder as if that had been renamed
"""


@pytest.mark.crash
def test_a_path_that_stays_relative_is_caught(tmp_path: Path, table: Table) -> None:
    """The test above can fail: where the path stays relative, what is recorded later goes astray."""
    run = Run("relative", tmp_path / "counts")
    run_and_kill(run, "runs", cwd=tmp_path, prelude=RELATIVE + CHDIR, far=True)
    found = tally(tmp_path / "runs", [run])
    table.caught(13, "a path that stays relative", 1, int(not found.good))
    assert not found.good


def test_places_that_can_be_no_store(tmp_path: Path) -> None:
    """A file, a path that is too long, a folder below a file: the open says so, before anything is recorded."""
    file = tmp_path / "file"
    file.write_text("not a folder")
    for place, why in (
        (file, "is a file"),
        (file / "below", "can't be made"),
        (tmp_path / ("x/" * 300), "longer path"),
    ):
        with pytest.raises(StoreUnavailable, match=why):
            eventrun.open(place, quiet=True)
    assert file.read_text() == "not a folder"


# disks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.crash
@needs("mount")
def test_a_store_on_tmpfs(tmp_path: Path, table: Table) -> None:
    """A disk in memory keeps what a killed process recorded."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=64m", "tmpfs") as disk:
        run = Run("tmpfs", tmp_path / "counts")
        said = run_and_kill(run, disk / "runs")
        found = tally(disk / "runs", [run])
    table.add(13, "tmpfs", 1, found)
    assert (found.good, found.reported, said) == (True, (), "")


@pytest.mark.crash
@pytest.mark.parametrize("kind", ["overlay", "nfs4", *FULL * ["unheard-of"]])
def test_a_store_on_a_disk_that_is_not_mapped(
    tmp_path: Path, table: Table, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where mapped files can't be trusted each call writes: what a killed process recorded is there as well."""
    mounts = tmp_path / "mounts"
    mounts.write_text(f"1 1 0:1 / / rw - ext4 a rw\n2 1 0:2 / {tmp_path / 'disk'} rw - {kind} x rw\n")
    monkeypatch.setattr("eventrun.filesystems.MOUNTINFO", mounts)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prelude = f"import pathlib, eventrun.filesystems as f; f.MOUNTINFO = pathlib.Path({str(mounts)!r})"
    run = Run("written", tmp_path / "counts")
    said = run_and_kill(run, tmp_path / "disk" / "runs", prelude=prelude)
    found = tally(tmp_path / "disk" / "runs", [run])
    table.add(13, f"a file system of kind {kind}", 1, found)
    assert (found.good, found.reported, said) == (True, (), "")


# what can't be written ---------------------------------------------------------------------------------------------

READER = """
import json, sys, warnings
import eventrun
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with eventrun.open(sys.argv[1], quiet=True, create=False) as client:
        trials = {trial.name: trial.status for trial in client.trials()}
        points = {name: len(client.history(name, "i").result()) for name in trials}
        errors = {name: client.get(name).result().error for name in trials}
        ok = client.verify().result().ok
print(json.dumps([trials, points, errors, ok, sorted({str(w.message) for w in caught})]))
"""


def read(
    store: Path, *python: str
) -> tuple[dict[str, str], dict[str, int], dict[str, str | None], bool, list[str]]:
    """Read a store in a process of its own."""
    import json

    command = [*(python or (sys.executable,)), "-c", READER, str(store)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 0, done.stderr
    trials, points, errors, ok, said = json.loads(done.stdout)
    return trials, points, errors, ok, said


@contextmanager
def read_only(way: str, folder: Path) -> Iterator[tuple[str, ...]]:
    """Make a folder one that can't be written; give the Python command that it is so for."""
    if way == "mount":
        with mounted(folder, "--bind", str(folder)):
            subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
            yield (sys.executable,)
    else:
        entries = [folder, *folder.rglob("*")]
        for entry in entries:
            os.chown(entry, NOBODY, NOBODY)
            entry.chmod(0o555 if entry.is_dir() else 0o444)
        yield UNPRIVILEGED
        for entry in entries:
            os.chown(entry, 0, 0)
            entry.chmod(0o755)


WAYS = [pytest.param("mount", marks=needs("mount")), pytest.param("permission", marks=needs("setpriv"))]


@pytest.mark.crash
@pytest.mark.parametrize("way", WAYS)
def test_reading_where_nothing_can_be_written(tmp_path: Path, table: Table, way: str) -> None:
    """A reader sees what is in the log, that a killed writer's trial is lost, and that events are missing; once
    somebody may write, all of them are there."""
    store = tmp_path / "disk" / "runs"
    with eventrun.open(store, quiet=True) as client, client.trial("crash", name="done") as trial:
        trial.log(i=0)
    run = Run("killed", tmp_path / "counts")
    process = subprocess.Popen(run.command(store, flush_every=100, linger_ms=1e8, events=0, pause_s=0.001))
    deadline = time.monotonic() + LONG_S
    while not run.counted()[0][1] and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait(LONG_S)
    if (store / "log.db-wal").exists():  # what a killed process leaves can't be read without writing
        with eventrun.open(store, quiet=True) as client:
            client._recorder.portal.call(client._recorder.store.settle).result(LONG_S)
    with read_only(way, tmp_path / "disk") as python:
        trials, points, errors, ok, said = read(store, *python)
        assert trials == {"done": "completed", "killed-0": "lost"}
        assert points["done"] == 1
        assert points["killed-0"] >= run.counted()[0][1]
        assert "may not write" in str(errors["killed-0"])
        assert ok
        assert len(said) == 1
        assert "missing here until somebody opens the store who may write to it" in said[0]
    found = tally(store, [run])
    table.add(13, f"killed, read where nothing can be written ({way}), recovered later", 1, found)
    assert found.good
    assert read(store)[0] == {"done": "completed", "killed-0": "lost"}


@pytest.mark.crash
@pytest.mark.parametrize("way", WAYS)
def test_writing_where_nothing_can_be_written(tmp_path: Path, table: Table, way: str) -> None:
    """Recording goes on in memory; that it is only there is said at once, and at the end how much was lost."""
    store = tmp_path / "disk" / "runs"
    with eventrun.open(store, quiet=True) as client, client.trial("crash", name="done") as trial:
        trial.log(i=0)
    with read_only(way, tmp_path / "disk") as python:
        run = Run("nowhere", tmp_path / "counts")
        command = run.command(
            store,
            events=500,
            python=python,
            prelude="import os; os.environ['EVENTRUN_CLOSE_TIMEOUT_S'] = '1'",
        )
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S)
        assert done.returncode == 0, done.stderr
    assert run.counted() == [(500, 0)]
    assert "journals can't be written" in done.stderr
    told = re.search(r"([\d,]+) events are LOST", done.stderr)
    assert told is not None
    found = tally(store, [run])
    lost = int(told[1].replace(",", ""))
    # All 500, and what is said of the trial besides: its creation, start and end, and its project's.
    assert lost - found.lost in range(6)
    table.add(13, f"recording where nothing can be written ({way}), said", 1, Tally(reported=(told[0],)))


@needs("setpriv")
def test_a_place_that_one_may_not_enter(tmp_path: Path) -> None:
    """No permission on the way is an error of the open, in words."""
    closed = tmp_path / "closed"
    (closed / "runs").mkdir(parents=True)
    os.chown(closed, NOBODY, NOBODY)
    closed.chmod(0o700)
    code = "import sys, eventrun; eventrun.open(sys.argv[1])"
    for place in (closed, closed / "runs", closed / "new"):
        command = [*UNPRIVILEGED, "-c", code, str(place)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S)
        assert done.returncode == 1
        assert "StoreUnavailable" in done.stderr, done.stderr


def test_journals_without_a_log_where_nothing_can_be_written(tmp_path: Path) -> None:
    """A writer that was killed before its first batch left no log: who may write makes it, who may not is told."""
    store = tmp_path / "runs"
    run = Run("young", tmp_path / "counts")
    process = subprocess.Popen(run.command(store, linger_ms=1e8))
    deadline = time.monotonic() + LONG_S
    while not run.counted()[0][0] and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait(LONG_S)
    assert not (store / "log.db").exists()
    with eventrun.open(store, quiet=True, create=False) as client:
        assert client.get("young-0").result(LONG_S).status == "lost"
        assert len(logged(client)["young-0"]) >= run.counted()[0][0]
    with pytest.raises(StoreUnavailable, match="nothing was recorded there"):
        eventrun.open(tmp_path / "elsewhere", create=False)


# what goes away ----------------------------------------------------------------------------------------------------


@pytest.mark.crash
@pytest.mark.parametrize("end", ["killed", "closed"])
def test_a_folder_that_is_renamed_while_it_is_open(tmp_path: Path, table: Table, end: str) -> None:
    """What was recorded before is in the renamed folder; so is what comes after, or it is said that it isn't."""
    store, moved = tmp_path / "runs", tmp_path / "moved"
    total, times = Tally(), rounds(2, 20)
    for n in range(times):
        run = Run(f"{end}{n}", tmp_path / f"counts{n}")
        command = run.command(
            store, pause_s=0.0005, flush_every=0, item_bytes=10 * n,
            prelude="import os; os.environ['EVENTRUN_CLOSE_TIMEOUT_S'] = '1'", events=0 if end == "killed" else 1500,
        )  # fmt: skip
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        wait_for_calls(run, process, 500)
        store.rename(moved)
        before = run.counted()[0][0]
        if end == "killed":
            wait_for_calls(run, process, before + 300)
            process.send_signal(signal.SIGKILL)
        _, said = process.communicate(timeout=LONG_S)
        found = tally(moved, [run])
        assert found.recovered >= before, (n, found, said)
        assert not found.doubled
        told = "kept in memory" in said or "LOST" in said
        assert found.good or told, (n, found, said)
        assert not found.good or "LOST" not in said, (n, found, said)
        assert end == "killed" or "LOST" in said or f"safe in {moved}" in said, said
        if end == "closed" and not found.good:
            assert int(re.findall(r"([\d,]+) events are LOST", said)[0].replace(",", "")) >= found.lost
        assert not store.exists()
        total = total.plus(found._replace(reported=(*found.reported, said) if told else found.reported))
        moved.rename(store)
    table.add(13, f"folder renamed while it is open, {end}", times, total)


@pytest.mark.crash
@pytest.mark.parametrize("kind", ["ext4", "nfs4", *FULL * ["overlay"]])
def test_a_renamed_folder_has_room_for_more(tmp_path: Path, table: Table, kind: str) -> None:
    """What fills new files after the renaming is in the renamed folder as well; nothing is called lost."""
    (tmp_path / "disk").mkdir()
    store, moved, mounts = tmp_path / "disk" / "runs", tmp_path / "disk" / "moved", tmp_path / "mounts"
    mounts.write_text(f"1 1 0:1 / / rw - ext4 a rw\n2 1 0:2 / {tmp_path / 'disk'} rw - {kind} x rw\n")
    prelude = (
        f"import os, pathlib, eventrun.filesystems as f; f.MOUNTINFO = pathlib.Path({str(mounts)!r}); "
        "os.environ['EVENTRUN_CLOSE_TIMEOUT_S'] = '1'"
    )
    run = Run("moved", tmp_path / "counts")
    command = run.command(store, pause_s=0.0005, events=3000, item_bytes=5000, prelude=prelude)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for_calls(run, process, 300)
    store.rename(moved)
    _, said = process.communicate(timeout=LONG_S)
    assert run.counted()[0][0] == 3000
    assert "RuntimeWarning" not in said
    assert f"safe in {moved}" in said
    found = tally(moved, [run])
    table.add(13, f"much recorded after the folder was renamed, {kind}", 1, found)
    assert found.good, (found, said)
    assert found.recovered == 3000


@pytest.mark.crash
def test_a_folder_that_is_deleted_while_it_is_open(tmp_path: Path) -> None:
    """A flush fails, and the end says how much is lost; nobody makes the folder anew."""
    store = tmp_path / "runs"
    code = """
import shutil, sys, eventrun
from eventrun.errors import StoreUnavailable
client = eventrun.open(sys.argv[1], quiet=True, close_timeout_s=1)
trial = client.trial("p", name="a")
trial.log(i=1)
client.flush().result()
shutil.rmtree(sys.argv[1])
trial.log(i=2)
try:
    client.flush().result()
except StoreUnavailable as error:
    print("flush:", error)
client.close()
"""
    done = subprocess.run([sys.executable, "-c", code, store], capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 0, done.stderr
    assert "flush:" in done.stdout
    assert "moved or deleted" in done.stdout
    assert "LOST" in done.stderr
    assert not store.exists()
    shutil.rmtree(store, ignore_errors=True)
