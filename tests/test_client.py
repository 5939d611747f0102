"""The public API: open, record, read, go back, close; from sync code, asyncio and trio."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import eventrun
from eventrun.client import Client
from eventrun.codec import Stream
from eventrun.errors import InvalidValue
from eventrun.events import MetricsLogged, TrialCreated
from eventrun.testing import chain

NO_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("EVENTRUN_")}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def client(store: Path) -> Iterator[Client]:
    with eventrun.open(store, quiet=True) as opened:
        yield opened


def script(code: str, *arguments: object) -> list[str]:
    """A command that runs Python code, with eventrun imported."""
    return [sys.executable, "-c", "import os, sys, eventrun\n" + textwrap.dedent(code), *map(str, arguments)]


def values(client: Client, trial: str, metric: str) -> list[Any]:
    """All values of a metric, in order of arrival."""
    return list(client.history(trial, metric).result().values)


def run(code: str, *arguments: object) -> str:
    """Run code in a process of its own and return what it printed."""
    command = script(code, *arguments)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=NO_ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# recording and reading ------------------------------------------------------------------------------------------


def test_sync_round_trip(store: Path) -> None:
    """What a block recorded is read back, by the same client and by the next."""
    with eventrun.open(store) as client:
        with client.trial(
            "p", group="g", name="n", params={"lr": 0.1}, tags=["t"], description="d", version="1"
        ) as trial:
            trial.log(loss=2.0, step=1)
            trial.log(loss=1.0, step=2)
            with trial.chrono("c"):
                pass
        first = client.get(trial.id).result()
    with eventrun.open(store) as client:
        again = client.get(trial.id).result()
        series = client.history("n", "loss").result()
    assert first == again
    assert (again.project, again.group, again.name, again.description, again.version) == (
        "p",
        "g",
        "n",
        "d",
        "1",
    )
    assert (again.status, again.params, again.tags, again.late) == ("completed", {"lr": 0.1}, {"t": None}, 0)
    assert (again.metrics["loss"].count, again.metrics["loss"].last, again.metrics["loss"].min) == (
        2,
        1.0,
        1.0,
    )
    assert again.chronos["c"].count == 1
    assert (list(series.steps), list(series.values)) == ([1, 2], [2.0, 1.0])


async def test_async_round_trip(store: Path) -> None:
    """asyncio and trio await the same answers."""
    async with eventrun.open(store) as client:
        async with client.trial("p") as trial:
            trial.log(loss=1.0)
            await client.flush()
            assert (await client.get(trial)).status == "running"
        await trial.ready()
        assert [state.id async for state in client.trials()] == [trial.id]
        assert [state.id for state in await client.trials()] == [trial.id]
        first = await client.trials().first()
        assert first is not None
        assert first.status == "completed"
        kinds = [type(stored.event) async for stored in client.events(trial=trial)]
        assert kinds[0] is TrialCreated
        assert len(kinds) == 4


async def test_cancelled_block_still_drains(store: Path) -> None:
    """A cancelled scope records interrupted, and what was logged gets to the log all the same."""
    with anyio.move_on_after(0.05):
        async with eventrun.open(store) as client, client.trial("p") as trial:
            trial.log(loss=1.0)
            await anyio.sleep_forever()
    async with eventrun.open(store) as client:
        state = await client.get(trial.id)
        assert (state.status, state.metrics["loss"].count) == ("interrupted", 1)


async def test_a_tail_follows(store: Path) -> None:
    """A tail gives what is recorded after it began, by another client too, in order."""
    async with eventrun.open(store) as writer, eventrun.open(store) as reader:
        trial = writer.trial("p")
        trial.log(loss=0)
        await writer.flush()
        seen: list[Any] = []

        async def log_more() -> None:
            await anyio.sleep(0.3)
            for i in range(1, 4):
                trial.log(loss=i)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(log_more)
            with anyio.fail_after(20):
                async for stored in reader.tail(trial=trial.id):
                    assert isinstance(stored.event, MetricsLogged)
                    seen.append(stored.event.values["loss"])
                    if len(seen) == 3:
                        break
        assert seen == [1, 2, 3]


def test_reads_see_own_writes(client: Client) -> None:
    """Each read sees everything that this client recorded before, without any flush."""
    trial = client.trial("p")
    for i in range(50):
        trial.log(loss=i)
        assert client.get(trial).result().metrics["loss"].last == i


def test_an_unawaited_pending_loses_nothing(store: Path) -> None:
    """A flush that nobody waits for is done all the same."""
    with eventrun.open(store) as client:
        trial = client.trial("p")
        trial.log(loss=1.0)
        client.flush()
        client.get(trial)
    with eventrun.open(store) as client:
        assert client.get(trial.id).result().metrics["loss"].count == 1


def test_two_clients_in_one_process(store: Path) -> None:
    """Two clients on one store, one trial from both: each reads what both recorded once it is durable."""
    with eventrun.open(store) as one, eventrun.open(store) as two:
        trial = one.trial("p")
        trial.log(loss=1.0)
        one.flush().result()
        same = two.trial("p", resume=trial.id)
        same.ready().result()
        same.log(loss=2.0)
        two.flush().result()
        assert one.get(trial).result().metrics["loss"].count == 2
        assert two.get(trial).result() == one.get(trial).result()


def test_resuming_an_unknown_id(client: Client) -> None:
    """An unknown id is an error of ready(); something that isn't an id at all is one at once."""
    with pytest.raises(eventrun.NotFound, match="no trial '0000000000000000'"):
        client.trial("p", resume="0" * 16).ready().result()
    with pytest.raises(eventrun.InvalidValue, match="not a trial's id"):
        client.trial("p", resume="my-trial")


