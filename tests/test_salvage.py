"""Salvage: what can be read of a damaged store stands in a clean new one, and what can't is told."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import eventrun
from eventrun.codec import StoredEvent, Stream
from eventrun.errors import InvalidValue, StoreUnavailable
from eventrun.events import MetricsLogged, WriterEnded
from eventrun.salvage import REPORT, SalvageReport, salvage
from eventrun.stores.sqlite import pages
from eventrun.stores.sqlite.pages import PAGE_BYTES, RawLog
from eventrun.testing import chain

CALLS = 120  # of each of three trials


def events(folder: Path) -> list[StoredEvent]:
    with eventrun.open(folder, quiet=True, create=False) as client:
        return list(client.events())


def said(found: list[StoredEvent]) -> Counter[object]:
    """What events say, whatever stream and position they have."""
    return Counter((each.stream.subject, each.time_ns, repr(each.event)) for each in found)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of some thirty pages: three trials in many small batches, and one event that takes many pages."""
    folder = tmp_path_factory.mktemp("salvage") / "whole"
    chance = random.Random(1)
    with eventrun.open(folder, quiet=True, linger_ms=1) as client:
        trials = [client.trial("p", group="g", name=f"t{n}") for n in range(3)]
        for step in range(CALLS):
            for trial in trials:
                trial.log(loss=chance.random(), other=chance.random(), step=step)
            if step % 4 == 0:
                client.flush().result()
            if step == CALLS // 2:
                trials[0].log(big=chance.randbytes(20_000).hex())
        for trial in trials:
            trial.finish()
    return folder


@pytest.fixture
def broken(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "broken"))


def saved(broken: Path, number: int = 0) -> tuple[SalvageReport, list[StoredEvent]]:
    """Salvage a store, check what comes out, and that the damaged one is as it was."""
    before = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    out = broken.parent / f"out{number}"
    report = salvage(broken, out)
    after = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    assert before == after
    assert json.loads((out / REPORT).read_text()) == json.loads(json.dumps(report.to_dict()))
    with eventrun.open(out, quiet=True, create=False) as client:
        assert client.verify(views=True).result().ok
        found = list(client.events())
    ended = sum(isinstance(each.event, WriterEnded) for each in found)
    assert report.events <= len(found) <= report.events + ended
    return report, found


def test_a_sound_store_comes_out_as_it_was(whole: Path, broken: Path) -> None:
    """Same positions, streams, sequences, times and events; nothing lost, nothing in the report."""
    report, found = saved(broken)
    assert found == events(whole)
    assert (report.ok, report.lost, report.events) == (True, 0, len(found))
    assert (report.problems, report.continued, report.from_journals) == ((), (), 0)


def test_any_page_may_be_gone(whole: Path, broken: Path) -> None:
    """A page costs at most the batches on it; pages of schema, trees and indexes cost nothing."""
    data = (broken / "log.db").read_bytes()
    expected = events(whole)
    pages = range(0, len(data), PAGE_BYTES)
    free = 0
    for number, start in enumerate(pages):
        gone = data[:start] + bytes(PAGE_BYTES) + data[start + PAGE_BYTES :]
        (broken / "log.db").write_bytes(gone)
        report, found = saved(broken, number)
        assert not said(found) - said(expected)
        assert bool(report.lost) == bool(report.problems)
        assert report.lost == len(expected) - len(found)
        free += report.ok
    assert free >= 4, "the schema, two inner pages and the index"
    assert free < len(pages)


