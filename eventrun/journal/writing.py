"""Writing a journal: one stream's items, in segments, from any thread, without waiting for a disk."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import takewhile
from typing import Any, NamedTuple
from zlib import adler32

import msgspec

from eventrun.codec import Stream
from eventrun.errors import InvalidValue, LogDamaged
from eventrun.journal.segments import (
    CUT,
    MARK_BYTES,
    MAX_ITEM_BYTES,
    NO_ITEMS,
    TRIM_BYTES,
    JournalFolder,
    Segment,
)

ITEM_HEAD_BYTES = 10  # an item up to its time
INTERPRETER_LOCK: bool = getattr(sys, "_is_gil_enabled", lambda: True)()


class Chunk(NamedTuple):
    """Consecutive items of one stream: the payload of a batch to be."""

    first: int
    events: int
    payload: bytes
    first_ns: int
    last_ns: int


class Journal:
    """One stream's events on their way to the log. `append` may be called from any thread; the rest by the flusher.

    After `close` or `shut`, `append` hands what it gets to `moved`, whose business it is to open a new journal.

    `append` takes no lock. It works out what to store, and then, if nobody else stored anything meanwhile, stores it
    by plain assignments. CPython switches threads, delivers signals and runs finalizers only at calls, allocations and
    backward jumps, so those assignments are all made or none, also when a signal handler or `__del__` logs in the
    middle of a log call. A lock made the call 40 % slower and needed a detour for that nested case. The flusher works
    in the same way: it never waits for a caller, who may be stopped inside by a handler that waits for the flusher.
    test_journal.py checks the bytecode; where there is no interpreter lock, `LockedJournal` serves.
    """

    __slots__ = ("_after", "_base", "_buffer", "_check", "_count", "_end", "_folder", "_full", "_guard", "_head",
                 "_last", "_limit", "_next", "_segment", "_turning", "dropped", "moved", "stream")  # fmt: skip

    def __init__(
        self,
        folder: JournalFolder,
        stream: Stream,
        segment: Segment,
        first: int,
        moved: Callable[[bytes], None],
    ) -> None:
        self.stream = stream
        self.moved = moved
        self.dropped = 0
        self._folder = folder
        # Of callers among each other. Reentrant: a finalizer that logs may run while this thread is inside.
        self._turning = threading.RLock()
        self._guard: AbstractContextManager[Any] = nullcontext() if INTERPRETER_LOCK else self._turning
        self._full: tuple[Segment, ...] = ()  # older segments, oldest first
        self._segment: Segment | None = None
        self._end = self._last = self._count = self._base = 0
        self._check = NO_ITEMS
        self._limit = -1
        self._after = 0  # the sequence after the last one, once it is closed
        self._next: Segment | None = None  # made ahead by the flusher
        segment.begin(stream, first)
        folder.begun(segment)
        self._enter(segment, min(segment.size, segment.start + MARK_BYTES), (), None, 0)

    def append(self, data: bytes) -> None:
        """Keep one item. Returns when a kill of the process can't lose it any more. Makes no system call."""
        size = len(data)
        while True:
            segment = self._segment
            start = self._end
            end = start + size
            check = adler32(data, self._check)
            place = slice(self._base + start, self._base + end)
            head = check << 32 | end
            # No call from here to the return: nobody can come in between.
            if self._end == start and self._segment is segment and end <= self._limit:
                self._buffer[place] = data
                self._head[0] = head
                self._last = start
                self._end = end
                self._check = check
                self._count += 1
                return
            if end > self._limit:
                if self._segment is None:
                    self.moved(data)
                    return
                if not self._turn(size):
                    return

    def _turn(self, size: int) -> bool:
        """Make room for an item, past a mark or in the next segment; False when there is none: dropped, counted."""
        if size > MAX_ITEM_BYTES:  # or the log would refuse it, and all that follows
            raise InvalidValue(
                f"an event of {size:,} bytes is too large, the most is {MAX_ITEM_BYTES:,}: "
                "keep the data in a file, and record where it lies"
            )
        with self._turning:
            full, segment, end, last, check, count = self._now()
            if segment is None:  # closed just now
                return True
            if end + size <= self._limit:  # another thread has just made room
                return True
            if end + size <= segment.size:
                segment.cuts += CUT.pack(end, count, last)
                segment.mark(end, count, check)
                limit = min(segment.size, end + max(MARK_BYTES, size))
                if self._segment is segment:
                    self._limit = limit
                return True
            # Now nobody gets past but by `_turn`: only a finalizer or signal handler of this very thread, or the end.
            # The handler gets a small segment: a large one takes longer than until the next signal, which gets one too.
            previous = 0 if self._limit < 0 else segment.size
            self._limit = -1
            following, self._next = self._next, None
            if following is not None and following.size < self._folder.size_for(self.stream, size, 0):
                self._folder.release(following)
                following = None
            following = following or self._folder.segment(self.stream, size, previous)
            if following is None:
                self.dropped += 1
                self._folder.drop()
                if self._segment is segment:
                    self._limit = self._end  # smaller items may still fit, or find room later
                return False
            following.begin(self.stream, segment.first + count)
            self._folder.begun(following)
            limit = min(following.size, following.start + max(MARK_BYTES, size))
            if not self._enter(following, limit, full, segment, end):
                self._folder.release(following)
            return True

    def _now(self) -> tuple[tuple[Segment, ...], Segment | None, int, int, int, int]:
        # Loads only: all of one moment.
        full = self._full
        segment = self._segment
        end = self._end
        last = self._last
        check = self._check
        count = self._count
        return full, segment, end, last, check, count

    def _enter(
        self,
        following: Segment | None,
        limit: int,
        full: tuple[Segment, ...],
        segment: Segment | None,
        end: int,
    ) -> bool:
        """Go on in another segment, or in none, unless anything has changed since it was `full, segment, end`."""
        older = (*full, segment) if segment is not None else full
        # No call from here to the return: nobody can come in between.
        if self._segment is not segment or self._end != end or self._full is not full:
            return False
        if segment is not None:
            segment.end = end
            segment.last = self._last
            segment.count = self._count
            self._after = segment.first + segment.count
        self._full = older
        self._limit = limit
        self._segment = following
        if following is not None:
            self._buffer = following.buffer
            self._base = following.base
            self._head = following.head
            self._end = self._last = following.start
            self._check = NO_ITEMS
            self._count = 0
        return True

    @property
    def next_sequence(self) -> int:
        """The sequence that the next event will have, here or in the journal after this one."""
        with self._guard:
            _, segment, _, _, _, count = self._now()
            return self._after if segment is None else segment.first + count

    @property
    def returned(self) -> int:
        """The last sequence whose `append` is over, as far as a flush from this thread has to wait for it."""
        return self.next_sequence - 1

    @property
    def closed(self) -> bool:
        """Tell whether `append` refuses."""
        return self._segment is None

    @property
    def has_new(self) -> bool:
        """Tell whether there is anything that no confirmed batch holds."""
        return self.held_bytes > 0

    @property
    def held_bytes(self) -> int:
        """Bytes of items that no confirmed batch holds."""
        with self._guard:
            full, segment, end, _, _, _ = self._now()
        here = 0 if segment is None else end - segment.taken
        return here + sum(s.end - s.taken for s in full) if full else here

    @property
    def resident_bytes(self) -> int:
        """Bytes of items whose pages were not given back yet, see `trim`."""
        with self._guard:
            full, segment, end, _, _, _ = self._now()
        here = 0 if segment is None else end - segment.trimmed
        return here + sum(s.end - s.trimmed for s in full if s.buffer)

    @property
    def oldest_ns(self) -> int | None:
        """The time of the oldest event that no confirmed batch holds."""
        while True:
            with self._guard:
                full, segment, end, _, _, _ = self._now()
            held = (
                s for s in (*full, segment) if s is not None and (end if s is segment else s.end) > s.taken
            )
            oldest = next(held, None)
            if oldest is None:
                return None
            taken = oldest.taken
            try:
                item = oldest.read(taken, min(taken + ITEM_HEAD_BYTES, oldest.size))
            except (OSError, LogDamaged):  # its file was cut off: the flusher will say so
                return None
            # What has been taken meanwhile may have been given back, and be another stream's by now.
            if oldest.taken == taken:
                return item_time(item, 0)

    def trim(self) -> bool:
        """Give back about TRIM_BYTES of pages of mapped files that were written; True when more may follow."""
        with self._guard:
            full, segment, end, _, _, _ = self._now()
        left = TRIM_BYTES
        for each in full if segment is None else (*full, segment):
            start, stop = each.trimmed, end if each is segment else each.end
            stop = min(stop, start + left)
            each.trim(start, stop)
            each.trimmed = stop
            left -= stop - start
            if not left:
                return True
        return False

    def peek(self, limit_bytes: int, batch_bytes: int = sys.maxsize) -> list[Chunk]:
        """Copy what is not confirmed yet, in order, at most about `limit_bytes`; at least one chunk.

        A chunk holds at most about `batch_bytes`, and events of one segment.
        """
        with self._guard:
            full, segment, end, last, _, count = self._now()
        found = [(s, s.end, s.count, s.last) for s in full]
        if segment is not None:
            found.append((segment, end, count, last))
        chunks: list[Chunk] = []
        for segment, end, count, last in found:
            at, done = segment.taken, segment.taken_count
            cuts = (
                list(CUT.iter_unpack(bytes(segment.cuts))) if end - at > min(limit_bytes, batch_bytes) else []
            )
            while at < end and limit_bytes > 0:
                most = min(limit_bytes, batch_bytes)
                stop = (end, count, last)
                if end - at > most:
                    ahead = [c for c in cuts if at < c[0] <= end]
                    fits = [c for c in ahead if c[0] - at <= most]
                    stop = fits[-1] if fits else ahead[0] if ahead else stop
                    if most == limit_bytes:
                        limit_bytes = 0
                chunks.append(_chunk(segment, at, done, *stop))
                limit_bytes -= stop[0] - at
                at, done, _ = stop
        return chunks

    def confirm(self, chunk: Chunk) -> None:
        """Note that the log holds this chunk, the first unconfirmed one."""
        with self._guard:
            full, segment, _, _, _, _ = self._now()
            here = full if segment is None else (*full, segment)
            segment = next(
                s for s in here if s.first + s.taken_count == chunk.first and s.taken < self._end_of(s)
            )
            before = segment.taken
            segment.taken += len(chunk.payload)
            segment.taken_count += chunk.events
            if before < segment.trimmed:  # the look has brought them back
                segment.trim(before, segment.taken)
            _, current, end, _, check, count = self._now()
            if segment is current and segment.taken == end:
                segment.mark(end, count, check)

    def _end_of(self, segment: Segment) -> int:
        _, current, end, _, _, _ = self._now()
        return end if segment is current else segment.end

    def prepare(self) -> None:
        """Make the next segment when the current one is half full, so that the log call needn't."""
        _, segment, end, _, _, _ = self._now()
        if segment is None or self._next is not None or (end - segment.start) * 2 < segment.size:
            return
        made = self._folder.ahead(self.stream, segment.size)
        with self._guard:
            if self._segment is not None and self._next is None:
                made, self._next = None, made
        if made is not None:
            self._folder.release(made)

    def release(self, sequence: int, *, memory: bool = False) -> None:
        """Give back older segments whose events all lie at or before `sequence`, which the log holds for good.

        With `memory` only those without a file: after a power loss they couldn't help the log, so they needn't wait.
        """
        gone: set[Segment] = set()
        done = False
        while not done:
            full = self._full
            gone = {s for s in full if s.first + s.count - 1 <= sequence and not (memory and s.place)}
            kept = tuple(s for s in full if s not in gone) if gone else full
            with self._guard:
                done = self._full is full
                if done:
                    self._full = kept
        for segment in gone:
            self._folder.release(segment)

    def close(self) -> bool:
        """Give all back if the log holds it all, and take no more; False when something is left."""
        with self._guard:
            full, segment, end, _, _, _ = self._now()
            if full or (segment is not None and end != segment.taken):
                return False
            if not self._enter(None, -1, full, segment, end):
                return False
            self._full = ()
            spare, self._next = self._next, None
        for each in (segment, spare):
            if each is not None:
                self._folder.release(each)
        return True

    def shut(self) -> None:
        """Take no more; what is held stays, to be peeked at and confirmed."""
        with self._guard:
            full, segment, end, _, _, _ = self._now()
            while segment is not None and not self._enter(None, -1, full, segment, end):
                full, segment, end, _, _, _ = self._now()

    def save(self) -> int:
        """After `shut`: bring what lies in memory alone to files; tell how many events no file could be had for.

        Those behind them count too: a stream is recovered up to its first gap.
        """
        left = [s for s in self._full if s.end != s.taken]
        saved = list(takewhile(self._folder.save, left))
        return sum(s.count - s.taken_count for s in left[len(saved) :])

    def rescue(self) -> bool:
        """Bring what lies in memory alone to files, if they can be had again; False when they can't."""
        if not self._turning.acquire(blocking=False):  # a caller is about to make room: another time
            return True
        try:
            return self._rescue()
        finally:
            self._turning.release()

    def _rescue(self) -> bool:
        with self._guard:
            full, segment, end, _, _, count = self._now()
        if (
            segment is not None
            and segment in self._folder.unsaved
            and not self._go_on(full, segment, end, count)
        ):
            return False
        return all(self._folder.save(s) for s in self._full if s in self._folder.unsaved)

    def _go_on(self, full: tuple[Segment, ...], segment: Segment, end: int, count: int) -> bool:
        """Go on in a file; False when there is none."""
        following = self._folder.in_file(self.stream)
        if following is None:
            return False
        following.begin(self.stream, segment.first + count)
        limit = min(following.size, following.start + MARK_BYTES)
        with self._guard:
            entered = self._enter(following, limit, full, segment, end)
        if not entered:  # something was recorded meanwhile: another time
            self._folder.release(following)
        return True


