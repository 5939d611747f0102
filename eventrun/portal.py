"""eventrun's own two threads: an asyncio loop for stores and the flusher, and a reader for everything that folds.

Both are daemons started on first use, so a training that blocks its own loop, or runs on trio, or has no loop at
all, doesn't hold back the log; and folding, which is Python work, never delays a flush.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from eventrun.pending import Pending

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")
_Job = Callable[[], None]


class Portal:
    """Start work on eventrun's threads from any other thread."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop the threads without stopping them: in a fork's child they don't exist."""
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread: threading.Thread | None = None
        self._inbox: deque[tuple[Future[Any], Callable[..., Coroutine[Any, Any, Any]], tuple[Any, ...]]] = (
            deque()
        )
        self._tasks: set[Any] = set()
        self._jobs: SimpleQueue[_Job | None] | None = None
        self._reader_thread: threading.Thread | None = None

    @property
    def started(self) -> bool:
        """Tell whether the background loop has been used."""
        return self._loop_thread is not None

    def call(self, function: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> Pending[T]:
        """Run a coroutine function on the background loop. Doesn't wait, not even for the loop to start."""
        future: Future[T] = Future()
        with self._lock:
            self._inbox.append((future, function, arguments))
            if self._loop_thread is None:
                self._loop_thread = threading.Thread(target=self._run_loop, name="eventrun-loop", daemon=True)
                self._loop_thread.start()
            elif self._loop is not None:
                self._loop.call_soon_threadsafe(self._drain)
        return Pending(future, lambda: threading.current_thread() is self._loop_thread)

    def _run_loop(self) -> None:
        import asyncio  # here and not above: 40 ms that neither the import of eventrun nor the first log call shall pay

        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        with self._lock:
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
            future, function, arguments = self._inbox.popleft()
            task = asyncio.ensure_future(_answer(future, function(*arguments)))
            self._tasks.add(task)  # a loop holds its tasks only weakly
            task.add_done_callback(self._tasks.discard)

    def read(self, function: Callable[..., T], *arguments: Any) -> Pending[T]:
        """Run a function on the reader thread, after those asked for before it."""
        future: Future[T] = Future()

        def job() -> None:
            try:
                result = function(*arguments)
            except BaseException as error:  # noqa: BLE001 - handed on to whoever waits
                future.set_exception(error)
            else:
                future.set_result(result)

        self._running_reader().put(job)
        return Pending(future, lambda: threading.current_thread() is self._reader_thread)

    def stop(self) -> None:
        """End both threads; what was asked for before is done first. May be used again afterwards."""
        with self._lock:
            loop, loop_thread, self._loop, self._loop_thread = self._loop, self._loop_thread, None, None
            jobs, reader, self._jobs, self._reader_thread = self._jobs, self._reader_thread, None, None
        if jobs is not None and reader is not None:
            jobs.put(None)
            reader.join()
        if loop is not None and loop_thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            loop_thread.join()

    def _running_reader(self) -> SimpleQueue[_Job | None]:
        if self._jobs is None:
            with self._lock:
                if self._jobs is None:
                    jobs: SimpleQueue[_Job | None] = SimpleQueue()
                    self._reader_thread = threading.Thread(
                        target=_run_reader, args=(jobs,), name="eventrun-reader", daemon=True
                    )
                    self._reader_thread.start()
                    self._jobs = jobs
        return self._jobs


async def _answer(future: Future[T], coroutine: Coroutine[Any, Any, T]) -> None:
    try:
        result = await coroutine
    except BaseException as error:
        future.set_exception(error)
        if not isinstance(error, Exception):  # cancelled: the loop ends
            raise
    else:
        future.set_result(result)


def _run_reader(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # or the last answer would be kept alive until the next question
