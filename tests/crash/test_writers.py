"""9. Two and eight processes on one store: a trial each, and one trial from all; some are killed, others recover them.

All the time a dashboard reads. The same on a network disk (told by an injected mount table), where collectors are
killed as well.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

import eventrun
from eventrun import filesystems
from eventrun.collecting import ALL_HOSTS
from eventrun.events import MetricsLogged, WriterEnded
from tests.crash.harness import FULL, LONG_S, Table, Tally, compare, rounds

WRITER = """
import mmap, sys, time
from pathlib import Path
exec(sys.argv[1])
import eventrun
store, stop, counts, shared, rank = sys.argv[2], Path(sys.argv[3]), sys.argv[4], sys.argv[5], int(sys.argv[6])
with open(counts, "r+b") as file:
    returned = memoryview(mmap.mmap(file.fileno(), 16)).cast("Q")
client = eventrun.open(store, linger_ms=20, close_timeout_s=3, quiet=True)
trials = [client.trial("crash", name=f"own-{rank}"), client.trial("crash", resume=shared)]
done = 0
while not stop.exists():
    for place, trial in enumerate(trials):
        trial.log(i=done, rank=rank, step=done)
        returned[place] = done + 1
    done += 1
    if done % 50 == 0:
        client.flush().result()
    time.sleep(0.002)
client.close()
"""

DASHBOARD = """
import sys, time
from pathlib import Path
exec(sys.argv[1])
import eventrun
client = eventrun.open(sys.argv[2], quiet=True)
stop, shared = Path(sys.argv[3]), sys.argv[4]
before = reads = 0
while not stop.exists():
    trials = list(client.trials(limit=100))
    assert any(trial.id == shared for trial in trials), trials
    state = client.get(shared).result()
    if "i" in state.metrics:
        points = len(client.history(shared, "i").result())
        assert points >= before, (points, before)
        before = points
    reads += 1
    time.sleep(0.05)
assert reads
client.close()
"""

COLLECTOR = """
import sys, time
exec(sys.argv[1])
import eventrun
from eventrun.errors import StoreUnavailable
client = eventrun.open(sys.argv[2], quiet=True)
while True:
    try:
        report = client.collect().result()
    except StoreUnavailable as error:
        assert "collecting" in str(error), error
    else:
        assert not report.problems, report
    time.sleep(0.02)
"""

RECOVERY = """
import os, sys, time
from pathlib import Path
exec(sys.argv[1])
import eventrun
client = eventrun.open(sys.argv[2], quiet=True, create=False)
print("ready", flush=True)
while not Path(sys.argv[3]).exists():
    time.sleep(0.0005)
