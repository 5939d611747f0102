"""What happens to open clients when the process ends: normally, by SIGTERM, or as a child of multiprocessing.

Safety never depends on this: what isn't in the log by then stays in the journal, and the next open takes it in.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import weakref
from contextlib import ExitStack
from types import FrameType
from typing import Protocol


class Endable(Protocol):
    """What is needed of a client."""

    def close(self) -> None:
        """End; may be called again."""

    def interrupt(self, reason: str) -> None:
        """Record that the trials are interrupted, without waiting."""


_open: set[Endable] = set()  # also those that nobody else knows any more: what they recorded must end well
_in_children: weakref.WeakSet[Endable] = weakref.WeakSet()  # those that multiprocessing's forks are told of
_in_child: weakref.WeakSet[Endable] = weakref.WeakSet()  # those that are closed when this child ends
_watching = False


def watch(client: Endable) -> None:
    """Close this client at exit, and tell its trials of a SIGTERM. Starts no thread."""
    global _watching  # noqa: PLW0603 - atexit and signal are the process's own globals
    _open.add(client)
    if not _watching:
        _watching = True
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=_before_fork)
    _handle_sigterm()  # each time: the first one may have come from another thread than the main one
    multiprocessing = sys.modules.get("multiprocessing.process")
    if (
        client not in _in_child
        and multiprocessing is not None
        and multiprocessing.parent_process() is not None
    ):
        _in_child.add(client)  # once: each trial comes by here
        _close_with_process(client)


def forget(client: Endable) -> None:
    """Stop watching a client that was closed."""
    _open.discard(client)


def _close_all() -> None:
    with ExitStack() as all_of_them:  # even if one of them fails
        for client in tuple(_open):
            all_of_them.callback(client.close)


# When this is imported, not at the first trial: what is registered later is called earlier, and a program that finishes
# its trials in a function of its own at exit has mostly registered that after its imports.
atexit.register(_close_all)


def _handle_sigterm() -> None:
    # Only where nobody else cares: a handler of the program's own, or of a framework, stays.
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    ):
        signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    for client in tuple(_open):
        client.interrupt("SIGTERM")
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


# multiprocessing ends its children by os._exit, past atexit. It runs finalizers of its own before, but a forked child
# begins by forgetting those that it inherited, and then calls what is registered for "after fork".


def _close_with_process(client: Endable) -> None:
    from multiprocessing.util import Finalize

    Finalize(client, client.close, exitpriority=0)


def _before_fork() -> None:
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        for client in tuple(_open):
            if client not in _in_children:
                _in_children.add(client)
                util.register_after_fork(client, _close_with_process)
