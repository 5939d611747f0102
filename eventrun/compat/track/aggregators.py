"""Track's four aggregators, with its arithmetic: statistics that skip, a ring, a time series, a value."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator
from math import inf, sqrt
from typing import Any

SHORT_SERIES = 20  # values of a time series in short JSON


class Aggregator:
    """Takes observations one by one."""

    def append(self, other: Any) -> None:
        """Add an observation."""
        raise NotImplementedError

    @property
    def val(self) -> Any:
        """What was observed last, or all that is kept."""
        raise NotImplementedError

    def to_json(self, short: bool = False) -> Any:
        """Give plain data, from which `from_json` makes the same again unless it is short."""
        raise NotImplementedError

    def __iadd__(self, other: Any) -> Any:
        self.append(other)
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Aggregator):
            return NotImplemented
        return type(self) is type(other) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.to_json(short=True)!r}>"

    @staticmethod
    def lazy(aggregator_t: Callable[..., Aggregator], **arguments: Any) -> Callable[[], Aggregator]:
        """Give a function that makes a new aggregator, for the parameter `aggregator`."""
        return lambda: aggregator_t(**arguments)

    @staticmethod
    def from_json(obj: Any) -> Aggregator:
        """Make the aggregator that gave this: statistics and rings tell what they are, a list is a time series."""
        kind = obj.get("dtype") if isinstance(obj, dict) else None
        if kind == "statstream":
            return StatAggregator.from_json(obj)
        if kind == "ring":
            return RingAggregator.from_json(obj)
        return TimeSeriesAggregator.from_json(obj) if isinstance(obj, list) else ValueAggregator(obj)


class ValueAggregator(Aggregator):
    """Keeps the last value."""

    def __init__(self, val: Any = None) -> None:
        self._val = val

    def append(self, other: Any) -> None:
        """Take the place of the value before."""
        self._val = other

    @property
    def val(self) -> Any:
        """The last value."""
        return self._val

    def to_json(self, short: bool = False) -> Any:
        """Give the value."""
        return self._val

    @staticmethod
    def lazy() -> Callable[[], Aggregator]:  # type: ignore[override]
        """Give a function that makes a new one."""
        return ValueAggregator

    @staticmethod
    def from_json(obj: Any) -> ValueAggregator:
        """Make one of this value."""
        return ValueAggregator(obj)


class TimeSeriesAggregator(Aggregator):
    """Keeps all observations, and is read like the list of them. Equal to a list of the same."""

    def __init__(self) -> None:
        self.time_series: list[Any] = []

    def append(self, other: Any) -> None:
        """Add an observation."""
        self.time_series.append(other)

    @property
    def val(self) -> list[Any]:
        """All of them."""
        return self.time_series

    def to_json(self, short: bool = False) -> list[Any]:
        """Give all, or the last SHORT_SERIES."""
        return self.time_series[-SHORT_SERIES:] if short else list(self.time_series)

    def __len__(self) -> int:
        return len(self.time_series)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.time_series)

    def __getitem__(self, place: Any) -> Any:
        return self.time_series[place]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, list):
            return self.time_series == other
        return super().__eq__(other)

    __hash__ = None

    @staticmethod
    def lazy() -> Callable[[], Aggregator]:  # type: ignore[override]
        """Give a function that makes a new one."""
        return TimeSeriesAggregator

    @staticmethod
    def from_json(obj: Any) -> TimeSeriesAggregator:
        """Make one of a list."""
        made = TimeSeriesAggregator()
        made.time_series.extend(obj)
        return made


class RingAggregator(Aggregator):
    """Keeps the last `n` observations, oldest first, rounded as an `array` of this type rounds ("f": 32 bits)."""

    def __init__(self, n: int, dtype: str = "f") -> None:
        if type(n) is not int or n < 1:
            raise ValueError(f"n={n!r}: a ring keeps at least one observation")
        self.n = n
        self.dtype = dtype
        self._round = array(dtype, [0])
        self._kept: deque[Any] = deque(maxlen=n)

    def append(self, other: Any) -> None:
        """Add an observation, in place of the oldest when there are n."""
        self._round[0] = other
        self._kept.append(self._round[0])

    @property
    def val(self) -> list[Any]:
        """Those kept, oldest first."""
        return list(self._kept)

    def to_json(self, short: bool = False) -> Any:
        """Give what is kept; unless short, with all that is needed to go on."""
        return self.val if short else {"dtype": "ring", "n": self.n, "type": self.dtype, "values": self.val}

    @staticmethod
    def lazy(n: int, dtype: str = "f") -> Callable[[], Aggregator]:  # type: ignore[override]
        """Give a function that makes a new one."""
        return lambda: RingAggregator(n, dtype)

    @staticmethod
    def from_json(obj: Any) -> RingAggregator:
        """Undo `to_json`."""
        made = RingAggregator(obj["n"], obj["type"])
        made._kept.extend(obj["values"])
        return made


class StatAggregator(Aggregator):
    """Keeps mean, population sd, sum, min and max of all but the first observations.

    Observations 1 to skip_obs-1 count for nothing, number skip_obs for min and max, the following for everything.
    Sums are taken of the distance to the first that counts, so that a large mean doesn't cost the digits of the sd.
    """

    def __init__(self, skip_obs: int = 10) -> None:
        self.skip_obs = skip_obs
        self.current_count = 0  # observations in all
        self.current_obs: Any = 0.0
        self.first_obs = 0.0
        self._sum = 0.0
        self._sum_sqr = 0.0
        self._min = inf
        self._max = -inf

    def append(self, other: Any) -> None:
        """Add an observation."""
        self.current_count += 1
        self.current_obs = other
        if self.current_count < self.skip_obs:
            return
        if self.current_count == max(self.skip_obs, 1):
            self.first_obs = other
        self._min, self._max = min(self._min, other), max(self._max, other)
        if self.current_count > self.skip_obs:
            distance = other - self.first_obs
            self._sum += distance
            self._sum_sqr += distance * distance

    @property
    def count(self) -> int:
        """How many count for the mean; 1 when none do."""
        return max(self.current_count - self.skip_obs, 1)

    @property
    def val(self) -> Any:
        """The last observation."""
        return self.current_obs

    @property
    def avg(self) -> float:
        """The mean; 0 when nothing counts yet."""
        return self._sum / self.count + (self.first_obs if self._counts else 0.0)

    @property
    def sd(self) -> float:
        """The standard deviation of the population; 0 when nothing counts yet."""
        mean = self._sum / self.count
        return sqrt(max(self._sum_sqr / self.count - mean * mean, 0.0))

    @property
    def sum(self) -> float:
        """The sum of what counts."""
        return self._sum + (self.first_obs * self.count if self._counts else 0.0)

    @property
    def total(self) -> float:
        """The sum of what counts."""
        return self.sum

    @property
    def min(self) -> float:
        """The lowest; infinite when there is none."""
        return self._min

    @property
    def max(self) -> float:
        """The highest; minus infinite when there is none."""
        return self._max

    @property
    def _counts(self) -> bool:
        return self.current_count > self.skip_obs

    def to_json(self, short: bool = False) -> dict[str, Any]:
        """Give the statistics, or all that is needed to go on."""
        if short:
            return {"avg": self.avg, "min": self.min, "max": self.max, "sd": self.sd, "count": self.count}
        return {
            "dtype": "statstream", "sum": self._sum, "sum_sqr": self._sum_sqr, "first_obs": self.first_obs,
            "min": self._min, "max": self._max, "current_count": self.current_count,
            "current_obs": self.current_obs, "drop_obs": self.skip_obs,
        }  # fmt: skip

    @staticmethod
    def lazy(skip: int = 10) -> Callable[[], Aggregator]:  # type: ignore[override]
        """Give a function that makes a new one."""
        return lambda: StatAggregator(skip)

    @staticmethod
    def from_json(obj: Any) -> StatAggregator:
        """Undo `to_json`."""
        made = StatAggregator(obj["drop_obs"])
        made._sum, made._sum_sqr, made.first_obs = obj["sum"], obj["sum_sqr"], obj["first_obs"]
        made._min, made._max = obj["min"], obj["max"]
        made.current_count, made.current_obs = obj["current_count"], obj["current_obs"]
        return made


EACH = StatAggregator.lazy(1)  # a chrono's, unless its user names another


def described(aggregator: Any) -> tuple[str, dict[str, Any]] | None:
    """Say what an aggregator is as an event does; None for one of a kind that only its maker knows."""
    match aggregator:
        case StatAggregator():
            return "stat", {"skip": aggregator.skip_obs}
        case RingAggregator():
            # eventrun's own ring doesn't round; a type of one's own is passed by there, and made again here.
            named = {} if aggregator.dtype == "f" else {"dtype": aggregator.dtype}
            return "ring", {"n": aggregator.n, **named}
        case ValueAggregator():
            return "value", {}
        case TimeSeriesAggregator():
            return "series", {}
    return None


def made(choice: tuple[str, dict[str, Any]] | None) -> Aggregator | None:
    """Undo `described`; None for what isn't known."""
    name, arguments = choice or ("", {})
    match name:
        case "stat":
            return StatAggregator(arguments.get("skip", 0))
        case "ring":
            return RingAggregator(arguments.get("n", 1), arguments.get("dtype", "f"))
        case "value":
            return ValueAggregator()
        case "series":
            return TimeSeriesAggregator()
    return None
