"""The stores: the public suite on each, and what only SQLite can do wrong."""

import asyncio
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import eventrun.stores.sqlite
from eventrun.codec import Batch, ChainChecker, Item, Stream, items_of, open_batch
from eventrun.errors import FormatTooNew, InvalidValue, LogDamaged, StoreError, StoreUnavailable
from eventrun.events import MetricsLogged
from eventrun.portal import Portal
from eventrun.stores import open_store
from eventrun.stores.base import Store, StoredBatch
from eventrun.stores.memory import MemoryStore
from eventrun.stores.sqlite import SqliteStore, batches, connection
from eventrun.stores.sqlite.mark import Mark
from eventrun.testing import SharedStoreConformance, StoreConformance, chain, read_all

STREAM = Stream("t/a", 1)
Run = Callable[..., Any]


class TestMemoryStore(StoreConformance):
    @pytest.fixture
    def store(self) -> Store:
        return open_store("memory:")


class TestSqliteStore(SharedStoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return open_store(tmp_path / "runs")

    @pytest.fixture
    def reopen(self, tmp_path: Path) -> Callable[[], Store]:
        return lambda: open_store(tmp_path / "runs")


class TestSqliteStoreInSmallStatements(SharedStoreConformance):
    """The same where SQLite takes few variables per statement, as it did before 3.32."""

    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
        monkeypatch.setattr(batches, "ROWS_PER_STATEMENT", 4)
        return open_store(tmp_path / "runs")

    @pytest.fixture
    def reopen(self, tmp_path: Path) -> Callable[[], Store]:
        return lambda: open_store(tmp_path / "runs")


@pytest.fixture
def run() -> Iterator[Run]:
    """Call a coroutine function on a loop like eventrun's own."""
    portal = Portal()
    yield lambda function, *arguments: portal.call(function, *arguments).result(60)
    portal.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def store(folder: Path, run: Run) -> Iterator[SqliteStore]:
    opened = SqliteStore(folder)
    yield opened
    run(opened.aclose)


def logged(*sizes: int) -> list[list[Item]]:
    return [[(n, MetricsLogged({"loss": n * 0.3}, step=n)) for n in range(size)] for size in sizes]


def some_batches(count: int, stream: Stream = STREAM) -> list[Batch]:
    return chain(stream, logged(*[3] * count))


def everything(run: Run, path: Path) -> list[StoredBatch]:
    """Read a log to its end, with all checks."""

    async def read() -> list[StoredBatch]:
        opened = SqliteStore(path, create=False)
        try:
            return await read_all(opened)
        finally:
            await opened.aclose()

    found: list[StoredBatch] = run(read)
    checker = ChainChecker()
    for stored in found:
        checker.check(stored.batch)
        items_of(stored.batch)
    return found


def written(folder: Path, run: Run, some: list[Batch], settle: bool = True) -> None:
    """Make a store with these batches, and close it; without `settle` they stay in the write-ahead file."""

    async def write() -> None:
        opened = SqliteStore(folder)
        await opened.append(some)
        await opened.aclose()

    if settle:
        run(write)
        return
    aside = folder.with_name("aside")
    opened = SqliteStore(aside)
    run(opened.append, some)
    shutil.copytree(aside, folder)
    run(opened.aclose)


def python(script: str, *arguments: object, **options: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
        **options,
    )


def output(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert not err
    return out


# opening


@pytest.mark.parametrize("url", ["", "sqlite:", "a\0b"])
def test_no_path(url: str) -> None:
    with pytest.raises(InvalidValue, match="names no store"):
        open_store(url)


@pytest.mark.parametrize(
    "url", ["nats://localhost", "postgresql://u@h/db", "postgres://h", "sqlite://runs", "http://a/b"]
)
def test_unknown_stores(url: str) -> None:
    with pytest.raises(StoreUnavailable, match="has no store for"):
        open_store(url)


def test_an_unknown_home() -> None:
    with pytest.raises(StoreUnavailable, match=r"write \./~nobody-of-that-name"):
        open_store("~nobody-of-that-name/runs")


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is taken from where the process is now, whatever it looks like."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert isinstance(open_store("memory:"), MemoryStore)
    folders = {}
    for url in (
        "runs",
        "sqlite:runs",
        f"sqlite:{tmp_path}/a b/ü",
        f"sqlite://{tmp_path}/c",
        "C:/x",
        "sqlite:~/r",
        "a?b#c%20",
    ):
        opened = open_store(url)
        assert isinstance(opened, SqliteStore)
        folders[url] = opened.folder.relative_to(tmp_path).as_posix()
        assert opened.folder.is_dir()
    assert list(folders.values()) == ["runs", "runs", "a b/ü", "c", "C:/x", "home/r", "a?b#c%20"]


def test_odd_paths_hold_a_log(tmp_path: Path, run: Run) -> None:
    """Characters that mean something in a URI mean nothing in a path."""
    path = tmp_path / "a?mode=ro#b%20 ü'"
    written(path, run, some_batches(2))
    assert len(everything(run, path)) == 2
    assert {file.name for file in path.iterdir()} == {"log.db", "log.mark"}


def test_bad_places(tmp_path: Path) -> None:
    """What is wrong with a path is said when it is opened, not at the first append."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "odd" / "log.db").mkdir(parents=True)
    for path, message in {
        tmp_path / "file": "is a file, and a store is a folder",
        tmp_path / "file" / "below": "can't be made",
        tmp_path / "odd": "is a folder where the log should be",
        tmp_path
        / ("x" * 100 + "/")
        / "/".join("y" * 100 for _ in range(5)): "longer path than SQLite can open",
    }.items():
        with pytest.raises(StoreUnavailable, match=message):
            open_store(path)
    with pytest.raises(StoreUnavailable, match="there is no store in"):
        open_store(tmp_path / "new", create=False)
    assert not (tmp_path / "new").exists()


def test_an_empty_database_is_no_log_for_a_reader(folder: Path, run: Run) -> None:
    """A process killed before its first append leaves an empty file: no store to read, but one to write."""
    folder.mkdir()
    (folder / "log.db").touch()
    with pytest.raises(StoreUnavailable, match="holds no log yet"):
        everything(run, folder)
    written(folder, run, some_batches(1))
    assert len(everything(run, folder)) == 1


def test_other_files_are_refused(folder: Path, run: Run) -> None:
    folder.mkdir()
    file = folder / "log.db"
    file.write_bytes(b"not a database, but as long as one\n" * 100)
    with pytest.raises(LogDamaged, match="not a database"):
        everything(run, folder)
    file.unlink()
    other = sqlite3.connect(file)
    other.execute("CREATE TABLE batches (x)")
    other.close()
    with pytest.raises(StoreUnavailable, match="another program"):
        written(folder, run, some_batches(1))


def test_a_newer_format_is_refused(folder: Path, run: Run) -> None:
    written(folder, run, some_batches(1))
    raw = sqlite3.connect(folder / "log.db")
    raw.execute("PRAGMA user_version = 2")
    raw.close()
    with pytest.raises(FormatTooNew, match="upgrade eventrun"):
        everything(run, folder)
    with pytest.raises(FormatTooNew):
        written(folder, run, some_batches(1))


def test_nothing_is_imported_before_it_is_used() -> None:
    script = """
import sys
before = set(sys.modules)
import eventrun.stores.base, eventrun.stores.memory, eventrun.stores.sqlite
print(*{"sqlite3", "aiosqlite"} & set(sys.modules))
"""
    assert output(python(script)).split() == []


@pytest.mark.parametrize("package", ["hypothesis", "pytest"])
def test_the_suite_names_the_extra_that_it_needs(package: str) -> None:
    script = """
import sys
sys.modules[sys.argv[1]] = None
from eventrun.errors import MissingExtra
try:
    import eventrun.testing
except MissingExtra as error:
    print(error)
"""
    said = f"eventrun.testing needs the package {package}: pip install 'eventrun[testing]'"
    assert output(python(script, package)).strip() == said


def test_a_store_that_nobody_closed_lets_the_interpreter_end(folder: Path) -> None:
    script = """
import sys
from pathlib import Path
from eventrun.portal import Portal
from eventrun.stores.sqlite import SqliteStore
portal = Portal()
print(portal.call(SqliteStore(Path(sys.argv[1])).end).result())
import os, warnings
warnings.simplefilter("ignore")
"""
    assert output(python(script, folder)) == "0\n"


def test_debug_logging_stays_quiet(folder: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """A training that logs at level DEBUG sees nothing of each append."""
    with caplog.at_level("DEBUG"):
        written(folder, run, some_batches(2))
    assert not [record for record in caplog.records if record.name == "aiosqlite"]


# several processes

# Without eventrun.testing, which imports pytest and hypothesis: a second for each process.
_MAKE = """
import asyncio, os, sys, warnings
from pathlib import Path
from eventrun.codec import Stream, digest, encode_item, seal
from eventrun.errors import StoreUnavailable
from eventrun.events import MetricsLogged
from eventrun.stores.sqlite import SqliteStore

async def append(store, writer, count):
    stream = Stream("t/a", writer)
    first, previous = await store.tip(stream)
    for n in range(first + 1, first + count + 1):
        batch = seal(stream, n, 1, encode_item(n, MetricsLogged({"n": n})), n, n, previous)
        previous = digest(batch)
        yield await store.append([batch])

"""
_APPEND = (
    _MAKE
    + """
async def main():
    store = SqliteStore(Path(sys.argv[1]))
    async for _ in append(store, int(sys.argv[2]), int(sys.argv[3])):
        print(".", end="", flush=True)
    await store.aclose()

asyncio.run(main())
"""
)


def numbers(found: list[StoredBatch], writer: int) -> list[object]:
    batches_of_writer = [stored.batch for stored in found if stored.batch.header.writer == writer]
    return [event.values["n"] for batch in batches_of_writer for _, event in items_of(batch)]  # type: ignore[union-attr]


def test_two_processes(folder: Path, run: Run) -> None:
    """Two processes make the log and append 200 batches each: none is lost, positions have no gaps."""
    processes = [python(_APPEND, folder, writer, 200) for writer in (1, 2)]
    for process in processes:
        output(process)
    found = everything(run, folder)
    assert [stored.position for stored in found] == list(range(1, 401))
    assert numbers(found, 1) == numbers(found, 2) == list(range(1, 201))


@pytest.mark.crash
def test_killed_in_the_middle(folder: Path, run: Run) -> None:
    """After kill -9 at any moment the log holds at least all acknowledged batches, and at most one more."""
    held = 0
    rng = random.Random(0)
    for _ in range(8):
        process = python(_APPEND, folder, 1, 100_000)
        assert process.stdout
        begun = process.stdout.read(1)
        time.sleep(rng.random() * 0.05)
        process.kill()
        acknowledged = held + len(
            begun + process.stdout.read()
        )  # communicate() would miss what read() has buffered
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        values = numbers(everything(run, folder), 1)
        assert values == list(range(1, len(values) + 1))
        assert acknowledged <= len(values) <= acknowledged + 1
        held = len(values)
    assert held > 8


def test_forked(folder: Path, run: Run) -> None:
    """A fork's child opens connections of its own and leaves its parent's alone."""
    script = """
store = SqliteStore(Path(sys.argv[1]))

async def five(writer, close=False):
    ends = [end async for end in append(store, writer, 5)]
    if close:
        await store.settle()
        await store.aclose()
    return ends[-1]

asyncio.run(five(1))
warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12: other threads exist
child = os.fork()
if child == 0:
    asyncio.run(five(2, close=True))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(asyncio.run(five(3, close=True)))
"""
    assert output(python(_MAKE + script, folder)) == "15\n"
    found = everything(run, folder)
    assert [numbers(found, writer) for writer in (1, 2, 3)] == [[1, 2, 3, 4, 5]] * 3


def test_a_locked_log_is_waited_for(store: SqliteStore, folder: Path, run: Run) -> None:
    """While another process holds the log an append waits; nobody sees 'database is locked'."""
    first, second = some_batches(2)
    run(store.append, [first])
    other = sqlite3.connect(folder / "log.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.3, other.execute, ["ROLLBACK"])
    timer.start()
    assert run(store.append, [second]) == 6
    timer.join()
    other.close()


def test_a_log_that_stays_locked(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locked for too long, an append fails, says why, and can be repeated on the same store."""
    monkeypatch.setattr(connection, "BUSY_S", 0.1)
    opened = SqliteStore(folder)
    first, second = some_batches(2)
    run(opened.append, [first])
    other = sqlite3.connect(folder / "log.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match=r"another process has held it for 0.1 s"):
        run(opened.append, [second])
    assert run(opened.end) == 3  # reading goes on
    other.close()
    assert run(opened.append, [second]) == 6
    run(opened.aclose)


def test_a_cancelled_append_is_finished(store: SqliteStore, run: Run) -> None:
    """Who gives up waiting doesn't leave a half-written batch or a stuck store."""
    some = some_batches(20)

    async def impatient() -> None:
        for batch in some:
            task = asyncio.ensure_future(store.append([batch]))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])

    run(impatient)
    assert run(store.append, some) == 60
    assert [stored.batch for stored in run(read_all, store)] == some


# places where nothing can be written, or that vanish

_READ = (
    _MAKE
    + """
import aiosqlite, sqlite3, urllib.parse  # afterwards nothing more can be imported, perhaps
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)

async def main():
    store = SqliteStore(Path(sys.argv[1]), create=len(sys.argv) > 2)
    try:
        found = await store.read()
        print(len(found), await store.end(), await store.lost_tail())
        async for _ in append(store, 9, 1):
            pass
    finally:
        await store.aclose()

try:
    asyncio.run(main())
except StoreUnavailable as error:
    print(error)
"""
)


@pytest.fixture
def shown() -> Iterator[Path]:
    """Return a folder that other users may look into; pytest's own can't be."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def as_nobody(path: Path, *arguments: str) -> str:
    """Run _READ as a user for whom the bits of permissions count: nobody for root, else this one."""
    return output(python(_READ, path, *arguments))


def make_read_only(folder: Path) -> None:
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)


needs_permissions = pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")


@needs_permissions
def test_a_read_only_place(shown: Path, run: Run) -> None:
    """A log that this user can't write is read as it is, and an append says why it can't be."""
    written(shown / "runs", run, some_batches(5))
    make_read_only(shown / "runs")
    out = as_nobody(shown / "runs").splitlines()
    assert out[0] == "5 15 None"
    assert "opened to read only" in out[1]
    assert {file.name for file in (shown / "runs").iterdir()} == {"log.db", "log.mark"}


@needs_permissions
def test_a_read_only_place_while_it_is_written(shown: Path, run: Run) -> None:
    """Another user's log is read while its owner appends, the newest batches included."""
    opened = SqliteStore(shown / "runs")
    run(opened.append, some_batches(5))
    make_read_only(shown / "runs")
    assert as_nobody(shown / "runs").splitlines()[0] == "5 15 None"
    run(opened.aclose)


@needs_permissions
def test_a_read_only_place_with_a_write_ahead_file(shown: Path, run: Run) -> None:
    """Events that lie in a write-ahead file nobody can read are not passed over in silence."""
    folder = shown / "runs"
    written(folder, run, some_batches(5), settle=False)
    (folder / "log.db-shm").unlink()
    make_read_only(folder)
    assert "holds the newest events" in as_nobody(folder)
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
    assert len(everything(run, folder)) == 5


@needs_permissions
def test_no_permission(shown: Path) -> None:
    (shown / "closed").mkdir(mode=0)
    assert "can't be made" in as_nobody(shown / "closed" / "runs", "create")
    assert "there is no store in" in as_nobody(shown / "closed" / "runs")
    (shown / "runs").mkdir(mode=0o755)
    (shown / "runs" / "log.db").touch(mode=0)
    assert "can't be read by this user" in as_nobody(shown / "runs")
    (shown / "runs" / "log.db").unlink()
    (shown / "runs").chmod(0o555)
    assert "can't be written" in as_nobody(shown / "runs", "create")


def test_a_folder_deleted_while_open(store: SqliteStore, folder: Path, run: Run) -> None:
    """An append into a deleted file would be lost: it is an error, and no new log is begun in its place."""
    first, second = some_batches(2)
    run(store.append, [first])
    shutil.rmtree(folder)
    with pytest.raises(StoreUnavailable, match="moved or deleted"):
        run(store.append, [second])
    assert not folder.exists()


def test_a_folder_moved_and_put_back(store: SqliteStore, folder: Path, run: Run) -> None:
    first, second = some_batches(2)
    run(store.append, [first])
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(StoreUnavailable, match="moved or deleted"):
        run(store.append, [second])
    folder.with_name("elsewhere").rename(folder)
    assert run(store.append, [second]) == 6


# failing disks


class _Failing(sqlite3.Connection):
    """A connection on which one statement fails, once."""

    fail: tuple[str, int] | None = None  # the statement's beginning and SQLite's code
    after = False  # whether the statement has its effect all the same
    opened = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        type(self).opened += 1

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        if self.fail is not None and sql.lstrip().startswith(self.fail[0]):
            if self.after:
                super().execute(sql, *arguments)
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode, error.sqlite_errorname = self.fail[1], "TEST"
            type(self).fail = None
            raise error
        return super().execute(sql, *arguments)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[_Failing]:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, factory=_Failing, **k))
    monkeypatch.setattr(_Failing, "fail", None)
    monkeypatch.setattr(_Failing, "opened", 0)
    monkeypatch.setattr(_Failing, "after", False)
    return _Failing


