"""The handle that training code holds: every call becomes one event, and none of them waits."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from datetime import UTC, datetime
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from eventrun.clock import monotonic_ns, time_ns
from eventrun.codec import METRICS_TAG, checked_text, encode, metric_values, plain, scalar
from eventrun.errors import AlreadyFinished, InvalidType, InvalidValue
from eventrun.events import (
    AggregatorChoice,
    ChronoFinished,
    ChronoStarted,
    Event,
    InputMarked,
    MetadataSet,
    MetricsLogged,
    OutputMarked,
    ParamsSet,
    Scalar,
    StatusChanged,
    Step,
    TagsAdded,
    TrialCreated,
    TrialFinished,
    TrialRenamed,
    TrialStarted,
    WriterEnded,
)
from eventrun.identity import configuration_hash
from eventrun.subjects import Subject, checked_name, mapping_of, tags_of, text_of

if TYPE_CHECKING:
    from eventrun.pending import Pending

ID_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u
ID_LENGTH = 16  # 80 random bits: a first collision is likely at 10^12 trials

_SCALARS = frozenset({float, int, bool, str, type(None)})
_STEPS = frozenset({int, float, type(None)})
_NO_STEP = type(None)
_active: ContextVar[Trial | None] = ContextVar("eventrun_trial", default=None)


class Recording(Protocol):
    """What a trial needs of its stream."""

    @property
    def append(self) -> Callable[[bytes], None]:
        """Keep an encoded item; changes now and then, so it is looked up at each call."""
        ...

    def record(self, event: Event) -> None:
        """Date, encode and keep an event."""


class Owner(Protocol):
    """What a trial needs of its client."""

    def trial_started(self, trial: Trial) -> None:
        """Take note that a trial runs."""

    def trial_finished(self, trial: Trial) -> None:
        """Take note that a trial has ended."""

    def check_trial(self, trial: Trial) -> Pending[None]:
        """Wait until the store knows a trial."""
        ...


class Trial(Subject):
    """One execution of one configuration. Made by `client.trial(...)`.

    All methods may be called from any thread, return at once, and fail only for values that can't be stored. As a
    context manager (`with` or `async with`) it starts, finishes, and is what `eventrun.current_trial()` gives inside.
    """

    def __init__(
        self,
        owner: Owner,
        recording: Recording,
        trial_id: str,
        project: str,
        group: str,
        name: str,
        resumed: bool,
    ) -> None:
        super().__init__(recording.record)
        self.id = trial_id
        self.project = project
        self.group = group
        self.name = name
        self.resumed = resumed
        self.attempt = 1  # the n-th trial of its configuration, see `client.declare`
        self._owner = owner
        self._recording = recording
        self._lock = RLock()  # reentrant: a signal handler may finish the trial that this thread just begins
        self._started = False
        self._started_ns: int | None = None  # by the monotonic clock
        self._finished: tuple[str, int] | None = None  # the status and when
        self._plain_log = False  # started and not finished: `log` needn't look further
        self._entered: list[tuple[int, Token[Trial | None]]] = []  # process and token of each `with` around

    def __repr__(self) -> str:
        return f"<Trial {self.id} {self.name!r} of {self.project!r}>"

    # metrics --------------------------------------------------------------------------------------------------

    def log(
        self,
        values: Mapping[str, Any] | None = None,
        /,
        *,
        step: Step = None,
        epoch: Step = None,
        subset: str | None = None,
        aggregator: Any = None,
        **named: Any,
    ) -> None:
        """Log metrics: `log(loss=0.3, step=10)` or `log({"loss": 0.3}, step=10, epoch=1, subset="train")`.

        Values are float, int up to 64 bits, bool, str, None, or have `.item()` (a GPU tensor waits for its GPU). Nested
        mappings flatten with "/"; `subset` is a prefix in the same way. Steps are int, float or None. `aggregator`
        chooses one more summary for these metrics: "ring", ("ring", {"n": 10}) or an aggregator. Raises InvalidType or
        InvalidValue naming the key; nothing is recorded then. After `finish` events are kept and marked late.
        """
        if values is None and self._plain_log and epoch is None and subset is None and aggregator is None:
            for value in named.values():
                if type(value) not in _SCALARS:
                    break
            else:
                if named and "" not in named and type(step) in _STEPS:
                    try:
                        # The bytes of MetricsLogged(named, step), whose other fields have their defaults.
                        self._recording.append(encode((time_ns(), (METRICS_TAG, named, step))))
                        return
                    except (
                        OverflowError,
                        UnicodeEncodeError,
                    ):  # a huge int or a lone surrogate: found by name below
                        pass
        merged = named if values is None else {**mapping_of(values, "metrics"), **named}
        self._log(merged, step, epoch, subset, aggregator)

    def _log(self, values: Mapping[str, Any], step: Any, epoch: Any, subset: Any, aggregator: Any) -> None:
        flat = metric_values(values)
        event = MetricsLogged(
            flat,
            _step(step, "step"),
            _step(epoch, "epoch"),
            None if subset is None else checked_name(subset, "subset"),
            _choice(aggregator),
            self._finished is not None,
        )
        if flat:
            self._begin()
            self._record(event)

    def chrono(self, name: str, *, aggregator: Any = None) -> Chrono:
        """Time a block: `with trial.chrono("epoch"): ...`, or `async with`. Nests, and may be used again."""
        return Chrono(self, checked_name(name, "a chrono's name"), _choice(aggregator))

    # what is known about the trial ----------------------------------------------------------------------------

    def set_params(
        self, params: Mapping[str, Any] | None = None, /, *, source: str = "call", **named: Any
    ) -> None:
        """Set params; nested mappings merge by key, all else replaces. `source` is shown beside each value."""
        params = {**mapping_of(params or {}, "params"), **named}
        if params:
            self._record(ParamsSet(plain(params, "params"), checked_name(source, "source")))

    def add_input(self, ref: Any) -> None:
        """Mark what the trial uses: a text, URI or mapping. Marking the same again changes nothing."""
        self._record(InputMarked(plain(ref, "input")))

    def add_output(self, ref: Any) -> None:
        """Mark what the trial makes: a text, URI or mapping. Marking the same again changes nothing."""
        self._record(OutputMarked(plain(ref, "output")))

    def rename(self, name: str) -> None:
        """Give it another name."""
        name = checked_name(name, "the trial's name")
        self._record(TrialRenamed(name))
        self.name = name

    # its life -------------------------------------------------------------------------------------------------

    def set_status(self, status: str, error: BaseException | str | None = None) -> None:
        """Say how the trial is, in your own word; views map it to one of seven."""
        self._record(StatusChanged(checked_name(status, "the status"), _error_text(error)))

    def start(self) -> None:
        """Record that the trial runs; `with` and the first `log` do so by themselves."""
        self._begin()

    def finish(self, status: str = "completed", error: BaseException | str | None = None) -> None:
        """End the trial. Raises AlreadyFinished when it has ended."""
        status, text = checked_name(status, "the status"), _error_text(error)
        with self._lock:
            if self._finished is not None:
                was, when = self._finished
                date = datetime.fromtimestamp(when / 1e9, UTC).isoformat(" ", "seconds")
                raise AlreadyFinished(
                    f"trial {self.name!r} ({self.id}) ended already at {date} as {was!r}; "
                    f"to go on with it: client.trial({self.project!r}, resume={self.id!r})"
                )
            self._record(TrialFinished(status, text, self._seconds()))
            self._finished = (status, time_ns())
            self._plain_log = False
        self._owner.trial_finished(self)

    def interrupt(self, reason: str, writer: int) -> None:
        """Record that this writer goes without a finish. Takes no lock: a signal handler may call it anywhere.

        The trial is interrupted then; one that was resumed only if nobody else runs it (it may be one rank of many).
        """
        if self._started and self._finished is None:
            self._finished = ("interrupted", time_ns())
            self._plain_log = False
            if self.resumed:
                self._record(WriterEnded(writer, time_ns(), reason))
            else:
                self._record(TrialFinished("interrupted", reason, self._seconds()))

    @property
    def runs(self) -> bool:
        """Tell whether this handle has begun the trial, or is about to, and not ended it."""
        return self._started_ns is not None and self._finished is None

    def _seconds(self) -> float | None:
        return None if self._started_ns is None else (monotonic_ns() - self._started_ns) / 1e9

    @property
    def finished(self) -> bool:
        """Tell whether this handle ended the trial."""
        return self._finished is not None

    def ready(self) -> Pending[None]:
        """Wait until the store knows this trial. Raises NotFound for a `resume=` id that doesn't exist."""
        return self._owner.check_trial(self)

    def _begin(self) -> None:
        if self._started:
            return
        with self._lock:
            first = not self._started
            if first and self._finished is None:
                self._started_ns = monotonic_ns()
                self._record(TrialStarted(self.resumed))
                self._plain_log = True
            self._started = True
        if first:
            self._owner.trial_started(self)

    def __enter__(self) -> Trial:
        self._begin()
        self._entered.append((os.getpid(), _active.set(self)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, token = self._entered.pop()
        # The outermost block ends the trial, in the process that entered it: a fork's child that leaves by an
        # exception must not end what its parent still runs.
        if self._finished is None and not self._entered and process == os.getpid():
            status = _status_of(error)
            self.finish(status, None if status == "completed" else error)
        try:
            _active.reset(token)
        except ValueError:  # left in another context: a generator that another task closes
            _active.set(None)

    async def __aenter__(self) -> Trial:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)


class Chrono:
    """A named timer of a trial; durations come from the monotonic clock.

    Blocks of one chrono nest; threads and tasks that time the same name side by side take one each.
    """

    def __init__(self, trial: Trial, name: str, aggregator: AggregatorChoice | None) -> None:
        self._trial = trial
        self._name = name
        self._aggregator = aggregator
        self._starts: list[int] = []

    def __enter__(self) -> Chrono:
        self._trial.start()
        self._trial.record(ChronoStarted(self._name, self._aggregator))
        self._starts.append(monotonic_ns())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = (monotonic_ns() - self._starts.pop()) / 1e9
        late = self._trial.finished
        self._trial.record(ChronoFinished(self._name, seconds, _error_text(error), self._aggregator, late))

    async def __aenter__(self) -> Chrono:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)


