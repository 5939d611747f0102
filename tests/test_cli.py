"""Each verb does what its help says; data on stdout, talk on stderr, exit codes, JSON, pipes and terminals."""

import csv
import io
import json
import os
import pty
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

import eventrun
from eventrun.cli import main, terminal
from eventrun.cli.opening import moment
from eventrun.cli.verbs import VERBS, parse
from eventrun.errors import InvalidValue
from eventrun.pending import Answer, Pending
from eventrun.summary import width

NAMES = ("plain", "ünïcode 学習率", "n" * 200, "esc\x1b[2Jape\nline", "[bold]markup[/bold]")


class Shown(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


Run = Callable[..., Shown]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with five trials, two of them failed; written once, only read by the tests."""
    folder = tmp_path_factory.mktemp("cli") / "runs"
    with eventrun.open(folder, quiet=True) as client:
        for number, name in enumerate(NAMES):
            trial = client.trial(
                "alpha" if number < 3 else "beta", group="g", name=name, params={"lr": 0.1 * number}
            )
            with trial:
                trial.add_tags("good" if number == 0 else "bad", rank=number)
                for step in range(100):
                    trial.log(loss=1 / (step + 1), step=step, subset="val")
                trial.log(odd=float("nan"))
                with trial.chrono("epoch"):
                    pass
                trial.add_note("a note")
                if number >= 3:
                    trial.finish("failed", "it broke")
            client.flush().result()
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, store: Path) -> Run:
    """Run a command line in this process, on the store above unless another is named."""
    monkeypatch.setenv("EVENTRUN_URL", str(store))
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> Shown:
        code = main(arguments)
        return Shown(code, *capsys.readouterr())

    return run


def environment(**changes: str) -> dict[str, str]:
    root = str(Path(__file__).parent.parent)
    known = {
        name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR", "EVENTRUN_URL")
    }
    return {**known, "PYTHONPATH": root, "TERM": "xterm-256color", **changes}


def process(*arguments: str, **changes: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "error", "-m", "eventrun", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**changes), timeout=60)


def on_terminal(*arguments: str, columns: int = 80, **changes: str) -> Shown:
    """Run a command line with a terminal as stdout and stderr; all that is seen stands in `out`."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, "-m", "eventrun", *arguments]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**changes)
    ) as child:
        os.close(theirs)
        seen = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the terminal's other end was closed
                break
            if not piece:
                break
            seen += piece
        code = child.wait()
    os.close(ours)
    return Shown(code, seen.decode().replace("\r\n", "\n"), "")


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


# help


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_and_an_example(verb: str, run: Run) -> None:
    """Help is on stdout, ends with an example of this very verb, and that example can be parsed."""
    shown = run(verb, "--help")
    assert shown.code == 0
    assert shown.err == ""
    assert f"eventrun {verb}" in shown.out
    _, _, examples = shown.out.partition("example")
    assert re.search(rf"^  eventrun (--store \S+ )?{verb}\b", examples, re.MULTILINE)
    for example in VERBS[verb].examples:
        words = shlex.split(re.split(r" (?:[|]|> \S+$)", example)[0])
        assert parse(words[1:]).run


def test_help_lists_every_verb_with_its_summary(run: Run) -> None:
    """The list of verbs is complete, and says how trials are named."""
    shown = run("--help")
    assert shown.code == 0
    for name, verb in VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(verb.summary)}$", shown.out, re.MULTILINE)
    assert "@latest" in shown.out
    assert all(width(line) <= 100 for line in shown.lines)


