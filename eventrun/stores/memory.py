"""The store in memory: the specification that every other store is held to, and the store of tests."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path

from eventrun.codec import NO_DIGEST, Batch, Stream, digest
from eventrun.errors import Closed, Conflict
from eventrun.stores.base import READ_BYTES, StoredBatch, Tip


class MemoryStore:
    """A log that lives as long as this object. Its coroutines never wait, so each is atomic on its loop."""

    folder: Path | None = None

    def __init__(self) -> None:
        self._log: list[StoredBatch] = []
        self._starts: list[int] = []  # the positions of self._log, to search in
        self._held: dict[tuple[Stream, int], bytes] = {}
        self._tips: dict[Stream, Tip] = {}
        self._end = 0
        self._closed = False

    async def append(self, batches: Sequence[Batch], expected: Mapping[Stream, int] | None = None) -> int:
        """Append all batches or none, and return the position of the last event of the log. See `Store.append`."""
        self._check_open()
        for stream, sequence in (expected or {}).items():
            check_expected(stream, sequence, self._tips.get(stream, NOTHING))
        added: dict[tuple[Stream, int], Batch] = {}
        tips: dict[Stream, Tip] = {}
        for batch in batches:
            stream, first = batch.header.stream, batch.header.first
            tip = tips.get(stream) or self._tips.get(stream, NOTHING)
            if fits(batch, tip):
                added[stream, first] = batch
                tips[stream] = Tip(batch.header.last, digest(batch))
            else:
                new = added.get((stream, first))
                check_repeated(batch, new.frame if new else self._held.get((stream, first)))
        for key, batch in added.items():
            self._held[key] = batch.frame
            self._log.append(StoredBatch(self._end + 1, batch))
            self._starts.append(self._end + 1)
            self._end += batch.header.count
        self._tips.update(tips)
        return self._end

    async def read(
        self, after: int = 0, *, subject: str | None = None, limit_bytes: int = READ_BYTES
    ) -> list[StoredBatch]:
        """Return batches that hold events beyond `after`, in log order. See `Store.read`."""
        self._check_open()
        found: list[StoredBatch] = []
        size = 0
        for index in range(max(bisect_right(self._starts, after) - 1, 0), len(self._log)):
            stored = self._log[index]
            if stored.last_position <= after or subject not in (None, stored.batch.header.subject):
                continue
            size += len(stored.batch.frame)
            if found and size > limit_bytes:
                break
            found.append(stored)
        return found

    async def tip(self, stream: Stream) -> Tip:
        """Return where a stream ends."""
        self._check_open()
        return self._tips.get(stream, NOTHING)

    async def end(self) -> int:
        """Return the position of the last event."""
        self._check_open()
        return self._end

    async def settle(self) -> None:
        """Do nothing: there is no write-ahead file."""
        self._check_open()

    async def aclose(self) -> None:
        """Refuse every later call; what was appended stays with this object."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the store was closed before this call: open another")


NOTHING = Tip(0, NO_DIGEST)


def fits(batch: Batch, tip: Tip) -> bool:
    """Tell whether a batch goes on where its stream ends; False: it may repeat what the log holds.

    Raises Conflict when it can be neither.
    """
    header = batch.header
    if header.count < 1 or header.first < 1:
        raise Conflict(f"{header.stream} {header.first}..{header.last} is no range: sequences begin at 1")
    if header.first <= tip.sequence:
        return False
    if header.first != tip.sequence + 1:
        raise Conflict(
            f"{header.stream} {header.first}..{header.last} leaves a gap after sequence {tip.sequence}"
        )
    if header.previous != tip.digest:
        raise Conflict(
            f"{header.stream} {header.first}..{header.last} isn't chained to the batch before it in the log"
        )
    return True


def check_repeated(batch: Batch, held: bytes | None) -> None:
    """Raise Conflict unless the log holds this very batch."""
    if held != batch.frame:
        header = batch.header
        raise Conflict(
            f"{header.stream} {header.first}..{header.last}: the log already holds other bytes there"
        )


def check_expected(stream: Stream, sequence: int, tip: Tip) -> None:
    """Raise Conflict unless the stream ends at `sequence`."""
    if tip.sequence != sequence:
        raise Conflict(f"{stream} ends at sequence {tip.sequence}, not {sequence}: another writer was faster")
