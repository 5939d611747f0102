"""Taking in what killed writers left in their journals: whoever opens the store next, once.

Recovering twice, or dying while recovering, changes nothing: what the log already holds is compared byte for byte and
skipped, and a folder is removed only when the log holds all of it for good. `collecting` does the same on network
disks, also for writers that live.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable
from itertools import groupby, zip_longest
from operator import attrgetter
from pathlib import Path

from msgspec import Struct

from eventrun.clock import time_ns
from eventrun.codec import (
    CLAIM_WRITER,
    Batch,
    Stream,
    decode_items,
    digest,
    encode_item,
    items_of,
    payload_of,
    seal,
)
from eventrun.errors import Conflict, FormatTooNew, LogDamaged
from eventrun.events import WriterEnded
from eventrun.journal import (
    dead_writers,
    has_ended,
    is_whole,
    keep_damaged,
    of_earlier_boot,
    recover,
    remove_folder,
    segments_in,
)
from eventrun.journal.scan import Found, Recovered
from eventrun.stores.base import Store, StoredBatch, Tip

BATCH_BYTES = 1 << 20
COMMIT_BYTES, COMMIT_BATCHES = 8 << 20, 1000
FIRST_LOOK = 4096  # positions from the log's end in which a stream's last batches are looked for first


class RecoveryReport(Struct):
    """What recovery found: killed writers, the events taken in, what could not be, and what was left to others."""

    writers: int = 0
    events: int = 0
    problems: list[str] = []
    left: list[str] = []


async def recover_dead_writers(store: Store, journals: Path) -> RecoveryReport:
    """Append what the journals of dead writers of this host hold and the log lacks. Raises StoreError."""
    report = RecoveryReport()
    for folder, descriptor in dead_writers(journals):
        try:
            torn = of_earlier_boot(descriptor) and not is_whole(folder)
            await recover_folder(store, folder, report, torn=torn)
        finally:
            os.close(descriptor)
    return report


async def recover_folder(store: Store, folder: Path, report: RecoveryReport, *, torn: bool = False) -> None:
    """Take in and remove the folder of a writer that lives no more.

    `torn`: its machine went down, so not all of its files need be whole.
    Raises StoreError when the store fails; what is the matter with this folder alone stands in the report.
    """
    try:
        if not (report.writers or report.events):
            await _check_sound(store)
        await _recover_writer(store, folder, report, torn)
    except (
        Conflict,
        FormatTooNew,
        LogDamaged,
        OSError,
    ) as error:  # nothing is lost, and the others need not wait for it
        report.problems.append(f"{folder.name} is left for the next open: {error}")


async def _check_sound(store: Store) -> None:
    """Raise LogDamaged when nothing should be appended to a log, and no journal removed: it is damaged inside."""
    lost_tail = getattr(store, "lost_tail", None)
    lost = None if lost_tail is None else await lost_tail()
    if lost is None:
        return
    # Most often nothing but the end is missing (damage in the write-ahead file), and the journals have it. But where a
    # checkpoint was under way, SQLite may have laid older pages over newer ones.
    found = await store.check() if hasattr(store, "check") else []
    position = 0
    while not found and (batches := await store.read(position)):
        position = batches[-1].last_position
    if found:
        raise LogDamaged(
            f"the log is damaged ({found[0]}): `eventrun salvage OUT` saves what can be read, journals included"
        )


async def _recover_writer(store: Store, folder: Path, report: RecoveryReport, torn: bool) -> None:
    streams, problems = segments_in(folder, torn=torn)
    intake = Intake(store)
    events = 0
    for stream, segments in streams.items():
        try:
            events += await _recover_stream(store, intake, stream, segments, problems, torn)
        except LogDamaged as error:
            problems.append(str(error))
    await intake.commit()
    report.events += events
    if not has_ended(folder):  # else its trials are as it left them, not lost
        await note_ends(store, streams)
    await store.settle()
    report.writers += 1
    if problems:
        why = " (the machine went down: what had not reached the disk is lost)" if torn else ""
        report.problems.extend(f"{folder.name}: {problem}{why}" for problem in problems)
        keep_damaged(folder)
    else:
        remove_folder(folder)


async def _recover_stream(
    store: Store, intake: Intake, stream: Stream, segments: list[Found], problems: list[str], torn: bool
) -> int:
    tip = await store.tip(stream)
    events = position = 0
    groups = [list(same) for _, same in groupby(segments, attrgetter("first"))]
    if tip.sequence:
        position = await _position_of(store, stream, min(groups[0][0].first, tip.sequence) if groups else 1)
    for same, following in zip_longest(groups, groups[1:]):
        segment = same[0]
        if segment.first > tip.sequence + 1:
            raise LogDamaged(f"{stream}: sequences {tip.sequence + 1} to {segment.first - 1} are missing")
        last = tip.sequence if following is None else min(following[0].first - 1, tip.sequence)
        if events and segment.first <= last:  # a copy that was cut differently
            await intake.commit()
        logged, position = await _logged(store, stream, segment.first, last, position)
        segment, found = best_of(same, logged, max(0, last - segment.first + 1), torn=torn)
        if found.problem is not None:
            problems.append(f"{segment.path.name}: {found.problem}")
        if found.events:
            tip = await put_all(intake, segment, found, tip)
            events += found.events
    return events


def best_of(same: list[Found], logged: bytes, count: int, *, torn: bool = False) -> tuple[Found, Recovered]:
    """Recover a segment. After a failed sync there may be several copies: take the one that goes furthest."""
    found = [(each, recover(each, logged, count, torn=torn)) for each in same]
    return max(found, key=lambda pair: (pair[1].events, pair[1].problem is None))


async def _logged(store: Store, stream: Stream, first: int, last: int, position: int) -> tuple[bytes, int]:
    """Return the log's bytes of a stream's sequences from `first` to `last`, and where to look for the next ones."""
    payloads: list[bytes] = []
    while first <= last and (batches := await store.read(position, subject=stream.subject)):
        for stored in batches:
            header = stored.batch.header
            if header.stream == stream and first <= header.first <= last:
                payloads.append(payload_of(stored.batch))
                first = header.last + 1
            if first > last:
                break
            position = stored.last_position
    if first <= last:
        raise LogDamaged(f"{stream}: the log lacks sequences {first} to {last} of those that it had")
    return b"".join(payloads), position


async def logged_from(store: Store, stream: Stream, first: int, last: int) -> bytes:
    """Return the log's bytes of a stream's sequences from `first` to `last`."""
    if first > last:
        return b""
    payload, _ = await _logged(store, stream, first, last, await _position_of(store, stream, first))
    return payload


async def _position_of(store: Store, stream: Stream, sequence: int) -> int:
    """Find a position before a sequence of a stream, from the log's end: it may be long, and what is asked for new."""
    end, back = await store.end(), FIRST_LOOK
    while back < end:
        async for stored in _of_stream(store, stream, end - back):
            if stored.batch.header.first <= sequence:
                return stored.position - 1
            break
        back *= 4
    return 0


