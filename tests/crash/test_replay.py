"""17. Replay: however a log was cut, caught up with and read, and by which process, the views are the same bytes."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest

import eventrun
from eventrun import aggregators
from eventrun.aggregators import Moments
from eventrun.codec import Batch, Item, Stream
from eventrun.events import (
    ChronoFinished,
    ChronoStarted,
    Event,
    MetricsLogged,
    NoteAdded,
    ParamsSet,
    ProjectCreated,
    Scalar,
    StatusChanged,
    TagsAdded,
    TagsRemoved,
    TrialCreated,
    TrialFinished,
    TrialStarted,
)
from eventrun.formats import events_jsonl
from eventrun.projector import Views
from eventrun.query import Reader
from eventrun.testing import chain
from tests.crash.folding import Run, folded, memory_log
from tests.crash.harness import LONG_S, Table, Tally, rounds

TRIALS, WRITERS = ("one", "two", "three"), (1, 2)
SECOND = 10**9


def history(seed: int, events: int = 1200) -> list[tuple[Stream, Item]]:
    """Draw what several writers recorded, in the order of the log. Values are such that a rounded sum shows it."""
    chance = random.Random(seed)
    found: list[tuple[Stream, Item]] = [(Stream("p/p", 1), (0, ProjectCreated("p")))]
    found += [(Stream(f"t/{name}", 1), (1, TrialCreated("p", "g", name))) for name in TRIALS]
    found += [(Stream(f"t/{name}", writer), (2, TrialStarted())) for name in TRIALS for writer in WRITERS]
    for n in range(events):
        stream = Stream(f"t/{chance.choice(TRIALS)}", chance.choice(WRITERS))
        # As ranks do: all log metrics, one tells the rest, whose order is that of the log.
        event = _logged(chance, n) if chance.random() < 0.9 or stream.writer != 1 else _told(chance, n)
        found.append((stream, (3 * SECOND + n * SECOND // 7, event)))
    found.append((Stream("t/one", 1), (10**18, TrialFinished())))
    return found


def _logged(chance: random.Random, n: int) -> Event:
    values: dict[str, Scalar] = {"acc": chance.random()}
    values["loss"] = (chance.random() - 0.5) * 10.0 ** chance.randrange(-3, 12)
    if chance.random() < 0.1:
        values["odd"] = chance.choice([float("nan"), "word", None, True, 2**63, -0.5])
    return MetricsLogged(values, n)


def _told(chance: random.Random, n: int) -> Event:
    told: list[Event] = [
        ParamsSet({"lr": chance.random(), "layers": {"n": n}}), TagsAdded({f"tag{n % 5}": None}),
        TagsRemoved([f"tag{n % 3}"]), NoteAdded(f"note {n}"), StatusChanged("suspended"),
        ChronoStarted("epoch"), ChronoFinished("epoch", chance.random()),
    ]  # fmt: skip
    return chance.choice(told)


def in_runs(found: list[tuple[Stream, Item]], cuts: set[int]) -> Iterator[Run]:
    """Make batches: of what follows each other in one stream, ended at the cuts too."""
    ends = [0]
    for place, ((stream, _), (other, _)) in enumerate(pairwise(found), 1):
        if stream != other or place in cuts:
            ends.append(place)
    for start, end in pairwise([*ends, len(found)]):
        yield found[start][0], [item for _, item in found[start:end]]


def by_stream(found: list[tuple[Stream, Item]]) -> list[tuple[Stream, Item]]:
    """Order one stream after the other: one of the orders in which writers may have come to the log."""
    return sorted(found, key=lambda each: each[0])


def caught_up(found: list[tuple[Stream, Item]], chance: random.Random) -> str:
    """Catch up now and then while the log grows, then digest."""
    log = memory_log(in_runs(found, set()))
    end, reached = log.end(), 0
    views = Views(None, log._replace(end=lambda: reached))
    while reached < end:
        # Only whole batches are ever in a log.
        reached = log.read(chance.randint(reached, end - 1), limit_bytes=1)[0].last_position
        views.catch_up()
    try:
        return views.digest()
    finally:
        views.close()


def rebuilt(found: list[tuple[Stream, Item]], folder: Path) -> list[str]:
    """Rebuild twice in a folder, then one trial."""
    views = Views(folder, memory_log(in_runs(found, set())))
    digests = []
    for trial in (None, None, "one"):
        views.rebuild(trial)
        digests.append(views.digest())
    views.close()
    return digests


def all_ways(seed: int, folder: Path) -> set[str]:
    """Fold one log in many ways; return the digests."""
    found, chance = history(seed), random.Random(seed)
    places = range(1, len(found))
    digests = {
        folded(in_runs(found, set())),
        folded(in_runs(found, set(places))),
        folded(in_runs(found, set(chance.sample(places, 300)))),
        *(caught_up(found, chance) for _ in range(2)),
        *rebuilt(found, folder),
    }
    few: Any = {"LIVE_TRIALS": 1, "LIVE_POINTS": 50, "ROWS": 3}
    with mock.patch.multiple("eventrun.projector.catchup", **few):
        digests.add(folded(in_runs(found, set())))
    # Long columns for numpy need another order. That is another log, so there are two digests when all is well.
    for numpy in (True, False):
        with mock.patch.dict(sys.modules, {} if numpy else {"numpy": None}):
            if numpy and aggregators.load_numpy():
                assert "numpy" in sys.modules
            digests.add(folded(in_runs(by_stream(found), set())))
            digests.add(folded(in_runs(by_stream(found), set(places))))
    return digests


@pytest.mark.crash
def test_one_log_gives_one_digest(tmp_path: Path, table: Table) -> None:
    """Other batches, other moments of catching up, rebuilds, few trials in memory, with and without numpy: the views
    of one log are the same bytes."""
    times = rounds(2, 100)
    for seed in range(times):
        assert len(all_ways(seed, tmp_path / str(seed))) == 2
    events = len(history(0)) * times
    table.add(17, "replay: cut, caught up, rebuilt otherwise", times, Tally(events, events))


ROUNDED = Moments._take


def rounded(self: Moments, *part: Any) -> None:
    """Keep the sum as a double, as a bare sum() does."""
    ROUNDED(self, *part)
    top, bottom = self.total.as_integer_ratio()
    self.exact_sum = aggregators._add(b"", (top, 1 - bottom.bit_length()))


@pytest.mark.crash
def test_a_rounded_sum_is_caught(tmp_path: Path, table: Table) -> None:
    """The test above can fail: with sums of doubles, the digest depends on where batches and catch-ups ended."""
    with mock.patch.object(Moments, "_take", rounded):
        assert len(all_ways(0, tmp_path)) > 2
    table.caught(17, "sums of doubles, rounded at each step", 1, 1)


# other orders --------------------------------------------------------------------------------------------------


def states(found: list[tuple[Stream, Item]]) -> str:
    """Fold into trials' states, and hash all but the places in the log."""
    log = memory_log(in_runs(found, set()))
    reader = Reader(None, read=log.read, end=log.end)
    try:
        return states_digest(reader)
    finally:
        reader.close()


