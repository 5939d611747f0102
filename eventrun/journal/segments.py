"""The write-ahead journal: a log call's bytes are in a mapped file before the call returns.

A mapped file (MAP_SHARED) belongs to the kernel as soon as the bytes are copied: a killed process loses none of
them, and no system call is made. One journal per stream, so its bytes are the payload of the next batch as they lie.

    journals/<writer>/lock                      held while the writer lives; host, boot and pid inside
    journals/<writer>/<n>-<size>x<slots>.arena  slots of `size` bytes; each in use is one segment of one stream. A
                                                shorter file was cut off. (No `x<slots>`: it may have any length)

    segment   u64 head | magic | u64 writer | u64 first sequence | u32 start | u32 slots of the ring | u32 CRC of the
              fields from magic to subject without the ring | u16 length of subject | ring of marks | subject | items
    head      adler32 of the items << 32 | end, in native byte order: one 8-byte store made after the copy.
              What lies beyond `end` is an event whose call had not returned. VACANT: nothing here counts.
    mark      u64 end | u64 count | u32 adler32 of the items | u32 CRC of the fields before: one per 64 KiB and one per
              batch taken

Adler-32 and not CRC-32, because it is worked out at each call, of few bytes: 60 ns against 165 (zlib 1.2.13). It
notices each changed byte as well, and the log's batches have a CRC-32 of their own.

`end` counts from the start of the slot. Small segments share a file because an mmap keeps a descriptor of its own
(before Python 3.13): a file per stream ends at `ulimit -n`.

Nothing here takes a lock. A caller may be stopped anywhere, by a signal handler that then waits for the flusher or by
a finalizer that logs; a lock that it held would be waited for in vain. Slots change hands by single list operations.
"""

from __future__ import annotations

import errno
import itertools
import json
import mmap
import os
import shutil
import struct
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from eventrun.codec import Stream
from eventrun.errors import LogDamaged
from eventrun.locks import owner, try_lock

SEGMENT_BYTES = (16 << 10, 256 << 10, 4 << 20, 32 << 20)  # a stream's first segment, its second, ...
# The same where segments lie in memory besides their file. Each full one leaves an object of some 600 bytes there.
WRITTEN_SEGMENT_BYTES = (16 << 10, 32 << 10, 256 << 10, 2 << 20)
MEMORY_SEGMENT_BYTES = WRITTEN_SEGMENT_BYTES[:2]  # the same where they lie in memory alone
WRITTEN_SPREAD_BYTES = 32 << 20  # what streams share, see SPREAD_BYTES, of the memory for current segments
SPREAD_BYTES = 256 << 20  # all streams' segments together, about; so with many streams they stay small
ROOM_SHARE = 8  # no file takes more than an eighth of what the disk has left
ARENA_BYTES = 4 << 20  # small segments come from files of this size
LARGE_ARENA_BYTES = (32 << 20, 256 << 20)  # of one more file when there are so many:
MANY_ARENAS = (16, 64)  # each takes a descriptor
WRITTEN_ARENA_BYTES = 32 << 20  # nothing is allocated beforehand there
EMPTIED_BYTES = 1 << 20  # larger slots aren't emptied to be used again: that would hold up everybody
MARK_BYTES = 64 << 10  # how much a damaged byte may cost at most
SPARE_BYTES = 1 << 20  # of the disk, left to the log and to everybody else
TRIM_BYTES = 1 << 20  # pages given back at once: 0.1 ms, in which Python stands still
RING_SLOTS = 32  # marks kept in a segment beyond one per 64 KiB
MAX_ITEM_BYTES = 256 << 20  # of one event; SQLite takes up to 10^9
MEMORY_BYTES = 64 << 20  # bound of what is kept in memory where no file can be written

MAGIC = b"evrnjrn" + (b"\x01" if sys.byteorder == "little" else b"\x81")
FIXED = struct.Struct("=8sQQIIIH")  # from offset 8
NO_ITEMS = 1  # the Adler-32 of nothing
VACANT = 1  # a head: the slot is being emptied, or filled in for a new segment
MARK = struct.Struct("=QQII")
MARK_FIELDS = struct.Struct("=QQI")
RING_AT = 8 + FIXED.size + 2  # 48: aligned to 8
HEAD = struct.Struct("=Q")
CUT = struct.Struct("=QQQ")

