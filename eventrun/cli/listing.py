"""`eventrun ls`: trials, projects or groups as a table."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from eventrun.cli import terminal
from eventrun.cli.opening import Source, reading
from eventrun.cli.verbs import Command
from eventrun.errors import InvalidValue
from eventrun.summary import Column, duration, number, short_time, telling_metrics

if TYPE_CHECKING:
    from eventrun.projections import GroupState, ProjectState, TrialState

MOST_TRIALS = 50  # shown to a person who doesn't say how many
MOST_METRICS = 3  # columns of metrics, unless they are named
_RANKS = (1, 4, 5)  # of these
ID_LETTERS = 8  # shown of an id: 40 of its 80 random bits

OF_TRIALS = ("where", "group", "status", "tag", "name", "sort", "limit", "metric")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=("trials", "groups", "projects"), default="trials",
                        help="what to list (default: trials)")  # fmt: skip
    parser.add_argument("--where", metavar="FILTER", help="only trials for which this holds, like "
                        "\"params.lr < 0.1 and 'baseline' in tags\"")  # fmt: skip
    parser.add_argument("--project", help="only those of this project")
    parser.add_argument("--group", help="only trials of this group")
    parser.add_argument("--status", help="only trials that are created, running, suspended, completed, failed, "
                        "interrupted or lost")  # fmt: skip
    parser.add_argument("--tag", help="only trials with this tag")
    parser.add_argument("--name", help="only trials of this name")
    parser.add_argument("--hidden", action="store_true", help="the hidden ones too")
    parser.add_argument("--sort", metavar="KEY", help="created (the default: newest first), name, params.NAME, "
                        "metrics.NAME.last, ...; a - in front reverses")  # fmt: skip
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help=f"at most N trials; 0: all (default: all, on a terminal {MOST_TRIALS})",
    )
    parser.add_argument("--metric", action="append", metavar="NAME", help="show this metric's last value; may be "
                        "repeated (default: those that say most)")  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print one JSON array, with all that is known of each"
    )


def ls(arguments: argparse.Namespace) -> int:
    """List what the arguments ask for."""
    if arguments.limit is not None and arguments.limit < 0:
        raise InvalidValue(f"--limit is {arguments.limit}; give a number of trials, or 0 for all")
    if arguments.what != "trials":
        named = [name for name in OF_TRIALS if getattr(arguments, name) is not None]
        if named or (arguments.what == "projects" and arguments.project is not None):
            raise InvalidValue(
                f"--{(named or ['project'])[0]} can't choose {arguments.what}, it is for trials"
            )
    with reading(arguments) as source:
        if arguments.what == "groups":
            _list_groups(arguments, list(source.reads.groups(arguments.project, hidden=arguments.hidden)))
        elif arguments.what == "projects":
            _list_projects(arguments, list(source.reads.projects(hidden=arguments.hidden)))
        else:
            _list_trials(arguments, source)
    return 0


def _list_trials(arguments: argparse.Namespace, source: Source) -> None:
    limit = arguments.limit
    if limit is None:
        limit = MOST_TRIALS if terminal.cells() is not None and not arguments.json else 0
    query = source.reads.trials(
        project=arguments.project, group=arguments.group, status=arguments.status, tag=arguments.tag,
        name=arguments.name, where=arguments.where, order_by=arguments.sort or "-created",
        limit=limit + 1 if limit else None, hidden=arguments.hidden,
    )  # fmt: skip
    if arguments.json:
        terminal.show_json([trial.to_dict() for trial in islice(query, limit or None)])
        return
    trials = list(query)
    more = bool(limit) and len(trials) > limit
    trials = trials[:limit] if more else trials
    if not trials:
        chosen = any(getattr(arguments, name) for name in ("where", "project", *OF_TRIALS[1:5]))
        terminal.say(
            "no trial is like that; all of them: eventrun ls" if chosen else "the store holds no trial yet"
        )
        return
    show_trials(trials, arguments.metric)
    if more:
        terminal.say("and more; to see all: --limit 0" if arguments.limit is None else "and more")


def show_trials(trials: Sequence[TrialState], metrics: Sequence[str] | None = None) -> None:
    """Print trials as a table, with the last values of these metrics, or of those that say most."""
    shown = _columns(trials, metrics)
    rows = [[cell(trial) for _, cell in shown] for trial in trials]
    terminal.table([column for column, _ in shown], rows)


Shown = tuple[Column, Callable[[Any], str]]


def _columns(trials: Sequence[TrialState], metrics: Sequence[str] | None) -> list[Shown]:
    """Choose columns; on a narrow terminal tags go first, then all but one of the metrics, times, the last metric."""
    chosen = [_metric(name, 0) for name in metrics or ()]
    chosen = chosen or [
        _metric(name, rank) for rank, name in zip(_RANKS, _common_metrics(trials), strict=False)
    ]
    shown: list[Shown] = [
        (Column("id", style="dim"), lambda trial: trial.id[:ID_LETTERS]),
        (Column("name", cut=True, style="bold"), lambda trial: trial.name),
    ]
    if len({trial.project for trial in trials}) > 1:
        shown.append((Column("project", cut=True), lambda trial: trial.project))
    if any(trial.group for trial in trials):
        shown.append((Column("group", cut=True), lambda trial: trial.group))
    shown += [
        (Column("status", style=terminal.status_style), lambda trial: trial.status),
        (Column("created", rank=3), lambda trial: short_time(trial.created_ns)),
        (Column("lasted", "right", rank=2), lambda trial: duration(trial.duration_s)),
        *chosen,
    ]
    if any(trial.tags for trial in trials):
        shown.append((Column("tags", cut=True, rank=9, style="dim"), lambda trial: tags(trial.tags)))
    return shown


def _metric(name: str, rank: int) -> Shown:
    def cell(trial: TrialState) -> str:
        return number(trial.metrics[name].last) if name in trial.metrics else ""

    return Column(name, "decimal", rank=rank), cell


def _common_metrics(trials: Sequence[TrialState]) -> list[str]:
    counts = Counter(name for trial in trials for name in trial.metrics)
    common = [name for name, count in counts.items() if 2 * count >= len(trials)]
    return telling_metrics(common or counts, MOST_METRICS)


def tags(known: dict[str, Any]) -> str:
    """Write tags, with their values where they have one."""
    return ", ".join(name if value is None else f"{name}={value}" for name, value in known.items())


def _list_groups(arguments: argparse.Namespace, groups: list[GroupState]) -> None:
    if arguments.json:
        terminal.show_json([group.to_dict() for group in groups])
        return
    columns = (Column("project", cut=True), Column("group", cut=True, style="bold"), *_PLACE_COLUMNS)
    terminal.table(columns, [[group.project, group.name, *_place(group)] for group in groups])


def _list_projects(arguments: argparse.Namespace, projects: list[ProjectState]) -> None:
    if arguments.json:
        terminal.show_json([project.to_dict() for project in projects])
        return
    columns = (Column("project", cut=True, style="bold"), Column("groups", "right"), *_PLACE_COLUMNS)
    rows = [[project.project, str(len(project.groups)), *_place(project)] for project in projects]
    terminal.table(columns, rows)


_PLACE_COLUMNS = (
    Column("trials", "right"), Column("of which", cut=True), Column("changed"), Column("what varies", cut=True),
)  # fmt: skip


def _place(state: GroupState | ProjectState) -> list[str]:
    statuses = ", ".join(f"{count:,} {status}" for status, count in state.by_status.items())
    return [
        f"{state.trials:,}",
        statuses,
        short_time(state.modified_ns),
        ", ".join(state.params_varying),
    ]


COMMANDS = {"ls": Command(_arguments, ls)}
