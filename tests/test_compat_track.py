"""Track's interface: every method of its protocol, its aggregators, its client; alone and with many processes."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import eventrun
from eventrun.compat.track import (
    Aggregator,
    BadQuery,
    ChronoNotStarted,
    CustomStatus,
    ItemNotFound,
    Project,
    Protocol,
    RingAggregator,
    StatAggregator,
    Status,
    TimeSeriesAggregator,
    TrackClient,
    Trial,
    TrialGroup,
    TrialLogger,
    UnknownProject,
    ValueAggregator,
    compute_hash,
    get_protocol,
    status,
)
from eventrun.compat.track.opening import url_of
from eventrun.compat.track.queries import fits, read_query
from eventrun.errors import InvalidType, InvalidValue

CROWD = 4  # processes at once, where few show what many would
MANY = 20


def run_many(code: str, count: int, *arguments: str) -> list[Any]:
    """Run a script in many processes at once and return what each printed, as JSON."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments]
    started = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(count)]
    answers = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0] * count
    return [json.loads(answer) for answer in answers]


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """Give a URI as Track's users write it."""
    return f"file://{tmp_path}/x.json?objective=loss"


@pytest.fixture
def protocol(uri: str) -> Iterator[Protocol]:
    """Give a protocol with a project "p"."""
    protocol = get_protocol(uri)
    protocol.new_project(Project(name="p"))
    yield protocol
    protocol.close()


def new(protocol: Protocol, **parameters: Any) -> Trial:
    """Insert a trial with these parameters."""
    trial = protocol.new_trial(Trial(parameters=parameters, project_id="p"))
    assert trial is not None
    return trial


def stored(protocol: Protocol, trial: Any) -> Trial:
    """Read a trial anew."""
    (found,) = protocol.fetch_trials({"uid": trial.uid})
    return found


NOBODY = Trial(_hash="nobody")


# the table: what each method does; what it does with a duplicate or with what is missing -----------------------------


def start(protocol: Protocol) -> None:
    trial = new(protocol)
    protocol.log_trial_start(trial)
    found = stored(protocol, trial)
    assert (found.status, found.chronos) == (Status.Running, {"runtime": ValueAggregator()})


def start_missing(protocol: Protocol) -> None:
    with pytest.raises(ItemNotFound, match=r"nobody_0.*new_trial"):
        protocol.log_trial_start(NOBODY)
    trial = new(protocol)
    protocol.log_trial_start(trial)
    protocol.log_trial_start(trial)  # twice is once
    protocol.log_trial_finish(trial)
    protocol.log_trial_start(trial)  # and it may be gone on with
    assert stored(protocol, trial).status is Status.Running


def finish(protocol: Protocol) -> None:
    for error, expected, errors in (
        (None, Status.Completed, []),
        (ValueError("bad"), Status.Exception, ["ValueError: bad"]),
        (KeyboardInterrupt(), Status.Interrupted, ["KeyboardInterrupt"]),
    ):
        trial = new(protocol, error=repr(error))
        protocol.log_trial_start(trial)
        protocol.log_trial_finish(trial, None if error is None else type(error), error, None)
        found = stored(protocol, trial)
        assert (found.status, found.errors) == (expected, errors)
        assert 0 <= found.chronos["runtime"].val < 1000


def finish_missing(protocol: Protocol) -> None:
    with pytest.raises(ItemNotFound):
        protocol.log_trial_finish(NOBODY)
    trial = new(protocol)
    protocol.log_trial_finish(trial)  # never started: it has no runtime
    protocol.log_trial_finish(trial)
    assert (stored(protocol, trial).status, stored(protocol, trial).chronos) == (Status.Completed, {})
    said = new(protocol, said=1)
    protocol.log_trial_start(said)
    protocol.set_trial_status(said, Status.Suspended)
    protocol.log_trial_finish(said)
    assert stored(protocol, said).status is Status.Suspended


def chrono_start(protocol: Protocol) -> None:
    trial, called = new(protocol), []
    protocol.log_trial_chrono_start(trial, "c", start_callback=lambda: called.append("start"))
    assert called == ["start"]
    assert stored(protocol, trial).chronos == {"c": StatAggregator(1)}
    for n in range(3):
        protocol.log_trial_chrono_start(trial, "ring", RingAggregator.lazy(2))
        protocol.log_trial_chrono_finish(trial, "ring")
        assert len(stored(protocol, trial).chronos["ring"].val) == min(n + 1, 2)


def chrono_start_missing(protocol: Protocol) -> None:
    with pytest.raises(ItemNotFound):
        protocol.log_trial_chrono_start(NOBODY, "c")
    trial = new(protocol)
    for aggregator in (StatAggregator.lazy(0), ValueAggregator.lazy()):  # the one of before is kept
        protocol.log_trial_chrono_start(trial, "c", aggregator)
        protocol.log_trial_chrono_finish(trial, "c")
    assert stored(protocol, trial).chronos["c"].count == 2


def chrono_finish(protocol: Protocol) -> None:
    trials, called = [new(protocol, n=n) for n in range(2)], []
    for trial in trials:  # of the same name, in two trials, side by side
        protocol.log_trial_chrono_start(
            trial, "c", StatAggregator.lazy(0), end_callback=lambda: called.append("end")
        )
    for trial in trials:
        protocol.log_trial_chrono_finish(trial, "c", ValueError, ValueError("bad"), None)
        assert 0 <= stored(protocol, trial).chronos["c"].val < 1000
    assert called == ["end", "end"]


def chrono_finish_missing(protocol: Protocol) -> None:
    trial = new(protocol)
    with pytest.raises(ItemNotFound):
        protocol.log_trial_chrono_finish(NOBODY, "c")
    with pytest.raises(ChronoNotStarted, match="'c' of trial"):
        protocol.log_trial_chrono_finish(trial, "c")
    with pytest.raises(KeyError):  # as Track has it
        protocol.log_trial_chrono_finish(trial, "c")


def arguments(protocol: Protocol) -> None:
    trial = new(protocol, a=1, opt={"x": 1})
    protocol.log_trial_arguments(trial, b=2, opt={"y": 2})
    found = stored(protocol, trial)
    assert (found.parameters, found.uid) == ({"a": 1, "b": 2, "opt": {"y": 2}}, trial.uid)
    assert found == trial


def arguments_missing(protocol: Protocol) -> None:
    with pytest.raises(ItemNotFound):
        protocol.log_trial_arguments(NOBODY, a=1)
    trial = new(protocol)
    with pytest.raises(InvalidType, match="arguments/f"):
        protocol.log_trial_arguments(trial, f=print)
    assert stored(protocol, trial).parameters == {}


def metadata(protocol: Protocol) -> None:
    trial = new(protocol)
    then = datetime(2026, 11, 1, tzinfo=UTC)
    protocol.log_trial_metadata(trial, heartbeat=then, host={"a": 1, "b": 1}, n=1)
    protocol.log_trial_metadata(trial, ValueAggregator.lazy(), host={"c": 1}, n=2)
    found = stored(protocol, trial).metadata
    assert (found["heartbeat"], found["host"], found["n"]) == (then.isoformat(), {"c": 1}, 2)
    assert found["_update_count"] > trial.metadata["_update_count"]
    assert found["_last_change"] > trial.metadata["_last_change"]
    assert not any("track" in name for name in found)


