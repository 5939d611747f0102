"""A projection of the user's own: a name, a version and two functions, run and stored like the built-in ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from eventrun.codec import StoredEvent

S = TypeVar("S")


def _global(stored: StoredEvent) -> str | None:
    return ""


@dataclass(frozen=True)
class Projection(Generic[S]):
    """Fold the log into states of your own, one for each key.

    `apply` gets the state and the next event of the log and returns the new state, which may be the old one changed;
    it must do no I/O and depend on nothing else. `key` says which state an event belongs to (None: it is passed by);
    without it there is one, under "". `state` is its type, anything that msgspec can write and read back. Raise
    `version` when `apply` changes its meaning: the states are then built anew from the log.
    """

    name: str
    version: int
    initial: Callable[[], S]
    apply: Callable[[S, StoredEvent], S]
    state: type[S]
    key: Callable[[StoredEvent], str | None] = _global

    def encode(self, state: S) -> bytes:
        """Write a state as msgpack."""
        return msgspec.msgpack.encode(state)

    def decode(self, data: bytes) -> S:
        """Read what `encode` wrote."""
        return msgspec.msgpack.decode(data, type=self.state)
