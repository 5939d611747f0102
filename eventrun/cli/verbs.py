"""What can be typed: the verbs, their help and the parsers, made only for the verb that is used."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

STORE_HELP = "the store: a folder, or sqlite:PATH (default: EVENTRUN_URL, else ./runs)"
TRIAL_HELP = "an id, the beginning of one, a name, or @latest"


class Verb(NamedTuple):
    """A verb in the list: which module holds it, what it does, and command lines to try."""

    module: str
    summary: str
    examples: tuple[str, ...]


class Command(NamedTuple):
    """What a module says of its verb: how to add its arguments to a parser, and how to run it (the exit code)."""

    add_arguments: Callable[[argparse.ArgumentParser], Any]
    run: Callable[[argparse.Namespace], int]


SECTIONS: dict[str, dict[str, Verb]] = {
    "Look": {
        "ls": Verb(
            "listing",
            "list trials, projects or groups",
            (
                "eventrun ls --project iris --status failed",
                "eventrun ls --where \"metrics['val/loss'].last < 0.1 and params.lr in (0.1, 0.01)\"",
                "eventrun ls --sort -metrics.val/loss.last --limit 5",
                "eventrun ls groups --json",
            ),
        ),
        "show": Verb(
            "showing", "show all about one trial", ("eventrun show @latest", "eventrun show rate-0.1 --json")
        ),
        "history": Verb(
            "showing",
            "show the points of one metric",
            ("eventrun history @latest val/loss", "eventrun history @latest val/loss --points 20"),
        ),
        "events": Verb(
            "watching",
            "show the events of the log",
            ("eventrun events --trial @latest --limit 20", "eventrun events --after 1000 --json"),
        ),
        "tail": Verb(
            "watching",
            "follow the log as it grows",
            ("eventrun tail", "eventrun tail --after 0 --json | grep StatusChanged"),
        ),
        "at": Verb(
            "past",
            "go back: ls, show, history or events as of then",
            ("eventrun at 2025-11-21T12:30 ls", "eventrun at 5000 show rate-0.1"),
        ),
    },
    "Change": {
        "mv": Verb("editing", "give a trial another name", ("eventrun mv rate-0.1 baseline",)),
        "rm": Verb(
            "editing",
            "hide trials, or a project; nothing is removed",
            ("eventrun rm rate-10", "eventrun rm --where \"status == 'failed'\" --dry-run"),
        ),
        "restore": Verb("editing", "show again what was hidden", ("eventrun restore rate-10",)),
        "tag": Verb("editing", "add and remove tags", ("eventrun tag @latest good owner=ann --remove bad",)),
        "note": Verb("editing", "add a note to a trial", ("eventrun note @latest 'learns best so far'",)),
    },
    "Move": {
        "export": Verb(
            "moving",
            "write events or metrics as JSON lines or CSV",
            (
                "eventrun export metrics --trial rate-0.1 --out loss.csv",
                "eventrun export events > events.jsonl",
            ),
        ),
        "import": Verb(
            "moving",
            "take in events that were exported; twice changes nothing",
            ("eventrun --store elsewhere import events.jsonl",),
        ),
        "backup": Verb("upkeep", "copy the store while it is in use", ("eventrun backup /mnt/backup/runs",)),
    },
    "Keep": {
        "verify": Verb(
            "upkeep", "read the whole log and check it", ("eventrun verify", "eventrun verify --views --json")
        ),
        "salvage": Verb(
            "upkeep",
            "write all that can be read of a damaged store to a new one",
            ("eventrun salvage rescued", "eventrun --store broken salvage rescued --json"),
        ),
        "rebuild": Verb("upkeep", "make the views anew from the log", ("eventrun rebuild",)),
        "collect": Verb(
            "collecting",
            "take in journals: on a network disk all, else those of other hosts too",
            ("eventrun collect --follow", "eventrun collect --host node17"),
        ),
        "doctor": Verb("doctor", "tell how the store and this machine are", ("eventrun doctor",)),
    },
    "Try": {
        "demo": Verb(
            "demo",
            "train a dozen small networks at once and log them",
            ("eventrun demo", "eventrun demo --trials 100 --seconds 20 --store /tmp/demo"),
        ),
    },
}
VERBS: dict[str, Verb] = {name: verb for section in SECTIONS.values() for name, verb in section.items()}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and what to type next in another."""

    def error(self, message: str) -> NoReturn:
        """Complain and exit with code 2."""
        self.exit(2, f"{message}\nto see what can be typed: {self.prog} --help\n")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read a command line. `run` in the result is the function to call with it; raises SystemExit as argparse does."""
    top = _top_parser()
    start = _verb_place(argv)
    chosen = top.parse_args(argv[:start])
    if start == len(argv):
        if argv:
            top.error("a verb is missing, like `eventrun ls`")
        top.print_help(sys.stderr)
        top.exit(2)
    arguments = parse_verb(argv[start], argv[start + 1 :], top)
    if arguments.store is None:
        arguments.store = chosen.store
    return arguments


def _verb_place(argv: Sequence[str]) -> int:
    place = 0
    while place < len(argv) and argv[place].startswith("-"):
        place += 2 if argv[place] == "--store" else 1
    return min(place, len(argv))


def parse_verb(name: str, rest: Sequence[str], parent: argparse.ArgumentParser) -> argparse.Namespace:
    """Read what stands after a verb."""
    if name not in VERBS:
        parent.error(f"there is no verb {name!r}{_meant(name)}")
    parser, command = verb_parser(name, parent.prog)
    arguments = parser.parse_args(_with_dashes(rest))
    arguments.run = command.run
    arguments.parser = parser
    return arguments


def _with_dashes(rest: Sequence[str]) -> list[str]:
    """Join `--sort -created` into one word, or argparse would take the key for an option."""
    words: list[str] = []
    for word in rest:
        if words and words[-1] == "--sort" and word.startswith("-"):
            words[-1] = f"--sort={word}"
        else:
            words.append(word)
    return words


def verb_parser(name: str, prog: str = "eventrun") -> tuple[argparse.ArgumentParser, Command]:
    """Make the parser of one verb, which imports its module."""
    verb = VERBS[name]
    command: Command = import_module(f"eventrun.cli.{verb.module}").COMMANDS[name]
    shown = "\n".join(f"  {example}" for example in verb.examples)
    parser = Parser(
        prog=f"{prog} {name}",
        description=f"{verb.summary[0].upper()}{verb.summary[1:]}.",
        epilog=f"example{'s' if len(verb.examples) > 1 else ''}:\n{shown}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--store", metavar="URL", help=STORE_HELP)
    parser.set_defaults(moment=None)
    command.add_arguments(parser)
    return parser, command


def _top_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="eventrun",
        usage="eventrun [--store URL] VERB ...",
        description="Look at, move and keep what eventrun has logged.",
        epilog=_list_of_verbs(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--store", metavar="URL", help=STORE_HELP)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    return parser


def _list_of_verbs() -> str:
    lines = []
    for title, verbs in SECTIONS.items():
        lines += [f"{title}:", *(f"  {name:<12}{verb.summary}" for name, verb in verbs.items()), ""]
    lines += [
        f"A TRIAL is {TRIAL_HELP}.",
        "With --json the verbs that read print JSON.",
        "To see a verb's options and an example: eventrun VERB --help",
    ]
    return "\n".join(lines)


def _meant(name: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, VERBS, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


class _Version(argparse.Action):
    """Look the version up only when it is asked for: importlib.metadata takes 20 ms."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"eventrun {version('eventrun')}")
        except PackageNotFoundError:
            print("eventrun from a checkout that is not installed")
        parser.exit()
