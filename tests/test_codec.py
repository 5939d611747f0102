"""The format of the log: what goes in comes out, and what is not of this format is told apart."""

import json
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eventrun import codec
from eventrun.codec import (
    ENVELOPE_MAGIC,
    FORMAT_VERSION,
    NO_DIGEST,
    RAW,
    ZLIB,
    Batch,
    ChainChecker,
    Header,
    Item,
    Stream,
    cut_batch,
    decode_envelope,
    decode_items,
    digest,
    encode_envelope,
    encode_item,
    event_from_json,
    event_to_json,
    from_json,
    items_of,
    metric_values,
    open_batch,
    payload_of,
    plain,
    seal,
    to_json,
)
from eventrun.errors import FormatTooNew, InvalidType, InvalidValue, LogDamaged, StoreError
from eventrun.events import EVENT_TYPES, Event, MetricsLogged, NoteAdded, ParamsSet, TrialStarted
from eventrun.testing import batches, chain, events, items, plain_values, scalars

STREAM = Stream("t/a", 2**64 - 1)


def same(left: Any, right: Any) -> bool:
    """Compare with NaN equal to itself, and 1, 1.0 and True told apart; by representation, which shows all that."""
    return repr(left) == repr(right)


def framed(header: object, body: bytes = b"") -> bytes:
    """Make a frame whose checksum fits, whatever its header says."""
    head = msgspec.msgpack.encode(header)
    return struct.pack(">H", len(head)) + head + struct.pack(">I", zlib.crc32(head)) + body


# items


@pytest.mark.parametrize("kind", EVENT_TYPES, ids=lambda kind: kind.__name__)
def test_every_kind_of_event_comes_back(kind: type[Event]) -> None:
    """Every field of every kind comes back as it was: NaN, infinite, 64-bit integers, bytes, any text."""

    @given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), events(kind)), max_size=4))
    def comes_back(some: list[Item]) -> None:
        payload = b"".join(encode_item(*item) for item in some)
        assert same(decode_items(payload, len(some)), some)

    comes_back()


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -0.0, 5e-324, 2**64 - 1, -(2**63), True, 1, 1.0, "", None]
)
def test_values_come_back_bit_for_bit(value: Any) -> None:
    ((_, event),) = decode_items(encode_item(0, MetricsLogged({"x": value})), 1)
    assert isinstance(event, MetricsLogged)
    assert type(event.values["x"]) is type(value)
    assert same(event.values["x"], value)


def test_defaults_are_filled_in() -> None:
    """An event written before a field existed has that field's default."""
    assert decode_items(msgspec.msgpack.encode((1, ["m", {"a": 1.0}])), 1) == [(1, MetricsLogged({"a": 1.0}))]


def test_an_old_kind_of_event_is_read_as_todays() -> None:
    """The prototype's one value per event becomes a MetricsLogged, also between events of today."""
    payload = encode_item(1, TrialStarted()) + msgspec.msgpack.encode((2, ["m1", "loss", 0.5, 7]))
    assert decode_items(payload, 2) == [(1, TrialStarted()), (2, MetricsLogged({"loss": 0.5}, step=7))]


