"""One transaction's worth of folding: load what is touched, fold slices into it, write it back.

Rows are written many at a time. An `execute` for each row cost five times as much, and beside a thread that is busy
in Python ten times, because each gives up the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from eventrun.events import split_subject
from eventrun.projections import Points, Slice, SubjectFold, TrialFold, TrialState, encode_state, fold
from eventrun.projections.facts import Fact, as_number, facts_of
from eventrun.projector.log import Pace, between
from eventrun.projector.series import (
    CHUNK,
    Chunk,
    DamagedView,
    Packer,
    decode_chunk,
    encode_chunk,
    undamaged,
    with_crc,
    without_crc,
)

if TYPE_CHECKING:
    import sqlite3

SNAPSHOT_EVERY = 1_000_000  # positions between two snapshots of a trial, for the past
SNAPSHOT_WORTH = 100  # a trial with fewer events than 1/100 of that has none: folding it anew takes 50 ms
FOLD_EVENTS = 50_000  # events folded at a time
LIVE_TRIALS = 4_096  # trials in memory at a time
LIVE_POINTS = 1_000_000  # points in memory at a time, 60 to 80 bytes each
GENTLE_LIVE_POINTS = (
    50_000  # the same in a process that records: a full garbage collection looks at each, 1 ms in all
)
POINTS_PER_SERIES = 30  # but so many that writing them is worth while
ROWS = 64  # per statement
WAITING_SERIES = 512  # written at a time; an open chunk has up to 40 KiB
SEPARATOR, ESCAPE = "\x1f", "\x1e"  # around tags; a separator in a tag is written ESCAPE and "-"
EVER = -(2**63)  # before any time

# Not json_each, which takes one parameter for all: before SQLite 3.45 it cut texts at a NUL.
_WANTED = "WITH wanted AS (VALUES {})"
_FIND_TRIALS = (
    "SELECT id, number, fold, until_ns FROM wanted JOIN trials ON id = column1 JOIN folds ON trial = number"
)
_FIND_SUBJECTS = "SELECT subject, fold FROM wanted JOIN subjects ON subject = column1"
_FIND_SERIES = """
    SELECT trial, name, number, count, open FROM wanted JOIN series ON trial = column1 AND name = column2
"""
_LAST_TRIAL = "SELECT coalesce(max(number), 0) FROM trials"
_LAST_SERIES = "SELECT coalesce(max(number), 0) FROM series"
_PUT_TRIALS = """
    INSERT OR REPLACE INTO trials
    (number, id, project, grp, name, status, tags, created_ns, events, position, raw_status, error, description,
    version, attempt, started_ns, finished_ns, modified_ns, duration_s, hidden, state) VALUES
"""
_PUT_FACTS = "INSERT OR REPLACE INTO facts (key, trial, number, text, there) VALUES"
_DROP_FACT = "DELETE FROM facts WHERE key = ? AND trial = ?"
_PUT_METRICS = "INSERT OR REPLACE INTO metrics (name, trial, count, last, latest, min, max, mean) VALUES"
_PUT_FOLDS = "INSERT OR REPLACE INTO folds (trial, until_ns, fold) VALUES"
_PUT_SERIES = "INSERT OR REPLACE INTO series (number, trial, name, count, open) VALUES"
_PUT_CHUNKS = "INSERT OR REPLACE INTO chunks (number, points) VALUES"
_PUT_SUBJECTS = "INSERT OR REPLACE INTO subjects (subject, hidden_project, fold) VALUES"
_SNAPSHOT = """
    INSERT OR REPLACE INTO snapshots (trial, position, until_ns, fold)
    SELECT number, :position, until_ns, fold FROM trials JOIN folds ON trial = number
    WHERE position > :position - :every AND events >= :every / :worth AND (:only IS NULL OR id = :only)
