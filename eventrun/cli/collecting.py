"""`eventrun collect`: bring to the log what writers left in their journals, once or for as long as it runs."""

from __future__ import annotations

import argparse

from msgspec import structs

from eventrun import clock
from eventrun.cli import terminal
from eventrun.cli.opening import opened
from eventrun.cli.verbs import Command
from eventrun.collecting import ALL_HOSTS
from eventrun.errors import InvalidValue, StoreUnavailable
from eventrun.recovery import RecoveryReport
from eventrun.summary import amount, clean

FOLLOW_S = 1.0


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--follow", action="store_true", help="go on until Ctrl-C, once a second")
    gone = "this machine is gone for good, its writers are dead, whatever their journals look like"
    parser.add_argument("--host", action="append", default=[], metavar="NAME", help=gone)
    parser.add_argument("--all", action="store_true", help="the same of all machines but this one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def collect(arguments: argparse.Namespace) -> int:
    """Collect; 1 when something could not be taken in."""
    hosts = [ALL_HOSTS] if arguments.all else arguments.host
    if arguments.follow and (hosts or arguments.json):
        raise InvalidValue("--follow goes with neither --host, --all nor --json: those are for once")
    with opened(arguments, create=False) as client:
        if not arguments.follow:
            report = terminal.wait(client.collect(hosts=hosts), "collecting")
            if arguments.json:
                terminal.show_json(structs.asdict(report))
            else:
                _tell(report)
            return 1 if report.problems else 0
        terminal.say(f"collecting in {client.url}; Ctrl-C ends it")
        busy = ""
        while True:
            try:
                report = client.collect().result()
                if report.events or report.writers or report.problems:
                    _tell(report)
                busy = ""
            except StoreUnavailable as error:  # another process's turn, or the disk's trouble: it may pass
                if str(error) != busy:
                    terminal.say(clean(str(error)))
                busy = str(error)
            clock.sleep(FOLLOW_S)


def _tell(report: RecoveryReport) -> None:
    ended = f", of which {amount(report.writers, 'writer')} had ended" if report.writers else ""
    print(f"{amount(report.events, 'event')} taken in{ended}", flush=True)
    for text in (*report.left, *report.problems):
        terminal.say(clean(text))


COMMANDS = {"collect": Command(_arguments, collect)}