@pytest.mark.parametrize("name", ["a/b", "ü ß 漢字 🎈", "x" * 10_000, "a\nb", " padded "])
def test_odd_names(client: Client, name: str) -> None:
    """Names with slashes, unicode, new lines, and of ten kilobytes are kept as they are."""
    trial = client.trial(name, group=name, name=name, tags=[name], params={name: name})
    trial.log({name: 1.0})
    state = client.get(trial).result()
    assert (state.project, state.group, state.name) == (name, name, name)
    assert state.tags == {name: None}
    assert state.params == {name: name}
    assert list(state.metrics) == [name]
    assert [group.name for group in client.groups()] == [name]
    assert [found.project for found in client.projects()] == [name]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda c: c.trial(""), eventrun.InvalidValue),
        (lambda c: c.trial(3), eventrun.InvalidType),
        (lambda c: c.trial("p", name=" "), eventrun.InvalidValue),
        (lambda c: c.trial("p", name="x" * 10_241), eventrun.InvalidValue),
        (lambda c: c.trial("p", params=[1]), eventrun.InvalidType),
        (lambda c: c.trial("p", params={"x": object()}), eventrun.InvalidType),
        (lambda c: c.trial("p", description=1), eventrun.InvalidType),
        (lambda c: c.get(3), eventrun.InvalidValue),
        (lambda c: c.trials(limit=1.5), eventrun.InvalidType),
        (lambda c: c.trials(offset=-1), eventrun.InvalidValue),
        (lambda c: c.trials(project=3), eventrun.InvalidType),
        (lambda c: c.events(after=-1), eventrun.InvalidValue),
        (lambda c: c.tail(after=-1), eventrun.InvalidValue),
        (lambda c: c.history("t", 3), eventrun.InvalidType),
        (lambda c: c.get("\ud800"), eventrun.InvalidValue),
        (lambda c: c.at(), eventrun.InvalidValue),
        (lambda c: c.at(position=1, time=1), eventrun.InvalidValue),
        (lambda c: c.at(position=1.5), eventrun.InvalidType),
    ],
)
def test_bad_arguments(client: Client, call: Callable[[Client], object], error: type[Exception]) -> None:
    """A bad argument is an error at the call, and nothing of it is recorded."""
    with pytest.raises(error):
        call(client)
    assert list(client.trials()) == []


def test_finding_a_trial(client: Client) -> None:
    """Unknown names and ambiguous prefixes are errors that name candidates."""
    one, two = client.trial("p", name="alpha"), client.trial("p", name="alpha")
    assert client.get("@latest").result().id == two.id
    assert client.get(one.id[:8]).result().id == one.id
    with pytest.raises(eventrun.Ambiguous, match=one.id[:4]):
        client.get("alpha").result()
    with pytest.raises(eventrun.NotFound, match="alpha"):
        client.get("alphb").result()
    one.log(loss=1.0)
    with pytest.raises(eventrun.NotFound, match="loss"):
        client.history(one, "lass").result()


# the past, the views ------------------------------------------------------------------------------------------


