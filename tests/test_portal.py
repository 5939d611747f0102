"""The portal: eventrun's own two threads, what runs where, and how they end and begin again."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import anyio
import pytest

from eventrun.errors import Closed
from eventrun.portal import Portal

LONG = 30.0  # seconds: how long to wait for what comes at once unless something is wrong


@pytest.fixture
def portal() -> Iterator[Portal]:
    opened = Portal()
    yield opened
    opened.stop()


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Holds up work until it is set; set at the end in any case, or a failed test would hang."""
    event = threading.Event()
    yield event
    event.set()


async def here() -> threading.Thread:
    return threading.current_thread()


async def double(number: int) -> int:
    return 2 * number


def throw(error: BaseException) -> None:
    raise error


async def fail(error: BaseException) -> None:
    raise error


# what runs where -----------------------------------------------------------------------------------------------


def test_two_threads(portal: Portal) -> None:
    """What is called runs on one daemon thread, what is read on another; neither is there before it is needed."""
    before = set(threading.enumerate())
    assert not portal.started
    reader = portal.read(threading.current_thread).result(LONG)
    assert not portal.started
    loop = portal.call(here).result(LONG)
    assert portal.call(here).result(LONG) is loop
    assert portal.read(threading.current_thread).result(LONG) is reader
    assert (loop.name, loop.daemon, reader.name, reader.daemon) == (
        "eventrun-loop",
        True,
        "eventrun-reader",
        True,
    )
    assert set(threading.enumerate()) - before == {loop, reader}


def test_started(portal: Portal) -> None:
    """Calling starts the portal."""
    portal.call(here)
    assert portal.started


def test_in_order(portal: Portal) -> None:
    """Reads are done, and calls begun, in the order in which they were asked for."""
    read: list[int] = []
    called: list[int] = []

    async def call(number: int) -> None:
        called.append(number)

    pending = [(portal.read(read.append, n), portal.call(call, n)) for n in range(300)]
    for each in pending:
        each[0].result(LONG)
        each[1].result(LONG)
    assert read == called == list(range(300))


def test_a_slow_read_holds_up_no_call(portal: Portal, gate: threading.Event) -> None:
    """Folding never delays a flush: while the reader is busy, calls are answered."""
    slow = portal.read(gate.wait)
    assert portal.call(double, 21).result(LONG) == 42
    assert not slow.done()


def test_calls_run_side_by_side(portal: Portal) -> None:
    """A coroutine that waits doesn't keep the next from running."""
    events: list[asyncio.Event] = []

    async def wait() -> str:
        events.append(asyncio.Event())
        await events[0].wait()
        return "waited"

    async def wake() -> None:
        events[0].set()

    waiting = portal.call(wait)
    portal.call(wake).result(LONG)
    assert waiting.result(LONG) == "waited"


def test_from_many_threads(portal: Portal) -> None:
    """Many threads that begin at once get their own answers, from one loop and one reader."""
    ready = threading.Barrier(8)
    answers: dict[int, bool] = {}
    threads: set[threading.Thread] = set()

    def ask(thread: int) -> None:
        ready.wait()
        numbers = range(thread * 1000, thread * 1000 + 100)
        found = [(portal.call(double, n).result(LONG), portal.read(int, n).result(LONG)) for n in numbers]
        answers[thread] = found == [(2 * n, n) for n in numbers]
        threads.update((portal.call(here).result(LONG), portal.read(threading.current_thread).result(LONG)))

    askers = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert answers == dict.fromkeys(range(8), True)
    assert len(threads) == 2


# errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_an_error_reaches_its_waiter_only(portal: Portal, error: BaseException) -> None:
    """What one coroutine or function raises, even to end the program, is told to whoever waits, and to nobody else."""
    before, failing, after = portal.call(double, 1), portal.call(fail, error), portal.call(double, 2)
    assert (before.result(LONG), after.result(LONG)) == (2, 4)
    first, wrong, last = portal.read(int, 1), portal.read(throw, error), portal.read(int, 2)
    assert (first.result(LONG), last.result(LONG)) == (1, 2)
    for pending in (failing, wrong):
        with pytest.raises(type(error)) as raised:
            pending.result(LONG)
        assert raised.value is error


