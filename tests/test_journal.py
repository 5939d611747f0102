"""Journal: what a log call keeps, how the flusher takes it, and what is found after a kill."""

from __future__ import annotations

import dis
import errno
import gc
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eventrun.codec import Stream, decode_items, encode
from eventrun.errors import InvalidValue, LogDamaged
from eventrun.events import NoteAdded
from eventrun.journal import (
    Journal,
    JournalFolder,
    dead_writers,
    held,
    new_journal,
    recover,
    scan,
    segments,
    segments_in,
    writing,
)
from eventrun.journal.scan import count_items, stretches
from eventrun.journal.segments import FIXED, LOCK_NAME, NEW_LOCK_NAME
from eventrun.journal.writing import Chunk, LockedJournal, WrittenJournal
from eventrun.locks import owner

STREAM = Stream("t/00000000000000ab", 0xABCDEF0123456789)
T0 = 1_700_000_000_000_000_000
IN_CI = os.environ.get("HYPOTHESIS_PROFILE", os.environ.get("CI", "")) not in ("", "0", "dev")


def item(number: int, size: int = 0) -> bytes:
    """Make an item that can be told from all others, of about `size` bytes."""
    return encode((T0 + number, NoteAdded(f"{number}:{'x' * max(0, size - 24)}")))


def split(payload: bytes) -> list[bytes]:
    """Take a payload apart."""
    items, at = [], 0
    while at < len(payload):
        count, after = count_items(payload, at, len(payload), most=1)
        assert count == 1
        items.append(payload[at:after])
        at = after
    return items


def joined(chunks: list[Chunk]) -> list[bytes]:
    """Join chunks, checking that they follow each other and say the truth about themselves."""
    items: list[bytes] = []
    for chunk in chunks:
        assert chunk.first == 1 + len(items)
        found = split(chunk.payload)
        assert len(found) == chunk.events
        times = [time_ns for time_ns, _ in decode_items(chunk.payload, chunk.events)]
        assert (chunk.first_ns, chunk.last_ns) == (times[0], times[-1])
        items += found
    return items


def take(journal: Journal, limit: int = 1 << 30, batch: int = 1 << 30) -> list[Chunk]:
    """Do as the flusher does: peek, then confirm."""
    chunks = journal.peek(limit, batch)
    for chunk in chunks:
        journal.confirm(chunk)
    return chunks


def take_all(journal: Journal, limit: int = 1 << 30) -> list[Chunk]:
    """Take until nothing is left."""
    chunks: list[Chunk] = []
    while found := take(journal, limit):
        chunks += found
    assert not journal.has_new
    return chunks


def found_in(folder: Path, first: int = 1) -> tuple[list[bytes], list[str]]:
    """Recover a folder as if the log ended before `first`: the items of its one stream, and the problems."""
    streams, problems = segments_in(folder)
    items: list[bytes] = []
    for found in streams.values():
        for segment in found:
            if segment.first < first:  # the log has it, the file has not been removed yet
                continue
            if segment.first != first + len(items):
                problems.append(f"sequence {segment.first} follows {first + len(items) - 1}")
                break
            recovered = recover(segment, b"", 0)
            assert recovered.events == len(split(recovered.payload))
            assert recovered.cuts[-1] == (len(recovered.payload), recovered.events)
            items += split(recovered.payload)
            if recovered.problem is not None:
                problems.append(recovered.problem)
    return items, problems


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Make segments and the distance of marks so small that few items pass many of them."""
    patch.setattr(segments, "SEGMENT_BYTES", (2048, 4096, 8192))
    patch.setattr(segments, "WRITTEN_SEGMENT_BYTES", (2048, 4096))
    patch.setattr(segments, "MEMORY_SEGMENT_BYTES", (2048, 4096))
    patch.setattr(segments, "ARENA_BYTES", 8192)
    patch.setattr(segments, "WRITTEN_ARENA_BYTES", 8192)
    patch.setattr(writing, "MARK_BYTES", 256)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


Open = Callable[..., Journal]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Give what opens a journal in a new folder below `tmp_path`."""
    folders: list[JournalFolder] = []
    numbers = itertools.count()

    def open_(path: Path | None = None, *, mapped: bool = True, stream: Stream = STREAM) -> Journal:
        folders.append(JournalFolder(path or tmp_path / f"w{next(numbers)}", mapped=mapped))
        return begun(folders[-1], stream)

    yield open_
    for folder in folders:
        folder.abandon()


def begun(
    folder: JournalFolder, stream: Stream = STREAM, moved: Callable[[bytes], None] = lambda _: None
) -> Journal:
    segment = folder.segment(stream)
    assert segment is not None
    return new_journal(folder, stream, segment, 1, moved)


def log(journal: Journal, items: list[bytes]) -> None:
    for data in items:
        journal.append(data)


def path_of(journal: Journal) -> Path:
    path = journal._folder.path
    assert path is not None
    return path


# appending and taking ------------------------------------------------------------------------------------------

Step = tuple[str, int]
STEPS: st.SearchStrategy[Step] = st.one_of(
    st.tuples(st.just("append"), st.one_of(st.integers(30, 300), st.just(2000), st.just(20_000))),
    st.tuples(st.just("take"), st.sampled_from([1, 100, 1000, 1 << 20])),
    st.tuples(st.just("peek"), st.sampled_from([1, 500])),
    st.tuples(st.sampled_from(["release", "prepare"]), st.just(0)),
)


def first_kept(journal: Journal) -> int:
    """Return the first sequence that lies in a segment which was not given back."""
    segment = (*journal._full, journal._segment)[0]
    assert segment is not None
    return segment.first


