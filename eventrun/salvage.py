"""Saving what can be read of a damaged store: a clean new one beside it, and a report of what is lost.

SQLite isn't asked: it gives up where a page of its tree is damaged, and takes older pages for newer ones where the
write-ahead file is. Each batch carries its stream, its place in it and checksums, so all pages of log.db and of the
write-ahead file are searched for batches, journals for the rest, and streams put together by sequence. The damaged
store is only read, and may be in use meanwhile.

Where events of a stream are gone for good, what follows goes on as the stream of another writer, numbered from 1: a
log has no gaps, and an event's stream and sequence must never name another event than in the store it came from. The
subject stays, so the views show all that is left of a trial under that trial. Claim streams close up instead, or
their claims would not be claims any more.
"""

from __future__ import annotations

import json
import shutil
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import Struct, structs

from eventrun import damage
from eventrun.codec import (
    CLAIM_WRITER,
    NO_DIGEST,
    Batch,
    Stream,
    decode_items,
    digest,
    payload_of,
    seal,
)
from eventrun.damage import Damage
from eventrun.errors import FormatTooNew, LogDamaged, StoreUnavailable
from eventrun.journal import has_ended, segments_in, state_of
from eventrun.journal.scan import Found, Stretch, count_items, recover, stretches
from eventrun.portal import Portal
from eventrun.recovery import note_ends
from eventrun.stores.sqlite import SqliteStore
from eventrun.stores.sqlite.mark import Mark
from eventrun.stores.sqlite.pages import Place, RawLog

BATCH_BYTES = 1 << 20  # about the most that a batch made of a journal holds
APPEND_BYTES = 8 << 20  # about the most that is held before it is appended
REPORT = "salvage.json"
FOR_EVER = 1 << 63  # a position beyond all


class Continued(Struct, frozen=True):
    """What followed a gap: sequences `first` to `last` of `stream`, which go on in `now` from sequence `begins`."""

    stream: str
    first: int
    last: int
    now: str
    begins: int


class SalvageReport(Struct, frozen=True, kw_only=True):
    """What could be saved, and what not.

    `events` are in the new store, `from_journals` of them from journals; `lost` are known to be gone: missing between
    others of their stream, or behind the end that the log once had. `continued`: streams that had to begin anew.
    """

    out: str
    events: int
    from_journals: int
    batches: int
    streams: int
    lost: int
    continued: tuple[Continued, ...] = ()
    problems: tuple[Damage, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is lost, as far as can be told."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        plain = {
            "continued": [structs.asdict(each) for each in self.continued],
            "problems": [each.to_dict() for each in self.problems],
        }
        return {**structs.asdict(self), **plain, "ok": self.ok}


def salvage(folder: Path, out: Path) -> SalvageReport:
    """Write a clean store with all that can be read of a damaged one to a folder that is new or empty.

    Its report lies there too, as salvage.json. Raises StoreUnavailable when there is nothing to read, or OUT can't be
    used. Journals are held in memory; of the log, an index.
    """
    folder, out = folder.absolute(), out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreUnavailable(f"{out} exists and is not an empty folder: choose another for what is saved")
    if not any((folder / name).exists() for name in ("log.db", "log.db-wal", "journals")):
        raise StoreUnavailable(f"there is nothing of a store in {folder}: nothing was recorded there")
    raw = RawLog(folder / "log.db")
    try:
        return _Salvage(folder, out, raw).run()
    finally:
        raw.close()


class _Entry(NamedTuple):
    """A batch that was found."""

    first: int
    last: int
    previous: bytes
    digest: bytes
    first_ns: int
    whole: bool
    position: int | None
    rank: int
    place: Place


class _Piece(NamedTuple):
    """A stretch of a stream that can be saved: events from sequence `first` on, `skip` of what is there left out."""

    first: int
    last: int
    entry: _Entry | None
    skip: int = 0
    payload: bytes = b""  # of a journal's
    cuts: tuple[tuple[int, int], ...] = ()


class _Run(NamedTuple):
    """Pieces without a gap between them, and the stream that they become."""

    stream: Stream
    pieces: list[_Piece]


