"""Write a condition as SQL over the views. The text is made of constants of this module; all else is bound."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from eventrun.filters.words import (
    MAPPINGS,
    OWN,
    TEXTS,
    All,
    Arithmetic,
    Compare,
    Condition,
    Constant,
    Has,
    Missing,
    Not,
    OneOf,
    Operand,
    Path,
    Some,
    TextTest,
    Truth,
    Value,
)

if TYPE_CHECKING:
    import sqlite3

SQL_REGEXP = "eventrun_matches"  # the function that `matches` calls, two arguments: see `matches`


def matches(pattern: str, text: str | None) -> bool | None:
    """Tell whether a regular expression is found in a text."""
    return None if text is None else re.search(pattern, text) is not None


def prepare(db: sqlite3.Connection) -> None:
    """Give a connection the function that `matches` calls."""
    db.create_function(SQL_REGEXP, 2, matches, deterministic=True)


class Sql(NamedTuple):
    """A condition on `trials`, and its parameters."""

    text: str
    bound: dict[str, Value]


def compile_sql(condition: Condition) -> Sql:
    """Write a condition as SQL over the tables `trials`, `facts` and `metrics` of the views.

    The text is made of constants of this module only; names and values are bound.
    """
    writer = _Writer()
    return Sql(writer.condition(condition, True), writer.bound)


class _Pair(NamedTuple):
    """SQL for a value: as a number and as a text, one of which is NULL."""

    number: str
    text: str


class _Writer:
    """Writes conditions that say when something is true; a negation is driven down to the tests.

    A test of one key becomes a set, read from one stretch of an index: a lookup for each trial takes 10 times as long.
    """

    def __init__(self) -> None:
        self.bound: dict[str, Value] = {}

    def bind(self, value: Value) -> str:
        name = f"w{len(self.bound)}"
        self.bound[name] = float(value) if isinstance(value, int) and not -(2**63) <= value < 2**63 else value
        return f":{name}"

    def condition(self, what: Condition, wanted: bool) -> str:
        match what:
            case Not(inner):
                return self.condition(inner, not wanted)
            case All(parts) | Some(parts):
                if not parts:
                    return "1" if isinstance(what, All) == wanted else "0"
                word = " AND " if isinstance(what, All) == wanted else " OR "
                return f"({word.join(self.condition(part, wanted) for part in parts)})"
            case Has(path):
                return self._among(path, "1", wanted)
            case Missing(value):
                return self._missing(value, wanted)
        return self._test(what, wanted)

    def _missing(self, value: Operand, wanted: bool) -> str:
        if isinstance(value, Path) and value.root in MAPPINGS:
            return self._among(value, "there", not wanted)
        pair = self._inline(value)
        return f"({pair.number} IS NULL AND {pair.text} IS NULL) IS {'TRUE' if wanted else 'FALSE'}"

    def _test(self, what: Compare | OneOf | Truth | TextTest, wanted: bool) -> str:
        paths = {path for path in _paths(what) if path.root not in OWN}
        if len(paths) == 1:
            [path] = paths
            return self._among(path, self._tested(what, wanted, path), True)
        return self._tested(what, wanted, None)

    def _among(self, path: Path, test: str, wanted: bool) -> str:
        within = "IN" if wanted else "NOT IN"
        return f"trials.number {within} (SELECT trial {self._rows(path)} AND ({test}))"

    def _rows(self, path: Path) -> str:
        if path.root == "metrics":
            return f"FROM metrics WHERE name = {self.bind(path.key)}"
        return f"FROM facts WHERE key = {self.bind(f'{path.root}/{path.key}')}"

    def _tested(self, what: Compare | OneOf | Truth | TextTest, wanted: bool, here: Path | None) -> str:
        match what:
            case Compare(sign, left, right):
                return _compare_sql(
                    sign if wanted else _OPPOSITE[sign], self._pair(left, here), self._pair(right, here)
                )
            case OneOf(value, among):
                return self._one_of(self._pair(value, here), among, wanted)
            case Truth(value):
                pair = self._pair(value, here)
                sign = "<>" if wanted else "="
                return f"({pair.number} {sign} 0 OR {pair.text} {sign} '')"
            case TextTest(test, value, text):
                found, bound = self._pair(value, here).text, self.bind(text)
                test_sql = {
                    "contains": f"instr({found}, {bound}) > 0",
                    "startswith": f"substr({found}, 1, length({bound})) = {bound}",
                    "endswith": f"({found} IS NOT NULL AND length({bound}) = 0"
                    f" OR substr({found}, -length({bound})) = {bound} AND length({found}) >= length({bound}))",
                    "matches": f"{SQL_REGEXP}({bound}, {found})",
                }[test]
                return test_sql if wanted else f"({found} IS NOT NULL AND NOT {test_sql})"

    def _one_of(self, pair: _Pair, among: tuple[Value, ...], wanted: bool) -> str:
        numbers = ", ".join(self.bind(each) for each in among if not isinstance(each, str))
        texts = ", ".join(self.bind(each) for each in among if isinstance(each, str))
        within = "IN" if wanted else "NOT IN"
        parts = [
            f"({value} IS NOT NULL AND {value} {within} ({listed}))"
            for value, listed in ((pair.number, numbers), (pair.text, texts))
        ]
        return f"({' OR '.join(parts)})"

    def _pair(self, operand: Operand, here: Path | None) -> _Pair:
        if operand == here and isinstance(operand, Path):
            return _Pair(operand.statistic, "NULL") if operand.root == "metrics" else _Pair("number", "text")
        if isinstance(operand, Arithmetic):
            left, right = self._pair(operand.left, here), self._pair(operand.right, here)
            # CAST: or SQLite would divide integers as integers.
            divided = f"CAST({left.number} AS REAL)" if operand.sign == "/" else left.number
            return _Pair(f"({divided} {operand.sign} {right.number})", "NULL")
        return self._inline(operand)

    def _inline(self, operand: Operand) -> _Pair:
        match operand:
            case Constant(value):
                bound = self.bind(value)
                return _Pair("NULL", bound) if isinstance(value, str) else _Pair(bound, "NULL")
            case Arithmetic():
                return self._pair(operand, None)
            case Path(root) if root in OWN:
                column = f"trials.{OWN[root][0]}"
                return _Pair("NULL", column) if root in TEXTS else _Pair(column, "NULL")
        where = f"{self._rows(operand)} AND trial = trials.number"
        if operand.root == "metrics":
            return _Pair(f"(SELECT {operand.statistic} {where})", "NULL")
        return _Pair(f"(SELECT number {where})", f"(SELECT text {where})")


_OPPOSITE = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}


def _compare_sql(sign: str, left: _Pair, right: _Pair) -> str:
    if sign == "!=":
        return (
            f"({left.number} <> {right.number} OR {left.text} <> {right.text}"
            f" OR ({left.number} IS NOT NULL AND {right.text} IS NOT NULL)"
            f" OR ({left.text} IS NOT NULL AND {right.number} IS NOT NULL))"
        )
    sql = "=" if sign == "==" else sign
    return f"({left.number} {sql} {right.number} OR {left.text} {sql} {right.text})"


def _paths(what: Any) -> Iterator[Path]:
    if isinstance(what, Path):
        yield what
    elif isinstance(what, (Compare, OneOf, Truth, TextTest, Arithmetic)):
        for part in what:
            yield from _paths(part)
