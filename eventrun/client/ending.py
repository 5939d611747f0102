"""What a client says at its end, and who of several that close it does so."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eventrun.pending import Answer

if TYPE_CHECKING:
    from eventrun.summary.block import Recorded


class Ending:
    """The one end of a client, whoever asks for it: threads, signal handlers, the interpreter's exit."""

    def __init__(self) -> None:
        self._over: Answer[None] = Answer()
        self._claim: dict[str, object] = {}
        self._said = False

    @property
    def over(self) -> bool:
        """Tell whether it is over."""
        return self._over.done()

    def claim(self) -> bool:
        """Tell whether it is the caller's to do; he calls `finish` then."""
        mine = (threading.get_ident(),)
        return self._claim.setdefault("thread", mine) is mine

    def wait(self, seconds: float) -> None:
        """Wait until whoever does it is through; not in a signal handler that has interrupted him."""
        if self._claim["thread"] != (threading.get_ident(),):
            try:
                self._over.wait(seconds)
            except TimeoutError:
                pass

    def finish(self) -> None:
        """Let go all who wait."""
        self._over.set(None)

    def say_left(self, events: int, why: str, journals: Path | None) -> None:
        """Say once how many events are not in the log; `journals`: where they are instead."""
        if not events or self._said:
            return
        self._said = True
        if journals is not None and journals.is_dir():
            say(
                f"eventrun: {events:,} events are not in the log yet ({why}); they are safe in {journals}, "
                "and the next open of the store takes them in"
            )
        else:
            say(f"eventrun: {events:,} events are LOST: {why}; no journal could be written either")

    def say_lost(self, events: int, why: str) -> None:
        """Say how many events neither the log nor a journal holds."""
        if events:
            say(f"eventrun: {events:,} events are LOST: {why}; no journal could be written either")


def block_for_people(client: Recorded, made: Sequence[str], *, quiet: bool, seconds: float) -> str:
    """Make the closing block if somebody is there to read it, in about `seconds` at most."""
    stream = sys.stderr
    if quiet or os.environ.get("CI") or not made or stream is None or not stream.isatty():
        return ""
    from eventrun.summary import closing_block

    try:
        return closing_block(client, made, seconds=seconds)
    except RuntimeError:  # at interpreter exit Python 3.12 starts no thread any more
        return ""


def say(text: str) -> None:
    """Write a line to stderr, if there is one."""
    if sys.stderr is not None:
        try:
            sys.stderr.write(text + "\n")
        except (OSError, ValueError):  # closed, or nobody reads it: no reason to end otherwise
            pass
