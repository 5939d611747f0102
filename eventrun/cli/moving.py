"""`eventrun export` and `eventrun import`: what was logged, out and in again."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from eventrun.cli import terminal
from eventrun.cli.opening import opened, reading
from eventrun.cli.verbs import TRIAL_HELP, Command
from eventrun.errors import EventrunError, InvalidValue, LogDamaged
from eventrun.formats.events_jsonl import export_events, import_events
from eventrun.formats.metrics import FORMATS, export_metrics
from eventrun.summary import amount, near

SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("events", "metrics"), help="the log itself, to be imported elsewhere; or a "
                        "row for each value of each metric")  # fmt: skip
    parser.add_argument("--trial", action="append", metavar="TRIAL", help=f"only this trial (may be repeated): "
                        f"{TRIAL_HELP}")  # fmt: skip
    parser.add_argument("--format", choices=FORMATS, help="of metrics (default: as the file's name says, else csv); "
                        "events are always JSON lines")  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="write to this file (default: stdout)")


def export(arguments: argparse.Namespace) -> int:
    """Write events or metrics."""
    if arguments.what == "events" and arguments.format == "csv":
        raise InvalidValue(
            "events are written as JSON lines; as CSV there are metrics: eventrun export metrics"
        )
    with (
        reading(arguments) as source,
        _output(arguments.out) as out,
        terminal.progress(f"exporting {arguments.what}") as tick,
    ):
        if arguments.what == "events":
            trials = arguments.trial or [None]
            count = sum(export_events(source.client, out, trial, progress=tick) for trial in trials)
        else:
            kind = arguments.format or SUFFIXES.get(Path(arguments.out or "").suffix.lower(), "csv")
            count = export_metrics(source.client, out, kind, arguments.trial, progress=tick)
    noun = "event" if arguments.what == "events" else "value"
    if arguments.out:
        terminal.say(f"{amount(count, noun)} written to {near(arguments.out)}")
    return 0


@contextmanager
def _output(name: str | None) -> Iterator[TextIO]:
    """Open what to write to; a file gets its name only when all is in it, or as `.part` what could be written."""
    if name is None or name == "-":
        yield terminal.data()
        return
    path = os.path.realpath(name)  # a link stays a link
    whole = not os.path.exists(path) or os.path.isfile(path)  # a device or a pipe is written to as it is
    part = f"{path}.part" if whole else path
    try:
        with open(part, "w", encoding="utf-8", newline="") as out:
            yield out
        if whole:
            os.replace(part, path)
    except LogDamaged:
        if whole:
            terminal.say(f"what comes before the damage is in {near(part)}")
        raise
    except OSError as error:
        if whole:
            _remove(part)
        raise EventrunError(f"{name} can't be written: {error.strerror or error}") from error
    except BaseException:
        if whole:
            _remove(part)
        raise


def _remove(name: str) -> None:
    try:
        os.unlink(name)
    except OSError:
        pass


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="what `eventrun export events` has written; - is stdin. The "
                        "store is made when there is none")  # fmt: skip


def import_(arguments: argparse.Namespace) -> int:
    """Take in exported events."""
    with _input(arguments.file) as (file, name), opened(arguments, create=True) as client:
        with terminal.progress(f"importing {name}", _size(file)) as tick:
            try:
                done = import_events(client, _lines(file, tick), name=name)
            except InvalidValue as error:  # the command line is right, the file isn't
                what = "what stands before that line is imported; mend it and import the file again"
                raise EventrunError(f"{error}\n{what}") from error
        known = f"; the store has {amount(done.known, 'other')} already" if done.known else ""
        terminal.say(f"{amount(done.added, 'event')} imported into {client.url}{known}")
    return 0


@contextmanager
def _input(name: str) -> Iterator[tuple[BinaryIO, str]]:
    if name == "-":
        yield sys.stdin.buffer, "stdin"
        return
    try:
        file = open(name, "rb")  # noqa: SIM115 - closed below; only opening it is wrapped
    except OSError as error:
        raise EventrunError(f"{name} can't be read: {error.strerror or error}") from error
    with file:
        yield file, name


def _size(file: BinaryIO) -> int | None:
    try:
        return os.fstat(file.fileno()).st_size or None
    except OSError:  # not a real file
        return None


def _lines(file: BinaryIO, tick: terminal.Tick) -> Iterator[bytes]:
    done = 0
    for number, line in enumerate(file, 1):
        done += len(line)
        if number % 1000 == 0:
            tick(done)
        yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


COMMANDS = {"export": Command(_export_arguments, export), "import": Command(_import_arguments, import_)}
