"""The read methods that the present and the past share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from eventrun.codec import ChainChecker, StoredEvent
from eventrun.errors import NotFound
from eventrun.events import group_subject, project_subject, split_subject, trial_subject
from eventrun.filters import Condition
from eventrun.pending import Page
from eventrun.projections import GroupState, ProjectState, SubjectFold, TrialState, group_state, project_state
from eventrun.projector import Views
from eventrun.projector.catchup import chunk_number, decode_subject, open_of
from eventrun.projector.custom import stored_events
from eventrun.projector.log import Pace, batches, slices
from eventrun.projector.series import CHUNK, Chunk, DamagedView, decode_chunk
from eventrun.projector.transactions import reading
from eventrun.query.listing import Choice, pages, read_state, resolve, suggestion
from eventrun.query.series import Series
from eventrun.query.thinning import Between

if TYPE_CHECKING:
    import sqlite3

EVENT_PAGE_BYTES = 128 << 10  # of batches per page of events, some 10,000 events
GROUPS_PER_PAGE = 16
FROM_THE_END = -1  # the cursor that begins a tail with what comes next

T = TypeVar("T")

_STATE = "SELECT state FROM trials WHERE id = ?"
_SERIES = """
    SELECT series.number, count, open FROM series JOIN trials ON trial = trials.number
    WHERE id = ? AND series.name = ?
"""
_CHUNKS = "SELECT points FROM chunks WHERE number >= ? AND number < ? ORDER BY number"
_GROUPS = "SELECT DISTINCT project, grp FROM trials"
_SUBJECTS = "SELECT subject FROM subjects"
_SUBJECT = "SELECT fold FROM subjects WHERE subject = ?"
_TRIALS_OF = (
    "SELECT state FROM trials WHERE project = :project AND (:grp IS NULL OR grp = :grp) AND NOT hidden"
)


class Reads:
    """What can be asked; all methods wait, and are called on one thread at a time.

    Methods of many answers are given a cursor and return a page: items, and the next cursor, or None at the end. The
    first cursor is 0, or a position to read after. With `fresh` the views are caught up first.
    """

    def __init__(self, views: Views) -> None:
        self.views = views

    # trials --------------------------------------------------------------------------------------------------

    def trials(
        self,
        cursor: Any = 0,
        *,
        project: str | None = None,
        group: str | None = None,
        status: str | None = None,
        tag: str | None = None,
        name: str | None = None,
        where: Condition | None = None,
        hidden: bool = False,
        order_by: str | None = None,
        limit: int | None = None,
        offset: int = 0,
        fresh: bool = True,
    ) -> Page[TrialState]:
        """List trials in the order of their creation or of `order_by` ("-" reverses), missing values last.

        Hidden ones, and those of hidden projects, are there only with `hidden`.

        Raises InvalidValue.
        """
        if isinstance(cursor, int):
            choice = Choice(project, group, status, tag, name, where, hidden)
            cursor = pages(self.views, choice, order_by, limit, offset, fresh)
        return _page(cursor)

    def trial(self, trial: str, *, fresh: bool = True) -> TrialState:
        """Return the state of a trial by id, unique prefix, name or "@latest". Raises NotFound, Ambiguous."""

        def job(db: sqlite3.Connection) -> TrialState:
            return _state(db, resolve(db, trial))

        return self.views.read(job, fresh=fresh)

    def history(
        self,
        trial: str,
        metric: str,
        *,
        points: int | None = None,
        between: Between | None = None,
        fresh: bool = True,
    ) -> Series:
        """Return the points of a metric. Raises NotFound, Ambiguous, InvalidValue.

        `between` (a, b) takes those whose step lies in it (None: open; the place in order of arrival stands for a
        missing step); `points` thins them to the extremes and ends of that many buckets.
        """
        trial_id = self.resolve(self.views, trial, fresh=fresh)
        return self.series(self.views, trial_id, metric, fresh=False).thinned(points, between)

    def resolve(self, views: Views, text: str, *, fresh: bool) -> str:
        """Return the id of the trial that a text names. Raises NotFound, Ambiguous."""
        return views.read(lambda db: resolve(db, text), fresh=fresh)

    def series(self, views: Views, trial: str, metric: str, *, fresh: bool) -> Series:
        """Return the whole series of a metric of the trial with this id. Raises NotFound."""

        def job(db: sqlite3.Connection) -> Series:
            with reading(db):
                row = db.execute(_SERIES, (trial, metric)).fetchone()
                if row is None:
                    state = _state(db, trial)
                    if metric in state.metrics:
                        raise DamagedView(f"the series of {metric!r} is not where it should be")
                    raise self.no_metric(trial, metric, list(state.metrics))
                return Series(trial, metric, _chunks(db, views.pace(), *row))

        return views.read(job, fresh=fresh)

    def no_metric(self, trial: str, metric: str, known: list[str]) -> NotFound:
        """Make the error that a trial has no metric of that name."""
        near = suggestion(metric, known) or (f"; it has {', '.join(known[:8])}" if known else "; it has none")
        return NotFound(f"trial {trial} has no metric {metric!r}{near}")

    # groups and projects -------------------------------------------------------------------------------------

    def groups(
        self, cursor: Any = 0, *, project: str | None = None, hidden: bool = False, fresh: bool = True
    ) -> Page[GroupState]:
        """List groups by project and name, each with a summary of its trials that aren't hidden."""
        if isinstance(cursor, int):
            found = self.views.read(_groups, fresh=fresh)
            wanted = [pair for pair in found if pair[1] and project in (None, pair[0])]
            cursor = _in_pages(_shown((self._group(*pair) for pair in wanted), hidden))
        return _page(cursor)

    def group(self, project: str, name: str, *, fresh: bool = True) -> GroupState:
        """Return the state of one group. Raises NotFound."""
        self.views.read(_groups, fresh=fresh)
        found = self._group(project, name)
        if found is None:
            raise NotFound(f"there is no group {name!r} in project {project!r}")
        return found

    def projects(self, cursor: Any = 0, *, hidden: bool = False, fresh: bool = True) -> Page[ProjectState]:
        """List projects by name, each with a summary of its trials that aren't hidden."""
        if isinstance(cursor, int):
            names = sorted({project for project, _ in self.views.read(_groups, fresh=fresh)})
            cursor = _in_pages(_shown(map(self._project, names), hidden))
        return _page(cursor)

    def _group(self, project: str, group: str) -> GroupState | None:
        own, trials = self._members(group_subject(project, group), project, group)
        return group_state(own, project, group, trials) if own is not None or trials else None

    def _project(self, project: str) -> ProjectState | None:
        own, trials = self._members(project_subject(project), project, None)
        return project_state(own, project, trials) if own is not None or trials else None

    def _members(
        self, subject: str, project: str, group: str | None
    ) -> tuple[SubjectFold | None, list[TrialState]]:
        """Return a subject's own fold, and its trials. The columns that lead there have no checksum of their own."""
        pace, attempts = self.views.pace(), count()

        def job(db: sqlite3.Connection) -> tuple[SubjectFold | None, list[TrialState]]:
            trials = []
            for (data,) in db.execute(_TRIALS_OF, {"project": project, "grp": group}):
                state = read_state(data)
                if state.project != project or group not in (None, state.group):
                    raise DamagedView(f"trial {state.id!r} is not of {subject!r}")
                trials.append(state)
                pace.breathe()
            row = db.execute(_SUBJECT, (subject,)).fetchone()
            # Once made anew, the views don't know the name: the name itself was damaged.
            if row is None and not trials and next(attempts) == 0:
                raise DamagedView(f"there is nothing of {subject!r}")
            return None if row is None else decode_subject(subject, row[0]), trials

        return self.views.read(job, fresh=False)

    # events --------------------------------------------------------------------------------------------------

    def events(
        self, cursor: Any = 0, *, trial: str | None = None, limit: int | None = None, fresh: bool = True
    ) -> Page[StoredEvent]:
        """Read the log after a position (the first cursor), in order; of one trial, or all. Raises LogDamaged."""
        if isinstance(cursor, int):
            subject = None if trial is None else trial_subject(self._resolve(trial, fresh))
            cursor = self._events(cursor, subject, limit)
        return _page(cursor)

    def _resolve(self, text: str, fresh: bool) -> str:
        return self.resolve(self.views, text, fresh=fresh)

    def _events(self, after: int, subject: str | None, limit: int | None) -> Iterator[list[StoredEvent]]:
        views, left = self.views, limit
        log, cut, pace = views.log, views.cut, small_pages(views.pace())
        upto = log.end() if cut.position is None else min(cut.position, log.end())
        checker = ChainChecker()
        for stored in batches(log, after, upto, pace, subject):
            if left is not None and left <= 0:
                return
            found = [
                event for part in slices(stored, after, cut, pace, checker) for event in stored_events(part)
            ]
            found = found if left is None else found[:left]
            left = None if left is None else left - len(found)
            yield found