def test_upcasters_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old tag is turned into the next newer one, until it is a tag of today."""
    monkeypatch.setitem(codec.UPCASTERS, "m0", lambda fields: ["m1", fields[1], fields[2], None])
    payload = msgspec.msgpack.encode((2, ["m0", "loss", 0.5]))
    assert decode_items(payload, 1) == [(2, MetricsLogged({"loss": 0.5}))]


def test_an_unknown_kind_of_event_is_of_a_newer_eventrun() -> None:
    with pytest.raises(FormatTooNew, match=r"'zz'.*upgrade eventrun"):
        decode_items(msgspec.msgpack.encode((1, ["zz", 1])), 1)


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [1],
        [None],
        [["m"]],
        [{"m": 1}],
        ["m"],
        ["m", 1],
        ["m", {"a": []}],
        ["m1"],
        ["m1", [], 1, 2],
        ["m1", {}, 1, 2],
        "m",
    ],
)
def test_malformed_events(fields: object) -> None:
    with pytest.raises(LogDamaged):
        decode_items(msgspec.msgpack.encode((1, fields)), 1)


@pytest.mark.parametrize("count", [0, 2, 2**32 - 1])
def test_a_wrong_count(count: int) -> None:
    with pytest.raises(LogDamaged):
        decode_items(encode_item(1, TrialStarted()), count)


# batches


@given(st.lists(items(), min_size=1, max_size=30))
def test_a_batch_comes_back(some: list[Item]) -> None:
    """A batch is opened as it was sealed, packed when that makes it smaller, and its events come back."""
    (batch,) = chain(STREAM, [some])
    opened = open_batch(batch.frame)
    assert opened == batch
    assert (opened.header.stream, opened.header.first, opened.header.last) == (STREAM, 1, len(some))
    assert same(items_of(opened), some)
    payload = payload_of(opened)
    assert opened.header.codec == (ZLIB if len(zlib.compress(payload, 1)) < len(payload) else RAW)


def test_a_batch_may_be_left_unpacked() -> None:
    payload = encode_item(1, ParamsSet({"x": "a" * 1000}))
    batch = seal(STREAM, 1, 1, payload, 1, 1, NO_DIGEST, pack=False)
    assert batch.header.codec == RAW
    assert payload_of(open_batch(batch.frame)) == payload


@given(batches(1), st.data())
def test_a_flipped_bit_is_noticed(some: list[Batch], data: st.DataObject) -> None:
    """A flipped bit anywhere in a frame is noticed, or changes nothing that the frame says."""
    (batch,) = some
    bit = data.draw(st.integers(0, 8 * len(batch.frame) - 1))
    frame = bytearray(batch.frame)
    frame[bit // 8] ^= 1 << bit % 8
    try:
        opened = open_batch(bytes(frame))
        found = payload_of(opened)
    except StoreError:
        return
    # the last bits of a compressed payload mean nothing
    assert bit >= 8 * (len(frame) - 6)
    assert (opened.header, found) == (batch.header, payload_of(batch))


@given(batches(1), st.data())
def test_a_truncated_frame_is_noticed(some: list[Batch], data: st.DataObject) -> None:
    (batch,) = some
    with pytest.raises(LogDamaged):
        payload_of(open_batch(batch.frame[: data.draw(st.integers(0, len(batch.frame) - 1))]))


def header_with(**changes: object) -> list[object]:
    fields = {
        "version": 1, "codec": RAW, "subject": "t/a", "writer": 1, "first": 1, "count": 1, "first_ns": 0, "last_ns": 0,
        "crc": 0, "previous": NO_DIGEST,
    }  # fmt: skip
    assert tuple(fields) == Header.__struct_fields__
    return list((fields | changes).values())


def test_a_newer_format_is_told_from_damage() -> None:
    """A newer header may have other fields; its first one is its version for ever."""
    for header in (header_with(version=2), [FORMAT_VERSION + 1], [99, {}, "other"], [2**64 - 1]):
        with pytest.raises(FormatTooNew, match="upgrade eventrun"):
            open_batch(framed(header))
    with pytest.raises(FormatTooNew, match="codec 7"):
        payload_of(open_batch(framed(header_with(codec=7))))


@pytest.mark.parametrize(
    "header",
    [
        None, [], {}, "x", [1], ["1"], [[]], [-1],
        header_with(first=0), header_with(first=-1), header_with(count=0), header_with(count=-1),
        header_with(writer=-1), header_with(first=2**63), header_with(count=2**63), header_with(subject=1),
        header_with(previous="x"),
    ],
    ids=repr,
)  # fmt: skip
def test_malformed_headers(header: object) -> None:
    """A header may be nonsense though its checksum fits."""
    with pytest.raises(LogDamaged):
        open_batch(framed(header))


def test_zeros_are_no_batch() -> None:
    """The checksum of nothing is zero: a block of zeros, which a full disk may leave, is no batch all the same."""
    with pytest.raises(LogDamaged):
        open_batch(bytes(100))


# envelopes


@given(st.lists(batches(2), max_size=3), st.sampled_from([RAW, ZLIB]))
def test_an_envelope_comes_back(lists: list[list[Batch]], packing: int) -> None:
    """An envelope gives back its batches, of any streams, in order."""
    some = [batch for each in lists for batch in each]
    assert decode_envelope(encode_envelope(some, packing)) == some


def test_an_envelope_of_a_newer_eventrun() -> None:
    with pytest.raises(FormatTooNew):
        decode_envelope(ENVELOPE_MAGIC + b"\x09abc")


# decoders given anything: an error of ours or a value, never another exception

# msgpack's own beginnings, so that more than the first byte is looked at
_LIKELY = st.sampled_from(
    [
        b"\x91",
        b"\x92",
        b"\x01",
        b"\xa1m",
        b"\xa2m1",
        b"\x81\xa1a",
        b"\xcb",
        b"\xdd",
        b"\xdf\xff\xff\xff\xff",
        b"\xc0",
        b"\xd6\xff",
    ]
)
ANYTHING = st.binary(max_size=60) | st.lists(_LIKELY | st.binary(max_size=3), max_size=20).map(b"".join)
DEEP = b"\x91" * 100_000


@given(ANYTHING, st.integers(0, 2**32 - 1) | st.integers(0, 3))
@example(DEEP, 1)
@example(b"\x92\x01" + DEEP, 1)
@example(b"", 2**32 - 1)
@example(b"\x92\x01\x92\xa1m\x81\x81\xc0\xc0\xc0", 1)
def test_any_bytes_as_items(data: bytes, count: int) -> None:
    try:
        assert len(decode_items(data, count)) == count
    except StoreError:
        pass


@given(ANYTHING)
@example(framed(None))
@example(b"\0\1\xc1" + struct.pack(">I", zlib.crc32(b"\xc1")))
@example(struct.pack(">H", 60_000) + DEEP[:60_000] + struct.pack(">I", zlib.crc32(DEEP[:60_000])))
def test_any_bytes_as_a_batch(data: bytes) -> None:
    for frame in (
        data,
        struct.pack(">H", len(data)) + data + struct.pack(">I", zlib.crc32(data)),
        framed(header_with(), data),
    ):
        try:
            items_of(open_batch(frame))
        except StoreError:
            pass


@given(ANYTHING, st.integers(0, 2))
@example(DEEP, RAW)
@example(zlib.compress(DEEP), ZLIB)
@example(msgspec.msgpack.encode([bytes(20)]), RAW)
def test_any_bytes_as_an_envelope(data: bytes, packing: int) -> None:
    for envelope in (data, ENVELOPE_MAGIC + data, ENVELOPE_MAGIC + bytes((packing,)) + data):
        try:
            decode_envelope(envelope)
        except StoreError:
            pass


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["$f", "$b", "$d", "a"]), inner),
    max_leaves=6,
)  # fmt: skip
_FIELDS = sorted({field for kind in EVENT_TYPES for field in kind.__struct_fields__})
_KINDS = [kind.__name__ for kind in EVENT_TYPES]


@given(st.sampled_from(_KINDS) | _JSON, st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=4))
@example("MetricsLogged", {"values": {"a": 2**70}})
@example("MetricsLogged", {"values": {"a": "\ud800"}})
@example("ParamsSet", {"params": {"a": {"$b": "é"}}})
@example([], {})
def test_any_mapping_as_an_event(kind: Any, fields: dict[str, Any]) -> None:
    try:
        event_from_json({"kind": kind, **fields})
    except InvalidValue:
        pass


def test_json_that_is_nested_too_deep() -> None:
    value: Any = 1
    for _ in range(5000):
        value = [value]
    with pytest.raises(InvalidValue):
        event_from_json({"kind": "ParamsSet", "params": {"a": value}})


# chain


@given(batches(3), batches(3))
def test_a_whole_chain_is_accepted(one: list[Batch], other: list[Batch]) -> None:
    """Batches that follow each other in their streams pass, however the streams are mixed."""
    checker = ChainChecker()
    different = {batch.header.stream for batch in one} != {batch.header.stream for batch in other}
    for left, right in zip(one, other, strict=False):
        checker.check(left)
        if different:
            checker.check(right)


def test_what_breaks_a_chain() -> None:
    first, second, third = chain(STREAM, [[(n, MetricsLogged({"n": n}))] for n in range(3)])
    cases: list[tuple[list[Batch], str]] = [
        ([first, third], "expected sequence 2"),
        ([first, first], "expected sequence 2"),
        ([first, second, second], "expected sequence 3"),
        ([first, seal(STREAM, 2, 1, b"x", 0, 0, NO_DIGEST)], "hash chain is broken"),
        ([seal(STREAM, 1, 1, b"x", 0, 0, digest(first))], "hash chain is broken"),
    ]
    for some, message in cases:
        checker = ChainChecker()
        for batch in some[:-1]:
            checker.check(batch)
        with pytest.raises(LogDamaged, match=message):
            checker.check(some[-1])


def test_a_chain_may_be_entered_in_its_middle() -> None:
    """Who reads from a position on takes each stream as it comes, and checks it from there."""
    _, second, third = chain(STREAM, [[(n, MetricsLogged({"n": n}))] for n in range(3)])
    checker = ChainChecker()
    checker.check(second)
    checker.check(third)
    with pytest.raises(LogDamaged):
        checker.check(second)


# JSON


@given(plain_values())
@example({"$f": "nan"})
@example({"$d": {"$b": b""}})
@example({"$f": 1})
def test_json_loses_nothing(value: Any) -> None:
    """What is stored comes back from JSON, which has neither NaN nor bytes."""
    text = json.dumps(to_json(value), allow_nan=False)
    assert same(from_json(json.loads(text)), value)


@given(events())
def test_events_come_back_from_json(event: Event) -> None:
    text = json.dumps(event_to_json(event), allow_nan=False)
    assert same(event_from_json(json.loads(text)), event)


def test_json_as_it_is_written() -> None:
    event = MetricsLogged({"a": math.nan, "b": -math.inf, "c": 1}, step=3)
    assert event_to_json(event) == {
        "kind": "MetricsLogged",
        "values": {"a": {"$f": "nan"}, "b": {"$f": "-inf"}, "c": 1},
        "step": 3, "epoch": None, "subset": None, "aggregator": None, "late": False, "key": None,
    }  # fmt: skip
    assert to_json({"x": b"\0\xff"}) == {"x": {"$b": "AP8="}}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "is not a kind of event"),
        ({"kind": "Nonsense"}, "'Nonsense' is not a kind of event"),
        ({"kind": "NoteAdded", "text": "x", "colour": 1}, "NoteAdded has no field 'colour'"),
        ({"kind": "NoteAdded"}, "NoteAdded: .*text"),
        ({"kind": "NoteAdded", "text": 1}, "NoteAdded: .*str"),
        ({"kind": "MetadataSet", "metadata": {"a": {"$b": "?"}}}, "is not base64"),
    ],
)
def test_json_that_is_no_event(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        event_from_json(mapping)


# what can be stored


class Tensor:
    def __init__(self, *values: float) -> None:
        self.values = values

    def item(self) -> float:
        if len(self.values) != 1:
            raise ValueError("only one element tensors can be converted")
        return self.values[0]


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=5), scalars()
    )
)
def test_scalars_are_kept_as_they_are(values: dict[str, Any]) -> None:
    kept = metric_values(values)
    assert same(kept, values)
    ((_, event),) = decode_items(encode_item(0, MetricsLogged(kept)), 1)
    assert same(event, MetricsLogged(values))


def test_nested_metrics_flatten() -> None:
    assert metric_values({"train": {"loss": Tensor(0.5), "b": {"c": 1}}, "x": True}) == {
        "train/loss": 0.5,
        "train/b/c": 1,
        "x": True,
    }


def raises(error: type[Exception], function: Callable[[], object], *words: str) -> None:
    with pytest.raises(error) as caught:
        function()
    for word in words:
        assert word in str(caught.value)


def test_refused_metrics_name_their_key() -> None:
    """What can't be stored is refused with the key that holds it."""
    too_large = 2**64
    endless: dict[str, Any] = {}
    endless["a"] = endless
    raises(InvalidType, lambda: metric_values({"a": {"b": object()}}), "'a/b'", "object")
    raises(InvalidType, lambda: metric_values({"list": [1, 2]}), "'list'")
    raises(InvalidType, lambda: metric_values({"a": {1: 2.0}}), "1", "names are text")
    raises(InvalidType, lambda: metric_values([("a", 1)]), "list")
    raises(InvalidType, lambda: metric_values({"c": 1j}), "'c'")
    raises(InvalidValue, lambda: metric_values({"big": too_large}), "'big'", "64 bits")
    raises(InvalidValue, lambda: metric_values({"low": -(2**63) - 1}), "'low'")
    raises(InvalidValue, lambda: metric_values({"t": Tensor(1, 2)}), "'t'", "more than one element")
    raises(InvalidValue, lambda: metric_values({"s": "\ud800"}), "'s'", "surrogate")
    raises(InvalidValue, lambda: metric_values({"\ud800": 1.0}), "surrogate")
    raises(InvalidValue, lambda: metric_values({"a": {"": 1.0}}), "'a/'", "empty")
    raises(InvalidValue, lambda: metric_values(endless), "nested more than 100 deep")