async def _of_stream(store: Store, stream: Stream, position: int) -> AsyncIterator[StoredBatch]:
    """Yield the stream's batches beyond a position."""
    while batches := await store.read(position, subject=stream.subject, limit_bytes=BATCH_BYTES):
        for stored in batches:
            if stored.batch.header.stream == stream:
                yield stored
        position = batches[-1].last_position


class Intake:
    """Batches of many streams on their way to the log, in few commits: each costs a sync of the disk."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._batches: list[Batch] = []
        self._expected: dict[Stream, int] = {}
        self._size = 0

    async def put(self, batch: Batch, expected: int | None = None) -> None:
        """Take the next batch of a stream, which has to end at sequence `expected` if that is given."""
        self._batches.append(batch)
        if expected is not None:
            self._expected[batch.header.stream] = expected
        self._size += len(batch.frame)
        if self._size >= COMMIT_BYTES or len(self._batches) >= COMMIT_BATCHES:
            await self.commit()

    async def commit(self) -> None:
        """Append what was put. Raises StoreError; Conflict after the streams that fit were appended."""
        batches, self._batches, self._size = self._batches, [], 0
        expected, self._expected = self._expected, {}
        if not batches:
            return
        try:
            await self._store.append(batches, expected)
        except Conflict:
            if len(batches) == 1:
                raise
            await self._one_by_one(batches, expected)

    async def _one_by_one(self, batches: list[Batch], expected: dict[Stream, int]) -> None:
        conflicts: dict[Stream, Conflict] = {}
        for batch in batches:
            stream = batch.header.stream
            if stream not in conflicts:
                wanted = {stream: expected[stream]} if stream in expected else None
                try:
                    await self._store.append([batch], wanted)
                except Conflict as error:
                    conflicts[stream] = error
        for conflict in conflicts.values():
            raise conflict


async def put_all(intake: Intake, segment: Found, found: Recovered, tip: Tip) -> Tip:
    """Put what a segment holds beyond the stream's tip, and return the tip that it will have."""
    start = done = 0
    for i, (end, count) in enumerate(found.cuts):
        if i + 1 < len(found.cuts) and found.cuts[i + 1][0] - start <= BATCH_BYTES:
            continue  # the next cut fits into this batch as well
        payload = found.payload[start:end]
        items = decode_items(payload, count - done)
        batch = seal(
            segment.stream, found.first + done, count - done, payload, items[0][0], items[-1][0], tip.digest
        )
        await intake.put(batch)
        tip = Tip(batch.header.last, digest(batch))
        start, done = end, count
    return tip