class _Salvage:
    def __init__(self, folder: Path, out: Path, raw: RawLog) -> None:
        self._folder = folder
        self._out = out
        self._raw = raw
        self._index: dict[Stream, dict[int, list[_Entry]]] = {}
        self._segments: dict[Stream, list[Found]] = {}
        self._vouched: dict[Stream, list[_Piece]] = {}
        self._dead: set[int] = set()
        self._problems: list[Damage] = []
        self._told: dict[Path, Damage] = {}  # by journal file, of its last reading
        self._lost = self._journal_events = 0
        self._continued: list[Continued] = []

    def run(self) -> SalvageReport:
        self._find_batches()
        self._find_journals()
        runs: list[_Run] = []
        for stream in sorted({*self._index, *self._segments}):
            runs += self._runs(stream)
        self._problems += self._told.values()
        self._check_positions(runs)
        if (had := self._raw.cut_off()) is not None:
            self._problems.append(damage.file("log.db", "is cut off", None, (self._raw.db_bytes, had - 1)))
        counts = self._write(runs)
        if (self._folder / "files").is_dir():
            shutil.copytree(self._folder / "files", self._out / "files")
        report = SalvageReport(
            out=str(self._out),
            events=counts[0],
            from_journals=self._journal_events,
            batches=counts[1],
            streams=len(runs),
            lost=self._lost,
            continued=tuple(self._continued),
            problems=tuple(self._problems),
        )
        (self._out / REPORT).write_text(json.dumps(report.to_dict(), indent=1), "utf-8")
        return report

    # finding --------------------------------------------------------------------------------------------------

    def _find_batches(self) -> None:
        for found in self._raw.candidates():
            header = found.batch.header
            entry = _Entry(
                header.first, header.last, header.previous, digest(found.batch), header.first_ns, found.whole,
                found.position, found.rank, found.place,
            )  # fmt: skip
            same = self._index.setdefault(header.stream, {}).setdefault(header.first, [])
            # One that only differs in where it was found: the better counts.
            for place, other in enumerate(same):
                if other.digest == entry.digest:
                    same[place] = max(other, entry, key=_worth)
                    break
            else:
                same.append(entry)

    def _find_journals(self) -> None:
        journals = self._folder / "journals"
        for folder in sorted(journals.iterdir()) if journals.is_dir() else []:
            if not folder.is_dir():
                continue
            try:
                streams, problems = segments_in(folder)
            except FormatTooNew as error:
                self._problems.append(damage.file(f"journals/{folder.name}", str(error)))
                continue
            killed = state_of(folder) in ("dead", "damaged") and not has_ended(folder)
            self._problems += [damage.file(f"journals/{folder.name}", problem) for problem in problems]
            for stream, segments in streams.items():
                self._segments.setdefault(stream, []).extend(segments)
                if killed:
                    self._dead.add(stream.writer)
        for segments in self._segments.values():
            segments.sort(key=lambda segment: segment.first)

    # putting together -----------------------------------------------------------------------------------------

    def _runs(self, stream: Stream) -> Iterator[_Run]:
        """Put a stream together, a run up to each gap."""
        pieces: list[_Piece] = []
        following, chain, writer = 1, NO_DIGEST, stream
        while True:
            piece = self._logged(stream, following, chain) or self._journaled(stream, following, pieces)
            if piece is not None:
                pieces.append(piece)
                following = piece.last + 1
                chain = piece.entry.digest if piece.entry is not None else b""
                continue
            after = self._next(stream, following)
            if pieces and not (after and stream.writer == CLAIM_WRITER):
                yield _Run(writer, pieces)
                self._note_run(stream, writer, pieces)
                pieces = []
            if after is None:
                return
            self._note_gap(stream, following, after - 1)
            if stream.writer != CLAIM_WRITER:
                writer = _writer_after(stream, after)
            following, chain = after, b""

    def _logged(self, stream: Stream, following: int, chain: bytes) -> _Piece | None:
        """Find the batch that goes on here: the one that is chained, that others are chained to, of the log's own."""
        index = self._index.get(stream, {})

        def worth(entry: _Entry) -> tuple[bool, bool, int, int]:
            followed = any(other.previous == entry.digest for other in index.get(entry.last + 1, ()))
            return entry.previous == chain, followed, entry.rank, entry.last

        whole = [entry for entry in index.get(following, ()) if entry.whole]
        if whole:
            entry = max(whole, key=worth)
            return _Piece(following, entry.last, entry)
        firsts = sorted(index)
        for first in firsts[max(bisect_left(firsts, following) - 8, 0) : bisect_left(firsts, following)]:
            for entry in index[first]:
                if entry.whole and entry.last >= following:
                    return _Piece(following, entry.last, entry, following - first)
        return None

    def _journaled(self, stream: Stream, following: int, pieces: Sequence[_Piece]) -> _Piece | None:
        """Find what the journals hold from a sequence on, as far as the log's bytes or a checksum vouch for it."""
        segments = [segment for segment in self._segments.get(stream, ()) if segment.first <= following]
        for segment in segments[::-1]:
            if segment.first < segments[-1].first:
                break
            known = following - segment.first
            logged = b"" if not known else self._payload_between(pieces, segment.first, following - 1)
            piece = None if logged is None else self._from_segment(segment, logged, known, 0)
            piece = piece or self._from_segment(segment, b"", 0, known)
            if piece is not None:
                return piece
        for piece in self._stretches(stream):
            if piece.first <= following <= piece.last:
                return _without(piece, following - piece.first)
        return None

    def _stretches(self, stream: Stream) -> list[_Piece]:
        """What checksums of the journals vouch for, also behind damage."""
        known = self._vouched.get(stream)
        if known is None:
            known = self._vouched[stream] = [
                _Piece(found.first, found.first + found.events - 1, None, 0, found.payload, tuple(found.cuts))
                for segment in self._segments.get(stream, ())
                for found in _stretches_of(segment)
            ]
        return known

    def _from_segment(self, segment: Found, logged: bytes, count: int, skip: int) -> _Piece | None:
        try:
            found = recover(segment, logged, count)
        except (LogDamaged, OSError) as error:
            self._tell(segment, str(error))
            return None
        if found.problem is not None:
            self._tell(segment, f"{segment.stream}, {found.problem}")
        elif not skip:
            self._told.pop(segment.path, None)
        events = found.events - skip
        if events <= 0:
            return None
        last = found.first + found.events - 1
        return _without(_Piece(found.first, last, None, 0, found.payload, tuple(found.cuts)), skip)

    def _tell(self, segment: Found, what: str) -> None:
        where = f"journals/{segment.path.parent.name}/{segment.path.name}"
        self._told[segment.path] = damage.file(
            where, what, None, (segment.base, segment.base + segment.size - 1)
        )

    def _payload_between(self, pieces: Sequence[_Piece], first: int, last: int) -> bytes | None:
        """Return the log's bytes of some sequences, None if they don't begin with a piece."""
        parts = []
        for piece in reversed(pieces):
            if piece.last != last or piece.first < first:
                return None
            parts.append(self._payload(piece))
            last = piece.first - 1
            if piece.first == first:
                return b"".join(reversed(parts))
        return None

    def _payload(self, piece: _Piece) -> bytes:
        if piece.entry is None:
            return piece.payload
        payload = payload_of(self._batch(piece.entry))
        if piece.skip:
            _, start = count_items(payload, 0, len(payload), most=piece.skip)
            payload = payload[start:]
        return payload

    def _batch(self, entry: _Entry) -> Batch:
        batch = self._raw.batch(entry.place)
        if batch is None or digest(batch) != entry.digest:
            raise StoreUnavailable(
                "the store has changed under the salvage: end what writes there, and try again"
            )
        return batch

    def _next(self, stream: Stream, following: int) -> int | None:
        """Find the first sequence after a gap that can be read."""
        index = self._index.get(stream, {})
        found = [first for first in index if first > following and any(entry.whole for entry in index[first])]
        found += [piece.first for piece in self._stretches(stream) if piece.first > following]
        return min(found, default=None)

    def _note_gap(self, stream: Stream, first: int, last: int) -> None:
        self._lost += last - first + 1
        bad = [
            entry
            for same in self._index.get(stream, {}).values()
            for entry in same
            if not entry.whole and entry.first <= last and entry.last >= first
        ]
        places = sorted({f"{'log.db-wal' if e.place.wal else 'log.db'} byte {e.place.offset}" for e in bad})
        what = (
            f"fail their checksum (in the page at {', '.join(places)})" if bad else "are nowhere to be found"
        )
        self._problems.append(damage.sequences(stream, first, last, what))

    def _note_run(self, stream: Stream, writer: Stream, pieces: list[_Piece]) -> None:
        if writer != stream:
            first, last = pieces[0].first, pieces[-1].last
            self._continued.append(Continued(str(stream), first, last, str(writer), 1))

    def _check_positions(self, runs: Sequence[_Run]) -> None:
        """Compare with where the log once ended: what is missing there and was found nowhere else is lost."""
        placed = sorted(
            (piece.entry.position, piece.last - piece.entry.first + 1)
            for run in runs
            for piece in run.pieces
            if piece.entry is not None and piece.entry.position is not None
        )
        end, gaps = 0, []
        for position, count in [*placed, (Mark(self._folder / "log.mark").read() + 1, 0)]:
            if position > end + 1:
                gaps.append((end + 1, position - 1))
            end = max(end, position + count - 1)
        elsewhere = sum(
            piece.last - piece.first + 1
            for run in runs
            for piece in run.pieces
            if piece.entry is None or piece.entry.position is None
        )
        missing = sum(last - first + 1 for first, last in gaps)
        if missing - elsewhere > self._lost:
            self._lost = missing - elsewhere
            what = "are nowhere to be found in log.db"
            found = f", and other copies and journals have {elsewhere:,} events in all" if elsewhere else ""
            self._problems += [damage.positions(first, last, what + found) for first, last in gaps]

    # writing --------------------------------------------------------------------------------------------------

    def _write(self, runs: Sequence[_Run]) -> tuple[int, int]:
        portal = Portal()
        store = SqliteStore(self._out)
        try:
            batches = events = held = 0
            waiting: list[Batch] = []
            for batch in self._batches(runs):
                waiting.append(batch)
                held += len(batch.frame)
                batches, events = batches + 1, events + batch.header.count
                if held >= APPEND_BYTES:
                    portal.call(store.append, waiting).result()
                    waiting, held = [], 0
            portal.call(store.append, waiting).result()
            for run in runs:
                if run.stream.subject.startswith("t/") and run.stream.writer in self._dead:
                    portal.call(note_ends, store, [run.stream]).result()
            portal.call(store.settle).result()
        finally:
            portal.call(store.aclose).result()
            portal.stop()
        return events, batches

    def _batches(self, runs: Sequence[_Run]) -> Iterator[Batch]:
        """Yield the batches of the new log in the order of the old one, as they were wherever that can be."""
        tips: dict[Stream, tuple[int, bytes]] = {}
        for _, place, n in sorted(_in_log_order(runs)):
            stream, pieces = runs[place]
            for batch in self._made(stream, pieces[n], tips.get(stream, (0, NO_DIGEST))):
                tips[stream] = batch.header.last, digest(batch)
                yield batch

    def _made(self, stream: Stream, piece: _Piece, tip: tuple[int, bytes]) -> Iterator[Batch]:
        sequence, previous = tip
        entry = piece.entry
        if entry is not None and not piece.skip:
            batch = self._batch(entry)
            header = batch.header
            if (header.stream, header.first, header.previous) != (stream, sequence + 1, previous):
                times = header.first_ns, header.last_ns
                batch = seal(stream, sequence + 1, header.count, payload_of(batch), *times, previous)
            yield batch
            return
        payload = self._payload(piece)
        cuts = piece.cuts or ((len(payload), piece.last - piece.first + 1),)
        start = done = 0
        for i, (end, count) in enumerate(cuts):
            if i + 1 < len(cuts) and cuts[i + 1][0] - start <= BATCH_BYTES:
                continue  # the next cut fits into this batch as well
            part = payload[start:end]
            try:
                items = decode_items(part, count - done)
            except (LogDamaged, FormatTooNew) as error:  # a newer eventrun's: it stays where it is
                first, last = piece.first + done, piece.last
                self._lost += last - first + 1
                self._problems.append(damage.sequences(stream, first, last, str(error)))
                return
            times = items[0][0], items[-1][0]
            batch = seal(stream, sequence + 1, count - done, part, *times, previous)
            if entry is None:
                self._journal_events += count - done
            yield batch
            sequence, previous = batch.header.last, digest(batch)
            start, done = end, count


