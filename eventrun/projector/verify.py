"""Read everything and check it: what `verify` reports."""

from __future__ import annotations

import re
from typing import Any

from msgspec import Struct, structs

from eventrun.codec import ChainChecker, Stream, items_of
from eventrun.errors import FormatTooNew, LogDamaged
from eventrun.projector.log import Log, Pace
from eventrun.stores.base import StoredBatch


class VerifyReport(Struct, frozen=True, kw_only=True):
    """What reading the whole log has shown.

    `bytes` are those of the batches as stored. `problems` holds a text each, with the range of positions; events in
    such a range are not counted. `views_ok`: a fresh fold gives what the views hold (None: not asked).
    """

    end: int
    batches: int
    events: int
    bytes: int
    streams: int
    problems: tuple[str, ...] = ()
    views_ok: bool | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and self.views_ok is not False

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return {**structs.asdict(self), "problems": list(self.problems), "ok": self.ok}


def verify_log(log: Log, pace: Pace) -> VerifyReport:
    """Read all batches up to the present end; check positions, checksums, chains and that the events decode."""
    return _Verifier(log, pace).run()


class _Verifier:
    def __init__(self, log: Log, pace: Pace) -> None:
        self._log = log
        self._pace = pace
        self._end = log.end()
        self._batches = self._events = self._bytes = 0
        self._chains: dict[Stream, ChainChecker] = {}
        self._problems: list[str] = []

    def run(self) -> VerifyReport:
        after = 0
        while after < self._end:
            try:
                page = self._log.read(after, limit_bytes=self._pace.page_bytes)
            except LogDamaged as error:
                after = self._past(after, error)
                continue
            if not page:
                self._problems.append(f"positions {after + 1}..{self._end} are missing")
                break
            for stored in page:
                self._place(after, stored)
                self._check(stored)
                after = max(after, stored.last_position)
        return VerifyReport(
            end=self._end,
            batches=self._batches,
            events=self._events,
            bytes=self._bytes,
            streams=len(self._chains),
            problems=tuple(self._problems),
        )

    def _place(self, after: int, stored: StoredBatch) -> None:
        if stored.position > after + 1:
            self._problems.append(f"positions {after + 1}..{stored.position - 1} are missing")
        elif stored.position <= after:
            self._problems.append(
                f"positions {stored.position}..{min(after, stored.last_position)} are there twice"
            )

    def _check(self, stored: StoredBatch) -> None:
        header = stored.batch.header
        try:
            self._chains.setdefault(header.stream, ChainChecker()).check(stored.batch)
        except LogDamaged as error:
            self._note(stored, error)
            # From here on the chain may be whole again.
            self._chains[header.stream] = ChainChecker()
            if header.first > 1:
                self._chains[header.stream].check(stored.batch)
        try:
            items_of(stored.batch)
        except (LogDamaged, FormatTooNew) as error:
            self._note(stored, error)
        else:
            self._events += header.count
        self._batches += 1
        self._bytes += len(stored.batch.frame)
        self._pace.breathe()

    def _note(self, stored: StoredBatch, error: Exception) -> None:
        self._problems.append(f"positions {stored.position}..{stored.last_position}: {error}")

    def _past(self, after: int, error: LogDamaged) -> int:
        """Note damage that a read has met, and find where to go on: the last position before the next good batch."""
        named = re.fullmatch(r"positions (\d+)\.\.(\d+)", error.where[0]) if error.where else None
        if named and int(named[2]) > after:
            self._problems.append(str(error))
            return int(named[2])
        last = after + 1
        while last < self._end and not self._readable(last):
            last += 1
        self._problems.append(f"positions {after + 1}..{last}: {error}")
        return last

    def _readable(self, after: int) -> bool:
        try:
            self._log.read(after, limit_bytes=1)
        except LogDamaged:
            return False
        return True
