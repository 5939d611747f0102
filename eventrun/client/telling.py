"""What a client is told: trials, groups and projects begin here, and handles of those that are there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from eventrun import exits
from eventrun.client.checks import TrialLike, checked_id, key_of
from eventrun.errors import NotFound
from eventrun.events import (
    GroupCreated,
    ProjectCreated,
    group_subject,
    project_subject,
    trial_subject,
)
from eventrun.pending import Pending
from eventrun.recorder import Statistics
from eventrun.subjects import Group, Project, Subject, checked_name, told_events
from eventrun.trial import (
    Trial,
    creation_events,
    default_name,
    new_id,
)

if TYPE_CHECKING:
    pass
from eventrun.client.asking import Asking


class Telling(Asking):
    """The part of a client that records. Nothing here waits but what gives a Pending."""

    _trials: dict[int, Trial]
    _resumed: list[str]
    _made: list[str]
    _known: set[str]

    if TYPE_CHECKING:

        def close(self) -> None:
            """End; the client itself does."""

    def trial(
        self,
        project: str,
        *,
        group: str = "",
        name: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Iterable[str] | Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        description: str = "",
        version: str | None = None,
        resume: str | None = None,
    ) -> Trial:
        """Begin a trial; its id and name are known at once. `with` or the first `log` starts it.

        With `resume`, a trial's id, this goes on with that trial; params, tags and metadata are then added to it. An
        id that the store doesn't know is an error of `await trial.ready()` and a warning at close.
        """
        project = checked_name(project, "the project's name")
        group = checked_name(group, "the group's name") if group else ""
        trial_id = new_id() if resume is None else checked_id(resume)
        name = default_name(trial_id) if name is None else checked_name(name, "the trial's name")
        recording = self._recorder.stream(trial_subject(trial_id))
        trial = Trial(self, recording, trial_id, project, group, name, resumed=resume is not None)
        events = creation_events(trial, params, tags, metadata, description, version)
        self._check_open()
        if resume is None:
            self._create_places(project, group)
        for event in events if resume is None else events[1:]:
            recording.record(event)
        exits.watch(self)
        self._trials[id(trial)] = trial
        if resume is None:
            self._made.append(trial_id)
        else:
            self._resumed.append(trial_id)
        return trial

    def edit(self, trial: TrialLike) -> Pending[Trial]:
        """Give a handle to tell something about a trial that is there, without running it.

        Raises NotFound, Ambiguous.
        """
        key = key_of(trial)

        def find() -> Trial:
            found = self._reader().trial(key)
            return self.trial(found.project, group=found.group, name=found.name or None, resume=found.id)

        return self._ask(True, find)

    def project(
        self,
        name: str,
        *,
        description: str | None = None,
        tags: Iterable[str] | Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Project:
        """Give a project to tell something about, created now if need be; what is given here is told at once."""
        name = checked_name(name, "the project's name")
        project = Project(name, self._recorder.stream(project_subject(name)).record)
        self._tell_about(project, name, "", description, tags, metadata)
        return project

    def group(
        self,
        project: str,
        name: str,
        *,
        description: str | None = None,
        tags: Iterable[str] | Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Group:
        """Give a group to tell something about, created now if need be; what is given here is told at once."""
        project = checked_name(project, "the project's name")
        name = checked_name(name, "the group's name")
        group = Group(project, name, self._recorder.stream(group_subject(project, name)).record)
        self._tell_about(group, project, name, description, tags, metadata)
        return group

    def _tell_about(
        self, subject: Subject, project: str, group: str, description: str | None, tags: Any, metadata: Any
    ) -> None:
        told = told_events(description, tags, metadata)  # all is checked before any is recorded
        self._check_open()
        self._create_places(project, group)
        exits.watch(self)
        for event in told:
            subject.record(event)

    def trial_started(self, trial: Trial) -> None:
        """A trial tells that it runs."""
        self._trials[id(trial)] = trial

    def trial_finished(self, trial: Trial) -> None:
        """A trial tells that it ended: its journal may go once the log holds everything."""
        self._trials.pop(id(trial), None)
        self._recorder.end(self._recorder.stream(trial_subject(trial.id)))

    def check_trial(self, trial: Trial) -> Pending[None]:
        """Wait until the store knows a trial. Raises NotFound."""
        return self._ask(True, lambda: self._check_known(trial))

    def _check_known(self, trial: Trial) -> None:
        if not self._reader().trial(trial.id).name:
            raise NotFound(
                f"there is no trial {trial.id!r} to resume in {self.url}; `eventrun ls` lists what there is"
            )

    def _create_places(self, project: str, group: str) -> None:
        for subject, event in (
            (project_subject(project), ProjectCreated(project)),
            (group_subject(project, group), GroupCreated(project, group)),
        ):
            if subject not in self._known and (group or isinstance(event, ProjectCreated)):
                self._known.add(subject)
                self._recorder.stream(subject).record(event)

    def interrupt(self, reason: str) -> None:
        """End all trials of this client as interrupted, at once and without waiting (a signal has come)."""
        for trial in tuple(self._trials.values()):
            trial.interrupt(reason, self._recorder.writer)

    def flush(self) -> Pending[None]:
        """Wait until all that was recorded before this call is durable."""
        self._check_open()
        return self._recorder.flush()

    def statistics(self) -> Statistics:
        """Count what was recorded and where it is. Cheap."""
        return self._recorder.statistics()
