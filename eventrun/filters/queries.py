"""Read a query as Track and MongoDB write it: a mapping from names to values or to tests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from eventrun.errors import InvalidValue
from eventrun.filters.words import (
    MAPPINGS,
    OWN,
    STATISTICS,
    TIMES,
    All,
    Compare,
    Condition,
    Constant,
    Missing,
    Not,
    OneOf,
    Path,
    Some,
    TextTest,
    Value,
    keyed,
    time_of,
)

_OPERATORS = {"$lt": "<", "$lte": "<=", "$gt": ">", "$gte": ">=", "$eq": "==", "$ne": "!="}


def from_query(query: Mapping[str, Any] | Sequence[Any]) -> Condition:
    """Read a query, like `{"status": {"$in": ["lost", "failed"]}, "params.lr": 0.1, "$or": [{...}, {...}]}`.

    All of it must hold. A list of pairs serves as well. Raises InvalidValue.
    """
    pairs = query.items() if isinstance(query, Mapping) else query
    parts: list[Condition] = []
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise InvalidValue(f"a query is a mapping from names to values, or a list of pairs, not {pair!r}")
        name, wanted = pair
        if name in ("$or", "$and"):
            if not isinstance(wanted, (list, tuple)) or not wanted:
                raise InvalidValue(f"{name} takes a list of queries, not {wanted!r}")
            some = tuple(from_query(each) for each in wanted)
            parts.append(Some(some) if name == "$or" else All(some))
            continue
        path = _path_of(name)
        tests = wanted if isinstance(wanted, Mapping) else {"$eq": wanted}
        parts += [_test(path, sign, value) for sign, value in tests.items()]
    return parts[0] if len(parts) == 1 else All(tuple(parts))


def _path_of(name: str) -> Path:
    root, _, key = name.partition(".")
    if not key and root in OWN:
        return Path(root)
    if key and root in MAPPINGS:
        return keyed(root, key.replace(".", "/"))
    if key and root == "metrics":
        metric, _, statistic = key.rpartition(".")
        return Path("metrics", metric, statistic) if statistic in STATISTICS and metric else keyed(root, key)
    raise InvalidValue(
        f"there is no {name!r} to ask for; there are {', '.join(OWN)}, params.NAME, metadata.NAME, tags.NAME"
        " and metrics.NAME.last"
    )


def _test(path: Path, sign: str, value: Any) -> Condition:
    if sign in ("$in", "$nin") and isinstance(value, (list, tuple, set, frozenset)):
        found = OneOf(path, tuple(_plain(path, each) for each in value))
        return found if sign == "$in" else Not(found)
    if sign == "$exists" and isinstance(value, (bool, int)):
        return Not(Missing(path)) if value else Missing(path)
    if sign == "$regex" and isinstance(value, str):
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise InvalidValue(f"{value!r} is no regular expression: {error}") from error
        return TextTest("matches", path, value)
    if sign in _OPERATORS:
        if value is None and sign in ("$eq", "$ne"):
            return Missing(path) if sign == "$eq" else Not(Missing(path))
        return Compare(_OPERATORS[sign], path, Constant(_plain(path, value)))
    known = ", ".join((*_OPERATORS, "$in", "$nin", "$exists", "$regex", "$or", "$and"))
    raise InvalidValue(f"{sign!r} with {value!r} is no test; those are {known}")


def _plain(path: Path, value: Any) -> Value:
    if isinstance(value, str) and path.root in TIMES:
        try:
            return time_of(value)
        except (ValueError, OverflowError, OSError) as error:
            raise InvalidValue(f"{value!r} is no time like '2026-11-21T12:30'") from error
    if isinstance(value, (bool, int, float, str)):
        return int(value) if isinstance(value, bool) else value
    raise InvalidValue(f"{value!r} can't be compared with: numbers and texts can")