def test_plain_makes_copies() -> None:
    """Params and metadata are copied, with text keys, paths as text, sets in order and tensors as numbers."""
    made = plain(
        {"a": (1, {2}), 3: PurePosixPath("/x"), "t": Tensor(0.5), "b": bytearray(b"x"), "n": None}, "params"
    )
    assert made == {"a": [1, [2]], "3": "/x", "t": 0.5, "b": b"x", "n": None}
    inner = [1]
    assert plain({"a": inner}, "params")["a"] is not inner


@given(plain_values())
def test_plain_keeps_what_is_plain(value: Any) -> None:
    assert same(plain(value, "x"), value)


def test_refused_params_name_their_place() -> None:
    too_large = 2**64
    endless: list[Any] = []
    endless.append(endless)
    raises(InvalidType, lambda: plain({"a": [1, object()]}, "params"), "params/a[1]", "object")
    raises(InvalidType, lambda: plain({"a": {(1, 2): 3}}, "params"), "params/a", "(1, 2)")
    raises(InvalidValue, lambda: plain({"a": {"b": too_large}}, "params"), "params/a/b")
    raises(InvalidValue, lambda: plain({"a": "\ud800"}, "params"), "params/a")
    raises(InvalidValue, lambda: plain({"\ud800": 1}, "params"), "params")
    raises(InvalidValue, lambda: plain(endless, "params"), "params[0]", "nested")


