"""What can happen: one frozen Struct per kind of event, and their union `Event`.

Events are stored as arrays that begin with a short tag. They only grow: a new field goes last and has a default, a
changed meaning gets a new tag and an upcaster in `codec`. An event tells what was called, as it was called; what
that means for a trial is decided by `projections`.

A subject is what a stream of events is about: "t/<trial id>", "g/<project>/<group>", "p/<project>", "s/<sweep id>",
"c/<hash of a configuration>".
"""

from __future__ import annotations

from typing import Any, get_args

from msgspec import Struct

# A metric's value, and a step: what is kept exactly as it was given.
Scalar = float | int | bool | str | None
Step = float | int | None
# Plain data as in JSON, plus bytes: params, metadata, chart specifications, references.
Plain = Any
# An aggregator's name and its arguments, as chosen by the caller: ("ring", {"n": 10}).
AggregatorChoice = tuple[str, dict[str, Plain]]


class _Event(Struct, frozen=True, array_like=True, gc=False):
    """Frozen, encoded as an array, never tracked by the garbage collector (events hold no cycles)."""


class ProjectCreated(_Event, frozen=True, tag="p+"):
    project: str


class GroupCreated(_Event, frozen=True, tag="g+"):
    project: str
    group: str


class TrialCreated(_Event, frozen=True, tag="t+"):
    project: str
    group: str
    name: str
    description: str = ""
    version: str | None = None
    attempt: int = 1


class TrialStarted(_Event, frozen=True, tag="t>"):
    """The trial, or one more rank or attempt at it (`resumed`), has begun to run."""

    resumed: bool = False


class TrialFinished(_Event, frozen=True, tag="t."):
    """The trial ended; `status` is the caller's own word.

    `seconds` since this handle began it come from the monotonic clock (None: it didn't).
    """

    status: str = "completed"
    error: str | None = None
    seconds: float | None = None


class StatusChanged(_Event, frozen=True, tag="st"):
    """The caller said so; `status` is the caller's own word."""

    status: str
    error: str | None = None


class ChronoStarted(_Event, frozen=True, tag="c>"):
    name: str
    aggregator: AggregatorChoice | None = None


class ChronoFinished(_Event, frozen=True, tag="c."):
    """`seconds` come from the monotonic clock; `error` is the exception's text when the block raised."""

    name: str
    seconds: float
    error: str | None = None
    aggregator: AggregatorChoice | None = None
    late: bool = False


class MetricsLogged(_Event, frozen=True, tag="m"):
    """One log call. `late`: the writer had already finished the trial.

    `key` is the caller's own step where that is no number (`compat.track`); `step` is None then.
    """

    values: dict[str, Scalar]
    step: Step = None
    epoch: Step = None
    subset: str | None = None
    aggregator: AggregatorChoice | None = None
    late: bool = False
    key: Plain = None


class ParamsSet(_Event, frozen=True, tag="pa"):
    """`source` tells where they come from: "call", "config.yaml", "sweep", ..."""

    params: dict[str, Plain]
    source: str = "call"


class MetadataSet(_Event, frozen=True, tag="md"):
    metadata: dict[str, Plain]


class TagsAdded(_Event, frozen=True, tag="tg+"):
    tags: dict[str, Plain]


class TagsRemoved(_Event, frozen=True, tag="tg-"):
    names: list[str]


class DescriptionSet(_Event, frozen=True, tag="de"):
    description: str


class NoteAdded(_Event, frozen=True, tag="no"):
    text: str


class InputMarked(_Event, frozen=True, tag="in"):
    ref: Plain


class OutputMarked(_Event, frozen=True, tag="out"):
    ref: Plain


class ChartAdded(_Event, frozen=True, tag="ch"):
    spec: Plain
    name: str | None = None


class TableAdded(_Event, frozen=True, tag="ta"):
    """`ref` says where the rows lie; `columns` maps a column's name to its type's name."""

    name: str
    ref: Plain
    rows: int
    columns: dict[str, str]


class WriterEnded(_Event, frozen=True, tag="w."):
    """A writer of this subject is gone without having closed; noticed by whoever recovered its journal.

    `last` is the sequence of the last event that it recorded here, as far as is known (0: it isn't).
    """

    writer: int
    noticed_ns: int
    reason: str = "lost"
    last: int = 0


class TrialRenamed(_Event, frozen=True, tag="rn"):
    name: str


class Hidden(_Event, frozen=True, tag="hi"):
    """A trial, or a project with all its trials, is not to be shown; nothing is removed."""

    reason: str = ""


class Restored(_Event, frozen=True, tag="sh"):
    """What was hidden is to be shown again."""


class AttemptClaimed(_Event, frozen=True, tag="c+"):
    """In a configuration's claim stream, whose n-th event it is: its n-th attempt is this trial."""

    trial: str


class Heartbeat(_Event, frozen=True, tag="hb"):
    """The writer lives. `every_s` is when to expect the next one."""

    every_s: float


Event = (
    ProjectCreated
    | GroupCreated
    | TrialCreated
    | TrialStarted
    | TrialFinished
    | StatusChanged
    | ChronoStarted
    | ChronoFinished
    | MetricsLogged
    | ParamsSet
    | MetadataSet
    | TagsAdded
    | TagsRemoved
    | DescriptionSet
    | NoteAdded
    | InputMarked
    | OutputMarked
    | ChartAdded
    | TableAdded
    | WriterEnded
    | Heartbeat
    | AttemptClaimed
    | TrialRenamed
    | Hidden
    | Restored
)
EVENT_TYPES: tuple[type[_Event], ...] = get_args(Event)


# urllib is imported on first use: 5 ms that a training needn't pay before its first trial.


def trial_subject(trial: str) -> str:
    """Name the stream subject of a trial."""
    return f"t/{trial}"


def group_subject(project: str, group: str) -> str:
    """Name the stream subject of a group; names may hold any character, so they are percent-encoded."""
    from urllib.parse import quote

    return f"g/{quote(project, safe='')}/{quote(group, safe='')}"


def project_subject(project: str) -> str:
    """Name the stream subject of a project."""
    from urllib.parse import quote

    return f"p/{quote(project, safe='')}"


def configuration_subject(hashed: str) -> str:
    """Name the stream subject of a configuration."""
    return f"c/{hashed}"


def split_subject(subject: str) -> tuple[str, ...]:
    """Take a subject apart: ("t", id), ("g", project, group), ("p", project), ("s", id), ("c", hash)."""
    from urllib.parse import unquote

    kind, *names = subject.split("/")
    return (kind, *map(unquote, names))
