"""Pending and Query: one answer or many, waited for by sync code, asyncio and trio."""

from __future__ import annotations

import gc
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from eventrun.pending import Page, Pending, Query, then
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


async def double(number: int) -> int:
    return 2 * number


async def fail(error: BaseException) -> None:
    raise error


def throw(error: BaseException) -> None:
    raise error


# one answer ----------------------------------------------------------------------------------------------------


def test_result(portal: Portal, gate: threading.Event) -> None:
    """result() waits for the answer of either thread, as often as it is asked; done() tells whether it is there."""
    called, read = portal.call(double, 21), portal.read(gate.wait)
    assert called.result() == called.result(LONG) == 42
    assert called.done()
    assert not read.done()
    gate.set()
    assert read.result() is True
    assert read.done()


async def test_await(portal: Portal, gate: threading.Event) -> None:
    """`await` gives the answer, also when it is there already, also a second time."""
    called, read = portal.call(double, 21), portal.read(gate.wait)
    threading.Timer(0.01, gate.set).start()
    for _ in range(2):
        with anyio.fail_after(LONG):
            assert await read is True
            assert await called == 42


async def test_several_wait_for_one(portal: Portal, gate: threading.Event) -> None:
    """All tasks that await one answer get it."""
    pending = portal.read(gate.wait)
    answers = []

    async def wait() -> None:
        answers.append(await pending)

    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            gate.set()
    assert answers == [True] * 5


@pytest.mark.parametrize(
    "ask", [lambda p, e: p.call(fail, e), lambda p, e: p.read(throw, e)], ids=["call", "read"]
)
async def test_errors(portal: Portal, ask: Callable[[Portal, Exception], Pending[None]]) -> None:
    """What the work raised is raised by result() and by `await`, the very same, each time."""
    error = ValueError("no")
    pending = ask(portal, error)
    for _ in range(2):
        with pytest.raises(ValueError, match="no") as awaited:
            await pending
        with pytest.raises(ValueError, match="no") as waited:
            pending.result(LONG)
        assert awaited.value is waited.value is error


def test_a_timeout_is_not_the_end(portal: Portal, gate: threading.Event) -> None:
    """result(timeout) raises TimeoutError when it takes longer; the work goes on and its answer can still be had."""
    pending = portal.read(gate.wait)
    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError):
            pending.result(timeout)
    assert not pending.done()
    gate.set()
    assert pending.result(LONG) is True


