"""Tables as text: columns that fit into a terminal's width."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from eventrun.summary.text import clean, shorten, width

FAIR_COLUMN = 16  # cells; columns of rank 0 are cut further only when no other is left
SMALLEST_COLUMN = 8  # cells; no column is cut further


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
    """Leave out columns of the highest rank until the rest fits, then narrow what may be cut; return what stays."""
    places = list(range(len(columns)))

    def least(place: int, fair: int) -> int:
        return min(widths[place], fair) if columns[place].cut else widths[place]

    def over(fair: int) -> int:
        return sum(least(place, fair) for place in places) + 2 * (len(places) - 1) - cells

    while over(FAIR_COLUMN) > 0:
        last = max(places, key=lambda place: (columns[place].rank, place))
        if not columns[last].rank:
            break
        places.remove(last)
    bound = FAIR_COLUMN if over(FAIR_COLUMN) <= 0 else SMALLEST_COLUMN
    widths[:] = [min(w, max(cells, bound)) for w in widths]
    while over(cells) > 0 and (cut := [p for p in places if columns[p].cut and widths[p] > bound]):
        widths[max(cut, key=widths.__getitem__)] -= 1
    return places


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


def pad(cell: str, cells: int, align: str) -> str:
    """Fill a cell up with blanks."""
    blanks = " " * (cells - width(cell))
    return cell + blanks if align == "left" else blanks + cell