def metadata_missing(protocol: Protocol) -> None:
    with pytest.raises(ItemNotFound):
        protocol.log_trial_metadata(NOBODY, a=1)


def metrics(protocol: Protocol) -> None:
    trial = new(protocol)
    for n in range(3):
        protocol.log_trial_metrics(trial, plain=n, both=n)
        protocol.log_trial_metrics(trial, step=n % 2, aggregator=StatAggregator.lazy(0), by_step=n)
        protocol.log_trial_metrics(trial, step=("a", n), any_step=n)
        protocol.log_trial_metrics(trial, aggregator=RingAggregator.lazy(2), ring=n)
        protocol.log_trial_metrics(trial, aggregator=Sum, own=n)
    for step in (0, 5, "end"):
        protocol.log_trial_metrics(trial, step=step, both=0)
    for n in range(100):
        protocol.log_trial_metrics(trial, aggregator=StatAggregator.lazy(10), stat=n)
    found = stored(protocol, trial).metrics
    assert found["plain"] == [0, 1, 2]
    assert found["plain"].val == list(found["plain"])
    assert found["by_step"] == {0: 2, 1: 1}
    assert found["any_step"] == {("a", 0): 0, ("a", 1): 1, ("a", 2): 2}
    assert found["both"] == [0, 1, 2, (0, 0), (5, 0), ("end", 0)]
    assert found["ring"].val == [1, 2]
    assert found["own"].val == 3
    assert (found["stat"].avg, found["stat"].min) == (54.5, 9)
    with eventrun.open(protocol.client.url, quiet=True) as client:
        state = client.get(protocol.client.trials().first().result()).result()
        assert state.metrics["stat"].value["mean"] == 54.5  # eventrun's own view has them, too
        assert client.history(state, "any_step").result().values == [0, 1, 2]


class Sum:
    """An aggregator of somebody's own."""

    def __init__(self) -> None:
        self.val = 0

    def append(self, value: int) -> None:
        """Add."""
        self.val += value


def metrics_missing(protocol: Protocol) -> None:
    with pytest.raises(ItemNotFound):
        protocol.log_trial_metrics(NOBODY, a=1)
    trial = new(protocol)
    with pytest.raises(InvalidType, match="'bad'"):
        protocol.log_trial_metrics(trial, good=1, bad=object())
    protocol.log_trial_metrics(trial, step=1, a=1)
    protocol.log_trial_metrics(trial, a=math.inf)  # Track fails here
    assert stored(protocol, trial).metrics == {"a": {1: 1, None: math.inf}}


def set_status(protocol: Protocol) -> None:
    trial = new(protocol)
    own = CustomStatus("waiting", 205)
    for wanted in (*Status, own, *reversed(Status)):
        protocol.set_trial_status(trial, wanted)
        assert stored(protocol, trial).status == wanted
    protocol.set_trial_status(trial, Status.Broken, error="disk")
    protocol.set_trial_status(trial, {"name": "waiting", "value": 205}, ValueError("bad"))
    assert (stored(protocol, trial).status, stored(protocol, trial).errors) == (
        own,
        ["disk", "ValueError: bad"],
    )


def set_status_missing(protocol: Protocol) -> None:
    with pytest.raises(ItemNotFound):
        protocol.set_trial_status(NOBODY, Status.Running)
    with pytest.raises(InvalidValue, match="no status"):
        protocol.set_trial_status(new(protocol), object())


def tags(protocol: Protocol) -> None:
    trial = new(protocol)
    protocol.add_trial_tags(trial, a=1, b={"c": 1})
    protocol.add_trial_tags(trial, a=2)
    assert stored(protocol, trial).tags == {"a": 2, "b": {"c": 1}}


def tags_missing(protocol: Protocol) -> None:
    with pytest.raises(ItemNotFound):
        protocol.add_trial_tags(NOBODY, a=1)


def get_project(protocol: Protocol) -> None:
    protocol.new_project(Project(name="q", description="d", tags={"t": 1}, metadata={"m": 1}))
    found = protocol.get_project(Project(name="q"))
    assert found is not None
    assert (found.uid, found.description, found.tags, found.metadata) == ("q", "d", {"t": 1}, {"m": 1})
    assert (found.groups, found.trials) == (set(), set())


def get_project_missing(protocol: Protocol) -> None:
    assert protocol.get_project(Project(name="nobody")) is None


def new_project(protocol: Protocol) -> None:
    assert protocol.new_project(SimpleNamespace(name="q")) == Project(name="q")
    assert [project.name for project in protocol.fetch_projects()] == ["p", "q"]


def new_project_missing(protocol: Protocol) -> None:
    protocol.new_project(Project(name="q", description="first"))
    assert protocol.new_project(Project(name="q", description="second")).description == "first"


def get_group(protocol: Protocol) -> None:
    group = TrialGroup(name="g", project_id="p", metadata={"m": 1}, description="d")
    protocol.new_trial_group(group)
    found = protocol.get_trial_group(TrialGroup(name="g", project_id="p"))
    assert found is not None
    assert (found, found.name, found.project_id, found.metadata) == (group, "g", "p", {"m": 1})
    assert found.trials == set()


def get_group_missing(protocol: Protocol) -> None:
    assert protocol.get_trial_group(TrialGroup(name="g", project_id="p")) is None
    with pytest.raises(InvalidValue, match="project_id"):
        protocol.get_trial_group(TrialGroup(name="g"))


def new_group(protocol: Protocol) -> None:
    made = protocol.new_trial_group(SimpleNamespace(uid="mine", name="g", project_id="p"))
    assert made is not None
    assert (made.uid, made.name) == ("mine", "g")
    project = protocol.get_project(Project(name="p"))
    assert project is not None
    assert project.groups == {"mine"}


def new_group_missing(protocol: Protocol) -> None:
    group = TrialGroup(name="g", project_id="p")
    assert protocol.new_trial_group(group) == group
    assert protocol.new_trial_group(group) is None
    with pytest.raises(UnknownProject, match=r"'q'.*new_project"):
        protocol.new_trial_group(TrialGroup(name="g", project_id="q"))
    lenient = get_protocol(protocol.uri, strict=False)
    assert lenient.new_trial_group(TrialGroup(name="g", project_id="q")) is not None
    lenient.close()


def add_project(protocol: Protocol) -> None:
    trial, project = new(protocol), protocol.new_project(Project(name="q"))
    protocol.add_project_trial(project, trial)
    assert trial.project_id == stored(protocol, trial).project_id == "q"
    again = protocol.get_project(project)
    assert again is not None
    assert again.trials == project.trials == {trial.uid}
    protocol.add_project_trial(project, trial)
    assert [each.uid for each in protocol.fetch_trials({"project_id": "q"})] == [trial.uid]


