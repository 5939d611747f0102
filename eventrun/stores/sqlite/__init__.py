"""The default store: a folder with `log.db`, an SQLite database that holds each batch as one BLOB, and `log.mark`.

Each job runs from its first statement to its last on a thread of its own (aiosqlite's), so that one append costs
two changes of thread. Statement by statement it would be a dozen, and beside a training that is busy in Python each
takes up to 5 ms. Appends, reads, and what may take long (checkpoints, backups) have a thread and a connection each,
opened on first use.

Durability: write-ahead log, synchronous=FULL. A connection that has failed is never used again, and closed when another
is open: what a failed fsync has lost the kernel doesn't write a second time. The next call opens anew, and the caller,
who still holds the bytes, appends them again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eventrun import clock, damage
from eventrun.codec import Batch, Stream
from eventrun.damage import Damage
from eventrun.errors import Closed, StoreUnavailable
from eventrun.stores.base import READ_BYTES, StoredBatch, Tip
from eventrun.stores.sqlite.batches import Appender, end_of, read
from eventrun.stores.sqlite.connection import (
    DURABLE,
    TO_APPEND,
    WAL_BYTES,
    Courier,
    Log,
    check_not_emptied,
    store_error,
)
from eventrun.stores.sqlite.mark import Mark
from eventrun.stores.sqlite.pages import damage_in_wal

if TYPE_CHECKING:
    import sqlite3

MAX_PATH_BYTES = (
    500  # of log.db; SQLite on Unix opens paths of up to 512 bytes, and its own files add a suffix
)
SETTLE_S = 5.0  # how long to wait for readers that hinder a checkpoint


class SqliteStore:
    """A folder with the log in `log.db`. Opened by the first call; the path is checked at once."""

    def __init__(self, folder: Path, *, create: bool = True) -> None:
        self.folder: Path = folder.absolute()  # the process may change its directory before the first call
        file = self.folder / "log.db"
        # Writers that were killed before their first batch have left journals and no log: who recovers them makes it.
        if not create and not os.path.exists(file) and has_journals(self.folder):
            create = os.access(self.folder, os.W_OK | os.X_OK)
        _check_path(self.folder, create)
        logs = self._logs(file, create)
        self._writer, self._reader, self._keeper = map(Courier, logs)
        self._appender = Appender(logs[0])
        self._mark = Mark(self.folder / "log.mark")
        self._checkpoint_at = WAL_BYTES
        self._closed = False

    def _logs(self, file: Path, create: bool) -> list[Log]:
        return [Log(file, create, TO_APPEND), Log(file, create), Log(file, create, DURABLE)]

    async def append(self, batches: Sequence[Batch], expected: Mapping[Stream, int] | None = None) -> int:
        """Append all batches or none, durably, and return the position of the last event. See `Store.append`."""

        def job(raw: sqlite3.Connection) -> int:
            self._writer.log.leave_found_wal(raw)
            end = self._appender.append(raw, batches, expected or {})
            self._mark.write(end)
            return end

        end = await self._open(self._writer).run(job)
        await self._keep_wal_small()
        return end

    async def _keep_wal_small(self) -> None:
        size = self._keeper.log.wal_bytes()
        if size <= self._checkpoint_at:
            return
        try:
            done = await self._open(self._keeper).run(self._keeper.log.checkpoint)
        except StoreUnavailable:  # the batches are in the log all the same; settle() will tell
            done = False
        self._checkpoint_at = WAL_BYTES if done else size + WAL_BYTES

    async def read(
        self, after: int = 0, *, subject: str | None = None, limit_bytes: int = READ_BYTES
    ) -> list[StoredBatch]:
        """Return batches that hold events beyond `after`, in log order. See `Store.read`.

        What is damaged ends the answer, or raises LogDamaged when it comes first; `where[0]` is then "positions A..B",
        and reading on after B goes past it.
        """
        return await self._open(self._reader).run(lambda raw: read(raw, after, subject, limit_bytes))

    async def tip(self, stream: Stream) -> Tip:
        """Return where a stream ends."""
        return await self._open(self._writer).run(lambda raw: self._appender.tip(raw, stream))

    async def end(self) -> int:
        """Return the position of the last event."""
        return await self._open(self._reader).run(end_of)

    async def settle(self) -> None:
        """Checkpoint: copy all that was appended from the write-ahead file to the database.

        Appends wait meanwhile. Raises StoreUnavailable when a reader hinders it for SETTLE_S.
        """
        import asyncio

        deadline = clock.monotonic_ns() + SETTLE_S * 1e9
        while not await self._open(self._keeper).run(self._keeper.log.checkpoint):
            if clock.monotonic_ns() > deadline:
                raise StoreUnavailable(
                    f"{self.folder}: a reader has hindered the checkpoint for {SETTLE_S:g} s"
                )
            await asyncio.sleep(0.02)

    async def lost_tail(self) -> tuple[int, int] | None:
        """Tell when the log is shorter than it was: (the position that was once its end, its end now).

        Ask before anything new is appended, which takes the lost positions again.
        """

        def job(raw: sqlite3.Connection) -> tuple[int, int] | None:
            marked = self._mark.read()  # before the end, or an append in between would look like a loss
            end = end_of(raw)
            return (marked, end) if marked > end else None

        return await self._open(self._reader).run(job)

    async def check(self) -> list[str]:
        """Let SQLite check its own structure, which takes a read of the whole log; return what it found."""

        def job(raw: sqlite3.Connection) -> list[str]:
            return [text for (text,) in raw.execute("PRAGMA integrity_check") if text != "ok"]

        return await self._open(self._keeper).run(job)

    def damage(self, *, tail_lost: bool = False) -> list[Damage]:
        """Find what is wrong with the files beside what SQLite reads; doesn't wait for the log."""
        found = []
        wal = damage_in_wal(self.folder / "log.db", tail_too=tail_lost)
        if wal is not None:
            first, last, what = wal
            found.append(damage.file("log.db-wal", what, None, (first, last)))
        if self._mark.damaged():
            found.append(
                damage.file("log.mark", "fails its checksum, so a lost tail of the log isn't noticed", 0)
            )
        return found

    async def backup(self, folder: Path) -> None:
        """Copy the log as it is now into a folder that is new or empty, while others go on appending."""
        await self._open(self._keeper).run(lambda raw: _backup(raw, folder))

    async def aclose(self) -> None:
        """Close the log. What was appended is durable without it."""
        self._closed = True
        for courier in (self._reader, self._keeper, self._writer):
            await courier.aclose()
        self._mark.close()

    def _open(self, courier: Courier) -> Courier:
        if self._closed:
            raise Closed(f"{self.folder} was closed before this call: open it again")
        return courier


