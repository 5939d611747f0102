"""Projections of the user's own: run over the log and stored, each with a checkpoint of its own.

They are caught up when they are asked for, not with the built-in views: an error in one concerns nobody else, and a
listing doesn't wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from eventrun.codec import ChainChecker, StoredEvent, digest
from eventrun.errors import InvalidValue
from eventrun.projections import Projection, Slice
from eventrun.projector.catchup import put
from eventrun.projector.log import EVERYTHING, Cut, Log, Pace, batches, slices
from eventrun.projector.series import with_crc, without_crc
from eventrun.projector.transactions import View, checkpoint, set_checkpoint

if TYPE_CHECKING:  # imported on first use
    import sqlite3

STATES_HELD = 50_000  # states in memory at a time

_GET_STATE = "SELECT state FROM states WHERE projection = ? AND version = ? AND key = ?"
_GET_KEYS = "SELECT key FROM states WHERE projection = ? AND version = ? ORDER BY key"
_PUT_STATES = "INSERT OR REPLACE INTO states (projection, version, key, state) VALUES"
_DROP_OLD_STATES = "DELETE FROM states WHERE projection = ? AND version < ?"
_DROP_OLD_CHECKPOINTS = "DELETE FROM checkpoints WHERE view = ? AND version < ?"


def view_of(projection: Projection[Any]) -> View:
    """Name the view of a projection."""
    return f"projection {projection.name}", projection.version


def get_state(db: sqlite3.Connection, projection: Projection[Any], key: str) -> Any:
    """Return the state under a key, the initial one if no event has concerned it. Raises DamagedView."""
    row = db.execute(_GET_STATE, (projection.name, projection.version, key)).fetchone()
    if row is None:
        return projection.initial()
    try:
        return projection.decode(without_crc(row[0]))
    except msgspec.DecodeError as error:
        raise InvalidValue(
            f"projection {projection.name!r} can't read back what it wrote: {error}; check its `state`, and raise its"
            " version when that changes"
        ) from error


def get_keys(db: sqlite3.Connection, projection: Projection[Any]) -> list[str]:
    """Return the keys that have a state, sorted."""
    return [key for (key,) in db.execute(_GET_KEYS, (projection.name, projection.version))]


def project(
    db: sqlite3.Connection,
    log: Log,
    projection: Projection[Any],
    stop: int,
    target: int,
    pace: Pace,
    cut: Cut,
) -> None:
    """Apply a projection to the events after its checkpoint, at least up to `stop`; in the caller's transaction."""
    view = view_of(projection)
    start, mark = checkpoint(db, view)
    states, position, checker = _States(db, projection), start, ChainChecker()
    for stored in batches(log, start, stop, pace):
        for part in slices(stored, start, cut, pace, checker):
            for event in stored_events(part):
                states.apply(event)
                pace.breathe()
        position, mark = stored.last_position, digest(stored.batch)
    states.write()
    if cut != EVERYTHING and cut.position is not None:
        position = min(position, cut.position)
    set_checkpoint(db, view, position, mark)
    if position >= target:
        db.execute(_DROP_OLD_STATES, (projection.name, projection.version))
        db.execute(_DROP_OLD_CHECKPOINTS, view)


def stored_events(part: Slice) -> Iterator[StoredEvent]:
    """Yield the events of a slice, each with its place."""
    position, stream, first, items = part
    for offset, (time_ns, event) in enumerate(items):
        yield StoredEvent(position + offset, stream, first + offset, time_ns, event)


class _States:
    """The states of one projection, in memory while they are worked on."""

    def __init__(self, db: sqlite3.Connection, projection: Projection[Any]) -> None:
        self._db = db
        self._projection = projection
        self._held: dict[str, Any] = {}

    def apply(self, event: StoredEvent) -> None:
        key = self._projection.key(event)
        if key is None:
            return
        if key not in self._held:
            if len(self._held) >= STATES_HELD:
                self.write()
            self._held[key] = get_state(self._db, self._projection, key)
        self._held[key] = self._projection.apply(self._held[key], event)

    def write(self) -> None:
        name, version = self._projection.name, self._projection.version
        rows = [
            (name, version, key, with_crc(self._projection.encode(state)))
            for key, state in self._held.items()
        ]
        put(self._db, _PUT_STATES, rows)
        self._held.clear()
