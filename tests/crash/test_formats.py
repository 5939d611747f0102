"""16. Formats: what earlier versions wrote is read on every path; what a newer one wrote is refused, and left alone."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sqlite3
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock
from zlib import crc32

import msgspec
import pytest

import eventrun
from eventrun.codec import ENVELOPE_MAGIC, FORMAT_VERSION, Batch, Header, Item, Stream, decode_envelope
from eventrun.errors import FormatTooNew, InvalidValue
from eventrun.events import MetricsLogged, WriterEnded
from eventrun.formats.events_jsonl import export_events, import_events
from eventrun.journal.segments import FIXED, LOCK_NAME, RING_AT
from eventrun.locks import owner
from eventrun.projections import TRIALS_VERSION
from eventrun.salvage import salvage
from tests.crash.harness import LONG_S, Table, Tally
from tests.test_codec import framed
from tests.test_golden import EXPECTED_V1, GOLDEN_V1

DATA = Path(__file__).parents[1] / "data"
GOLDEN_JOURNAL_V1 = DATA / "golden-journal-v1"
T0 = 1_700_000_000_000_000_000
GOLDEN_WRITERS = {1: True, 2: False}  # number of the writer: whether it mapped its journal

little_endian = pytest.mark.skipif(
    sys.byteorder != "little", reason="the golden journal is a little-endian one"
)


def golden_events(number: int) -> dict[str, list[Item]]:
    """What the writers of the golden journal recorded: every kind of event, and many to pass marks and segments."""
    every = [item for _, _, items in EXPECTED_V1 for item in items]
    many: list[Item] = [
        (T0 + n, MetricsLogged({"i": n, "loss": 1 / (n + number)}, step=n)) for n in range(90)
    ]
    return {"t/0123456789abcdef": [*many[:3], *every, *many[3:]], f"p/golden {number}": many[:2]}


@contextmanager
def opened(store: Path) -> Iterator[eventrun.Client]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the same texts are in the reports
        with eventrun.open(store, quiet=True, close_timeout_s=1.0) as client:
            yield client


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of the golden store."""
    return Path(shutil.copytree(GOLDEN_V1 / "store", tmp_path / "golden"))


def in_log(client: eventrun.Client) -> list[tuple[Stream, int, str]]:
    return [(stored.stream, stored.time_ns, repr(stored.event)) for stored in client.events()]


EXPECTED = [(stream, time_ns, repr(event)) for stream, _, items in EXPECTED_V1 for time_ns, event in items]


@pytest.mark.crash
def test_the_golden_log_is_read_on_every_path(golden: Path, tmp_path: Path, table: Table) -> None:
    """Read, verify, fold, rebuild, export, import, back up, salvage: the same events each time."""
    lines = io.StringIO()
    with opened(golden) as client:
        assert in_log(client) == EXPECTED
        assert client.verify(views=True).result(LONG_S).ok
        (state,) = client.trials()
        told = repr(state)  # there is a NaN in it, which isn't equal to itself
        assert (state.name, state.status, state.params["lr"]) == ("mnist 🙂", "failed", 0.1)
        assert client.rebuild().result(LONG_S) == len(EXPECTED)
        assert repr(client.get("mnist 🙂").result(LONG_S)) == told
        assert list(client.history(state.id, "loss").result(LONG_S).values) == [0.25, 0.1]
        assert repr(client.at(position=len(EXPECTED)).get(state.id).result(LONG_S)) == told
        assert export_events(client, lines) == len(EXPECTED)
        client.backup(tmp_path / "backup").result(LONG_S)
    with opened(tmp_path / "imported") as client:
        assert import_events(client, lines.getvalue().splitlines()).added == len(EXPECTED)
        assert in_log(client) == EXPECTED
        assert repr(client.get(state.id).result(LONG_S)) == told
    assert salvage(golden, tmp_path / "salvaged").ok
    for copy in ("backup", "salvaged"):
        with opened(tmp_path / copy) as client:
            assert in_log(client) == EXPECTED
            assert repr(client.get(state.id).result(LONG_S)) == told
    table.add(16, "golden log, every path", 6, Tally(6 * len(EXPECTED), 6 * len(EXPECTED)))


