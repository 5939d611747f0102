"""Writing a journal: one stream's items, in segments, from any thread, without waiting for a disk."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple
from zlib import adler32

import msgspec

from eventrun.codec import Stream
from eventrun.journal.segments import MARK_BYTES, JournalFolder, Segment, WrittenFile, size_for

class Chunk(NamedTuple):
    """Consecutive items of one stream: the payload of a batch to be."""

    first: int
    count: int
    payload: bytes
    first_ns: int
    last_ns: int


class Journal:
    """One stream's events on their way to the log. `append` may be called from any thread; the rest by the flusher.

    After `close`, `append` hands what it gets to `moved`, whose business it is to open a new journal.

    `append` takes no lock. It works out what to store, and then, if nobody else stored anything meanwhile, stores it
    by plain assignments. CPython switches threads, delivers signals and runs finalizers only at calls and backward
    jumps, so those assignments are all made or none, also when a signal handler or `__del__` logs in the middle of a
    log call. A lock made the call 40 % slower and needed a detour for that nested case. test_journal.py checks the
    bytecode; where there is no interpreter lock, `LockedJournal` serves.
    """

    __slots__ = ("_base", "_buffer", "_check", "_count", "_end", "_folder", "_full", "_head", "_last", "_limit",
                 "_next", "_segment", "_turning", "dropped", "moved", "stream")  # fmt: skip

    def __init__(
        self, folder: JournalFolder, stream: Stream, segment: Segment, first: int, moved: Callable[[bytes], None]
    ) -> None:
        self.stream = stream
        self.moved = moved
        self.dropped = 0
        self._folder = folder
        # For all but `append`. Reentrant: a finalizer that logs may run while this thread is inside.
        self._turning = threading.RLock()
        self._full: deque[Segment] = deque()  # older segments, oldest first
        self._next: Segment | None = None  # made ahead by the flusher
        segment.begin(stream, first)
        self._enter(segment, self._full, min(segment.size, segment.start + MARK_BYTES))

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
                    return self.moved(data)
                if not self._turn(size):
                    return

    def _turn(self, size: int) -> bool:
        """Make room for an item, past a mark or in the next segment; False when there is none: dropped, counted."""
        with self._turning:
            segment, end = self._segment, self._end
            if segment is None:  # closed just now
                return True
            if end + size <= self._limit:  # another thread has just made room
                return True
            # Nobody gets past this limit but by `_turn`, so the segment's end stays as it is below - unless a
            # finalizer or signal handler of this very thread turns first, which `is segment` notices.
            self._limit = -1
            self._leave(segment)
            if segment.end + size <= segment.size:
                segment.cuts.append((segment.end, segment.count, segment.last))
                segment.mark(segment.end, segment.count, segment.check)
                limit = min(segment.size, segment.end + max(MARK_BYTES, size))
                if self._segment is segment:
                    self._limit = limit
                return True
            following, self._next = self._next, None
            if following is not None and following.size < size_for(self.stream, size, 0):
                self._folder.release(following)
                following = None
            following = following or self._folder.segment(self.stream, size, segment.size)
            if following is None:
                self.dropped += 1
                self._folder.dropped_events += 1
                self._limit = segment.end  # smaller items may still fit, or find room later
                return False
            following.begin(self.stream, segment.first + segment.count)
            full = deque((*self._full, segment))
            limit = min(following.size, following.start + max(MARK_BYTES, size))
            if self._segment is segment:
                self._enter(following, full, limit)
                return True
            self._folder.release(following)
            return True

    def _enter(self, segment: Segment, full: deque[Segment], limit: int) -> None:
        # Stores only: nobody can come in between.
        self._full = full
        self._segment: Segment | None = segment
        self._buffer = segment.buffer
        self._base = segment.base
        self._head = segment.head
        self._end = segment.end
        self._last = segment.last
        self._check = segment.check
        self._count = segment.count
        self._limit = limit

    def _leave(self, segment: Segment) -> None:
        # Loads first, all of one moment.
        end, last, check, count = self._end, self._last, self._check, self._count
        segment.end, segment.last, segment.check, segment.count = end, last, check, count

    @property
    def next_sequence(self) -> int:
        """The sequence that the next event will have."""
        segment = self._segment
        return 0 if segment is None else segment.first + self._count

    @property
    def closed(self) -> bool:
        """Tell whether `append` refuses."""
        return self._segment is None

    @property
    def has_new(self) -> bool:
        """Tell whether there is anything that no confirmed batch holds."""
        segment = self._segment
        return segment is not None and (self._end != segment.taken or any(s.end != s.taken for s in self._full))

    @property
    def held_bytes(self) -> int:
        """Bytes of items that no confirmed batch holds."""
        segment = self._segment
        here = 0 if segment is None else self._end - segment.taken
        return here + sum(s.end - s.taken for s in tuple(self._full))

    def peek(self, limit_bytes: int) -> list[Chunk]:
        """Copy what is not confirmed yet, in order, at most about `limit_bytes`; at least one chunk, one a segment."""
        with self._turning:
            if self._segment is None:
                return []
            self._leave(self._segment)
            found = [(s, s.end, s.count, s.last, list(s.cuts)) for s in (*self._full, self._segment)]
        chunks: list[Chunk] = []
        for segment, end, count, last, cuts in found:
            if end == segment.taken or limit_bytes <= 0:
                continue
            whole = end - segment.taken <= limit_bytes
            if not whole:
                fits = [c for c in cuts if c[0] > segment.taken and c[0] - segment.taken <= limit_bytes]
                beyond = [c for c in cuts if c[0] > segment.taken]
                end, count, last = fits[-1] if fits else beyond[0] if beyond else (end, count, last)
            chunks.append(_chunk(segment, end, count, last))
            limit_bytes = limit_bytes - len(chunks[-1].payload) if whole else 0
        return chunks

    def confirm(self, chunk: Chunk) -> None:
        """Note that the log holds this chunk, the first unconfirmed one."""
        with self._turning:
            here = (*self._full, *([] if self._segment is None else [self._segment]))
            segment = next(s for s in here if s.first + s.taken_count == chunk.first and s.taken < s.end)
            segment.taken += len(chunk.payload)
            segment.taken_count += chunk.count
            while segment.cuts and segment.cuts[0][0] <= segment.taken:
                segment.cuts.popleft()
            end, count, check = self._end, self._count, self._check
            if segment is self._segment and segment.taken == end:
                segment.mark(end, count, check)

    def prepare(self) -> None:
        """Make the next segment when the current one is half full, so that the log call needn't."""
        segment = self._segment
        if segment is None or self._next is not None or (self._end - segment.start) * 2 < segment.size:
            return
        made = self._folder.segment(self.stream, 0, segment.size)
        with self._turning:
            if self._segment is not None and self._next is None:
                made, self._next = None, made
        if made is not None:
            self._folder.release(made)

    def release(self, sequence: int) -> None:
        """Give back older segments whose events all lie at or before `sequence`, which the log holds for good."""
        gone = []
        with self._turning:
            while self._full and self._full[0].first + self._full[0].count - 1 <= sequence:
                gone.append(self._full.popleft())
        for segment in gone:
            self._folder.release(segment)

    def close(self) -> bool:
        """Give all back if the log holds it all, and take no more; False when something is left."""
        with self._turning:
            segment = self._segment
            if segment is None:
                return True
            if self._full:
                return False
            gone = [segment, self._next]
            # No call from here on, so no event can slip in between the look and the end.
            if self._end != segment.taken:
                return False
            self._limit = -1
            self._segment = self._next = None
        for each in gone:
            if each is not None:
                self._folder.release(each)
        return True