def states_digest(reader: Reader) -> str:
    """Hash what is told of each trial, but for its place in the log, and the steps that came first and last to it."""
    trials, _ = reader.trials(0)
    digest = hashlib.sha256()
    for state in sorted(trials, key=lambda trial: trial.id):
        plain = state.to_dict()
        plain.pop("position")
        for metric in plain["metrics"].values():
            del metric["first_step"], metric["last_step"]
        digest.update(msgspec.msgpack.encode(plain, order="sorted"))
    return digest.hexdigest()


@pytest.mark.crash
def test_other_orders_of_the_writers_give_the_same_states(table: Table) -> None:
    """Streams may come to the log in any order among each other: what is told of each trial is the same."""
    times = rounds(2, 100)
    for seed in range(times):
        found, chance = history(seed, 400), random.Random(seed)
        expected = states(found)
        queues: dict[Stream, list[Item]] = {}
        for stream, item in found:
            queues.setdefault(stream, []).append(item)
        assert states(by_stream(found)) == expected
        order = chance.sample([stream for stream, _ in found], len(found))
        mixed = [(stream, queues[stream].pop(0)) for stream in order]
        assert states(mixed) == expected, seed
    events = len(history(0, 400)) * times
    table.add(17, "replay: writers in another order", times, Tally(events, events))