# Elsewhere than on Linux the same word may mean that the bytes are not needed any more.
CAN_TRIM = sys.platform == "linux" and hasattr(mmap, "MADV_DONTNEED")


class Segment:
    """A stretch of one stream in one buffer: a slot of a mapped arena, memory with a file behind it, or memory."""

    __slots__ = ("base", "buffer", "count", "cuts", "end", "first", "head", "last", "place", "ring",
                 "size", "start", "taken", "taken_count", "trimmed", "turns", "written", "written_turns")  # fmt: skip

    def __init__(self, buffer: memoryview, base: int, size: int, place: Slot | None) -> None:
        self.buffer = buffer
        self.base = base
        self.size = size
        self.place = place
        self.written = 0  # of a segment in memory with a file behind it: what the file has
        self.written_turns = -1
        self.head = buffer[base : base + 8].cast("Q")
        self.turns = 0

    def begin(self, stream: Stream, first: int) -> None:
        """Write the header and become the current segment of a stream."""
        subject = stream.subject.encode()
        self.ring, self.start = layout(self.size, len(subject))
        self.first = first
        self.end = self.taken = self.last = self.start
        self.count = self.taken_count = 0
        self.trimmed = 0  # up to where its pages were given back to the system
        self.cuts = bytearray()  # (end, count, start of last item), packed: where batches may end
        fields = (MAGIC, stream.writer, first, self.start, self.ring)
        check = crc32(subject, crc32(FIXED.pack(*fields, 0, len(subject))))
        base = self.base
        self.head[0] = VACANT  # a kill in the middle must not leave what looks like a damaged segment
        self.buffer[base + 8 : base + 8 + FIXED.size] = FIXED.pack(*fields, check, len(subject))
        at = base + RING_AT + self.ring * MARK.size
        self.buffer[at : at + len(subject)] = subject
        self.head[0] = NO_ITEMS << 32 | self.start

    def mark(self, end: int, count: int, check: int) -> None:
        """Note that the items up to `end` have this checksum."""
        buffer = self.buffer
        at = self.base + RING_AT + (self.turns % self.ring) * MARK.size
        if buffer:  # its memory may have been let go
            buffer[at : at + MARK.size] = packed_mark(end, count, check)
            self.turns += 1

    def read(self, start: int, end: int) -> bytes:
        """Return a copy of some bytes, from the file when the memory was let go."""
        buffer = self.buffer
        if buffer:
            return bytes(buffer[self.base + start : self.base + end])
        # Without a place: memory that another thread has just given back, because the log holds it.
        return b"" if self.place is None else self.place.read(start, end - start)

    def trim(self, start: int, end: int) -> None:
        """Give the pages of a mapped stretch back to the system: the file keeps them, and who looks gets them again."""
        if self.place is not None and self.buffer:
            self.place.arena.trim(self.base + start, self.base + end)

    def write(self) -> None:
        """Copy what is new to the file behind this memory: items and marks, then the head that makes them count."""
        buffer, head, place = self.buffer, self.head, self.place
        if place is None or not buffer:
            return
        descriptor, base = place.arena.descriptor, place.base
        while True:
            now, turns = head[0], self.turns
            end = now & 0xFFFFFFFF
            if self.written_turns < 0:  # until there is a head that counts
                place.write(0, HEAD.pack(VACANT) + buffer[8 : self.start])
            elif self.written_turns != turns:
                place.write(8, buffer[8 : self.start])
            start = max(self.written, self.start)
            if start < end:
                place.write(start, buffer[start:end])
            packed = HEAD.pack(now)
            # No call between the look and the write: a log call that came in between has written a newer head.
            if head[0] == now:
                if os.pwrite(descriptor, packed, base) < len(packed):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.written, self.written_turns = end, turns
                return


def packed_mark(end: int, count: int, check: int) -> bytes:
    """Pack a mark: its own CRC tells it from a damaged one."""
    return MARK.pack(end, count, check, crc32(MARK_FIELDS.pack(end, count, check)))


def layout(size: int, subject_bytes: int) -> tuple[int, int]:
    """Slots of the ring, and where the items start, in a segment of this size."""
    ring = RING_SLOTS + size // MARK_BYTES
    return ring, (RING_AT + ring * MARK.size + subject_bytes + 63) // 64 * 64


