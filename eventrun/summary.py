"""Say in a few short lines what was recorded: numbers, durations and tables for people, and the closing block.

Only text is made here; who prints it is somebody else's business. Widths are in cells of a terminal.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from eventrun import clock
from eventrun.errors import EventrunError

if TYPE_CHECKING:
    from eventrun.client import Client
    from eventrun.projections import TrialState

CLOSING_TRIALS = 4  # trials that the closing block shows
CLOSING_METRICS = 3  # metrics of each
SPARK_CELLS = 16
NAME_CELLS = 32  # the most that the closing block gives a name
TEXT_CELLS = 24  # the most that a value gets that is text
FAIR_COLUMN = 16  # cells; columns of rank 0 are cut further only when no other is left
SMALLEST_COLUMN = 8  # cells; no column is cut further

BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
NOT_FINITE, ASCII_NOT_FINITE = "×", "x"  # noqa: RUF001 - a cross, as it looks

_LESS = "loss error err mae mse rmse mape nll perplexity ppl wer cer fid regret cost divergence kl bpb bpc"
_MORE = (
    "accuracy acc auc auroc f1 precision recall score reward return iou dice bleu rouge r2 psnr ssim success"
)
_LESS_IS_BETTER, _MORE_IS_BETTER = frozenset(_LESS.split()), frozenset(_MORE.split())
_CHECKED_SUBSETS = frozenset({"val", "valid", "validation", "eval", "test", "dev"})


# values --------------------------------------------------------------------------------------------------------


def number(value: Any) -> str:
    """Write a metric's value: four significant digits, integers of up to nine digits in full, text cut short."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if abs(value) < 10**9 else _scientific(float(value))
    if not isinstance(value, float):
        return shorten(clean(str(value)), TEXT_CELLS)
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if not -4 <= size < 6:
        return _scientific(value)
    text = f"{value:.{max(3 - size, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _scientific(value: float) -> str:
    digits, _, exponent = f"{value:.3e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def duration(seconds: float | None) -> str:
    """Write a duration: "35.2 ms", "12.3 s", "3 min 20 s", "2 h 14 min", "3 d 4 h"."""
    if seconds is None or not math.isfinite(seconds):
        return "" if seconds is None else str(seconds)
    if abs(seconds) < 0.9995:
        return f"{_three(seconds * 1e3)} ms"
    if abs(seconds) < 59.95:
        return f"{_three(seconds)} s"
    whole = round(seconds)
    for size, large, small, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if abs(whole) >= size:
            return f"{whole // size} {large} {whole % size // small} {name}"
    return f"{whole} s"


def _three(value: float) -> str:
    text = f"{value:.3g}"
    return f"{float(text):.0f}" if "e+" in text else text


def local_time(time_ns: int | None) -> str:
    """Write a time in this machine's zone: "2025-11-21 12:44:03"."""
    return _in_zone(time_ns, "%Y-%m-%d %H:%M:%S")


def short_time(time_ns: int | None) -> str:
    """Write a time for a narrow column: "11-21 12:44", or the date alone when it isn't of this year."""
    this_year = _in_zone(time_ns, "%Y") == _in_zone(clock.time_ns(), "%Y")
    return _in_zone(time_ns, "%m-%d %H:%M" if this_year else "%Y-%m-%d")


