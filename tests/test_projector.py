"""Views: folded in any number of steps, kept by several processes, healed when they are damaged."""

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast
from unittest import mock

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrun.codec import Batch, ChainChecker, Item, StoredEvent, Stream, encode_item, items_of
from eventrun.errors import LogDamaged, NotFound, StoreUnavailable
from eventrun.events import (
    Event,
    GroupCreated,
    MetricsLogged,
    ParamsSet,
    ProjectCreated,
    TagsAdded,
    TrialCreated,
    TrialStarted,
    group_subject,
    project_subject,
    trial_subject,
)
from eventrun.portal import Portal
from eventrun.projections import TRIALS_VERSION, Points, Projection
from eventrun.projector import Views, generations, transactions
from eventrun.projector import log as reading
from eventrun.projector import series as packing
from eventrun.projector.log import Cut, Log, Pace
from eventrun.projector.verify import verify_log
from eventrun.stores import open_store
from eventrun.stores.base import Store, StoredBatch
from eventrun.testing import chain, scalars

ONE, TWO = Stream(trial_subject("one"), 1), Stream(trial_subject("two"), 2)
ANSWER_S = 60.0
T = TypeVar("T")


class Lab:
    """A store, what to append to it, and its log as the read side sees it."""

    def __init__(self, url: str) -> None:
        self._portal = Portal()
        self.url = url
        self.store: Store = open_store(url)
        self.log = Log(self._read, lambda: self.wait(self.store.end()))
        self.reads: list[tuple[int, str | None]] = []
        self._last: dict[Stream, Batch] = {}

    def wait(self, answer: Coroutine[Any, Any, T]) -> T:
        """Wait for what the store does."""
        if self.url != "memory:":
            return self._portal.call(lambda: answer).result(ANSWER_S)
        try:
            answer.send(None)  # the memory store's coroutines never wait
        except StopIteration as done:
            return cast(T, done.value)
        raise AssertionError("it waits")

    def _read(
        self, after: int, *, subject: str | None = None, limit_bytes: int = 1 << 20
    ) -> list[StoredBatch]:
        self.reads.append((after, subject))
        return self.wait(self.store.read(after, subject=subject, limit_bytes=limit_bytes))

    def append(self, stream: Stream, *groups: Sequence[Item]) -> None:
        """Append a batch of each group of items."""
        batches = chain(stream, groups, self._last.get(stream))
        self.wait(self.store.append(batches))
        self._last[stream] = batches[-1]

    def close(self) -> None:
        self.wait(self.store.aclose())
        self._portal.stop()