@little_endian
@pytest.mark.crash
def test_the_golden_journal_is_taken_in(tmp_path: Path, table: Table) -> None:
    """What killed writers of format 1 left, mapped and written, gets into the log; verify and salvage read it too."""
    store = Path(shutil.copytree(GOLDEN_JOURNAL_V1, tmp_path / "runs"))
    expected = {
        Stream(subject, number): [repr(item) for item in items]
        for number in GOLDEN_WRITERS
        for subject, items in golden_events(number).items()
    }
    total = sum(map(len, expected.values()))
    with opened(store) as client:  # of a host called golden, so it is left to that one
        assert not list(client.events())
    for lock in store.glob(f"journals/*/{LOCK_NAME}"):
        assert set(json.loads(lock.read_text())) >= {"host", "boot", "pid"}
        lock.write_text(json.dumps(owner()))
    with opened(store) as client:
        report = client.recovery().result(LONG_S)
        assert (report.writers, report.events, report.problems) == (2, total, [])
        found: dict[Stream, list[str]] = {}
        for stored in client.events():
            if stored.stream.writer:
                found.setdefault(stored.stream, []).append(repr((stored.time_ns, stored.event)))
            else:
                assert isinstance(stored.event, WriterEnded)
        assert found == expected
        assert client.verify(views=True).result(LONG_S).ok
    assert not any((store / "journals").iterdir())
    table.add(16, "golden journal", 1, Tally(total, total))


# newer than this version ---------------------------------------------------------------------------------------


def frame_of(version: int, item: bytes, last: Batch | None = None) -> bytes:
    """Make a batch as this version would, but for the version in its header."""
    header = Header(version, 0, "t/new", 7, 1, 1, T0, T0, crc32(item), bytes(16))
    return framed(header, item)


def insert(store: Path, frame: bytes) -> None:
    """Put a batch at the end of a log, past all checks."""
    raw = sqlite3.connect(store / "log.db")
    with raw:
        (stream,) = raw.execute(
            "INSERT INTO streams (subject, writer) VALUES ('t/new', 7) RETURNING id"
        ).fetchone()
        raw.execute("INSERT INTO batches VALUES (?, ?, 1, 1, ?)", (len(EXPECTED) + 1, stream, frame))
    raw.close()


def newer_batch(store: Path) -> None:
    insert(store, frame_of(FORMAT_VERSION + 1, msgspec.msgpack.encode((T0, ["t>"]))))


def newer_event(store: Path) -> None:
    insert(store, frame_of(FORMAT_VERSION, msgspec.msgpack.encode((T0, ["zz", 1, 2]))))


def newer_log(store: Path) -> None:
    raw = sqlite3.connect(store / "log.db")
    raw.execute("PRAGMA user_version = 2")
    raw.close()


def content(store: Path) -> list[tuple[Any, ...]]:
    """What is in the tables of a log."""
    raw = sqlite3.connect(store / "log.db")
    try:
        return [*raw.execute("SELECT * FROM streams"), *raw.execute("SELECT * FROM batches")]
    finally:
        raw.close()


NEWER: dict[str, Callable[[Path], None]] = {"batch": newer_batch, "event": newer_event, "log": newer_log}


def refused(store: Path) -> None:
    """Assert that a log with something newer in it isn't read, that the error says what to do, and nothing changes."""
    before = content(store)
    with opened(store) as client:
        for answer in (
            lambda: list(client.events()), lambda: list(client.trials()),
            lambda: client.rebuild().result(LONG_S), lambda: export_events(client, io.StringIO()),
        ):  # fmt: skip
            with pytest.raises(FormatTooNew, match="upgrade eventrun"):
                answer()
    assert content(store) == before


@pytest.mark.crash
@pytest.mark.parametrize("what", NEWER)
def test_a_newer_log_is_refused_and_left_alone(what: str, golden: Path, table: Table) -> None:
    """A batch, an event or a log of a newer version: a clear error on each path, and not a byte is overwritten."""
    NEWER[what](golden)
    refused(golden)
    if what != "log":
        with opened(golden) as client:
            report = client.verify().result(LONG_S)
            assert any("upgrade eventrun" in str(problem) for problem in report.problems)
            assert report.events == len(EXPECTED)
            assert [stored.event for stored in client.events(limit=3)]  # what comes before is there
    table.add(16, f"newer {what}", 1, Tally(len(EXPECTED), len(EXPECTED)))


