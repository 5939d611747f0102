"""Items, batches and envelopes to bytes and back: the format of the log.

    item      msgpack of [time_ns, event]
    payload   the items of one stream end to end, as they lie in its journal
    batch     u16 length of header | header | u32 CRC-32 of header | payload, packed by the header's codec
    header    msgpack array, see `Header`; its `previous` is the digest of the stream's batch before: a hash chain
    envelope  b"ER" | u8 codec | packed msgpack list of batches, for engines where messages are dear

All integers outside msgpack are big-endian. Readers check the CRC of header and payload, the chain and contiguity.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from eventrun.errors import FormatTooNew, InvalidType, InvalidValue, LogDamaged
from eventrun.events import EVENT_TYPES, Event, MetricsLogged, Scalar

FORMAT_VERSION = 1
RAW, ZLIB = 0, 1  # how a payload is packed
ZLIB_LEVEL = (
    1  # halves noisy metrics at 100 MB/s, without the interpreter's lock; level 6 gains 4 % at a third
)
DIGEST_BYTES = 16
NO_DIGEST = bytes(DIGEST_BYTES)  # what the first batch of a stream has as its previous
ENVELOPE_MAGIC = b"ER"
MAX_PAYLOAD_BYTES = 512 << 20  # of a batch or an envelope, unpacked; one event has at most half of it

Item = tuple[int, Event]

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode  # an item as (time_ns, event); the log call can't afford a function around it
METRICS_TAG = str(MetricsLogged.__struct_config__.tag)
_items = msgspec.msgpack.Decoder(list[Item])
# What decoding any bytes may raise: text that isn't UTF-8, keys that can't be hashed, what is nested too deep.
# Before msgspec 0.20 its own errors are no ValueErrors.
_UNREADABLE = (msgspec.MsgspecError, ValueError, TypeError, RecursionError)
_LAST_SEQUENCE = 2**63 - 1
_MOST_EVENTS = 2**32 - 1  # of a msgpack array
_raw_items = msgspec.msgpack.Decoder(list[tuple[int, list[Any]]])


CLAIM_WRITER = 0  # of a subject's claim stream, appended to by compare-and-set


class Stream(NamedTuple):
    """One subject's events by one writer. Writer 0 is the subject's claim stream, appended to by compare-and-set."""

    subject: str
    writer: int

    def __str__(self) -> str:
        return f"{self.subject}@{self.writer:016x}"


class StoredEvent(NamedTuple):
    """One event as it lies in the log: `position` in the whole log, `sequence` in its stream, both from 1."""

    position: int
    stream: Stream
    sequence: int
    time_ns: int
    event: Event


class Header(Struct, frozen=True, array_like=True, gc=False):
    """`first` is the sequence of the first event, `crc` the CRC-32 of the unpacked payload."""

    version: int
    codec: int
    subject: str
    writer: int
    first: int
    count: int
    first_ns: int
    last_ns: int
    crc: int
    previous: bytes

    @property
    def stream(self) -> Stream:
        """Whose batch this is."""
        return Stream(self.subject, self.writer)

    @property
    def last(self) -> int:
        """The sequence of the last event."""
        return self.first + self.count - 1


_header = msgspec.msgpack.Decoder(Header)


class Batch(Struct, frozen=True, gc=False):
    """A header and the whole batch as bytes, header included."""

    header: Header
    frame: bytes


# items ---------------------------------------------------------------------------------------------------------


def encode_item(time_ns: int, event: Event) -> bytes:
    """Encode one event as it will lie in journal and log."""
    return _encoder.encode((time_ns, event))


def decode_items(payload: bytes, count: int) -> list[Item]:
    """Decode all items of a payload. Raises LogDamaged, or FormatTooNew for an event this version doesn't know."""
    # msgspec refuses items that are merely concatenated; as one array they decode in one go.
    framed = b"".join((b"\xdd", count.to_bytes(4, "big"), payload))
    try:
        return _items.decode(framed)
    except _UNREADABLE:
        return _decode_old_items(framed)


def _decode_old_items(framed: bytes) -> list[Item]:
    try:
        raw = _raw_items.decode(framed)
    except _UNREADABLE as error:
        raise LogDamaged(f"these bytes are not events: {error}") from error
    return [(time_ns, _current(fields)) for time_ns, fields in raw]


def _current(fields: list[Any]) -> Event:
    tag = fields[0] if fields else None
    try:
        while isinstance(tag, str) and tag in UPCASTERS:
            fields = UPCASTERS[tag](fields)
            tag = fields[0]
        if isinstance(tag, str) and tag not in _KNOWN_TAGS:
            raise FormatTooNew(
                f"the log holds events of kind {tag!r}, which this eventrun doesn't know: upgrade eventrun"
            )
        return msgspec.convert(fields, Event)  # type: ignore[arg-type,return-value,no-any-return,unused-ignore]
    except _UNREADABLE as error:  # an upcaster may raise the same
        raise LogDamaged(f"an event of kind {tag!r} is malformed: {error}") from error