@contextmanager
def opened(url: str = "memory:") -> Iterator[Lab]:
    lab = Lab(url)
    try:
        yield lab
    finally:
        lab.close()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A lab with a store in a folder."""
    with opened(str(tmp_path / "runs")) as lab:
        yield lab


@pytest.fixture
def folder(tmp_path: Path, lab: Lab) -> Path:
    """The folder of that store."""
    return tmp_path / "runs"


def calls(first: int, count: int, **values: Any) -> list[Item]:
    """Log calls with the steps first, first + 1, ..., a second apart."""
    logged = values or {"loss": 0.5}
    return [
        (10**9 * step, MetricsLogged(dict(logged, n=float(step)), step=step))
        for step in range(first, first + count)
    ]


def begun(name: str) -> list[Item]:
    """The first events of a trial."""
    return [
        (1, TrialCreated("p", "g", name)),
        (2, TrialStarted()),
        (3, ParamsSet({"lr": 0.1})),
        (4, TagsAdded({"a": None})),
    ]


def fill(lab: Lab, rounds: int = 5) -> None:
    """Record two trials, a group and a project."""
    lab.append(Stream(project_subject("p"), 1), [(1, ProjectCreated("p"))])
    lab.append(Stream(group_subject("p", "g"), 1), [(1, GroupCreated("p", "g"))])
    lab.append(ONE, begun("first"))
    lab.append(TWO, begun("second"))
    for n in range(rounds):
        lab.append(ONE, calls(10 * n, 10))
        lab.append(TWO, calls(10 * n, 7, loss="none", acc=True), calls(10 * n + 7, 3))


def fresh_digest(lab: Lab, *projections: Projection[Any], snapshot_every: int = 1_000_000) -> str:
    views = Views(None, lab.log, projections, snapshot_every=snapshot_every)
    views.catch_up_all()
    try:
        return views.digest()
    finally:
        views.close()


def metrics_in(views: Views, trial: str) -> int:
    query = "SELECT count FROM series JOIN trials ON trial = trials.number WHERE id = ? AND series.name = 'n'"
    return int(views.read(lambda db: db.execute(query, (trial,)).fetchone())[0])


# packed series -------------------------------------------------------------------------------------------------


def points_of(values: Sequence[Any], steps: Sequence[Any], start: int = 0) -> Points:
    count = len(values)
    return Points(
        list(values), list(steps), [None] * count, [n * n for n in range(start, start + count)], [7] * count
    )


def packed_in_parts(values: Sequence[Any], steps: Sequence[Any], cuts: Sequence[int]) -> list[bytes]:
    """Extend a series part by part, as catch-ups do, and return its chunks."""
    full: list[bytes] = []
    opened: packing.Chunk | None = None
    bounds = [0, *sorted(cut for cut in cuts if cut < len(values)), len(values)]
    for start, end in pairwise(bounds):
        for chunk in packing.Packer().extend(opened, points_of(values[start:end], steps[start:end], start)):
            opened = chunk
            if chunk.count == packing.CHUNK:
                full.append(packing.encode_chunk(chunk))
                opened = None
    return full if opened is None else [*full, packing.encode_chunk(opened)]


COLUMNS = st.one_of(
    st.lists(st.floats(), max_size=40),
    st.lists(st.integers(-(2**63), 2**64 - 1), max_size=40),
    st.lists(st.booleans(), max_size=40),
    st.lists(scalars(), max_size=40),
    st.builds(lambda start, step, count: [start + step * n for n in range(count)],
              st.integers(-9, 9) | st.integers(2**63 - 30, 2**63), st.integers(-3, 3), st.integers(0, 40)),
)  # fmt: skip


@given(COLUMNS, st.lists(st.integers(0, 40)))
def test_a_series_is_packed_alike_however_its_points_come(values: list[Any], cuts: list[int]) -> None:
    """Chunks and their bytes depend on the points alone, not on how many came at a time."""
    with mock.patch.object(packing, "CHUNK", 8):
        assert packed_in_parts(values, values, cuts) == packed_in_parts(values, values, [])


@given(COLUMNS)
def test_a_packed_column_gives_back_its_elements(values: list[Any]) -> None:
    """Types, NaN, -0.0, 64-bit integers, text and None survive."""
    if values:
        assert repr(list(packing.unpack(packing.pack(values), len(values)))) == repr(values)


def test_metrics_of_the_same_calls_are_packed_like_others() -> None:
    """What they share is packed once, also when one of them has been logged more often before."""
    earlier, later = points_of([0.5], [None]), points_of([1.5, 2.5], [None, 7], start=1)
    packer = packing.Packer()
    [often] = packer.extend(next(packing.Packer().extend(None, earlier)), later)
    [seldom] = packer.extend(None, later)
    assert [list(packing.unpack(chunk.steps, chunk.count)) for chunk in (often, seldom)] == [
        [None, None, 7],
        [None, 7],
    ]
    [twice] = packer.extend(next(packer.extend(None, points_of([0.5] * 2, [None] * 2))), later)
    assert list(packing.unpack(twice.steps, 4)) == [None, None, None, 7]


def test_regular_columns_take_no_room() -> None:
    """Steps that count up and epochs that are missing cost no bytes per point, floats eight."""
    chunk = next(packing.Packer().extend(None, points_of([0.5] * 1000, range(1000))))
    assert [len(column.data) for column in (chunk.values, chunk.steps, chunk.epochs)] == [8000, 0, 0]


def test_a_flipped_bit_in_a_chunk_is_noticed() -> None:
    """Every bit of a stored chunk is covered by its checksum."""
    data = packing.encode_chunk(next(packing.Packer().extend(None, points_of([0.5, 1.5], [1, 2]))))
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(packing.DamagedView):
            packing.decode_chunk(bytes(flipped))


# reading the log -----------------------------------------------------------------------------------------------


def test_a_payload_decodes_in_pieces_as_in_one_go() -> None:
    """A gentle reader gets the same events, a few at a time; msgspec still names the place where an array ends."""
    [batch] = chain(ONE, [[*begun("x"), *calls(0, 1000), (5, ParamsSet({"text": "x" * 9000}))]])
    with mock.patch.object(reading, "PIECE_BYTES", 200):
        parts = list(reading.slices(StoredBatch(11, batch), 0, Cut(), Pace(gentle=True), ChainChecker()))
    assert len(parts) > 50
    assert [item for part in parts for item in part.items] == items_of(batch)
    assert [(part.position, part.first) for part in parts[:2]] == [
        (11, 1),
        (11 + len(parts[0].items), 1 + len(parts[0].items)),
    ]
    one, two, three = (encode_item(*item) for item in calls(0, 3))
    assert reading._end_of_array(memoryview(b"\xdd\0\0\0\2" + one + two + three)) == 5 + len(one + two)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=20),
    st.integers(0, 12),
    st.integers(0, 25),
    st.integers(0, 25),
)
def test_slices_hold_the_events_that_count(times: list[int], until: int, after: int, last: int) -> None:
    """A cut in position and time leaves exactly the events within both, each with its position and sequence."""
    [batch] = chain(ONE, [[(time, ParamsSet({"n": n})) for n, time in enumerate(times)]])
    for gentle in (False, True):
        parts = reading.slices(StoredBatch(3, batch), after, Cut(last, until), Pace(gentle), ChainChecker())
        found = [
            (part.position + n, part.first + n, item) for part in parts for n, item in enumerate(part.items)
        ]
        assert found == [
            (3 + n, 1 + n, item) for n, item in enumerate(items_of(batch))
            if after < 3 + n <= last and item[0] <= until
        ]  # fmt: skip


# one result ----------------------------------------------------------------------------------------------------

SUBJECTS = [
    trial_subject("one"),
    trial_subject("two"),
    group_subject("p", "g"),
    project_subject("p"),
    "s/sweep",
]
HAPPENINGS: st.SearchStrategy[Event] = st.one_of(
    st.builds(MetricsLogged, st.dictionaries(st.sampled_from("ab\0c"), scalars(), min_size=1, max_size=3),
              st.none() | st.integers(0, 5) | st.floats()),
    st.just(TrialCreated("p", "g", "name")),
    st.just(TrialStarted()),
    st.builds(TagsAdded, st.dictionaries(st.sampled_from(["x", "y", "\x1f"]), st.none(), min_size=1)),
)  # fmt: skip
HISTORIES = st.lists(
    st.tuples(
        st.sampled_from(SUBJECTS),
        st.integers(1, 2),
        st.lists(st.tuples(st.integers(0, 99), HAPPENINGS), min_size=1, max_size=30),
    ),
    max_size=8,
)


@given(HISTORIES, st.randoms(use_true_random=False), st.booleans())
def test_views_are_the_same_however_they_were_folded(
    history: Any, chance: random.Random, gentle: bool
) -> None:
    """Batches of any size, any number of catch-ups, gentle or not, few trials in memory or many: one digest."""
    few: Any = {"CHUNK": 4, "LIVE_TRIALS": 1, "LIVE_POINTS": 10, "ROWS": 2, "WAITING_SERIES": 1}
    small = (
        mock.patch.multiple("eventrun.projector.catchup", **few),
        mock.patch.multiple("eventrun.projector.series", CHUNK=4),
        mock.patch.multiple("eventrun.projector", STINT_EVENTS=9, GENTLE_STINT_EVENTS=5),
        mock.patch.multiple("eventrun.projector.log", PIECE_BYTES=60, PAGE_BYTES=300, GENTLE_PAGE_BYTES=100),
    )
    with opened() as lab, opened() as other, small[0], small[1]:
        views = Views(None, lab.log, gentle=lambda: gentle, snapshot_every=7)
        with small[2], small[3]:
            for subject, writer, items in history:
                cuts = sorted(chance.sample(range(1, len(items)), chance.randint(0, min(3, len(items) - 1))))
                bounds = [0, *cuts, len(items)]
                for start, end in pairwise(bounds):
                    lab.append(Stream(subject, writer), items[start:end])
                    if chance.random() < 0.5:
                        views.catch_up()
                other.append(Stream(subject, writer), items)
            views.catch_up()
        assert views.digest() == fresh_digest(other, snapshot_every=7)
        assert views.is_right()
        views.close()


@pytest.mark.parametrize("snapshot_every", [13, 1_000_000])
def test_a_rebuild_gives_what_catching_up_gave(lab: Lab, folder: Path, snapshot_every: int) -> None:
    """A rebuild of all, of one trial, and views that come back after their files were deleted: the same digest."""
    views = Views(folder, lab.log, snapshot_every=snapshot_every)
    for _ in range(3):
        fill_more(lab)
        views.catch_up()
    expected = views.digest()
    assert expected == fresh_digest(lab, snapshot_every=snapshot_every)
    for trial in ("one", "two"):
        assert views.rebuild(trial) == lab.log.end()
        assert views.digest() == expected
    assert views.rebuild() == lab.log.end()
    assert views.digest() == expected
    views.close()
    for file in folder.glob("views*"):
        file.unlink()
    views.catch_up()
    assert views.digest() == expected
    assert not views.in_memory
    views.close()


def fill_more(lab: Lab) -> None:
    """Record two trials, or go on with them."""
    if ONE in lab._last:
        lab.append(ONE, calls(1000, 20))
        lab.append(TWO, calls(1000, 20))
    else:
        fill(lab)


def test_damage_in_the_views_is_seen_by_the_digest(lab: Lab, folder: Path) -> None:
    """A view that isn't what the log says isn't right."""
    fill(lab)
    views = Views(folder, lab.log)
    views.catch_up()
    assert views.is_right()
    views.read(lambda db: db.execute("UPDATE trials SET status = 'failed' WHERE id = 'one'"))
    assert not views.is_right()
    views.rebuild("one")
    assert views.is_right()
    views.close()


# several readers -----------------------------------------------------------------------------------------------

READER = """
import sys
from pathlib import Path
from eventrun.portal import Portal
from eventrun.projector import Views
from eventrun.projector.log import Log
from eventrun.stores import open_store