@pytest.mark.crash
def test_what_is_recorded_beside_a_newer_log_is_kept(golden: Path, table: Table) -> None:
    """A writer that can't append to a newer log leaves its events in the journal, and says so; who can takes them."""
    newer_log(golden)
    with opened(golden) as client:
        with client.trial("p", name="older") as trial:
            for n in range(10):
                trial.log(n=n)
        with pytest.raises(FormatTooNew, match="upgrade eventrun"):
            client.flush().result(LONG_S)
    assert list((golden / "journals").iterdir())
    raw = sqlite3.connect(golden / "log.db")
    raw.execute("PRAGMA user_version = 1")
    raw.close()
    with opened(golden) as client:
        assert list(client.history("older", "n").result(LONG_S).values) == list(range(10))
    table.add(16, "recorded beside a newer log", 1, Tally(10, 10))


def rewrite_magic(arena: Path, slot: int, last: int) -> None:
    """Give the segments of a journal another version, with a checksum that is right."""
    data = bytearray(arena.read_bytes())
    for base in range(0, len(data), slot):
        magic, writer, first, start, ring, _, length = FIXED.unpack_from(data, base + 8)
        if length:
            magic = magic[:7] + bytes((last,))
            at = base + RING_AT + ring * 24
            check = crc32(
                data[at : at + length], crc32(FIXED.pack(magic, writer, first, start, ring, 0, length))
            )
            FIXED.pack_into(data, base + 8, magic, writer, first, start, ring, check, length)
    arena.write_bytes(data)


@little_endian
@pytest.mark.crash
def test_a_newer_journal_is_left_for_a_newer_version(tmp_path: Path, table: Table) -> None:
    """Its folder stays as it is, under its name, and whoever comes is told; the other writers' are taken in."""
    store = Path(shutil.copytree(GOLDEN_JOURNAL_V1, tmp_path / "runs"))
    for lock in store.glob(f"journals/*/{LOCK_NAME}"):
        lock.write_text(json.dumps(owner()))
    folder = store / "journals" / f"{1:016x}"
    for arena in folder.glob("*.arena"):
        rewrite_magic(arena, int(arena.name.split("-")[1].split("x")[0]), 2)
    before = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    with opened(store) as client:
        report = client.recovery().result(LONG_S)
        assert report.writers == 1
        (problem,) = report.problems
        assert "upgrade eventrun" in problem
        assert "left for the next open" in problem
        verified = client.verify().result(LONG_S)
        assert any("upgrade eventrun" in str(problem) for problem in verified.problems)
    salvaged = salvage(store, tmp_path / "out")
    assert any("upgrade eventrun" in str(problem) for problem in salvaged.problems)
    assert {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()} == before
    table.add(16, "newer journal", 1, Tally())


@pytest.mark.crash
def test_newer_carriers_outside_the_log(golden: Path, tmp_path: Path, table: Table) -> None:
    """An envelope and an export of a newer version are refused with what to do; an unknown mark and views of another
    version hinder nobody, and newer views are left alone."""
    with pytest.raises(FormatTooNew, match="upgrade eventrun"):
        decode_envelope(ENVELOPE_MAGIC + b"\x09abc")
    line = {"subject": "t/a", "writer": "0" * 15 + "1", "sequence": 1, "time_ns": 1}
    for event in ({"kind": "Teleported", "to": "here"}, {"kind": "NoteAdded", "text": "x", "colour": 1}):
        with opened(tmp_path / "imported") as client, pytest.raises(InvalidValue, match="upgrade eventrun"):
            import_events(client, [json.dumps({**line, "event": event})])
    (golden / "log.mark").write_bytes(b"eventru2" + bytes(40))
    with opened(golden) as client:
        assert in_log(client) == EXPECTED
        assert [problem.where for problem in client.verify().result(LONG_S).problems] == ["log.mark"]
        states = repr(list(client.trials()))
    with (
        mock.patch("eventrun.projector.generations.TRIALS_VERSION", TRIALS_VERSION + 1),
        opened(golden) as client,
    ):
        assert repr(list(client.trials())) == states
    pointer = (golden / "views").read_bytes()
    with opened(golden) as client:
        assert repr(list(client.trials())) == states
    assert (golden / "views").read_bytes() == pointer
    table.add(16, "newer envelope, export, mark, views", 4, Tally())


def no_check(*_: object) -> None:
    """Take every version for one's own."""


@pytest.mark.crash
def test_a_version_that_isnt_looked_at_is_caught(golden: Path, table: Table) -> None:
    """The tests above can fail: a reader that doesn't look at a batch's version takes a newer one for its own."""
    newer_batch(golden)
    with mock.patch("eventrun.codec._check_version", no_check), pytest.raises(pytest.fail.Exception):
        refused(golden)
    table.caught(16, "version of a batch not looked at", 1, 1)
