"""`eventrun at MOMENT VERB`: the verbs that read, as of a position of the log or a time."""

from __future__ import annotations

import argparse

from eventrun.cli.opening import moment
from eventrun.cli.verbs import Command, parse_verb
from eventrun.errors import InvalidValue

READERS = ("ls", "show", "history", "events")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("when", metavar="POSITION|TIME", help="a position as in `eventrun events`; or a time: "
                        "2025-11-21T12:30, or nanoseconds since 1970")  # fmt: skip
    parser.add_argument("verb", metavar="VERB", choices=READERS, help=" or ".join(READERS))
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="...", help="what the verb takes; see its --help"
    )


def at(arguments: argparse.Namespace) -> int:
    """Run another verb on the store as it was."""
    when = moment(arguments.when)
    inner = parse_verb(arguments.verb, arguments.rest, arguments.parser)
    if inner.store is not None and arguments.store is not None and inner.store != arguments.store:
        raise InvalidValue("the store is named twice; name it once: eventrun --store PATH at ...")
    inner.store = inner.store or arguments.store
    inner.moment = when
    return int(inner.run(inner))


COMMANDS = {"at": Command(_arguments, at)}
