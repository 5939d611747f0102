"""15. Every decoder, given what is no more than nearly right: an error of ours or a value, never a hang or another.

What is given is valid input with bytes flipped, cut out, put in and doubled, so that the decoder gets past the first
check; `tests/test_codec.py` has those of any bytes at all.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import eventrun
from eventrun import config
from eventrun.cli.opening import moment
from eventrun.codec import (
    NO_DIGEST,
    RAW,
    ZLIB,
    Stream,
    decode_envelope,
    decode_items,
    encode_envelope,
    encode_item,
    from_json,
    items_of,
    open_batch,
    seal,
)
from eventrun.errors import EventrunError, InvalidValue, LogDamaged
from eventrun.events import MetricsLogged, ParamsSet
from eventrun.formats.events_jsonl import import_events
from eventrun.journal import dead_writers, recover, segments_in
from eventrun.journal.scan import count_items
from eventrun.journal.segments import LOCK_NAME
from eventrun.locks import owner
from eventrun.projections import Points, TrialFold, fold
from eventrun.projections.rows import Slice
from eventrun.projector import series
from eventrun.projector.catchup import decode_fold
from eventrun.query.past import cut_at
from eventrun.stores.sqlite.mark import Mark
from eventrun.testing import batches, items
from tests.crash.harness import Table, Tally, rounds
from tests.crash.test_formats import GOLDEN_JOURNAL_V1, little_endian
from tests.test_codec import framed
from tests.test_golden import EXPECTED_V1

EXAMPLES = rounds(40, 20_000)
fuzzing = settings(
    max_examples=EXAMPLES, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip

THOUSANDTHS = st.integers(0, 1000)
ODD = [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\x81\xc0", b"[" * 50, b"\0" * 9, b"9" * 30]
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), THOUSANDTHS, st.integers(1, 255)),
        st.tuples(st.just("cut"), THOUSANDTHS, st.integers(1, 40)),
        st.tuples(st.just("double"), THOUSANDTHS, st.integers(1, 40)),
        st.tuples(st.just("put"), THOUSANDTHS, st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("put"), THOUSANDTHS, st.sampled_from(ODD)),
        st.tuples(st.just("end"), THOUSANDTHS, st.none()),
    ),
    min_size=1, max_size=4,
)  # fmt: skip
DEEP = 50_000


def changed(data: bytes, changes: list[tuple[str, int, Any]]) -> bytes:
    """Flip, cut out, double and put in bytes."""
    for what, thousandths, how in changes:
        at = len(data) * thousandths // 1000
        if what == "flip" and at < len(data):
            data = data[:at] + bytes((data[at] ^ how,)) + data[at + 1 :]
        elif what == "cut":
            data = data[:at] + data[at + how :]
        elif what == "double":
            data = data[: at + how] + data[at:]
        elif what == "put":
            data = data[:at] + how + data[at:]
        elif what == "end":
            data = data[:at]
    return data


def ours(decode: Callable[[], object], *errors: type[Exception]) -> None:
    """Run a decoder; errors of ours are an answer."""
    allowed: tuple[type[Exception], ...] = (EventrunError, *errors)
    try:
        decode()
    except allowed:
        pass


@pytest.fixture(autouse=True)
def counted(request: pytest.FixtureRequest, table: Table) -> Iterator[None]:
    yield
    name = request.node.name
    if "caught" not in name:
        table.add(15, name.removeprefix("test_").replace("_", " "), EXAMPLES, Tally())


# the log -------------------------------------------------------------------------------------------------------


@pytest.mark.crash
@fuzzing
@given(st.lists(items(), min_size=1, max_size=5), CHANGES, st.integers(0, 6))
def test_items(some: list[Any], changes: list[Any], count: int) -> None:
    payload = changed(b"".join(encode_item(*item) for item in some), changes)
    ours(lambda: decode_items(payload, count))
    count_items(payload, 0, len(payload))


@pytest.mark.crash
@fuzzing
@given(batches(2), CHANGES, st.sampled_from(["frame", "header", "payload"]), st.sampled_from([RAW, ZLIB]))
def test_batches_and_envelopes(some: list[Any], changes: list[Any], what: str, codec: int) -> None:
    """Also with checksums that are right for what was changed."""
    frame = some[0].frame
    size = int.from_bytes(frame[:2], "big")
    head, body = frame[2 : 2 + size], frame[6 + size :]
    if what == "frame":
        frame = changed(frame, changes)
    elif what == "header":
        head = changed(head, changes)[:60_000]
        frame = len(head).to_bytes(2, "big") + head + zlib.crc32(head).to_bytes(4, "big") + body
    else:
        fields = msgspec.msgpack.decode(head)
        body = changed(body, changes)
        fields[1], fields[8] = RAW, zlib.crc32(body)
        frame = framed(fields, body)
    ours(lambda: items_of(open_batch(frame)))
    envelope = encode_envelope(some, codec)
    ours(lambda: decode_envelope(envelope[:3] + changed(envelope[3:], changes)))
    ours(lambda: decode_envelope(changed(envelope, changes)))


@pytest.mark.crash
def test_what_unpacks_to_very_much() -> None:
    """A batch or an envelope of a few kilobytes that claims to hold gigabytes is refused, before it takes memory."""
    bomb = zlib.compress(bytes(64 << 20), 9)
    header = [1, ZLIB, "t/a", 1, 1, 1, 0, 0, zlib.crc32(bytes(64 << 20)), NO_DIGEST]
    frame, envelope = framed(header, bomb), b"ER\x01" + bomb
    with mock.patch("eventrun.codec.MAX_PAYLOAD_BYTES", 1 << 20):
        tracemalloc.start()
        for decode in (lambda: items_of(open_batch(frame)), lambda: decode_envelope(envelope)):
            with pytest.raises(LogDamaged):
                decode()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 8 << 20
    count = [1, RAW, "t/a", 1, 1, 2**62, 0, 0, zlib.crc32(b"\x90"), NO_DIGEST]
    ours(lambda: items_of(open_batch(framed(count, b"\x90"))))


@pytest.mark.crash
@fuzzing
@given(st.binary(max_size=60) | CHANGES)
def test_the_mark(tmp_path: Path, data: Any) -> None:
    file = tmp_path / "log.mark"
    file.unlink(missing_ok=True)
    mark = Mark(file)
    mark.write(7)
    mark.close()
    file.write_bytes(data if isinstance(data, bytes) else changed(file.read_bytes(), data))
    assert mark.read() >= 0
    mark.write(9)
    mark.close()
    assert mark.read() >= 9


# journals ------------------------------------------------------------------------------------------------------


@little_endian
@pytest.mark.crash
@fuzzing
@given(CHANGES, st.integers(0, 2), st.integers(1, 2), st.booleans())
def test_journals(tmp_path: Path, changes: list[Any], file: int, writer: int, torn: bool) -> None:
    """A segment's slots, headers, marks and items: what is given out was written, or is refused."""
    folder = tmp_path / "journal"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(GOLDEN_JOURNAL_V1 / "journals" / f"{writer:016x}", folder)
    whole = b"".join(path.read_bytes() for path in sorted(folder.glob("*.arena")))
    arena = sorted(folder.glob("*.arena"))[file]
    arena.write_bytes(changed(arena.read_bytes(), changes))

    def scan() -> None:
        streams, _ = segments_in(folder, torn=torn)
        for segments in streams.values():
            for segment in segments:
                found = recover(segment, b"", 0, torn=torn)
                assert found.payload in whole
                decode_items(found.payload, found.events)

    ours(scan)


