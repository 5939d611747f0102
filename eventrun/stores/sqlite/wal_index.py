"""The index of the write-ahead file (`log.db-shm`), which SQLite maps: on a full disk it must have no holes.

SQLite takes space for it by one byte in each 4,096. Where the file system's blocks are smaller (ext4 makes blocks of
1,024 bytes on disks of less than 512 MB) the other blocks of those pages are holes, and on a full disk the first store
to one of them ends the process with SIGBUS (tried). So the space is taken here, as soon as there is such a file, for
more than the write-ahead file needs as a rule; SQLite doesn't mind a file that is larger.
"""

from __future__ import annotations

import os
from pathlib import Path

from eventrun.errors import StoreUnavailable

PAGE_BYTES = 4096  # SQLite's step
INDEX_BYTES = 256 << 10  # 32 KiB for each 16 MiB of the write-ahead file
SPARE_BYTES = 1 << 20  # with less than this free the index isn't made: until it has its space it has holes


def check_room(file: Path) -> None:
    """Raise StoreUnavailable where opening a database could end the process."""
    if _has_small_blocks(file.parent):
        usage = os.statvfs(file.parent)
        if usage.f_bavail * usage.f_frsize < SPARE_BYTES and _index(file) not in _held:
            raise StoreUnavailable(f"{file}: the disk is full; free some space and try again")


def take_room(file: Path) -> None:
    """Fill the holes of an open database's index. Raises StoreUnavailable when there is no space for that."""
    index = _index(file)
    try:
        if not _has_small_blocks(file.parent):
            return
        found = os.stat(index)
        identity = found.st_dev, found.st_ino
        known = _held.get(index)
        if known is not None and known[0] == identity:
            return
        descriptor = os.open(index, os.O_RDWR | os.O_CLOEXEC)
        _held[index] = identity, descriptor
        if known is not None:
            os.close(known[1])  # of a file that nobody has any more
        os.posix_fallocate(descriptor, 0, INDEX_BYTES)
    except OSError as error:
        raise StoreUnavailable(f"{file}: the disk is full; free some space and try again: {error}") from error


# Never closed while it is in use: closing any descriptor of a file drops all locks that this process has on it.
_held: dict[Path, tuple[tuple[int, int], int]] = {}


def _index(file: Path) -> Path:
    return file.with_name(file.name + "-shm")


def _has_small_blocks(folder: Path) -> bool:
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        return os.statvfs(folder).f_bsize < PAGE_BYTES
    except OSError:
        return False