def test_help_imports_nothing_heavy() -> None:
    """Neither the list of verbs nor a wrong verb loads what folds, stores or encodes."""
    package = Path(eventrun.__file__).parent
    code = f"""
import sys, types
bare = types.ModuleType("eventrun")  # the package's own names are another test's matter
bare.__path__ = [{str(package)!r}]
sys.modules["eventrun"] = bare
from eventrun.cli import main
assert main(["--help"]) == 0
assert main(["lss"]) == 2
heavy = {{"msgspec", "asyncio", "anyio", "sqlite3", "yaml", "rich", "eventrun.client"}} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_nothing_typed_shows_help_and_is_wrong_usage(run: Run) -> None:
    """Without a verb the list of verbs is shown on stderr."""
    shown = run()
    assert shown.code == 2
    assert shown.out == ""
    assert "verify" in shown.err


def test_a_wrong_verb_is_answered_with_the_one_that_was_meant(run: Run) -> None:
    """Wrong usage is exit code 2 and two calm lines."""
    shown = run("lss")
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.splitlines() == [
        "there is no verb 'lss'; did you mean 'ls'?",
        "to see what can be typed: eventrun --help",
    ]
    shown = run("show")
    assert shown.code == 2
    assert "eventrun show --help" in shown.err


def test_version_is_told(run: Run) -> None:
    """One line with the version on stdout."""
    shown = run("--version")
    assert shown.code == 0
    assert re.fullmatch(r"eventrun \S+( .*)?\n", shown.out)


# ls


def test_ls_shows_a_line_per_trial_newest_first(run: Run) -> None:
    """The table has a title line and a line for each trial, with its status and last values; no name breaks it."""
    shown = run("ls")
    assert shown.code == 0
    assert shown.err == ""
    title, *lines = shown.lines
    assert title.split()[:3] == ["id", "name", "project"]
    assert "val/loss" in title
    assert len(lines) == len(NAMES)
    assert "markup" in lines[0]
    assert "plain" in lines[-1]
    assert "0.01" in lines[-1]
    assert "\x1b" not in shown.out
    assert "esc\\x1b[2Jape\\nline" in shown.out


def test_ls_chooses_sorts_and_limits(run: Run) -> None:
    """Filters, an order that begins with a dash and a limit do what they say."""

    def names(*arguments: str) -> list[str]:
        return [trial["name"] for trial in run("ls", "--json", *arguments).json]

    assert names() == list(NAMES[::-1])
    assert names("--sort", "created") == list(NAMES)
    assert names("--sort", "-created", "--limit", "2") == list(NAMES[:2:-1])
    assert names("--project", "beta") == list(NAMES[:2:-1])
    assert names("--status", "failed") == list(NAMES[:2:-1])
    assert names("--tag", "good") == ["plain"]
    assert names("--where", "'good' in tags and status == 'completed'") == ["plain"]
    refused = run("ls", "--where", "name.upper() == 'X'")
    assert refused.code == 2
    assert refused.err.splitlines()[1:] == ["  name.upper() == 'X'", "  ^"]
    assert names("--name", NAMES[1]) == [NAMES[1]]
    assert names("--group", "none") == []


def test_ls_says_when_there_is_more(run: Run) -> None:
    """A list that was cut says so on stderr; one that wasn't, doesn't."""
    assert "more" in run("ls", "--limit", "2").err
    assert run("ls", "--limit", "0").err == ""
    assert run("ls", "--limit", "5").err == ""


def test_ls_of_nothing_says_why(run: Run) -> None:
    """No trial is no error, and stderr says what was asked for."""
    shown = run("ls", "--project", "nowhere")
    assert (shown.code, shown.out) == (0, "")
    assert "eventrun ls" in shown.err


def test_ls_shows_the_metrics_that_are_asked_for(run: Run) -> None:
    """--metric names the columns; a trial without it has an empty cell."""
    assert "nan" in run("ls", "--metric", "odd").lines[1]
    assert run("ls", "--metric", "nowhere").lines[0].split()[-2:] == ["nowhere", "tags"]


def test_ls_shows_groups_and_projects(run: Run) -> None:
    """Each with its trials, how they ended, and what varies."""
    title, *lines = run("ls", "projects").lines
    assert title.startswith("project")
    assert [line.split()[0] for line in lines] == ["alpha", "beta"]
    assert "2 failed" in lines[1]
    assert "lr" in lines[1]
    assert len(run("ls", "groups").lines) == 3
    assert [group["name"] for group in run("ls", "groups", "--json", "--project", "beta").json] == ["g"]
    assert {project["project"]: project["trials"] for project in run("ls", "projects", "--json").json} == {
        "alpha": 3,
        "beta": 2,
    }


@pytest.mark.parametrize(
    "arguments",
    [("ls", "--limit", "-1"), ("ls", "groups", "--tag", "x"), ("ls", "runs"), ("ls", "--limit", "many")],
)
def test_ls_refuses_what_makes_no_sense(arguments: tuple[str, ...], run: Run) -> None:
    """Wrong arguments are exit code 2 and a line on stderr."""
    shown = run(*arguments)
    assert (shown.code, shown.out) == (2, "")
    assert shown.err


# show, history


def test_show_tells_all_about_a_trial(run: Run) -> None:
    """Params, metrics with their course, chronos, notes, tags and times stand under headings."""
    shown = run("show", "plain")
    assert shown.code == 0
    for expected in ("plain", "alpha", "completed", "good, rank=0", "params", "lr", "metrics", "val/loss", "0.01",
                     "chronos", "epoch", "a note", "0 to 99", "█"):  # fmt: skip
        assert expected in shown.out
    assert "it broke" in run("show", NAMES[4]).out


def test_a_trial_is_named_by_id_prefix_name_or_latest(run: Run) -> None:
    """Each of the four ways finds the trial."""
    trial = run("show", "plain", "--json").json
    assert trial["name"] == "plain"
    for name in (trial["id"], trial["id"][:8]):
        assert run("show", name, "--json").json["id"] == trial["id"]
    assert run("show", "@latest", "--json").json["name"] == NAMES[-1]


def test_show_gives_json_without_loss(run: Run) -> None:
    """Non-finite numbers are written as everywhere in eventrun's JSON."""
    trial = run("show", "plain", "--json").json
    assert trial["metrics"]["odd"]["last"] == {"$f": "nan"}
    assert trial["params"] == {"lr": 0.0}
    assert trial["tags"] == {"good": None, "rank": 0}


