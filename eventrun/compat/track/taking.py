"""What is taken from objects of any class, and how it is written down."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from eventrun.codec import scalar
from eventrun.compat.track.structure import Status, storable
from eventrun.errors import InvalidType
from eventrun.events import Plain, Step


def hash_of(trial: Any) -> str:
    """Give a trial's hash."""
    hashed = getattr(trial, "hash", None)
    return hashed if isinstance(hashed, str) else str(trial.uid).rpartition("_")[0]


def project_name(project: Any) -> str:
    """Give a project's name."""
    return text_or(getattr(project, "uid", None) or getattr(project, "name", None), "")


def text_or(value: Any, otherwise: str) -> str:
    """Give a text, or another where there is none."""
    return otherwise if value is None else str(value)


def brought_along(metadata: dict[str, Any]) -> dict[str, Any]:
    """Leave out what a trial that was read says of itself."""
    return {name: value for name, value in metadata.items() if name not in ("_update_count", "_last_change")}


def tell_of(thing: Any, attribute: str, uid: str) -> None:
    """Add a uid to what an object holds, if it holds any."""
    known = getattr(thing, attribute, None)
    if isinstance(known, set):
        known.add(uid)


def replacing(named: dict[str, Plain]) -> Iterator[dict[str, Plain]]:
    """Make of one update events after which a mapping has taken the place of the one before, not merged with it."""
    mappings = {name: None for name, value in named.items() if isinstance(value, dict)}
    if mappings:
        yield mappings
    if named:
        yield named


def step_of(step: Any) -> tuple[Step, Plain]:
    """Give a step as a number, or else as a key."""
    try:
        number = scalar(step, "step")
    except InvalidType:
        number = ""
    if number is None or type(number) in (int, float):
        return number, None  # type: ignore[return-value]
    return None, storable(step, "step")


def error_text(error: Any) -> str | None:
    """Say what an error says: its type and message, or the text itself."""
    if error is None:
        return None
    if isinstance(error, BaseException):
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return error.__name__ if isinstance(error, type) else str(error)


def ending(exc_type: Any) -> Status:
    """Give the status of a trial that ends by this kind of exception."""
    if exc_type is None:
        return Status.Completed
    if isinstance(exc_type, type) and issubclass(exc_type, Exception):
        return Status.Exception
    return Status.Interrupted if isinstance(exc_type, type) else Status.Exception
