"""Starts workloads by fork: a sweep needs hundreds of processes, and Python's start takes longer than what they do.

`Starter` is the test's side. Run as a program this is the other side: it imports what a workload needs, and forks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

LONG_S = 120.0


class Starter:
    """A process that has everything imported, and forks one child after another."""

    def __enter__(self) -> Starter:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(LONG_S)

    def run(self, command: Sequence[str], strace: Sequence[str] = (), stderr: Path | None = None) -> int:
        """Run what would follow `python` on a command line, its calls traced if asked; give the return code."""
        pid = self._ask({"command": list(command), "stderr": stderr and str(stderr)})
        tracer = None
        if strace:
            tracer = subprocess.Popen(["strace", "-qq", "-f", *strace, "-p", str(pid)])
            status = Path(f"/proc/{pid}/status")
            while "TracerPid:\t0\n" in status.read_text() and tracer.poll() is None:
                time.sleep(0.001)
        code = self._ask("go")
        if tracer is not None:
            tracer.wait(LONG_S)
        return code

    def _ask(self, question: object) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def main() -> None:
    """Fork for each line; tell the child's pid, wait for the word to go, tell its return code."""
    preload()
    for line in sys.stdin:
        question = json.loads(line)
        ready, go = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(go)
            os.read(ready, 1)
            os.close(ready)
            child(question["command"], question["stderr"])
        os.close(ready)
        print(pid, flush=True)
        sys.stdin.readline()
        os.close(go)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def preload() -> None:
    """Import what a workload imports; open nothing."""
    import asyncio
    import logging
    import runpy
    import sqlite3

    import aiosqlite
    import anyio._backends._asyncio
    import anyio._backends._trio
    import trio

    import eventrun
    import eventrun.stores.sqlite

    assert all((asyncio, logging, runpy, sqlite3, aiosqlite, anyio, trio, eventrun))


def child(command: list[str], stderr: str | None) -> None:
    """Be the new process, to its end."""
    import runpy
    import signal

    signal.alarm(int(LONG_S))  # a run that hangs ends, with a return code of its own
    for number, place in ((0, os.devnull), (1, os.devnull), (2, stderr)):
        if place is not None:
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
            os.dup2(descriptor, number)
            os.close(descriptor)
    what, sys.argv = command[0], command
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    if what == "-c":
        sys.argv = command[1:]
        exec(sys.argv[0], {"__name__": "__main__"})
    else:
        runpy.run_path(what, run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    main()
