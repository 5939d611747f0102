"""`eventrun demo`: a real training of small networks, logged, then listed and verified."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eventrun.cli import listing, terminal, upkeep
from eventrun.cli.opening import opened, reading
from eventrun.cli.verbs import Command
from eventrun.clock import monotonic_ns
from eventrun.errors import InvalidValue
from eventrun.summary import amount, closing_block, command, duration, telling_metrics

if TYPE_CHECKING:
    from eventrun.cli.terminal import Tick
    from eventrun.client import Client
    from eventrun.projections import TrialState

LISTED = 20
PROGRESS_S = 0.1
BLOCK_S = 3.0  # for the closing block, which scripts give a tenth of it


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", type=int, default=12, metavar="N", help="how many networks (default: 12)")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="train for about S seconds (default: 80 epochs)"
    )


def demo(arguments: argparse.Namespace) -> int:
    """Train, list, verify, and say what to type next."""
    if arguments.trials < 1:
        raise InvalidValue(f"--trials is {arguments.trials}; give a number from 1 on")
    if arguments.seconds is not None and not arguments.seconds >= 0:
        raise InvalidValue(f"--seconds is {arguments.seconds:g}; give a time from 0 on")
    with opened(arguments, create=True) as client:
        terminal.say(f"training {amount(arguments.trials, 'small network')} on Fisher's irises, all at once")
        begun = monotonic_ns()
        with terminal.progress("training") as tick:
            ids = _train(client, arguments.trials, arguments.seconds, tick)
        terminal.say(f"trained and logged in {duration((monotonic_ns() - begun) / 1e9)}\n")
        terminal.say(closing_block(client, ids, seconds=BLOCK_S, hint=False) + "\n")
    return _look_back(arguments, ids)


def _train(client: Client, trials: int, seconds: float | None, tick: Tick) -> list[str]:
    import anyio

    from eventrun.demo import run

    async def tell() -> None:
        while True:
            tick(client.statistics().recorded)
            await anyio.sleep(PROGRESS_S)

    async def train() -> list[str]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tell)
            ids = await run(client, trials=trials, seconds=seconds)
            tasks.cancel_scope.cancel()
        return ids

    return anyio.run(train)


def _look_back(arguments: argparse.Namespace, ids: list[str]) -> int:
    """Read again what was logged, with a client of its own: what was left without a finish has one now."""
    with reading(arguments) as source:
        client = source.client
        shown = [client.get(trial).result() for trial in ids[:LISTED]]
        listing.show_trials(shown)
        if len(ids) > len(shown):
            terminal.say(f"and {len(ids) - len(shown):,} more")
        print()
        report = terminal.wait(client.verify(), "verifying")
        upkeep.tell(report)
        _tell_next(client.url, shown, report.events)
    return 0 if report.ok else 1


def _tell_next(url: str, trials: Sequence[TrialState], events: int) -> None:
    name = trials[0].name if trials else "@latest"
    metric = next(iter(telling_metrics(trials[0].metrics, 1)), "val/loss") if trials else "val/loss"
    terminal.say("\nto look further:")
    for words in (f"show {name}", f"history {name} {metric}", f"at {events // 2} ls", "doctor"):
        terminal.say(f"  {command(url, words)}")


COMMANDS = {"demo": Command(_arguments, demo)}