def test_a_trial_that_is_not_there_is_exit_code_1(run: Run) -> None:
    """The error says what to type next, on stderr alone."""
    shown = run("show", "nowhere")
    assert (shown.code, shown.out) == (1, "")
    assert "nowhere" in shown.err
    assert "Traceback" not in shown.err
    assert len(shown.err.splitlines()) <= 2
    assert run("history", "plain", "nowhere").code == 1


def test_history_shows_every_point_in_a_pipe(run: Run) -> None:
    """All points stand on lines of their own: step, time, value."""
    title, *lines = run("history", "plain", "val/loss").lines
    assert title.split() == ["step", "time", "value"]
    assert len(lines) == 100
    assert lines[0].split()[0] == "0"
    assert lines[1].split()[-1] == "0.5"


def test_history_thins_out_and_chooses(run: Run) -> None:
    """--points keeps the ends, --between keeps steps within; JSON has columns."""
    few = run("history", "plain", "val/loss", "--points", "10", "--json").json
    assert len(few["values"]) < 50
    assert (few["steps"][0], few["steps"][-1]) == (0, 99)
    some = run("history", "plain", "val/loss", "--between", "10", "19", "--json").json
    assert some["steps"] == list(range(10, 20))
    assert run("history", "plain", "odd", "--json").json["values"] == [{"$f": "nan"}]
    assert run("history", "plain", "val/loss", "--points", "0").code == 2


# events, tail, at


def test_events_are_lines_in_the_order_of_the_log(run: Run) -> None:
    """Each has position, time, subject, kind and what it says, and no event breaks its line."""
    everything = run("events").lines
    assert [int(line.split()[0]) for line in everything] == list(range(1, len(everything) + 1))
    assert re.search(r"MetricsLogged +loss 1, step 0, subset val", run("events", "--trial", "plain").out)
    after = run("events", "--after", "5", "--limit", "3").lines
    assert after == everything[5:8]
    assert all("\x1b" not in line for line in everything)
    assert run("events", "--after", "-1").code == 2


def test_events_as_json_are_what_export_writes(run: Run) -> None:
    """One JSON object a line, the same as `export events`."""
    lines = run("events", "--json", "--trial", "plain").lines
    assert {json.loads(line)["event"]["kind"] for line in lines} >= {
        "TrialCreated",
        "MetricsLogged",
        "TrialFinished",
    }
    assert set(json.loads(lines[0])) == {"position", "subject", "writer", "sequence", "time_ns", "event"}


def test_at_shows_the_past(run: Run) -> None:
    """The same verbs, as of a position, a time in nanoseconds, or an ISO date."""
    first = run("show", "plain", "--json").json
    names = [trial["name"] for trial in run("at", str(first["position"]), "ls", "--json").json]
    assert names == ["plain"]
    assert run("at", str(first["finished_ns"]), "show", "plain", "--json").json["name"] == "plain"
    assert run("at", "2001-01-01", "ls", "--json").json == []
    assert run("at", "20", "history", "plain", "val/loss", "--json").json["steps"] == list(range(len(
        [1 for line in run("events", "--limit", "20").lines if "MetricsLogged" in line]
    )))  # fmt: skip
    assert len(run("at", "20", "events").lines) == 20


def test_at_refuses_what_is_no_moment_and_verbs_that_do_not_read(run: Run) -> None:
    """Exit code 2 and what moments look like."""
    shown = run("at", "yesterday", "ls")
    assert shown.code == 2
    assert "2025-11-21T12:30" in shown.err
    assert run("at", "5", "rebuild").code == 2


def test_a_moment_is_a_position_a_date_or_nanoseconds() -> None:
    """Large numbers are times; a date without a zone is of this machine's zone."""
    assert moment("5000") == {"position": 5000}
    assert moment("1700000000000000000") == {"time": 1_700_000_000_000_000_000}
    assert moment("2023-11-14T22:13:20Z") == {"time": 1_700_000_000_000_000_000}
    local = time.mktime(time.strptime("2023-11-14 22:13:20", "%Y-%m-%d %H:%M:%S"))
    assert moment("2023-11-14 22:13:20") == {"time": int(local) * 10**9}
    with pytest.raises(InvalidValue):
        moment("-5")