portal, folder = Portal(), Path(sys.argv[1])
store = open_store(folder, create=False)

def read(after, *, subject=None, limit_bytes=1 << 20):
    async def ask():
        return await store.read(after, subject=subject, limit_bytes=limit_bytes)
    return portal.call(ask).result()

views = Views(folder, Log(read, lambda: portal.call(store.end).result()))
position = 0
while position < int(sys.argv[2]):
    reached = views.rebuild() if sys.argv[3] == "rebuild" else views.catch_up()
    assert reached >= position, (reached, position)
    position = reached
print(views.in_memory, views.is_right())
views.close()
portal.call(store.aclose).result()
portal.stop()
"""


def test_processes_share_the_views(lab: Lab, folder: Path) -> None:
    """Three processes catch up and one rebuilds again and again while this one appends: no error, no lost event."""
    total = 40 * 50
    command = [sys.executable, "-W", "error", "-c", READER, str(folder), str(total)]
    lab.append(ONE, begun("first") + calls(0, 46))
    children = [
        subprocess.Popen([*command, what], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for what in ("catch up", "catch up", "rebuild", "catch up")
    ]
    for n in range(1, 40):
        lab.append(ONE, calls(50 * n, 50))
    answers = [(child.communicate(timeout=120), child.returncode) for child in children]
    assert [(out, code) for (out, _), code in answers] == [("False True\n", 0)] * 4, answers
    views = Views(folder, lab.log)
    assert views.digest() == fresh_digest(lab)
    views.close()


def test_threads_share_the_views(lab: Lab, folder: Path) -> None:
    """Each with views of its own on one folder, they end with the same."""
    fill(lab)
    found, errors = [], []

    def work() -> None:
        views = Views(folder, lab.log)
        try:
            for _ in range(20):
                views.catch_up()
            found.append(views.digest())
        except Exception as error:  # noqa: BLE001 - shown by the test's own thread
            errors.append(error)
        finally:
            views.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for n in range(10):
        lab.append(ONE, calls(100 * n, 100))
    for thread in threads:
        thread.join()
    assert errors == []
    views = Views(folder, lab.log)
    views.catch_up()
    assert views.digest() == fresh_digest(lab)
    views.close()


def test_a_reader_waits_for_the_one_that_folds(
    lab: Lab, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It doesn't fail while another holds the write lock, unless that one doesn't get on for very long."""
    fill(lab)
    views, other = Views(folder, lab.log), Views(folder, lab.log)
    views.catch_up()
    lab.append(ONE, calls(500, 5))
    db = other.read(lambda db: db, fresh=False)
    db.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(transactions, "STUCK_S", 0.5)
    with pytest.raises(StoreUnavailable, match="end it"):
        views.catch_up()
    assert views.read(lambda db: db.execute("SELECT count(*) FROM trials").fetchone()[0], fresh=False) == 2
    monkeypatch.setattr(transactions, "STUCK_S", 60.0)
    waiting = threading.Thread(target=views.catch_up)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    db.execute("ROLLBACK")
    waiting.join(30)
    assert not waiting.is_alive()
    assert views.digest() == fresh_digest(lab)
    views.close()
    other.close()


