"""log.db and its write-ahead file as bytes: what can be read of them without SQLite, however damaged they are.

SQLite's formats: https://sqlite.org/fileformat2.html. A batch is the last column of a row of the table `batches`, so
it lies at the end of a cell, and goes on in a chain of overflow pages when it is long. It is found by its own header,
which has a checksum; neither the schema nor the tree above it is needed.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from eventrun.codec import Batch, cut_batch, open_batch, payload_of
from eventrun.errors import FormatTooNew, LogDamaged

PAGE_BYTES = 4096  # SQLite's default, taken where both files' headers are damaged
READ_BYTES = 1 << 20
WAL_HEADER_BYTES, FRAME_HEADER_BYTES = 32, 24
WAL_MAGIC = 0x377F0682  # or 1 more, for checksums of big-endian words
SECTOR_BYTES = 512
CELL_BYTES = (
    64  # the most that stands before the batch in its cell: four varints, a record header, three integers
)

_LIKELY = re.compile(rb"\x9a\x01")  # the beginning of a header, after its length: an array of ten, version 1
_INTEGER_BYTES = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8, 8: 0, 9: 0}  # of a column, by its serial type

COMMITTED, UNSURE = (
    2,
    1,
)  # how much a page counts: the log's own, or what a write-ahead file has beyond its good part


class Frame(NamedTuple):
    """A page in the write-ahead file. `current`: of the file's present run; `good`: and all checksums up to it fit."""

    offset: int
    page: int
    commits: bool
    current: bool
    good: bool


class Place(NamedTuple):
    """Where a batch was found: in which page of which file, and at which byte of it."""

    wal: bool
    offset: int
    at: int


class Candidate(NamedTuple):
    """A batch whose header is whole; `whole`: its payload too. `position`: as its row says, if that can be read."""

    batch: Batch
    whole: bool
    position: int | None
    rank: int
    place: Place


