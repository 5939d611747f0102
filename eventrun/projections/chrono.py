"""One chrono of one trial: how often it ran and for how long."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

from eventrun.aggregators import Aggregator, Moments, split
from eventrun.events import ChronoFinished, ChronoStarted
from eventrun.projections.metric import begin_aggregator


class ChronoState(Struct, array_like=True, gc=False, frozen=True):
    """A named timer, in seconds. `count` runs are over, `running` have begun and not finished.

    `value` is that of the aggregator the caller chose, or None.
    """

    count: int
    sum: float
    mean: float | None
    min: float | int | None
    max: float | int | None
    sd: float | None
    running: int = 0
    value: Any = None


class ChronoFold(Struct, array_like=True, gc=False):
    """The working state of a chrono. Seconds that are not finite count as a run, and for nothing else."""

    started: int = 0
    finished: int = 0
    moments: Moments = field(default_factory=Moments)
    aggregator: Aggregator | None = None

    def observe(self, events: list[ChronoStarted | ChronoFinished]) -> None:
        """Take in starts and finishes in arrival order."""
        seconds = [event.seconds for event in events if isinstance(event, ChronoFinished)]
        self.started += len(events) - len(seconds)
        self.finished += len(seconds)
        self.moments.extend(split(seconds)[0])  # type: ignore[arg-type]
        if self.aggregator is not None:
            self.aggregator.extend(seconds)  # type: ignore[arg-type]
            return
        place, self.aggregator = begin_aggregator([event.aggregator for event in events])
        if self.aggregator is not None:
            since = [event.seconds for event in events[place:] if isinstance(event, ChronoFinished)]
            self.aggregator.extend(since)  # type: ignore[arg-type]

    def state(self) -> ChronoState:
        """Give the state to read."""
        moments = self.moments
        return ChronoState(
            self.finished, moments.total, moments.mean, moments.min, moments.max, moments.sd,
            max(self.started - self.finished, 0),
            None if self.aggregator is None else self.aggregator.value(),
        )  # fmt: skip