def _upcast_single_metric(fields: list[Any]) -> list[Any]:
    # The prototype's log had one event per value: ["m1", name, value, step].
    _, name, value, step = fields
    return ["m", {name: value}, step]


# An old tag and what turns its fields into those of the next newer tag.
UPCASTERS: dict[str, Callable[[list[Any]], list[Any]]] = {"m1": _upcast_single_metric}
_KNOWN_TAGS = frozenset(str(kind.__struct_config__.tag) for kind in EVENT_TYPES)


# batches -------------------------------------------------------------------------------------------------------


def seal(
    stream: Stream, first: int, count: int, payload: bytes, first_ns: int, last_ns: int, previous: bytes,
    *, pack: bool = True,
) -> Batch:  # fmt: skip
    """Make a batch of a payload: packed when that makes it smaller, checked by CRC, chained to `previous`."""
    packed = zlib.compress(payload, ZLIB_LEVEL) if pack else payload
    codec, body = (ZLIB, packed) if len(packed) < len(payload) else (RAW, payload)
    header = Header(
        FORMAT_VERSION, codec, stream.subject, stream.writer, first, count, first_ns, last_ns,
        zlib.crc32(payload), previous,
    )  # fmt: skip
    head = _encoder.encode(header)
    frame = b"".join((len(head).to_bytes(2, "big"), head, zlib.crc32(head).to_bytes(4, "big"), body))
    return Batch(header, frame)


def open_batch(frame: bytes) -> Batch:
    """Read the header of a batch. Raises LogDamaged or FormatTooNew."""
    size = int.from_bytes(frame[:2], "big")
    head = frame[2 : 2 + size]
    if len(frame) < size + 6 or zlib.crc32(head) != int.from_bytes(frame[2 + size : 6 + size], "big"):
        raise LogDamaged("a batch's header fails its checksum")
    try:
        header = _header.decode(head)
    except _UNREADABLE as error:
        _check_version(_version_of(head))
        raise LogDamaged(f"a batch's header is malformed: {error}") from error
    _check_version(header.version)
    whole = 1 <= header.count <= _MOST_EVENTS and header.first >= 1 and header.last <= _LAST_SEQUENCE
    if not whole or header.writer < 0:
        raise LogDamaged(f"a batch's header is malformed: {header}")
    return Batch(header, frame)


def _version_of(head: bytes) -> int:
    try:
        version = msgspec.msgpack.decode(head, type=list[Any])[0]
    except (*_UNREADABLE, IndexError):
        return 0
    return version if isinstance(version, int) else 0


def _check_version(version: int) -> None:
    if version > FORMAT_VERSION:
        raise FormatTooNew(
            f"a batch has format {version}, this eventrun reads up to {FORMAT_VERSION}: upgrade eventrun"
        )


def payload_of(batch: Batch) -> bytes:
    """Unpack a batch's payload and check it. Raises LogDamaged."""
    start = 6 + int.from_bytes(batch.frame[:2], "big")
    payload = _unpack(batch.header.codec, batch.frame[start:])
    if zlib.crc32(payload) != batch.header.crc:
        raise LogDamaged(
            f"{batch.header.stream} {batch.header.first}..{batch.header.last} fails its checksum"
        )
    return payload


def items_of(batch: Batch) -> list[Item]:
    """Decode a batch's events, checked."""
    return decode_items(payload_of(batch), batch.header.count)


def digest(batch: Batch) -> bytes:
    """Hash a batch's header, which holds the CRC of its payload: what the next batch has as `previous`."""
    size = int.from_bytes(batch.frame[:2], "big")
    return blake2b(batch.frame[2 : 2 + size], digest_size=DIGEST_BYTES).digest()


def _unpack(codec: int, body: bytes) -> bytes:
    if codec == RAW:
        return body
    if codec != ZLIB:
        raise FormatTooNew(
            f"a payload is packed by codec {codec}, which this eventrun doesn't know: upgrade eventrun"
        )
    payload, _ = _inflate(body)
    return payload


def _inflate(body: bytes) -> tuple[bytes, bytes]:
    """Unpack, and return what follows too. Bounded: a thousand bytes may claim to be a million."""
    unpacker = zlib.decompressobj()
    try:
        payload = unpacker.decompress(body, MAX_PAYLOAD_BYTES)
    except zlib.error as error:
        raise LogDamaged(f"a payload can't be unpacked: {error}") from error
    if not unpacker.eof:
        what = f"has more than {MAX_PAYLOAD_BYTES:,} bytes" if unpacker.unconsumed_tail else "is cut off"
        raise LogDamaged(f"a payload can't be unpacked: it {what}")
    return payload, unpacker.unused_data