"""


class _Trial:
    """A trial in memory: its number, its fold, its latest time, and the points that wait, a mapping for each fold."""

    def __init__(self, number: int, state: TrialFold, until_ns: int) -> None:
        self.number = number
        self.fold = state
        self.until_ns = until_ns
        self.points: list[dict[str, Points]] = []
        # As `facts` and `metrics` of the views have them.
        self.facts = facts_of(state.params, state.about.metadata, state.about.tags)
        self.counts = {name: metric.count for name, metric in state.metrics.items()}


class Folding:
    """Takes slices in log order and keeps the views of trials, groups and projects in `db` up with them.

    Nothing is in `db` before `write`; begin, commit and the checkpoint are the caller's. With `only` (a trial's id)
    snapshots are made of that trial alone; without `keep_points` series are left out.
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        pace: Pace,
        snapshot_every: int,
        *,
        only: str | None = None,
        keep_points: bool = True,
    ) -> None:
        self._db = db
        self._pace = pace
        self._every = snapshot_every
        self._only = only
        self._keep_points = keep_points
        self._trials: dict[str, _Trial] = {}
        self._subjects: dict[str, SubjectFold] = {}
        self._waiting: dict[str, list[Slice]] = {}
        self._waiting_events = 0
        self._points = 0
        self._last_trial = int(db.execute(_LAST_TRIAL).fetchone()[0])
        self._last_series = int(db.execute(_LAST_SERIES).fetchone()[0])

    def take(self, part: Slice) -> None:
        """Fold the next slice, perhaps later together with others."""
        self._waiting.setdefault(part.stream.subject, []).append(part)
        self._waiting_events += len(part.items)
        if self._pace.gentle or self._waiting_events >= FOLD_EVENTS:
            self._fold_waiting()
            if len(self._trials) > LIVE_TRIALS or self._points > self._most_points():
                self.write()

    def _most_points(self) -> int:
        if not self._pace.gentle or self._points <= GENTLE_LIVE_POINTS:
            return LIVE_POINTS
        series = sum(len(trial.fold.metrics) for trial in self._trials.values())
        return min(max(GENTLE_LIVE_POINTS, POINTS_PER_SERIES * series), LIVE_POINTS)

    def take_cut(self, part: Slice) -> None:
        """Fold the next slice of the whole log, and make snapshots where it passes a multiple of the interval."""
        start, size = 0, len(part.items)
        while start < size:
            boundary = next_boundary(part.position + start, self._every)
            stop = min(boundary + 1 - part.position, size)
            self.take(between(part, start, stop))
            if part.position + stop - 1 == boundary:
                self.snapshot(boundary)
            start = stop

    def snapshot(self, position: int) -> None:
        """Keep the folds of trials with news since the snapshot before, as they are at `position`."""
        self.write()
        bound = {"position": position, "every": self._every, "worth": SNAPSHOT_WORTH, "only": self._only}
        self._db.execute(_SNAPSHOT, bound)

    def write(self) -> None:
        """Write back all that was taken."""
        self._fold_waiting()
        subjects = [
            (subject, _hidden_project(subject, state), with_crc(state.encode()))
            for subject, state in self._subjects.items()
        ]
        put(self._db, _PUT_SUBJECTS, subjects)
        self._write_trials()
        self._write_points()
        self._trials.clear()
        self._subjects.clear()

    def _fold_waiting(self) -> None:
        waiting, self._waiting, self._waiting_events = self._waiting, {}, 0
        self._load({subject for subject in waiting if subject.startswith(("t/", "g/", "p/"))})
        for subject, parts in waiting.items():
            if subject.startswith("t/"):
                trial = self._trials[subject[2:]]
                points = fold(trial.fold, parts)
                latest = max([max(map(itemgetter(0), part.items)) for part in parts])
                trial.until_ns = max(trial.until_ns, latest)
                if points and self._keep_points:
                    trial.points.append(points)
                    self._points += sum(map(len, points.values()))
            elif subject in self._subjects:
                self._subjects[subject].fold(parts)
            self._pace.breathe()

    def _load(self, subjects: set[str]) -> None:
        others = sorted(
            subject for subject in subjects if subject[0] != "t" and subject not in self._subjects
        )
        for subject, data in find(self._db, _FIND_SUBJECTS, [(subject,) for subject in others]):
            self._subjects[subject] = decode_subject(subject, data)
        for subject in others:
            self._subjects.setdefault(subject, SubjectFold.new(subject))
        trials = sorted(
            subject[2:] for subject in subjects if subject[0] == "t" and subject[2:] not in self._trials
        )
        for trial, number, data, until_ns in find(self._db, _FIND_TRIALS, [(trial,) for trial in trials]):
            self._trials[trial] = _Trial(number, decode_fold(trial, data), until_ns)
            self._pace.breathe()
        for trial in trials:
            if trial not in self._trials:
                self._last_trial += 1
                self._trials[trial] = _Trial(self._last_trial, TrialFold.new(trial), EVER)

    def _write_trials(self) -> None:
        rows, folds, facts, metrics = [], [], [], []
        for trial in self._trials.values():
            state = trial.fold.state()
            rows.append((
                trial.number, state.id, state.project, state.group, state.name, state.status, tag_text(state.tags),
                state.created_ns, state.events, state.position, state.raw_status, state.error, state.description,
                state.version, state.attempt, state.started_ns, state.finished_ns, state.modified_ns, state.duration_s,
                state.hidden,
                with_crc(encode_state(state)),
            ))  # fmt: skip
            facts += self._new_facts(trial, facts_of(state.params, state.metadata, state.tags))
            metrics += _new_metrics(trial, state)
            folds.append((trial.number, trial.until_ns, with_crc(trial.fold.encode())))
            self._pace.breathe()
        put(self._db, _PUT_TRIALS, rows)
        put(self._db, _PUT_FOLDS, folds)
        put(self._db, _PUT_FACTS, sorted(facts, key=itemgetter(0, 1)))
        put(self._db, _PUT_METRICS, sorted(metrics, key=itemgetter(0, 1)))

    def _new_facts(self, trial: _Trial, facts: dict[str, Fact]) -> list[tuple[Any, ...]]:
        if facts == trial.facts:
            return []
        for key in trial.facts.keys() - facts.keys():
            self._db.execute(_DROP_FACT, (key, trial.number))
        return [(key, trial.number, *fact) for key, fact in facts.items() if fact != trial.facts.get(key)]

    def _write_points(self) -> None:
        self._points = 0
        group: list[tuple[_Trial, list[str]]] = []
        size = 0
        for trial in self._trials.values():
            names = list({name: None for part in trial.points for name in part})
            group.append((trial, names))
            size += len(names)
            if size > WAITING_SERIES:
                self._write_series(group)
                group, size = [], 0
        self._write_series(group)

    def _write_series(self, group: list[tuple[_Trial, list[str]]]) -> None:
        wanted = [(trial.number, name) for trial, names in group for name in names]
        known = {
            (trial, name): (number, count, data)
            for trial, name, number, count, data in find(self._db, _FIND_SERIES, wanted)
        }
        series: list[tuple[Any, ...]] = []
        chunks: list[tuple[Any, ...]] = []
        for trial, names in group:
            packer = Packer()
            for name in names:
                number, count, data = known.get((trial.number, name)) or (self._new_series(), 0, None)
                opened = open_of(count, data)
                full = count // CHUNK
                for part in trial.points:
                    self._pace.breathe()
                    for chunk in packer.extend(opened, part[name]) if name in part else ():
                        opened = chunk
                        if chunk.count == CHUNK:
                            chunks.append((chunk_number(number, full), encode_chunk(chunk)))
                            full, opened = full + 1, None
                left, data = (0, None) if opened is None else (opened.count, encode_chunk(opened))
                series.append((number, trial.number, name, full * CHUNK + left, data))
            while trial.points:  # one after the other: to free a million points at once takes 50 ms
                trial.points.pop()
                self._pace.breathe()
        put(self._db, _PUT_CHUNKS, chunks)
        put(self._db, _PUT_SERIES, series)

    def _new_series(self) -> int:
        self._last_series += 1
        return self._last_series


