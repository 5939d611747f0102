"""What only one of many processes gets: the methods of a client; `claims` has the ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from eventrun import exits
from eventrun.client import claims
from eventrun.client.checks import check_choice, parsed
from eventrun.codec import plain
from eventrun.errors import InvalidValue
from eventrun.events import (
    Event,
    GroupCreated,
    ProjectCreated,
    group_subject,
    project_subject,
    trial_subject,
)
from eventrun.identity import configuration_hash
from eventrun.pending import Pending
from eventrun.subjects import Group, checked_name, text_of, told_events
from eventrun.trial import (
    Trial,
    creation_events,
    default_name,
    id_of,
    new_id,
)

if TYPE_CHECKING:
    from eventrun.filters import Where
    from eventrun.projections import GroupState, TrialState
from eventrun.client.telling import Telling


class Claiming(Telling):
    """The part of a client that claims: all of it waits for the log, and is decided there."""

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
