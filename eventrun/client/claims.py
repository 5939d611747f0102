"""What only one may have: the next attempt at a configuration, a trial that waits to be taken.

Both are claimed by compare-and-set on a claim stream (writer 0 of the subject), which waits, and never go through a
journal: whoever appends the next sequence first has it, and all others look again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from random import randrange
from typing import TYPE_CHECKING, Any, NamedTuple

from eventrun.clock import time_ns
from eventrun.codec import CLAIM_WRITER, Batch, Stream, encode_item, items_of, seal
from eventrun.errors import AlreadyExists, Conflict, InvalidValue, NotFound
from eventrun.events import (
    AttemptClaimed,
    Event,
    StatusChanged,
    configuration_subject,
    group_subject,
    trial_subject,
)
from eventrun.stores.base import StoredBatch, Tip
from eventrun.subjects import Group
from eventrun.trial import Trial

if TYPE_CHECKING:
    from eventrun.filters import Condition
    from eventrun.projections import GroupState, TrialState
    from eventrun.query import Reader

IF_EXISTS = ("none", "error", "attempt")
# What `update_trial` may do: the methods of a trial that record something about it.
METHODS = (
    "set_status", "finish", "set_params", "set_metadata", "add_tags", "remove_tags", "set_description", "add_note",
    "rename", "hide", "restore",
)  # fmt: skip

SPREAD = 16  # trials that are passed over, at most, by whoever was too slow for one


class Log(NamedTuple):
    """The store's methods that claiming needs, waited for."""

    append: Callable[[Sequence[Batch], Mapping[Stream, int]], int]
    tip: Callable[[Stream], Tip]
    read: Callable[..., list[StoredBatch]]


def claim_stream(subject: str) -> Stream:
    """Name the claim stream of a subject."""
    return Stream(subject, CLAIM_WRITER)


def batch_of(stream: Stream, tip: Tip, events: Sequence[Event]) -> Batch:
    """Make the batch that goes on with a stream."""
    now = time_ns()
    payload = b"".join(encode_item(now, event) for event in events)
    return seal(stream, tip.sequence + 1, len(events), payload, now, now, tip.digest)


def claim_attempt(
    log: Log, hashed: str, trial: str, if_exists: str, creation: Callable[[int], Sequence[Event]]
) -> int | None:
    """Claim the next attempt at a configuration for a trial, and record its creation, both or none.

    Returns the attempt's number from 1 on; None: there is one already, and `if_exists` is "none".
    Raises AlreadyExists.
    """
    claims, own = claim_stream(configuration_subject(hashed)), claim_stream(trial_subject(trial))
    nothing = log.tip(own)
    while True:
        tip = log.tip(claims)
        if tip.sequence and if_exists == "none":
            return None
        if tip.sequence and if_exists == "error":
            known = _first_attempt(log, claims)
            raise AlreadyExists(
                f"this configuration was declared before, as trial {known}: with if_exists='attempt' it gets another "
                f"attempt, and client.trial(..., resume={known!r}) goes on with that one"
            )
        attempt = tip.sequence + 1
        batches = [batch_of(claims, tip, [AttemptClaimed(trial)]), batch_of(own, nothing, creation(attempt))]
        try:
            log.append(batches, {claims: tip.sequence, own: 0})
        except Conflict:
            continue  # somebody else was faster
        return attempt


def _first_attempt(log: Log, claims: Stream) -> str:
    for stored in log.read(0, subject=claims.subject, limit_bytes=1):
        for _, event in items_of(stored.batch):
            if isinstance(event, AttemptClaimed):
                return event.trial
    raise AssertionError("a configuration's claim stream holds attempts only")


def update_first(
    log: Log, reader: Reader, condition: Condition, events: Callable[[TrialState], Sequence[Event]]
) -> TrialState:
    """Record events about the first trial for which a condition holds, and which nobody else just took.

    A trial of which there is nothing to record is passed by. Raises NotFound when there is none.
    """
    from eventrun.filters import holds

    contested = True
    while contested:
        contested, skip = False, 0
        cursor: Any = 0
        while cursor is not None:
            found, cursor = reader.trials(cursor, where=condition)
            for candidate in found:
                if skip:
                    skip -= 1
                    continue
                stream = claim_stream(trial_subject(candidate.id))
                if not events(candidate):
                    continue
                # First where the claims end, then the state: who claims in between makes the append fail.
                tip = log.tip(stream)
                state = reader.trial(candidate.id)
                if holds(condition, state) is not True or not (recorded := events(state)):
                    continue
                try:
                    log.append([batch_of(stream, tip, recorded)], {stream: tip.sequence})
                except Conflict:
                    contested = True
                    # Whoever was faster comes to the next one as well: spread out, and come back to the others.
                    skip = randrange(SPREAD)
                    continue
                return reader.trial(candidate.id)
    raise NotFound("no trial is like that; `eventrun ls --where ...` shows which ones there are")


