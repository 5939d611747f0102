"""What is recorded: noisy doubles, and trials as the figures describe them. Called in children."""

import random
from collections.abc import Iterator
from pathlib import Path

from figures import Run

import eventrun

SCALARS = 3  # in an event
READ_AHEAD = 1 << 20


def noise(count: int) -> Iterator[tuple[float, float, float]]:
    """Yield (loss, acc, lr) so many times, in doubles whose every bit is used."""
    source = random.Random(0)
    for _ in range(count):
        yield source.gauss(1, 0.1), source.random(), source.random() * 1e-3


def noisy() -> list[tuple[float, float, float]]:
    """Return 4096 values, made before time is taken; go round with `i & 4095`."""
    return list(noise(4096))


def noisy_events(run: Run) -> int:
    """Return how many events the log has that is measured, folded and read; from 500,000 on a fold loads numpy."""
    return run.size(500_000, 1_000_000)


def record_noisy(url: str, events: int) -> str:
    """Record one trial with so many events of three scalars and return its id."""
    with eventrun.open(url, quiet=True) as client, client.trial("bench", name="noisy") as trial:
        for step, (loss, acc, lr) in enumerate(noise(events)):
            trial.log(loss=loss, acc=acc, lr=lr, step=step)
        client.flush().result()  # closing would give up after close_timeout_s
    return trial.id


def record_trials(url: str, count: int) -> int:
    """Record trials with 20 params, 10 metrics and 3 tags each and return their number."""
    source = random.Random(0)
    with eventrun.open(url, quiet=True) as client:
        for number in range(count):
            tags = ["baseline", f"seed-{number % 10}", f"host-{number % 7}"]
            with client.trial("bench", group=f"g{number % 10}", params=params(number), tags=tags) as trial:
                for step in range(2):
                    trial.log({f"metric_{i}": source.random() for i in range(10)}, step=step)
            if number % 1000 == 999:
                client.flush().result()
        client.flush().result()
    return count


def params(number: int) -> dict[str, float | str]:
    """Return 20 params, numbers and texts."""
    return {f"param_{i}": f"choice-{(number + i) % 5}" if i % 4 == 0 else number * 0.1 + i for i in range(20)}


def catch_up(url: str) -> None:
    """Let the views of a store catch up with its log."""
    with eventrun.open(url, quiet=True) as client:
        list(client.trials(limit=1))


def warm(url: str) -> None:
    """Read a store's files, so that the page cache holds them."""
    for path in Path(url).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(READ_AHEAD):
                    pass
