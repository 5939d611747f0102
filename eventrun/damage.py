"""What is wrong with a store, as data: where, and what it costs. `verify` and `salvage` report it."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct, structs

Kind = Literal["positions", "stream", "file"]


class Damage(Struct, frozen=True, kw_only=True):
    """One stretch of a store that is not what was written.

    `first` and `last` are positions of the log, sequences of the stream that `where` names, or bytes of the file that
    it names (None: the whole of it). `events` counts the events that can't be read for it (None: it can't be told).
    """

    kind: Kind
    where: str = ""
    first: int | None = None
    last: int | None = None
    what: str
    events: int | None = None

    @property
    def place(self) -> str:
        """Say where."""
        if self.first is None:
            return self.where
        unit = {"positions": "positions", "stream": f"{self.where} sequences", "file": f"{self.where} bytes"}
        return f"{unit[self.kind]} {self.first}..{'' if self.last is None else self.last}"

    @property
    def costs(self) -> str:
        """Say what it costs."""
        if self.events is None:
            return "not known"
        return f"{self.events:,} event{'' if self.events == 1 else 's'}" if self.events else "no event"

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return {**structs.asdict(self), "text": str(self)}


def positions(first: int, last: int, what: str, *, lost: bool = True) -> Damage:
    """Make the damage of a stretch of the log."""
    return Damage(kind="positions", first=first, last=last, what=what, events=last - first + 1 if lost else 0)


def sequences(stream: object, first: int, last: int, what: str, *, lost: bool = True) -> Damage:
    """Make the damage of a stretch of a stream."""
    return Damage(
        kind="stream", where=str(stream), first=first, last=last, what=what,
        events=last - first + 1 if lost else 0,
    )  # fmt: skip


def file(where: str, what: str, events: int | None = None, at: tuple[int, int] | None = None) -> Damage:
    """Make the damage of a file, named by its path inside the store; `at`: its first and last byte."""
    first, last = at or (None, None)
    return Damage(kind="file", where=where, first=first, last=last, what=what, events=events)
