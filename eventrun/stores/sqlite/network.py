"""The store on a network disk: one process at a time writes, whichever machine it is on, without a write-ahead log.

SQLite's own locks may not be seen by other machines there, and its write-ahead log needs memory that all its users
share. So whoever appends holds the folder's turn (`locks.Turn`, the files `collecting.<n>`) and uses a rollback
journal. All others open the database to read only: then none of them can take a commit that is under way for one whose
process was killed, and roll it back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eventrun import clock
from eventrun.codec import Batch, Stream
from eventrun.errors import LogDamaged, StoreUnavailable
from eventrun.locks import BEAT_S, Turn
from eventrun.stores.base import READ_BYTES, StoredBatch, Tip
from eventrun.stores.sqlite import SqliteStore
from eventrun.stores.sqlite.batches import Appender, end_of
from eventrun.stores.sqlite.connection import SCHEMA, Log, connect

if TYPE_CHECKING:
    import sqlite3

TURN = "collecting"
TURN_WAIT_S = 10.0  # how long an append waits for its turn
POLL_S = 0.05
KEPT = ["PRAGMA synchronous = EXTRA"]  # also syncs the folder when the rollback journal is removed

T = TypeVar("T")


class NetworkStore(SqliteStore):
    """A folder on a network disk with the log in `log.db`."""

    def __init__(self, folder: Path, *, create: bool = True) -> None:
        self._turn = Turn(folder.absolute(), TURN)
        self._depth = 0  # how many tasks use the turn that is ours
        self._beating: asyncio.Task[None]
        super().__init__(folder, create=create)

    def _logs(self, file: Path, create: bool) -> list[Log]:
        return [_WrittenLog(file, self._turn), _ReadLog(file), _ReadLog(file)]

    @asynccontextmanager
    async def turn(self, wait_s: float | None = None) -> AsyncIterator[None]:
        """Be the one process that writes. Raises StoreUnavailable: another one is, or nothing can be written here."""
        deadline = clock.monotonic_ns() + (TURN_WAIT_S if wait_s is None else wait_s) * 1e9
        while not (self._depth or self._take()):
            if clock.monotonic_ns() >= deadline:
                raise Busy(
                    f"{self.folder}: another process is collecting: {self._turn.holder() or 'just now'}"
                )
            await asyncio.sleep(POLL_S)
        if not self._depth:
            self._beating = asyncio.create_task(self._beat())
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._beating.cancel()
                self._turn.give_back()

    def _take(self) -> bool:
        try:
            return self._turn.take()
        except OSError as error:
            raise NotWritable(f"{self.folder} can't be written by this user: {error.strerror}") from error

    async def _beat(self) -> None:
        while self._turn.held:
            await asyncio.sleep(BEAT_S)
            self._turn.beat()

    async def prepare(self) -> None:
        """Within a turn: make the log if there is none, and finish what a killed process was in the middle of."""
        await self._open(self._writer).run(end_of)

    def collector(self) -> dict[str, Any]:
        """Tell which process has the turn, {} when none has."""
        return self._turn.holder()

    async def append(self, batches: Sequence[Batch], expected: Mapping[Stream, int] | None = None) -> int:
        """Append all batches or none, as `Store.append`, when it is this process's turn."""
        async with self.turn():
            return await super().append(batches, expected)

    async def read(
        self, after: int = 0, *, subject: str | None = None, limit_bytes: int = READ_BYTES
    ) -> list[StoredBatch]:
        """Return batches, as `Store.read`."""
        return await self._looking(
            lambda: super(NetworkStore, self).read(after, subject=subject, limit_bytes=limit_bytes)
        )

    async def tip(self, stream: Stream) -> Tip:
        """Return where a stream ends."""
        log = self._reader.log
        return await self._looking(
            lambda: self._open(self._reader).run(lambda raw: Appender(log).tip(raw, stream))
        )

    async def end(self) -> int:
        """Return the position of the last event."""
        return await self._looking(super().end)

    async def settle(self) -> None:
        """Do nothing: there is no write-ahead file."""
        self._open(self._writer)

    async def _looking(self, look: Callable[[], Awaitable[T]]) -> T:
        """Read; while there is half a commit, or a write-ahead log, wait, or have it cleared away first."""
        deadline = clock.monotonic_ns() + TURN_WAIT_S * 1e9
        while True:
            try:
                return await look()
            except (StoreUnavailable, LogDamaged):
                # Or, where no lock holds between machines, we have read pages of before and of after a commit.
                left = any((self.folder / f"log.db-{name}").exists() for name in ("journal", "wal"))
                if not left or clock.monotonic_ns() > deadline:
                    raise
            try:
                async with self.turn(wait_s=0):
                    await self.prepare()
            except Busy:
                await asyncio.sleep(POLL_S)


class Busy(StoreUnavailable):
    """Another process has the turn."""


class NotWritable(StoreUnavailable):
    """Nobody can have the turn here who isn't allowed to write."""


class _WrittenLog(Log):
    """The database for whoever has the turn."""

    def __init__(self, file: Path, turn: Turn) -> None:
        super().__init__(file, True, KEPT)
        self._turn = turn

    def check_writable(self) -> None:
        super().check_writable()
        self._check_turn()

    def check_unmoved(self) -> None:
        super().check_unmoved()
        if self._identity is not None and self._raw is not None:
            self._check_turn()  # the last look before a commit

    def _check_turn(self) -> None:
        if not self._turn.held:
            raise Busy(
                f"{self.file.parent}: another process is collecting: it took the turn, this one was too slow"
            )

    def _set_mode(self, raw: sqlite3.Connection) -> None:
        _leave_wal(raw)


def _leave_wal(raw: sqlite3.Connection) -> None:
    """Take a log that comes from a local disk out of its write-ahead mode, without the memory that it shares there."""
    raw.execute("PRAGMA locking_mode = EXCLUSIVE")
    (mode,) = raw.execute("PRAGMA journal_mode = DELETE").fetchone()
    raw.execute("PRAGMA locking_mode = NORMAL")
    raw.execute("SELECT count(*) FROM sqlite_master").fetchone()  # or the lock would be kept
    if mode != "delete":
        raise StoreUnavailable("another process has this log open in write-ahead mode: close it, or wait")


class _ReadLog(Log):
    """The database for everybody else: never written, not even to roll back. One that isn't there yet is empty."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, False, [])
        self._is_empty = False

    def run(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Do a job. Raises StoreError."""
        if self._is_empty and self._is_there():
            self.close()
        return super().run(job)

    def _is_there(self) -> bool:
        return self.file.exists() and self.file.stat().st_size > 0

    def _connect(self) -> sqlite3.Connection:
        import sqlite3

        self.read_only = True
        self._is_empty = not self._is_there()
        if self._is_empty:
            raw = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            raw.executescript(SCHEMA.read_text("utf-8"))
            return raw
        # Never "immutable", as a read-only folder on a local disk is opened: somebody may be writing elsewhere.
        return connect(self.file, "ro")
