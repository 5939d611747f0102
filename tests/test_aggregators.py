import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from math import inf, isfinite, nan, nextafter, ulp
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eventrun import aggregators
from eventrun.aggregators import (
    CHUNK,
    NUMPY_FROM,
    RING_LIMIT,
    SERIES_LENGTH,
    SKIP_LIMIT,
    Aggregator,
    Moments,
    Number,
    Ring,
    Stat,
    TimeSeries,
    Value,
    load_numpy,
    make,
    split,
)
from eventrun.events import Scalar

MAX = sys.float_info.max
TINY = 5e-324  # the smallest subnormal

needs_numpy = pytest.mark.skipif(not load_numpy(), reason="numpy is not installed")

ints = st.integers(-(2**63), 2**64 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
ordinary = st.floats(-1e3, 1e3)
numbers = st.one_of(
    *(
        st.lists(kind, max_size=40)
        for kind in (finite, ordinary, ints, finite | ordinary | ints | st.booleans())
    )
)
scalars = st.lists(st.floats() | ints | st.booleans() | st.text(max_size=3) | st.none(), max_size=40)
cuts = st.lists(st.integers(0, 40), max_size=8)
choices = st.sampled_from(
    [("value", {}), ("series", {}), ("ring", {"n": 1}), ("ring", {"n": 7})]
    + [("stat", {"skip": skip}) for skip in (0, 1, 2, 10)]
)


def encoded(state: Moments | Aggregator) -> bytes:
    return msgspec.msgpack.encode(state)


def moments(xs: list[Number]) -> Moments:
    result = Moments()
    result.extend(xs)
    return result


def pieces(xs: list[Any], at: list[int]) -> list[list[Any]]:
    return [xs[start:end] for start, end in pairwise([0, *sorted(at), max([len(xs), *at])])]


def noisy(seed: int, length: int, exponents: tuple[int, int] = (0, 0)) -> list[Number]:
    rng = random.Random(seed)
    return [rng.gauss(0.0, 1.0) * 2.0 ** rng.randint(*exponents) for _ in range(length)]


def is_nearest_root(root: float, square: Fraction) -> bool:
    low = (Fraction(root) + Fraction(nextafter(root, -inf))) / 2
    high = Fraction(root) + Fraction(ulp(root)) / 2
    return (low < 0 or low * low <= square) and square <= high * high


@contextmanager
def without_numpy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "numpy", None)
        yield


def test_moments_of_nothing() -> None:
    """Without observations the total is 0, and there is no mean, sd, lowest or highest."""
    empty = moments([])
    empty.merge(Moments())
    assert empty == Moments()
    assert (empty.count, empty.total, empty.mean, empty.sd, empty.min, empty.max) == (
        0,
        0.0,
        None,
        None,
        None,
        None,
    )


@given(numbers)
@example([MAX, MAX, -MAX])
@example([0.0, -0.0])
def test_moments_are_exact(xs: list[Number]) -> None:
    """Total, mean and sd are the doubles nearest the exact ones, for any finite numbers."""
    result = moments(xs)
    assert result.count == len(xs)
    if not xs:
        return
    fractions = [Fraction(x) for x in xs]
    mean = sum(fractions, Fraction()) / len(xs)
    assert result.mean == float(mean)
    if abs(mean * len(xs)) <= MAX:
        assert result.total == float(mean * len(xs))
    assert result.sd is not None
    assert result.sd >= 0
    assert is_nearest_root(result.sd, sum((x * x for x in fractions), Fraction()) / len(xs) - mean * mean)
    assert (result.min, result.max) == (min(xs), max(xs))


@given(numbers, cuts)
@example([1, 1.0, True, -0.0, 0, 0.0], [1, 2, 3, 4, 5])
def test_moments_do_not_depend_on_grouping(xs: list[Number], at: list[int]) -> None:
    """One by one, in any groups, or as shards merged in order: the encoded state has the same bytes."""
    grouped, single, merged = Moments(), Moments(), Moments()
    for x in xs:
        single.observe(x)
    for piece in pieces(xs, at):
        grouped.extend(piece)
        merged.merge(moments(piece))
    assert encoded(moments(xs)) == encoded(single) == encoded(grouped) == encoded(merged)


@given(numbers)
def test_moments_come_back(xs: list[Number]) -> None:
    """A stored state comes back the same, and goes on as the first would have."""
    stored = msgspec.msgpack.decode(encoded(moments(xs)), type=Moments)
    assert encoded(stored) == encoded(moments(xs))
    stored.extend(xs)
    assert encoded(stored) == encoded(moments(xs + xs))


