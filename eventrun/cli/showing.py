"""`eventrun show` and `eventrun history`: one trial, one of its metrics."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from eventrun.cli import terminal
from eventrun.cli.listing import tags
from eventrun.cli.opening import Source, reading
from eventrun.cli.verbs import TRIAL_HELP, Command
from eventrun.codec import to_json
from eventrun.errors import InvalidValue
from eventrun.summary import SPARK_CELLS, Column, amount, command, duration, local_time, number

if TYPE_CHECKING:
    from eventrun.projections import TrialState
    from eventrun.query import Series

SPARK_METRICS = 100  # more metrics than these are shown without their course
SPARK_PAST_EVENTS = 500_000  # each course of the past folds the trial's events anew, some 3 us each
CHART_CELLS = 60
SHOWN_POINTS = 40  # to a person who doesn't say how many


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trial", metavar="TRIAL", help=TRIAL_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def show(arguments: argparse.Namespace) -> int:
    """Show one trial."""
    with reading(arguments) as source:
        trial = source.reads.get(arguments.trial).result()
        if arguments.json:
            terminal.show_json(trial.to_dict())
        else:
            _show(source, trial)
    return 0


def _show(source: Source, trial: TrialState) -> None:
    terminal.line(trial.name, "bold")
    terminal.facts(_facts(trial), indent=2)
    for title, mapping in (("params", trial.params), ("metadata", trial.metadata)):
        if mapping:
            terminal.heading(title)
            terminal.facts([[name, plain(value)] for name, value in _leaves(mapping)], indent=2)
    if trial.metrics:
        terminal.heading("metrics")
        terminal.table(
            _METRIC_COLUMNS, [_metric_row(source, trial, name) for name in trial.metrics], indent=2
        )
    if trial.chronos:
        terminal.heading("chronos")
        terminal.table(_CHRONO_COLUMNS, [_chrono_row(trial, name) for name in trial.chronos], indent=2)
    for title, refs in (("inputs", trial.inputs), ("outputs", trial.outputs)):
        if refs:
            terminal.heading(title)
            terminal.table([Column("", cut=True)], [[plain(ref)] for ref in refs], titles=False, indent=2)
    if trial.tables:
        terminal.heading("tables")
        rows = [
            [table.name, f"{amount(table.rows, 'row')}: {', '.join(table.columns)}"] for table in trial.tables
        ]
        terminal.facts(rows, indent=2)
    if trial.notes:
        terminal.heading("notes")
        rows = [[local_time(note.time_ns), note.text] for note in trial.notes]
        terminal.facts(rows, indent=2)


def _facts(trial: TrialState) -> Iterator[list[str]]:
    """Yield what is known of a trial, without what nobody told."""
    status = (
        trial.status if trial.raw_status.lower() == trial.status else f"{trial.status} ({trial.raw_status})"
    )
    late = f", {trial.late} after the finish" if trial.late else ""
    facts = (
        ("id", trial.id),
        ("project", trial.project),
        ("group", trial.group),
        ("status", status),
        ("error", trial.error),
        ("about", trial.description),
        ("tags", tags(trial.tags)),
        ("version", trial.version),
        ("attempt", str(trial.attempt) if trial.attempt != 1 else None),
        ("created", local_time(trial.created_ns)),
        ("started", local_time(trial.started_ns)),
        ("finished", local_time(trial.finished_ns)),
        ("lasted", duration(trial.duration_s)),
        ("charts", str(len(trial.charts)) if trial.charts else None),
        ("events", f"{trial.events:,}{late}; the last is at position {trial.position:,}"),
    )
    yield from ([name, fact] for name, fact in facts if fact)


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def plain(value: Any) -> str:
    """Write a value as JSON, texts without quotes."""
    return value if isinstance(value, str) else json.dumps(to_json(value), ensure_ascii=False)


_METRIC_COLUMNS = (
    Column("name", cut=True), Column("last", "decimal"), Column("min", "decimal"), Column("max", "decimal"),
    Column("mean", "decimal"), Column("points", "right"), Column("steps"), Column("", style="cyan"),
)  # fmt: skip


def _metric_row(source: Source, trial: TrialState, name: str) -> list[str]:
    metric = trial.metrics[name]
    statistics = ["" if value is None else number(value) for value in (metric.min, metric.max, metric.mean)]
    steps = "" if metric.first_step is None else f"{number(metric.first_step)} to {number(metric.last_step)}"
    drawn = ""
    past = source.reads is not source.client and trial.events * len(trial.metrics) > SPARK_PAST_EVENTS
    if len(trial.metrics) <= SPARK_METRICS and not past:
        series = source.reads.history(trial.id, name, points=SPARK_CELLS).result()
        drawn = terminal.sparkline(series.values, SPARK_CELLS)
    return [name, number(metric.last), *statistics, f"{metric.count:,}", steps, drawn]


_CHRONO_COLUMNS = (
    Column("name", cut=True), Column("runs", "right"), Column("mean", "right"), Column("min", "right"),
    Column("max", "right"), Column("sum", "right"), Column(""),
)  # fmt: skip


def _chrono_row(trial: TrialState, name: str) -> list[str]:
    chrono = trial.chronos[name]
    times = [duration(seconds) for seconds in (chrono.mean, chrono.min, chrono.max, chrono.sum)]
    return [name, f"{chrono.count:,}", *times, f"{chrono.running} running" if chrono.running else ""]


# history -------------------------------------------------------------------------------------------------------


def _history_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trial", metavar="TRIAL", help=TRIAL_HELP)
    parser.add_argument("metric", metavar="METRIC", help="the metric's name, with its subset: val/loss")
    parser.add_argument("--points", type=int, metavar="N", help="at most about N points, extremes and ends kept "
                        f"(default: all, on a terminal {SHOWN_POINTS})")  # fmt: skip
    parser.add_argument(
        "--between", nargs=2, type=float, metavar=("FROM", "TO"), help="only points of these steps"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object of columns")


def history(arguments: argparse.Namespace) -> int:
    """Show the points of one metric."""
    points = arguments.points
    if points is not None and points < 1:
        raise InvalidValue(f"--points is {points}; give a number of points from 1 on")
    between = None if arguments.between is None else tuple(arguments.between)
    with reading(arguments) as source:
        if points is None and not arguments.json and terminal.cells() is not None:
            points = SHOWN_POINTS
        thinned = None if points is None else max(points // 4, 1)  # buckets of up to four points
        series = source.reads.history(
            arguments.trial, arguments.metric, points=thinned, between=between
        ).result()
        if arguments.json:
            terminal.show_json(series.to_dict())
            return 0
        _show_series(series)
        if terminal.cells() is not None:
            _tell_course(source, arguments, series, between)
    return 0


def _show_series(series: Series) -> None:
    epochs = any(epoch is not None for epoch in series.epochs)
    columns = [Column("step", "right"), *([Column("epoch", "right")] if epochs else ()), Column("time"),
               Column("value", "decimal")]  # fmt: skip
    rows = (
        [_step(step), *([_step(epoch)] if epochs else ()), local_time(time_ns), number(value)]
        for step, epoch, time_ns, value in zip(
            series.steps, series.epochs, series.times_ns, series.values, strict=True
        )
    )
    terminal.table(columns, rows)


def _step(step: float | int | None) -> str:
    return "" if step is None else number(step)


def _tell_course(
    source: Source, arguments: argparse.Namespace, series: Series, between: tuple[float, ...] | None
) -> None:
    """Draw the whole course for a person, and say what was left out."""
    fine = source.reads.history(
        arguments.trial, arguments.metric, points=CHART_CELLS, between=between
    ).result()
    terminal.say(f"\n{terminal.sparkline(fine.values, min(CHART_CELLS, terminal.cells() or CHART_CELLS))}")
    count = source.reads.get(arguments.trial).result().metrics[arguments.metric].count
    if between is None and count > len(series.values):
        everything = command(
            source.client.url, f"history {arguments.trial} {arguments.metric} --points {count}"
        )
        terminal.say(f"{len(series.values)} of {amount(count, 'point')}; all of them: {everything}")


COMMANDS = {"show": Command(_show_arguments, show), "history": Command(_history_arguments, history)}
