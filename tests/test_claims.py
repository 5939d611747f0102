"""Declaring configurations, taking trials, giving back those of lost workers: one of many gets it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import eventrun
from eventrun.errors import AlreadyExists, InvalidValue, NotFound
from eventrun.events import Heartbeat

MANY = 20  # processes


def many(code: str, *arguments: str) -> list[Any]:
    """Run a script in many processes at once and return what each printed, as JSON."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    started = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(MANY)]
    answers = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0] * MANY
    return [json.loads(answer) for answer in answers]


def test_the_same_configuration_is_declared_once(tmp_path: Path) -> None:
    """Key order doesn't matter, types do; None, an error or the next attempt, as one likes."""
    with eventrun.open(tmp_path / "runs", quiet=True) as client:
        first = client.declare("p", params={"lr": 0.1, "opt": {"a": 1, "b": -2}}, name="n").result()
        assert first is not None
        same = {"opt": {"b": -2, "a": 1}, "lr": 0.1}
        assert client.declare("p", params=same, name="n").result() is None
        with pytest.raises(AlreadyExists, match=first.id):
            client.declare("p", params=same, name="n", if_exists="error").result()
        again = client.declare("p", params=same, name="n", if_exists="attempt", tags=["t"]).result()
        assert again is not None
        assert again.attempt == 2
        for other in ({"lr": 0.1, "opt": {"a": True, "b": -2}}, {"lr": 0.1}, {}, {"lr": 1}, {"lr": 1.0}):
            assert client.declare("p", params=other, name="n").result() is not None
        for more in ({"group": "g"}, {"version": "2"}):
            assert client.declare("p", params=same, name="n", **more).result() is not None  # type: ignore[arg-type]
        assert client.declare("p", params=same, name="other").result() is not None
        assert client.declare("q", params=same, name="n").result() is not None
        with again:
            again.log(loss=1)
        states = list(
            client.trials(where={"attempt": {"$gte": 1}, "params.opt.b": -2, "name": "n", "project": "p"})
        )
        assert [(state.attempt, state.status) for state in states][:2] == [(1, "created"), (2, "completed")]
        assert states[0].params == same
        assert states[1].tags == {"t": None}
        assert client.verify(views=True).result().ok


def test_what_cant_be_stored_fails_at_the_call(tmp_path: Path) -> None:
    """Nothing is claimed then."""
    with eventrun.open(tmp_path / "runs", quiet=True) as client:
        with pytest.raises(InvalidValue):
            client.declare("p", params={"x": 2**70})
        with pytest.raises(InvalidValue, match="if_exists"):
            client.declare("p", if_exists="maybe")
        assert list(client.trials()) == []


DECLARE = """
    import json, sys, eventrun
    with eventrun.open(sys.argv[1], quiet=True) as client:
        got = []
        for i in range(10):
            trial = client.declare("p", params={"i": i}, if_exists=sys.argv[2]).result()
            got.append(None if trial is None else [trial.id, trial.attempt])
    print(json.dumps(got))
"""


@pytest.mark.slow
@pytest.mark.parametrize("if_exists", ["none", "attempt"])
def test_many_processes_declare_the_same(tmp_path: Path, if_exists: str) -> None:
    """Of 20 processes that declare the same ten configurations one gets each, or each gets an attempt of its own."""
    answers = many(DECLARE, str(tmp_path / "runs"), if_exists)
    with eventrun.open(tmp_path / "runs", quiet=True) as client:
        states = {state.id: state for state in client.trials()}
        assert client.verify(views=True).result().ok
    for i in range(10):
        got = [answer[i] for answer in answers if answer[i] is not None]
        attempts = sorted(attempt for _, attempt in got)
        assert attempts == ([1] if if_exists == "none" else list(range(1, MANY + 1)))
        assert all(states[trial].params == {"i": i} and states[trial].attempt == n for trial, n in got)
    assert len(states) == sum(answer is not None for each in answers for answer in each)


def test_update_trial_takes_the_first(tmp_path: Path) -> None:
    """The first match is changed and given back; when there is none, NotFound."""
    with eventrun.open(tmp_path / "runs", quiet=True) as client:
        for n in range(3):
            client.trial("p", name=f"n{n}", params={"n": n})
        taken = client.update_trial("params.n > 0 and status == 'created'", "set_status", "Running").result()
        assert (taken.name, taken.status, taken.raw_status) == ("n1", "running", "Running")
        taken = client.update_trial(
            {"params.n": {"$gt": 0}, "status": "created"}, "set_status", "running"
        ).result()
        assert taken.name == "n2"
        with pytest.raises(NotFound):
            client.update_trial("params.n > 0 and status == 'created'", "set_status", "running").result()
        assert client.update_trial(None, "add_tags", "seen", by="me").result().tags == {
            "seen": None,
            "by": "me",
        }
        assert client.update_trial("name == 'n2'", "set_metadata", {"host": "h"}).result().metadata == {
            "host": "h"
        }
        with pytest.raises(InvalidValue, match="can't be done"):
            client.update_trial(None, "log", {"loss": 1})
        with pytest.raises(InvalidValue):
            client.update_trial("nothing", "set_status", "running")
        assert [state.status for state in client.trials()] == ["created", "running", "running"]


def test_a_function_chooses_and_records(tmp_path: Path) -> None:
    """What it records nothing of is passed by; several events about one trial come together."""
    with eventrun.open(tmp_path / "runs", quiet=True) as client:
        for n in range(3):
            client.trial("p", params={"n": [n]})

        def change(state: Any, trial: Any) -> None:
            if state.params["n"] == [1] and state.status == "created":
                trial.set_status("running")
                trial.set_metadata(by="me")

        taken = client.update_trial(None, change).result()
        assert (taken.params, taken.status, taken.metadata) == ({"n": [1]}, "running", {"by": "me"})
        with pytest.raises(NotFound):
            client.update_trial({}, change).result()


