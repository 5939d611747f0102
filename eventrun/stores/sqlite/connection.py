"""A connection that is opened anew after a failure, a thread that it runs on, and what SQLite's errors mean.

A fork is waited for: see `_close_before_fork`.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eventrun import clock
from eventrun.errors import SALVAGE, FormatTooNew, LogDamaged, StoreError, StoreUnavailable
from eventrun.filesystems import sync_parents
from eventrun.portal import importing
from eventrun.stores.sqlite.batches import FORMAT, TOUCH
from eventrun.stores.sqlite.mark import Mark
from eventrun.stores.sqlite.wal_index import check_room, take_room

if TYPE_CHECKING:  # imported on first use: together they take 40 ms
    import asyncio
    import sqlite3

    import aiosqlite

APPLICATION_ID = 0x65767275  # also in schema.sql
BUSY_S = 10.0  # how long to wait while another process holds the log
WAL_BYTES = (
    64 << 20
)  # of the write-ahead file, beyond which an append checkpoints if nobody has called settle()
FORK_WAIT_S = 10.0  # how long a fork waits for jobs that are under way
CACHE_BYTES = 16 << 20  # with 1,000 streams a commit touches 1,000 index pages

# As few as can be: beside a busy thread each may take 10 ms.
DURABLE = ["PRAGMA synchronous = FULL"]
if sys.platform == "darwin":  # a plain fsync stops at the disk's cache
    DURABLE += ["PRAGMA fullfsync = 1", "PRAGMA checkpoint_fullfsync = 1"]
TO_APPEND = [
    *DURABLE,
    f"PRAGMA cache_size = {-CACHE_BYTES // 1024}",
    "PRAGMA wal_autocheckpoint = 0",  # see Log.checkpoint
    f"PRAGMA journal_size_limit = {WAL_BYTES}",  # to which a write-ahead file that is begun anew is cut down
]
_FORMAT = """
    SELECT (SELECT count(*) FROM sqlite_master), application_id, user_version
    FROM pragma_application_id, pragma_user_version
