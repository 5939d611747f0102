"""Where Track's URIs lead, and the stores that this process has open, one client for each.

One client, because in Track what one protocol wrote is seen by the next read of another on the same file. A store that
was removed by hand is noticed at the next use, and a new one begun in its place.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eventrun.client
from eventrun.client import Client
from eventrun.errors import InvalidValue
from eventrun.trial import Trial

SUFFIX = ".eventrun"  # of the folder next to the file that a URI of Track's names
_FILES = ("file:", "pickled:")  # of Track's backends those that kept a file
_MEMORY = ("ephemeral:", "none", "memory:")
_ELSEWHERE = ("cockroach:", "mongodb:", "socket:", "cometml:")


def url_of(uri: str) -> str:
    """Give the store's URL for a URI as Track's users write them, or for one of ours. Raises InvalidValue."""
    if uri in _MEMORY or uri.startswith("ephemeral:"):
        return "memory:"
    if uri.startswith(_ELSEWHERE):
        raise InvalidValue(f"there is no store for {uri!r} here: name a file (file://x.json) or a folder")
    for scheme in _FILES:
        if uri.startswith(scheme):
            path = uri.removeprefix(scheme).removeprefix("//").partition("?")[0]
            if not path.strip("/"):
                raise InvalidValue(f"{uri!r} names no file: write file://x.json, or file:///abs/path/x.json")
            return str(Path(path + SUFFIX).absolute())
    return uri


class Opened:
    """A client, and what its protocols keep in memory: of trials their handles, of chronos when they started."""

    def __init__(self, url: str) -> None:
        self.client: Client = eventrun.client.open(url, quiet=True)
        self.users = 0
        self.handles: dict[str, Trial] = {}
        self.starts: dict[tuple[str, str], list[tuple[int, int, Callable[[], Any] | None]]] = {}
        self.factories: dict[tuple[str, str, str], Callable[[], Any]] = {}
        self.told: set[tuple[str, str, str]] = set()  # metrics and chronos whose aggregator was recorded
        self.projects: set[str] = set()
        self.groups: dict[str, tuple[str, str]] = {}
        self._folder = self.client.folder
        self._descriptor: int | None = None
        self._own: tuple[int, int] | None = None
        if self._folder is not None:
            try:
                # As long as it is open no other folder gets its number.
                self._descriptor = os.open(self._folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
                self._own = _number(os.fstat(self._descriptor))
            except OSError:  # Windows: there a folder that is in use can't be removed either
                pass

    def gone(self) -> bool:
        """Tell whether the store was removed, or another one lies in its place."""
        if self._own is None or self._folder is None:
            return False
        try:
            return _number(os.stat(self._folder)) != self._own
        except OSError:
            return True

    def close(self) -> None:
        """Let go."""
        self.client.close()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _number(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


_shared: dict[str, Opened] = {}  # by URL: of the process, since its files are
_lock = threading.RLock()


def opened(url: str, before: Opened | None) -> Opened:
    """Give the open store at a URL: the one of before if it still is there, else this process's, else a new one."""
    if before is not None and not before.gone():
        return before
    with _lock:
        known = _shared.get(url)
        if known is not None and known.gone():
            known.close()
            del _shared[url]
            known = None
        if known is None:
            known = Opened(url)
            if known.client.folder is not None:
                _shared[url] = known
        known.users += 1
        return known


def leave(url: str, was: Opened) -> None:
    """Close the store if nobody else uses it."""
    with _lock:
        was.users -= 1
        if was.users <= 0:
            if _shared.get(url) is was:
                del _shared[url]
            was.close()