def size_for(stream: Stream, item_bytes: int, previous: int, sizes: tuple[int, ...] = SEGMENT_BYTES) -> int:
    """Choose a segment's size: larger than the one before, and with room for the next item."""
    subject_bytes = len(stream.subject.encode())

    def fits(size: int) -> bool:
        return layout(size, subject_bytes)[1] + item_bytes <= size

    for size in sizes:
        if (size > previous or size == sizes[-1]) and fits(size):
            return size
    size = item_bytes >> 20 << 20  # one item larger than any segment
    while not fits(size):
        size += 1 << 20
    return size


class Slot(NamedTuple):
    """A place in an arena."""

    arena: Arena
    base: int

    def write(self, at: int, data: memoryview | bytes) -> None:
        """Write to the file."""
        while data:  # a nearly full disk takes less than it is given
            done = os.pwrite(self.arena.descriptor, data, self.base + at)
            data, at = data[done:], at + done

    def read(self, at: int, count: int) -> bytes:
        """Read back what was written."""
        data = os.pread(self.arena.descriptor, count, self.base + at)
        if len(data) < count:
            raise LogDamaged(f"{self.arena.path} is shorter than it was: somebody has cut it off")
        return data


class Arena:
    """A file of equal slots: mapped, or only written to. It lives as long as somebody looks at it."""

    mapping: mmap.mmap  # of a mapped one
    view: memoryview

    def __init__(self, path: Path, slot_bytes: int, slots: int, *, mapped: bool) -> None:
        self.path = path
        self.slot_bytes = slot_bytes
        self.slots = slots
        self.mapped = mapped
        size = slot_bytes * slots
        # Its name says how long it is, so it gets it when it is that long: what is shorter was cut off.
        new = path.with_name(path.name + ".new")
        self.descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
        if mapped:
            try:
                _check_space(path.parent, size)
                # A hole on a full disk would be a SIGBUS at the copy; space that is taken beforehand can't be one.
                os.posix_fallocate(self.descriptor, 0, size)
                self.mapping = mmap.mmap(self.descriptor, size)
                self.view = memoryview(self.mapping)
            except OSError:
                new.unlink()
                raise
            finally:
                self.__del__()
        else:
            try:
                os.ftruncate(self.descriptor, size)
            except OSError:  # longer than files may be here (ulimit -f); it will grow as far as it goes
                self.path = path.with_name(path.name.replace(f"x{slots}.", "."))
        os.rename(new, self.path)
        self.vacant = list(range(0, size, slot_bytes))[::-1]
        self.spent = 0  # slots of a written file that were given back: they aren't used again

    # Never closed while another thread may just be writing: the number could be that of another file by then.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        descriptor, self.descriptor = getattr(self, "descriptor", -1), -1
        if descriptor >= 0:
            close(descriptor)

    def take(self) -> int | None:
        """Take a vacant slot."""
        try:
            return self.vacant.pop()
        except IndexError:
            return None

    def take_all(self) -> bool:
        """Take all slots, so that the file can be removed; False, and none taken, when some are in use."""
        taken = []
        while (base := self.take()) is not None:
            taken.append(base)
        if len(taken) + self.spent == self.slots:
            return True
        self.vacant.extend(taken)
        return False

    def trim(self, start: int, end: int) -> None:
        """Give pages back to the system. Of a shared mapping that drops no byte, only this process's hold on them."""
        start = start // mmap.PAGESIZE * mmap.PAGESIZE
        if self.mapped and CAN_TRIM and start < end:
            try:
                self.mapping.madvise(mmap.MADV_DONTNEED, start, min(end, len(self.mapping)) - start)
            except OSError:  # a process that keeps all of its memory locked (mlockall)
                pass

    def empty(self, base: int) -> None:
        """Take a slot back, emptied: old items must never look like new ones."""
        if not self.mapped:
            self.spent += 1
            return
        head = self.view[base : base + 8].cast("Q")
        head[0] = VACANT
        if self.slot_bytes > EMPTIED_BYTES:
            self.trim(base, base + self.slot_bytes)
            self.spent += 1
            return
        self.view[base + 8 : base + self.slot_bytes] = bytes(self.slot_bytes - 8)
        head[0] = 0
        self.trim(base, base + self.slot_bytes)
        self.vacant.append(base)