def add_project_missing(protocol: Protocol) -> None:
    with pytest.raises(ItemNotFound):
        protocol.add_project_trial(Project(name="p"), NOBODY)
    with pytest.raises(AssertionError):  # as Track has it
        protocol.add_project_trial(Project(name="q"), new(protocol))


def add_group(protocol: Protocol) -> None:
    trial, group = new(protocol), protocol.new_trial_group(TrialGroup(name="g", project_id="p"))
    assert group is not None
    protocol.add_group_trial(group, trial)
    assert trial.group_id == stored(protocol, trial).group_id == group.uid
    again = protocol.get_trial_group(group)
    assert again is not None
    assert again.trials == {trial.uid}
    assert [each.uid for each in protocol.fetch_trials({"group_id": group.uid})] == [trial.uid]
    inside = protocol.new_trial(Trial(parameters={"a": 1}, project_id="p", group_id=group.uid))
    assert inside is not None
    assert inside.group_id == group.uid
    protocol.add_project_trial(protocol.new_project(Project(name="q")), trial)  # its group stays
    again = protocol.get_trial_group(group)
    assert again is not None
    assert again.trials == {trial.uid, inside.uid}
    assert protocol.fetch_groups({}) == [group]


def add_group_missing(protocol: Protocol) -> None:
    with pytest.raises(ItemNotFound):
        protocol.add_group_trial(TrialGroup(name="g", project_id="p"), NOBODY)


def commit(protocol: Protocol) -> None:
    trial = new(protocol)
    protocol.log_trial_metadata(trial, a=1)
    protocol.commit()
    assert protocol.client.statistics().held_bytes == 0
    copy = str(Path(protocol.client.url).with_name("copy.json"))
    protocol.commit(file_name_override=copy)
    other = get_protocol(f"file:{copy}")
    assert stored(other, trial).metadata["a"] == 1
    other.close()


def commit_missing(protocol: Protocol) -> None:
    protocol.commit()
    protocol.commit()


def get_trial(protocol: Protocol) -> None:
    trial = new(protocol, a=1)
    for _ in range(2):
        protocol.new_trial(Trial(parameters={"a": 1}, project_id="p"), auto_increment=True)
    new(protocol, a=2)
    found = protocol.get_trial(trial)
    assert found is not None
    assert [(each.hash, each.revision) for each in found] == [(trial.hash, n) for n in range(3)]
    assert protocol.get_trial(SimpleNamespace(uid=f"{trial.hash}_2")) == found


def get_trial_missing(protocol: Protocol) -> None:
    trial = new(protocol, a=1)
    assert protocol.get_trial(NOBODY) is None
    assert protocol.get_trial(Trial(_hash=trial.hash, revision=1)) is None


def new_trial(protocol: Protocol) -> None:
    given = Trial(
        name="n", description="d", tags={"t": 1}, version="v", project_id="p", parameters={"a": {"b": [1]}},
        metadata={"m": 1}, metrics={"loss": {1: 0.5}, "acc": [1, 2]}, status=Status.Suspended,
    )  # fmt: skip
    assert protocol.new_trial(given) == given
    found = stored(protocol, given)
    assert (found.name, found.description, found.tags, found.version) == ("n", "d", {"t": 1}, "v")
    assert (found.project_id, found.parameters, found.metadata["m"]) == ("p", {"a": {"b": [1]}}, 1)
    assert (found.metrics, found.status) == ({"loss": {1: 0.5}, "acc": [1, 2]}, Status.Suspended)
    orphan = protocol.new_trial(SimpleNamespace(uid="mine_3", revision=3, parameters={}))
    assert orphan is not None
    assert (orphan.uid, orphan.hash, orphan.project_id, orphan.name) == ("mine_3", "mine", "orphan", None)


def new_trial_missing(protocol: Protocol) -> None:
    new(protocol, a=1, b=2)
    again = Trial(parameters={"b": 2, "a": 1}, project_id="p")
    assert protocol.new_trial(again) is None
    made = protocol.new_trial(again, auto_increment=True)
    assert made is not None
    assert made.revision == again.revision == 1
    protocol.log_trial_metrics(again, x=1)
    assert stored(protocol, made).metrics == {"x": [1]}
    assert protocol.new_trial(Trial(parameters={"a": 1, "b": 2}, project_id="p", revision=7)) is not None
    last = protocol.new_trial(Trial(parameters={"a": 1, "b": 2}, project_id="p"), auto_increment=True)
    assert last is not None
    assert last.revision == 8
    with pytest.raises(UnknownProject):
        protocol.new_trial(Trial(parameters={"a": 1}, project_id="nobody"))
    with pytest.raises(InvalidValue):
        protocol.new_trial(Trial(parameters={"a": 2**70}, project_id="p"))


def update_trial(protocol: Protocol) -> None:
    trials = [new(protocol, n=n) for n in range(3)]
    protocol.set_trial_status(trials[0], Status.Completed)
    query = {"status": Status.CreatedGroup, "parameters.n": {"$gt": 0}}
    found = protocol.fetch_and_update_trial(query, "set_trial_status", Status.Broken, error="why")
    assert (found.uid, found.status, found.errors) == (trials[1].uid, Status.Broken, ["why"])
    for attr, named in (
        ("log_trial_metadata", {"heartbeat": 1}), ("log_trial_arguments", {"x": {"y": 1}}),
        ("add_trial_tags", {"t": 1}),
        ("log_trial_metrics", {"loss": 1, "aggregator": StatAggregator.lazy(0)}),
    ):  # fmt: skip
        assert protocol.fetch_and_update_trial({"status": Status.Broken}, attr, **named).uid == trials[1].uid
    found = stored(protocol, trials[1])
    assert (found.metadata["heartbeat"], found.tags) == (1, {"t": 1})
    assert (found.parameters, found.metrics["loss"].avg) == ({"n": 1, "x": {"y": 1}}, 1)
    protocol.fetch_and_update_trial({"uid": trials[2].uid}, "log_trial_start")
    protocol.fetch_and_update_trial({"uid": trials[2].uid}, "log_trial_finish")
    assert stored(protocol, trials[2]).status is Status.Completed


def update_trial_missing(protocol: Protocol) -> None:
    trial = new(protocol)
    with pytest.raises(ItemNotFound, match="suspended"):
        protocol.fetch_and_update_trial({"status": "suspended"}, "set_trial_status", Status.Running)
    with pytest.raises(AttributeError):
        protocol.fetch_and_update_trial({}, "no_such_method")
    with pytest.raises(InvalidType):
        protocol.fetch_and_update_trial({}, "log_trial_metadata", bad=object())
    assert stored(protocol, trial).status is Status.CreatedGroup


def update_group(protocol: Protocol) -> None:
    for name in "ab":
        protocol.new_trial_group(TrialGroup(name=name, project_id="p", metadata={"name": name}))
    found = protocol.fetch_and_update_group({"metadata.name": "b"}, "set_group_metadata", done=True)
    assert (found.name, found.metadata) == ("b", {"name": "b", "done": True})
    protocol.set_group_metadata(found, done=False)
    assert [each.metadata.get("done") for each in protocol.fetch_groups()] == [None, False]


