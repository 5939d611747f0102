"""Where views lie: generations `views-<n>.db`, and the pointer file `views` that names the one to read.

A database that may be open is never renamed or unlinked, and a number never comes again, so a process that still
holds an old generation can neither harm the new one nor be harmed. Each generation has a random token, in the file
and in the pointer, so that a file of another store, put there by a copy, isn't taken for the one that is meant.

Where nothing can be written, views live in a database without a name, which SQLite keeps in memory and puts aside to
the system's temporary folder when it grows; it is gone when it is closed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from eventrun.clock import monotonic_ns, sleep, time_ns
from eventrun.projections import TRIALS_VERSION

if TYPE_CHECKING:  # imported on first use
    import sqlite3

SCHEMA_VERSION = 2  # raise it when views.sql or the form of a chunk changes
BUSY_S = 60.0  # how long SQLite waits for another process by itself
LOCK_WAIT_S = (
    60.0  # how long one rebuild waits for another; after that both go on, each to a generation of its own
)
CACHE_BYTES = 32 << 20
WAL_BYTES = 16 << 20  # what is left of a write-ahead file that has grown

_SET_META = "INSERT INTO meta (name, value) VALUES (?, ?)"
_GET_META = "SELECT name, value FROM meta"


class Generation(NamedTuple):
    """What the pointer names."""

    number: int
    token: str


class UnusableView(Exception):  # never seen outside: views heal
    """A stored view is of another version or of another log."""

    newer = False  # made by a newer eventrun, which would take ours away again


class NoPlace(UnusableView):
    """The store's folder can't be written."""


class Place:
    """The folder of a store's views."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pointer = folder / "views"

    def current(self) -> Generation | None:
        """Read the pointer; None: there is none, or it can't be understood."""
        try:
            name, token = self._pointer.read_text("ascii").split()
            return Generation(int(name.removeprefix("views-").removesuffix(".db")), token)
        except (OSError, ValueError):
            return None

    def open(self, generation: Generation) -> sqlite3.Connection:
        """Open a generation. Raises sqlite3.Error, UnusableView."""
        db = _connect(f"{self._file(generation.number).as_uri()}?mode=rw")
        try:
            found = dict(db.execute(_GET_META))
            version = found.get("version", "")
            if found.get("token") != generation.token or version != _version():
                error = UnusableView(f"views of version {version}, not {_version()}")
                error.newer = _numbers_in(version) > _numbers_in(_version())
                raise error
            _set_up(db)
        except BaseException:
            db.close()
            raise
        return db

    def create(self) -> tuple[Generation, sqlite3.Connection]:
        """Make an empty generation, to which nothing points yet. Raises NoPlace, sqlite3.Error."""
        # Without a pointer all views may have been deleted while another process still has, say, views-2.db open.
        newest = self.current()
        number = max([time_ns() // 1_000_000 if newest is None else newest.number, *self._numbers()]) + 1
        while True:
            try:
                os.close(os.open(self._file(number), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
                break
            except FileExistsError:
                number += 1
            except OSError as error:
                raise NoPlace(str(error)) from error
        generation = Generation(number, os.urandom(8).hex())
        db = _connect(f"{self._file(number).as_uri()}?mode=rw")
        try:
            db.execute("PRAGMA page_size = 8192")
            db.execute("PRAGMA journal_mode = WAL")
            _make_tables(db, generation.token)
            _set_up(db)
        except BaseException:
            db.close()
            raise
        return generation, db

    def point_to(self, generation: Generation) -> None:
        """Make a generation the one to read, and remove what nobody can have open. Raises NoPlace."""
        before = self.current()
        new = self._pointer.with_name(f"views.{os.getpid()}-{generation.token}.new")
        try:
            new.write_text(f"views-{generation.number}.db {generation.token}\n", "ascii")
            os.replace(new, self._pointer)
        except OSError as error:
            raise NoPlace(str(error)) from error
        keep = generation.number if before is None else min(before.number, generation.number)
        for number in self._numbers():
            if number < keep:
                self.remove(number)

    def _file(self, number: int) -> Path:
        return self.folder.resolve() / f"views-{number}.db"

    def _numbers(self) -> list[int]:
        texts = [
            file.name.removeprefix("views-").removesuffix(".db") for file in self.folder.glob("views-*.db")
        ]
        return [int(text) for text in texts if text.isdecimal()]

    def remove_unfinished(self) -> None:
        """Remove what a killed rebuild has left. Only with the lock: others may just be making theirs."""
        newest = self.current()
        for number in self._numbers():
            if newest is not None and number > newest.number:
                self.remove(number)

    def remove(self, number: int) -> None:
        """Remove an old generation unless somebody has it open, or it is none."""
        import sqlite3

        file = self._file(number)
        try:
            db = _connect(f"{file.as_uri()}?mode=rw")
            try:
                # Leaving the write-ahead log takes a lock that nobody gets while another connection is open.
                db.execute("PRAGMA busy_timeout = 0")
                (mode,) = db.execute("PRAGMA journal_mode = DELETE").fetchone()
            finally:
                db.close()
            if mode == "delete":
                file.unlink()
        except (sqlite3.DatabaseError, OSError):  # in use; or damaged, and then perhaps in use: it stays
            pass

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let one process at a time make a generation. An SQLite lock works alike on every system.

        It spares work, no more: whoever has waited for LOCK_WAIT_S goes on without. Raises sqlite3.Error.
        """
        import sqlite3

        db = sqlite3.connect(self.folder / "views.lock", timeout=0, isolation_level=None)
        try:
            deadline = monotonic_ns() + LOCK_WAIT_S * 1e9
            while True:
                try:
                    db.execute("BEGIN IMMEDIATE")
                    break
                except sqlite3.OperationalError as error:
                    if not is_busy(error):
                        raise
                    if monotonic_ns() > deadline:
                        break
                    sleep(0.02)
            yield
        finally:
            db.close()


def in_memory() -> sqlite3.Connection:
    """Make views that have no file."""
    db = _connect("")
    _make_tables(db, "")
    _set_up(db)
    return db


def is_busy(error: sqlite3.Error) -> bool:
    """Tell whether another process is what an error is about."""
    import sqlite3

    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def is_about_place(error: Exception) -> bool:
    """Tell whether an error says that the place can't be written: read-only, or full."""
    import sqlite3

    codes = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL)
    return isinstance(error, NoPlace) or getattr(error, "sqlite_errorcode", 0) & 0xFF in codes


def _connect(name: str) -> sqlite3.Connection:
    import sqlite3

    # One thread at a time uses it, but after Portal.stop() it may be another one.
    return sqlite3.connect(name, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)


def _make_tables(db: sqlite3.Connection, token: str) -> None:
    db.executescript(Path(__file__).with_name("views.sql").read_text("utf-8"))
    db.execute(_SET_META, ("token", token))
    db.execute(_SET_META, ("version", _version()))


def _set_up(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
    db.execute(f"PRAGMA cache_size = {-CACHE_BYTES // 1024}")


def _numbers_in(version: str) -> list[int]:
    return [int(number) if number.isdecimal() else 0 for number in version.split(".")]


def _version() -> str:
    return f"{SCHEMA_VERSION}.{TRIALS_VERSION}"
