"""How the writers of a store are, by the folders of their journals: seen from outside, without changing anything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from eventrun.journal.scan import DAMAGED_SUFFIX, lock_free
from eventrun.journal.segments import CLOSED_NAME, LOCK_NAME
from eventrun.locks import STALE_S, is_owner_here, mtime_ns, read_owner

LIVE, KILLED = "live", "of a killed writer"
CLOSED = "of a writer that has ended"
ELSEWHERE, SILENT = "of another host", "of another host, silent"
TAKEN, DAMAGED, UNLOCKED = "being taken in", "damaged", "without a lock"
TAKEN_SUFFIX = ".taken"  # a folder that a collector took away from a writer that it was told is dead


class Left(NamedTuple):
    """A writer's folder: its state, who it says it is, and the mtime of its lock (None: there is none)."""

    folder: Path
    state: str
    owner: dict[str, Any]
    beat_ns: int | None

    @property
    def host(self) -> str:
        """The host that it says it is on."""
        return str(self.owner.get("host", ""))


def writers(journals: Path, now_ns: int) -> Iterator[Left]:
    """Look at each writer's folder; `now_ns` is the time of that disk. Raises OSError."""
    for folder in sorted(journals.iterdir() if journals.is_dir() else ()):
        if folder.is_dir():
            yield look(folder, now_ns)


def look(folder: Path, now_ns: int) -> Left:
    """Tell the state of a writer's folder."""
    owner, beat_ns = _lock(folder / LOCK_NAME)
    if folder.name.endswith(DAMAGED_SUFFIX):
        return Left(folder, DAMAGED, owner, beat_ns)
    if folder.name.endswith(TAKEN_SUFFIX):
        return Left(folder, TAKEN, owner, beat_ns)
    if beat_ns is None:
        owner, beat_ns = _lock(folder / CLOSED_NAME)
        return Left(folder, UNLOCKED if beat_ns is None else CLOSED, owner, beat_ns)
    silent = now_ns - beat_ns > STALE_S * 1e9
    if not is_owner_here(owner):
        return Left(folder, SILENT if silent else ELSEWHERE, owner, beat_ns)
    if owner.get("flock", True):
        return Left(folder, KILLED if _is_free(folder / LOCK_NAME) else LIVE, owner, beat_ns)
    # No file locks there: only its beat tells whether it lives.
    return Left(folder, SILENT if silent else LIVE, owner, beat_ns)


def quiet_ns(folder: Path, now_ns: int) -> int:
    """Tell for how long nothing in a writer's folder has changed."""
    times = [now_ns - (1 << 62)]
    for entry in folder.iterdir():
        try:
            times.append(mtime_ns(entry))
        except OSError:  # gone meanwhile
            pass
    return now_ns - max(times)


def _lock(path: Path) -> tuple[dict[str, Any], int | None]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # opening makes a network disk look again
    except OSError:
        return {}, None
    try:
        return read_owner(descriptor), os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def _is_free(path: Path) -> bool:
    descriptor = lock_free(path)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None or (not os.access(path, os.W_OK) and _nobody_holds(path))


def _nobody_holds(path: Path) -> bool:
    """Look at a lock that isn't ours to write: another shared lock on it would be granted."""
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
