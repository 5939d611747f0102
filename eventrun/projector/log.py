"""Read the log for folding: batches checked and in order, cut into slices, without holding up anybody.

`Pace` is why a training's event loop isn't held up by a fold in its process. Tried on 2 cores, lag of an asyncio
loop in another thread while this one runs Python code: nothing given up, p99 15 ms (the interpreter switches threads
every 5 ms only); `sleep(0)` after each 0.4 ms, 3.4 ms, because this thread takes the lock back before the other has
woken; a sleep of 10 us, 2.1 ms, which is what an idle machine had (2.0 ms). A longer sleep only cost throughput.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import msgspec

from eventrun.clock import monotonic_ns, sleep
from eventrun.codec import ChainChecker, decode_items, payload_of
from eventrun.errors import SALVAGE, LogDamaged
from eventrun.events import Event
from eventrun.projections import Slice
from eventrun.stores.base import StoredBatch

PAGE_BYTES = 1 << 20  # of batches per read of the log: some 75,000 events, 40 MB when decoded
GENTLE_PAGE_BYTES = 256 << 10  # the same in a process that records
PIECE_BYTES = 4 << 10  # of payload folded at a time in a process that records: about 0.4 ms
SLICE_NS = 400_000  # Python work without a pause in a process that records
PAUSE_S = 10e-6  # see above

Item = tuple[int, Event]


class Read(Protocol):
    """A store's `read`, waited for."""

    def __call__(
        self, after: int, *, subject: str | None = None, limit_bytes: int = PAGE_BYTES
    ) -> list[StoredBatch]:
        """Return batches that hold events beyond `after`; of one subject, or all."""
        ...


class Log(NamedTuple):
    """What the read side asks of a store, as functions that wait for the answer."""

    read: Read
    end: Callable[[], int]


class Cut(NamedTuple):
    """Which events count: those up to a position, those up to a time, or both; None is no bound."""

    position: int | None = None
    time_ns: int | None = None


EVERYTHING = Cut()


class Pace:
    """Give up the interpreter's lock often, when `gentle`."""

    def __init__(self, gentle: bool) -> None:
        self.gentle = gentle
        self.page_bytes = GENTLE_PAGE_BYTES if gentle else PAGE_BYTES
        self._since = monotonic_ns()

    def breathe(self) -> None:
        """Let other threads run if it is time to; to be called at least each 0.1 ms or so."""
        if self.gentle and monotonic_ns() - self._since > SLICE_NS:
            sleep(PAUSE_S)
            self._since = monotonic_ns()


def batches(log: Log, after: int, upto: int, pace: Pace, subject: str | None = None) -> Iterator[StoredBatch]:
    """Yield the batches that hold the events after `after`, up to `upto`, without gaps in the positions.

    Raises LogDamaged with the range; what is in a batch is checked by `slices`.
    """
    while after < upto:
        page = log.read(after, subject=subject, limit_bytes=pace.page_bytes)
        if not page and subject is None:
            raise _damaged(after + 1, upto, "are missing")
        if not page:
            return
        for stored in page:
            if stored.position > upto:
                return
            if subject is None and stored.position > after + 1:
                raise _damaged(after + 1, stored.position - 1, "are missing")
            if stored.last_position <= after:
                raise _damaged(stored.position, stored.last_position, "are there twice")
            after = stored.last_position
            yield stored


def _damaged(first: int, last: int, what: str) -> LogDamaged:
    where = f"positions {first}..{last}"
    return LogDamaged(f"{where} of the log: {what}; {SALVAGE}", (where,))


def slices(stored: StoredBatch, after: int, cut: Cut, pace: Pace, checker: ChainChecker) -> Iterator[Slice]:
    """Yield the events of a batch that lie beyond `after` and count, in slices small enough for the pace.

    Raises LogDamaged with the batch's positions, before the first slice: for a wrong checksum, or a place in its
    stream that doesn't follow what `checker` has seen. Batches that a checker has refused it hasn't seen.
    """
    try:
        payload = payload_of(stored.batch)
        checker.check(stored.batch)
        yield from _counting(_decoded(stored, payload, pace), after, cut)
    except LogDamaged as error:
        raise _damaged(stored.position, stored.last_position, str(error)) from error


def _decoded(stored: StoredBatch, payload: bytes, pace: Pace) -> Iterator[Slice]:
    position, batch = stored
    header = batch.header
    if not pace.gentle:
        yield Slice(position, header.stream, header.first, decode_items(payload, header.count))
        return
    done = 0
    for items in _pieces(payload, header.count):
        yield Slice(position + done, header.stream, header.first + done, items)
        done += len(items)
        pace.breathe()


_raw_items = msgspec.msgpack.Decoder(list[msgspec.Raw])


def _pieces(payload: bytes, count: int) -> Iterator[list[Item]]:
    """Decode a payload bit by bit: in one go 30,000 events would keep the interpreter's lock for 15 ms or more."""
    each = max(PIECE_BYTES * count // max(len(payload), 1), 1)
    # Room for an array's head before each piece, over what has been decoded already.
    framed = bytearray(5) + payload
    at = 5
    while count > each:
        framed[at - 5 : at] = b"\xdd" + each.to_bytes(4, "big")
        end = _end_of_array(memoryview(framed)[at - 5 :])
        if end is None:
            break
        end += at - 5
        yield decode_items(bytes(framed[at:end]), each)
        at, count = end, count - each
    yield decode_items(bytes(framed[at:]), count)


def _end_of_array(data: memoryview) -> int | None:
    """Return where the msgpack array at the beginning of `data` ends.

    msgspec has no call for it, but its refusal of trailing bytes names the place, and costs 0.2 us an event where
    a walker in Python costs 5. None if the message has changed.
    """
    try:
        _raw_items.decode(data)
    except msgspec.DecodeError as error:
        _, _, place = str(error).rpartition("trailing characters (byte ")
        return int(place[:-1]) if place[:-1].isdecimal() else None
    return None


def _counting(decoded: Iterator[Slice], after: int, cut: Cut) -> Iterator[Slice]:
    for part in decoded:
        skip = max(after + 1 - part.position, 0)
        stop = len(part.items)
        if cut.position is not None:
            stop = min(stop, cut.position + 1 - part.position)
        if skip >= stop:
            continue
        kept = between(part, skip, stop)
        if cut.time_ns is None:
            yield kept
        else:
            yield from _up_to_time(kept, cut.time_ns)


def between(part: Slice, start: int, stop: int) -> Slice:
    """Return the items from place `start` to before `stop`."""
    if start == 0 and stop >= len(part.items):
        return part
    return Slice(part.position + start, part.stream, part.first + start, part.items[start:stop])


def _up_to_time(part: Slice, time_ns: int) -> Iterator[Slice]:
    """Yield the runs of items that are not later than `time_ns`; with a clock that jumps there may be several."""
    start = None
    for place, (when, _) in enumerate(part.items):
        if when <= time_ns:
            start = place if start is None else start
        elif start is not None:
            yield between(part, start, place)
            start = None
    if start is not None:
        yield between(part, start, len(part.items))
