"""One trial: its working state, the exhaustive `apply`, the column-wise `fold`, and the state to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct, field, structs

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
from eventrun.projections.about import About, Chart, Note, Table, Told, to_plain
from eventrun.projections.chrono import ChronoFold, ChronoState
from eventrun.projections.metric import MetricFold, MetricState, Points, observe_calls
from eventrun.projections.params import ParamSource, merged, remember
from eventrun.projections.rows import Rows, Slice, rows_of
from eventrun.projections.status import Writer, judge

TRIALS_VERSION = 3  # raise it when a fold changes its meaning or its bytes: every view is then built anew

_UNKNOWN = TrialCreated("", "", "")


class TrialState(Struct, array_like=True, gc=False, frozen=True):
    """A trial as it is read back.

    `status` is one of seven words, see `view_status`; `raw_status` is the caller's own. `params` and `metadata` are
    nested as they were set, a later mapping merged into the earlier. `finished_ns` is None while it runs, and when it
    is lost. `modified_ns` is the latest time of its events. `duration_s` is the time from its first start to its
    finish, or to `modified_ns`: measured by the monotonic clock if it was started once and has finished, else the
    difference of two times and at least what was measured. `hidden`: it isn't shown
    unless asked for. `late` counts what was recorded after its writer had
    finished the trial (and is kept like all else), `events` all events, `position` is where the last of them stands in
    the log.
    """

    # Tuples, not lists: an empty one costs nothing to read, and a list would be tracked by the garbage collector.
    id: str
    project: str
    group: str
    name: str
    description: str
    version: str | None
    attempt: int
    status: str
    raw_status: str
    error: str | None
    params: dict[str, Any]
    metadata: dict[str, Any]
    tags: dict[str, Any]
    metrics: dict[str, MetricState]
    chronos: dict[str, ChronoState]
    inputs: tuple[Plain, ...]
    outputs: tuple[Plain, ...]
    charts: tuple[Chart, ...]
    tables: tuple[Table, ...]
    notes: tuple[Note, ...]
    created_ns: int | None
    started_ns: int | None
    finished_ns: int | None
    modified_ns: int | None
    duration_s: float | None
    late: int
    events: int
    position: int
    hidden: bool
    packed_sources: bytes  # rarely read, and half as dear to read as all the rest

    @property
    def param_sources(self) -> dict[str, list[ParamSource]]:
        """Who set each param to what, newest last, by its keys joined by "/"; the last SOURCES_KEPT of each."""
        return _sources.decode(self.packed_sources)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values: mappings, lists, numbers, text, None, and bytes where a param is bytes."""
        plain: dict[str, Any] = to_plain(self)
        del plain["packed_sources"]
        return {**plain, "param_sources": to_plain(self.param_sources)}