class RawLog:
    """The two files of a log, read by plain calls."""

    def __init__(self, file: Path) -> None:
        self._db = _descriptor(file)
        self._wal_file = file.with_name(file.name + "-wal")
        try:
            self._wal = os.open(self._wal_file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError:
            self._wal = -1
        self.db_bytes = os.fstat(self._db).st_size if self._db >= 0 else 0
        self.wal_bytes = os.fstat(self._wal).st_size if self._wal >= 0 else 0
        self.page_bytes = self._find_page_bytes()
        self.frames = list(wal_frames(self._read_wal, self.wal_bytes, self.page_bytes))
        # Where the last version of each page lies: of those that count, and of all.
        self._good = {f.page: f.offset + FRAME_HEADER_BYTES for f in self.frames if f.good}
        self._any = {f.page: f.offset + FRAME_HEADER_BYTES for f in self.frames}

    def close(self) -> None:
        """Close the write-ahead file. The database's descriptor stays open, see `_descriptor`."""
        if self._wal >= 0:
            os.close(self._wal)
            self._wal = -1

    def cut_off(self) -> int | None:
        """Return how many bytes the database had by its own header, if it has fewer now."""
        header = _read(self._db, 0, 100)
        if (
            len(header) < 100 or header[24:28] != header[92:96]
        ):  # the count of pages was noted by an old SQLite
            return None
        had = int.from_bytes(header[28:32], "big") * self.page_bytes
        return had if self.db_bytes < had else None

    def candidates(self) -> Iterator[Candidate]:
        """Yield each batch that can be found, some more than once."""
        step = READ_BYTES // self.page_bytes * self.page_bytes
        for start in range(0, self.db_bytes, step):
            data = _read(self._db, start, step)
            for base in range(0, len(data), self.page_bytes):
                page = data[base : base + self.page_bytes]
                yield from self._in_page(page, COMMITTED, False, start + base)
        for frame in self.frames:
            offset = frame.offset + FRAME_HEADER_BYTES
            page = self._read_wal(offset, self.page_bytes)
            yield from self._in_page(page, COMMITTED if frame.good else UNSURE, True, offset)

    def batch(self, place: Place) -> Batch | None:
        """Read a batch that was found before once more."""
        page = _read(self._wal if place.wal else self._db, place.offset, self.page_bytes)
        found = self._at(page, place.at)
        return None if found is None else found[0]

    def _in_page(self, page: bytes, rank: int, wal: bool, offset: int) -> Iterator[Candidate]:
        for match in _LIKELY.finditer(page, 2):
            at = match.start() - 2
            found = self._at(page, at)
            if found is not None:
                yield Candidate(*found, rank, Place(wal, offset, at))

    def _at(self, page: bytes, at: int) -> tuple[Batch, bool, int | None] | None:
        """Read the batch that may begin here: its header at least; whether it is whole; its position."""
        cell = _cell(page, at, self.page_bytes)
        headless: Batch | None = None
        # As SQLite would read it; past damage in the write-ahead file; with pages that only an old run of that has.
        for places in (self._good, {}, self._any) if cell is not None and cell.next else ({},):
            if cell is None:
                break
            try:
                batch = headless = open_batch(self._collect(page[at : cell.local_end], cell, places))
                payload_of(batch)
            except (LogDamaged, FormatTooNew):
                continue
            return batch, True, cell.position
        if cell is not None:
            return None if headless is None else (headless, False, cell.position)
        # The cell around it is damaged: what lies wholly on this page ends where its payload does.
        try:
            headless = open_batch(page[at:])
        except (LogDamaged, FormatTooNew):
            return None
        batch_alone = cut_batch(page[at:])
        return (headless, False, None) if batch_alone is None else (batch_alone, True, None)

    def _collect(self, start: bytes, cell: _Cell, places: Mapping[int, int]) -> bytes:
        """Follow the chain of overflow pages. `places`: pages that are to be read from the write-ahead file."""
        parts, left, number = [start], cell.size - len(start), cell.next
        while left > 0 and number:
            page = self._page(number, places)
            number = int.from_bytes(page[:4], "big")
            part = page[4 : 4 + left]
            if not part:
                break
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _page(self, number: int, places: Mapping[int, int]) -> bytes:
        start = (number - 1) * self.page_bytes
        offset = places.get(number)
        if offset is None and start + self.page_bytes > self.db_bytes:
            offset = self._any.get(number)
        if offset is not None:
            return self._read_wal(offset, self.page_bytes)
        return _read(self._db, start, self.page_bytes)

    def _read_wal(self, offset: int, count: int) -> bytes:
        return _read(self._wal, offset, count)

    def _find_page_bytes(self) -> int:
        for found in (
            int.from_bytes(_read(self._db, 16, 2), "big"),
            int.from_bytes(self._read_wal(8, 4), "big"),
        ):
            if 512 <= found <= 1 << 15 and found & (found - 1) == 0:
                return found
        return PAGE_BYTES


class _Cell(NamedTuple):
    position: int
    size: int  # of the batch
    local_end: int  # where the part of it that lies on this page ends
    next: int  # the first overflow page; 0: none


def _cell(page: bytes, at: int, page_bytes: int) -> _Cell | None:
    """Read the beginning of the cell whose last column begins at `at`, by trying where it may begin."""
    for start in range(at - 8, max(at - CELL_BYTES, 0) - 1, -1):
        cell = _cell_from(page, start, at, page_bytes)
        if cell is not None:
            return cell
    return None


def _cell_from(page: bytes, start: int, at: int, page_bytes: int) -> _Cell | None:
    payload, place = _varint(page, start)
    position, record = _varint(page, place)
    head, place = _varint(page, record)
    if not 6 <= head <= 14 or record + head > at or position < 1:
        return None
    types = []
    while place < record + head:
        kind, place = _varint(page, place)
        types.append(kind)
    if len(types) != 5 or types[0] != 0 or any(kind not in _INTEGER_BYTES for kind in types[1:4]):
        return None
    before = record + head + sum(_INTEGER_BYTES[kind] for kind in types[1:4])
    size = (types[4] - 12) // 2
    if types[4] < 12 or types[4] % 2 or before != at or payload != at - record + size:
        return None
    local = _local_bytes(payload, page_bytes)
    if record + local + (4 if local < payload else 0) > page_bytes:
        return None
    following = int.from_bytes(page[record + local : record + local + 4], "big") if local < payload else 0
    return _Cell(position, size, record + local, following)


def _local_bytes(payload: int, page_bytes: int) -> int:
    """How much of a cell of a table's leaf lies on the page itself."""
    most = page_bytes - 35
    if payload <= most:
        return payload
    least = (page_bytes - 12) * 32 // 255 - 23
    wanted = least + (payload - least) % (page_bytes - 4)
    return wanted if wanted <= most else least


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i in range(8):
        if at + i >= len(data):
            return -1, len(data)
        value = value << 7 | data[at + i] & 0x7F
        if data[at + i] < 0x80:
            return value, at + i + 1
    return -1, len(data)  # nine bytes: larger than anything here


# the write-ahead file --------------------------------------------------------------------------------------------


def wal_frames(read: Callable[[int, int], bytes], size: int, page_bytes: int) -> Iterator[Frame]:
    """Yield what stands in a write-ahead file, also what SQLite wouldn't read any more."""
    header = read(0, WAL_HEADER_BYTES)
    good = wal_header_is_good(header)
    order, sums = _order_of(header), (0, 0)
    if good:
        sums = int.from_bytes(header[24:28], "big"), int.from_bytes(header[28:32], "big")
    each = FRAME_HEADER_BYTES + page_bytes
    for offset in range(WAL_HEADER_BYTES, size - each + 1, each):
        data = read(offset, each)
        if len(data) < each:
            return
        current = data[8:16] == header[16:24]
        if good and current:
            sums = _checksum(data[24:], _checksum(data[:8], sums, order), order)
            good = data[16:24] == sums[0].to_bytes(4, "big") + sums[1].to_bytes(4, "big")
        yield Frame(offset, int.from_bytes(data[:4], "big"), data[4:8] != bytes(4), current, good and current)
        good = good and current


def wal_header_is_good(header: bytes) -> bool:
    """Tell whether the beginning of a write-ahead file is what SQLite wrote."""
    if len(header) < WAL_HEADER_BYTES or int.from_bytes(header[:4], "big") | 1 != WAL_MAGIC | 1:
        return False
    sums = _checksum(header[:24], (0, 0), _order_of(header))
    return header[24:32] == sums[0].to_bytes(4, "big") + sums[1].to_bytes(4, "big")


def damage_in_wal(file: Path, *, tail_too: bool) -> tuple[int, int, str] | None:
    """Find what SQLite, after all processes died, would leave out of a write-ahead file: first and last byte, what.

    Of what is not in use, behind the end, nothing is told unless `tail_too`: after a power loss pages may stand there
    that never counted. Others may write meanwhile. Each page takes 0.15 ms.
    """
    used = None if tail_too else _used_frames(file)
    try:
        descriptor = os.open(file.with_name(file.name + "-wal"), os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError:
        return None
    try:
        size = os.fstat(descriptor).st_size
        header = _read(descriptor, 0, WAL_HEADER_BYTES)
        if not header.strip(b"\0"):
            return None
        if not wal_header_is_good(header):
            return 0, WAL_HEADER_BYTES - 1, "its header fails its checksum, so that nothing of it is read"
        page_bytes = int.from_bytes(header[8:12], "big")
        first = last = None
        if used is not None:
            size = min(size, WAL_HEADER_BYTES + used * (FRAME_HEADER_BYTES + page_bytes))
        for frame in wal_frames(lambda at, count: _read(descriptor, at, count), size, page_bytes):
            if not frame.good and first is None:
                first = frame.offset
            elif frame.current and frame.commits and first is not None and frame.offset > first:
                # What a killed transaction left has no commit; so these were written after the bad page, in one run.
                last = frame.offset + FRAME_HEADER_BYTES + page_bytes - 1
        # Begun anew under our eyes: what was read is of two runs.
        if first is None or last is None or _read(descriptor, 0, WAL_HEADER_BYTES) != header:
            return None
        return first, last, "a page fails its checksum, and SQLite doesn't read what follows it"
    finally:
        os.close(descriptor)


def _used_frames(file: Path) -> int | None:
    """Read from the index how many frames SQLite uses just now; None: nobody has the log open."""
    index = _descriptor(file.with_name(file.name + "-shm"))  # SQLite keeps locks on it as well
    header = _read(index, 0, 48)
    return int.from_bytes(header[16:20], sys.byteorder) if len(header) == 48 and header[12] else None


def _order_of(header: bytes) -> str:
    return ">" if header[3:4] and header[3] & 1 else "<"


def _checksum(data: bytes, sums: tuple[int, int], order: str) -> tuple[int, int]:
    import struct

    one, two = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for i in range(0, len(words), 2):
        one = one + words[i] + two & 0xFFFFFFFF
        two = two + words[i + 1] + one & 0xFFFFFFFF
    return one, two


# files -----------------------------------------------------------------------------------------------------------

# To close any descriptor of a database drops the locks that SQLite holds in this process (POSIX). So each database
# that was read here keeps one descriptor as long as the file is there.
_kept: dict[tuple[int, int], int] = {}


def _descriptor(file: Path) -> int:
    """Open a database to read; -1: there is none, or it can't be read."""
    try:
        for key, descriptor in tuple(_kept.items()):
            if not os.fstat(descriptor).st_nlink and _kept.pop(key, None) is not None:  # nobody can lock it
                os.close(descriptor)
        found = file.stat()
        key = found.st_dev, found.st_ino
        if key not in _kept:
            _kept[key] = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        return _kept[key]
    except OSError:
        return -1


def _read(descriptor: int, at: int, count: int) -> bytes:
    """Read at a place; less at the end, nothing where nothing can be read."""
    parts = []
    while count > 0 and descriptor >= 0 and at >= 0:
        try:
            part = _pread(descriptor, count, at)
        except OSError:  # a bad sector: what lies on it is lost, the rest isn't
            part = bytes(min(count, SECTOR_BYTES))
        if not part:
            break
        parts.append(part)
        at, count = at + len(part), count - len(part)
    return b"".join(parts)


if sys.platform == "win32":

    def _pread(descriptor: int, count: int, at: int) -> bytes:
        os.lseek(descriptor, at, os.SEEK_SET)
        return os.read(descriptor, count)

else:

    def _pread(descriptor: int, count: int, at: int) -> bytes:
        return os.pread(descriptor, count, at)
