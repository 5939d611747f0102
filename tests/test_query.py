"""Reading: lists, single trials, series, events, and all of it as of a moment of the past."""

import gc
import math
import random
import sys
from array import array
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eventrun import damage
from eventrun.codec import Batch, Item, StoredEvent, Stream
from eventrun.errors import Ambiguous, InvalidValue, LogDamaged, MissingExtra, NotFound, StoreUnavailable
from eventrun.events import (
    ChronoFinished,
    DescriptionSet,
    GroupCreated,
    MetricsLogged,
    ParamsSet,
    ProjectCreated,
    TagsAdded,
    TagsRemoved,
    TrialCreated,
    TrialFinished,
    TrialStarted,
    WriterEnded,
    group_subject,
    project_subject,
    trial_subject,
)
from eventrun.pending import Query
from eventrun.portal import Portal
from eventrun.projections import Projection, Slice, TrialFold, TrialState, fold
from eventrun.query import Reader, Series, listing, thinning
from eventrun.query.reads import Reads
from eventrun.stores import open_store
from eventrun.stores.base import Store, StoredBatch
from eventrun.testing import chain, scalars

T = TypeVar("T")
NAN = math.nan
HOUR = 3600 * 10**9


class Lab:
    """A memory store, what to append to it, and its reader."""

    def __init__(self, **options: Any) -> None:
        self.store: Store = open_store("memory:")
        self.reads: list[tuple[int, str | None]] = []
        self.reader = Reader(None, read=self.read, end=lambda: self.wait(self.store.end()), **options)
        self._last: dict[Stream, Batch] = {}

    def wait(self, answer: Coroutine[Any, Any, T]) -> T:
        """Take the answer: the memory store's coroutines never wait."""
        try:
            answer.send(None)
        except StopIteration as done:
            return cast(T, done.value)
        raise AssertionError("it waits")

    def read(
        self, after: int, *, subject: str | None = None, limit_bytes: int = 1 << 20
    ) -> list[StoredBatch]:
        self.reads.append((after, subject))
        return self.wait(self.store.read(after, subject=subject, limit_bytes=limit_bytes))

    def append(self, stream: Stream, *groups: Sequence[Item]) -> int:
        """Append a batch of each group of items, and return the position of the last one."""
        batches = chain(stream, groups, self._last.get(stream))
        self._last[stream] = batches[-1]
        return self.wait(self.store.append(batches))

    def trial(
        self, trial: str, time_ns: int = 0, project: str = "p", group: str = "", **happened: Any
    ) -> int:
        """Record a trial: its name, params, tags, metrics, and finish."""
        created = TrialCreated(project, group, happened.get("name", trial))
        items: list[Item] = [(time_ns, created), (time_ns, TrialStarted())]
        if "params" in happened:
            items.append((time_ns, ParamsSet(happened["params"])))
        if "tags" in happened:
            items.append((time_ns, TagsAdded(dict.fromkeys(happened["tags"]))))
        items += [
            (time_ns + n, MetricsLogged(values, step=n))
            for n, values in enumerate(happened.get("metrics", []))
        ]
        if "finish" in happened:
            items.append((time_ns + 100, TrialFinished(happened["finish"])))
        return self.append(Stream(trial_subject(trial), 1), items)


