"""Track's client and logger: what training code of its users holds."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from eventrun.clock import monotonic_ns
from eventrun.compat.track.aggregators import EACH
from eventrun.compat.track.errors import ItemNotFound
from eventrun.compat.track.persistence import Protocol, get_protocol
from eventrun.compat.track.reading import ORPHANS
from eventrun.compat.track.structure import Project, Status, Trial, TrialGroup, split_uid, storable
from eventrun.config import load_settings
from eventrun.errors import InvalidValue

CAPTURED_LINES = 50  # of stdout and of stderr that `capture_output` keeps, unless told


class TrialLogger:
    """Logs one trial. As `with` it starts and finishes it; what is raised inside is recorded, and goes on its way."""

    def __init__(self, trial: Any, protocol: Protocol) -> None:
        self.protocol = protocol
        self.has_started = False
        self.has_finished = False
        self._trial = trial
        self._began_ns = 0
        self._process = os.getpid()  # a fork's child must not end what its parent still runs
        self._eta_total: int | None = None
        self._captured: list[tuple[str, TextIO, _Tee]] = []

    @property
    def trial(self) -> Trial:
        """The trial as the store has it now."""
        found = self.protocol.fetch_trials({"uid": self._trial.uid})
        if not found:
            raise ItemNotFound(f"there is no trial {self._trial.uid} in {self.protocol.uri} any more")
        return found[0]

    def start(self) -> TrialLogger:
        """Start the trial, once."""
        if not self.has_started:
            self.has_started = True
            self._began_ns = monotonic_ns()
            self.protocol.log_trial_start(self._trial)
            self.protocol.set_trial_status(self._trial, Status.Running)
            atexit.register(self._at_exit)
        return self

    def finish(self, exc_type: Any = None, exc_val: Any = None, exc_tb: Any = None) -> None:
        """Finish the trial, once: completed, interrupted (Ctrl-C) or, by an exception, with its message."""
        if self.has_finished:
            return
        self.has_finished = True
        atexit.unregister(self._at_exit)
        self._release_output()
        self.protocol.log_trial_finish(self._trial, exc_type, exc_val, exc_tb)

    def _at_exit(self) -> None:
        error = getattr(sys, "last_value", None)  # what ended the program, if something did
        self.__exit__(None if error is None else type(error), error, None)

    def __enter__(self) -> TrialLogger:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process == os.getpid():
            self.finish(kind, error, trace)

    def log_metrics(
        self, step: Any = None, aggregator: Callable[[], Any] | None = None, **kwargs: Any
    ) -> None:
        """Log metrics; starts the trial if need be."""
        self.start()
        self.protocol.log_trial_metrics(self._trial, step=step, aggregator=aggregator, **kwargs)

    def log_metadata(self, aggregator: Callable[[], Any] | None = None, **kwargs: Any) -> None:
        """Add or replace metadata."""
        self.protocol.log_trial_metadata(self._trial, aggregator, **kwargs)

    def log_arguments(self, args: Any = None, **kwargs: Any) -> None:
        """Add or replace parameters; the trial's uid stays."""
        self.protocol.log_trial_arguments(self._trial, **{**_arguments(args), **kwargs})

    def add_tags(self, **kwargs: Any) -> None:
        """Add or replace tags."""
        self.protocol.add_trial_tags(self._trial, **kwargs)

    def set_status(self, status: Any, error: Any = None) -> None:
        """Set the status, and what went wrong."""
        self.protocol.set_trial_status(self._trial, status, error)

    @contextmanager
    def chrono(
        self,
        name: str,
        aggregator: Callable[[], Any] = EACH,
        start_callback: Callable[[], Any] | None = None,
        end_callback: Callable[[], Any] | None = None,
    ) -> Iterator[None]:
        """Time a block; the callbacks are called without arguments, when it begins and when it has ended."""
        self.start()
        self.protocol.log_trial_chrono_start(self._trial, name, aggregator, start_callback, end_callback)
        try:
            yield
        finally:
            kind, error, trace = sys.exc_info()
            self.protocol.log_trial_chrono_finish(self._trial, name, kind, error, trace)

    def capture_output(self, n: int = CAPTURED_LINES) -> None:
        """Keep the last `n` lines of stdout and stderr, which go on as before, and log them as metadata at the end."""
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            tee = _Tee(stream, n)
            setattr(sys, name, tee)
            self._captured.append((name, stream, tee))

    def _release_output(self) -> None:
        for name, stream, tee in reversed(self._captured):
            if getattr(sys, name) is tee:
                setattr(sys, name, stream)
            self.log_metadata(None, **{name: tee.lines()})
        self._captured.clear()

    def log_code(self) -> None:
        """Log the text of the program's main file as metadata "code"."""
        path = _main_file()
        if path is not None:
            self.log_metadata(code=path.read_text(errors="replace"))

    def log_file(self, path: Any) -> None:
        """Mark a file as one that the trial made."""
        self.protocol.client.trial("track", resume=self._id()).add_output(str(path))

    def log_directory(self, path: Any, recursive: bool = False) -> None:
        """Mark a folder as one that the trial made."""
        self.log_file(path)

    def _id(self) -> str:
        from eventrun.compat.track.reading import trial_id

        return trial_id(self._trial.uid)

    def set_eta_total(self, total: int) -> None:
        """Say how many steps there will be."""
        self._eta_total = total

    def show_eta(self, step: int, msg: str = "") -> None:
        """Write to stdout how long the rest takes, after `step` steps."""
        if self._eta_total is None or step < 1:
            return
        seconds = (monotonic_ns() - self._began_ns) / 1e9 / step * max(self._eta_total - step, 0)
        sys.stdout.write(f"[{step}/{self._eta_total}] {seconds:.1f} s left {msg}".rstrip() + "\n")


