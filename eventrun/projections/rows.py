"""What a fold is given: slices of batches, and their events as columns in arrival order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from eventrun.codec import StoredEvent, Stream
from eventrun.events import Event


class Slice(NamedTuple):
    """A batch or a part of one: `position` and `first` (sequence) belong to the first of its items."""

    position: int
    stream: Stream
    first: int
    items: list[tuple[int, Event]]


class Rows(NamedTuple):
    """Stored events as columns, one place per event in each."""

    positions: list[int]
    streams: list[Stream]
    sequences: list[int]
    times_ns: list[int]
    events: list[Event]

    @classmethod
    def of(cls, slices: Sequence[Slice]) -> Rows:
        rows = cls([], [], [], [], [])
        for position, stream, first, items in slices:
            size = len(items)
            rows.positions.extend(range(position, position + size))
            rows.streams.extend([stream] * size)
            rows.sequences.extend(range(first, first + size))
            rows.times_ns.extend([time_ns for time_ns, _ in items])
            rows.events.extend([event for _, event in items])
        return rows

    @classmethod
    def one(cls, stored: StoredEvent) -> Rows:
        """Make the rows of one event."""
        return cls._make([field] for field in stored)

    def at(self, place: int) -> StoredEvent:
        """Return the event at this place."""
        return StoredEvent._make(column[place] for column in self)

    def take(self, places: Sequence[int]) -> Rows:
        """Return the rows at these places, which ascend; all of them are these very rows."""
        if len(places) == len(self.events):
            return self
        return Rows._make([column[place] for place in places] for column in self)