@contextmanager
def opened(**options: Any) -> Iterator[Lab]:
    lab = Lab(**options)
    try:
        yield lab
    finally:
        lab.reader.close()


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab with nothing recorded."""
    with opened() as lab:
        yield lab


def everything(ask: Callable[..., Any], start: Any = 0, **chosen: Any) -> list[Any]:
    """Go through all pages."""
    found: list[Any] = []
    cursor: Any = start
    while cursor is not None:
        items, cursor = ask(cursor, **chosen)
        found += items
    return found


def ids(reads: Reads, **chosen: Any) -> list[str]:
    return [state.id for state in everything(reads.trials, **chosen)]


# lists ---------------------------------------------------------------------------------------------------------


def record_five(lab: Lab) -> None:
    a: dict[str, Any] = {"name": "first", "params": {"lr": 0.1, "net": {"size": 3}}, "tags": ["good", "x"]}
    lab.trial("a", 50, "p", "g1", metrics=[{"loss": 0.5}], **a)
    b: dict[str, Any] = {"name": "second", "params": {"lr": 10}, "tags": ["good"], "finish": "completed"}
    lab.trial("b", 40, "p", "g2", metrics=[{"loss": NAN}], **b)
    c: dict[str, Any] = {"name": "third", "params": {"lr": "high"}, "finish": "failed"}
    lab.trial("c", 30, "q", "g1", metrics=[{"loss": 0.1}, {"loss": 9}], **c)
    lab.trial("d", 20, "q", name="fourth", metrics=[{"acc": 1}])
    e: dict[str, Any] = {"name": "first", "params": {"lr": True}, "tags": ["x"], "finish": "odd word"}
    lab.trial("e", 10, "q", metrics=[{"loss": math.inf}], **e)


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        ({}, "edcba"),
        ({"project": "p"}, "ba"),
        ({"project": "q", "group": "g1"}, "c"),
        ({"group": ""}, "ed"),
        ({"status": "running"}, "da"),
        ({"status": "completed"}, "eb"),
        ({"tag": "good"}, "ba"),
        ({"tag": "goo"}, ""),
        ({"tag": "x", "project": "q"}, "e"),
        ({"name": "first"}, "ea"),
        ({"project": "nowhere"}, ""),
        ({"order_by": "-created"}, "abcde"),
        ({"order_by": "name"}, "eadbc"),
        ({"order_by": "-name"}, "cbdea"),
        ({"order_by": "metrics.loss.last"}, "acedb"),
        ({"order_by": "-metrics.loss"}, "ecadb"),
        ({"order_by": "metrics.loss.min"}, "caedb"),
        ({"order_by": "params.lr"}, "aebcd"),
        ({"order_by": "-params.lr"}, "cbead"),
        ({"order_by": "params.net.size"}, "aedcb"),
        ({"order_by": "params.net/size", "limit": 1}, "a"),
        ({"order_by": "finished"}, "ecbda"),
        ({"order_by": "-status", "limit": 2}, "da"),
        ({"order_by": "tags.good"}, "edcba"),
        ({"limit": 2}, "ed"),
        ({"limit": 0}, ""),
        ({"offset": 3}, "ba"),
        ({"limit": 1, "offset": 1, "project": "q"}, "d"),
        ({"order_by": "name", "limit": 2, "offset": 1}, "ad"),
        ({"offset": 9}, ""),
    ],
)
@pytest.mark.parametrize("page", [1, 2, 1000])
def test_trials_are_chosen_and_ordered(lab: Lab, chosen: dict[str, Any], found: str, page: int) -> None:
    """Whatever the page size; missing values and NaN come last both ways, of equals the older trial comes first."""
    record_five(lab)
    with mock.patch.multiple(listing, PAGE=page, FIRST_PAGE=page):
        assert "".join(ids(lab.reader, **chosen)) == found


@pytest.mark.parametrize(
    "chosen",
    [
        {"order_by": "loss"}, {"order_by": ""}, {"order_by": "params"}, {"order_by": "metrics."}, {"limit": -1},
        {"offset": -1}, {"status": "Running"},
    ],
)  # fmt: skip
def test_a_list_that_makes_no_sense_is_refused(lab: Lab, chosen: dict[str, Any]) -> None:
    """The error says what can be asked."""
    with pytest.raises(InvalidValue):
        lab.reader.trials(0, **({"order_by": chosen["order_by"] or "-"} if "order_by" in chosen else chosen))


def test_a_trial_recorded_between_two_pages_shifts_nothing(lab: Lab) -> None:
    """No trial comes twice or is left out, in the order of creation and in any other."""
    for n in range(6):
        lab.trial(f"t{n}", 10 * n, metrics=[{"loss": n}])
    for order, expected in (("created", "012345"), ("-created", "543210"), ("-metrics.loss", "543210")):
        with mock.patch.multiple(listing, PAGE=2, FIRST_PAGE=2):
            first, cursor = lab.reader.trials(0, order_by=order)
            lab.trial(f"new{order}", 25, metrics=[{"loss": 2.5}])
            rest = everything(lab.reader.trials, cursor)
        old = [state.id[1] for state in [*first, *rest] if state.id.startswith("t")]
        assert "".join(old) == expected


def test_trials_without_a_beginning_come_last(lab: Lab) -> None:
    """A trial of which only another rank's events have come is listed, after the others, whatever the direction."""
    lab.append(Stream(trial_subject("rank"), 2), [(5, MetricsLogged({"loss": 1.0}))])
    lab.trial("whole", 10)
    assert ids(lab.reader) == ids(lab.reader, order_by="-created") == ["whole", "rank"]
    assert ids(lab.reader, offset=1) == ["rank"]
    assert ids(lab.reader, offset=2) == []


def test_any_tag_is_found(lab: Lab) -> None:
    """Also one that holds the character between tags; never one that merely looks alike."""
    lab.trial("a", 1, tags=["one\x1ftwo"])
    lab.trial("b", 2, tags=["one", "two"])
    lab.trial("c", 3, tags=["one\x1e-two", "%"])
    assert ids(lab.reader, tag="one\x1ftwo") == ["a"]
    assert ids(lab.reader, tag="one") == ["b"]
    assert ids(lab.reader, tag="one\x1e-two") == ["c"]
    lab.append(Stream(trial_subject("b"), 1), [(4, TagsRemoved(["one"]))])
    assert ids(lab.reader, tag="one") == []