@pytest.mark.parametrize("statement", ["BEGIN", "INSERT", "COMMIT"])
@pytest.mark.parametrize("stored_all_the_same", [False, True])
def test_a_failed_commit(
    failing: type[_Failing], store: SqliteStore, run: Run, statement: str, stored_all_the_same: bool
) -> None:
    """A connection that failed is never used again; what the caller appends again is in the log once."""
    first, second, third = some_batches(3)
    run(store.append, [first])
    opened = failing.opened
    failing.fail = (statement, sqlite3.SQLITE_IOERR_FSYNC)
    failing.after = stored_all_the_same
    with pytest.raises(StoreUnavailable, match="the disk failed"):
        run(store.append, [second])
    assert run(store.append, [second, third]) == 9
    assert failing.opened == opened + 1
    assert [stored.batch for stored in run(read_all, store)] == [first, second, third]


def test_a_repeat_alone_is_synced(failing: type[_Failing], store: SqliteStore, run: Run) -> None:
    """That a batch can be seen doesn't mean that it was synced, so a repeat commits something too."""
    some = some_batches(1)
    run(store.append, some)
    failing.fail = ("PRAGMA user_version", sqlite3.SQLITE_IOERR)
    with pytest.raises(StoreUnavailable):
        run(store.append, some)