class TrackClient:
    """Chooses project, group and trial, and logs. Reads EVENTRUN_URL or "runs" unless a backend is named.

    `backend` is a URI, see `get_protocol`; TRACK_LOG_BACKEND_NAME is looked at, too. ORION_PROJECT, ORION_EXPERIMENT
    and ORION_TRIAL_ID choose project, group and trial.
    """

    def __init__(self, backend: str | None = None) -> None:
        backend = backend or os.environ.get("TRACK_LOG_BACKEND_NAME") or load_settings().url
        self.protocol = get_protocol(backend)
        self.project: Project | None = None
        self.group: TrialGroup | None = None
        self._logger: TrialLogger | None = None
        self._waiting: dict[str, Any] | None = None  # a trial that is made when its arguments are known
        self._version: str | None = None
        if name := os.environ.get("ORION_PROJECT"):
            self.set_project(name=name)
        if name := os.environ.get("ORION_EXPERIMENT"):
            self.set_group(name=name)
        if uid := os.environ.get("ORION_TRIAL_ID"):
            self.set_trial(uid=uid)

    def set_version(self, version: Any = None, version_fun: Callable[[], Any] | None = None) -> TrackClient:
        """Set the version of the trials to come; by default it is a hash of the program's main file."""
        found = version_fun() if version_fun is not None else version
        self._version = None if found is None else str(found)
        return self

    def set_project(
        self, project: Any = None, force: bool = False, get_only: bool = False, **kwargs: Any
    ) -> Project:
        """Choose a project, given or described by name and so on; created if need be, unless `get_only`.

        Another one than before is taken only with `force`. Raises InvalidValue, ItemNotFound.
        """
        wanted = project if project is not None else Project(**kwargs)
        _only_by_force("project", self.project, wanted, force)
        found = self.protocol.get_project(wanted)
        if found is None and get_only:
            raise ItemNotFound(f"there is no project {wanted.name!r} in {self.protocol.uri}")
        self.project = found or self.protocol.new_project(wanted)
        return self.project

    def set_group(
        self, group: Any = None, force: bool = False, get_only: bool = False, **kwargs: Any
    ) -> TrialGroup:
        """Choose a group of the chosen project, as `set_project`."""
        if group is None:
            group = TrialGroup(**{"project_id": self._project().uid, **kwargs})
        _only_by_force("group", self.group, group, force)
        found = self.protocol.get_trial_group(group)
        if found is None and get_only:
            raise ItemNotFound(f"there is no group {group.name!r} in {self.protocol.uri}")
        # Another process may have created it in between.
        found = found or self.protocol.new_trial_group(group) or self.protocol.get_trial_group(group)
        assert found is not None
        self.group = found
        return found

    def set_trial(
        self,
        trial: Any = None,
        uid: str | None = None,
        hash: str | None = None,  # noqa: A002 - Track's name
        revision: int = 0,
        force: bool = False,
    ) -> TrialLogger:
        """Go on with a trial. Raises ItemNotFound."""
        if trial is None:
            hashed, revision = split_uid(uid) if uid is not None else (hash, revision)
            trial = Trial(_hash=hashed, revision=revision)
        self._check_no_trial(force)
        found = self.protocol.fetch_trials({"uid": trial.uid})
        if not found:
            raise ItemNotFound(f"there is no trial {trial.uid} in {self.protocol.uri}")
        self._logger = TrialLogger(found[0], self.protocol)
        return self._logger

    def new_trial(
        self,
        force: bool = False,
        parameters: Any = None,
        name: str | None = None,
        description: str | None = None,
        **kwargs: Any,
    ) -> TrialLogger | None:
        """Create a trial: the next revision, if its parameters were tried before.

        Without parameters it is created by `log_arguments` or the first thing that is logged. A second trial is
        made only with `force`. Raises InvalidValue.
        """
        self._check_no_trial(force)
        self._logger = None
        self._waiting = {"name": name, "description": description, **kwargs}
        return None if parameters is None else self._create(_arguments(parameters))

    def _create(self, parameters: dict[str, Any]) -> TrialLogger:
        described, self._waiting = self._waiting or {}, None
        project = self._project()
        known: dict[str, Any] = {"version": self._version or _default_version(), "project_id": project.uid}
        if self.group is not None:
            known["group_id"] = self.group.uid
        trial = self.protocol.new_trial(
            Trial(**{**known, **described, "parameters": parameters}), auto_increment=True
        )
        assert trial is not None
        self._logger = TrialLogger(trial, self.protocol)
        return self._logger

    def _project(self) -> Project:
        return self.project or self.set_project(name=ORPHANS)

    def _check_no_trial(self, force: bool) -> None:
        if self._logger is not None and not force:
            raise InvalidValue("there is a trial already: force=True goes on to another one")

    @property
    def logger(self) -> TrialLogger:
        """The logger of the trial, which is created now if it waited for that."""
        return self._logger or self._create({})

    @property
    def trial(self) -> Trial:
        """The trial as the store has it now."""
        return self.logger.trial

    def log_arguments(self, args: Any = None, show: bool = False, **kwargs: Any) -> Any:
        """Log parameters (a mapping, a Namespace, a parser), give them back; creates the trial that waits for them."""
        given = args.parse_args() if isinstance(args, ArgumentParser) else args
        parameters = {**_arguments(given), **kwargs}
        if self._logger is None:
            self._create(parameters)
        else:
            self._logger.log_arguments(**parameters)
        if show:
            sys.stdout.write(_pretty(parameters) + "\n")
        return parameters if given is None else given

    def get_arguments(self, args: Any, show: bool = False, **kwargs: Any) -> Namespace:
        """Log parameters, see `log_arguments`, and give them as a Namespace."""
        logged = self.log_arguments(args, show, **kwargs)
        return logged if isinstance(logged, Namespace) else Namespace(**logged)

    def add_tags(self, **kwargs: Any) -> None:
        """Add or replace tags of the trial."""
        self.logger.add_tags(**kwargs)

    def start(self) -> TrialLogger:
        """Start the trial."""
        return self.logger.start()

    def finish(self, exc_type: Any = None, exc_val: Any = None, exc_tb: Any = None) -> None:
        """Finish the trial."""
        self.logger.finish(exc_type, exc_val, exc_tb)

    def __enter__(self) -> TrialLogger:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.logger.__exit__(kind, error, trace)

    def __getattr__(self, name: str) -> Any:
        # All else is the logger's: log_metrics, chrono, set_status, ...
        if name.startswith("_") or not hasattr(TrialLogger, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.logger, name)

    def report(self, short: bool = True) -> dict[str, Any]:
        """Write to stdout how the trial is by now, as JSON, and give it."""
        told = as_json(self.trial, short)
        sys.stdout.write(_pretty(told) + "\n")
        return told

    def save(self, file_name_override: str | None = None) -> None:
        """Wait until all is durable; with a name, copy the store there."""
        self.protocol.commit(file_name_override=file_name_override)

    @staticmethod
    def get_device() -> Any:
        """Give torch's device, cuda where there is one; "cpu" without torch."""
        torch = sys.modules.get("torch")
        return "cpu" if torch is None else torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def close(self) -> None:
        """Let go of the store."""
        self.protocol.close()


