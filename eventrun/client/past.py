"""The store as it was: what `client.at(...)` gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eventrun.client.checks import TrialLike, check_between, check_choice, key_of, parsed
from eventrun.pending import Pending, Query

if TYPE_CHECKING:
    from eventrun.client.asking import Asking
    from eventrun.codec import StoredEvent
    from eventrun.projections import GroupState, ProjectState, TrialState
    from eventrun.query import Series


class Past:
    """The store as it was at a position or a time: the read methods of `Client`. Made by `client.at(...)`."""

    def __init__(self, client: Asking, reader: Callable[[], Any]) -> None:
        self._client = client
        self._at = reader

    def trials(self, **chosen: Any) -> Query[TrialState]:
        """Ask for trials, as `Client.trials`."""
        chosen["where"] = parsed(chosen.get("where"))
        return self._client._pages(True, lambda cursor: self._at().trials(cursor, **chosen), 0)

    def get(self, trial: TrialLike) -> Pending[TrialState]:
        """Ask for one trial, as `Client.get`."""
        key = key_of(trial)
        return self._client._ask(True, lambda: self._at().trial(key))

    def history(
        self,
        trial: TrialLike,
        metric: str,
        *,
        points: int | None = None,
        between: tuple[float, float] | None = None,
    ) -> Pending[Series]:
        """Ask for the points of one metric, as `Client.history`."""
        key = key_of(trial)
        check_choice({"metric": metric, "points": points})
        check_between(between)
        return self._client._ask(
            True, lambda: self._at().history(key, metric, points=points, between=between)
        )

    def groups(self, project: str | None = None, *, hidden: bool = False) -> Query[GroupState]:
        """Ask for groups, as `Client.groups`."""
        return self._client._pages(
            True, lambda cursor: self._at().groups(cursor, project=project, hidden=hidden), 0
        )

    def projects(self, *, hidden: bool = False) -> Query[ProjectState]:
        """Ask for projects, as `Client.projects`."""
        return self._client._pages(True, lambda cursor: self._at().projects(cursor, hidden=hidden), 0)

    def events(
        self, after: int = 0, *, trial: TrialLike = None, limit: int | None = None
    ) -> Query[StoredEvent]:
        """Ask for events, as `Client.events`."""
        check_choice({"after": after, "limit": limit})
        key = None if trial is None else key_of(trial)
        return self._client._pages(
            True, lambda cursor: self._at().events(cursor, trial=key, limit=limit), after
        )
