"""What is exported can be imported: nothing is lost, twice changes nothing, a bad line is named."""

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import eventrun
from eventrun import testing
from eventrun.codec import NO_DIGEST, Batch, Item, Stream, digest, encode_item, seal
from eventrun.errors import InvalidValue, NotFound
from eventrun.events import MetricsLogged, TrialCreated, WriterEnded
from eventrun.formats.events_jsonl import Imported, export_events, import_events
from eventrun.formats.metrics import export_metrics, utc


def exported(client: eventrun.Client, trial: str | None = None) -> list[str]:
    out = io.StringIO()
    count = export_events(client, out, trial)
    lines = list(io.StringIO(out.getvalue(), newline="\n"))  # str.splitlines would split at U+0085 too
    assert count == len(lines)
    return lines


def states(client: eventrun.Client) -> list[dict[str, Any]]:
    return [trial.to_dict() for trial in client.trials()]


@pytest.fixture
def source(tmp_path: Path) -> Iterator[eventrun.Client]:
    """A store with three trials that hold what is awkward."""
    with eventrun.open(tmp_path / "source", quiet=True) as client:
        for name in ("plain", "ünïcode 学習", "line\nbreak"):
            with client.trial(
                "project", group="group", name=name, params={"lr": 0.1, "raw": b"\x00\xff"}
            ) as trial:
                trial.log(loss=math.nan, count=2**64 - 1, ok=True, note="text", nothing=None, step=0)
                trial.log({"loss": -math.inf}, step=1.5, epoch=1, subset="val")
                trial.log(loss=1.0, step=2)
                with trial.chrono("epoch"):
                    trial.add_tags("good", owner="me")
            client.flush().result()
        yield client


@pytest.fixture
def target(tmp_path: Path) -> Iterator[eventrun.Client]:
    with eventrun.open(tmp_path / "target", quiet=True) as client:
        yield client


# events


def test_a_second_store_holds_the_same_after_export_and_import(
    source: eventrun.Client, target: eventrun.Client
) -> None:
    """States, events and positions are the same in a store that imported all of another."""
    lines = exported(source)
    assert import_events(target, lines) == Imported(added=len(lines), known=0)
    assert exported(target) == lines
    assert repr(states(target)) == repr(states(source))  # NaN equals NaN in a repr
    assert target.verify().result().ok


def test_importing_twice_changes_nothing(source: eventrun.Client, target: eventrun.Client) -> None:
    """What the store has already is skipped, in its own store too."""
    lines = exported(source)
    import_events(target, lines)
    assert import_events(target, lines) == Imported(added=0, known=len(lines))
    assert import_events(source, lines) == Imported(added=0, known=len(lines))
    assert exported(target) == lines


def test_what_has_grown_since_is_added(source: eventrun.Client, target: eventrun.Client) -> None:
    """A later export of the same store adds only what is new."""
    before = exported(source)
    import_events(target, before)
    with source.trial("project", name="later") as trial:
        trial.log(loss=0.5)
    after = exported(source)
    assert import_events(target, after) == Imported(added=len(after) - len(before), known=len(before))
    assert exported(target) == after


def test_one_trial_can_be_exported_alone(source: eventrun.Client, target: eventrun.Client) -> None:
    """Only the trial's events are written, and they are enough to have it elsewhere."""
    import_events(target, exported(source, "plain"))
    (there,) = states(target)
    here = source.get("plain").result().to_dict()
    del there["position"], here["position"]
    assert repr(there) == repr(here)


def test_two_exports_one_after_the_other_are_one_history(
    source: eventrun.Client, target: eventrun.Client
) -> None:
    """Lines that come again in the same file are skipped too."""
    lines = exported(source)
    assert import_events(target, [*lines, "\n", *lines]) == Imported(added=len(lines), known=len(lines))


def _chains() -> st.SearchStrategy[list[Batch]]:
    names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5)
    writers = st.integers(0, 2**64 - 1)
    streams = st.builds(lambda name, writer: Stream(f"t/{name}", writer), names, writers)
    groups = st.lists(st.lists(testing.items(), min_size=1, max_size=5), min_size=1, max_size=3)
    return st.lists(
        st.builds(testing.chain, streams, groups), max_size=3, unique_by=lambda c: c[0].header.stream
    ).map(lambda chains: [batch for chain in chains for batch in chain])


