"""Ways to end a process that logs: `python ends.py STORE NAME COUNTS WAY SCENE [PRELUDE]`. See test_ends.py.

Each source of events logs 0, 1, 2, ... to a trial of its own and counts, in a mapped file, the calls that have
returned: the oracle of harness.py.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import mmap
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import anyio

SOURCES = 8  # the most that one life has

# Ends the block that it is called in, or returns True: a signal is on its way, and logging goes on until it comes.
Way = Callable[["Life", "Source | None"], bool | None]


class Life:
    """One process: its store, its counts, its random moments."""

    def __init__(self, store: str, name: str, counts: Path) -> None:
        self.store = store
        self.name = name
        self.chance = random.Random(name)
        with counts.open("w+b") as file:
            file.truncate(16 * SOURCES)
            self.counts = memoryview(mmap.mmap(file.fileno(), 16 * SOURCES)).cast("Q")
        self.sources = 0

    def open(self, **options: Any) -> Any:
        """Open the store."""
        import eventrun

        return eventrun.open(self.store, **{"linger_ms": 20, "quiet": True, "close_timeout_s": 60, **options})

    def source(self, client: Any) -> Source:
        """Begin a trial that counts."""
        self.sources += 1
        return Source(self, self.sources - 1, client)

    def soon(self, number: int) -> None:
        """Have a signal sent to this process in a moment, whatever it does then."""
        pause = self.chance.uniform(0, 0.03)

        def send() -> None:
            time.sleep(pause)
            os.kill(os.getpid(), number)

        threading.Thread(target=send, daemon=True).start()


class Source:
    """A trial that gets 0, 1, 2, ..."""

    def __init__(self, life: Life, place: int, client: Any) -> None:
        self.trial = client.trial("crash", name=f"{life.name}-{place}")
        self.client = client
        self.counts = life.counts
        self.place = place
        self.done = 0
        self.busy = threading.Lock()

    def log(self, times: int = 1) -> None:
        """Log the next numbers."""
        for _ in range(times):
            self.trial.log({"i": self.done}, step=self.done)
            self.done += 1
            self.counts[2 * self.place] = self.done

    def log_alone(self) -> None:
        """Log the next number, unless a call to here is under way: what interrupts itself would mix up the order."""
        if self.busy.acquire(blocking=False):
            try:
                self.log()
            finally:
                self.busy.release()

    def __enter__(self) -> Source:
        self.trial.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.trial.__exit__(kind, error, trace)


# ways to end in the middle of `with client, trial` -------------------------------------------------------------------


def go_on(source: Source) -> NoReturn:
    """Log until something comes."""
    while True:
        source.log(5)
        time.sleep(0.001)


def signalled(number: int) -> Way:
    """End by a signal at some moment."""

    def way(life: Life, source: Source | None) -> bool:
        life.soon(number)
        return True

    return way


def error(life: Life, source: Source | None) -> None:
    """End by an exception that nobody handles."""
    raise ValueError("not handled")


WAYS: dict[str, Way] = {
    "return": lambda life, source: None,
    "exit 0": lambda life, source: sys.exit(0),
    "exit 3": lambda life, source: sys.exit(3),
    "error": error,
    "os._exit": lambda life, source: os._exit(7),
    "SIGINT": signalled(signal.SIGINT),
    "SIGTERM": signalled(signal.SIGTERM),
    "SIGHUP": signalled(signal.SIGHUP),
    "SIGQUIT": signalled(signal.SIGQUIT),
}


def in_sync(life: Life, way: Way, **options: Any) -> None:
    """End in sync code."""
    with life.open(**options) as client, life.source(client) as source:
        source.log(50)
        if way(life, source):
            go_on(source)


def in_loop(backend: str) -> Callable[..., None]:
    """End on an event loop."""

    def scene(life: Life, way: Way, **options: Any) -> None:
        async def main() -> None:
            async with life.open(**options) as client:
                with life.source(client) as source:
                    source.log(50)
                    await anyio.sleep(0.001)
                    if way(life, source):
                        await go_on_in_loop(source)

        anyio.run(main, backend=backend)

    return scene


async def beside(source: Source) -> None:
    """Log, one task of many."""
    with source:
        await go_on_in_loop(source)


async def go_on_in_loop(source: Source) -> NoReturn:
    """Log until something comes."""
    while True:
        source.log(2)
        await anyio.sleep(0.001)


# scenes of their own -------------------------------------------------------------------------------------------------


def not_closed(life: Life, way: Way, **options: Any) -> None:
    """Nobody closes, nobody finishes."""
    source = life.source(life.open(**options))
    source.log(50)
    if way(life, source):
        go_on(source)


def dropped(life: Life, way: Way) -> None:
    """`del client` without a close."""
    client = life.open(linger_ms=1e7)
    source = life.source(client)
    source.log(50)
    del client, source
    gc.collect()
    way(life, None)


def error_in_thread(life: Life, way: Way) -> None:
    """An exception that nobody handles, on another thread; the main one goes on."""
    with life.open() as client, life.source(client) as main:

        def work() -> None:
            with life.source(client) as source:
                source.log(50)
                raise ValueError("not handled")

        thread = threading.Thread(target=work)
        thread.start()
        main.log(50)
        thread.join()
        main.log(50)
        way(life, main)


def daemon_threads(life: Life, way: Way) -> None:
    """Daemon threads log while the interpreter shuts down; some open streams all the time."""
    client = life.open(linger_ms=2)
    sources = [life.source(client) for _ in range(3)]
    begun = threading.Barrier(5)

    def work(source: Source) -> None:
        begun.wait()
        while True:
            source.log()

    def open_streams() -> None:
        begun.wait()
        while True:
            client.trial("crash", name="other").log(other=1)

    for source in sources:
        threading.Thread(target=work, args=(source,), daemon=True).start()
    threading.Thread(target=open_streams, daemon=True).start()
    begun.wait()
    time.sleep(life.chance.uniform(0, 0.05))
    way(life, sources[0])


def cancelled_group(backend: str) -> Callable[[Life, Way], None]:
    """A task group is cancelled while its tasks log and the client is open around it, or in it."""

    def scene(life: Life, way: Way) -> None:
        async def inside(scope: anyio.CancelScope) -> None:
            async with life.open(linger_ms=1e7) as client:
                source = life.source(client)
                with source:
                    source.log(50)
                    scope.cancel()
                    await anyio.sleep_forever()

        async def main() -> None:
            async with life.open(linger_ms=1e7) as client:
                async with anyio.create_task_group() as tasks:
                    for _ in range(3):
                        tasks.start_soon(beside, life.source(client))
                    tasks.start_soon(inside, tasks.cancel_scope)
                late = life.source(client)
                late.log(10)
                late.trial.finish()

        anyio.run(main, backend=backend)

    return scene


def cancelled_task(life: Life, way: Way) -> None:
    """An asyncio task is cancelled in its block, and again while the client closes."""
    import asyncio

    async def work() -> None:
        async with life.open() as client:
            with life.source(client) as source:
                source.log(50)
                begun.set()
                await asyncio.sleep(1e6)

    begun = asyncio.Event()

    async def main() -> None:
        task = asyncio.create_task(work())
        await begun.wait()
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)

    asyncio.run(main())


def loop_closed(life: Life, way: Way) -> None:
    """The event loop is closed while a task is in its block."""
    import asyncio

    async def work() -> None:
        async with life.open() as client:
            with life.source(client) as source:
                source.log(50)
                begun.set()
                await asyncio.sleep(1e6)

    loop = asyncio.new_event_loop()
    begun = asyncio.Event()
    task = loop.create_task(work())
    loop.run_until_complete(begun.wait())
    loop.close()
    way(life, None)
    assert not task.done()


def loop_blocked(backend: str) -> Callable[[Life, Way], None]:
    """The loop is blocked until all is in the log: were it needed for that, this would take for ever."""

    def scene(life: Life, way: Way) -> None:
        async def main() -> None:
            async with life.open() as client:
                with life.source(client) as source:
                    source.log(50)
                    while client.statistics().durable < client.statistics().recorded:
                        time.sleep(0.01)  # noqa: ASYNC251 - on purpose
                    way(life, source)

        anyio.run(main, backend=backend)

    return scene


def finished_at_exit(life: Life, way: Way) -> None:
    """Functions at exit, registered before the client was opened and after the trial was begun, log and finish."""
    sources: list[Source] = []

    def finish(place: int) -> None:
        sources[place].log(10)
        sources[place].trial.finish()

    atexit.register(finish, 0)
    client = life.open()
    sources += [life.source(client), life.source(client)]
    atexit.register(finish, 1)
    for source in sources:
        source.log(50)
    way(life, sources[0])


class Garbage:
    """Logs when it is collected."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.me = self

    def __del__(self) -> None:
        self.source.log_alone()