def cut_batch(data: bytes) -> Batch | None:
    """Cut a batch out of bytes that begin with it and go on after it; None if it isn't whole. Raises LogDamaged."""
    batch = open_batch(data)
    start = 6 + int.from_bytes(data[:2], "big")
    body = data[start:]
    if batch.header.codec == ZLIB:
        try:
            payload, rest = _inflate(body)
        except LogDamaged:
            return None
        whole = zlib.crc32(payload) == batch.header.crc
        return Batch(batch.header, data[: len(data) - len(rest)]) if whole else None
    check = 0
    for end in range(1, len(body) + 1):
        check = zlib.crc32(body[end - 1 : end], check)
        if check == batch.header.crc:
            return Batch(batch.header, data[: start + end])
    return None


def encode_envelope(batches: Sequence[Batch], codec: int = RAW) -> bytes:
    """Put several batches, of any streams, in one message."""
    body = _encoder.encode([batch.frame for batch in batches])
    packed = zlib.compress(body, ZLIB_LEVEL) if codec == ZLIB else body
    return b"".join((ENVELOPE_MAGIC, bytes((codec,)), packed))


def decode_envelope(data: bytes) -> list[Batch]:
    """Take an envelope apart. Raises LogDamaged or FormatTooNew."""
    if data[:2] != ENVELOPE_MAGIC or len(data) < 3:
        raise LogDamaged("this is not an envelope of batches")
    try:
        frames = msgspec.msgpack.decode(_unpack(data[2], data[3:]), type=list[bytes])
    except _UNREADABLE as error:
        raise LogDamaged(f"an envelope is malformed: {error}") from error
    return [open_batch(frame) for frame in frames]


class ChainChecker:
    """Check that batches read one after another follow each other in their streams: contiguous and chained."""

    def __init__(self) -> None:
        self._next: dict[Stream, tuple[int, bytes]] = {}

    def check(self, batch: Batch) -> None:
        """Take the next batch in log order. Raises LogDamaged; a stream seen for the first time is taken as it is,
        unless it begins at 1, where its chain must begin too."""
        header = batch.header
        known = self._next.get(header.stream)
        if known is None and header.first == 1:
            known = (1, NO_DIGEST)
        if known is not None and known != (header.first, header.previous):
            expected, _ = known
            what = "the hash chain is broken" if expected == header.first else f"expected sequence {expected}"
            raise LogDamaged(f"{header.stream} {header.first}..{header.last}: {what}")
        self._next[header.stream] = (header.last + 1, digest(batch))


# what can be stored --------------------------------------------------------------------------------------------

_SCALARS = frozenset({float, int, bool, str, type(None)})
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1
T = TypeVar("T")


def metric_values(values: Any) -> dict[str, Scalar]:
    """Make the values of one log call storable: nested mappings flatten with "/", anything with `.item()` is asked.

    Raises InvalidType or InvalidValue naming the key; nothing is recorded then.
    """
    flat: dict[str, Scalar] = {}
    _flatten(values, "", flat, 0)
    return flat


def _flatten(values: Any, prefix: str, flat: dict[str, Scalar], depth: int) -> None:
    if not hasattr(values, "items"):
        raise InvalidType(f"metrics are a mapping of names to values, not {_typename(values)}")
    if depth > 100:
        raise InvalidValue(f"metrics are nested more than 100 deep below {prefix!r}")
    for key, value in values.items():
        if not isinstance(key, str):
            raise InvalidType(f"the metric name {key!r} is {_typename(key)}; names are text")
        name = prefix + key
        if not key:
            raise InvalidValue(
                f"a metric name is empty{f' below {prefix!r}' if prefix else ''}; give it a name"
            )
        if hasattr(value, "items"):
            _flatten(value, name + "/", flat, depth + 1)
        else:
            checked_text(name, "the metric name")
            flat[name] = scalar(value, f"metric {name!r}")


def scalar(value: Any, what: str) -> Scalar:
    """Make one value storable: float, int up to 64 bits, bool, text, None, or anything whose `.item()` is one."""
    if type(value) not in _SCALARS:
        value = _plain_scalar(value, what)
    if type(value) is int and not _INT_MIN <= value <= _INT_MAX:
        raise InvalidValue(f"{what} is an integer of more than 64 bits; log it as float or as text")
    if type(value) is str:
        checked_text(value, what)
    return value  # type: ignore[no-any-return]


def _plain_scalar(value: Any, what: str) -> Any:
    for kind in (bool, int, float, str):  # subclasses: numpy.float64, IntEnum, StrEnum
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    item = getattr(value, "item", None)
    if callable(item):
        try:
            found = item()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidValue(f"{what} is {_typename(value)} of more than one element: {error}") from error
        if type(found) in _SCALARS:
            return found
    raise InvalidType(
        f"{what} is {_typename(value)}; metrics are float, int, bool, str, None or have .item()"
    )


