"""For tests of eventrun and of what is built on it: strategies for hypothesis, and the suite that a store must pass.

A new store's tests are one fixture, or two with SharedStoreConformance:

    class TestMyStore(StoreConformance):
        @pytest.fixture
        def store(self, tmp_path):
            return MyStore(tmp_path)
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, get_origin

import msgspec

from eventrun.codec import (
    NO_DIGEST,
    Batch,
    ChainChecker,
    Item,
    Stream,
    digest,
    encode_item,
    items_of,
    metric_values,
    seal,
)
from eventrun.errors import Closed, Conflict, MissingExtra
from eventrun.events import EVENT_TYPES, Event, MetricsLogged, Plain, Scalar
from eventrun.portal import Portal
from eventrun.stores.base import Store, StoredBatch, Tip
from eventrun.stores.memory import NOTHING

try:
    import pytest
    from hypothesis import strategies as st
except ImportError as error:
    raise MissingExtra("eventrun.testing", error.name or "pytest", "testing") from error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = [
    "SharedStoreConformance",
    "StoreConformance",
    "batches",
    "chain",
    "events",
    "items",
    "plain_values",
    "read_all",
    "scalars",
    "streams",
]

ANSWER_S = 120.0  # how long a test of the suite may take


# strategies ----------------------------------------------------------------------------------------------------

_TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
_TIMES = st.integers(-(2**63), 2**63 - 1)
_UNSIGNED = st.integers(0, 2**64 - 1)


def scalars() -> st.SearchStrategy[Scalar]:
    """Draw every value that a metric may have: NaN, infinite, 64-bit integers, any text, None."""
    return st.one_of(st.floats(), st.integers(-(2**63), 2**64 - 1), st.booleans(), _TEXT, st.none())


def plain_values() -> st.SearchStrategy[Plain]:
    """Draw what params, metadata and references may be: JSON-like data, and bytes."""
    return st.recursive(
        scalars() | st.binary(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
        max_leaves=8,
    )


def events(*kinds: type[Event]) -> st.SearchStrategy[Event]:
    """Draw events of the kinds given, or of all kinds."""
    return st.one_of([_event(kind) for kind in kinds or EVENT_TYPES])


def items() -> st.SearchStrategy[Item]:
    """Draw (time_ns, event)."""
    return st.tuples(_TIMES, events())


def streams() -> st.SearchStrategy[Stream]:
    """Draw streams of any subject and writer."""
    return st.builds(Stream, _TEXT.filter(bool), _UNSIGNED)


def batches(most: int = 4) -> st.SearchStrategy[list[Batch]]:
    """Draw the first batches of one stream, chained."""
    groups = st.lists(st.lists(items(), min_size=1, max_size=5), min_size=1, max_size=most)
    return st.builds(chain, streams(), groups)


def _event(kind: Any) -> st.SearchStrategy[Any]:
    # Made from the fields' types, so that a new kind of event is drawn as soon as it exists.
    fields = {field.name: _of_type(field.type) for field in msgspec.structs.fields(kind)}
    return st.builds(kind, **fields)


def _of_type(annotation: Any) -> st.SearchStrategy[Any]:
    if annotation is Plain:
        return plain_values()
    if annotation is str:
        return _TEXT
    if annotation is int:
        return _UNSIGNED
    if annotation is float:
        return st.floats()
    if get_origin(annotation) is dict:
        return st.dictionaries(_TEXT, _of_type(annotation.__args__[1]), max_size=4)
    if get_origin(annotation) is list:
        return st.lists(_of_type(annotation.__args__[0]), max_size=4)
    if get_origin(annotation) is tuple:
        return st.tuples(*map(_of_type, annotation.__args__))
    if annotation == Scalar:
        return scalars()
    if hasattr(annotation, "__args__"):
        return st.one_of([_of_type(one) for one in annotation.__args__])
    return st.from_type(annotation)


# batches -------------------------------------------------------------------------------------------------------


def chain(stream: Stream, groups: Iterable[Sequence[Item]], after: Tip | Batch | None = None) -> list[Batch]:
    """Make one batch of each group of items, the first one following `after`, or beginning the stream."""
    tip = Tip(after.header.last, digest(after)) if isinstance(after, Batch) else after or NOTHING
    made = []
    for group in groups:
        payload = b"".join(encode_item(*item) for item in group)
        times = [time_ns for time_ns, _ in group]
        batch = seal(stream, tip.sequence + 1, len(group), payload, min(times), max(times), tip.digest)
        tip = Tip(batch.header.last, digest(batch))
        made.append(batch)
    return made


async def read_all(
    store: Store, after: int = 0, *, subject: str | None = None, limit_bytes: int = 4 << 20
) -> list[StoredBatch]:
    """Read to the log's end, as many times as it takes."""
    found: list[StoredBatch] = []
    while page := await store.read(after, subject=subject, limit_bytes=limit_bytes):
        found += page
        after = page[-1].last_position
    return found