@pytest.mark.crash
def test_shards_that_are_merged_give_the_same_states(tmp_path: Path, table: Table) -> None:
    """Two stores' events brought into one, by export and import or batch by batch: the states of one store."""
    found = history(7, 300)
    shards = [[each for each in found if each[0].writer == writer] for writer in WRITERS]
    urls = [tmp_path / f"shard{n}" for n in range(2)]
    for url, shard in zip(urls, shards, strict=True):
        fill(url, shard)
    expected = states(found)
    for name, bring in (("imported", by_import), ("appended", by_append)):
        with eventrun.open(tmp_path / name, quiet=True) as merged:
            for url in urls:
                with eventrun.open(url, quiet=True) as shard_client:
                    bring(shard_client, merged)
            merged.projects().first().result(LONG_S)  # caught up
            reader = merged._reader()
            assert merged._portal.read(states_digest, reader).result(LONG_S) == expected
            assert merged.verify(views=True).result(LONG_S).ok
    table.add(17, "replay: two stores merged", 2, Tally(2 * len(found), 2 * len(found)))


def fill(url: Path, found: list[tuple[Stream, Item]]) -> None:
    """Make a store of these events."""
    last: dict[Stream, Batch] = {}
    batches = []
    for stream, items in in_runs(found, set()):
        last[stream] = chain(stream, [items], last.get(stream))[-1]
        batches.append(last[stream])
    with eventrun.open(url, quiet=True) as client:
        client.append(batches).result(LONG_S)


def by_import(source: eventrun.Client, target: eventrun.Client) -> None:
    lines = [events_jsonl.event_line(stored) for stored in source.events()]
    assert events_jsonl.import_events(target, lines).added == len(lines)


def by_append(source: eventrun.Client, target: eventrun.Client) -> None:
    target.append([stored.batch for stored in source.batches()]).result(LONG_S)


# other processes -----------------------------------------------------------------------------------------------

DIGEST = """
import sys
import eventrun
if sys.argv[2] == "numpy":
    import numpy
with eventrun.open(sys.argv[1], quiet=True, create=False) as client:
    client.rebuild().result()
    print(client._portal.read(client._reader().views.digest).result())
"""


@pytest.mark.crash
def test_other_processes_give_the_same_digest(tmp_path: Path, table: Table) -> None:
    """Another seed of hashes, asserts left out, with numpy loaded and without: the views of one log are the same."""
    found = history(11)
    fill(tmp_path / "runs", found)
    numpy = importlib.util.find_spec("numpy") is not None
    ways = [
        (seed, flag, loaded)
        for seed, flag, loaded in (("0", "-b", ""), ("1", "-O", "numpy"), ("4711", "-b", ""))
        if numpy or not loaded
    ]
    digests = set()
    for seed, flag, loaded in ways:
        done = subprocess.run(
            [sys.executable, flag, "-c", DIGEST, str(tmp_path / "runs"), loaded],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, timeout=LONG_S, check=True,
        )  # fmt: skip
        digests.add(done.stdout.strip())
    assert digests == {folded(in_runs(found, set()))}
    table.add(17, "replay: other processes", len(ways), Tally(len(found) * len(ways), len(found) * len(ways)))