def update_group_missing(protocol: Protocol) -> None:
    with pytest.raises(ItemNotFound):
        protocol.fetch_and_update_group({"name": "g"}, "set_group_metadata", a=1)
    with pytest.raises(AttributeError):
        protocol.fetch_and_update_group({}, "no_such_method")
    with pytest.raises(ItemNotFound):
        protocol.set_group_metadata(TrialGroup(name="g", project_id="p"), a=1)


def fetch_trials(protocol: Protocol) -> None:
    for n in range(4):
        trial = new(protocol, n=n, lr=[n])
        if n:
            protocol.log_trial_metadata(trial, heartbeat=n, last={"step": n})
        protocol.set_trial_status(
            trial, (Status.Interrupted, CustomStatus("mine", 1), "completed", "Running")[n]
        )
    with eventrun.open(protocol.client.url, quiet=True) as client, client.trial("p", params={"n": 4}):
        pass
    everything = list(range(5))
    for query, expected in (
        (None, everything), ({}, everything), ([("project_id", "p")], everything), ({"project_id": "q"}, []),
        ({"parameters.n": 2}, [2]), ({"parameters.lr": [3]}, [3]), ({"parameters.n": True}, [1]),
        ({"metadata.heartbeat": {"$gt": 1}}, [2, 3]), ({"metadata.heartbeat": {"$lte": 2, "$gte": 2}}, [2]),
        ({"metadata.heartbeat": None}, [0, 4]), ({"metadata.heartbeat": {"$ne": 1}}, [0, 2, 3, 4]),
        ({"metadata.last.step": 3}, [3]), ({"metadata.heartbeat": {"$lt": "text"}}, []),
        ({"status": Status.Interrupted}, [0]), ({"status": "interrupted"}, [0]), ({"status": "mine"}, [1]),
        ({"status": CustomStatus("mine", 1)}, [1]), ({"status": CustomStatus("mine", 2)}, []),
        ({"status": {"$in": ["mine", "running", Status.Completed]}}, [1, 2, 3, 4]),
        ({"status": {"$ne": Status.Running}, "parameters.n": {"$in": [2, 3]}}, [2]),
        ({"status": {"$gt": Status.Broken}}, [2, 4]), ({"status": {"$in": []}}, []),
        ({"parameters.n": {"$in": []}}, []),
        ({"uid": {"$in": ["nobody_0", "no uid"]}}, []), ({"revision": 0, "name": None}, [0, 1, 2, 3]),
        ({"metadata.last": {"step": 1}}, [1]), ({"tags": {}}, everything),
    ):  # fmt: skip
        found = protocol.fetch_trials(query)
        assert [trial.parameters["n"] for trial in found] == expected, query
    native = protocol.fetch_trials({"parameters.n": 4})[0]
    assert stored(protocol, native) == native
    assert protocol.fetch_trials({"hash": native.hash}) == [native]
    protocol.log_trial_metadata(native, seen=True)
    assert stored(protocol, native).metadata["seen"]


def fetch_trials_missing(protocol: Protocol) -> None:
    assert protocol.fetch_trials({"hash": "nobody"}) == []
    for query in ({"nobody": 1}, {"status": {"$near": 1}}, {"uid": {"$in": "text"}}, "uid", {"metrics.loss": 1},
                  {"name": {"$regex": "("}}, {"name": object()}):  # fmt: skip
        with pytest.raises(BadQuery):
            protocol.fetch_trials(query)
    with pytest.raises(RuntimeError):  # as Track has it
        protocol.fetch_trials({"nobody": 1})


def fetch_groups(protocol: Protocol) -> None:
    for name in "ab":
        protocol.new_trial_group(TrialGroup(name=name, project_id="p", metadata={"n": name}))
    assert [group.name for group in protocol.fetch_groups({})] == ["a", "b"]
    assert [group.name for group in protocol.fetch_groups({"metadata.n": "b", "project_id": "p"})] == ["b"]


def fetch_groups_missing(protocol: Protocol) -> None:
    assert protocol.fetch_groups({"_uid": "nobody"}) == []
    with pytest.raises(BadQuery):
        protocol.fetch_groups({"status": 1})


def fetch_projects(protocol: Protocol) -> None:
    protocol.new_project(Project(name="q", metadata={"m": 1}))
    assert [project.name for project in protocol.fetch_projects(None)] == ["p", "q"]
    assert [project.name for project in protocol.fetch_projects({"metadata.m": {"$in": [1]}})] == ["q"]


def fetch_projects_missing(protocol: Protocol) -> None:
    assert protocol.fetch_projects({"uid": "nobody"}) == []
    with pytest.raises(BadQuery):
        protocol.fetch_projects({"revision": 1})


TABLE: dict[str, tuple[Callable[[Protocol], None], Callable[[Protocol], None]]] = {
    "log_trial_start": (start, start_missing),
    "log_trial_finish": (finish, finish_missing),
    "log_trial_chrono_start": (chrono_start, chrono_start_missing),
    "log_trial_chrono_finish": (chrono_finish, chrono_finish_missing),
    "log_trial_arguments": (arguments, arguments_missing),
    "log_trial_metadata": (metadata, metadata_missing),
    "log_trial_metrics": (metrics, metrics_missing),
    "set_trial_status": (set_status, set_status_missing),
    "add_trial_tags": (tags, tags_missing),
    "get_project": (get_project, get_project_missing),
    "new_project": (new_project, new_project_missing),
    "get_trial_group": (get_group, get_group_missing),
    "new_trial_group": (new_group, new_group_missing),
    "add_project_trial": (add_project, add_project_missing),
    "add_group_trial": (add_group, add_group_missing),
    "commit": (commit, commit_missing),
    "get_trial": (get_trial, get_trial_missing),
    "new_trial": (new_trial, new_trial_missing),
    "fetch_and_update_trial": (update_trial, update_trial_missing),
    "fetch_and_update_group": (update_group, update_group_missing),
    "fetch_trials": (fetch_trials, fetch_trials_missing),
    "fetch_groups": (fetch_groups, fetch_groups_missing),
    "fetch_projects": (fetch_projects, fetch_projects_missing),
}


@pytest.mark.parametrize("method", TABLE)
def test_a_method_does_what_it_says(protocol: Protocol, method: str) -> None:
    """The normal case of each method of Track's protocol."""
    TABLE[method][0](protocol)


@pytest.mark.parametrize("method", TABLE)
def test_duplicates_and_what_is_missing(protocol: Protocol, method: str) -> None:
    """Each method tells, in Track's way, of what exists already or isn't there."""
    TABLE[method][1](protocol)


# the table again, by several processes at once -----------------------------------------------------------------------

