"""What a store is: an append-only log of batches. It knows bytes and headers, never what an event means.

The memory store is the specification; `eventrun.testing.StoreConformance` is the contract as tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from eventrun.codec import Batch, Stream

READ_BYTES = 4 << 20  # about how much one `read` returns


class StoredBatch(NamedTuple):
    """A batch and the position of its first event in the whole log (from 1, without gaps)."""

    position: int
    batch: Batch

    @property
    def last_position(self) -> int:
        """The position of the last event."""
        return self.position + self.batch.header.count - 1


class Tip(NamedTuple):
    """The end of a stream: its last sequence (0: nothing yet) and the digest of its last batch."""

    sequence: int
    digest: bytes


class Store(Protocol):
    """An append-only log of batches.

    Methods are coroutines on eventrun's own asyncio loop; concurrent calls are allowed. Every failure that a caller
    can do something about is a StoreError.
    """

    async def append(self, batches: Sequence[Batch], expected: Mapping[Stream, int] | None = None) -> int:
        """Append all batches or none, durably (fsync), and return the position of the last event of the log.

        A batch must begin where its stream ends, with the chain's digest. A batch that the log already holds, byte
        for byte, is skipped (an append whose answer was lost may be repeated). Raises Conflict when a batch doesn't
        fit or a stream in `expected` doesn't end at that sequence; then nothing was appended.
        """
        ...

    async def read(
        self, after: int = 0, *, subject: str | None = None, limit_bytes: int = READ_BYTES
    ) -> list[StoredBatch]:
        """Return batches that hold events at positions beyond `after`, in log order; of one subject, or all.

        Returns at least one batch unless there is none, and stops at about `limit_bytes`. The first batch may begin
        at or before `after`. Headers are checked (LogDamaged); payloads are checked by whoever unpacks them.
        """
        ...

    async def tip(self, stream: Stream) -> Tip:
        """Return where a stream ends."""
        ...

    async def end(self) -> int:
        """Return the position of the last event (0: the log is empty). Cheap: it may be polled."""
        ...

    async def settle(self) -> None:
        """Make all that was appended independent of any write-ahead file of the engine; journals are released after.

        On SQLite: the WAL checkpoint. May take long; never needed for durability.
        """
        ...

    async def aclose(self) -> None:
        """Release what is held. The store can't be used afterwards."""
        ...
