"""eventrun's own two threads: an asyncio loop for stores and the flusher, and a reader for everything that folds.

Both are daemons started on first use, so a training that blocks its own loop, or runs on trio, or has no loop at
all, doesn't hold back the log; and folding, which is Python work, never delays a flush.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from eventrun.errors import Closed
from eventrun.pending import Answer, Pending

if TYPE_CHECKING:
    import asyncio

    _Call = tuple[Answer[Any], Callable[..., Coroutine[Any, Any, Any]], tuple[Any, ...]]

T = TypeVar("T")

# Held while a thread of eventrun's imports what takes long. A fork waits for it: the child would have a half-imported
# module, locked by a thread that it hasn't got, and would wait for ever where it needs that module.
importing = threading.Lock()
_prepared: list[bool] = []


def _prepare_for_forks() -> None:
    # Not when this is imported: hooks that are registered later are called earlier, and what is imported may need what
    # such a hook of another module locks (logging's).
    if not _prepared and hasattr(os, "register_at_fork"):
        _prepared.append(True)
        os.register_at_fork(
            before=importing.acquire, after_in_parent=importing.release, after_in_child=importing.release
        )


class Portal:
    """Start work on eventrun's threads from any other thread."""

    def __init__(self) -> None:
        # asyncio needs it. Not imported by the loop's thread, since it registers hooks for forks: a fork that waits for
        # that import would call only those for after it. Nor by the first call, which a handler may interrupt.
        import logging  # noqa: F401

        self._begin()

    def _begin(self) -> None:
        # Of callers among each other; eventrun's own threads never wait for it. Reentrant: a signal handler, or a
        # finalizer that logs, may run while this thread is inside.
        self._lock = threading.RLock()
        self._loop: _Loop | None = None
        self._reader: _Reader | None = None

    def forget(self) -> None:
        """Drop the threads without stopping them: in a fork's child they don't exist."""
        _inherited.append((self._loop, self._reader))
        self._begin()

    @property
    def started(self) -> bool:
        """Tell whether the background loop has been used."""
        return self._loop is not None

    def call(self, function: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> Pending[T]:
        """Run a coroutine function on the background loop. Doesn't wait, not even for the loop to start."""
        answer: Answer[T] = Answer()
        with self._lock:
            loop = self._running_loop()
            loop.put((answer, function, arguments))
        return Pending(answer, lambda: threading.current_thread() is loop.thread)

    def read(self, function: Callable[..., T], *arguments: Any) -> Pending[T]:
        """Run a function on the reader thread, after those asked for before it."""
        answer: Answer[T] = Answer()

        def job() -> None:
            try:
                result = function(*arguments)
            except BaseException as error:  # noqa: BLE001 - handed on to whoever waits
                answer.fail(error)
            else:
                answer.set(result)

        with self._lock:
            reader = self._running_reader()
            reader.put(job)
        # Not on the loop's thread either: what is read may need the loop.
        return Pending(answer, lambda: threading.current_thread() is reader.thread or self._on_loop())

    def stop(self, seconds: float | None = None) -> bool:
        """End both threads. What the reader was asked for is done first, what still runs on the loop is cancelled.

        Waits at most `seconds` for each; what is in the way then is left to itself, and to its end as a daemon.
        """
        # One after the other: what is read may need the loop.
        with self._lock:
            reader, self._reader = self._reader, None
            if reader is not None:
                reader.put(None)
        if reader is not None and not _joined(reader.thread, seconds):
            self.forget()
            return False
        with self._lock:
            loop, self._loop = self._loop, None
            if loop is not None:
                loop.put(None)
        return loop is None or _joined(loop.thread, seconds)

    def _on_loop(self) -> bool:
        loop = self._loop
        return loop is not None and threading.current_thread() is loop.thread

    def _running_loop(self) -> _Loop:
        if (loop := self._loop) is None:
            _prepare_for_forks()
            made = _Loop()
            _start(made.thread)
            loop = self._loop = self._loop or made
            if loop is not made:  # a signal handler that logs was faster
                made.put(None)
        return loop

    def _running_reader(self) -> _Reader:
        if (reader := self._reader) is None:
            made = _Reader()
            _start(made.thread)
            reader = self._reader = self._reader or made
            if reader is not made:
                made.put(None)
        return reader


class _Loop:
    """A thread with an asyncio loop."""

    def __init__(self) -> None:
        self.thread = threading.Thread(target=self._run, name="eventrun-loop", daemon=True)
        self._inbox: deque[_Call | None] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def put(self, call: _Call | None) -> None:
        """Have it begun after what was put before; None ends the thread."""
        self._inbox.append(call)
        loop = self._loop
        if loop is not None:  # else the loop looks into the inbox when it begins
            loop.call_soon_threadsafe(self._drain)

    def _run(self) -> None:
        with importing:
            import asyncio  # not above: 40 ms that neither the import of eventrun nor the first log call shall pay

        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        self._loop = loop
        loop.call_soon(self._drain)
        try:
            loop.run_forever()
        finally:
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            if left:
                loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            loop.close()

    def _drain(self) -> None:
        import asyncio

        while self._inbox:
            call = self._inbox.popleft()
            if call is None:
                asyncio.get_running_loop().stop()
                return
            task = asyncio.ensure_future(_answer(*call))
            self._tasks.add(task)  # a loop holds its tasks only weakly
            task.add_done_callback(partial(self._ended, call[0]))

    def _ended(self, answer: Answer[Any], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not answer.done():  # cancelled, maybe before it began; whoever waits was not cancelled himself
            answer.fail(Closed("eventrun was closed before the answer came"))


async def _answer(
    answer: Answer[T], function: Callable[..., Coroutine[Any, Any, T]], arguments: tuple[Any, ...]
) -> None:
    import asyncio

    try:
        result = await function(*arguments)
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # noqa: BLE001 - handed on to whoever waits
        answer.fail(error)
    else:
        answer.set(result)


class _Reader:
    """A thread that does one job after another."""

    def __init__(self) -> None:
        self.thread = threading.Thread(target=self._run, name="eventrun-reader", daemon=True)
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def put(self, job: Callable[[], None] | None) -> None:
        """Have it done after what was put before; None ends the thread."""
        self._jobs.put(job)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # or the last answer would be kept alive until the next question


def _start(thread: threading.Thread) -> None:
    if (
        sys.is_finalizing()
    ):  # up to Python 3.11 it would be waited for in vain; from 3.12 on this is the error there too
        raise RuntimeError("can't start a thread at interpreter shutdown")
    thread.start()


def _joined(thread: threading.Thread, seconds: float | None) -> bool:
    thread.join(seconds)
    return not thread.is_alive()


def aside(function: Callable[[], T]) -> Pending[T]:
    """Run a function on a daemon thread of its own; right here when there is none to be had (at interpreter exit)."""
    answer: Answer[T] = Answer()

    def work() -> None:
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - handed on to whoever waits
            answer.fail(error)
        else:
            answer.set(result)

    try:
        _start(threading.Thread(target=work, name="eventrun-aside", daemon=True))
    except RuntimeError:
        work()
    return Pending(answer)


_inherited: list[object] = []  # of a fork's parent: tasks that are pending complain when they are thrown away