report = client.recovery().result()
assert not report.problems, report
print(report.writers, flush=True)
client.close()
"""


class Rank(NamedTuple):
    """A writing process and what the oracle counts of it."""

    number: int
    counts: Path
    process: subprocess.Popen[str]

    def returned(self) -> list[int]:
        """How many calls had returned: to its own trial, to the shared one."""
        return list(memoryview(self.counts.read_bytes()).cast("Q"))


class Scene:
    """A store with its processes, of which none may complain."""

    def __init__(self, folder: Path, prelude: str = "", hosts: Sequence[str] = ()) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.store = folder / "runs"
        self.stop = folder / "stop"
        self.prelude = prelude
        self.hosts = hosts
        self.started = 0
        self.ranks: list[Rank] = []
        self.others: list[subprocess.Popen[str]] = []
        self.killed: set[int] = set()
        self.complaints: list[str] = []
        with eventrun.open(self.store, quiet=True) as client:
            self.shared = client.trial("crash", name="shared").id
        with eventrun.open(self.store, quiet=True) as client:
            client.get(self.shared).result(LONG_S)

    def start(self, code: str, *arguments: object) -> subprocess.Popen[str]:
        """Start a process."""
        self.started += 1
        host = HOST.format(host=self.hosts[self.started % len(self.hosts)]) if self.hosts else ""
        command = [sys.executable, "-W", "error", "-c", code, self.prelude + host, *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)

    def write(self) -> Rank:
        """Start a writer."""
        number = len(self.ranks)
        counts = self.folder / f"counts{number}"
        counts.write_bytes(bytes(16))
        rank = Rank(number, counts, self.start(WRITER, self.store, self.stop, counts, self.shared, number))
        self.ranks.append(rank)
        return rank

    def kill(self, process: subprocess.Popen[str]) -> None:
        """Kill a process, whatever it does."""
        process.kill()
        self.end(process)

    def end(self, process: subprocess.Popen[str]) -> None:
        """Wait for a process; note what it had to complain of."""
        _, errors = process.communicate(timeout=LONG_S)
        if errors.strip() or process.returncode not in (0, -9):
            self.complaints.append(errors or f"exit code {process.returncode}")

    def wait_for_calls(self, rank: Rank, calls: int) -> None:
        """Wait until a writer has logged so often, or is gone."""
        deadline = time.monotonic() + LONG_S
        while min(rank.returned()) < calls and rank.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)

    def end_all(self) -> None:
        """Let everybody come to an end."""
        self.stop.touch()
        for rank in self.ranks:
            if rank.number not in self.killed:
                self.end(rank.process)
        for process in self.others:
            self.end(process)

    def wait_for_silence(self) -> None:
        """Wait until a turn that a killed process of another machine had is over."""
        code = "import sys, time; exec(sys.argv[1]); import eventrun; time.sleep(1.5)\n"
        code += "client = eventrun.open(sys.argv[2]); client.collect().result(); client.close()"
        self.end(self.start(code, self.store))

    def tally(self) -> Tally:
        """Compare what each process had logged with what the store gives back."""
        total = Tally(reported=tuple(self.complaints))
        if self.hosts:
            self.wait_for_silence()
        with eventrun.open(self.store, quiet=True) as client:
            if self.hosts:
                client.collect(hosts=[ALL_HOSTS]).result(LONG_S)
            problems: list[object] = [*client.recovery().result(LONG_S).problems]
            found: dict[tuple[bool, int], list[object]] = {}
            ended: Counter[tuple[str, int]] = Counter()
            for stored in client.events():
                subject, event = stored.stream.subject, stored.event
                if isinstance(event, MetricsLogged) and "i" in event.values:
                    shared = subject == f"t/{self.shared}"
                    number = event.values["rank"]
                    assert isinstance(number, int)
                    found.setdefault((shared, number), []).append(event.values["i"])
                elif isinstance(event, WriterEnded):
                    ended[subject, event.writer] += 1
            problems += client.verify(views=True).result(LONG_S).problems
            states = {trial.name: trial.status for trial in client.trials()}
        for rank in self.ranks:
            for shared, calls in zip((False, True), rank.returned(), strict=True):
                total = total.plus(compare(calls + 1, calls, found.get((shared, rank.number), [])))
            status = states.get(f"own-{rank.number}")
            wanted = "lost" if rank.number in self.killed else "interrupted"
            if status != wanted and (rank.returned()[0] or rank.number not in self.killed):
                problems.append(f"rank {rank.number} is {status}, not {wanted}")
        if not self.hosts:
            problems += [
                f"the end of {who} was noted {times} times" for who, times in ended.items() if times > 1
            ]
        return total.plus(Tally(reported=tuple(map(str, problems))))


def play(scene: Scene, writers: int, kills: int, collectors: int) -> Tally:
    """Have so many write at once, kill some and start others, with a dashboard all the time."""
    chance = random.Random(writers)
    for _ in range(writers):
        scene.write()
    dashboard = scene.start(DASHBOARD, scene.store, scene.stop, scene.shared)
    scene.others.append(dashboard)
    collecting = [scene.start(COLLECTOR, scene.store) for _ in range(collectors)]
    for _ in range(kills):
        rank = chance.choice([rank for rank in scene.ranks if rank.number not in scene.killed])
        scene.wait_for_calls(rank, chance.randrange(1, 200))
        scene.killed.add(rank.number)
        scene.kill(rank.process)
        scene.write()
        if collecting:
            scene.kill(collecting.pop(0))
            collecting.append(scene.start(COLLECTOR, scene.store))
    for rank in scene.ranks:
        if rank.number not in scene.killed:
            scene.wait_for_calls(rank, 100)
    for process in collecting:
        scene.kill(process)
    scene.end_all()
    return scene.tally()


NETWORK = """
import eventrun.filesystems, pathlib
eventrun.filesystems.MOUNTINFO = pathlib.Path({mounts!r})
"""


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have the disk of this test's stores taken for one on a network; return the prelude that tells children so."""
    mounts = tmp_path / "mounts"
    mounts.write_text(f"1 1 0:1 / / rw - ext4 a rw\n2 1 0:2 / {tmp_path / 'net'} rw - nfs4 server:/x rw\n")
    monkeypatch.setattr(filesystems, "MOUNTINFO", mounts)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return NETWORK.format(mounts=str(mounts))