class Late:
    """Asks through a client that has only read, which nobody closes at exit, when it is collected; and closes it."""

    def __init__(self, life: Life) -> None:
        self.me = self
        self.client = life.open()
        self.client.projects().first().result()

    def __del__(self) -> None:
        try:
            self.client.projects().first().result()
        except RuntimeError as error:
            sys.stderr.write(f"late: {error}\n")
        self.client.close()
        sys.stderr.write("late: closed\n")


def finalizers_at_shutdown(life: Life, way: Way) -> None:
    """What is thrown away while the interpreter shuts down logs, before and after the client was closed."""
    client = life.open()
    source, last = life.source(client), life.source(client)
    source.log(50)
    sys.modules["kept"] = Garbage(source)  # type: ignore[assignment]
    sys.modules["late"] = Late(life)  # type: ignore[assignment]
    atexit.register(lambda: last.log(10))
    Garbage(source)
    way(life, source)


def storm(life: Life, way: Way) -> None:
    """Signal handlers and finalizers log while log calls, new streams, flushes and commits are under way."""
    with life.open(linger_ms=2) as client:
        main, handled, called, garbage = (life.source(client) for _ in range(4))
        moments = itertools.count()

        def handler(number: int, frame: object) -> None:
            handled.log_alone()

        def hook(frame: object, event: str, argument: object) -> None:
            # A timer's signals come too seldom to find a call of a microsecond: where they may come, in turn.
            if event in ("call", "c_return") and not next(moments) % 7:
                called.log_alone()

        signal.signal(signal.SIGVTALRM, handler)
        signal.setitimer(signal.ITIMER_VIRTUAL, 2e-4, 2e-4)
        gc.set_threshold(50, 2, 2)
        for i in range(200):
            sys.setprofile(hook if i % 2 else None)
            main.log(5)
            Garbage(garbage)
            client.trial("crash", name="other").log(other=1)
            if i % 40 == 0:
                client.flush().result()
        sys.setprofile(None)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        gc.set_threshold(700, 10, 10)
        way(life, main)


