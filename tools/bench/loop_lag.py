"""How much later an asyncio loop wakes its tasks because one of them logs."""

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter as now
from typing import Any

from figures import Figure, Run, benchmark, column, interleaved
from workloads import noisy

import eventrun

CALLS_PER_S = 20_000
TICK_S = 0.001


def lag(url: str, folder: str, logging: bool, seconds: float) -> dict[str, float]:
    """Return by how many milliseconds sleeps of 1 ms end late beside a task that logs, or only says that it does."""
    with eventrun.open(url, quiet=True) as client, client.trial("bench") as trial:
        late = sorted(asyncio.run(_late(trial.log if logging else _nothing, seconds)))
    return {"p50": late[len(late) // 2], "p99": late[len(late) * 99 // 100], "max": late[-1]}


def _nothing(**values: Any) -> None:
    pass


async def _late(call: Callable[..., None], seconds: float) -> list[float]:
    end = now() + seconds
    logging = asyncio.create_task(_in_bursts(call, end))
    late = []
    while (start := now()) < end:
        await asyncio.sleep(TICK_S)
        late.append((now() - start - TICK_S) * 1000)
    await logging
    return late


async def _in_bursts(call: Callable[..., None], end: float) -> None:
    """Make 20 calls per ms, and what is missing when a tick came late."""
    values, start, done = noisy(), now(), 0
    while now() < end:
        await asyncio.sleep(TICK_S)
        for step in range(done, int((now() - start) * CALLS_PER_S)):
            loss, acc, lr = values[step & 4095]
            call(loss=loss, acc=acc, lr=lr, step=step)
            done = step + 1


@benchmark("loop-lag")
def loop_lag(run: Run) -> Iterator[Figure]:
    """What 20,000 log calls per second add to the lag of an asyncio loop."""
    seconds = run.size(1, 5)
    contenders = {
        "without logging": partial(run.measure, lag, False, seconds),
        "with logging": partial(run.measure, lag, True, seconds),
    }
    results = interleaved(run.rounds(2, 5), contenders)
    for quantile in ("p50", "p99", "max"):
        beside = {name: column(found, quantile) for name, found in results.items()}
        added = [b - a for a, b in zip(*beside.values(), strict=True)]
        at_most = 1.0 if quantile == "p99" else None
        yield Figure(f"loop-lag.{quantile}", "ms", added, beside, at_most=at_most, note="with minus without")