@given(_chains())
def test_every_event_survives_the_way_through_json(batches: list[Batch]) -> None:
    """Events of every kind, with any values and times, come out of a second store as they went into the first."""
    with eventrun.open("memory:", quiet=True) as one, eventrun.open("memory:", quiet=True) as other:
        if batches:
            one.append(batches).result()
        lines = exported(one)
        import_events(other, lines)
        assert exported(other) == lines
        assert import_events(one, lines) == Imported(added=0, known=len(lines))


def _line(number: int = 1, **changes: Any) -> str:
    event = {"kind": "MetricsLogged", "values": {"loss": 0.5}, "step": number}
    line = {
        "subject": "t/a",
        "writer": "00000000000000ff",
        "sequence": number,
        "time_ns": 7,
        "event": event,
    }
    return json.dumps(line | changes) + "\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no event"),
        ("\x00", "not JSON"),
        (_line(2, sequence="2"), "'sequence' is '2'; it must be an integer"),
        (_line(2, sequence=0), "sequences begin at 1"),
        (_line(2, sequence=True), "must be an integer"),
        (_line(2, time_ns=2**63), "no time"),
        (_line(2, writer="ff"), "16 hex digits"),
        (_line(2, writer="-00000000000000f"), "16 hex digits"),
        (_line(2, subject="a"), "subjects look like"),
        (_line(2, event={"kind": "Exploded"}), "'Exploded' is not a kind of event"),
        (_line(2, event={"kind": "MetricsLogged", "values": {}, "color": 1}), "no field 'color'"),
        (_line(2, event={"kind": "MetricsLogged", "values": [1]}), "MetricsLogged"),
        (_line(2, event=None), "must be an object"),
        (_line(4), "sequences 2 to 3 are missing before 4"),
        (_line(1, time_ns=8), "the store holds another event as sequence 1 of t/a@00000000000000ff"),
    ],
)
def test_a_bad_line_is_named_and_ends_the_import(line: str, message: str, target: eventrun.Client) -> None:
    """The error names file and line; what stands before it is in the log, nothing after it is."""
    with pytest.raises(InvalidValue) as error:
        import_events(target, [_line(1), line, _line(2)], name="some.jsonl")
    assert str(error.value).startswith("some.jsonl, line 2: ")
    assert message in str(error.value)
    assert [stored.sequence for stored in target.events()] == [1]


def test_lines_that_are_not_text_are_named(target: eventrun.Client) -> None:
    """Bytes that are not UTF-8 are an error of their line."""
    with pytest.raises(InvalidValue, match="line 2: this is not JSON"):
        import_events(target, [_line(1).encode(), b'{"subject": "\xff"}\n'])


def test_a_long_file_becomes_batches_of_a_bounded_size(target: eventrun.Client) -> None:
    """However many events of one stream follow each other, no batch holds much more than 1 MiB."""
    text = "x" * 10_000
    values = {"kind": "MetricsLogged", "values": {"text": text}}
    lines = [_line(sequence, event=values) for sequence in range(1, 251)]
    assert import_events(target, lines).added == 250
    counts = [stored.batch.header.count for stored in target.batches()]
    assert sum(counts) == 250
    assert max(counts) < 110


def test_streams_that_take_turns_keep_their_order(target: eventrun.Client) -> None:
    """The order of the lines is the order of the log, also where streams alternate."""
    lines = [_line(sequence, subject=f"t/{name}") for sequence in range(1, 6) for name in "abc"]
    import_events(target, lines)
    order = [(stored.sequence, stored.stream.subject) for stored in target.events()]
    assert order == [(sequence, f"t/{name}") for sequence in range(1, 6) for name in "abc"]


# metrics


def rows(client: eventrun.Client, trials: Iterable[str] | None = None) -> list[dict[str, str]]:
    out = io.StringIO(newline="")
    count = export_metrics(client, out, "csv", None if trials is None else list(trials))
    found = list(csv.DictReader(io.StringIO(out.getvalue(), newline="")))
    assert count == len(found)
    return found


