"""`eventrun events` and `eventrun tail`: the log itself, as it is and as it grows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from datetime import datetime
from itertools import islice
from typing import Any

from eventrun.cli import terminal
from eventrun.cli.opening import reading
from eventrun.cli.showing import plain
from eventrun.cli.verbs import TRIAL_HELP, Command
from eventrun.codec import StoredEvent
from eventrun.errors import InvalidValue
from eventrun.events import MetricsLogged, split_subject
from eventrun.formats.events_jsonl import event_line
from eventrun.summary import clean, number, shorten


def _shared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trial", metavar="TRIAL", help=f"only events of this trial: {TRIAL_HELP}")
    parser.add_argument(
        "--json", action="store_true", help="print JSON lines, as `eventrun export events` does"
    )


def _events_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--after", type=int, default=0, metavar="POSITION", help="begin behind this position")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N events")
    _shared_arguments(parser)


def _tail_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--after", type=int, metavar="POSITION", help="begin behind this position (default: now; "
                        "0: at the beginning)")  # fmt: skip
    _shared_arguments(parser)


def events(arguments: argparse.Namespace) -> int:
    """Show events of the log, in its order."""
    _check(arguments.after, arguments.limit)
    with reading(arguments) as source:
        found = source.reads.events(arguments.after, trial=arguments.trial, limit=arguments.limit)
        _print(islice(found, arguments.limit), arguments.json)
    return 0


def tail(arguments: argparse.Namespace) -> int:
    """Show events as they reach the log, until Ctrl-C."""
    _check(arguments.after, None)
    with reading(arguments) as source:
        if terminal.is_terminal(sys.stdout):
            terminal.say(f"following {source.client.url}; Ctrl-C ends it")
        _print(source.client.tail(after=arguments.after, trial=arguments.trial), arguments.json, flush=True)
    return 0


def _check(after: int | None, limit: int | None) -> None:
    if after is not None and after < 0:
        raise InvalidValue(f"--after is {after}; positions begin at 1, and 0 is before the first")
    if limit is not None and limit < 0:
        raise InvalidValue(f"--limit is {limit}; give a number of events")


def _print(found: Iterable[StoredEvent], as_json: bool, flush: bool = False) -> None:
    room = terminal.cells()
    mark = terminal.ellipsis()
    out = terminal.data() if as_json else sys.stdout
    for stored in found:
        text = event_line(stored).rstrip("\n") if as_json else describe(stored)
        print(text if as_json or room is None else shorten(text, room, mark), file=out, flush=flush)


def describe(stored: StoredEvent) -> str:
    """Write an event on one line: position, time, subject, kind and what it says."""
    event = stored.event
    fields = {name: getattr(event, name) for name in event.__struct_fields__}
    if isinstance(event, MetricsLogged):
        fields = {**fields.pop("values"), **fields}
    told = ", ".join(
        f"{clean(name)} {_short(value)}"
        for name, value in fields.items()
        if value is not None and value != "" and value is not False
    )
    kind = type(event).__name__
    return (
        f"{stored.position:>8}  {_clock(stored.time_ns)}  {_subject(stored):<14}  {kind:<15}  {told}".rstrip()
    )


def _clock(time_ns: int) -> str:
    try:
        moment = datetime.fromtimestamp(time_ns / 1e9).astimezone()
    except (OverflowError, ValueError, OSError):
        return f"{time_ns} ns"
    return f"{moment:%Y-%m-%d %H:%M:%S}.{time_ns // 10**6 % 1000:03d}"


def _subject(stored: StoredEvent) -> str:
    kind, *names = split_subject(stored.stream.subject)
    word = {"t": "trial", "g": "group", "p": "project", "s": "sweep"}.get(kind, kind)
    name = names[0][:8] if kind == "t" else names[-1] if names else ""
    return clean(f"{word} {name}")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{clean(str(name))}: {_short(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, (float, int)):
        return number(value)
    return clean(plain(value))


COMMANDS = {"events": Command(_events_arguments, events), "tail": Command(_tail_arguments, tail)}
