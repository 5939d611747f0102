"""What a reader that may not write can tell of killed writers: that their trials are lost, not their last events."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from eventrun.clock import time_ns
from eventrun.journal import segments_in
from eventrun.journal.writers import KILLED, SILENT, writers

if TYPE_CHECKING:
    from eventrun.projections import TrialState

NOTED = "its writer was killed; this reader may not write, so that isn't in the log"
_UNFINISHED = frozenset({"created", "running", "suspended"})


def may_recover(journals: Path) -> bool:
    """Tell whether this process could take in what killed writers left, if there is anything."""
    return not journals.is_dir() or os.access(journals, os.W_OK | os.X_OK)


def lost_trials(journals: Path) -> frozenset[str]:
    """Find the trials (by subject) that only killed writers have a journal of."""
    dead: set[str] = set()
    alive: set[str] = set()
    try:
        for left in writers(journals, time_ns()):
            subjects = {stream.subject for stream in segments_in(left.folder)[0]}
            (dead if left.state in (KILLED, SILENT) else alive).update(subjects)
    except OSError:  # not ours to read either
        pass
    return frozenset(dead - alive)


def as_lost(state: TrialState, lost: frozenset[str]) -> TrialState:
    """Mark a trial's state when it is one of those."""
    if not lost or f"t/{state.id}" not in lost or state.status not in _UNFINISHED:
        return state
    return structs.replace(state, status="lost", error=state.error or NOTED)
