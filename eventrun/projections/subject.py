"""Groups and projects: what was told about them, and the summary of their trials."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import fsum, isfinite, sqrt
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct, field

from eventrun.codec import StoredEvent
from eventrun.events import (
    AttemptClaimed,
    ChartAdded,
    ChronoFinished,
    ChronoStarted,
    DescriptionSet,
    GroupCreated,
    Heartbeat,
    Hidden,
    InputMarked,
    MetadataSet,
    MetricsLogged,
    NoteAdded,
    OutputMarked,
    ParamsSet,
    Plain,
    ProjectCreated,
    Restored,
    Scalar,
    StatusChanged,
    TableAdded,
    TagsAdded,
    TagsRemoved,
    TrialCreated,
    TrialFinished,
    TrialRenamed,
    TrialStarted,
    WriterEnded,
)
from eventrun.projections.about import About, Chart, Note, Told, to_plain
from eventrun.projections.metric import Number
from eventrun.projections.params import leaves
from eventrun.projections.rows import Slice
from eventrun.projections.trial import TrialState

VARYING_VALUES = 50  # distinct values shown per param; the smallest are kept


class Held(NamedTuple):
    """A value and the id of the trial that holds it."""

    value: Scalar
    trial: str


class SubjectFold(Struct, array_like=True, gc=False):
    """The working state of a group's or project's own events. Its trials' events are in streams of their own."""

    subject: str
    about: About = field(default_factory=About)
    created_ns: int | None = None
    modified_ns: int | None = None
    events: int = 0
    position: int = 0

    @classmethod
    def new(cls, subject: str) -> SubjectFold:
        """Begin with a subject ("g/..." or "p/...") of which nothing is known."""
        return cls(subject)

    def apply(self, stored: StoredEvent) -> SubjectFold:
        """Take in the next event; changes this state and returns it."""
        time_ns, event = stored.time_ns, stored.event
        self.events += 1
        self.position = stored.position
        self.modified_ns = time_ns if self.modified_ns is None else max(time_ns, self.modified_ns)
        # As for trials: every case returns, none is `case _`.
        match event:
            case ProjectCreated() | GroupCreated():
                self.created_ns = time_ns if self.created_ns is None else min(time_ns, self.created_ns)
                return self
            case (
                DescriptionSet() | TagsAdded() | TagsRemoved() | MetadataSet() | NoteAdded()
                | ChartAdded() | TableAdded() | InputMarked() | OutputMarked() | TrialRenamed() | Hidden() | Restored()
            ):  # fmt: skip
                return self._tell(time_ns, event)
            case (
                TrialCreated() | TrialStarted() | TrialFinished() | StatusChanged() | ChronoStarted()
                | ChronoFinished() | MetricsLogged() | ParamsSet() | WriterEnded() | Heartbeat() | AttemptClaimed()
            ):  # fmt: skip
                return self

    def fold(self, slices: Sequence[Slice]) -> None:
        """Take in slices in the order of the log. Such events are few: one at a time is quick enough."""
        for part in slices:
            for place in range(len(part.items)):
                self.apply(part.at(place))

    def encode(self) -> bytes:
        """Write the state as msgpack: equal bytes for equal events, however they were grouped."""
        return _encoder.encode(self)

    @classmethod
    def decode(cls, subject: str, data: bytes) -> SubjectFold:
        """Read what `encode` wrote."""
        fold = _folds.decode(data)
        fold.subject = subject
        return fold

    def _tell(self, time_ns: int, event: Told) -> SubjectFold:
        self.about.apply(time_ns, event)
        return self


_encoder = msgspec.msgpack.Encoder()
_folds = msgspec.msgpack.Decoder(SubjectFold)


class Spread(Struct, array_like=True, gc=False, frozen=True):
    """How the last values of a metric that are finite numbers lie over several trials; `sd` of the population."""

    count: int
    mean: float
    sd: float
    min: Number
    max: Number


class Attempts(Struct, array_like=True, gc=False, frozen=True):
    """Several trials of one configuration: their ids, and for each metric the spread of its last values."""

    params: dict[str, Any]
    version: str | None
    trials: tuple[str, ...]
    metrics: dict[str, Spread]