def test_a_failed_connection_is_closed_last(failing: type[_Failing], store: SqliteStore, run: Run) -> None:
    """SQLite never forgets where the write-ahead file ends: the failed connection waits until another is open."""
    first, second = some_batches(2)
    run(store.append, [first])
    (raw,) = run(store._writer.run, lambda raw: [raw])
    failing.fail = ("COMMIT", sqlite3.SQLITE_IOERR_FSYNC)
    with pytest.raises(StoreUnavailable):
        run(store.append, [second])
    assert raw.total_changes  # a closed one would raise
    assert (store.folder / "log.db-wal").exists()
    run(store.append, [second])
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        raw.total_changes  # noqa: B018


def test_nothing_is_written_behind_what_others_left(store: SqliteStore, run: Run, tmp_path: Path) -> None:
    """What a killed process left in the write-ahead file is brought to the database before the first append."""
    first, second, third = some_batches(3)
    run(store.append, [first, second])
    left = tmp_path / "left"
    shutil.copytree(store.folder, left)
    before = (left / "log.db-wal").read_bytes()
    opened = SqliteStore(left)
    run(opened.append, [third])
    assert (left / "log.db-wal").read_bytes()[:24] != before[:24]  # begun anew
    assert [stored.batch for stored in run(read_all, opened)] == [first, second, third]
    run(opened.aclose)


