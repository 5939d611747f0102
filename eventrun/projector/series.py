"""The points of one metric of one trial, packed: full chunks of CHUNK points and an open one.

    chunk    msgpack array [count, values, steps, epochs, times_ns, sequences], then its CRC-32
    column   msgpack array [kind, start, step, data]

Chunks are cut by count alone and a column's form follows from its elements alone, so the bytes don't depend on how
many points came at a time. NaN, -0.0, ints of 64 bits, text and None come back as they were.
"""

import struct
import sys
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import countOf
from typing import Any, Final, Literal, Protocol

import msgspec
from msgspec import Struct

# Points in a full chunk. Of 512, 1024, 2048 and 4096 the larger ones read 1 M points in 38, 29, 26 and 25 ms, but the
# open chunk of each metric is written anew at each catch-up: with 300 live trials of 10 metrics each it took 0.39 s
# when they held 800 points, and 0.65 s when they held 1,800.
CHUNK = 1024
Kind = Literal["n", "d", "q", "b", "r", "m"]
NONE: Final = "n"
FLOATS: Final = "d"
INTS: Final = "q"
BOOLS: Final = "b"
RANGE: Final = "r"
MIXED: Final = "m"


class DamagedView(Exception):  # never seen outside: views heal
    """A stored view is not what was written."""


class Columns(Protocol):
    """Parallel lists, one element a point, in arrival order; `projections.Points` is one."""

    values: list[Any]
    steps: list[Any]
    epochs: list[Any]
    times_ns: list[int]
    sequences: list[int]


class Column(Struct, frozen=True, array_like=True, gc=False):
    """Elements of one kind: none (all None), float64, int64, bools of a byte, an arithmetic range, or mixed."""

    kind: Kind
    start: int = 0
    step: int = 0
    data: bytes = b""


class Chunk(Struct, frozen=True, array_like=True, gc=False):
    """Up to CHUNK points of a metric."""

    count: int
    values: Column
    steps: Column
    epochs: Column
    times_ns: Column
    sequences: Column


# What decoding may raise although the checksum is right: text that isn't UTF-8, keys that can't be hashed, ...
_MALFORMED = (msgspec.MsgspecError, ValueError, TypeError, RecursionError)
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Chunk)


def with_crc(data: bytes) -> bytes:
    """Append a checksum: SQLite doesn't notice a flipped bit."""
    return data + zlib.crc32(data).to_bytes(4, "big")


def without_crc(data: object) -> bytes:
    """Check and remove what `with_crc` appended. Raises DamagedView."""
    if not isinstance(data, bytes) or len(data) < 5:
        raise DamagedView("a stored value was cut, or is no bytes")
    body = data[:-4]
    if zlib.crc32(body) != int.from_bytes(data[-4:], "big"):
        raise DamagedView("a stored value fails its checksum")
    return body


@contextmanager
def undamaged() -> Iterator[None]:
    """Raise DamagedView for what can't be decoded although its checksum is right."""
    try:
        yield
    except _MALFORMED as error:
        raise DamagedView(f"a stored value is malformed: {error}") from error


def encode_chunk(chunk: Chunk) -> bytes:
    """Write a chunk."""
    return with_crc(_encoder.encode(chunk))


def decode_chunk(data: bytes) -> Chunk:
    """Read a chunk. Raises DamagedView."""
    with undamaged():
        chunk = _decoder.decode(without_crc(data))
    if not 0 < chunk.count <= CHUNK:
        raise DamagedView(f"a chunk of a series claims to have {chunk.count} points")
    return chunk


def pack(elements: Sequence[Any]) -> Column:
    """Pack a column, which isn't empty, in the one form that its elements have."""
    kind = _one_type(elements)
    if kind is float:
        return Column(FLOATS, data=_floats(elements))
    if kind is int:
        return _pack_ints(elements)
    if kind is bool:
        return Column(BOOLS, data=bytes(elements))
    if kind is type(None):
        return Column(NONE)
    return Column(MIXED, data=_encoder.encode(elements))


def _one_type(elements: Sequence[Any]) -> type | None:
    """Return the type of all elements, None if they have several."""
    kind = type(elements[0])
    return kind if countOf(map(type, elements), kind) == len(elements) else None


