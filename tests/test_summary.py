"""Numbers, tables and the closing block are short, aligned, and safe to print."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

import eventrun
from eventrun import clock
from eventrun.errors import NotFound
from eventrun.pending import Answer, Pending
from eventrun.summary import (
    ASCII_BARS,
    ASCII_NOT_FINITE,
    BARS,
    NOT_FINITE,
    Column,
    amount,
    clean,
    closing_block,
    command,
    direction,
    duration,
    local_time,
    near,
    number,
    plain_table,
    short_time,
    shorten,
    size,
    sparkline,
    telling_metrics,
    width,
)

# values


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.3, "0.3"),
        (0.97777, "0.9778"),
        (12.0514, "12.05"),
        (12345.6, "12346"),
        (-0.00123456, "-0.001235"),
        (1.23456e-7, "1.235e-7"),
        (1e300, "1e300"),
        (0.99999, "1"),
        (0.0, "0"),
        (3.0, "3"),
        (123456789, "123456789"),
        (2**64 - 1, "1.845e19"),
        (True, "true"),
        (None, "none"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        ("a good one", "a good one"),
        ("x" * 100, "x" * 23 + "…"),
    ],
)
def test_a_number_has_four_significant_digits(value: Any, text: str) -> None:
    """Floats are rounded and lose trailing zeros, integers stay whole, what is no number stays readable."""
    assert number(value) == text


@given(st.floats(-1.797e308, 1.797e308))
def test_a_written_number_is_near_the_number(value: float) -> None:
    """Reading the text gives the value back to within half a unit of its fourth digit, in at most 11 letters."""
    assert float(number(value)) == pytest.approx(value, rel=0.5001e-3)
    assert len(number(value)) <= len("-1.235e-308")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.0, "0 ms"),
        (0.0000123, "0.0123 ms"),
        (0.0352, "35.2 ms"),
        (0.9996, "1 s"),
        (12.34, "12.3 s"),
        (59.96, "1 min 0 s"),
        (200, "3 min 20 s"),
        (8040, "2 h 14 min"),
        (273600, "3 d 4 h"),
        (math.inf, "inf"),
    ],
)
def test_a_duration_is_what_a_person_would_say(seconds: float | None, text: str) -> None:
    """Two units at most, and none that is too small to matter."""
    assert duration(seconds) == text


def test_sizes_and_amounts_are_short() -> None:
    """Bytes have three digits and a unit, amounts have thousands apart and a noun that agrees."""
    assert [size(n) for n in (0, 999, 1000, 12_345_678, 10**15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "12.3 MB",
        "1000 TB",
    ]
    assert [amount(n, "event") for n in (0, 1, 45_210)] == ["0 events", "1 event", "45,210 events"]


def test_a_time_is_local_and_never_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time is shown in this machine's zone; one that no calendar holds is shown as it is."""
    import time

    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert local_time(0) == "1970-01-01 09:00:00"
        assert short_time(0) == "1970-01-01"
        assert re.fullmatch(r"\d\d-\d\d \d\d:\d\d", short_time(clock.time_ns()))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert local_time(None) == ""
    assert local_time(2**63 - 1).startswith("2262-")
    assert local_time(10**27) == f"{10**27} ns"


# text


def test_what_could_move_the_cursor_is_escaped() -> None:
    """Control characters show as escapes; letters of any language stay."""
    assert clean("a\x1b[2Jb\nc\u202ed") == "a\\x1b[2Jb\\nc\\u202ed"
    assert clean("学習率 é") == "学習率 é"


@given(st.text(), st.integers(1, 30))
def test_a_shortened_text_fits(text: str, cells: int) -> None:
    """However wide its letters are, a text takes no more cells than it was given, and is whole if it fits."""
    assert width(shorten(text, cells)) <= cells
    if width(text) <= cells:
        assert shorten(text, cells) == text


@given(
    st.lists(st.floats() | st.integers(-(2**63), 2**64) | st.none() | st.text(max_size=3)), st.integers(1, 40)
)
def test_a_sparkline_of_anything_is_that_many_cells_at_most(values: list[Any], cells: int) -> None:
    """Any values, the largest doubles, NaN and text too, give at most so many letters, all of them bars or crosses."""
    drawn = sparkline(values, cells)
    assert len(drawn) <= cells
    assert set(drawn) <= set(BARS + NOT_FINITE)
    assert set(sparkline(values, cells, ascii_only=True)) <= set(ASCII_BARS + ASCII_NOT_FINITE)


def test_a_sparkline_shows_the_course() -> None:
    """The lowest is the lowest bar, the highest the highest, what is not finite a cross, and a flat line is low."""
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BARS
    assert sparkline([1.0, math.nan, 3.0]) == f"{BARS[0]}{NOT_FINITE}{BARS[-1]}"
    assert sparkline([5, 5, 5]) == BARS[0] * 3
    assert sparkline([]) == sparkline(["text", None]) == ""


# tables

COLUMNS = (Column("name", cut=True), Column("loss", "decimal"), Column("n", "right"))


def test_a_table_is_aligned() -> None:
    """Text is aligned left, counts right, and numbers at their decimal points."""
    rows = [["a", "0.3", "5"], ["long name", "12.05", "1,200"], ["", "nan", ""], ["b", "7", "1"]]
    assert plain_table(COLUMNS, rows) == [
        "name        loss      n",
        "a           0.3       5",
        "long name  12.05  1,200",
        "             nan",
        "b           7         1",
    ]