def test_a_full_disk(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk nothing is half-written; with space again the same append succeeds."""
    full = [*connection.TO_APPEND, "PRAGMA max_page_count = 20"]
    monkeypatch.setattr(eventrun.stores.sqlite, "TO_APPEND", full)
    opened = SqliteStore(folder)
    some = chain(
        STREAM, [[(n, MetricsLogged({"x": random.Random(n).randbytes(9000).hex()}))] for n in range(9)]
    )

    def one_by_one() -> None:
        for batch in some:
            run(opened.append, [batch])

    with pytest.raises(StoreUnavailable, match="the disk is full"):
        one_by_one()
    assert 1 < run(opened.end) < 9
    full[-1] = "PRAGMA max_page_count = 100000"
    assert run(opened.append, some) == 9
    run(opened.aclose)
    assert [stored.batch for stored in everything(run, folder)] == some


def test_the_write_ahead_file_stays_bounded(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody calls settle, appends checkpoint by themselves, also when a reader has hindered it for a while."""
    limit = 100_000
    monkeypatch.setattr(eventrun.stores.sqlite, "WAL_BYTES", limit)
    monkeypatch.setattr(connection, "WAL_BYTES", limit)
    monkeypatch.setattr(
        eventrun.stores.sqlite, "TO_APPEND", [*connection.TO_APPEND, f"PRAGMA journal_size_limit = {limit}"]
    )
    opened = SqliteStore(folder)
    wal = folder / "log.db-wal"
    some = some_batches(300)
    for batch in some[:100]:
        run(opened.append, [batch])
        assert wal.stat().st_size < 1.3 * limit
    reader = sqlite3.connect(folder / "log.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM batches").fetchall()
    for batch in some[100:200]:
        run(opened.append, [batch])
    assert wal.stat().st_size > 2 * limit
    reader.close()
    for batch in some[200:]:
        run(opened.append, [batch])
    assert wal.stat().st_size < 2 * limit
    run(opened.aclose)
    assert [stored.batch for stored in everything(run, folder)] == some


def test_nobody_commits_during_a_checkpoint(store: SqliteStore, folder: Path, run: Run) -> None:
    """SQLite up to 3.51.2 can lose a commit that is made while another connection checkpoints."""
    some = some_batches(2)
    run(store.append, some[:1])
    other = sqlite3.connect(folder / "log.db", isolation_level=None, timeout=0)
    refused = []

    class Watched:
        def execute(self, sql: str) -> sqlite3.Cursor:
            assert "wal_checkpoint" in sql
            with pytest.raises(sqlite3.OperationalError, match="locked") as caught:
                other.execute("BEGIN IMMEDIATE")
            refused.append(caught.value)
            return other.execute(sql)

    assert connection.Log(folder / "log.db", create=False).checkpoint(Watched())  # type: ignore[arg-type]
    assert refused
    for automatic in run(store._writer.run, lambda raw: raw.execute("PRAGMA wal_autocheckpoint").fetchone()):
        assert automatic == 0
    other.close()
    assert run(store.append, some[1:]) == 6


# damage


def frames_in(folder: Path, some: list[Batch]) -> tuple[bytearray, list[int]]:
    data = bytearray((folder / "log.db").read_bytes())
    return data, [data.index(batch.frame) for batch in some]


def test_a_damaged_header(folder: Path, run: Run) -> None:
    """First the good batches before it are read, then LogDamaged names its positions, and reading goes on past them."""
    some = some_batches(5)
    written(folder, run, some)
    data, places = frames_in(folder, some)
    data[places[2] + 5] ^= 1
    (folder / "log.db").write_bytes(data)

    async def read() -> None:
        opened = SqliteStore(folder)
        for subject in (None, "t/a"):
            assert [stored.position for stored in await opened.read(subject=subject)] == [1, 4]
            with pytest.raises(LogDamaged, match="fails its checksum") as caught:
                await opened.read(6, subject=subject)
            assert caught.value.where == ("positions 7..9",)
            assert [stored.position for stored in await opened.read(9, subject=subject)] == [10, 13]
        await opened.aclose()

    run(read)


def test_a_damaged_payload(folder: Path, run: Run) -> None:
    """Whoever unpacks a batch notices."""
    some = some_batches(3)
    written(folder, run, some)
    data, places = frames_in(folder, some)
    data[places[1] + len(some[1].frame) - 5] ^= 1
    (folder / "log.db").write_bytes(data)
    with pytest.raises(LogDamaged):
        everything(run, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("UPDATE batches SET first = 99 WHERE position = 4", "positions 4..6: the index says"),
        ("UPDATE batches SET count = 4 WHERE position = 4", "positions 4..7: the index says"),
        ("UPDATE batches SET count = x'00' WHERE position = 4", "positions 4..6 are missing"),
        ("UPDATE batches SET frame = 'text' WHERE position = 4", "positions 4..6: a batch's header"),
        ("UPDATE streams SET writer = 5", "positions 1..3: the index says"),
        ("DELETE FROM streams", "positions 1..3: the index says"),
        ("DELETE FROM batches WHERE position = 4", "positions 4..6 are missing"),
        ("DELETE FROM batches WHERE position = 1", "positions 1..3 are missing"),
        ("UPDATE batches SET position = 3 WHERE position = 4", "positions 6..6 are missing"),
        ("UPDATE streams SET subject = CAST(x'fffe' AS TEXT)", "decode"),
        ("DROP TABLE batches", "no such table"),
    ],
)
def test_what_the_index_says_is_checked(folder: Path, run: Run, change: str, message: str) -> None:
    written(folder, run, some_batches(3))
    raw = sqlite3.connect(folder / "log.db", isolation_level=None)
    raw.execute(change)
    raw.close()
    with pytest.raises(LogDamaged, match=message):
        everything(run, folder)


