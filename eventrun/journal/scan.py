"""Reading what a killed writer left: which events its journals hold, as far as marks, head and log vouch for them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, NoReturn
from zlib import adler32, crc32

from eventrun.codec import Stream
from eventrun.errors import FormatTooNew, LogDamaged
from eventrun.filesystems import file_system
from eventrun.journal.segments import (
    CLOSED_NAME,
    ENDED_NAME,
    FIXED,
    HEAD,
    LOCK_NAME,
    MAGIC,
    MARK,
    NEW_LOCK_NAME,
    NO_ITEMS,
    RING_AT,
    VACANT,
    packed_mark,
)
from eventrun.journal.writing import ITEM_HEAD_BYTES, item_time
from eventrun.locks import is_owner_here, owner, read_owner, try_lock

SUBJECT_BYTES = 256  # of a subject, in which a changed byte is looked for
DAMAGED_SUFFIX = (
    ".damaged"  # a writer's folder of which something could not be read; kept for a person to look at
)

ITEM = b"\x92"  # an item is an array of two


class Found(NamedTuple):
    """A segment as it lies in a file. `points` are (end, count, checksum) of its marks, by end."""

    path: Path
    base: int
    size: int
    stream: Stream
    first: int
    start: int
    head: tuple[int, int]  # (end, checksum)
    points: list[tuple[int, int, int]]

    def read(self) -> bytes:
        """Return the whole slot."""
        with self.path.open("rb") as file:
            file.seek(self.base)
            return file.read(self.size)


class Recovered(NamedTuple):
    """Items that the log lacks: `events` of them from sequence `first` on. `problem`: what could not be vouched for."""

    first: int
    events: int
    payload: bytes
    problem: str | None
    cuts: list[tuple[int, int]]  # (bytes, events) after which the payload may be cut, in order, its end last


def dead_writers(journals: Path) -> Iterator[tuple[Path, int]]:
    """Lock and yield (folder, descriptor) of each writer of this host that lives no more; the caller closes it."""
    if not journals.is_dir():
        return
    for folder in sorted(journals.iterdir()):
        descriptor = None if folder.name.endswith(DAMAGED_SUFFIX) else hold_if_dead(folder)
        if descriptor is not None:
            yield folder, descriptor


def keep_damaged(folder: Path) -> None:
    """Put a dead writer's folder aside, so that it isn't recovered again and again."""
    folder.rename(folder.with_name(folder.name + DAMAGED_SUFFIX))


def hold_if_dead(folder: Path) -> int | None:
    """Lock the folder of a writer of this host that lives no more, or of any that said so; None: it lives, perhaps."""
    for path in (folder / LOCK_NAME, folder / NEW_LOCK_NAME, folder / CLOSED_NAME):
        descriptor = lock_free(path)
        if descriptor is not None:
            if path.name == CLOSED_NAME or _is_of_this_host(descriptor, path):
                return descriptor
            os.close(descriptor)
    return None


def lock_free(path: Path) -> int | None:
    """Lock a writer's lock file that nobody holds, and return its descriptor, which the caller closes."""
    try:
        import fcntl  # noqa: F401 - only to see whether there is any

        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (ImportError, OSError):  # no lock yet (about to begin), or none any more, or not ours to write
        return None
    try:
        if try_lock(descriptor):
            there, here = os.stat(path), os.fstat(descriptor)
            if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
                return descriptor
    except OSError:  # removed meanwhile
        pass
    os.close(descriptor)
    return None


def has_ended(folder: Path) -> bool:
    """Tell whether a writer said that it has ended: of its trials it has said what there was to say."""
    return is_whole(folder) or (folder / ENDED_NAME).exists()


def is_whole(folder: Path) -> bool:
    """Tell whether a writer on a network disk said that all is in its files."""
    return (folder / CLOSED_NAME).exists()


def is_of_this_host(folder: Path) -> bool:
    """Tell whether a journal's writer runs, or ran, on this host."""
    path = folder / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _is_of_this_host(descriptor, path)
    finally:
        os.close(descriptor)


def _is_of_this_host(descriptor: int, path: Path) -> bool:
    found = read_owner(descriptor)
    if path.name == NEW_LOCK_NAME and found.get("boot") in (None, owner()["boot"]):
        return False  # about to begin: another moment, and it is held under its name
    if not os.pread(descriptor, 4096, 0).strip(b"\0"):
        # It appears under its name with its contents, which a power loss may have kept from the disk. Whoever held it
        # was of this host if no other one has this disk.
        place = file_system(path)
        return bool(place.kind) and not place.network
    return is_owner_here(found)


