"""How fast events become durable, what they take on the disk, and how fast trials are made."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter as now

import msgspec
from figures import Figure, Run, benchmark, column, interleaved
from log_call import encode_and_write
from workloads import SCALARS, noisy, noisy_events, params, record_noisy

import eventrun
from eventrun.events import MetricsLogged

BUSY = 10  # turns of a Python loop between two calls, about a microsecond


def durable(url: str, folder: str, events: int, trials: int, busy: int) -> dict[str, float]:
    """Log round-robin and flush; return events per second, until durable and of the calls alone. Called in a child."""
    values, between, x = noisy(), range(busy), 1
    with eventrun.open(url, quiet=True) as client:
        logs = [client.trial("bench").log for _ in range(trials)]
        client.flush().result()
        start = now()
        for i in range(events):
            loss, acc, lr = values[i & 4095]
            logs[i % trials](loss=loss, acc=acc, lr=lr, step=i)
            for _ in between:
                x = x * 5 + 1 & 0xFFFF
        called = now()
        client.flush().result()
        end = now()
    return {"durable": events / (end - start), "calls": events / (called - start)}


def written(url: str, folder: str, events: int, trials: int, busy: int) -> dict[str, float]:
    """Do the same with `encode + os.write` and one fsync at the end. Called in a child."""
    values, between, x = noisy(), range(busy), 1
    with encode_and_write(url, folder) as write:
        start = now()
        for i in range(events):
            loss, acc, lr = values[i & 4095]
            write(loss=loss, acc=acc, lr=lr, step=i)
            for _ in between:
                x = x * 5 + 1 & 0xFFFF
        with Path(folder, "written").open("rb") as file:
            os.fsync(file.fileno())
        return {"durable": events / (now() - start)}


def _figure(run: Run, name: str, trials: int, busy: int, at_least: float) -> Iterator[Figure]:
    events = run.size(200_000, 1_000_000)
    contenders = {
        "eventrun": partial(run.measure, durable, events, trials, busy),
        "encode + os.write, one fsync": partial(run.measure, written, events, trials, busy),
    }
    results = interleaved(run.rounds(2, 5), contenders)
    ours = results.pop("eventrun")
    beside = {name: column(theirs, "durable") for name, theirs in results.items()}
    beside["the log calls alone"] = column(ours, "calls")
    yield Figure(
        name, "events/s", column(ours, "durable"), beside, at_least=at_least,
        ratio_to="encode + os.write, one fsync", note=f"{events:,} events of {SCALARS} scalars",
    )  # fmt: skip


@benchmark("durable-1")
def durable_1(run: Run) -> Iterator[Figure]:
    """Events of one trial, from the first call until flush has returned."""
    return _figure(run, "durable-1", 1, 0, 330_000)


@benchmark("durable-8")
def durable_8(run: Run) -> Iterator[Figure]:
    """The same with eight trials in turn."""
    return _figure(run, "durable-8", 8, 0, 330_000)


@benchmark("durable-1000-busy")
def durable_1000(run: Run) -> Iterator[Figure]:
    """The same with 1,000 trials in turn, and a main thread that works in Python between the calls."""
    return _figure(run, "durable-1000-busy", 1000, BUSY, 200_000)


@benchmark("bytes")
def bytes_per_scalar(run: Run) -> Iterator[Figure]:
    """Size of log.db after close, without VACUUM, for each scalar of noisy doubles."""
    events = noisy_events(run)
    url, _ = run.prepared(record_noisy, events)
    scalars = SCALARS * events
    loss, acc, lr = noisy()[0]
    item = msgspec.msgpack.encode((1 << 60, MetricsLogged({"loss": loss, "acc": acc, "lr": lr}, events // 2)))
    sizes = {path.name: path.stat().st_size for path in Path(url).glob("log.db*")}
    beside = {"as encoded": [len(item) / SCALARS]}
    beside |= {name: [size / scalars] for name, size in sorted(sizes.items()) if name != "log.db"}
    yield Figure(
        "bytes", "bytes/scalar", [sizes["log.db"] / scalars], beside, at_most=11, note=f"{events:,} events"
    )


def create(url: str, folder: str, trials: int) -> float:
    """Make trials with 20 params and one metric; return seconds until durable. Called in a child."""
    with eventrun.open(url, quiet=True) as client:
        start = now()
        for number in range(trials):
            client.trial("bench", params=params(number)).log(loss=0.5, step=0)
        client.flush().result()
        return now() - start


@benchmark("create-1000")
def create_1000(run: Run) -> Iterator[Figure]:
    """1,000 new trials, each with 20 params and one metric, until flush has returned."""
    seconds = [run.measure(create, 1000) for _ in range(run.rounds(3, 7))]
    yield Figure("create-1000", "s", seconds, at_most=0.5)