class LockedJournal(Journal):
    """A journal for interpreters without a global lock."""

    __slots__ = ()

    def append(self, data: bytes) -> None:
        """Keep one item, as `Journal.append`."""
        with self._turning:
            super().append(data)


class WrittenJournal(LockedJournal):
    """A journal whose bytes reach its file by write calls, within `append`."""

    __slots__ = ()

    def append(self, data: bytes) -> None:
        """Keep one item; two system calls."""
        super().append(data)
        with self._turning:
            for segment in (*self._full, self._segment):
                if segment is not None and isinstance(segment.place, WrittenFile):
                    end = self._end if segment is self._segment else segment.end
                    if segment.written < end:
                        self._write(segment, segment.place, end)

    def _write(self, segment: Segment, file: WrittenFile, end: int) -> None:
        try:
            file.write(segment, segment.written, end)
            segment.written = end
        except OSError as error:  # it stays in memory, and the next append tries again
            self._folder.problem = str(error)


def new_journal(
    folder: JournalFolder, stream: Stream, segment: Segment, first: int, moved: Callable[[bytes], None]
) -> Journal:
    """Make the journal that this file system and this interpreter need."""
    locked = not getattr(sys, "_is_gil_enabled", lambda: True)()
    kind = WrittenJournal if not folder.mapped else LockedJournal if locked else Journal
    return kind(folder, stream, segment, first, moved)


def _chunk(segment: Segment, end: int, count: int, last: int) -> Chunk:
    base, start = segment.base, segment.taken
    payload = bytes(segment.buffer[base + start : base + end])
    first = segment.first + segment.taken_count
    times = item_time(payload, 0), item_time(payload, last - start)
    return Chunk(first, count - segment.taken_count, payload, *times)


def item_time(payload: bytes, at: int) -> int:
    """Read the time of the item that begins at `at`: the first element of its array."""
    if payload[at + 1] == 0xCF:
        return int.from_bytes(payload[at + 2 : at + 10], "big")
    # Times before 1970-01-01T00:00:04 are packed shorter; only tests have them.
    size = {0xCC: 1, 0xCD: 2, 0xCE: 4}.get(payload[at + 1], 0)
    return int(msgspec.msgpack.decode(payload[at + 1 : at + 2 + size]))
