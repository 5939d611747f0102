"""The write-ahead journal: a log call's bytes are in a mapped file before the call returns.

A mapped file (MAP_SHARED) belongs to the kernel as soon as the bytes are copied: a killed process loses none of
them, and no system call is made. One journal per stream, so its bytes are the payload of the next batch as they lie.

    journals/<writer>/lock              held while the writer lives; host, boot and pid inside
    journals/<writer>/<n>-<size>.arena  slots of `size` bytes; each in use is one segment of one stream

    segment   u64 head | magic | u64 writer | u64 first sequence | u32 start | u32 slots of the ring | u32 CRC of the
              fields from magic to subject without the ring | u16 length of subject | ring of marks | subject | items
    head      adler32 of the items << 32 | end, in native byte order: one 8-byte store made after the copy.
              What lies beyond `end` is an event whose call had not returned.
    mark      u64 end | u64 count | u64 adler32: one per 64 KiB and one per batch taken

Adler-32 and not CRC-32, because it is worked out at each call, of few bytes: 60 ns against 165 (zlib 1.2.13). It
notices each changed byte as well, and the log's batches have a CRC-32 of their own.

`end` counts from the start of the slot. Small segments share a file because an mmap keeps a descriptor of its own
(before Python 3.13): a file per stream ends at `ulimit -n`.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import struct
import sys
import threading
from collections import deque
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from eventrun.codec import Stream

SEGMENT_BYTES = (16 << 10, 256 << 10, 4 << 20, 32 << 20)  # a stream's first segment, its second, ...
ARENA_BYTES = 4 << 20  # small segments come from files of this size
MARK_BYTES = 64 << 10  # how much a damaged byte may cost at most
RING_SLOTS = 32  # marks kept in a segment beyond one per 64 KiB
MEMORY_BYTES = 64 << 20  # bound of what is kept in memory where no file can be written
MAPPED_FILESYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "tmpfs"})  # keep what posix_fallocate promised

MAGIC = b"evrnjrn" + (b"\x01" if sys.byteorder == "little" else b"\x81")
FIXED = struct.Struct("=8sQQIIIH")  # from offset 8
NO_ITEMS = 1  # the Adler-32 of nothing
MARK = struct.Struct("=QQQ")
RING_AT = 8 + FIXED.size + 2  # 48: aligned to 8
HEAD = struct.Struct("=Q")


class Segment:
    """A stretch of one stream in one buffer: a slot of a mapped arena, memory with a file behind it, or memory."""

    __slots__ = ("base", "buffer", "check", "count", "cuts", "end", "first", "head", "last", "place", "ring",
                 "size", "start", "taken", "taken_count", "turns", "written")  # fmt: skip

    def __init__(self, buffer: memoryview, base: int, size: int, place: Slot | WrittenFile | None) -> None:
        self.buffer = buffer
        self.base = base
        self.size = size
        self.place = place
        self.written = 0
        self.head = buffer[base : base + 8].cast("Q")
        self.turns = 0

    def begin(self, stream: Stream, first: int) -> None:
        """Write the header and become the current segment of a stream."""
        subject = stream.subject.encode()
        self.ring, self.start = layout(self.size, len(subject))
        self.first = first
        self.end = self.taken = self.last = self.start
        self.count = self.taken_count = 0
        self.check = NO_ITEMS
        self.cuts: deque[tuple[int, int, int]] = deque()  # (end, count, start of last item): where batches may end
        fields = (MAGIC, stream.writer, first, self.start, self.ring)
        check = crc32(subject, crc32(FIXED.pack(*fields, 0, len(subject))))
        base = self.base
        self.head[0] = 0
        self.buffer[base + 8 : base + 8 + FIXED.size] = FIXED.pack(*fields, check, len(subject))
        at = base + RING_AT + self.ring * MARK.size
        self.buffer[at : at + len(subject)] = subject
        self.head[0] = NO_ITEMS << 32 | self.start

    def mark(self, end: int, count: int, check: int) -> None:
        """Note that the items up to `end` have this checksum."""
        at = self.base + RING_AT + (self.turns % self.ring) * MARK.size
        self.buffer[at : at + MARK.size] = MARK.pack(end, count, check)
        self.turns += 1


def layout(size: int, subject_bytes: int) -> tuple[int, int]:
    """Slots of the ring, and where the items start, in a segment of this size."""
    ring = RING_SLOTS + size // MARK_BYTES
    return ring, (RING_AT + ring * MARK.size + subject_bytes + 63) // 64 * 64


def size_for(stream: Stream, item_bytes: int, previous: int) -> int:
    """Choose a segment's size: larger than the one before, and with room for the next item."""
    subject_bytes = len(stream.subject.encode())
    largest = SEGMENT_BYTES[-1]
    for size in SEGMENT_BYTES:
        if (size > previous or size == largest) and layout(size, subject_bytes)[1] + item_bytes <= size:
            return size
    return -(-(item_bytes + subject_bytes) // largest) * largest + largest  # one item larger than any segment


class Slot(NamedTuple):
    """A place in an arena."""

    arena: Arena
    base: int


class WrittenFile(NamedTuple):
    """A file that a segment in memory is copied to, by write calls: where mapped files can't be trusted."""

    path: Path
    descriptor: int

    def write(self, segment: Segment, start: int, end: int) -> None:
        """Copy the bytes from `start` on, then the head that makes them count."""
        os.pwrite(self.descriptor, segment.buffer[start:end], start)
        os.pwrite(self.descriptor, segment.buffer[:8], 0)

    def remove(self) -> None:
        """Close and remove the file."""
        os.close(self.descriptor)
        self.path.unlink(missing_ok=True)


class Arena:
    """A mapped file of equal slots."""

    def __init__(self, path: Path, slot_bytes: int, slots: int) -> None:
        self.path = path
        self.slot_bytes = slot_bytes
        size = slot_bytes * slots
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            # A hole on a full disk would be a SIGBUS at the copy; space that is taken beforehand can't be one.
            os.posix_fallocate(descriptor, 0, size)
            self.map = mmap.mmap(descriptor, size)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(descriptor)
        self.view = memoryview(self.map)
        self.vacant = list(range(0, size, slot_bytes))[::-1]
        self.slots = slots

    def free(self, base: int) -> None:
        """Take a slot back, emptied: old items must never look like new ones."""
        self.view[base : base + self.slot_bytes] = bytes(self.slot_bytes)
        self.vacant.append(base)

    def close(self) -> None:
        """Unmap and remove the file."""
        self.path.unlink(missing_ok=True)
        try:
            self.view.release()
            self.map.close()
        except BufferError:  # a thread is just leaving `append`: unmapped when it lets go
            pass


class JournalFolder:
    """One writer's folder: its lock, and the places that its journals take segments from.

    Segments are mapped where the file system can be trusted with that, else written by write calls, else (`path` None,
    no permission, a full disk) memory alone, at most MEMORY_BYTES; `problem` says why. Never raises to the log call.
    """

    def __init__(self, path: Path | None, *, mapped: bool = True) -> None:
        self.path = path
        self.mapped = mapped
        self.problem: str | None = None
        self.memory_bytes = 0
        self.dropped_events = 0
        # Reentrant, because a finalizer that logs may run while this thread is inside. The lists below are then
        # still whole: each change of them is one call.
        self._lock = threading.RLock()
        self._arenas: list[Arena] = []
        self._made = 0
        self._descriptor: int | None = None
        if path is not None:
            try:
                self._descriptor = _make_locked(path)
            except OSError as error:
                self.problem = str(error)

    @property
    def crash_safe(self) -> bool:
        """Tell whether what is appended survives a kill of the process."""
        return self._descriptor is not None and self.problem is None

    def segment(self, stream: Stream, item_bytes: int = 0, previous: int = 0) -> Segment | None:
        """Find room for more items of a stream: a slot of an arena, memory, or None when that is full too."""
        with self._lock:
            if self._descriptor is not None:
                try:
                    if self.mapped:
                        return self._in_arena(size_for(stream, item_bytes, previous))
                    return self._in_memory(size_for(stream, item_bytes, SEGMENT_BYTES[0]), written=True)
                except OSError as error:  # the disk is full, or gone: memory takes over until it works again
                    self.problem = str(error)
            return self._in_memory(size_for(stream, item_bytes, SEGMENT_BYTES[0]))

    def _in_arena(self, size: int) -> Segment:
        assert self.path is not None
        for arena in self._arenas:
            if arena.slot_bytes == size and arena.vacant:
                break
        else:
            self._made += 1
            arena = Arena(self.path / f"{self._made}-{size}.arena", size, max(1, ARENA_BYTES // size))
            self._arenas.append(arena)
        self.problem = None
        base = arena.vacant.pop()
        return Segment(arena.view, base, size, Slot(arena, base))

    def _in_memory(self, size: int, *, written: bool = False) -> Segment | None:
        if self.memory_bytes + size > MEMORY_BYTES:
            return None
        place = None
        if written:
            assert self.path is not None
            self._made += 1
            path = self.path / f"{self._made}-{size}.arena"
            place = WrittenFile(path, os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644))
            self.problem = None
        self.memory_bytes += size
        return Segment(memoryview(bytearray(size)), 0, size, place)

    def release(self, segment: Segment) -> None:
        """Take a segment back whose events the log holds; arenas that are empty are removed, but for one a size."""
        with self._lock:
            segment.head.release()
            if not isinstance(segment.place, Slot):
                self.memory_bytes -= segment.size
                if segment.place is not None:
                    segment.place.remove()
                return
            arena = segment.place.arena
            arena.free(segment.place.base)
            same = [a for a in self._arenas if a.slot_bytes == arena.slot_bytes]
            if len(arena.vacant) == arena.slots and (len(same) > 1 or arena.slots == 1):
                self._arenas.remove(arena)
                arena.close()

    def file_bytes(self) -> int:
        """Sum the sizes of the arenas."""
        with self._lock:
            return sum(arena.slots * arena.slot_bytes for arena in self._arenas)

    def remove(self) -> None:
        """End the writer: all is in the log, nothing is left to recover."""
        with self._lock:
            arenas, self._arenas = self._arenas, []
            for arena in arenas:
                arena.close()
            if self.path is not None and self._descriptor is not None:
                remove_folder(self.path)
        self.abandon()

    def abandon(self) -> None:
        """Let the lock go and leave the files to be recovered by the next open (or, after a fork, to the parent).

        The descriptor is closed, never unlocked: a lock that a fork's child shares stays with the parent.
        """
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)



LOCK_NAME = "lock"


def _make_locked(path: Path) -> int:
    """Make a writer's folder with its lock held; the lock appears under its name only when it is held."""
    try:
        import fcntl
    except ImportError as error:
        raise OSError("this system has no file locks that end with their process") from error
    path.mkdir(parents=True)
    new = path / (LOCK_NAME + ".new")
    # Not inherited by an exec, and never mapped: an mmap keeps a duplicate, and a fork's child would hold the lock.
    descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, json.dumps(owner()).encode())
        new.rename(path / LOCK_NAME)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def owner() -> dict[str, str | int]:
    """Say who this process is, as it stands in a lock file: host, boot, pid."""
    return {"host": os.uname().nodename, "boot": _boot_id(), "pid": os.getpid()}


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return ""


def remove_folder(path: Path) -> None:
    """Remove a writer's folder, the lock last: without it the rest would look like a writer about to begin."""
    for entry in path.iterdir():
        if entry.name != LOCK_NAME:
            entry.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def can_map(path: Path, mountinfo: str | None = None) -> bool:
    """Tell whether mapped files under `path` can be trusted: the file system must keep what is allocated.

    `mountinfo` is the text of /proc/self/mountinfo.
    """
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    except OSError:
        return False
    best, kind = "", ""
    place = os.path.realpath(path)
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4].encode().decode("unicode_escape")
        if (place == mount or place.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best):
            best, kind = mount, after.split()[0]
    return kind in MAPPED_FILESYSTEMS