def test_tail_follows_until_it_is_interrupted(tmp_path: Path) -> None:
    """Events appear as they become durable; Ctrl-C ends it without a word, exit code 130."""
    folder = str(tmp_path / "runs")
    with eventrun.open(folder, quiet=True) as client, client.trial("p", name="live") as trial:
        trial.log(loss=1.0)
        client.flush().result()
        command = [sys.executable, "-m", "eventrun", "--store", folder, "tail", "--after", "0", "--json"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        ) as child:
            assert child.stdout is not None
            assert child.stderr is not None
            kinds = [json.loads(child.stdout.readline())["event"]["kind"] for _ in range(4)]
            assert "MetricsLogged" in kinds
            trial.log(loss=2.0, step=7)
            client.flush().result()
            assert json.loads(child.stdout.readline())["event"]["step"] == 7
            child.send_signal(signal.SIGINT)
            assert child.wait(30) == 130
            assert child.stderr.read() == ""


# verify, rebuild, backup


def test_verify_says_ok(run: Run) -> None:
    """A sound log is one line and exit code 0; JSON has the numbers."""
    shown = run("verify")
    assert shown.code == 0
    assert re.match(r"ok: [\d,]+ events in [\d,]+ batches of [\d,]+ streams, ", shown.out)
    report = run("verify", "--views", "--json").json
    assert report["problems"] == []
    assert report["events"] == len(run("events").lines)


def test_verify_finds_damage(tmp_path: Path, run: Run) -> None:
    """A flipped byte is named with its positions, exit code 1, and what to do stands on stderr."""
    folder = tmp_path / "runs"
    with eventrun.open(folder, quiet=True) as client, client.trial("p") as trial:
        for step in range(2000):
            trial.log(loss=step * 0.1, text="find me", step=step)
    file = folder / "log.db"
    data = bytearray(file.read_bytes())
    data[-2000] ^= 0xFF
    file.write_bytes(data)
    shown = run("--store", str(folder), "verify")
    assert shown.code == 1
    assert shown.out
    assert "Traceback" not in shown.err
    assert run("--store", str(folder), "verify", "--json").json["problems"]


def test_verify_tells_ranges_in_a_table(tmp_path: Path, run: Run) -> None:
    """Where, what it costs, what: a line for each stretch of damage; the same as JSON."""
    folder = tmp_path / "runs"
    with eventrun.open(folder, quiet=True, linger_ms=1) as client, client.trial("p") as trial:
        for step in range(20):
            trial.log(loss=step * 0.1, step=step)
            client.flush().result()
    raw = sqlite3.connect(folder / "log.db", isolation_level=None)
    raw.execute("DELETE FROM batches WHERE position IN (7, 8, 12)")
    raw.close()
    shown = run("--store", str(folder), "verify")
    assert shown.code == 1
    assert re.match(r"where +costs +what$", shown.lines[0])
    assert re.match(r"positions 7\.\.8 +2 events +are missing", shown.lines[1])
    assert any(re.match(r"positions 12\.\.12 +1 event +are missing", line) for line in shown.lines)
    assert "salvage OUT" in shown.err
    problems = run("--store", str(folder), "verify", "--json").json["problems"]
    assert problems[0] == {
        "kind": "positions", "where": "", "first": 7, "last": 8, "what": problems[0]["what"], "events": 2,
        "text": f"positions 7..8: {problems[0]['what']}",
    }  # fmt: skip


def test_verify_tells_of_a_log_that_is_gone_or_cannot_be_opened(tmp_path: Path, run: Run) -> None:
    """It is a finding of verify's like any other, not an error; other verbs say what to type."""
    folder = tmp_path / "runs"
    with eventrun.open(folder, quiet=True) as client, client.trial("p") as trial:
        trial.log(loss=1)
    data = (folder / "log.db").read_bytes()
    for damaged in (b"", b"x" * 100 + data[100:], None):
        if damaged is None:
            (folder / "log.db").unlink()
        else:
            (folder / "log.db").write_bytes(damaged)
        shown = run("--store", str(folder), "verify", "--json")
        assert shown.code == 1
        assert shown.json["problems"][0]["where"] == "log.db"
        assert not shown.json["ok"]
        shown = run("--store", str(folder), "events")
        assert (shown.code, shown.out) == (1, "")
        assert "eventrun salvage OUT" in shown.err
        assert any(
            "salvage" in problem
            for problem in run("--store", str(folder), "doctor", "--json").json["problems"]
        )
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") == [
        "journals",
        "log.mark",
    ]