@pytest.mark.parametrize(
    ("some", "others"),
    [
        ([0.5, 0.5], [1.0, 0.0]),
        ([MAX, TINY, -MAX], [TINY]),
        ([2**60, 0.75], [2**60 + 0.0, 0.75]),
        ([0.1, -0.1], []),
    ],
)
def test_equal_sums_equal_bytes(some: list[Number], others: list[Number]) -> None:
    """A sum has one form, whatever it was made of."""
    assert moments(some).exact_sum == moments(others).exact_sum


@needs_numpy
@given(
    st.integers(0, 2**32),
    st.integers(NUMPY_FROM, 600),
    st.tuples(st.integers(-1060, 1020), st.integers(0, 150)),
)
@example(1, 300, (-1060, 0))
@example(1, 300, (-1060, 2080))
@example(1, 300, (900, 120))
def test_numpy_gives_the_same_bytes(seed: int, length: int, exponents: tuple[int, int]) -> None:
    """With and without numpy the state is the same, for small and large numbers and any spread of them."""
    lowest, width = exponents
    xs = noisy(seed, length, (lowest, min(lowest + width, 1020)))
    fast = moments(xs)
    with without_numpy():
        assert encoded(moments(xs)) == encoded(fast)


@needs_numpy
@pytest.mark.parametrize(
    "xs",
    [
        noisy(1, CHUNK - 1),
        noisy(2, CHUNK),
        noisy(3, CHUNK + 1),
        noisy(4, 3 * CHUNK + NUMPY_FROM),
        [nextafter(1.0, 0.0)] * CHUNK,
        [-nextafter(2.0**1000, 0.0)] * CHUNK,
        [-0.0, 0.0] * CHUNK,
        [TINY, -2 * TINY, 3 * TINY] * 1000,
        [MAX, -MAX] * 1000,
        [MAX, TINY] * 1000,
        [1.0, 2.0**-200] * 1000,
    ],
    ids=lambda xs: f"{len(xs)} from {xs[0]}",
)
def test_numpy_gives_the_same_bytes_at_the_bounds(xs: list[Number]) -> None:
    """The same holds around the size of a chunk, where sums reach 2**53, and where numpy has to be left."""
    fast = moments(xs)
    single = Moments()
    for x in xs:
        single.observe(x)
    with without_numpy():
        assert encoded(moments(xs)) == encoded(fast) == encoded(single)


@needs_numpy
def test_numpy_is_used() -> None:
    """Ordinary noisy doubles are summed with numpy once it is loaded, numbers spread too far are not."""
    xs = [float(x) for x in noisy(5, 1000, (-10, 10))]
    assert aggregators._numpy_part(xs) is not None
    assert aggregators._numpy_part([*xs, 1e-300]) is None
    with without_numpy():
        assert not load_numpy()
        assert aggregators._numpy_part(xs) is None


@pytest.mark.parametrize("exponent", [*range(960, 980), 1022, 1023])
def test_spread_at_the_bounds_of_doubles(exponent: int) -> None:
    """Where bringing all numbers to integers would just leave the range of doubles, sums stay exact."""
    small = 1.75 * 2.0**-exponent
    for xs in ([1.75 * 2.0**exponent, 1.25, -1.5] * 4, [small, 1.25, -1.5] * 4, [small, -small] * 4):
        single = Moments()
        for x in xs:
            single.observe(x)
        assert encoded(moments([*xs])) == encoded(single)


def test_large_ints_are_exact() -> None:
    """Ints above 2**53 are summed and compared as ints, alone and among floats."""
    xs: list[Number] = [2**53 + 1, 2**64 - 1, -(2**63), 2**53 + 3] * 5
    result = moments(xs)
    assert result.total == float(sum(xs))
    assert (result.min, result.max) == (-(2**63), 2**64 - 1)
    assert moments([2**53 + 1, -float(2**53)]).mean == 0.5
    assert moments([2**53 + 1, 2.0**53]).max == 2**53 + 1


def test_sums_beyond_doubles() -> None:
    """Where a sum or a square is no double, the mean and sd still are."""
    assert moments([MAX] * 10).mean == MAX
    assert moments([MAX] * 10).sd == 0.0
    assert moments([MAX] * 10).total == inf
    assert moments([-MAX] * 10).total == -inf
    assert moments([MAX, -MAX]).sd == MAX
    assert moments([0.0, 1e-200]).sd == 5e-201
    assert moments([TINY] * 1000).mean == TINY
    assert moments([1e16, 1.0, -1e16]).total == 1.0