"""

T = TypeVar("T")
_inherited: list[object] = []  # kept alive: to close a connection of the parent's may harm its database
SCHEMA = Path(__file__).with_name("schema.sql")


class Log:
    """The database as one connection sees it, used by one thread; opened by the first job, and after a failure."""

    def __init__(self, file: Path, create: bool, pragmas: Sequence[str] = ()) -> None:
        self.file = file
        self._pragmas = pragmas
        self.read_only = False
        self._create = create
        self._raw: sqlite3.Connection | None = None
        self._failed: list[sqlite3.Connection] = []  # not used any more, not closed yet
        self.found_wal = False  # when this connection was opened, something was in the write-ahead file
        self._identity: tuple[int, int] | None = None
        self.lock = threading.Lock()  # held by the job, and by a fork
        _logs.add(self)

    def run(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Do a job. Raises StoreError for what SQLite raises."""
        with importing:
            import sqlite3

        _prepare_for_forks()
        with self.lock:
            if self.file in _cut:
                raise StoreUnavailable(
                    f"{self.file} can't be used by this process: it was forked in the middle of a job that took long; "
                    "what it records is kept in its journal, and the next open of the store takes it in"
                )
            try:
                if self._raw is None:
                    self._raw = self._open()
                    self._close_failed()
                return job(self._raw)
            except sqlite3.Error as error:
                if _code(error) != sqlite3.SQLITE_BUSY:
                    self._set_aside()
                raise store_error(error, self.file) from error
            except (
                OverflowError,
                UnicodeDecodeError,
            ) as error:  # a flipped bit in a number, in the schema's text
                self._set_aside()
                raise LogDamaged(f"{self.file} is damaged: {error}; {SALVAGE}", (str(self.file),)) from error

    def connect(self) -> sqlite3.Connection:
        """Open the log."""
        return self.run(lambda raw: raw)

    def close(self) -> None:
        """Close the connection; the next job opens another."""
        if self._raw is None and self._failed:
            import sqlite3

            # So that none that has failed is the last one, with which SQLite checkpoints.
            try:
                self._raw = self._open()
            except (sqlite3.Error, StoreError):
                pass
        self._close_failed()
        raw, self._raw = self._raw, None
        if raw is not None:
            raw.close()

    def _set_aside(self) -> None:
        # Not closed until another is open: the last one to be closed checkpoints, that is, it retries the sync that has
        # failed. And when nobody has the database open SQLite forgets where the write-ahead file ends, reads it anew,
        # and takes the commit whose sync has failed for a good one, though the kernel may have dropped its pages.
        # (Tried, with a second failure there: what was appended after it was lost at a power cut.)
        if self._raw is not None:
            self._failed.append(self._raw)
            self._raw = None

    def _close_failed(self) -> None:
        while self._failed:
            self._failed.pop().close()

    def wal_bytes(self) -> int:
        """Return the size of the write-ahead file."""
        try:
            return os.stat(f"{self.file}-wal").st_size
        except OSError:
            return 0

    def checkpoint(self, raw: sqlite3.Connection) -> bool:
        """Copy the write-ahead file into the database and begin it anew; False when a reader needs some of it."""
        # Nobody may commit meanwhile: up to 3.51.2 SQLite can lose transactions when a commit starts the file anew
        # under a checkpoint (sqlite.org/wal.html#walresetbug). So another connection holds the lock for writing, and
        # nothing of SQLite's own accord checkpoints beside commits. FULL and TRUNCATE take that lock too, but go on
        # without it after a while, and make everybody wait for readers.
        gate = connect(self.file, "rw")
        try:
            gate.execute("BEGIN IMMEDIATE")
            busy, frames, copied = raw.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            gate.execute("ROLLBACK")
            return not busy and frames == copied and (frames <= 1 or self._begin_wal_anew(gate))
        finally:
            gate.close()

    def leave_found_wal(self, raw: sqlite3.Connection) -> None:
        """Before the first append: write nothing behind what others have left in the write-ahead file."""
        # They may have been killed after a sync that had failed. Then what looks like their last commit may be gone
        # from the disk, and with it, after a power cut, all that follows it in the file. In the database it is safe.
        # A reader or a full disk that hinders this doesn't stop us: all of these faults would have to meet.
        import sqlite3

        if not self.found_wal:
            return
        try:
            self.found_wal = not self.checkpoint(raw)
        except sqlite3.Error as error:
            if _code(error) != sqlite3.SQLITE_FULL:
                raise

    def _begin_wal_anew(self, gate: sqlite3.Connection) -> bool:
        """After a whole checkpoint, have the next frame written at the start of the write-ahead file."""
        # Until then it holds what was copied. If all die and a byte of it changes, SQLite takes the frames before
        # that byte for the newest pages: settled batches vanish behind older pages (tried: 146 of 150 flips). This
        # commit changes nothing. It begins the file anew unless a reader still needs the old one.
        before = self._wal_generation()
        gate.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
        gate.execute(TOUCH)
        return self._wal_generation() != before

    def _wal_generation(self) -> bytes:
        # Its number and salts (sqlite.org/fileformat2.html#walformat). SQLite keeps no locks on this file, so unlike
        # log.db it may be opened and closed at any time.
        try:
            with open(f"{self.file}-wal", "rb") as wal:
                return wal.read(24)[12:]
        except OSError:
            return b""

    def abandon(self) -> object:
        """Give away the connection as it is: in a fork's child it must be neither used nor closed."""
        raw, self._raw = self._raw, None
        failed, self._failed = self._failed, []
        return raw, failed

    def check_writable(self) -> None:
        """Raise StoreUnavailable in a place where nothing can be written."""
        if self.read_only:
            raise StoreUnavailable(
                f"{self.file.parent} can't be written by this user: it was opened to read only"
            )

    def check_unmoved(self) -> None:
        """Raise StoreUnavailable when the file is not the one that was opened."""
        # SQLite would go on writing to a file that has been deleted.
        if _identity(self.file) != self._identity:
            raise StoreUnavailable(
                f"{self.file} was moved or deleted while it was open: put it back, or open another"
            )

    def _open(self) -> sqlite3.Connection:
        if self._identity is not None:
            self.check_unmoved()
        check_not_emptied(self.file)
        raw = self._connect()
        try:
            self._check_format(raw)
            if not self.read_only:
                take_room(self.file)
            for pragma in self._pragmas:
                raw.execute(pragma)
        except BaseException:
            raw.close()
            raise
        self._identity = _identity(self.file)
        return raw

    def _connect(self) -> sqlite3.Connection:
        self.read_only = not os.access(self.file.parent, os.W_OK | os.X_OK) or (
            self.file.exists() and not os.access(self.file, os.W_OK)
        )
        if not self._failed:  # else we know where the file ends, see `_set_aside`
            self.found_wal = not self.read_only and self.wal_bytes() > 0
        if self.read_only:
            return self._open_read_only()
        check_room(self.file)
        return connect(self.file, "rwc" if self._create else "rw")

    def _set_mode(self, raw: sqlite3.Connection) -> None:
        """Before anything is written, see to it that there is a write-ahead log."""
        _use_wal(raw)

    def _open_read_only(self) -> sqlite3.Connection:
        import sqlite3

        raw = connect(self.file, "ro")
        try:
            raw.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return raw
        except sqlite3.OperationalError as error:
            raw.close()
            wal = self.file.with_name(self.file.name + "-wal")
            if wal.exists() and wal.stat().st_size:
                raise StoreUnavailable(
                    f"{wal} holds the newest events, and can't be read from a folder that can't be written: "
                    "copy the whole folder to a place that can be written, and open that"
                ) from error
        # Nobody writes here and there is no write-ahead file, so SQLite may do without the index that it would have
        # to make beside the database.
        return connect(self.file, "ro&immutable=1")

    def _check_format(self, raw: sqlite3.Connection) -> None:
        marked = _marked(self.file)  # before the tables are looked for, see `check_not_emptied`
        tables, application, version = raw.execute(_FORMAT).fetchone()
        if application == version == tables == 0:
            _refuse_new_log(self.file, marked)
            if not self._create or self.read_only:
                raise StoreUnavailable(
                    f"{self.file} holds no log yet: its writer was stopped before the first append"
                )
            # Before there is a log that others could append to. SQLite syncs the folder, not what leads there.
            try:
                sync_parents(self.file.parent)
            except OSError as error:
                raise StoreUnavailable(
                    f"{self.file.parent}: the disk failed; look at the system's log: {error}"
                ) from error
            self._set_mode(raw)
            raw.executescript(SCHEMA.read_text("utf-8"))
        elif application != APPLICATION_ID:
            raise StoreUnavailable(f"{self.file} is a database of another program: choose another folder")
        elif version > FORMAT:
            raise FormatTooNew(
                f"{self.file} has format {version}, this eventrun reads up to {FORMAT}: upgrade eventrun"
            )
        elif not self.read_only and self._pragmas:  # it may come from another kind of disk
            self._set_mode(raw)


