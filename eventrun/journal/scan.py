"""Reading what a killed writer left: which events its journals hold, as far as marks, head and format vouch for them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zlib import adler32, crc32

from eventrun.codec import Stream
from eventrun.errors import LogDamaged
from eventrun.journal.segments import FIXED, HEAD, LOCK_NAME, MAGIC, MARK, RING_AT, owner

DAMAGED_SUFFIX = ".damaged"  # a writer's folder of which something could not be read; kept for a person to look at


class Found(NamedTuple):
    """A segment as it lies in a file. `points` are (end, count, checksum) of its marks, by end."""

    path: Path
    base: int
    stream: Stream
    first: int
    data: bytes  # the whole slot
    start: int
    head: tuple[int, int]  # (end, checksum)
    points: list[tuple[int, int, int]]


class Recovered(NamedTuple):
    """Items that the log lacks: `count` items from sequence `first` on. `problem` tells what could not be vouched for."""

    first: int
    count: int
    payload: bytes
    problem: str | None
    cuts: list[tuple[int, int]]  # (bytes, events) after which the payload may be cut, in order, its end last


def dead_writers(journals: Path) -> Iterator[tuple[Path, int]]:
    """Lock and yield (folder, descriptor) of each writer of this host that lives no more; the caller closes it."""
    if not journals.is_dir():
        return
    for folder in sorted(journals.iterdir()):
        descriptor = None if folder.name.endswith(DAMAGED_SUFFIX) else _lock_if_dead(folder)
        if descriptor is not None:
            yield folder, descriptor


def _lock_if_dead(folder: Path) -> int | None:
    path = folder / LOCK_NAME
    try:
        import fcntl

        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (ImportError, OSError):  # no lock yet (about to begin), or none any more, or not ours to write
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there, here = os.stat(path), os.fstat(descriptor)
        same = (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
        if same and _owner_of(descriptor).get("host") == owner()["host"]:
            return descriptor
    except OSError:  # held by a living writer, or removed meanwhile
        pass
    os.close(descriptor)
    return None


def _owner_of(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def segments_in(folder: Path) -> tuple[dict[Stream, list[Found]], list[str]]:
    """Find all segments of a writer by stream, in order of sequence, and the problems of those that can't be read."""
    streams: dict[Stream, list[Found]] = {}
    problems: list[str] = []
    for path in sorted(folder.glob("*.arena")):
        data = path.read_bytes()
        slot_bytes = int(path.stem.partition("-")[2])
        for base in range(0, len(data), slot_bytes):
            slot = data[base : base + slot_bytes]
            if not slot.strip(b"\0"):
                continue
            try:
                found = _read_header(path, base, slot)
            except LogDamaged as error:
                problems.append(f"{path.name} at {base}: {error}")
            else:
                streams.setdefault(found.stream, []).append(found)
    for segments in streams.values():
        segments.sort(key=lambda segment: segment.first)
    return streams, problems


def _read_header(path: Path, base: int, slot: bytes) -> Found:
    magic, writer, first, start, ring, check, length = FIXED.unpack_from(slot, 8)
    at = RING_AT + ring * MARK.size
    subject = slot[at : at + length]
    if magic != MAGIC or check != crc32(subject, crc32(FIXED.pack(magic, writer, first, start, ring, 0, length))):
        raise LogDamaged("the segment's header fails its checksum")
    head = HEAD.unpack_from(slot, 0)[0]
    marks = (MARK.unpack_from(slot, RING_AT + i * MARK.size) for i in range(ring))
    points = sorted({(end, count, sum_) for end, count, sum_ in marks if start < end <= len(slot)})
    stream = Stream(subject.decode(), writer)
    return Found(path, base, stream, first, slot, start, (head & 0xFFFFFFFF, head >> 32), points)


def recover(segment: Found, logged: bytes, logged_count: int) -> Recovered:
    """Tell what a segment holds beyond its first `logged_count` items, whose bytes the log has as `logged`.

    Raises LogDamaged when the log's bytes and the journal's are not the same.
    """
    data, start = segment.data, segment.start
    done = start + len(logged)
    if data[start:done] != logged:
        raise LogDamaged(f"{segment.stream}: journal and log differ between sequences {segment.first} and "
                         f"{segment.first + logged_count - 1}")  # fmt: skip
    end, check = segment.head
    if start <= end <= len(data) and adler32(data[start:end]) == check:
        return _found(segment, logged_count, done, end, _count(segment, end), None)
    vouched = _vouched_end(segment, done)
    count = _count(segment, vouched) if vouched > done else logged_count
    last = segment.first + count - 1
    # Beyond the last mark nothing but the format vouches for an item; before a later mark that fails, not even that.
    if any(point[0] > vouched for point in segment.points):
        what = f"a damaged stretch begins after sequence {last}; what follows it is left in the journal"
        return _found(segment, logged_count, done, vouched, count, what)
    more, stop = count_items(data, vouched, len(data))
    what = f"the head is damaged; sequences from {last + 1} to {last + more} are whole but unchecked"
    return _found(segment, logged_count, done, stop, count + more, what if more else "the head is damaged")


def _found(segment: Found, logged: int, done: int, end: int, count: int, problem: str | None) -> Recovered:
    inside = [(at - done, n - logged) for at, n, _ in segment.points if done < at < end]
    cuts = [*inside, (end - done, count - logged)]
    return Recovered(segment.first + logged, count - logged, segment.data[done:end], problem, cuts)


def _count(segment: Found, end: int) -> int:
    """Count the items up to `end`: marks hold counts, so at most what lies behind the last one is walked."""
    at, count = max((p[:2] for p in segment.points if p[0] <= end), default=(segment.start, 0))
    return count + count_items(segment.data, at, end)[0]


def _vouched_end(segment: Found, done: int) -> int:
    """The furthest mark that can be reached from what the log holds over stretches whose checksum is right."""
    data, vouched, so_far = segment.data, done, adler32(segment.data[segment.start : done])
    for end, _, check in segment.points:
        if end <= vouched:
            so_far = check if end == vouched else so_far
        elif adler32(data[vouched:end], so_far) == check:
            vouched, so_far = end, check
        else:
            break
    return vouched


def count_items(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Count the whole items between `at` and `end`, and tell where they stop."""
    count = 0
    while at < end and data[at] == 0x92:  # an item is an array of two
        after = _skip(data, at, end)
        if after < 0:
            break
        count, at = count + 1, after
    return count, at


_FIXED_SIZES = {0xC0: 1, 0xC2: 1, 0xC3: 1, 0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3,
                0xD2: 5, 0xD3: 9}  # fmt: skip
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}  # bin and str: bytes of the length
_COUNTED = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}  # array and map: bytes of the count, values each


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
