"""Reading and writing the views' database: transactions, the write lock that processes share, and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from eventrun.clock import monotonic_ns
from eventrun.errors import StoreUnavailable
from eventrun.projector.generations import BUSY_S, is_busy
from eventrun.projector.series import DamagedView

if TYPE_CHECKING:  # imported on first use
    import sqlite3

View = tuple[str, int]  # name and version
TRIALS: View = ("trials", 0)  # the built-in view; its version is that of the generation

POLL_MS = 200  # how long to wait for the write lock before looking whether another process has done the work
STUCK_S = 60.0  # how long another process may hold the lock without getting on

_CHECKPOINT = "SELECT position, batch FROM checkpoints WHERE view = ? AND version = ?"
_FURTHEST = "SELECT coalesce(max(position), 0) FROM checkpoints"
_SET_CHECKPOINT = "INSERT OR REPLACE INTO checkpoints (view, version, position, batch) VALUES (?, ?, ?, ?)"


def checkpoint(db: sqlite3.Connection, view: View) -> tuple[int, bytes]:
    """Return the position up to which a view has read, and the digest of the batch that ends there."""
    position, mark = db.execute(_CHECKPOINT, view).fetchone() or (0, b"")
    if not isinstance(position, int) or not isinstance(mark, bytes):
        raise DamagedView(f"the checkpoint of {view[0]!r} is no position")
    return position, mark


def furthest(db: sqlite3.Connection) -> int:
    """Return the furthest position that any view has read up to."""
    (position,) = db.execute(_FURTHEST).fetchone()
    if not isinstance(position, int):
        raise DamagedView("a checkpoint is no position")
    return position


def set_checkpoint(db: sqlite3.Connection, view: View, position: int, mark: bytes) -> None:
    """Note how far a view has read; in the transaction that changes the view."""
    db.execute(_SET_CHECKPOINT, (*view, position, mark))


def lock(db: sqlite3.Connection, view: View, target: int) -> bool:
    """Begin to write; False: another process has brought the view to the target meanwhile.

    Raises StoreUnavailable when another process holds the lock and doesn't get on.
    """
    reached, since = -1, monotonic_ns()
    while not _begin_immediate(db):
        position, _ = checkpoint(db, view)
        if position >= target:
            return False
        if position != reached:
            reached, since = position, monotonic_ns()
        elif monotonic_ns() - since > STUCK_S * 1e9:
            raise StoreUnavailable(
                f"another process has held the views for {STUCK_S:.0f} s without getting on: end it, "
                "or read with fresh=False what is there"
            )
    if checkpoint(db, view)[0] < target:
        return True
    db.execute("ROLLBACK")
    return False


def _begin_immediate(db: sqlite3.Connection) -> bool:
    import sqlite3

    db.execute(f"PRAGMA busy_timeout = {POLL_MS}")
    try:
        db.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        if not is_busy(error):
            raise
        return False
    finally:
        db.execute(f"PRAGMA busy_timeout = {BUSY_S * 1000:.0f}")
    return True


@contextmanager
def ending(db: sqlite3.Connection) -> Iterator[None]:
    """Commit what was begun, or roll it back."""
    import sqlite3

    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        try:
            if db.in_transaction:
                db.execute("ROLLBACK")
        except sqlite3.Error:  # the error that brought us here says more
            pass
        raise


@contextmanager
def writing(db: sqlite3.Connection) -> Iterator[None]:
    """Begin to write, whatever another process has done; wait for it."""
    db.execute("BEGIN IMMEDIATE")
    with ending(db):
        yield


@contextmanager
def reading(db: sqlite3.Connection) -> Iterator[None]:
    """Let several queries see one state of the views."""
    db.execute("BEGIN")
    with ending(db):
        yield
