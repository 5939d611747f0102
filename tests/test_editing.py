"""Changing what is told: every change is one more event, nothing is removed, the past stays as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import eventrun
from eventrun.errors import NotFound


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Give a store with four trials of two projects."""
    path = tmp_path / "runs"
    with eventrun.open(path, quiet=True) as client:
        for n in range(4):
            with client.trial(f"p{n % 2}", group="g", name=f"n{n}", params={"n": n}) as trial:
                trial.log(loss=n)
    return path


def names(client: eventrun.Client, **chosen: object) -> list[str]:
    return [state.name for state in client.trials(**chosen)]  # type: ignore[arg-type]


def test_a_trial_gets_another_name(store: Path) -> None:
    """It is found by the new name and not by the old one; the past has the old one; the last name counts."""
    with eventrun.open(store, quiet=True) as client:
        before = client.rebuild().result()
        trial = client.edit("n1").result()
        trial.rename("best")
        assert trial.name == "best"
        assert client.get("best").result().id == trial.id
        with pytest.raises(NotFound):
            client.get("n1").result()
        assert client.get("best").result().status == "completed"
        assert client.at(position=before).get(trial.id).result().name == "n1"
        trial.rename("again")
        assert names(client, where="name == 'again'") == ["again"]
        assert client.verify(views=True).result().ok


def test_hidden_trials_are_shown_only_when_asked_for(store: Path) -> None:
    """They are in no list, summary or @latest, but under their id, among `hidden=True`, and in the past."""
    with eventrun.open(store, quiet=True) as client:
        before = client.rebuild().result()
        latest = client.get("@latest").result()
        assert latest.name == "n3"
        client.edit("n3").result().hide("a mistake")
        assert names(client) == ["n0", "n1", "n2"]
        assert names(client, hidden=True) == ["n0", "n1", "n2", "n3"]
        assert names(client, where="params.n > 1") == ["n2"]
        assert names(client, order_by="-params.n", limit=1) == ["n2"]
        assert client.get("@latest").result().name == "n2"
        assert client.get(latest.id).result().hidden
        assert [group.trials for group in client.groups()] == [2, 1]
        past = client.at(position=before)
        assert [state.name for state in past.trials()] == ["n0", "n1", "n2", "n3"]
        client.edit(latest.id).result().restore()
        assert names(client) == ["n0", "n1", "n2", "n3"]
        assert client.verify(views=True).result().ok


def test_a_hidden_project_hides_its_trials(store: Path) -> None:
    """Until it is restored; the trials themselves aren't changed."""
    with eventrun.open(store, quiet=True) as client:
        client.project("p1").hide()
        assert names(client) == ["n0", "n2"]
        assert names(client, project="p1") == []
        assert names(client, project="p1", hidden=True) == ["n1", "n3"]
        assert [state.project for state in client.projects()] == ["p0"]
        assert [state.hidden for state in client.projects(hidden=True)] == [False, True]
        client.project("p1").restore()
        assert names(client) == ["n0", "n1", "n2", "n3"]
        client.group("p0", "g").hide()
        assert [state.project for state in client.groups()] == ["p1"]
        assert len(list(client.groups(hidden=True))) == 2
        assert client.verify(views=True).result().ok


def run(store: Path, *arguments: str) -> tuple[int, str, str]:
    """Run a command line."""
    done = subprocess.run(
        [sys.executable, "-m", "eventrun", "--store", str(store), *arguments], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_line(store: Path) -> None:
    """mv, rm, restore, tag and note say what they did, and how to undo it."""
    assert run(store, "mv", "n0", "first")[2] == "n0 is called first now\n"
    code, out, _ = run(store, "rm", "--where", "params.n >= 2", "--dry-run")
    assert code == 0
    assert "n2" in out
    assert "n3" in out
    assert "first" not in out
    _, _, said = run(store, "rm", "--where", "params.n >= 2", "--reason", "old")
    assert said.startswith("2 trials hidden")
    assert "restore --where" in said
    assert "n2" not in run(store, "ls")[1]
    assert "n2" in run(store, "ls", "--hidden")[1]
    assert run(store, "restore", "n2")[2] == "1 trial shown again\n"
    assert "n2" in run(store, "ls")[1]
    assert run(store, "rm", "--project", "p0")[0] == 0
    assert run(store, "ls", "--project", "p0")[1] == ""
    assert run(store, "restore", "--project", "p0")[0] == 0
    assert "first" in run(store, "ls")[1]
    assert run(store, "tag", "first", "good", "owner=ann")[2] == "the tags of first: good, owner=ann\n"
    assert run(store, "tag", "first", "--remove", "good")[2] == "the tags of first: owner=ann\n"
    assert run(store, "note", "first", "looks good")[0] == 0
    assert "looks good" in run(store, "show", "first")[1]
    assert run(store, "rm")[0] == 2
    assert run(store, "tag", "first")[0] == 2
    assert run(store, "rm", "--project", "nothing")[0] == 1
    with eventrun.open(store, quiet=True) as client:
        assert [state.status for state in client.trials(hidden=True)] == ["completed"] * 4
