"""Processes that fork and log on both sides: `python forks.py STORE COUNTS SCENE [PRELUDE]`. See test_fork.py.

Each process is a voice of its own: it logs 0, 1, 2, ... with its number to the one trial, and counts, in a file that
all of them map, the calls that have returned.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

VOICES = 64
LONG_S = 100.0


class Voice:
    """One process's side of the trial."""

    def __init__(self, trial: Any, counts: Path, number: int) -> None:
        self.trial = trial
        self.number = number
        with counts.open("r+b") as file:
            self.counts = memoryview(mmap.mmap(file.fileno(), 8 * VOICES)).cast("Q")
        self.done = 0

    def log(self, times: int = 1) -> None:
        """Log the next numbers."""
        for _ in range(times):
            self.trial.log({"i": self.done, "voice": self.number}, step=self.done)
            self.done += 1
            self.counts[self.number] = self.done


class Family:
    """The store, the trial, and the voices of a process and of its children."""

    def __init__(self, store: str, counts: Path, **options: Any) -> None:
        import eventrun

        self.store, self.counts = store, counts
        self.client = eventrun.open(store, quiet=True, **{"linger_ms": 5, "close_timeout_s": 60, **options})
        self.trial = self.client.trial("crash", name="family")
        self.next = 1
        self.voice = self.speak(0)

    def speak(self, number: int) -> Voice:
        """Take a voice."""
        return Voice(self.trial, self.counts, number)

    def fork(self, work: Callable[[Voice], object]) -> int:
        """Have a child do this and end as a program does that returns."""
        number, self.next = self.next, self.next + 1
        pid = os.fork()
        if pid:
            return pid
        work(self.speak(number))
        sys.exit(0)

    def wait(self, pid: int, code: int = 0) -> None:
        """Wait for a child."""
        found = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert found == code, (found, code)


def killed(voice: Voice, number: int) -> None:
    """Log, and end by a signal."""
    voice.log(20)
    os.kill(os.getpid(), number)


def ends(family: Family) -> None:
    """Children that log and return, exit, are killed, flush first, close first; the parent logs on."""
    client = family.client

    def left(voice: Voice) -> None:
        voice.log(20)
        os._exit(4)

    def flushed(voice: Voice) -> None:
        voice.log(20)
        client.flush().result(LONG_S)
        voice.log(5)
        os._exit(0)

    def closed(voice: Voice) -> None:
        voice.log(20)
        client.close()
        os._exit(0)

    def failed(voice: Voice) -> None:
        voice.log(20)
        sys.exit(6)

    children: list[tuple[Callable[[Voice], object], int]] = [
        (lambda voice: voice.log(20), 0), (left, 4), (flushed, 0), (closed, 0), (failed, 6),
        (lambda voice: killed(voice, signal.SIGKILL), -signal.SIGKILL),
        (lambda voice: killed(voice, signal.SIGTERM), -signal.SIGTERM),
    ]  # fmt: skip
    with client, family.trial:
        family.voice.log(20)
        pids = []
        for work, _ in children:
            pids.append(family.fork(work))
            family.voice.log(10)
        for pid, (_, code) in zip(pids, children, strict=True):
            family.wait(pid, code)
        family.voice.log(10)


def left_only(family: Family) -> None:
    """Children that log, beside their parent, and end without a word."""

    def left(voice: Voice) -> None:
        voice.log(20)
        os._exit(0)

    family.voice.log(20)
    for _ in range(3):
        pid = family.fork(left)
        family.voice.log(10)
        family.wait(pid)
    os._exit(0)


def chain(family: Family) -> None:
    """A child that forks a child that forks, six deep; each logs before and after, and half of them end at once."""

    def deeper(depth: int) -> Callable[[Voice], object]:
        def work(voice: Voice) -> None:
            voice.log(10)
            if depth:
                family.wait(family.fork(deeper(depth - 1)))
                voice.log(10)
            if depth % 2:
                os._exit(0)

        return work

    with family.client, family.trial:
        family.voice.log(10)
        family.wait(family.fork(deeper(5)))
        family.voice.log(10)


