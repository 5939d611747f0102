"""Filters: what is read, what is refused, and that SQL and Python give the same answer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import eventrun
from eventrun.errors import InvalidType, InvalidValue
from eventrun.filters import holds, parse
from eventrun.filters.parsing import MAX_LENGTH


@pytest.fixture(scope="module")
def client() -> Iterator[eventrun.Client]:
    """Give a store with trials that differ in everything a filter can ask for."""
    with eventrun.open("memory:", quiet=True) as client:
        for n in range(24):
            params: dict[str, Any] = {
                "lr": 10.0**-n,
                "opt": {"name": ("adam", "sgd")[n % 2]},
                "n": n,
                "on": n % 3 == 0,
            }
            if n % 4 == 0:
                params |= {
                    "layers": [1, 2],
                    "none": None,
                    "opt/wd": 0.5 * n,
                    "text": f"é{n}",
                    "huge": 2**63 + n,
                }
            tags: dict[str, Any] = {"owner": "ann", "level": n} if n % 5 == 0 else {"baseline": None}
            trial = client.trial(
                f"p{n % 2}", group=("", "g")[n % 2], name=f"trial {n}", params=params, tags=tags,
                metadata={"host": f"h{n % 3}"}, version="7" if n % 6 else None, description="x" * (n % 3),
            )  # fmt: skip
            if n % 7 == 6:
                continue
            with pytest.MonkeyPatch.context():
                try:
                    with trial:
                        for step in range(n % 4):
                            trial.log(
                                {"loss": n / (step + 1), "train": {"acc": math.nan if n == 3 else step}},
                                step=step,
                            )
                        trial.log(word="good", inf=math.inf)
                        if n % 8 == 7:
                            raise ArithmeticError("too bad")
                except ArithmeticError:
                    pass
        yield client


def names(client: eventrun.Client, where: Any, **more: Any) -> list[int]:
    """Return the numbers of the chosen trials."""
    return [int(state.name.split()[1]) for state in client.trials(where=where, **more)]


ALL = list(range(24))


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("params.n < 3", [0, 1, 2]),
        ("0 < params.n <= 3", [1, 2, 3]),
        ("params.n in (5, 7, 99)", [5, 7]),
        ("params.n not in [0, 1] and params.n < 4", [2, 3]),
        ("'baseline' in tags and params.n < 6", [1, 2, 3, 4]),
        ("'baseline' not in tags", [0, 5, 10, 15, 20]),
        ("tags['owner'] == 'ann'", [0, 5, 10, 15, 20]),
        ("tags.level > 5", [10, 15, 20]),
        ("params.opt.name == 'sgd' and params['n'] < 6", [1, 3, 5]),
        ("params['opt/name'].startswith('s') and params.n < 6", [1, 3, 5]),
        ("params['opt/wd'] >= 10", [20]),
        ("params.on and params.n < 8", [0, 3, 6]),
        ("not params.on and params.n < 4", [1, 2]),
        ("params.none is None", ALL),
        ("'none' in params", [0, 4, 8, 12, 16, 20]),
        ("params.layers is not None and params.n < 9", [0, 4, 8]),
        ("params.layers == 1", []),
        ("params.missing < 1", []),
        ("not params.missing < 1", []),
        ("params.missing is None and params.n == 1", [1]),
        ("params.text == 'é8'", [8]),
        ("contains(params.text, '1')", [12, 16]),
        ("params.text.endswith('0')", [0, 20]),
        ("params.text.matches('^é[48]$')", [4, 8]),
        ("'6' in params.text", [16]),
        ("params.lr == 'adam'", []),
        ("params.lr != 'adam'", ALL),
        ("params.lr < 'adam'", []),
        ("params.n + 1 == 2 * 3 - params.n / 5 * 5", []),
        ("params.n * 2 == 10", [5]),
        ("params.n / 2 == 2.5", [5]),
        ("params.n / 0 == 1", []),
        ("-params.n == -4", [4]),
        ("params.huge > 9223372036854775807 - 1", [0, 4, 8, 12, 16, 20]),
        ("params.n == tags.level", [0, 5, 10, 15, 20]),
        ("params.n > metrics.loss.last * 2 and params.n > 20", [23]),
        ("metrics.loss.last < 2", [1, 2, 3]),
        ("metrics['train/acc'].max == 2 and params.n < 12", [7, 11]),
        ("metrics.train.acc.count == 1", [1, 5, 9, 17, 21]),
        ("metrics['train/acc'].last is None and 'train/acc' in metrics", [3]),
        ("metrics.inf > 1e300 and params.n < 3", [0, 1, 2]),
        ("metrics.word == 'good'", []),
        ("metrics.loss is None and params.n < 9", [0, 4, 6, 8]),
        ("status == 'failed'", [7, 15, 23]),
        ("error.contains('bad')", [7, 15, 23]),
        ("status in ('created', 'failed') and params.n > 12", [13, 15, 20, 23]),
        ("project == 'p1' and group == 'g' and params.n < 4", [1, 3]),
        ("created > '2020-01-01' and finished is None", [6, 13, 20]),
        ("created < '2020-01-01T12:30'", []),
        ("version is None and params.n < 7", [0, 6]),
        ("description == 'xx' and params.n < 6", [2, 5]),
        ("duration >= 0 and started <= finished and params.n < 2", [0, 1]),
        ("name == 'trial 3' or (name == 'trial 4' and True)", [3, 4]),
        ("metadata.host == 'h1' and params.n < 6", [1, 4]),
        (" params.n\n== 3 ", [3]),
        ({"params.n": 3}, [3]),
        ({"params.n": {"$in": [1, 2]}}, [1, 2]),
        ({"params.n": {"$gt": 1, "$lte": 3}}, [2, 3]),
        ({"params.n": {"$lt": 2}, "params.opt.name": {"$ne": "adam"}}, [1]),
        ([("params.n", {"$gte": 22}), ("project", "p0")], [22]),
        ({"$or": [{"params.n": 1}, {"name": "trial 2"}]}, [1, 2]),
        ({"params.huge": {"$exists": True}, "params.n": {"$lt": 5}}, [0, 4]),
        ({"name": {"$regex": "^trial 2.$"}}, [20, 21, 22, 23]),
        ({"metrics.loss.min": {"$lt": 1}}, []),
        ({"status": {"$nin": ["completed", "created"]}}, [7, 15, 23]),
        ({}, ALL),
    ],
)
def test_what_a_filter_chooses(client: eventrun.Client, where: Any, expected: list[int]) -> None:
    """Each filter chooses these trials, and a state that is asked says the same."""
    assert names(client, where) == expected
    condition = parse(where)
    assert [n for n, state in enumerate(client.trials()) if holds(condition, state) is True] == expected


def test_with_order_limit_and_offset(client: eventrun.Client) -> None:
    """A filter goes with order, limit, offset and the other choices, and with the past."""
    assert names(client, "params.n > 10", order_by="-params.n", limit=3, offset=1) == [22, 21, 20]
    assert names(client, "params.n > 10", project="p1", limit=2) == [11, 13]
    past = client.at(position=10**6).trials(where="params.n == 3")
    assert [state.name for state in past] == ["trial 3"]


REFUSED = [
    "__import__('os').system('true')", "name.__class__", "().__class__.__bases__", "params.lr.__class__ == 1 or f()",
    "[x for x in params]", "lambda: 1", "params[0]", "params[name]", "name[0]", "exec('1')", "open('/etc/passwd')",
    "startswith(name)", "name.startswith('a', 'b')", "name.startswith(text='a')", "name.upper() == 'A'",
    "1 if name else 2", "f'{name}'", "name := 'x'", "name == b'x'", "params", "metrics", "'x' in status in tags",
    "params.n ** 99", "params.n % 2", "params.n // 2", "~params.n", "params.n is 3", "None is None",
    "params.n < None", "nothing == 1", "tags[1:2]", "*name", "await name", "(yield)", "name == ...", "1j == params.n",
    "", "  ", "name ==", "name = 'x'", "import os", "name; name", "created > 'yesterday'", "name.matches('(')",
    "name in (project, 'x')", "params.n in ((1, 2), 3)", "name.matches(name)", "1 in [", "{'a': 1}", "{**params}",
    "print", "params.n in 3", "type(name)", "name.startswith", "\x00",
]  # fmt: skip


@pytest.mark.parametrize("where", REFUSED)
def test_what_is_refused(where: str) -> None:
    """Anything but the listed parts of the language is refused, with a mark under the place."""
    with pytest.raises(InvalidValue) as caught:
        parse(where)
    if where.strip() and where != "\x00":
        assert str(caught.value).splitlines()[-1].strip() == "^", caught.value


def test_the_mark_stands_under_the_fault() -> None:
    """The caret is under the character, also after letters of several bytes and on a later line."""
    with pytest.raises(InvalidValue) as caught:
        parse("params['é'] == 1\nand params.é < nothing.x")
    _, line, mark = str(caught.value).splitlines()
    assert line[mark.index("^") :].startswith("nothing")


@pytest.mark.parametrize(
    "where",
    ["(" * 5_000 + "1" + ")" * 5_000, "-" * 9_000 + "1", "not " * 2_400 + "name", "x" * (MAX_LENGTH + 1),
     "1<" * 4_000 + "1", "name == 'a'" + " or name == 'a'" * 600, "params" + ".a" * 4_000, "1" + "+1" * 4_000,
     "9" * 9_000 + " == params.n"],
)  # fmt: skip
def test_deep_and_long_filters_are_refused(where: str) -> None:
    """Depth and length end in our error, never in another."""
    with pytest.raises(InvalidValue):
        parse(where)


@pytest.mark.parametrize(
    "query",
    [{"params.n": {"$where": "1"}}, {"nothing": 1}, {"params": 1}, {"params.n": {"$in": 3}}, {"params.n": [1]},
     {"$or": []}, {"$or": {"name": "x"}}, ["name"], [("name",)], {3: 4}, {"name": {"$regex": "("}}, {"name": b"x"},
     {"created": {"$gt": "soon"}}, {"params.n": {"$lt": None}}],
)  # fmt: skip
def test_refused_queries(query: Any) -> None:
    """A query that means nothing is refused."""
    with pytest.raises(InvalidValue):
        parse(query)


def test_other_types_are_refused() -> None:
    """A filter is a text or a mapping."""
    with pytest.raises(InvalidType):
        parse(3)  # type: ignore[arg-type]


paths = st.sampled_from(
    ["params.n", "params.lr", "params.opt.name", "params.huge", "params.none", "params.layers", "tags.level",
     "tags.owner", "metrics.loss.last", "metrics['train/acc'].mean", "metrics.inf", "metrics.word", "name", "status",
     "error", "version", "duration", "finished", "attempt", "events", "description"]
)  # fmt: skip
constants = st.one_of(
    st.integers(-3, 30), st.floats(allow_nan=False, allow_infinity=False, width=32).map(abs), st.integers(2**62, 2**64),
    st.sampled_from(["adam", "", "é8", "trial 3", "7"]),
).map(repr)  # fmt: skip
operands = st.recursive(
    st.one_of(paths, constants),
    lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from("+-*/"), inner),
    max_leaves=4,
)
signs = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
tests = st.one_of(
    st.builds("{} {} {}".format, operands, signs, operands),
    st.builds("{} {} {} {} {}".format, operands, signs, operands, signs, operands),
    st.builds("{} {} None".format, operands, st.sampled_from(["is", "is not"])),
    st.builds("{} {} ({},{},)".format, operands, st.sampled_from(["in", "not in"]), constants, constants),
    st.builds("{}({}, {!r})".format, st.sampled_from(["startswith", "endswith", "contains", "matches"]), operands,
              st.sampled_from(["a", "", "3", "é", "tri.l"])),
    st.builds("{!r} in {}".format, st.sampled_from(["n", "none", "level", "baseline", "loss", "x"]),
              st.sampled_from(["params", "tags", "metrics", "metadata"])),
    operands,
)  # fmt: skip
filters = st.recursive(
    tests,
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["and", "or"]), inner),
        st.builds("(not {})".format, inner),
    ),
    max_leaves=5,
)


@given(where=filters)
def test_sql_and_python_agree(client: eventrun.Client, where: str) -> None:
    """Whatever the expression, SQL over the views chooses what each state, asked alone, says of itself."""
    try:
        condition = parse(where)
    except InvalidValue:  # a text where a time stands beside it
        assert "time" in where or "finished" in where
        return
    expected = [n for n, state in enumerate(client.trials()) if holds(condition, state) is True]
    assert names(client, where) == expected
