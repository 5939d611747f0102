"""`eventrun.open(...)`: one object that ties store, recorder and read side together.

`past` has the store as it was, `checks` what questions may be made of, `ending` what is said at the end.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from eventrun import damage, exits
from eventrun.client import claims
from eventrun.client.checks import TrialLike, check_between, check_choice, checked_id, key_of, parsed
from eventrun.client.ending import Ending, block_for_people, say
from eventrun.client.lost import as_lost, lost_trials, may_recover
from eventrun.client.past import Past
from eventrun.clock import monotonic_ns
from eventrun.codec import Batch, Stream, plain
from eventrun.config import Settings, load_settings
from eventrun.errors import Closed, InvalidValue, LogDamaged, NotFound, StoreError, StoreUnavailable
from eventrun.events import (
    Event,
    GroupCreated,
    ProjectCreated,
    group_subject,
    project_subject,
    trial_subject,
)
from eventrun.filesystems import cache_folder, file_system
from eventrun.identity import configuration_hash
from eventrun.pending import Page, Pending, Query
from eventrun.portal import Portal, aside
from eventrun.recorder import CLOSE_STORE_S, NO_FINISH, Recorder, Statistics
from eventrun.recovery import RecoveryReport
from eventrun.stores import open_store
from eventrun.stores.base import READ_BYTES, StoredBatch, Tip
from eventrun.subjects import Group, Project, Subject, checked_name, text_of, told_events
from eventrun.trial import (
    Trial,
    active_trial,
    creation_events,
    default_name,
    id_of,
    new_id,
)

if TYPE_CHECKING:
    from eventrun.codec import StoredEvent
    from eventrun.damage import Damage
    from eventrun.filters import Where
    from eventrun.journal import JournalReport
    from eventrun.projections import GroupState, Projection, ProjectState, TrialState
    from eventrun.projector import VerifyReport
    from eventrun.query import Reader, Series
    from eventrun.salvage import SalvageReport

__all__ = ["Client", "Past", "current_trial", "open"]

LOOK_FOR_DEAD_WRITERS_S = 2.0  # how often readers look whether a writer was killed
COLLECT_EVERY_S = 0.5  # how often they look for new events on a network disk
CLOSING_BLOCK_S = 0.3
STUCK_S = 1.0  # how long closing waits for eventrun's own threads beyond the time that they have
TAIL_POLL_S = 0.1

T = TypeVar("T")


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
        self._recorder = _recorder_for(self.folder)(
            self._portal,
            lambda: next(stores, None) or open_store(self.url, create=create),
            folder=self.folder,
            linger_ms=settings.linger_ms,
            close_timeout_s=settings.close_timeout_s,
            forked=self._forked,
            running=lambda: [trial_subject(t.id) for t in tuple(self._trials.values()) if t.runs],
        )
        self._readers: Reader | None = None
        self._trials: dict[int, Trial] = {}  # handles whose end is this client's business, by id()
        self._resumed: list[str] = []  # ids that were to be there already
        self._made: list[str] = []  # for the closing block
        self._known: set[str] = set()  # projects and groups that were recorded
        self._looked_ns = -(1 << 62)
        self._lost: frozenset[str] = (
            frozenset()
        )  # trials that are lost, though this client may not say so in the log
        self._said: set[str] = set()
        self._look_every_s = (
            COLLECT_EVERY_S if type(self._recorder) is not Recorder else LOOK_FOR_DEAD_WRITERS_S
        )
        self._closed = False
        self._ending = Ending()

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

    def declare(
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
        if_exists: str = "none",
        identity: str | None = None,
        attempt: int | None = None,
    ) -> Pending[Trial | None]:
        """Begin a trial unless its configuration was declared before, by whomever: one of many processes gets it.

        The configuration is project, group, name, version and params, in any order of keys; types are kept apart.
        When it exists the answer is None, or with `if_exists="error"` AlreadyExists is raised; "attempt" begins its
        next attempt. The trial is durable before the answer comes; it is created, and runs when it is started.
        With `identity`, that text is what makes it the same, instead of its configuration, and gives it its id;
        `attempt` is then which attempt it is, if one that somebody else has counted (see `compat.track`).
        """
        if if_exists not in claims.IF_EXISTS:
            raise InvalidValue(f"if_exists={if_exists!r}: it is one of {', '.join(claims.IF_EXISTS)}")
        project = checked_name(project, "the project's name")
        group = checked_name(group, "the group's name") if group else ""
        named = None if name is None else checked_name(name, "the trial's name")
        trial_id = new_id() if identity is None else id_of(text_of(identity, "the identity"))
        check_choice({"attempt": attempt})
        trial = Trial(
            self, self._recorder.stream(trial_subject(trial_id)), trial_id, project, group,
            default_name(trial_id) if named is None else named, resumed=False,
        )  # fmt: skip

        def creation(number: int) -> list[Event]:
            number = number if attempt is None else attempt
            return creation_events(trial, params, tags, metadata, description, version, number)

        creation(1)  # what can't be stored fails here, where it was passed
        configuration = project, group, named, version, plain(dict(params or {}), "params")
        hashed = configuration_hash(*(configuration if identity is None else ("identity", identity)))
        self._check_open()

        def claim() -> Trial | None:
            number = claims.claim_attempt(self._claiming(), hashed, trial_id, if_exists, creation)
            if number is None:
                return None
            trial.attempt = number if attempt is None else attempt
            self._create_places(project, group)
            exits.watch(self)
            self._trials[id(trial)] = trial
            self._made.append(trial_id)
            return trial

        return self._portal.read(claim)

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

    def declare_project(
        self,
        name: str,
        *,
        description: str | None = None,
        tags: Iterable[str] | Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Pending[bool]:
        """Create a project unless it exists; True for the one, of many at once, that created it."""
        checked_name(name, "the project's name")
        return self._declare(
            project_subject(name), ProjectCreated(name), told_events(description, tags, metadata)
        )

    def declare_group(
        self,
        project: str,
        name: str,
        *,
        description: str | None = None,
        tags: Iterable[str] | Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Pending[bool]:
        """Create a group unless it exists; True for the one, of many at once, that created it."""
        checked_name(project, "the project's name")
        checked_name(name, "the group's name")
        told = told_events(description, tags, metadata)
        self._check_open()
        self._create_places(project, "")
        exits.watch(self)
        return self._declare(group_subject(project, name), GroupCreated(project, name), told)

    def _declare(self, subject: str, created: Event, told: list[Event]) -> Pending[bool]:
        self._known.add(subject)
        return self._ask(True, lambda: claims.claim_subject(self._claiming(), subject, [created, *told]))

    def update_trial(
        self,
        where: Where,
        method: str | Callable[[TrialState, Trial], object],
        /,
        *arguments: Any,
        **named: Any,
    ) -> Pending[TrialState]:
        """Do something to the first trial for which a filter holds, so that of many processes one gets it.

        `method` is that of a trial that records something about it, like `update_trial("status == 'created'",
        "set_status", "running")`. Gives the trial's state afterwards. Atomic towards other calls of this method and
        of `release_lost`; what the trial's own process records meanwhile doesn't hinder it. Raises NotFound.

        Instead of a method it may be a function of a trial's state and of a handle to record with; a trial for which
        it records nothing is passed by. It is called on another thread, perhaps again, and must not ask this client.
        """
        condition = parsed({} if where is None else where)
        assert condition is not None
        events = claims.what_to_record(method, arguments, named)
        return self._ask(
            True, lambda: claims.update_first(self._claiming(), self._reader(), condition, events)
        )

    def update_group(
        self, change: Callable[[GroupState, Group], object], *, project: str | None = None
    ) -> Pending[GroupState]:
        """Do something to the first group for which a function records something; of many processes one gets it.

        As `update_trial` with a function. Raises NotFound.
        """
        check_choice({"project": project})
        return self._ask(
            True,
            lambda: claims.update_first_group(
                self._claiming(), self._reader(), project, lambda state: claims.events_of_group(change, state)
            ),
        )

    def release_lost(
        self, *, older_than: float = 0.0, project: str | None = None
    ) -> Pending[list[TrialState]]:
        """Give back the trials of workers that are gone: their status becomes "created" again, to be taken anew.

        Those are the lost ones, and of the running ones those that nothing was recorded of for `older_than` seconds
        (0: none of them; a living trial records a heartbeat every 10 s). Each is given back once, whoever else tries.
        """
        if type(older_than) not in (int, float) or not 0 <= older_than < 1e9:
            raise InvalidValue(f"older_than={older_than!r}: it is a number of seconds from 0 on")
        check_choice({"project": project})
        return self._ask(True, lambda: claims.release(self._claiming(), self._reader(), older_than, project))

    def _claiming(self) -> claims.Log:
        store, wait = self._recorder.store, self._portal.call
        return claims.Log(
            lambda batches, expected: wait(store.append, batches, expected).result(),
            lambda stream: wait(store.tip, stream).result(),
            self._read_log,
        )

    def _create_places(self, project: str, group: str) -> None:
        for subject, event in (
            (project_subject(project), ProjectCreated(project)),
            (group_subject(project, group), GroupCreated(project, group)),
        ):
            if subject not in self._known and (group or isinstance(event, ProjectCreated)):
                self._known.add(subject)
                self._recorder.stream(subject).record(event)

    def _forked(self) -> object:
        """In a fork's child: the parent's trials are the parent's to end, its connections not to be touched."""
        self._trials.clear()
        self._made.clear()
        self._resumed.clear()
        reader, self._readers = self._readers, None
        if not self._ending.over:  # a close that was under way on a thread that the child hasn't got
            self._closed = False
            self._ending = Ending()
        exits.watch(self)
        return None if reader is None else (reader, reader.abandon())

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
        where: Where = None,
        hidden: bool = False,
        order_by: str | None = None,
        limit: int | None = None,
        offset: int = 0,
        fresh: bool = True,
    ) -> Query[TrialState]:
        """Ask for trials, with `hidden` for the hidden ones too. `where` is a filter, see `eventrun.filters`.

        `order_by`: "created" (the default), "metrics.loss.last", "params.lr", ...; "-" reverses.
        """
        chosen: dict[str, Any] = {
            "project": project, "group": group, "status": status, "tag": tag, "name": name,
            "order_by": order_by, "limit": limit,
        }  # fmt: skip
        check_choice({**chosen, "offset": offset})
        condition = parsed(where)

        def page(cursor: Any) -> Page[TrialState]:
            found, following = self._reader().trials(
                cursor, where=condition, hidden=hidden, offset=offset, fresh=fresh, **chosen
            )
            return [as_lost(state, self._lost) for state in found], following

        return self._pages(fresh, page, 0)

    def get(self, trial: TrialLike, *, fresh: bool = True) -> Pending[TrialState]:
        """Ask for one trial by id, unique prefix, name or "@latest". Raises NotFound, Ambiguous."""
        key = key_of(trial)
        return self._ask(fresh, lambda: as_lost(self._reader().trial(key, fresh=fresh), self._lost))

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
        key = key_of(trial)
        check_choice({"metric": metric, "points": points})
        check_between(between)
        return self._ask(
            fresh, lambda: self._reader().history(key, metric, points=points, between=between, fresh=fresh)
        )

    def groups(
        self, project: str | None = None, *, hidden: bool = False, fresh: bool = True
    ) -> Query[GroupState]:
        """Ask for groups, with a summary of their trials."""
        return self._pages(
            fresh,
            lambda cursor: self._reader().groups(cursor, project=project, hidden=hidden, fresh=fresh),
            0,
        )

    def projects(self, *, hidden: bool = False, fresh: bool = True) -> Query[ProjectState]:
        """Ask for projects, with a summary of their trials."""
        return self._pages(
            fresh, lambda cursor: self._reader().projects(cursor, hidden=hidden, fresh=fresh), 0
        )

    def events(
        self, after: int = 0, *, trial: TrialLike = None, limit: int | None = None, fresh: bool = True
    ) -> Query[StoredEvent]:
        """Ask for the events of the log beyond position `after`, in order; of one trial, or all."""
        check_choice({"after": after, "limit": limit})
        key = None if trial is None else key_of(trial)
        return self._pages(fresh, lambda cursor: self._reader().events(cursor, trial=key, limit=limit), after)

    def tail(
        self, *, after: int | None = None, trial: TrialLike = None, poll_s: float = TAIL_POLL_S
    ) -> Query[StoredEvent]:
        """Follow the log: events beyond `after` (None: from now on), for ever, as they become durable."""
        key = None if trial is None else key_of(trial)
        check_choice({"after": after})
        start = -1 if after is None else after
        return Query(
            lambda cursor: self._ask(True, lambda: self._reader().tail(cursor, trial=key)), start, poll_s
        )

    def at(self, *, position: int | None = None, time: Any = None) -> Past:
        """Go back: an object with the same read methods, as of a position of the log or a time.

        `time` is in nanoseconds since 1970, a datetime with a time zone, or ISO text.
        """
        check_choice({"position": position})
        if (position is None) == (time is None):
            raise InvalidValue("at() takes a position or a time, one of them")
        return Past(self, lambda: self._reader().at(position=position, time=time))

    def rebuild(self, trial: TrialLike = None) -> Pending[int]:
        """Fold the whole log anew beside the old views, or one trial's part; gives the position reached."""
        key = None if trial is None else key_of(trial)
        return self._ask(True, lambda: self._reader().rebuild(key))

    def verify(self, *, views: bool = False) -> Pending[VerifyReport]:
        """Read everything and check it: the log and the journals; with `views`, also fold anew and compare.

        What is wrong is in the report's `problems`, a `Damage` each; it is never an error.
        """
        return self._ask(False, lambda: self._verify(views))

    def _verify(self, views: bool) -> VerifyReport:
        try:
            self._freshen()
        except LogDamaged:  # which the report tells
            pass
        return self._reader().verify(views=views)

    def register(self, projection: Projection[Any]) -> None:
        """Have a projection of your own kept, caught up and rebuilt like ours; ask for its state with `view`."""
        self._reader().register(projection)

    def view(self, name: str, key: str = "", *, fresh: bool = True) -> Pending[Any]:
        """Ask for the state of a registered projection. Raises NotFound for a name that isn't registered."""
        return self._ask(fresh, lambda: self._reader().view(name, key, fresh=fresh))

    def _ask(self, fresh: bool, question: Callable[[], T]) -> Pending[T]:
        self._check_open()

        def answer() -> T:
            if fresh:
                self._freshen()
            return question()

        return self._portal.read(answer)

    def _pages(self, fresh: bool, fetch: Callable[[Any], Page[T]], start: Any) -> Query[T]:
        # Only the first page waits for what was recorded before: the rest belongs to the same question.
        return Query(lambda cursor: self._ask(fresh and cursor == start, lambda: fetch(cursor)), start)

    def _freshen(self) -> None:
        """On the reader's thread: what this client recorded is durable, what killed writers left is taken in."""
        if not self._recorder.idle:
            self._recorder.flush().result()
        now = monotonic_ns()
        if self._recorder.unseen or now - self._looked_ns > self._look_every_s * 1e9:
            self._looked_ns = now
            try:
                self._recover()
            except (
                StoreUnavailable
            ) as error:  # a full disk, as a rule: what the log holds can be read all the same
                self._say_once(f"what a killed writer left can't be taken in now: {error}")

    def _recover(self) -> RecoveryReport:
        if self.folder is not None and not may_recover(self.folder / "journals"):
            self._lost = lost_trials(self.folder / "journals")
            if self._lost:
                self._say_once(
                    f"{len(self._lost)} trials of killed writers are lost; the last events that these recorded are in "
                    f"{self.folder / 'journals'}, and missing here until somebody opens the store who may write to it"
                )
            return RecoveryReport()
        self._reader().views.drop_if_ahead()
        report = self._portal.call(self._recorder.recover).result()
        for problem in report.problems:
            warnings.warn(
                f"eventrun: a killed writer's journal is damaged: {problem}", RuntimeWarning, stacklevel=2
            )
        return report

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"eventrun: {message}", RuntimeWarning, stacklevel=2)

    def _reader(self) -> Reader:
        if self._readers is None:
            from eventrun.query import Reader

            shared = self.folder is not None and file_system(self.folder).network
            self._readers = Reader(
                cache_folder(self.folder) if shared and self.folder is not None else self.folder,
                read=self._read_log,
                end=self._end_of_log,
                gentle=lambda: not self._recorder.idle,
                inspect=self._inspect,
                journals=self._check_journals,
            )
        return self._readers

    def _read_log(
        self, after: int = 0, *, subject: str | None = None, limit_bytes: int = READ_BYTES
    ) -> list[StoredBatch]:
        store = self._recorder.store

        async def read() -> list[StoredBatch]:
            return await store.read(after, subject=subject, limit_bytes=limit_bytes)

        return self._portal.call(read).result()

    def _inspect(self) -> list[Damage]:
        """What is wrong beyond the batches themselves: a lost tail, SQLite's own structure, the files."""
        found: list[Damage] = []
        store = self._recorder.store
        lost = None
        try:
            if (lost_tail := getattr(store, "lost_tail", None)) is not None:
                lost = self._portal.call(lost_tail).result()
                if lost is not None:
                    what = "were in the log once and are lost"
                    found.append(damage.positions(lost[1] + 1, lost[0], what))
            if (check := getattr(store, "check", None)) is not None:
                found += [damage.file("log.db", what) for what in self._portal.call(check).result()]
        except LogDamaged as error:
            found.append(damage.file("log.db", str(error)))
        if (look := getattr(store, "damage", None)) is not None:
            found += look(tail_lost=lost is not None)
        return found

    def _check_journals(self) -> list[JournalReport]:
        from eventrun.journal import check_journals

        return [] if self.folder is None else check_journals(self.folder / "journals")

    def _end_of_log(self) -> int:
        return self._portal.call(self._recorder.store.end).result()

    # the store itself, for import, export and maintenance ------------------------------------------------------

    def recovery(self) -> Pending[RecoveryReport]:
        """Take in what killed writers of this host left; reads do so by themselves."""
        return self._ask(False, self._recover)

    def salvage(self, out: Path | str) -> Pending[SalvageReport]:
        """Write a clean store with all that can be read of this one to a new or empty folder, and tell what not.

        This store is only read. Where it can't even be opened: `eventrun.salvage.salvage(folder, out)`.
        """
        from eventrun.salvage import salvage

        if self.folder is None:
            raise InvalidValue(f"the store {self.url!r} has no files to salvage")
        folder = self.folder

        def job() -> SalvageReport:
            try:
                self._freshen()
            except LogDamaged:  # what was recorded is in the journals
                pass
            return salvage(folder, Path(out))

        return self._ask(False, job)

    def collect(self, *, hosts: Iterable[str] = ()) -> Pending[RecoveryReport]:
        """Take in what writers left in their journals: on a network disk all of them, else those of other hosts too.

        `hosts` names machines (ALL_HOSTS: all but this one) whose writers are dead for certain, so that their journals
        are removed when all is in the log. Raises StoreUnavailable while another process is collecting.
        """
        self._check_open()
        named = [hosts] if isinstance(hosts, str) else [*hosts]
        return self._portal.call(self._recorder.collect, named)

    def backup(self, folder: Path | str) -> Pending[None]:
        """Copy the store to an empty or new folder while it is used: all that is durable now. Raises StoreError."""
        copy = getattr(self._recorder.store, "backup", None)
        if copy is None:
            raise InvalidValue(f"the store {self.url!r} can't be copied as files: export its events instead")
        return self._ask(True, lambda: self._portal.call(copy, Path(folder)).result())

    def append(self, batches: Sequence[Batch], expected: Mapping[Stream, int] | None = None) -> Pending[int]:
        """Append ready batches to the log, all or none. Raises Conflict; see `stores.base.Store`.

        No journal holds them, so the log is settled too: then damage to the engine's write-ahead file costs nothing.
        """
        self._check_open()
        store = self._recorder.store

        async def append() -> int:
            end = await store.append(batches, expected)
            try:
                await store.settle()
            except (
                StoreUnavailable
            ):  # hindered by a reader: durable all the same, and settled with what comes next
                pass
            return end

        return self._portal.call(append)

    def tip(self, stream: Stream) -> Pending[Tip]:
        """Ask where a stream ends."""
        self._check_open()
        return self._portal.call(self._recorder.store.tip, stream)

    def batches(self, after: int = 0, *, subject: str | None = None) -> Query[StoredBatch]:
        """Ask for the log's batches beyond a position, as they are stored."""

        def page(cursor: int) -> Page[StoredBatch]:
            found = self._read_log(cursor, subject=subject)
            return found, found[-1].last_position if found else None

        return self._pages(True, page, after)

    # the end --------------------------------------------------------------------------------------------------

    def interrupt(self, reason: str) -> None:
        """End all trials of this client as interrupted, at once and without waiting (a signal has come)."""
        for trial in tuple(self._trials.values()):
            trial.interrupt(reason, self._recorder.writer)

    def close(self) -> None:
        """End what is unfinished, bring everything to the log and let go; about `close_timeout_s` at most.

        What doesn't get there in time, or before a Ctrl-C, stays in the journal, said in one line; the next open takes
        it in. Closing again waits for the first close, if that goes on on another thread, and does nothing else.
        """
        ending = self._ending
        if sys.is_finalizing():  # nobody can bring anything to the log any more, and the journal keeps it
            return
        if not ending.claim():
            with self._telling_if_stopped(ending):
                ending.wait(self.settings.close_timeout_s + CLOSE_STORE_S + STUCK_S)
            return
        try:
            with self._telling_if_stopped(ending):
                self._end(ending, monotonic_ns() + int(self.settings.close_timeout_s * 1e9))
        finally:
            self._closed = True
            exits.forget(self)
            ending.finish()

    @contextmanager
    def _telling_if_stopped(self, ending: Ending) -> Iterator[None]:
        try:
            yield
        except BaseException:  # Ctrl-C, as a rule, by somebody who doesn't want to wait
            self._closed = True
            if not self._recorder.untouched:
                self._recorder.close()  # in the background, as far as it gets
            ending.say_left(self._recorder.left, "closing was interrupted", self._safe_place())
            raise

    def _end(self, ending: Ending, deadline: int) -> None:
        def seconds() -> float:
            return max(0.0, (deadline - monotonic_ns()) / 1e9)

        self.interrupt(NO_FINISH)
        # What is asked here is answered after a flush, so it may take its part of the time, but not all.
        block = block_for_people(
            self, self._made, quiet=self.settings.quiet, seconds=min(CLOSING_BLOCK_S, seconds() / 4)
        )
        unknown = self._unknown(seconds() / 2)
        self._closed = True
        if not self._close_recorder(ending, seconds()):
            self._portal.forget()  # something hangs: its threads are daemons, and nobody waits for them
        else:
            closed = None if self._readers is None else self._portal.read(self._readers.close)
            self._portal.stop(max(seconds(), STUCK_S))
            if closed is not None and closed.done():
                closed.result()
        for trial_id in unknown:
            say(
                f"eventrun: there was no trial {trial_id} in {self.url} to resume; what was logged is kept under this "
                "id, without a name: is it the right store?"
            )
        if block:
            say(block)

    def _close_recorder(self, ending: Ending, seconds: float) -> bool:
        """Bring everything to the log; False when something hangs."""
        recorder = self._recorder
        if recorder.untouched:
            return True
        journals = recorder.journals
        place = self._safe_place()  # of what is not in a file now, none will be if the loop itself hangs
        try:
            left = recorder.close(seconds).result(seconds + CLOSE_STORE_S + STUCK_S)
            place = journals
        except TimeoutError:
            left = recorder.left
        why = recorder.last_error or "the store didn't answer in time"
        ending.say_left(left, why, place)
        ending.say_lost(recorder.statistics().dropped, why)
        return not left and recorder.store_closed

    def _safe_place(self) -> Path | None:
        return (
            self._recorder.journals if self._recorder.statistics().acknowledgement == "crash_safe" else None
        )

    def _unknown(self, seconds: float) -> list[str]:
        """Find resumed ids of which the store knows nothing but what was recorded under them here."""
        if not self._resumed:
            return []

        def look() -> list[str]:
            self._recorder.flush().result(seconds)
            subjects = {trial_subject(trial_id): trial_id for trial_id in self._resumed}
            found = {subject: self._read_log(subject=subject, limit_bytes=1 << 16) for subject in subjects}
            writer = self._recorder.writer
            return [
                subjects[subject]
                for subject, batches in found.items()
                if all(stored.batch.header.writer == writer for stored in batches)
            ]

        try:
            return self._portal.read(look).result(seconds)
        except (StoreError, TimeoutError, RuntimeError):  # then there is worse to tell
            return []

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the client was closed before this call; open another with eventrun.open(...)")

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import anyio

        if sys.is_finalizing():  # a coroutine that is thrown away
            return
        # On a daemon thread: after Ctrl-C only the interpreter's exit waits for it, and a second one ends that too.
        closing = aside(self.close)
        # Shielded: a cancelled task group must not cost the last events their way to the log.
        with anyio.CancelScope(shield=True):
            await closing