def test_a_damaged_tip(folder: Path, run: Run) -> None:
    """A stream whose last batch is damaged is not appended to; others are."""
    some = some_batches(3)
    written(folder, run, some[:2])
    data, places = frames_in(folder, some[:2])
    data[places[1] + 5] ^= 1
    (folder / "log.db").write_bytes(data)
    opened = SqliteStore(folder)
    with pytest.raises(LogDamaged, match=r"the last batch of t/a@0000000000000001"):
        run(opened.append, [some[2]])
    assert run(opened.append, some_batches(1, Stream("t/b", 1))) == 9
    run(opened.aclose)


def told(found: list[StoredBatch]) -> list[object]:
    """What batches say. Their bytes may differ: the last bits of a compressed payload mean nothing."""
    return [(stored.position, stored.batch.header, items_of(stored.batch)) for stored in found]


@pytest.mark.crash
def test_flipped_bits_are_noticed(tmp_path: Path, run: Run) -> None:
    """A flipped bit anywhere in log.db changes nothing that is read, or is reported; it is never another exception."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    some = [*some_batches(20), *some_batches(20, Stream("t/b", 2**64 - 1))]
    written(good, run, some)
    data = (good / "log.db").read_bytes()
    mark = (good / "log.mark").read_bytes()
    expected = told(everything(run, good))
    rng = random.Random(1)
    noticed = 0

    async def look() -> list[list[StoredBatch]]:
        opened = SqliteStore(bad, create=False)
        try:
            whole = await read_all(opened)
            lost = await opened.lost_tail()
            wrong = await opened.check()
            if lost or wrong:
                raise LogDamaged(f"{lost} {wrong}")
            return [whole, await read_all(opened, subject="t/a"), await read_all(opened, subject="t/b")]
        finally:
            await opened.aclose()

    for _ in range(300):
        bit = rng.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        shutil.rmtree(bad, ignore_errors=True)
        bad.mkdir()
        (bad / "log.db").write_bytes(flipped)
        (bad / "log.mark").write_bytes(mark)
        try:
            whole, a, b = map(told, run(look))
        except StoreError:
            noticed += 1
        else:
            assert (whole, a, b) == (expected, expected[:20], expected[20:]), f"bit {bit}"
    assert noticed > 50


def test_check(store: SqliteStore, folder: Path, run: Run) -> None:
    """SQLite's own check finds an index that doesn't fit its table."""
    run(store.append, some_batches(3))
    assert run(store.check) == []
    raw = sqlite3.connect(folder / "log.db", isolation_level=None)
    raw.execute("PRAGMA writable_schema = ON")
    raw.execute("UPDATE sqlite_master SET rootpage = 3 WHERE name = 'batches_of_stream'")
    raw.close()
    run(store.aclose)

    async def check() -> list[str]:
        opened = SqliteStore(folder)
        try:
            return await opened.check()
        finally:
            await opened.aclose()

    try:
        assert run(check)
    except LogDamaged:
        pass


# mark, settle, backup


def test_a_lost_tail(folder: Path, run: Run) -> None:
    """A log that is shorter than its mark says is told from one that never was longer."""
    some = some_batches(4)
    written(folder, run, some[:2])
    short = (folder / "log.db").read_bytes()
    written(folder, run, some)
    (folder / "log.db").write_bytes(short)
    opened = SqliteStore(folder)
    assert run(opened.lost_tail) == (12, 6)
    run(opened.append, [some[2]])
    assert run(opened.lost_tail) == (12, 9), "an append must not hide what is lost still"
    run(opened.append, [some[3]])
    assert run(opened.lost_tail) is None
    run(opened.aclose)


@pytest.mark.parametrize("record", [b"", b"x" * 20, b"eventrun" + b"\0" * 12, None])
def test_a_bad_mark(folder: Path, run: Run, record: bytes | None) -> None:
    """A missing or torn mark says nothing, and is written anew."""
    some = some_batches(2)
    written(folder, run, some[:1])
    mark = folder / "log.mark"
    assert Mark(mark).read() == 3
    if record is None:
        mark.unlink()
    else:
        mark.write_bytes(record)
    opened = SqliteStore(folder)
    assert run(opened.lost_tail) is None
    run(opened.append, some[1:])
    run(opened.aclose)
    assert Mark(mark).read() == 6


def test_a_mark_that_cannot_be_written(folder: Path, run: Run) -> None:
    """The mark is a help; an append doesn't fail for want of it."""
    folder.mkdir()
    (folder / "log.mark").mkdir()
    written(folder, run, some_batches(1))
    assert len(everything(run, folder)) == 1