def test_queries_wait_in_both_ways(lab: Lab) -> None:
    """Pages serve pending.Query: for, list, first."""
    record_five(lab)
    portal = Portal()
    query: Query[TrialState] = Query(
        lambda cursor: portal.read(partial(lab.reader.trials, cursor, project="q"))
    )
    with mock.patch.multiple(listing, PAGE=1, FIRST_PAGE=1):
        assert [state.id for state in query] == ["e", "d", "c"]
        first = query.first().result()
        assert first is not None
        assert first.id == "e"
        none = Query(lambda cursor: portal.read(partial(lab.reader.trials, cursor, project="z"))).first()
        assert none.result() is None
    portal.read(lab.reader.close).result()
    portal.stop()


# one trial -----------------------------------------------------------------------------------------------------


def test_a_trial_is_found_by_what_names_it(lab: Lab) -> None:
    """Its id, before its name, before the beginning of its id; @latest is the one created last."""
    lab.trial("aa11", 30, name="net")
    lab.trial("aa22", 20, name="aa11")
    lab.trial("bb33", 10, name="tree")
    reader = lab.reader
    found = {text: reader.trial(text).id for text in ("aa11", "net", "tree", "aa2", "b", "@latest")}
    assert found == {
        "aa11": "aa11",
        "net": "aa11",
        "tree": "bb33",
        "aa2": "aa22",
        "b": "bb33",
        "@latest": "aa11",
    }


def test_a_name_of_several_trials_is_ambiguous(lab: Lab) -> None:
    """The error names the candidates, with where they are; so it does for the beginning of several ids."""
    lab.trial("aa11", 1, "p", "g", name="net")
    lab.trial("aa22", 2, "q", name="net")
    for text in ("net", "aa"):
        with pytest.raises(Ambiguous) as caught:
            lab.reader.trial(text)
        assert "aa11 (p/g/net), aa22 (q/net)" in str(caught.value)


@pytest.mark.parametrize("text", ["nett", "zz", "", "@last", "%", "aa1\0"])
def test_a_trial_that_is_not_there(lab: Lab, text: str) -> None:
    """NotFound, with near names if there are any."""
    with pytest.raises(NotFound, match="no trial"):
        lab.reader.trial("@latest")
    lab.trial("aa11", 1, name="net")
    with pytest.raises(NotFound) as caught:
        lab.reader.trial(text)
    assert not isinstance(caught.value, Ambiguous)
    assert ("'net'" in str(caught.value)) == (text == "nett")


# series --------------------------------------------------------------------------------------------------------


def logged(lab: Lab, values: Sequence[Any], steps: Sequence[Any] | None = None) -> Series:
    """Log values of one metric, and read them back."""
    chosen = range(len(values)) if steps is None else steps
    points = zip(values, chosen, strict=True)
    items = [(100 + n, MetricsLogged({"m": m}, step=step, epoch=1.5)) for n, (m, step) in enumerate(points)]
    lab.append(Stream(trial_subject("t"), 1), [(1, TrialCreated("p", "", "t"))], items)
    return lab.reader.history("t", "m")


@pytest.mark.parametrize(
    "values",
    [
        [0.5, NAN, -0.0, math.inf], [1, -(2**63), 5], [2**64 - 1, 1], [True, False], ["a", "b\0"], [None, None],
        [1, 1.0, True, "x", None, NAN],
    ],
)  # fmt: skip
@pytest.mark.parametrize("times", [1, 700])
def test_a_series_holds_what_was_logged(lab: Lab, values: list[Any], times: int) -> None:
    """Every value with its type, in order of arrival, over full chunks and the open one."""
    values = values * times
    series = logged(lab, values)
    assert repr(series.values) == repr(values)
    assert series.steps == list(range(len(values)))
    assert series.epochs == [1.5] * len(values)
    assert series.times_ns == [100 + n for n in range(len(values))]
    assert series.sequences == [2 + n for n in range(len(values))]
    assert len(series) == len(values)
    assert repr(list(series)[:2]) == repr(list(enumerate(values))[:2])
    assert series.to_dict()["steps"] == series.steps
    assert series == lab.reader.history("t", "m")
    assert series != lab.reader.history("t", "m", between=(1, None))


@given(
    st.lists(st.tuples(scalars(), st.none() | st.integers(-3, 2**63) | st.floats()), min_size=1, max_size=30)
)
def test_any_series_comes_back(points: list[tuple[Any, Any]]) -> None:
    """Whatever values and steps are mixed."""
    homes = ("eventrun.projector.series", "eventrun.projector.catchup", "eventrun.query.reads")
    with opened() as lab, ExitStack() as small:
        for home in homes:
            small.enter_context(mock.patch(f"{home}.CHUNK", 4))
        series = logged(lab, [value for value, _ in points], [step for _, step in points])
        assert repr(list(series)) == repr([(step, value) for value, step in points])


