"""What is seen on a terminal: tables, colours, progress. The only module that knows rich (the extra [cli]).

Without rich, in a pipe and where CI is set, the same tables come as plain aligned text. Columns are laid out by
`eventrun.summary` in both cases, so rich adds colour and the progress bar, nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from eventrun.clock import monotonic_ns
from eventrun.codec import to_json
from eventrun.summary import (
    BARS,
    FAIR_COLUMN,
    NOT_FINITE,
    Column,
    Laid,
    amount,
    can_write,
    clean,
    duration,
    lay_out,
    pad,
    plain_table,
    width,
    wrap,
)
from eventrun.summary import sparkline as draw_sparkline

if TYPE_CHECKING:
    from rich.console import Console

    from eventrun.pending import Pending

T = TypeVar("T")

PROGRESS_AFTER_S = 1.0  # what is over sooner shows no progress
REDRAW_S = 0.1

STATUS_STYLES = {
    "running": "cyan",
    "completed": "green",
    "failed": "red",
    "lost": "red",
    "interrupted": "yellow",
    "suspended": "yellow",
    "created": "dim",
}


def is_terminal(stream: TextIO) -> bool:
    """Tell whether a person looks at this stream."""
    return stream.isatty() and os.environ.get("CI", "").lower() in ("", "0", "false")


def can_move_cursor(stream: TextIO) -> bool:
    """Tell whether lines of this stream can be drawn anew."""
    return is_terminal(stream) and os.environ.get("TERM") != "dumb"


def cells() -> int | None:
    """Return the width that data may take: the terminal's, or None where nobody looks and nothing must be cut."""
    return shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None


def say(text: str) -> None:
    """Talk to the person, on stderr."""
    print(text, file=sys.stderr, flush=True)


def show_json(value: Any) -> None:
    """Print a JSON document on stdout, on lines of its own when a person looks."""
    indent = 2 if is_terminal(sys.stdout) else None
    print(json.dumps(to_json(value), indent=indent, ensure_ascii=False, allow_nan=False), file=data())


def data() -> TextIO:
    """Return stdout for what programs read: UTF-8 whatever the locale says, line ends as they are written."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="strict", newline="")
    return sys.stdout


def table(
    columns: Sequence[Column], rows: Iterable[Sequence[str]], *, titles: bool = True, indent: int = 0
) -> None:
    """Print a table on stdout: aligned, and cut to the terminal's width."""
    room = cells()
    room = None if room is None else max(room - indent, 1)
    console = _console(sys.stdout)
    if console is None:
        for line in plain_table(columns, rows, cells=room, titles=titles, mark=ellipsis()):
            print(" " * indent + line if line else "")
        return
    laid = lay_out(columns, rows, room, ellipsis())
    if titles:
        _print_row(console, laid, [(column.title, "dim") for column in laid.columns], indent)
    for row in laid.rows:
        styled = [(cell, style_of(column, cell)) for column, cell in zip(laid.columns, row, strict=True)]
        _print_row(console, laid, styled, indent)


def style_of(column: Column, cell: str) -> str:
    """Return the style of a cell."""
    return column.style if isinstance(column.style, str) else column.style(cell)


def status_style(cell: str) -> str:
    """Return the colour of a status."""
    return STATUS_STYLES.get(cell.strip(), "")


def _print_row(console: Console, laid: Laid, row: Sequence[tuple[str, str]], indent: int) -> None:
    from rich.text import Text

    line = Text(" " * indent)
    for place, ((cell, style), w, column) in enumerate(zip(row, laid.widths, laid.columns, strict=True)):
        line.append("  " if place else "")
        line.append(pad(cell, w, column.align), style=style)
    line.rstrip()
    console.print(line, no_wrap=True, overflow="ellipsis", crop=True)


def facts(rows: Iterable[Sequence[str]], *, indent: int = 0) -> None:
    """Print names and what belongs to them; long texts go on in further lines on a terminal."""
    known = [(name, text) for name, text in rows]
    room = cells()
    longest = min(max((width(clean(name)) for name, _ in known), default=0), FAIR_COLUMN * 2)
    rest = None if room is None else max(room - indent - longest - 2, FAIR_COLUMN)
    lines = []
    for name, text in known:
        parts = [text] if rest is None else wrap(text, rest)
        lines += [
            [part_name, part] for part_name, part in zip([name] + [""] * (len(parts) - 1), parts, strict=True)
        ]
    table([Column("", style="dim", cut=True), Column("", cut=True)], lines, titles=False, indent=indent)


def heading(text: str) -> None:
    """Print a heading on stdout, an empty line before it."""
    print()
    line(text, "bold")


def line(text: str, style: str = "") -> None:
    """Print one line on stdout, cut to the terminal's width."""
    table([Column("", cut=True, style=style)], [[text]], titles=False)


def sparkline(values: Sequence[Any], cells: int) -> str:
    """Draw a series in the letters that stdout can write."""
    return draw_sparkline(values, cells, ascii_only=not can_write(BARS + NOT_FINITE, sys.stdout.encoding))


def ellipsis() -> str:
    """Return the sign for what was cut off, as stdout can write it."""
    return "…" if can_write("…", sys.stdout.encoding) else "..."


def _console(stream: TextIO) -> Console | None:
    if not can_move_cursor(stream):
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=stream, highlight=False, markup=False, emoji=False)


def wait(pending: Pending[T], label: str) -> T:
    """Wait for an answer, and show that it is being worked on when it takes long."""
    with progress(label) as tick:
        while not pending.done():
            try:
                return pending.result(REDRAW_S)
            except TimeoutError:
                tick(None)
    return pending.result()


class Tick:
    """Tells the progress what has been done so far; None means that it isn't known."""

    def __init__(self, label: str, total: int | None, noun: str) -> None:
        self._label = label
        self._total = total
        self._noun = noun
        self._begun_ns = self._drawn_ns = monotonic_ns()
        self._bar: Any = None
        self._task: Any = None
        self._shown = False
        self._possible = can_move_cursor(sys.stderr)

    def __call__(self, done: int | None) -> None:
        """Draw, if it is time to."""
        now = monotonic_ns()
        if not self._possible or now - self._begun_ns < PROGRESS_AFTER_S * 1e9:
            return
        if not self._shown:
            self._shown = True
            self._start()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, told=self._told(done))
        elif now - self._drawn_ns > REDRAW_S * 1e9:
            self._drawn_ns = now
            room = shutil.get_terminal_size().columns - 1
            text = f"{self._label}  {self._told(done)}"
            print(f"\r\x1b[K{text[:room]}", end="", file=sys.stderr, flush=True)

    def _told(self, done: int | None) -> str:
        passed = duration((monotonic_ns() - self._begun_ns) // 10**9)
        if done is None:
            return passed
        if self._total:
            return f"{min(100 * done // self._total, 100)} %, {passed}"
        return f"{amount(done, self._noun)}, {passed}"

    def _start(self) -> None:
        console = _console(sys.stderr)
        if console is None:
            return
        from rich.progress import BarColumn, Progress, TextColumn

        told = TextColumn("{task.fields[told]}")
        columns = (TextColumn("{task.description}"), BarColumn(30), told)
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task(clean(self._label), total=self._total, told="")
        self._bar.start()

    def end(self) -> None:
        """Remove what was drawn."""
        if self._bar is not None:
            self._bar.stop()
        elif self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int | None = None, noun: str = "event") -> Iterator[Tick]:
    """Show progress on stderr from the second second on, when a person looks; gone when the work is done."""
    tick = Tick(label, total, noun)
    try:
        yield tick
    finally:
        tick.end()
