"""Params and metadata: merge nested mappings, and remember where each param came from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from eventrun.events import Plain

SOURCES_KEPT = 5  # entries per param; older ones stand in the log


class ParamSource(NamedTuple):
    """Who set a param ("call", "config.yaml", "sweep", ...) and to what."""

    source: str
    value: Plain


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Merge nested mappings key by key; all else, lists too, is replaced. Both arguments stay as they are."""
    result = dict(old)
    for key, value in new.items():
        if isinstance(value, dict):
            before = result.get(key)
            result[key] = merged(before if isinstance(before, dict) else {}, value)
        else:
            result[key] = value
    return result


def leaves(params: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Plain]]:
    """Yield each value that is no mapping, or an empty one, with its keys joined by "/"."""
    for key, value in params.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def remember(sources: dict[str, list[ParamSource]], params: dict[str, Any], source: str) -> None:
    """Note who set these params, newest last; saying the same again is no news."""
    for path, value in leaves(params):
        known = sources.setdefault(path, [])
        entry = ParamSource(source, value)
        if not known or known[-1] != entry or type(known[-1].value) is not type(value):
            known.append(entry)
            del known[:-SOURCES_KEPT]