def test_a_metric_that_is_not_there(lab: Lab) -> None:
    """NotFound names near ones, or those there are."""
    lab.trial("a", 1, metrics=[{"train/loss": 1.0, "acc": 2}])
    lab.trial("b", 2)
    for trial, metric, hint in (
        ("a", "train/los", "'train/loss'"),
        ("a", "zz", "train/loss, acc"),
        ("b", "x", "none"),
    ):
        with pytest.raises(NotFound, match=hint):
            lab.reader.history(trial, metric)
    with pytest.raises(NotFound):
        lab.reader.history("c", "acc")


NUMBERS = st.lists(st.floats() | st.floats(-1, 1), min_size=1, max_size=60)
AXES = st.one_of(
    st.none(),
    st.lists(st.integers(-50, 50), min_size=60, max_size=60),
    st.lists(st.none() | st.floats() | st.integers(0, 9), min_size=60, max_size=60),
)


BOUNDS = st.none() | st.floats(-60, 60)


@given(NUMBERS, AXES, st.integers(1, 7), st.none() | st.tuples(BOUNDS, BOUNDS))
@example([0.0] * 40, [-1.7e308, *range(38), 1.7e308], 3, None)
def test_thinning_keeps_extremes_and_ends(values: list[float], axis: Any, buckets: int, between: Any) -> None:
    """At most four points a bucket; each bucket keeps its lowest, highest, first and last, NaN or not."""
    steps = list(range(len(values))) if axis is None else axis[: len(values)]
    kept = thinning.thin(steps, values, buckets, between)
    xs = [float(n if step is None or not math.isfinite(step) else step) for n, step in enumerate(steps)]
    low, high = between or (None, None)
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    chosen = [n for n, x in enumerate(xs) if low <= x <= high]
    assert list(kept) == sorted(set(kept))
    assert set(kept) <= set(chosen)
    assert len(kept) <= 4 * buckets
    if chosen:
        assert min(xs[n] for n in kept) == min(xs[n] for n in chosen)
        assert max(xs[n] for n in kept) == max(xs[n] for n in chosen)
    comparable = [values[n] for n in chosen if values[n] == values[n]]
    if comparable:
        left = [values[n] for n in kept if values[n] == values[n]]
        assert (min(left), max(left)) == (min(comparable), max(comparable))


@given(NUMBERS, st.integers(1, 7), st.integers(-2, 3), st.booleans())
def test_numpy_thins_alike(values: list[float], buckets: int, step: int, ints: bool) -> None:
    """The same points with numpy as without."""
    column: Any = array("d", values)
    if ints:
        column = array("q", [int(v * 1000) if abs(v) < 1e15 else 0 for v in values])
    steps: Any = range(0, step * len(values), step or 1)
    if not step:
        steps = array("d", [abs(math.sin(n)) for n in range(len(values))])
    assert list(thinning._thin_numpy(steps, column, buckets, -5.0, 40.0)) == list(
        thinning._thin_pure(steps, column, buckets, -5.0, 40.0)
    )


def test_a_long_series_is_thinned(lab: Lab) -> None:
    """A spike among many points stays, in order of arrival; so does a range of steps in full."""
    values = [math.sin(n / 50) for n in range(5000)]
    values[1234], values[4321] = 99.0, NAN
    logged(lab, values)
    thinned = lab.reader.history("t", "m", points=20)
    assert len(thinned) <= 80
    assert (thinned.steps[0], thinned.steps[-1]) == (0, 4999)
    assert thinned.steps == sorted(cast(list[int], thinned.steps))
    assert (1234, 99.0) in list(thinned)
    assert lab.reader.history("t", "m", between=(10, 12)).steps == [10, 11, 12]
    assert len(lab.reader.history("t", "m", between=(None, None))) == 5000
    with pytest.raises(InvalidValue):
        lab.reader.history("t", "m", points=0)


def test_text_and_none_are_no_extremes(lab: Lab) -> None:
    """They may be first or last of a bucket; they never hide a number."""
    series = logged(lab, [*["x", None] * 50, 7, True, *[None, "y"] * 50])
    assert {7, True} <= set(series.thinned(2).values)


# tables --------------------------------------------------------------------------------------------------------

TABLES: list[tuple[list[Any], list[Any], str, str, list[str]]] = [
    # values, steps, arrow's and pandas' type of value, columns
    ([0.5, NAN], [1, 2], "double", "float64", ["step", "epoch", "time", "value", "sequence"]),
    ([1, 2], [1, None], "int64", "int64", ["step", "epoch", "time", "value", "sequence"]),
    ([True, False], [1, 2.5], "bool", "bool", ["step", "epoch", "time", "value", "sequence"]),
    ([1, None], [1, 2], "int64", "Int64", ["step", "epoch", "time", "value", "sequence"]),
    ([1, 0.5, None, NAN], [1, 2, 3, 4], "double", "Float64", ["step", "epoch", "time", "value", "sequence"]),
    ([1, "x"], [1, 2], "double", "Float64", ["step", "epoch", "time", "value", "text", "sequence"]),
    ([2**64 - 1, 1], [1, 2], "double", "float64", ["step", "epoch", "time", "value", "sequence"]),
]


