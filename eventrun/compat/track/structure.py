"""Track's nouns: statuses, trials, groups and projects, as plain objects.

Wherever one of them is taken, any object with the same attributes serves as well.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from enum import Enum
from typing import Any

from eventrun.codec import plain
from eventrun.errors import InvalidValue
from eventrun.identity import configuration_hash


class Status(Enum):
    """How a trial is. The hundreds tell the kind: 0 created, 100 running, 200 error, 300 finished."""

    CreatedGroup = 0
    RunningGroup = 100
    Running = 101
    ErrorGroup = 200
    Interrupted = 201
    Exception = 202
    Broken = 203
    FinishedGroup = 300
    Suspended = 301
    Completed = 302

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, eq=False)
class CustomStatus:
    """A status of one's own: equal to one of the same name and value, to its name, to {"name": ..., "value": ...}."""

    name: str
    value: int | None = None

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            return self.name == other
        if isinstance(other, Mapping):
            return (self.name, self.value) == (other.get("name"), other.get("value"))
        if isinstance(other, (Status, CustomStatus)):
            return (self.name, self.value) == (other.name, other.value)
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name.lower()


AnyStatus = Status | CustomStatus
_BY_NAME = {str(each): each for each in Status}


def status(name: str | None = None, value: int | None = None) -> AnyStatus:
    """Give the status of this name, of this value, or one of one's own. Raises InvalidValue for nothing at all."""
    if name is None:
        known = [each for each in Status if each.value == value]
        if not known:
            raise InvalidValue(f"no status has the value {value!r}: give it a name")
        return known[0]
    found = _BY_NAME.get(name.lower())
    return found if found is not None and value in (None, found.value) else CustomStatus(name, value)


def as_status(given: Any) -> AnyStatus:
    """Take a status, its name, a mapping, or any object with name and value."""
    if isinstance(given, (Status, CustomStatus)):
        return given
    if isinstance(given, str):
        return status(given)
    if isinstance(given, Mapping):
        return status(given.get("name"), given.get("value"))
    name = getattr(given, "name", None)
    if not isinstance(name, str):
        raise InvalidValue(
            f"{given!r} is no status: those are Status.NAME, CustomStatus(name, value), a name"
        )
    return status(name, getattr(given, "value", None))


@dataclass(eq=False)
class Trial:
    """One execution of a configuration, named by `uid`: its hash and its revision.

    The hash is made of name, version and parameters when it is first asked for, and stays.
    """

    _hash: str | None = None
    revision: int = 0
    name: str | None = None
    description: str | None = None
    tags: dict[str, Any] = field(default_factory=dict)
    version: str | None = None
    group_id: str | None = None
    project_id: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict, repr=False)
    chronos: dict[str, Any] = field(default_factory=dict, repr=False)
    status: AnyStatus = Status.CreatedGroup
    errors: list[str] = field(default_factory=list, repr=False)

    @property
    def hash(self) -> str:
        """What makes this configuration differ from others."""
        if self._hash is None:
            self._hash = compute_hash(self.name, self.version, **storable(self.parameters))
        return self._hash

    @property
    def uid(self) -> str:
        """Hash and revision: "<hash>_<revision>"."""
        return f"{self.hash}_{self.revision}"

    @uid.setter
    def uid(self, uid: str) -> None:
        self._hash, self.revision = split_uid(uid)

    def __eq__(self, other: object) -> bool:
        return self.uid == other.uid if isinstance(other, Trial) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.uid)


@dataclass(eq=False)
class TrialGroup:
    """Trials compared together. Its uid is made of its name and project when it is first asked for."""

    _uid: str | None = None
    name: str | None = None
    description: str | None = None
    tags: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    trials: set[str] = field(default_factory=set, repr=False)
    project_id: str | None = None

    @property
    def uid(self) -> str:
        """What names it. Raises InvalidValue while it has no name or project."""
        if self._uid is None:
            if not self.name or not self.project_id:
                raise InvalidValue("a group needs a name and a project_id before it has a uid")
            self._uid = compute_hash(self.name, self.project_id)
        return self._uid

    def __eq__(self, other: object) -> bool:
        return self.uid == other.uid if isinstance(other, TrialGroup) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.uid)


@dataclass(eq=False)
class Project:
    """The widest namespace. Its uid is its name."""

    name: str | None = None
    description: str | None = None
    tags: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    groups: set[str] = field(default_factory=set, repr=False)
    trials: set[str] = field(default_factory=set, repr=False)

    @property
    def uid(self) -> str | None:
        """Its name."""
        return self.name

    def __eq__(self, other: object) -> bool:
        return self.uid == other.uid if isinstance(other, Project) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.uid)


def compute_hash(*values: Any, **named: Any) -> str:
    """Hash plain data, named ones in any order. Not the original's hash, see the package."""
    return configuration_hash("track", storable(list(values)), storable(named))


def split_uid(uid: str) -> tuple[str, int]:
    """Take a trial's uid apart. Raises InvalidValue."""
    hashed, underscore, revision = uid.rpartition("_")
    if not underscore or not revision.isdecimal():
        raise InvalidValue(f"{uid!r} is no trial's uid: that is '<hash>_<revision>'")
    return hashed, int(revision)


def storable(value: Any, what: str = "a value") -> Any:
    """Make plain data: times as ISO text, members of an Enum by name, a Namespace as a mapping. A copy."""
    return plain(_simple(value), what)


def _simple(value: Any) -> Any:
    match value:
        case Namespace():
            return _simple(vars(value))
        case Enum():
            return value.name
        case datetime() | date():
            return value.isoformat()
        case Mapping():
            return {key: _simple(inner) for key, inner in value.items()}
        case list() | tuple() | set() | frozenset():
            return type(value)(_simple(inner) for inner in value) if type(value) in _PLAIN else list(value)
    return value


_PLAIN = (list, tuple, set, frozenset)
