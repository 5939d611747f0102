"""What is recorded: noisy doubles, and trials as the figures describe them. Called in children."""

import random
from itertools import cycle, islice
from pathlib import Path

import eventrun

SCALARS = 3  # in an event
READ_AHEAD = 1 << 20


def noisy(seed: int = 0) -> list[tuple[float, float, float]]:
    """Return 4096 times (loss, acc, lr), in doubles whose every bit is used; go round with `i & 4095`."""
    noise = random.Random(seed)
    return [(noise.gauss(1, 0.1), noise.random(), noise.random() * 1e-3) for _ in range(4096)]


def record_noisy(url: str, events: int) -> str:
    """Record one trial with so many events of three scalars, let the views catch up, and return its id."""
    values = cycle(noisy())
    with eventrun.open(url, quiet=True) as client, client.trial("bench", name="noisy") as trial:
        for step, (loss, acc, lr) in enumerate(islice(values, events)):
            trial.log(loss=loss, acc=acc, lr=lr, step=step)
    catch_up(url)
    return trial.id


def record_trials(url: str, count: int) -> int:
    """Record trials with 20 params, 10 metrics and 3 tags each, let the views catch up, and return their number."""
    noise = random.Random(0)
    with eventrun.open(url, quiet=True, close_timeout_s=600) as client:
        for number in range(count):
            tags = ["baseline", f"seed-{number % 10}", f"host-{number % 7}"]
            with client.trial("bench", group=f"g{number % 10}", params=params(number), tags=tags) as trial:
                for step in range(2):
                    trial.log({f"metric_{i}": noise.random() for i in range(10)}, step=step)
            if number % 1000 == 999:
                client.flush().result()
    catch_up(url)
    return count


def params(number: int) -> dict[str, float | str]:
    """Return 20 params, numbers and texts."""
    return {f"param_{i}": f"choice-{(number + i) % 5}" if i % 4 == 0 else number * 0.1 + i for i in range(20)}


def catch_up(url: str) -> None:
    """Let the views catch up with the log."""
    with eventrun.open(url, quiet=True) as client:
        list(client.trials(limit=1))


def warm(url: str) -> None:
    """Read a store's files, so that the page cache holds them."""
    for path in Path(url).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(READ_AHEAD):
                    pass
