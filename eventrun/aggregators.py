"""Summarise one series of observations in bounded space: `Moments`, and the aggregators a caller may name.

The state depends on the observations and their order alone, never on how they were grouped into calls or
split over shards that were merged in order; else a rebuild could not give the same bytes as catching up did.
So sums are exact: a double is an integer times a power of two, one power suits a whole chunk, and Python adds
integers exactly.

- Integers of about 70 bits are two to three times as quick as float partials (tried: `math.fsum` and its
  residuals, over products of values split in halves).
- With numpy a chunk is cut into rows of 20-bit integers held in doubles. No sum of their products passes
  2**53: one matrix product gives all of them unrounded (a bincount by exponent took up to 1.5 times as long).
- numpy is taken when the process has loaded it anyway, because loading it (120 ms) costs what it wins on a
  million values; whoever is about to fold more calls `load_numpy()` first.
"""

import importlib
import sys
from collections.abc import Iterable, Sequence
from itertools import repeat
from math import floor, frexp, inf, isfinite, isqrt
from operator import mul
from typing import Any, TypeAlias

import msgspec

from eventrun.events import Scalar

Number: TypeAlias = float | int

SERIES_LENGTH = 20  # values that TimeSeries keeps
RING_LIMIT = 10_000  # largest n of a Ring, in values
SKIP_LIMIT = 10_000  # largest skip of a Stat, in observations
CHUNK = 8192  # values summed at once; with 20-bit rows the numpy sums stay within 8192 * 2**40 = 2**53
FEW = 6  # values up to which the loop is the quickest way
NUMPY_FROM = 256  # values in a chunk from which numpy is the quicker way

_NUMBERS = frozenset({float, int, bool})
_ROW_BITS = 20
_ROW_STEP = _ROW_BITS + 1  # the rest after rounding is at most one half
_MOST_ROWS = 6  # a chunk whose bits spread further (over about 2**125) goes the pure way
_BIAS = 1 << 15  # makes the exponents of sums (-2148 to about 2110) unsigned 16-bit numbers

_Dyadic: TypeAlias = tuple[int, int]  # (integer, exponent) is integer * 2**exponent, exactly
_Part: TypeAlias = tuple[int, Number, Number, _Dyadic, _Dyadic]  # count, lowest, highest, sum, sum of squares


def load_numpy() -> bool:
    """Load numpy if it is installed, so that long lists are folded with it from now on; False if it isn't."""
    return _numpy() is not None


def split(values: list[Scalar]) -> tuple[list[Number], int, int]:
    """Return the finite numbers (perhaps the list given), how many are not finite, how many no numbers."""
    if _NUMBERS.issuperset(map(type, values)) and all(map(isfinite, values)):  # type: ignore[arg-type]
        return values, 0, 0  # type: ignore[return-value]
    numbers = [value for value in values if isinstance(value, (float, int))]
    finite = [value for value in numbers if isfinite(value)]
    return finite, len(numbers) - len(finite), len(values) - len(numbers)


class Moments(msgspec.Struct, array_like=True, gc=False):
    """Keep count, exact sum, exact sum of squares, lowest and highest of finite numbers; True counts as 1.

    Ints may have up to 64 bits and stay ints. Of equal numbers (1 and 1.0) `min` and `max` show the first.
    """

    count: int = 0
    exact_sum: bytes = b""
    exact_squares: bytes = b""
    min: Number | None = None
    max: Number | None = None

    def observe(self, x: Number) -> None:
        """Add one finite number."""
        self.extend((x,))

    def extend(self, xs: Sequence[Number]) -> None:
        """Add finite numbers; anything else is a ValueError or TypeError and leaves the state as it was."""
        if len(xs) <= CHUNK:
            if xs:
                self._take(*_part(xs))
        else:
            for part in [_part(xs[start : start + CHUNK]) for start in range(0, len(xs), CHUNK)]:
                self._take(*part)

    def merge(self, other: "Moments") -> None:
        """Add the observations of `other`, which came after ours."""
        if other.min is not None and other.max is not None:
            exact_sum, exact_squares = _unpack(other.exact_sum), _unpack(other.exact_squares)
            self._take(other.count, other.min, other.max, exact_sum, exact_squares)

    def _take(self, count: int, low: Number, high: Number, total: _Dyadic, squares: _Dyadic) -> None:
        self.count += count
        self.exact_sum = _add(self.exact_sum, total)
        self.exact_squares = _add(self.exact_squares, squares)
        if self.min is None or low < self.min:
            self.min = low
        if self.max is None or high > self.max:
            self.max = high

    @property
    def total(self) -> float:
        """The double nearest the sum, infinite if the sum is beyond all doubles."""
        integer, exponent = _unpack(self.exact_sum)
        try:
            return _quotient(integer, exponent, 1)
        except OverflowError:
            return inf if integer > 0 else -inf

    @property
    def mean(self) -> float | None:
        """The double nearest the mean."""
        return _quotient(*_unpack(self.exact_sum), self.count) if self.count else None

    @property
    def sd(self) -> float | None:
        """The double nearest the population standard deviation, sqrt(n * squares - sum**2) / n."""
        if not self.count:
            return None
        total, exponent = _unpack(self.exact_sum)
        squares, exponent_2 = _unpack(self.exact_squares)
        unit = min(2 * exponent, exponent_2)
        spread = self.count * (squares << exponent_2 - unit) - (total * total << 2 * exponent - unit)
        return _root(spread << max(unit, 0), self.count**2 << max(-unit, 0))