def test_types_of_extremes() -> None:
    """Ints stay ints, True counts as 1, -0.0 as 0.0, and the first of equal numbers decides the type."""
    assert repr(moments([3, 5]).min) == "3"
    assert repr(moments([True, False]).max) == "1"
    assert repr(moments([-0.0, 0]).min) == "0.0"
    assert repr(moments([0, -0.0]).min) == "0"


@pytest.mark.parametrize("bad", [nan, inf, -inf, "1", None])
@pytest.mark.parametrize("length", [0, 5, 50, 500, CHUNK + 50])
def test_moments_refuse_what_is_not_finite(bad: Any, length: int) -> None:
    """What is no finite number is an error, whatever the way of summing, and nothing of its list is added."""
    result = moments([1.5])
    before = encoded(result)
    for xs in ([*noisy(6, length), bad], [bad, *noisy(6, length)]):
        with pytest.raises((ValueError, TypeError)):
            result.extend(xs)
    assert encoded(result) == before


@given(scalars)
def test_split(values: list[Scalar]) -> None:
    """Finite numbers (bools too) come out in order; the others are counted as not finite or not numeric."""
    kept, non_finite, non_numeric = split(values)
    assert list(map(repr, kept)) == [repr(x) for x in values if isinstance(x, (float, int)) and isfinite(x)]
    assert non_numeric == sum(x is None or isinstance(x, str) for x in values)
    assert len(kept) + non_finite + non_numeric == len(values)


def test_split_does_not_copy_finite_numbers() -> None:
    """A list of finite numbers is handed on as it is."""
    values: list[Scalar] = [1.5, 2, True]
    assert split(values)[0] is values


@given(choices, scalars, cuts)
def test_aggregators_do_not_depend_on_grouping(
    choice: tuple[str, dict[str, Any]], values: list[Scalar], at: list[int]
) -> None:
    """One by one, in any groups, or as shards merged in order: each aggregator's state has the same bytes."""
    whole, single, grouped, merged = (make(*choice) for _ in range(4))
    whole.extend(values)
    for value in values:
        single.observe(value)
    for piece in pieces(values, at):
        grouped.extend(piece)
        shard: Any = make(*choice)
        shard.extend(piece)
        merged.merge(shard)
    assert encoded(whole) == encoded(single) == encoded(grouped) == encoded(merged)


@given(choices, scalars)
def test_aggregators_come_back(choice: tuple[str, dict[str, Any]], values: list[Scalar]) -> None:
    """A stored aggregator is told by its tag, comes back the same and goes on as the first would have."""
    first = make(*choice)
    first.extend(values)
    stored = msgspec.msgpack.Decoder[Aggregator](Aggregator).decode(encoded(first))
    assert type(stored) is type(first)
    assert repr(stored.value()) == repr(first.value())
    first.extend(values)
    stored.extend(values)
    assert encoded(stored) == encoded(first)


def test_value_is_the_last() -> None:
    """Value shows the last value, whatever its type; None seen last is told from nothing seen."""
    value = Value()
    value.extend([1.5, "x", True])
    value.merge(Value())
    assert value.value() is True
    last = Value()
    last.observe(None)
    value.merge(last)
    assert value.value() is None
    assert value.count == 4


def test_series_shows_its_end() -> None:
    """TimeSeries counts all values and keeps the last SERIES_LENGTH, NaN and strings included."""
    series = TimeSeries()
    series.extend([*range(100), nan, "end"])
    assert series.count == 102
    assert repr(series.value()) == repr([*range(100 - SERIES_LENGTH + 2, 100), nan, "end"])


def test_ring_keeps_the_last_n() -> None:
    """Ring shows the last n values, oldest first and unrounded."""
    ring = Ring(3)
    ring.observe(0.1)
    assert ring.value() == [0.1]
    ring.extend([0.2, 0.3, 0.4])
    ring.observe(0.5)
    assert ring.value() == [0.3, 0.4, 0.5]


def test_values_shown_are_copies() -> None:
    """Changing what value() returned doesn't change the state, nor does changing the list that was passed."""
    for aggregator in (Ring(3), TimeSeries()):
        values: list[Scalar] = [1, 2]
        aggregator.extend(values)
        values.append(3)
        aggregator.value().append(4)
        assert aggregator.value() == [1, 2]