@pytest.mark.crash
@pytest.mark.parametrize("writers", [2, 8])
def test_many_writers(tmp_path: Path, table: Table, writers: int) -> None:
    """Writers that are killed lose nothing and hinder nobody; no process ever sees an error; each end is noted once."""
    total, times = Tally(), rounds(1, 20)
    for n in range(times):
        total = total.plus(play(Scene(tmp_path / f"{n}"), writers, kills=writers // 2, collectors=0))
    table.add(9, f"{writers} writers, own trials and one of all, some killed, a dashboard", times, total)
    assert total.good, total
    assert not total.reported


@pytest.mark.crash
def test_many_writers_on_a_network_disk(tmp_path: Path, table: Table, network: str) -> None:
    """The same where writers leave fragments, and collectors and writers are killed at random moments."""
    total, times, writers = Tally(), rounds(1, 20), 8 if FULL else 4
    for n in range(times):
        scene = Scene(tmp_path / "net" / f"{n}", network)
        total = total.plus(play(scene, writers, kills=writers // 2, collectors=2))
        assert not any((scene.store / "journals").iterdir())
    table.add(
        9, f"{writers} writers on a network disk, some killed, collectors killed, a dashboard", times, total
    )
    assert total.good, total
    assert not total.reported


# As between machines that don't see each other's file locks: only beats tell who lives, and they come late.
HOST = """
import errno, fcntl, os
import eventrun.locks, eventrun.collecting, eventrun.journal.fragments, eventrun.journal.writers
import eventrun.stores.sqlite.network
def refuse(*arguments):
    raise OSError(errno.ENOLCK, "no locks available")
fcntl.flock = refuse
machine = os.uname()
os.uname = lambda: os.uname_result((machine[0], {host!r}, *machine[2:]))
eventrun.locks._boot_id = lambda: {host!r}
for module in (eventrun.locks, eventrun.collecting, eventrun.journal.writers):
    module.STALE_S = 1.0
for module in (eventrun.locks, eventrun.journal.fragments, eventrun.stores.sqlite.network):
    module.BEAT_S = 0.3
"""


@pytest.mark.crash
def test_writers_on_several_machines(tmp_path: Path, table: Table, network: str) -> None:
    """Where no file lock holds, and on a busy machine the living are taken for dead now and then, nothing is lost or
    doubled, neither by writers nor by collectors; those that were killed are lost."""
    total, times, writers = Tally(), rounds(1, 20), 8 if FULL else 4
    for n in range(times):
        scene = Scene(tmp_path / "net" / f"{n}", network, hosts=["one", "two"])
        total = total.plus(play(scene, writers, kills=writers // 2, collectors=2))
    table.add(9, f"{writers} writers on two machines without file locks, some killed", times, total)
    assert total.good, total
    assert not total.reported


WITHOUT_LOCK = """
import eventrun.journal.scan
eventrun.journal.scan.try_lock = lambda descriptor: True
"""

WITHOUT_LOOK = """
from eventrun.journal.fragments import FragmentFolder
FragmentFolder._check_place = lambda folder: None
"""


@pytest.mark.crash
@pytest.mark.parametrize("disk", ["local", "network"])
def test_journals_without_a_lock_are_caught(tmp_path: Path, table: Table, network: str, disk: str) -> None:
    """Where a living writer is taken for dead, and its journal removed, the tests above show it."""
    times = rounds(1, 5)
    caught = 0
    for n in range(times):
        prelude = WITHOUT_LOCK + (network + WITHOUT_LOOK if disk == "network" else "")
        scene = Scene(tmp_path / ("net" if disk == "network" else "local") / f"{n}", prelude)
        found = play(scene, 2, kills=1, collectors=int(disk == "network"))
        caught += not found.good or bool(found.reported)
    table.caught(9, f"journals without a lock, {disk} disk", times, caught)
    assert caught == times


@pytest.mark.crash
@pytest.mark.parametrize(
    ("disk", "opening"),
    [("local", 8), ("network", 2)] + FULL * [("local", 2), ("network", 8)],
)
def test_all_open_at_once(tmp_path: Path, table: Table, network: str, disk: str, opening: int) -> None:
    """Of processes that open a store at the same moment each killed writer is recovered by one, and by all seen."""
    prelude = network if disk == "network" else ""
    scene = Scene(tmp_path / ("net" if disk == "network" else "local"), prelude)
    for _ in range(3):
        scene.wait_for_calls(scene.write(), 60)
    for rank in scene.ranks:
        scene.killed.add(rank.number)
        scene.kill(rank.process)
    go = tmp_path / "go"
    recovering = [scene.start(RECOVERY, scene.store, go) for _ in range(opening)]
    for process in recovering:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    go.touch()
    recovered = 0
    for process in recovering:
        out, errors = process.communicate(timeout=LONG_S)
        assert (process.returncode, errors) == (0, "")
        recovered += int(out)
    found = scene.tally()
    table.add(9, f"{opening} open at the same moment, {disk} disk", 1, found)
    assert recovered == 3
    assert found.good, found
    assert not found.reported