def test_everybody_goes_over_to_a_new_generation(lab: Lab, folder: Path) -> None:
    """The next read after a rebuild by somebody else uses what that one made; the generation before stays."""
    fill(lab)
    views, other = Views(folder, lab.log), Views(folder, lab.log)
    views.catch_up()
    other.catch_up()
    before = set(folder.glob("views-*.db"))
    other.rebuild()
    lab.append(ONE, calls(500, 5))
    other.catch_up()
    assert metrics_in(views, "one") == 55
    assert len(before) == 1
    assert before < set(folder.glob("views-*.db"))
    assert views.digest() == other.digest()
    views.close()
    other.close()


def test_a_rebuild_that_fails_leaves_the_old_views(lab: Lab, folder: Path) -> None:
    """What it has begun is pointed to by nobody."""
    fill(lab)
    views = Views(folder, lab.log)
    views.catch_up()
    pointer = (folder / "views").read_text()
    views.log = tampered(lab, DAMAGES["a flipped bit"][0])
    with pytest.raises(LogDamaged):
        views.rebuild()
    assert (folder / "views").read_text() == pointer
    assert len(list(folder.glob("views-*"))) == 1
    views.log = lab.log
    assert metrics_in(views, "one") == 50
    views.rebuild()
    assert (folder / "views").read_text() != pointer
    views.close()