def open(  # noqa: A001 - the documented name: eventrun.open
    url: str | os.PathLike[str] | None = None,
    *,
    linger_ms: float | None = None,
    close_timeout_s: float | None = None,
    quiet: bool | None = None,
    create: bool = True,
) -> Client:
    """Open a store: a folder's path, "sqlite:PATH" or "memory:"; by default EVENTRUN_URL, else "runs".

    Cheap and without waiting; a missing folder is made unless `create` is False. Raises StoreUnavailable, InvalidValue.
    """
    settings = load_settings(
        url=None if url is None else os.fspath(url),
        linger_ms=linger_ms,
        close_timeout_s=close_timeout_s,
        quiet=quiet,
    )
    return Client(settings, create=create)


def _recorder_for(folder: Path | None) -> type[Recorder]:
    if folder is None or not file_system(folder).network:
        return Recorder
    from eventrun.network import NetworkRecorder

    return NetworkRecorder


_default: dict[str, Client] = {}  # the client of EVENTRUN_TRIAL, by url


def current_trial() -> Trial | None:
    """Return the trial whose `with` block this task is in; elsewhere the one that EVENTRUN_TRIAL names, or None.

    A new thread has no block of its own. The trial of EVENTRUN_TRIAL is joined in the store of EVENTRUN_URL.
    """
    trial = active_trial()
    named = os.environ.get("EVENTRUN_TRIAL")
    if trial is not None or not named:
        return trial
    checked_id(named, "EVENTRUN_TRIAL=")
    url = load_settings().url
    if url not in _default:
        _default[url] = open(url)
    client = _default[url]
    joined = next((trial for trial in tuple(client._trials.values()) if trial.id == named), None)
    return joined or client.trial("joined", resume=named)
