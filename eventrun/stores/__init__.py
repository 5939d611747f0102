"""Stores: where the log lies. `open_store` chooses one by its URL; what a store is says `eventrun.stores.base`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from eventrun.errors import InvalidValue, StoreUnavailable
from eventrun.filesystems import file_system

if TYPE_CHECKING:
    from eventrun.stores.base import Store

_KNOWN = "a store is a folder's path, sqlite:PATH or memory:"


def open_store(url: str | os.PathLike[str], *, create: bool = True) -> Store:
    """Open a store: a folder's path or "sqlite:PATH" (~ is expanded), or "memory:".

    Checks the path and, with `create`, makes the folder; the log itself is opened, or made, by the store's first
    use. Without `create` a missing store is an error, and nothing is written to one that can't be written.
    Raises StoreUnavailable, InvalidValue.
    """
    text = os.fspath(url)
    if text == "memory:":
        from eventrun.stores.memory import MemoryStore

        return MemoryStore()
    path = text.removeprefix("sqlite:")
    if not path or "\0" in path:
        raise InvalidValue(f"{text!r} names no store: {_KNOWN}")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+:)?//[^/]", path)
    if scheme and (scheme[1] or path != text):
        raise StoreUnavailable(f"this version of eventrun has no store for {text!r}: {_KNOWN}")

    try:
        folder = Path(path).expanduser()
    except RuntimeError as error:
        raise StoreUnavailable(
            f"{path!r} begins with a user that isn't known here: write ./{path}"
        ) from error
    if file_system(folder).network:
        from eventrun.stores.sqlite.network import NetworkStore

        return NetworkStore(folder, create=create)
    from eventrun.stores.sqlite import SqliteStore

    return SqliteStore(folder, create=create)
