"""The end of the process: signals, exit, children of multiprocessing. See also test_client.py."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

import eventrun

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("EVENTRUN_")}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def run(code: str, *arguments: object, status: int = 0) -> tuple[str, str]:
    """Run code in a process of its own and return what it printed: stdout and stderr."""
    command = [sys.executable, "-c", "import os, signal, sys, threading, eventrun\n" + textwrap.dedent(code)]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=60, env=ENVIRONMENT
    )
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


def ends(store: Path) -> dict[str, tuple[str, Any]]:
    """How each trial ended, by name."""
    with eventrun.open(store, quiet=True) as client:
        return {state.name: (state.status, state.error) for state in client.trials()}


def journals(store: Path) -> list[str]:
    folder = store / "journals"
    return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []


# SIGTERM -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_handler_of_the_programs_own_stays(store: Path, when: str) -> None:
    """A handler for SIGTERM that the program has, or sets later, is the one that is called; the trial goes on."""
    out, _ = run(
        """
        def own(number, frame):
            print("own", flush=True)
        if sys.argv[2] == "before": signal.signal(signal.SIGTERM, own)
        with eventrun.open(sys.argv[1]) as client, client.trial("p", name="n") as trial:
            if sys.argv[2] == "after": signal.signal(signal.SIGTERM, own)
            assert signal.getsignal(signal.SIGTERM) is own
            os.kill(os.getpid(), signal.SIGTERM)
            trial.log(loss=1.0)
        assert signal.getsignal(signal.SIGTERM) is own
        """,
        store,
        when,
    )
    assert out == "own\n"
    assert ends(store) == {"n": ("completed", None)}


def test_ignored_stays_ignored(store: Path) -> None:
    """A program that ignores SIGTERM goes on ignoring it."""
    run(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with eventrun.open(sys.argv[1]) as client, client.trial("p", name="n") as trial:
            os.kill(os.getpid(), signal.SIGTERM)
            trial.log(loss=1.0)
        """,
        store,
    )
    assert ends(store) == {"n": ("completed", None)}


def test_a_thread_installs_no_handler(store: Path) -> None:
    """A client that another thread uses leaves SIGTERM alone; the next trial of the main one installs a handler."""
    run(
        """
        def work():
            with client.trial("p", name="thread") as trial:
                trial.log(loss=1.0)
        client = eventrun.open(sys.argv[1])
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        with client.trial("p", name="main") as trial:
            trial.log(loss=1.0)
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            os.kill(os.getpid(), signal.SIGTERM)
        """,
        store,
        status=-signal.SIGTERM,
    )
    assert ends(store) == {"thread": ("completed", None), "main": ("interrupted", "SIGTERM")}


def test_sigterm_tells_all_clients(store: Path, tmp_path: Path) -> None:
    """SIGTERM interrupts what runs in every open client; what has ended stays so."""
    run(
        """
        clients = [eventrun.open(path) for path in sys.argv[1:]]
        for client in clients:
            client.trial("p", name="running").log(loss=1.0)
            with client.trial("p", name="done"):
                pass
        closed = eventrun.open(sys.argv[1])
        closed.trial("p", name="closed").log(loss=1.0)
        closed.close()
        os.kill(os.getpid(), signal.SIGTERM)
        """,
        store,
        tmp_path / "other",
        status=-signal.SIGTERM,
    )
    told = {"running": ("interrupted", "SIGTERM"), "done": ("completed", None)}
    assert ends(tmp_path / "other") == told
    assert ends(store) == {**told, "closed": ("interrupted", "no finish")}


# exit ----------------------------------------------------------------------------------------------------------