def of_earlier_boot(descriptor: int) -> bool:
    """Tell whether the machine went down since a dead writer's lock was made: not all of its files need be whole."""
    return read_owner(descriptor).get("boot") != owner()["boot"]


class Held(NamedTuple):
    """What a writer's journals hold that the log doesn't."""

    events: int = 0
    size: int = 0  # bytes
    oldest_ns: int | None = None  # the time of the oldest of them

    def plus(self, other: Held) -> Held:
        """Add up."""
        times = [time for time in (self.oldest_ns, other.oldest_ns) if time is not None]
        return Held(self.events + other.events, self.size + other.size, min(times, default=None))


def held(segment: Found, logged: int) -> Held:
    """Tell what a segment holds after the stream's sequence `logged`; about, as its writer may be writing."""
    try:
        data = segment.read()
        now = _read_header(segment.path, segment.base, segment.size, data)
    except (OSError, LogDamaged):  # given back meanwhile
        return Held()
    end = min(now.head[0], len(data))
    if (now.stream, now.first) != (segment.stream, segment.first) or end <= now.start:
        return Held()
    past = max(0, logged - now.first + 1)
    events = _count(now, data, end, (now.start, 0)) - past
    at, count = max((at, count) for at, count, _ in ((now.start, 0, 0), *now.points) if count <= past)
    at = count_items(data, at, end, most=past - count)[1]
    if events <= 0 or data[at : at + 1] != ITEM:
        return Held()
    return Held(events, end - at, item_time(data[at : at + ITEM_HEAD_BYTES], 0))


def segments_in(folder: Path, *, torn: bool = False) -> tuple[dict[Stream, list[Found]], list[str]]:
    """Find all segments of a writer by stream, in order of sequence, and the problems of those that can't be read.

    A stream whose segments are all empty is there, with an empty list. `torn`: pages may be missing, see `recover`.
    Raises FormatTooNew.
    """
    streams: dict[Stream, list[Found]] = {}
    problems: list[str] = []
    for path in sorted(folder.glob("*.arena")):
        try:
            for found in _slots(path, problems, torn):
                segments = streams.setdefault(found.stream, [])
                # One that a killed or interrupted log call was about to begin has another one's first sequence.
                if found.points or found.head[0] != found.start:
                    segments.append(found)
        except (OSError, ValueError) as error:
            problems.append(f"{path.name} can't be read: {error}")
    for segments in streams.values():
        segments.sort(key=lambda segment: segment.first)
    return streams, problems


def segments_of(path: Path) -> list[Found] | None:
    """Find all segments in one file; None when not all of it can be read."""
    problems: list[str] = []
    try:
        found = list(_slots(path, problems, False))
    except (OSError, ValueError):
        return None
    return None if problems else found


def _slots(path: Path, problems: list[str], torn: bool) -> Iterator[Found]:
    _, _, form = path.stem.partition("-")
    size, slots = map(int, f"{form.removesuffix('-full')}x0".split("x")[:2])
    with path.open("rb") as file:
        length, whole = os.fstat(file.fileno()).st_size, size * slots
        if length < whole and not torn:  # after a power loss files may be shorter than they were
            problems.append(f"{path.name} is cut off: {whole - length:,} of its {whole:,} bytes are missing")
        base = 0
        nothing = bytes(size)  # comparing takes a twentieth of the time of strip()
        while slot := file.read(size):
            # Where pages are missing, a slot that was given back may have kept some that are not its first.
            looked_at = slot[:RING_AT] if torn else slot
            vacant = slot[: HEAD.size] == HEAD.pack(VACANT) or looked_at == nothing[: len(looked_at)]
            if not vacant:
                try:
                    yield _read_header(path, base, size, slot)
                except LogDamaged as error:
                    problems.append(f"{path.name} at {base}: {error}")
                    restored = None if torn else _restored(slot)
                    if restored is not None:
                        problems[-1] += "; one byte of it was changed, and its items are whole"
                        yield _read_header(path, base, size, restored)
            base += size


