"""Track's queries: a mapping (or pairs) from attributes to values or to tests, all of which must hold.

    {"status": {"$in": ["interrupted", "suspended"]}, "metadata.heartbeat": {"$lte": then}, "group_id": uid}

What is missing is None: equal to None, unequal to all else, neither less nor greater than anything. `prefilter` asks
the store for what can be asked there; `fits` decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from eventrun.compat.track.errors import BadQuery
from eventrun.compat.track.reading import NATIVE, trial_id, views_of
from eventrun.compat.track.structure import AnyStatus, CustomStatus, Status, as_status, storable
from eventrun.errors import InvalidValue

Query = list[tuple[str, str, Any]]  # attribute, operator, value

_ATTRIBUTES = {
    "trial": ("uid", "_uid", "hash", "_hash", "revision", "name", "description", "version", "group_id", "project_id",
              "status", "parameters", "metadata", "tags"),
    "group": ("uid", "_uid", "name", "description", "project_id", "metadata", "tags"),
    "project": ("uid", "_uid", "name", "description", "metadata", "tags"),
}  # fmt: skip
_ALIASES = {"_uid": "uid", "_hash": "hash"}


def read_query(query: Any, kind: str) -> Query:
    """Take a query apart: None and {} mean all. Raises BadQuery."""
    pairs = [] if query is None else list(query.items() if isinstance(query, Mapping) else query)
    found: Query = []
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise BadQuery(f"a query maps attributes to values or tests; {pair!r} is no such pair")
        name, wanted = pair
        root = name.partition(".")[0]
        if root not in _ATTRIBUTES[kind]:
            raise BadQuery(
                f"a {kind} can't be asked for {name!r}; there are {', '.join(_ATTRIBUTES[kind])}, and metadata.NAME"
                " and the like. For metrics: client.trials(where=...)"
            )
        name = _ALIASES.get(root, root) + name[len(root) :]
        tests = wanted if _is_test(wanted) else {"$eq": wanted}
        found += [(name, sign, _checked(name, sign, value)) for sign, value in tests.items()]
    return found


def _is_test(wanted: Any) -> bool:
    return (
        isinstance(wanted, Mapping)
        and bool(wanted)
        and all(isinstance(key, str) and key.startswith("$") for key in wanted)
    )


def _checked(name: str, sign: str, value: Any) -> Any:
    if sign not in _TESTS:
        raise BadQuery(f"{sign!r} is no operator; there are {', '.join(_TESTS)}")
    many = sign in ("$in", "$nin")
    if many and (isinstance(value, str) or not hasattr(value, "__iter__")):
        raise BadQuery(f"{sign} takes a list of values, not {value!r}")
    one: Callable[[Any], Any] = _status if name == "status" else storable
    if sign == "$exists":
        return bool(value)
    try:
        checked = [one(each) for each in value] if many else one(value)
        if sign == "$regex":
            re.compile(str(checked))
    except (ValueError, TypeError, re.error) as error:
        raise BadQuery(f"{name} can't be compared with {value!r}: {error}") from error
    return checked


def _status(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else as_status(value)


def fits(query: Query, thing: Any) -> bool:
    """Tell whether a trial, a group or a project is meant."""
    return all(_TESTS[sign](_value(thing, name), wanted) for name, sign, wanted in query)


def _value(thing: Any, name: str) -> Any:
    root, *keys = name.split(".")
    found = getattr(thing, root)
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _equal(found: Any, wanted: Any) -> bool:
    if isinstance(found, (Status, CustomStatus)) and isinstance(wanted, str):
        return wanted in (found.name, str(found))
    return bool(found == wanted)


def _ordered(test: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def ask(found: Any, wanted: Any) -> bool:
        if isinstance(found, (Status, CustomStatus)):
            found, wanted = found.value, getattr(wanted, "value", None)
        try:
            return test(found, wanted)
        except TypeError:  # what is missing, or of another kind
            return False

    return ask


_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "$in": lambda found, wanted: any(_equal(found, each) for each in wanted),
    "$nin": lambda found, wanted: not any(_equal(found, each) for each in wanted),
    "$eq": _equal,
    "$ne": lambda found, wanted: not _equal(found, wanted),
    "$lt": _ordered(lambda found, wanted: found < wanted),
    "$lte": _ordered(lambda found, wanted: found <= wanted),
    "$gt": _ordered(lambda found, wanted: found > wanted),
    "$gte": _ordered(lambda found, wanted: found >= wanted),
    "$exists": lambda found, wanted: (found is not None) == wanted,
    "$regex": lambda found, wanted: isinstance(found, str) and re.search(wanted, found) is not None,
}


def prefilter(query: Query) -> list[tuple[str, Any]]:
    """Make a filter of the store that chooses at least the trials that are meant."""
    made: list[tuple[str, Any]] = []
    for name, sign, wanted in query:
        if sign not in ("$eq", "$in", "$lte", "$gt", "$lt", "$gte"):
            continue
        test = _prefiltered(name, sign, wanted)
        if test is not None:
            made.append(test)
    return made


def _prefiltered(name: str, sign: str, wanted: Any) -> tuple[str, Any] | None:
    root, _, key = name.partition(".")
    many = wanted if sign == "$in" else [wanted]
    if sign in ("$eq", "$in"):
        if name == "uid" and all(isinstance(each, str) for each in many):
            return "id", {"$in": _ids(many)}
        if name == "status" and None not in many:
            return "status", {"$in": sorted({view for each in many for view in _views(each)})}
        if name == "hash" and all(isinstance(each, str) and not each.startswith(NATIVE) for each in many):
            return "metadata._track.hash", {"$in": many}
        if name == "project_id" and all(isinstance(each, str) for each in many):
            return "project", {"$in": many}
    # Only finite numbers and texts are compared alike by the store; a "/" is how it joins keys.
    simple = all(type(each) in (int, str) or (type(each) is float and each - each == 0) for each in many)
    if root in ("metadata", "parameters", "tags") and key and "/" not in key and not key.startswith("_"):
        if simple and all(type(each) is not int or abs(each) < 1 << 53 for each in many):
            return f"{'params' if root == 'parameters' else root}.{key}", {sign: wanted}
    return None


def _views(wanted: AnyStatus | str) -> list[str]:
    if isinstance(wanted, str):
        # A word may be a status of Track's in any case, or one of one's own of any kind.
        return [*views_of(as_status(wanted)), *views_of(CustomStatus(wanted)), "running"]
    return views_of(wanted)


def _ids(uids: list[str]) -> list[str]:
    found = []
    for uid in uids:
        try:
            found.append(trial_id(uid))
        except InvalidValue:  # no trial's
            pass
    return found