def as_json(trial: Any, short: bool = False) -> dict[str, Any]:
    """Give a trial as plain data; `short`: summaries of its aggregators."""

    def told(container: Any) -> Any:
        if isinstance(container, Mapping):
            return {str(step): value for step, value in container.items()}
        return container.to_json(short) if hasattr(container, "to_json") else container

    return {
        "uid": trial.uid, "hash": trial.hash, "revision": trial.revision, "name": trial.name,
        "description": trial.description, "version": trial.version, "project_id": trial.project_id,
        "group_id": trial.group_id, "tags": trial.tags, "parameters": trial.parameters, "metadata": trial.metadata,
        "metrics": {name: told(container) for name, container in trial.metrics.items()},
        "chronos": {name: told(container) for name, container in trial.chronos.items()},
        "status": {"name": trial.status.name, "value": trial.status.value}, "errors": trial.errors,
    }  # fmt: skip


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, default=str)


def _arguments(given: Any) -> dict[str, Any]:
    found: dict[str, Any] = storable({} if given is None else given, "arguments")
    return found


def _only_by_force(what: str, before: Any, wanted: Any, force: bool) -> None:
    if before is not None and before.uid != wanted.uid and not force:
        raise InvalidValue(f"the {what} is {before.name!r} already: force=True takes another one")


def _main_file() -> Path | None:
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(path) if path and Path(path).is_file() else None


def _default_version() -> str | None:
    path = _main_file()
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


class _Tee:
    """Stands for stdout or stderr: passes all on, and keeps the last lines."""

    def __init__(self, stream: TextIO, n: int) -> None:
        self._stream = stream
        self._kept: deque[str] = deque(maxlen=n)
        self._open = ""

    def write(self, text: str) -> int:
        *whole, self._open = (self._open + text).split("\n")
        self._kept.extend(whole)
        return self._stream.write(text)

    def lines(self) -> list[str]:
        kept = [*self._kept, self._open] if self._open else list(self._kept)
        return kept[-(self._kept.maxlen or 0) :]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