def _logged(first: int, count: int = 1, **values: Scalar) -> list[Item]:
    flat = metric_values(values) or {"loss": 1.0}
    return [(n, MetricsLogged(flat, step=n)) for n in range(first, first + count)]


def _groups(sizes: Iterable[int]) -> list[list[Item]]:
    made, first = [], 1
    for size in sizes:
        made.append(_logged(first, size))
        first += size
    return made


A, B, C = Stream("t/a", 1), Stream("t/b", 2**64 - 1), Stream("t/a", 2**63)
CLAIMS = Stream("g/p/g", 0)


# the suite -----------------------------------------------------------------------------------------------------


def _on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on a loop like eventrun's own, and close the store there: a store's client may belong to its loop."""

    @functools.wraps(test)
    def run(self: object, store: Store, **fixtures: Any) -> None:
        async def whole() -> None:
            try:
                await test(self, store, **fixtures)
            finally:
                await store.aclose()

        portal = Portal()
        try:
            portal.call(whole).result(ANSWER_S)
        finally:
            portal.stop()

    return run


class StoreConformance:
    """The contract of `eventrun.stores.base.Store` as tests. Subclass it as Test... and give it a fixture `store`.

    `store` returns a new, empty store for each test. The tests close it, on the loop where they used it.
    """

    @pytest.fixture
    def store(self) -> Store:
        """Return a new, empty store."""
        raise NotImplementedError("give the subclass of StoreConformance a fixture named store")

    @_on_a_loop
    async def test_an_empty_log(self, store: Store) -> None:
        """Nothing was appended: nothing to read, every stream ends at 0 with no digest."""
        assert await store.end() == 0
        assert await store.read() == []
        assert await store.read(5, subject="t/a") == []
        assert await store.tip(A) == Tip(0, NO_DIGEST)
        await store.settle()

    @_on_a_loop
    async def test_an_empty_append(self, store: Store) -> None:
        """Appending nothing changes nothing and returns the end."""
        assert await store.append([]) == 0
        await store.append(chain(A, _groups([3])))
        assert await store.append([]) == 3
        assert await store.end() == 3

    @_on_a_loop
    async def test_what_was_appended_is_read(self, store: Store) -> None:
        """Batches come back byte for byte, in the order of their append, with positions from 1 without gaps."""
        a, b = chain(A, _groups([2, 3])), chain(B, _groups([4]))
        assert await store.append([a[0], b[0], a[1]]) == 9
        assert await read_all(store) == [StoredBatch(1, a[0]), StoredBatch(3, b[0]), StoredBatch(7, a[1])]
        assert await store.end() == 9
        await store.settle()
        assert [stored.position for stored in await read_all(store)] == [1, 3, 7]

    @_on_a_loop
    async def test_tips(self, store: Store) -> None:
        """A stream's tip is its last sequence and the digest of its last batch; other streams have no part in it."""
        a, c = chain(A, _groups([2, 3])), chain(C, _groups([1]))
        await store.append(a)
        await store.append(c)
        assert await store.tip(A) == Tip(5, digest(a[1]))
        assert await store.tip(C) == Tip(1, digest(c[0]))
        assert await store.tip(B) == Tip(0, NO_DIGEST)

    @_on_a_loop
    async def test_read_after_a_position(self, store: Store) -> None:
        """Only batches with events beyond the position are read; the first may begin at or before it."""
        some = chain(A, _groups([3, 1, 4]))
        await store.append(some)
        starts = {
            after: [stored.position for stored in await store.read(after)]
            for after in (0, 1, 2, 3, 4, 5, 7, 8, 99)
        }
        last = [5]
        assert starts == {
            0: [1, 4, 5],
            1: [1, 4, 5],
            2: [1, 4, 5],
            3: [4, 5],
            4: last,
            5: last,
            7: last,
            8: [],
            99: [],
        }

    @_on_a_loop
    async def test_read_one_subject(self, store: Store) -> None:
        """All streams of the subject are read in log order, and no others; also from the middle of a batch."""
        a, b, c = chain(A, _groups([2, 2, 2])), chain(B, _groups([2, 2])), chain(C, _groups([2, 2]))
        await store.append([a[0], b[0], c[0], a[1], b[1], c[1], a[2]])
        of_a = [(1, a[0]), (5, c[0]), (7, a[1]), (11, c[1]), (13, a[2])]
        assert await read_all(store, subject="t/a") == of_a
        assert await read_all(store, subject="t/a", limit_bytes=1) == of_a
        assert await read_all(store, 1, subject="t/a") == of_a
        assert await read_all(store, 2, subject="t/a") == of_a[1:]
        assert await read_all(store, 11, subject="t/a") == of_a[3:]
        assert await read_all(store, 12, subject="t/a") == of_a[4:]
        assert await read_all(store, subject="t/b") == [(3, b[0]), (9, b[1])]
        assert await read_all(store, subject="t/") == []

    @_on_a_loop
    async def test_read_in_small_pages(self, store: Store) -> None:
        """A page holds at least one batch, however large, and stops at about the limit."""
        some = chain(A, _groups([1] * 50))
        await store.append(some)
        assert [len(await store.read(n, limit_bytes=1)) for n in (0, 10, 49, 50)] == [1, 1, 1, 0]
        page = await store.read(limit_bytes=10 * len(some[9].frame))
        assert 5 <= len(page) <= 15
        assert [stored.batch for stored in await read_all(store, limit_bytes=500)] == some

    @_on_a_loop
    async def test_a_gap_is_refused(self, store: Store) -> None:
        """A batch that doesn't begin where its stream ends is a Conflict."""
        some = chain(A, _groups([2, 3, 1]))
        with pytest.raises(Conflict):
            await store.append([some[1]])
        await store.append([some[0]])
        with pytest.raises(Conflict):
            await store.append([some[2]])
        with pytest.raises(Conflict):
            await store.append([some[2], some[1]])
        assert await store.append(some[1:]) == 6

    @_on_a_loop
    async def test_an_overlap_is_refused(self, store: Store) -> None:
        """A batch that repeats some sequences and adds others is a Conflict."""
        await store.append(chain(A, _groups([2])))
        with pytest.raises(Conflict):
            await store.append(chain(A, _groups([3])))
        with pytest.raises(Conflict):
            await store.append(chain(A, _groups([2]), Tip(1, NO_DIGEST)))
        assert await store.end() == 2

    @_on_a_loop
    async def test_a_broken_chain_is_refused(self, store: Store) -> None:
        """A batch that isn't chained to the stream's last one is a Conflict, though its sequence fits."""
        first, _ = chain(A, _groups([2, 1]))
        await store.append([first])
        for previous in (NO_DIGEST, b"x" * len(NO_DIGEST)):
            with pytest.raises(Conflict):
                await store.append(chain(A, [_logged(3)], Tip(2, previous)))
        with pytest.raises(Conflict):
            await store.append(chain(B, [_logged(1)], Tip(0, digest(first))))
        assert await store.end() == 2

    @_on_a_loop
    async def test_append_is_atomic(self, store: Store) -> None:
        """When one batch doesn't fit, none is appended, and all that came before is as it was."""
        a, b, c = chain(A, _groups([2, 2])), chain(B, _groups([1, 1])), chain(C, _groups([1]))
        await store.append([a[0]])
        with pytest.raises(Conflict):
            await store.append([c[0], a[1], b[1]])
        with pytest.raises(Conflict):
            await store.append([b[0], a[1]], expected={C: 7})
        assert await read_all(store) == [(1, a[0])]
        assert [await store.tip(stream) for stream in (B, C)] == [Tip(0, NO_DIGEST)] * 2
        assert await store.append([c[0], a[1], b[0], b[1]]) == 7

    @_on_a_loop
    async def test_a_repeat_is_skipped(self, store: Store) -> None:
        """Batches that the log holds byte for byte are skipped: an append whose answer was lost may be repeated."""
        some = chain(A, _groups([2, 3, 1, 1]))
        assert await store.append(some[:2]) == 5
        assert await store.append(some[:2]) == 5
        assert await store.append([some[0]]) == 5
        assert await store.append(some) == 7
        more = chain(B, _groups([1]))
        assert await store.append([*more, *more, some[3], some[1]]) == 8
        assert [stored.batch for stored in await read_all(store)] == [*some, *more]

    @_on_a_loop
    async def test_a_repeat_with_other_bytes_is_refused(self, store: Store) -> None:
        """Sequences that the log holds with other bytes are a Conflict."""
        some = chain(A, _groups([2, 2]))
        await store.append(some)
        for other in (
            chain(A, [_logged(1, 2, loss=2.0)])[0],
            chain(A, [_logged(1, 1)])[0],
            chain(A, [_logged(1, 4)])[0],
        ):
            with pytest.raises(Conflict):
                await store.append([other])
        assert [stored.batch for stored in await read_all(store)] == some

    @_on_a_loop
    async def test_expected(self, store: Store) -> None:
        """An append happens only if each expected stream ends where its caller thought, also one not appended to."""
        claims = chain(CLAIMS, _groups([1, 1]))
        assert await store.append([claims[0]], expected={CLAIMS: 0}) == 1
        with pytest.raises(Conflict):
            await store.append([claims[1]], expected={CLAIMS: 0})
        with pytest.raises(Conflict):
            await store.append(chain(A, _groups([1])), expected={CLAIMS: 2})
        assert await store.append(chain(A, _groups([1])), expected={CLAIMS: 1, B: 0}) == 2
        assert await store.append([claims[1]], expected={CLAIMS: 1}) == 3
        with pytest.raises(Conflict):  # whoever repeats a claim has to look who won
            await store.append([claims[1]], expected={CLAIMS: 1})

    @_on_a_loop
    async def test_one_winner(self, store: Store) -> None:
        """Of those who claim the same place at once exactly one wins."""
        await _race([store])

    @_on_a_loop
    async def test_concurrent_appends(self, store: Store) -> None:
        """Many writers at once: no batch is lost or doubled, positions have no gaps, each stream is in order."""
        await _append_at_once([store])

    @_on_a_loop
    async def test_many_small_batches(self, store: Store) -> None:
        """10,000 batches of one stream, then one batch of 2,000 streams each, in one append."""
        some = chain(A, _groups([1] * 10_000))
        assert await store.append(some) == 10_000
        assert await store.append(some[-100:]) == 10_000
        many = [chain(Stream(f"t/{n}", n), _groups([2]))[0] for n in range(2000)]
        assert await store.append(many) == 14_000
        assert (await store.tip(Stream("t/1999", 1999))).sequence == 2
        found = await read_all(store, limit_bytes=100_000)
        assert [stored.batch for stored in found] == some + many
        _check_log(found, 14_000)
        assert await read_all(store, subject="t/7") == [StoredBatch(10_015, many[7])]

    @_on_a_loop
    async def test_large_batches(self, store: Store) -> None:
        """Batches of several megabytes come back whole, one to a page."""
        incompressible = "".join(chr(0x4E00 + (n * n * 7919) % 20_000) for n in range(300_000))
        some = chain(A, [_logged(n, 1, **{incompressible: float(n)}) for n in (1, 2, 3)])
        await store.append(some)
        assert [stored.batch for stored in await read_all(store, limit_bytes=100)] == some

    @pytest.mark.parametrize(
        "subject", ["t/größe", "g/%2F/日本", "t/🙂\u0301", "t/a'b\"; --", "t/a\0b", "T/a", "t/A", " "]
    )
    @_on_a_loop
    async def test_any_subject(self, store: Store, subject: str) -> None:
        """Subjects are compared character by character, whatever they hold."""
        stream = Stream(subject, 7)
        await store.append([*chain(A, _groups([1])), *chain(stream, _groups([2]))])
        (stored,) = await store.read(subject=subject)
        assert (stored.position, stored.batch.header.stream) == (2, stream)
        assert (await store.tip(stream)).sequence == 2

    @_on_a_loop
    async def test_closed(self, store: Store) -> None:
        """A closed store refuses every call; closing twice is no error."""
        await store.append(chain(A, _groups([1])))
        await store.aclose()
        await store.aclose()
        for call in (store.end(), store.read(), store.tip(A), store.append([]), store.settle()):
            with pytest.raises(Closed):
                await call