def test_old_generations_go_when_nobody_has_them_open(lab: Lab, folder: Path) -> None:
    """The generation before the present one stays; older ones are removed at the next rebuild, unless in use."""
    fill(lab)
    views, idle = Views(folder, lab.log), Views(folder, lab.log)
    idle.catch_up()
    [oldest] = folder.glob("views-*.db")
    for _ in range(4):
        views.rebuild()
        assert oldest.exists()
    idle.close()
    views.rebuild()
    assert not oldest.exists()
    assert len(list(folder.glob("views-*.db"))) == 2
    views.close()


def test_what_a_killed_rebuild_has_left_goes_with_the_next(lab: Lab, folder: Path) -> None:
    """Nobody points to it, and its number is above the present one's."""
    fill(lab)
    views = Views(folder, lab.log)
    views.catch_up()
    views.close()
    [present] = folder.glob("views-*.db")
    number = int(present.stem.removeprefix("views-"))
    for ahead in (1, 7):
        shutil.copy(present, folder / f"views-{number + ahead}.db")
    views.rebuild()
    left = sorted(int(file.stem.removeprefix("views-")) for file in folder.glob("views-*.db"))
    assert left == [number, number + 1]
    assert metrics_in(views, "one") == 50
    views.close()


# healing -------------------------------------------------------------------------------------------------------