class TrialFold(Struct, array_like=True, gc=False):
    """The working state of a trial: all that is needed to go on folding, and to give its `TrialState`.

    `params` is replaced, never changed in place, so a state that was given stays as it is.
    """

    id: str
    created: TrialCreated = _UNKNOWN  # the last in the log; another writer's events may come before the first
    about: About = field(default_factory=About)
    params: dict[str, Any] = {}
    sources: dict[str, list[ParamSource]] = {}
    metrics: dict[str, MetricFold] = {}
    chronos: dict[str, ChronoFold] = {}
    writers: dict[int, Writer] = {}
    created_ns: int | None = None
    started_ns: int | None = None
    modified_ns: int | None = None
    late: int = 0
    events: int = 0
    position: int = 0
    starts: int = 0
    measured_s: float | None = None  # the most that a writer measured from its start to its finish

    @classmethod
    def new(cls, trial_id: str) -> TrialFold:
        """Begin with a trial of which nothing is known."""
        return cls(trial_id)

    def encode(self) -> bytes:
        """Write the state as msgpack: equal bytes for equal events, however they were grouped."""
        # A fold counts before it applies, so the writers may have come in another order.
        self.writers = dict(sorted(self.writers.items()))
        return _encoder.encode(self)

    @classmethod
    def decode(cls, trial_id: str, data: bytes) -> TrialFold:
        """Read what `encode` wrote."""
        trial = _folds.decode(data)
        trial.id = trial_id
        return trial

    def state(self) -> TrialState:
        """Give the state to read, which later folds don't change."""
        created, about, status = self.created, self.about, judge(self.writers)
        return TrialState(
            self.id, created.project, created.group, created.name if about.name is None else about.name,
            created.description if about.description is None else about.description,
            created.version, created.attempt,
            status.view, status.raw, status.error,
            self.params, about.metadata, dict(about.tags),
            {name: metric.state() for name, metric in self.metrics.items()},
            {name: chrono.state() for name, chrono in self.chronos.items()},
            tuple(about.inputs), tuple(about.outputs),
            tuple(about.charts), tuple(about.tables), tuple(about.notes),
            self.created_ns, self.started_ns, status.finished_ns, self.modified_ns,
            self._lasted(status.finished_ns),
            self.late, self.events, self.position, about.hidden,
            _encoder.encode(self.sources),
        )  # fmt: skip

    def _lasted(self, finished_ns: int | None) -> float | None:
        until_ns = self.modified_ns if finished_ns is None else finished_ns
        if self.started_ns is None or until_ns is None:
            return None
        measured = self.measured_s or 0.0
        if self.starts == 1 and self.measured_s is not None and finished_ns is not None:
            return measured
        return max((until_ns - self.started_ns) / 1e9, measured, 0.0)

    def writer(self, name: int) -> Writer:
        """Give what is known of a writer."""
        known = self.writers.get(name)
        if known is None:
            known = self.writers[name] = Writer()
        return known


_encoder = msgspec.msgpack.Encoder()
_folds = msgspec.msgpack.Decoder(TrialFold)
_states = msgspec.msgpack.Decoder(TrialState)
_sources = msgspec.msgpack.Decoder(dict[str, list[ParamSource]])


def encode_state(state: TrialState) -> bytes:
    """Write a trial's state as msgpack."""
    return _encoder.encode(state)


def decode_state(data: bytes) -> TrialState:
    """Read what `encode_state` wrote."""
    return _states.decode(data)


def apply(trial: TrialFold, stored: StoredEvent) -> TrialFold:
    """Take in the next event; changes `trial` and returns it. This is what `fold` means, one event at a time."""
    part = Slice(stored.position, stored.stream, stored.sequence, [(stored.time_ns, stored.event)])
    _count(trial, part, *_signs_of_life(part))
    return _apply(trial, stored)


def fold(trial: TrialFold, slices: Sequence[Slice]) -> dict[str, Points]:
    """Take in slices of the trial's batches, in the order of the log; return the new points by metric.

    Changes `trial` in place. Any grouping of the same events gives the same bytes, and the same points in all.
    Metrics, and each chrono, are taken out and folded as columns: no other event changes what they do.
    """
    rows = rows_of(slices)
    kinds = list(map(type, rows.events))
    if kinds.count(MetricsLogged) == len(kinds):
        end = 0
        for part in slices:
            start, end = end, end + len(part.items)
            _count(trial, part, rows.times_ns[start:end], len(part.items))
        return _log(trial, rows)  # type: ignore[arg-type]
    chronos: dict[str, list[ChronoStarted | ChronoFinished]] = {}
    for part in slices:
        _count(trial, part, *_signs_of_life(part))
        for place, (_, event) in enumerate(part.items):
            if isinstance(event, (ChronoStarted, ChronoFinished)):
                chronos.setdefault(event.name, []).append(event)
            elif not isinstance(event, MetricsLogged):
                _apply(trial, part.at(place))
    for name, events in chronos.items():
        _time(trial, name, events)
    calls = [place for place, kind in enumerate(kinds) if kind is MetricsLogged]
    return _log(trial, rows.take(calls))  # type: ignore[arg-type]


