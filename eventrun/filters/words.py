"""What a filter is made of: conditions, and the values that they compare."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

MAPPINGS = ("params", "metadata", "tags")
STATISTICS = ("last", "latest", "min", "max", "mean", "count")
# name -> (column in the table of trials, attribute of TrialState)
OWN = {
    "id": ("id", "id"), "name": ("name", "name"), "project": ("project", "project"), "group": ("grp", "group"),
    "status": ("status", "status"), "raw_status": ("raw_status", "raw_status"), "error": ("error", "error"),
    "description": ("description", "description"), "version": ("version", "version"),
    "attempt": ("attempt", "attempt"), "events": ("events", "events"), "duration": ("duration_s", "duration_s"),
    "created": ("created_ns", "created_ns"), "started": ("started_ns", "started_ns"),
    "finished": ("finished_ns", "finished_ns"), "modified": ("modified_ns", "modified_ns"),
}  # fmt: skip
TIMES = frozenset({"created", "started", "finished", "modified"})
TEXTS = frozenset(
    {"id", "name", "project", "group", "status", "raw_status", "error", "description", "version"}
)
TEXT_TESTS = ("startswith", "endswith", "contains", "matches")

Value = int | float | str


class Path(NamedTuple):
    """A value of a trial: an own field, a key of a mapping, or a metric's statistic."""

    root: str
    key: str = ""
    statistic: str = ""


class Constant(NamedTuple):
    """A number or a text."""

    value: Value


class Arithmetic(NamedTuple):
    """Numbers reckoned with; text, a missing value or a division by zero makes it missing."""

    sign: str
    left: Operand
    right: Operand


class Compare(NamedTuple):
    """`<`, `<=`, `>`, `>=`, `==` or `!=`."""

    sign: str
    left: Operand
    right: Operand


class OneOf(NamedTuple):
    """`in (...)`."""

    value: Operand
    among: tuple[Value, ...]


class Missing(NamedTuple):
    """`is None`."""

    value: Operand


class Has(NamedTuple):
    """`'key' in params`."""

    path: Path


class Truth(NamedTuple):
    """A value alone: not zero, not empty."""

    value: Operand


class TextTest(NamedTuple):
    """`startswith` and the like; unknown for what isn't text."""

    test: str
    value: Operand
    text: str


class Not(NamedTuple):
    """The opposite; of unknown, unknown."""

    what: Condition


class All(NamedTuple):
    """`and`."""

    parts: tuple[Condition, ...]


class Some(NamedTuple):
    """`or`."""

    parts: tuple[Condition, ...]


Operand = Path | Constant | Arithmetic
Condition = Compare | OneOf | Missing | Has | Truth | TextTest | Not | All | Some


def time_of(text: str) -> int:
    """Read ISO 8601, of this machine's zone if it names none, as nanoseconds since 1970. Raises ValueError."""
    return round(datetime.fromisoformat(text).astimezone().timestamp() * 1e6) * 1000


def keyed(root: str, key: str) -> Path:
    """Name a key of a mapping, or a metric by its last value."""
    return Path(root, key, "last" if root == "metrics" else "")
