"""The points of one metric of one trial, packed: full chunks of CHUNK points and an open one.

    chunk    msgpack array [count, values, steps, epochs, times_ns, sequences], then its CRC-32
    column   msgpack array [kind, start, step, data]

Chunks are cut by count alone and a column's form follows from its elements alone, so the bytes don't depend on how
many points came at a time. NaN, -0.0, ints of 64 bits, text and None come back as they were.
"""

import sys
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal, Protocol

import msgspec
from msgspec import Struct

CHUNK = 1024  # points; see `tools/decisions`: larger ones cost more at each catch-up than they win in reading
Kind = Literal["n", "d", "q", "b", "r", "m"]
NONE: Final = "n"
FLOATS: Final = "d"
INTS: Final = "q"
BOOLS: Final = "b"
RANGE: Final = "r"
MIXED: Final = "m"

_INT_MIN, _INT_MAX = -(2**63), 2**63 - 1
_BIG_ENDIAN = sys.byteorder == "big"


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


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Chunk)


def with_crc(data: bytes) -> bytes:
    """Append a checksum: SQLite doesn't notice a flipped bit."""
    return data + zlib.crc32(data).to_bytes(4, "big")


def without_crc(data: object) -> bytes:
    """Check and remove what `with_crc` appended. Raises DamagedView."""
    if not isinstance(data, bytes):
        raise DamagedView(f"a stored value is {type(data).__name__}, not bytes")
    body = data[:-4]
    if zlib.crc32(body) != int.from_bytes(data[-4:], "big"):
        raise DamagedView("a stored value fails its checksum")
    return body


@contextmanager
def undamaged() -> Iterator[None]:
    """Raise DamagedView for what can't be decoded although its checksum is right."""
    try:
        yield
    except msgspec.DecodeError as error:
        raise DamagedView(f"a stored value is malformed: {error}") from error


def encode_chunk(chunk: Chunk) -> bytes:
    """Write a chunk."""
    return with_crc(_encoder.encode(chunk))


def decode_chunk(data: bytes) -> Chunk:
    """Read a chunk. Raises DamagedView."""
    with undamaged():
        return _decoder.decode(without_crc(data))


def pack(elements: Sequence[Any]) -> Column:
    """Pack a column in the one form that its elements have."""
    kinds = set(map(type, elements))
    if kinds == {float}:
        return Column(FLOATS, data=_to_bytes(array("d", elements)))
    if kinds == {int}:
        return _pack_ints(elements)
    if kinds == {bool}:
        return Column(BOOLS, data=bytes(elements))
    if kinds <= {type(None)}:
        return Column(NONE)
    return Column(MIXED, data=_encoder.encode(elements))


def _pack_ints(elements: Sequence[int]) -> Column:
    start, last, count = elements[0], elements[-1], len(elements)
    step = elements[1] - start if count > 1 else 0
    if not _INT_MIN <= min(elements) <= max(elements) <= _INT_MAX:
        return Column(MIXED, data=_encoder.encode(elements))
    if last == start + step * (count - 1) and list(elements) == list(_arithmetic(start, step, count)):
        if _INT_MIN <= step <= _INT_MAX:
            return Column(RANGE, start, step)
    return Column(INTS, data=_to_bytes(array("q", elements)))


def _arithmetic(start: int, step: int, count: int) -> Sequence[int]:
    return range(start, start + step * count, step) if step else [start] * count


def unpack(column: Column, count: int) -> Sequence[Any]:
    """Give back a column's elements: an array, a range or a list."""
    kind = column.kind
    if kind == "d" or kind == "q":
        return to_array(kind, column.data)
    if kind == RANGE:
        return _arithmetic(column.start, column.step, count)
    if kind == NONE:
        return [None] * count
    if kind == BOOLS:
        return list(map(bool, column.data))
    return msgspec.msgpack.decode(column.data, type=list[Any])


def to_array(kind: Literal["d", "q"], data: bytes) -> "array[Any]":
    """Make an array of little-endian bytes."""
    elements: array[Any] = array(kind)
    elements.frombytes(data)
    if _BIG_ENDIAN:
        elements.byteswap()
    return elements


def _to_bytes(elements: "array[Any]") -> bytes:
    if _BIG_ENDIAN:
        elements.byteswap()
    return elements.tobytes()


def _longer(column: Column, count: int, elements: Sequence[Any]) -> Column:
    """Pack what `column` holds followed by `elements`; the common cases without unpacking it."""
    kinds = set(map(type, elements))
    if column.kind == FLOATS and kinds == {float}:
        return Column(FLOATS, data=column.data + _to_bytes(array("d", elements)))
    if column.kind == INTS and kinds == {int}:
        try:
            return Column(INTS, data=column.data + _to_bytes(array("q", elements)))
        except OverflowError:  # beyond int64
            pass
    if column.kind == RANGE and kinds == {int} and count > 1:
        first = column.start + column.step * count
        if list(elements) == list(_arithmetic(first, column.step, len(elements))):
            return column
    if column.kind == NONE and kinds == {type(None)}:
        return column
    return pack([*unpack(column, count), *elements])


class Packer:
    """Packs what metrics of the same log calls share (steps, epochs, times, sequences) once for all of them.

    Columns are known by their identity: keep them alive and unchanged as long as the packer.
    """

    def __init__(self) -> None:
        self._packed: dict[tuple[int, int, int], list[tuple[Column | None, Column]]] = {}

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
        known = self._packed.setdefault((id(elements), start, end), [])
        for before, packed in known:
            if before == old:
                return packed
        part = elements[start:end]
        packed = pack(part) if old is None else _longer(old, have, part)
        known.append((old, packed))
        return packed
