"""What a client is asked: trials, histories, groups, events, the past; and the store itself, to keep it well."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eventrun import damage
from eventrun.client.checks import TrialLike, check_between, check_choice, key_of, parsed
from eventrun.client.lost import as_lost, lost_trials, may_recover
from eventrun.client.past import Past
from eventrun.clock import monotonic_ns
from eventrun.codec import Batch, Stream
from eventrun.config import Settings
from eventrun.errors import Closed, InvalidValue, LogDamaged, StoreUnavailable
from eventrun.filesystems import cache_folder, file_system
from eventrun.pending import Page, Pending, Query
from eventrun.portal import Portal
from eventrun.recorder import Recorder
from eventrun.recovery import RecoveryReport
from eventrun.stores.base import READ_BYTES, StoredBatch, Tip

if TYPE_CHECKING:
    from eventrun.codec import StoredEvent
    from eventrun.damage import Damage
    from eventrun.filters import Where
    from eventrun.journal import JournalReport
    from eventrun.projections import GroupState, Projection, ProjectState, TrialState
    from eventrun.projector import VerifyReport
    from eventrun.query import Reader, Series
    from eventrun.salvage import SalvageReport

TAIL_POLL_S = 0.1

T = TypeVar("T")


class Asking:
    """The part of a client that reads. Every answer is worked out on the reader's thread."""

    settings: Settings
    url: str
    folder: Path | None
    _portal: Portal
    _recorder: Recorder
    _readers: Reader | None
    _looked_ns: int
    _look_every_s: float
    _lost: frozenset[str]
    _said: set[str]
    _closed: bool

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

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the client was closed before this call; open another with eventrun.open(...)")