class LockedJournal(Journal):
    """A journal for interpreters without a global lock."""

    __slots__ = ()

    def append(self, data: bytes) -> None:
        """Keep one item, as `Journal.append`."""
        with self._turning:
            super().append(data)


class WrittenJournal(Journal):
    """A journal whose bytes reach its file by write calls, within `append`."""

    __slots__ = ()

    def append(self, data: bytes) -> None:
        """Keep one item; two system calls."""
        with self._turning:
            super().append(data)
            full, segment, _, _, _, _ = self._now()
            # Those that are written have let their memory go, so few are looked at however many there are.
            behind = [*takewhile(lambda older: older.buffer, reversed(full))][::-1]
            here = [s for s in (*behind, segment) if s is not None and s.place is not None]
            try:
                for each in here:
                    each.write()
                    self._folder.saved(each)
                    if each is not segment:
                        self._folder.unload(each)
            except OSError as error:  # it stays in memory, and the next append tries again
                self._folder.unsaved.update(s for s in here if s.buffer)
                self._folder.note(error)


def new_journal(
    folder: JournalFolder, stream: Stream, segment: Segment, first: int, moved: Callable[[bytes], None]
) -> Journal:
    """Make the journal that this file system and this interpreter need; `fragments` has that of network disks."""
    kind = WrittenJournal if not folder.mapped else Journal if INTERPRETER_LOCK else LockedJournal
    return kind(folder, stream, segment, first, moved)


def _chunk(segment: Segment, start: int, done: int, end: int, count: int, last: int) -> Chunk:
    payload = segment.read(start, end)
    times = item_time(payload, 0), item_time(payload, last - start)
    return Chunk(segment.first + done, count - done, payload, *times)


def item_time(payload: bytes, at: int) -> int:
    """Read the time of the item that begins at `at`: the first element of its array."""
    if payload[at + 1] == 0xCF:
        return int.from_bytes(payload[at + 2 : at + 10], "big")
    # Times before 1970-01-01T00:00:04 are packed otherwise: tests have them, and clocks that were never set.
    size = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}.get(payload[at + 1], 0)
    return int(msgspec.msgpack.decode(payload[at + 1 : at + 2 + size]))
