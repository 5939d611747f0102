"""One answer or many, and two ways to wait for them.

Work runs on eventrun's own threads. `Pending` waits for one answer, `Query` for many; both serve sync code
(`result()`, `for`) and async code on asyncio or trio (`await`, `async for`). Giving up waiting doesn't stop the work.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any, Generic, TypeVar, cast

from eventrun.clock import sleep

T = TypeVar("T")
U = TypeVar("U")


class Answer(Generic[T]):
    """Where one answer, or an error, arrives; set once.

    It needs no lock that whoever waits could hold: a signal handler may stop him at any call and wait for the same
    thread. (concurrent.futures.Future has one: a handler that came while `result` held it hung with the thread that
    was to set it.)
    """

    __slots__ = ("_callbacks", "_outcome")

    def __init__(self) -> None:
        self._outcome: tuple[T | None, BaseException | None] | None = None
        self._callbacks: deque[Callable[[], object]] = deque()

    def done(self) -> bool:
        """Tell whether it is there."""
        return self._outcome is not None

    def set(self, value: T) -> None:
        """Give the answer to all who wait."""
        self._outcome = (value, None)
        self._call()

    def fail(self, error: BaseException) -> None:
        """Give all who wait an error instead."""
        self._outcome = (None, error)
        self._call()

    def when_done(self, callback: Callable[[], object]) -> None:
        """Have this called once: on the thread that sets the answer, or at once when it is there."""
        self._callbacks.append(callback)
        if self._outcome is not None:
            self._call()

    def _call(self) -> None:
        while self._callbacks:
            try:
                callback = self._callbacks.popleft()
            except IndexError:  # the other thread was faster
                return
            callback()

    def wait(self, timeout: float | None = None) -> T:
        """Wait for it, at most `timeout` seconds. Raises the error, or TimeoutError."""
        if self._outcome is None:
            there = threading.Lock()
            there.acquire()
            self.when_done(there.release)
            if not there.acquire(timeout=-1 if timeout is None else max(timeout, 0)):
                raise TimeoutError
        return self.value()

    def value(self) -> T:
        """Return it, which must be there. Raises the error."""
        assert self._outcome is not None
        value, error = self._outcome
        if error is not None:
            raise error
        return cast(T, value)


class Pending(Generic[T]):
    """One answer that is on its way: `await pending`, or `pending.result(timeout)` in sync code."""

    def __init__(self, answer: Answer[T], forbidden_thread: Callable[[], bool] | None = None) -> None:
        self.answer = answer
        self._on_worker = forbidden_thread

    def done(self) -> bool:
        """Tell whether the answer, or the error, is there."""
        return self.answer.done()

    def result(self, timeout: float | None = None) -> T:
        """Wait for the answer, at most `timeout` seconds.

        Raises TimeoutError when it takes longer; the work goes on. Works on any thread, also inside a running
        event loop (a notebook), which it then holds up; on eventrun's own threads it would wait for itself and raises,
        and so it does in a finalizer that is called when the interpreter has stopped all other threads.
        """
        if self._on_worker is not None and self._on_worker() and not self.answer.done():
            raise RuntimeError("result() on eventrun's own thread would wait for itself: use await there")
        if sys.is_finalizing() and not self.answer.done():
            raise RuntimeError("the interpreter has shut down the threads that would answer")
        return self.answer.wait(timeout)

    def __await__(self) -> Generator[Any, Any, T]:
        return self._wait().__await__()

    async def _wait(self) -> T:
        await self._arrival()
        return self.answer.value()

    async def _arrival(self) -> None:
        if not self.answer.done():
            await _until_done(self.answer)


async def _until_done(answer: Answer[Any]) -> None:
    # Each loop is woken by its own thread-safe call. anyio.from_thread would do for both, but it blocks the thread
    # that calls it until the loop has run: a training that holds its loop for seconds would hold up the flusher.
    import anyio

    event = anyio.Event()
    answer.when_done(_waker(event.set))
    await event.wait()


def _waker(callback: Callable[[], object]) -> Callable[[], None]:
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        token = trio.lowlevel.current_trio_token()
        gone: tuple[type[Exception], ...] = (trio.RunFinishedError,)
        call = token.run_sync_soon
    else:
        import asyncio

        call = asyncio.get_running_loop().call_soon_threadsafe
        gone = (RuntimeError,)

    def wake() -> None:
        try:
            call(callback)
        except gone:  # the loop ended while the work went on: nobody waits any more
            pass

    return wake


# A page is what one turn of the work gives: some items, and where to go on (None: that was all).
Page = tuple[list[T], Any]


class Query(Generic[T]):
    """Many answers: `for x in query`, `async for x in query`, `list(query)`, `await query`, `query.first()`.

    `fetch(cursor) -> Pending[(items, next cursor or None)]` gives one page; the first cursor is `start`. With
    `poll_s` an empty page means "nothing yet" and is asked for again after that many seconds (a tail).
    Each iteration starts anew.
    """

    def __init__(
        self, fetch: Callable[[Any], Pending[Page[T]]], start: Any = 0, poll_s: float | None = None
    ) -> None:
        self._fetch = fetch
        self._start = start
        self._poll_s = poll_s

    def __iter__(self) -> Iterator[T]:
        cursor = self._start
        while cursor is not None:
            items, cursor = self._fetch(cursor).result()
            yield from items
            if not items and cursor is not None and self._poll_s is not None:
                sleep(self._poll_s)

    def __aiter__(self) -> AsyncIterator[T]:
        # Not an async generator: one that is left by `break` must be closed by hand, and trio says so loudly.
        return _Walk(self._fetch, self._start, self._poll_s)

    def __await__(self) -> Generator[Any, Any, list[T]]:
        return self._all().__await__()

    async def _all(self) -> list[T]:
        return [item async for item in self]

    def first(self) -> Pending[T | None]:
        """Ask for the first item; None when there is none (yet)."""
        first: Answer[T | None] = Answer()

        def look(page: Answer[Page[T]]) -> None:
            try:
                items, cursor = page.value()
                if not items and cursor is not None and self._poll_s is None:  # more pages come
                    ask(self._fetch(cursor))
                else:
                    first.set(items[0] if items else None)
            except BaseException as error:  # noqa: BLE001 - handed on to whoever waits
                first.fail(error)

        def ask(asked: Pending[Page[T]]) -> None:
            asked.answer.when_done(lambda: look(asked.answer))

        asked = self._fetch(self._start)
        ask(asked)
        return Pending(first, asked._on_worker)


class _Walk(AsyncIterator[T]):
    """One asynchronous walk through a query's pages."""

    def __init__(self, fetch: Callable[[Any], Pending[Page[T]]], cursor: Any, poll_s: float | None) -> None:
        self._fetch = fetch
        self._cursor = cursor
        self._poll_s = poll_s
        self._items: Iterator[T] = iter(())
        self._asked: Pending[Page[T]] | None = None

    async def __anext__(self) -> T:
        while True:
            for item in self._items:
                return item
            if self._cursor is None:
                raise StopAsyncIteration
            # A step that is cancelled here leaves its page to the next one: asked again, a cursor that is itself an
            # iterator would give the page after it.
            asked = self._asked = self._asked or self._fetch(self._cursor)
            await asked._arrival()
            self._asked = None
            items, self._cursor = asked.result()
            self._items = iter(items)
            if not items and self._cursor is not None and self._poll_s is not None:
                import anyio

                await anyio.sleep(self._poll_s)


def then(pending: Pending[T], change: Callable[[T], U]) -> Pending[U]:
    """Make a Pending of `change(answer)`; an error passes through."""
    changed: Answer[U] = Answer()

    def forward() -> None:
        try:
            changed.set(change(pending.answer.value()))
        except BaseException as error:  # noqa: BLE001 - handed on to whoever waits
            changed.fail(error)

    pending.answer.when_done(forward)
    return Pending(changed, pending._on_worker)