async def note_ends(store: Store, streams: Iterable[Stream]) -> bool:
    """Say of each trial that this writer recorded in that it has ended; False when all of that was said already."""
    new = False
    while True:
        intake = Intake(store)
        try:
            for stream in streams:
                if stream.subject.startswith("t/") and (tip := await store.tip(stream)).sequence:
                    new |= await _note_end(store, intake, stream, tip.sequence)
            await intake.commit()
        except Conflict:
            continue  # somebody else claimed such a sequence meanwhile: look again
        return new


async def _note_end(store: Store, intake: Intake, stream: Stream, last: int) -> bool:
    """Put a WriterEnded for the subject's claim stream, once after the writer's last event; False: it is there."""
    claims = Stream(stream.subject, CLAIM_WRITER)
    tip = await store.tip(claims)
    position = 0
    async for stored in _of_stream(store, stream, await _position_of(store, stream, last)):
        position = stored.last_position
    if tip.sequence and await _noted(store, stream, position):
        return False
    now = time_ns()
    item = encode_item(now, WriterEnded(stream.writer, now, last=last))
    await intake.put(seal(claims, tip.sequence + 1, 1, item, now, now, tip.digest), tip.sequence)
    return True


async def say_end(store: Store, stream: Stream, last: int, reason: str) -> None:
    """Append to the subject's claim stream that a writer goes: what it can't say in its own stream any more."""
    claims = Stream(stream.subject, CLAIM_WRITER)
    while True:
        tip = await store.tip(claims)
        now = time_ns()
        item = encode_item(now, WriterEnded(stream.writer, now, reason, last))
        batch = seal(claims, tip.sequence + 1, 1, item, now, now, tip.digest)
        try:
            await store.append([batch], expected={claims: tip.sequence})
        except Conflict:
            continue  # somebody else claimed that sequence meanwhile: look again
        return


async def _noted(store: Store, stream: Stream, position: int) -> bool:
    async for stored in _of_stream(store, Stream(stream.subject, CLAIM_WRITER), position):
        for _, event in items_of(stored.batch):
            if isinstance(event, WriterEnded) and event.writer == stream.writer:
                return True
    return False