def test_views_of_another_version_are_made_anew(
    lab: Lab, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older version's views are replaced; a newer version's are left alone, and the older reads in memory."""
    fill(lab)
    views = Views(folder, lab.log)
    views.catch_up()
    [before] = folder.glob("views-*.db")
    views.close()
    monkeypatch.setattr(generations, "TRIALS_VERSION", TRIALS_VERSION + 1)
    views.catch_up()
    assert metrics_in(views, "one") == 50
    assert not views.in_memory
    assert (folder / "views").read_text().split()[0] != before.name
    views.close()
    pointer = (folder / "views").read_text()
    monkeypatch.undo()
    old = Views(folder, lab.log)
    assert metrics_in(old, "one") == 50
    assert old.in_memory
    assert (folder / "views").read_text() == pointer
    old.close()


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def overwrite(file: Path) -> None:
    file.write_bytes(b"no database" * 1000)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def drop_a_table(file: Path) -> None:
    db = sqlite3.connect(file)
    db.execute("DROP TABLE series")
    db.close()


@pytest.mark.parametrize("damage", [truncate, overwrite, empty, drop_a_table, Path.unlink])
def test_damaged_views_heal(lab: Lab, folder: Path, damage: Callable[[Path], None]) -> None:
    """A views file that was cut, overwritten, changed or deleted is replaced by a new generation."""
    fill(lab)
    views = Views(folder, lab.log)
    views.catch_up()
    expected = views.digest()
    views.close()
    [file] = folder.glob("views-*.db")
    for extra in folder.glob("views-*.db-*"):
        extra.unlink()
    damage(file)
    assert metrics_in(views, "one") == 50
    assert views.digest() == expected
    assert not views.in_memory
    views.close()


@pytest.mark.parametrize("pointer", [b"", b"views-7.db", b"views-x.db 1", b"\xff\xfe", b"views-999.db abc\n"])
def test_a_damaged_pointer_heals(lab: Lab, folder: Path, pointer: bytes) -> None:
    """A pointer that names nothing is replaced."""
    fill(lab)
    views = Views(folder, lab.log)
    views.catch_up()
    (folder / "views").write_bytes(pointer)
    lab.append(ONE, calls(500, 5))
    assert metrics_in(views, "one") == 55
    views.close()


def test_flipped_bits_in_what_was_folded_are_noticed(lab: Lab, folder: Path) -> None:
    """A state, a fold or points that fail their checksum make the views new; nothing wrong is read or gone on with."""
    fill(lab)
    views = Views(folder, lab.log)
    views.catch_up()
    for table, column in (("folds", "fold"), ("series", "open")):
        flip = f"UPDATE {table} SET {column} = CAST('x' || substr({column}, 2) AS BLOB)"
        views.read(lambda db, flip=flip: db.execute(flip))  # type: ignore[misc]
        lab.append(ONE, calls(500, 5))
        views.catch_up()
        assert views.digest() == fresh_digest(lab)
    views.close()


def test_what_heals_is_read_whole(lab: Lab, folder: Path) -> None:
    """A read that didn't ask to catch up gets everything too, when it meets damage: new views begin empty."""
    fill(lab)
    views = Views(folder, lab.log, [kinds_by_trial()])
    views.catch_up_all()
    views.read(lambda db: db.execute("UPDATE states SET state = x'00'"))
    assert views.state("kinds", "one", fresh=False)["MetricsLogged"] == 50
    tries = []

    def job(db: sqlite3.Connection) -> int:
        tries.append(1)
        if len(tries) == 1:
            raise packing.DamagedView("somewhere")
        return int(db.execute("SELECT count(*) FROM trials").fetchone()[0])

    assert views.read(job, fresh=False) == 2
    views.read(lambda db: db.execute("DELETE FROM checkpoints"))
    views.catch_up()
    assert metrics_in(views, "one") == 50
    views.close()


def test_views_of_another_log_are_made_anew(tmp_path: Path) -> None:
    """A log that is shorter than what the views have read, or another log of the same length, voids them."""
    with opened() as first, opened() as shorter, opened() as longer:
        fill(first, rounds=3)
        fill(shorter, rounds=2)
        longer.append(ONE, begun("other"), calls(0, 500))
        views = Views(tmp_path, first.log)
        views.catch_up()
        for lab in (shorter, longer):
            views.log = lab.log
            assert views.catch_up() == lab.log.end()
            assert views.digest() == fresh_digest(lab)
        views.close()


@pytest.mark.parametrize("what", ["missing", "a file"])
def test_without_a_place_views_are_kept_in_memory(tmp_path: Path, what: str) -> None:
    """A folder that can't be written serves readers all the same, and a memory store too."""
    place = tmp_path / "not there"
    if what == "a file":
        place.write_text("")
    with opened() as lab:
        fill(lab)
        for folder in (place, None):
            views = Views(folder, lab.log)
            count = metrics_in(views, "one")
            assert views.in_memory
            views.rebuild()
            lab.append(ONE, calls(500, 5))
            assert metrics_in(views, "one") == count + 5
            assert views.is_right()
            views.close()
        assert not place.is_dir()


def test_a_full_disk_makes_views_in_memory(lab: Lab, folder: Path) -> None:
    """When the file can't grow any more, reading goes on without it."""
    fill(lab)
    views = Views(folder, lab.log)
    views.catch_up()
    views.read(lambda db: db.execute("PRAGMA max_page_count = 1"))
    lab.append(ONE, calls(1000, 20_000))
    assert metrics_in(views, "one") == 20_050
    assert views.in_memory
    assert views.is_right()
    views.close()


def test_a_catch_up_that_fails_changes_nothing(lab: Lab, folder: Path) -> None:
    """The view and its checkpoint change together or not at all."""
    fill(lab)
    views = Views(folder, lab.log)
    views.catch_up()
    before = views.digest()
    lab.append(ONE, calls(500, 2000))
    lab.append(ONE, calls(3000, 2000))

    def fails(after: int, **more: Any) -> list[StoredBatch]:
        if len(lab.reads) > start + 1:
            raise StoreUnavailable("the network is down")
        return lab.log.read(after, subject=more.get("subject"), limit_bytes=1)

    start = len(lab.reads)
    views.log = Log(fails, lab.log.end)
    with pytest.raises(StoreUnavailable, match="network"):
        views.catch_up()
    assert views.digest() == before
    views.log = lab.log
    views.catch_up()
    assert views.digest() == fresh_digest(lab)
    views.close()


# damage in the log ---------------------------------------------------------------------------------------------


def tampered(lab: Lab, change: Callable[[list[StoredBatch]], list[StoredBatch]]) -> Log:
    """The lab's log as it would be read after damage that leaves the store's own index whole."""
    end = lab.log.end()
    batches = change(lab.log.read(0, limit_bytes=1 << 30))

    def read(after: int, *, subject: str | None = None, limit_bytes: int = 0) -> list[StoredBatch]:
        return [
            stored for stored in batches
            if stored.last_position > after and subject in (None, stored.batch.header.subject)
        ]  # fmt: skip

    return Log(read, lambda: end)


def flip(stored: StoredBatch) -> StoredBatch:
    frame = bytearray(stored.batch.frame)
    frame[-5] ^= 4
    return StoredBatch(stored.position, msgspec.structs.replace(stored.batch, frame=bytes(frame)))


DAMAGES: dict[str, tuple[Callable[[list[StoredBatch]], list[StoredBatch]], str]] = {
    "a flipped bit": (lambda log: [*log[:2], flip(log[2]), *log[3:]], "positions 15..24"),
    "a batch is gone": (lambda log: [*log[:2], *log[3:]], "positions 15..24"),
    "the tail is gone": (lambda log: log[:2], "positions 15..34"),
    "a batch comes twice": (lambda log: [*log[:3], log[2], *log[3:]], "positions 15..24"),
    "batches changed places": (
        lambda log: [*log[:2], StoredBatch(15, log[3].batch), StoredBatch(25, log[2].batch)], "positions 15..24"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_in_the_log_is_named(what: str) -> None:
    """LogDamaged names the positions; what comes before them is folded and can be read."""
    change, where = DAMAGES[what]
    with opened() as lab:
        lab.append(ONE, begun("first"), calls(0, 10), calls(10, 10), calls(20, 10))
        views = Views(None, tampered(lab, change))
        for _ in range(1 if what == "a batch comes twice" else 2):
            with pytest.raises(LogDamaged) as caught:
                views.catch_up()
            assert caught.value.where == (where,)
            assert where in str(caught.value)
        read = views.read(lambda db: db.execute("SELECT position FROM checkpoints").fetchone(), fresh=False)
        assert read == ((24,) if what == "a batch comes twice" else (14,))
        views.close()


@pytest.mark.parametrize("what", DAMAGES)
def test_verify_lists_all_damage(what: str) -> None:
    """It goes on past damage and names each range."""
    change, where = DAMAGES[what]
    with opened() as lab:
        lab.append(ONE, begun("first"), calls(0, 10), calls(10, 10), calls(20, 10))
        report = verify_log(tampered(lab, change), Pace(gentle=False))
        assert not report.ok
        assert str(report.problems[0]).startswith(where)
        assert report.to_dict()["problems"][0]["text"] == str(report.problems[0])


def test_verify_finds_nothing_wrong_in_a_good_log(lab: Lab) -> None:
    """It counts what there is."""
    fill(lab)
    report = verify_log(lab.log, Pace(gentle=True))
    assert (report.ok, report.events, report.end, report.batches, report.streams) == (True, 110, 110, 19, 4)


def test_verify_goes_past_what_the_store_cannot_read(lab: Lab, folder: Path) -> None:
    """A batch whose header or count is damaged costs itself; what comes after it is checked too."""
    fill(lab)
    lab.wait(lab.store.aclose())
    lab.store = open_store(folder)
    with sqlite3.connect(folder / "log.db") as db:
        db.execute("UPDATE batches SET frame = CAST('xxxx' || substr(frame, 5) AS BLOB) WHERE position = 11")
        db.execute("UPDATE batches SET count = 'x' WHERE position = 31")
    db.close()
    report = verify_log(lab.log, Pace(gentle=False))
    assert len(report.problems) >= 2
    assert any("positions 11..20" in str(problem) for problem in report.problems)
    assert any("positions 31.." in str(problem) for problem in report.problems)
    assert report.events > 70


@given(st.sets(st.integers(1, 60), min_size=1), st.integers(61, 70))
def test_verify_finds_its_way_past_nameless_damage(damaged: set[int], end: int) -> None:
    """A store that says only that it can't read on: each unreadable stretch is named, and all the rest is checked."""
    batches = [
        StoredBatch(n, batch) for n, batch in enumerate(chain(ONE, [[item] for item in calls(0, end)]), 1)
    ]

    def read(after: int, *, subject: str | None = None, limit_bytes: int = 0) -> list[StoredBatch]:
        if after + 1 in damaged:
            raise LogDamaged("unreadable")
        good = []
        for stored in batches[after:]:
            if stored.position in damaged:
                break
            good.append(stored)
        return good

    report = verify_log(Log(read, lambda: end), Pace(gentle=False))
    named: set[int] = set()
    for problem in report.problems:
        if "unreadable" in problem.what:
            assert problem.first is not None
            assert problem.last is not None
            named.update(range(problem.first, problem.last + 1))
    assert named == damaged
    assert report.events == end - len(damaged)


# projections of the user's own ---------------------------------------------------------------------------------


def count_apply(state: dict[str, int], stored: StoredEvent) -> dict[str, int]:
    kind = type(stored.event).__name__
    state[kind] = state.get(kind, 0) + 1
    return state


def kinds_by_trial(
    version: int = 1, apply: Callable[..., dict[str, int]] = count_apply
) -> Projection[dict[str, int]]:
    def key(stored: StoredEvent) -> str | None:
        subject = stored.stream.subject
        return subject[2:] if subject.startswith("t/") else None

    return Projection("kinds", version, dict, apply, dict[str, int], key)


def test_a_users_projection_is_kept_and_caught_up(lab: Lab, folder: Path) -> None:
    """Its states are stored with a checkpoint of their own, and only new events are applied."""
    fill(lab)
    applied = []

    def apply(state: dict[str, int], stored: StoredEvent) -> dict[str, int]:
        applied.append(stored.position)
        return count_apply(state, stored)

    views = Views(folder, lab.log, [kinds_by_trial(apply=apply)])
    with mock.patch("eventrun.projector.custom.STATES_HELD", 1):
        assert views.state("kinds", "one")["MetricsLogged"] == 50
    assert views.keys("kinds") == ["one", "two"]
    assert views.state("kinds", "nobody") == {}
    assert applied == list(range(3, 111))
    views.close()
    applied.clear()
    views = Views(folder, lab.log)
    views.register(kinds_by_trial(apply=apply))
    lab.append(ONE, calls(500, 5))
    assert views.state("kinds", "one", fresh=False)["MetricsLogged"] == 50
    assert views.state("kinds", "one")["MetricsLogged"] == 55
    assert applied == list(range(111, 116))
    assert views.is_right()
    with pytest.raises(NotFound, match="kinds"):
        views.state("kind")
    views.close()


def test_a_users_projection_is_made_anew(lab: Lab, folder: Path) -> None:
    """By a rebuild, and when its version is raised; then the old version's states go."""
    fill(lab)
    views = Views(folder, lab.log, [kinds_by_trial()])
    views.catch_up_all()
    expected = views.digest()
    assert expected == fresh_digest(lab, kinds_by_trial())
    views.rebuild()
    assert views.digest() == expected

    def double(state: dict[str, int], stored: StoredEvent) -> dict[str, int]:
        return count_apply(count_apply(state, stored), stored)

    views.register(kinds_by_trial(2, double))
    assert views.state("kinds", "one")["MetricsLogged"] == 100
    assert views.read(lambda db: db.execute("SELECT DISTINCT version FROM states").fetchall()) == [(2,)]
    views.close()


def test_an_error_in_a_users_projection_concerns_it_alone(lab: Lab) -> None:
    """It reaches whoever asks for that projection; everything else can be read."""
    fill(lab)

    def broken(state: dict[str, int], stored: StoredEvent) -> dict[str, int]:
        raise ZeroDivisionError("my mistake")

    views = Views(None, lab.log, [kinds_by_trial(apply=broken)])
    with pytest.raises(ZeroDivisionError, match="my mistake"):
        views.state("kinds", "one")
    assert metrics_in(views, "one") == 50
    views.close()


def test_views_that_are_ahead_of_the_log_are_dropped_in_time(tmp_path: Path) -> None:
    """A lost end that comes back in another order may end with the same batch at the same position, as nobody could
    tell by then; so views that are ahead are dropped before."""
    first, second, last = Stream("t/one", 1), Stream("t/two", 1), Stream("t/three", 1)
    with opened() as whole, opened() as other:
        for lab, order in ((whole, (first, second, last)), (other, (second, first, last))):
            for stream in order:
                lab.append(stream, calls(0, 3))
        views = Views(tmp_path, whole.log)
        views.drop_if_ahead()
        assert not list(tmp_path.iterdir())
        views.catch_up()
        before = views.digest()
        views.drop_if_ahead()
        assert views.digest() == before
        views.log = Log(other.log.read, lambda: 3)
        views.drop_if_ahead()
        views.log = other.log
        views.catch_up()
        assert views.digest() == fresh_digest(other) != before
        views.close()