CROWDED = """
    import json, sys
    from eventrun.compat.track import *
    uri, n = sys.argv[1], int(sys.argv[2])
    told = {}
    p = get_protocol(uri)
    told["new_project"] = p.new_project(Project(name="p", description="d")).description
    group = TrialGroup(name="g", project_id="p")
    told["new_trial_group"] = p.new_trial_group(group) is not None
    shared = Trial(parameters={"shared": True}, project_id="p")
    told["new_trial"] = p.new_trial(Trial(parameters={"shared": True}, project_id="p")) is not None
    mine = p.new_trial(Trial(parameters={"shared": True}, project_id="p"), auto_increment=True)
    told["revision"] = mine.revision
    p.log_trial_start(shared)
    p.log_trial_chrono_start(shared, "c", StatAggregator.lazy(0))
    for i in range(5):
        p.log_trial_metrics(shared, step=f"{n}/{i}", by_step=i)
        p.log_trial_metrics(shared, series=n)
    p.log_trial_metadata(shared, **{f"m{n}": n})
    p.log_trial_arguments(shared, **{f"a{n}": n})
    p.add_trial_tags(shared, **{f"t{n}": n})
    p.log_trial_chrono_finish(shared, "c")
    p.log_trial_finish(shared)
    p.set_trial_status(mine, CustomStatus(f"of {n}", n))
    p.new_project(Project(name="q"))
    p.add_project_trial(Project(name="q"), mine)
    p.add_group_trial(group, mine)
    told["own"] = p.fetch_trials({"uid": mine.uid})[0].group_id == group.uid
    told["get_project"] = mine.uid in p.get_project(Project(name="q")).trials
    told["get_trial_group"] = p.get_trial_group(group) is not None
    told["get_trial"] = mine.uid in [each.uid for each in p.get_trial(mine)]
    told["fetch_groups"] = len(p.fetch_groups({}))
    told["fetch_projects"] = len(p.fetch_projects({}))
    told["taken"] = []
    try:
        while True:
            job = p.fetch_and_update_trial({"status": "suspended"}, "set_trial_status", Status.Running)
            told["taken"].append(job.parameters["job"])
    except ItemNotFound:
        pass
    told["groups"] = []
    try:
        while True:
            query = {"metadata.waits": True}
            told["groups"].append(p.fetch_and_update_group(query, "set_group_metadata", waits=False).name)
    except ItemNotFound:
        pass
    p.commit()
    told["fetch_trials"] = len(get_protocol(uri).fetch_trials({"parameters.job": {"$exists": True}}))
    print(json.dumps(told))
"""
JOBS = 12


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[dict[str, Any]], Protocol, Trial]]:
    """Have several processes do all of it to the same things at once; give what they told, and the store."""
    uri = f"file:{tmp_path_factory.mktemp('crowd')}/x.json"
    protocol = get_protocol(uri)
    protocol.new_project(Project(name="jobs"))
    for job in range(JOBS):
        protocol.new_trial(Trial(parameters={"job": job}, project_id="jobs", status=Status.Suspended))
        protocol.new_trial_group(TrialGroup(name=f"g{job}", project_id="jobs", metadata={"waits": True}))
    protocol.commit()
    told = run_many(CROWDED, CROWD, uri)
    (shared,) = protocol.fetch_trials({"parameters.shared": True, "revision": 0})
    yield told, protocol, shared
    protocol.close()


def each(crowd: tuple[list[dict[str, Any]], Protocol, Trial], name: str) -> list[Any]:
    """Give what each process told."""
    return [told[name] for told in crowd[0]]


def names(prefix: str) -> set[str]:
    """Name what each process has added."""
    return {f"{prefix}{n}" for n in range(CROWD)}