def test_verify_looks_into_journals(tmp_path: Path, run: Run) -> None:
    """Journals that live writers hold are read up to their heads; what nothing vouches for is told."""
    folder = tmp_path / "runs"
    with eventrun.open(folder, quiet=True) as client, client.trial("p") as trial:
        trial.log(loss=1)
        client.flush().result()
        shown = run("--store", str(folder), "verify")
        assert shown.code == 0
        assert re.search(r"[45] events in a live journal", shown.err)
        (arena,) = folder.glob("journals/*/*.arena")
        with arena.open("r+b") as file:
            place = arena.read_bytes().index(b"loss")
            file.seek(place)
            file.write(b"lost")
        report = run("--store", str(folder), "verify", "--json")
        assert report.code == 1
        (problem,) = report.json["problems"]
        assert problem["where"].startswith("journals/")
        assert report.json["journals"][0]["state"] == "live"


def test_rebuild_makes_the_same_views(run: Run, tmp_path: Path) -> None:
    """What is shown after a rebuild is what was shown before, for one trial and for all."""
    before = run("ls", "--json").out
    assert run("rebuild").code == 0
    assert run("ls", "--json").out == before
    assert run("rebuild", "--trial", "plain").code == 0
    assert run("ls", "--json").out == before
    assert run("rebuild", "--trial", "nowhere").code == 1


def test_backup_is_a_store_of_its_own(run: Run, tmp_path: Path) -> None:
    """The copy holds the same; a folder with something in it is refused."""
    out = tmp_path / "copy"
    shown = run("backup", str(out))
    assert shown.code == 0
    assert str(out) in shown.err
    assert run("--store", str(out), "export", "events").out == run("export", "events").out
    assert run("backup", str(out)).code == 1


# export, import


def test_events_go_out_and_in_again(run: Run, tmp_path: Path) -> None:
    """A second store gives the same states; importing twice changes nothing and says so."""
    file, other = str(tmp_path / "events.jsonl"), str(tmp_path / "other")
    assert run("export", "events", "--out", file).code == 0
    shown = run("--store", other, "import", file)
    assert (shown.code, shown.out) == (0, "")
    assert "imported" in shown.err
    again = run("--store", other, "import", file)
    assert again.err.startswith("0 events imported")
    assert run("--store", other, "ls", "--json").out == run("ls", "--json").out


def test_a_bad_import_is_named(run: Run, tmp_path: Path) -> None:
    """File and line stand in the error; a missing file is an error too."""
    file = tmp_path / "bad.jsonl"
    file.write_text(run("events", "--limit", "2", "--json").out + "{}\n", encoding="utf-8")
    shown = run("--store", str(tmp_path / "other"), "import", str(file))
    assert shown.code == 1
    assert len(shown.err.splitlines()) == 2
    assert f"{file}, line 3" in shown.err
    assert len(run("--store", str(tmp_path / "other"), "events").lines) == 2
    assert run("import", str(tmp_path / "nowhere")).code == 1


def test_metrics_go_out_as_csv_and_json_lines(run: Run, tmp_path: Path) -> None:
    """CSV by default, JSON lines by name of file or by --format; one trial or all."""
    shown = run("export", "metrics", "--trial", "plain")
    found = list(csv.DictReader(io.StringIO(shown.out)))
    assert len(found) == 101
    assert found[0]["metric"] == "val/loss"
    file = tmp_path / "metrics.jsonl"
    run("export", "metrics", "--out", str(file))
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 101 * len(NAMES)
    assert json.loads(lines[100])["value"] == {"$f": "nan"}
    assert run("export", "metrics", "--format", "jsonl", "--trial", "plain").lines == lines[:101]
    assert run("export", "events", "--format", "csv").code == 2


def test_an_export_that_fails_leaves_no_half_file(run: Run, tmp_path: Path) -> None:
    """A file gets its name only when all is in it; what was there before stays."""
    file = tmp_path / "out.csv"
    file.write_text("before")
    assert run("export", "metrics", "--trial", "nowhere", "--out", str(file)).code == 1
    assert file.read_text() == "before"
    assert os.listdir(tmp_path) == ["out.csv"]
    assert run("export", "metrics", "--out", str(tmp_path / "no" / "folder")).code == 1


# doctor, demo


def test_doctor_tells_how_things_are(run: Run, store: Path) -> None:
    """Path, format, sizes, file system, promises and versions; nothing is wrong here."""
    shown = run("doctor")
    assert shown.code == 0, shown.out
    for expected in (str(store), "sqlite", "events", "log.db", "python", "msgspec", "no problem found"):
        assert expected in shown.out
    found = run("doctor", "--json").json
    assert found["problems"] == []
    assert found["log_calls"] in ("crash_safe", "accepted")
    assert found["events"] == len(run("events").lines)