@pytest.mark.parametrize(
    ("skip", "shown"),
    [
        (10, {"count": 90, "sum": 4905.0, "mean": 54.5, "sd": 25.979158313283875, "min": 9, "max": 99}),
        (0, {"count": 100, "sum": 4950.0, "mean": 49.5, "sd": 28.86607004772212, "min": 0, "max": 99}),
        (1, {"count": 99, "sum": 4950.0, "mean": 50.0, "sd": 28.577380332470412, "min": 0, "max": 99}),
        (100, {"count": 0, "sum": 0.0, "mean": None, "sd": None, "min": 99, "max": 99}),
        (101, {"count": 0, "sum": 0.0, "mean": None, "sd": None, "min": None, "max": None}),
    ],
)
def test_stat_skips_as_track_does(skip: int, shown: dict[str, Any]) -> None:
    """Observations before number `skip` are ignored, number `skip` enters min and max only, the rest all."""
    stat = Stat(skip)
    stat.extend(list(range(100)))
    assert stat.value() == {**shown, "last": 99, "non_finite": 0, "non_numeric": 0}


def test_stat_of_anything() -> None:
    """What is not finite or not numeric takes its place in the skipping, is counted, enters no statistic."""
    stat = Stat(skip=2)
    stat.extend([nan, "warm-up", -inf, 5.0, None, True, 3])
    assert stat.value() == {
        "count": 3,
        "sum": 9.0,
        "mean": 3.0,
        "sd": 1.632993161855452,
        "min": 1,
        "max": 5.0,
        "last": 3,
        "non_finite": 2,
        "non_numeric": 2,
    }


def test_merge_wants_equals() -> None:
    """Rings of different n, and Stats of different skip, can't be merged."""
    with pytest.raises(ValueError, match=r"ring of 4 .* ring of 3"):
        Ring(3).merge(Ring(4))
    with pytest.raises(ValueError, match=r"skip=1 .* skip=2:"):
        Stat(2).merge(Stat(1))


def test_states_are_bounded() -> None:
    """Each aggregator's state stays small, however many values it has seen."""
    xs: list[Scalar] = [*noisy(7, 100_000)]
    for aggregator in (Value(), TimeSeries(), Ring(20), Stat(20)):
        aggregator.extend(xs)
        assert len(encoded(aggregator)) < 300


def test_make_by_name() -> None:
    """The four names make the four aggregators; bounds are inclusive and skip may be left out."""
    assert make("value", {}) == Value()
    assert make("series", {}) == TimeSeries()
    assert make("ring", {"n": RING_LIMIT}) == Ring(RING_LIMIT)
    assert make("stat", {"skip": SKIP_LIMIT}) == Stat(SKIP_LIMIT)
    assert make("stat", {}) == Stat(0)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("median", {}, "unknown aggregator 'median'"),
        ("value", {"n": 1}, "'value' takes no argument 'n'"),
        ("ring", {"n": 3, "items": [1]}, "'ring' takes no argument 'items'"),
        ("ring", {}, "'ring': .*'n'"),
        ("ring", {"n": 0}, "n must be an int from 1 to 10000, not 0"),
        ("ring", {"n": RING_LIMIT + 1}, "not 10001"),
        ("ring", {"n": True}, "not True"),
        ("stat", {"skip": -1}, "skip must be an int from 0 to 10000, not -1"),
        ("stat", {"skip": 1.5}, "not 1.5"),
    ],
)
def test_make_says_what_is_wrong(name: str, arguments: dict[str, Any], said: str) -> None:
    """An unknown name or a bad argument is a ValueError that names it and lists what is known."""
    with pytest.raises(ValueError, match=said + r".*known are value, series, ring \(n\), stat \(skip\)"):
        make(name, arguments)


def test_stored_bounds_are_checked() -> None:
    """A stored ring whose n is out of bounds is refused when it is read."""
    with pytest.raises(msgspec.ValidationError, match="n must be an int"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(["ring", 0, []]), type=Ring)


@pytest.mark.parametrize(
    ("name", "arguments"), [("value", {}), ("series", {}), ("ring", {"n": 3}), ("stat", {"skip": 2})]
)
def test_describe_undoes_make(name: str, arguments: dict[str, int]) -> None:
    """An aggregator gives back the name and arguments it was made of, whatever it has observed."""
    made = aggregators.make(name, arguments)
    made.observe(1.0)
    assert aggregators.describe(made) == (name, arguments)
    with pytest.raises(TypeError, match="int is not an aggregator"):
        aggregators.describe(3)
