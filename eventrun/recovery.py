"""Taking in what killed writers left in their journals: whoever opens the store next, once.

Recovering twice, or dying while recovering, changes nothing: what the log already holds is compared byte for byte and
skipped, and a folder is removed only when the log holds all of it for good.
"""

from __future__ import annotations

import os
from pathlib import Path

from msgspec import Struct

from eventrun.clock import time_ns
from eventrun.codec import Stream, decode_items, digest, encode_item, items_of, payload_of, seal
from eventrun.errors import Conflict, LogDamaged
from eventrun.events import WriterEnded
from eventrun.journal import DAMAGED_SUFFIX, dead_writers, recover, remove_folder, segments_in
from eventrun.journal.scan import Found, Recovered
from eventrun.stores.base import Store, Tip

CLAIM_WRITER = 0  # a subject's claim stream, appended to by compare-and-set
BATCH_BYTES = 1 << 20


class RecoveryReport(Struct):
    """What recovery found: killed writers, the events taken in, and what could not be."""

    writers: int = 0
    events: int = 0
    problems: list[str] = []


async def recover_dead_writers(store: Store, journals: Path) -> RecoveryReport:
    """Append what the journals of dead writers of this host hold and the log lacks. Raises StoreError."""
    report = RecoveryReport()
    for folder, descriptor in dead_writers(journals):
        try:
            await _recover_writer(store, folder, report)
        finally:
            os.close(descriptor)
    return report


async def _recover_writer(store: Store, folder: Path, report: RecoveryReport) -> None:
    streams, problems = segments_in(folder)
    for stream, segments in streams.items():
        try:
            report.events += await _recover_stream(store, stream, segments, problems)
        except LogDamaged as error:
            problems.append(str(error))
    for stream in streams:
        if stream.subject.startswith("t/"):
            await _note_end(store, stream)
    await store.settle()
    report.writers += 1
    if problems:
        report.problems.extend(f"{folder.name}: {problem}" for problem in problems)
        folder.rename(folder.with_name(folder.name + DAMAGED_SUFFIX))
    else:
        remove_folder(folder)


async def _recover_stream(store: Store, stream: Stream, segments: list[Found], problems: list[str]) -> int:
    tip = await store.tip(stream)
    events = 0
    ends = [segment.first - 1 for segment in segments[1:]]
    for segment, end in zip(segments, [*ends, tip.sequence], strict=True):
        if segment.first > tip.sequence + 1:
            raise LogDamaged(f"{stream}: sequences {tip.sequence + 1} to {segment.first - 1} are missing")
        logged, count = await _logged(store, stream, segment.first, min(end, tip.sequence))
        found = recover(segment, logged, count)
        if found.problem is not None:
            problems.append(f"{segment.path.name}: {found.problem}")
        if found.count:
            tip = await _append(store, segment, found, tip)
            events += found.count
    return events


async def _logged(store: Store, stream: Stream, first: int, last: int) -> tuple[bytes, int]:
    """Return the log's bytes of a stream's sequences from `first` to `last`, and how many events they are."""
    if first > last:
        return b"", 0
    payloads: list[bytes] = []
    position = 0
    while batches := await store.read(position, subject=stream.subject):
        for stored in batches:
            header = stored.batch.header
            if header.stream == stream and first <= header.first <= last:
                payloads.append(payload_of(stored.batch))
        position = batches[-1].last_position
    return b"".join(payloads), last - first + 1


async def _append(store: Store, segment: Found, found: Recovered, tip: Tip) -> Tip:
    start = done = 0
    for i, (end, count) in enumerate(found.cuts):
        if i + 1 < len(found.cuts) and found.cuts[i + 1][0] - start <= BATCH_BYTES:
            continue  # the next cut fits into this batch as well
        payload = found.payload[start:end]
        items = decode_items(payload, count - done)
        batch = seal(
            segment.stream, found.first + done, count - done, payload, items[0][0], items[-1][0], tip.digest
        )
        await store.append([batch])
        tip = Tip(batch.header.last, digest(batch))
        start, done = end, count
    return tip


async def _note_end(store: Store, stream: Stream) -> None:
    """Append WriterEnded to the subject's claim stream, once."""
    claims = Stream(stream.subject, CLAIM_WRITER)
    while True:
        tip = await store.tip(claims)
        if tip.sequence and await _noted(store, stream):
            return
        now = time_ns()
        item = encode_item(now, WriterEnded(stream.writer, now))
        batch = seal(claims, tip.sequence + 1, 1, item, now, now, tip.digest)
        try:
            await store.append([batch], expected={claims: tip.sequence})
        except Conflict:
            continue  # somebody else claimed that sequence meanwhile: look again
        return


async def _noted(store: Store, stream: Stream) -> bool:
    position = 0
    while batches := await store.read(position, subject=stream.subject):
        for stored in batches:
            if stored.batch.header.writer == CLAIM_WRITER and any(
                isinstance(event, WriterEnded) and event.writer == stream.writer
                for _, event in items_of(stored.batch)
            ):
                return True
        position = batches[-1].last_position
    return False