def checked_text(text: str, what: str) -> str:
    """Refuse text that UTF-8 can't hold (lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidValue(
            f"{what} holds a lone surrogate at {error.start}, which is not valid text"
        ) from error
    return text


def plain(value: Any, what: str, _depth: int = 0) -> Any:
    """Make params, metadata and references storable: JSON-like data, bytes, paths (as text), objects with `.item()`.

    Returns a copy; mappings get text keys. Raises InvalidType or InvalidValue naming the place.
    """
    if _depth > 100:
        raise InvalidValue(f"{what} is nested more than 100 deep (or holds itself)")
    if type(value) in _SCALARS:
        return scalar(value, what)
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        ordered: Iterable[Any] = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [plain(element, f"{what}[{i}]", _depth + 1) for i, element in enumerate(ordered)]
    if hasattr(value, "items"):
        return {
            _key(key, what): plain(element, f"{what}/{key}", _depth + 1) for key, element in value.items()
        }
    if hasattr(value, "__fspath__"):
        return checked_text(str(value), what)
    if hasattr(value, "tolist"):  # arrays: numpy, array.array
        return plain(value.tolist(), what, _depth + 1)
    try:
        return scalar(value, what)
    except InvalidType as error:
        raise InvalidType(
            f"{what} is {_typename(value)}; it can't be stored: pass text, numbers, lists, mappings"
        ) from error


def _key(key: Any, what: str) -> str:
    if isinstance(key, str):
        return checked_text(key, f"a key of {what}")
    if isinstance(key, (int, float, bool)):
        return str(key)
    raise InvalidType(f"{what} has the key {key!r} of type {_typename(key)}; keys are text")


def _typename(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


# JSON ----------------------------------------------------------------------------------------------------------

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def to_json(value: Any) -> Any:
    """Make plain data that JSON can hold without loss: {"$f": "nan"} for non-finite numbers, {"$b": base64} for bytes.

    A mapping that looks like one of these is wrapped in {"$d": mapping}. Structs become mappings with their tag.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$f": str(value)}
    if isinstance(value, dict):
        changed = {key: to_json(element) for key, element in value.items()}
        return {"$d": changed} if len(value) == 1 and next(iter(value)) in ("$f", "$b", "$d") else changed
    if isinstance(value, (list, tuple)):
        return [to_json(element) for element in value]
    if isinstance(value, bytes):
        return {"$b": base64.b64encode(value).decode()}
    if isinstance(value, Struct):
        return to_json({name: getattr(value, name) for name in value.__struct_fields__})
    return value


def from_json(value: Any) -> Any:
    """Undo `to_json`, except for Structs, which stay mappings. Raises InvalidValue."""
    if isinstance(value, list):
        return [from_json(element) for element in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, inner),) = value.items()
        if key == "$f" and isinstance(inner, str) and inner in _NON_FINITE:
            return _NON_FINITE[inner]
        if key == "$b" and isinstance(inner, str):
            try:
                return base64.b64decode(inner, validate=True)
            except ValueError as error:
                raise InvalidValue(f"{inner[:40]!r} is not base64: {error}") from error
        if key == "$d" and isinstance(inner, dict):
            return {name: from_json(element) for name, element in inner.items()}
    return {name: from_json(element) for name, element in value.items()}


def event_to_json(event: Event) -> dict[str, Any]:
    """Show an event as a mapping: {"kind": "MetricsLogged", ...fields}."""
    fields = {name: to_json(getattr(event, name)) for name in event.__struct_fields__}
    return {"kind": type(event).__name__, **fields}


def event_from_json(mapping: dict[str, Any]) -> Event:
    """Undo `event_to_json`. Raises InvalidValue."""
    fields = dict(mapping)
    name = fields.pop("kind", None)
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise InvalidValue(
            f"{mapping.get('kind')!r} is not a kind of event; kinds are {', '.join(sorted(_KINDS))}. "
            "If a newer eventrun wrote it: upgrade eventrun"
        )
    unknown = fields.keys() - set(kind.__struct_fields__)
    if unknown:
        raise InvalidValue(
            f"{kind.__name__} has no field {min(unknown)!r}; if a newer eventrun wrote it: upgrade eventrun"
        )
    try:
        made = kind(**{name: from_json(field) for name, field in fields.items()})
        return msgspec.msgpack.decode(_encoder.encode(made), type=kind)  # type: ignore[return-value,unused-ignore]
    except (*_UNREADABLE, OverflowError) as error:
        raise InvalidValue(f"{kind.__name__}: {error}") from error


_KINDS = {kind.__name__: kind for kind in EVENT_TYPES}