class SharedStoreConformance(StoreConformance):
    """The contract of a store that outlives its process and may be open in several. Needs a fixture `reopen` too.

    `reopen` returns a function that opens the log of `store` once more, also while that is open.
    """

    @pytest.fixture
    def reopen(self) -> Callable[[], Store]:
        """Return a function that opens the same log again."""
        raise NotImplementedError("give the subclass of SharedStoreConformance a fixture named reopen")

    @_on_a_loop
    async def test_reopening(self, store: Store, reopen: Callable[[], Store]) -> None:
        """What was appended is there in the next process, which goes on where the log ended."""
        some = chain(A, _groups([2, 3, 1]))
        await store.append(some[:2])
        await store.aclose()
        again = reopen()
        try:
            assert await again.end() == 5
            assert await again.tip(A) == Tip(5, digest(some[1]))
            assert await again.append(some[1:]) == 6
            assert [stored.batch for stored in await read_all(again)] == some
        finally:
            await again.aclose()

    @_on_a_loop
    async def test_others_are_seen(self, store: Store, reopen: Callable[[], Store]) -> None:
        """What another process appends is seen by the next call, tips included."""
        some = chain(A, _groups([1] * 6))
        async with _others(reopen, 1) as (other,):
            for n in range(0, 6, 2):
                await store.append([some[n]])
                await other.append([some[n + 1]])
                assert await store.end() == n + 2
                assert await store.tip(A) == Tip(n + 2, digest(some[n + 1]))
                assert len(await store.read(n)) == 2

    @_on_a_loop
    async def test_one_winner_of_several_handles(self, store: Store, reopen: Callable[[], Store]) -> None:
        """Of those who claim the same place at once, each through a handle of its own, exactly one wins."""
        async with _others(reopen, 2) as others:
            await _race([store, *others])

    @_on_a_loop
    async def test_concurrent_appends_by_several_handles(
        self, store: Store, reopen: Callable[[], Store]
    ) -> None:
        """Many writers at once, through handles of their own: nothing is lost, positions have no gaps."""
        async with _others(reopen, 2) as others:
            await _append_at_once([store, *others])