CONCURRENT: dict[str, Callable[[Any], bool]] = {
    "log_trial_start": lambda c: c[2].chronos["runtime"].val > 0,
    "log_trial_finish": lambda c: c[2].status is Status.Completed,
    "log_trial_chrono_start": lambda c: c[2].chronos["c"].skip_obs == 0,
    "log_trial_chrono_finish": lambda c: c[2].chronos["c"].count == CROWD,
    "log_trial_arguments": lambda c: names("a") <= c[2].parameters.keys(),
    "log_trial_metadata": lambda c: names("m") <= c[2].metadata.keys(),
    "log_trial_metrics": lambda c: (
        c[2].metrics["by_step"] == {f"{n}/{i}": i for n in range(CROWD) for i in range(5)}
        and Counter(c[2].metrics["series"]) == dict.fromkeys(range(CROWD), 5)
    ),
    "set_trial_status": lambda c: (
        {each.status for each in c[1].fetch_trials({"project_id": "q"})}
        == {CustomStatus(f"of {n}", n) for n in range(CROWD)}
    ),
    "add_trial_tags": lambda c: c[2].tags == {f"t{n}": n for n in range(CROWD)},
    "get_project": lambda c: all(each(c, "get_project")),
    "new_project": lambda c: each(c, "new_project") == ["d"] * CROWD,
    "get_trial_group": lambda c: all(each(c, "get_trial_group")),
    "new_trial_group": lambda c: sum(each(c, "new_trial_group")) == 1,
    "add_project_trial": lambda c: len(c[1].get_project(Project(name="q")).trials) == CROWD,
    "add_group_trial": lambda c: (
        all(each(c, "own")) and len(c[1].fetch_trials({"group_id": TrialGroup(name="g", project_id="p").uid})) == CROWD
    ),
    "commit": lambda c: c[1].client.verify(views=True).result().ok,
    "get_trial": lambda c: all(each(c, "get_trial")) and len(c[1].get_trial(c[2])) == 1 + CROWD,
    "new_trial": lambda c: (
        sum(each(c, "new_trial")) == 1 and sorted(each(c, "revision")) == list(range(1, CROWD + 1))
    ),
    "fetch_and_update_trial": lambda c: sorted(chain(*each(c, "taken"))) == list(range(JOBS)),
    "fetch_and_update_group": lambda c: sorted(chain(*each(c, "groups"))) == sorted(f"g{n}" for n in range(JOBS)),
    "fetch_trials": lambda c: each(c, "fetch_trials") == [JOBS] * CROWD,
    "fetch_groups": lambda c: each(c, "fetch_groups") == [JOBS + 1] * CROWD,
    "fetch_projects": lambda c: each(c, "fetch_projects") == [3] * CROWD,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", TABLE)
def test_several_processes_at_once(crowd: Any, method: str) -> None:
    """Nothing that one of them did is lost, and what only one may have has one."""
    assert CONCURRENT[method](crowd)


def test_the_table_is_whole() -> None:
    """It holds every method of the protocol that the original documents."""
    documented = {
        "log_trial_start",
        "log_trial_finish",
        "log_trial_chrono_start",
        "log_trial_chrono_finish",
        "log_trial_arguments",
        "log_trial_metadata",
        "log_trial_metrics",
        "set_trial_status",
        "add_trial_tags",
        "get_project",
        "new_project",
        "get_trial_group",
        "new_trial_group",
        "add_project_trial",
        "add_group_trial",
        "commit",
        "get_trial",
        "new_trial",
        "fetch_and_update_trial",
        "fetch_and_update_group",
        "fetch_trials",
        "fetch_groups",
        "fetch_projects",
    }
    assert documented == TABLE.keys() == CONCURRENT.keys()
    public = {name for name in dir(Protocol) if not name.startswith("_")}
    assert public - documented == {"client", "close", "set_group_metadata"}


RACE = """
    import json, sys
    from eventrun.compat.track import *
    p = get_protocol(sys.argv[1])
    project = p.new_project(Project(name="p"))
    told = {"once": [], "again": [], "taken": [], "groups": []}
    for i in range(5):
        told["groups"].append(p.new_trial_group(TrialGroup(name=f"g{i}", project_id="p")) is not None)
        told["once"].append(p.new_trial(Trial(parameters={"i": i}, project_id="p", name="once")) is not None)
        made = p.new_trial(Trial(parameters={"i": i}, project_id="p", name="again"), auto_increment=True)
        told["again"].append(made.uid)
    try:
        while True:
            query = {"status": Status.CreatedGroup, "project_id": "jobs"}
            told["taken"].append(p.fetch_and_update_trial(query, "set_trial_status", Status.Running).parameters["n"])
    except ItemNotFound:
        pass
    print(json.dumps(told))
"""


@pytest.mark.slow
def test_many_processes_lose_and_double_nothing(uri: str) -> None:
    """Of 20 processes one gets each configuration, each gets its revisions, and 500 trials are taken once each."""
    protocol = get_protocol(uri)
    protocol.new_project(Project(name="jobs"))
    for n in range(500):
        assert protocol.new_trial(Trial(parameters={"n": n}, project_id="jobs"))
    told = run_many(RACE, MANY, uri)
    for i in range(5):
        assert sum(one["once"][i] for one in told) == sum(one["groups"][i] for one in told) == 1
        revisions = sorted(int(one["again"][i].rpartition("_")[2]) for one in told)
        assert revisions == list(range(MANY))
    assert Counter(n for one in told for n in one["taken"]) == Counter(range(500))
    assert len(protocol.fetch_trials({"project_id": "p"})) == 5 + 5 * MANY
    protocol.close()


# aggregators --------------------------------------------------------------------------------------------------------


def test_statistics_by_hand() -> None:
    """0 to 99 with skip 10: the tenth observation, 9, counts for min and max, the 90 after it for all."""
    stat = StatAggregator(10)
    for n in range(100):
        stat.append(n)
    assert (stat.avg, stat.sum, stat.total, stat.min, stat.max, stat.val, stat.count) == (
        54.5, 4905, 4905, 9, 99, 99, 90,
    )  # fmt: skip
    assert stat.sd == pytest.approx(math.sqrt((90**2 - 1) / 12), rel=1e-15)
    assert f"{stat.sd:.3f}" == "25.979"
    assert stat.to_json(short=True) == {"avg": 54.5, "min": 9, "max": 99, "sd": stat.sd, "count": 90}
    assert StatAggregator().skip_obs == 10


@pytest.mark.parametrize(
    ("skip", "values", "expected"),  # avg, sd, sum, min, max, count
    [
        (0, [], (0, 0, 0, math.inf, -math.inf, 1)),
        (0, [3], (3, 0, 3, 3, 3, 1)),
        (0, [1, 2, 3, 4], (2.5, math.sqrt(1.25), 10, 1, 4, 4)),
        (1, [5], (0, 0, 0, 5, 5, 1)),
        (1, [5, 1, 3], (2, 1, 4, 1, 5, 2)),
        (2, [9, 5, 1], (1, 0, 1, 1, 5, 1)),
        (3, [9, 8], (0, 0, 0, math.inf, -math.inf, 1)),
        (0, [1e9, 1e9 + 1, 1e9 + 2], (1e9 + 1, math.sqrt(2 / 3), 3e9 + 3, 1e9, 1e9 + 2, 3)),
    ],
)
def test_what_counts_for_what(skip: int, values: list[float], expected: tuple[float, ...]) -> None:
    """Up to skip-1 nothing, then min and max, then all."""
    stat = StatAggregator.lazy(skip)()
    for value in values:
        stat.append(value)
    found = (stat.avg, stat.sd, stat.sum, stat.min, stat.max, stat.count)  # type: ignore[attr-defined]
    assert found == pytest.approx(expected, rel=1e-12)


def test_rings_series_and_values() -> None:
    """A ring of n keeps the last n, rounded to 32 bits; a series all; a value the last."""
    ring, double = RingAggregator(3), RingAggregator.lazy(3, "d")()
    series, value = TimeSeriesAggregator.lazy()(), ValueAggregator(5)
    assert (ring.val, series.val, value.val, ValueAggregator().val) == ([], [], 5, None)
    for n in range(30):
        for aggregator in (ring, double, series, value):
            aggregator.append(n + 0.1)
    assert ring.val == pytest.approx([27.1, 28.1, 29.1], rel=1e-7)
    assert ring.val != double.val == [27.1, 28.1, 29.1]
    assert series == [n + 0.1 for n in range(30)]
    assert series.to_json(short=True) == series.to_json()[-20:]
    assert (value.val, value.to_json()) == (29.1, 29.1)
    value += 1
    assert value.val == 1
    with pytest.raises(ValueError, match="n=0"):
        RingAggregator(0)
    assert Aggregator.lazy(RingAggregator, n=4)().to_json()["n"] == 4


@pytest.mark.parametrize(
    "make",
    [StatAggregator.lazy(3), RingAggregator.lazy(4), TimeSeriesAggregator.lazy(), ValueAggregator.lazy()],
)
@pytest.mark.parametrize("count", [0, 1, 3, 4, 10])
def test_json_and_back(make: Callable[[], Aggregator], count: int) -> None:
    """What comes back from JSON is the same, and goes on the same."""
    first = make()
    for n in range(count):
        first.append(n * 0.7)
    again = [
        type(first).from_json(json.loads(json.dumps(first.to_json()))),
        Aggregator.from_json(first.to_json()),
    ]
    if type(first) is ValueAggregator:
        again[1] = ValueAggregator.from_json(first.to_json())
    for aggregator in (first, *again):
        aggregator.append(2.5)
    assert again == [first, first]


# nouns --------------------------------------------------------------------------------------------------------------


def test_the_statuses() -> None:
    """All ten with their values; their text is the name in lower case; one's own are equal by name and value."""
    assert {each.name: each.value for each in Status} == {
        "CreatedGroup": 0, "RunningGroup": 100, "Running": 101, "ErrorGroup": 200, "Interrupted": 201, "Exception": 202,
        "Broken": 203, "FinishedGroup": 300, "Suspended": 301, "Completed": 302,
    }  # fmt: skip
    assert str(Status.CreatedGroup) == "createdgroup"
    assert status("Running") is status("running", 101) is status(value=101) is Status.Running
    own = status("mine", 7)
    assert own == CustomStatus("mine", 7) == {"name": "mine", "value": 7} == status("mine", 7)
    assert own == "mine"
    assert own not in (CustomStatus("mine", 8), "Mine", Status.Running, 7)
    assert len({own, CustomStatus("mine", 7)}) == 1
    with pytest.raises(InvalidValue):
        status(value=5)


def test_uids() -> None:
    """<hash>_<revision>; the hash stays, doesn't depend on the order, and keeps apart what the original mixed up."""
    trial = Trial(parameters={"a": 1})
    hashed = trial.hash
    trial.parameters["b"] = 2
    assert trial.uid == f"{hashed}_0"
    trial.uid = "with_underscores_12"
    assert (trial.hash, trial.revision) == ("with_underscores", 12)
    with pytest.raises(InvalidValue):
        trial.uid = "nothing"
    assert compute_hash(a=1, b=2) == compute_hash(b=2, a=1)
    differ: list[Any] = [
        1, True, 1.0, "1", -1, 2**40, 2**64 - 1, [1], [[1]], {"a": 1}, {"a": 2}, ["a", "bc"], ["ab", "c"], None,
    ]  # fmt: skip
    assert len({compute_hash(x=value) for value in differ if value is not None}) == len(differ) - 1
    assert Trial(_hash="h", revision=1) == Trial(_hash="h", revision=1, name="other") != Trial(_hash="h")
    assert TrialGroup(name="g", project_id="p") != TrialGroup(name="g", project_id="q")


def test_a_trial_that_was_read_is_a_copy(protocol: Protocol) -> None:
    """It shows the trial as it was, metrics included, wherever it is taken."""
    trial = new(protocol)
    protocol.log_trial_metrics(trial, a=1)
    before = stored(protocol, trial)
    protocol.log_trial_metrics(trial, a=2)
    assert before.metrics == {"a": [1]}
    assert stored(protocol, trial).metrics == {"a": [1, 2]}
    moved = pickle.loads(pickle.dumps(stored(protocol, trial)))
    assert (moved, moved.metrics) == (trial, {"a": [1, 2]})
    with pytest.raises(AttributeError):
        _ = before.nothing  # type: ignore[attr-defined]


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1.0, 0.5, 1e300, 2**53 + 1, 2**63, "", "1", "a", "A", "b'; --", [1], {"k": 1}, {},
]  # fmt: skip
STATUSES: list[Any] = [
    *Status,
    CustomStatus("created", 7),
    CustomStatus("mine", 204),
    CustomStatus("Error", 3),
]
TESTS = st.sampled_from(["$eq", "$ne", "$in", "$nin", "$lt", "$lte", "$gt", "$gte"])


