"""A log of the test's own and what a fresh fold makes of it: the oracle for views."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

from eventrun.codec import Batch, Item, StoredEvent, Stream
from eventrun.projector import Views
from eventrun.projector.log import Log
from eventrun.stores.base import StoredBatch
from eventrun.stores.memory import MemoryStore
from eventrun.testing import chain

T = TypeVar("T")
Run = tuple[Stream, Sequence[Item]]  # consecutive events of one stream


def now(answer: Coroutine[Any, Any, T]) -> T:
    """Run what never waits: the memory store's coroutines."""
    try:
        answer.send(None)
    except StopIteration as done:
        return cast(T, done.value)
    raise AssertionError("it waits")


def memory_log(runs: Iterable[Run]) -> Log:
    """Make a log of these events, a batch of each run."""
    store = MemoryStore()
    last: dict[Stream, Batch] = {}
    for stream, items in runs:
        last[stream] = chain(stream, [items], last.get(stream))[-1]
        now(store.append([last[stream]]))

    def read(after: int, *, subject: str | None = None, limit_bytes: int = 1 << 20) -> list[StoredBatch]:
        return now(store.read(after, subject=subject, limit_bytes=limit_bytes))

    return Log(read, lambda: now(store.end()))


def folded(runs: Iterable[Run]) -> str:
    """Fold these events anew, in memory, and return the digest of the views."""
    views = Views(None, memory_log(runs))
    try:
        views.catch_up_all()
        return views.digest()
    finally:
        views.close()


def runs_of(events: Iterable[StoredEvent]) -> Iterator[tuple[Stream, list[Item]]]:
    """Join what follows each other in one stream, in the order of the log."""
    stream: Stream | None = None
    items: list[Item] = []
    for stored in events:
        if stored.stream != stream:
            if stream is not None:
                yield stream, items
            stream, items = stored.stream, []
        items.append((stored.time_ns, stored.event))
    if stream is not None:
        yield stream, items
