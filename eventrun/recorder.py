"""From `record(event)` to the log: streams with their journals, the flusher, flush, close, fork, recovery.

    record    caller's thread: encode, append to the stream's journal; never waits
    flusher   every linger_ms, or at flush: what is new of each stream becomes a batch; one append for all
    settle    now and then, so that the engine's write-ahead file isn't needed; then journals are released

Failure policy lives here and nowhere else: whatever the store does, events stay in the journal and are tried again.
The flusher never waits for a lock that callers hold: a caller may be stopped by a signal handler that waits for it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Struct

from eventrun.clock import monotonic_ns, time_ns
from eventrun.codec import NO_DIGEST, Batch, Stream, digest, encode, seal
from eventrun.errors import Closed, StoreError, StoreUnavailable
from eventrun.events import Event, Heartbeat
from eventrun.filesystems import file_system
from eventrun.journal import DAMAGED_SUFFIX, Chunk, Journal, JournalFolder, new_journal
from eventrun.journal.segments import Segment
from eventrun.pending import Pending
from eventrun.portal import Portal, aside
from eventrun.recovery import RecoveryReport, recover_dead_writers, say_end
from eventrun.stores.base import Store

if TYPE_CHECKING:
    import asyncio

LINGER_MS = 100.0  # how long an event waits for others before its batch is made
CLOSE_TIMEOUT_S = 10.0
BATCH_BYTES = 1 << 20  # about the most that one batch holds, unpacked
COMMIT_BYTES = 16 << 20  # about the most that one append holds, unpacked
PACKED_PER_COMMIT = 64  # zlib gives up the GIL; a busy main thread makes each return cost up to 5 ms
SETTLE_BYTES = 32 << 20  # unpacked bytes between two settlings of the store
HEARTBEAT_S = 10.0  # how often a running trial shows that it lives, when nothing else is recorded of it
UPKEEP_S = 0.1  # how often journals are looked after, also while the store keeps an append waiting
RESCUE_S = 1.0  # how often files are tried again for what lies in memory alone
RESIDENT_BYTES = 64 << 20  # about the most that mapped journals take of this process's memory
# The most memory that recording takes, however much waits for the store: the journals' part, a commit unpacked and
# packed, SQLite's cache, and what Python doesn't give back at once. Where no file can be written, MEMORY_BYTES more.
RECORDING_BYTES = 160 << 20
RETRY_MIN_S, RETRY_MAX_S = 0.1, 5.0
NO_FINISH = "no finish"  # why a trial is interrupted whose client was closed
CLOSE_STORE_S = 1.0  # how long closing waits at least for the store's own end
MAX_OPEN_JOURNALS = 10_000  # above it, streams that are idle give their journal back


class Statistics(Struct):
    """What a recorder did and what it holds; bytes are unpacked."""

    writer: str
    recorded: int  # events whose call returned
    durable: int  # of these, in the log
    dropped: int  # events lost because neither disk nor memory had room
    streams: int  # with an open journal
    held_bytes: int  # recorded, not durable yet
    held_age_s: float  # how long ago the oldest of these was recorded; 0.0: there is none
    journal_bytes: int  # files taken by the journals
    memory_bytes: int  # journals in memory, where no file can be written
    acknowledgement: str  # what a returned log call means: "crash_safe" or "accepted"
    batches: int
    commits: int
    failed_commits: int
    settled: int
    recovered: int  # events taken over from killed writers
    last_error: str | None
    problem: str | None  # why journals lie in memory


class _Sealed(NamedTuple):
    recording: Recording
    chunk: Chunk
    batch: Batch
    journal: Journal


class Recording:
    """One subject's stream by this writer. `record` is safe on any thread and never waits."""

    __slots__ = ("_recorder", "append", "digest", "durable", "ended", "journal", "next", "subject")

    def __init__(self, recorder: Recorder, subject: str) -> None:
        self._recorder = recorder
        self.subject = subject
        self.renew()

    def renew(self) -> None:
        """Begin anew, as another writer's stream."""
        self.journal: Journal | None = None
        # Keeps an encoded item: the journal's own `append`, so that no call lies between it and the log call.
        self.append: Callable[[bytes], None] = self.reopen
        self.next = 1  # the sequence that a new journal begins with
        self.durable = 0  # the last sequence that the log holds
        self.digest = NO_DIGEST  # of the last batch sealed
        self.ended = False  # nothing more is expected: give the journal back when all is in the log

    def record(self, event: Event) -> None:
        """Date, encode and keep one event."""
        self.append(encode((time_ns(), event)))

    def reopen(self, item: bytes) -> None:
        """Keep an item that found no journal, in a new one."""
        journal = self._recorder.open_journal(self)
        if journal is not None:
            journal.append(item)

    @property
    def recorded(self) -> int:
        """How many events this stream has, the last sequence."""
        journal = self.journal
        return (self.next if journal is None else journal.next_sequence) - 1


