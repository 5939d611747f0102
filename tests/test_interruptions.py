"""What may come in between anywhere: signal handlers and finalizers that log, flush or close."""

from __future__ import annotations

import gc
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eventrun.codec import ChainChecker, items_of
from eventrun.errors import Closed
from eventrun.events import MetricsLogged
from eventrun.journal import JournalFolder
from eventrun.portal import Portal
from eventrun.recorder import Recorder
from eventrun.stores.memory import MemoryStore

LONG = 60.0  # seconds: how long to wait for what comes at once unless something is wrong


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def recorder(store: MemoryStore, tmp_path: Path) -> Iterator[Recorder]:
    portal = Portal()
    yield Recorder(portal, lambda: store, folder=tmp_path, linger_ms=1.0)
    portal.stop()


def log(recorder: Recorder, subject: str, *numbers: int) -> None:
    for number in numbers:
        recorder.stream(subject).record(MetricsLogged({"i": number, "pad": "x" * 100}))


def logged(store: MemoryStore) -> dict[str, list[Any]]:
    """Read the log by subject, checking the chains."""
    chain = ChainChecker()
    found: dict[str, list[Any]] = {}
    for stored in store._log:
        chain.check(stored.batch)
        for _, event in items_of(stored.batch):
            assert isinstance(event, MetricsLogged)
            found.setdefault(stored.batch.header.subject, []).append(event.values["i"])
    return found


@pytest.mark.parametrize("at", ["_open", "segment", "_in_arena", "_new_arena"])
@pytest.mark.parametrize("before", [True, False])
def test_a_log_call_while_its_stream_is_opened(
    recorder: Recorder, store: MemoryStore, monkeypatch: pytest.MonkeyPatch, at: str, before: bool
) -> None:
    """A log call into the very stream that the interrupted call is opening, and into another one: all are kept."""
    method = getattr(JournalFolder, at)
    nested = [1]

    def nesting(self: JournalFolder, *arguments: Any, **named: Any) -> Any:
        found = None if before else method(self, *arguments, **named)
        if nested:
            nested.clear()
            log(recorder, "t/1", 1)
            log(recorder, "t/2", 1)
        return method(self, *arguments, **named) if before else found

    monkeypatch.setattr(JournalFolder, at, nesting)
    log(recorder, "t/1", 2, 3)
    log(recorder, "t/2", 4)
    assert recorder.close().result(LONG) == 0
    assert logged(store) == {"t/1": [1, 2, 3], "t/2": [1, 4]}
    assert nested == []
    assert recorder.statistics().problem is None


def test_finalizers_that_log_everywhere(recorder: Recorder, store: MemoryStore) -> None:
    """Garbage that logs, collected at any allocation of any thread, the flusher's too: nothing hangs or is lost."""
    numbers = itertools.count()
    returned: list[int] = []

    class Garbage:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            number = next(numbers)
            log(recorder, f"t/garbage{number % 5}", number)
            returned.append(number)

    def work(thread: int) -> None:
        for i in range(300):
            Garbage()
            log(recorder, f"t/{thread}-{i // 50}", i)

    before = gc.get_threshold()
    gc.set_threshold(20, 2, 2)
    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(3)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
            assert not thread.is_alive()
    finally:
        gc.set_threshold(*before)
    while len(returned) < 900:  # collecting does nothing while another thread collects
        gc.collect()
    assert recorder.close().result(LONG) == 0
    found = logged(store)
    for n, k in itertools.product(range(3), range(6)):
        assert found[f"t/{n}-{k}"] == list(range(50 * k, 50 * k + 50))
    assert sorted(i for k in range(5) for i in found[f"t/garbage{k}"]) == sorted(returned)


class Interruption:
    """Calls `handler` at the main thread's call number `at`: where a call begins or has returned, a signal may come."""

    def __init__(self, at: int, handler: Callable[[], object]) -> None:
        self.left = at
        self.handler = handler
        self._hook = (
            self._look
        )  # kept, since CPython 3.11 doesn't keep a hook that is taken away while it runs

    def __enter__(self) -> Interruption:
        sys.setprofile(self._hook)
        return self

    def _look(self, frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_return"):
            self.left -= 1
            if self.left == 0:
                self.handler()

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


@pytest.mark.parametrize("closing", [False, True])
def test_a_handler_at_every_call(tmp_path: Path, closing: bool) -> None:
    """A handler that logs, also to the stream that is just opened, and waits for a flush or a close, at any call of
    opening streams, starting threads, flushing and closing: nothing hangs, is lost or doubled, no file stays."""
    for at in itertools.count(1 + closing, 3):
        folder = tmp_path / str(at)
        store, portal = MemoryStore(), Portal()
        recorder = Recorder(portal, lambda store=store: store, folder=folder, linger_ms=1.0)  # type: ignore[misc]
        returned: dict[str, list[int]] = {}

        def note(subject: str, number: int, recorder: Recorder = recorder, returned: Any = returned) -> None:
            log(recorder, subject, number)
            returned.setdefault(subject, []).append(number)

        def handler(recorder: Recorder = recorder, note: Any = note) -> None:
            try:
                note("t/2", 10)
                note("t/handler", 11)
                (recorder.close if closing else recorder.flush)().result(LONG)
            except Closed:
                pass

        with Interruption(at, handler) as interruption:
            try:
                note("t/1", 1)
                note("t/2", 2)
                recorder.flush().result(LONG)
                note("t/1", 3)
                recorder.close().result(LONG)
            except Closed:
                assert closing
        assert recorder.close().result(LONG) == 0
        portal.stop()
        found = {subject: sorted(numbers) for subject, numbers in logged(store).items()}
        assert found == {subject: sorted(numbers) for subject, numbers in returned.items()}
        assert not list((folder / "journals").iterdir())
        if interruption.left > 0:
            break
    assert at > 100


@pytest.mark.parametrize("end", [False, True])
def test_signal_handlers_that_wait_for_the_flusher(recorder: Recorder, store: MemoryStore, end: bool) -> None:
    """Real signals, whose handler logs and flushes and may close at last, in a storm of log calls that open streams:
    the flusher needs nothing that the interrupted call holds."""
    signals: list[int] = []
    over = False

    def handler(number: int, frame: object) -> None:
        if over:
            return
        try:
            log(recorder, "t/signals", len(signals))
        except Closed:
            return
        signals.append(len(signals))
        if end and len(signals) == 30:
            recorder.close().result(LONG)
        else:
            recorder.flush().result(LONG)
        signal.setitimer(signal.ITIMER_REAL, 1e-3)  # the next one not before this one is through

    returned: dict[str, list[int]] = {}
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1e-3)
    try:
        for i in itertools.count():
            subject = f"t/{i // 20}"
            log(recorder, subject, i)
            returned.setdefault(subject, []).append(i)
            if len(signals) >= 50:
                break
    except Closed:
        assert end
    finally:
        over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert recorder.close().result(LONG) == 0
    found = logged(store)
    assert found.pop("t/signals") == signals
    assert found == returned
