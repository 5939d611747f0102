"""What can be told about a trial, a group or a project: description, tags, metadata, notes, charts.

Groups and projects are handles like trials: each call is one event, and none waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from eventrun.codec import checked_text, plain
from eventrun.errors import InvalidType, InvalidValue
from eventrun.events import (
    ChartAdded,
    DescriptionSet,
    Event,
    Hidden,
    MetadataSet,
    NoteAdded,
    Restored,
    TagsAdded,
    TagsRemoved,
)

MAX_NAME_BYTES = 10_240  # of a project's, group's or trial's name, as UTF-8


class Subject:
    """What the events of a stream are about: a trial, a group or a project."""

    def __init__(self, record: Callable[[Event], None]) -> None:
        self._record = record

    def record(self, event: Event) -> None:
        """Record any event about it; the other methods are the usual way."""
        self._record(event)

    def set_metadata(self, metadata: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        """Set metadata by key."""
        metadata = {**mapping_of(metadata or {}, "metadata"), **named}
        if metadata:
            self._record(MetadataSet(plain(metadata, "metadata")))

    def add_tags(self, *names: str, **tags: Any) -> None:
        """Add tags: names alone, or with a value: `add_tags("good", owner="x")`."""
        found: dict[str, Any] = {checked_name(name, "a tag"): None for name in names}
        found.update(
            {checked_name(name, "a tag"): plain(value, f"tag {name!r}") for name, value in tags.items()}
        )
        if found:
            self._record(TagsAdded(found))

    def remove_tags(self, *names: str) -> None:
        """Remove tags; those that aren't there are ignored."""
        if names:
            self._record(TagsRemoved([checked_name(name, "a tag") for name in names]))

    def set_description(self, description: str) -> None:
        """Set the description."""
        self._record(DescriptionSet(text_of(description, "the description")))

    def add_note(self, text: str) -> None:
        """Add a note; notes are kept with their time."""
        self._record(NoteAdded(text_of(text, "the note")))

    def add_chart(self, spec: Mapping[str, Any], name: str | None = None) -> None:
        """Add a Vega or Vega-Lite specification."""
        name = None if name is None else checked_name(name, "a chart's name")
        self._record(ChartAdded(plain(mapping_of(spec, "a chart"), "chart"), name))

    def hide(self, reason: str = "") -> None:
        """Don't show it any more, a project with all its trials; nothing is removed, and `restore` undoes it."""
        self._record(Hidden(text_of(reason, "the reason")))

    def restore(self) -> None:
        """Show it again."""
        self._record(Restored())


class Project(Subject):
    """The widest namespace. Made by `client.project(...)`."""

    def __init__(self, name: str, record: Callable[[Event], None]) -> None:
        super().__init__(record)
        self.name = name

    def __repr__(self) -> str:
        return f"<Project {self.name!r}>"


class Group(Subject):
    """Trials compared together, within a project. Made by `client.group(...)`."""

    def __init__(self, project: str, name: str, record: Callable[[Event], None]) -> None:
        super().__init__(record)
        self.project = project
        self.name = name

    def __repr__(self) -> str:
        return f"<Group {self.name!r} of {self.project!r}>"


def checked_name(value: Any, what: str) -> str:
    """Check a project's, group's, trial's, tag's or chrono's name: text, not blank, at most MAX_NAME_BYTES."""
    text = text_of(value, what)
    if not text or text.isspace():
        raise InvalidValue(f"{what} is empty; give it at least one letter")
    if len(text) > MAX_NAME_BYTES // 4 and len(text.encode()) > MAX_NAME_BYTES:
        raise InvalidValue(f"{what} has {len(text.encode()):,} bytes; at most {MAX_NAME_BYTES:,} are kept")
    return text


def text_of(value: Any, what: str) -> str:
    """Check a text."""
    if not isinstance(value, str):
        raise InvalidType(f"{what} is {type(value).__qualname__}, not text")
    return checked_text(str(value), what)


def mapping_of(value: Any, what: str) -> dict[str, Any]:
    """Check a mapping and copy it."""
    if not hasattr(value, "items"):
        raise InvalidType(f"{what} are a mapping of names to values, not {type(value).__qualname__}")
    return dict(value.items())


def tags_of(tags: Any) -> dict[str, Any]:
    """Check tags: names, one name, or a mapping from names to values."""
    named = tags if hasattr(tags, "items") else dict.fromkeys([tags] if isinstance(tags, str) else tags)
    return {checked_name(name, "a tag"): plain(value, f"tag {name!r}") for name, value in named.items()}


def told_events(description: str | None, tags: Any, metadata: Any) -> list[Event]:
    """Make the events that tell this; all is checked before any is made."""
    told: list[Event] = []
    draft = Project("", told.append)
    if description is not None:
        draft.set_description(description)
    if tags:
        draft.record(TagsAdded(tags_of(tags)))
    if metadata:
        draft.set_metadata(metadata)
    return told
