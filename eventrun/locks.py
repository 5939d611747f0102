"""Who this process is, and a turn: what one process at a time may do to a folder, also when other machines share it.

File locks end with their process, but on a network disk they may hold on one machine only, or not at all. So a turn is
a file made with O_EXCL, which holds everywhere. Its number only grows, and the newest file stays, released or not:

    <name>.<n>   host, boot and pid of who has the n-th turn; "released" once it is over

The n+1st turn begins when the n-th is over, or its holder is known to be dead: by its file lock on this machine, by an
mtime that nobody has renewed for STALE_S elsewhere. Whoever was slow to look makes a number that is taken, or finds a
higher one beside it, and steps back. Times are compared with those of a fresh file on the same disk, so clocks don't
matter.
"""

from __future__ import annotations

import errno
import json
import os
import weakref
from pathlib import Path
from typing import Any

BEAT_S = 10.0  # how often the holder of a turn, or a writer on a network disk, renews its file's mtime
STALE_S = 30.0  # after so long without a beat it is taken for dead
UNSUPPORTED = (
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EINVAL,
)  # of flock, by file systems without it


def owner() -> dict[str, str | int]:
    """Say who this process is, as it stands in a lock file: host, boot, pid."""
    return {"host": os.uname().nodename, "boot": _boot_id(), "pid": os.getpid()}


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return ""


def read_owner(descriptor: int) -> dict[str, Any]:
    """Read what `owner` gave; {} when there is nothing of the kind."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_owner_here(found: dict[str, Any]) -> bool:
    """Tell whether a file lock of that owner's would be seen here."""
    here = owner()
    # Each container has a host name of its own, but what runs under this very kernel has told us all by its lock.
    return bool(found) and (found.get("host") == here["host"] or found.get("boot") == here["boot"] != "")


def try_lock(descriptor: int) -> bool | None:
    """Take the file lock of a descriptor; False: somebody has it; None: this file system has none."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return None
        return False
    return True


def now_ns(folder: Path) -> int:
    """Tell the time of a folder's disk: the mtime that a new file gets there. Raises OSError."""
    path = folder / f".now-{os.urandom(6).hex()}"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def mtime_ns(path: Path) -> int:
    """Return a file's mtime as its server has it: opening makes a network disk look again. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


class Turn:
    """One process's wish to have a folder's turn. Nothing here waits for others."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._path: Path | None = None  # of the turn that is ours
        self._descriptor = -1
        _turns.add(self)

    def take(self) -> bool:
        """Begin the next turn; False: another process has it. Raises OSError where nothing can be written."""
        newest = self._newest()
        if newest and not self._is_over(newest):
            return False
        path = self._file(newest + 1)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return False
        locked = try_lock(descriptor)  # first, or others would see an owner that seems to be dead
        os.write(descriptor, json.dumps({**owner(), "flock": locked is True}).encode())
        if self._newest() > newest + 1:  # we had looked long ago: that number was used and removed
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return False
        self._path, self._descriptor = path, descriptor
        for number in self._numbers():
            if number <= newest:
                self._file(number).unlink(missing_ok=True)
        return True

    def beat(self) -> None:
        """Say that this process still lives."""
        if self._descriptor >= 0:
            os.utime(self._descriptor)

    @property
    def held(self) -> bool:
        """Tell whether the turn is still ours: whoever takes us for dead makes the next number, and removes ours."""
        if self._path is None:
            return False
        number = int(self._path.suffix[1:])
        return self._path.exists() and not self._file(number + 1).exists()

    def give_back(self) -> None:
        """End our turn."""
        path, descriptor, self._path, self._descriptor = self._path, self._descriptor, None, -1
        if path is not None:
            try:
                os.pwrite(descriptor, b'{"released": true}'.ljust(os.fstat(descriptor).st_size), 0)
            finally:
                os.close(descriptor)

    def holder(self) -> dict[str, Any]:
        """Tell who has the turn just now, {} when nobody has."""
        newest = self._newest()
        try:
            if not newest or self._is_over(newest):
                return {}
            descriptor = os.open(self._file(newest), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return {}
        try:
            return read_owner(descriptor)
        finally:
            os.close(descriptor)

    def _file(self, number: int) -> Path:
        return self._folder / f"{self._name}.{number}"

    def _numbers(self) -> list[int]:
        texts = [path.suffix[1:] for path in self._folder.glob(f"{self._name}.*")]
        return [int(text) for text in texts if text.isdecimal()]

    def _newest(self) -> int:
        newest = max(self._numbers(), default=0)
        while self._file(newest + 1).exists():  # a network disk may list a folder as it was a while ago
            newest += 1
        return newest

    def _is_over(self, number: int) -> bool:
        try:
            descriptor = os.open(self._file(number), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:  # somebody has just begun the next
            return False
        try:
            found = read_owner(descriptor)
            if found.get("released"):
                return True
            if found.get("flock") and is_owner_here(found):
                return try_lock(descriptor) is True
            return now_ns(self._folder) - os.fstat(descriptor).st_mtime_ns > STALE_S * 1e9
        finally:
            os.close(descriptor)

    def forked(self) -> None:
        """In a fork's child: the turn, and the lock, are the parent's."""
        descriptor, self._path, self._descriptor = self._descriptor, None, -1
        if descriptor >= 0:
            os.close(descriptor)


_turns: weakref.WeakSet[Turn] = weakref.WeakSet()


def _in_child() -> None:
    for turn in tuple(_turns):
        turn.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