class Value(msgspec.Struct, array_like=True, tag="value", gc=False):
    """Keep the last value."""

    count: int = 0
    last: Scalar = None

    def observe(self, value: Scalar) -> None:
        """Add one value."""
        self.extend([value])

    def extend(self, values: list[Scalar]) -> None:
        """Add values, oldest first."""
        if values:
            self.count += len(values)
            self.last = values[-1]

    def merge(self, other: "Value") -> None:
        """Add the observations of `other`, which came after ours."""
        if other.count:
            self.count += other.count
            self.last = other.last

    def value(self) -> Scalar:
        """The last value; None before the first."""
        return self.last


class TimeSeries(msgspec.Struct, array_like=True, tag="series", gc=False):
    """Keep the last SERIES_LENGTH values and the count; the whole series stands in the history."""

    count: int = 0
    items: list[Scalar] = []

    def observe(self, value: Scalar) -> None:
        """Add one value."""
        self.extend([value])

    def extend(self, values: list[Scalar]) -> None:
        """Add values, oldest first."""
        self.count += len(values)
        _keep_last(self.items, values, SERIES_LENGTH)

    def merge(self, other: "TimeSeries") -> None:
        """Add the observations of `other`, which came after ours."""
        self.count += other.count
        _keep_last(self.items, other.items, SERIES_LENGTH)

    def value(self) -> list[Scalar]:
        """The values kept, oldest first."""
        return list(self.items)


class Ring(msgspec.Struct, array_like=True, tag="ring", gc=False):
    """Keep the last n values (1 to RING_LIMIT), unrounded."""

    n: int
    items: list[Scalar] = []

    def __post_init__(self) -> None:
        _check("ring", "n", self.n, 1, RING_LIMIT)

    def observe(self, value: Scalar) -> None:
        """Add one value."""
        self.extend([value])

    def extend(self, values: list[Scalar]) -> None:
        """Add values, oldest first."""
        _keep_last(self.items, values, self.n)

    def merge(self, other: "Ring") -> None:
        """Add the observations of `other`, which came after ours; a ValueError if its n is another."""
        if other.n != self.n:
            raise ValueError(f"a ring of {other.n} can't be merged into a ring of {self.n}: make both alike")
        _keep_last(self.items, other.items, self.n)

    def value(self) -> list[Scalar]:
        """The values kept, oldest first."""
        return list(self.items)


