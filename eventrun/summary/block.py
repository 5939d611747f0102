"""The closing block: what a script recorded, in a few lines at its end. And which metrics say most."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from eventrun import clock
from eventrun.errors import EventrunError
from eventrun.summary.tables import Column, plain_table
from eventrun.summary.text import (
    BARS,
    NOT_FINITE,
    SPARK_CELLS,
    amount,
    can_write,
    clean,
    command,
    near,
    number,
    shorten,
    sparkline,
)

if TYPE_CHECKING:
    from eventrun.pending import Pending
    from eventrun.projections import TrialState

CLOSING_TRIALS = 4  # trials that the closing block shows
CLOSING_METRICS = 3  # metrics of each
NAME_CELLS = 32  # the most that the closing block gives a name

_LESS = "loss error err mae mse rmse mape nll perplexity ppl wer cer fid regret cost divergence kl bpb bpc"
_MORE = (
    "accuracy acc auc auroc f1 precision recall score reward return iou dice bleu rouge r2 psnr ssim success"
)
_LESS_IS_BETTER, _MORE_IS_BETTER = frozenset(_LESS.split()), frozenset(_MORE.split())
_CHECKED_SUBSETS = frozenset({"val", "valid", "validation", "eval", "test", "dev"})


def direction(metric: str) -> Literal["min", "max"] | None:
    """Guess by its name whether a metric is better low ("min") or high ("max"); None if the name doesn't say."""
    for word in reversed(re.split(r"[^a-z0-9]+", metric.lower())):
        if word in _LESS_IS_BETTER:
            return "min"
        if word in _MORE_IS_BETTER:
            return "max"
    return None


def telling_metrics(names: Iterable[str], most: int) -> list[str]:
    """Choose the metrics that say most: with a direction before others, few parts first, validation before training."""

    def key(name: str) -> tuple[bool, int, bool, str]:
        parts = name.split("/")
        return direction(name) is None, len(parts), parts[0] not in _CHECKED_SUBSETS, name

    return sorted(names, key=key)[:most]


# the closing block ---------------------------------------------------------------------------------------------


class Recorded(Protocol):
    """What the closing block asks of a client, which imports this module."""

    url: str
    folder: Path | None

    def statistics(self) -> Any:
        """Count what was recorded."""
        ...

    def get(self, trial: str) -> Pending[TrialState]:
        """Ask for a trial."""
        ...

    def history(self, trial: str, metric: str, *, points: int | None, fresh: bool) -> Pending[Any]:
        """Ask for the points of a metric."""
        ...


def closing_block(
    client: Recorded,
    trials: Sequence[str],
    *,
    seconds: float = 0.3,
    cells: int | None = None,
    encoding: str | None = None,
    hint: bool = True,
) -> str:
    """Tell what a client recorded: where it lies, how many events, the first trials, and what to type next.

    Takes about `seconds` at most; when that is over, or the store can't be read, it tells the number of events and
    where they lie. Waits, so not on eventrun's own threads. `cells` and `encoding` are those of stderr by default.
    """
    cells = shutil.get_terminal_size().columns if cells is None else cells
    encoding = getattr(sys.stderr, "encoding", None) if encoding is None else encoding
    deadline = clock.monotonic_ns() + int(seconds * 1e9)
    place = "memory" if client.folder is None else near(client.folder)
    headline = f"{amount(client.statistics().recorded, 'event')} in {clean(place)}"
    try:
        states = [client.get(trial).result(_left(deadline)) for trial in trials[:CLOSING_TRIALS]]
    except (TimeoutError, EventrunError):
        return f"eventrun: {headline}"
    ascii_only = not can_write(BARS + NOT_FINITE + "…", encoding)
    rows = [row for state in states for row in _trial_rows(client, state, deadline, ascii_only)]
    lines = plain_table(_BLOCK_COLUMNS, rows, cells=cells - 2, mark="..." if ascii_only else "…")
    lines += [f"and {len(trials) - len(states)} more"] if len(trials) > len(states) else []
    block = [f"eventrun: {amount(len(trials), 'trial')}, {headline}", ""]
    block += [f"  {line}".rstrip() for line in lines]
    if hint and client.folder is not None:
        words = f"show {states[0].id[:8]}" if len(states) == 1 else "ls"
        block += ["", f"  to see more: {command(client.url, words)}"]
    return "\n".join(block)


_BLOCK_COLUMNS = (
    Column("trial", cut=True),
    Column("status"),
    Column("metric", cut=True),
    Column("min", "decimal"),
    Column("last", "decimal"),
    Column("best", "decimal"),
    Column(""),
)


def _left(deadline: int) -> float:
    left = (deadline - clock.monotonic_ns()) / 1e9
    if left <= 0:
        raise TimeoutError
    return left


def _trial_rows(client: Recorded, state: TrialState, deadline: int, ascii_only: bool) -> list[list[str]]:
    """Make a line for each of the metrics that say most; the first has the trial's name, the others nothing."""
    rows = []
    for metric in telling_metrics(state.metrics, CLOSING_METRICS):
        summary = state.metrics[metric]
        best = {"min": summary.min, "max": summary.max}.get(direction(metric) or "")
        cells = ["" if value is None else number(value) for value in (summary.min, summary.last, best)]
        rows.append([metric, *cells, _spark(client, state.id, metric, deadline, ascii_only)])
    names = [[shorten(state.name, NAME_CELLS, "..." if ascii_only else "…"), state.status]]
    names += [["", ""]] * max(len(rows) - 1, 0)
    return [[*name, *row] for name, row in zip(names, rows or [[""] * 5], strict=True)]


def _spark(client: Recorded, trial: str, metric: str, deadline: int, ascii_only: bool) -> str:
    try:
        series = client.history(trial, metric, points=SPARK_CELLS, fresh=False).result(_left(deadline))
    except (TimeoutError, EventrunError):
        return ""
    return sparkline(series.values, ascii_only=ascii_only)