def _backup(raw: sqlite3.Connection, out: Path) -> None:
    import sqlite3

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreUnavailable(f"{out} exists and is not an empty folder: choose another for the backup")
    _check_path(out, create=True)
    file = out / "log.db"
    target = sqlite3.connect(file, isolation_level=None)
    try:
        raw.backup(target)  # in one step: in several, each append in between would make it begin again
        end = end_of(target)
    except sqlite3.Error as error:
        raise store_error(error, file) from error
    finally:
        target.close()
    mark = Mark(out / "log.mark")
    mark.write(end)
    mark.close()


def has_journals(folder: Path) -> bool:
    """Tell whether writers have left journals in a store, which may not have a log yet."""
    try:
        with os.scandir(folder / "journals") as entries:
            return any(entries)
    except OSError:
        return False


def _check_path(folder: Path, create: bool) -> None:
    """Find what is wrong with a path, and make the folder."""
    # Without opening the database: closing a descriptor of it drops the locks that SQLite holds in this process.
    file = folder / "log.db"
    if len(os.fsencode(file)) > MAX_PATH_BYTES:
        raise StoreUnavailable(f"{folder} is a longer path than SQLite can open: choose a shorter one")
    if os.path.exists(folder) and not os.path.isdir(folder):  # unlike Path.exists, these never raise
        raise StoreUnavailable(
            f"{folder} is a file, and a store is a folder: pass its folder, or another path"
        )
    if os.path.isdir(file):
        raise StoreUnavailable(f"{file} is a folder where the log should be: choose another folder")
    check_not_emptied(file)
    if create:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnavailable(
                f"{folder} can't be made: {error.strerror}; choose another path"
            ) from error
    elif not os.path.exists(file):
        if has_journals(folder):
            raise StoreUnavailable(
                f"{folder} has journals of killed writers and no log yet: open it once as a user who may write there"
            )
        raise StoreUnavailable(f"there is no store in {folder}: nothing was recorded there")
    if os.path.exists(file):
        if not os.access(file, os.R_OK):
            raise StoreUnavailable(f"{file} can't be read by this user: ask its owner")
    elif not os.access(folder, os.W_OK | os.X_OK):
        raise StoreUnavailable(f"{folder} can't be written by this user: choose another path")