class JournalFolder:
    """One writer's folder: its lock, and the places that its journals take segments from.

    Segments are mapped where the file system can be trusted with that, else written by write calls, else (`path` None,
    no permission, a full disk) memory alone, at most MEMORY_BYTES; `problem` says why. Never raises to the log call.
    """

    def __init__(self, path: Path | None, *, mapped: bool = True) -> None:
        self.path = path
        self.mapped = mapped
        self.problem: str | None = None
        self.unsaved: set[Segment] = set()  # with events that should be in a file and aren't
        self.memory_bytes = 0
        self.dropped_events = 0
        self.streams = 0  # that share the folder
        self._arenas: list[Arena] = []
        self._numbers = itertools.count(1)
        self._descriptor: int | None = None
        self._opening = False
        self._abandoned = False
        self._said = False

    @property
    def crash_safe(self) -> bool:
        """Tell whether all that was appended, and what will be now, survives a kill of the process.

        An event in a file behind one that only memory has would not: a stream is recovered up to its first gap.
        """
        return self.path is not None and self.problem is None and not self.unsaved

    @property
    def ended(self) -> bool:
        """Tell whether the writer has ended, or belongs to a fork's parent."""
        return self._abandoned

    def segment(self, stream: Stream, item_bytes: int = 0, previous: int = 0) -> Segment | None:
        """Find room for more items of a stream: a slot of an arena, memory, or None when that is full too."""
        # When the disk is full, or gone, memory takes over until it works again.
        return self.in_file(stream, item_bytes, previous) or self._in_memory(
            size_for(stream, item_bytes, previous, MEMORY_SEGMENT_BYTES), None
        )

    def in_file(self, stream: Stream, item_bytes: int = 0, previous: int = 0) -> Segment | None:
        """Find a slot of an arena, or None."""
        try:
            return self._in_file(stream, item_bytes, previous)
        except OSError as error:
            if not self._abandoned:  # else the writer has just ended, and the folder with it
                self.note(error)
        return None

    def ahead(self, stream: Stream, previous: int) -> Segment | None:
        """Find a slot before it is needed; None, and nothing is said, when there is none yet."""
        try:
            return self._in_file(stream, 0, previous)
        except OSError:
            return None

    def _in_file(self, stream: Stream, item_bytes: int, previous: int) -> Segment | None:
        if self._descriptor is None and not self._open():
            return None
        least = self.size_for(stream, item_bytes, 0)
        size = self.size_for(stream, item_bytes, previous)
        return self._in_arena(self._bounded(size, least), least)

    def begun(self, segment: Segment) -> None:
        """Note that events go to a segment now."""
        if segment.place is None and self.path is not None:
            self.unsaved.add(segment)

    def _open(self) -> bool:
        """Make the folder with its lock, at the first segment; False when there is none to make."""
        if self._descriptor is not None:  # by a finalizer that came in between
            return True
        if self.path is None or self._abandoned or self._opening:  # opening: such a finalizer is here
            return False
        self._opening = True
        try:
            self._descriptor = self._make_lock(self.path)
        finally:
            self._opening = False
        if self.ended:  # meanwhile, by another thread or a signal handler
            self.remove()
        return not self.ended

    def _make_lock(self, path: Path) -> int:
        return make_locked(path)

    def size_for(self, stream: Stream, item_bytes: int, previous: int) -> int:
        """Choose a segment's size, see `size_for`."""
        return size_for(stream, item_bytes, previous, SEGMENT_BYTES if self.mapped else WRITTEN_SEGMENT_BYTES)

    def _bounded(self, size: int, least: int) -> int:
        sizes, most = WRITTEN_SEGMENT_BYTES, WRITTEN_SPREAD_BYTES // max(self.streams, 1)
        if self.mapped:
            assert self.path is not None
            sizes = SEGMENT_BYTES
            most = min(SPREAD_BYTES // max(self.streams, 1), _room(self.place() or self.path) // ROOM_SHARE)
        return max((each for each in (*sizes, size) if least <= each <= min(size, most)), default=least)

    def note(self, error: OSError) -> None:
        """Remember why events are only in memory, and say so once."""
        self.problem = str(error)
        if not self._said:
            self._said = True
            _warn(f"journals can't be written ({error}): until they can, events are kept in memory, and a kill of "
                  "this process loses those that the log doesn't hold yet")  # fmt: skip

    def drop(self, events: int = 1) -> None:
        """Count events for which there was no room, and say so once."""
        first, self.dropped_events = not self.dropped_events, self.dropped_events + events
        if first and events:
            _warn(f"events are lost: the log doesn't take them, journals can't be written ({self.problem}), and memory "
                  f"({MEMORY_BYTES:,} bytes) is full or at its end; statistics() counts them")  # fmt: skip

    def saved(self, segment: Segment) -> None:
        """Note that a segment's events are in a file, or in the log."""
        if segment in self.unsaved:
            self.unsaved.discard(segment)
            if not self.unsaved:
                self.problem = None

    def _in_arena(self, size: int, least: int) -> Segment | None:
        try:
            place = self._slot(size, mapped=self.mapped)
        except OSError:
            # What is there already takes no space.
            found = self._vacant(least, size, mapped=self.mapped)
            if found is None and least == size:
                raise
            place = found or self._slot(least, mapped=self.mapped)
        if not self.unsaved:
            self.problem = None
        arena, base = place
        if self.mapped:
            return Segment(arena.view, base, arena.slot_bytes, place)
        return self._in_memory(arena.slot_bytes, place)

    def _slot(self, size: int, *, mapped: bool) -> Slot:
        return self._vacant(size, size, mapped=mapped) or self._new_arena(size, mapped=mapped)

    def _vacant(self, least: int, most: int, *, mapped: bool) -> Slot | None:
        for arena in tuple(self._arenas):
            fits = least <= arena.slot_bytes <= most and arena.mapped == mapped
            if fits and (base := arena.take()) is not None:
                return Slot(arena, base)
        return None

    def _new_arena(self, size: int, *, mapped: bool) -> Slot:
        sizes = (ARENA_BYTES if mapped else WRITTEN_ARENA_BYTES, *LARGE_ARENA_BYTES)
        most = sizes[sum(len(self._arenas) >= many for many in MANY_ARENAS)]
        if mapped:
            assert self.path is not None
            most = min(most, _room(self.place() or self.path) // ROOM_SHARE)
        slots = max(1, most // size)
        try:
            arena = self._arena(size, slots, mapped=mapped)
        except OSError as error:
            if error.errno != errno.EMFILE or not _raise_file_limit():
                raise
            arena = self._arena(size, slots, mapped=mapped)
        place = Slot(arena, arena.vacant.pop())
        self._arenas.append(arena)  # not before: another thread would take its only slot
        return place

    def _arena(self, size: int, slots: int, *, mapped: bool) -> Arena:
        assert self.path is not None
        name = f"{next(self._numbers)}-{size}x{slots}.arena"
        try:
            arena = Arena(self.path / name, size, slots, mapped=mapped)
        except FileNotFoundError:
            moved = self.place()
            if moved is None or moved == self.path:
                raise
            # The store has another name by now: there its next reader looks for what this writer left.
            arena = Arena(moved / name, size, slots, mapped=mapped)
        if self._abandoned:  # the writer has ended meanwhile, and nobody else would remove it
            arena.path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty: it wasn't removed
                self.path.rmdir()
            raise OSError("the writer has ended")
        return arena

    def save(self, segment: Segment) -> bool:
        """Bring a segment that will not change any more to a file, if only memory holds it; False when that fails."""
        try:
            if segment.place is None:
                if self._descriptor is None and not self._open():
                    return False
                segment.place = self._slot(segment.size, mapped=False)
            if not segment.place.arena.mapped:
                segment.write()
                self.unload(segment)
        except OSError as error:
            self.problem = str(error)
            return False
        self.saved(segment)
        return True

    def _in_memory(self, size: int, place: Slot | None) -> Segment | None:
        try:
            # Where files can be written what is in memory is only what they have too.
            bounded = place is None or self.unsaved
            buffer = None if bounded and self.memory_bytes + size > MEMORY_BYTES else bytearray(size)
        except MemoryError:  # a limit of the system's
            buffer = None
        if buffer is None:
            if place is not None:
                self._give_back(place)
            return None
        self.memory_bytes += size
        return Segment(memoryview(buffer), 0, size, place)

    def unload(self, segment: Segment) -> None:
        """Let go of the memory of a segment that its file, or the log, holds."""
        nothing = memoryview(b"")
        if segment.buffer:  # once, whoever comes in between
            segment.head = nothing
            segment.buffer = nothing
            self.memory_bytes -= segment.size

    def release(self, segment: Segment) -> None:
        """Take a segment back whose events the log holds; arenas that are empty are removed, but for one a size."""
        if self._abandoned:  # whoever recovers may be reading
            return
        self.saved(segment)
        if segment.place is None or not segment.place.arena.mapped:
            self.unload(segment)
        if segment.place is not None:
            self._give_back(segment.place)

    def _give_back(self, place: Slot) -> None:
        arena = place.arena
        if arena.slots > 1:
            arena.empty(place.base)
            last = not any(a.slot_bytes == arena.slot_bytes and a is not arena for a in tuple(self._arenas))
            if (last and not arena.spent) or not arena.take_all():
                return
        # A writer that has just ended has no arenas any more; a file that can't be removed does no harm: the log has
        # all of it.
        with suppress(ValueError):
            self._arenas.remove(arena)
        with suppress(OSError):
            arena.path.unlink()

    def file_bytes(self) -> int:
        """Sum the sizes of the arenas."""
        return sum(arena.slots * arena.slot_bytes for arena in tuple(self._arenas))

    def place(self) -> Path | None:
        """Tell where the folder is, should it have been moved; None: nowhere any more, or that can't be told."""
        descriptor = self._descriptor
        if self.path is None or descriptor is None:
            return None
        if (self.path / LOCK_NAME).exists():
            return self.path
        try:
            now = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:
            return None
        return now.parent if now.exists() else None

    def remove(self) -> None:
        """End the writer: all is in the log, nothing is left to recover."""
        if self.path is not None and self._descriptor is not None:
            remove_folder(self.path)
        self._arenas = []
        self.abandon()

    def end(self, *, complete: bool) -> None:
        """End the writer by its own will, with files left to be recovered by the next open; see `abandon`.

        `complete`: nothing of what it had to say was lost.
        """
        if complete and self.path is not None and self._descriptor is not None:
            try:
                (self.path / ENDED_NAME).touch()
            except OSError:  # then it will look like one that was killed
                pass
        self.abandon()

    def abandon(self) -> None:
        """Let the lock go and leave the files to be recovered by the next open (or, after a fork, to the parent).

        The descriptor is closed, never unlocked: a lock that a fork's child shares stays with the parent.
        """
        self._abandoned = True
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _room(folder: Path) -> int:
    usage = os.statvfs(folder)
    return usage.f_bavail * usage.f_frsize - SPARE_BYTES


def _check_space(folder: Path, size: int) -> None:
    # Not left to posix_fallocate: until it finds out, it takes what there is from everybody.
    if _room(folder) < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _warn(message: str) -> None:
    try:
        warnings.warn(f"eventrun: {message}", RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # where warnings are errors, a log call must not fail for one
        pass


def _raise_file_limit() -> bool:
    """Raise the soft limit of open files to the hard one; False when it stands there already."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return True


LOCK_NAME = "lock"
ENDED_NAME = "ended"  # an empty file: the writer was closed, and has said of its trials what there was to say
NEW_LOCK_NAME = "lock.new"  # until it is held
CLOSED_NAME = "closed"  # the lock of a writer on a network disk that has ended: what is in its files is all


def make_locked(path: Path, *, shared: bool = False) -> int:
    """Make a writer's folder with its lock held; the lock appears under its name only when it is held.

    A `shared` one lies on a network disk, where file locks may not work: its owner says whether this one does.
    """
    try:
        import fcntl  # noqa: F401 - only to see whether there is any
    except ImportError as error:
        raise OSError("this system has no file locks that end with their process") from error
    path.mkdir(parents=True)
    new = path / NEW_LOCK_NAME
    descriptor = -1
    try:
        # Not inherited by an exec, and never mapped: an mmap keeps a duplicate, and a fork's child would hold the lock.
        descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
        locked = try_lock(descriptor) is True
        if not locked and not shared:
            raise OSError(errno.ENOLCK, "this file system has no file locks")
        os.write(descriptor, json.dumps({**owner(), "flock": locked} if shared else owner()).encode())
        new.rename(path / LOCK_NAME)
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        shutil.rmtree(path, ignore_errors=True)
        raise
    return descriptor


def remove_folder(path: Path) -> None:
    """Remove a writer's folder, the lock last: without it the rest would look like a writer about to begin."""
    for entry in path.glob("*"):
        if entry.name not in (LOCK_NAME, CLOSED_NAME):
            entry.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