def small_pages(pace: Pace) -> Pace:
    """Read the log in pages small enough to show."""
    pace.page_bytes = EVENT_PAGE_BYTES
    return pace


def _state(db: sqlite3.Connection, trial: str) -> TrialState:
    row = db.execute(_STATE, (trial,)).fetchone()
    state = None if row is None else read_state(row[0])
    if state is None or state.id != trial:
        raise DamagedView(f"an index of the views doesn't lead to trial {trial!r}")
    return state


def _page(pages: Iterator[list[T]]) -> Page[T]:
    items = next(pages, None)
    return ([], None) if items is None else (items, pages)


S = TypeVar("S", GroupState, ProjectState)


def _shown(states: Iterable[S | None], hidden: bool) -> Iterator[S | None]:
    for state in states:
        yield None if state is not None and state.hidden and not hidden else state


def _in_pages(found: Iterable[T | None]) -> Iterator[list[T]]:
    page: list[T] = []
    for item in found:
        if item is not None:
            page.append(item)
        if len(page) == GROUPS_PER_PAGE:
            yield page
            page = []
    if page:
        yield page


def _chunks(db: sqlite3.Connection, pace: Pace, number: Any, points: Any, data: bytes | None) -> list[Chunk]:
    if not isinstance(number, int) or not isinstance(points, int):
        raise DamagedView("the number or count of a series is no number")
    rows = db.execute(_CHUNKS, (chunk_number(number, 0), chunk_number(number + 1, 0))).fetchall()
    chunks = []
    for (packed,) in rows:
        chunks.append(decode_chunk(packed))
        pace.breathe()
    if len(chunks) != points // CHUNK or any(chunk.count != CHUNK for chunk in chunks):
        raise DamagedView(f"a series of {points} points has {len(chunks)} full chunks")
    opened = open_of(points, data)
    return chunks if opened is None else [*chunks, opened]


def _groups(db: sqlite3.Connection) -> list[tuple[str, str]]:
    """Return all pairs of project and group ("": none) that have a trial or an event of their own, sorted."""
    found = {(project, group) for project, group in db.execute(_GROUPS) if project}
    if not all(isinstance(name, str) for pair in found for name in pair):
        raise DamagedView("the name of a project or group is no text")
    for (subject,) in db.execute(_SUBJECTS):
        kind, *names = split_subject(subject)
        found.add((names[0], names[1] if kind == "g" else ""))
    return sorted(found)