def test_what_is_claimed_overrules_what_was_said(tmp_path: Path) -> None:
    """A trial that has failed can be set back to created and taken again, by whomever."""
    with eventrun.open(tmp_path / "runs", quiet=True) as client:
        with pytest.raises(ArithmeticError), client.trial("p"):
            raise ArithmeticError
        again = client.update_trial("status == 'failed'", "set_status", "created").result()
        assert again.status == "created"
        with client.trial("p", resume=again.id):
            pass
        assert client.get(again.id).result().status == "completed"


def test_an_identity_is_declared_once(tmp_path: Path) -> None:
    """A text of one's own instead of the configuration: it gives the id, and the attempt is what it is told to be."""
    with eventrun.open(tmp_path / "runs", quiet=True) as client:
        first = client.declare("p", identity="mine", attempt=7, params={"n": 1}).result()
        assert first is not None
        assert (first.attempt, client.get(first).result().attempt) == (7, 7)
        assert client.declare("q", identity="mine", params={"n": 2}).result() is None
        with eventrun.open("memory:", quiet=True) as other:
            same = other.declare("q", identity="mine").result()
            assert same is not None
            assert same.id == first.id


def test_groups_and_projects_are_declared_once_and_updated(tmp_path: Path) -> None:
    """The first is told so; an update gets the first group for which it records something."""
    with eventrun.open(tmp_path / "runs", quiet=True) as client:
        assert client.declare_project("p", description="d").result()
        assert not client.declare_project("p", description="other").result()
        assert client.declare_group("p", "g", metadata={"n": 1}).result()
        assert not client.declare_group("p", "g").result()
        client.trial("p", group="native")
        assert not client.declare_group("p", "native").result()
        assert client.declare_group("q", "g").result()

        def change(state: Any, group: Any) -> None:
            if state.metadata.get("n") == 1:
                group.set_metadata(n=2)

        assert client.update_group(change).result().metadata == {"n": 2}
        with pytest.raises(NotFound):
            client.update_group(change, project="p").result()
        assert [project.description for project in client.projects()] == ["d", ""]
        assert [(group.project, group.name) for group in client.groups()] == [
            ("p", "g"), ("p", "native"), ("q", "g"),
        ]  # fmt: skip


TAKE = """
    import json, sys, eventrun
    got = []
    with eventrun.open(sys.argv[1], quiet=True) as client:
        try:
            while True:
                taken = client.update_trial("status == 'created'", "set_status", "running").result()
                got.append(taken.params["n"])
        except eventrun.NotFound:
            pass
    print(json.dumps(got))
"""


@pytest.mark.slow
def test_many_processes_take_each_trial_once(tmp_path: Path) -> None:
    """20 processes that take 500 created trials take each of them exactly once."""
    with eventrun.open(tmp_path / "runs", quiet=True) as client:
        for n in range(500):
            client.trial("p", params={"n": n})
    taken = Counter(n for got in many(TAKE, str(tmp_path / "runs")) for n in got)
    assert taken == Counter(range(500))


def test_a_silent_trial_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running trial of which nothing else is recorded has heartbeats; one that is created or finished has none."""
    monkeypatch.setattr("eventrun.recorder.HEARTBEAT_S", 0.2)
    with eventrun.open(tmp_path / "runs", quiet=True) as client:
        client.trial("p", name="waits")
        with client.trial("p", name="done") as done:
            done.log(loss=1)
        with client.trial("p", name="silent") as silent:
            silent.log(loss=1)
            found: set[str] = set()
            for stored in client.tail(after=0):
                if isinstance(stored.event, Heartbeat):
                    found.add(stored.stream.subject)
                    break
        assert found == {f"t/{silent.id}"}
        beats = [stored.stream.subject for stored in client.events() if isinstance(stored.event, Heartbeat)]
        assert set(beats) == {f"t/{silent.id}"}
        assert client.get("silent").result().status == "completed"


LOSE = """
    import os, sys, eventrun
    client = eventrun.open(sys.argv[1], quiet=True)
    taken = client.update_trial("status == 'created'", "set_status", "running").result()
    trial = client.trial("p", resume=taken.id)
    trial.log(loss=1.0)
    client.flush().result()
    os.kill(os.getpid(), 9)
"""


def test_trials_of_lost_workers_are_given_back_once(tmp_path: Path) -> None:
    """A killed worker's trial is lost; released it is created again and can be taken; releasing again does nothing."""
    with eventrun.open(tmp_path / "runs", quiet=True) as client:
        for n in range(3):
            client.trial("p", params={"n": n})
        client.flush().result()
        for _ in range(2):
            killed = subprocess.run([sys.executable, "-c", textwrap.dedent(LOSE), str(tmp_path / "runs")])
            assert killed.returncode == -9
        client.recovery().result()
        assert [state.status for state in client.trials()] == ["lost", "lost", "created"]
        assert [state.params["n"] for state in client.release_lost().result()] == [0, 1]
        assert [state.status for state in client.trials()] == ["created"] * 3
        assert client.release_lost().result() == []
        running = client.update_trial(None, "set_status", "running").result()
        assert client.release_lost(older_than=3600).result() == []
        assert [state.id for state in client.release_lost(older_than=1e-6).result()] == [running.id]
        with pytest.raises(InvalidValue):
            client.release_lost(older_than=-1)
