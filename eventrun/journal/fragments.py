"""Journals on a network disk: fragments of the log, which a collector takes in.

Nothing is mapped there, and a writer never opens the log for writing. Its events are durable once its files are synced;
it gives nothing back. When it ends it renames its lock to `closed`; while it lives it renews the lock's mtime, since a
file lock may not be seen from other machines. A file whose slots are all used up and synced is renamed, so that the
collector may remove it under the living writer:

    journals/<writer>/lock -> closed
    journals/<writer>/<n>-<size>x<slots>.arena -> <n>-<size>x<slots>-full.arena

A writer that was taken for dead, whose folder was removed, notices at its next sync. It makes the folder anew and
writes there again all that it had not called durable, with the same sequences, so that nothing is there twice.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from eventrun.clock import monotonic_ns, time_ns
from eventrun.codec import Stream
from eventrun.errors import StoreUnavailable
from eventrun.filesystems import sync_parents
from eventrun.journal.segments import (
    CLOSED_NAME,
    LOCK_NAME,
    MEMORY_BYTES,
    Arena,
    JournalFolder,
    Segment,
    Slot,
    make_locked,
)
from eventrun.journal.writing import Journal, WrittenJournal
from eventrun.locks import BEAT_S

FULL_SUFFIX = "-full.arena"
MOVE_WAIT_S = 1.0  # how long the flusher waits for a log call before it writes anew what isn't durable


class FragmentFolder(JournalFolder):
    """One writer's folder on a network disk."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(path, mapped=False)
        self.kept_bytes = 0  # of files that are full
        self._retiring: list[Arena] = []  # full, to be renamed after the next sync
        self._beat_ns = _clocks()
        self._new_names = False  # files were made since the last sync
        self._named = False  # the folder's own name, and its lock, are durable
        self._home: tuple[int, int] | None = None  # of the folder of all journals

    def _make_lock(self, path: Path) -> int:
        descriptor = make_locked(path, shared=True)
        self._beat_ns = _clocks()
        self._home = _identity(path.parent)
        self._new_names, self._named = True, False
        return descriptor

    def _arena(self, size: int, slots: int, *, mapped: bool) -> Arena:
        self._new_names = True
        return super()._arena(size, slots, mapped=mapped)

    @property
    def has_new(self) -> bool:
        """Tell whether a sync is due though no journal has anything new."""
        return self._new_names or bool(self._retiring)

    def house(self, segment: Segment) -> None:
        """Give a segment that lies in memory alone a place in a file. Raises OSError."""
        if segment.place is None:
            if self._descriptor is None and not self._open():
                raise OSError(errno.ENOENT, self.problem or "there is no folder to write to")
            place = self._vacant(segment.size, segment.size, mapped=False) or self._new_arena(
                segment.size, mapped=False
            )
            segment.written, segment.written_turns, segment.place = 0, -1, place

    def sync(self) -> None:
        """Make durable what is in the files. Raises OSError, StoreUnavailable."""
        if self._descriptor is None:
            return
        retiring, self._retiring = self._retiring, []
        try:
            for arena in (*tuple(self._arenas), *retiring):
                os.fsync(arena.descriptor)
            if self._new_names and self.path is not None:
                self._new_names = False
                if not self._named:
                    # Without the owner in its lock nobody could tell whether this writer lives.
                    os.fsync(self._descriptor)
                    sync_parents(self.path)
                    self._named = True
                _sync_folder(self.path)
        except OSError:
            self._retiring, self._new_names = retiring + self._retiring, True
            raise
        self._check_place()
        for arena in retiring:
            full = arena.path.with_name(arena.path.stem + FULL_SUFFIX)
            arena.path.rename(full)
            arena.path = full

    def _check_place(self) -> None:
        """Raise FileNotFoundError when a collector removed the folder, StoreUnavailable when the store is gone."""
        if self.path is None or self._descriptor is None:
            return
        here = os.fstat(self._descriptor)
        if _identity(self.path / LOCK_NAME) == (here.st_dev, here.st_ino):
            return
        if self._home is None or _identity(self.path.parent) != self._home:
            raise StoreUnavailable(
                f"{self.path.parent} was moved or deleted while it was open: put it back, or open another"
            )
        raise FileNotFoundError(errno.ENOENT, "this writer's folder was removed", str(self.path))

    def beat(self) -> None:
        """Say that this writer lives, when it is time to."""
        # By both clocks: one of them may have stood still while the machine slept, the other may be set back.
        passed = (now - then for now, then in zip(_clocks(), self._beat_ns, strict=True))
        if self._descriptor is not None and max(passed) > BEAT_S * 1e9:
            self._beat_ns = _clocks()
            try:
                os.utime(self._descriptor)
            except OSError as error:
                self.problem = str(error)

    def renew(self, journals: Iterable[FragmentJournal]) -> None:
        """After a failed sync, or when the folder was removed: write all that isn't durable to new files."""
        descriptor = self._descriptor
        if descriptor is not None and self._is_removed():
            self._descriptor = None
            os.close(descriptor)
        self._retiring.clear()
        # The descriptors stay open as long as a segment needs its old place.
        self._arenas = []
        for journal in journals:
            journal.move()

    def _is_removed(self) -> bool:
        try:
            self._check_place()
        except FileNotFoundError:
            return True
        return False

    def release(self, segment: Segment) -> None:
        """Let go of the memory of a segment that is durable; what is in the file stays there."""
        if self._abandoned:
            return
        self.unload(segment)
        place = segment.place
        if place is None:
            return
        if segment.written_turns < 0:  # never begun
            place.arena.vacant.append(place.base)
            return
        place.arena.spent += 1
        if place.arena.spent == place.arena.slots and place.arena in self._arenas:
            self._arenas.remove(place.arena)
            self._retiring.append(place.arena)
            self.kept_bytes += place.arena.slots * place.arena.slot_bytes

    def _give_back(self, place: Slot) -> None:
        place.arena.vacant.append(place.base)

    def file_bytes(self) -> int:
        """Sum the sizes of all files, those that are full included."""
        return super().file_bytes() + self.kept_bytes

    @property
    def crowded(self) -> bool:
        """Tell whether half of the memory for what isn't durable yet is taken."""
        return self.memory_bytes > MEMORY_BYTES // 2

    def end(self, *, complete: bool) -> None:
        """End the writer though not all could be made durable: it will look like one that was killed."""
        self.abandon()

    def remove(self) -> None:
        """End the writer: all is durable in its files, which a collector takes in."""
        if self.path is not None and self._descriptor is not None:
            (self.path / LOCK_NAME).rename(self.path / CLOSED_NAME)
            _sync_folder(self.path)
        self._arenas = []
        self.abandon()