def active_trial() -> Trial | None:
    """Return the trial whose `with` block this task is in."""
    return _active.get()


def creation_events(
    trial: Trial,
    params: Any,
    tags: Any,
    metadata: Any,
    description: str,
    version: str | None,
    attempt: int = 1,
) -> list[Event]:
    """Make the events that a new trial begins with; all values are checked before any is recorded."""
    events: list[Event] = [
        TrialCreated(trial.project, trial.group, trial.name, text_of(description, "the description"),
                     None if version is None else text_of(version, "the version"), attempt)
    ]  # fmt: skip
    if params:
        events.append(ParamsSet(plain(mapping_of(params, "params"), "params")))
    if tags:
        events.append(TagsAdded(tags_of(tags)))
    if metadata:
        events.append(MetadataSet(plain(mapping_of(metadata, "metadata"), "metadata")))
    return events


def new_id() -> str:
    """Draw a trial's id: 80 random bits."""
    return _spelled(os.urandom(10))


def id_of(identity: str) -> str:
    """Make the id of a trial that is the same wherever this identity is named, see `client.declare`."""
    return _spelled(bytes.fromhex(configuration_hash(identity))[:10])


def _spelled(ten_bytes: bytes) -> str:
    bits = int.from_bytes(ten_bytes, "big")
    return "".join(ID_ALPHABET[bits >> shift & 31] for shift in range(75, -1, -5))