def double_fork(family: Family) -> None:
    """A daemon's double fork: the grandchild logs when its parent and its grandparent are gone."""
    first = os.getpid()

    def daemon(voice: Voice) -> None:
        number = family.next
        pid = os.fork()
        if pid:
            os._exit(0)
        os.setsid()
        own = family.speak(number)
        own.log(10)
        begun = time.monotonic()
        while Path(f"/proc/{first}/stat").exists() and time.monotonic() - begun < LONG_S:
            if Path(f"/proc/{first}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                break
            time.sleep(0.01)
        own.log(10)

    with family.client, family.trial:
        family.voice.log(10)
        family.wait(family.fork(daemon))
        family.voice.log(10)


def in_the_storm(family: Family) -> None:
    """Forks from two threads while a third logs at full speed and the flusher commits all the time."""
    with family.client, family.trial:
        family.voice.log(10)
        over = threading.Event()
        lock = threading.Lock()
        failures: list[BaseException] = []

        def storm() -> None:
            while not over.is_set():
                family.voice.log(20)

        def child(voice: Voice) -> NoReturn:
            voice.log(10)
            if voice.number % 3 == 0:
                family.client.flush().result(LONG_S)
            if voice.number % 3 == 1:
                family.client.close()
            os._exit(0)

        def forks() -> None:
            try:
                for i in range(8):
                    with lock:  # of the numbers: a fork in between has its own
                        number, family.next = family.next, family.next + 1
                    pid = os.fork()
                    if not pid:
                        child(family.speak(number))
                    time.sleep(0.002 * i)
                    family.wait(pid)
            except AssertionError as error:
                failures.append(error)

        threads = [threading.Thread(target=work, daemon=True) for work in (forks, forks)]
        stormy = threading.Thread(target=storm, daemon=True)
        stormy.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        over.set()
        stormy.join()
        assert not failures, failures


def parent_killed(family: Family) -> None:
    """The parent is killed; a child that logs, one that doesn't, and programs that it has started live on."""
    go = family.counts.with_name("go")

    def waits(voice: Voice) -> None:
        voice.log(10)
        ready(voice)
        voice.log(10)

    def ready(voice: Voice) -> None:
        family.counts.with_name(f"ready{voice.number}").touch()
        begun = time.monotonic()
        while not go.exists() and time.monotonic() - begun < LONG_S:
            time.sleep(0.01)

    family.voice.log(50)
    family.fork(waits)
    family.fork(ready)
    # Not with close_fds, and by a fork of its own: no descriptor of the lock may reach another program.
    until = ["sh", "-c", f"while [ ! -e {go} ]; do sleep 0.1; done"]
    subprocess.Popen(until, close_fds=False)
    pid = os.fork()
    if not pid:
        os.execvp(until[0], until)
    family.voice.log(10)
    begun = time.monotonic()
    while not all(family.counts.with_name(f"ready{n}").exists() for n in (1, 2)):
        assert time.monotonic() - begun < LONG_S
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


# multiprocessing -----------------------------------------------------------------------------------------------------

_here: dict[str, Any] = {}  # what a fork's worker finds of its parent's


def resumed(store: str, counts: Path, trial: str, number: int) -> None:
    """In a process of multiprocessing's: log to the parent's trial, inherited or by its id."""
    import eventrun

    if "family" in _here:
        Voice(_here["family"].trial, counts, number).log(20)
    else:
        Voice(eventrun.open(store, quiet=True).trial("crash", resume=trial), counts, number).log(20)


def processes(method: str) -> Callable[[Family], None]:
    """Processes of multiprocessing log and return."""

    def scene(family: Family) -> None:
        context: Any = multiprocessing.get_context(method)
        if method == "fork":
            _here["family"] = family
        with family.client, family.trial:
            family.voice.log(10)
            family.client.flush().result(LONG_S)
            arguments = (family.store, family.counts, family.trial.id)
            started = [context.Process(target=resumed, args=(*arguments, n)) for n in (1, 2, 3)]
            for process in started:
                process.start()
            family.voice.log(10)
            for process in started:
                process.join()
            assert [process.exitcode for process in started] == [0, 0, 0]

    return scene


def begin_worker(numbers: Any) -> None:
    """In a pool's worker: take a voice."""
    family = _here["family"]
    with numbers.get_lock():
        numbers.value += 1
        _here["voice"] = family.speak(numbers.value)


def load(item: int) -> int:
    """In a pool's worker: load an item, and log."""
    _here["voice"].log(2)
    return item


def data_loader(family: Family) -> None:
    """A data loader: workers log to the trial that their parent logs to, and are terminated at the end, twice."""
    context = multiprocessing.get_context("fork")
    _here["family"] = family
    numbers = context.Value("i", 0)
    with family.client, family.trial:
        for _ in range(2):
            with context.Pool(3, begin_worker, (numbers,)) as pool:
                for _ in pool.imap_unordered(load, range(60)):
                    family.voice.log()


SCENES: dict[str, Callable[[Family], None]] = {
    "ends": ends,
    "left only": left_only,
    "chain": chain,
    "double fork": double_fork,
    "storm": in_the_storm,
    "parent killed": parent_killed,
    "fork": processes("fork"),
    "spawn": processes("spawn"),
    "forkserver": processes("forkserver"),
    "data loader": data_loader,
}


def main() -> None:
    """Play a scene."""
    store, counts, scene, *prelude = sys.argv[1:]
    exec("\n".join(prelude), {"__name__": "prelude"})
    options = {"linger_ms": 1e7} if scene in ("parent killed", "left only") else {}
    SCENES[scene](Family(store, Path(counts), **options))


if __name__ == "__main__":
    main()
