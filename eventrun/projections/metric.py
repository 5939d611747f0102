"""One metric of one trial: its summary, and its new points as columns.

A log call names several metrics, and a training loop makes the same few calls over and over. So calls of one shape
(subset and names) are put together, whatever came between them, and each metric becomes one list; what depends on
steps and times alone is worked out once for all the metrics that share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from msgspec import Struct, field

from eventrun import aggregators
from eventrun.aggregators import Aggregator, Moments, split
from eventrun.events import AggregatorChoice, MetricsLogged, Scalar, Step
from eventrun.projections.rows import Rows

T = TypeVar("T")
Number = float | int


def series_name(name: str, subset: str | None = None) -> str:
    """Name the series of a metric: subset "train" with "loss", and "train/loss", are one on purpose."""
    return f"{subset}/{name}" if subset else name


class Points(Struct, gc=False):
    """New points of one metric, in arrival order, one place per point in each list.

    Metrics logged by the same calls share their lists: don't change them.
    """

    values: list[Scalar]
    steps: list[Step]
    epochs: list[Step]
    times_ns: list[int]
    sequences: list[int]

    def __len__(self) -> int:
        return len(self.values)


class MetricState(Struct, array_like=True, gc=False, frozen=True):
    """A metric in short. `count` counts all points, the statistics are those of the finite numbers (True is 1).

    `last` is the value last by (time_ns, stream, sequence), `latest` by (step, time_ns, stream, sequence), points
    without a step before all others; both may be of any type, NaN too. `first_step` and `last_step` are the steps of
    the first and the last point to arrive that has one. `non_finite` counts NaN and infinities, `non_numeric` text
    and None. `value` is that of the aggregator the caller chose, or None.
    """

    count: int
    last: Scalar
    latest: Scalar
    min: Number | None
    max: Number | None
    mean: float | None
    sd: float | None
    first_step: Step = None
    last_step: Step = None
    non_finite: int = 0
    non_numeric: int = 0
    value: Any = None


class Frame(Struct, gc=False, frozen=True):
    """What the metrics of the same calls share: their columns, and which of the points is last and latest."""

    steps: list[Step]
    epochs: list[Step]
    times_ns: list[int]
    sequences: list[int]
    choices: list[AggregatorChoice | None] | None  # None: no call chose an aggregator
    last: int
    last_key: tuple[int, ...]
    latest: int
    latest_key: tuple[Number, ...]
    first_step: Step
    last_step: Step

    @classmethod
    def of(cls, rows: Rows[MetricsLogged]) -> Frame:
        """Make the frame of these calls."""
        writers, sequences, times_ns, calls = rows
        # Comprehensions: with slots they take half the time of map and attrgetter.
        steps = [call.step for call in calls]
        choices = [call.aggregator for call in calls]
        numbers = [step for step in steps if step is not None and step == step]  # a NaN is no step either

        def key(place: int) -> tuple[int, ...]:
            return times_ns[place], writers[place], sequences[place]

        last = latest = _greatest(times_ns, max(times_ns), key)
        if numbers:
            latest = _greatest(steps, max(numbers), key)
        return cls(
            steps,
            [call.epoch for call in calls],
            times_ns,
            sequences,
            choices if any(choices) else None,
            last,
            key(last),
            latest,
            (1, steps[latest] or 0, *key(latest)) if numbers else (0, 0, *key(last)),
            numbers[0] if numbers else None,
            numbers[-1] if numbers else None,
        )


def _greatest(column: list[T], top: T, key: Callable[[int], tuple[int, ...]]) -> int:
    """Return where `top` stands in the column; of several such places the one with the greatest key."""
    if column[-1] == top and column.count(top) == 1:
        return len(column) - 1
    return max((place for place, value in enumerate(column) if value == top), key=key)


class MetricFold(Struct, array_like=True, gc=False):
    """The working state of a metric."""

    count: int = 0
    last: Scalar = None
    last_key: tuple[int, ...] = ()
    latest: Scalar = None
    latest_key: tuple[Number, ...] = ()
    moments: Moments = field(default_factory=Moments)
    first_step: Step = None
    last_step: Step = None
    non_finite: int = 0
    non_numeric: int = 0
    aggregator: Aggregator | None = None

    def observe(self, values: list[Scalar], frame: Frame) -> None:
        """Take in the values that arrived next, all of one frame."""
        numbers, non_finite, non_numeric = split(values)
        self.moments.extend(numbers)
        self.count += len(values)
        self.non_finite += non_finite
        self.non_numeric += non_numeric
        if frame.last_key > self.last_key:
            self.last, self.last_key = values[frame.last], frame.last_key
        if frame.latest_key > self.latest_key:
            self.latest, self.latest_key = values[frame.latest], frame.latest_key
        if frame.last_step is not None:
            self.last_step = frame.last_step
            if self.first_step is None:
                self.first_step = frame.first_step
        if self.aggregator is not None:
            self.aggregator.extend(values)
        elif frame.choices is not None:
            place, self.aggregator = begin_aggregator(frame.choices)
            if self.aggregator is not None:
                self.aggregator.extend(values[place:])

    def state(self) -> MetricState:
        """Give the state to read."""
        moments = self.moments
        return MetricState(
            self.count, self.last, self.latest, moments.min, moments.max, moments.mean, moments.sd,
            self.first_step, self.last_step, self.non_finite, self.non_numeric,
            None if self.aggregator is None else self.aggregator.value(),
        )  # fmt: skip


def begin_aggregator(choices: Sequence[AggregatorChoice | None]) -> tuple[int, Aggregator | None]:
    """Make the first aggregator that was chosen, and say where: it observes from there on, later choices don't count.

    A choice that this version can't make is passed by: what stands in the log must not stop a fold.
    """
    for place, choice in enumerate(choices):
        if choice is not None:
            try:
                return place, aggregators.make(*choice)
            except ValueError:
                continue
    return 0, None


def observe_calls(metrics: dict[str, MetricFold], rows: Rows[MetricsLogged]) -> dict[str, Points]:
    """Take in log calls in arrival order, and return their points by metric."""
    points = {}
    for name, values, frame in _series(rows):
        metric = metrics.get(name)
        if metric is None:
            metric = metrics[name] = MetricFold()
        metric.observe(values, frame)
        points[name] = Points(values, frame.steps, frame.epochs, frame.times_ns, frame.sequences)
    return points


def _series(rows: Rows[MetricsLogged]) -> Iterator[tuple[str, list[Scalar], Frame]]:
    """Yield each metric of these calls once, in the order of first arrival, with its values and their frame."""
    values = [call.values for call in rows.events]
    subsets = [call.subset for call in rows.events]
    columns = _columns(values, subsets)
    if columns is None:
        yield from _mixed_series(rows, values, subsets)
    elif columns:
        frame = Frame.of(rows)
        for name, column in columns.items():
            yield series_name(name, subsets[0]), column, frame


def _columns(values: list[dict[str, Scalar]], subsets: list[str | None]) -> dict[str, list[Scalar]] | None:
    """Return the values by name; None unless all calls have one shape."""
    size = len(values)
    if subsets.count(subsets[0]) != size or sum(map(len, values)) != size * len(values[0]):
        return None
    try:
        return {name: [value[name] for value in values] for name in values[0]}
    except KeyError:
        return None


def _mixed_series(
    rows: Rows[MetricsLogged], values: list[dict[str, Scalar]], subsets: list[str | None]
) -> Iterator[tuple[str, list[Scalar], Frame]]:
    shapes: dict[tuple[str | None, tuple[str, ...]], list[int]] = {}
    for place, shape in enumerate(zip(subsets, map(tuple, values), strict=True)):
        shapes.setdefault(shape, []).append(place)
    homes: dict[str, list[tuple[str, list[int]]]] = {}  # which name it has in which calls
    for (subset, names), places in shapes.items():
        for name in names:
            homes.setdefault(series_name(name, subset), []).append((name, places))
    frames: dict[tuple[int, ...], Frame] = {}
    for series, found in homes.items():
        name, places = found[0]
        if len(found) == 1:
            column = [values[place][name] for place in places]
        else:
            order = sorted((place, name) for name, places in found for place in places)
            places = [place for place, _ in order]
            column = [values[place][name] for place, name in order]
        home = tuple(id(places) for _, places in found)
        if home not in frames:
            frames[home] = Frame.of(rows.take(places))
        yield series, column, frames[home]
