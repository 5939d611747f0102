"""How fast the log is folded into all views, beside the time that decoding it takes."""

import asyncio
from collections.abc import Iterator
from functools import partial
from time import perf_counter as now

from figures import Figure, Run, benchmark, interleaved
from fresh import fresh
from workloads import noisy_events, record_noisy, warm

import eventrun
from eventrun.codec import items_of
from eventrun.stores import open_store

NO_NUMPY = 'raise ImportError("hidden by tools/bench")\n'


def decode(url: str) -> float:
    """Read, unpack and decode all batches; return the seconds. Called in a child."""
    return asyncio.run(_decode(url))


async def _decode(url: str) -> float:
    store = open_store(url, create=False)
    start, position = now(), 0
    while found := await store.read(position):
        for stored in found:
            items_of(stored.batch)
        position = found[-1].last_position
    seconds = now() - start
    await store.aclose()
    return seconds


def rebuild(url: str) -> float:
    """Fold the whole log into new views; return the seconds. Called in a child."""
    with eventrun.open(url, quiet=True) as client:
        start = now()
        client.rebuild().result()
        return now() - start


@benchmark("fold")
def fold(run: Run) -> Iterator[Figure]:
    """client.rebuild() of a log of three scalars per event, with and without numpy."""
    events = noisy_events(run)
    url, _ = run.prepared(record_noisy, events)
    warm(url)
    with run.place() as folder:
        # found before the real one, also by processes that the rebuild starts
        (folder / "numpy.py").write_text(NO_NUMPY)
        contenders = {
            "decoding alone": partial(fresh, decode, url),
            "numpy": partial(fresh, rebuild, url),
            "pure": partial(fresh, rebuild, url, path=(str(folder),)),
        }
        results = interleaved(run.rounds(1, 3), contenders)
    rates = {name: [events / seconds for seconds in found] for name, found in results.items()}
    for name, at_least in (("numpy", 700_000), ("pure", 300_000)):
        yield Figure(
            f"fold-{name}", "events/s", rates[name], {"decoding alone": rates["decoding alone"]},
            at_least=at_least, ratio_to="decoding alone", ratio_at_most=5, note=f"{events:,} events",
        )  # fmt: skip