class Stat(msgspec.Struct, array_like=True, tag="stat", gc=False):
    """Keep statistics of all but the first observations, by Track's rule, with skip from 0 to SKIP_LIMIT.

    Observations 1 to skip-1 count for nothing, number skip for `min` and `max` only, the following ones for
    everything. What is not finite (NaN, infinite) or not numeric (str, None) takes its place in that order,
    is counted wherever it stands, and enters no statistic. The first `skip` observations are kept as they
    came: after a merge they may turn out not to be the first.
    """

    skip: int = 0
    head: list[Scalar] = []
    moments: Moments = msgspec.field(default_factory=Moments)
    later_non_finite: int = 0
    later_non_numeric: int = 0
    seen: int = 0
    last: Scalar = None

    def __post_init__(self) -> None:
        _check("stat", "skip", self.skip, 0, SKIP_LIMIT)

    def observe(self, value: Scalar) -> None:
        """Add one value."""
        self.extend([value])

    def extend(self, values: list[Scalar]) -> None:
        """Add values, oldest first."""
        if not values:
            return
        self.seen += len(values)
        self.last = values[-1]
        room = self.skip - len(self.head)
        if room:
            self.head += values[:room]
            values = values[room:]
        numbers, non_finite, non_numeric = split(values)
        self.moments.extend(numbers)
        self.later_non_finite += non_finite
        self.later_non_numeric += non_numeric

    def merge(self, other: "Stat") -> None:
        """Add the observations of `other`, which came after ours; a ValueError if its skip is another."""
        if other.skip != self.skip:
            raise ValueError(
                f"a stat with skip={other.skip} can't be merged into one of skip={self.skip}: make both alike"
            )
        if not other.seen:
            return
        self.extend(other.head)
        self.moments.merge(other.moments)
        self.later_non_finite += other.later_non_finite
        self.later_non_numeric += other.later_non_numeric
        self.seen += other.seen - len(other.head)
        self.last = other.last

    def value(self) -> dict[str, Scalar]:
        """The statistics by name; `count` is the number of values in `sum`; mean and sd of none are None."""
        edge = split(self.head[self.skip - 1 :])[0] if self.skip else []
        extremes = Moments()
        extremes.extend(edge)
        extremes.merge(self.moments)
        _, non_finite, non_numeric = split(self.head)
        return {
            "count": self.moments.count,
            "sum": self.moments.total,
            "mean": self.moments.mean,
            "sd": self.moments.sd,
            "min": extremes.min,
            "max": extremes.max,
            "last": self.last,
            "non_finite": non_finite + self.later_non_finite,
            "non_numeric": non_numeric + self.later_non_numeric,
        }


Aggregator: TypeAlias = Value | TimeSeries | Ring | Stat

_KINDS: dict[str, tuple[type[Aggregator], frozenset[str]]] = {
    "value": (Value, frozenset()),
    "series": (TimeSeries, frozenset()),
    "ring": (Ring, frozenset({"n"})),
    "stat": (Stat, frozenset({"skip"})),
}
_KNOWN = "known are value, series, ring (n), stat (skip)"


def make(name: str, arguments: dict[str, Any]) -> Aggregator:
    """Make the aggregator of that name; a ValueError says what is unknown, missing or out of bounds."""
    if name not in _KINDS:
        raise ValueError(f"unknown aggregator {name!r}: {_KNOWN}")
    kind, parameters = _KINDS[name]
    if unknown := sorted(arguments.keys() - parameters):
        raise ValueError(f"aggregator {name!r} takes no argument {', '.join(map(repr, unknown))}: {_KNOWN}")
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"aggregator {name!r}: {error}; {_KNOWN}") from error


def describe(aggregator: object) -> tuple[str, dict[str, Any]]:
    """Undo `make`: name and arguments, as an event carries them; observations are left out. Raises TypeError."""
    for name, (kind, parameters) in _KINDS.items():
        if isinstance(aggregator, kind):
            return name, {parameter: getattr(aggregator, parameter) for parameter in sorted(parameters)}
    raise TypeError(f"{type(aggregator).__qualname__} is not an aggregator: {_KNOWN}")


def _check(name: str, parameter: str, value: object, lowest: int, highest: int) -> None:
    if type(value) is not int or not lowest <= value <= highest:
        raise ValueError(
            f"aggregator {name!r}: {parameter} must be an int from {lowest} to {highest}, not {value!r}; "
            + _KNOWN
        )


def _keep_last(items: list[Scalar], values: list[Scalar], n: int) -> None:
    items += values[-n:]
    del items[:-n]


def _part(xs: Sequence[Number]) -> _Part:
    """Sum a chunk, which is not empty."""
    kinds = set(map(type, xs)) if len(xs) > FEW else set()
    if kinds == {float} and len(xs) >= NUMPY_FROM and (part := _numpy_part(xs)) is not None:
        return part
    low, high = min(xs) + 0, max(xs) + 0  # + 0 makes True into 1 and -0.0 into 0.0
    if not -inf < low <= high < inf:
        raise ValueError("moments take finite numbers only: filter the values with split() first")
    if kinds == {float} and (up := _common_power(xs, low, high)) is not None:
        sums = _integer_sums(list(map(floor, map(mul, xs, repeat(2.0**up)))), -up)
    elif kinds == {int}:
        sums = _integer_sums(xs, 0)
    else:
        sums = _slow_sums(xs)
    return len(xs), low, high, *sums


