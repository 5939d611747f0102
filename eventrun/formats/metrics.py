"""Metrics as CSV or JSON lines for other programs: a row per value, in the order of the log.

    trial, name, metric, step, epoch, time, value

`metric` has its subset in front ("val/loss"); `time` is UTC to the nanosecond, as in 2025-11-21T12:44:03.123456789Z.
In CSV a value that is NaN or infinite is nan, inf or -inf, None is empty, bools are true and false, and a text "1"
looks like the number; JSON lines keep all apart, non-finite numbers as {"$f": "nan"}.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from eventrun.codec import StoredEvent, to_json
from eventrun.errors import InvalidValue
from eventrun.events import MetricsLogged, Scalar, Step
from eventrun.formats.events_jsonl import REPORT_EVENTS, Progress, Sink

if TYPE_CHECKING:
    from eventrun.client import Client

FORMATS = ("csv", "jsonl")


class Row(NamedTuple):
    """One value of one metric."""

    trial: str
    name: str
    metric: str
    step: Step
    epoch: Step
    time: str
    value: Scalar


def export_metrics(
    client: Client,
    out: Sink,
    kind: str = "csv",
    trials: Sequence[str] | None = None,
    *,
    progress: Progress | None = None,
) -> int:
    """Write the metrics of these trials (ids, prefixes or names), or of all, and return the number of values.

    Holds one page of events at a time, and of each trial its name. CSV begins with a line of the columns' names.
    """
    write = _writer(out, kind)
    count = 0
    for events, (stored, name) in enumerate(_events(client, trials), 1):
        for row in rows_of(stored, name):
            write(row)
            count += 1
        if progress is not None and events % REPORT_EVENTS == 0:
            progress(events)
    return count


def rows_of(stored: StoredEvent, name: str) -> Iterator[Row]:
    """Yield the rows of one event of the trial called `name`; none if it is no log call."""
    event = stored.event
    if isinstance(event, MetricsLogged):
        trial = stored.stream.subject.removeprefix("t/")
        prefix = f"{event.subset}/" if event.subset else ""
        time = utc(stored.time_ns)
        for metric, value in event.values.items():
            yield Row(trial, name, prefix + metric, event.step, event.epoch, time, value)


def utc(time_ns: int) -> str:
    """Write a time in ISO 8601, UTC, to the nanosecond."""
    seconds, rest = divmod(time_ns, 10**9)
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"
    except (OverflowError, ValueError, OSError):  # a clock far off: beyond the years of datetime
        return f"{seconds}.{rest:09d}"


def _events(client: Client, trials: Sequence[str] | None) -> Iterator[tuple[StoredEvent, str]]:
    if trials is None:
        names = {trial.id: trial.name for trial in client.trials()}
        for stored in client.events():
            yield stored, names.get(stored.stream.subject.removeprefix("t/"), "")
    else:
        for wanted in trials:
            trial = client.get(wanted).result()
            for stored in client.events(trial=trial.id):
                yield stored, trial.name


def _writer(out: Sink, kind: str) -> Callable[[Row], object]:
    if kind == "jsonl":
        encode = msgspec.json.Encoder().encode
        return lambda row: out.write(encode(to_json(row._asdict())).decode() + "\n")
    if kind != "csv":
        raise InvalidValue(f"{kind!r} is no format for metrics; formats are {' and '.join(FORMATS)}")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Row._fields)
    return lambda row: writer.writerow(_csv_row(row))


def _csv_row(row: Row) -> Row:
    # The csv module writes None as nothing and floats by repr, as is wanted; bools it would write as Python does.
    return row._replace(value=str(row.value).lower()) if isinstance(row.value, bool) else row
