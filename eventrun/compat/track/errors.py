"""What can go wrong in Track's interface: eventrun's errors that are Track's, too."""

from __future__ import annotations

from eventrun.errors import InvalidValue, NotFound


class ItemNotFound(NotFound):
    """No trial, group or project is like that."""


class UnknownProject(ItemNotFound, AssertionError):
    """A trial or group of a project that was never created; Track asserts that it was."""


class ChronoNotStarted(ItemNotFound, KeyError):
    """A chrono was finished that this process has not started."""

    __str__ = Exception.__str__  # KeyError shows the message as a quoted key


class BadQuery(InvalidValue, RuntimeError):
    """A query that asks for what isn't there, or with an operator that isn't."""
