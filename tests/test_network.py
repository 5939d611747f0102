"""Stores on a network disk (by an injected mount table): writers leave fragments, and one process collects them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import eventrun
from eventrun import filesystems, network
from eventrun.client import Client
from eventrun.collecting import ALL_HOSTS
from eventrun.errors import StoreUnavailable
from eventrun.events import TrialCreated, WriterEnded
from eventrun.journal import fragments, segments
from eventrun.journal.writers import CLOSED, ELSEWHERE, KILLED, LIVE, SILENT, look
from eventrun.locks import STALE_S, Turn, owner
from eventrun.recovery import RecoveryReport
from eventrun.stores.sqlite.network import NetworkStore

WAIT_S = 60


def mounts(folder: Path) -> str:
    """Return a mount table by which this folder is on a network and all else is local."""
    return f"1 1 0:1 / / rw - ext4 /dev/sda rw\n2 1 0:2 / {folder} rw - nfs4 server:/x rw\n"


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder on a network disk."""
    folder = tmp_path / "net"
    folder.mkdir()
    (tmp_path / "mounts").write_text(mounts(folder))
    monkeypatch.setattr(filesystems, "MOUNTINFO", tmp_path / "mounts")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def store(disk: Path) -> Path:
    return disk / "runs"


Open = Callable[..., Client]


@pytest.fixture
def opened(store: Path) -> Iterator[Open]:
    """Open clients of the store; all are closed at the end."""
    clients: list[Client] = []

    def make(**more: Any) -> Client:
        clients.append(eventrun.open(store, quiet=True, **more))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def folders(store: Path) -> list[Path]:
    return sorted((store / "journals").iterdir())


def values(client: Client, name: str) -> list[Any]:
    return list(client.history(name, "i").result(WAIT_S).values)


def pretend_elsewhere(folder: Path, silent_s: float = 0.0) -> None:
    """Make a writer's lock say that it is another machine's, and when it was last heard of."""
    lock = folder / "lock"
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "host": "elsewhere", "boot": "another"}))
    then = time.time() - silent_s
    os.utime(lock, (then, then))


def killed(store: Path, tmp_path: Path, more: str = "") -> Path:
    """Have a process log 0 to 99 to a trial "killed", and kill itself; return its folder."""
    before = folders(store) if (store / "journals").exists() else []
    code = f"""
import os, signal, sys
from pathlib import Path
from eventrun import filesystems
filesystems.MOUNTINFO = Path({str(tmp_path / "mounts")!r})
import eventrun
client = eventrun.open({str(store)!r}, quiet=True)
trial = client.trial("p", name="killed")
for i in range(100):
    trial.log(i=i, step=i)
{more}
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False, timeout=WAIT_S)
    (made,) = set(folders(store)) - set(before)
    return made


# writers -------------------------------------------------------------------------------------------------------


def test_a_flush_leaves_the_log_alone(store: Path, opened: Open) -> None:
    """What was flushed is durable in the journals' files: no log is opened, nothing is mapped, nothing given back."""
    client = opened(linger_ms=1)
    trial = client.trial("p", name="a")
    for i in range(5000):
        trial.log(i=i, step=i)
    client.flush().result(WAIT_S)
    found = client.statistics()
    assert (found.durable, found.held_bytes, found.acknowledgement) == (5003, 0, "crash_safe")
    assert os.listdir(store) == ["journals"]
    assert look(folders(store)[0], time.time_ns()).state == LIVE
    assert values(client, "a") == list(range(5000))
    assert not (store / "log.db-wal").exists()
    assert client.verify(views=True).result(WAIT_S).ok