def _integer_sums(integers: Sequence[Any], exponent: int) -> tuple[_Dyadic, _Dyadic]:
    return (sum(integers), exponent), (sum(map(mul, integers, integers)), 2 * exponent)


def _common_power(xs: Sequence[float], low: float, high: float) -> int | None:
    """Return an `up` for which each x * 2.0**up is an integer; None if that would be beyond all doubles."""
    smallest = low if low > 0 else -high if high < 0 else min(map(abs, xs))
    smallest = smallest or min(filter(None, map(abs, xs)), default=1.0)
    up = 53 - frexp(smallest)[1]  # 2**-up is the last of the 53 bits of the smallest
    return up if up < 1024 and frexp(max(-low, high))[1] + up <= 1024 else None


def _slow_sums(xs: Sequence[Number]) -> tuple[_Dyadic, _Dyadic]:
    """Sum any finite numbers; the quickest way for a few of them."""
    total = squares = up = 0
    for x in xs:
        top, bottom = x.as_integer_ratio()
        more = bottom.bit_length() - 1 - up
        if more > 0:
            total, squares, up = total << more, squares << 2 * more, up + more
        else:
            top <<= -more
        total += top
        squares += top * top
    return (total, -up), (squares, -2 * up)


def _numpy_part(xs: Sequence[float]) -> _Part | None:
    """Sum a chunk with numpy; None if it isn't loaded or the bits of the numbers spread too far for it."""
    if "numpy" not in sys.modules or (np := _numpy()) is None:
        return None
    values = np.fromiter(xs, np.float64, len(xs))
    low, high = float(values.min()) + 0, float(values.max()) + 0
    if not -inf < low <= high < inf:
        return None
    with np.errstate(all="ignore"):  # underflow is looked for below; some BLAS raise flags for nothing
        down = max(frexp(max(-low, high))[1] - _ROW_BITS, -1000)
        rest = values * 2.0**-down
        if not np.array_equal(rest * 2.0**down, values):  # something was too small for that
            return None
        rows = [np.rint(rest)]
        while (rest := rest - rows[-1]).any():
            if len(rows) == _MOST_ROWS:
                return None
            rest *= 2.0**_ROW_STEP
            rows.append(np.rint(rest))
        matrix = np.array(rows)
        total = _joined(matrix.sum(axis=1).tolist())
        squares = _joined(map(_joined, (matrix @ matrix.T).tolist()))
    exponent = down - _ROW_STEP * (len(rows) - 1)
    return len(xs), low, high, (total, exponent), (squares, 2 * exponent)


def _joined(digits: Iterable[Number]) -> int:
    """Put together an integer from digits of any size and sign in base 2**_ROW_STEP, highest first."""
    result = 0
    for digit in digits:
        result = (result << _ROW_STEP) + int(digit)
    return result


def _numpy() -> Any | None:
    try:
        return importlib.import_module("numpy")
    except ImportError:
        return None


def _add(state: bytes, addend: _Dyadic) -> bytes:
    """Add to an exact sum.

    The bytes hold an odd integer above 16 bits of exponent (no bytes for zero): one form for each value.
    """
    ours, our_exponent = _unpack(state)
    integer, exponent = addend
    if our_exponent < exponent:
        integer <<= exponent - our_exponent
        exponent = our_exponent
    integer += ours << our_exponent - exponent
    if not integer:
        return b""
    zeros = (integer & -integer).bit_length() - 1
    packed = (integer >> zeros << 16) | exponent + zeros + _BIAS
    return packed.to_bytes(packed.bit_length() // 8 + 1, "little", signed=True)


def _unpack(state: bytes) -> _Dyadic:
    packed = int.from_bytes(state, "little", signed=True)
    return packed >> 16, (packed & 0xFFFF) - _BIAS if state else 0


def _quotient(integer: int, exponent: int, divisor: int) -> float:
    """Return integer * 2**exponent / divisor, rounded once."""
    if exponent < 0:
        return integer / (divisor << -exponent)
    return (integer << exponent) / divisor


def _root(top: int, bottom: int) -> float:
    """Return the double nearest sqrt(top / bottom), also where the quotient itself is no double.

    As in the standard library's `statistics`: the integer root has 55 bits or more and is odd if inexact, so
    that the one rounding, in the division, is right.
    """
    up = (bottom.bit_length() - top.bit_length() + 110) // 2
    if up > 0:
        top <<= 2 * up
    else:
        bottom <<= -2 * up
    root = isqrt(top // bottom)
    root |= root * root * bottom != top
    return _quotient(root, -up, 1)
