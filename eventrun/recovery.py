"""Taking in what killed writers left in their journals: whoever opens the store next, once.

Recovering twice, or dying while recovering, changes nothing: what the log already holds is compared byte for byte and
skipped, and a folder is removed only when the log holds all of it for good.
"""

from __future__ import annotations

import os
from itertools import zip_longest
from pathlib import Path

from msgspec import Struct

from eventrun.clock import time_ns
from eventrun.codec import Stream, decode_items, digest, encode_item, items_of, payload_of, seal
from eventrun.errors import Conflict, FormatTooNew, LogDamaged
from eventrun.events import WriterEnded
from eventrun.journal import (
    ENDED_NAME,
    dead_writers,
    keep_damaged,
    of_earlier_boot,
    recover,
    remove_folder,
    segments_in,
)
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
    sound = False
    for folder, descriptor in dead_writers(journals):
        try:
            if not sound:
                await _check_sound(store)
                sound = True
            await _recover_writer(store, folder, report, of_earlier_boot(descriptor))
        except (
            Conflict,
            FormatTooNew,
            LogDamaged,
            OSError,
        ) as error:  # nothing is lost, and the others need not wait for it
            report.problems.append(f"{folder.name} is left for the next open: {error}")
        finally:
            os.close(descriptor)
    return report


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
    for stream, segments in streams.items():
        try:
            report.events += await _recover_stream(store, stream, segments, problems, torn)
        except LogDamaged as error:
            problems.append(str(error))
    closed = (folder / ENDED_NAME).exists()  # then its trials are as it left them, not lost
    for stream in streams:
        if not closed and stream.subject.startswith("t/") and (await store.tip(stream)).sequence:
            await note_end(store, stream)
    await store.settle()
    report.writers += 1
    if problems:
        why = " (the machine went down: what had not reached the disk is lost)" if torn else ""
        report.problems.extend(f"{folder.name}: {problem}{why}" for problem in problems)
        keep_damaged(folder)
    else:
        remove_folder(folder)


async def _recover_stream(
    store: Store, stream: Stream, segments: list[Found], problems: list[str], torn: bool
) -> int:
    tip = await store.tip(stream)
    events = position = 0
    for segment, following in zip_longest(segments, segments[1:]):
        if segment.first > tip.sequence + 1:
            raise LogDamaged(f"{stream}: sequences {tip.sequence + 1} to {segment.first - 1} are missing")
        last = tip.sequence if following is None else min(following.first - 1, tip.sequence)
        logged, position = await _logged(store, stream, segment.first, last, position)
        found = recover(segment, logged, max(0, last - segment.first + 1), torn=torn)
        if found.problem is not None:
            problems.append(f"{segment.path.name}: {found.problem}")
        if found.events:
            tip = await _append(store, segment, found, tip)
            events += found.events
    return events


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


async def note_end(store: Store, stream: Stream) -> None:
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
