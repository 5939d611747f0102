"""Logs of released formats are read for ever. This file and its data never change; a new format gets a new folder."""

import math
import shutil
from pathlib import Path

import pytest

from eventrun.codec import (
    RAW,
    ZLIB,
    Batch,
    ChainChecker,
    Item,
    Stream,
    decode_envelope,
    digest,
    items_of,
    open_batch,
)
from eventrun.events import (
    ChartAdded,
    ChronoFinished,
    ChronoStarted,
    DescriptionSet,
    Event,
    GroupCreated,
    Heartbeat,
    InputMarked,
    MetadataSet,
    MetricsLogged,
    NoteAdded,
    OutputMarked,
    ParamsSet,
    ProjectCreated,
    StatusChanged,
    TableAdded,
    TagsAdded,
    TagsRemoved,
    TrialCreated,
    TrialFinished,
    TrialStarted,
    WriterEnded,
)
from eventrun.portal import Portal
from eventrun.stores.base import StoredBatch
from eventrun.stores.sqlite import SqliteStore

GOLDEN_V1 = Path(__file__).parent / "data" / "golden-v1"

T0 = 1_700_000_000_000_000_000
CLAIMS = Stream("g/golden/größe %2F", 0)
TRIAL = Stream("t/0123456789abcdef", 0x0123456789ABCDEF)
RANK = Stream("t/0123456789abcdef", 2**64 - 1)


def at(first: int, *events: Event) -> list[Item]:
    return [(T0 + first + n, event) for n, event in enumerate(events)]


# The log, batch by batch: stream, codec of its payload, items.
EXPECTED_V1: list[tuple[Stream, int, list[Item]]] = [
    (CLAIMS, RAW, at(0, ProjectCreated("golden"))),
    (CLAIMS, RAW, at(1, GroupCreated("golden", "größe/"))),
    (
        TRIAL,
        ZLIB,
        at(
            100,
            TrialCreated("golden", "größe/", "mnist 🙂", "what for", "1.2.3", 3),
            TrialStarted(),
            TrialStarted(resumed=True),
            ParamsSet(
                {"lr": 0.1, "layers": [1, 2, {"a": None}], "raw": b"\x00\xff", "big": 2**64 - 1},
                source="config.yaml",
            ),
            MetadataSet({"host": "größe", "low": -(2**63), "nested": {"deep": {"er": [True, False]}}}),
            TagsAdded({"baseline": None, "owner": "x"}),
            TagsRemoved(["baseline"]),
            DescriptionSet("another description"),
            NoteAdded("a note\nin two lines"),
        ),
    ),
    (
        RANK,
        RAW,
        at(
            50,
            # stored as the prototype did: ["m1", name, value, step]
            MetricsLogged({"loss": 0.25}, step=7),
        ),
    ),
    (
        TRIAL,
        ZLIB,
        at(
            200,
            MetricsLogged({"loss": 0.1, "acc": 1, "ok": True, "word": "wörd", "none": None}),
            MetricsLogged(
                {"nan": math.nan, "inf": math.inf, "minus": -math.inf, "zero": -0.0, "tiny": 5e-324}, step=1
            ),
            MetricsLogged({"top": 2**64 - 1, "bottom": -(2**63)}, 2.5, 1, "val", ("ring", {"n": 10}), True),
            ChronoStarted("epoch", ("stat", {})),
            ChronoFinished("epoch", 1.5, "ValueError: no", ("stat", {}), True),
            InputMarked({"path": "data.csv", "sha256": b"\x01" * 32}),
            OutputMarked("model.pt"),
            ChartAdded({"mark": "line", "encoding": {"x": {"field": "step"}}}, "loss"),
            TableAdded("predictions", {"path": "files/abc"}, 1000, {"x": "float64", "y": "str"}),
            StatusChanged("suspended", "waiting for a GPU"),
            Heartbeat(10.0),
            TrialFinished("failed", "RuntimeError: out of memory"),
        ),
    ),
    (CLAIMS, RAW, at(300, WriterEnded(0x0123456789ABCDEF, T0 + 400))),
]


def check(found: list[Batch]) -> None:
    """Assert that batches hold EXPECTED_V1, packed and chained as they were."""
    checker = ChainChecker()
    assert len(found) == len(EXPECTED_V1)
    for batch, (stream, codec, items) in zip(found, EXPECTED_V1, strict=True):
        checker.check(batch)
        assert (batch.header.stream, batch.header.codec, batch.header.version) == (stream, codec, 1)
        assert (batch.header.first_ns, batch.header.last_ns) == (items[0][0], items[-1][0])
        assert repr(items_of(batch)) == repr(items)  # by repr, since NaN isn't equal to itself


def frames() -> list[Batch]:
    """Read the file of bare frames, each after its length as u32."""
    data, found = (GOLDEN_V1 / "frames.bin").read_bytes(), []
    while data:
        size = int.from_bytes(data[:4], "big")
        found.append(open_batch(data[4 : 4 + size]))
        data = data[4 + size :]
    return found


def test_every_kind_of_event_of_version_1_is_in_it() -> None:
    kinds = {type(event).__name__ for _, _, items in EXPECTED_V1 for _, event in items}
    assert len(kinds) == 21


def test_frames() -> None:
    check(frames())


def test_digests() -> None:
    """The hash chain is part of the format: who goes on with an old log must find the same digests."""
    assert [digest(batch).hex() for batch in frames()] == DIGESTS_V1


@pytest.mark.parametrize("name", ["envelope-raw.bin", "envelope-zlib.bin"])
def test_envelope(name: str) -> None:
    check(decode_envelope((GOLDEN_V1 / name).read_bytes()))


def test_store(tmp_path: Path) -> None:
    """A store of format 1 is read, checked and appended to."""
    folder = tmp_path / "store"
    shutil.copytree(GOLDEN_V1 / "store", folder)
    portal = Portal()
    store = SqliteStore(folder)

    async def use() -> list[StoredBatch]:
        assert await store.check() == []
        assert await store.lost_tail() is None
        assert (await store.tip(RANK)).digest == digest(frames()[3])
        found = await store.read()
        assert await store.append([found[-1].batch]) == await store.end() == 25
        await store.aclose()
        return found

    try:
        found = portal.call(use).result(60)
    finally:
        portal.stop()
    assert [stored.position for stored in found] == [1, 2, 3, 12, 13, 25]
    check([stored.batch for stored in found])


DIGESTS_V1 = [
    "2262c6b16e40471e91abcd3ba25df7bb",
    "e70ee64ba54a4c06119e41fd556ecc07",
    "b9efd033c63be05b03c5c667494077ad",
    "938ee28f6089ea255d8706edd9861939",
    "f9699e7cfc79b495d29be87f0e082e41",
    "083dd469f88042e765cd3088bade9a7b",
]