@pytest.mark.parametrize(("values", "steps", "kind", "_", "columns"), TABLES)
def test_arrow_tables(
    lab: Lab, values: list[Any], steps: list[Any], kind: str, _: str, columns: list[str]
) -> None:
    """Types are as documented, NaN and null are kept apart."""
    pytest.importorskip("pyarrow")
    table = logged(lab, values, steps).to_arrow()
    assert table.column_names == columns
    types = {name: str(table.schema.field(name).type) for name in columns}
    assert types["value"] == kind
    assert types["time"] == "timestamp[ns, tz=UTC]"
    assert types["step"] == ("double" if 2.5 in steps else "int64")
    assert types["sequence"] == "int64"
    expected = [float(v) if kind == "double" and v is not None and v != "x" else v for v in values]
    assert repr(table["value"].to_pylist()) == repr([None if v == "x" else v for v in expected])
    assert table["step"].to_pylist() == steps
    if "text" in columns:
        assert table["text"].to_pylist() == [None, "x"]


@pytest.mark.parametrize(("values", "steps", "_", "kind", "columns"), TABLES)
def test_pandas_frames(
    lab: Lab, values: list[Any], steps: list[Any], _: str, kind: str, columns: list[str]
) -> None:
    """Types are as documented, NaN and null are kept apart."""
    pandas = pytest.importorskip("pandas")
    frame = logged(lab, values, steps).to_pandas()
    assert list(frame.columns) == columns
    assert str(frame["value"].dtype) == kind
    assert str(frame["time"].dtype) == "datetime64[ns, UTC]"
    assert frame["time"][0].value == 100
    assert str(frame["step"].dtype) == ("Int64" if None in steps else "float64" if 2.5 in steps else "int64")
    missing = [value is None or value == "x" for value in values]
    assert [value is pandas.NA for value in frame["value"]] == missing


@pytest.mark.parametrize(("package", "method"), [("pyarrow", "to_arrow"), ("pandas", "to_pandas")])
def test_tables_need_an_extra(monkeypatch: pytest.MonkeyPatch, package: str, method: str) -> None:
    """Without the package the error names what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"eventrun\["):
        getattr(Series("t", "m"), method)()


def test_an_empty_series() -> None:
    """It has no points and equals another."""
    empty = Series("t", "m")
    assert (len(empty), list(empty), empty.values) == (0, [], [])
    assert empty == Series("t", "m") != Series("t", "n")
    assert len(empty.thinned(5)) == 0


# groups and projects -------------------------------------------------------------------------------------------


def test_groups_and_projects(lab: Lab) -> None:
    """Each is listed once, by name, with its own events and the summary of its trials, or with no trial at all."""
    record_five(lab)
    lab.append(
        Stream(group_subject("p", "g1"), 1), [(1, GroupCreated("p", "g1")), (2, DescriptionSet("mine"))]
    )
    lab.append(Stream(group_subject("p", "empty/ü"), 1), [(1, GroupCreated("p", "empty/ü"))])
    lab.append(Stream(project_subject("z"), 1), [(1, ProjectCreated("z"))])
    groups = everything(lab.reader.groups)
    assert [(g.project, g.name, g.trials) for g in groups] == [
        ("p", "empty/ü", 0), ("p", "g1", 1), ("p", "g2", 1), ("q", "g1", 1)
    ]  # fmt: skip
    assert groups[1].description == "mine"
    assert [g.name for g in everything(lab.reader.groups, project="q")] == ["g1"]
    projects = everything(lab.reader.projects)
    assert [p.project for p in projects] == ["p", "q", "z"]
    assert projects[1].by_status == {"completed": 1, "failed": 1, "running": 1}
    assert projects[1].groups["g1"] == 1
    with mock.patch("eventrun.query.reads.GROUPS_PER_PAGE", 1):
        assert repr(everything(lab.reader.groups)) == repr(groups)


# events --------------------------------------------------------------------------------------------------------


def test_events_are_read_in_order(lab: Lab) -> None:
    """All or one trial's, after a position, at most so many, each with its place."""
    lab.trial("a", 1, metrics=[{"m": 1}] * 3)
    lab.trial("b", 2, metrics=[{"m": 1}] * 3)
    found = everything(lab.reader.events)
    assert [event.position for event in found] == list(range(1, 11))
    assert [event.sequence for event in found] == [1, 2, 3, 4, 5] * 2
    assert found[7] == StoredEvent(8, Stream("t/b", 1), 3, 2, MetricsLogged({"m": 1}, step=0))
    assert everything(lab.reader.events, 3) == found[3:]
    assert everything(lab.reader.events, 3, limit=4) == found[3:7]
    assert everything(lab.reader.events, limit=0) == []
    assert everything(lab.reader.events, 6, trial="b") == found[6:]
    assert everything(lab.reader.events, 99) == []
    with pytest.raises(NotFound):
        lab.reader.events(0, trial="c")


