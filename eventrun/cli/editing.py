"""`eventrun mv`, `rm`, `restore`, `tag` and `note`: change what is told about trials. Each change is one more event."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from eventrun.cli import terminal
from eventrun.cli.listing import show_trials
from eventrun.cli.opening import Source, reading
from eventrun.cli.verbs import TRIAL_HELP, Command
from eventrun.errors import InvalidValue, NotFound
from eventrun.summary import amount, clean, command

if TYPE_CHECKING:
    from eventrun.projections import TrialState
    from eventrun.subjects import Project
    from eventrun.trial import Trial

WHERE_HELP = "all trials for which this holds, like \"status == 'failed' and params.lr > 1\""


def _mv_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trial", metavar="TRIAL", help=TRIAL_HELP)
    parser.add_argument("name", metavar="NAME", help="its new name")


def mv(arguments: argparse.Namespace) -> int:
    """Rename a trial."""
    with reading(arguments) as source:
        trial = source.client.edit(arguments.trial).result()
        before = trial.name
        trial.rename(arguments.name)
        source.client.flush().result()
    terminal.say(f"{clean(before)} is called {clean(arguments.name)} now")
    return 0


def _choice_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trials", metavar="TRIAL", nargs="*", help=TRIAL_HELP)
    parser.add_argument("--where", metavar="FILTER", help=WHERE_HELP)
    parser.add_argument("--project", metavar="PROJECT", help="this project, with all its trials")
    parser.add_argument("--dry-run", action="store_true", help="only show which trials it would be")


def _hide_arguments(parser: argparse.ArgumentParser) -> None:
    _choice_arguments(parser)
    parser.add_argument("--reason", default="", metavar="TEXT", help="why; kept in the log")


def rm(arguments: argparse.Namespace) -> int:
    """Hide trials, or a project."""
    with reading(arguments) as source:
        if arguments.project is not None and not arguments.dry_run and not _chosen(arguments):
            _find_project(source, arguments.project).hide(arguments.reason)
            terminal.say(_done(source, f"project {arguments.project!r} is", f"--project {arguments.project}"))
            return 0
        trials = _trials(source, arguments, hidden=False)
        if arguments.dry_run:
            return _show(trials, "would be hidden")
        _edit(source, trials, lambda trial: trial.hide(arguments.reason))
        terminal.say(_done(source, f"{amount(len(trials), 'trial')} hidden:", _again(arguments)))
    return 0


def restore(arguments: argparse.Namespace) -> int:
    """Show again what was hidden."""
    with reading(arguments) as source:
        if arguments.project is not None and not arguments.dry_run and not _chosen(arguments):
            _find_project(source, arguments.project).restore()
            terminal.say(f"project {arguments.project!r} is shown again")
            return 0
        trials = _trials(source, arguments, hidden=True)
        if arguments.dry_run:
            return _show(trials, "would be shown again")
        _edit(source, trials, lambda trial: trial.restore())
        terminal.say(f"{amount(len(trials), 'trial')} shown again")
    return 0


def _chosen(arguments: argparse.Namespace) -> bool:
    return bool(arguments.trials) or arguments.where is not None


def _again(arguments: argparse.Namespace) -> str:
    if arguments.where is not None:
        return f'--where "{arguments.where}"'
    return " ".join(arguments.trials)


def _done(source: Source, what: str, again: str) -> str:
    undo = command(source.client.url, f"restore {again}")
    return (
        f"{what} not shown any more, nothing is removed; to see it all: eventrun ls --hidden; to undo: {undo}"
    )


def _find_project(source: Source, name: str) -> Project:
    if not any(state.project == name for state in source.client.projects(hidden=True)):
        raise NotFound(f"there is no project {name!r}; `eventrun ls projects` lists what there is")
    return source.client.project(name)


def _trials(source: Source, arguments: argparse.Namespace, *, hidden: bool) -> list[TrialState]:
    """Find the trials that are meant, of those that are hidden or not."""
    if not _chosen(arguments) and arguments.project is None:
        raise InvalidValue("which trials? name them, or say --where FILTER, or --project PROJECT")
    found = {state.id: state for key in arguments.trials for state in [source.client.get(key).result()]}
    if arguments.where is not None or not arguments.trials:
        for state in source.client.trials(where=arguments.where, project=arguments.project, hidden=True):
            found[state.id] = state
    return [state for state in found.values() if state.hidden == hidden]


def _show(trials: Sequence[TrialState], what: str) -> int:
    if trials:
        show_trials(trials)
    terminal.say(f"{amount(len(trials), 'trial')} {what}")
    return 0


def _edit(source: Source, trials: Sequence[TrialState], change: Callable[[Trial], Any]) -> None:
    for state in trials:
        change(source.client.trial(state.project, group=state.group, name=state.name, resume=state.id))
    source.client.flush().result()


def _tag_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trial", metavar="TRIAL", help=TRIAL_HELP)
    parser.add_argument("tags", metavar="TAG", nargs="*", help="a tag to add, or TAG=VALUE")
    parser.add_argument("--remove", action="append", default=[], metavar="TAG", help="a tag to remove")


def tag(arguments: argparse.Namespace) -> int:
    """Add and remove tags."""
    if not arguments.tags and not arguments.remove:
        raise InvalidValue("which tags? eventrun tag TRIAL good owner=ann --remove bad")
    pairs = [text.partition("=") for text in arguments.tags]
    with reading(arguments) as source:
        trial = source.client.edit(arguments.trial).result()
        trial.remove_tags(*arguments.remove)
        if pairs:
            trial.add_tags(**{name: value if equals else None for name, equals, value in pairs})
        source.client.flush().result()
        tags = source.client.get(trial.id).result().tags
    shown = ", ".join(name if value is None else f"{name}={value}" for name, value in tags.items())
    terminal.say(f"the tags of {clean(trial.name)}: {clean(shown) or 'none'}")
    return 0


def _note_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trial", metavar="TRIAL", help=TRIAL_HELP)
    parser.add_argument("text", metavar="TEXT", help="what is to be remembered")


def note(arguments: argparse.Namespace) -> int:
    """Add a note."""
    with reading(arguments) as source:
        trial = source.client.edit(arguments.trial).result()
        trial.add_note(arguments.text)
        source.client.flush().result()
    terminal.say(f"noted about {clean(trial.name)}")
    return 0


COMMANDS = {
    "mv": Command(_mv_arguments, mv),
    "rm": Command(_hide_arguments, rm),
    "restore": Command(_choice_arguments, restore),
    "tag": Command(_tag_arguments, tag),
    "note": Command(_note_arguments, note),
}
