"""How long reads take in a fresh process, when the page cache is warm and the views have caught up."""

from collections.abc import Callable, Iterator
from time import perf_counter as now
from typing import Any

from figures import Figure, LeftOut, Run, benchmark, column
from fresh import fresh
from workloads import catch_up, noisy_events, record_noisy, record_trials, warm

import eventrun

AGAIN = "the second time in the same process"


def history(url: str, trial: str, points: int) -> dict[str, float]:
    """Read a whole series and its values. Called in a child."""

    def read() -> None:
        values = client.history(trial, "loss").result().values
        assert len(list(values)) == points, len(values)

    with eventrun.open(url, quiet=True) as client:
        return _twice(read)


def listing(url: str, count: int) -> dict[str, float]:
    """List all trials and look at the last value of every metric. Called in a child."""

    def read() -> None:
        last = [metric.last for trial in client.trials() for metric in trial.metrics.values()]
        assert len(last) == 10 * count, len(last)

    with eventrun.open(url, quiet=True) as client:
        return _twice(read)


def _twice(read: Callable[[], None]) -> dict[str, float]:
    times = [now()]
    for _ in range(2):
        read()
        times.append(now())
    return {"first": (times[1] - times[0]) * 1000, "again": (times[2] - times[1]) * 1000}


def _figure(name: str, rounds: int, function: Callable[..., Any], url: str, *arguments: Any) -> Figure:
    fresh(catch_up, url)
    warm(url)
    found = [fresh(function, url, *arguments) for _ in range(rounds)]
    return Figure(name, "ms", column(found, "first"), {AGAIN: column(found, "again")})


@benchmark("history")
def history_of_a_million(run: Run) -> Iterator[Figure]:
    """client.history of one metric with 1 M points (with --quick 500,000), values included."""
    points = noisy_events(run)
    url, trial = run.prepared(record_noisy, points)
    figure = _figure("history", run.rounds(3, 7), history, url, trial, points)
    figure.at_most = None if run.quick else 50
    figure.note = f"{points:,} points"
    yield figure


@benchmark("list-1000")
def list_1000(run: Run) -> Iterator[Figure]:
    """client.trials() of 1,000 trials, and the last value of each of their ten metrics."""
    url, count = run.prepared(record_trials, 1000)
    figure = _figure("list-1000", run.rounds(3, 7), listing, url, count)
    figure.at_most = 20
    yield figure


@benchmark("list-100000")
def list_100000(run: Run) -> Iterator[Figure]:
    """The same with 100,000 trials; left out by --quick."""
    if run.quick:
        raise LeftOut("it takes minutes")
    url, count = run.prepared(record_trials, 100_000)
    figure = _figure("list-100000", run.rounds(1, 3), listing, url, count)
    figure.at_most = 1000
    yield figure