def _hidden_project(subject: str, state: SubjectFold) -> str | None:
    kind, *names = split_subject(subject)
    return names[0] if kind == "p" and state.about.hidden else None


def _new_metrics(trial: _Trial, state: TrialState) -> list[tuple[Any, ...]]:
    return [
        (
            name,
            trial.number,
            m.count,
            as_number(m.last),
            as_number(m.latest),
            as_number(m.min),
            as_number(m.max),
            as_number(m.mean),
        )
        for name, m in state.metrics.items()
        if trial.counts.get(name) != m.count
    ]


def tag_text(tags: Iterable[str]) -> str:
    """Give the tags' names as the column `tags` has them: each between two separators, to be found by instr()."""
    escaped = [tag.replace(ESCAPE, ESCAPE * 2).replace(SEPARATOR, f"{ESCAPE}-") for tag in tags]
    return "".join([f"{SEPARATOR}{tag}{SEPARATOR}" for tag in escaped])


def next_boundary(position: int, every: int) -> int:
    """Return the first position, this one included, where snapshots are made."""
    return -(-position // every) * every


def put(db: sqlite3.Connection, statement: str, rows: Sequence[Sequence[Any]]) -> None:
    """Insert rows, many at a time."""
    for places, cells in _chunks(rows):
        db.execute(f"{statement} {places}", cells)


def find(db: sqlite3.Connection, statement: str, keys: Sequence[Sequence[Any]]) -> Iterator[Any]:
    """Yield the rows that `statement` joins with `wanted`, a table of these keys."""
    for places, cells in _chunks(keys):
        yield from db.execute(f"{_WANTED.format(places)} {statement}", cells).fetchall()


def _chunks(rows: Sequence[Sequence[Any]]) -> Iterator[tuple[str, list[Any]]]:
    """Yield places to bind and what to bind; a power of two at a time: few statements, which stay compiled."""
    start = 0
    while start < len(rows):
        size = min(ROWS, 1 << (len(rows) - start).bit_length() - 1)
        one = "(" + ", ".join("?" * len(rows[0])) + ")"
        yield ", ".join([one] * size), [cell for row in rows[start : start + size] for cell in row]
        start += size


def chunk_number(series: int, n: int) -> int:
    """Number the n-th full chunk of a series."""
    return series << 24 | n


def open_of(count: int, data: bytes | None) -> Chunk | None:
    """Read the open chunk of a series with `count` points. Raises DamagedView."""
    chunk = None if data is None else decode_chunk(data)
    if (chunk.count if chunk else 0) != count % CHUNK:
        raise DamagedView(f"a series of {count} points has an open chunk of {chunk.count if chunk else 0}")
    return chunk


def decode_fold(trial: str, data: bytes) -> TrialFold:
    """Read a trial's fold. Raises DamagedView."""
    with undamaged():
        return TrialFold.decode(trial, without_crc(data))


def decode_subject(subject: str, data: bytes) -> SubjectFold:
    """Read a group's or project's fold. Raises DamagedView."""
    with undamaged():
        return SubjectFold.decode(subject, without_crc(data))
