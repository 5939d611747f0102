"""The mark beside the log, which tells a lost tail from a shorter log."""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path


class Mark:
    """`log.mark`: the last position, written after each commit without a sync, so never ahead of the log."""

    MAGIC = b"eventrun"
    SIZE = 20

    def __init__(self, file: Path) -> None:
        self._file = file
        self._descriptor: int | None = None

    def write(self, position: int) -> None:
        """Set the mark, unless it is further already."""
        body = self.MAGIC + position.to_bytes(8, "big")
        record = body + zlib.crc32(body).to_bytes(4, "big")
        try:
            if self._descriptor is None:
                self._descriptor = os.open(
                    self._file, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666
                )
            if _position_in(_read_at_0(self._descriptor)) < position:
                _write_at_0(self._descriptor, record)
        except OSError:
            pass  # a full disk; a mark that stays behind does no harm, and the batches are in the log

    def read(self) -> int:
        """Return the marked position, 0 when there is no valid mark."""
        try:
            return _position_in(self._file.read_bytes())
        except OSError:
            return 0

    def damaged(self) -> bool:
        """Tell whether there is something that is no mark. A power cut may leave zeros."""
        try:
            record = self._file.read_bytes()
        except OSError:
            return False
        return bool(record.strip(b"\0")) and not _position_in(record)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _position_in(record: bytes) -> int:
    body, check = record[:16], record[16 : Mark.SIZE]
    if len(record) < Mark.SIZE or body[:8] != Mark.MAGIC or zlib.crc32(body).to_bytes(4, "big") != check:
        return 0
    return int.from_bytes(body[8:], "big")


if sys.platform == "win32":

    def _read_at_0(descriptor: int) -> bytes:
        os.lseek(descriptor, 0, os.SEEK_SET)
        return os.read(descriptor, Mark.SIZE)

    def _write_at_0(descriptor: int, record: bytes) -> None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, record)

else:  # a fork shares the descriptor's offset with its parent, so it is better not used

    def _read_at_0(descriptor: int) -> bytes:
        return os.pread(descriptor, Mark.SIZE, 0)

    def _write_at_0(descriptor: int, record: bytes) -> None:
        os.pwrite(descriptor, record, 0)