def _count(trial: TrialFold, part: Slice, times_ns: list[int], lived: int) -> None:
    """Count a slice; `times_ns` are those of its writer's signs of life, `lived` where the last of them is behind."""
    trial.events += len(part.items)
    trial.position = part.position + len(part.items) - 1
    if times_ns:
        last_ns = max(times_ns)
        writer = trial.writer(part.stream.writer)
        writer.last_ns = last_ns if writer.last_ns is None else max(last_ns, writer.last_ns)
        writer.last = max(writer.last, part.first + lived - 1)
        trial.modified_ns = last_ns if trial.modified_ns is None else max(last_ns, trial.modified_ns)


def _signs_of_life(part: Slice) -> tuple[list[int], int]:
    # A writer's end is noticed by another, perhaps days later.
    times, lived = [], 0
    for count, (time_ns, event) in enumerate(part.items, 1):
        if not isinstance(event, WriterEnded):
            times.append(time_ns)
            lived = count
    return times, lived


def _apply(trial: TrialFold, stored: StoredEvent) -> TrialFold:
    # Every case returns and none is `case _`, so that mypy misses a return when a new kind of event is missing here.
    event = stored.event
    match event:
        case MetricsLogged():
            _log(trial, Rows([stored.stream.writer], [stored.sequence], [stored.time_ns], [event]))
            return trial
        case ChronoStarted() | ChronoFinished():
            return _time(trial, event.name, [event])
        case TrialCreated():
            return _create(trial, stored.time_ns, event)
        case TrialStarted():
            return _start(trial, stored)
        case TrialFinished() | StatusChanged():
            return _say(trial, stored, event)
        case WriterEnded():
            return _end(trial, stored, event)
        case ParamsSet():
            return _set_params(trial, event)
        case (
            DescriptionSet() | TagsAdded() | TagsRemoved() | MetadataSet() | NoteAdded()
            | ChartAdded() | TableAdded() | InputMarked() | OutputMarked() | TrialRenamed() | Hidden() | Restored()
        ):  # fmt: skip
            return _tell(trial, stored.time_ns, event)
        case ProjectCreated() | GroupCreated() | Heartbeat() | AttemptClaimed():
            return trial


def _log(trial: TrialFold, rows: Rows[MetricsLogged]) -> dict[str, Points]:
    if not rows.events:
        return {}
    trial.late += [call.late for call in rows.events].count(True)
    return observe_calls(trial.metrics, rows)


def _time(trial: TrialFold, name: str, events: list[ChronoStarted | ChronoFinished]) -> TrialFold:
    chrono = trial.chronos.get(name)
    if chrono is None:
        chrono = trial.chronos[name] = ChronoFold()
    chrono.observe(events)
    trial.late += sum(isinstance(event, ChronoFinished) and event.late for event in events)
    return trial


def _create(trial: TrialFold, time_ns: int, event: TrialCreated) -> TrialFold:
    trial.created = event
    trial.created_ns = time_ns if trial.created_ns is None else min(time_ns, trial.created_ns)
    return trial


def _start(trial: TrialFold, stored: StoredEvent) -> TrialFold:
    trial.starts += 1
    trial.writer(stored.stream.writer).begin(stored.time_ns)
    trial.started_ns = stored.time_ns if trial.started_ns is None else min(stored.time_ns, trial.started_ns)
    return trial


def _say(trial: TrialFold, stored: StoredEvent, event: TrialFinished | StatusChanged) -> TrialFold:
    trial.writer(stored.stream.writer).say(stored.time_ns, event)
    if isinstance(event, TrialFinished) and event.seconds is not None:
        trial.measured_s = max(event.seconds, trial.measured_s or 0.0)
    return trial


def _end(trial: TrialFold, stored: StoredEvent, event: WriterEnded) -> TrialFold:
    if stored.stream.writer == event.writer:  # by its own account
        event = structs.replace(event, last=stored.sequence)
    trial.writer(event.writer).end(event)
    return trial


def _set_params(trial: TrialFold, event: ParamsSet) -> TrialFold:
    trial.params = merged(trial.params, event.params)
    remember(trial.sources, event.params, event.source)
    return trial


def _tell(trial: TrialFold, time_ns: int, event: Told) -> TrialFold:
    trial.about.apply(time_ns, event)
    return trial
