"""Taking in journals on a network disk, of the living and the dead: one process on one host at a time.

Each writer leaves its events in its own folder (`journal.fragments`). Who collects holds the store's turn, continues
each writer's own streams from where the log has them, and removes a folder only when its writer has ended: it said so
itself, or it was one of this host and its lock is free. A writer elsewhere that gives no sign of life is taken for
dead, so its trials become `lost`, but its folder stays: it may have been asleep, and may go on. What it still writes is
then taken in like before. `hosts` names machines that are gone for good.

On a local disk only the folders of other hosts are this module's business: of a disk or a copy from elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from itertools import groupby, zip_longest
from operator import attrgetter
from pathlib import Path

from eventrun.codec import Stream
from eventrun.errors import Conflict, FormatTooNew, LogDamaged, StoreUnavailable
from eventrun.journal import segments_in
from eventrun.journal.fragments import FULL_SUFFIX
from eventrun.journal.scan import Found, lock_free, segments_of
from eventrun.journal.segments import LOCK_NAME
from eventrun.journal.writers import (
    CLOSED,
    ELSEWHERE,
    KILLED,
    LIVE,
    SILENT,
    TAKEN,
    TAKEN_SUFFIX,
    Left,
    quiet_ns,
    writers,
)
from eventrun.locks import STALE_S, now_ns, owner
from eventrun.recovery import (
    Intake,
    RecoveryReport,
    best_of,
    logged_from,
    note_ends,
    put_all,
    recover_dead_writers,
    recover_folder,
)
from eventrun.stores.base import Store
from eventrun.stores.sqlite.network import Busy, NetworkStore, NotWritable

ALL_HOSTS = "*"
_NOBODY: frozenset[str] = frozenset()


async def collect(store: Store, journals: Path, hosts: Collection[str] = _NOBODY) -> RecoveryReport:
    """Take in what there is; `hosts` (or ALL_HOSTS) names those whose writers are dead for certain.

    Raises StoreError; StoreUnavailable also when another process is collecting.
    """
    if not isinstance(store, NetworkStore):
        report = await recover_dead_writers(store, journals)
        for left in _look(journals):
            if left.state in (ELSEWHERE, SILENT):
                await _collect_foreign(store, left, hosts, report)
        return report
    async with store.turn():
        return await _collect_all(store, journals, hosts)


async def collect_if_free(store: NetworkStore, journals: Path) -> RecoveryReport | None:
    """Take in what there is; None when another process is collecting, or nothing can be written here."""
    try:
        async with store.turn(wait_s=0):
            return await _collect_all(store, journals, _NOBODY)
    except (Busy, NotWritable):
        return None


def _look(journals: Path) -> list[Left]:
    try:
        found = list(writers(journals, now_ns(journals))) if journals.is_dir() else []
    except OSError as error:
        raise StoreUnavailable(f"{journals} can't be read or written: {error.strerror}") from error
    # First what was taken from a writer that goes on in a new folder: there its streams continue.
    return sorted(found, key=lambda left: left.state != TAKEN)


# a network disk ------------------------------------------------------------------------------------------------


async def _collect_all(store: NetworkStore, journals: Path, hosts: Collection[str]) -> RecoveryReport:
    report, here = RecoveryReport(), owner()
    await store.prepare()
    for left in _look(journals):
        folder, state = left.folder, left.state
        if state in (SILENT, ELSEWHERE) and _is_named(left, hosts):
            # From here on its writer, should it live after all, can't call anything durable there.
            folder = folder.rename(folder.with_name(folder.name + TAKEN_SUFFIX))
            state = TAKEN
        if state in (KILLED, TAKEN):
            await recover_folder(store, folder, report, torn=left.owner.get("boot") != here["boot"])
        elif state == CLOSED:
            await recover_folder(store, folder, report)
        elif state in (LIVE, ELSEWHERE, SILENT):
            await _follow(store, folder, report, silent=state == SILENT)
    return report


def _is_named(left: Left, hosts: Collection[str]) -> bool:
    return ALL_HOSTS in hosts or left.host in hosts


async def _follow(store: Store, folder: Path, report: RecoveryReport, *, silent: bool) -> None:
    """Take in what a writer that may be writing has left so far. What isn't whole yet is left for the next time."""
    try:
        streams, _ = segments_in(folder, torn=True)
    except FormatTooNew as error:
        report.problems.append(f"{folder.name} is left for the next time: {error}")
        return
    left_over: list[Found] = []
    intake, total = Intake(store), 0
    for stream, segments in streams.items():
        unfinished = segments
        try:
            events, unfinished = await _follow_stream(store, intake, stream, segments)
            total += events
        except FileNotFoundError:  # a file that is full has just got another name
            pass
        except (Conflict, FormatTooNew, LogDamaged, OSError) as error:
            report.problems.append(f"{folder.name}: {error}")
        left_over += unfinished
    try:
        await intake.commit()
    except Conflict as error:
        report.problems.append(f"{folder.name}: {error}")
        return
    report.events += total
    if silent and await note_ends(store, streams):
        report.writers += 1
    taken = {_place_of(each) for segments in streams.values() for each in segments}
    report.problems += _remove_full(folder, taken - {_place_of(each) for each in left_over})