def check_not_emptied(file: Path) -> None:
    """Raise LogDamaged where a log once was: SQLite would make a new one in its place."""
    # Before the look at the file itself, or another process might make them all in between.
    marked = _marked(file)
    wal = file.with_name(file.name + "-wal")
    wal_bytes = _bytes_of(wal)
    if not _bytes_of(file):
        if wal_bytes:  # SQLite would remove it: it belongs to no database
            raise LogDamaged(
                f"{file} is gone, and the newest events stand in {wal.name} beside it; {SALVAGE}"
            )
        _refuse_new_log(file, marked)


def _bytes_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _marked(file: Path) -> int:
    return Mark(file.with_name("log.mark")).read()


def _refuse_new_log(file: Path, marked: int) -> None:
    if marked:
        raise LogDamaged(
            f"{file} is missing or empty, but log.mark says that the log had {marked:,} events: put it back or "
            "restore a backup; `eventrun salvage OUT` saves what journals hold; to begin a new log, remove log.mark",
            (f"positions 1..{marked}",),
        )


def connect(file: Path, mode: str) -> sqlite3.Connection:
    """Open a database, "ro", "rw" or "rwc"."""
    import sqlite3

    # One thread at a time: the job's, or the one that forks.
    return sqlite3.connect(
        f"{file.as_uri()}?mode={mode}",
        uri=True,
        timeout=BUSY_S,
        isolation_level=None,
        check_same_thread=False,
    )


def _use_wal(raw: sqlite3.Connection) -> None:
    import sqlite3

    mode = ""
    deadline = clock.monotonic_ns() + BUSY_S * 1e9
    while not mode:
        try:
            (mode,) = raw.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError as error:
            # Two processes that make the same log at once: here SQLite doesn't wait by itself.
            if _code(error) != sqlite3.SQLITE_BUSY or clock.monotonic_ns() > deadline:
                raise
            clock.sleep(0.01)
    if mode != "wal":
        raise StoreUnavailable(
            "SQLite can't keep a write-ahead log in this folder (a network disk?): choose one on a local disk"
        )


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def store_error(error: sqlite3.Error, file: Path) -> StoreError:
    """Say what SQLite's error means here, and what to do."""
    import sqlite3

    code = _code(error)
    text = f"{error} ({getattr(error, 'sqlite_errorname', type(error).__name__)})"
    # An OperationalError without a code comes from sqlite3 itself: text that is not UTF-8. And no statement of ours
    # names a table or column that isn't there, unless a byte of the schema's text has changed.
    odd_schema = code == sqlite3.SQLITE_ERROR and text.startswith(("no such", "table", "malformed"))
    if (
        code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
        or odd_schema
        or (not code and "decode" in text)
    ):
        return LogDamaged(f"{file} is damaged: {text}; {SALVAGE}", (f"{file}: {text}",))
    advice = {
        sqlite3.SQLITE_BUSY: f"another process has held it for {BUSY_S:g} s; look for one that hangs",
        sqlite3.SQLITE_FULL: "the disk is full; free some space and append again",
        sqlite3.SQLITE_READONLY: "it can't be written; give this user the right, or open it to read only",
        sqlite3.SQLITE_CANTOPEN: "it can't be opened; look at the folder's permissions and free space",
        sqlite3.SQLITE_IOERR: "the disk failed; look at the system's log, then append again",
    }.get(code, "SQLite refused")
    return StoreUnavailable(f"{file}: {advice}: {text}")