def test_settled(store: SqliteStore, folder: Path, run: Run, tmp_path: Path) -> None:
    """What is settled stands in log.db alone, while appends go on."""
    some = some_batches(3)
    run(store.append, some[:2])
    run(store.settle)
    run(store.append, [some[2]])
    (tmp_path / "copy").mkdir()
    shutil.copy(folder / "log.db", tmp_path / "copy")
    assert [stored.batch for stored in everything(run, tmp_path / "copy")] == some[:2]


def flipped_wals(folder: Path, run: Run, tries: int) -> Iterator[list[StoredBatch]]:
    """As if all processes had died: change a byte of the write-ahead file, and read what is left of the log."""
    data = (folder / "log.db-wal").read_bytes()
    chance = random.Random(tries)
    for at in [*range(0, 64, 7), *(chance.randrange(len(data)) for _ in range(tries))]:
        left = folder.with_name("left")
        shutil.rmtree(left, ignore_errors=True)
        left.mkdir()
        shutil.copy(folder / "log.db", left)
        (left / "log.db-wal").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        yield everything(run, left)


@pytest.mark.parametrize("more", [0, 1, 5])
def test_damage_to_the_write_ahead_file_costs_nothing_that_is_settled(
    store: SqliteStore, folder: Path, run: Run, more: int
) -> None:
    """What is left is the log up to some append after the one that was settled last."""
    some = some_batches(60 + more)
    for batch in some[:60]:
        run(store.append, [batch])
    run(store.settle)
    for batch in some[60:]:
        run(store.append, [batch])
    for found in flipped_wals(folder, run, 30):
        assert len(found) >= 60
        assert [stored.batch for stored in found] == some[: len(found)]