def test_a_tail_follows_the_log(lab: Lab) -> None:
    """From the end or from a position, of all or of one trial; an empty page says that nothing has come yet."""
    lab.trial("a", 1)
    cursors = {"end": -1, "start": 0, "one": 0}
    got: dict[str, list[int]] = {name: [] for name in cursors}
    more: dict[str, dict[str, Any]] = {"end": {}, "start": {}, "one": {"trial": "a"}}
    for n in range(4):
        for name, cursor in cursors.items():
            items, cursors[name] = lab.reader.tail(cursor, **more[name])
            got[name] += [event.position for event in items]
            assert lab.reader.tail(cursors[name], **more[name])[0] == []
        lab.trial(f"b{n}", 2)
        lab.append(Stream(trial_subject("a"), 1), [(9, MetricsLogged({"m": n}))])
    assert got == {"end": list(range(3, 12)), "start": list(range(1, 12)), "one": [1, 2, 5, 8, 11]}


def test_damage_reaches_whoever_reads(lab: Lab) -> None:
    """Events, tails and trials raise LogDamaged; what was folded before can be read without catching up."""
    lab.trial("a", 1)
    assert ids(lab.reader) == ["a"]
    lab.trial("b", 2)
    log = cast(Any, lab.store)._log
    frame = log[1].batch.frame
    log[1] = StoredBatch(3, type(log[1].batch)(log[1].batch.header, frame[:-3] + b"xyz"))
    asked: list[Callable[[], Any]] = [
        lambda: lab.reader.trials(0), lambda: lab.reader.trial("a"), lambda: everything(lab.reader.events),
        lambda: lab.reader.tail(0),
    ]  # fmt: skip
    for ask in asked:
        with pytest.raises(LogDamaged) as caught:
            ask()
        assert caught.value.where == ("positions 3..4",)
    assert ids(lab.reader, fresh=False) == ["a"]
    assert lab.reader.trial("a", fresh=False).id == "a"
    report = lab.reader.verify(views=True)
    assert str(report.problems[0]).startswith("positions 3..4")
    assert report.views_ok is None


# the past ------------------------------------------------------------------------------------------------------

VALUES = st.dictionaries(st.sampled_from("mn"), st.floats(-1, 1) | st.none(), min_size=1)
PAST_EVENTS = st.one_of(
    st.builds(MetricsLogged, VALUES, st.none() | st.integers(0, 3)),
    st.just(TrialStarted()),
    st.builds(TrialFinished, st.sampled_from(["completed", "failed"])),
    st.builds(WriterEnded, st.integers(1, 2), st.integers(0, 30)),
    st.builds(ChronoFinished, st.just("epoch"), st.floats(0, 1)),
    st.builds(TagsAdded, st.dictionaries(st.sampled_from("xy"), st.none())),
)
PAST_ITEMS = st.lists(st.tuples(st.integers(0, 30), PAST_EVENTS), min_size=1, max_size=6)
PAST_LOGS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 2), PAST_ITEMS), min_size=1, max_size=8)


def fold_by_hand(events: list[StoredEvent], trial: str) -> TrialFold:
    state = TrialFold.new(trial)
    for position, stream, sequence, time_ns, event in events:
        if stream.subject == trial_subject(trial):
            fold(state, [Slice(position, stream, sequence, [(time_ns, event)])])
    return state


@given(PAST_LOGS, st.integers(0, 40), st.integers(0, 35))
def test_the_past_is_the_fold_of_what_had_happened(batches: Any, position: int, time: int) -> None:
    """At a position, the prefix; at a time, all events not later, though clocks jump; snapshots change nothing."""
    with opened(snapshot_every=3) as lab:
        for trial, writer, items in batches:
            lab.append(Stream(trial_subject(trial), writer), items)
        events = everything(lab.reader.events)
        cuts: list[tuple[dict[str, Any], Callable[[StoredEvent], bool]]] = [
            ({"position": position}, lambda e: e.position <= position),
            ({"time": time}, lambda e: e.time_ns <= time),
            ({"position": position, "time": time}, lambda e: e.position <= position and e.time_ns <= time),
        ]
        for moment, counts in cuts:
            then = [event for event in events if counts(event)]
            past = lab.reader.at(**moment)
            assert everything(past.events) == then
            known = sorted({event.stream.subject[2:] for event in then})
            expected = {trial: fold_by_hand(then, trial).state() for trial in known}
            assert {state.id: state for state in everything(past.trials)} == expected
            for trial, state in expected.items():
                assert past.trial(trial) == state
                for metric in state.metrics:
                    assert past.history(trial, metric).values == values_by_hand(then, trial, metric)


