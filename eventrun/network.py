"""Recording on a network disk: the flusher syncs the journals' files, and whoever collects brings them to the log."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from eventrun.codec import Stream
from eventrun.collecting import collect_if_free
from eventrun.errors import StoreUnavailable
from eventrun.journal import Journal, JournalFolder
from eventrun.journal.fragments import FragmentFolder, FragmentJournal
from eventrun.journal.segments import Segment
from eventrun.recorder import Recorder, Recording
from eventrun.recovery import RecoveryReport
from eventrun.stores.sqlite.network import NetworkStore

SEEN_S = 5.0  # how long a read waits for another process to collect what was recorded here
OTHERS_S = 1.0  # the same where nothing was recorded here: what others left may be of a moment ago
SEEN_POLL_S = 0.05

T = TypeVar("T")


class NetworkRecorder(Recorder):
    """All streams of one writer. It never opens the log for writing: durable is what its journals' files hold."""

    _unseen = False  # the log may not have yet what is durable

    def _new_folder(self, path: Path | None) -> JournalFolder:
        return FragmentFolder(path)

    def _make_journal(self, stream: Stream, segment: Segment, recording: Recording) -> Journal:
        assert isinstance(self._folder, FragmentFolder)
        return FragmentJournal(self._folder, stream, segment, recording.next, recording.reopen)

    async def _take_new(self) -> bool:
        """Make durable what the journals hold."""
        folder = self._folder
        assert isinstance(folder, FragmentFolder)
        folder.beat()
        journals = [
            (r, journal) for r, journal in self._open_journals() if isinstance(journal, FragmentJournal)
        ]
        try:
            reached = [(r, journal, journal.reach()) for r, journal in journals if journal.has_new]
            if reached or folder.has_new:
                await _aside(folder.sync)
        except OSError as error:
            # What a failed fsync has lost the kernel doesn't write a second time.
            self._renew(folder, [journal for _, journal in journals])
            raise StoreUnavailable(f"{self._journals} can't be written: {error}") from error
        for recording, journal, upto in reached:
            journal.confirm_reached(upto)
            self._counts["durable"] += max(upto.sequence - recording.durable, 0)
            recording.durable = max(upto.sequence, recording.durable)
            self._unseen = True
        for recording, journal in journals:
            journal.release(recording.durable)
            if recording.ended and recording.recorded == recording.durable:
                self._close_journal(recording, journal)
        self._counts["commits"] += bool(reached)
        self._last_error = None
        self._prepare()
        return False

    def _renew(self, folder: FragmentFolder, journals: list[FragmentJournal]) -> None:
        try:
            folder.renew(journals)
        except OSError as error:
            self._last_error = str(error)

    async def recover(self) -> RecoveryReport:
        """Collect, or wait a while for who is just collecting to take in what this writer has recorded."""
        store = self.store
        if self._journals is None or not isinstance(store, NetworkStore):
            return await super().recover()
        durable = [(Stream(r.subject, self.writer), r.durable) for r in tuple(self._recordings.values())]
        begun = asyncio.get_running_loop().time()
        while True:
            unseen, self._unseen = self._unseen, False
            report = await collect_if_free(store, self._journals)
            if report is not None:
                self._counts["recovered"] += report.events
                return report
            if unseen and not await _has_all(store, durable):
                self._unseen = True
            wait_s = SEEN_S if self._unseen else OTHERS_S
            if asyncio.get_running_loop().time() - begun > wait_s or (unseen and not self._unseen):
                return RecoveryReport()
            await asyncio.sleep(SEEN_POLL_S)

    @property
    def unseen(self) -> bool:
        """Tell whether what was flushed may still have to be collected before a read sees it."""
        return self._unseen


async def _has_all(store: NetworkStore, durable: list[tuple[Stream, int]]) -> bool:
    for stream, sequence in durable:
        if (await store.tip(stream)).sequence < sequence:
            return False
    return True


async def _aside(job: Callable[[], T]) -> T:
    """Do what may wait for a disk on a thread of its own, so that the loop goes on."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def work() -> None:
        try:
            result = job()
        except BaseException as error:  # noqa: BLE001 - handed on to whoever waits
            _hand_over(loop, answer, partial(answer.set_exception, error))
        else:
            _hand_over(loop, answer, partial(answer.set_result, result))

    try:
        threading.Thread(target=work, name="eventrun-sync", daemon=True).start()
    except RuntimeError:  # at interpreter exit Python 3.12 starts no thread any more
        work()
    return await answer


def _hand_over(
    loop: asyncio.AbstractEventLoop, answer: asyncio.Future[Any], put: Callable[[], object]
) -> None:
    try:
        loop.call_soon_threadsafe(lambda: answer.done() or put())
    except RuntimeError:  # the loop was closed meanwhile: nobody waits any more
        pass