@pytest.fixture(scope="module")
def varied() -> Iterator[tuple[Protocol, list[Trial]]]:
    """Give trials with all kinds of values and statuses."""
    protocol = get_protocol("memory:")
    for n, value in enumerate(VALUES):
        protocol.new_trial(
            Trial(
                parameters={"n": n, "x": value}, tags={"x": value, "k'": n % 3}, project_id=("orphan", None)[n % 2],
                metadata={"x": {"y": value}, "z": VALUES[-n]}, status=STATUSES[n % len(STATUSES)], revision=n % 2,
            )
        )  # fmt: skip
    for n, word in enumerate(("completed", "failed", "odd word", "SUCCESS")):  # eventrun's own
        protocol.client.trial("orphan", params={"n": 100 + n}).finish(word)
    yield protocol, protocol.fetch_trials({})
    protocol.close()


@given(data=st.data())
def test_the_store_is_asked_for_enough(varied: tuple[Protocol, list[Trial]], data: st.DataObject) -> None:
    """What is asked of the store beforehand never leaves out a trial that a query means."""
    protocol, everything = varied
    assert len(everything) == len(VALUES) + 4
    query = []
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(
            st.sampled_from(
                ["parameters.x", "parameters.n", "tags.x", "tags.k'", "metadata.x.y", "metadata.z", "metadata.x",
                 "status", "project_id", "revision", "uid", "hash"]
            )
        )  # fmt: skip
        found = [read(trial, name) for trial in everything]
        values = st.sampled_from([*found, *(STATUSES if name == "status" else VALUES)])
        if name == "status":
            values = st.sampled_from([*found, *STATUSES, *map(str, STATUSES), "Exception"])
        test = data.draw(TESTS)
        query.append(
            (name, {test: data.draw(st.lists(values, max_size=3) if test in ("$in", "$nin") else values)})
        )
    asked = read_query(query, "trial")
    assert protocol.fetch_trials(query) == [trial for trial in everything if fits(asked, trial)]


def read(trial: Trial, name: str) -> Any:
    """Read what a dotted name means."""
    root, *keys = name.split(".")
    found = getattr(trial, root)
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


# stores -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file://x.json", "x.json.eventrun"), ("file:x.json", "x.json.eventrun"), ("pickled://x", "x.eventrun"),
        ("file://a/x.json", "a/x.json.eventrun"), ("file:///a/x.json?objective=loss", "/a/x.json.eventrun"),
        ("file:/a/x.json", "/a/x.json.eventrun"),
    ],
)  # fmt: skip
def test_where_uris_lead(uri: str, path: str) -> None:
    """To a folder next to the file that they name."""
    assert url_of(uri) == str(Path(path).absolute())


def test_other_uris() -> None:
    """Ours serve as they are; what needs a server of Track's is refused."""
    assert [url_of(uri) for uri in ("runs", "sqlite:runs", "memory:", "ephemeral:", "none")] == [
        "runs", "sqlite:runs", "memory:", "memory:", "memory:",
    ]  # fmt: skip
    for uri in ("file://", "mongodb://host", "socket://a:b@host:1"):
        with pytest.raises(InvalidValue):
            get_protocol(uri)
    one, other = get_protocol("memory:"), get_protocol("memory:")
    one.new_project(Project(name="p"))
    assert (len(one.fetch_projects({})), other.fetch_projects({})) == (1, [])
    one.close()
    other.close()


def test_two_protocols_in_a_process(uri: str) -> None:
    """One sees at once what the other wrote, and goes on when the other is closed."""
    one, other = get_protocol(uri), get_protocol(uri)
    one.new_project(Project(name="p"))
    trial = new(one)
    one.log_trial_metadata(trial, a=1)
    assert stored(other, trial).metadata["a"] == 1
    one.close()
    other.log_trial_metadata(trial, a=2)
    assert stored(other, trial).metadata["a"] == 2
    other.close()


def test_a_store_removed_by_hand(uri: str) -> None:
    """Removed between two uses, with a protocol open or not, it leaves a clean start."""
    protocol = get_protocol(uri)
    protocol.new_project(Project(name="p"))
    trial = new(protocol)
    protocol.log_trial_metrics(trial, a=1)
    folder = protocol.client.folder
    assert folder is not None
    shutil.rmtree(folder)
    assert protocol.fetch_trials({}) == protocol.fetch_projects({}) == []
    with pytest.raises(ItemNotFound):
        protocol.log_trial_metrics(trial, a=2)
    protocol.new_project(Project(name="p"))
    with pytest.raises(ItemNotFound, match="any more"):
        _ = trial.metrics
    assert new(protocol) == trial
    protocol.close()
    shutil.rmtree(folder)
    protocol = get_protocol(uri)
    assert protocol.fetch_trials({}) == []
    protocol.close()


