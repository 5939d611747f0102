"""What trials, groups and projects have in common: description, tags, metadata, notes and charts."""

from __future__ import annotations

from typing import Any, TypeAlias

from msgspec import Struct

from eventrun.events import (
    ChartAdded,
    DescriptionSet,
    Hidden,
    InputMarked,
    MetadataSet,
    NoteAdded,
    OutputMarked,
    Plain,
    Restored,
    TableAdded,
    TagsAdded,
    TagsRemoved,
    TrialRenamed,
)
from eventrun.projections.params import merged

Told: TypeAlias = (
    DescriptionSet
    | TagsAdded
    | TagsRemoved
    | MetadataSet
    | NoteAdded
    | ChartAdded
    | TableAdded
    | InputMarked
    | OutputMarked
    | TrialRenamed
    | Hidden
    | Restored
)


class Chart(Struct, array_like=True, gc=False, frozen=True):
    """A chart's specification. One of the same name takes the place of the one before."""

    name: str | None
    spec: Plain


class Table(Struct, array_like=True, gc=False, frozen=True):
    """A table: where its rows lie, how many, and the names of its columns' types."""

    name: str
    ref: Plain
    rows: int
    columns: dict[str, str]


class Note(Struct, array_like=True, gc=False, frozen=True):
    """A remark, and when it was made."""

    time_ns: int
    text: str


class About(Struct, array_like=True, gc=False):
    """What was told about a subject, in the order of the log. `metadata` is replaced, never changed in place."""

    description: str | None = None
    tags: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    notes: list[Note] = []
    charts: list[Chart] = []
    tables: list[Table] = []
    inputs: list[Plain] = []
    outputs: list[Plain] = []
    name: str | None = None  # that a trial was given later
    hidden: bool = False

    def apply(self, time_ns: int, event: Told) -> None:
        """Take in the next event."""
        match event:
            case DescriptionSet():
                self.description = event.description
            case TagsAdded():
                self.tags.update(event.tags)
            case TagsRemoved():
                for name in event.names:
                    self.tags.pop(name, None)
            case MetadataSet():
                self.metadata = merged(self.metadata, event.metadata)
            case NoteAdded():
                self.notes.append(Note(time_ns, event.text))
            case ChartAdded():
                self._chart(Chart(event.name, event.spec))
            case TableAdded():
                self.tables.append(Table(event.name, event.ref, event.rows, event.columns))
            case InputMarked():
                _mark(self.inputs, event.ref)
            case OutputMarked():
                _mark(self.outputs, event.ref)
            case TrialRenamed():
                self.name = event.name
            case Hidden():
                self.hidden = True
            case Restored():
                self.hidden = False

    def _chart(self, chart: Chart) -> None:
        for place, known in enumerate(self.charts):
            if known.name == chart.name and known.name is not None:
                self.charts[place] = chart
                return
        self.charts.append(chart)


def _mark(marked: list[Plain], ref: Plain) -> None:
    if ref not in marked:
        marked.append(ref)


def to_plain(value: Any) -> Any:
    """Turn Structs and named tuples into mappings and tuples into lists, all the way down."""
    if isinstance(value, Struct):
        return {name: to_plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, dict):
        return {key: to_plain(element) for key, element in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return to_plain(value._asdict())
    if isinstance(value, (list, tuple)):
        return [to_plain(element) for element in value]
    return value
