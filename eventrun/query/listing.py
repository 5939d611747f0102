"""Lists of trials: which ones, in which order, page by page; and finding the one that a text names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from eventrun.errors import Ambiguous, InvalidValue, NotFound
from eventrun.filters import Condition, compile_sql, prepare
from eventrun.projections import TrialState, decode_state
from eventrun.projector import Views
from eventrun.projector.catchup import find, tag_text
from eventrun.projector.series import DamagedView, without_crc

if TYPE_CHECKING:
    import sqlite3

FIRST_PAGE = 100  # trials; the first page alone is asked for by `first()`
PAGE = 1_000  # trials
NEAR = 5  # names suggested, or candidates named, in an error
NAMES_SEARCHED = 2_000  # newest names among which near ones are looked for

STATUSES = ("created", "running", "suspended", "completed", "failed", "interrupted", "lost")
LATEST = "@latest"

# Conditions are put together from these texts only; values are bound.
_CONDITIONS = {
    "project": "project = :project",
    "group": "grp = :group",
    "status": "status = :status",
    "tag": "instr(tags, :tag) > 0",
    "name": "name = :name",
}
_SHOWN = (
    "NOT hidden AND project NOT IN (SELECT hidden_project FROM subjects WHERE hidden_project IS NOT NULL)"
)
_AFTER = "(created_ns, id) > (:created_ns, :id)"
_BEFORE = "(created_ns, id) < (:created_ns, :id)"
_ANY = "1"
_LIST = """
    SELECT id, state FROM trials WHERE {conditions} AND created_ns IS NOT NULL
    ORDER BY created_ns {order}, id {order} LIMIT :limit OFFSET :offset
"""
# Trials of which only other writers' events have come so far; last, whatever the direction.
_LIST_UNCREATED = """
    SELECT id, state FROM trials WHERE {conditions} AND created_ns IS NULL
    AND id > :id ORDER BY id LIMIT :limit OFFSET :offset
"""
_COUNT_CREATED = "SELECT count(*) FROM trials WHERE {conditions} AND created_ns IS NOT NULL"
_GET = "SELECT id, state FROM wanted JOIN trials ON id = column1"
_BY_ID = "SELECT id FROM trials WHERE id = :text"
_BY_NAME = "SELECT id FROM trials WHERE name = :text ORDER BY created_ns, id"
_BY_PREFIX = "SELECT id FROM trials WHERE id >= :text AND id < :text || char(0x10ffff) ORDER BY id"
_UNINDEXED = "SELECT 1 FROM trials NOT INDEXED WHERE id = :text OR name = :text"
_DESCRIBE = "SELECT id, project, grp, name FROM wanted JOIN trials ON id = column1"
_NEWEST = "SELECT id FROM trials WHERE {conditions} ORDER BY created_ns DESC, id DESC LIMIT 1"
_NEWEST_NAMES = "SELECT name FROM trials ORDER BY created_ns DESC, id DESC LIMIT ?"


class Choice(NamedTuple):
    """Which trials; None: any."""

    project: str | None = None
    group: str | None = None
    status: str | None = None
    tag: str | None = None
    name: str | None = None
    where: Condition | None = None
    hidden: bool = True  # hidden ones too

    def checked(self) -> Choice:
        """Return it. Raises InvalidValue for an unknown status."""
        if self.status is not None and self.status not in STATUSES:
            raise InvalidValue(f"{self.status!r} is no status of a trial; those are {', '.join(STATUSES)}")
        return self

    def holds(self, state: TrialState) -> bool:
        """Tell whether a trial is chosen."""
        return (
            (self.hidden or not state.hidden)
            and self.project in (None, state.project)
            and self.group in (None, state.group)
            and self.status in (None, state.status)
            and self.name in (None, state.name)
            and (self.tag is None or self.tag in state.tags)
        )  # `where` is read from other tables than these columns

    def sql(self, *more: str) -> str:
        """Give the conditions; the parameters are `bound`."""
        own = [text for field, text in _CONDITIONS.items() if getattr(self, field) is not None]
        where = "" if self.where is None else compile_sql(self.where).text
        shown = "" if self.hidden else _SHOWN
        return " AND ".join(filter(None, [*own, where, shown, *more])) or _ANY

    def bound(self) -> dict[str, Any]:
        """Give the parameters of `sql`."""
        tag = None if self.tag is None else tag_text([self.tag])
        own = {field: getattr(self, field) for field in _CONDITIONS}
        return {**own, "tag": tag, **(compile_sql(self.where).bound if self.where is not None else {})}


ANY_TRIAL = Choice()


# pages ---------------------------------------------------------------------------------------------------------


def pages(
    views: Views, choice: Choice, order_by: str | None, limit: int | None, offset: int, fresh: bool
) -> Iterator[list[TrialState]]:
    """Yield pages of the chosen trials in order. A trial recorded between two pages doesn't shift the rest."""
    for what, number in (("limit", limit), ("offset", offset)):
        if number is not None and number < 0:
            raise InvalidValue(f"{what}={number!r}: it is a number of trials, 0 or more")
    descending, key = _order(order_by or "created")
    choice.checked()
    if key is None:
        return _by_time(views, choice, descending, limit, offset, fresh)
    return _by_key(views, choice, key, descending, limit, offset, fresh)


