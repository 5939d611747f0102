"""From eventrun's states to Track's objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from eventrun.compat.track.aggregators import (
    Aggregator,
    StatAggregator,
    TimeSeriesAggregator,
    ValueAggregator,
    made,
)
from eventrun.compat.track.structure import (
    AnyStatus,
    CustomStatus,
    Project,
    Status,
    Trial,
    TrialGroup,
    split_uid,
    status,
)
from eventrun.events import (
    ChronoFinished,
    ChronoStarted,
    MetricsLogged,
    StatusChanged,
    TrialFinished,
    TrialStarted,
)
from eventrun.projections import series_name, view_status
from eventrun.trial import id_of

if TYPE_CHECKING:
    from eventrun.codec import StoredEvent
    from eventrun.projections import GroupState, ProjectState, TrialState

RESERVED = "_track"  # the key in metadata under which stands what Track needs besides
NATIVE = "eventrun:"  # begins the hash of a trial that was not made by Track's interface; its id follows
RUNTIME = "runtime"  # the chrono of a whole trial
ORPHANS = "orphan"  # the project of trials that have none

# The status of a trial whose word is not Track's own.
_OF_VIEW = {
    "created": Status.CreatedGroup, "running": Status.Running, "suspended": Status.Suspended,
    "completed": Status.Completed, "failed": Status.Exception, "interrupted": Status.Interrupted,
    "lost": Status.Interrupted,  # killed: like one that was interrupted, it may be gone on with
}  # fmt: skip

# Makes a trial's aggregator by kind ("metric", "chrono") and name; None: the usual one.
Factories = Callable[[str, str], Callable[[], Any] | None]


class _Later:
    """Attributes that are found when they are first asked for."""

    def __getattr__(self, name: str) -> Any:
        find = self.__dict__.get("_later", {}).get(name)
        if find is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.__dict__.update(find())
        return self.__dict__[name]

    def _find_later(self, names: Iterable[str], find: Callable[[], dict[str, Any]]) -> None:
        for name in names:
            del self.__dict__[name]
        self.__dict__["_later"] = dict.fromkeys(names, find)

    def __getstate__(self) -> dict[str, Any]:
        for name in self.__dict__.get("_later", {}):
            getattr(self, name)
        return {name: value for name, value in self.__dict__.items() if name != "_later"}


class StoredTrial(_Later, Trial):
    """A trial as it was when it was asked for; its metrics, chronos and errors are read on first use."""


class StoredGroup(_Later, TrialGroup):
    """A group as it was when it was asked for; its trials are read on first use."""


class StoredProject(_Later, Project):
    """A project as it was when it was asked for; its groups and trials are read on first use."""


def trial_id(uid: str) -> str:
    """Give eventrun's id of the trial with this uid. Raises InvalidValue."""
    hashed, _ = split_uid(uid)
    return hashed.removeprefix(NATIVE) if hashed.startswith(NATIVE) else id_of(identity(uid))


def identity(uid: str) -> str:
    """Give what the trial with this uid is declared as."""
    return f"track/{uid}"


def uid_of(state: TrialState) -> str:
    """Give a trial's uid."""
    kept = _kept(state)
    return f"{kept['hash']}_{kept['revision']}" if "hash" in kept else f"{NATIVE}{state.id}_0"


def trial_of(state: TrialState, events: Callable[[], Iterable[StoredEvent]], factories: Factories) -> Trial:
    """Make Track's trial."""
    kept = _kept(state)
    trial = StoredTrial(
        name=state.name if kept.get("named", True) else None,
        description=state.description or None,
        tags=dict(state.tags),
        version=state.version,
        group_id=kept.get("group") or (group_uid(state.project, state.group) if state.group else None),
        project_id=state.project,
        parameters=dict(state.params),
        metadata={
            **_others(state.metadata),
            "_update_count": state.events,
            "_last_change": _date(state.modified_ns),
        },
        status=status_of(state),
    )
    trial.uid = uid_of(state)

    def find() -> dict[str, Any]:
        before = (stored for stored in events() if stored.position <= state.position)
        return contents(before, factories)

    trial._find_later(("metrics", "chronos", "errors"), find)
    return trial


def group_of(state: GroupState, trials: Callable[[], set[str]]) -> TrialGroup:
    """Make Track's group."""
    group = StoredGroup(
        _kept(state).get("uid") or group_uid(state.project, state.name),
        state.name,
        state.description or None,
        dict(state.tags),
        _others(state.metadata),
        project_id=state.project,
    )
    group._find_later(("trials",), lambda: {"trials": trials()})
    return group