def default_name(trial_id: str) -> str:
    """Make a name that people can say from an id: "calm-otter-7f3"."""
    number = int.from_bytes(trial_id.encode(), "big")
    return f"{_ADJECTIVES[number % 64]}-{_ANIMALS[number // 64 % 64]}-{trial_id[:3]}"


def _step(value: Any, what: str) -> Step:
    found: Scalar = scalar(value, what)
    if type(found) not in _STEPS:
        raise InvalidType(f"{what} is {value!r}; steps are int, float or None")
    return found  # type: ignore[return-value]


def _choice(aggregator: Any) -> AggregatorChoice | None:
    if aggregator is None:
        return None
    from eventrun import aggregators  # seldom chosen: the log call needn't pay for the import

    if isinstance(aggregator, str):
        aggregator = (aggregator, {})
    try:
        name, arguments = aggregator if isinstance(aggregator, tuple) else aggregators.describe(aggregator)
        aggregators.make(name, arguments)
    except (TypeError, ValueError) as error:
        raise InvalidValue(f"aggregator={aggregator!r}: {error}") from error
    return (name, dict(arguments))


def _error_text(error: BaseException | str | None) -> str | None:
    if error is None:
        return None
    if isinstance(error, str):
        return checked_text(error, "the error")
    try:
        text = str(error).encode("utf-8", "backslashreplace").decode()
    except Exception as failure:  # noqa: BLE001 - an error that can't say what it is must not hide behind this one
        text = f"(its text could not be made: {type(failure).__name__})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _status_of(error: BaseException | None) -> str:
    """The word for how a block was left. Being cancelled or stopped isn't a failure of the trial."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "completed"
    return "failed" if isinstance(error, (Exception, SystemExit)) else "interrupted"


# ruff: noqa: SIM905 - a list literal of 64 words would take 64 lines
_ADJECTIVES = (
    "able airy amber bold brave brisk bright calm clear clever cosy crisp dapper deft eager early easy fair fine fleet "
    "fond frank fresh gentle glad golden grand happy hardy honest jolly keen kind lively lucid lucky merry mild neat "
    "nimble noble patient plain polite proud quick quiet rapid ready sage sharp silver smart snug spry steady sunny "
    "swift tidy trusty vivid warm wise witty"
).split()
_ANIMALS = (
    "badger bear beaver bee bison bobcat camel cat condor crane crow deer dingo dolphin dove eagle egret elk falcon "
    "ferret finch fox gecko goat goose hare hawk heron ibex ibis jackal jay kestrel kiwi koala lark lemur llama lynx "
    "magpie marten mole moose newt ocelot orca osprey otter owl panda pike puffin quail raven robin seal shrew stork "
    "swan tapir tern toad vole wren"
).split()
