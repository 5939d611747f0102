"""Every error that eventrun raises on purpose.

EventrunError
├── InvalidType (TypeError)       a value of a type that can't be stored; names the key
├── InvalidValue (ValueError)     a value, name or setting that can't be stored or doesn't make sense
├── MissingExtra (ImportError)    an optional package is not installed; names the extra
├── Closed                        the client was closed before this call
├── AlreadyFinished               a trial was finished twice; says when it ended
├── AlreadyExists                 a configuration was declared before; names its trial
├── NotFound (LookupError)        no trial, metric, group or store of that name; names near ones
│   └── Ambiguous                 a prefix or name that fits several; names the candidates
└── StoreError
    ├── StoreUnavailable          not there, not writable, not a store, locked for too long
    ├── FormatTooNew              written by a newer eventrun than this one
    ├── Conflict                  another writer has taken that sequence number first
    └── LogDamaged                bytes of the log or of a journal are not what was written; carries the ranges

A message says what happened and what to do. Errors of other libraries are wrapped once, at the edge.
"""

from __future__ import annotations


class EventrunError(Exception):
    """The root: catch it to catch everything that eventrun raises on purpose."""


class InvalidType(EventrunError, TypeError):
    """A value of a type that can't be stored."""


class InvalidValue(EventrunError, ValueError):
    """A value, name or setting that can't be stored or doesn't make sense."""


class MissingExtra(EventrunError, ImportError):
    """An optional package is not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs the package {package}: pip install 'eventrun[{extra}]'")


class Closed(EventrunError):
    """The client was closed before this call."""


class AlreadyFinished(EventrunError):
    """A trial was finished twice."""


class AlreadyExists(EventrunError):
    """The same configuration was declared before."""


class NotFound(EventrunError, LookupError):
    """Nothing of that id or name."""


class Ambiguous(NotFound):
    """A prefix or a name that fits several."""


class StoreError(EventrunError):
    """Something is the matter with a store."""


class StoreUnavailable(StoreError):
    """The store can't be opened, read or written."""


class FormatTooNew(StoreError):
    """The store was written by a newer eventrun.

    `where` names the ranges that it concerns, if not all, one text each.
    """

    def __init__(self, message: str, where: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.where = where


class Conflict(StoreError):
    """A stream is not where the caller expected it to be."""


SALVAGE = "`eventrun verify` lists all damage, `eventrun salvage OUT` saves what can be read"


class LogDamaged(StoreError):
    """Bytes of the log or of a journal are not what was written.

    `where` names the damaged ranges, one text each.
    """

    def __init__(self, message: str, where: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.where = where