def values_by_hand(events: list[StoredEvent], trial: str, metric: str) -> list[Any]:
    return [
        stored.event.values[metric]
        for stored in events
        if isinstance(stored.event, MetricsLogged) and stored.stream.subject == trial_subject(trial)
        and metric in stored.event.values
    ]  # fmt: skip


def test_a_snapshot_saves_reading(lab: Lab) -> None:
    """A trial's past begins at the last snapshot whose events all count, and reads that trial's batches only."""
    with opened(snapshot_every=100) as lab:
        stream = Stream(trial_subject("a"), 1)
        lab.append(stream, [(0, TrialCreated("p", "", "a"))])
        for n in range(50):
            lab.append(stream, [(10 * n + k, MetricsLogged({"m": k}, step=k)) for k in range(10)])
            lab.trial(f"other{n}", n)
        lab.reader.trial("a")
        lab.reads.clear()
        assert lab.reader.at(position=350).trial("a").metrics["m"].count == 291
        assert (300, "t/a") in lab.reads
        lab.append(stream, [(7, MetricsLogged({"m": 7.0}))])  # the clock was set back
        lab.reads.clear()
        assert lab.reader.at(time=255).trial("a").metrics["m"].count == 257
        assert (300, "t/a") in lab.reads
        assert (0, "t/a") not in lab.reads


def test_the_past_reads_like_the_present(lab: Lab) -> None:
    """Lists, groups, projects, names, errors: as of then."""
    lab.trial("aa", 10, "p", "g", name="net", metrics=[{"m": 1}])
    until = lab.trial("bb", 20, "p", name="net", tags=["x"])
    lab.trial("cc", 30, "q", name="net")
    lab.append(
        Stream(trial_subject("aa"), 1), [(40, MetricsLogged({"m": 2, "new": 1})), (50, TrialFinished())]
    )
    past = lab.reader.at(position=until)
    assert ids(past) == ["aa", "bb"]
    assert ids(past, tag="x") == ["bb"]
    assert past.trial("@latest").id == "bb"
    assert past.trial("aa").status == "running"
    assert [p.project for p in everything(past.projects)] == ["p"]
    assert [g.trials for g in everything(past.groups)] == [1]
    assert lab.reader.at(position=3).trial("net").id == "aa"
    assert everything(past.events, trial="aa", limit=2)[-1].position == 2
    with pytest.raises(Ambiguous):
        past.trial("net")
    with pytest.raises(NotFound, match="no event yet"):
        past.trial("cc")
    with pytest.raises(NotFound, match="no metric"):
        past.history("aa", "new")
    with pytest.raises(NotFound):
        lab.reader.at(position=0).trial("@latest")
    assert ids(lab.reader.at(position=0)) == []


def test_a_past_moment_takes_in_what_comes_late(lab: Lab) -> None:
    """An event recorded later but dated earlier belongs to that time; moments that were asked for are kept."""
    lab.trial("a", 10)
    past = lab.reader.at(time=15)
    assert ids(past) == ["a"]
    lab.trial("late", 12)
    assert lab.reader.at(time=15) is past
    assert ids(past) == ["a", "late"]
    for time in range(5):
        lab.reader.at(time=time)
    assert lab.reader.at(time=15) is not past
    assert ids(past) == ["a", "late"]
    del past
    gc.collect()  # closes what it had opened again


