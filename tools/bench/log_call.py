"""How long a log call takes, beside three simpler things that could be done with the same event."""

import asyncio
import json
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter_ns as now
from time import time_ns
from typing import Any

import msgspec
from figures import Figure, Run, benchmark, column, interleaved
from fresh import running
from workloads import noisy

import eventrun
from eventrun.events import MetricsLogged

PACED_NS = 50_000  # 20,000 calls per second
WARM_UP = 1000  # calls that aren't counted; what the first one costs tells `first-log`
QUANTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
HAMMER_BYTES = 4 << 20

Call = Callable[..., Any]

# what is called ------------------------------------------------------------------------------------------------
# All take keywords, as trial.log does, and make of them the same event with its time.


@contextmanager
def log(url: str, folder: str) -> Iterator[Call]:
    with eventrun.open(url, quiet=True) as client:
        with client.trial("bench") as trial:
            yield trial.log
        client.flush().result()


@contextmanager
def deque_append(url: str, folder: str) -> Iterator[Call]:
    append = deque[Any]().append
    yield lambda step, **values: append((time_ns(), MetricsLogged(values, step)))


@contextmanager
def encode(url: str, folder: str) -> Iterator[Call]:
    encode = msgspec.msgpack.Encoder().encode
    yield lambda step, **values: encode((time_ns(), MetricsLogged(values, step)))


@contextmanager
def encode_and_write(url: str, folder: str) -> Iterator[Call]:
    encode, write = msgspec.msgpack.Encoder().encode, os.write
    with Path(folder, "written").open("ab", buffering=0) as file:
        descriptor = file.fileno()
        yield lambda step, **values: write(descriptor, encode((time_ns(), MetricsLogged(values, step))))


CONTENDERS: dict[str, Callable[[str, str], AbstractContextManager[Call]]] = {
    "log": log,
    "deque append": deque_append,
    "encode": encode,
    "encode + os.write": encode_and_write,
}

# how it is called ----------------------------------------------------------------------------------------------


def at_full_speed(call: Call, calls: int) -> "array[int]":
    values, samples = noisy(), array("q", bytes(8 * calls))
    for i in range(-WARM_UP, calls):
        loss, acc, lr = values[i & 4095]
        start = now()
        call(loss=loss, acc=acc, lr=lr, step=i)
        samples[i] = now() - start  # a negative place is one that is filled again later
    return samples


def at_20k_a_second(call: Call, calls: int) -> "array[int]":
    values, samples = noisy(), array("q", bytes(8 * calls))
    due = now()
    for i in range(-WARM_UP, calls):
        loss, acc, lr = values[i & 4095]
        due += PACED_NS
        while now() < due:
            pass
        start = now()
        call(loss=loss, acc=acc, lr=lr, step=i)
        samples[i] = now() - start
    return samples


def after_1_ms_of_sleep(call: Call, calls: int) -> "array[int]":
    async def loop() -> None:
        for i in range(-10, calls):
            loss, acc, lr = values[i & 4095]
            await asyncio.sleep(0.001)
            start = now()
            call(loss=loss, acc=acc, lr=lr, step=i)
            samples[i] = now() - start

    values, samples = noisy(), array("q", bytes(8 * calls))
    asyncio.run(loop())
    return samples


PACES = {"full": at_full_speed, "paced": at_20k_a_second, "cold": after_1_ms_of_sleep}


def measured(url: str, folder: str, contender: str, pace: str, calls: int) -> dict[str, float]:
    """Return quantiles in microseconds without the timer's own cost, which is told beside. Called in a child."""
    timer = _timer_ns()
    with CONTENDERS[contender](url, folder) as call:
        samples = sorted(PACES[pace](call, calls))
    found = {name: samples[int(part * calls)] for name, part in QUANTILES.items()} | {"max": samples[-1]}
    return {name: (ns - timer) / 1000 for name, ns in found.items()} | {"timer": timer / 1000}


def _timer_ns() -> int:
    samples = []
    for _ in range(10_000):
        start = now()
        samples.append(now() - start)
    return sorted(samples)[len(samples) // 2]


# figures -------------------------------------------------------------------------------------------------------


def _calls(run: Run, pace: str) -> int:
    quick, full = {"full": (50_000, 300_000), "paced": (8_000, 60_000), "cold": (300, 3000)}[pace]
    return run.size(quick, full)


def _figures(run: Run, pace: str, p99_at_most: float | None) -> Iterator[Figure]:
    contenders = {name: partial(run.measure, measured, name, pace, _calls(run, pace)) for name in CONTENDERS}
    results = interleaved(run.rounds(2, 5), contenders)
    ours = results.pop("log")
    for quantile in (*QUANTILES, "max"):
        figure = Figure(f"log-{pace}.{quantile}", "us", column(ours, quantile))
        figure.beside = {name: column(theirs, quantile) for name, theirs in results.items()}
        figure.ratio_to = "encode + os.write"
        if quantile == "p50":
            figure.ratio_at_most = 1.0
            figure.note = f"the timer's {min(column(ours, 'timer')):.3f} us are subtracted everywhere"
        if quantile == "p99":
            figure.at_most = p99_at_most
        yield figure


@benchmark("log-full")
def full(run: Run) -> Iterator[Figure]:
    """One trial.log of three scalars, call after call."""
    return _figures(run, "full", 10)


@benchmark("log-paced")
def paced(run: Run) -> Iterator[Figure]:
    """One trial.log at 20,000 calls per second."""
    return _figures(run, "paced", 10)


@benchmark("log-cold")
def cold(run: Run) -> Iterator[Figure]:
    """One trial.log in an asyncio loop that sleeps 1 ms before each call."""
    return _figures(run, "cold", None)


@benchmark("log-hammered")
def hammered(run: Run) -> Iterator[Figure]:
    """One trial.log while another process writes 4 MiB and calls fsync, again and again, on the same disk."""
    for pace in ("full", "paced"):
        quiet = partial(run.measure, measured, "log", pace, _calls(run, pace))
        contenders = {
            "quiet": quiet,
            "hammered": partial(_hammered, run, "log", pace),
            "hammered encode + os.write": partial(_hammered, run, "encode + os.write", pace),
        }
        results = interleaved(run.rounds(1, 5), contenders)
        ours = results.pop("hammered")
        for quantile in ("p99", "p99.9", "max"):
            figure = Figure(f"log-hammered-{pace}.{quantile}", "us", column(ours, quantile), ratio_to="quiet")
            figure.beside = {name: column(theirs, quantile) for name, theirs in results.items()}
            if quantile == "p99":
                figure.ratio_at_most = 2.0
            yield figure


def _hammered(run: Run, contender: str, pace: str) -> Any:
    with run.place() as folder, running(hammer, str(folder)):
        return run.measure(measured, contender, pace, _calls(run, pace))


def hammer(folder: str) -> None:
    """Write and fsync until killed, or until nobody is left to do so. Called in a child."""
    block, parent = os.urandom(HAMMER_BYTES), os.getppid()
    with Path(folder, "hammer").open("wb", buffering=0) as file:
        print(json.dumps("ready"), flush=True)
        while os.getppid() == parent:
            file.write(block)
            os.fsync(file.fileno())
            if file.tell() >= 32 * HAMMER_BYTES:
                file.seek(0)