def _remove_full(folder: Path, taken: set[Place]) -> list[str]:
    """Remove the files that their living writer has left, when the log holds all that is in them; tell of damage."""
    problems = []
    for path in folder.glob(f"*{FULL_SUFFIX}"):
        found = segments_of(path)
        if found is None:
            problems.append(f"{folder.name}: {path.name} can't be read whole, `eventrun verify` tells more")
        elif all(_place_of(segment) in taken or _is_empty(segment) for segment in found):
            path.unlink(missing_ok=True)
    return problems


Place = tuple[Path, int, int]


def _place_of(segment: Found) -> Place:
    """Name a segment by its file, its place there, and its first sequence."""
    return segment.path, segment.base, segment.first


def _is_empty(segment: Found) -> bool:
    return not segment.points and segment.head[0] == segment.start


async def _follow_stream(
    store: Store, intake: Intake, stream: Stream, segments: list[Found]
) -> tuple[int, list[Found]]:
    """Append what is new; return how many events, and the segments of which the log may lack something."""
    tip = await store.tip(stream)
    events = 0
    groups = [list(same) for _, same in groupby(segments, attrgetter("first"))]
    unfinished: list[Found] = []
    for same, following in zip_longest(groups, groups[1:]):
        first = same[0].first
        if following is not None and following[0].first <= tip.sequence + 1:
            continue  # the log has all of it
        if first > tip.sequence + 1:  # the one before was not full yet when it was read
            unfinished += same
            continue
        if events and first <= tip.sequence:  # a copy that was cut differently
            await intake.commit()
        logged = await logged_from(store, stream, first, tip.sequence)
        segment, found = best_of(same, logged, max(0, tip.sequence - first + 1), torn=True)
        if found.events:
            tip = await put_all(intake, segment, found, tip)
            events += found.events
        if found.problem is not None:
            unfinished += same
    return events, unfinished


# a local disk --------------------------------------------------------------------------------------------------


async def _collect_foreign(store: Store, left: Left, hosts: Collection[str], report: RecoveryReport) -> None:
    """Take in what a writer of another host left on a disk that is this machine's own now."""
    descriptor = lock_free(left.folder / LOCK_NAME)
    if descriptor is None:  # it does live, and under this very kernel
        return
    try:
        quiet_s = quiet_ns(left.folder, now_ns(left.folder.parent)) / 1e9
        if quiet_s > STALE_S or _is_named(left, hosts):
            await recover_folder(store, left.folder, report, torn=True)
        else:
            report.left.append(
                f"{left.folder.name} of host {left.host} was written to {max(quiet_s, 0):.0f} s ago: "
                f"`eventrun collect --host {left.host}` takes it in if that writer is dead for certain"
            )
    finally:
        os.close(descriptor)