# the client ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrackClient]:
    """Give a client as Track's users make it."""
    for name in ("ORION_PROJECT", "ORION_EXPERIMENT", "ORION_TRIAL_ID"):
        monkeypatch.delenv(name, raising=False)
    client = TrackClient(uri)
    yield client
    client.close()


def test_a_training(client: TrackClient, capsys: pytest.CaptureFixture[str]) -> None:
    """Project, group, trial made of its arguments, metrics, chronos; the client's trial is as the store has it."""
    client.set_project(name="p", description="d")
    client.set_group(name="g")
    assert client.new_trial(name="first", description="d") is None  # until its arguments are known
    parser = ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.1)
    args = client.get_arguments(parser.parse_args([]), show=True)
    assert args == Namespace(lr=0.1)
    called: list[str] = []
    with client as logger:
        assert isinstance(logger, TrialLogger)
        assert client.trial.status is Status.Running
        for step in range(3):
            with logger.chrono(
                "batch", StatAggregator.lazy(0), lambda: called.append("a"), lambda: called.append("b")
            ):
                client.log_metrics(step=step, loss=1 / (step + 1))
        client.log_metadata(host="h")
        client.add_tags(model="resnet")
        logger.set_eta_total(10)
        logger.show_eta(5)
    trial = client.trial
    assert (trial.status, trial.parameters, trial.tags) == (
        Status.Completed,
        {"lr": 0.1},
        {"model": "resnet"},
    )
    assert (trial.metadata["host"], trial.metrics["loss"][2]) == ("h", 1 / 3)
    assert (trial.chronos["batch"].count, called) == (3, ["a", "b"] * 3)
    assert trial.project_id == "p"
    assert trial.group_id == TrialGroup(name="g", project_id="p").uid
    assert client.report()["status"] == {"name": "Completed", "value": 302}
    assert '"resnet"' in capsys.readouterr().out
    client.save()


def test_an_exception_keeps_its_message(client: TrackClient) -> None:
    """It goes on its way as it is, and the trial is finished and tells it, once."""
    client.new_trial(parameters={"a": 1})
    error = ValueError("bad luck")
    with pytest.raises(ValueError, match="bad luck") as caught, client:
        raise error
    assert caught.value is error
    assert (client.trial.status, client.trial.errors) == (Status.Exception, ["ValueError: bad luck"])
    assert client.trial.chronos["runtime"].val is not None


def test_the_same_parameters_again(client: TrackClient) -> None:
    """They are the next revision; another trial in the same client needs force."""
    for revision in range(3):
        logger = client.new_trial(force=True, parameters={"a": 1})
        assert logger is not None
        assert logger.trial.revision == revision
    with pytest.raises(InvalidValue, match="force"):
        client.new_trial(parameters={"a": 2})
    assert client.trial.project_id == "orphan"


def test_going_on_with_a_trial(client: TrackClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """By uid or hash, or by the environment."""
    client.set_project(name="p")
    client.new_trial(parameters={"a": 1})
    uid = client.trial.uid
    client.set_trial(uid=uid, force=True).log_metrics(x=1)
    assert client.set_trial(hash=uid.rpartition("_")[0], force=True).trial.metrics == {"x": [1]}
    with pytest.raises(ItemNotFound):
        client.set_trial(uid="nobody_0", force=True)
    with pytest.raises(ItemNotFound):
        client.set_project(name="q", force=True, get_only=True)
    with pytest.raises(InvalidValue, match="force"):
        client.set_project(name="q")
    with pytest.raises(AttributeError):
        client.nothing()
    monkeypatch.setenv("ORION_PROJECT", "p")
    monkeypatch.setenv("ORION_EXPERIMENT", "g")
    monkeypatch.setenv("ORION_TRIAL_ID", uid)
    monkeypatch.setenv("TRACK_LOG_BACKEND_NAME", client.protocol.uri)
    other = TrackClient()
    assert (other.trial.uid, other.group and other.group.name) == (uid, "g")
    other.close()


def test_output_code_and_files(
    client: TrackClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last lines of output, the program's text, and marks on what it made."""
    client.set_version(version_fun=lambda: 7)
    client.new_trial(parameters={})
    with client as logger:
        logger.capture_output(2)
        sys.stdout.write("one\ntwo\nthree\n")
        logger.log_code()
        logger.log_file(tmp_path / "model")
        logger.log_directory(tmp_path)
    trial = client.trial
    assert (trial.metadata["stdout"], trial.metadata["stderr"]) == (["two", "three"], [])
    assert trial.version == "7"
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
    (state,) = client.protocol.client.trials()
    assert state.outputs == (str(tmp_path / "model"), str(tmp_path))


FORKS = """
    import os, sys
    from eventrun.compat.track import TrackClient
    client = TrackClient(sys.argv[1])
    client.new_trial(parameters={})
    with client:
        if os.fork() == 0:
            client.log_metrics(step="child", loss=1)
            sys.exit()
        os.wait()
        assert str(client.trial.status) == "running", client.trial.status
        client.log_metrics(step="parent", loss=2)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_child_logs_and_leaves_the_end_to_its_parent(uri: str) -> None:
    """What a fork's child logs is there; its exit doesn't end the trial."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(FORKS), uri]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    protocol = get_protocol(uri)
    (trial,) = protocol.fetch_trials({})
    assert (trial.status, trial.metrics) == (Status.Completed, {"loss": {"child": 1, "parent": 2}})
    protocol.close()


EXITS = """
    import sys
    from eventrun.compat.track import TrackClient
    client = TrackClient(sys.argv[1])
    client.new_trial(parameters={"how": sys.argv[2]})
    client.log_metrics(loss=1)
    if sys.argv[2] == "error":
        raise ValueError("bad luck")
"""


def test_a_program_that_never_finishes_its_trial(uri: str) -> None:
    """At exit it is completed, and if an exception ended the program, that is told."""
    for how in ("end", "error"):
        command = [sys.executable, "-c", textwrap.dedent(EXITS), uri, how]
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("ORION_", "TRACK_"))}
        ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert (ended.returncode == 0) == (how == "end"), ended.stderr
    protocol = get_protocol(uri)
    found = {trial.parameters["how"]: (trial.status, trial.errors) for trial in protocol.fetch_trials({})}
    assert found == {
        "end": (Status.Completed, []),
        "error": (Status.Exception, ["ValueError: bad luck"]),
    }
    protocol.close()


def test_one_import_serves() -> None:
    """All of it is in one module, and what its docstring says of the reserved key is so."""
    import eventrun.compat.track as track

    assert re.search("RESERVED", track.__doc__ or "")
    assert all(hasattr(track, name) for name in track.__all__)
