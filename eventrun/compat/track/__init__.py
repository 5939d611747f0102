"""Track's interface (Delaunay/track): `from eventrun.compat.track import ...` instead of `from track...`.

Its trials, groups and projects are eventrun's, so all else of eventrun (the command line, filters, history, the past)
sees them too. A trial is named by a hash and a revision: `uid` is "<hash>_<revision>". The hash is over name, version
and params as `eventrun.identity` makes it: the order of params doesn't matter, types are kept apart, and nothing that
can be stored fails; so uids differ from those of the original. A trial that has a `_hash` keeps it. eventrun's own id
of a trial follows from its uid, and creating it is a compare-and-set in the log: of many processes one succeeds.

What differs from the original on purpose: an exception leaves a `with` as it is, and its message is kept;
`client.trial` shows what the store has; the same parameters again are the next revision; the number of observations
is a number; what is missing in a query compares as None and never raises; a chrono is of one trial; a step keeps its
type.

What is kept beside Track's own fields stands in the metadata under `RESERVED`; Track's readers don't see it.
"""

from eventrun.compat.track.aggregators import (
    Aggregator,
    RingAggregator,
    StatAggregator,
    TimeSeriesAggregator,
    ValueAggregator,
)
from eventrun.compat.track.client import TrackClient, TrialLogger
from eventrun.compat.track.errors import BadQuery, ChronoNotStarted, ItemNotFound, UnknownProject
from eventrun.compat.track.persistence import Protocol, get_protocol
from eventrun.compat.track.structure import (
    CustomStatus,
    Project,
    Status,
    Trial,
    TrialGroup,
    compute_hash,
    status,
)

__all__ = [
    "Aggregator",
    "BadQuery",
    "ChronoNotStarted",
    "CustomStatus",
    "ItemNotFound",
    "Project",
    "Protocol",
    "RingAggregator",
    "StatAggregator",
    "Status",
    "TimeSeriesAggregator",
    "TrackClient",
    "Trial",
    "TrialGroup",
    "TrialLogger",
    "UnknownProject",
    "ValueAggregator",
    "compute_hash",
    "get_protocol",
    "status",
]
