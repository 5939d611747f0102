"""The read side: list, get, history, groups, projects, events, tail, and all of it as of a moment of the past.

Everything here waits and is called on one thread at a time; the client runs it on its reader thread and hands out
Pending and Query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from eventrun import damage
from eventrun.codec import ChainChecker, StoredEvent
from eventrun.damage import Damage
from eventrun.errors import StoreUnavailable
from eventrun.events import trial_subject
from eventrun.journal import JournalReport
from eventrun.pending import Page
from eventrun.projections import Projection
from eventrun.projector import VerifyReport, Views
from eventrun.projector.catchup import SNAPSHOT_EVERY
from eventrun.projector.custom import stored_events
from eventrun.projector.log import EVERYTHING, Cut, Log, Read, batches, slices
from eventrun.projector.verify import verify_log
from eventrun.query.past import Past, cut_at
from eventrun.query.reads import FROM_THE_END, Reads, small_pages
from eventrun.query.series import Series

__all__ = ["Past", "Reader", "Series", "VerifyReport"]

TAIL_EVENTS = 1_000  # a page of a tail ends with the batch that brings it there
PASTS_KEPT = 2  # moments whose lists stay in memory


def _nothing() -> list[Damage]:
    return []


def _no_journals() -> list[JournalReport]:
    return []


class _Place(NamedTuple):
    """Where a tail is."""

    after: int
    subject: str | None
    checker: ChainChecker


class Reader(Reads):
    """Everything that can be asked about a store.

    `folder` is the store's (None: views are kept in memory), `read` and `end` its methods of that name, waited for.
    `gentle` tells whether this process records just now. For `verify`, `inspect` returns what else the store knows to
    be wrong, and `journals` what lies in the journals.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        read: Read,
        end: Callable[[], int],
        projections: Iterable[Projection[Any]] = (),
        gentle: Callable[[], bool] = lambda: False,
        inspect: Callable[[], list[Damage]] = _nothing,
        journals: Callable[[], list[JournalReport]] = _no_journals,
        snapshot_every: int = SNAPSHOT_EVERY,
    ) -> None:
        views = Views(folder, Log(read, end), projections, gentle=gentle, snapshot_every=snapshot_every)
        super().__init__(views)
        self._folder = folder
        self._inspect = inspect
        self._journals = journals
        self._pasts: dict[Cut, Past] = {}

    def tail(self, cursor: Any = FROM_THE_END, *, trial: str | None = None) -> Page[StoredEvent]:
        """Read what the log holds after a position (-1: after its present end); an empty page says: nothing yet.

        The cursor never ends. Raises NotFound, LogDamaged.
        """
        log = self.views.log
        if not isinstance(cursor, _Place):
            subject = None if trial is None else trial_subject(self._resolve(trial, True))
            cursor = _Place(log.end() if cursor == FROM_THE_END else cursor, subject, ChainChecker())
        after, subject, checker = cursor
        pace = small_pages(self.views.pace())
        found: list[StoredEvent] = []
        for stored in batches(log, after, log.end(), pace, subject):
            found += [
                event
                for part in slices(stored, after, EVERYTHING, pace, checker)
                for event in stored_events(part)
            ]
            if len(found) >= TAIL_EVENTS:
                break
        return found, _Place(found[-1].position if found else after, subject, checker)

    def at(self, *, position: int | None = None, time: Any = None) -> Past:
        """Go back to a position of the log, or to a time: nanoseconds since 1970, an aware datetime or ISO text.

        Raises InvalidValue.
        """
        cut = cut_at(position, time)
        past = self._pasts.pop(cut, None) or Past(self.views, cut)
        self._pasts[cut] = past
        while len(self._pasts) > PASTS_KEPT:
            self._pasts.pop(next(iter(self._pasts))).close()
        return past

    def rebuild(self, trial: str | None = None) -> int:
        """Make all views anew from the log, or those of one trial, and return the position reached.

        Raises StoreUnavailable where they can't be stored: this process has them then, in memory, and nobody else.
        """
        position = self.views.rebuild(None if trial is None else self._resolve(trial, True))
        if self._folder is not None and self.views.in_memory:
            raise StoreUnavailable(
                f"{self._folder} can't be written, so nothing was made anew there; reads fold the log in memory: "
                "make room, or have somebody rebuild who may write"
            )
        return position

    def verify(self, *, views: bool = False) -> VerifyReport:
        """Read the whole log and the journals and check them; with `views`, also fold the log anew and compare."""
        report = verify_log(self.views.log, self.views.pace())
        journals = self._journals()
        held = [each for found in journals for each in found.problems]
        problems = [*report.problems, *self._inspect(), *held]
        right = None
        if views and not report.problems:  # what is damaged can't be folded
            self.views.catch_up_all()
            right = self.views.is_right()
        if right is False:
            wrong = "hold something else than a fresh fold of the log; to make them anew: eventrun rebuild"
            problems.append(damage.file("views", wrong, 0))
        return msgspec.structs.replace(
            report, problems=tuple(problems), journals=tuple(journals), views_ok=right
        )

    def register(self, projection: Projection[Any]) -> None:
        """Keep a projection of the user's own; one of the same name is replaced."""
        self.views.register(projection)

    def view(self, name: str, key: str = "", *, fresh: bool = True) -> Any:
        """Return the state of a registered projection under a key. Raises NotFound if it isn't registered."""
        return self.views.state(name, key, fresh=fresh)

    def view_keys(self, name: str, *, fresh: bool = True) -> list[str]:
        """Return the keys of a registered projection, sorted. Raises NotFound if it isn't registered."""
        return self.views.keys(name, fresh=fresh)

    def close(self) -> None:
        """Close the views; the next question opens them again."""
        for past in self._pasts.values():
            past.close()
        self._pasts.clear()
        self.views.close()

    def abandon(self) -> list[object]:
        """Give away what is open: in a fork's child it must be neither used nor closed, but kept referenced."""
        held = [past.views.abandon() for past in self._pasts.values()]
        self._pasts.clear()
        return [*held, self.views.abandon()]