def _stretches_of(segment: Found) -> list[Stretch]:
    try:
        return stretches(segment)
    except OSError:
        return []


def _without(piece: _Piece, skip: int) -> _Piece:
    """Leave out the first events of a journal's piece."""
    _, start = count_items(piece.payload, 0, len(piece.payload), most=skip)
    cuts = tuple((end - start, n - skip) for end, n in piece.cuts if n > skip)
    return _Piece(piece.first + skip, piece.last, None, 0, piece.payload[start:], cuts)


def _worth(entry: _Entry) -> tuple[bool, int, bool]:
    return entry.whole, entry.rank, entry.position is not None


def _writer_after(stream: Stream, first: int) -> Stream:
    """Name the writer of what follows a gap; the same each time, and nobody else's."""
    text = f"{stream} from {first}".encode()
    number = int.from_bytes(blake2b(text, digest_size=8).digest(), "big")
    return Stream(stream.subject, number or 1)


def _in_log_order(runs: Sequence[_Run]) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Yield a key, a run's place and a piece's place in it. What has no position comes after what is before it.

    What the log never held comes last, in the order of time.
    """
    for place, run in enumerate(runs):
        known = [piece.entry.position if piece.entry is not None else None for piece in run.pieces]
        last = max((n for n, position in enumerate(known) if position is not None), default=-1)
        reached, time_ns = (0, 0), 0
        for n, piece in enumerate(run.pieces):
            position = known[n]
            if position is not None:
                reached = max(reached, (position, 0))
            elif n > last:
                time_ns = max(time_ns, _time_of(piece))
                reached = max(reached, (FOR_EVER, time_ns))
            yield reached, place, n


def _time_of(piece: _Piece) -> int:
    if piece.entry is not None:
        return piece.entry.first_ns
    try:
        return decode_items(piece.payload[: piece.cuts[0][0]], piece.cuts[0][1])[0][0]
    except (LogDamaged, FormatTooNew):
        return 0