async def test_a_cancelled_await_is_not_the_end(portal: Portal, gate: threading.Event) -> None:
    """Cancelling an await doesn't cancel the work: somebody else, or the same task later, gets the answer."""
    pending = portal.read(gate.wait)
    with anyio.move_on_after(0.01) as scope:
        await pending
    assert scope.cancelled_caught
    assert not pending.done()
    gate.set()
    with anyio.fail_after(LONG):
        assert await pending is True


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_loop_ends_before_the_work(
    portal: Portal, gate: threading.Event, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An answer that comes after the waiting loop has ended disturbs nobody, and can still be had."""
    pending = portal.read(gate.wait)

    async def give_up() -> None:
        with anyio.move_on_after(0.01):
            await pending

    anyio.run(give_up, backend=backend)
    gate.set()
    assert pending.result(LONG) is True
    assert portal.read(int).result(LONG) == 0  # the callbacks of the answer before have run
    assert caplog.records == []


async def test_result_inside_a_running_loop(portal: Portal) -> None:
    """result() works where a loop runs, as in a notebook's cell: other threads do the work."""
    assert portal.call(double, 21).result(LONG) == 42
    assert portal.read(lambda: portal.call(double, 4).result()).result(LONG) == 8


def test_result_on_the_own_threads(portal: Portal, gate: threading.Event) -> None:
    """result() on a thread of eventrun's, where it would wait for itself, raises; what is there already it gives."""
    done = portal.call(double, 1)
    done.result(LONG)

    def wait(ask: Callable[[], Pending[Any]]) -> Any:
        return ask().result(LONG)

    async def wait_on_the_loop(ask: Callable[[], Pending[Any]]) -> Any:
        return wait(ask)

    def call() -> Pending[int]:
        return portal.call(double, 21)

    def read() -> Pending[int]:
        return portal.read(int, "7")

    assert portal.read(wait, call).result(LONG) == 42
    assert portal.call(wait_on_the_loop, lambda: done).result(LONG) == 2
    for ask in (read, lambda: then(read(), str)):
        with pytest.raises(RuntimeError, match="own thread"):
            portal.read(wait, ask).result(LONG)
    with pytest.raises(RuntimeError, match="own thread"):
        portal.call(wait_on_the_loop, call).result(LONG)
    portal.read(gate.wait)
    with pytest.raises(RuntimeError, match="own thread"):  # whoever reads may need the loop
        portal.call(wait_on_the_loop, read).result(LONG)


def test_await_on_the_own_loop(portal: Portal) -> None:
    """A coroutine on eventrun's own loop may await what the loop and the reader do."""

    async def both() -> tuple[int, int]:
        return await portal.call(double, 21), await portal.read(int, "7")

    assert portal.call(both).result(LONG) == (42, 7)


async def test_then(portal: Portal) -> None:
    """`then` changes the answer; an error of the work, or of the change, is the error of the changed."""
    assert then(portal.call(double, 21), str).result(LONG) == "42"
    assert await then(then(portal.read(int, "7"), float), str) == "7.0"
    with pytest.raises(KeyError, match="work"):
        await then(portal.read(throw, KeyError("work")), str)
    with pytest.raises(ZeroDivisionError):
        then(portal.read(int), lambda zero: 1 / zero).result(LONG)
    assert portal.read(int).result(LONG) == 0  # the thread lives


# many ----------------------------------------------------------------------------------------------------------


class Source:
    """Pages that are asked for by their number, and what was asked for."""

    def __init__(self, portal: Portal, pages: list[list[int]], poll_s: float | None = None) -> None:
        self.asked: list[int] = []
        self.pages = pages
        self.query = Query(lambda cursor: portal.read(self.page, cursor), 0, poll_s)

    def page(self, cursor: int) -> Page[int]:
        self.asked.append(cursor)
        following = cursor + 1
        return self.pages[cursor], following if following < len(self.pages) else None


@pytest.mark.parametrize(
    "pages",
    [[[]], [[1]], [[1, 2, 3]], [[1, 2], [3], [4, 5]], [[], [1], [], [], [2, 3], []], [[], []]],
    ids=str,
)
async def test_all_ways_to_walk(portal: Portal, pages: list[list[int]]) -> None:
    """for, list, async for and await give all items of all pages, in order; first() the first one or None."""
    items = list(itertools.chain(*pages))
    query = Source(portal, pages).query
    assert [x for x in query] == list(query) == items  # noqa: C416 - both ways are what is tested
    assert [x async for x in query] == await query == items
    assert await query.first() == query.first().result(LONG) == (items[0] if items else None)


async def test_each_iteration_starts_anew(portal: Portal) -> None:
    """Two walks through one query don't know each other."""
    query = Source(portal, [[1, 2], [3]]).query
    one, two = iter(query), aiter(query)
    assert [next(one), next(one), await anext(two)] == [1, 2, 1]
    assert next(iter(query)) == await anext(aiter(query)) == 1
    assert (list(one), [x async for x in two]) == ([3], [2, 3])
    assert list(one) == [x async for x in two] == []


async def test_nothing_is_asked_ahead(portal: Portal) -> None:
    """A page is asked for when an item of it is wanted, none before the first."""
    source = Source(portal, [[1, 2], [3]])
    walk, again = iter(source.query), aiter(source.query)
    assert source.asked == []
    assert [next(walk), next(walk), await anext(again)] == [1, 2, 1]
    assert source.asked == [0, 0]
    assert next(walk) == 3
    assert source.asked == [0, 0, 1]


async def test_an_error_comes_after_what_was_there_before_it(portal: Portal) -> None:
    """What a later page raises reaches the walk after the items of the pages before; first() doesn't see it."""

    def page(cursor: int) -> Page[int]:
        if cursor:
            raise OSError("gone")
        return [1, 2], 1

    query: Query[int] = Query(lambda cursor: portal.read(page, cursor))
    seen: list[int] = []

    async def walk() -> None:
        async for x in query:
            seen.append(x)  # noqa: PERF401 - what came before the error is what matters

    with pytest.raises(OSError, match="gone"):
        seen.extend(x for x in query)
    assert seen == [1, 2]
    with pytest.raises(OSError, match="gone"):
        await walk()
    assert seen == [1, 2, 1, 2]
    with pytest.raises(OSError, match="gone"):
        await query
    assert await query.first() == 1


def test_first_tells_an_error(portal: Portal) -> None:
    """An error on the way to the first item, on a page after an empty one too, is the error of first()."""

    def page(cursor: int) -> Page[int]:
        if cursor == 2:
            raise OSError("gone")
        return [], cursor + 1

    query: Query[int] = Query(lambda cursor: portal.read(page, cursor))
    with pytest.raises(OSError, match="gone"):
        query.first().result(LONG)


def polled(portal: Portal) -> tuple[Query[int], list[int]]:
    """A tail: two items come after some empty answers each, and then the end."""
    answers: Iterator[list[int]] = iter([[], [], [1, 2], [], [], [], [3]])
    asked: list[int] = []

    def page(cursor: int) -> Page[int]:
        asked.append(cursor)
        items = next(answers)
        return items, None if items == [3] else cursor + len(items)

    return Query(lambda cursor: portal.read(page, cursor), 0, poll_s=0.001), asked


def test_a_poll_goes_on_for(portal: Portal) -> None:
    """With poll_s an empty page is asked for again, from where the walk is, until something comes."""
    query, asked = polled(portal)
    assert list(query) == [1, 2, 3]
    assert asked == [0, 0, 0, 2, 2, 2, 2]


async def test_a_poll_goes_on_async_for(portal: Portal) -> None:
    """The same in async code."""
    query, asked = polled(portal)
    assert [x async for x in query] == [1, 2, 3]
    assert asked == [0, 0, 0, 2, 2, 2, 2]


async def test_first_of_a_tail(portal: Portal) -> None:
    """first() of what is polled doesn't wait for something to come."""
    query, asked = polled(portal)
    assert await query.first() is None
    assert asked == [0]


async def test_break_leaves_nothing_behind(portal: Portal) -> None:
    """Leaving `async for` needs no closing: nothing warns, and nothing more is asked for."""
    source = Source(portal, [[1, 2], [3]])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        async for _ in source.query:
            break
        for _ in source.query:
            break
        gc.collect()
        await anyio.lowlevel.checkpoint()
    assert warned == []
    assert portal.read(lambda: list(source.asked)).result(LONG) == [0, 0]


async def test_a_cancelled_step_loses_nothing(portal: Portal, gate: threading.Event) -> None:
    """A step that was cancelled while its page was on the way is taken again later, with that very page."""
    pages: Iterator[list[int]] = iter([[1], [2], [3]])  # the cursor itself goes on, as that of events() does

    def page(cursor: Any) -> Page[int]:
        gate.wait()
        items = next(pages, None)
        return ([], None) if items is None else (items, pages)

    query: Query[int] = Query(lambda cursor: portal.read(page, cursor))
    walk = aiter(query)
    with anyio.move_on_after(0.01) as scope:
        await anext(walk)
    assert scope.cancelled_caught
    gate.set()
    portal.read(int).result(LONG)  # the page is there, and nobody has taken it
    with anyio.fail_after(LONG):
        assert [x async for x in walk] == [1, 2, 3]


async def test_a_cancelled_poll_goes_on(portal: Portal) -> None:
    """A walk that was cancelled between two polls goes on with the next step."""
    found: list[int] = []
    query: Query[int] = Query(
        lambda cursor: portal.read(lambda: (found[cursor:], len(found))), 0, poll_s=0.001
    )
    walk = aiter(query)
    for number in range(3):
        with anyio.move_on_after(0.02) as scope:
            await anext(walk)
        assert scope.cancelled_caught
        found.append(number)
        with anyio.fail_after(LONG):
            assert await anext(walk) == number
