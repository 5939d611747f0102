"""The filter expression: which trials are meant. Parsed, checked, compiled to SQL, or asked of a state.

    metrics['val/loss'].last < 0.1 and params.opt.lr in (0.1, 0.01) and 'baseline' in tags
    created > '2026-11-01' and not name.startswith('try') and (metrics.acc.max > 0.9 or error is None)

What can be named: the trial's own fields (`words.OWN`), `params.KEY`, `metadata.KEY`, `tags.KEY` and
`metrics.NAME.STATISTIC` (`last` when none is named); any KEY or NAME in brackets too. Nested keys are joined by "/".

Logic has three values, as in SQL: what compares with a missing value (or NaN) is unknown, and a trial is chosen only
when the whole is true. A number and a text are different, and in no order. Nothing else of Python is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eventrun.errors import InvalidType
from eventrun.filters.asking import holds
from eventrun.filters.parsing import parse_text
from eventrun.filters.queries import from_query
from eventrun.filters.sql import Sql, compile_sql, prepare
from eventrun.filters.words import Condition

__all__ = ["Condition", "Sql", "Where", "compile_sql", "holds", "parse", "prepare"]

Where = str | Mapping[str, Any] | Sequence[Any] | None  # None: all trials


def parse(where: str | Mapping[str, Any] | Sequence[Any]) -> Condition:
    """Read an expression, or a query as Track and MongoDB write it.

    Raises InvalidType, and InvalidValue, which shows the place.
    """
    if isinstance(where, str):
        return parse_text(where)
    if isinstance(where, (Mapping, Sequence)):
        return from_query(where)
    raise InvalidType(f"where={where!r}: a filter is a text or a mapping")