@given(st.lists(st.tuples(st.text(), st.text(), st.text()), max_size=5), st.integers(10, 100))
def test_no_line_of_a_table_is_wider_than_the_terminal(rows: list[tuple[str, str, str]], cells: int) -> None:
    """Whatever the cells hold, each row is one line that fits."""
    lines = plain_table(COLUMNS, rows, cells=cells)
    assert len(lines) == len(rows) + 1
    assert all(width(line) <= cells and line.isprintable() for line in lines)


def test_only_long_names_are_cut() -> None:
    """Where a line is too wide, names lose their ends; numbers stay whole. Without a width nothing is cut."""
    row = ["a very long name of a trial", "0.1234", "5"]
    assert plain_table(COLUMNS, [row], cells=30)[1] == "a very long name o…  0.1234  5"
    assert row[0] in plain_table(COLUMNS, [row])[1]


# what matters


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("val/loss", "min"),
        ("train/top1-accuracy", "max"),
        ("val/recall/setosa", "max"),
        ("lr", None),
        ("F1", "max"),
    ],
)
def test_the_name_tells_what_is_better(metric: str, better: str | None) -> None:
    """The last word of a name that says so decides; other names decide nothing."""
    assert direction(metric) == better


def test_validation_comes_before_training_and_quality_before_the_rest() -> None:
    """Of many metrics those are chosen that tell how good a trial is."""
    names = ["train/gradient_norm", "train/loss", "val/recall/setosa", "val/loss", "val/accuracy"]
    assert telling_metrics(names, 3) == ["val/accuracy", "val/loss", "train/loss"]


def test_the_next_command_names_the_store_when_it_has_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default store needs no name; any other is named, in quotes when a shell would take it apart."""
    monkeypatch.delenv("EVENTRUN_URL", raising=False)
    assert command("runs", "ls") == "eventrun ls"
    assert command("/tmp/a b's", "ls") == "eventrun --store '/tmp/a b'\"'\"'s' ls"
    monkeypatch.setenv("EVENTRUN_URL", "elsewhere")
    assert command("runs", "ls") == "eventrun --store runs ls"
    assert command("elsewhere", "ls") == "eventrun ls"


def test_a_path_is_shown_from_here_when_it_lies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths below the working directory are relative, others stay as they are."""
    monkeypatch.chdir(tmp_path)
    assert near(tmp_path / "runs") == "runs"
    assert near("/somewhere/else") == "/somewhere/else"
    assert near("runs") == "runs"


# the closing block


def test_the_block_tells_what_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the folder, counts trials and events, shows each metric's best, and ends with a command to type."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EVENTRUN_URL", raising=False)
    with eventrun.open("runs", quiet=True) as client:
        with client.trial("p", name="first") as trial:
            for step, loss in enumerate([4.0, 2.0, 1.0, 3.0]):
                trial.log(loss=loss, step=step)
        block = closing_block(client, [trial.id], seconds=30, cells=80)
        recorded = client.statistics().recorded
    lines = block.splitlines()
    assert lines[0] == f"eventrun: 1 trial, {recorded} events in runs"
    (line,) = (line for line in lines if "first" in line)
    assert line.split() == [
        "first",
        "completed",
        "loss",
        "1",
        "3",
        "1",
        f"{BARS[7]}{BARS[2]}{BARS[0]}{BARS[5]}",
    ]
    assert lines[-1].endswith(f"eventrun show {trial.id[:8]}")


def test_the_block_shows_a_handful_of_trials(tmp_path: Path) -> None:
    """However many trials there were, the block fits on a screen and says how many it leaves out."""
    with eventrun.open(tmp_path / "runs", quiet=True) as client:
        ids = []
        for number_ in range(13):
            with client.trial("p", name=f"trial-{number_}") as trial:
                trial.log({f"metric-{i}": float(i) for i in range(20)})
            ids.append(trial.id)
        block = closing_block(client, ids, seconds=30, cells=80, hint=False)
    assert "and 9 more" in block
    assert len(block.splitlines()) < 24
    assert all(width(line) <= 80 for line in block.splitlines()[1:])


def test_the_block_can_be_plain_ascii(tmp_path: Path) -> None:
    """For a terminal that knows no Unicode, bars and ellipses are ASCII."""
    with eventrun.open(tmp_path / "runs", quiet=True) as client:
        with client.trial("p", name="n" * 100) as trial:
            trial.log(loss=1.0)
            trial.log(loss=math.nan)
        block = closing_block(client, [trial.id], seconds=30, cells=60, encoding="ascii")
    assert block.isascii()
    assert "..." in block
    assert f"{ASCII_BARS[0]}{ASCII_NOT_FINITE}" in block


class Stuck:
    """A client whose store doesn't answer, or answers with an error."""

    url = "runs"
    folder = Path("/somewhere/runs")

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def statistics(self) -> Any:
        return SimpleNamespace(recorded=45_210)

    def get(self, trial: str, *, fresh: bool = True) -> Pending[Any]:
        answer: Answer[Any] = Answer()
        if self._error is not None:
            answer.fail(self._error)
        return Pending(answer)


@pytest.mark.parametrize("error", [None, NotFound("gone")])
def test_the_block_is_bounded_in_time_and_raises_nothing(error: Exception | None) -> None:
    """When the store doesn't answer in time, or can't, one line tells how many events lie where."""
    client = cast(eventrun.Client, Stuck(error))
    assert closing_block(client, ["a"], seconds=0.05) == "eventrun: 45,210 events in /somewhere/runs"
