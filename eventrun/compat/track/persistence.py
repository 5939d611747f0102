"""Track's protocol on an eventrun store: all that can be done to trials, groups and projects."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventrun.clock import monotonic_ns
from eventrun.codec import metric_values
from eventrun.compat.track import opening
from eventrun.compat.track.aggregators import EACH, described
from eventrun.compat.track.errors import ChronoNotStarted, ItemNotFound, UnknownProject
from eventrun.compat.track.queries import fits, prefilter, read_query
from eventrun.compat.track.reading import (
    ORPHANS,
    RESERVED,
    RUNTIME,
    group_of,
    identity,
    numbered,
    project_of,
    status_of,
    trial_id,
    trial_of,
    uid_of,
)
from eventrun.compat.track.structure import (
    CustomStatus,
    Project,
    Status,
    Trial,
    TrialGroup,
    as_status,
    storable,
)
from eventrun.compat.track.taking import (
    brought_along,
    ending,
    error_text,
    hash_of,
    project_name,
    replacing,
    step_of,
    tell_of,
    text_or,
)
from eventrun.errors import NotFound
from eventrun.events import (
    AggregatorChoice,
    ChronoFinished,
    ChronoStarted,
    MetadataSet,
    MetricsLogged,
    ParamsSet,
    Scalar,
    StatusChanged,
    TagsAdded,
    TrialCreated,
    TrialFinished,
)
from eventrun.subjects import Subject

if TYPE_CHECKING:
    from eventrun.client import Client
    from eventrun.codec import StoredEvent
    from eventrun.projections import GroupState, TrialState
    from eventrun.trial import Trial as Handle

_UNDER_WAY = (Status.CreatedGroup.name, Status.RunningGroup.name, Status.Running.name)


class Protocol:
    """Track's protocol on an eventrun store. Made by `get_protocol(uri)`.

    All that is taken may be any object with the attributes of ours. What is logged about a trial is recorded at once
    and doesn't wait for a disk; creating things, setting a status, fetching and updating wait for the log. A read sees
    all that this process wrote before. Raises ItemNotFound for a trial that isn't there.
    """

    def __init__(self, uri: str, strict: bool = True, eager: bool = True) -> None:
        self.uri = uri
        self.strict = strict
        self.eager = eager  # Track's: here nothing is held back that `commit` would have to write
        self._url = opening.url_of(uri)
        self._opened: opening.Opened | None = None
        self._claimed = threading.local()  # what `fetch_and_update_...` is about to change, on its thread
        self._store  # noqa: B018 - opened now: what is wrong with a URI is said where it is given

    @property
    def client(self) -> Client:
        """The eventrun client beneath."""
        return self._store.client

    @property
    def _store(self) -> opening.Opened:
        self._opened = opening.opened(self._url, self._opened)
        return self._opened

    def close(self) -> None:
        """Bring everything to the log and let go, unless others in this process use the store; exit does so, too."""
        if self._opened is not None:
            was, self._opened = self._opened, None
            opening.leave(self._url, was)

    # a trial's life -------------------------------------------------------------------------------------------

    def log_trial_start(self, trial: Any) -> None:
        """Begin the trial: it runs, and its chrono "runtime" begins."""
        handle = self._handle(trial)
        if self._taken("trial", trial.uid) is not None:
            handle.record(StatusChanged(Status.Running.name))
            return
        if handle.finished:
            handle = self._store.handles[trial.uid] = self.client.trial(handle.project, resume=handle.id)
        handle.start()
        self._begin(trial.uid, RUNTIME, None)

    def log_trial_finish(
        self, trial: Any, exc_type: Any = None, exc_val: Any = None, exc_tb: Any = None
    ) -> None:
        """End the trial: as it was last said to be, else completed, interrupted or, by an error, with its message."""
        handle, store = self._handle(trial), self._store
        error = error_text(exc_val if exc_val is not None else exc_type)
        if store.starts.get((trial.uid, RUNTIME)):
            started, _ = self._end(trial.uid, RUNTIME)
            handle.record(ChronoFinished(RUNTIME, (monotonic_ns() - started) / 1e9, error))
        taken = self._taken("trial", trial.uid) is not None
        state = None if taken else self._state(trial.uid)
        word = Status.Running.name if state is None else status_of(state).name
        if word in _UNDER_WAY or (exc_type is not None and word == Status.Completed.name):
            word = ending(exc_type).name
        if handle.finished or taken:
            handle.record(TrialFinished(word, error))
        else:
            handle.finish(word, error)

    def log_trial_chrono_start(
        self,
        trial: Any,
        name: str,
        aggregator: Callable[[], Any] = EACH,
        start_callback: Callable[[], Any] | None = None,
        end_callback: Callable[[], Any] | None = None,
    ) -> None:
        """Start a chrono, whose seconds the aggregator is given; the callbacks are called without arguments."""
        handle = self._handle(trial)
        handle.record(ChronoStarted(name, self._choice(trial.uid, "chrono", name, aggregator)))
        if start_callback is not None:
            start_callback()
        self._begin(trial.uid, name, end_callback)

    def log_trial_chrono_finish(
        self, trial: Any, name: str, exc_type: Any = None, exc_val: Any = None, exc_tb: Any = None
    ) -> None:
        """Finish a chrono. Raises ChronoNotStarted."""
        handle = self._handle(trial)
        started, callback = self._end(trial.uid, name)
        seconds = (monotonic_ns() - started) / 1e9
        error = error_text(exc_val if exc_val is not None else exc_type)
        handle.record(ChronoFinished(name, seconds, error, late=handle.finished))
        if callback is not None:
            callback()

    def _begin(self, uid: str, name: str, callback: Callable[[], Any] | None) -> None:
        entry = threading.get_ident(), monotonic_ns(), callback
        self._store.starts.setdefault((uid, name), []).append(entry)

    def _end(self, uid: str, name: str) -> tuple[int, Callable[[], Any] | None]:
        """Take off this thread's last start, or anybody's."""
        starts = self._store.starts.get((uid, name), [])
        if not starts:
            raise ChronoNotStarted(
                f"the chrono {name!r} of trial {uid} was not started here, or has finished"
            )
        own = [place for place, start in enumerate(starts) if start[0] == threading.get_ident()]
        _, started, callback = starts.pop(own[-1] if own else -1)
        return started, callback

    # what is known about it -----------------------------------------------------------------------------------

    def log_trial_arguments(self, trial: Any, **kwargs: Any) -> None:
        """Add or replace parameters; the trial's uid stays."""
        for part in replacing(storable(kwargs, "arguments")):
            self._handle(trial).record(ParamsSet(part))

    def log_trial_metadata(
        self, trial: Any, aggregator: Callable[[], Any] | None = None, **kwargs: Any
    ) -> None:
        """Add or replace metadata; the last value counts, whatever the aggregator."""
        for part in replacing(storable(kwargs, "metadata")):
            self._handle(trial).record(MetadataSet(part))

    def log_trial_metrics(
        self, trial: Any, step: Any = None, aggregator: Callable[[], Any] | None = None, **kwargs: Any
    ) -> None:
        """Log metrics. The first call of each decides how it is read: by step, or by its aggregator (a time series).

        Numbers, text, booleans and None; a step may be anything that can be stored.
        """
        handle = self._handle(trial)
        number, key = step_of(step)
        values = metric_values(kwargs)
        if aggregator is None or step is not None:
            if values:
                handle.record(MetricsLogged(values, number, late=handle.finished, key=key))
            return
        for choice, part in self._by_choice(trial.uid, values, aggregator):
            handle.record(MetricsLogged(part, number, aggregator=choice, late=handle.finished, key=key))

    def _by_choice(
        self, uid: str, values: dict[str, Scalar], aggregator: Callable[[], Any]
    ) -> Iterator[tuple[AggregatorChoice | None, dict[str, Scalar]]]:
        """Part the values in those whose aggregator was told before, and others."""
        fresh = {}
        choice = None
        for name in values:
            if ("metric", uid, name) not in self._store.told:
                choice = self._choice(uid, "metric", name, aggregator)
                fresh[name] = values[name]
        rest = {name: value for name, value in values.items() if name not in fresh}
        if fresh:
            yield choice, fresh
        if rest:
            yield None, rest

    def _choice(
        self, uid: str, kind: str, name: str, aggregator: Callable[[], Any] | None
    ) -> AggregatorChoice | None:
        """Say which aggregator it is, when it is named first; one of another kind serves in this process only."""
        store = self._store
        if aggregator is not None and self._taken("trial", uid) is not None:
            return described(aggregator())
        if aggregator is None or (kind, uid, name) in store.told:
            return None
        store.told.add((kind, uid, name))
        choice = described(aggregator())
        if choice is None:
            store.factories[kind, uid, name] = aggregator
        return choice

    def set_trial_status(self, trial: Any, status: Any, error: Any = None) -> None:
        """Change the status, any to any; it replaces whatever was said before, by whomever. Waits for the log."""
        wanted = as_status(status)

        def change(_: object, handle: Handle) -> None:
            if isinstance(wanted, CustomStatus):
                handle.record(MetadataSet({RESERVED: {"statuses": {wanted.name: wanted.value}}}))
            handle.record(StatusChanged(wanted.name, error_text(error)))

        handle = self._taken("trial", trial.uid)
        if handle is not None:
            change(None, handle)
            return
        self._update(trial.uid, change)

    def _update(self, uid: str, change: Callable[[TrialState, Handle], object]) -> TrialState:
        try:
            return self.client.update_trial({"id": trial_id(uid)}, change).result()
        except NotFound as error:
            raise ItemNotFound(f"there is no trial {uid}: create it with new_trial") from error

    def add_trial_tags(self, trial: Any, **kwargs: Any) -> None:
        """Add or replace tags."""
        if kwargs:
            self._handle(trial).record(TagsAdded(storable(kwargs, "tags")))

    def _handle(self, trial: Any) -> Handle:
        """Give eventrun's handle of a trial. Raises ItemNotFound."""
        uid = trial.uid
        handle = self._taken("trial", uid) or self._store.handles.get(uid)
        if handle is None:
            state = self._state(uid)
            if state is None:
                raise ItemNotFound(f"there is no trial {uid} in {self.uri}: create it with new_trial")
            handle = self._store.handles[uid] = self.client.trial(state.project, resume=state.id)
        return handle

    def _state(self, uid: str) -> TrialState | None:
        try:
            key = trial_id(uid)
            state = self.client.get(key).result()
        except (NotFound, ValueError):
            return None
        return state if state.id == key else None

    # projects and groups --------------------------------------------------------------------------------------

    def get_project(self, project: Any) -> Project | None:
        """Fetch a project by its uid; None when there is none."""
        return next(iter(self.fetch_projects({"uid": project_name(project)})), None)

    def new_project(self, project: Any) -> Project:
        """Create a project, or give the one that exists."""
        name = project_name(project)
        created = self.client.declare_project(
            name,
            description=getattr(project, "description", None),
            tags=storable(getattr(project, "tags", None) or {}),
            metadata=storable(getattr(project, "metadata", None) or {}),
        )
        created.result()
        self._store.projects.add(name)
        found = self.get_project(project)
        assert found is not None
        return found

    def get_trial_group(self, group: Any) -> TrialGroup | None:
        """Fetch a group by its uid; None when there is none."""
        return next(iter(self.fetch_groups({"uid": group.uid})), None)

    def new_trial_group(self, group: Any) -> TrialGroup | None:
        """Create a group; None if it exists. Raises UnknownProject, unless not `strict`."""
        project = text_or(group.project_id, ORPHANS)
        self._check_project(project)
        created = self.client.declare_group(
            project,
            group.name,
            description=getattr(group, "description", None),
            tags=storable(getattr(group, "tags", None) or {}),
            metadata={**storable(getattr(group, "metadata", None) or {}), RESERVED: {"uid": group.uid}},
        )
        return self.get_trial_group(group) if created.result() else None

    def add_project_trial(self, project: Any, trial: Any) -> None:
        """Make a trial one of a project. Raises UnknownProject, unless not `strict`."""
        name = project_name(project)
        self._check_project(name)
        self._move(trial, name, None)
        tell_of(project, "trials", trial.uid)
        trial.project_id = name

    def add_group_trial(self, group: Any, trial: Any) -> None:
        """Make a trial one of a group."""
        self._move(trial, None, (text_or(getattr(group, "project_id", None), ORPHANS), group.name))
        self._handle(trial).record(MetadataSet({RESERVED: {"group": group.uid}}))
        tell_of(group, "trials", trial.uid)
        trial.group_id = group.uid

    def _move(self, trial: Any, project: str | None, group: tuple[str, str] | None) -> None:
        """Put a trial elsewhere. In eventrun a group is one project's: of another's only Track's readers know."""
        handle = self._handle(trial)
        state = self._state(trial.uid)
        assert state is not None
        project = project or state.project
        known = self._trial(state).group_id
        group = group or (None if known is None else self._place(known))
        place = project, group[1] if group is not None and group[0] == project else ""
        if place != (state.project, state.group):
            handle.record(TrialCreated(*place, state.name, state.description, state.version, state.attempt))

    def set_group_metadata(self, group: Any, **kwargs: Any) -> None:
        """Add or replace metadata of a group. Raises ItemNotFound."""
        handle: Subject | None = self._taken("group", group.uid)
        if handle is None:
            place = self._place(group.uid)
            if place is None:
                raise ItemNotFound(
                    f"there is no group {group.uid} in {self.uri}: create it with new_trial_group"
                )
            handle = self.client.group(*place)
        for part in replacing(storable(kwargs, "metadata")):
            handle.record(MetadataSet(part))

    def _check_project(self, name: str) -> None:
        projects = self._store.projects
        if not self.strict or name in projects or name == ORPHANS:
            return
        projects.update(state.project for state in self.client.projects())
        if name not in projects:
            raise UnknownProject(f"there is no project {name!r} in {self.uri}: create it with new_project")

    def _place(self, group_uid: str) -> tuple[str, str] | None:
        """Give project and name of a group."""
        groups = self._store.groups
        if group_uid not in groups:
            for state in self.client.groups():
                groups[self._group(state).uid] = (state.project, state.name)
        return groups.get(group_uid)

    # trials ---------------------------------------------------------------------------------------------------

    def get_trial(self, trial: Any) -> list[Trial] | None:
        """Fetch all revisions of a trial, by number; None when there is no trial of just this uid."""
        found = list(numbered(self.fetch_trials({"hash": hash_of(trial)})))
        return found if any(each.uid == trial.uid for each in found) else None

    def new_trial(self, trial: Any, auto_increment: bool = False) -> Trial | None:
        """Insert a trial; when its uid exists, None, or with `auto_increment` the next revision of its hash.

        Then the revision of the object that was given is set, too. Of many processes that insert the same one
        succeeds. Raises UnknownProject, unless not `strict`.
        """
        project = text_or(getattr(trial, "project_id", None), ORPHANS)
        self._check_project(project)
        uid, revision = trial.uid, trial.revision
        handle = self._declare(trial, project, revision)
        if handle is None and auto_increment:
            known = [each.revision for each in self.fetch_trials({"hash": hash_of(trial)})]
            revision = max(known, default=revision)
            while handle is None:  # others may count as well: each finds the next one that is free
                revision += 1
                handle = self._declare(trial, project, revision)
        if handle is None:
            return None
        if revision != trial.revision:
            trial.revision = revision
            uid = f"{hash_of(trial)}_{revision}"
        self._store.handles[uid] = handle
        self._copy(trial)
        state = self._state(uid)
        assert state is not None
        return self._trial(state)

    def _declare(self, trial: Any, project: str, revision: int) -> Handle | None:
        hashed, name = hash_of(trial), getattr(trial, "name", None)
        group_id = getattr(trial, "group_id", None)
        place = None if group_id is None else self._place(group_id)
        version = getattr(trial, "version", None)
        own = {"hash": hashed, "revision": revision, "named": bool(name)}
        return self.client.declare(
            project,
            group=place[1] if place is not None and place[0] == project else "",
            name=name or None,
            params=storable(trial.parameters, "parameters"),
            tags=storable(getattr(trial, "tags", None) or {}, "tags"),
            metadata={
                **brought_along(storable(getattr(trial, "metadata", None) or {}, "metadata")),
                RESERVED: own if group_id is None else {**own, "group": group_id},
            },
            description=getattr(trial, "description", None) or "",
            version=None if version is None else str(version),
            identity=identity(f"{hashed}_{revision}"),
            attempt=revision + 1,
        ).result()

    def _copy(self, trial: Any) -> None:
        """Record what a new trial brings along: metrics, a status."""
        for name, container in dict(getattr(trial, "metrics", None) or {}).items():
            if isinstance(container, Mapping):
                for step, value in container.items():
                    self.log_trial_metrics(trial, step=step, **{name: value})
            else:
                values = container.val if hasattr(container, "val") else container
                for value in values if isinstance(values, (list, tuple)) else [values]:
                    self.log_trial_metrics(trial, **{name: value})
        status = getattr(trial, "status", None)
        if status is not None and as_status(status) is not Status.CreatedGroup:
            self.set_trial_status(trial, status)

    def commit(self, **kwargs: Any) -> None:
        """Wait until all is durable; with `file_name_override` also copy the store, to where that URI or path leads."""
        self.client.flush().result()
        name = kwargs.get("file_name_override")
        if name is not None:
            uri = str(name) if ":" in str(name) else f"file:{name}"
            self.client.backup(Path(opening.url_of(uri))).result()

    # queries --------------------------------------------------------------------------------------------------

    def fetch_and_update_trial(self, query: Any, attr: str, *args: Any, **kwargs: Any) -> Trial:
        """Call the method `attr` of this protocol with the first trial that a query means, and give that trial.

        Of many processes one gets each. What the method records is one append to the log; it may not read.
        Raises ItemNotFound.
        """
        asked, method = read_query(query, "trial"), getattr(self, attr)

        def change(state: TrialState, handle: Handle) -> None:
            trial = self._trial(state)
            if fits(asked, trial):
                with self._taking("trial", trial.uid, handle):
                    method(trial, *args, **kwargs)

        try:
            return self._trial(self.client.update_trial(prefilter(asked), change).result())
        except NotFound as error:
            raise ItemNotFound(f"no trial is like {query!r}") from error

    def fetch_and_update_group(self, query: Any, attr: str, *args: Any, **kwargs: Any) -> TrialGroup:
        """Call the method `attr` of this protocol with the first group that a query means, and give that group."""
        asked, method = read_query(query, "group"), getattr(self, attr)

        def change(state: GroupState, handle: Subject) -> None:
            group = self._group(state)
            if fits(asked, group):
                with self._taking("group", group.uid, handle):
                    method(group, *args, **kwargs)

        try:
            return self._group(self.client.update_group(change).result())
        except NotFound as error:
            raise ItemNotFound(f"no group is like {query!r}") from error

    @contextmanager
    def _taking(self, kind: str, uid: str, handle: Any) -> Iterator[None]:
        setattr(self._claimed, kind, (uid, handle))
        try:
            yield
        finally:
            setattr(self._claimed, kind, None)

    def _taken(self, kind: str, uid: str) -> Any:
        taken = getattr(self._claimed, kind, None)
        return taken[1] if taken is not None and taken[0] == uid else None

    def fetch_trials(self, query: Any = None) -> list[Trial]:
        """Fetch the trials that a query means, in the order of their creation. See `queries`."""
        asked = read_query(query, "trial")
        found = map(self._trial, self.client.trials(where=prefilter(asked)))
        return [trial for trial in found if fits(asked, trial)]

    def fetch_groups(self, query: Any = None) -> list[TrialGroup]:
        """Fetch the groups that a query means."""
        asked = read_query(query, "group")
        return [group for group in map(self._group, self.client.groups()) if fits(asked, group)]

    def fetch_projects(self, query: Any = None) -> list[Project]:
        """Fetch the projects that a query means."""
        asked = read_query(query, "project")
        client = self.client
        found = [
            project_of(
                state,
                lambda name=state.project: {self._group(each).uid for each in client.groups(name)},  # type: ignore[misc]
                lambda name=state.project: {uid_of(each) for each in client.trials(project=name)},  # type: ignore[misc]
            )
            for state in client.projects()
        ]
        return [project for project in found if fits(asked, project)]

    def _trial(self, state: TrialState) -> Trial:
        store, uid = self._opened_now(), uid_of(state)
        return trial_of(
            state,
            lambda: self._events(state.id),
            lambda kind, name: store.factories.get((kind, uid, name)),
        )

    def _events(self, trial: str) -> Iterator[StoredEvent]:
        try:
            yield from self.client.events(trial=trial)
        except NotFound as error:
            raise ItemNotFound(f"trial {trial} is not in {self.uri} any more") from error

    def _group(self, state: GroupState) -> TrialGroup:
        client = self._opened_now().client

        def trials() -> set[str]:
            told = {f"metadata.{RESERVED}.group": group.uid}
            inside = client.trials(where={"$or": [told, {"project": state.project, "group": state.name}]})
            found = map(self._trial, inside)
            return {trial.uid for trial in found if trial.group_id == group.uid}

        group = group_of(state, trials)
        return group

    def _opened_now(self) -> opening.Opened:
        # Not looked for anew: this is asked while the store answers.
        return self._opened or self._store


def get_protocol(uri: str, strict: bool = True, eager: bool = True) -> Protocol:
    """Open the store that a URI names.

    Track's own (`file://x.json`, `file:x.json`, `file:///abs/x.json?objective=loss`): a folder next to that file,
    "x.json.eventrun". Ours: a folder's path, "sqlite:PATH", "memory:".
    """
    return Protocol(uri, strict, eager)
