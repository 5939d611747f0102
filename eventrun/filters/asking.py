"""Ask a state whether a condition holds: what the SQL says, said in Python. The two agree, by test."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eventrun.filters.words import (
    OWN,
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
from eventrun.projections.facts import as_number, as_scalar, flattened

if TYPE_CHECKING:
    from eventrun.projections import TrialState

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
}  # fmt: skip


def holds(condition: Condition, state: TrialState) -> bool | None:
    """Tell whether a trial is chosen; None: unknown. What the SQL says, said by a state."""
    match condition:
        case Compare(sign, left, right):
            return _compared(sign, _value(left, state), _value(right, state))
        case OneOf(value, among):
            found = _value(value, state)
            return None if found is None else any(_compared("==", found, each) for each in among)
        case Missing(value):
            return _value(value, state, others_too=True) is None
        case Has(path):
            return path.key in (state.metrics if path.root == "metrics" else _facts(path, state))
        case Truth(value):
            found = _value(value, state)
            return None if found is None else bool(found)
        case TextTest(test, value, text):
            found = _value(value, state)
            return _tested(test, found, text) if isinstance(found, str) else None
        case Not(what):
            known = holds(what, state)
            return None if known is None else not known
        case All(parts):
            answers = [holds(part, state) for part in parts]
            return False if False in answers else None if None in answers else True
        case Some(parts):
            answers = [holds(part, state) for part in parts]
            return True if True in answers else None if None in answers else False


def _compared(sign: str, left: Value | None, right: Value | None) -> bool | None:
    if left is None or right is None:
        return None
    if isinstance(left, str) != isinstance(right, str):
        return {"==": False, "!=": True}.get(sign)
    return _COMPARISONS[sign](left, right)


def _tested(test: str, found: str, text: str) -> bool | None:
    if test == "matches":
        return re.search(text, found) is not None
    if test == "contains":
        return text in found
    return found.startswith(text) if test == "startswith" else found.endswith(text)


def _value(operand: Operand, state: TrialState, *, others_too: bool = False) -> Value | None:
    """Give a number or a text; with `others_too` 1 for what is neither, a list for instance."""
    if isinstance(operand, Constant):
        return operand.value
    if isinstance(operand, Arithmetic):
        left, right = _value(operand.left, state), _value(operand.right, state)
        if left is None or right is None or isinstance(left, str) or isinstance(right, str):
            return None
        try:
            return as_number(_ARITHMETIC[operand.sign](left, right))
        except (ZeroDivisionError, OverflowError):
            return None
    if operand.root in OWN:
        return as_scalar(getattr(state, OWN[operand.root][1]))
    if operand.root == "metrics":
        metric = state.metrics.get(operand.key)
        return None if metric is None else as_number(getattr(metric, operand.statistic))
    value = _facts(operand, state).get(operand.key)
    found = as_scalar(value)
    return 1 if others_too and found is None and value is not None else found


def _facts(path: Path, state: TrialState) -> dict[str, Any]:
    return dict(flattened(getattr(state, path.root)))