def _by_time(
    views: Views, choice: Choice, descending: bool, limit: int | None, offset: int, fresh: bool
) -> Iterator[list[TrialState]]:
    left, size = limit, FIRST_PAGE
    created, before = True, None  # the trial before the page
    while left is None or left > 0:
        size = size if left is None else min(size, left)
        found = views.read(
            partial(_page, views, choice, descending, created, before, size, offset), fresh=fresh
        )
        fresh = False
        if found:
            yield found
            left = None if left is None else left - len(found)
            before, offset = found[-1], 0
        if len(found) < size:
            if not created:
                return
            if offset:
                offset = max(offset - views.read(partial(_count, choice), fresh=False), 0)
            created, before = False, None
        size = PAGE


def _page(
    views: Views,
    choice: Choice,
    descending: bool,
    created: bool,
    before: TrialState | None,
    size: int,
    offset: int,
    db: sqlite3.Connection,
) -> list[TrialState]:
    """Read a page. Raises DamagedView."""
    prepare(db)
    bound = {**choice.bound(), "limit": size, "offset": offset, "id": ""}
    more = ""
    if before is not None:
        bound.update(id=before.id, created_ns=before.created_ns)
        more = (_BEFORE if descending else _AFTER) if created else ""
    query = _LIST if created else _LIST_UNCREATED
    statement = query.format(conditions=choice.sql(more), order="DESC" if descending else "ASC")
    pace, any_trial = views.pace(), choice == ANY_TRIAL
    states: list[TrialState] = []
    for trial, data in db.execute(statement, bound).fetchall():
        state = read_state(data)
        # The columns that were asked have no checksum of their own.
        if state.id != trial or not (any_trial or choice.holds(state)):
            raise DamagedView(f"the columns of trial {trial!r} contradict its state")
        states.append(state)
        pace.breathe()
    keys = [(state.created_ns, state.id) for state in states if state.created_ns is not None]
    if created and (len(keys) < len(states) or keys != sorted(keys, reverse=descending)):
        raise DamagedView("an index of the views is not in order")
    return states


def _count(choice: Choice, db: sqlite3.Connection) -> int:
    statement = _COUNT_CREATED.format(conditions=choice.sql())
    return int(db.execute(statement, choice.bound()).fetchone()[0])


def read_state(data: object) -> TrialState:
    """Read a stored state. Raises DamagedView."""
    try:
        return decode_state(without_crc(data))
    except msgspec.DecodeError as error:
        raise DamagedView(f"a stored state is malformed: {error}") from error


def _by_key(
    views: Views,
    choice: Choice,
    key: Callable[[TrialState], Any],
    descending: bool,
    limit: int | None,
    offset: int,
    fresh: bool,
) -> Iterator[list[TrialState]]:
    """Sort by anything in a state: all are read once to get the order, then the wanted ones page by page."""
    present: list[tuple[tuple[int, Any], str]] = []
    missing: list[str] = []
    for page in _by_time(views, choice, False, None, 0, fresh):
        for state in page:
            rank = _rank(key(state))
            if rank is None:
                missing.append(state.id)
            else:
                present.append((rank, state.id))
    present.sort(key=lambda entry: entry[0], reverse=descending)  # stable: of equals the older comes first
    wanted = [trial for _, trial in present] + missing
    wanted = wanted[offset:] if limit is None else wanted[offset : offset + limit]
    for start in range(0, len(wanted), PAGE):
        yield get_states(views, wanted[start : start + PAGE])


def get_states(views: Views, trials: Sequence[str]) -> list[TrialState]:
    """Read the states of these trials, in this order, without catching up."""

    def job(db: sqlite3.Connection) -> list[TrialState]:
        found = {trial: read_state(data) for trial, data in find(db, _GET, [(trial,) for trial in trials])}
        return [found[trial] for trial in trials if trial in found]

    return views.read(job, fresh=False)


# order ---------------------------------------------------------------------------------------------------------

