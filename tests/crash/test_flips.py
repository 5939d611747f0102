"""8. Bit flips in each file of a store: what changes is told, and costs no more than it must.

In the full run there are 10,000 of them, all together.
"""

from __future__ import annotations

import random
import shutil
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

import eventrun
from eventrun.codec import RAW, Batch, payload_of
from eventrun.errors import EventrunError, LogDamaged
from eventrun.journal import segments_in
from eventrun.journal.scan import stretches
from eventrun.journal.segments import MARK_BYTES
from eventrun.stores.sqlite import pages
from tests.crash.damaging import Said, laid, look, made, said, salvaged
from tests.crash.harness import LONG_S, Table, Tally, rounds


def flips(data: bytes, times: int, seed: int, within: Sequence[range] = ()) -> Iterator[tuple[int, bytes]]:
    """Yield places and changed contents: random bits, in the full run of each byte if it is small."""
    places = [at for part in within or [range(len(data))] for at in part]
    chance = random.Random(seed)
    chosen = places if len(places) <= times else [chance.choice(places) for _ in range(times)]
    for at in chosen:
        yield at, data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


# log.db --------------------------------------------------------------------------------------------------------------


def pages_of(store: Path) -> dict[int, list[Batch]]:
    """Tell which batches lie on each page of log.db, wholly or in part."""
    raw = pages.RawLog(store / "log.db")
    used: dict[int, list[Batch]] = {}
    data = (store / "log.db").read_bytes()
    for found in raw.candidates():
        start, at = found.place.offset, found.place.at
        cell = pages._cell(data[start : start + raw.page_bytes], at, raw.page_bytes)
        assert cell is not None
        left, number = len(found.batch.frame) - (cell.local_end - at), cell.next
        used.setdefault(start // raw.page_bytes, []).append(found.batch)
        while left > 0:
            used.setdefault(number - 1, []).append(found.batch)
            start = (number - 1) * raw.page_bytes
            number, left = int.from_bytes(data[start : start + 4], "big"), left - raw.page_bytes + 4
    raw.close()
    return used


def flip_log(store: Path, place: Path, times: int, every: int = 1) -> tuple[Tally, int]:
    """Flip bits of log.db; return what came of it, and how many flips changed what is read without a word."""
    good = look(store)
    assert not good.reported
    data, used = (store / "log.db").read_bytes(), pages_of(store)
    total, silent, reported = Tally(), 0, 0
    target = laid(store, place)
    for number, (at, changed) in enumerate(flips(data, times, 1)):
        for beside in target.glob("log.db-*"):
            beside.unlink()
        (target / "log.db").write_bytes(changed)
        found = look(target)
        silent += found.events != good.events and not found.reported
        if not found.reported:
            continue
        reported += 1
        if reported % every:
            continue
        (target / "log.db").write_bytes(changed)
        kept, sent = set(said(salvaged(target))), said(good.events)
        lost = [each for each in good.events if said([each])[0][2:] not in {one[2:] for one in kept}]
        on_page = used.get(at // pages.PAGE_BYTES, [])
        outside = [
            each
            for each in lost
            if not any(
                batch.header.stream == each.stream
                and batch.header.first <= each.sequence <= batch.header.last
                for batch in on_page
            )
        ]
        assert not outside, (number, at, outside)
        total = total.plus(Tally(len(sent), len(sent) - len(lost), len(lost), 0, tuple(found.reported[:1])))
    return total, silent


@pytest.mark.crash
def test_flips_in_the_log_are_told(tmp_path: Path, table: Table) -> None:
    """A changed bit in log.db is told or changes nothing that is read, and costs at most the batches on its page.

    In a page of the schema, of a tree or an index it costs nothing: salvage does without them.
    """
    store = made(tmp_path / "runs", "closed")
    shutil.rmtree(store / "journals", ignore_errors=True)
    times = rounds(40, 3000)
    total, silent = flip_log(store, tmp_path / "flipped", times, every=5 if times < 1000 else 1)
    table.add(8, "bit flips in log.db, salvaged", times, total)
    assert not silent
    assert total.reported


@pytest.mark.crash
def test_checksums_that_are_not_compared_are_caught(
    tmp_path: Path, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: where nobody compares the CRC of what a batch holds (nor zlib's own), events change."""
    store = made(tmp_path / "runs", "closed")
    shutil.rmtree(store / "journals", ignore_errors=True)

    def unchecked(batch: Batch) -> bytes:
        body = batch.frame[6 + int.from_bytes(batch.frame[:2], "big") :]
        try:
            return body if batch.header.codec == RAW else zlib.decompressobj(-15).decompress(body[2:])
        except zlib.error as error:
            raise LogDamaged(str(error)) from error

    monkeypatch.setattr(payload_of, "__code__", unchecked.__code__)
    times = 30
    _, silent = flip_log(store, tmp_path / "flipped", times, every=1 << 30)
    table.caught(8, "CRC of batches not compared", times, silent)
    assert silent


# the write-ahead file ------------------------------------------------------------------------------------------------


@pytest.mark.crash
@pytest.mark.parametrize("how", ["killed", "hindered"])
def test_flips_in_the_write_ahead_file_cost_nothing(tmp_path: Path, table: Table, how: str) -> None:
    """Whatever a changed bit in the write-ahead file of a dead store does, all events are there.

    At the next open, from database and journals; or, when a checkpoint had stopped half-way and SQLite lays older
    pages over newer ones, that is told, and salvage has them all.
    """
    store = made(tmp_path / "runs", how)
    data = (store / "log.db-wal").read_bytes()
    sent = said(look(laid(store, tmp_path / "whole")).events)
    times = rounds(15, 1500 if how == "killed" else 500)
    total = Tally()
    for _, changed in flips(data, times, 2):
        target = laid(store, tmp_path / "flipped")
        (target / "log.db-wal").write_bytes(changed)
        found = look(target)
        kept = said(found.events)
        if kept != sent:
            assert found.reported
            (target / "log.db-wal").write_bytes(changed)
            kept = sorted(said(salvaged(target)))
            assert kept == sorted(sent)
        total = total.plus(Tally(len(sent), len(kept), 0, 0, tuple(found.reported[:1])))
    table.add(8, f"bit flips in the write-ahead file ({how})", times, total)


# journals ------------------------------------------------------------------------------------------------------------


def used_bytes(folder: Path) -> tuple[dict[Path, list[range]], int]:
    """Tell which bytes of a writer's journal files say something: headers, marks and items up to the head.

    And how many events lie between two marks at most.
    """
    streams, problems = segments_in(folder)
    assert not problems
    used: dict[Path, list[range]] = {}
    most = 0
    for segment in (segment for segments in streams.values() for segment in segments):
        used.setdefault(segment.path, []).append(range(segment.base, segment.base + segment.head[0]))
        (held,) = stretches(segment)
        ends = [(segment.start, 0), *((at, count) for at, count, _ in segment.points)]
        ends.append((segment.head[0], held.events))
        for (at, count), (end, further) in pairwise(ends):
            assert end - at <= MARK_BYTES
            most = max(most, further - count)
    return used, most


@pytest.mark.crash
def test_flips_in_a_journal_cost_what_lies_between_two_marks(tmp_path: Path, table: Table) -> None:
    """A changed bit in a dead writer's journal is told if it costs events, and none of them is ever taken in changed.

    Without the log's help it costs at most what lies between two marks; what a gap keeps from the log stays in the
    journal, and salvage has it.
    """
    store = made(tmp_path / "runs", "killed")
    (folder,) = (store / "journals").iterdir()
    events = look(laid(store, tmp_path / "whole")).events
    sent = said(events)
    by_stream: dict[str, list[Said]] = {}
    for each in sent:
        by_stream.setdefault(each[0], []).append(each)
    used, most = used_bytes(folder)
    times = rounds(20, 3000)
    total = Tally()
    for path, places in used.items():
        share = max(
            times * sum(map(len, places)) // sum(len(part) for parts in used.values() for part in parts), 5
        )
        for at, changed in flips(path.read_bytes(), share, 3, places):
            target = laid(store, tmp_path / "flipped")
            (target / "journals" / folder.name / path.name).write_bytes(changed)
            found = look(target)
            kept = said(found.events)
            for subject, all_of_it in by_stream.items():
                some = [each for each in kept if each[0] == subject]
                assert some == all_of_it[: len(some)], (path.name, at)
            assert kept == sent or found.reported, (path.name, at)
            if kept != sent:
                saved = salvaged(target)
                there = {one[2:] for one in said(saved)}
                lost = [each for each in sent if each[2:] not in there]
                assert len(lost) <= most, (path.name, at)
                kept = [each for each in sent if each[2:] in there]
            lost_here = len(sent) - len(kept)
            total = total.plus(Tally(len(sent), len(kept), lost_here, 0, tuple(found.reported[:1])))
    table.add(8, "bit flips in a dead writer's journal", times, total)
    assert total.reported


# views ---------------------------------------------------------------------------------------------------------------


def shown(client: eventrun.Client) -> list[object]:
    """What the views show: trials, groups and a series of each."""
    trials = [trial.to_dict() for trial in client.trials()]
    series = [client.history(str(trial["id"]), "loss").result(LONG_S).to_dict() for trial in trials]
    return [trials, [group.to_dict() for group in client.groups()], series]


@pytest.mark.crash
@pytest.mark.parametrize("name", ["views-*.db", "views-*.db-wal", "views"])
def test_flips_in_the_views_cost_nothing(tmp_path: Path, table: Table, name: str) -> None:
    """No changed bit in views costs an event; what they then show wrongly is told by verify, or mended."""
    store = made(tmp_path / "runs", "closed")
    for each in store.glob("views*"):
        each.unlink()
    with eventrun.open(store, quiet=True) as client:
        right = shown(client)
        pointer = (store / "views").read_text().split()[0] if "-" in name else "views"
        whole = laid(store, tmp_path / "whole")  # while it is open: with the views' own write-ahead file
    (file,) = [path for path in whole.glob(name) if path.name.startswith(pointer)]
    events = look(laid(whole, tmp_path / "looked at")).events
    times = rounds(15, 1200) if name == "views-*.db" else rounds(5, 400)
    total, wrong, silent = Tally(), 0, 0
    target = laid(whole, tmp_path / "flipped")
    for at, changed in flips(file.read_bytes(), times, 4):
        for each in [*target.glob("views*"), *target.glob("log.db*")]:
            each.unlink()
        for each in [*whole.glob("views*"), *whole.glob("log.db*")]:
            if not each.name.endswith("-shm"):
                shutil.copy(each, target)
        (target / file.name).write_bytes(changed)
        with eventrun.open(target, quiet=True, create=False) as client:
            try:
                answer = shown(client)
            except EventrunError as error:
                answer = [str(error)]
            report = client.verify(views=True).result(LONG_S)
            assert list(client.events()) == events
        told = tuple(map(str, report.problems))
        wrong += answer != right
        silent += answer != right and not told
        assert not silent, at
        total = total.plus(Tally(len(events), len(events), 0, 0, told[:1]))
    table.add(8, f"bit flips in {name.replace('-*', '')}", times, total)