def _read_header(path: Path, base: int, size: int, slot: bytes) -> Found:
    if len(slot) < RING_AT:
        raise LogDamaged("the segment is cut off in its header")
    magic, writer, first, start, ring, check, length = FIXED.unpack_from(slot, 8)
    at = RING_AT + ring * MARK.size
    subject = slot[at : at + length]
    if check != crc32(subject, crc32(FIXED.pack(magic, writer, first, start, ring, 0, length))):
        raise LogDamaged("the segment's header fails its checksum")
    if magic != MAGIC:
        _refuse(magic)
    (head,) = HEAD.unpack_from(slot, 0)
    points = set()
    for at in range(RING_AT, RING_AT + ring * MARK.size, MARK.size):
        end, count, mark, _ = MARK.unpack_from(slot, at)
        if start < end <= len(slot) and slot[at : at + MARK.size] == packed_mark(end, count, mark):
            points.add((end, count, mark))
    stream = Stream(subject.decode(), writer)
    return Found(path, base, size, stream, first, start, (head & 0xFFFFFFFF, head >> 32), sorted(points))


def _restored(slot: bytes) -> bytes | None:
    """Undo the change of one byte in a segment's header: a CRC-32 tells which it was. Takes 30 ms."""
    if len(slot) < RING_AT:
        return None
    tried = bytearray(slot)
    for at in _header_bytes(slot):
        for value in range(256):
            tried[at] = value
            magic, writer, first, start, ring, check, length = FIXED.unpack_from(tried, 8)
            place = RING_AT + ring * MARK.size
            fields = FIXED.pack(magic, writer, first, start, ring, 0, length)
            if magic == MAGIC and check == crc32(tried[place : place + length], crc32(fields)):
                return bytes(tried)
        tried[at] = slot[at]
    return None


def _header_bytes(slot: bytes) -> Iterator[int]:
    yield from range(8, 8 + FIXED.size)
    *_, ring, _, length = FIXED.unpack_from(slot, 8)
    place = RING_AT + ring * MARK.size
    yield from range(place, min(place + length, place + SUBJECT_BYTES, len(slot)))


def _refuse(magic: bytes) -> NoReturn:
    # Every format has these fields in this place, as every one has its version in the magic's last byte.
    version, ours = magic[-1] & 0x7F, MAGIC[-1] & 0x7F
    if magic[:-1] != MAGIC[:-1] or version <= ours:
        raise LogDamaged("the segment was written on a machine with another byte order")
    raise FormatTooNew(f"a journal has format {version}, this eventrun reads up to {ours}: upgrade eventrun")


def recover(segment: Found, logged: bytes, logged_count: int, *, torn: bool = False) -> Recovered:
    """Tell what a segment holds beyond its first `logged_count` items, whose bytes the log has as `logged`.

    Nothing is given that no checksum vouches for: a changed byte in an item need not keep it from being decoded.
    `torn`: the machine went down and pages may be missing; nobody needs those whose items the log has.
    Raises LogDamaged when the log's bytes and the journal's are not the same and both can't be right.
    """
    data, start = segment.read(), segment.start
    end, check = segment.head
    done = start + len(logged)
    so_far = adler32(logged)  # the log's copy, which has a checksum of its own, stands for the journal's
    if start <= end < done and adler32(logged[: end - start]) == check:
        return Recovered(
            segment.first + logged_count, 0, b"", None, [(0, 0)]
        )  # after a power loss: older than the log
    problems = []
    if not (done <= end <= len(data) and adler32(data[done:end], so_far) == check):
        end, so_far = _vouched_end(segment, data, done, so_far)
        whole = _end_by_head(data, end, so_far, check)
        if whole is None:
            problems.append("what follows is damaged or missing, and left in the journal")
        else:
            end = whole
            problems.append("the segment's head is damaged, its items are whole")
    count = _count(segment, data, end, (done, logged_count))
    if data[start:done] != logged and not torn:
        what = f"{segment.stream}: sequences {segment.first} to {segment.first + logged_count - 1} differ from the log"
        if problems and end == done:
            raise LogDamaged(what)
        problems.append(f"{what}, where they are whole")
    problem = f"up to sequence {segment.first + count - 1}: {'; '.join(problems)}" if problems else None
    inside = [(at - done, n - logged_count) for at, n, _ in segment.points if done < at < end]
    cuts = [*inside, (end - done, count - logged_count)]
    return Recovered(segment.first + logged_count, count - logged_count, data[done:end], problem, cuts)