def test_all_are_closed_at_exit(store: Path) -> None:
    """At exit every open client is closed, even if closing one of them fails, and that failure is shown."""
    _, err = run(
        """
        def fail():
            raise OSError("this one is broken")
        clients = []
        for name in ("a", "b", "c", "d"):
            client = eventrun.open(sys.argv[1])
            client.trial("p", name=name).log(loss=1.0)
            clients.append(client)
        for each in clients[1:3]:
            each.flush().result()
            each.close = fail
        """,
        store,
    )
    assert err.count("this one is broken") >= 1
    assert len(journals(store)) == 2
    found = ends(store)
    assert {name: found[name] for name in "ad"} == dict.fromkeys("ad", ("interrupted", "no finish"))
    assert {name: found[name][0] for name in "bc"} == dict.fromkeys("bc", "lost")
    assert journals(store) == []


def test_a_closed_client_is_forgotten(store: Path) -> None:
    """A client that was closed is not closed again at exit, and nothing keeps it in memory."""
    _, err = run(
        """
        import gc, weakref
        from eventrun import exits
        client = eventrun.open(sys.argv[1])
        client.trial("p").log(loss=1.0)
        assert list(exits._open) == [client]
        client.close()
        assert list(exits._open) == []
        client.close = lambda: os._exit(9)
        gone = weakref.ref(client)
        del client
        gc.collect()
        assert gone() is None
        left = eventrun.open(sys.argv[1])
        left.trial("p")
        """,
        store,
    )
    assert err == ""


def test_a_client_that_recorded_nothing_is_not_watched(store: Path) -> None:
    """Opening and reading changes nothing of the process: no handler, nothing to do at exit, no journal."""
    run("eventrun.open(sys.argv[1]).trial('p', name='n').log(loss=1.0)", store)
    run(
        """
        from eventrun import exits
        client = eventrun.open(sys.argv[1])
        assert client.get("n").result().status == "interrupted"
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert list(exits._open) == []
        """,
        store,
    )
    assert journals(store) == []


def test_exit_starts_no_thread(store: Path) -> None:
    """A client that recorded nothing but its trial's creation and was never flushed is drained at exit all the same."""
    _, err = run("trial = eventrun.open(sys.argv[1]).trial('p', name='n')", store)
    assert err == ""
    assert journals(store) == []
    assert ends(store) == {"n": ("created", None)}


# children of multiprocessing -----------------------------------------------------------------------------------

CHILDREN = """
import multiprocessing, sys
import eventrun

def work(store, rank):
    client = eventrun.open(store)
    trial = client.trial("p", name=f"n{rank}")
    trial.log(rank=rank)
    if rank == 1:
        raise SystemExit(5)
    if rank == 2:
        client.close()

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[2])
    children = [context.Process(target=work, args=(sys.argv[1], rank)) for rank in range(3)]
    for child in children: child.start()
    for child in children: child.join()
    assert [child.exitcode for child in children] == [0, 5, 0]
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_a_child_that_opens_a_client_and_returns(store: Path, tmp_path: Path, method: str) -> None:
    """A child that logs and returns, or exits, without closing leaves nothing behind, though it ends past atexit."""
    program = tmp_path / "program.py"
    program.write_text(CHILDREN)
    done = subprocess.run(
        [sys.executable, program, store, method],
        capture_output=True,
        text=True,
        timeout=60,
        env={**ENVIRONMENT, "PYTHONPATH": str(Path(eventrun.__file__).parent.parent)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert journals(store) == []
    assert ends(store) == {f"n{rank}": ("interrupted", "no finish") for rank in range(3)}


def test_a_child_remembers_a_client_once(store: Path) -> None:
    """In a child that makes many trials what is to be done at its end doesn't grow with them."""
    out, _ = run(
        """
        import multiprocessing, multiprocessing.util
        def work():
            with eventrun.open(sys.argv[1]) as client:
                for n in range(10):
                    with client.trial("p"):
                        pass
                    print(len(multiprocessing.util._finalizer_registry))
                sys.stdout.flush()
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join()
        """,
        store,
    )
    counts = out.split()
    assert len(counts) == 10
    assert len(set(counts)) == 1
    assert len(ends(store)) == 10