def test_what_follows_a_gap_goes_on_as_another_writer(whole: Path, broken: Path) -> None:
    """Under the same subject, numbered from 1, named in the report; views show all that is left of a trial."""
    data = bytearray((broken / "log.db").read_bytes())
    expected = events(whole)
    victim = expected[len(expected) // 2]
    raw = RawLog(broken / "log.db")
    (place,) = {
        candidate.place
        for candidate in raw.candidates()
        if candidate.batch.header.stream == victim.stream
        and candidate.batch.header.first <= victim.sequence <= candidate.batch.header.last
    }
    raw.close()
    data[place.offset + place.at + 8] ^= 1  # in its header
    (broken / "log.db").write_bytes(data)
    report, found = saved(broken)
    (continued,) = report.continued
    (problem,) = report.problems
    assert continued.stream == problem.where == str(victim.stream)
    assert problem.first is not None
    assert problem.last is not None
    assert problem.first <= victim.sequence <= problem.last == continued.first - 1
    assert report.lost == problem.last - problem.first + 1
    lost = range(problem.first, problem.last + 1)
    left = [each for each in expected if each.stream != victim.stream or each.sequence not in lost]
    assert [(each.time_ns, each.event) for each in found] == [(each.time_ns, each.event) for each in left]
    behind = [each.sequence for each in found if str(each.stream) == continued.now]
    assert behind == list(range(1, len(behind) + 1))
    with eventrun.open(Path(report.out), quiet=True) as client:
        for trial in client.trials():
            logged = [
                e for e in left if e.stream.subject == f"t/{trial.id}" and isinstance(e.event, MetricsLogged)
            ]
            assert trial.metrics["loss"].count + ("big" in trial.metrics) == len(logged)
            assert trial.status == "completed"


def test_a_cut_off_file(whole: Path, broken: Path) -> None:
    """What lies before the cut is there, and the report tells how much isn't, by log.mark."""
    data = (broken / "log.db").read_bytes()
    expected = events(whole)
    for number, size in enumerate((0, 100, len(data) // 3, len(data) - 5000)):
        (broken / "log.db").write_bytes(data[:size])
        report, found = saved(broken, number)
        assert not said(found) - said(expected)
        assert report.lost == len(expected) - len(found)
        assert (report.lost > 0) == bool(report.problems)
        told = [problem for problem in report.problems if problem.where == "log.db"]
        assert [(problem.first, problem.last) for problem in told] == (
            [(size, len(data) - 1)] if size else []
        )
    (broken / "log.db").unlink()
    report, found = saved(broken, 9)
    assert (found, report.lost) == ([], len(expected))


def killed(folder: Path, code: str) -> None:
    """Run code that logs to a store and then kills itself."""
    text = (
        "import os, signal, sys, eventrun\nclient = eventrun.open(sys.argv[1], quiet=True)\n"
        + textwrap.dedent(code)
    )
    done = subprocess.run(
        [sys.executable, "-c", text + "\nos.kill(os.getpid(), signal.SIGKILL)", str(folder)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr


KILLED = """
    trial = client.trial("p", name="killed")
    for step in range(200):
        trial.log(loss=step * 0.1, step=step)
        if step % 20 == 0:
            client.flush().result()
    trial.log(last=1)
"""


@pytest.mark.parametrize("gone", ["log.db", "log.db-wal", "both", "neither", "header of log.db"])
def test_a_killed_writers_store(tmp_path: Path, gone: str) -> None:
    """Journals, write-ahead file and database make up for each other; the trial is lost in the new store too."""
    broken = tmp_path / "broken"
    killed(broken, KILLED)
    if gone == "header of log.db":
        data = (broken / "log.db").read_bytes()
        (broken / "log.db").write_bytes(os.urandom(200) + data[200:])
    else:
        for name in ("log.db", "log.db-wal") if gone == "both" else (gone,):
            (broken / name).unlink(missing_ok=True)
    report, found = saved(broken)
    trial = [each for each in found if isinstance(each.event, MetricsLogged)]
    assert len(trial) == 201
    assert report.lost == 0
    assert [each.sequence for each in trial] == list(range(3, 204))
    with eventrun.open(report.out, quiet=True) as client:
        assert client.get("killed").result().status == "lost"
        assert client.history("killed", "loss").result().values[-1] == pytest.approx(19.9)


def test_journals_that_recovery_put_aside(tmp_path: Path) -> None:
    """Of a `.damaged` folder all is saved that a checksum vouches for, past what the log has."""
    broken = tmp_path / "broken"
    killed(broken, KILLED.replace("if step % 20 == 0", "if step == 20"))
    (folder,) = (broken / "journals").iterdir()
    folder.rename(folder.with_name(folder.name + ".damaged"))
    report, found = saved(broken)
    assert len([each for each in found if isinstance(each.event, MetricsLogged)]) == 201
    assert report.from_journals > 100
    assert report.ok


def test_claims_stay_claims(tmp_path: Path) -> None:
    """Behind a gap a claim stream closes up: writer 0 goes on under its own name."""
    claims = Stream("t/a", 0)
    batches = chain(claims, [[(n, MetricsLogged({"n": n}))] for n in range(6)])
    with eventrun.open(tmp_path / "broken", quiet=True) as client:
        for batch in batches:
            client.append([batch]).result()
    file = tmp_path / "broken" / "log.db"
    data = bytearray(file.read_bytes())
    for place in occurrences(data, batches[2].frame):
        data[place + 8] ^= 1
    file.write_bytes(data)
    report, found = saved(tmp_path / "broken")
    assert [each.stream for each in found] == [claims] * 5
    assert [each.sequence for each in found] == [1, 2, 3, 4, 5]
    assert [each.event for each in found] == [MetricsLogged({"n": n}) for n in (0, 1, 3, 4, 5)]
    assert (report.lost, report.continued) == (1, ())


def occurrences(data: bytes | bytearray, part: bytes) -> list[int]:
    found, at = [], data.find(part)
    while at >= 0:
        found.append(at)
        at = data.find(part, at + 1)
    return found


def test_a_store_in_use_is_salvaged(tmp_path: Path) -> None:
    """The client's own, live journals and write-ahead file included, while it goes on; nothing is locked or closed."""
    with eventrun.open(tmp_path / "runs", quiet=True) as client, client.trial("p", name="live") as trial:
        trial.log(loss=1)
        client.flush().result()
        report = client.salvage(tmp_path / "out").result()
        assert report.ok
        trial.log(loss=2)
        client.flush().result()
        # SQLite's locks are still held: another process doesn't take itself for the only one.
        code = "import sys, eventrun; c = eventrun.open(sys.argv[1], quiet=True); list(c.events()); c.close()"
        for _ in range(2):
            subprocess.run(
                [sys.executable, "-c", code, str(tmp_path / "runs")], check=True, capture_output=True
            )
        trial.log(loss=3)
        client.flush().result()
        assert list(client.history("live", "loss").result().values) == [1, 2, 3]
    assert len(events(tmp_path / "out")) == report.events
    with eventrun.open(tmp_path / "runs", quiet=True) as client:
        assert list(client.history("live", "loss").result().values) == [1, 2, 3]
        assert client.verify(views=True).result().ok


def test_descriptors_do_not_pile_up(broken: Path) -> None:
    """What is kept open of a database, for the sake of SQLite's locks, is let go when the file is gone."""
    before = len(pages._kept)
    for _ in range(5):
        with eventrun.open(broken, quiet=True) as client:
            assert client.verify().result().ok
    assert len(pages._kept) <= before + 2


def test_what_is_refused(whole: Path, tmp_path: Path) -> None:
    """A folder that isn't empty is never written to; a folder without a store holds nothing to save."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(StoreUnavailable, match="not an empty folder"):
        salvage(whole, tmp_path / "full")
    with pytest.raises(StoreUnavailable, match="nothing of a store"):
        salvage(tmp_path / "nowhere", tmp_path / "out")
    with eventrun.open("memory:") as client, pytest.raises(InvalidValue, match="no files"):
        client.salvage(tmp_path / "out")


Shown = Callable[..., Any]


def test_the_command(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 when all is saved, else 1 with a table or JSON of what isn't; what continues is named."""
    from eventrun.cli import main

    out = tmp_path / "out"
    assert main(["--store", str(broken), "salvage", str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "none lost" in shown.err
    data = (broken / "log.db").read_bytes()
    middle = len(data) // PAGE_BYTES // 2 * PAGE_BYTES
    (broken / "log.db").write_bytes(
        b"?" * 4096 + data[4096:middle] + bytes(PAGE_BYTES) + data[middle + 4096 :]
    )
    assert main(["--store", str(broken), "events"]) == 1
    assert "eventrun salvage OUT" in capsys.readouterr().err
    shutil.rmtree(out)
    assert main(["--store", str(broken), "salvage", str(out)]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("where ")
    assert " goes on as " in shown.err
    shutil.rmtree(out)
    assert main(["--store", str(broken), "salvage", str(out), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"]
    assert main(["--store", str(out), "verify"]) == 0
