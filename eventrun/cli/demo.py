"""`eventrun demo`: a real training of small networks, logged, then listed and verified."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from eventrun.cli import listing, terminal
from eventrun.cli.opening import opened
from eventrun.cli.verbs import Command
from eventrun.errors import InvalidValue
from eventrun.summary import amount, closing_block, command, size

if TYPE_CHECKING:
    from eventrun.cli.terminal import Tick
    from eventrun.client import Client

LISTED = 20
PROGRESS_S = 0.1


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", type=int, default=12, metavar="N", help="how many networks (default: 12)")
    parser.add_argument("--seconds", type=float, metavar="S", help="train for about S seconds (default: 80 epochs)")


def demo(arguments: argparse.Namespace) -> int:
    """Train, list, verify, and say what to type next."""
    if arguments.trials < 1:
        raise InvalidValue(f"--trials is {arguments.trials}; give a number from 1 on")
    if arguments.seconds is not None and not arguments.seconds >= 0:
        raise InvalidValue(f"--seconds is {arguments.seconds:g}; give a time from 0 on")
    with opened(arguments, create=True) as client:
        terminal.say(f"training {amount(arguments.trials, 'small network')} on Fisher's irises, all at once")
        with terminal.progress("logging") as tick:
            ids = _train(client, arguments.trials, arguments.seconds, tick)
    return _look_back(arguments, ids)