@pytest.mark.crash
@fuzzing
@given(CHANGES | st.binary(max_size=200))
@example(b"[" * 4096)
@example(b'{"host": ' * 400)
@example(b'{"host": 1, "boot": [], "pid": {}}')
@example(b"\xff\xfe")
@example(b"9" * 4096)
def test_lock_files(tmp_path: Path, data: Any) -> None:
    """Whatever stands in a lock file, looking for dead writers goes on."""
    folder = tmp_path / "journals" / "0123456789abcdef"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(owner()).encode()
    (folder / LOCK_NAME).write_bytes(data if isinstance(data, bytes) else changed(text, data))

    for _, descriptor in dead_writers(tmp_path / "journals"):
        os.close(descriptor)


# import --------------------------------------------------------------------------------------------------------

LINES = [
    json.dumps(
        {"subject": "t/a", "writer": "0" * 15 + "1", "sequence": n + 1, "time_ns": n, "event": event}
    ).encode()
    for n, event in enumerate(
        [
            {"kind": "MetricsLogged", "values": {"a": 1.5, "b": {"$f": "nan"}}, "step": 3},
            {"kind": "ParamsSet", "params": {"raw": {"$b": "AP8="}, "list": [1, {"x": None}]}},
            {"kind": "TagsAdded", "tags": {"x": None}},
        ]
    )
]


@pytest.fixture(scope="module")
def target() -> Iterator[eventrun.Client]:
    with eventrun.open("memory:", quiet=True) as client:
        yield client


@pytest.mark.crash
@fuzzing
@given(CHANGES, st.integers(0, len(LINES)))
@example([("put", 0, b"[" * DEEP)], 0)
@example([("put", 990, b"[" * DEEP)], 1)
@example([("put", 0, b"\xff\xfe\0")], 0)
def test_imported_lines(target: eventrun.Client, changes: list[Any], at: int) -> None:
    data = changed(b"\n".join(LINES), changes)
    ours(lambda: import_events(target, io.BytesIO(data)))
    ours(lambda: from_json(json.loads(changed(LINES[1], changes))), ValueError, RecursionError)


# views ---------------------------------------------------------------------------------------------------------


