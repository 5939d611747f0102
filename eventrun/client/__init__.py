"""`eventrun.open(...)`: one object that ties store, recorder and read side together.

Its methods stand in `asking` (what it is asked), `telling` (what it is told) and `claiming` (what only one may have);
here it begins and ends. `past` has the store as it was, `checks` what questions may be made of, `ending` what is said
at the end.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from eventrun import exits
from eventrun.client.checks import checked_id
from eventrun.client.claiming import Claiming
from eventrun.client.ending import Ending, block_for_people, say
from eventrun.client.past import Past
from eventrun.clock import monotonic_ns
from eventrun.config import Settings, load_settings
from eventrun.errors import StoreError
from eventrun.events import trial_subject
from eventrun.filesystems import file_system
from eventrun.portal import Portal, aside
from eventrun.recorder import CLOSE_STORE_S, NO_FINISH, Recorder
from eventrun.stores import open_store
from eventrun.trial import Trial, active_trial

if TYPE_CHECKING:
    from eventrun.query import Reader

__all__ = ["Client", "Past", "current_trial", "open"]

LOOK_FOR_DEAD_WRITERS_S = 2.0  # how often readers look whether a writer was killed
COLLECT_EVERY_S = 0.5  # how often they look for new events on a network disk
CLOSING_BLOCK_S = 0.3
STUCK_S = 1.0  # how long closing waits for eventrun's own threads beyond the time that they have


class Client(Claiming):
    """An open store: record trials, ask what was recorded. Use it as `with` or `async with`, or call `close`.

    Recording never waits. What may wait returns a Pending (one answer) or a Query (many); both serve sync and async
    code. Reads see everything this client recorded before; `fresh=False` skips waiting for that.
    """

    def __init__(self, settings: Settings, *, create: bool = True) -> None:
        self.settings = settings
        self.url = settings.url
        self._portal = Portal()
        store = open_store(self.url, create=create)
        self.folder: Path | None = getattr(store, "folder", None)
        stores = iter([store])
        self._recorder = _recorder_for(self.folder)(
            self._portal,
            lambda: next(stores, None) or open_store(self.url, create=create),
            folder=self.folder,
            linger_ms=settings.linger_ms,
            close_timeout_s=settings.close_timeout_s,
            forked=self._forked,
            running=lambda: [trial_subject(t.id) for t in tuple(self._trials.values()) if t.runs],
        )
        self._readers: Reader | None = None
        self._trials: dict[int, Trial] = {}  # handles whose end is this client's business, by id()
        self._resumed: list[str] = []  # ids that were to be there already
        self._made: list[str] = []  # for the closing block
        self._known: set[str] = set()  # projects and groups that were recorded
        self._looked_ns = -(1 << 62)
        # Trials that are lost, though this client may not say so in the log.
        self._lost: frozenset[str] = frozenset()
        self._said: set[str] = set()
        self._look_every_s = (
            COLLECT_EVERY_S if type(self._recorder) is not Recorder else LOOK_FOR_DEAD_WRITERS_S
        )
        self._closed = False
        self._ending = Ending()

    def __repr__(self) -> str:
        return f"<Client of {self.url!r}{' (closed)' if self._closed else ''}>"

    def _forked(self) -> object:
        """In a fork's child: the parent's trials are the parent's to end, its connections not to be touched."""
        self._trials.clear()
        self._made.clear()
        self._resumed.clear()
        reader, self._readers = self._readers, None
        if not self._ending.over:  # a close that was under way on a thread that the child hasn't got
            self._closed = False
            self._ending = Ending()
        exits.watch(self)
        return None if reader is None else (reader, reader.abandon())

    # the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End what is unfinished, bring everything to the log and let go; about `close_timeout_s` at most.

        What doesn't get there in time, or before a Ctrl-C, stays in the journal, said in one line; the next open takes
        it in. Closing again waits for the first close, if that goes on on another thread, and does nothing else.
        """
        ending = self._ending
        if sys.is_finalizing():  # nobody can bring anything to the log any more, and the journal keeps it
            return
        if not ending.claim():
            with self._telling_if_stopped(ending):
                ending.wait(self.settings.close_timeout_s + CLOSE_STORE_S + STUCK_S)
            return
        try:
            with self._telling_if_stopped(ending):
                self._end(ending, monotonic_ns() + int(self.settings.close_timeout_s * 1e9))
        finally:
            self._closed = True
            exits.forget(self)
            ending.finish()

    @contextmanager
    def _telling_if_stopped(self, ending: Ending) -> Iterator[None]:
        try:
            yield
        except BaseException:  # Ctrl-C, as a rule, by somebody who doesn't want to wait
            self._closed = True
            if not self._recorder.untouched:
                self._recorder.close()  # in the background, as far as it gets
            ending.say_left(self._recorder.left, "closing was interrupted", self._safe_place())
            raise

    def _end(self, ending: Ending, deadline: int) -> None:
        def seconds() -> float:
            return max(0.0, (deadline - monotonic_ns()) / 1e9)

        self.interrupt(NO_FINISH)
        # What is asked here is answered after a flush, so it may take its part of the time, but not all.
        block = block_for_people(
            self, self._made, quiet=self.settings.quiet, seconds=min(CLOSING_BLOCK_S, seconds() / 4)
        )
        unknown = self._unknown(seconds() / 2)
        self._closed = True
        if not self._close_recorder(ending, seconds()):
            self._portal.forget()  # something hangs: its threads are daemons, and nobody waits for them
        else:
            closed = None if self._readers is None else self._portal.read(self._readers.close)
            self._portal.stop(max(seconds(), STUCK_S))
            if closed is not None and closed.done():
                closed.result()
        for trial_id in unknown:
            say(
                f"eventrun: there was no trial {trial_id} in {self.url} to resume; what was logged is kept under this "
                "id, without a name: is it the right store?"
            )
        if block:
            say(block)

    def _close_recorder(self, ending: Ending, seconds: float) -> bool:
        """Bring everything to the log; False when something hangs."""
        recorder = self._recorder
        if recorder.untouched:
            return True
        journals = recorder.journals
        place = self._safe_place()  # of what is not in a file now, none will be if the loop itself hangs
        try:
            left = recorder.close(seconds).result(seconds + CLOSE_STORE_S + STUCK_S)
            place = journals
        except TimeoutError:
            left = recorder.left
        why = recorder.last_error or "the store didn't answer in time"
        ending.say_left(left, why, place)
        ending.say_lost(recorder.statistics().dropped, why)
        return not left and recorder.store_closed

    def _safe_place(self) -> Path | None:
        return (
            self._recorder.journals if self._recorder.statistics().acknowledgement == "crash_safe" else None
        )

    def _unknown(self, seconds: float) -> list[str]:
        """Find resumed ids of which the store knows nothing but what was recorded under them here."""
        if not self._resumed:
            return []

        def look() -> list[str]:
            self._recorder.flush().result(seconds)
            subjects = {trial_subject(trial_id): trial_id for trial_id in self._resumed}
            found = {subject: self._read_log(subject=subject, limit_bytes=1 << 16) for subject in subjects}
            writer = self._recorder.writer
            return [
                subjects[subject]
                for subject, batches in found.items()
                if all(stored.batch.header.writer == writer for stored in batches)
            ]

        try:
            return self._portal.read(look).result(seconds)
        except (StoreError, TimeoutError, RuntimeError):  # then there is worse to tell
            return []

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import anyio

        if sys.is_finalizing():  # a coroutine that is thrown away
            return
        # On a daemon thread: after Ctrl-C only the interpreter's exit waits for it, and a second one ends that too.
        closing = aside(self.close)
        # Shielded: a cancelled task group must not cost the last events their way to the log.
        with anyio.CancelScope(shield=True):
            await closing


def open(  # noqa: A001 - the documented name: eventrun.open
    url: str | os.PathLike[str] | None = None,
    *,
    linger_ms: float | None = None,
    close_timeout_s: float | None = None,
    quiet: bool | None = None,
    create: bool = True,
) -> Client:
    """Open a store: a folder's path, "sqlite:PATH" or "memory:"; by default EVENTRUN_URL, else "runs".

    Cheap and without waiting; a missing folder is made unless `create` is False. Raises StoreUnavailable, InvalidValue.
    """
    settings = load_settings(
        url=None if url is None else os.fspath(url),
        linger_ms=linger_ms,
        close_timeout_s=close_timeout_s,
        quiet=quiet,
    )
    return Client(settings, create=create)


def _recorder_for(folder: Path | None) -> type[Recorder]:
    if folder is None or not file_system(folder).network:
        return Recorder
    from eventrun.network import NetworkRecorder

    return NetworkRecorder


_default: dict[str, Client] = {}  # the client of EVENTRUN_TRIAL, by url


def current_trial() -> Trial | None:
    """Return the trial whose `with` block this task is in; elsewhere the one that EVENTRUN_TRIAL names, or None.

    A new thread has no block of its own. The trial of EVENTRUN_TRIAL is joined in the store of EVENTRUN_URL.
    """
    trial = active_trial()
    named = os.environ.get("EVENTRUN_TRIAL")
    if trial is not None or not named:
        return trial
    checked_id(named, "EVENTRUN_TRIAL=")
    url = load_settings().url
    if url not in _default:
        _default[url] = open(url)
    client = _default[url]
    joined = next((trial for trial in tuple(client._trials.values()) if trial.id == named), None)
    return joined or client.trial("joined", resume=named)