def update_first_group(
    log: Log, reader: Reader, project: str | None, events: Callable[[GroupState], Sequence[Event]]
) -> GroupState:
    """Record events about the first group of which there is something to record. Raises NotFound."""
    contested = True
    while contested:
        contested = False
        cursor: Any = 0
        while cursor is not None:
            found, cursor = reader.groups(cursor, project=project)
            for candidate in found:
                if not events(candidate):
                    continue
                place = candidate.project, candidate.name
                stream = claim_stream(group_subject(*place))
                tip = log.tip(stream)
                state = reader.group(*place)
                if not (recorded := events(state)):
                    continue
                try:
                    log.append([batch_of(stream, tip, recorded)], {stream: tip.sequence})
                except Conflict:
                    contested = True
                    continue
                return reader.group(*place)
    raise NotFound("no group is like that")


def claim_subject(log: Log, subject: str, events: Sequence[Event]) -> bool:
    """Record the creation of a group or project unless it exists; of many at once one is told True."""
    if log.read(0, subject=subject, limit_bytes=1):
        return False
    stream = claim_stream(subject)
    try:
        log.append([batch_of(stream, log.tip(stream), events)], {stream: 0})
    except Conflict:
        return False
    return True


def release(log: Log, reader: Reader, older_than: float, project: str | None) -> list[TrialState]:
    """Set the status of all lost trials, and of those that give no sign of life, to created."""
    from eventrun.filters import parse

    silent_since = time_ns() - round(older_than * 1e9)
    silent = {"status": "running", "modified": {"$lt": silent_since if older_than else 0}}
    condition = parse({"$or": [{"status": "lost"}, silent], **({"project": project} if project else {})})
    released: list[TrialState] = []
    while True:
        try:
            taken = update_first(log, reader, condition, lambda _: [StatusChanged("created")])
        except NotFound:
            return released
        released.append(taken)


class _Collector:
    """Stands for a trial's stream and keeps what would be recorded."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.record = self.events.append

    def append(self, data: bytes) -> None:
        raise AssertionError("only log() appends bytes")


class _Nobody:
    """Stands for a trial's client."""

    def trial_started(self, trial: Trial) -> None:
        pass

    def trial_finished(self, trial: Trial) -> None:
        pass

    def check_trial(self, trial: Trial) -> Any:
        raise AssertionError("nobody asks")


def events_of(method: str, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> list[Event]:
    """Make the events that a trial's method would record. Raises InvalidValue for another method."""
    if method not in METHODS:
        raise InvalidValue(
            f"{method!r} can't be done to a trial that is taken; there are {', '.join(METHODS)}"
        )
    collector = _Collector()
    trial = Trial(_Nobody(), collector, "0" * 16, "p", "", "n", resumed=True)
    getattr(trial, method)(*arguments, **named)
    return collector.events


def what_to_record(
    method: str | Callable[[TrialState, Trial], object], arguments: tuple[Any, ...], named: Mapping[str, Any]
) -> Callable[[TrialState], list[Event]]:
    """Give a function from a trial's state to the events. Raises what the method raises for these arguments."""
    if callable(method):
        return partial(events_of_change, method)
    fixed = events_of(method, arguments, named)
    return lambda _: fixed


def events_of_change(change: Callable[[TrialState, Trial], object], state: TrialState) -> list[Event]:
    """Make the events that a function records about a trial of this state."""
    collector = _Collector()
    change(
        state,
        Trial(_Nobody(), collector, state.id, state.project, state.group, state.name or "n", resumed=True),
    )
    return collector.events


def events_of_group(change: Callable[[GroupState, Group], object], state: GroupState) -> list[Event]:
    """Make the events that a function records about a group of this state."""
    events: list[Event] = []
    change(state, Group(state.project, state.name, events.append))
    return events
