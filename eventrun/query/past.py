"""The store as it was: at a position of the log (its prefix), or at a time (all events not later than that).

One trial's past folds that trial's batches only, from the last snapshot that holds no event that doesn't count. Lists
fold the log in memory with the projections of the present.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from eventrun.codec import ChainChecker
from eventrun.errors import Ambiguous, InvalidValue, NotFound
from eventrun.events import trial_subject
from eventrun.projections import TrialFold, TrialState, fold
from eventrun.projector import Views
from eventrun.projector.catchup import decode_fold
from eventrun.projector.log import Cut, batches, slices
from eventrun.query.listing import LATEST
from eventrun.query.reads import Reads
from eventrun.query.series import Series
from eventrun.query.thinning import Between

if TYPE_CHECKING:
    import sqlite3

_SNAPSHOT = """
    SELECT snapshots.position, fold FROM snapshots JOIN trials ON trial = number
    WHERE id = ? AND snapshots.position <= ? AND until_ns <= ?
    ORDER BY snapshots.position DESC LIMIT 1
"""
_LAST = 2**63 - 1  # no position and no time comes after
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def cut_at(position: int | None, time: Any) -> Cut:
    """Say which events count. Raises InvalidValue."""
    if position is None and time is None:
        raise InvalidValue("at() needs a position or a time")
    if position is not None and position < 0:
        raise InvalidValue(
            f"position={position!r}: positions are whole numbers from 1; 0 is before the first event"
        )
    return Cut(position, None if time is None else _nanoseconds(time))


def _nanoseconds(time: Any) -> int:
    if isinstance(time, int) and not isinstance(time, bool):
        if not -_LAST <= time <= _LAST:
            raise InvalidValue("the time is beyond the year 2262: give nanoseconds since 1970")
        return time
    if isinstance(time, str):
        try:
            time = datetime.fromisoformat(time)
        except ValueError as error:
            raise InvalidValue(
                f"time={time!r} is no ISO time like 2025-11-21T12:44:03+00:00: {error}"
            ) from error
    if not isinstance(time, datetime):
        raise InvalidValue(f"time={time!r}: give nanoseconds since 1970, a datetime or ISO text")
    if time.tzinfo is None:
        raise InvalidValue(
            f"time={time.isoformat()!r} has no time zone: add +00:00, or datetime.astimezone()"
        )
    since = time - _EPOCH
    found = (since.days * 86_400 + since.seconds) * 10**9 + since.microseconds * 1_000
    return min(max(found, -_LAST), _LAST)


class Past(Reads):
    """The read methods, as of then. `views` are those of the present."""

    def __init__(self, views: Views, cut: Cut) -> None:
        super().__init__(Views(None, views.log, cut=cut, gentle=views.gentle))
        self._now = views

    def close(self) -> None:
        """Free what lists have folded."""
        self.views.close()

    def trial(self, trial: str, *, fresh: bool = True) -> TrialState:
        """Return the state of a trial then, by id, unique prefix, name or "@latest". Raises NotFound, Ambiguous."""
        return self._fold_of(self._resolve(trial, fresh), self.views.cut).state()

    def history(
        self,
        trial: str,
        metric: str,
        *,
        points: int | None = None,
        between: Between | None = None,
        fresh: bool = True,
    ) -> Series:
        """Return the points of a metric that had been logged then. Raises NotFound, InvalidValue."""
        trial_id, cut = self._resolve(trial, fresh), self.views.cut
        state = self._fold_of(trial_id, cut).state()
        if metric not in state.metrics:
            raise self.no_metric(trial_id, metric, list(state.metrics))
        series = self.series(self._now, trial_id, metric, fresh=False)
        if cut.position is not None:
            known = self._fold_of(trial_id, Cut(cut.position)).state().metrics[metric].count
            series = series.picked(range(known))
        if cut.time_ns is not None:
            series = series.until(cut.time_ns)
        return series.thinned(points, between)

    def _resolve(self, text: str, fresh: bool) -> str:
        if text != LATEST:
            try:
                return self.resolve(self._now, text, fresh=fresh)
            except Ambiguous:  # perhaps it was not, then
                pass
        return self.resolve(self.views, text, fresh=fresh)

    def _fold_of(self, trial: str, cut: Cut) -> TrialFold:
        """Fold a trial's own batches, up to the cut. Raises NotFound if it has no event there."""
        after, state = self._now.read(lambda db: _snapshot(db, trial, cut), fresh=False)
        log, pace = self.views.log, self.views.pace()
        upto = log.end() if cut.position is None else min(cut.position, log.end())
        checker = ChainChecker()
        for stored in batches(log, after, upto, pace, trial_subject(trial)):
            for part in slices(stored, after, cut, pace, checker):
                fold(state, [part])
                pace.breathe()
        if not state.events:
            raise NotFound(f"trial {trial!r} had no event yet, then")
        return state


def _snapshot(db: sqlite3.Connection, trial: str, cut: Cut) -> tuple[int, TrialFold]:
    """Return the best state to begin with, and its position."""
    last = _LAST if cut.position is None else cut.position
    until = _LAST if cut.time_ns is None else cut.time_ns
    row = db.execute(_SNAPSHOT, (trial, last, until)).fetchone()
    if row is None:
        return 0, TrialFold.new(trial)
    return row[0], decode_fold(trial, row[1])