def test_a_write_ahead_file_that_is_not_begun_anew_is_caught(
    store: SqliteStore, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: SQLite itself goes back to older pages."""
    monkeypatch.setattr(connection.Log, "_begin_wal_anew", lambda self, gate: True)
    for batch in some_batches(60):
        run(store.append, [batch])
    run(store.settle)
    assert any(len(found) < 60 for found in flipped_wals(folder, run, 30))


def test_a_reader_that_keeps_the_log_from_being_settled(
    store: SqliteStore, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eventrun.stores.sqlite, "SETTLE_S", 0.1)
    some = some_batches(2)
    run(store.append, [some[0]])
    reader = sqlite3.connect(folder / "log.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM batches").fetchall()
    run(store.append, [some[1]])
    with pytest.raises(StoreUnavailable, match="a reader has hindered the checkpoint"):
        run(store.settle)
    reader.close()
    run(store.settle)


def test_backup_while_appending(store: SqliteStore, folder: Path, run: Run, tmp_path: Path) -> None:
    """A backup is the log as it was at one moment; appends go on meanwhile."""
    some = some_batches(400)
    run(store.append, some[:100])
    out = tmp_path / "backups" / "one"

    async def both() -> None:
        backing_up = asyncio.ensure_future(store.backup(out))
        for batch in some[100:]:
            await store.append([batch])
        await backing_up

    run(both)
    copied = everything(run, out)
    assert len(copied) >= 100
    assert [stored.batch for stored in copied] == some[: len(copied)]
    assert Mark(out / "log.mark").read() == 3 * len(copied)
    assert len(everything(run, folder)) == 400
    opened = SqliteStore(out)
    assert run(opened.append, some[len(copied) :]) == 1200
    run(opened.aclose)


def test_a_backup_overwrites_nothing(store: SqliteStore, run: Run, tmp_path: Path) -> None:
    run(store.append, some_batches(1))
    (tmp_path / "empty").mkdir()
    run(store.backup, tmp_path / "empty")
    with pytest.raises(StoreUnavailable, match="not an empty folder"):
        run(store.backup, tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match="not an empty folder"):
        run(store.backup, tmp_path / "file")


# speed


def test_a_busy_thread_does_not_stop_appends(store: SqliteStore, run: Run) -> None:
    """1,000 streams in one append beside a thread that is busy in Python: far less than 5 ms for each row."""
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        many = [chain(Stream(f"t/{n}", 1), logged(1))[0] for n in range(1000)]
        began = time.perf_counter()
        run(store.append, many)
        assert time.perf_counter() - began < 3  # with executemany 2 to 5 s, here 0.1
    finally:
        stop.set()
        thread.join()


def test_tips_are_few_in_memory(store: SqliteStore, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a store remembers of streams is bounded, and forgetting changes nothing."""
    monkeypatch.setattr(batches, "MAX_KNOWN_STREAMS", 10)
    chains = [chain(Stream(f"t/{n}", 1), logged(1, 1)) for n in range(25)]
    for n in (0, 1):
        run(store.append, [chain_[n] for chain_ in chains])
        for chain_ in chains:
            assert run(store.append, [chain_[n]]) == 25 * (n + 1)
        assert len(store._appender._known) <= 25
    assert open_batch(chains[0][1].frame) == chains[0][1]


# what is gone


@pytest.mark.parametrize("how", ["deleted", "emptied", "all but the mark deleted"])
@pytest.mark.parametrize("create", [True, False])
def test_a_log_that_is_gone_is_not_begun_anew(folder: Path, run: Run, how: str, create: bool) -> None:
    """Where a mark says that there was a log, none is made silently; the error says what to do."""
    written(folder, run, some_batches(2))
    if how == "emptied":
        (folder / "log.db").write_bytes(b"")
    else:
        (folder / "log.db").unlink()
    with pytest.raises(LogDamaged, match=r"the log had 6 events: .*eventrun salvage OUT.*remove log\.mark"):
        SqliteStore(folder, create=create)
    assert not (folder / "log.db").exists() or not (folder / "log.db").stat().st_size
    (folder / "log.mark").unlink()
    if create:
        opened = SqliteStore(folder)
        assert run(opened.append, some_batches(1)) == 3
        run(opened.aclose)


def test_a_log_that_is_emptied_beside_its_write_ahead_file(folder: Path, run: Run) -> None:
    """SQLite would remove the write-ahead file, which holds events; so nothing is opened."""
    written(folder, run, some_batches(2), settle=False)
    wal = (folder / "log.db-wal").read_bytes()
    (folder / "log.db").write_bytes(b"")
    (folder / "log.mark").unlink()
    with pytest.raises(LogDamaged, match=r"stand in log\.db-wal beside it"):
        SqliteStore(folder)
    assert (folder / "log.db-wal").read_bytes() == wal


def test_a_log_that_is_gone_while_it_is_open(store: SqliteStore, folder: Path, run: Run) -> None:
    """A connection that has to be opened anew doesn't make another log."""
    run(store.append, some_batches(1))
    store._writer.log.close()
    (folder / "log.db").unlink()
    with pytest.raises(StoreError):
        run(store.append, some_batches(1))
    assert not (folder / "log.db").exists()


def test_damage_in_the_write_ahead_file_is_found(store: SqliteStore, folder: Path, run: Run) -> None:
    """A changed byte in any page of the present run but the last commit is told; what is whole isn't."""
    for batch in some_batches(12):
        run(store.append, [batch])
    file = folder / "log.db-wal"
    data = file.read_bytes()
    assert store.damage() == []
    copy = folder.with_name("copy")
    copy.mkdir()
    (copy / "log.db").write_bytes((folder / "log.db").read_bytes())
    for at in range(0, len(data) - 30_000, 997):
        (copy / "log.db-wal").write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        (found,) = SqliteStore(copy).damage()
        assert found.where == "log.db-wal"
        assert found.first is not None
        assert found.last is not None
        assert found.first <= at <= found.last
    (copy / "log.db-wal").write_bytes(data[:-2000])  # a tail that is being written
    assert SqliteStore(copy).damage() == []


def test_a_damaged_mark_is_found(store: SqliteStore, folder: Path, run: Run) -> None:
    run(store.append, some_batches(1))
    mark = bytearray((folder / "log.mark").read_bytes())
    assert store.damage() == []
    mark[-1] ^= 1
    (folder / "log.mark").write_bytes(mark)
    (found,) = store.damage()
    assert "log.mark" in str(found)


def test_damage_in_use_is_told_from_what_never_counted(store: SqliteStore, folder: Path, run: Run) -> None:
    """While the log is open its index says how far the write-ahead file counts; behind that nothing is damage."""
    for batch in some_batches(12):
        run(store.append, [batch])
    with (folder / "log.db-wal").open("r+b", buffering=0) as file:
        data = file.read()
        file.seek(5000)
        file.write(bytes([data[5000] ^ 1]))
        file.seek(len(data))
        file.write(data[32:])  # frames of this run, whose checksums don't follow
        assert [found.first for found in store.damage()] == [32 + 4120]
        file.seek(5000)
        file.write(bytes([data[5000]]))
        assert store.damage() == []
        assert [found.first for found in store.damage(tail_lost=True)] == [len(data)]
        file.truncate(len(data))