def test_the_past(client: Client) -> None:
    """at() shows trials as they were at a position and at a time."""
    trial = client.trial("p", name="n")
    trial.log(loss=1.0, step=1)
    client.flush().result()
    position = client.get(trial).result().position
    between = time.time_ns()
    trial.log(loss=2.0, step=2)
    trial.finish()
    client.trial("p", name="later")
    for past in (client.at(position=position), client.at(time=between)):
        state = past.get(trial).result()
        assert (state.status, state.metrics["loss"].last) == ("running", 1.0)
        assert [found.name for found in past.trials()] == ["n"]
        assert list(past.history(trial, "loss").result().values) == [1.0]
    assert len(list(client.trials())) == 2


def test_deleted_views_come_back(store: Path) -> None:
    """Views that are deleted come back from the log, the same in every answer."""
    with eventrun.open(store) as client:
        for i in range(3):
            with client.trial("p", params={"i": i}) as trial:
                for step in range(100):
                    trial.log(loss=i / (step + 1), step=step)
        before = list(client.trials())
        assert client.verify(views=True).result().ok
    for path in store.glob("views*"):
        path.unlink()
    with eventrun.open(store) as client:
        assert list(client.trials()) == before
        client.rebuild().result()
        client.rebuild(before[0].id).result()
        assert list(client.trials()) == before
        assert client.verify(views=True).result().ok


def test_a_projection_of_ones_own(client: Client) -> None:
    """A registered projection is folded, caught up and rebuilt."""
    calls = eventrun.Projection(
        "calls",
        1,
        initial=int,
        apply=lambda n, stored: n + isinstance(stored.event, MetricsLogged),
        state=int,
    )
    client.register(calls)
    trial = client.trial("p")
    trial.log(loss=1.0)
    assert client.view("calls").result() == 1
    trial.log(loss=1.0)
    assert client.view("calls").result() == 2
    client.rebuild().result()
    assert client.view("calls").result() == 2
    with pytest.raises(eventrun.NotFound, match="calls"):
        client.view("cells").result()


# the end ------------------------------------------------------------------------------------------------------


def test_close_is_the_end(store: Path) -> None:
    """After close every call says that the client is closed; closing again does nothing."""
    client = eventrun.open(store)
    trial = client.trial("p")
    trial.log(loss=1.0)
    client.close()
    client.close()
    for call in (
        lambda: trial.log(loss=2.0),
        client.flush,
        lambda: client.get(trial),
        lambda: client.trial("p"),
    ):
        with pytest.raises(eventrun.Closed, match="open another"):
            call()


def test_left_without_a_finish(store: Path) -> None:
    """A trial that runs when its client closes is interrupted; one that never began stays created."""
    with eventrun.open(store) as client:
        running, waiting = client.trial("p"), client.trial("p")
        running.log(loss=1.0)
    with eventrun.open(store) as client:
        state = client.get(running.id).result()
        assert (state.status, state.error) == ("interrupted", "no finish")
        assert client.get(waiting.id).result().status == "created"


def test_a_script_that_never_closes(store: Path) -> None:
    """Interpreter exit drains: nothing is lost, the trial is interrupted, no journal is left."""
    run(
        "client = eventrun.open(sys.argv[1]); trial = client.trial('p', name='n'); trial.log(loss=1.0)", store
    )
    assert not any((store / "journals").iterdir())
    with eventrun.open(store) as client:
        state = client.get("n").result()
        assert (state.status, state.error, state.metrics["loss"].count) == ("interrupted", "no finish", 1)


def test_a_failing_script(store: Path) -> None:
    """An exception out of the blocks is recorded with its message."""
    command = script(
        """
        with eventrun.open(sys.argv[1]) as client, client.trial("p", name="n") as trial:
            trial.log(loss=1.0)
            raise ValueError("too steep")
        """,
        store,
    )
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 1
    with eventrun.open(store) as client:
        state = client.get("n").result()
        assert (state.status, state.error) == ("failed", "ValueError: too steep")