AN_HOUR = datetime(1970, 1, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("time", [HOUR, AN_HOUR, "1970-01-01T02:00:00+01:00", "1970-01-01T01:00Z"])
def test_a_time_is_given_in_several_ways(lab: Lab, time: Any) -> None:
    """Nanoseconds, a datetime with a zone, ISO text; to the nanosecond."""
    lab.trial("a", HOUR)
    lab.trial("b", HOUR + 1)
    assert ids(lab.reader.at(time=time)) == ["a"]


@pytest.mark.parametrize(
    "moment",
    [
        {},
        {"position": -1},
        *({"time": time} for time in ("now", AN_HOUR.replace(tzinfo=None), 1.5, "2025-01-01")),
    ],
)
def test_a_moment_that_is_none(lab: Lab, moment: dict[str, Any]) -> None:
    """The error says how to give one."""
    with pytest.raises(InvalidValue):
        lab.reader.at(**moment)


# the whole -----------------------------------------------------------------------------------------------------


def test_verify_and_rebuild(lab: Lab) -> None:
    """A good log and right views are found so; what the store knows beside is told; a rebuild leads to the same."""
    record_five(lab)
    report = lab.reader.verify(views=True)
    assert (report.ok, report.views_ok, report.problems) == (True, True, ())
    assert lab.reader.rebuild("a") == lab.reader.rebuild() == report.end
    lab.reader.views.read(lambda db: db.execute("DELETE FROM trials WHERE id = 'a'"))
    assert not lab.reader.verify(views=True).ok
    assert lab.reader.verify().ok
    lab.reader.rebuild()
    assert lab.reader.verify(views=True).ok
    with opened(inspect=lambda: [damage.positions(27, 30, "are lost")]) as other:
        assert other.reader.verify().problems == (damage.positions(27, 30, "are lost"),)


def test_a_rebuild_that_stays_in_memory_is_no_success(lab: Lab, tmp_path: Path) -> None:
    """Where views can't be stored, a rebuild says so; reads fold in memory and go on."""
    record_five(lab)
    log = lab.reader.views.log
    reader = Reader(tmp_path / "not there", read=log.read, end=log.end)
    before = len(everything(reader.trials))
    for trial in (None, "a"):
        with pytest.raises(StoreUnavailable, match="nothing was made anew"):
            reader.rebuild(trial)
    assert len(everything(reader.trials)) == before == 5
    reader.close()


def test_a_projection_of_ones_own_is_asked(lab: Lab) -> None:
    """By name and key; verify and rebuild know it."""
    record_five(lab)
    projection = Projection("count", 1, int, lambda state, stored: state + 1, int)
    lab.reader.register(projection)
    assert lab.reader.view("count") == lab.reader.verify().end == 26
    assert lab.reader.view_keys("count") == [""]
    assert lab.reader.view("count", "other") == 0
    assert lab.reader.verify(views=True).ok
    lab.reader.rebuild()
    assert lab.reader.view("count", fresh=False) == 26
    with pytest.raises(NotFound):
        lab.reader.view("counts")


def test_an_empty_store(lab: Lab) -> None:
    """Nothing is there, and nothing fails."""
    reader = lab.reader
    assert [everything(ask) for ask in (reader.trials, reader.groups, reader.projects, reader.events)] == [
        []
    ] * 4
    assert reader.verify(views=True).ok
    assert reader.rebuild() == 0
    assert reader.tail()[0] == []


def test_reading_goes_on_after_close(lab: Lab) -> None:
    """Views are opened again when they are asked; in a fork's child they are given away instead of closed."""
    lab.trial("a", 1)
    assert ids(lab.reader) == ["a"]
    assert ids(lab.reader.at(position=1)) == ["a"]
    lab.reader.close()
    assert ids(lab.reader) == ["a"]
    held = lab.reader.abandon()
    assert ids(lab.reader) == ["a"]
    for connection in held:
        if connection is not None:
            cast(Any, connection).close()


def test_views_in_a_folder_serve_the_next_reader(tmp_path: Path) -> None:
    """What one reader has folded the next one finds."""
    lab = Lab()
    record_five(lab)
    for reads in (2, 0):
        reader = Reader(tmp_path, read=lab.read, end=lambda: lab.wait(lab.store.end()))
        lab.reads.clear()
        assert len(ids(reader)) == 5
        assert (len(lab.reads) > 0) == (reads > 0)
        reader.close()
    lab.reader.close()


def test_a_flipped_bit_in_the_views_is_not_believed(tmp_path: Path) -> None:
    """Wherever it is, reading gives the same, for views are made anew; at most an index hides a row from a filter."""
    lab, chance = Lab(), random.Random(7)
    record_five(lab)
    lab.append(Stream(group_subject("p", "g1"), 1), [(1, GroupCreated("p", "g1"))])

    def ask() -> str:
        reader = Reader(tmp_path, read=lab.read, end=lambda: lab.wait(lab.store.end()))
        lists = [everything(ask) for ask in (reader.trials, reader.groups, reader.projects)]
        chosen = [ids(reader, **one) for one in ({"project": "p"}, {"status": "failed"}, {"tag": "x"})]
        single = reader.trial("third"), reader.history("c", "loss").to_dict()
        reader.close()
        return repr((lists, chosen, single))

    expected = ask()
    [file] = tmp_path.glob("views-*.db")
    whole, pointer = file.read_bytes(), (tmp_path / "views").read_bytes()
    used = [place for place, byte in enumerate(whole) if byte]
    wrong = 0
    for _ in range(200):
        for each in tmp_path.glob("views*"):
            each.unlink()
        flipped = bytearray(whole)
        flipped[chance.choice(used)] ^= 1 << chance.randrange(8)
        file.write_bytes(flipped)
        (tmp_path / "views").write_bytes(pointer)
        wrong += ask() != expected
    assert wrong <= 3
    lab.reader.close()
