"""Batches to rows and back: the SQL of append and read, and their checks."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from heapq import merge
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from eventrun.codec import NO_DIGEST, Batch, Stream, digest, open_batch
from eventrun.errors import FormatTooNew, LogDamaged
from eventrun.stores.base import StoredBatch, Tip
from eventrun.stores.memory import check_expected, check_repeated, fits

if TYPE_CHECKING:
    import sqlite3

    from eventrun.stores.sqlite.connection import Log

FORMAT = 1  # user_version; also in schema.sql
MAX_KNOWN_STREAMS = 50_000  # tips kept in memory, about 300 bytes each
ROWS_PER_STATEMENT = 4096

_Row = tuple[Any, ...]

# {rows} stands for as many (?, ?, ...) as there are rows; the last ones may be all NULL.
_ADD_BATCHES = """
    INSERT INTO batches (position, stream, first, count, frame)
    SELECT * FROM (VALUES {rows}) WHERE column1 IS NOT NULL
"""
_ADD_STREAMS = """
    INSERT INTO streams (id, subject, writer)
    SELECT * FROM (VALUES {rows}) WHERE column1 IS NOT NULL
"""
# A header, and so all that a digest is made of, has at most 65,541 bytes.
_TIPS = """
    WITH wanted (subject, writer) AS (VALUES {rows})
    SELECT id, streams.subject, streams.writer, first, count, substr(frame, 1, 65541)
    FROM wanted
    JOIN streams ON streams.subject = wanted.subject AND streams.writer = wanted.writer
    LEFT JOIN batches ON position = (SELECT max(position) FROM batches WHERE stream = id)
"""
_LAST_STREAM = "SELECT coalesce(max(id), 0) FROM streams"
_LAST_BATCH = "SELECT position, count FROM batches ORDER BY position DESC LIMIT 1"
_STREAMS_AFTER = "SELECT group_concat(DISTINCT stream) FROM batches WHERE position > ?"
_BACK_FROM_TIP = "SELECT first, frame FROM batches WHERE stream = ? ORDER BY position DESC"
_STREAMS_OF_SUBJECT = "SELECT id FROM streams WHERE subject = ?"
# IS NOT TRUE: a damaged count, which compares as NULL, must not hide the row.
_READ = """
    SELECT position, count, first, subject, writer, frame
    FROM batches LEFT JOIN streams ON id = stream
    WHERE position >= coalesce((SELECT max(position) FROM batches WHERE position <= :after + 1), 0)
    AND (position + count <= :after + 1) IS NOT TRUE
    ORDER BY position
"""
_READ_STREAM = """
    SELECT position, count, first, subject, writer, frame
    FROM batches LEFT JOIN streams ON id = stream
    WHERE stream = :stream
    AND position >= coalesce((SELECT max(position) FROM batches WHERE stream = :stream AND position <= :after + 1), 0)
    AND (position + count <= :after + 1) IS NOT TRUE
    ORDER BY position