class Reached(NamedTuple):
    """How far a journal's files go."""

    sequence: int
    segment: Segment | None
    end: int
    events: int  # in the segment
    check: int


class FragmentJournal(WrittenJournal):
    """A journal on a network disk. A segment stays in memory until it is durable."""

    __slots__ = ("_marked", "_reached", "fragments")

    def __init__(
        self,
        folder: FragmentFolder,
        stream: Stream,
        segment: Segment,
        first: int,
        moved: Callable[[bytes], None],
    ) -> None:
        self.fragments = folder
        self._reached = Reached(first - 1, None, 0, 0, 0)
        self._marked = first - 1
        super().__init__(folder, stream, segment, first, moved)

    def append(self, data: bytes) -> None:
        """Keep one item; two system calls."""
        with self._turning:
            Journal.append(self, data)
            try:
                self._write_out()
            except OSError as error:  # it stays in memory, and the next append or sync tries again
                self._folder.note(error)

    def _write_out(self) -> None:
        full, segment, end, _, check, count = self._now()
        for older in full:
            if older.buffer and (older.place is None or older.written < older.end):
                self.fragments.house(older)
                older.write()
            if older.buffer and self.fragments.crowded:
                self._folder.unload(older)
        if segment is None:
            if self._after - 1 > self._reached.sequence:
                self._reached = Reached(self._after - 1, None, 0, 0, 0)
            return
        self.fragments.house(segment)
        segment.write()
        self._reached = Reached(segment.first + count - 1, segment, end, count, check)

    @property
    def returned(self) -> int:
        """The last sequence whose `append` is over: a handler that flushes can't wait for the call that it is in."""
        if self._turning._is_owned():  # type: ignore[attr-defined]
            return self._reached.sequence
        return super().returned

    def reach(self) -> Reached:
        """Tell how far the files go, after another try to write what couldn't be written. Raises OSError."""
        # Without waiting: a caller may be stopped inside, by a handler that waits for this flush.
        if self._turning.acquire(blocking=False):
            try:
                self._write_out()
            finally:
                self._turning.release()
        reached = self._reached
        segment = reached.segment
        if segment is not None and reached.sequence > self._marked and segment.place is not None:
            # A mark, or what the next calls write would be all that vouches for this after a power loss.
            segment.mark(reached.end, reached.events, reached.check)
            if segment.buffer:
                segment.place.write(8, segment.buffer[8 : segment.start])
            self._marked = reached.sequence
        return reached

    def confirm_reached(self, reached: Reached) -> None:
        """Note that the files are durable so far."""
        with self._guard:
            full = self._full
        for segment in full:
            if segment.first + segment.count - 1 <= reached.sequence:
                _take(segment, segment.end, segment.count)
        if reached.segment is not None:
            _take(reached.segment, reached.end, reached.events)

    def move(self) -> None:
        """Give up the places that the segments have, to be written again to new ones. Raises OSError."""
        if not self._turning.acquire(timeout=MOVE_WAIT_S):
            raise OSError(errno.EBUSY, "a log call is under way")
        try:
            full, segment, _, _, _, _ = self._now()
            for each in (*full, segment):
                if each is not None and each.place is not None:
                    self._load(each, each.place)
                    each.place = None
            self._marked = -1
            self._write_out()
        finally:
            self._turning.release()

    def _load(self, segment: Segment, place: Slot) -> None:
        if not segment.buffer:
            data = bytearray(segment.size)
            data[: segment.end] = place.read(0, segment.end)
            segment.buffer = memoryview(data)
            segment.head = segment.buffer[:8].cast("Q")
            self._folder.memory_bytes += segment.size


def _take(segment: Segment, end: int, count: int) -> None:
    if end > segment.taken:
        segment.taken, segment.taken_count = end, count


def _clocks() -> tuple[int, int]:
    return monotonic_ns(), time_ns()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _sync_folder(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:  # not ours to read, so not new
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some can't, and need not
            raise
    finally:
        os.close(descriptor)
