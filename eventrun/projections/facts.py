"""What a trial can be chosen by: params, metadata and tags as flat keys, each value as a number or a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Fact = tuple[int | float | None, str | None, bool]  # as a number, as a text, not None


def facts_of(
    params: Mapping[str, Any], metadata: Mapping[str, Any], tags: Mapping[str, Any]
) -> dict[str, Fact]:
    """Give the facts by their keys, like "params/opt/lr"."""
    found: dict[str, Fact] = {}
    for root, mapping in (("params", params), ("metadata", metadata), ("tags", tags)):
        for key, value in flattened(mapping):
            found_as = as_scalar(value)
            if isinstance(found_as, str):
                found[f"{root}/{key}"] = (None, found_as, True)
            else:
                found[f"{root}/{key}"] = (found_as, None, value is not None)
    return found


def flattened(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys, joined by "/", and values of nested mappings."""
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def as_scalar(value: Any) -> int | float | str | None:
    """Give a value as it compares: a number (bools are 0 and 1), a text, or None for all else and for NaN."""
    return value if isinstance(value, str) else as_number(value)


def as_number(value: Any) -> int | float | None:
    """Give a number as SQLite keeps it: no NaN, and as a float what its integers don't hold."""
    if isinstance(value, float):
        return None if value != value else value
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**63 else float(value)
    return None