"""
TOUCH = f"PRAGMA user_version = {FORMAT}"


def _with_rows(raw: sqlite3.Connection, sql: str, rows: Sequence[_Row]) -> Iterator[_Row]:
    """Run a statement with {rows} for all rows at once, and return what it returns."""
    import sqlite3

    # Never executemany: sqlite3 gives up the interpreter's lock at each row, and beside a busy thread gets it back
    # only 5 ms later. For the same reason the statement is filled up to 2**n rows: there are few of them to keep
    # compiled, and one does it (1,000 rows beside a busy thread: 15 ms, in pieces of 190 rows 38 ms, tried).
    start = 0
    while start < len(rows):
        columns = len(rows[0])
        variables = raw.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER)  # 999 before SQLite 3.32
        most = min(ROWS_PER_STATEMENT, 1 << ((variables // columns).bit_length() - 1))
        part = rows[start : start + most]
        size = 1 << (len(part) - 1).bit_length()
        row = f"({', '.join('?' * columns)})"
        cells = [cell for each in part for cell in each] + [None] * (columns * (size - len(part)))
        yield from raw.execute(sql.replace("{rows}", ", ".join([row] * size)), cells)
        start += most


def _insert(raw: sqlite3.Connection, sql: str, rows: Sequence[_Row]) -> None:
    for _ in _with_rows(raw, sql, rows):
        pass


def _signed(writer: int) -> int:
    return writer - (1 << 64) if writer >> 63 else writer


def _unsigned(writer: Any) -> Any:
    return writer + (1 << 64) if isinstance(writer, int) and writer < 0 else writer


@contextmanager
def _transaction(raw: sqlite3.Connection) -> Iterator[None]:
    raw.execute("BEGIN IMMEDIATE")
    try:
        yield
        raw.execute("COMMIT")
    except BaseException:
        if raw.in_transaction:
            raw.execute("ROLLBACK")
        raise


def end_of(raw: sqlite3.Connection) -> int:
    """Return the position of the last event."""
    row = raw.execute(_LAST_BATCH).fetchone()
    if row is None:
        return 0
    position, count = row
    if not isinstance(position, int) or not isinstance(count, int) or count < 1:
        where = f"positions {position}..{position}"
        raise LogDamaged(f"{where}: the last batch of the log has no valid count", (where,))
    return position + count - 1


class Appender:
    """Puts batches into the log, and knows where streams end."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._end = 0
        # Right as long as the log ends at self._end: it only grows, so another process's append shows there.
        self._known: dict[Stream, tuple[int, Tip]] = {}  # id in the table streams, end

    def append(
        self, raw: sqlite3.Connection, batches: Sequence[Batch], expected: Mapping[Stream, int]
    ) -> int:
        """Append all batches or none; see `Store.append`."""
        self._log.check_writable()
        with _transaction(raw):
            end = self._catch_up(raw)
            pairs = [(batch.header.stream, batch) for batch in batches]
            tips = self._find(raw, {*expected, *(stream for stream, _ in pairs)})
            for stream, sequence in expected.items():
                check_expected(stream, sequence, tips[stream][1])
            fresh, repeated = _divide(pairs, tips)
            _add_streams(raw, dict.fromkeys(stream for stream, _ in fresh), tips)
            rows = []
            for stream, batch in fresh:
                header = batch.header
                rows.append((end + 1, tips[stream][0], header.first, header.count, batch.frame))
                end += header.count
            _insert(raw, _ADD_BATCHES, rows)
            _check_all_repeated(raw, repeated, tips)
            if repeated and not fresh:
                # They may be seen without being on the disk yet, when the process that wrote them was killed before
                # its fsync. A commit without a change would sync nothing.
                raw.execute(TOUCH)
            self._log.check_unmoved()
        self._end = end
        if len(self._known) + len(tips) > MAX_KNOWN_STREAMS:
            self._known.clear()
        self._known.update((stream, known) for stream, known in tips.items() if known[0])
        return end

    def tip(self, raw: sqlite3.Connection, stream: Stream) -> Tip:
        """Return where a stream ends."""
        self._catch_up(raw)
        return self._find(raw, {stream})[stream][1]

    def _catch_up(self, raw: sqlite3.Connection) -> int:
        end = end_of(raw)
        if end < self._end:
            self._known.clear()
        elif end > self._end and self._known:
            # Others have appended. Mostly to streams of their own, so what is known of the rest stays right.
            (text,) = raw.execute(_STREAMS_AFTER, (self._end,)).fetchone()
            changed = frozenset((text or "").split(","))
            self._known = {
                stream: known for stream, known in self._known.items() if str(known[0]) not in changed
            }
        self._end = end
        return end

    def _find(self, raw: sqlite3.Connection, streams: Iterable[Stream]) -> dict[Stream, tuple[int, Tip]]:
        found = {stream: self._known.get(stream, _UNKNOWN) for stream in streams}
        asked = [
            (stream.subject, _signed(stream.writer)) for stream, known in found.items() if known is _UNKNOWN
        ]
        for number, subject, writer, first, count, frame in list(_with_rows(raw, _TIPS, asked)):
            stream = Stream(subject, _unsigned(writer))
            found[stream] = (number, _tip(stream, first, count, frame))
        return found


_UNKNOWN = (0, Tip(0, NO_DIGEST))


def _tip(stream: Stream, first: Any, count: Any, frame: Any) -> Tip:
    if first is None:
        return Tip(0, NO_DIGEST)
    batch = _opened(frame, f"the last batch of {stream}")
    header = batch.header
    if (header.stream, header.first, header.count) != (stream, first, count):
        where = f"{stream} {first}..{header.last}"
        raise LogDamaged(f"{where}: the last batch of the stream isn't what the index says", (where,))
    return Tip(header.last, digest(batch))


_Pairs = list[tuple[Stream, Batch]]


def _divide(pairs: _Pairs, tips: dict[Stream, tuple[int, Tip]]) -> tuple[_Pairs, _Pairs]:
    """Tell new batches from those that the log seems to hold, and move `tips` on."""
    fresh, repeated = [], []
    for pair in pairs:
        stream, batch = pair
        number, tip = tips[stream]
        if fits(batch, tip):
            fresh.append(pair)
            tips[stream] = (number, Tip(batch.header.last, digest(batch)))
        else:
            repeated.append(pair)
    return fresh, repeated


