"""Open the store that a command line names; those that only read never make one."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eventrun.config import load_settings
from eventrun.errors import InvalidValue, NotFound, StoreUnavailable
from eventrun.summary import clean

if TYPE_CHECKING:
    from eventrun.client import Client

CLOSE_S = 1.0
INTERRUPTED = 130  # the exit code after Ctrl-C, as a shell shows it
SHORTEST_TIME_NS = 10**15  # a number from here on is nanoseconds since 1970, below it a position


class Source(NamedTuple):
    """An open client, and what to ask: the client itself, or the store as it was at a moment."""

    client: Client
    reads: Any  # Client or Past, which have the same read methods


@contextmanager
def reading(arguments: argparse.Namespace) -> Iterator[Source]:
    """Open the store to read. Raises StoreUnavailable when there is none."""
    with opened(arguments, create=False) as client:
        moment = arguments.moment
        yield Source(client, client if moment is None else client.at(**moment))


@contextmanager
def opened(arguments: argparse.Namespace, *, create: bool) -> Iterator[Client]:
    """Open the store; with `create` it is made where there is none."""
    from eventrun.client import open as open_client

    url = store_url(arguments)
    if not create:
        _check_there(url)
    client = open_client(url, quiet=True, create=create)
    try:
        with _calm_warnings():
            yield client
    except KeyboardInterrupt:
        _close_soon(client)
        raise
    finally:
        client.close()


@contextmanager
def _calm_warnings() -> Iterator[None]:
    """Show eventrun's warnings as plain lines, without the place in the code."""
    show = warnings.showwarning

    def say(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, RuntimeWarning) and str(message).startswith("eventrun"):
            print(clean(str(message)), file=sys.stderr)
        else:
            show(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.showwarning = say
        yield


def _close_soon(client: Client) -> None:
    """After Ctrl-C don't wait for a rebuild or a long question to end; events that were recorded are waited for."""
    closing = threading.Thread(target=client.close, daemon=True)
    closing.start()
    closing.join(CLOSE_S)
    if closing.is_alive() and not client.statistics().recorded:
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # readers may be killed at any moment: they leave nothing half-done
    closing.join()


def store_url(arguments: argparse.Namespace) -> str:
    """Tell which store a command line means."""
    url: str = load_settings(url=arguments.store).url
    return url


def store_folder(url: str) -> Path | None:
    """Return the folder of a store that has one."""
    path = url.removeprefix("sqlite:")
    return None if path == "memory:" or "://" in path else Path(path).expanduser()


def _check_there(url: str) -> None:
    if url == "memory:":
        raise StoreUnavailable(
            "a store in memory ends with its process, so there is none to read: name a folder"
        )
    folder = store_folder(url)
    if folder is None or (folder / "log.db").exists():
        return
    from eventrun.stores.sqlite import has_journals

    if has_journals(folder):  # of a process that was killed before its first batch
        return
    if (folder / "log.mark").exists():  # there was one: the store tells
        return
    if folder.is_dir() or not folder.exists():  # a file in its place is told by the store
        raise NotFound(
            f"there is no store in {clean(str(folder))}: nothing was recorded there\n"
            "to make one: eventrun demo; to name another: eventrun --store PATH ls"
        )


def moment(text: str) -> dict[str, int]:
    """Read a position, or a time: ISO 8601 (of this machine's zone if it names none) or nanoseconds since 1970."""
    try:
        if text.isdecimal() and text.isascii():
            number = int(text)
            return {"time": number} if number >= SHORTEST_TIME_NS else {"position": number}
        return {"time": round(datetime.fromisoformat(text).astimezone().timestamp() * 1e6) * 1000}
    except (ValueError, OverflowError, OSError) as error:
        raise InvalidValue(
            f"{text!r} is neither a position nor a time\n"
            "positions are numbers as in `eventrun events`; times look like 2025-11-21T12:30, or nanoseconds since 1970"
        ) from error