def _in_zone(time_ns: int | None, form: str) -> str:
    if time_ns is None:
        return ""
    try:
        return datetime.fromtimestamp(time_ns // 10**9).astimezone().strftime(form)
    except (OverflowError, ValueError, OSError):  # a clock far off: beyond the years of datetime
        return f"{time_ns} ns"


def size(count: int) -> str:
    """Write a number of bytes: "812 B", "12.3 MB"."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{_three(value)} {unit}"


def amount(count: int, noun: str) -> str:
    """Write how many: "1 trial", "45,210 events"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# text ----------------------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Escape what isn't printable, so that a name can't move the cursor or break a line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def width(text: str) -> int:
    """Count the cells that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def shorten(text: str, cells: int, mark: str = "…") -> str:
    """Cut a text to so many cells, with an ellipsis at its end."""
    if width(text) <= cells:
        return text
    kept = ""
    for c in text:
        if width(kept + c) > cells - len(mark):
            break
        kept += c
    return (kept + mark)[: max(cells, 0)]


def can_write(text: str, encoding: str | None) -> bool:
    """Tell whether a stream of this encoding can write a text."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def sparkline(values: Sequence[Any], cells: int = SPARK_CELLS, *, ascii_only: bool = False) -> str:
    """Draw a series in so many cells at most; what is no finite number shows as a cross, text and None not at all."""
    numbers = [float(value) for value in values if isinstance(value, (float, int))]
    if not numbers:
        return ""
    cells = min(cells, len(numbers))
    parts = [numbers[i * len(numbers) // cells : (i + 1) * len(numbers) // cells] for i in range(cells)]
    # Halved, or the span of numbers near the largest double would be infinite.
    heights = [_middle([x / 2 for x in part if math.isfinite(x)]) for part in parts]
    known = [height for height in heights if height is not None]
    low, span = (min(known), max(known) - min(known)) if known else (0.0, 0.0)
    bars, cross = (ASCII_BARS, ASCII_NOT_FINITE) if ascii_only else (BARS, NOT_FINITE)
    top = len(bars) - 1
    drawn = [cross if h is None else bars[round((h - low) / span * top) if span > 0 else 0] for h in heights]
    return "".join(drawn)


def _middle(part: list[float]) -> float | None:
    return sum(x / len(part) for x in part) if part else None


# tables --------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of a table. `decimal` aligns numbers at their points; cells of `cut` columns may be shortened.

    Where there isn't room for all columns, those of the highest rank are left out first, those of rank 0 never.
    """

    title: str
    align: Literal["left", "right", "decimal"] = "left"
    cut: bool = False
    rank: int = 0
    style: str | Callable[[str], str] = ""  # where there is colour


class Laid(NamedTuple):
    """A table that fits: the columns that stay, their widths, and the cells, cut but not padded."""

    columns: list[Column]
    widths: list[int]
    rows: list[list[str]]


def align_points(cells: Sequence[str]) -> list[str]:
    """Pad numbers so that their decimal points, or ends, stand under each other when they are aligned right."""
    tails = [
        len(cell) - len(re.split(r"[.e]", cell, maxsplit=1)[0]) if _is_number(cell) else 0 for cell in cells
    ]
    longest = max(tails, default=0)
    return [
        cell + " " * (longest - tail) if _is_number(cell) else cell
        for cell, tail in zip(cells, tails, strict=True)
    ]


def _is_number(text: str) -> bool:
    return text[-1:].isdigit()


def lay_out(
    columns: Sequence[Column], rows: Iterable[Sequence[str]], cells: int | None, mark: str = "…"
) -> Laid:
    """Choose columns and their widths so that a line fits into `cells` (None: any length), and cut what doesn't fit."""
    table = [list(map(clean, row)) for row in rows]
    for place, column in enumerate(columns):
        if column.align == "decimal":
            for row, cell in zip(table, align_points([row[place] for row in table]), strict=True):
                row[place] = cell
    widths = [
        max([width(column.title), *(width(row[place]) for row in table)])
        for place, column in enumerate(columns)
    ]
    places = list(range(len(columns))) if cells is None else _fit(columns, widths, cells)
    body = [[shorten(row[place], widths[place], mark) for place in places] for row in table]
    return Laid([columns[place] for place in places], [widths[place] for place in places], body)


def _fit(columns: Sequence[Column], widths: list[int], cells: int) -> list[int]:
    """Narrow columns that may be cut, leave out those of the highest rank, then cut further; return what stays."""
    places = list(range(len(columns)))
    while not _narrow(columns, widths, places, cells, FAIR_COLUMN):
        last = max(places, key=lambda place: (columns[place].rank, place))
        if not columns[last].rank:
            _narrow(columns, widths, places, cells, SMALLEST_COLUMN)
            break
        places.remove(last)
    return places


def _narrow(columns: Sequence[Column], widths: list[int], places: list[int], cells: int, least: int) -> bool:
    """Narrow the widest columns, none below `least`; True when all fit, else the widths stay as they were."""
    wanted = list(widths)
    while (over := sum(wanted[place] for place in places) + 2 * (len(places) - 1) - cells) > 0:
        cut = [place for place in places if columns[place].cut and wanted[place] > least]
        if not cut:
            if least == SMALLEST_COLUMN:
                widths[:] = wanted
            return False
        widest = max(cut, key=wanted.__getitem__)
        second = max((wanted[place] for place in cut if place != widest), default=least)
        wanted[widest] -= min(over, max(wanted[widest] - max(second, least), 1))
    widths[:] = wanted
    return True


def plain_table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[str]],
    *,
    cells: int | None = None,
    titles: bool = True,
    mark: str = "…",
) -> list[str]:
    """Draw a table as aligned lines without trailing blanks."""
    laid = lay_out(columns, rows, cells, mark)
    head = [[column.title for column in laid.columns]] if titles else []
    lines = []
    for row in head + laid.rows:
        padded = [
            pad(cell, w, column.align) for cell, w, column in zip(row, laid.widths, laid.columns, strict=True)
        ]
        line = "  ".join(padded).rstrip()
        lines.append(line if cells is None else shorten(line, cells, mark))
    return lines


def wrap(text: str, cells: int) -> list[str]:
    """Break a text into lines of so many cells, between words where it can be; at least one line."""
    lines = [""]
    for word in clean(text).split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if width(joined) <= cells or cells < 1:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for c in word:
            if lines[-1] and width(lines[-1] + c) > cells:
                lines.append("")
            lines[-1] += c
    return lines


def pad(cell: str, cells: int, align: str) -> str:
    """Fill a cell up with blanks."""
    blanks = " " * (cells - width(cell))
    return cell + blanks if align == "left" else blanks + cell


# what matters --------------------------------------------------------------------------------------------------


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


def command(url: str, words: str) -> str:
    """Write the command line that does this with this store."""
    default = os.environ.get("EVENTRUN_URL") or "runs"
    if url == default:
        return f"eventrun {words}"
    quoted = url if re.fullmatch(r"[\w@%+=:,./-]+", url) else "'" + url.replace("'", "'\"'\"'") + "'"
    return f"eventrun --store {quoted} {words}"


def near(path: str | os.PathLike[str]) -> str:
    """Write a path relative to the working directory when it lies below it."""
    text = os.fspath(path)
    try:
        relative = os.path.relpath(text)
    except (ValueError, OSError):  # another drive; a working directory that is gone
        return text
    return text if relative.startswith(os.pardir) or not os.path.isabs(text) else relative


# the closing block ---------------------------------------------------------------------------------------------


def closing_block(
    client: Client,
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
    columns = (
        Column("trial", cut=True), Column("status"), Column("metric", cut=True),
        Column("min", "decimal"), Column("last", "decimal"), Column("best", "decimal"), Column(""),
    )  # fmt: skip
    mark = "..." if ascii_only else "…"
    lines = plain_table(columns, rows, cells=cells - 2, mark=mark)
    if len(trials) > len(states):
        lines.append(f"and {len(trials) - len(states)} more")
    block = [
        f"eventrun: {amount(len(trials), 'trial')}, {headline}",
        "",
        *(f"  {line}".rstrip() for line in lines),
    ]
    if hint and client.folder is not None:
        shown = states[0].id[:8] if len(states) == 1 else None
        block += ["", f"  to see more: {command(client.url, f'show {shown}' if shown else 'ls')}"]
    return "\n".join(block)


def _left(deadline: int) -> float:
    left = (deadline - clock.monotonic_ns()) / 1e9
    if left <= 0:
        raise TimeoutError
    return left


def _trial_rows(client: Client, state: TrialState, deadline: int, ascii_only: bool) -> list[list[str]]:
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


def _spark(client: Client, trial: str, metric: str, deadline: int, ascii_only: bool) -> str:
    try:
        series = client.history(trial, metric, points=SPARK_CELLS, fresh=False).result(_left(deadline))
    except (TimeoutError, EventrunError):
        return ""
    return sparkline(series.values, ascii_only=ascii_only)
