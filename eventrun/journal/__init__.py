"""The mapped write-ahead journal: `segments` (its files), `writing` (the log call's side), `scan` (recovery's side)."""

from eventrun.journal.checking import JournalReport, check_journals, state_of
from eventrun.journal.scan import (
    DAMAGED_SUFFIX,
    Held,
    Recovered,
    dead_writers,
    has_ended,
    held,
    is_whole,
    keep_damaged,
    of_earlier_boot,
    recover,
    segments_in,
)
from eventrun.journal.segments import JournalFolder, remove_folder
from eventrun.journal.writing import Chunk, Journal, new_journal

__all__ = [
    "DAMAGED_SUFFIX",
    "Chunk",
    "Held",
    "Journal",
    "JournalFolder",
    "JournalReport",
    "Recovered",
    "check_journals",
    "dead_writers",
    "has_ended",
    "held",
    "is_whole",
    "keep_damaged",
    "new_journal",
    "of_earlier_boot",
    "recover",
    "remove_folder",
    "segments_in",
    "state_of",
]
