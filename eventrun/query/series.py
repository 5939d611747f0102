"""All points of one metric of one trial, or some of them, as they are read back."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from eventrun.errors import InvalidValue, MissingExtra
from eventrun.events import Scalar, Step
from eventrun.projections import Points
from eventrun.projector.series import Chunk, Column, pack, to_array, unpack
from eventrun.query.thinning import Between, thin

_COLUMNS = ("values", "steps", "epochs", "times_ns", "sequences")


class Series:
    """The points of a metric in order of arrival: columns of equal length, each made when it is first looked at.

    `values` are what was logged: float, int, bool, str or None; `steps` and `epochs` int, float or None; `times_ns`
    nanoseconds since 1970; `sequences` the places of the log calls in their writer's stream. Iterating yields
    (step, value). Equal to another series of the same points, NaN equal to NaN.
    """

    def __init__(self, trial: str, metric: str, chunks: Sequence[Chunk] = ()) -> None:
        self.trial = trial
        self.metric = metric
        self._chunks = chunks
        self._length = sum(chunk.count for chunk in chunks)
        self._packed: dict[str, Sequence[Any]] = {}  # arrays and ranges where the elements allow it
        self._lists: dict[str, list[Any]] = {}

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[Step, Scalar]]:
        return zip(self.steps, self.values, strict=True)

    def __repr__(self) -> str:
        return f"<Series {self.metric!r} of trial {self.trial}, {self._length:,} points>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Series):
            return NotImplemented
        same = (self.trial, self.metric, self._length) == (other.trial, other.metric, other._length)
        if not same or not self._length:
            return same
        return all(pack(self._list(name)) == pack(other._list(name)) for name in _COLUMNS)

    __hash__ = None  # type: ignore[assignment]  # as for lists

    @property
    def values(self) -> list[Scalar]:
        """What was logged."""
        return self._list("values")

    @property
    def steps(self) -> list[Step]:
        """The step of each point, None where the call had none."""
        return self._list("steps")

    @property
    def epochs(self) -> list[Step]:
        """The epoch of each point, None where the call had none."""
        return self._list("epochs")

    @property
    def times_ns(self) -> list[int]:
        """When each point was logged, in nanoseconds since 1970."""
        return self._list("times_ns")

    @property
    def sequences(self) -> list[int]:
        """The place of each log call in its writer's stream; with several writers a number may come again."""
        return self._list("sequences")

    def to_dict(self) -> dict[str, Any]:
        """Give plain values: trial, metric and the columns as lists."""
        return {
            "trial": self.trial,
            "metric": self.metric,
            **{name: list(self._list(name)) for name in _COLUMNS},
        }

    def to_arrow(self) -> Any:
        """Give a pyarrow.Table with the columns step, epoch, time, value, text and sequence.

        `value` is float64, int64 or bool when all values are of that type; else float64, null where a value is text
        or None; `text` (string) is there only when some value is text. `step` and `epoch` are int64, or float64 when
        some element is a float, null where there is none. `time` is timestamp[ns, UTC], `sequence` int64. Integers
        beyond 64 bits signed become float64. Needs the extra "arrow".
        """
        try:
            import pyarrow as pa
        except ImportError as error:
            raise MissingExtra("Series.to_arrow", "pyarrow", "arrow") from error

        kinds = {"float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_(), "text": pa.string()}
        columns = {}
        for name, (kind, elements) in self._table().items():
            columns[name] = pa.array(
                elements, kinds.get(kind) or pa.timestamp("ns", tz="UTC"), from_pandas=False
            )
        return pa.table(columns)

    def to_pandas(self) -> Any:
        """Give a pandas.DataFrame with the columns of `to_arrow`.

        Columns without a null are float64, int64, bool; with nulls they are pandas' Float64 and Int64, which keep NaN
        and null (<NA>) apart in what was logged. `text` is object, `time` datetime64[ns, UTC]. Needs the extra
        "pandas".
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtra("Series.to_pandas", "pandas", "pandas") from error

        columns = {}
        for name, (kind, elements) in self._table().items():
            if kind == "time":
                columns[name] = pd.Series(pd.to_datetime(list(elements), utc=True, unit="ns")).astype(
                    "datetime64[ns, UTC]"
                )
            elif kind == "text":
                columns[name] = pd.Series(list(elements), dtype="object")
            elif isinstance(elements, list) and None in elements:
                columns[name] = pd.Series(_nullable(pd, kind, elements))
            else:
                columns[name] = pd.Series(elements, dtype=kind)
        return pd.DataFrame(columns)

    def _table(self) -> dict[str, tuple[str, Sequence[Any]]]:
        """Give each column of a table its type's name and its elements."""
        table = {
            "step": _numbers(self._column("steps")),
            "epoch": _numbers(self._column("epochs")),
            "time": ("time", self._column("times_ns")),
            "value": _numbers(self._column("values")),
            "text": ("text", [value if isinstance(value, str) else None for value in self._column("values")]),
            "sequence": _numbers(self._column("sequences")),
        }
        if isinstance(self._column("values"), array) or not any(isinstance(v, str) for v in self.values):
            del table["text"]
        return table

    # selecting -----------------------------------------------------------------------------------------------

    def thinned(self, points: int | None = None, between: Between | None = None) -> Series:
        """Keep the points with steps in `between`, and of those the extremes and ends of `points` buckets (M4).

        At most four times `points` are left, all of them as they were logged. Raises InvalidValue.
        """
        if points is not None and points < 1:
            raise InvalidValue(f"points={points!r}: ask for at least one")
        if points is None and between is None:
            return self
        return self.picked(thin(self._column("steps"), self._column("values"), points, between))

    def until(self, time_ns: int) -> Series:
        """Keep the points logged at or before a time."""
        return self.picked([place for place, when in enumerate(self._column("times_ns")) if when <= time_ns])

    def picked(self, places: Sequence[int]) -> Series:
        """Keep the points at these places."""
        if len(places) == self._length:
            return self
        picked = Series(self.trial, self.metric)
        picked._length = len(places)
        for name in _COLUMNS:
            column = self._column(name)
            picked._packed[name] = [column[place] for place in places]
        return picked

    @classmethod
    def of_points(cls, trial: str, metric: str, parts: Sequence[Points]) -> Series:
        """Make a series of points that were just folded."""
        series = cls(trial, metric)
        series._length = sum(map(len, parts))
        for name in _COLUMNS:
            series._packed[name] = [element for part in parts for element in getattr(part, name)]
        return series

    def _list(self, name: str) -> list[Any]:
        if name not in self._lists:
            column = self._column(name)
            self._lists[name] = column if isinstance(column, list) else list(column)
        return self._lists[name]

    def _column(self, name: str) -> Sequence[Any]:
        if name not in self._packed:
            self._packed[name] = _joined([(getattr(chunk, name), chunk.count) for chunk in self._chunks])
        return self._packed[name]


def _joined(columns: list[tuple[Column, int]]) -> Sequence[Any]:
    """Put packed columns together: an array or a range if all elements are of one kind, else a list."""
    kinds = {column.kind for column, _ in columns}
    if kinds == {"d"}:
        return to_array("d", b"".join([column.data for column, _ in columns]))
    if kinds == {"r"} and (whole := _one_range(columns)) is not None:
        return whole
    if kinds <= {"q", "r"} and kinds:
        whole_array: array[int] = array("q")
        for column, count in columns:
            whole_array.extend(
                to_array("q", column.data) if column.kind == "q" else array("q", unpack(column, count))
            )
        return whole_array
    return [element for column, count in columns for element in unpack(column, count)]


def _one_range(columns: list[tuple[Column, int]]) -> range | None:
    """Return the range that arithmetic columns make together, if they do."""
    first, length = columns[0]
    end = first.start + first.step * length
    for column, count in columns[1:]:
        if column.start != end or (column.step != first.step and count > 1):
            return None
        end += first.step * count
        length += count
    return range(first.start, end, first.step) if first.step else None


def _numbers(column: Sequence[Any]) -> tuple[str, Sequence[Any]]:
    """Name the type that a column has in a table, and give its elements as that type, None for what is no number."""
    if isinstance(column, array):
        return ("float64" if column.typecode == "d" else "int64"), column
    if isinstance(column, range):
        return "int64", array("q", column)
    types = set(map(type, column)) - {type(None)}
    if types == {bool} and None not in column:
        return "bool", column
    if types <= {int} and all(element is None or -(2**63) <= element < 2**63 for element in column):
        return "int64", column
    return "float64", [float(element) if isinstance(element, (int, float)) else None for element in column]


def _nullable(pd: Any, kind: str, elements: Sequence[Any]) -> Any:
    import numpy as np

    missing = np.array([element is None for element in elements])
    filled = np.array([0 if element is None else element for element in elements], dtype=kind)
    made = pd.arrays.IntegerArray if kind == "int64" else pd.arrays.FloatingArray
    return made(filled, missing)