class Stretch(NamedTuple):
    """Items that two neighbouring marks vouch for, from sequence `first` on; `cuts` as in `Recovered`."""

    first: int
    events: int
    payload: bytes
    cuts: list[tuple[int, int]]


def stretches(segment: Found) -> list[Stretch]:
    """Find all that marks and head vouch for, also behind damage: each checksum goes on from the one before it.

    So a damaged byte costs what lies between two marks. A log takes none of it, since its streams have no gaps.
    """
    data = segment.read()
    ends = [(segment.start, 0, NO_ITEMS), *segment.points]
    end, check = segment.head
    if ends[-1][0] < end <= len(data):
        ends.append((end, ends[-1][1] + count_items(data, ends[-1][0], end)[0], check))
    found: list[Stretch] = []
    whole = False
    for (at, before, known), (end, count, check) in pairwise(ends):
        if adler32(data[at:end], known) != check or count <= before:
            whole = False
            continue
        if not whole:
            found.append(Stretch(segment.first + before, 0, b"", []))
        first, events, payload, cuts = found[-1]
        events, payload = events + count - before, payload + data[at:end]
        found[-1] = Stretch(first, events, payload, [*cuts, (len(payload), events)])
        whole = True
    return found


def _count(segment: Found, data: bytes, end: int, logged: tuple[int, int]) -> int:
    """Count the items up to `end`: marks hold counts, so at most what lies behind the last one is walked."""
    at, count = max([logged, *((at, count) for at, count, _ in segment.points if at <= end)])
    return count + count_items(data, at, end)[0]


def _vouched_end(segment: Found, data: bytes, done: int, so_far: int) -> tuple[int, int]:
    """Find the furthest mark that can be reached from what the log holds over stretches whose checksum is right."""
    for end, _, check in segment.points:
        if end > done:
            reached = adler32(data[done:end], so_far)
            if reached != check:
                break
            done, so_far = end, reached
    return done, so_far


def _end_by_head(data: bytes, at: int, so_far: int, check: int) -> int | None:
    """Find the item after which the head's checksum is right, for a head whose offset is damaged."""
    while so_far != check:
        count, after = count_items(data, at, len(data), most=1)
        if not count:
            return None
        at, so_far = after, adler32(data[at:after], so_far)
    return at


def count_items(data: bytes, at: int, end: int, most: int = sys.maxsize) -> tuple[int, int]:
    """Count the whole items between `at` and `end`, and tell where they stop."""
    count = 0
    while count < most and at < end and data[at] == ITEM[0]:
        after = _skip(data, at, end)
        if after < 0:
            break
        count, at = count + 1, after
    return count, at


_FIXED_SIZES = {0xC0: 1, 0xC2: 1, 0xC3: 1, 0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3,
                0xD2: 5, 0xD3: 9}  # fmt: skip
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}  # bin and str: bytes of the length
_COUNTED = {
    0xDC: (2, 1),
    0xDD: (4, 1),
    0xDE: (2, 2),
    0xDF: (4, 2),
}  # array and map: bytes of the count, values each


def _skip(data: bytes, at: int, end: int) -> int:
    """Walk over one msgpack value (https://github.com/msgpack/msgpack/blob/master/spec.md); -1: it isn't whole."""
    left = 1
    while left:
        if at >= end:
            return -1
        byte = data[at]
        left -= 1
        if byte <= 0x7F or byte >= 0xE0:
            at += 1
        elif byte <= 0x8F:
            left, at = left + 2 * (byte & 15), at + 1
        elif byte <= 0x9F:
            left, at = left + (byte & 15), at + 1
        elif byte <= 0xBF:
            at += 1 + (byte & 31)
        elif byte in _FIXED_SIZES:
            at += _FIXED_SIZES[byte]
        elif byte in _SIZED:
            width = _SIZED[byte]
            at += 1 + width + int.from_bytes(data[at + 1 : at + 1 + width], "big")
        elif byte in _COUNTED:
            width, each = _COUNTED[byte]
            left, at = left + each * int.from_bytes(data[at + 1 : at + 1 + width], "big"), at + 1 + width
        else:
            return -1
        if left > end:  # a damaged count: more values than bytes
            return -1
    return at if at <= end else -1