def _floats(elements: Sequence[float]) -> bytes:
    # struct takes a third of the time of array("d", elements)
    return struct.pack(f"<{len(elements)}d", *elements)


def _ints(elements: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(elements)}q", *elements)


def _fits(number: int) -> bool:
    return -(2**63) <= number < 2**63


def _pack_ints(elements: Sequence[int]) -> Column:
    start, last, count = elements[0], elements[-1], len(elements)
    step = elements[1] - start if count > 1 else 0
    if last == start + step * (count - 1) and _fits(start) and _fits(last) and _fits(step):
        if list(elements) == list(_arithmetic(start, step, count)):
            return Column(RANGE, start, step)
    try:
        return Column(INTS, data=_ints(elements))
    except struct.error:  # beyond int64
        return Column(MIXED, data=_encoder.encode(elements))


def _arithmetic(start: int, step: int, count: int) -> Sequence[int]:
    return range(start, start + step * count, step) if step else [start] * count


def unpack(column: Column, count: int) -> Sequence[Any]:
    """Give back a column's elements: an array, a range or a list. Raises DamagedView."""
    with undamaged():
        elements = _unpacked(column, count)
    if len(elements) != count:
        raise DamagedView(f"a column has {len(elements)} elements, its chunk {count} points")
    return elements


def _unpacked(column: Column, count: int) -> Sequence[Any]:
    kind = column.kind
    if kind == "d" or kind == "q":
        return to_array(kind, column.data)
    if kind == "r":
        return _arithmetic(column.start, column.step, count)
    if kind == "n":
        return [None] * count
    if kind == "b":
        return list(map(bool, column.data))
    return msgspec.msgpack.decode(column.data, type=list[Any])


def to_array(kind: Literal["d", "q"], data: bytes) -> "array[Any]":
    """Make an array of little-endian bytes."""
    elements: array[Any] = array(kind)
    elements.frombytes(data)
    if sys.byteorder == "big":
        elements.byteswap()
    return elements


def _longer(column: Column, count: int, elements: Sequence[Any]) -> Column:
    """Pack what `column` holds followed by `elements`; the common cases without unpacking it."""
    old, new = column.kind, _one_type(elements)
    if old == FLOATS and new is float:
        return Column(FLOATS, data=column.data + _floats(elements))
    if old == NONE and new is type(None):
        return column
    if old == INTS and new is int:
        try:
            return Column(INTS, data=column.data + _ints(elements))
        except struct.error:  # beyond int64
            pass
    if old == RANGE and new is int and count > 1:
        first = column.start + column.step * count
        if list(elements) == list(_arithmetic(first, column.step, len(elements))) and _fits(elements[-1]):
            return column
    return pack([*unpack(column, count), *elements])


class Packer:
    """Packs what metrics of the same log calls share (steps, epochs, times, sequences) once for all of them.

    Columns are known by their identity: keep them alive and unchanged as long as the packer.
    """

    def __init__(self) -> None:
        self._packed: dict[tuple[int, int, int, int], list[tuple[Column | None, Column]]] = {}

    def extend(self, chunk: Chunk | None, points: Columns) -> Iterator[Chunk]:
        """Add points behind an open chunk: yield full chunks, then, when points are left, the open one."""
        done, total = 0, len(points.values)
        while done < total:
            have = chunk.count if chunk is not None else 0
            end = min(done + CHUNK - have, total)
            shared = (points.steps, points.epochs, points.times_ns, points.sequences)
            values = points.values[done:end]
            if chunk is None:
                yield Chunk(
                    end - done, pack(values), *[self._shared(None, 0, each, done, end) for each in shared]
                )
            else:
                before = (chunk.steps, chunk.epochs, chunk.times_ns, chunk.sequences)
                columns = [
                    self._shared(old, have, each, done, end) for old, each in zip(before, shared, strict=True)
                ]
                yield Chunk(have + end - done, _longer(chunk.values, have, values), *columns)
            chunk, done = None, end

    def _shared(self, old: Column | None, have: int, elements: list[Any], start: int, end: int) -> Column:
        known = self._packed.setdefault((id(elements), have, start, end), [])
        for before, packed in known:
            if before == old:
                return packed
        part = elements[start:end]
        packed = pack(part) if old is None else _longer(old, have, part)
        known.append((old, packed))
        return packed