class Recorder:
    """All streams of one writer, and the flusher that brings them to the store.

    `open_store` is asked for a store at the start and again in a fork's child, where the parent's must not be used.
    """

    def __init__(
        self,
        portal: Portal,
        open_store: Callable[[], Store],
        *,
        folder: Path | None,
        linger_ms: float = LINGER_MS,
        close_timeout_s: float = CLOSE_TIMEOUT_S,
        forked: Callable[[], object] = lambda: None,
        running: Callable[[], list[str]] = list,
    ) -> None:
        self.portal = portal
        self.linger_ms = linger_ms
        self.close_timeout_s = close_timeout_s
        self.heartbeat_s = HEARTBEAT_S
        self._open_store = open_store
        self._running = running  # tells the subjects of trials that nobody has ended
        self._on_fork = forked  # tells the client, and gives what of its own must stay referenced
        self._journals = None if folder is None else folder / "journals"
        self._mapped = folder is not None and file_system(folder).mapped
        self._recordings: dict[str, Recording] = {}  # kept for good: a stream must go on where it ended
        self._store: Store | None = open_store()
        self._begin()
        _recorders.add(self)

    def _begin(self) -> None:
        self.writer = int.from_bytes(os.urandom(8), "big") or 1
        # Reentrant: a finalizer that logs may open a stream while this thread opens one.
        self._lock = threading.RLock()
        self._live: dict[str, Recording] = {}  # with an open journal
        path = None if self._journals is None else self._journals / f"{self.writer:016x}"
        self._folder = self._new_folder(path)
        self._flusher: Pending[None] | None = None
        self._keeper: Pending[None] | None = None
        self._closed = False
        self._closing: Pending[int] | None = None
        self._ending: asyncio.Task[int] | None = None
        self._gave_up = False  # the close left events in the journal
        self.store_closed = False
        self._cycle_lock: asyncio.Lock | None = None
        self._settling: asyncio.Task[bool] | None = None
        self._sealed: list[_Sealed] = []  # handed to the store, no answer yet
        self._unsettled_bytes = 0
        self._settle_at = SETTLE_BYTES
        self._counts = dict.fromkeys(
            ("durable", "batches", "commits", "failed_commits", "settled", "recovered"), 0
        )
        self._last_error: str | None = None
        self._heard: dict[str, int] = {}  # events of each running trial when its heart was listened to
        self._beat_at = 0

    def _new_folder(self, path: Path | None) -> JournalFolder:
        return JournalFolder(path, mapped=self._mapped)

    @property
    def store(self) -> Store:
        """The store; in a fork's child opened on first use."""
        if self._store is None:
            self._store = self._open_store()
        return self._store

    # recording: any thread ------------------------------------------------------------------------------------

    def stream(self, subject: str) -> Recording:
        """Return this writer's stream of a subject."""
        with self._lock:
            recording = self._recordings.get(subject)
            if recording is None:
                made = Recording(self, subject)
                # A finalizer or signal handler that logs to the same subject may have come in between.
                recording = self._recordings.setdefault(subject, made)
            return recording

    def open_journal(self, recording: Recording) -> Journal | None:
        """Give a stream a journal, unless another thread has just done so; None: no room, which is counted."""
        with self._lock:
            while (journal := recording.journal) is None or journal.closed:
                made = None if self._closed else self._new_journal(recording)
                # No call from here to the end of the branch: `_shut` comes before it or after it, and a finalizer
                # that logs, which may have opened a journal meanwhile, too.
                if recording.journal is journal and made is not None and not self._closed:
                    self._live[recording.subject] = recording
                    recording.journal = made
                    recording.ended = False
                elif made is not None:
                    made.close()
                if self._closed:
                    raise Closed(
                        "the client was closed before this call; open another with eventrun.open(...)"
                    )
                if made is None:
                    return None
            recording.append = journal.append
            self._folder.streams = len(self._live)
            begin = self._flusher is None
        # Outside the lock: a finalizer that logs may come in between, in a thread that holds the portal's.
        if begin:
            self._begin_flushing()
        return journal

    def _new_journal(self, recording: Recording) -> Journal | None:
        stream = Stream(recording.subject, self.writer)
        segment = self._folder.segment(stream)
        if segment is None:
            self._folder.drop()
            return None
        return self._make_journal(stream, segment, recording)

    def _make_journal(self, stream: Stream, segment: Segment, recording: Recording) -> Journal:
        return new_journal(self._folder, stream, segment, recording.next, recording.reopen)

    def _begin_flushing(self) -> None:
        try:
            self._flusher = self.portal.call(self._flush_for_ever)
            self._keeper = self.portal.call(self._keep_up)
        except (
            RuntimeError
        ) as error:  # no thread to be had; the events are kept, and the next stream tries again
            self._last_error = str(error)

    def end(self, recording: Recording) -> None:
        """Say that a stream is complete: its journal is given back when the log holds it all."""
        recording.ended = True

    # the flusher: the loop's thread ---------------------------------------------------------------------------

    async def _flush_for_ever(self) -> None:
        import asyncio

        pause = linger = self.linger_ms / 1000
        while not self._closed:
            await asyncio.sleep(pause)
            try:
                # A full batch needn't wait for more. (Many small ones had better: each costs the interpreter 40 us.)
                pause = 0 if await self._cycle() else linger
            except Exception as error:  # noqa: BLE001 - the one place: events stay in the journal, to be tried again
                self._note_failure(error)
                pause = min(max(pause * 2, RETRY_MIN_S), RETRY_MAX_S)

    def _note_failure(self, error: Exception) -> None:
        self._counts["failed_commits"] += 1
        self._last_error = str(error) or repr(error)

    async def _cycle(self) -> bool:
        """Append what is new, at most about COMMIT_BYTES; tell whether more may wait: a batch, or all, was full."""
        import asyncio

        self._cycle_lock = self._cycle_lock or asyncio.Lock()
        async with self._cycle_lock:
            if self._gave_up:  # whoever opens the store next may be taking it in
                return False
            more = await self._take_new()
        if self._unsettled_bytes >= self._settle_at or (self._unsettled_bytes and self._wants_release()):
            self._begin_settling()
        return more

    async def _take_new(self) -> bool:
        # A batch whose append failed may be in the log all the same, so it is sent again as it was.
        self._sealed = self._sealed or self._seal()
        sizes = [len(each.chunk.payload) for each in self._sealed]
        if self._sealed:
            await self._append_sealed()
        self._prepare()
        return max(sizes, default=0) * 2 >= BATCH_BYTES or sum(sizes) * 2 >= COMMIT_BYTES

    def _prepare(self) -> None:
        for _, journal in self._open_journals():
            journal.prepare()

    async def _keep_up(self) -> None:
        """Look after the journals beside the appends: however long the store takes, no log call waits for a file
        to be made, and what was written doesn't stay in memory."""
        import asyncio

        since_rescue_s = 0.0
        while not self._closed:
            await asyncio.sleep(UPKEEP_S)
            since_rescue_s += UPKEEP_S
            try:
                self._prepare()
                await self._trim()
                if monotonic_ns() >= self._beat_at:
                    self._beat_at = monotonic_ns() + int(self.heartbeat_s * 1e9)
                    # Not on this thread: who records may have to wait for a caller, and a caller for this thread.
                    aside(self._beat)
                if self._folder.unsaved and since_rescue_s >= RESCUE_S:
                    since_rescue_s = 0.0
                    self._rescue()
                    if self._unsettled_bytes:  # then what journals hold already can make room
                        self._begin_settling()
            except Exception as error:  # noqa: BLE001 - of the one place: it is tried again
                self._last_error = str(error) or repr(error)

    def _beat(self) -> None:
        """Record a heartbeat of each running trial of which nothing was recorded since the last time."""
        heard: dict[str, int] = {}
        for subject in self._running():
            recording = self.stream(subject)
            if self._heard.get(subject) == recording.recorded and not self._closed:
                recording.record(Heartbeat(self.heartbeat_s))
            heard[subject] = recording.recorded
        self._heard = heard

    def _rescue(self) -> None:
        for _, journal in self._open_journals():
            if not journal.rescue():
                return

    async def _trim(self) -> None:
        import asyncio

        journals = [journal for _, journal in self._open_journals()]
        if sum(journal.resident_bytes for journal in journals) <= RESIDENT_BYTES // 2:
            return
        for journal in journals:
            while journal.trim():  # noqa: ASYNC110 - in between others may go on
                await asyncio.sleep(0)

    def _begin_settling(self) -> asyncio.Task[bool]:
        # Beside the appends: a reader may hinder it for seconds.
        import asyncio

        if self._settling is None or self._settling.done():
            self._settling = asyncio.create_task(self._settle())
        return self._settling

    def _open_journals(self) -> list[tuple[Recording, Journal]]:
        live = tuple(self._live.values())
        return [(r, journal) for r in live if (journal := r.journal) is not None]

    def _seal(self) -> list[_Sealed]:
        left = COMMIT_BYTES
        peeked: list[tuple[Recording, Journal, Chunk]] = []
        for recording, journal in self._open_journals():
            if left > 0 and journal.has_new:
                chunks = journal.peek(
                    left, BATCH_BYTES
                )  # all of it: where a sync takes seconds each one counts
                left -= sum(len(chunk.payload) for chunk in chunks)
                peeked.extend((recording, journal, chunk) for chunk in chunks)
        sizes = sorted((len(chunk.payload) for _, _, chunk in peeked), reverse=True)
        smallest_packed = sizes[PACKED_PER_COMMIT] + 1 if len(sizes) > PACKED_PER_COMMIT else 0
        digests: dict[Recording, bytes] = {}  # kept only when all is sealed, or the chain would break
        sealed = []
        for recording, journal, chunk in peeked:
            stream = Stream(recording.subject, self.writer)
            pack = len(chunk.payload) >= smallest_packed
            batch = seal(stream, *chunk, digests.get(recording, recording.digest), pack=pack)
            digests[recording] = digest(batch)
            sealed.append(_Sealed(recording, chunk, batch, journal))
        for recording, last in digests.items():
            recording.digest = last
        return sealed

    async def _append_sealed(self) -> None:
        sealed = self._sealed
        await self.store.append([each.batch for each in sealed])
        for each in sealed:
            each.journal.confirm(each.chunk)
            each.recording.durable = each.batch.header.last
            if self._folder.memory_bytes:
                each.journal.release(each.recording.durable, memory=True)
            self._counts["durable"] += each.chunk.events
            self._unsettled_bytes += len(each.chunk.payload)
        self._counts["batches"] += len(sealed)
        self._counts["commits"] += 1
        self._last_error = None
        self._sealed = []

    def _wants_release(self) -> bool:
        ended = sum(recording.ended for recording in tuple(self._live.values()))
        return ended >= 100 or len(self._live) > MAX_OPEN_JOURNALS

    async def _settle(self) -> bool:
        """Make the log independent of the engine's write-ahead file, then give journals back; False when it failed."""
        durable = [(recording, journal, recording.durable) for recording, journal in self._open_journals()]
        unsettled = self._unsettled_bytes
        try:
            await self.store.settle()
        except Exception as error:  # noqa: BLE001 - of the one place: what isn't given back does no harm
            self._last_error = str(error) or repr(error)
            self._settle_at = self._unsettled_bytes + SETTLE_BYTES
            return False
        self._unsettled_bytes -= unsettled
        self._settle_at = SETTLE_BYTES
        self._counts["settled"] += 1
        crowded = len(self._live) > MAX_OPEN_JOURNALS
        for recording, journal, sequence in durable:
            journal.release(sequence)
            if (recording.ended or crowded) and recording.recorded == sequence:
                self._close_journal(recording, journal)
        return True

    def _close_journal(self, recording: Recording, journal: Journal) -> None:
        if not self._lock.acquire(blocking=False):
            return  # a stream is just being opened; another time
        try:
            recording.next = recording.durable + 1  # what a finalizer that logs right after the close needs
            if journal.close():
                reopen = recording.reopen
                if recording.journal is journal:  # no call from here
                    recording.journal = None
                    recording.append = reopen
                    self._live.pop(recording.subject, None)
        finally:
            self._lock.release()

    # waiting: flush and close ---------------------------------------------------------------------------------

    def flush(self) -> Pending[None]:
        """Wait until all that was recorded before this call is durable. Raises StoreError; nothing is lost then."""
        return self.portal.call(self._flush, self._targets())

    async def _flush(self, targets: list[tuple[Recording, int]]) -> None:
        try:
            while any(recording.durable < target for recording, target in targets):
                if self._gave_up:
                    raise StoreUnavailable("the client gave up on the store before this flush was through")
                await self._cycle()
        except StoreError as error:
            self._note_failure(error)
            raise

    def close(self, seconds: float | None = None) -> Pending[int]:
        """Bring all to the log, in `seconds` (None: close_timeout_s), and end; gives the number of events left.

        What is left, in the journal, is taken in by the next open of the store; what no file could be had for is
        dropped and counted. Recording afterwards raises Closed. Closing again gives the answer of the first time.
        """
        if self._closing is None:
            self._closing = self.portal.call(self._close, seconds)
        return self._closing

    async def _close(self, seconds: float | None) -> int:
        # Once: a signal handler may have closed while the interrupted call was about to.
        import asyncio

        if self._ending is None:
            self._ending = asyncio.ensure_future(
                self._end(self.close_timeout_s if seconds is None else seconds)
            )
        return await asyncio.shield(self._ending)

    async def _end(self, seconds: float) -> int:
        import asyncio

        deadline = asyncio.get_running_loop().time() + seconds
        done = False
        try:
            async with asyncio.timeout_at(deadline):
                await self._drain()  # while others may still record
                self._shut()
                await self._drain()
                await self._note_running()
                done = True
                while done and self._unsettled_bytes:
                    done = await self._begin_settling()
        except Exception as error:  # noqa: BLE001 - of the one place: what is left stays in the journal
            done = False
            self._last_error = str(error) or self._last_error or "the store didn't answer in time"
        self._shut()
        left = self.left
        said_all = done or not self._running()
        if done and not left:
            self._folder.remove()
        else:
            lost = sum(journal.save() for _, journal in self._open_journals())
            self._folder.drop(lost)
            self._folder.end(complete=said_all and not lost)
            self._gave_up = left > 0
            left -= lost
        try:
            async with asyncio.timeout_at(max(deadline, asyncio.get_running_loop().time() + CLOSE_STORE_S)):
                if self._store is not None:
                    await self._store.aclose()
            self.store_closed = True
        except Exception as error:  # noqa: BLE001 - of the one place: all that matters is done
            self._last_error = str(error) or "the store couldn't be closed in time"
        return left

    async def _note_running(self) -> None:
        # Those that other threads began while the client ended all others: their own streams take no more.
        for subject in self._running():
            stream = Stream(subject, self.writer)
            await say_end(self.store, stream, self._recordings[subject].recorded, NO_FINISH)
            self._unsettled_bytes += 1

    def _shut(self) -> None:
        self._closed = True
        for _, journal in self._open_journals():
            journal.shut()

    async def _drain(self) -> None:
        """Append all that was recorded until now, trying again while the store is unavailable."""
        import asyncio

        pause = RETRY_MIN_S
        targets = self._targets()
        while True:
            try:
                return await self._flush(targets)
            except StoreUnavailable:
                await asyncio.sleep(pause)
                pause = min(pause * 2, RETRY_MAX_S)

    def _targets(self) -> list[tuple[Recording, int]]:
        return [
            (recording, recording.recorded if (journal := recording.journal) is None else journal.returned)
            for recording in tuple(self._live.values())
        ]

    async def recover(self) -> RecoveryReport:
        """Take in what killed writers of this host left."""
        if self._journals is None:
            return RecoveryReport()
        report = await recover_dead_writers(self.store, self._journals)
        self._counts["recovered"] += report.events
        return report

    async def collect(self, hosts: Collection[str]) -> RecoveryReport:
        """Take in what writers of other hosts left as well; see `collecting`."""
        from eventrun.collecting import collect

        return (
            RecoveryReport() if self._journals is None else await collect(self.store, self._journals, hosts)
        )

    @property
    def journals(self) -> Path | None:
        """The folder of all journals, where it is now if the store was moved while it was open."""
        place = self._folder.place()
        return self._journals if place is None else place.parent

    def damaged(self) -> list[Path]:
        """Find the folders of killed writers that could not be taken in whole."""
        return [] if self._journals is None else sorted(self._journals.glob("*" + DAMAGED_SUFFIX))

    # looking --------------------------------------------------------------------------------------------------

    @property
    def last_error(self) -> str | None:
        """Why the last append failed; None while all is well."""
        return self._last_error

    @property
    def left(self) -> int:
        """How many events the log doesn't hold yet, as far as is known."""
        return sum(each.recorded - each.durable for each in tuple(self._recordings.values()))

    @property
    def unseen(self) -> bool:
        """Tell whether what was flushed may still have to be collected before a read sees it."""
        return False

    @property
    def idle(self) -> bool:
        """Tell whether nothing was recorded yet."""
        return not self._recordings

    @property
    def untouched(self) -> bool:
        """Tell whether neither recording nor reading has used the background loop yet."""
        return not self.portal.started

    def statistics(self) -> Statistics:
        """Count what was done and what is held. Cheap, on any thread."""
        recordings = tuple(self._recordings.values())
        journals = [journal for _, journal in self._open_journals()]
        held = [(journal, size) for journal in journals if (size := journal.held_bytes)]
        dates = [date for journal, _ in held if (date := journal.oldest_ns) is not None]
        return Statistics(
            writer=f"{self.writer:016x}",
            recorded=sum(recording.recorded for recording in recordings),
            dropped=self._folder.dropped_events,
            streams=len(journals),
            held_bytes=sum(size for _, size in held),
            held_age_s=max(time_ns() - min(dates), 0) / 1e9 if dates else 0.0,
            journal_bytes=self._folder.file_bytes(),
            memory_bytes=self._folder.memory_bytes,
            acknowledgement="crash_safe" if self._folder.crash_safe else "accepted",
            last_error=self._last_error,
            problem=self._folder.problem,
            **self._counts,
        )

    # fork -----------------------------------------------------------------------------------------------------

    def forked(self) -> None:
        """In a fork's child: leave all of the parent's alone and be a new writer from the first record on."""
        journals = [recording.journal for recording in self._recordings.values()]
        running = (self._flusher, self._keeper, self._closing, self._ending, self._cycle_lock, self._settling)
        _inherited.append((self._store, self._folder, self._sealed, journals, running, self._on_fork()))
        self._folder.abandon()
        self.portal.forget()
        for recording in self._recordings.values():
            recording.renew()
        closed = self._closed
        self._store = None
        self._begin()
        self._closed = closed


# What a fork's child has of its parent's: referenced for ever and never touched, because closing an SQLite connection
# drops its locks in the parent too, and unmapping would need the parent's lock.
_inherited: list[Any] = []
_recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()


def _in_child() -> None:
    for recorder in tuple(_recorders):
        recorder.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