def test_doctor_sees_writers(run: Run, tmp_path: Path) -> None:
    """A live writer's journal is listed; a killed one's is a problem that says what will happen; neither is touched."""
    folder = tmp_path / "runs"
    with eventrun.open(folder, quiet=True) as client, client.trial("p") as trial:
        trial.log(loss=1.0)
        client.flush().result()
        found = run("--store", str(folder), "doctor", "--json").json
        assert [journal["state"] for journal in found["journals"]] == ["live"]
        assert [journal["held_events"] for journal in found["journals"]] == [0]
        assert found["problems"] == []
    code = (
        f"import eventrun, os, signal; t = eventrun.open({str(folder)!r}, linger_ms=1e6).trial('p'); "
        "t.log(loss=1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], env=environment())
    for _ in range(2):
        shown = run("--store", str(folder), "doctor")
        assert shown.code == 1
        assert "killed writer" in shown.out
        assert (
            "holds 4 events that the log lacks, the oldest" in shown.out
        )  # the project's and three of the trial
    (dead,) = run("--store", str(folder), "doctor", "--json").json["journals"]
    assert (dead["held_events"], dead["held_age_s"] < 600) == (4, True)
    assert 0 < dead["held_bytes"] < dead["bytes"]
    run("--store", str(folder), "ls")
    assert run("--store", str(folder), "doctor").code == 0


def test_collect_takes_in_what_another_host_left(run: Run, tmp_path: Path) -> None:
    """What may still be written to is left and told, unless its host is named; doctor says how it is."""
    folder = tmp_path / "runs"
    code = (
        f"import eventrun, os, signal; t = eventrun.open({str(folder)!r}, linger_ms=1e6).trial('p', name='a'); "
        "t.log(loss=1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], env=environment())
    (lock,) = (folder / "journals").glob("*/lock")
    lock.write_text('{"host": "elsewhere", "boot": "b", "pid": 1}')
    shown = run("--store", str(folder), "doctor")
    assert shown.code == 1
    assert "eventrun collect" in shown.out
    assert run("--store", str(folder), "doctor", "--json").json["journals"][0]["state"] == "of another host"
    shown = run("--store", str(folder), "collect")
    assert (shown.code, shown.out) == (0, "0 events taken in\n")
    assert "eventrun collect --host elsewhere" in shown.err
    found = run("--store", str(folder), "collect", "--host", "elsewhere", "--json").json
    assert (found["writers"], found["events"]) == (1, 4)
    assert run("--store", str(folder), "show", "a", "--json").json["status"] == "lost"
    assert run("--store", str(folder), "doctor").code == 0
    assert run("--store", str(folder), "collect", "--follow", "--all").code == 2


def test_collect_follows_until_it_is_interrupted(tmp_path: Path) -> None:
    """On a network disk it brings to the log what a living writer leaves there; doctor tells who collects."""
    folder, mounts = tmp_path / "runs", tmp_path / "mounts"
    mounts.write_text(f"1 1 0:1 / / rw - ext4 a rw\n2 1 0:2 / {folder} rw - nfs b rw\n")
    prelude = f"import eventrun.filesystems as f, pathlib; f.MOUNTINFO = pathlib.Path({str(mounts)!r}); "
    folder.mkdir()
    cli = prelude + "import sys; from eventrun.cli import main; sys.exit(main(sys.argv[1:]))"
    code = (
        f"{prelude} import eventrun, sys; c = eventrun.open({str(folder)!r}); t = c.trial('p', name='a'); "
        "t.log(i=1); c.flush().result(); print('x', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    writer = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdin=pipe, stdout=pipe)
    with writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        command = [sys.executable, "-c", cli, "--store", str(folder)]
        following = subprocess.Popen(
            [*command, "collect", "--follow"], env=environment(), stdout=pipe, stderr=pipe, text=True
        )
        with following:
            assert following.stdout is not None
            assert following.stdout.readline() == "4 events taken in\n"
            following.send_signal(signal.SIGINT)
        done = subprocess.run([*command, "doctor"], env=environment(), capture_output=True, text=True)
        assert "nfs, on a network" in done.stdout
        assert "crash_safe" in done.stdout
        assert "1 live" in done.stdout
        writer.communicate()


def test_doctor_sees_what_could_not_be_recovered(run: Run, tmp_path: Path) -> None:
    """A journal that recovery has put aside is a problem until a person removes it."""
    folder = tmp_path / "runs"
    with eventrun.open(folder, quiet=True) as client, client.trial("p") as trial:
        trial.log(loss=1.0)
    damaged = folder / "journals" / "00000000000000ff.damaged"
    damaged.mkdir(parents=True)
    (damaged / "lock").write_text("{")
    (damaged / "1-16384.arena").write_bytes(b"x" * 1000)
    shown = run("--store", str(folder), "doctor", "--json")
    assert shown.code == 1
    (journal,) = shown.json["journals"]
    assert (journal["state"], journal["bytes"]) == ("damaged", 1001)
    assert "00000000000000ff.damaged" in shown.json["problems"][0]


def test_doctor_says_that_there_is_no_store(run: Run, tmp_path: Path) -> None:
    """Without a store the machine is told about all the same, nothing is made, and the exit code is 1."""
    shown = run("--store", str(tmp_path / "nowhere"), "doctor")
    assert shown.code == 1
    assert "eventrun demo" in shown.out
    assert "python" in shown.out
    assert not (tmp_path / "nowhere").exists()


def test_demo_trains_lists_verifies_and_says_what_to_type(run: Run, tmp_path: Path) -> None:
    """The table and the verdict are data, the rest is talk; the commands name the store."""
    folder = str(tmp_path / "demo")
    shown = run("demo", "--trials", "3", "--seconds", "0.2", "--store", folder)
    assert shown.code == 0
    assert len([line for line in shown.lines if "iris" in line or "rate-0.1" in line]) >= 1
    assert shown.lines[-1].startswith("ok: ")
    assert f"eventrun --store {folder} show rate-0.1" in shown.err
    assert len(run("--store", folder, "ls", "--json").json) == 3
    assert run("demo", "--trials", "0").code == 2


# stores, pipes, terminals


@pytest.mark.parametrize(
    "arguments",
    [("ls",), ("show", "x"), ("history", "x", "y"), ("events",), ("tail",), ("at", "5", "ls"), ("verify",),
     ("rebuild",), ("backup", "out"), ("export", "events")],
)  # fmt: skip
def test_a_store_that_is_not_there_is_not_made_by_readers(
    arguments: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    """Exit code 1, what to type to have one, and no folder afterwards."""
    shown = run("--store", str(tmp_path / "nowhere"), *arguments)
    assert (shown.code, shown.out) == (1, "")
    assert "eventrun demo" in shown.err
    assert not list(tmp_path.iterdir())


def test_an_empty_store_is_no_error(run: Run, tmp_path: Path) -> None:
    """A store in which nothing was logged can be looked at and checked."""
    folder = str(tmp_path / "empty")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with eventrun.open(folder, quiet=True) as client:
        client.tip(eventrun.codec.Stream("t/x", 1)).result()
    for arguments in (("ls",), ("ls", "groups"), ("ls", "projects"), ("events",), ("verify",), ("rebuild",),
                      ("export", "events"), ("export", "metrics"), ("import", str(empty)), ("doctor",)):  # fmt: skip
        assert run("--store", folder, *arguments).code == 0, arguments
    assert run("--store", folder, "ls", "--json").json == []
    assert run("--store", folder, "show", "@latest").code == 1


def test_the_store_may_be_named_before_or_after_the_verb(run: Run, store: Path, tmp_path: Path) -> None:
    """--store may stand on either side, and wins over the environment."""
    nowhere = str(tmp_path / "nowhere")
    for arguments in (("--store", nowhere, "ls"), ("ls", "--store", nowhere), (f"--store={nowhere}", "ls")):
        assert run(*arguments).code == 1
    assert run("--store", "memory:", "ls").code == 1
    assert run("--store", f"sqlite:{store}", "ls").code == 0
    assert run("--store").code == 2


def test_a_reader_that_goes_away_ends_it_quietly(store: Path) -> None:
    """`eventrun events | head -1` prints a line and nothing else."""
    command = [sys.executable, "-m", "eventrun", "--store", str(store), "events", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline()
        child.stdout.close()
        said = child.stderr.read()
        assert child.wait(60) in (0, 141)
    assert said == ""


def test_a_process_prints_what_main_prints(run: Run, store: Path) -> None:
    """`python -m eventrun` in a pipe gives the same text, without escapes, and stderr stays empty."""
    shown = process("--store", str(store), "ls")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == run("ls").out
    assert "\x1b" not in shown.stdout


def test_letters_that_a_pipe_cannot_write_are_replaced(store: Path) -> None:
    """An ASCII locale gets question marks in tables, and escapes in JSON, but no error."""
    shown = process("--store", str(store), "ls", PYTHONIOENCODING="ascii")
    assert shown.returncode == 0
    assert shown.stdout.isascii()
    as_json = process("--store", str(store), "ls", "--json", PYTHONIOENCODING="ascii")
    assert NAMES[1] in [trial["name"] for trial in json.loads(as_json.stdout)]
    events = process("--store", str(store), "events", "--json", PYTHONIOENCODING="ascii")
    assert events.returncode == 0
    assert all(json.loads(line) for line in events.stdout.splitlines())


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(columns: int, store: Path) -> None:
    """Long and wide names are cut so that each trial stays on one line, and no name's escape is obeyed."""
    for arguments in (
        ("ls",),
        ("show", NAMES[2]),
        ("events",),
        ("doctor",),
        ("history", "plain", "val/loss"),
    ):
        shown = on_terminal("--store", str(store), *arguments, columns=columns)
        assert shown.code == 0
        lines = [line for line in without_escapes(shown.out).splitlines() if "eventrun --store" not in line]
        assert all(width(line) <= columns for line in lines), (arguments, lines)
        assert "\x1b[2J" not in shown.out


def test_colours_are_for_terminals_that_want_them(store: Path) -> None:
    """A terminal gets colours, NO_COLOR and CI get none, and the words are the same."""
    pytest.importorskip("rich")
    coloured = on_terminal("--store", str(store), "ls", columns=120)
    assert "\x1b[3" in coloured.out
    assert "[bold]markup[/bold]" in without_escapes(coloured.out)
    for changes in ({"NO_COLOR": "1"}, {"CI": "true"}, {"TERM": "dumb"}):
        shown = on_terminal("--store", str(store), "ls", columns=120, **changes)
        assert not re.search(r"\x1b\[[0-9;]*3[0-9]", shown.out)


def test_without_rich_the_table_is_the_same(store: Path, tmp_path: Path) -> None:
    """Where the extra isn't installed, the same columns come as plain text."""
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("raise ImportError('not installed')")
    with_rich = on_terminal("--store", str(store), "ls", columns=90)
    path = f"{tmp_path}{os.pathsep}{environment()['PYTHONPATH']}"
    without = on_terminal("--store", str(store), "ls", columns=90, PYTHONPATH=path)
    assert "\x1b" not in without.out
    assert without_escapes(with_rich.out) == without.out


class Terminal(io.StringIO):
    """A stream that says that a person looks at it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(params=["rich", "plain"])
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Stderr as a terminal, on which progress shows at once, with rich and without."""
    if request.param == "rich":
        pytest.importorskip("rich")
    else:
        monkeypatch.setattr(terminal, "_console", lambda _: None)
    seen = Terminal()
    # Not sys.stderr itself, which pytest replaces between this and the test.
    monkeypatch.setattr(terminal, "sys", SimpleNamespace(stderr=seen, stdout=seen))
    monkeypatch.setattr(terminal, "PROGRESS_AFTER_S", 0.0)
    monkeypatch.setattr(terminal, "REDRAW_S", 0.0)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("CI", raising=False)
    return seen


def test_progress_tells_what_is_done_and_leaves_nothing(screen: Terminal) -> None:
    """What is counted shows as a number, or as a part of the whole; at the end the line is empty again."""
    with terminal.progress("counting") as tick:
        for done in (1000, 2000):
            tick(done)
    assert "counting" in screen.getvalue()
    assert "2,000 events" in without_escapes(screen.getvalue())
    assert screen.getvalue().endswith("\x1b[K") or screen.getvalue().endswith("\x1b[2K")
    with terminal.progress("copying", 4000) as tick:
        tick(1000)
    assert "25 %" in without_escapes(screen.getvalue())


def test_waiting_shows_that_something_is_going_on(screen: Terminal) -> None:
    """An answer that takes long is waited for under its label; its error is raised as it is."""
    slow: Answer[int] = Answer()
    threading.Timer(0.3, slow.set, (7,)).start()
    assert terminal.wait(Pending(slow), "thinking") == 7
    assert "thinking" in screen.getvalue()
    failed: Answer[int] = Answer()
    failed.fail(TimeoutError("of the work itself"))
    with pytest.raises(TimeoutError, match="of the work itself"):
        terminal.wait(Pending(failed), "failing")


@pytest.mark.parametrize("changes", [{"CI": "true"}, {"TERM": "dumb"}])
def test_no_progress_where_nobody_looks(
    changes: dict[str, str], screen: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CI logs and dumb terminals get no lines that are drawn anew."""
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with terminal.progress("counting") as tick:
        tick(1000)
    assert screen.getvalue() == ""


def test_demo_on_a_terminal_fits_on_a_screen(tmp_path: Path) -> None:
    """The closing block with its courses, the table, the verdict and the next commands stand on one screen."""
    shown = on_terminal("demo", "--seconds", "0.3", "--store", str(tmp_path / "demo"), columns=100)
    assert shown.code == 0
    lines = without_escapes(shown.out).splitlines()
    assert len(lines) < 50
    assert any(line.startswith("eventrun: 12 trials, ") for line in lines)
    assert any(line.startswith("ok: ") for line in lines)


def test_ctrl_c_ends_a_long_verb_quietly(tmp_path: Path) -> None:
    """An interrupted demo says nothing, exits with 130, and its trials are interrupted, not lost."""
    folder = str(tmp_path / "runs")
    command = [
        sys.executable,
        "-m",
        "eventrun",
        "demo",
        "--seconds",
        "60",
        "--trials",
        "2",
        "--store",
        folder,
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as child:
        assert child.stderr is not None
        assert "training" in child.stderr.readline()
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130
        assert "Traceback" not in child.stderr.read()
    with eventrun.open(folder, quiet=True) as client:
        assert {trial.status for trial in client.trials()} == {"interrupted"}
