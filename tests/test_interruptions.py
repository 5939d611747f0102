"""What may come in between anywhere: signal handlers and finalizers that log, flush or close."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eventrun.codec import ChainChecker, items_of
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

    def nesting(self: JournalFolder, *arguments: Any) -> Any:
        found = None if before else method(self, *arguments)
        if nested:
            nested.clear()
            log(recorder, "t/1", 1)
            log(recorder, "t/2", 1)
        return method(self, *arguments) if before else found

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
