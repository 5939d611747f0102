"""Forks: parent and children on one store, in any order of events, ended in any way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eventrun.codec import ChainChecker, items_of
from eventrun.events import MetricsLogged, WriterEnded
from eventrun.portal import Portal
from eventrun.recorder import Recorder
from eventrun.stores import open_store
from eventrun.testing import read_all

LONG = 60.0  # seconds: how long to wait for what comes at once unless something is wrong

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")

# From Python 3.12 on a fork beside threads warns.
COMMAND = [sys.executable, "-W", "ignore::DeprecationWarning", "-c"]
BEGIN = """
    import os, sys, threading, time
    from pathlib import Path
    from eventrun.events import MetricsLogged
    from eventrun.portal import Portal
    from eventrun.recorder import Recorder
    from eventrun.stores import open_store

    folder = Path(sys.argv[1])
    portal = Portal()
    recorder = Recorder(portal, lambda: open_store(folder), folder=folder, linger_ms=5)
    stream = recorder.stream("t/1")

    def log(*numbers):
        for number in numbers:
            stream.record(MetricsLogged({"i": number}))

    def flush():
        recorder.flush().result(60)

    def close():
        assert recorder.close().result(60) == 0
        portal.stop()

    def child(work):
        pid = os.fork()
        if pid == 0:
            try:
                work()
            except BaseException as error:
                print(type(error).__name__, error, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        return pid

    def wait(pid):
        assert os.waitpid(pid, 0)[1] == 0
"""


def script(code: str) -> str:
    return textwrap.dedent(BEGIN) + textwrap.dedent(code)


def run(code: str, store: Path) -> None:
    """Run code that forks; it must end well and say nothing."""
    done = subprocess.run([*COMMAND, script(code), str(store)], capture_output=True, text=True, timeout=LONG)
    assert (done.stderr, done.returncode) == ("", 0)


@pytest.fixture
def portal() -> Iterator[Portal]:
    opened = Portal()
    yield opened
    opened.stop()


def by_writer(portal: Portal, store: Path) -> tuple[list[list[Any]], int]:
    """Recover and read the log: the numbers of each writer, sorted, and how many were noted as ended."""
    opened = open_store(store)
    recorder = Recorder(portal, lambda: opened, folder=store)
    assert portal.call(recorder.recover).result(LONG).problems == []
    found: dict[int, list[Any]] = {}
    ended = 0
    chain = ChainChecker()
    for stored in portal.call(read_all, opened).result(LONG):
        chain.check(stored.batch)
        for _, event in items_of(stored.batch):
            if isinstance(event, WriterEnded):
                ended += 1
            elif isinstance(event, MetricsLogged):
                found.setdefault(stored.batch.header.writer, []).append(event.values["i"])
    recorder.close().result(LONG)
    assert not list((store / "journals").iterdir())
    return sorted(found.values()), ended


def test_a_child_is_a_writer_of_its_own(portal: Portal, tmp_path: Path) -> None:
    """Parent and child log on through the same stream, and close: two writers, nothing doubled, nothing lost."""
    run(
        """
        log(0, 1)
        def work():
            log(10, 11); flush(); log(12); close()
        pid = child(work)
        log(2)
        wait(pid)
        log(3)
        close()
        """,
        tmp_path,
    )
    assert by_writer(portal, tmp_path) == ([[0, 1, 2, 3], [10, 11, 12]], 0)


def test_a_child_that_just_ends(portal: Portal, tmp_path: Path) -> None:
    """What a child recorded that ended by os._exit the next open takes in; one that recorded nothing left nothing."""
    run(
        """
        log(0)
        wait(child(lambda: log(10, 11)))
        wait(child(lambda: None))
        log(1)
        close()
        """,
        tmp_path,
    )
    assert len(list((tmp_path / "journals").iterdir())) == 1
    assert by_writer(portal, tmp_path) == ([[0, 1], [10, 11]], 1)


def test_a_child_that_outlives_its_parent(portal: Portal, tmp_path: Path) -> None:
    """The parent closes, the last one that SQLite's locks would know of if its connections had been open at the fork;
    what the child flushes afterwards is in the log, for others too."""
    run(
        """
        go, gone = os.pipe(), os.pipe()
        log(0)
        flush()
        def work():
            log(10)
            flush()
            os.write(go[1], b"x")
            os.read(gone[0], 1)
            log(11)
            flush()
            import subprocess
            look = "import sqlite3, sys; log = sqlite3.connect(sys.argv[1] + '/log.db'); "
            look += "print(log.execute('SELECT sum(count) FROM batches').fetchone()[0])"
            seen = subprocess.run([sys.executable, "-c", look, str(folder)], capture_output=True, text=True)
            assert seen.stdout.strip() == "4", seen
            log(12)
            close()
        pid = child(work)
        log(1)
        os.read(go[0], 1)
        close()
        os.write(gone[1], b"x")
        wait(pid)
        """,
        tmp_path,
    )
    assert by_writer(portal, tmp_path) == ([[0, 1], [10, 11, 12]], 0)


def test_forks_at_any_moment(portal: Portal, tmp_path: Path) -> None:
    """Forks from the first log call on, while modules are imported, threads log and the flusher commits: each child
    can log, flush and close, and so can the parent."""
    run(
        """
        numbers = iter(range(10**9))
        done = threading.Event()
        def work():
            while not done.is_set():
                log(next(numbers))
        def task():
            log(-1, -2); flush(); log(-3); close()
        log(next(numbers))
        pids = [child(task)]
        thread = threading.Thread(target=work)
        thread.start()
        for i in range(12):
            time.sleep(0.01 * i)
            pids.append(child(task))
        done.set()
        thread.join()
        for pid in pids:
            wait(pid)
        close()
        """,
        tmp_path,
    )
    writers, ended = by_writer(portal, tmp_path)
    assert ended == 0
    assert writers[:-1] == [[-1, -2, -3]] * 13
    assert writers[-1] == list(range(len(writers[-1])))


def test_a_childs_child(portal: Portal, tmp_path: Path) -> None:
    """A daemon's double fork, its parent gone: the grandchild is a writer of its own."""
    run(
        """
        log(0)
        ready = os.pipe()
        def outer():
            log(10)
            def inner():
                log(20, 21); close(); os.write(ready[1], b"x")
            child(inner)
            close()
        wait(child(outer))
        os.read(ready[0], 1)
        log(1)
        close()
        """,
        tmp_path,
    )
    assert by_writer(portal, tmp_path) == ([[0, 1], [10], [20, 21]], 0)


def test_a_killed_parent_with_a_living_child(portal: Portal, tmp_path: Path) -> None:
    """A child that lives on doesn't keep its killed parent's journal locked."""
    code = """
        recorder.linger_ms = 1e7
        log(0, 1, 2)
        def work():
            print(os.getpid(), flush=True)
            time.sleep(60)
        child(work)
        time.sleep(60)
    """
    with subprocess.Popen([*COMMAND, script(code), str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            process.kill()
            process.wait()
            assert by_writer(portal, tmp_path) == ([[0, 1, 2]], 1)
            os.kill(child, 0)  # it lives
        finally:
            os.kill(child, signal.SIGKILL)


def test_closed_stays_closed(tmp_path: Path) -> None:
    """What was closed before the fork is closed in the child."""
    run(
        """
        log(0)
        close()
        def work():
            try:
                log(1)
            except Exception as error:
                assert type(error).__name__ == "Closed", error
            else:
                raise AssertionError("it was recorded")
            assert recorder.close().result(60) == 0
        wait(child(work))
        """,
        tmp_path,
    )


def test_a_fork_in_the_middle_of_a_long_job(portal: Portal, tmp_path: Path) -> None:
    """A fork waits for the store only so long; then the child can't use it and says so, and the next open takes in what
    the child recorded."""
    run(
        """
        from eventrun.stores.sqlite import connection
        connection.FORK_WAIT_S = 0.05
        log(0)
        flush()
        inside, leave = threading.Event(), threading.Event()
        def job(raw):
            inside.set()
            leave.wait(60)
        thread = threading.Thread(target=recorder.store._keeper.log.run, args=[job])
        thread.start()
        inside.wait(60)
        def work():
            log(10, 11)
            try:
                flush()
            except Exception as error:
                assert "forked in the middle" in str(error), error
            else:
                raise AssertionError("it was flushed")
            recorder.close_timeout_s = 0.1
            assert recorder.close().result(60) == 2
        wait(child(work))
        leave.set()
        thread.join()
        log(1)
        close()
        """,
        tmp_path,
    )
    assert by_writer(portal, tmp_path) == ([[0, 1], [10, 11]], 0)