class _Summary(Struct, array_like=True, gc=False, frozen=True, kw_only=True):
    project: str
    description: str
    tags: dict[str, Any]
    metadata: dict[str, Any]
    hidden: bool
    notes: tuple[Note, ...]
    charts: tuple[Chart, ...]
    created_ns: int | None
    modified_ns: int | None
    started_ns: int | None
    finished_ns: int | None
    trials: int
    by_status: dict[str, int]
    params_varying: dict[str, list[Plain]]
    best: dict[str, dict[str, Held]]
    last: dict[str, Held]
    attempts: tuple[Attempts, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        plain: dict[str, Any] = to_plain(self)
        return plain


class GroupState(_Summary, array_like=True, gc=False, frozen=True, kw_only=True):
    """A group as it is read back: what was told about it, and its trials in short.

    `params_varying` has the params with more than one value (nested keys joined by "/"), sorted, the first
    VARYING_VALUES of each. `best` tells for each metric the lowest ("min") and highest ("max") number of any trial,
    `last` the last value of the trial modified last; each with the trial's id. `started_ns` is the first start,
    `finished_ns` the last finish, None while a trial runs or none has finished. `modified_ns` is the latest change of
    group or trials. `attempts` has the configurations (params and version) that were tried more than once.
    """

    name: str


class ProjectState(_Summary, array_like=True, gc=False, frozen=True, kw_only=True):
    """A project as it is read back; its fields are as in `GroupState`. `groups` maps a group's name to its trials.

    When it is `hidden`, so are all its trials.
    """

    groups: dict[str, int]


def group_state(
    own: SubjectFold | None, project: str, group: str, trials: Iterable[TrialState]
) -> GroupState:
    """Give the state of a group from its own events and its trials, in any order."""
    return GroupState(name=group, **_summary(own, project, list(trials)))


def project_state(own: SubjectFold | None, project: str, trials: Iterable[TrialState]) -> ProjectState:
    """Give the state of a project from its own events and all its trials, in any order."""
    known = list(trials)
    groups = dict(sorted(Counter(trial.group for trial in known).items()))
    return ProjectState(groups=groups, **_summary(own, project, known))


def _summary(own: SubjectFold | None, project: str, trials: list[TrialState]) -> dict[str, Any]:
    about = own.about if own else About()
    trials.sort(key=lambda trial: trial.id)  # so that ties are decided the same whatever order they came in
    modified = [trial.modified_ns for trial in trials] + ([own.modified_ns] if own else [])
    finished = [trial.finished_ns for trial in trials]
    running = any(trial.status in ("running", "suspended", "created") for trial in trials)
    return {
        "project": project,
        "description": about.description or "",
        "tags": dict(about.tags),
        "metadata": about.metadata,
        "hidden": about.hidden,
        "notes": tuple(about.notes),
        "charts": tuple(about.charts),
        "created_ns": own.created_ns if own else None,
        "modified_ns": max((ns for ns in modified if ns is not None), default=None),
        "started_ns": min(
            (trial.started_ns for trial in trials if trial.started_ns is not None), default=None
        ),
        "finished_ns": None if running else max((ns for ns in finished if ns is not None), default=None),
        "trials": len(trials),
        "by_status": dict(sorted(Counter(trial.status for trial in trials).items())),
        "params_varying": _varying(trials),
        "best": _best(trials),
        "last": _last(trials),
        "attempts": _attempts(trials),
    }


def _varying(trials: list[TrialState]) -> dict[str, list[Plain]]:
    found: dict[str, dict[tuple[int, Any], Plain]] = {}
    for trial in trials:
        for path, value in leaves(trial.params):
            found.setdefault(path, {}).setdefault(_order(value), value)
    return {
        path: [values[key] for key in sorted(values)[:VARYING_VALUES]]
        for path, values in sorted(found.items())
        if len(values) > 1
    }


def _order(value: Plain) -> tuple[int, Any]:
    """Return a key that sorts values of any types, and is equal for those that mean the same (1 and 1.0)."""
    match value:
        case None:
            return 0, None
        case bool():
            return 1, value
        case int() | float():
            return (2, value) if value == value else (3, None)
        case str():
            return 4, value
        case _:
            return 5, msgspec.msgpack.encode(value, order="sorted")


def _best(trials: list[TrialState]) -> dict[str, dict[str, Held]]:
    lows: dict[str, tuple[Number, str]] = {}
    highs: dict[str, tuple[Number, str]] = {}
    for trial in trials:
        for name, metric in trial.metrics.items():
            if metric.min is None or metric.max is None:
                continue
            if name not in lows or metric.min < lows[name][0]:
                lows[name] = metric.min, trial.id
            if name not in highs or metric.max > highs[name][0]:
                highs[name] = metric.max, trial.id
    return {name: {"min": Held(*lows[name]), "max": Held(*highs[name])} for name in sorted(lows)}


def _attempts(trials: list[TrialState]) -> tuple[Attempts, ...]:
    alike: dict[bytes, list[TrialState]] = {}
    for trial in trials:
        key = msgspec.msgpack.encode((trial.params, trial.version), order="sorted")
        alike.setdefault(key, []).append(trial)
    return tuple(
        Attempts(some[0].params, some[0].version, tuple(trial.id for trial in some), _spreads(some))
        for some in alike.values()
        if len(some) > 1
    )


def _spreads(trials: list[TrialState]) -> dict[str, Spread]:
    values: dict[str, list[Number]] = {}
    for trial in trials:
        for name, metric in trial.metrics.items():
            if isinstance(metric.last, (int, float)) and isfinite(metric.last):
                values.setdefault(name, []).append(metric.last)
    return {name: _spread(some) for name, some in sorted(values.items())}


def _spread(values: list[Number]) -> Spread:
    count = len(values)
    mean = fsum(value / count for value in values)
    largest = max(abs(value - mean) for value in values) or 1.0  # or squares of 1e200 would overflow
    sd = largest * sqrt(fsum(((value - mean) / largest) ** 2 for value in values) / count)
    return Spread(count, mean, sd, min(values), max(values))


def _last(trials: list[TrialState]) -> dict[str, Held]:
    last: dict[str, Held] = {}
    for trial in sorted(trials, key=lambda trial: trial.modified_ns or 0):
        for name, metric in trial.metrics.items():
            last[name] = Held(metric.last, trial.id)
    return dict(sorted(last.items()))