def chunk_of(values: list[Any]) -> bytes:
    nothing: list[Any] = [None] * len(values)
    count = list(range(len(values)))
    points = Points(values, nothing, nothing, count, count)
    [chunk] = series.Packer().extend(None, points)
    return series.encode_chunk(chunk)


CHUNKS = [chunk_of(values) for values in ([0.5] * 9, [1, 5, 2], [True], ["x", None, 2**64 - 1], [7, 8, 9])]
FOLD = TrialFold.new("a")
fold(FOLD, [Slice(1, Stream("t/a", 1), 1, [item for _, _, some in EXPECTED_V1[2:5] for item in some])])


@pytest.mark.crash
@fuzzing
@given(CHANGES, st.sampled_from(CHUNKS), st.booleans())
def test_chunks_of_series(changes: list[Any], chunk: bytes, right: bool) -> None:
    """Also with a checksum that is right for what was changed."""
    data = changed(chunk[:-4], changes)

    def read() -> None:
        found = series.decode_chunk(series.with_crc(data) if right else data)
        for column in (found.values, found.steps, found.epochs, found.times_ns, found.sequences):
            assert len(series.unpack(column, found.count)) == found.count

    ours(read, series.DamagedView)


@pytest.mark.crash
@fuzzing
@given(CHANGES, st.booleans())
def test_folds_of_trials(changes: list[Any], right: bool) -> None:
    data = changed(FOLD.encode(), changes)
    ours(lambda: decode_fold("a", series.with_crc(data) if right else data), series.DamagedView)


# what people write ---------------------------------------------------------------------------------------------

SETTINGS = b"""
url: runs  # where
linger_ms: 20.5
close_timeout_s: 1e1
quiet: no
"""


@pytest.mark.crash
@fuzzing
@given(CHANGES | st.binary(max_size=40))
@example(b"[" * 3000)
@example(b"url: 2001-99-99")
@example(b"? [a]\n: b")
@example(b"&a [*a]")
@example(b"linger_ms: 1" + b"0" * 5000)
@example(b"linger_ms: .nan")
@example(b"url: \xff")
@example(b"url: !!python/object:os.system x")
@example(b"a: " + b"{a: " * 1000)
def test_settings_files(tmp_path: Path, data: Any) -> None:
    file = tmp_path / "eventrun.yaml"
    file.write_bytes(data if isinstance(data, bytes) else changed(SETTINGS, data))
    try:
        config.load_settings({"EVENTRUN_CONFIG": str(file)})
    except InvalidValue:
        pass


VARIABLES = [f"EVENTRUN_{name}" for name in ("URL", "LINGER_MS", "CLOSE_TIMEOUT_S", "QUIET", "CONFIG")]
VALUES = ["1e999", "nan", "-1", "9" * 400, "9" * 5000, "/", "/dev/null", "\0", "~", "\udcff"]


@pytest.mark.crash
@fuzzing
@given(st.dictionaries(st.sampled_from(VARIABLES), st.text(max_size=30) | st.sampled_from(VALUES)))
def test_environment(environ: dict[str, str]) -> None:
    try:
        config.load_settings(environ)
    except InvalidValue:
        pass


TIMES = st.text(max_size=30) | CHANGES.map(
    lambda changes: changed(b"2025-11-21T12:30:00.123456+01:00", changes).decode("latin-1")
)


@pytest.mark.crash
@fuzzing
@given(TIMES | st.integers(-(2**80), 2**80).map(str))
@example("0001-01-01T00:00:00+23:59")
@example("9999-12-31T23:59:59-23:59")
@example("9" * 5000)
@example("²")
def test_moments(text: str) -> None:
    """A time or a position on the command line, and in `at`."""
    ours(lambda: moment(text))
    ours(lambda: cut_at(None, text))
    if text.lstrip("-").isdecimal() and len(text) < 100:
        ours(lambda: cut_at(None, int(text)))


# broken on purpose ---------------------------------------------------------------------------------------------


@pytest.mark.crash
def test_a_decoder_without_its_check_is_caught(table: Table) -> None:
    """The tests above can fail: where an error of msgspec isn't made one of ours, changed bytes show it."""
    payload = encode_item(1, ParamsSet({"a": MetricsLogged({"x": 1.0}).values}))
    batch = seal(Stream("t/a", 1), 1, 1, payload, 1, 1, NO_DIGEST)

    @settings(parent=fuzzing, derandomize=True, max_examples=100, report_multiple_bugs=False)
    @given(CHANGES)
    def decodes(changes: list[Any]) -> None:
        frame = framed([*msgspec.msgpack.decode(batch.frame[2 : 2 + int.from_bytes(batch.frame[:2], "big")])[:8],
                        zlib.crc32(changed(payload, changes)), NO_DIGEST], changed(payload, changes))  # fmt: skip
        ours(lambda: items_of(open_batch(frame)))

    decodes()
    with mock.patch("eventrun.codec._UNREADABLE", (RecursionError,)), pytest.raises(msgspec.MsgspecError):
        decodes()
    table.caught(15, "error of another library let through", 1, 1)
