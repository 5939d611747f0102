"""What a benchmark is made of: figures, the registry of benchmarks, and the run that they are given."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from fresh import fresh


@dataclass
class Figure:
    """One measured number: a value per round, and what was measured beside it in the same rounds.

    `ratio_to` names the one beside it that is the baseline; the ratio is what this costs, in baselines.
    """

    name: str
    unit: str  # one that ends in "/s" is better when it is higher
    values: list[float]
    beside: dict[str, list[float]] = field(default_factory=dict)
    at_most: float | None = None
    at_least: float | None = None
    ratio_to: str | None = None
    ratio_at_most: float | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def ratio(self) -> float | None:
        """The median of the rounds' ratios."""
        if self.ratio_to is None:
            return None
        pairs = list(zip(self.values, self.beside[self.ratio_to], strict=True))
        return median(theirs / ours if self.unit.endswith("/s") else ours / theirs for ours, theirs in pairs)

    @property
    def target(self) -> str:
        limits = (("<=", self.at_most), (">=", self.at_least))
        parts = [f"{sign} {limit:,.10g} {self.unit}" for sign, limit in limits if limit is not None]
        if self.ratio_at_most is not None:
            parts.append(f"<= {self.ratio_at_most:g} x {self.ratio_to}")
        return ", ".join(parts)

    @property
    def met(self) -> bool | None:
        """Whether the medians reach the target; None: there is no target."""
        if not self.target:
            return None
        reached = []
        if self.at_most is not None:
            reached.append(self.median <= self.at_most)
        if self.at_least is not None:
            reached.append(self.median >= self.at_least)
        if self.ratio is not None and self.ratio_at_most is not None:
            reached.append(self.ratio <= self.ratio_at_most)
        return all(reached)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "median": short(self.median),
            "min": short(min(self.values)),
            "max": short(max(self.values)),
            "rounds": len(self.values),
            "target": self.target or None,
            "met": self.met,
            "ratio": None if self.ratio is None else short(self.ratio),
            "ratio_to": self.ratio_to,
            "beside": {name: short(median(values)) for name, values in self.beside.items()},
            "note": self.note or None,
        }


def short(value: float) -> float:
    """Round to four digits, or to whole numbers."""
    return round(value) if abs(value) >= 10_000 else float(f"{value:.4g}")


Function = Callable[["Run"], Iterable[Figure]]
BENCHMARKS: dict[str, Function] = {}


def benchmark(name: str) -> Callable[[Function], Function]:
    """Register a function that measures one figure, or several that belong together."""

    def register(function: Function) -> Function:
        BENCHMARKS[name] = function
        return function

    return register


class LeftOut(Exception):
    """This benchmark isn't part of such a run; the message says why."""


class Run:
    """What benchmarks are given: how much to measure, and places for their stores."""

    def __init__(
        self, folder: Path, *, url: str | None = None, quick: bool = False, rounds: int | None = None
    ) -> None:
        self.folder = folder  # an empty one, removed afterwards
        self.quick = quick
        self._url = url
        self._rounds = rounds
        self._prepared: dict[Any, tuple[str, Any]] = {}

    def size(self, quick: int, full: int) -> int:
        return quick if self.quick else full

    def rounds(self, quick: int, full: int) -> int:
        return self._rounds or self.size(quick, full)

    @contextmanager
    def place(self) -> Iterator[Path]:
        """Give an empty folder, for the length of a block."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def measure(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function(store's URL, empty folder, ...)` in a new process."""
        with self.place() as folder:
            return fresh(function, self._url or str(folder / "runs"), str(folder), *arguments)

    def prepared(self, function: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
        """Return the URL of a store that `function(URL, ...)` filled, once for all benchmarks, and what it returned."""
        if self._url is not None:
            raise LeftOut("it needs a store in a folder, which one process writes and another reads")
        key = (function, arguments)
        if key not in self._prepared:
            url = str(Path(tempfile.mkdtemp(dir=self.folder)) / "runs")
            self._prepared[key] = (url, fresh(function, url, *arguments))
        return self._prepared[key]


def interleaved(rounds: int, contenders: Mapping[str, Callable[[], Any]]) -> dict[str, list[Any]]:
    """Measure A B C, A B C, ...: what the machine does meanwhile befalls all alike."""
    results: dict[str, list[Any]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, measure in contenders.items():
            results[name].append(measure())
    return results


def column(results: Iterable[dict[str, float]], key: str) -> list[float]:
    """Return one number of each round."""
    return [result[key] for result in results]