def test_sigterm(store: Path) -> None:
    """SIGTERM ends the process as always, and its trial is interrupted."""
    command = script(
        """
        import time
        with eventrun.open(sys.argv[1]) as client, client.trial("p", name="n") as trial:
            trial.log(loss=1.0)
            print("ready", flush=True)
            time.sleep(60)
        """,
        store,
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM
    with eventrun.open(store) as client:
        state = client.get("n").result()
        assert (state.status, state.error) == ("interrupted", "SIGTERM")


def test_a_resumed_trial_left_without_a_finish(store: Path) -> None:
    """A client that resumed a trial and closes without finishing it leaves it interrupted, unless another runs it."""
    with eventrun.open(store) as client:
        with client.trial("p") as trial:
            trial.log(loss=1.0)
        with client.trial("p") as shared:
            shared.log(loss=1.0)
            client.flush().result()
            with eventrun.open(store) as other:
                other.trial("p", resume=trial.id).log(loss=2.0)
                other.trial("p", resume=shared.id).log(loss=2.0)
            assert client.get(trial).result().status == "interrupted"
            assert client.get(shared).result().status == "running"


def test_an_unknown_id_is_told_at_close(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Closing a client that resumed an id unknown to the store says so; a known one isn't mentioned."""
    with eventrun.open(store) as client, client.trial("p") as trial:
        trial.log(loss=1.0)
    with eventrun.open(store) as client:
        client.trial("p", resume=trial.id).log(loss=2.0)
        client.trial("p", resume="0" * 16).log(loss=2.0)
    said = capfd.readouterr().err
    assert "no trial 0000000000000000" in said
    assert trial.id not in said


def test_what_is_lost_is_not_called_safe(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """When the store vanishes under a client, close says that events are lost, not that they are safe."""
    client = eventrun.open(store, close_timeout_s=0.5)
    client.trial("p").log(loss=1.0)
    client.flush().result()
    shutil.rmtree(store)
    client.trial("p").log(loss=2.0)
    client.close()
    assert "are LOST" in capfd.readouterr().err


def test_a_child_does_not_end_its_parents_trial(store: Path) -> None:
    """A forked child that leaves the block by an exception doesn't finish the trial of its parent."""
    run(
        """
        with eventrun.open(sys.argv[1], quiet=True) as client, client.trial("p", name="n") as trial:
            trial.log(rank=0)
            child = os.fork()
            if child == 0:
                raise SystemExit(0)
            os.waitpid(child, 0)
            assert client.get(trial).result().status == "running"
        """,
        store,
    )


def test_eight_processes_on_one_store(store: Path) -> None:
    """Eight processes log to one store, each its own trial and all of them one; nothing is lost or doubled."""
    with eventrun.open(store) as client:
        shared = client.trial("p", name="shared")
        code = """
            with eventrun.open(sys.argv[1], quiet=True) as client:
                shared = client.trial("p", resume=sys.argv[2])
                with client.trial("p", name="n" + sys.argv[3]) as own:
                    for i in range(500):
                        own.log(i=i, step=i)
                        shared.log(i=i, rank=int(sys.argv[3]), step=i)
        """
        started = [
            subprocess.Popen(script(code, store, shared.id, rank), env=NO_ENVIRONMENT) for rank in range(8)
        ]
        assert [process.wait(120) for process in started] == [0] * 8
        assert client.verify(views=True).result().ok
        for rank in range(8):
            assert values(client, f"n{rank}", "i") == list(range(500))
        both = zip(values(client, shared.id, "rank"), values(client, shared.id, "i"), strict=True)
        assert sorted(both) == [(rank, i) for rank in range(8) for i in range(500)]


def test_a_forked_child_is_another_writer(store: Path) -> None:
    """A fork's child logs to the same trial as a writer of its own; nothing is lost or doubled."""
    out = run(
        """
        client = eventrun.open(sys.argv[1])
        trial = client.trial("p", name="n")
        for i in range(100):
            trial.log(i=i)
        child = os.fork()
        for i in range(100):
            trial.log(i=1000 + i if child else 2000 + i)
        if child:
            os.waitpid(child, 0)
            client.close()
        else:
            client.flush().result()
            os._exit(0)
        """,
        store,
    )
    assert out == ""
    with eventrun.open(store) as client:
        assert sorted(values(client, "n", "i")) == [*range(100), *range(1000, 1100), *range(2000, 2100)]
        assert client.verify(views=True).result().ok


def test_multiprocessing_children_close(store: Path) -> None:
    """Children of multiprocessing that log and return leave no journal behind."""
    run(
        """
        import multiprocessing
        client = eventrun.open(sys.argv[1])
        trial = client.trial("p", name="n")
        def work(rank):
            trial.log(rank=rank)
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=work, args=(rank,)) for rank in range(4)]
        for child in children: child.start()
        for child in children: child.join()
        client.close()
        """,
        store,
    )
    assert not any((store / "journals").iterdir())
    with eventrun.open(store) as client:
        assert sorted(values(client, "n", "rank")) == [0, 1, 2, 3]


# places and the environment -----------------------------------------------------------------------------------


def test_bad_places(tmp_path: Path) -> None:
    """A store path that is a file, or a store that must exist and doesn't, is an error that says so."""
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(eventrun.StoreUnavailable, match="is a file"):
        eventrun.open(file)
    with pytest.raises(eventrun.StoreUnavailable, match="no store"):
        eventrun.open(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()


def test_memory_store() -> None:
    """The memory store serves the whole API, and promises no more than it can hold."""
    with eventrun.open("memory:") as client:
        with client.trial("p") as trial:
            trial.log(loss=1.0)
        assert client.get(trial).result().metrics["loss"].last == 1.0
        assert client.statistics().acknowledgement == "accepted"


def test_the_current_trial(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's trial is current in its task; elsewhere EVENTRUN_TRIAL names one that is joined."""
    assert eventrun.current_trial() is None
    with eventrun.open(store) as client, client.trial("p", name="n") as trial:
        assert eventrun.current_trial() is trial
        trial.log(rank=0)
        client.flush().result()
        monkeypatch.setenv("EVENTRUN_TRIAL", trial.id)
        monkeypatch.setenv("EVENTRUN_URL", str(store))
        code = "trial = eventrun.current_trial(); trial.log(rank=1); assert eventrun.current_trial() is trial"
        subprocess.run(script(code), check=True, timeout=60)
        assert sorted(values(client, trial.id, "rank")) == [0, 1]
        assert client.get(trial).result().status == "running"


def test_a_backup_is_a_store(client: Client, tmp_path: Path) -> None:
    """A backup made while a trial runs can be opened, and holds all that was recorded before."""
    trial = client.trial("p", name="n")
    trial.log(loss=1.0)
    client.backup(tmp_path / "saved").result()
    trial.log(loss=2.0)
    with eventrun.open(tmp_path / "saved", create=False) as saved:
        assert saved.get("n").result().metrics["loss"].count == 1


def test_statistics(client: Client) -> None:
    """Statistics count what was recorded and what is durable, and say what a log call promises."""
    trial = client.trial("p")
    for i in range(10):
        trial.log(i=i)
    client.flush().result()
    found = client.statistics()
    assert (found.recorded, found.durable, found.dropped, found.held_bytes) == (13, 13, 0, 0)
    assert found.acknowledgement == "crash_safe"
    assert found.journal_bytes > 0


def test_what_no_journal_holds_is_settled(client: Client, store: Path, tmp_path: Path) -> None:
    """What was appended past the journals stands in log.db itself when the call is through."""
    batch = chain(Stream("t/a", 0), [[(1, MetricsLogged({"a": 1}))]])[0]
    client.append([batch], expected={Stream("t/a", 0): 0}).result()
    (tmp_path / "copy").mkdir()
    shutil.copy(store / "log.db", tmp_path / "copy")
    with eventrun.open(tmp_path / "copy", quiet=True, create=False) as copy:
        assert [stored.batch for stored in copy.batches()] == [batch]


@pytest.mark.parametrize("named", ["nonsense", "0123", "l" * 16, " "])
def test_a_malformed_trial_in_the_environment_is_named(
    named: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The error names the variable."""
    monkeypatch.setenv("EVENTRUN_TRIAL", named)
    monkeypatch.setenv("EVENTRUN_URL", str(tmp_path))
    with pytest.raises(InvalidValue, match="EVENTRUN_TRIAL="):
        eventrun.current_trial()


@pytest.mark.parametrize("between", [1, "ab", (1,), (1, 2, 3), ("a", "b"), (float("nan"), 1), (True, 2), {}])
def test_bounds_that_are_none_are_refused_at_the_call(between: Any) -> None:
    with eventrun.open("memory:") as client, pytest.raises(InvalidValue, match="between="):
        client.history("x", "loss", between=between)


@pytest.mark.parametrize(
    "time",
    [
        2**63,
        -(2**70),
        "nonsense",
        "2025-11-21T12:30",
        1.5,
        float("nan"),
        True,
        b"x",
        [1],
        "0001-01-01T00:00+23:59",
    ],
)
def test_times_that_are_none_are_refused(time: Any) -> None:
    """A time that can't be one is an InvalidValue, or has nothing before it."""
    with eventrun.open("memory:") as client:
        try:
            assert list(client.at(time=time).trials()) == []
        except InvalidValue:
            pass
        else:
            assert str(time).startswith("0001")
