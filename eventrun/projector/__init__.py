"""Views: the stored results of the projections, kept up with the log by whoever reads.

A view and its checkpoint change in one transaction, so a killed reader leaves nothing half-done. One process folds at
a time, under SQLite's write lock; the others wait until the view is far enough, or read what is there. Views that are
missing, damaged, of another version or of another log are no error: a new generation takes their place.

What is stored doesn't depend on the steps in which it was folded: `digest` is the same after any number of catch-ups
and after a rebuild.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from eventrun.aggregators import load_numpy
from eventrun.codec import ChainChecker, digest
from eventrun.errors import LogDamaged, NotFound, StoreUnavailable
from eventrun.events import trial_subject
from eventrun.projections import Projection
from eventrun.projector.catchup import SNAPSHOT_EVERY, Folding, next_boundary
from eventrun.projector.custom import get_keys, get_state, project, view_of
from eventrun.projector.generations import Generation, Place, UnusableView, in_memory, is_about_place, is_busy
from eventrun.projector.log import EVERYTHING, Cut, Log, Pace, batches, slices
from eventrun.projector.series import DamagedView
from eventrun.projector.transactions import (
    TRIALS,
    View,
    checkpoint,
    ending,
    furthest,
    lock,
    reading,
    set_checkpoint,
    writing,
)
from eventrun.projector.verify import VerifyReport

if TYPE_CHECKING:  # imported on first use
    import sqlite3

__all__ = ["VerifyReport", "Views"]

STINT_EVENTS = 1_000_000  # per transaction: about five seconds, after which others may read it
GENTLE_STINT_EVENTS = 100_000  # the same in a process that records, which gets on much more slowly
NUMPY_FROM = 500_000  # events to fold from which loading numpy pays
NO_SNAPSHOTS = 1 << 62  # a position that no log reaches
HEALINGS = 2  # the first time views that can't be used are made anew, the second time in memory

T = TypeVar("T")

_DROP_TRIAL = (
    "DELETE FROM chunks WHERE number >> 24 IN (SELECT number FROM series WHERE trial = ?)",
    "DELETE FROM series WHERE trial = ?",
    "DELETE FROM snapshots WHERE trial = ?",
    "DELETE FROM folds WHERE trial = ?",
    "DELETE FROM facts WHERE trial = ?",
    "DELETE FROM metrics WHERE trial = ?",
    "DELETE FROM trials WHERE number = ?",
)
_ANY_FOLD = "SELECT 1 FROM folds LIMIT 1"
_NUMBER = "SELECT number FROM trials WHERE id = ?"
_BUILT_IN = (
    """
    SELECT id, project, grp, name, status, tags, created_ns, events, position, raw_status, error, description,
    version, attempt, started_ns, finished_ns, modified_ns, duration_s, hidden, state, until_ns, fold
    FROM trials JOIN folds ON trial = number ORDER BY id
    """,
    """
    SELECT id, key, facts.number, text, there
    FROM facts JOIN trials ON trial = trials.number ORDER BY id, key
    """,
    """
    SELECT id, metrics.name, count, last, latest, min, max, mean
    FROM metrics JOIN trials ON trial = trials.number ORDER BY id, metrics.name
    """,
    """
    SELECT id, series.name, count, open
    FROM series JOIN trials ON trial = trials.number ORDER BY id, series.name
    """,
    """
    SELECT id, series.name, chunks.number & 0xffffff, points
    FROM chunks JOIN series ON series.number = chunks.number >> 24 JOIN trials ON trial = trials.number
    ORDER BY id, series.name, chunks.number
    """,
    """
    SELECT id, snapshots.position, until_ns, fold
    FROM snapshots JOIN trials ON trial = number ORDER BY id, snapshots.position
    """,
    "SELECT subject, hidden_project, fold FROM subjects ORDER BY subject",
)
_OWN = "SELECT key, state FROM states WHERE projection = ? AND version = ? ORDER BY key"


def _never() -> bool:
    return False


Stint = Callable[["sqlite3.Connection", int], None]


class Views:
    """The views of one log. Used by one thread at a time.

    `folder` is the store's; None, or one that can't be written, keeps the views in memory. `gentle` tells whether
    this process records just now: then no more than about 0.4 ms are folded without a pause. `cut` makes views of the
    past, in memory only.
    """

    def __init__(
        self,
        folder: Path | None,
        log: Log,
        projections: Iterable[Projection[Any]] = (),
        *,
        gentle: Callable[[], bool] = _never,
        snapshot_every: int = SNAPSHOT_EVERY,
        cut: Cut = EVERYTHING,
    ) -> None:
        self.log = log
        self.cut = cut
        self.projections = {projection.name: projection for projection in projections}
        self._place = Place(folder) if folder is not None and cut == EVERYTHING else None
        self.gentle = gentle
        self._every = snapshot_every if cut == EVERYTHING else NO_SNAPSHOTS
        self._db: sqlite3.Connection | None = None
        self._forgotten: weakref.finalize[Any, Any] | None = None
        self._generation: Generation | None = None
        self._checker = ChainChecker()
        self._checked: tuple[Generation | None, int] | None = None  # what the checker has seen to the end

    @property
    def in_memory(self) -> bool:
        """Whether the views are lost when this process ends."""
        return self._place is None

    def pace(self) -> Pace:
        """Tell how fast this process may work just now."""
        return Pace(self.gentle())

    # reading -------------------------------------------------------------------------------------------------

    def read(self, job: Callable[[sqlite3.Connection], T], *, fresh: bool = True) -> T:
        """Catch up (unless `fresh` is False) and run `job` on the views; it must only read, and may be run twice.

        Raises LogDamaged, StoreUnavailable.
        """
        return self._healing(lambda anew: job(self._caught_up() if fresh or anew else self._open()))

    def catch_up(self) -> int:
        """Fold what the log holds by now, and return the position reached."""
        return self.read(lambda db: checkpoint(db, TRIALS)[0])

    def drop_if_ahead(self) -> None:
        """Begin anew if the views have read further than the log goes.

        To be called before a lost tail is appended again, from journals: the same batches may come in another order,
        and where the last one lies where it was, nobody could tell afterwards.
        """
        if self._db is not None or (self._place is not None and self._place.current() is not None):
            self._healing(lambda _: self._check_not_ahead(self._open()))

    def _check_not_ahead(self, db: sqlite3.Connection) -> None:
        reached, end = furthest(db), self.log.end()
        if reached > end:
            raise UnusableView(f"the log ends at {end}, the views have read up to {reached}")

    def register(self, projection: Projection[Any]) -> None:
        """Keep a projection of the user's own; one of the same name is replaced."""
        self.projections[projection.name] = projection

    def state(self, name: str, key: str = "", *, fresh: bool = True) -> Any:
        """Return the state of a projection of the user's own under a key. Raises NotFound for an unknown projection."""
        projection = self._registered(name)
        return self._healing(
            lambda anew: get_state(self._projected(projection, fresh or anew), projection, key)
        )

    def keys(self, name: str, *, fresh: bool = True) -> list[str]:
        """Return the keys of a projection of the user's own, sorted. Raises NotFound for an unknown projection."""
        projection = self._registered(name)
        return self._healing(lambda anew: get_keys(self._projected(projection, fresh or anew), projection))

    def _registered(self, name: str) -> Projection[Any]:
        if name not in self.projections:
            known = ", ".join(map(repr, sorted(self.projections))) or "none"
            raise NotFound(f"there is no projection {name!r}; registered: {known}")
        return self.projections[name]

    def _projected(self, projection: Projection[Any], fresh: bool) -> sqlite3.Connection:
        db = self._open()
        if fresh:
            self._catch_up(db, view_of(projection), partial(self._project, projection))
        return db

    def digest(self) -> str:
        """Hash all that the views hold, the registered projections included, in the order of its keys (SHA-256)."""
        return self.read(self._digest, fresh=False)[0]

    def is_right(self) -> bool:
        """Tell whether the views hold what a fresh fold gives of the log up to where they have read."""
        if self.read(lambda db: db.execute("PRAGMA integrity_check(1)").fetchone()[0], fresh=False) != "ok":
            return False
        stored, reached = self.read(self._digest, fresh=False)
        fresh = Views(
            None, self.log, self.projections.values(), gentle=self.gentle, snapshot_every=self._every
        )
        try:
            fresh._catch_up_all(fresh._open(), reached)
            return fresh.digest() == stored
        finally:
            fresh.close()

    def _digest(self, db: sqlite3.Connection) -> tuple[str, dict[View, int]]:
        found, pace = hashlib.sha256(), self.pace()
        own = [view_of(projection) for projection in self.projections.values()]
        with reading(db):
            reached = {view: checkpoint(db, view)[0] for view in (TRIALS, *own)}
            queries = [(query, ()) for query in _BUILT_IN] + [
                (_OWN, (projection.name, projection.version)) for projection in self.projections.values()
            ]
            for query, parameters in queries:
                found.update(b"\xc1")  # a byte that no row begins with
                for row in db.execute(query, parameters):
                    found.update(msgspec.msgpack.encode(row))
                    pace.breathe()
        found.update(msgspec.msgpack.encode(sorted(reached.items())))
        return found.hexdigest(), reached

    # making anew ---------------------------------------------------------------------------------------------

    def rebuild(self, trial: str | None = None) -> int:
        """Make all views anew from the log beside the present ones, and switch; or those of one trial, in place.

        Returns the position reached. Others read the old views until then.
        """
        if trial is not None:
            return self._healing(lambda _: self._rebuild_trial(self._caught_up(), trial))
        return self._healing(lambda _: self._rebuild())

    def _rebuild(self) -> int:
        place = self._place
        self.close()
        if place is None:
            return self._catch_up_all(self._open())
        with place.lock():
            place.remove_unfinished()
            made, self._db = place.create()
            self._generation = made
            try:
                position = self._catch_up_all(self._db)
                place.point_to(made)
            except BaseException:
                self.close()  # nobody points to it: the next read opens the one before
                place.remove(made.number)
                raise
        return position

    def catch_up_all(self) -> int:
        """Catch up the built-in views and all of the user's own, and return the position reached."""
        return self._healing(lambda _: self._catch_up_all(self._open()))

    def _catch_up_all(self, db: sqlite3.Connection, upto: Mapping[View, int] | None = None) -> int:
        stints: dict[View, Stint] = {TRIALS: self._fold}
        stints.update((view_of(own), partial(self._project, own)) for own in self.projections.values())
        for view, stint in stints.items():
            self._catch_up(db, view, stint, upto[view] if upto else None)
        return checkpoint(db, TRIALS)[0]

    def _rebuild_trial(self, db: sqlite3.Connection, trial: str) -> int:
        pace, every, checker = self.pace(), self._every, ChainChecker()
        with writing(db):
            position, _ = checkpoint(db, TRIALS)
            for (number,) in db.execute(_NUMBER, (trial,)).fetchall():
                for statement in _DROP_TRIAL:
                    db.execute(statement, (number,))
            folding = Folding(db, pace, every, only=trial)
            boundary = None
            for stored in batches(self.log, 0, position, pace, trial_subject(trial)):
                for part in slices(stored, 0, Cut(position), pace, checker):
                    if boundary is not None and part.position > boundary:
                        folding.snapshot(boundary)
                    folding.take_cut(part)
                    boundary = next_boundary(part.position + len(part.items) - 1, every)
            if boundary is not None and boundary <= position:
                folding.snapshot(boundary)
            folding.write()
        return position

    # catching up ---------------------------------------------------------------------------------------------

    def _caught_up(self) -> sqlite3.Connection:
        db = self._open()
        self._catch_up(db, TRIALS, self._fold)
        return db

    def _catch_up(self, db: sqlite3.Connection, view: View, stint: Stint, upto: int | None = None) -> None:
        """Run stints, a transaction each, until the view has read what the log held at the beginning."""
        position, _ = checkpoint(db, view)
        target = self.log.end()  # after the checkpoint: another process may be ahead of an earlier answer
        if self.cut.position is not None:
            target = min(target, self.cut.position)
        if upto is not None:
            target = min(target, upto)
        if position > target:
            raise UnusableView(f"the log ends at {target}, the views have read up to {position}")
        while position < target:
            if lock(db, view, target):
                stint(db, target)
            position, _ = checkpoint(db, view)

    def _fold(self, db: sqlite3.Connection, target: int) -> None:
        with ending(db):
            damage = self._fold_stint(db, target)
        if damage is not None:
            raise damage

    def _fold_stint(self, db: sqlite3.Connection, target: int) -> LogDamaged | None:
        """Fold the next events; what comes before damage in the log is kept."""
        start, mark = checkpoint(db, TRIALS)
        self._check_same_log(start, mark)
        if not start and db.execute(_ANY_FOLD).fetchone() is not None:
            raise DamagedView("there are trials, but no checkpoint")
        pace = self.pace()
        target = min(target, start + (GENTLE_STINT_EVENTS if pace.gentle else STINT_EVENTS))
        if target - start >= NUMPY_FROM and not pace.gentle:
            load_numpy()
        if self._checked != (self._generation, start):
            self._checker = ChainChecker()
        self._checked = None
        folding = Folding(db, pace, self._every, keep_points=self.cut == EVERYTHING)
        position, damage, within = start, None, False
        try:
            for stored in batches(self.log, start, target, pace):
                for part in slices(stored, start, self.cut, pace, self._checker):
                    within = True
                    folding.take_cut(part)
                within = False
                position, mark = stored.last_position, digest(stored.batch)
        except LogDamaged as error:
            if within:  # half a batch was taken
                raise
            damage = error
        folding.write()
        if self.cut.position is not None:
            position = min(position, self.cut.position)
        set_checkpoint(db, TRIALS, position, mark)
        self._checked = (self._generation, position)
        return damage

    def _check_same_log(self, position: int, mark: bytes) -> None:
        """Raise UnusableView if the log isn't the one whose events up to `position` are in the views."""
        if position and self.cut == EVERYTHING:
            page = self.log.read(position - 1, limit_bytes=1)
            if not page or page[0].last_position != position or digest(page[0].batch) != mark:
                raise UnusableView("the views were made from another log")

    def _project(self, projection: Projection[Any], db: sqlite3.Connection, target: int) -> None:
        """Run a projection of the user's own over the next events."""
        with ending(db):
            start, mark = checkpoint(db, view_of(projection))
            self._check_same_log(start, mark)
            stop = min(target, start + STINT_EVENTS)
            project(db, self.log, projection, stop, target, self.pace(), self.cut)

    # opening and healing -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the database. The next read opens it again; views in memory begin anew."""
        db = self.abandon()
        if db is not None:
            db.close()

    def abandon(self) -> sqlite3.Connection | None:
        """Give away the connection as it is: in a fork's child it must be neither used nor closed."""
        db, self._db, self._generation, self._checked = self._db, None, None, None
        if self._forgotten is not None:
            self._forgotten.detach()
        return db

    def _open(self) -> sqlite3.Connection:
        """Open the generation that the pointer names just now, or make one."""
        place = self._place
        if place is None:
            if self._db is None:
                self._db = in_memory()
                # A moment of the past is nobody's to close once it is forgotten.
                self._forgotten = weakref.finalize(self, self._db.close)
                self._forgotten.atexit = False
            return self._db
        named = place.current()
        if self._db is not None and self._generation == named:
            return self._db
        self.close()
        if named is None:
            return self._begin_generation(place, None)
        self._generation = named
        self._db = place.open(named)
        return self._db

    def _begin_generation(self, place: Place, unusable: Generation | None) -> sqlite3.Connection:
        """Make a new generation in the place of an unusable one, unless another process just did."""
        with place.lock():
            named = place.current()
            if named is None or named == unusable:
                self._generation, self._db = place.create()
                place.point_to(self._generation)
                return self._db
        self._generation = named
        self._db = place.open(named)
        return self._db

    def _healing(self, job: Callable[[bool], T]) -> T:
        """Run a job; when the views can't be used, begin anew and run it again, telling it so: they are empty then.

        sqlite3 raises UnicodeDecodeError where damage has reached the text of an error.
        """
        import sqlite3

        for attempt in range(HEALINGS + 1):
            try:
                return job(attempt > 0)
            except (sqlite3.DatabaseError, DamagedView, UnusableView, UnicodeDecodeError) as error:
                if isinstance(error, sqlite3.Error) and is_busy(error):
                    raise StoreUnavailable(
                        "another process holds the views for too long: try again"
                    ) from error
                if attempt == HEALINGS:
                    raise StoreUnavailable(f"the views can't be made: {error}") from error
                self._heal(error, attempt)
        raise AssertionError("unreachable")

    def _heal(self, error: Exception, attempt: int) -> None:
        import sqlite3

        unusable, place = self._generation, self._place
        self.close()
        newer = isinstance(error, UnusableView) and error.newer
        if place is None or newer or attempt == HEALINGS - 1 or is_about_place(error):
            self._place = None
            return
        try:
            self._begin_generation(place, unusable)
        except (sqlite3.DatabaseError, UnusableView):
            self.close()  # the next attempt, or memory in the end, tells