async def _race(handles: list[Store]) -> None:
    for place in range(10):
        tip = await handles[0].tip(CLAIMS)
        claims = [chain(CLAIMS, [_logged(place, who=float(n))], tip)[0] for n in range(6)]
        tries = [
            handles[n % len(handles)].append([claim], expected={CLAIMS: place})
            for n, claim in enumerate(claims)
        ]
        answers = await asyncio.gather(*tries, return_exceptions=True)
        winners = [claim for claim, answer in zip(claims, answers, strict=True) if answer == place + 1]
        assert len(winners) == 1
        assert all(isinstance(answer, Conflict) for answer in answers if answer != place + 1)
        assert (await handles[-1].read(place))[0].batch == winners[0]


async def _append_at_once(handles: list[Store]) -> None:
    async def write(handle: Store, stream: Stream) -> list[int]:
        return [await handle.append([batch]) for batch in chain(stream, _groups([1, 2, 3] * 5))]

    writers = [(handles[n % len(handles)], Stream("t/shared", n)) for n in range(9)]
    ends = await asyncio.gather(*(write(*writer) for writer in writers))
    assert all(answers == sorted(answers) for answers in ends)
    found = await read_all(handles[-1], subject="t/shared")
    _check_log(found, 30 * len(writers))
    assert len(found) == 15 * len(writers)


@asynccontextmanager
async def _others(reopen: Callable[[], Store], count: int) -> AsyncIterator[list[Store]]:
    others = [reopen() for _ in range(count)]
    try:
        yield others
    finally:
        for other in others:
            await other.aclose()


def _check_log(found: Sequence[StoredBatch], end: int) -> None:
    """Assert that batches read from a log's beginning are whole, without gaps, and end at `end`."""
    checker, position = ChainChecker(), 0
    for stored in found:
        assert stored.position == position + 1
        checker.check(stored.batch)
        assert len(items_of(stored.batch)) == stored.batch.header.count
        position = stored.last_position
    assert position == end
