"""7. Truncated tails: each length of the last two blocks of journal, log.db and write-ahead file."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from eventrun.journal import segments_in
from eventrun.stores.sqlite import pages
from eventrun.stores.sqlite.mark import Mark
from tests.crash.damaging import laid, look, made, said, salvaged
from tests.crash.harness import Table, Tally, rounds

BLOCK = 512


def lengths(quick: int, full: int = 2 * BLOCK) -> list[int]:
    """Tell how much to cut off: each byte of two blocks in the full run, else some, the blocks' edges among them."""
    times = min(rounds(quick, full), full)
    edges = [1, BLOCK, 2 * BLOCK]
    rest = [cut for cut in range(2, full) if cut not in edges]
    return sorted([*edges, *random.Random(times).sample(rest, max(min(times, full) - len(edges), 1))])


def wal_in_use(store: Path) -> bytes:
    """Return the write-ahead file up to its last page that counts: behind it lies what an older run has left."""
    raw = pages.RawLog(store / "log.db")
    end = max(frame.offset for frame in raw.frames if frame.good) + pages.FRAME_HEADER_BYTES + raw.page_bytes
    raw.close()
    return (store / "log.db-wal").read_bytes()[:end]


@pytest.mark.crash
@pytest.mark.parametrize("how", ["killed", "hindered"])
def test_a_cut_write_ahead_file_costs_nothing(tmp_path: Path, table: Table, how: str) -> None:
    """Whatever is cut off the write-ahead file of a killed writer stands in its journal, which recovery takes in."""
    store = made(tmp_path / "runs", how)
    data = wal_in_use(store)
    sent = said(look(laid(store, tmp_path / "whole")).events)
    total, cuts = Tally(), [*lengths(8), len(data) // 2, len(data) - 40, len(data)]
    for cut in cuts:
        target = laid(store, tmp_path / "cut")
        (target / "log.db-wal").write_bytes(data[: len(data) - cut])
        found = look(target)
        assert said(found.events) == sent, cut
        total = total.plus(Tally(len(sent), len(sent), 0, 0, tuple(found.reported)))
    table.add(7, f"write-ahead file cut off ({how})", len(cuts), total)


@pytest.mark.crash
def test_a_write_ahead_file_cut_off_without_journals_is_told(
    tmp_path: Path, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where journals are gone as well (a careless copy), log.mark tells that the log was longer.

    And without the mark nobody would notice.
    """
    store = made(tmp_path / "runs", "flushed")
    shutil.rmtree(store / "journals")
    data = wal_in_use(store)
    sent = said(look(laid(store, tmp_path / "whole")).events)
    total, cuts, silent = Tally(), lengths(6), 0
    for marked in (True, False):
        if not marked:
            monkeypatch.setattr(Mark, "read", lambda self: 0)
        for cut in cuts:
            target = laid(store, tmp_path / "cut")
            (target / "log.db-wal").write_bytes(data[: len(data) - cut])
            found = look(target)
            kept = said(found.events)
            assert len(kept) < len(sent)
            if not marked:
                silent += not found.reported
                continue
            assert any("were in the log once and are lost" in text for text in found.reported)
            total = total.plus(Tally(0, len(kept), 0, 0, tuple(found.reported)))
    table.add(7, "write-ahead file cut off, journals gone: told", len(cuts), total)
    table.caught(7, "log.mark not read", len(cuts), silent)
    assert silent


@pytest.mark.crash
@pytest.mark.parametrize("how", ["flushed", "killed"])
def test_a_cut_journal(tmp_path: Path, table: Table, how: str) -> None:
    """What the log has already is not missed; of the rest each stream keeps a prefix, and what is missing is told.

    That is what lies behind the last mark before the cut: no checksum vouches for it.
    """
    store = made(tmp_path / "runs", how)
    (folder,) = (store / "journals").iterdir()
    sent = said(look(laid(store, tmp_path / "whole")).events)
    by_subject = {
        subject: [each for each in sent if each[0] == subject] for subject in {one[0] for one in sent}
    }
    ends: dict[Path, int] = {}
    for segments in segments_in(folder)[0].values():
        for segment in segments:
            ends[segment.path] = max(ends.get(segment.path, 0), segment.base + segment.head[0])
    total, cuts = Tally(), lengths(6)
    for path, end in ends.items():
        data = path.read_bytes()
        for cut in cuts:
            target = laid(store, tmp_path / "cut")
            (target / "journals" / folder.name / path.name).write_bytes(data[: end - cut])
            found = look(target)
            kept = said(found.events)
            for subject, all_of_it in by_subject.items():
                some = [each for each in kept if each[0] == subject]
                assert some == all_of_it[: len(some)], (path.name, cut)
            assert kept == sent or found.reported, (path.name, cut)
            if how == "flushed":
                assert kept == sent, (path.name, cut)
            missing = len(sent) - len(kept)
            total = total.plus(Tally(len(sent), len(kept), missing, 0, tuple(found.reported)))
    table.add(7, f"journal cut off ({how})", len(cuts) * len(ends), total)


@pytest.mark.crash
def test_a_cut_log_is_told(tmp_path: Path, table: Table) -> None:
    """Whatever is cut off log.db is told; salvage has all that lies before the cut."""
    store = made(tmp_path / "runs", "closed")
    shutil.rmtree(store / "journals", ignore_errors=True)
    data = (store / "log.db").read_bytes()
    events = look(laid(store, tmp_path / "whole")).events
    raw = pages.RawLog(store / "log.db")
    batches = {found.batch.frame: found.place.offset + found.place.at for found in raw.candidates()}
    raw.close()
    total, cuts = Tally(), [*lengths(6), pages.PAGE_BYTES, len(data) // 2, len(data) - 100, len(data)]
    for number, cut in enumerate(cuts):
        target = laid(store, tmp_path / "cut")
        left = data[: len(data) - cut]
        (target / "log.db").write_bytes(left)
        found = look(target)
        assert found.reported or found.events == events, cut
        assert number % 3 == 0 or found.reported or cut < pages.PAGE_BYTES
        (target / "log.db").write_bytes(left)
        kept = {one[2:] for one in said(salvaged(target))}
        whole = sum(frame in left for frame in batches)
        assert len(kept) >= whole
        total = total.plus(Tally(0, len(kept), 0, 0, tuple(found.reported)))
    table.add(7, "log.db cut off: told", len(cuts), total)


@pytest.mark.crash
def test_a_cut_log_beside_journals_costs_nothing(tmp_path: Path, table: Table) -> None:
    """What is cut off log.db and stands in a journal or in the write-ahead file still, salvage puts together."""
    store = made(tmp_path / "runs", "killed")
    data = (store / "log.db").read_bytes()
    sent = said(look(laid(store, tmp_path / "whole")).events)
    total, cuts = Tally(), [*lengths(5), len(data) // 2]
    for cut in cuts:
        target = laid(store, tmp_path / "cut")
        (target / "log.db").write_bytes(data[: len(data) - cut])
        found = look(target)
        if said(found.events) != sent:
            assert found.reported, cut
            target = laid(store, tmp_path / "cut")
            (target / "log.db").write_bytes(data[: len(data) - cut])
            assert sorted(said(salvaged(target))) == sorted(sent), cut
        total = total.plus(Tally(len(sent), len(sent), 0, 0, tuple(found.reported)))
    table.add(7, "log.db cut off beside journals", len(cuts), total)
