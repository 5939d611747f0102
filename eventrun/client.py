"""`eventrun.open(...)`: one object that ties store, recorder and read side together."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from eventrun import exits
from eventrun.clock import monotonic_ns
from eventrun.codec import Batch, Stream
from eventrun.config import Settings, load_settings
from eventrun.errors import Closed, InvalidValue, NotFound
from eventrun.events import GroupCreated, ProjectCreated, TagsAdded, group_subject, project_subject, trial_subject
from eventrun.pending import Page, Pending, Query
from eventrun.portal import Portal
from eventrun.recorder import Recorder, Statistics
from eventrun.recovery import RecoveryReport
from eventrun.stores import open_store
from eventrun.stores.base import READ_BYTES, StoredBatch, Tip
from eventrun.trial import ID_ALPHABET, ID_LENGTH, Trial, active_trial, checked_name, creation_events, default_name, new_id

if TYPE_CHECKING:
    from eventrun.projections import Projection
    from eventrun.projector import VerifyReport
    from eventrun.query import GroupState, ProjectState, Reader, Series, StoredEvent, TrialState

LOOK_FOR_DEAD_WRITERS_S = 2.0  # how often readers look whether a writer was killed
CLOSING_BLOCK_S = 0.3
TAIL_POLL_S = 0.1

T = TypeVar("T")
TrialLike = Any  # a Trial, a TrialState, an id, a unique prefix, a name or "@latest"


class Client:
    """An open store: record trials, ask what was recorded. Use it as `with` or `async with`, or call `close`.

    Recording never waits. What may wait returns a Pending (one answer) or a Query (many); both serve sync and async
    code. Reads see everything this client recorded before; `fresh=False` skips waiting for that.
    """

    def __init__(self, settings: Settings, *, create: bool = True) -> None:
        self.settings = settings
        self.url = settings.url
        self._portal = Portal()
        store = open_store(self.url, create=create)
        self.folder: Path | None = getattr(store, "folder", None)
        stores = iter([store])
        self._recorder = Recorder(
            self._portal,
            lambda: next(stores, None) or open_store(self.url, create=create),
            folder=self.folder,
            linger_ms=settings.linger_ms,
            close_timeout_s=settings.close_timeout_s,
        )
        self._readers: Reader | None = None
        self._trials: dict[str, Trial] = {}  # handles whose end is this client's business
        self._made: list[str] = []  # for the closing block
        self._known: set[str] = set()  # projects and groups that were recorded
        self._unknown: list[str] = []  # resumed ids that turned out not to exist
        self._writer = self._recorder.writer
        self._looked_ns = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"<Client of {self.url!r}{' (closed)' if self._closed else ''}>"

    # recording ------------------------------------------------------------------------------------------------

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
        trial_id = new_id() if resume is None else _checked_id(resume)
        name = default_name(trial_id) if name is None else checked_name(name, "the trial's name")
        recording = self._recorder.stream(trial_subject(trial_id))
        trial = Trial(self, recording, trial_id, project, group, name, resumed=resume is not None)
        events = creation_events(trial, params, tags, metadata, description, version)
        self._check_open()
        if resume is None:
            self._create_places(project, group)
        for event in events if resume is None else events[1:]:
            recording.record(event)
        self._watch()
        self._trials[trial_id] = trial
        self._made.append(trial_id)
        return trial

    def _create_places(self, project: str, group: str) -> None:
        for subject, event in (
            (project_subject(project), ProjectCreated(project)),
            (group_subject(project, group), GroupCreated(project, group)),
        ):
            if subject not in self._known and (group or isinstance(event, ProjectCreated)):
                self._known.add(subject)
                self._recorder.stream(subject).record(event)

    def _watch(self) -> None:
        if self._writer != self._recorder.writer:  # after a fork: the parent's trials are the parent's to end
            self._writer = self._recorder.writer
            self._trials.clear()
            self._made.clear()
            self._readers = None
        exits.watch(self)

    def trial_started(self, trial: Trial) -> None:
        """A trial tells that it runs."""
        self._trials[trial.id] = trial

    def trial_finished(self, trial: Trial) -> None:
        """A trial tells that it ended: its journal may go once the log holds everything."""
        self._trials.pop(trial.id, None)
        self._recorder.end(self._recorder.stream(trial_subject(trial.id)))

    def check_trial(self, trial: Trial) -> Pending[None]:
        """Wait until the store knows a trial. Raises NotFound."""
        return self._ask(True, self._check_known, trial)

    def _check_known(self, trial: Trial) -> None:
        if not self._reader().trial(trial.id).name:
            raise NotFound(f"there is no trial {trial.id!r} to resume in {self.url}; `eventrun ls` lists what there is")

    def flush(self) -> Pending[None]:
        """Wait until all that was recorded before this call is durable."""
        self._check_open()
        return self._recorder.flush()

    def statistics(self) -> Statistics:
        """Count what was recorded and where it is. Cheap."""
        return self._recorder.statistics()

    # reading --------------------------------------------------------------------------------------------------

    def trials(
        self,
        *,
        project: str | None = None,
        group: str | None = None,
        status: str | None = None,
        tag: str | None = None,
        name: str | None = None,
        order_by: str | None = None,
        limit: int | None = None,
        offset: int = 0,
        fresh: bool = True,
    ) -> Query[TrialState]:
        """Ask for trials. `order_by`: "created" (the default), "metrics.loss.last", "params.lr", ...; "-" reverses."""
        chosen = dict(project=project, group=group, status=status, tag=tag, name=name, order_by=order_by, limit=limit)
        return self._pages(fresh, lambda cursor: self._reader().trials(cursor, offset=offset, **chosen), 0)

    def get(self, trial: TrialLike, *, fresh: bool = True) -> Pending[TrialState]:
        """Ask for one trial by id, unique prefix, name or "@latest". Raises NotFound, Ambiguous."""
        return self._ask(fresh, lambda: self._reader().trial(_key(trial)))

    def history(
        self,
        trial: TrialLike,
        metric: str,
        *,
        points: int | None = None,
        between: tuple[float, float] | None = None,
        fresh: bool = True,
    ) -> Pending[Series]:
        """Ask for all points of one metric, or at most about `points` that keep extremes and ends. Raises NotFound."""
        return self._ask(
            fresh, lambda: self._reader().history(_key(trial), metric, points=points, between=between)
        )

    def groups(self, project: str | None = None, *, fresh: bool = True) -> Query[GroupState]:
        """Ask for groups, with a summary of their trials."""
        return self._pages(fresh, lambda cursor: self._reader().groups(cursor, project=project), 0)

    def projects(self, *, fresh: bool = True) -> Query[ProjectState]:
        """Ask for projects, with a summary of their trials."""
        return self._pages(fresh, lambda cursor: self._reader().projects(cursor), 0)

    def events(
        self, after: int = 0, *, trial: TrialLike = None, limit: int | None = None, fresh: bool = True
    ) -> Query[StoredEvent]:
        """Ask for the events of the log beyond position `after`, in order; of one trial, or all."""
        key = None if trial is None else _key(trial)
        return self._pages(fresh, lambda cursor: self._reader().events(cursor, trial=key, limit=limit), after)