def test_metrics_as_csv_have_a_row_for_each_value(source: eventrun.Client) -> None:
    """Each value of each metric is a row, in the order of the log, with its trial, step, epoch and time."""
    found = rows(source)
    assert len(found) == 3 * 7
    names = {row["name"] for row in found}
    assert names == {"plain", "ünïcode 学習", "line\nbreak"}
    first = [row for row in found if row["name"] == "plain"]
    assert [(row["metric"], row["step"], row["epoch"], row["value"]) for row in first] == [
        ("loss", "0", "", "nan"),
        ("count", "0", "", str(2**64 - 1)),
        ("ok", "0", "", "true"),
        ("note", "0", "", "text"),
        ("nothing", "0", "", ""),
        ("val/loss", "1.5", "1", "-inf"),
        ("loss", "2", "", "1.0"),
    ]
    assert first[0]["trial"] == source.get("plain").result().id
    assert first[0]["time"].endswith("Z")


def test_metrics_as_json_lines_keep_types_apart(source: eventrun.Client) -> None:
    """A number, a text and nothing stay what they are, and non-finite numbers are written as in every JSON."""
    out = io.StringIO()
    export_metrics(source, out, "jsonl", ["plain"])
    found = [json.loads(line) for line in out.getvalue().splitlines()]
    values = [row["value"] for row in found]
    assert values == [{"$f": "nan"}, 2**64 - 1, True, "text", None, {"$f": "-inf"}, 1.0]
    assert list(found[0]) == ["trial", "name", "metric", "step", "epoch", "time", "value"]


def test_metrics_of_chosen_trials(source: eventrun.Client) -> None:
    """Only the trials that are named are written, one after the other; one that isn't there is an error."""
    found = rows(source, ["ünïcode 学習", "plain"])
    assert list(dict.fromkeys(row["name"] for row in found)) == ["ünïcode 学習", "plain"]
    with pytest.raises(NotFound):
        rows(source, ["nowhere"])


def test_metrics_have_no_other_format(source: eventrun.Client) -> None:
    """An unknown format is an error that lists those there are."""
    with pytest.raises(InvalidValue, match="csv and jsonl"):
        export_metrics(source, io.StringIO(), "parquet")


def test_a_time_is_utc_to_the_nanosecond() -> None:
    """Times before 1970 and beyond the calendar are written too."""
    assert utc(1_700_000_000_123_456_789) == "2023-11-14T22:13:20.123456789Z"
    assert utc(-1) == "1969-12-31T23:59:59.999999999Z"
    assert utc(10**27)


def test_metrics_of_an_empty_store(target: eventrun.Client) -> None:
    """There is a header, so that a reader of CSV is content, and no row."""
    out = io.StringIO(newline="")
    assert export_metrics(target, out) == 0
    assert out.getvalue() == "trial,name,metric,step,epoch,time,value\n"


def _sealed(stream: Stream, items: list[Item]) -> Batch:
    payload = b"".join(encode_item(*item) for item in items)
    return seal(stream, 1, len(items), payload, items[0][0], items[-1][0], NO_DIGEST)


def test_metrics_of_a_trial_that_several_writers_log_to(target: eventrun.Client) -> None:
    """Ranks of one trial share its id and name."""
    first = _sealed(
        Stream("t/abc", 1), [(1, TrialCreated("p", "", "ranked")), (2, MetricsLogged({"loss": 1.0}, 0))]
    )
    second = _sealed(Stream("t/abc", 2), [(3, MetricsLogged({"loss": 2.0}, 1))])
    target.append([first, second]).result()
    assert [(row["trial"], row["name"], row["value"]) for row in rows(target)] == [
        ("abc", "ranked", "1.0"),
        ("abc", "ranked", "2.0"),
    ]
    assert digest(first) != digest(second)


def _ended(sequence: int, writer: int, noticed_ns: int) -> str:
    event = {"kind": "WriterEnded", "writer": writer, "noticed_ns": noticed_ns}
    return _line(sequence, writer="0" * 16, time_ns=noticed_ns, event=event)


def test_an_end_that_others_have_noticed_too_is_no_other_history(target: eventrun.Client) -> None:
    """Two stores may have noticed the same lost writers, in another order and at other times: the ends are merged."""
    assert import_events(target, [_line(1), _ended(1, 7, 50), _ended(2, 8, 60)]) == Imported(added=3)
    elsewhere = [_line(1), _ended(1, 9, 40), _ended(2, 8, 70), _ended(3, 7, 71)]
    for added in (1, 0):
        assert import_events(target, elsewhere) == Imported(added=added, known=4 - added)
    ends = [stored.event for stored in target.events() if isinstance(stored.event, WriterEnded)]
    assert [(event.writer, event.noticed_ns) for event in ends] == [(7, 50), (8, 60), (9, 40)]
    assert target.verify().result().ok