def project_of(
    state: ProjectState, groups: Callable[[], set[str]], trials: Callable[[], set[str]]
) -> Project:
    """Make Track's project."""
    project = StoredProject(
        state.project, state.description or None, dict(state.tags), _others(state.metadata)
    )
    project._find_later(("groups", "trials"), lambda: {"groups": groups(), "trials": trials()})
    return project


def group_uid(project: str, name: str) -> str:
    """Give the uid of a group that has none of its own."""
    return TrialGroup(name=name, project_id=project).uid


def status_of(state: TrialState) -> AnyStatus:
    """Give a trial's status: Track's own word, one of the caller's, or what comes nearest to eventrun's."""
    customs = _kept(state).get("statuses", {})
    if state.status == "lost":
        return Status.Interrupted
    if state.raw_status in customs:
        return CustomStatus(state.raw_status, customs[state.raw_status])
    known = status(state.raw_status)
    if isinstance(known, Status) and view_status(known.name) == state.status:
        return known
    unknown = state.status == "running" and state.raw_status.lower() not in _RUNNING
    return CustomStatus(state.raw_status) if unknown else _OF_VIEW[state.status]


_RUNNING = frozenset({"running", "runninggroup", "resume", "collecting", "post_processing"})


def views_of(given: AnyStatus) -> list[str]:
    """Name eventrun's statuses that a trial of this status may have."""
    if isinstance(given, Status):
        return ["interrupted", "lost"] if given is Status.Interrupted else [view_status(given.name)]
    return [view_status(given.name), "completed", "failed"]  # a trial may have finished with it


def contents(events: Iterable[StoredEvent], factories: Factories) -> dict[str, Any]:
    """Fold a trial's events, in the order of the log, into Track's metrics, chronos and errors."""
    metrics: dict[str, Any] = {}
    chronos: dict[str, Any] = {}
    errors: list[str] = []
    for _, _, _, _, event in events:
        match event:
            case MetricsLogged():
                for name, value in event.values.items():
                    _observe(metrics, series_name(name, event.subset), value, event, factories)
            case TrialStarted():
                chronos.setdefault(RUNTIME, ValueAggregator())
            case ChronoStarted():
                _chrono(chronos, event, factories)
            case ChronoFinished():
                _chrono(chronos, event, factories).append(event.seconds)
            case StatusChanged() | TrialFinished():
                # What ended it is told once, by the finish and by the status that follows.
                if event.error is not None and errors[-1:] != [event.error]:
                    errors.append(event.error)
            case _:
                pass
    return {"metrics": metrics, "chronos": chronos, "errors": errors}


def _chrono(chronos: dict[str, Any], event: ChronoStarted | ChronoFinished, factories: Factories) -> Any:
    if event.name not in chronos:
        factory = factories("chrono", event.name)
        usual = ValueAggregator() if event.name == RUNTIME else StatAggregator(1)
        chronos[event.name] = made(event.aggregator) or (factory() if factory else usual)
    return chronos[event.name]


def _observe(
    metrics: dict[str, Any], name: str, value: Any, event: MetricsLogged, factories: Factories
) -> None:
    """Put a value into a metric's container, which its first call decides: by step, or an aggregator."""
    step = event.step if event.key is None else _hashable(event.key)
    if name not in metrics:
        factory = factories("metric", name)
        metrics[name] = (
            {} if step is not None
            else made(event.aggregator) or (factory() if factory else TimeSeriesAggregator())
        )  # fmt: skip
    container = metrics[name]
    if isinstance(container, dict):
        container[step] = value  # a later call without a step stands under None
    elif step is not None and isinstance(container, TimeSeriesAggregator):
        container.append((step, value))
    else:
        _append(container, value)


def _append(container: Any, value: Any) -> None:
    numeric = not isinstance(container, Aggregator) or isinstance(
        container, (ValueAggregator, TimeSeriesAggregator)
    )
    if numeric or isinstance(value, (int, float)):  # text has no mean
        container.append(value)


def _hashable(key: Any) -> Any:
    if isinstance(key, list):
        return tuple(_hashable(inner) for inner in key)
    return tuple(sorted(key.items())) if isinstance(key, dict) else key


def _kept(state: TrialState | GroupState) -> dict[str, Any]:
    kept = state.metadata.get(RESERVED)
    return kept if isinstance(kept, dict) else {}


def _others(metadata: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name != RESERVED}


def _date(time_ns: int | None) -> str | None:
    return None if time_ns is None else datetime.fromtimestamp(time_ns / 1e9, UTC).isoformat()


def numbered(trials: Iterable[Trial]) -> Iterator[Trial]:
    """Give trials by their revision."""
    return iter(sorted(trials, key=lambda trial: trial.revision))
