"""M4: thin a series for a line chart to the lowest, highest, first and last point of each of N buckets.

A line drawn through these points covers the same pixels as one through all points, when a bucket is as wide as a
pixel (U. Jugel et al., "M4: a visualization-oriented time series data aggregation", VLDB 2014). A point's place
on the axis is its step, or its place in the order of arrival where it has none. numpy is used when it is loaded, or
when there is enough to do, and gives the same points.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from itertools import pairwise
from math import inf, isfinite
from typing import Any

from eventrun.aggregators import load_numpy

NUMPY_FROM = 200_000  # points from which loading numpy pays

Between = tuple[float | None, float | None]


def thin(
    steps: Sequence[Any], values: Sequence[Any], buckets: int | None, between: Between | None
) -> Sequence[int]:
    """Return the places of the points to show, in order of arrival.

    With `between` only those whose place on the axis lies in it, bounds included (None: open). With `buckets` at
    most that many times four; NaN, text and None are never lowest or highest. All are kept when they are so few.
    """
    low, high = (-inf, inf) if between is None else (_bound(between[0], -inf), _bound(between[1], inf))
    if (
        _is_plain(steps)
        and _is_plain(values)
        and ("numpy" in sys.modules or (len(values) >= NUMPY_FROM and load_numpy()))
    ):
        return _thin_numpy(steps, values, buckets, low, high)
    return _thin_pure(steps, values, buckets, low, high)


def _bound(bound: float | None, default: float) -> float:
    return default if bound is None else bound


def _is_plain(column: Sequence[Any]) -> bool:
    return isinstance(column, (array, range))


def _thin_pure(
    steps: Sequence[Any], values: Sequence[Any], buckets: int | None, low: float, high: float
) -> Sequence[int]:
    xs = [
        float(place) if step is None or not isfinite(step) else float(step)
        for place, step in enumerate(steps)
    ]
    chosen = [place for place, x in enumerate(xs) if low <= x <= high]
    if buckets is None or len(chosen) <= 4 * buckets:
        return chosen
    chosen.sort(key=xs.__getitem__)
    kept: set[int] = set()
    bucket_of = _buckets(xs[chosen[0]], xs[chosen[-1]], buckets)
    start = 0
    numbers = [bucket_of(xs[place]) for place in chosen]
    cuts = [
        0,
        *(at for at, (one, next_one) in enumerate(pairwise(numbers), 1) if one != next_one),
        len(chosen),
    ]
    for start, end in pairwise(cuts):
        bucket = chosen[start:end]
        kept.update((bucket[0], bucket[-1]))
        comparable = [place for place in bucket if isinstance(values[place], (float, int))]
        comparable = [place for place in comparable if values[place] == values[place]]
        if comparable:
            kept.add(min(comparable, key=values.__getitem__))
            kept.add(max(comparable, key=values.__getitem__))
    return sorted(kept)


def _buckets(first: float, last: float, count: int) -> Any:
    """Return a function from a place on the axis to its bucket, 0 to count - 1."""
    scale = 1.0 if isfinite(last - first) else 0.25
    start, width = first * scale, last * scale - first * scale

    def bucket_of(x: float) -> int:
        return min(int((x * scale - start) / width * count), count - 1) if width else 0

    return bucket_of


def _thin_numpy(
    steps: Sequence[Any], values: Sequence[Any], buckets: int | None, low: float, high: float
) -> Sequence[int]:
    import numpy as np

    def column(elements: Sequence[Any]) -> Any:
        if isinstance(elements, range):
            return np.arange(elements.start, elements.stop, elements.step)
        return np.asarray(elements)

    xs = column(steps).astype(np.float64)
    xs = np.where(np.isfinite(xs), xs, np.arange(len(xs)))
    chosen = np.flatnonzero((xs >= low) & (xs <= high))
    if buckets is None or len(chosen) <= 4 * buckets:
        return [int(place) for place in chosen]
    xs = xs[chosen]
    if (np.diff(xs) < 0).any():
        order = np.argsort(xs, kind="stable")
        xs, chosen = xs[order], chosen[order]
    scale = 1.0 if isfinite(float(xs[-1]) - float(xs[0])) else 0.25
    width = xs[-1] * scale - xs[0] * scale
    numbers = np.zeros(len(xs), np.int64)
    if width:
        numbers = np.minimum(((xs * scale - xs[0] * scale) / width * buckets).astype(np.int64), buckets - 1)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(numbers)) + 1))
    ends = np.append(starts[1:], len(xs)) - 1
    ys = column(values)[chosen]
    kept = [starts, ends]
    for reduce, never in ((np.minimum, inf), (np.maximum, -inf)):
        comparable = np.where(np.isnan(ys), never, ys) if ys.dtype == np.float64 else ys
        extremes = reduce.reduceat(comparable, starts)
        # The first in its bucket that equals the extreme; a bucket of NaN alone has none.
        hits = np.flatnonzero(ys == np.repeat(extremes, np.diff(np.append(starts, len(xs)))))
        _, firsts = np.unique(numbers[hits], return_index=True)
        kept.append(hits[firsts])
    return [int(place) for place in np.unique(chosen[np.concatenate(kept)])]
