"""A trial's status: the words of other trackers, and one answer from what several writers said.

Each writer counts with the last thing it said: it began to run, it set a status, it finished. What was said before
the trial's last start, by whomever, counts no more, so a resumed trial runs again.

1. If a writer has finished since, the trial is finished: failed if any of them failed, else completed if any
   completed, else as the last of them said. (When one rank fails, the others are interrupted a moment later; and a
   rank that merely left without a finish doesn't undo the finish of another.)
2. Else it is lost, if a writer that had recorded in it ended without a finish, nobody else has said anything since,
   and no writer that began to run is left. A writer that records after its end was noticed has not ended (by its
   sequence where whoever noticed knew it, for their clocks may differ). If all of them ended by their own account (a
   resumed trial whose client closed), it is interrupted.
3. Else it is as the last statement said.

What stands in the claim stream (writer 0) was said by compare-and-set, by someone who had seen all before it: like a
start it makes what was said before count no more. So a failed trial may be set back to created.

"Last" is by (time_ns, writer, sequence), so the order in which the writers' batches arrive doesn't matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from msgspec import Struct

from eventrun.codec import CLAIM_WRITER
from eventrun.events import StatusChanged, TrialFinished, WriterEnded

CREATED, RUNNING, SUSPENDED = "created", "running", "suspended"
COMPLETED, FAILED, INTERRUPTED, LOST = "completed", "failed", "interrupted", "lost"
_FINAL = frozenset({COMPLETED, FAILED, INTERRUPTED, LOST})

# The words of Track, digitalhub, t9k and 3LC. No two of them differ by their case alone.
_WORDS = {
    CREATED: "created createdgroup built ready pending empty",
    RUNNING: "running runninggroup resume collecting post_processing",
    SUSPENDED: "suspended stop stopped paused",
    COMPLETED: "completed complete success finishedgroup",
    FAILED: "failed errorgroup exception broken error run_error fsm_error",
    INTERRUPTED: "interrupted cancelled",
    LOST: "lost",
}
_EVER = -(2**63)  # before any time_ns
_VIEWS = {word: view for view, words in _WORDS.items() for word in words.split()}


def view_status(raw: str) -> str:
    """Map a caller's word to created, running, suspended, completed, failed, interrupted or lost.

    Case doesn't matter; an unknown word is running.
    """
    return _VIEWS.get(raw.lower(), RUNNING)


class Statement(Struct, array_like=True, gc=False, frozen=True):
    """What a writer said about the trial; `final`: it doesn't run any more."""

    time_ns: int
    raw: str
    view: str
    final: bool


_NOTHING = Statement(_EVER, CREATED, CREATED, False)


class Writer(Struct, array_like=True, gc=False):
    """What is known of a writer of this trial.

    `last_ns` is the time of its last event (None: it has recorded nothing) and `last` its sequence, `begun_ns` the time
    of its last start, `error` what it told since. It ended at `ended_ns`, after its event `ended_last`.
    """

    last_ns: int | None = None
    begun_ns: int | None = None
    said: Statement | None = None
    error: str | None = None
    ended_ns: int | None = None
    ended_why: str | None = None
    last: int = 0
    ended_last: int = 0

    def begin(self, time_ns: int) -> None:
        """Note that it has begun to run, once more perhaps."""
        self.begun_ns, self.error = time_ns, None
        self.said = Statement(time_ns, RUNNING, RUNNING, False)

    def say(self, time_ns: int, event: TrialFinished | StatusChanged) -> None:
        """Note a status that it set, or its finish."""
        finish = isinstance(event, TrialFinished)
        # What has finished runs no more, whatever its word.
        unknown = RUNNING if not finish else COMPLETED if event.error is None else FAILED
        view = _VIEWS.get(event.status.lower(), unknown)
        self.said = Statement(time_ns, event.status, view, finish or view in _FINAL)
        if event.error is not None:
            self.error = event.error

    def end(self, event: WriterEnded) -> None:
        """Note that its end was noticed."""
        self.ended_last = max(self.ended_last, event.last)
        if self.ended_ns is None or event.noticed_ns >= self.ended_ns:
            self.ended_ns, self.ended_why = event.noticed_ns, event.reason

    @property
    def ended(self) -> bool:
        """It has recorded something, and nothing since its end was noticed."""
        if self.ended_ns is None or self.last_ns is None:
            return False
        return self.last <= self.ended_last if self.ended_last else self.last_ns <= self.ended_ns

    @property
    def finished(self) -> bool:
        """The last thing it said was a finish."""
        return self.said is not None and self.said.final


class Verdict(NamedTuple):
    """A trial's status, the caller's own word for it, the error, and when it finished."""

    view: str
    raw: str
    error: str | None
    finished_ns: int | None


def judge(writers: dict[int, Writer]) -> Verdict:
    """Give the trial's status by the rules above."""
    begun = max(
        (writer.begun_ns for writer in writers.values() if writer.begun_ns is not None), default=_EVER
    )
    claimed = writers.get(CLAIM_WRITER)
    if claimed is not None and claimed.said is not None:
        begun = max(begun, claimed.said.time_ns)
    said = [
        (writer.said.time_ns, name, writer.said)
        for name, writer in writers.items()
        # Its own last word follows its own start, even when the clock was set back in between.
        if writer.said is not None and (writer.said.time_ns >= begun or writer.begun_ns == begun)
    ]
    finals = [entry for entry in said if entry[2].final]
    if finals:
        weights = {FAILED: 2, COMPLETED: 1}
        _, name, end = max(finals, key=lambda entry: (weights.get(entry[2].view, 0), entry[:2]))
        return Verdict(end.view, end.raw, _error(writers, said, name), max(finals)[0])
    _, name, now = max(said, default=(_EVER, 0, _NOTHING))
    error = _error(writers, said, name)
    gone = {name: w for name, w in writers.items() if w.ended and not w.finished}
    runs = any(w.begun_ns is not None and not w.ended and not w.finished for w in writers.values())
    # What a writer said itself came before its end, whatever the clock of whoever noticed that.
    since_ns = max((said_ns for said_ns, writer, _ in said if writer not in gone), default=_EVER)
    if gone and not runs and max(w.ended_ns or 0 for w in gone.values()) >= since_ns:
        view = LOST if any(w.ended_why == LOST for w in gone.values()) else INTERRUPTED
        return Verdict(view, now.raw, error or _why(gone.values()), None)
    return Verdict(now.view, now.raw, error, None)


def _error(writers: dict[int, Writer], said: list[tuple[int, int, Statement]], name: int) -> str | None:
    """Return the error that this writer told, else the last that another one did."""
    told = [(other == name, time_ns, other) for time_ns, other, _ in said if writers[other].error is not None]
    return writers[max(told)[2]].error if told else None


def _why(gone: Iterable[Writer]) -> str | None:
    ended = max(gone, key=lambda writer: (writer.ended_ns or 0, writer.ended_why or ""))
    return None if ended.ended_why == LOST else ended.ended_why
