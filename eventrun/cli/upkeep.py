"""`eventrun verify`, `salvage`, `rebuild` and `backup`: keep a store well."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eventrun.cli import terminal
from eventrun.cli.opening import reading, store_folder, store_url
from eventrun.cli.verbs import TRIAL_HELP, Command
from eventrun.clock import monotonic_ns
from eventrun.errors import InvalidValue, LogDamaged
from eventrun.summary import Column, amount, clean, command, duration, near, size

if TYPE_CHECKING:
    from eventrun.damage import Damage
    from eventrun.projector import VerifyReport


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--views", action="store_true", help="also fold the log anew and compare with the views"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def verify(arguments: argparse.Namespace) -> int:
    """Check the store; 1 when something is wrong with it."""
    begun = monotonic_ns()
    try:
        with reading(arguments) as source:
            report = terminal.wait(source.client.verify(views=arguments.views), "verifying")
    except LogDamaged as error:  # so much that it can't even be opened
        report = _unopened(arguments, error)
    if arguments.json:
        terminal.show_json(report.to_dict())
    else:
        took = duration((monotonic_ns() - begun) / 1e9)
        tell(report, f" in {took}" + (", and the views agree with it" if arguments.views else ""))
        if not report.ok:
            rescued = command(store_url(arguments), "salvage OUT")
            terminal.say(f"to save all that can be read in a new store: {rescued}")
    return 0 if report.ok else 1


def _unopened(arguments: argparse.Namespace, error: LogDamaged) -> VerifyReport:
    from eventrun import damage
    from eventrun.journal import check_journals
    from eventrun.projector import VerifyReport

    folder = store_folder(store_url(arguments))
    journals = [] if folder is None else check_journals(folder / "journals")
    problems = [damage.file("log.db", str(error)), *(each for found in journals for each in found.problems)]
    return VerifyReport(
        end=0, batches=0, events=0, bytes=0, streams=0, problems=tuple(problems), journals=tuple(journals)
    )


def tell(report: VerifyReport, more: str = "") -> None:
    """Print what verifying has found: one line when all is well, else a table of the damage."""
    batches = f"{report.batches:,} batch{'' if report.batches == 1 else 'es'}"
    what = f"{amount(report.events, 'event')} in {batches} of {amount(report.streams, 'stream')}, {size(report.bytes)}"
    held = [f"{amount(journal.events, 'event')} in a {journal.state} journal" for journal in report.journals]
    if report.ok:
        print(f"ok: {what}, all read and checked{more}")
    else:
        tell_damage(report.problems)
        terminal.say(f"{amount(len(report.problems), 'problem')} in {what}")
    for line in held:
        terminal.say(line)


def tell_damage(found: Sequence[Damage]) -> None:
    """Print damage as a table."""
    rows = [[clean(each.place), each.costs, clean(each.what)] for each in found]
    terminal.table([Column("where"), Column("costs"), Column("what", cut=True)], rows)


def _salvage_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="a folder that is new or empty")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def salvage(arguments: argparse.Namespace) -> int:
    """Save what can be read; 1 when something is lost."""
    from eventrun.salvage import REPORT
    from eventrun.salvage import salvage as salvage_store

    folder, out = store_folder(store_url(arguments)), Path(arguments.out)
    if folder is None:
        raise InvalidValue("only a store that is a folder has files to salvage")
    with terminal.progress("salvaging"):
        report = salvage_store(folder, out)
    if arguments.json:
        terminal.show_json(report.to_dict())
    elif report.problems:
        tell_damage(report.problems)
    for each in report.continued:
        terminal.say(f"{each.stream} {each.first}..{each.last} goes on as {each.now} from {each.begins}")
    lost = f"{amount(report.lost, 'event')} lost" if report.lost or report.problems else "none lost"
    terminal.say(
        f"{amount(report.events, 'event')} saved in {near(out)}, {lost}; {near(out / REPORT)} has all of this\n"
        f"to look at it: {command(str(out), 'ls')}"
    )
    return 0 if report.ok else 1


def _rebuild_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trial", metavar="TRIAL", help=f"only this trial: {TRIAL_HELP}")


def rebuild(arguments: argparse.Namespace) -> int:
    """Make the views anew."""
    begun = monotonic_ns()
    with reading(arguments) as source:
        terminal.wait(source.client.rebuild(arguments.trial), "rebuilding")
    what = "the views of that trial are" if arguments.trial else "all views are"
    terminal.say(f"{what} made anew from the log, in {duration((monotonic_ns() - begun) / 1e9)}")
    return 0


def _backup_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="a folder that is new or empty")


def backup(arguments: argparse.Namespace) -> int:
    """Copy the store."""
    out = Path(arguments.out)
    with reading(arguments) as source:
        terminal.wait(source.client.backup(out), "copying")
    copied = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    terminal.say(f"{size(copied)} copied to {near(out)}; to look at it: {command(str(out), 'ls')}")
    return 0


COMMANDS = {
    "verify": Command(_verify_arguments, verify),
    "salvage": Command(_salvage_arguments, salvage),
    "rebuild": Command(_rebuild_arguments, rebuild),
    "backup": Command(_backup_arguments, backup),
}