_SHORT = {
    "started": "started_ns",
    "finished": "finished_ns",
    "modified": "modified_ns",
    "duration": "duration_s",
}
_OWN = (
    "name",
    "id",
    "project",
    "group",
    "description",
    "version",
    "attempt",
    "status",
    "raw_status",
    "error",
)
_FIELDS = {
    **_SHORT,
    **{field: field for field in (*_OWN, *_SHORT.values())},
}
_MAPPINGS = ("params", "metadata", "tags")


def _order(order_by: str) -> tuple[bool, Callable[[TrialState], Any] | None]:
    """Take an order apart: descending?, and what to sort by (None: the time of creation). Raises InvalidValue."""
    path = order_by.removeprefix("-")
    descending = path != order_by
    if path == "created":
        return descending, None
    if path in _FIELDS:
        field = _FIELDS[path]
        return descending, lambda state: getattr(state, field)
    root, _, rest = path.partition(".")
    if rest and root in _MAPPINGS:
        return descending, lambda state: _within(getattr(state, root), rest)
    if rest and root in ("metrics", "chronos"):
        return descending, lambda state: _statistic(
            getattr(state, root), rest, "last" if root == "metrics" else "sum"
        )
    raise InvalidValue(
        f"order_by={order_by!r}: order by created, {', '.join(_SHORT)}, name, status, metrics.NAME,"
        " metrics.NAME.min (or any other of its numbers), chronos.NAME, params.NAME, metadata.NAME or tags.NAME;"
        " a - in front reverses"
    )


def _within(mapping: Any, path: str) -> Any:
    """Look up a key that may hold dots or slashes itself, or lead through nested mappings."""
    if not isinstance(mapping, dict):
        return None
    if path in mapping:
        return mapping[path]
    for at, letter in enumerate(path):
        if letter in "./" and path[:at] in mapping:
            found = _within(mapping[path[:at]], path[at + 1 :])
            if found is not None:
                return found
    return None


def _statistic(states: dict[str, Any], path: str, default: str) -> Any:
    if path in states:
        return getattr(states[path], default)
    name, _, field = path.rpartition(".")
    return getattr(states[name], field, None) if name in states and not field.startswith("_") else None


def _rank(value: Any) -> tuple[int, Any] | None:
    """Make values of any types comparable: numbers, then text, then the rest; None for what counts as missing."""
    if value is None or value != value:
        return None
    if isinstance(value, (bool, int, float)):
        return 0, value
    if isinstance(value, str):
        return 1, value
    return 2, repr(value)


# one trial -----------------------------------------------------------------------------------------------------


def resolve(db: sqlite3.Connection, text: str) -> str:
    """Return the id of the trial that a text names: an id, "@latest", a name or a prefix of one id.

    Raises NotFound with near names, Ambiguous with the candidates.
    """
    if text == LATEST:
        row = db.execute(_NEWEST.format(conditions=_SHOWN)).fetchone()
        if row is None:
            raise NotFound("there is no trial yet")
        return str(row[0])
    for query in (_BY_ID, _BY_NAME, _BY_PREFIX) if text else ():
        found = [str(trial) for (trial,) in db.execute(query, {"text": text}).fetchmany(NEAR + 1)]
        if len(found) == 1:
            return found[0]
        if found:
            shown = [f"{trial} ({where})" for trial, where in _described(db, found[:NEAR]).items()]
            more = " and more" if len(found) > NEAR else ""
            what = "name" if query is _BY_NAME else "begin of id"
            raise Ambiguous(
                f"{text!r} is the {what} of several trials: {', '.join(shown)}{more}; give the id"
            )
    if db.execute(_UNINDEXED, {"text": text}).fetchone() is not None:
        raise DamagedView(f"an index of the views doesn't lead to trial {text!r}")
    raise NotFound(f"there is no trial {text!r}{_near(db, text)}; `eventrun ls` lists what there is")


def _described(db: sqlite3.Connection, trials: list[str]) -> dict[str, str]:
    rows = find(db, _DESCRIBE, [(trial,) for trial in trials])
    found = {
        trial: "/".join(part for part in (project, group, name) if part)
        for trial, project, group, name in rows
    }
    return {trial: found[trial] for trial in trials if trial in found}


def _near(db: sqlite3.Connection, text: str) -> str:
    names = dict.fromkeys(name for (name,) in db.execute(_NEWEST_NAMES, (NAMES_SEARCHED,)) if name)
    return suggestion(text, list(names))


def suggestion(text: str, known: Sequence[str]) -> str:
    """Say which known names are near, if any."""
    from difflib import get_close_matches  # 3 ms that only an error shall pay

    near = get_close_matches(text, known, NEAR)
    return f"; near: {', '.join(map(repr, near))}" if near else ""