@pytest.mark.parametrize("kind", ["mapped", "written", "memory"])
@given(steps=st.lists(STEPS, max_size=60))
@example(
    steps=[("append", 100), ("append", 20_000), ("take", 1), ("release", 0), ("append", 100), ("prepare", 0)]
)
def test_chunks_joined_are_what_was_appended(
    kind: str, steps: list[Step], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the sizes (one larger than any segment included) and however peek, confirm, release and prepare come
    in between: the chunks are what was appended, in order and contiguous, and so is what lies in the files."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        path = None if kind == "memory" else tmp_path_factory.mktemp("journals") / "w"
        folder = JournalFolder(path, mapped=kind == "mapped")
        journal = begun(folder)
        sent: list[bytes] = []
        taken: list[Chunk] = []
        for what, number in steps:
            if what == "append":
                sent.append(item(len(sent), number))
                journal.append(sent[-1])
            elif what == "prepare":
                journal.prepare()
            elif what == "release":
                journal.release(sum(chunk.events for chunk in taken))
            elif what == "peek":
                journal.peek(number)
            else:
                taken += take(journal, number, number // 4 + 1)
            assert journal.next_sequence == len(sent) + 1
            assert journal.held_bytes == sum(map(len, sent)) - sum(len(chunk.payload) for chunk in taken)
        if path is not None:
            first = first_kept(journal)
            assert found_in(path, first) == (sent[first - 1 :], [])
        taken += take_all(journal, 700)
        assert joined(taken) == sent
        journal.release(len(sent))
        assert journal.close()
        assert folder.memory_bytes == 0
        folder.remove()
        assert path is None or not path.exists()


def test_a_chunk_ends_at_a_mark_and_holds_about_what_was_asked_for(small: None, opened: Open) -> None:
    """Peeking at a little gives a little, whole items, also while more is appended; at least one stretch."""
    journal = opened()
    sent = [item(i, 60) for i in range(20)]
    for data in sent:
        journal.append(data)
    sizes = []
    while chunks := take(journal, 500):
        sizes.append(sum(len(chunk.payload) for chunk in chunks))
    assert max(sizes) <= 500
    assert len(sizes) >= 3


def test_one_look_gives_many_chunks(small: None, opened: Open) -> None:
    """Each chunk is of about the size of a batch, and there are as many as were asked for, also of one segment."""
    journal = opened()
    sent = [item(i, 60) for i in range(200)]
    log(journal, sent)
    chunks = journal.peek(5000, 600)
    assert sum(len(chunk.payload) for chunk in chunks) <= 5000 + 256
    assert max(len(chunk.payload) for chunk in chunks) <= 600
    assert len(chunks) >= 8
    assert joined(chunks) == sent[: sum(chunk.events for chunk in chunks)]
    assert joined(take_all(journal)) == sent


def test_close_takes_no_more_and_hands_on(opened: Open) -> None:
    """A journal that holds something refuses to close; closed, it hands each item to `moved` and holds nothing."""
    moved: list[bytes] = []
    journal = opened()
    journal.moved = moved.append
    journal.append(item(1))
    assert not journal.close()
    take_all(journal)
    assert journal.close()
    journal.append(item(2))
    assert (moved, journal.closed, journal.next_sequence, journal.has_new) == ([item(2)], True, 2, False)
    assert journal.close()
    assert journal.peek(1000) == []


def test_a_shut_journal_keeps_what_it_holds(small: None, opened: Open) -> None:
    """After `shut` nothing more comes in, and what is there can still be taken, released and closed."""
    moved: list[bytes] = []
    journal = opened()
    journal.moved = moved.append
    sent = [item(i, 100) for i in range(40)]
    for data in sent:
        journal.append(data)
    journal.prepare()
    journal.shut()
    journal.shut()
    journal.append(item(99))
    assert moved == [item(99)]
    assert not journal.close()
    assert joined(take_all(journal, 300)) == sent
    assert journal.next_sequence == 41
    journal.release(40)
    assert journal.close()
    assert journal.next_sequence == 41


def test_the_next_segment_is_made_ahead(small: None, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once `prepare` has run on a half full segment, a log call that turns makes no file."""
    journal = opened()
    for i in range(19):
        journal.append(item(i, 60))
    journal.prepare()
    monkeypatch.setattr(journal._folder, "segment", None)
    for i in range(19, 25):
        journal.append(item(i, 60))
    assert len(journal._full) == 1


@pytest.mark.parametrize("kind", ["mapped", "written", "memory"])
def test_what_is_trimmed_is_still_there(small: None, opened: Open, tmp_path: Path, kind: str) -> None:
    """Pages that were given back to the system come again when they are read, and more can be written after them."""
    journal = (
        begun(JournalFolder(None))
        if kind == "memory"
        else opened(tmp_path / "journals", mapped=kind == "mapped")
    )
    sent = [item(i, 60 + i % 5 * 20) for i in range(300)]
    taken: list[Chunk] = []
    for i, data in enumerate(sent):
        journal.append(data)
        if i % 7 == 0:
            while journal.trim():
                pass
            assert journal.resident_bytes <= (0 if kind == "mapped" else 8192)
        if i % 50 == 49:
            taken += take(journal, 700)
    assert journal.oldest_ns == T0 + sum(chunk.events for chunk in taken)
    if kind != "memory":
        assert found_in(tmp_path / "journals") == (sent, [])
    assert joined(taken + take_all(journal, 500)) == sent
    assert journal.oldest_ns is None


def test_an_event_that_is_too_large(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that the log couldn't take is refused where it is recorded; what comes after it is kept."""
    monkeypatch.setattr(writing, "MAX_ITEM_BYTES", 100_000)
    journal = opened()
    with pytest.raises(InvalidValue, match="bytes is too large, the most is 100,000"):
        journal.append(item(1, 100_050))
    journal.append(item(2, 99_000))
    assert joined(take_all(journal)) == [item(2, 99_000)]


# nobody comes in between ---------------------------------------------------------------------------------------


def is_call(name: str) -> bool:
    """Tell whether CPython may run somebody else's code at this instruction: signal handler, thread, finalizer."""
    begin = ("CALL", "BUILD_", "RESUME", "JUMP_BACKWARD", "FOR_ITER", "MAKE_", "LIST_", "BEFORE_", "SEND", "YIELD",
             "IMPORT_", "BINARY_SLICE", "LOAD_SPECIAL")  # fmt: skip
    return name.startswith(begin)


def names_between(function: Callable[..., Any], begin: str, end: str) -> list[str]:
    """List the instructions of the source lines from the first that holds `begin` to the next that holds `end`."""
    import inspect

    lines, start = inspect.getsourcelines(function)
    first = next(i for i, line in enumerate(lines) if begin in line)
    last = next(i for i, line in enumerate(lines) if i >= first and end in line)
    wanted = range(start + first, start + last + 1)
    found, line = [], 0
    for instruction in dis.get_instructions(function):
        line = instruction.positions.lineno or line if instruction.positions else line
        if line in wanted:
            found.append(instruction.opname)
    return found


@pytest.mark.parametrize(
    ("function", "begin", "end"),
    [
        (Journal.append, "if self._end == start", "return"),
        (Journal._enter, "if self._segment is not segment", "return True"),
        (Journal._now, "full = self._full", "count = self._count"),
    ],
)
def test_no_call_lies_between_the_look_and_the_last_store(
    function: Callable[..., Any], begin: str, end: str
) -> None:
    """In this interpreter's bytecode nothing that runs other code comes between the check and the last assignment."""
    names = names_between(function, begin, end)
    assert len(names) > 15
    assert [name for name in names if is_call(name)] == []


class Injector:
    """Do something at the nth moment, inside the journal's own code, at which CPython may run other code.

    With `after_calls`, only where a signal handler may raise: behind a call.
    """

    CODE = frozenset({writing.__file__, segments.__file__})

    def __init__(self, when: int, action: Callable[[], None], *, after_calls: bool = False) -> None:
        self.left = when
        self.action = action
        self.after_calls = after_calls
        self._names: dict[Any, dict[int, str]] = {}
        self._last: dict[FrameType, str] = {}

    def __enter__(self) -> Injector:
        self._before = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # Python 3.12 looks at this only when tracing begins
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in self.CODE:
            return None
        if event == "call":
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
        elif event == "opcode":
            names = self._names.get(frame.f_code)
            if names is None:
                names = self._names[frame.f_code] = {
                    i.offset: i.opname for i in dis.get_instructions(frame.f_code)
                }
            name, last = names[frame.f_lasti], self._last.get(frame, "")
            self._last[frame] = name
            signal_comes = last.startswith(("CALL", "RESUME", "JUMP_BACKWARD"))
            allocates = is_call(last) or (is_call(name) and not name.startswith("CALL"))
            if signal_comes or (allocates and not self.after_calls):
                self.left -= 1
                if self.left == 0:
                    self.action()
        elif event == "return":
            self._last.pop(frame, None)
        return self._trace


def each_moment(run: Callable[[int], Injector]) -> int:
    """Run with n = 1, 2, ... until nothing is left to come in between of; outside CI a sample of them."""
    run(sys.maxsize)  # once for what is only done the first time
    moments = sys.maxsize - run(sys.maxsize).left
    every = range(1, moments + 1)
    chosen = every if IN_CI or moments < 60 else random.Random(moments).sample(every, 60)
    reached = sum(run(n).left <= 0 for n in chosen)
    # A run may come by with a few calls less (something was cached), not with many.
    assert reached >= len(chosen) * 0.9
    return moments


@pytest.mark.parametrize("mapped", [True, False])
def test_a_log_call_inside_a_log_call(small: None, opened: Open, mapped: bool) -> None:
    """A signal handler or finalizer that logs at any moment of a log call: both events are kept, once, and at once."""

    def run(n: int) -> Injector:
        journal = opened(mapped=mapped)
        inner = [item(100, 60), item(101, 900)]
        outer = [item(i, 150) for i in range(10)] + [item(11, 3000), item(12, 60)]

        def log() -> None:
            for data in inner:
                journal.append(data)
                assert data in found_in(path_of(journal))[0]

        with Injector(n, log) as injector:
            for data in outer:
                journal.append(data)
        expected = outer if injector.left > 0 else outer + inner
        items, problems = found_in(path_of(journal))
        assert (sorted(items), problems) == (sorted(expected), [])
        assert [i for i in items if i in outer] == outer
        assert [i for i in items if i in inner] == (inner if injector.left <= 0 else [])
        assert joined(take_all(journal)) == items
        return injector

    assert each_moment(run) > 200


@pytest.mark.parametrize("mapped", [True, False])
def test_an_exception_at_any_moment_of_a_log_call(small: None, opened: Open, mapped: bool) -> None:
    """KeyboardInterrupt wherever a signal may raise it: later calls go on, and what is found is what returned, plus
    at most the interrupted one."""

    def run(n: int) -> Injector:
        journal = opened(mapped=mapped)
        returned: list[bytes] = []
        torn: list[bytes] = []

        def interrupt() -> None:
            raise KeyboardInterrupt

        with Injector(n, interrupt, after_calls=True) as injector:
            for data in [*(item(i, 150) for i in range(8)), item(9, 3000), item(10, 60), item(11, 60)]:
                try:
                    journal.append(data)
                    returned.append(data)
                except KeyboardInterrupt:
                    torn.append(data)
        items, problems = found_in(path_of(journal))
        assert problems == []
        both = sorted(returned + torn, key=lambda data: decode_items(data, 1)[0][0])
        assert items in (returned, both)
        assert joined(take_all(journal)) in (items, both)
        return injector

    assert each_moment(run) > 50


@pytest.mark.parametrize("mapped", [True, False])
def test_the_flusher_at_any_moment_of_a_log_call(small: None, opened: Open, mapped: bool) -> None:
    """The flusher needs no lock of a caller's: at any moment of a log call it takes, prepares and releases, and
    nothing is lost, doubled or out of order."""

    def run(n: int) -> Injector:
        journal = opened(mapped=mapped)
        sent = [item(i, 150) for i in range(8)] + [item(8, 3000), item(9, 60)]
        taken: list[Chunk] = []

        def flush() -> None:
            flusher = threading.Thread(target=work)
            flusher.start()
            flusher.join(60)
            assert not flusher.is_alive()

        def work() -> None:
            for limit in (300, 1 << 20):
                taken.extend(take(journal, limit))
            journal.prepare()
            journal.release(sum(chunk.events for chunk in taken))

        with Injector(n, flush) as injector:
            for data in sent:
                journal.append(data)
        assert joined(taken + take_all(journal)) == sent
        first = first_kept(journal)
        assert found_in(path_of(journal), first) == (sent[first - 1 :], [])
        return injector

    assert each_moment(run) > 200


@pytest.mark.parametrize("end", ["close", "shut"])
def test_the_end_at_any_moment_of_a_log_call(small: None, opened: Open, end: str) -> None:
    """An item goes either into the journal before its end, or to whoever opens the next one; never to neither."""

    def run(n: int) -> Injector:
        journal = opened()
        sent = [item(i, 150) for i in range(8)] + [item(8, 3000), item(9, 60)]
        taken: list[Chunk] = []
        moved: list[bytes] = []
        journal.moved = moved.append

        def finish() -> None:
            taken.extend(take_all(journal))
            journal.release(sum(chunk.events for chunk in taken))
            getattr(journal, end)()

        with Injector(n, finish) as injector:
            for data in sent:
                journal.append(data)
        assert joined(taken + take_all(journal)) + moved == sent
        assert journal.closed == (injector.left <= 0)
        return injector

    assert each_moment(run) > 200


def test_a_log_call_at_any_moment_of_the_flusher(small: None, opened: Open) -> None:
    """A finalizer that logs on the flusher's thread, or a caller on another, at any moment of peek, confirm, prepare,
    release, close and shut: nothing is lost, doubled or out of order."""

    def run(n: int) -> Injector:
        journal = opened()
        moved: list[bytes] = []
        journal.moved = moved.append
        sent: list[bytes] = []
        taken: list[Chunk] = []

        def log(number: int = 4, size: int = 400) -> None:
            for _ in range(number):
                sent.append(item(len(sent), size))
                journal.append(sent[-1])

        log(12, 150)
        with Injector(n, log) as injector:
            taken.extend(take(journal, 600))
            journal.prepare()
            taken.extend(take(journal))
            journal.release(sum(chunk.events for chunk in taken))
            journal.close()
            journal.shut()
        assert joined(taken + take_all(journal)) + moved == sent
        return injector

    assert each_moment(run) > 200


@pytest.mark.parametrize("mapped", [True, False])
def test_a_kill_at_any_instruction_leaves_no_damage(small: None, opened: Open, mapped: bool) -> None:
    """What the files hold after each single instruction of append, turn, release and reuse of slots is what was
    appended, at least all that had returned, and nothing looks damaged."""
    journal = opened(mapped=mapped)
    path = path_of(journal)
    sent: list[bytes] = []
    before: dict[str, bytes] = {}
    logged = looked = 0

    class Looker(Injector):
        def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
            nonlocal looked
            if frame.f_code.co_filename in self.CODE and event == "opcode":
                looked += 1
                look()
            return super()._trace(frame, event, _)

    def look() -> None:
        files = {file.name: file.read_bytes() for file in path.glob("*.arena")}
        if files == before:
            return
        before.clear()
        before.update(files)
        streams, problems = segments_in(path)
        items, following = [], 0
        for segment in streams.get(STREAM, []):
            found = recover(segment, b"", 0)
            assert following in (0, segment.first)
            assert found.problem is None
            items += split(found.payload)
            following = segment.first + found.events
        assert problems == []
        first = following - len(items)
        assert not items or (items == sent[first - 1 : following - 1] and first <= logged + 1)
        assert len(sent) <= max(following, logged + 1)

    with Looker(0, lambda: None):
        for i in range(55):
            sent.append(item(i, 150))
            journal.append(sent[-1])
            if i % 25 == 24:
                journal.prepare()
                logged += sum(chunk.events for chunk in take_all(journal))
                journal.release(logged)
    assert looked > 3000


def test_signal_handlers_that_log(opened: Open) -> None:
    """Hundreds of signals whose handler logs into the journal that is being logged into: no deadlock, none lost."""
    journal = opened()
    sent: list[bytes] = []
    handled: list[bytes] = []

    def handler(number: int, frame: FrameType | None) -> None:
        handled.append(item(1_000_000 + len(handled)))
        journal.append(handled[-1])

    before = signal.signal(signal.SIGALRM, handler)
    # Not too often: a new segment may take a millisecond, and a handler that logs meanwhile needs one as well.
    signal.setitimer(signal.ITIMER_REAL, 3e-3, 3e-3)
    try:
        while len(handled) < 150:
            sent.append(item(len(sent), 40))
            journal.append(sent[-1])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    items, problems = found_in(path_of(journal))
    assert problems == []
    ours = set(handled)
    assert [i for i in items if i not in ours] == sent
    assert sorted(i for i in items if i in ours) == sorted(handled)  # handlers may be interrupted by the next
    assert joined(take_all(journal)) == items


def test_finalizers_that_log(opened: Open) -> None:
    """Garbage whose `__del__` logs, collected at any allocation: no deadlock, none lost."""
    journal = opened()
    numbers = itertools.count(1_000_000)
    sent: list[bytes] = []

    class Garbage:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            journal.append(item(next(numbers)))

    before = gc.get_threshold()
    gc.set_threshold(3, 2, 2)
    try:
        for i in range(5000):
            Garbage()
            sent.append(item(i, 40))
            journal.append(sent[-1])
            if i % 500 == 0:
                take(journal)
                journal.prepare()
    finally:
        gc.set_threshold(*before)
    gc.collect()
    items, problems = found_in(path_of(journal))
    assert problems == []
    assert [i for i in items if i < item(1_000_000)] == sent
    assert [i for i in items if i >= item(1_000_000)] == [item(i) for i in range(1_000_000, next(numbers))]


@pytest.mark.parametrize("kind", [Journal, LockedJournal, WrittenJournal])
def test_many_threads_on_one_stream(small: None, opened: Open, tmp_path: Path, kind: type[Journal]) -> None:
    """Eight threads, and the flusher beside them: each thread's items are all there, once, in its order."""
    folder = JournalFolder(tmp_path / "writer", mapped=kind is not WrittenJournal)
    segment = folder.segment(STREAM)
    assert segment is not None
    journal = kind(folder, STREAM, segment, 1, lambda _: None)
    taken: list[Chunk] = []
    done = threading.Event()

    def log(thread: int) -> None:
        for i in range(1000):
            journal.append(item(thread * 10_000 + i, 40 + i % 7 * 30))

    def flush() -> None:
        while not done.is_set():
            taken.extend(take(journal, 900))
            journal.prepare()
            journal.release(sum(chunk.events for chunk in taken))

    threads = [threading.Thread(target=log, args=(thread,)) for thread in range(8)]
    flusher = threading.Thread(target=flush)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in (*threads, flusher):
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        done.set()
        flusher.join()
        sys.setswitchinterval(before)
    items = joined(taken + take_all(journal))
    numbers = [int(event.text.partition(":")[0]) for _, event in decode_items(b"".join(items), len(items))]  # type: ignore[union-attr]
    assert sorted(numbers) == [thread * 10_000 + i for thread in range(8) for i in range(1000)]
    for number in range(8):
        mine = [n for n in numbers if n // 10_000 == number]
        assert mine == sorted(mine)
    folder.abandon()


# after a kill --------------------------------------------------------------------------------------------------


@pytest.fixture
def killed(small: None, opened: Open, tmp_path: Path) -> tuple[Path, list[bytes], list[int]]:
    """Leave the files of a killed writer: (folder, items, the counts after which a mark or a head lies)."""
    journal = opened()
    sent = [item(i, 60 + i % 5 * 20) for i in range(60)]
    for data in sent:
        journal.append(data)
    streams, problems = segments_in(path_of(journal))
    assert problems == []
    marks = [0]
    for segment in streams[STREAM]:
        marks += [segment.first - 1 + count for _, count, _ in segment.points]
        marks.append(segment.first - 1 + recover(segment, b"", 0).events)
    copy = tmp_path / "copy"
    shutil.copytree(path_of(journal), copy)
    return copy, sent, marks


def test_marks_lie_close_together(killed: tuple[Path, list[bytes], list[int]]) -> None:
    """The example has several segments, each with several marks."""
    path, sent, marks = killed
    assert marks[-1] == len(sent)
    assert max(b - a for a, b in itertools.pairwise(marks)) <= 6
    assert len(list(path.glob("*.arena"))) >= 2


def test_each_truncation_gives_a_prefix(killed: tuple[Path, list[bytes], list[int]]) -> None:
    """Files cut off anywhere: a prefix is found, and all that a mark or a head before the cut covers."""
    path, sent, marks = killed
    for file in sorted(path.glob("*.arena")):
        whole = file.read_bytes()
        for size in range(len(whole.rstrip(b"\0")), -1, -1 if IN_CI else -13):
            os.truncate(file, size)
            items, problems = found_in(path)
            assert items == sent[: len(items)]
            assert len(items) in marks
            assert problems
        file.write_bytes(whole)
    assert found_in(path) == (sent, [])


@pytest.mark.parametrize("mapped", [True, False])
def test_a_file_that_was_cut_off_is_told(small: None, opened: Open, mapped: bool) -> None:
    """Also where whole slots are gone, of which nothing else tells."""
    journal = opened(mapped=mapped)
    log(journal, [item(1)])
    (file,) = path_of(journal).glob("*.arena")
    os.truncate(file, 0)
    assert found_in(path_of(journal)) == (
        [],
        [f"{file.name} is cut off: 8,192 of its 8,192 bytes are missing"],
    )


def test_a_file_that_may_not_be_long_grows(
    small: None, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where files may not be as long as a whole one, its name doesn't claim that it is."""

    def too_long(descriptor: int, size: int) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(os, "ftruncate", too_long)
    journal = opened(mapped=False)
    log(journal, [item(1)])
    (file,) = path_of(journal).glob("*.arena")
    assert file.name == "1-2048.arena"
    assert found_in(path_of(journal)) == ([item(1)], [])


def test_each_flipped_bit_gives_a_prefix(killed: tuple[Path, list[bytes], list[int]]) -> None:
    """One bit flipped anywhere: a prefix is found, it ends at the last mark before the damage or later, nothing that
    was changed is given out, and what is missing is told."""
    path, sent, marks = killed
    draw = random.Random(1)
    for file in sorted(path.glob("*.arena")):
        whole = bytearray(file.read_bytes())
        slot = int(file.stem.partition("-")[2].partition("x")[0])
        for at in range(len(whole)):
            if whole[at] == 0 and at % slot > 1000:  # nothing is there
                continue
            if not IN_CI and draw.random() < 0.95:
                continue
            damaged = bytearray(whole)
            damaged[at] ^= 1 << draw.randrange(8)
            file.write_bytes(damaged)
            items, problems = found_in(path)
            assert items == sent[: len(items)]
            assert items == sent or (problems and len(items) in marks)
            before = whole.find(sent[len(items)]) if len(items) < len(sent) else 0
            if at % slot > 1000 and len(items) < len(sent) and before >= 0:
                # An item: what is lost begins at the mark before it.
                lost = next(
                    n for n, data in enumerate(sent) if whole.find(data) <= at < whole.find(data) + len(data)
                )
                assert len(items) == max(mark for mark in marks if mark <= lost)
        file.write_bytes(whole)
    assert found_in(path) == (sent, [])


def test_a_damaged_offset_costs_nothing(killed: tuple[Path, list[bytes], list[int]]) -> None:
    """Where only the half of the head is damaged that tells the end, its checksum tells it too."""
    path, sent, _ = killed
    file = path / "1-2048x4.arena"
    whole = bytearray(file.read_bytes())
    whole[0 if sys.byteorder == "little" else 7] ^= 64
    file.write_bytes(whole)
    items, problems = found_in(path)
    assert items == sent
    assert len(problems) == 1
    assert "head is damaged" in problems[0]


def test_what_the_log_holds_is_compared(small: None, opened: Open) -> None:
    """Recovery goes on after what the log has. Damage in the journal's copy of that costs nothing and is told; where
    nothing vouches for either, it is an error."""
    journal = opened()
    sent = [item(i, 60) for i in range(10)]
    for data in sent:
        journal.append(data)
    (segment,) = segments_in(path_of(journal))[0][STREAM]
    for done in range(11):
        logged = b"".join(sent[:done])
        found = recover(segment, logged, done)
        assert (found.first, found.events, found.problem) == (done + 1, 10 - done, None)
        assert split(found.payload) == sent[done:]
    with segment.path.open("r+b") as file:
        file.seek(segment.start + len(sent[0]) - 3)
        file.write(b"?")
    found = recover(segment, b"".join(sent[:5]), 5)
    assert split(found.payload) == sent[5:]
    assert found.problem is not None
    assert "sequences 1 to 5 differ from the log" in found.problem
    with pytest.raises(LogDamaged, match="sequences 1 to 5 differ from the log"):
        recover(segment, b"".join([*sent[:4], item(99, 60)]), 5)


@pytest.mark.parametrize("mapped", [True, False])
def test_what_the_log_lacks_is_told(small: None, opened: Open, tmp_path: Path, mapped: bool) -> None:
    """How many events a journal holds beyond a sequence, how large and how old they are, without taking them in."""
    journal = opened(tmp_path / "journals", mapped=mapped)
    sent = [item(i, 60 + i % 5 * 20) for i in range(200)]
    for logged in (0, 3, 100, 199, 200):
        for data in sent[journal.next_sequence - 1 : max(logged, 10)]:
            journal.append(data)
        here = sent[logged : journal.next_sequence - 1]
        ((_, found),) = segments_in(tmp_path / "journals")[0].items()
        told = [held(segment, logged) for segment in found]
        assert sum(each.events for each in told) == len(here)
        assert sum(each.size for each in told) == sum(map(len, here))
        times = [each.oldest_ns for each in told if each.oldest_ns is not None]
        assert min(times, default=None) == (T0 + logged if here else None)


def test_a_log_that_is_ahead_of_the_journal(small: None, opened: Open, tmp_path: Path) -> None:
    """After a power loss the log may hold more than the journal's pages: then there is nothing to do."""
    journal = opened()
    sent = [item(i, 60) for i in range(10)]
    for data in sent[:4]:
        journal.append(data)
    shutil.copytree(path_of(journal), tmp_path / "early")
    (segment,) = segments_in(tmp_path / "early")[0][STREAM]
    found = recover(segment, b"".join(sent), 10)
    assert (found.first, found.events, found.problem) == (11, 0, None)


def test_pages_that_a_power_loss_took(small: None, opened: Open) -> None:
    """Pages that a power loss took are no damage where the log has their items, or where nothing begins."""
    journal = opened()
    sent = [item(i, 60) for i in range(10)]
    for data in sent:
        journal.append(data)
    (segment,) = segments_in(path_of(journal))[0][STREAM]
    with segment.path.open("r+b") as file:
        file.seek(segment.start)
        file.write(bytes(len(sent[0])))
    found = recover(segment, b"".join(sent[:5]), 5, torn=True)
    assert (split(found.payload), found.problem) == (sent[5:], None)
    assert recover(segment, b"", 0, torn=True).problem is not None
    with segment.path.open("r+b") as file:
        file.seek(segment.base)
        file.write(bytes(64))
    assert segments_in(path_of(journal), torn=True) == ({}, [])
    assert segments_in(path_of(journal))[1]


def test_large_slots_are_used_once(small: None, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot that would take long to be emptied is not used again; its file goes when all of its slots are spent."""
    monkeypatch.setattr(segments, "EMPTIED_BYTES", 2048)
    monkeypatch.setattr(segments, "ARENA_BYTES", 32_768)
    journal = opened()
    sent: list[bytes] = []
    taken: list[Chunk] = []
    for round_ in range(40):
        for _ in range(20):
            sent.append(item(len(sent), 200))
            journal.append(sent[-1])
        taken += take_all(journal)
        if round_ % 3 == 0:
            journal.release(len(sent))
            first = first_kept(journal)
            assert found_in(path_of(journal), first) == (sent[first - 1 :], [])
    assert joined(taken) == sent
    journal.release(len(sent))
    assert len(list(path_of(journal).glob("*.arena"))) <= 3


def test_a_large_backlog_takes_few_files(small: None, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The more files there are the larger is the next one, since each takes a descriptor."""
    monkeypatch.setattr(segments, "MANY_ARENAS", (3, 6))
    monkeypatch.setattr(segments, "LARGE_ARENA_BYTES", (65_536, 1 << 20))
    for journal in (opened(), opened(mapped=False)):
        sent = [item(i, 400) for i in range(4000)]
        log(journal, sent)
        assert journal._folder.crash_safe
        assert len(list(path_of(journal).glob("*.arena"))) <= 10
        assert joined(take_all(journal, 1 << 20)) == sent


def test_old_items_never_come_back(small: None, opened: Open) -> None:
    """A slot that is used again is empty before: even with its head and marks damaged no old item is found."""
    journal = opened()
    for i in range(50):
        journal.append(item(i, 100))
    take_all(journal)
    journal.release(50)
    assert journal._segment is not None
    other = begun(journal._folder, Stream("t/other", STREAM.writer))
    other.append(item(1000, 60))
    for path in path_of(journal).glob("*.arena"):
        assert item(1, 100) not in path.read_bytes()
    (segment,) = segments_in(path_of(journal))[0][other.stream]
    with segment.path.open("r+b") as file:
        file.seek(segment.base)
        file.write(b"\xff" * 8)
    (segment,) = segments_in(path_of(journal))[0][other.stream]
    assert recover(segment, b"", 0).events == 0
    assert count_items(segment.read(), segment.start, segment.size)[0] == 1


def test_header_damage_is_told(killed: tuple[Path, list[bytes], list[int]]) -> None:
    """A segment whose header is damaged is reported with its place, and so is a file that is none of ours."""
    path, _, _ = killed
    file = path / "1-2048x4.arena"
    whole = bytearray(file.read_bytes())
    whole[10] ^= 1
    whole[30] ^= 1
    file.write_bytes(whole)
    (path / "odd.arena").write_bytes(b"?")
    items, problems = found_in(path)
    assert items == []
    assert problems[0] == "1-2048x4.arena at 0: the segment's header fails its checksum"
    assert "odd.arena can't be read" in " ".join(problems)


def test_one_changed_byte_in_a_header_costs_nothing(killed: tuple[Path, list[bytes], list[int]]) -> None:
    """Its checksum tells which byte it was: all items are found, and it is told."""
    path, sent, _ = killed
    file = path / "1-2048x4.arena"
    whole = file.read_bytes()
    subject = STREAM.subject.encode()
    place = whole.index(subject)
    for at in [*range(8, 8 + FIXED.size, 3), *range(place, place + len(subject), 5)]:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 32]) + whole[at + 1 :])
        items, problems = found_in(path)
        assert items == sent
        assert "one byte of it was changed" in problems[0]


def test_behind_damage_each_stretch_between_two_marks_counts(
    killed: tuple[Path, list[bytes], list[int]],
) -> None:
    """Checksums go on from one another, so a changed byte costs what lies between the marks around it, no more."""
    path, _, _ = killed
    (segments,) = segments_in(path)[0].values()
    for segment in segments:
        whole = segment.path.read_bytes()
        all_of_it = [found.payload for found in stretches(segment)]
        assert len(all_of_it) <= 1
        ends = [segment.start, *(end for end, _, _ in segment.points), segment.head[0]]
        for at in range(segment.start, segment.head[0], 7):
            place = segment.base + at
            segment.path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            before = max(end for end in ends if end <= at)
            after = min(end for end in ends if end > at)
            found = stretches(segment)
            data = segment.read()
            assert b"".join(each.payload for each in found) == (
                data[segment.start : before] + data[after : segment.head[0]]
            )
            assert [each.first for each in found] == sorted(each.first for each in found)
            for each in found:
                assert each.cuts[-1] == (len(each.payload), each.events)
                assert count_items(each.payload, 0, len(each.payload))[0] == each.events
        segment.path.write_bytes(whole)


def test_written_is_as_good_as_mapped(small: None, opened: Open) -> None:
    """A journal that is written by system calls leaves the same segments, marks included, at each call."""
    mapped, written = opened(), opened(mapped=False)
    assert type(mapped) is Journal
    assert type(written) is WrittenJournal

    def points(journal: Journal) -> list[tuple[int, int, list[tuple[int, int, int]]]]:
        return [(s.first, s.head[0], s.points) for s in segments_in(path_of(journal))[0][STREAM]]

    sent = []
    for i in range(60):
        sent.append(item(i, 60 + i % 5 * 20))
        mapped.append(sent[-1])
        written.append(sent[-1])
        assert found_in(path_of(written)) == found_in(path_of(mapped)) == (sent, [])
        assert points(written) == points(mapped) or i > 20  # later segments have other sizes
    assert written._folder.memory_bytes == 4096  # full segments are let go: their file has them
    assert joined(take_all(written, 500)) == joined(take_all(mapped, 500)) == sent


def test_a_short_write_doesnt_count(small: None, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes less than it is given is given the rest; one that fails leaves the event in memory, the next
    call tries again, and the file never claims what it hasn't got."""
    journal = opened(mapped=False)
    pwrite = os.pwrite
    fail = False

    def grudging(descriptor: int, data: bytes, at: int) -> int:
        if fail:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, bytes(data)[:50], at)

    sent = [item(i, 60) for i in range(12)]
    journal.append(sent[0])
    monkeypatch.setattr(os, "pwrite", grudging)
    journal.append(sent[1])
    assert found_in(path_of(journal)) == (sent[:2], [])
    fail = True
    for data in sent[2:6]:
        journal.append(data)
    assert found_in(path_of(journal)) == (sent[:2], [])
    assert not journal._folder.crash_safe
    fail = False
    for data in sent[6:]:
        journal.append(data)
    assert found_in(path_of(journal)) == (sent, [])
    assert joined(take_all(journal)) == sent


# places --------------------------------------------------------------------------------------------------------


def test_without_a_path_memory_serves(small: None) -> None:
    """A store in memory has its journals there too; what is taken is what was appended."""
    journal = begun(JournalFolder(None))
    sent = [item(i, 100) for i in range(100)]
    for data in sent:
        journal.append(data)
    assert not journal._folder.crash_safe
    assert journal._folder.memory_bytes > 10_000
    assert joined(take_all(journal, 500)) == sent


def test_without_permission_memory_serves(small: None, tmp_path: Path) -> None:
    """Where no folder can be made, memory serves, which is said once, with the reason."""
    (tmp_path / "journals").write_text("a file where the folder should be")
    folder = JournalFolder(tmp_path / "journals" / "w")
    with pytest.warns(RuntimeWarning, match="journals can't be written .*journals"):
        journal = begun(folder)
    sent = [item(i, 100) for i in range(30)]
    for data in sent:
        journal.append(data)
    assert folder.problem is not None
    assert not folder.crash_safe
    assert joined(take_all(journal)) == sent
    assert journal.close() is False
    journal.release(30)
    assert journal.close()
    folder.remove()


def test_memory_is_bounded_and_what_is_dropped_counted(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """When memory is full too, events are dropped, counted and told of; the rest is whole, and later ones find room."""
    monkeypatch.setattr(segments, "MEMORY_BYTES", 10_000)
    journal = begun(JournalFolder(None))
    sent = [item(i, 100) for i in range(200)]
    with pytest.warns(RuntimeWarning, match="events are lost"):
        log(journal, sent)
    folder = journal._folder
    assert folder.memory_bytes <= 10_000
    kept = take_all(journal)
    number = sum(chunk.events for chunk in kept)
    assert joined(kept) == sent[:number]
    assert folder.dropped_events == journal.dropped == 200 - number > 0
    journal.release(number)
    journal.append(item(999, 100))
    assert joined(kept + take_all(journal)) == [*sent[:number], item(999, 100)]
    assert folder.dropped_events == 200 - number


def test_memory_is_let_go_as_soon_as_the_log_has_it(small: None) -> None:
    """Segments without a file needn't wait until the log is settled: after a power loss they couldn't help it."""
    journal = begun(JournalFolder(None))
    sent = [item(i, 100) for i in range(100)]
    log(journal, sent)
    before = journal._folder.memory_bytes
    taken = take(journal, 4000)
    journal.release(sum(chunk.events for chunk in taken), memory=True)
    assert journal._folder.memory_bytes < before - 2000
    assert joined(taken + take_all(journal)) == sent


@pytest.mark.parametrize("kind", [Journal, WrittenJournal])
def test_one_that_only_waits_is_rescued_too(
    small: None, opened: Open, monkeypatch: pytest.MonkeyPatch, kind: type[Journal]
) -> None:
    """Of a stream to which nothing more is recorded all reaches files, too, when there is space again."""
    journal = opened(mapped=kind is Journal)
    assert type(journal) is kind
    full = True

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments)

        return called

    for name in ("posix_fallocate", "pwrite"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    sent = [item(i, 100) for i in range(50)]
    with pytest.warns(RuntimeWarning, match="No space left"):
        log(journal, sent)
    taken = take(journal, 700)
    assert [journal._folder.crash_safe] == [False]
    assert not journal.rescue()
    full = False
    assert journal.rescue()
    assert [journal._folder.crash_safe] == [True]
    assert journal._folder.problem is None
    assert found_in(path_of(journal)) == (sent, [])
    assert joined(taken + take_all(journal)) == sent


def test_what_lies_behind_a_gap_is_not_called_safe(
    small: None, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end, what no file could be had for is counted with all that comes after it in its stream."""
    journal = opened()
    allocate = os.posix_fallocate
    full = True

    def fallocate(descriptor: int, start: int, size: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(descriptor, start, size)

    def no_file(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log(journal, [item(i, 100) for i in range(10)])
    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.warns(RuntimeWarning, match="No space left"):
        log(journal, [item(i, 100) for i in range(10, 100)])
    full = False
    log(journal, [item(i, 100) for i in range(100, 200)])
    journal.shut()
    monkeypatch.setattr(journal._folder, "_arena", no_file)
    kept, _ = found_in(path_of(journal))
    assert journal.save() == 200 - sum(1 for i in range(200) if item(i, 100) in kept and i < 100)


def test_a_full_disk_then_space_again(small: None, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """While space can't be had events are kept in memory, which is told; then segments lie in files again, also those
    from before, and not until then it is crash_safe. What the log takes is whole; what a kill would leave is a
    prefix."""
    journal = opened()
    allocate = os.posix_fallocate
    full: list[bool] = []

    def fallocate(descriptor: int, start: int, size: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(descriptor, start, size)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    sent: list[bytes] = []

    def log(number: int) -> None:
        for _ in range(number):
            sent.append(item(len(sent), 100))
            journal.append(sent[-1])

    log(5)
    full.append(True)
    with pytest.warns(RuntimeWarning, match="No space left"):
        log(60)
    assert [journal._folder.crash_safe] == [False]
    on_disk, _ = found_in(path_of(journal))
    assert on_disk == sent[: len(on_disk)]
    assert len(on_disk) >= 5
    assert not journal.rescue()
    full.clear()
    log(60)
    assert [journal._folder.crash_safe] == [False]
    assert found_in(path_of(journal))[0] == on_disk
    assert journal.rescue()
    assert [journal._folder.crash_safe] == [True]
    log(3)
    assert found_in(path_of(journal)) == (sent, [])
    assert journal._folder.memory_bytes == 0
    assert joined(take_all(journal, 700)) == sent
    journal.release(len(sent))
    log(3)
    first = first_kept(journal)
    assert found_in(path_of(journal), first) == (sent[first - 1 :], [])


MANY = """
    import resource, sys
    from pathlib import Path
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
    from eventrun.codec import Stream, encode
    from eventrun.events import NoteAdded
    from eventrun.journal import JournalFolder, new_journal
    folder = JournalFolder(Path(sys.argv[1]), mapped=sys.argv[4] == "mapped")
    journals = []
    for i in range(1000):
        stream = Stream(f"t/{i}", 7)
        journals.append(new_journal(folder, stream, folder.segment(stream), 1, None))
    for number in range(20):
        item = encode((number, NoteAdded("x" * 1000)))
        for journal in journals:
            journal.append(item)
    assert folder.crash_safe, folder.problem
    open("/dev/null").close()  # and the training can still open its own files
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("kind", "soft", "hard"), [("mapped", 256, 256), ("written", 256, 256), ("mapped", 20, 256)]
)
def test_a_thousand_streams_and_few_descriptors(tmp_path: Path, kind: str, soft: int, hard: int) -> None:
    """1,000 streams of one writer, past their first segment, work under `ulimit -n 256`; a lower soft limit is
    raised. All is there after a kill."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MANY), str(tmp_path / "w"), str(soft), str(hard), kind],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    streams, problems = segments_in(tmp_path / "w")
    assert problems == []
    assert len(streams) == 1000
    assert all(sum(recover(s, b"", 0).events for s in found) == 20 for found in streams.values())


# locks ---------------------------------------------------------------------------------------------------------


def dead(journals: Path) -> list[str]:
    """List the folders of dead writers, and let their locks go."""
    names = []
    for folder, descriptor in dead_writers(journals):
        names.append(folder.name)
        os.close(descriptor)
    return names


def test_a_living_writer_is_left_alone(opened: Open, tmp_path: Path) -> None:
    """Whoever holds the lock lives; when it is let go the writer is dead, until its folder is gone."""
    journal = opened(tmp_path / "journals" / "w")
    journal.append(item(1))
    assert dead(tmp_path / "journals") == []
    journal._folder.abandon()
    assert dead(tmp_path / "journals") == ["w"]
    assert dead(tmp_path / "journals") == ["w"]
    assert dead(tmp_path / "nowhere") == []


def test_a_lock_that_is_not_ours_to_judge(tmp_path: Path) -> None:
    """A writer about to begin (`.new`), one of another host, one with a strange lock and a damaged one are left alone;
    one of another container under the same kernel is ours."""
    mine = owner()
    locks: dict[str, dict[str, Any] | str] = {
        "beginning": mine,
        "elsewhere": {**mine, "host": "elsewhere", "boot": "other"},
        "strange": "[]",
        "broken": "{",
        "w.damaged": mine,
        "container": {**mine, "host": "e0f1"},
        "earlier-boot": {**mine, "boot": "other"},
        "new-of-earlier-boot": {**mine, "boot": "other"},
    }
    for name, text in locks.items():
        (tmp_path / name).mkdir()
        lock = NEW_LOCK_NAME if name in ("beginning", "new-of-earlier-boot") else LOCK_NAME
        (tmp_path / name / lock).write_bytes(
            text.encode() if isinstance(text, str) else msgspec.json.encode(text)
        )
    (tmp_path / "file").touch()
    assert dead(tmp_path) == ["container", "earlier-boot", "new-of-earlier-boot"]


@pytest.mark.parametrize("left", [b"", bytes(76)])
def test_a_lock_that_a_power_loss_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bytes
) -> None:
    """A lock whose contents never reached the disk is a dead writer's of this host, unless others share the disk."""
    for name, lock in {"w": LOCK_NAME, "beginning": NEW_LOCK_NAME}.items():
        (tmp_path / "journals" / name).mkdir(parents=True)
        (tmp_path / "journals" / name / lock).write_bytes(left)
    mountinfo = tmp_path / "mountinfo"
    monkeypatch.setattr("eventrun.filesystems.MOUNTINFO", mountinfo)
    for kind, found in {"ext4": ["w"], "btrfs": ["w"], "nfs4": [], "": []}.items():
        mountinfo.write_text(f"1 0 0:1 / / rw - {kind} /dev/sda rw" if kind else "")
        assert dead(tmp_path / "journals") == found


def test_the_lock_survives_neither_its_process_nor_a_child(opened: Open, tmp_path: Path) -> None:
    """A child that exec'ed doesn't keep a dead writer's lock."""
    journal = opened(tmp_path / "journals" / "w")
    journal.append(item(1))
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        journal._folder.abandon()
        assert dead(tmp_path / "journals") == ["w"]
    finally:
        child.kill()
        child.wait()


# the walker ----------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=20),
    max_leaves=30,
)


@given(values=st.lists(st.tuples(st.integers(0, 2**63), VALUES), max_size=5), rest=st.binary(max_size=9))
def test_the_walker_agrees_with_msgspec(values: list[Any], rest: bytes) -> None:
    """Items are counted as they were encoded, and the walk stops where no whole one follows."""
    items = [msgspec.msgpack.encode(value) for value in values]
    payload = b"".join(items)
    assert count_items(payload, 0, len(payload)) == (len(items), len(payload))
    for at in range(1, len(items[-1]) if items else 0):
        end = len(payload) - at
        assert count_items(payload, 0, end) == (len(items) - 1, len(payload) - len(items[-1]))
    count, at = count_items(payload + rest, 0, len(payload) + len(rest))
    assert count >= len(items)
    assert at <= len(payload) + len(rest)


@pytest.mark.parametrize("size", [0, 31, 32, 255, 256, 65535, 65536])
def test_the_walker_knows_long_values(size: int) -> None:
    """Text, bytes, lists and mappings of each width of length are walked over."""
    values = ["x" * size, b"x" * size, [None] * size, {str(i): i for i in range(size)}]
    items = [msgspec.msgpack.encode((1, value)) for value in values]
    payload = b"".join(items)
    assert count_items(payload, 0, len(payload)) == (4, len(payload))
    assert scan.count_items(payload, 0, len(payload) - 1)[0] == 3