# SQLite remembers per process, by the file's inode, which locks the process holds. A fork's child inherits that memory
# and not the locks. So a connection that it opened itself would lock nothing as long as the parent's were open at the
# fork: the parent, or anybody, could take itself for the last one, delete the write-ahead file at its close, and with
# it what the child had committed since (tried: a lost commit that had been acknowledged). Nor could the child ever
# write if the parent was just writing. Hence all connections are closed around a fork, and opened anew by the next job.
_logs: weakref.WeakSet[Log] = weakref.WeakSet()
_held: list[Log] = []  # during a fork
_cut: set[Path] = set()  # of this process: its parent was in the middle of a job that didn't end in time
_prepared: list[bool] = []


def _prepare_for_forks() -> None:
    # Not when this is imported: hooks that are registered later are called earlier, and a job may need what such a hook
    # of another module locks (logging's).
    if not _prepared and hasattr(os, "register_at_fork"):
        _prepared.append(True)
        os.register_at_fork(before=_close_before_fork, after_in_parent=_go_on, after_in_child=_go_on_in_child)


def _close_before_fork() -> None:
    deadline = clock.monotonic_ns() + FORK_WAIT_S * 1e9
    for log in tuple(_logs):
        if log.lock.acquire(timeout=max(0.0, (deadline - clock.monotonic_ns()) / 1e9)):
            _held.append(log)
            log.close()


def _go_on() -> None:
    while _held:
        _held.pop().lock.release()


def _go_on_in_child() -> None:
    for log in tuple(_logs):
        if log not in _held:
            log.lock = threading.Lock()
            _inherited.append(log.abandon())
            _cut.add(log.file)
    _go_on()


class Courier:
    """Carries jobs to a log on a thread of its own, one after another, and their answers back.

    A job that was begun is finished, whether or not anybody still waits for it.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self._opening: asyncio.Future[aiosqlite.Connection] | None = None
        self._process = 0

    async def run(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Have a job done and return its answer."""
        import asyncio

        self._leave_to_parent()
        if self._opening is None:
            self._process = os.getpid()
            self._opening = asyncio.ensure_future(self._open())
        try:
            connection = await asyncio.shield(self._opening)
        except RuntimeError:
            # At interpreter exit Python 3.12 starts no thread any more. Nothing else goes on then: done right here.
            return self.log.run(job)
        # A closure, since aiosqlite logs the call at level DEBUG with all its arguments.
        return await _on_thread(connection, lambda: self.log.run(job))

    async def _open(self) -> aiosqlite.Connection:
        import asyncio

        with importing:
            import logging

            import aiosqlite

        logger = logging.getLogger("aiosqlite")
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)  # two lines per job would drown the training's own debug output
        connection = aiosqlite.Connection(self.log.connect, iter_chunk_size=1)
        # Or a client that nobody closed would hang the interpreter's exit. Before aiosqlite 0.22 it is the thread.
        thread: Any = getattr(connection, "_thread", connection)
        thread.daemon = True
        try:
            return await connection
        except BaseException:
            self._opening = None
            while thread.is_alive():  # noqa: ASYNC110 - its last word must not find a closed loop
                await asyncio.sleep(0.001)
            raise

    async def aclose(self) -> None:
        """Close the connection after the jobs that wait, and end the thread."""
        self._leave_to_parent()
        opening, self._opening = self._opening, None
        if opening is None:
            self.log.close()
        else:
            connection = await opening
            await _on_thread(connection, self.log.close)
            await connection.close()

    def _leave_to_parent(self) -> None:
        if self._opening is not None and self._process != os.getpid():
            _inherited.append((self._opening, self.log.abandon()))
            self._opening = None


async def _on_thread(connection: aiosqlite.Connection, job: Callable[[], T]) -> T:
    # aiosqlite's public methods do one statement each.
    answer: T = await connection._execute(job)  # type: ignore[no-untyped-call]
    return answer
