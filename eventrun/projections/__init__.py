"""Fold events into what is read back: the states of trials, groups and projects, and those of a user's own.

Each has a working state, which holds all that is needed to go on (`TrialFold`, `SubjectFold`), and a state to read.
`apply` takes one event and is the specification; `fold` takes whole columns and gives the same bytes. Both work in
the order of the log. What two writers said at the same time is decided by the time and the stream, not by whose
batch came first: `last`, `latest` and the status are the same in every store that holds the events.
"""

from eventrun.projections.about import Chart, Note, Table
from eventrun.projections.chrono import ChronoState
from eventrun.projections.custom import Projection
from eventrun.projections.metric import MetricState, Points, series_name
from eventrun.projections.params import ParamSource
from eventrun.projections.rows import Slice
from eventrun.projections.status import view_status
from eventrun.projections.subject import (
    GroupState,
    Held,
    ProjectState,
    SubjectFold,
    group_state,
    project_state,
)
from eventrun.projections.trial import (
    TRIALS_VERSION,
    TrialFold,
    TrialState,
    apply,
    decode_state,
    encode_state,
    fold,
)

__all__ = [
    "TRIALS_VERSION",
    "Chart",
    "ChronoState",
    "GroupState",
    "Held",
    "MetricState",
    "Note",
    "ParamSource",
    "Points",
    "ProjectState",
    "Projection",
    "Slice",
    "SubjectFold",
    "Table",
    "TrialFold",
    "TrialState",
    "apply",
    "decode_state",
    "encode_state",
    "fold",
    "group_state",
    "project_state",
    "series_name",
    "view_status",
]
