"""The log as JSON lines, out and in again: one event a line, in the order of the log.

    {"position": 7, "subject": "t/...", "writer": "00c0ffee00c0ffee", "sequence": 3, "time_ns": 1700000000000000000,
     "event": {"kind": "MetricsLogged", "values": {"loss": 0.3}, "step": 10, ...}}

Nothing is lost on the way: NaN, infinities and bytes are written as `codec.to_json` does, integers have 64 bits.
Import keeps the order of the lines, so what a log exports makes the same log again, and what it holds of streams
that the store knows already is compared and passed by: importing twice, or what has grown since, is safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec
from msgspec import Struct

from eventrun.codec import (
    Batch,
    Item,
    StoredEvent,
    Stream,
    digest,
    encode_item,
    event_from_json,
    event_to_json,
    items_of,
    seal,
)
from eventrun.errors import Conflict, InvalidValue
from eventrun.events import WriterEnded
from eventrun.stores.base import Tip

if TYPE_CHECKING:
    from eventrun.client import Client

BATCH_BYTES = 1 << 20  # about the most that one batch holds, unpacked
APPEND_BYTES = 8 << 20  # about the most that is held before it is appended, unpacked
CLAIMS = 0  # the writer of claim streams
REPORT_EVENTS = 1000  # how often progress is told
SUBJECT_KINDS = ("t", "g", "p", "s", "c")

Progress = Callable[[int], object]

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder()


class Sink(Protocol):
    """What text can be written to."""

    def write(self, text: str, /) -> object:
        """Write text."""
        ...


class Imported(Struct):
    """What an import did: events added, and events that the store had already."""

    added: int = 0
    known: int = 0


class Line(NamedTuple):
    """One event as its line tells it."""

    stream: Stream
    sequence: int
    item: bytes
    time_ns: int
    ended: int | None = None  # the writer whose end a claim stream tells


def export_events(
    client: Client, out: Sink, trial: str | None = None, *, progress: Progress | None = None
) -> int:
    """Write the events of the log, or of one trial, and return how many they are. Holds one page at a time."""
    count = 0
    for stored in client.events(trial=trial):
        out.write(event_line(stored))
        count += 1
        if progress is not None and count % REPORT_EVENTS == 0:
            progress(count)
    return count


def event_line(stored: StoredEvent) -> str:
    """Make the line of an event, with its newline."""
    return _encoder.encode(event_mapping(stored)).decode() + "\n"


def event_mapping(stored: StoredEvent) -> dict[str, Any]:
    """Make the mapping that the line of an event holds."""
    return {
        "position": stored.position,
        "subject": stored.stream.subject,
        "writer": f"{stored.stream.writer:016x}",
        "sequence": stored.sequence,
        "time_ns": stored.time_ns,
        "event": event_to_json(stored.event),
    }


def import_events(client: Client, lines: Iterable[str | bytes], *, name: str = "input") -> Imported:
    """Append the events of these lines to the log, in their order. Empty lines are passed by.

    An event that the store has already (same stream and sequence, equal content) is skipped. A line that is no
    event, one that contradicts the store and one that leaves a gap in its stream raise InvalidValue with `name` and
    the line's number: what stands before it is then in the log, what follows is not.
    """
    importer = _Importer(client)
    number = 0
    try:
        for text in lines:
            number += 1
            if text.strip():
                importer.take(_read(text))
    except InvalidValue as error:
        importer.append()
        raise InvalidValue(f"{name}, line {number}: {error}") from error
    except UnicodeDecodeError as error:
        importer.append()
        raise InvalidValue(
            f"{name}, line {number + 1}: not UTF-8 text, so not what eventrun exports"
        ) from error
    importer.append()
    return importer.done


def _read(text: str | bytes) -> Line:
    try:
        found = _decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidValue(f"this is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidValue(
            "this is no event: a line is an object with subject, writer, sequence, time_ns and event"
        )
    writer = _field(found, "writer", str)
    try:
        number = int(writer, 16)
    except ValueError:
        number = -1
    if number < 0 or len(writer) != 16:
        raise InvalidValue(f"the writer is {writer!r}; it has 16 hex digits")
    sequence, time_ns = _field(found, "sequence", int), _field(found, "time_ns", int)
    if not 1 <= sequence < 2**63:
        raise InvalidValue(f"the sequence is {sequence}; sequences begin at 1")
    if not -(2**63) <= time_ns < 2**63:
        raise InvalidValue(f"time_ns is {time_ns}, which is no time")
    event = event_from_json(_field(found, "event", dict))
    ended = event.writer if number == CLAIMS and isinstance(event, WriterEnded) else None
    return Line(Stream(_subject(found), number), sequence, encode_item(time_ns, event), time_ns, ended)


def _subject(found: dict[str, Any]) -> str:
    subject: str = _field(found, "subject", str)
    kind, _, name = subject.partition("/")
    if kind not in SUBJECT_KINDS or not name or len(subject) > 60_000:
        raise InvalidValue(
            f'the subject is {subject[:60]!r}; subjects look like "t/<trial id>" or "p/<project>"'
        )
    return subject


def _field(found: dict[str, Any], name: str, kind: type) -> Any:
    value = found.get(name)
    if type(value) is not kind:
        what = "is missing" if name not in found else f"is {str(value)[:40]!r}"
        raise InvalidValue(f"{name!r} {what}; it must be {_KINDS[kind]}")
    return value


_KINDS = {str: "text", int: "an integer", dict: "an object"}


class _Run(Struct):
    """Consecutive events of one stream: a batch to be."""

    stream: Stream
    first: int
    items: list[bytes]
    first_ns: int
    last_ns: int
    size: int


class _Importer:
    """Takes lines in, in order; what is new is appended in runs of one stream, so that the order stays.

    `_tips` are the ends of streams, with what is held here; `_stored` read what the log has of a stream.
    """

    def __init__(self, client: Client) -> None:
        self.done = Imported()
        self._client = client
        self._tips: dict[Stream, Tip] = {}
        self._known: dict[Stream, _Known] = {}
        self._ended: dict[Stream, set[int]] = {}
        self._run: _Run | None = None
        self._batches: list[Batch] = []
        self._held = 0

    def take(self, line: Line) -> None:
        """Take in one event, or see that the store has it."""
        stream, sequence = line.stream, line.sequence
        tip = self._tips.get(stream)
        if tip is None:
            tip = self._tips[stream] = self._client.tip(stream).result()
        run = self._run
        end = run.first + len(run.items) - 1 if run is not None and run.stream == stream else tip.sequence
        if line.ended is not None:
            # Another process may have noticed the same end, at another time and beside others.
            if line.ended in self._ended_in(stream):
                self.done.known += 1
                return
            self._ended[stream].add(line.ended)
            sequence = end + 1
        if sequence <= end:
            self._compare(line)
            return
        if sequence > end + 1:
            missing = (
                f"sequence {end + 1} is"
                if sequence == end + 2
                else f"sequences {end + 1} to {sequence - 1} are"
            )
            raise InvalidValue(
                f"{missing} missing before {sequence} of {stream}: import the part before it first"
            )
        if run is None or run.stream != stream or run.size >= BATCH_BYTES:
            self._seal()
            self._run = run = _Run(stream, sequence, [], line.time_ns, line.time_ns, 0)
        run.items.append(line.item)
        run.last_ns = line.time_ns
        run.size += len(line.item)
        if self._held + run.size >= APPEND_BYTES:
            self.append()

    def _ended_in(self, claims: Stream) -> set[int]:
        """Find the writers whose end is known."""
        found = self._ended.get(claims)
        if found is None:
            found = self._ended[claims] = {
                event.writer
                for stored in self._client.batches(subject=claims.subject)
                if stored.batch.header.stream == claims
                for _, event in items_of(stored.batch)
                if isinstance(event, WriterEnded)
            }
        return found

    def _compare(self, line: Line) -> None:
        known = self._known.get(line.stream)
        if known is None or known.end < line.sequence:
            self.append()  # it may be one of those held here
            known = self._known[line.stream] = _Known(
                self._client, line.stream, self._tips[line.stream].sequence
            )
        if not known.holds(line):
            raise InvalidValue(
                f"the store holds another event as sequence {line.sequence} of {line.stream}; "
                "this file is not of the same history"
            )
        self.done.known += 1

    def _seal(self) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        tip = self._tips[run.stream]
        payload = b"".join(run.items)
        batch = seal(run.stream, run.first, len(run.items), payload, run.first_ns, run.last_ns, tip.digest)
        self._batches.append(batch)
        self._held += len(payload)
        self._tips[run.stream] = Tip(batch.header.last, digest(batch))

    def append(self) -> None:
        """Bring what is held to the log. Raises StoreError."""
        self._seal()
        batches, self._batches, self._held = self._batches, [], 0
        if not batches:
            return
        try:
            self._client.append(batches).result()
        except Conflict as error:
            raise Conflict(
                f"{error}: is another import running? Run this one again when it has ended"
            ) from error
        self.done.added += sum(batch.header.count for batch in batches)


class _Known:
    """Reads what the log holds of one stream, up to sequence `end`, forwards; going back begins anew."""

    def __init__(self, client: Client, stream: Stream, end: int) -> None:
        self.end = end
        self._client = client
        self._stream = stream
        self._items: Iterator[tuple[int, Item]] = iter(())
        self._place = 0  # the sequence of the item below
        self._item: Item | None = None

    def holds(self, line: Line) -> bool:
        """Tell whether the log holds this very event at its sequence."""
        if line.sequence < self._place or not self._place:
            self._items = self._read()
            self._place = 0
        while self._place < line.sequence:
            self._place, self._item = next(self._items, (self.end + 1, None))
        if self._place != line.sequence or self._item is None:
            return False
        time_ns, event = self._item
        if encode_item(time_ns, event) == line.item:
            return True
        # JSON has but one NaN, and a log may hold others.
        return encode_item(time_ns, event_from_json(event_to_json(event))) == line.item

    def _read(self) -> Iterator[tuple[int, Item]]:
        for stored in self._client.batches(subject=self._stream.subject):
            header = stored.batch.header
            if header.stream == self._stream:
                yield from enumerate(items_of(stored.batch), header.first)
