"""Read everything and check it: what `verify` reports."""

from __future__ import annotations

import re
from typing import Any

from msgspec import Struct, structs

from eventrun import damage
from eventrun.codec import ChainChecker, Stream, items_of
from eventrun.damage import Damage
from eventrun.errors import FormatTooNew, LogDamaged
from eventrun.journal import JournalReport
from eventrun.projector.log import Log, Pace
from eventrun.stores.base import StoredBatch

STEPS = (
    256  # positions tried one by one for where to go on; past them it may skip good events between bad ones
)


class VerifyReport(Struct, frozen=True, kw_only=True):
    """What reading the whole store has shown.

    `bytes` are those of the batches as stored. `problems` has each stretch of damage; events in such a range are not
    counted. `journals`: what writers hold there. `views_ok`: a fresh fold gives what the views hold (None: not asked,
    or the log is damaged).
    """

    end: int
    batches: int
    events: int
    bytes: int
    streams: int
    problems: tuple[Damage, ...] = ()
    journals: tuple[JournalReport, ...] = ()
    views_ok: bool | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and self.views_ok is not False

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        plain = {
            "problems": [problem.to_dict() for problem in self.problems],
            "journals": [journal.to_dict() for journal in self.journals],
        }
        return {**structs.asdict(self), **plain, "ok": self.ok}


def verify_log(log: Log, pace: Pace) -> VerifyReport:
    """Read all batches up to the present end; check positions, checksums, chains and that the events decode."""
    return _Verifier(log, pace).run()


class _Verifier:
    def __init__(self, log: Log, pace: Pace) -> None:
        self._log = log
        self._pace = pace
        self._end = self._batches = self._events = self._bytes = 0
        self._chains: dict[Stream, ChainChecker] = {}
        self._problems: list[Damage] = []

    def run(self) -> VerifyReport:
        try:
            self._end = self._log.end()
        except LogDamaged as error:  # and so where to stop isn't known
            self._problems.append(_of_error(error))
        after = 0
        while after < self._end:
            try:
                page = self._log.read(after, limit_bytes=self._pace.page_bytes)
            except (FormatTooNew, LogDamaged) as error:
                after = self._past(after, error)
                continue
            if not page:
                self._problems.append(damage.positions(after + 1, self._end, "are missing"))
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
            self._problems.append(damage.positions(after + 1, stored.position - 1, "are missing"))
        elif stored.position <= after:
            last = min(after, stored.last_position)
            self._problems.append(damage.positions(stored.position, last, "are there twice", lost=False))

    def _check(self, stored: StoredBatch) -> None:
        header = stored.batch.header
        if header.stream not in self._chains and header.first > 1:
            missing = damage.sequences(header.stream, 1, header.first - 1, "are missing")
            self._problems.append(missing)
        try:
            self._chains.setdefault(header.stream, ChainChecker()).check(stored.batch)
        except LogDamaged as error:
            self._note(stored, error, lost=False)
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

    def _note(self, stored: StoredBatch, error: Exception, *, lost: bool = True) -> None:
        found = damage.positions(stored.position, stored.last_position, str(error), lost=lost)
        self._problems.append(found)

    def _past(self, after: int, error: FormatTooNew | LogDamaged) -> int:
        """Note damage that a read has met, and find where to go on: the last position before the next good batch."""
        found = _of_error(error)
        if found.last is not None and found.last > after:
            self._problems.append(found)
            return found.last
        last = self._last_unreadable(after + 1)
        self._problems.append(damage.positions(after + 1, last, str(error)))
        return last

    def _last_unreadable(self, last: int) -> int:
        start = last
        while last < self._end and not self._readable(last):
            if last - start < STEPS:
                last += 1
                continue
            step = last - start  # twice as far each time, and then back to the first that can be read
            good = min(last + step, self._end)
            if good < self._end and not self._readable(good):
                last = good
                continue
            while good - last > 1:
                middle = (last + good) // 2
                last, good = (last, middle) if self._readable(middle) else (middle, good)
            return good
        return last

    def _readable(self, after: int) -> bool:
        try:
            self._log.read(after, limit_bytes=1)
        except (FormatTooNew, LogDamaged):
            return False
        return True


def _of_error(error: FormatTooNew | LogDamaged) -> Damage:
    """Make damage of an error, which names its positions if it knows them."""
    named = re.fullmatch(r"positions (\d+)\.\.(\d+)", error.where[0]) if error.where else None
    if named is None:
        return damage.file("log.db", str(error))
    first, last = int(named[1]), int(named[2])
    return damage.positions(first, last, str(error).removeprefix(f"{error.where[0]}").lstrip(": "))
