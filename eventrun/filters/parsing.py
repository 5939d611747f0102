"""Read an expression: by `ast`, which never runs it, and node by node; what isn't listed here is refused."""

from __future__ import annotations

import ast
import re
from typing import NoReturn

from eventrun.errors import InvalidValue
from eventrun.filters.words import (
    MAPPINGS,
    OWN,
    STATISTICS,
    TEXT_TESTS,
    TIMES,
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
    keyed,
    time_of,
)

MAX_LENGTH = 10_000  # characters of an expression
MAX_NODES = 2_000  # of a parsed expression; SQLite takes expressions up to a depth of 1,000
MAX_DEPTH = 200
SHOWN = 100  # characters of it in an error


def parse_text(text: str) -> Condition:
    """Read an expression. Raises InvalidValue that shows where it goes wrong."""
    return _Parser(text).parse()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text

    def parse(self) -> Condition:
        if len(self._text) > MAX_LENGTH:
            raise InvalidValue(f"a filter of {len(self._text):,} characters: the most is {MAX_LENGTH:,}")
        try:
            # In brackets, so that it may have several lines.
            tree = ast.parse(f"({self._text}\n)", mode="eval")
        except SyntaxError as error:
            self._fail(error.msg, self._place(error.lineno or 1, (error.offset or 1) - 1))
        except (MemoryError, RecursionError, ValueError) as error:
            raise InvalidValue(f"the filter is nested too deeply, or no text: {error}") from error
        self._check_size(tree)
        return self._condition(tree.body)

    def _check_size(self, tree: ast.AST) -> None:
        level: list[ast.AST] = [tree]
        nodes = depth = 0
        while level:
            nodes, depth = nodes + len(level), depth + 1
            if nodes > MAX_NODES or depth > MAX_DEPTH:
                raise InvalidValue(f"the filter has more than {MAX_NODES:,} parts, or {MAX_DEPTH} levels")
            level = [child for node in level for child in ast.iter_child_nodes(node)]

    def _place(self, line: int, column: int) -> int:
        """Count characters from the start, given a line from 1 on and the characters before in it."""
        before = sum(map(len, self._text.splitlines(keepends=True)[: line - 1]))
        return min(max(before + column - (line == 1), 0), len(self._text.rstrip()))

    def _fail(self, what: str, place: int) -> NoReturn:
        start = max(place - SHOWN // 2, 0)
        shown = re.sub(r"\s", " ", self._text[start : start + SHOWN])
        raise InvalidValue(f"the filter can't be used: {what}\n  {shown}\n  {' ' * (place - start)}^")

    def _refuse(self, node: ast.AST, what: str) -> NoReturn:
        line, column = getattr(node, "lineno", 1), getattr(node, "col_offset", 1)
        # ast counts bytes; people look at characters.
        text = f"({self._text}\n)".splitlines()[line - 1]
        self._fail(what, self._place(line, len(text.encode()[:column].decode(errors="replace"))))

    def _condition(self, node: ast.expr) -> Condition:
        match node:
            case ast.BoolOp(op=op, values=values):
                parts = tuple(map(self._condition, values))
                return All(parts) if isinstance(op, ast.And) else Some(parts)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return Not(self._condition(operand))
            case ast.Compare():
                return self._comparison(node)
            case ast.Call():
                return self._call(node)
            case ast.Constant(value=bool(value)):
                return Truth(Constant(int(value)))
        return Truth(self._operand(node))

    def _comparison(self, node: ast.Compare) -> Condition:
        parts: list[Condition] = []
        left = node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            parts.append(self._compare(left, op, right))
            left = right
        return parts[0] if len(parts) == 1 else All(tuple(parts))

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Condition:
        if _is_none(left) or _is_none(right):
            return self._missing(left, op, right)
        match op:
            case ast.Is() | ast.IsNot():
                self._refuse(right, "`is` goes with None only; write == or !=")
            case ast.In():
                return self._within(left, right)
            case ast.NotIn():
                return Not(self._within(left, right))
        sign = _SIGNS[type(op)]
        one, other = self._operand(left), self._operand(right)
        return Compare(sign, self._dated(one, other, left), self._dated(other, one, right))

    def _missing(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Condition:
        value = right if _is_none(left) else left
        if _is_none(value) or not isinstance(op, (ast.Is, ast.IsNot, ast.Eq, ast.NotEq)):
            self._refuse(right, "with None there are `is None` and `is not None`")
        found = Missing(self._operand(value))
        return found if isinstance(op, (ast.Is, ast.Eq)) else Not(found)

    def _within(self, left: ast.expr, right: ast.expr) -> Condition:
        if isinstance(right, (ast.List, ast.Tuple, ast.Set)):
            value = self._operand(left)
            return OneOf(value, tuple(self._listed(each, value) for each in right.elts))
        if isinstance(left, ast.Constant) and isinstance(left.value, str):
            if isinstance(right, ast.Name) and right.id in (*MAPPINGS, "metrics"):
                return Has(keyed(right.id, left.value))
            return TextTest("contains", self._operand(right), left.value)
        what = "`in` takes a list like (1, 2), or a text before params, metadata, tags, metrics or a text"
        return self._refuse(right, what)

    def _listed(self, node: ast.expr, value: Operand) -> Value:
        found = self._dated(self._operand(node), value, node)
        if not isinstance(found, Constant):
            self._refuse(node, "a list holds numbers and texts only")
        return found.value

    def _dated(self, operand: Operand, other: Operand, node: ast.expr) -> Operand:
        """Read a text as a time where it stands beside one."""
        if isinstance(other, Path) and other.root in TIMES and isinstance(operand, Constant):
            if isinstance(operand.value, str):
                try:
                    return Constant(time_of(operand.value))
                except (ValueError, OverflowError, OSError):
                    self._refuse(node, "this is no time like '2026-11-21' or '2026-11-21T12:30'")
        return operand

    def _call(self, node: ast.Call) -> Condition:
        match node:
            case ast.Call(func=ast.Name(id=name), args=[value, text], keywords=[]):
                pass
            case ast.Call(func=ast.Attribute(value=value, attr=name), args=[text], keywords=[]):
                pass
            case _:
                self._refuse(node, f"the calls are {', '.join(TEXT_TESTS)}, as name.startswith('a')")
        if name not in TEXT_TESTS:
            self._refuse(node, f"the calls are {', '.join(TEXT_TESTS)}, as name.startswith('a')")
        if not isinstance(text, ast.Constant) or not isinstance(text.value, str):
            self._refuse(text, f"{name} takes a text, like 'abc'")
        if name == "matches":
            try:
                re.compile(text.value)
            except (re.error, OverflowError, RecursionError) as error:
                self._refuse(text, f"this is no regular expression: {error}")
        return TextTest(name, self._operand(value), text.value)

    def _operand(self, node: ast.expr) -> Operand:
        match node:
            case ast.Constant(value=bool(value)):
                return Constant(int(value))
            case ast.Constant(value=int(value) | float(value) | str(value)):
                return Constant(value)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return Arithmetic("+", Constant(0), self._operand(operand))
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value) | float(value))):
                return Constant(-value)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return Arithmetic("-", Constant(0), self._operand(operand))
            case ast.BinOp(left=left, op=op, right=right):
                if type(op) not in _RECKONINGS:
                    self._refuse(node, "the arithmetic is + - * /")
                return Arithmetic(_RECKONINGS[type(op)], self._operand(left), self._operand(right))
            case ast.Name() | ast.Attribute() | ast.Subscript():
                return self._path(node)
        return self._refuse(node, f"{type(node).__name__} isn't part of the filter language")

    def _path(self, node: ast.expr) -> Path:
        names: list[str] = []
        here = node
        while not isinstance(here, ast.Name):
            match here:
                case ast.Attribute(value=inner, attr=attr):
                    names.append(attr)
                case ast.Subscript(value=inner, slice=ast.Constant(value=str(key))):
                    names.append(key)
                case _:
                    self._refuse(here, "a name is written params.lr or params['opt/lr']")
            here = inner
        names.reverse()
        if here.id in OWN and not names:
            return Path(here.id)
        if here.id in MAPPINGS and names:
            return keyed(here.id, "/".join(names))
        if here.id == "metrics" and names:
            return self._metric(node, names)
        if here.id in (*MAPPINGS, "metrics"):
            self._refuse(node, f"which of the {here.id}? write {here.id}.NAME or {here.id}['NAME']")
        if here.id in OWN:
            self._refuse(node, f"{here.id} is a value by itself and has no parts")
        return self._refuse(
            node, f"there is no {here.id!r}; there are {', '.join((*OWN, *MAPPINGS, 'metrics'))}"
        )

    def _metric(self, node: ast.expr, names: list[str]) -> Path:
        if len(names) > 1 and names[-1] in STATISTICS and isinstance(node, ast.Attribute):
            return Path("metrics", "/".join(names[:-1]), names[-1])
        return Path("metrics", "/".join(names), "last")


_SIGNS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
_RECKONINGS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