def test_unpacking_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes that claim to be very many are refused before they are unpacked; what is cut off is, too."""
    payload = b"".join(encode_item(n, NoteAdded("x" * 100)) for n in range(100))
    batch = seal(STREAM, 1, 100, payload, 0, 99, NO_DIGEST)
    assert batch.header.codec == codec.ZLIB
    with pytest.raises(LogDamaged, match="cut off"):
        payload_of(Batch(batch.header, batch.frame[:-3]))
    monkeypatch.setattr(codec, "MAX_PAYLOAD_BYTES", len(payload))
    assert payload_of(batch) == payload
    monkeypatch.setattr(codec, "MAX_PAYLOAD_BYTES", len(payload) - 1)
    with pytest.raises(LogDamaged, match=f"more than {len(payload) - 1:,} bytes"):
        payload_of(batch)
    envelope = encode_envelope([batch] * 100, codec.ZLIB)
    with pytest.raises(LogDamaged, match="more than"):
        decode_envelope(envelope)


@given(st.binary(max_size=50))
def test_a_batch_is_cut_out_of_what_follows_it(rest: bytes) -> None:
    """Packed or not, it ends where its payload's checksum says, and one that isn't whole is none."""
    payload = b"".join(encode_item(n, NoteAdded("x" * n)) for n in range(1, 20))
    for pack in (True, False):
        batch = seal(STREAM, 1, 19, payload, 0, 99, NO_DIGEST, pack=pack)
        assert cut_batch(batch.frame + rest) == batch
        assert cut_batch(batch.frame[:-1]) is None
        assert cut_batch(batch.frame[:-1] + bytes([batch.frame[-1] ^ 1])) is None