def handler_that_ends(life: Life, way: Way) -> None:
    """The program's own handler of SIGTERM finishes its trial, flushes, closes and exits."""
    client = life.open()
    source, handled = life.source(client), life.source(client)

    def handler(number: int, frame: object) -> None:
        handled.log(10)
        handled.trial.finish()
        client.flush().result()
        client.close()
        sys.exit(5)

    signal.signal(signal.SIGTERM, handler)
    life.soon(signal.SIGTERM)
    while True:
        source.log()


# a store that hangs --------------------------------------------------------------------------------------------------


def interrupted_close(scene: Callable[..., None]) -> Callable[[Life, Way], None]:
    """Ctrl-C twice while the client closes, which would take an hour."""

    def interrupted(life: Life, way: Way) -> None:
        from eventrun.client.ending import Ending

        claim = Ending.claim
        closing = threading.Event()

        def claimed(self: Ending) -> bool:
            closing.set()
            return claim(self)

        def send() -> None:
            closing.wait()
            for pause in (0.05, 0.3):
                time.sleep(pause)
                os.kill(os.getpid(), signal.SIGINT)

        Ending.claim = claimed  # type: ignore[method-assign]
        threading.Thread(target=send, daemon=True).start()
        scene(life, way, close_timeout_s=3600)

    return interrupted


def hanging(scene: Callable[..., None]) -> Callable[[Life, Way], None]:
    """A close that gives up soon."""

    def impatient(life: Life, way: Way) -> None:
        from eventrun import client, recorder

        recorder.CLOSE_STORE_S = client.CLOSE_STORE_S = 0.1  # type: ignore[attr-defined]
        scene(life, way, close_timeout_s=0.3)

    return impatient


SCENES: dict[str, Callable[[Life, Way], None]] = {
    "sync": in_sync,
    "asyncio": in_loop("asyncio"),
    "trio": in_loop("trio"),
    "not closed": not_closed,
    "dropped": dropped,
    "error in thread": error_in_thread,
    "daemon threads": daemon_threads,
    "cancelled group, asyncio": cancelled_group("asyncio"),
    "cancelled group, trio": cancelled_group("trio"),
    "cancelled task": cancelled_task,
    "loop closed": loop_closed,
    "loop blocked, asyncio": loop_blocked("asyncio"),
    "loop blocked, trio": loop_blocked("trio"),
    "finished at exit": finished_at_exit,
    "finalizers at shutdown": finalizers_at_shutdown,
    "storm": storm,
    "handler that ends": handler_that_ends,
    "hanging, sync": hanging(in_sync),
    "hanging, asyncio": hanging(in_loop("asyncio")),
    "hanging, trio": hanging(in_loop("trio")),
    "hanging, not closed": hanging(not_closed),
    "interrupted, sync": interrupted_close(in_sync),
    "interrupted, asyncio": interrupted_close(in_loop("asyncio")),
    "interrupted, trio": interrupted_close(in_loop("trio")),
}


def main() -> None:
    """Live, and end."""
    store, name, counts, way, scene, *prelude = sys.argv[1:]
    exec("\n".join(prelude), {"__name__": "prelude"})
    SCENES[scene](Life(store, name, Path(counts)), WAYS[way])


if __name__ == "__main__":
    main()
