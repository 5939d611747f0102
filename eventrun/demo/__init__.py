"""Show a real training in the log: small networks learn Fisher's Iris data, many at once.

`training` does the learning and knows nothing of eventrun; this module is all that it takes to log it. Not
everything goes well, since a tracker is there for such days: one trial diverges to NaN, one raises, one is
left without a finish.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from itertools import count, islice
from typing import TYPE_CHECKING, NamedTuple

import anyio
from anyio.lowlevel import checkpoint

from eventrun.demo.training import Settings, Training, datasets

if TYPE_CHECKING:
    from eventrun.client import Client
    from eventrun.trial import Trial

__all__ = ["run"]

PROJECT = "iris"
EPOCHS = 80
GOOD_ACCURACY = 0.93


class Plan(NamedTuple):
    """One trial to be."""

    group: str
    name: str
    settings: Settings
    description: str = ""
    tags: tuple[str, ...] = ()
    abandoned: bool = False


# In rounds of one trial per group, all three mishaps in the second, so that the first six show the most.
PLANS = (
    Plan("learning-rate", "rate-0.1", Settings(learning_rate=0.1), "What to compare with", ("baseline",)),
    Plan("architecture", "tanh-8", Settings(hidden=8), "One hidden layer"),
    Plan("batch-size", "batch-4", Settings(batch_size=4), "Many noisy steps"),
    Plan("learning-rate", "rate-1e4", Settings(learning_rate=1e4), "Someone typed 1e4 for 1e-4", ("typo",)),
    Plan("architecture", "tanh-32", Settings(hidden=32), "Left after one epoch", abandoned=True),
    Plan("batch-size", "batch-halved", Settings(batch_growth=0.5), "16, 8, 4, 2, 1, and then?"),
    Plan("learning-rate", "rate-0.01", Settings(learning_rate=0.01)),
    Plan("architecture", "tanh-4", Settings(hidden=4)),
    Plan("batch-size", "batch-64", Settings(batch_size=64), "Two steps per epoch"),
    Plan("learning-rate", "rate-0.001", Settings(learning_rate=0.001), "Too slow to get there"),
    Plan("architecture", "tanh-16", Settings(hidden=16)),
    Plan("batch-size", "batch-grown", Settings(batch_size=4, batch_growth=1.1), "A tenth more each epoch"),
)


async def run(client: "Client", *, trials: int = 12, seconds: float | None = None) -> list[str]:
    """Train `trials` networks at once, each in a task of its own, and return the ids of the trials, in order.

    Step for step, the numbers are the same in every run. Without `seconds` each network learns for `EPOCHS`;
    with it, until its first epoch that ends after so many seconds, be that more epochs or fewer (under two
    seconds may be over before anything goes wrong).
    """
    train, validation = datasets()
    deadline = None if seconds is None else anyio.current_time() + seconds
    ids = []
    async with anyio.create_task_group() as tasks:
        for plan in islice(_plans(), trials):
            trial = client.trial(
                PROJECT,
                group=plan.group,
                name=plan.name,
                params=plan.settings._asdict(),
                tags=list(plan.tags),
                description=plan.description,
            )
            ids.append(trial.id)
            learn = _abandon if plan.abandoned else _learn
            tasks.start_soon(learn, trial, Training(plan.settings, train, validation), deadline)
    return ids


def _plans() -> Iterator[Plan]:
    """Go through the plans for ever, each time with the next seed."""
    yield from PLANS
    for seed in count(2):
        for plan in PLANS:
            yield plan._replace(name=f"{plan.name}-seed-{seed}", settings=plan.settings._replace(seed=seed))


async def _learn(trial: "Trial", training: Training, deadline: float | None) -> None:
    # When an error arrives here the trial has recorded it; further up it would stop the other tasks.
    with suppress(ValueError):
        async with trial:
            trial.set_metadata(
                train_rows=len(training.train),
                validation_rows=len(training.validation),
                weights=len(training.weights),
            )
            while True:
                with trial.chrono("epoch"):
                    train_loss = await _log_epoch(trial, training)
                with trial.chrono("validation"):
                    loss, accuracy, recall = training.validate()
                trial.log(
                    loss=loss,
                    accuracy=accuracy,
                    recall=recall,
                    step=training.step,
                    epoch=training.epoch,
                    subset="val",
                )
                if math.isnan(train_loss):
                    trial.add_tags("diverged")
                    break
                if training.epoch >= EPOCHS and deadline is None:
                    break
                if deadline is not None and anyio.current_time() >= deadline:
                    break
            if accuracy > GOOD_ACCURACY:
                trial.add_tags("good", owner="demo")


async def _abandon(trial: "Trial", training: Training, _deadline: float | None) -> None:
    """Log one epoch and forget about the trial, as happens in a notebook."""
    await _log_epoch(trial, training)


async def _log_epoch(trial: "Trial", training: Training) -> float:
    """Log each mini-batch of an epoch and return the last loss."""
    loss = math.nan
    for step in training.train_epoch():
        loss = step.loss
        trial.log(
            loss=loss,
            accuracy=step.accuracy,
            gradient_norm=step.gradient_norm,
            step=step.number,
            epoch=training.epoch,
            subset="train",
        )
        await checkpoint()  # the other trials' turn
    return loss
