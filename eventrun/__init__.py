"""eventrun: an asynchronous, event-sourced logger for training code.

with eventrun.open("runs") as client, client.trial("mnist") as trial:
    trial.log(loss=0.3, step=1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eventrun.client import Client, Past, current_trial, open  # noqa: A004 - the documented name
from eventrun.errors import (
    AlreadyExists,
    AlreadyFinished,
    Ambiguous,
    Closed,
    Conflict,
    EventrunError,
    FormatTooNew,
    InvalidType,
    InvalidValue,
    LogDamaged,
    MissingExtra,
    NotFound,
    StoreError,
    StoreUnavailable,
)
from eventrun.pending import Pending, Query
from eventrun.subjects import Group, Project
from eventrun.trial import Chrono, Trial

if TYPE_CHECKING:
    from eventrun.aggregators import Ring, Stat, TimeSeries, Value
    from eventrun.damage import Damage
    from eventrun.projections import Projection
    from eventrun.projector import VerifyReport
    from eventrun.query import Series

__all__ = [
    "AlreadyExists",
    "AlreadyFinished",
    "Ambiguous",
    "Chrono",
    "Client",
    "Closed",
    "Conflict",
    "Damage",
    "EventrunError",
    "FormatTooNew",
    "Group",
    "InvalidType",
    "InvalidValue",
    "LogDamaged",
    "MissingExtra",
    "NotFound",
    "Past",
    "Pending",
    "Project",
    "Projection",
    "Query",
    "Ring",
    "Series",
    "Stat",
    "StoreError",
    "StoreUnavailable",
    "TimeSeries",
    "Trial",
    "Value",
    "VerifyReport",
    "__version__",
    "current_trial",
    "open",
]

# Found on first use: a training that only records needn't import what reads.
_LATER = {
    "Damage": "eventrun.damage",
    "VerifyReport": "eventrun.projector",
    "Projection": "eventrun.projections",
    "Series": "eventrun.query",
    **dict.fromkeys(("Ring", "Stat", "TimeSeries", "Value"), "eventrun.aggregators"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("eventrun")
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'eventrun' has no attribute {name!r}")