def test_a_function_that_cannot_be_called(portal: Portal) -> None:
    """Wrong arguments, or a function that gives no coroutine, are an error of that call, and of no other."""
    wrong = [portal.call(double), portal.call(throw, OSError("early")), portal.call(int, 3)]  # type: ignore[arg-type]
    right = portal.call(double, 21)
    assert right.result(LONG) == 42
    for pending, error in zip(wrong, (TypeError, OSError, TypeError), strict=True):
        with pytest.raises(error):
            pending.result(LONG)


# callers with a loop of their own ------------------------------------------------------------------------------


async def test_a_caller_that_blocks_its_loop(portal: Portal) -> None:
    """A loop that is blocked doesn't hold up the portal, not even where a task of it is to be told of an answer."""
    answers: list[int] = []
    worked = threading.Event()

    async def work() -> None:
        for _ in range(30):
            await asyncio.sleep(0.01)
        worked.set()

    async def wait() -> None:
        answers.append(await portal.call(double, 21))

    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            portal.call(work)
            assert worked.wait(LONG)  # holds up this loop, for 0.3 s when all is well
    assert answers == [42]


# the end, and beginning again ----------------------------------------------------------------------------------


def test_stop_ends_both_threads(portal: Portal, gate: threading.Event) -> None:
    """stop() ends both threads after what the reader was asked for, calls that this needs included."""
    loop, reader = portal.call(here).result(LONG), portal.read(threading.current_thread).result(LONG)
    waited = portal.read(gate.wait)
    called = portal.read(lambda: portal.call(double, 21).result(LONG))
    stopping = threading.Thread(target=portal.stop)
    stopping.start()
    gate.set()
    stopping.join(LONG)
    assert not stopping.is_alive()
    assert (waited.result(0), called.result(0)) == (True, 42)
    assert not loop.is_alive()
    assert not reader.is_alive()
    assert not portal.started


def test_stop_cancels_what_still_runs(portal: Portal) -> None:
    """A coroutine that is still running is cancelled; whoever waits is told so."""
    cleaned = threading.Event()

    async def endless() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            cleaned.set()

    running = portal.call(endless)
    portal.call(double, 1).result(LONG)  # the one before has begun
    portal.stop()
    assert cleaned.is_set()
    with pytest.raises(Closed, match="before the answer"):
        running.result(0)


@pytest.mark.parametrize("calls", [1, 2, 10, 100])
def test_no_waiter_is_forgotten(portal: Portal, calls: int) -> None:
    """Whatever was called right before stop() is answered, or told that it was closed; never is nothing said."""
    pending = [portal.call(double, n) for n in range(calls)]
    portal.stop()

    def answer(number: int) -> int:
        try:
            return pending[number].result(0)
        except Closed:
            return 2 * number

    assert [answer(n) for n in range(calls)] == [2 * n for n in range(calls)]


def test_use_after_stop(portal: Portal) -> None:
    """After stop(), which may be repeated, the portal begins again with new threads."""
    portal.stop()
    threads: list[threading.Thread] = []
    for _ in range(3):
        threads += portal.call(here).result(LONG), portal.read(threading.current_thread).result(LONG)
        portal.stop()
        portal.stop()
    assert len(set(threads)) == 6
    assert not any(thread.is_alive() for thread in threads)


def test_a_fork_starts_afresh() -> None:
    """After forget() a fork's child has threads of its own, whatever the parent was doing; the parent goes on."""
    code = """
        import asyncio, os, sys, threading
        from eventrun.portal import Portal

        async def double(number): return 2 * number
        async def here(): return threading.get_native_id()

        portal = Portal()
        threads = portal.call(here).result(), portal.read(threading.get_native_id).result()
        slow = portal.call(asyncio.sleep, 0.2, "slow")
        stopped = threading.Event()
        def hammer():
            while not stopped.is_set():
                portal.call(double, 1).result()
        asker = threading.Thread(target=hammer)     # may hold the portal's lock at the moment of the fork
        asker.start()
        for _ in range(10):
            child = os.fork()
            if not child:
                portal.forget()
                assert not portal.started
                assert portal.call(double, 21).result(20) == 42
                own = portal.call(here).result(20), portal.read(threading.get_native_id).result(20)
                assert not set(own) & set(threads)
                portal.stop()
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        stopped.set()
        asker.join()
        assert slow.result() == "slow"
        assert (portal.call(here).result(), portal.read(threading.get_native_id).result()) == threads
        portal.stop()
        print("done")
    """
    # Python 3.12 warns of the fork that this is about.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
