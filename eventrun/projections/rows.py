"""What a fold is given: slices of batches, and their events as columns in arrival order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from eventrun.codec import StoredEvent, Stream
from eventrun.events import Event

E = TypeVar("E")


class Slice(NamedTuple):
    """A batch or a part of one: `position` and `first` (sequence) belong to the first of its items."""

    position: int
    stream: Stream
    first: int
    items: list[tuple[int, Event]]

    def at(self, place: int) -> StoredEvent:
        """Return the event at this place as it lies in the log."""
        time_ns, event = self.items[place]
        return StoredEvent(self.position + place, self.stream, self.first + place, time_ns, event)


class Rows(NamedTuple, Generic[E]):
    """Events as columns, one place per event in each."""

    writers: list[int]
    sequences: list[int]
    times_ns: list[int]
    events: list[E]

    def take(self, places: Sequence[int]) -> Rows[E]:
        """Return the rows at these places, which ascend; all of them are these very rows."""
        if len(places) == len(self.events):
            return self
        return Rows(
            [self.writers[place] for place in places],
            [self.sequences[place] for place in places],
            [self.times_ns[place] for place in places],
            [self.events[place] for place in places],
        )


def rows_of(slices: Sequence[Slice]) -> Rows[Event]:
    """Put the events of these slices into columns."""
    rows: Rows[Event] = Rows([], [], [], [])
    for _, stream, first, items in slices:
        rows.writers.extend([stream.writer] * len(items))
        rows.sequences.extend(range(first, first + len(items)))
        rows.times_ns.extend([time_ns for time_ns, _ in items])
        rows.events.extend([event for _, event in items])
    return rows
