"""Looking into journals without changing anything: whose they are, what they hold, what nothing vouches for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from msgspec import Struct, structs

from eventrun import damage
from eventrun.damage import Damage
from eventrun.errors import FormatTooNew, LogDamaged
from eventrun.journal.scan import (
    DAMAGED_SUFFIX,
    hold_if_dead,
    is_of_this_host,
    of_earlier_boot,
    recover,
    segments_in,
)

LOOKS = 3  # at a journal that is being written: a segment may be given back and begun anew meanwhile


class JournalReport(Struct, frozen=True, kw_only=True):
    """What one writer's journal holds.

    `state`: live, dead (to be taken in by the next open), damaged (kept, because not all could be taken in), elsewhere
    (of another host: it can't be told from here whether its writer lives). `events`: those that checksums vouch for,
    most of which the log has as well.
    """

    writer: str
    state: str
    streams: int
    events: int
    damage: tuple[Damage, ...] = ()

    @property
    def problems(self) -> tuple[Damage, ...]:
        """What is surely wrong: what lies elsewhere may be half-written, or of a machine that went down."""
        return () if self.state == "elsewhere" else self.damage

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return {**structs.asdict(self), "damage": [each.to_dict() for each in self.damage]}


def check_journals(journals: Path) -> list[JournalReport]:
    """Read all journals of a store up to their heads."""
    try:
        folders = sorted(path for path in journals.iterdir() if path.is_dir())
    except OSError:
        return []
    return [_check(folder) for folder in folders]


def state_of(folder: Path) -> str:
    """Tell whether a journal is live, dead, damaged or elsewhere."""
    if folder.name.endswith(DAMAGED_SUFFIX):
        return "damaged"
    if _death(folder) is not None:
        return "dead"
    return "live" if is_of_this_host(folder) else "elsewhere"


def _death(folder: Path) -> bool | None:
    """Tell whether the machine went down with the writer; None: it isn't known to be dead."""
    descriptor = hold_if_dead(folder)
    if descriptor is None:
        return None
    try:
        return of_earlier_boot(descriptor)
    finally:
        os.close(descriptor)


def _check(folder: Path) -> JournalReport:
    state = state_of(folder)
    looks = LOOKS if state in ("live", "elsewhere") else 1
    # What a writer of an earlier boot, or none that can be told, left may lack pages that a power loss cost.
    torn = state == "elsewhere" or (state == "dead" and bool(_death(folder)))
    streams, events, problems = _look(folder, torn)
    for _ in range(looks - 1):
        if not problems:
            break
        streams, events, problems = _look(folder, torn)
    where = f"journals/{folder.name}"
    if not folder.exists():  # its writer has just ended
        streams, events, problems = 0, 0, []
    found = [damage.file(where, problem) for problem in problems]
    if state == "damaged" and not found:
        found = [damage.file(where, "not all that it holds could be taken into the log")]
    writer = folder.name.removesuffix(DAMAGED_SUFFIX)
    return JournalReport(writer=writer, state=state, streams=streams, events=events, damage=tuple(found))


def _look(folder: Path, torn: bool) -> tuple[int, int, list[str]]:
    events = 0
    try:
        streams, problems = segments_in(folder, torn=torn)
    except FormatTooNew as error:
        return 0, 0, [str(error)]
    for segments in streams.values():
        for segment in segments:
            try:
                found = recover(segment, b"", 0, torn=torn)
            except (LogDamaged, OSError) as error:
                problems.append(f"{segment.path.name} at {segment.base}: {error}")
                continue
            events += found.events
            if found.problem is not None:
                problems.append(f"{segment.stream} in {segment.path.name} at {segment.base}, {found.problem}")
    return len(streams), events, problems