def _add_streams(
    raw: sqlite3.Connection, used: Iterable[Stream], tips: dict[Stream, tuple[int, Tip]]
) -> None:
    new = [stream for stream in used if not tips[stream][0]]
    if not new:
        return
    (last,) = raw.execute(_LAST_STREAM).fetchone()
    rows = [(last + i, stream.subject, _signed(stream.writer)) for i, stream in enumerate(new, 1)]
    _insert(raw, _ADD_STREAMS, rows)
    for stream, (number, _, _) in zip(new, rows, strict=True):
        tips[stream] = (number, tips[stream][1])


def _check_all_repeated(
    raw: sqlite3.Connection, repeated: _Pairs, tips: Mapping[Stream, tuple[int, Tip]]
) -> None:
    by_stream: dict[Stream, list[Batch]] = {}
    for stream, batch in repeated:
        by_stream.setdefault(stream, []).append(batch)
    for stream, some in by_stream.items():
        lowest = min(batch.header.first for batch in some)
        firsts = {batch.header.first for batch in some}
        held: dict[int, bytes] = {}
        # What is repeated lies near the stream's end, so walking back from there needs no second index.
        for first, frame in raw.execute(_BACK_FROM_TIP, (tips[stream][0],)):
            if first in firsts:
                held[first] = frame
            if first <= lowest:
                break
        for batch in some:
            check_repeated(batch, held.get(batch.header.first))


def read(raw: sqlite3.Connection, after: int, subject: str | None, limit_bytes: int) -> list[StoredBatch]:
    """Return the good batches after a position; see `Store.read`. Raises LogDamaged when the first isn't good."""
    import sqlite3

    after = min(max(after, 0), (1 << 63) - 2)
    found: list[StoredBatch] = []
    size = 0
    try:
        with closing(_rows(raw, after, subject)) as rows:
            for row in rows:
                if not isinstance(row[0], int):
                    raise LogDamaged("the table of batches has lost its positions: its schema is damaged")
                size += len(row[-1]) if isinstance(row[-1], bytes) else 0
                if found and size > limit_bytes:
                    break
                if subject is None:
                    _check_position(row[0], found[-1].last_position if found else None, after)
                found.append(_checked(row, subject))
    except (FormatTooNew, LogDamaged, sqlite3.DatabaseError):
        # First what is good; the next read, after it, begins with the damage and says so.
        if not found:
            raise
    return found


def _rows(raw: sqlite3.Connection, after: int, subject: str | None) -> Generator[_Row, None, None]:
    if subject is None:
        cursors = [raw.execute(_READ, {"after": after})]
    else:
        # One query over all streams of the subject would sort what is left of them, anew for each page.
        numbers = raw.execute(_STREAMS_OF_SUBJECT, (subject,)).fetchall()
        cursors = [raw.execute(_READ_STREAM, {"after": after, "stream": number}) for (number,) in numbers]
    try:
        yield from cursors[0] if len(cursors) == 1 else merge(*cursors, key=itemgetter(0))
    finally:
        for cursor in cursors:  # one that is left in its middle keeps checkpoints from going on
            cursor.close()


def _check_position(position: int, reached: int | None, after: int) -> None:
    if reached is None:  # the first batch may begin before `after`
        reached = min(after, position - 1)
    if position > reached + 1:
        where = f"positions {reached + 1}..{position - 1}"
        raise LogDamaged(f"{where} are missing from the log", (where,))
    if position <= reached:
        where = f"positions {position}..{reached}"
        raise LogDamaged(f"{where} are in the log twice", (where,))


def _checked(row: _Row, subject: str | None) -> StoredBatch:
    """Compare a row's columns with the header of its batch."""
    position, count, first, row_subject, writer, frame = row
    last = position + count - 1 if isinstance(count, int) and count > 0 else position
    where = f"positions {position}..{last}"
    batch = _opened(frame, where)
    header = batch.header
    columns = (row_subject, _unsigned(writer), first, count)
    held = (header.subject, header.writer, header.first, header.count)
    if columns != held or subject not in (None, header.subject):
        raise LogDamaged(f"{where}: the index says {columns}, the batch itself {held}", (where,))
    return StoredBatch(position, batch)


def _opened(frame: Any, where: str) -> Batch:
    try:
        return open_batch(frame if isinstance(frame, bytes) else b"")
    except LogDamaged as error:
        raise LogDamaged(f"{where}: {error}", (where,)) from error
    except FormatTooNew as error:
        raise FormatTooNew(f"{where}: {error}", (where,)) from error