def test_a_sync_comes_before_the_flush_returns(
    store: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file with new events is synced, and the folder that has its name."""
    synced: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    client = opened(linger_ms=1e8)
    client.trial("p", name="a").log(i=1)
    assert not synced
    client.flush().result(WAIT_S)
    (folder,) = folders(store)
    assert {str(path) for path in (*folder.glob("*.arena"), folder, folder.parent)} <= set(synced)


def test_a_closed_writers_folder_is_taken_in_and_removed(store: Path, opened: Open) -> None:
    """Its lock tells that it has ended, and of its trials nothing is said that they didn't say themselves."""
    client = opened()
    with client.trial("p", name="a") as trial:
        trial.log(i=0)
    client.close()
    (folder,) = folders(store)
    assert look(folder, time.time_ns()).state == CLOSED
    reader = opened()
    assert reader.get("a").result(WAIT_S).status == "completed"
    assert folders(store) == []
    assert not any(isinstance(stored.event, WriterEnded) for stored in reader.events())


def test_full_files_of_a_living_writer_are_removed(
    store: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long training doesn't fill the disk twice: what it has left for good, and the log holds, goes."""
    monkeypatch.setattr(segments, "WRITTEN_ARENA_BYTES", 64 << 10)
    monkeypatch.setattr(segments, "WRITTEN_SEGMENT_BYTES", (16 << 10, 32 << 10))
    client = opened(linger_ms=1e8)
    trial = client.trial("p", name="a")
    for part in range(5):
        for i in range(part * 4000, (part + 1) * 4000):
            trial.log(i=i, step=i)
        client.flush().result(WAIT_S)
        client.flush().result(WAIT_S)
        client.collect().result(WAIT_S)
    left = sum(path.stat().st_size for path in folders(store)[0].glob("*.arena"))
    assert left < 256 << 10
    assert values(opened(), "a") == list(range(20_000))
    assert client.verify().result(WAIT_S).ok


def test_many_short_trials(store: Path, opened: Open) -> None:
    """Trials that end give back memory and descriptors while their writer goes on."""
    client = opened()
    for n in range(300):
        with client.trial("p", name=f"t{n}") as trial:
            trial.log(i=n)
    client.flush().result(WAIT_S)
    client.flush().result(WAIT_S)
    assert client.statistics().streams < 10
    assert len(list(client.trials(status="completed", limit=1000))) == 300


def test_a_failed_sync_is_not_tried_again_on_the_same_file(
    store: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that isn't durable is written to new files, and the flush that failed says so."""
    client = opened(linger_ms=1e8)
    trial = client.trial("p", name="a")
    for i in range(3000):
        trial.log(i=i, step=i)
    client.flush().result(WAIT_S)
    durable = {path: path.read_bytes() for path in folders(store)[0].glob("*.arena")}
    for i in range(3000, 6000):
        trial.log(i=i, step=i)
    fsync = os.fsync

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(StoreUnavailable, match="Input/output error"):
        client.flush().result(WAIT_S)
    monkeypatch.setattr(os, "fsync", fsync)
    for path, data in durable.items():  # what was not synced is lost there
        path.write_bytes(data)
    trial.log(i=6000, step=6000)
    client.flush().result(WAIT_S)
    assert client.statistics().held_bytes == 0
    assert values(client, "a") == list(range(6001))


def test_a_flush_within_a_log_call(store: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that flushes in the middle of a log call waits for what was logged before, not for that call."""
    client = opened(linger_ms=1e8)
    trial = client.trial("p", name="a")
    trial.log(i=0)
    write_out = fragments.FragmentJournal._write_out
    flushed: list[Any] = []

    def interrupted(journal: fragments.FragmentJournal) -> None:
        if not flushed and journal._turning._is_owned():  # type: ignore[attr-defined]
            flushed.append(None)
            flushed[0] = client.flush().result(WAIT_S)
        write_out(journal)

    monkeypatch.setattr(fragments.FragmentJournal, "_write_out", interrupted)
    trial.log(i=1)
    assert len(flushed) == 1
    assert values(client, "a") == [0, 1]


# the collector -------------------------------------------------------------------------------------------------


def test_a_living_writer_is_followed(store: Path, opened: Open) -> None:
    """Collecting again and again continues the writer's stream: nothing twice, nothing left out, always a prefix."""
    writer, reader = opened(linger_ms=1), opened()
    trial = writer.trial("p", name="a")
    seen = -1
    for i in range(2000):
        trial.log(i=i, step=i)
        if i % 100 == 99:
            writer.flush().result(WAIT_S)
            reader.collect().result(WAIT_S)
            found = values(reader, "a")
            assert found == list(range(len(found)))
            assert len(found) > seen
            seen = len(found)
    assert seen == 2000
    assert reader.verify().result(WAIT_S).ok


def test_a_killed_writer_of_this_host(store: Path, opened: Open, tmp_path: Path) -> None:
    """Its lock is free: all its calls that had returned are taken in, its trial is lost, its folder removed; once."""
    folder = killed(store, tmp_path)
    assert look(folder, time.time_ns()).state == KILLED
    one, other = opened(), opened()
    assert one.get("killed").result(WAIT_S).status == "lost"
    assert values(other, "killed") == list(range(100))
    assert folders(store) == []
    ended = [s for s in other.events() if isinstance(s.event, WriterEnded)]
    assert len(ended) == 1


def test_a_silent_writer_of_another_host(store: Path, opened: Open, tmp_path: Path) -> None:
    """After three beats without a sign its trial is lost, said once; its folder stays until its host is named."""
    folder = killed(store, tmp_path)
    pretend_elsewhere(folder)
    reader = opened()
    assert look(folder, time.time_ns()).state == ELSEWHERE
    assert reader.get("killed").result(WAIT_S).status == "running"
    pretend_elsewhere(folder, STALE_S + 5)
    assert look(folder, time.time_ns()).state == SILENT
    for _ in range(3):
        reader.collect().result(WAIT_S)
    assert reader.get("killed").result(WAIT_S).status == "lost"
    assert values(reader, "killed") == list(range(100))
    assert folders(store) == [folder]
    assert reader.collect(hosts=["no such host"]).result(WAIT_S) == RecoveryReport()
    assert folders(store) == [folder]
    assert reader.collect(hosts=["elsewhere"]).result(WAIT_S) == RecoveryReport(writers=1)
    assert folders(store) == []
    assert sum(isinstance(s.event, WriterEnded) for s in reader.events()) == 1


def test_a_writer_that_only_slept(store: Path, opened: Open) -> None:
    """One that was taken for dead and goes on is running again; nothing of it is lost or doubled."""
    writer, reader = opened(linger_ms=1e8), opened()
    trial = writer.trial("p", name="a")
    for i in range(10):
        trial.log(i=i)
    writer.flush().result(WAIT_S)
    pretend_elsewhere(folders(store)[0], STALE_S + 5)
    reader.collect().result(WAIT_S)
    assert reader.get("a").result(WAIT_S).status == "lost"
    for i in range(10, 20):
        trial.log(i=i)
    writer._recorder._folder._beat_ns = (0, 0)  # type: ignore[attr-defined]
    writer.flush().result(WAIT_S)
    reader.collect().result(WAIT_S)
    assert reader.get("a").result(WAIT_S).status == "running"
    assert values(reader, "a") == list(range(20))


@pytest.mark.parametrize("left", ["nothing", "something", "much"])
def test_a_writer_whose_folder_was_removed(store: Path, opened: Open, left: str) -> None:
    """It makes its folder anew and writes there what it had not called durable: all is there, once, in order."""
    writer, reader = opened(linger_ms=1e8), opened()
    trial = writer.trial("p", name="a")
    count = {"nothing": 0, "something": 10, "much": 20_000}[left]
    for i in range(100):
        trial.log(i=i, step=i)
    writer.flush().result(WAIT_S)
    for i in range(100, 100 + count):
        trial.log(i=i, step=i)
    (folder,) = folders(store)
    pretend_elsewhere(folder, STALE_S + 5)
    reader.collect(hosts=[ALL_HOSTS]).result(WAIT_S)
    assert folders(store) == []
    for i in range(100 + count, 200 + count):
        trial.log(i=i, step=i)
    try:
        writer.flush().result(WAIT_S)
    except StoreUnavailable:  # it has noticed, and written all anew
        writer.flush().result(WAIT_S)
    assert folders(store) == [folder]
    assert values(reader, "a") == list(range(200 + count))
    writer.close()
    assert reader.collect().result(WAIT_S).problems == []
    assert reader.verify().result(WAIT_S).ok
    assert folders(store) == []


def test_a_collector_that_dies_while_it_takes_a_folder_away(store: Path, opened: Open) -> None:
    """What it took away is taken in before what its writer wrote to a new folder, even if that has ended by then."""
    writer, reader = opened(linger_ms=1e8), opened()
    trial = writer.trial("p", name="a")
    for i in range(100):
        trial.log(i=i)
    writer.flush().result(WAIT_S)
    (folder,) = folders(store)
    folder.rename(folder.with_name(folder.name + ".taken"))
    for i in range(100, 200):
        trial.log(i=i)
    writer.close()
    assert len(folders(store)) == 2
    assert values(reader, "a") == list(range(200))
    assert reader.collect().result(WAIT_S).problems == []
    assert folders(store) == []


def test_a_full_file_that_is_damaged_stays(
    store: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of which not every slot can be read is never removed under its writer."""
    monkeypatch.setattr(segments, "WRITTEN_ARENA_BYTES", 64 << 10)
    monkeypatch.setattr(segments, "WRITTEN_SEGMENT_BYTES", (16 << 10, 32 << 10))
    client = opened(linger_ms=1e8)
    trial = client.trial("p", name="a")
    for i in range(8000):
        trial.log(i=i, step=i)
        if i > 7997:
            client.flush().result(WAIT_S)
    full = sorted(folders(store)[0].glob("*-full.arena"))
    data = full[0].read_bytes()
    full[0].write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    (problem,) = client.collect().result(WAIT_S).problems
    assert full[0].name in problem
    assert full[0].exists()
    full[0].write_bytes(data)
    assert values(client, "a") == list(range(8000))


def test_a_collector_that_dies(store: Path, opened: Open, tmp_path: Path) -> None:
    """One that was killed in the middle of a commit leaves a journal that the next one rolls back."""
    folder = killed(store, tmp_path)
    aside = tmp_path / "aside"
    shutil.copytree(folder, aside)
    # What a collector killed at this point leaves: the log before its commit, and a journal that is hot.
    client = opened()
    client.collect().result(WAIT_S)
    client.close()
    code = f"""
import os, signal, sqlite3
raw = sqlite3.connect({str(store / "log.db")!r}, isolation_level=None)
raw.execute("PRAGMA cache_size = 1")
raw.execute("BEGIN IMMEDIATE")
raw.execute("UPDATE batches SET frame = zeroblob(200000)")
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False, timeout=WAIT_S)
    assert (store / "log.db-journal").exists()
    shutil.copytree(aside, folder)
    reader = opened()
    assert values(reader, "killed") == list(range(100))
    assert not (store / "log.db-journal").exists()
    assert folders(store) == []


def test_while_another_collects(store: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read while another process has the turn waits a while for it, and then shows what the log has."""
    monkeypatch.setattr(network, "SEEN_S", 0.2)
    monkeypatch.setattr(network, "OTHERS_S", 0.1)
    monkeypatch.setattr("eventrun.stores.sqlite.network.TURN_WAIT_S", 0.1)
    client = opened()
    client.trial("p", name="a").log(i=0)
    assert values(client, "a") == [0]
    turn = Turn(store, "collecting")
    assert turn.take()
    client.trial("p", name="b").log(i=0)
    assert [trial.name for trial in client.trials()] == ["a"]
    with pytest.raises(StoreUnavailable, match="another process is collecting"):
        client.collect().result(WAIT_S)
    turn.give_back()
    assert {trial.name for trial in client.trials()} == {"a", "b"}


def test_a_store_without_a_log(store: Path, opened: Open) -> None:
    """A reader of a store that has nothing yet sees nothing, and no error."""
    client = opened()
    assert list(client.trials()) == []
    assert list(client.events()) == []


def test_import_waits_for_its_turn(store: Path, opened: Open, tmp_path: Path) -> None:
    """Appending by hand takes the turn like a collector does."""
    source = eventrun.open(tmp_path / "local", quiet=True)
    with source.trial("p", name="a") as trial:
        trial.log(i=1)
    batches = [stored.batch for stored in source.batches()]
    source.close()
    client = opened()
    client.append(batches).result(WAIT_S)
    assert values(client, "a") == [1]
    assert NetworkStore(store, create=False).collector() == {}


# moved stores ----------------------------------------------------------------------------------------------------


def test_a_local_store_goes_on_a_network_disk_and_back(
    disk: Path, store: Path, opened: Open, tmp_path: Path
) -> None:
    """The same folder serves in both places: the write-ahead log is left and taken up again."""
    local = tmp_path / "local"
    with eventrun.open(local, quiet=True) as client, client.trial("p", name="a") as trial:
        trial.log(i=1)
    shutil.copytree(local, store)
    with eventrun.open(store, quiet=True) as client, client.trial("p", name="b") as trial:
        trial.log(i=1)
        assert values(client, "a") == values(client, "b") == [1]
        assert sorted(path.name for path in store.glob("log.db*")) == ["log.db"]
        assert (store / "log.db").read_bytes()[18:20] == b"\1\1"
    shutil.copytree(store, tmp_path / "back")
    with eventrun.open(tmp_path / "back", quiet=True) as client, client.trial("p", name="c") as trial:
        trial.log(i=1)
        assert {trial.name for trial in client.trials()} == {"a", "b", "c"}
        client.flush().result(WAIT_S)
        assert (tmp_path / "back" / "log.db").read_bytes()[18:20] == b"\2\2"
        assert not any((tmp_path / "back" / "journals").glob("*/closed"))


def test_journals_of_another_host_on_a_local_disk(tmp_path: Path) -> None:
    """A copied store's journals are left alone by reads; `collect` takes in what nobody writes to, or what is named."""
    store = tmp_path / "runs"
    code = f"""
import os, signal, eventrun
trial = eventrun.open({str(store)!r}, quiet=True, linger_ms=1e8).trial("p", name="a")
trial.log(i=1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False, timeout=WAIT_S)
    (folder,) = folders(store)
    pretend_elsewhere(folder)
    with eventrun.open(store, quiet=True) as client:
        assert list(client.trials()) == []
        report = client.collect().result(WAIT_S)
        assert (report.events, folders(store)) == (0, [folder])
        assert "eventrun collect --host elsewhere" in report.left[0]
        then = time.time() - STALE_S - 5
        for entry in (*folder.iterdir(), folder):
            os.utime(entry, (then, then))
        assert client.collect().result(WAIT_S).writers == 1
        assert client.get("a").result(WAIT_S).status == "lost"
        assert folders(store) == []


def test_the_name_of_this_host_is_told(store: Path, opened: Open) -> None:
    """A lock says who holds it, and whether file locks work there."""
    client = opened()
    client.trial("p", name="a")
    lock = json.loads((folders(store)[0] / "lock").read_text())
    assert lock == {**owner(), "flock": True}
    assert any(isinstance(stored.event, TrialCreated) for stored in client.events())
