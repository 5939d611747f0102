"""Numbers, durations, times and names as people read them; widths are in cells of a terminal."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from eventrun import clock

SPARK_CELLS = 16
TEXT_CELLS = 24  # the most that a value gets that is text

BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
NOT_FINITE, ASCII_NOT_FINITE = "×", "x"  # noqa: RUF001 - a cross, as it looks


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