def test_a_grandchild_closes_too(store: Path) -> None:
    """A child's client that its own child inherits and logs with is closed by both."""
    run(
        """
        import multiprocessing
        context = multiprocessing.get_context("fork")
        def grandchild(trial):
            trial.log(rank=2)
        def child():
            client = eventrun.open(sys.argv[1])
            trial = client.trial("p", name="n")
            trial.log(rank=1)
            process = context.Process(target=grandchild, args=(trial,))
            process.start()
            process.join()
        process = context.Process(target=child)
        process.start()
        process.join()
        assert process.exitcode == 0
        """,
        store,
    )
    assert journals(store) == []
    with eventrun.open(store) as client:
        assert set(client.history("n", "rank").result().values) == {1, 2}


# the time that closing takes -----------------------------------------------------------------------------------


def test_a_dropped_client_is_closed_at_exit(store: Path) -> None:
    """A client that nobody refers to any more is closed at exit all the same: what it recorded ends well."""
    run(
        """
        import gc
        def work():
            eventrun.open(sys.argv[1]).trial("p", name="n").log(loss=1.0)
        work()
        gc.collect()
        """,
        store,
    )
    assert journals(store) == []
    assert ends(store) == {"n": ("interrupted", "no finish")}


@pytest.mark.parametrize("registered", ["before", "after"])
def test_a_trial_finished_at_exit(store: Path, registered: str) -> None:
    """A trial that the program finishes in a function of its own at exit is completed, whether that function was
    registered before the trial was begun or after, but not before eventrun was imported."""
    run(
        """
        import atexit
        def finish():
            trial.log(loss=2.0)
            trial.finish()
        if sys.argv[2] == "before": atexit.register(finish)
        trial = eventrun.open(sys.argv[1]).trial("p", name="n")
        trial.log(loss=1.0)
        if sys.argv[2] == "after": atexit.register(finish)
        """,
        store,
        registered,
    )
    assert ends(store) == {"n": ("completed", None)}


def test_a_question_that_takes_for_ever(store: Path) -> None:
    """Closing doesn't wait for a long question: all that was recorded is in the log, and the process ends."""
    _, err = run(
        """
        client = eventrun.open(sys.argv[1], close_timeout_s=0.2)
        client.trial("p", name="n").log(loss=1.0)
        client.flush().result()
        client._portal.read(threading.Event().wait)
        """,
        store,
    )
    assert err == ""
    assert journals(store) == []
    assert ends(store) == {"n": ("interrupted", "no finish")}


def test_a_reader_in_the_way(store: Path) -> None:
    """A close whose checkpoint is hindered by a reader leaves its journal; a trial that never began isn't lost then."""
    with eventrun.open(store, quiet=True) as client:
        client.trial("p", name="done").finish()
    reader = sqlite3.connect(store / "log.db", isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM batches").fetchone() != (0,)
    try:
        with eventrun.open(store, quiet=True, close_timeout_s=0.3) as client:
            client.trial("p", name="n")
        assert len(journals(store)) == 1
    finally:
        reader.close()
    assert ends(store) == {"done": ("completed", None), "n": ("created", None)}
    assert journals(store) == []


def test_a_close_on_another_thread_is_waited_for(store: Path) -> None:
    """Whoever closes while another thread does so comes back when all is in the log."""
    client = eventrun.open(store, quiet=True)
    trial = client.trial("p", name="n")
    for i in range(1000):
        trial.log(i=i)
    left: list[int] = []

    def close() -> None:
        client.close()
        left.append(client._recorder.left)

    threads = [threading.Thread(target=close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert left == [0] * 4
    assert journals(store) == []


def test_a_trial_that_begins_while_its_client_closes(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that another thread begins when the client has ended all others is interrupted too, not left running."""
    client = eventrun.open(store, quiet=True)
    client.trial("p", name="before").log(i=1)

    def meanwhile(seconds: float) -> list[str]:
        client.trial("p", name="meanwhile").log(i=1)
        client.trial("p", name="never begun")
        return []

    monkeypatch.setattr(client, "_unknown", meanwhile)
    client.close()
    assert journals(store) == []
    assert ends(store) == {
        **dict.fromkeys(["before", "meanwhile"], ("interrupted", "no finish")),
        "never begun": ("created", None),
    }
