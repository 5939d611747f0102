"""The demo: the data, the training, and what it logs."""

import math
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrun import demo
from eventrun.demo import training
from eventrun.demo.training import SPECIES, Settings, Step, Training

if TYPE_CHECKING:
    from eventrun.client import Client

ENOUGH_TO_DIVERGE = 25  # epochs


def start(settings: Settings) -> Training:
    return Training(settings, *training.datasets())


def learn(settings: Settings, epochs: int) -> tuple[Training, list[Step]]:
    under_way = start(settings)
    return under_way, [step for _ in range(epochs) for step in under_way.train_epoch()]


# Data


def test_the_flowers_are_fishers() -> None:
    """There are 50 flowers of each species with Fisher's means, and the two that UCI has wrong are right."""
    flowers = training.load()
    assert len(flowers) == 150
    assert Counter(flower.species for flower in flowers) == {0: 50, 1: 50, 2: 50}
    means = [fmean(column) for column in zip(*(flower.features for flower in flowers), strict=True)]
    assert means == pytest.approx([5.843, 3.057, 3.758, 1.199], abs=0.0005)
    assert flowers[34].features == [4.9, 3.1, 1.5, 0.2]
    assert flowers[37].features == [4.9, 3.6, 1.4, 0.1]


def test_each_species_is_split_alike_and_no_flower_is_lost() -> None:
    """Training gets 35 and validation 15 of each species, together all 150, the same for the same seed."""
    flowers = training.load()
    train, validation = training.split(flowers)
    assert Counter(flower.species for flower in train) == {0: 35, 1: 35, 2: 35}
    assert Counter(flower.species for flower in validation) == {0: 15, 1: 15, 2: 15}
    assert sorted(train + validation) == sorted(flowers)
    assert training.split(flowers) == (train, validation)
    assert training.split(flowers, seed=1) != (train, validation)


def test_only_the_training_flowers_set_the_scale() -> None:
    """Each feature has mean 0 and mean square 1 over the training flowers only."""
    train, validation = training.datasets()
    for column in zip(*(flower.features for flower in train), strict=True):
        assert fmean(column) == pytest.approx(0, abs=1e-12)
        assert fmean(x * x for x in column) == pytest.approx(1)
    for column in zip(*(flower.features for flower in validation), strict=True):
        assert fmean(column) != pytest.approx(0, abs=1e-6)


# The network


@pytest.mark.parametrize("sizes", [(4, 3), (4, 5, 3), (4, 5, 2, 3)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_gradient_is_that_of_the_loss(sizes: tuple[int, ...], weight_decay: float) -> None:
    """Each element of the gradient equals the central difference of the loss, for any number of layers."""
    batch = training.datasets()[0][::7]
    weights = [w + 0.1 for w in training.initial_weights(sizes, random.Random(3))]
    _loss, _accuracy, gradient = training.objective(weights, sizes, batch, weight_decay)

    def loss_with(index: int, change: float) -> float:
        moved = [w + change * (i == index) for i, w in enumerate(weights)]
        return training.objective(moved, sizes, batch, weight_decay)[0]

    h = 1e-5
    differences = [(loss_with(i, h) - loss_with(i, -h)) / (2 * h) for i in range(len(weights))]
    assert gradient == pytest.approx(differences, rel=1e-6, abs=1e-9)


@given(st.lists(st.floats(-1e300, 1e300), min_size=1))
def test_log_softmax_gives_probabilities_whatever_the_size_of_the_logits(logits: list[float]) -> None:
    """The exponentials add up to 1, and huge logits raise nothing."""
    assert sum(map(math.exp, training.log_softmax(logits))) == pytest.approx(1)


@pytest.mark.parametrize("logits", [[math.inf, 0.0], [0.0, math.nan], [math.nan, 1e9], [-math.inf] * 2])
def test_log_softmax_of_the_undefined_is_nan(logits: list[float]) -> None:
    """Where no probabilities exist the answer is NaN, not an exception."""
    assert any(map(math.isnan, training.log_softmax(logits)))


def test_unpack_gives_each_neuron_its_weights_and_its_bias() -> None:
    """Flat weights are cut layer by layer, neuron by neuron, the bias last."""
    assert training.unpack(range(9), (1, 2, 1)) == [[[0, 1], [2, 3]], [[4, 5, 6]]]


# Training


def test_one_update_goes_down_the_gradient_and_momentum_keeps_part_of_it() -> None:
    """The first step is -rate * gradient; the second adds the first, times momentum."""
    under_way = start(Settings(learning_rate=0.5, momentum=0.25, weight_decay=0.0, batch_size=105))
    before, first_velocity = under_way.weights, [-0.5 * g for g in gradient_of(under_way)]
    list(under_way.train_epoch())
    assert under_way.weights == pytest.approx([w + v for w, v in zip(before, first_velocity, strict=True)])
    before, slope = under_way.weights, gradient_of(under_way)
    list(under_way.train_epoch())
    moved = [w + 0.25 * v - 0.5 * g for w, v, g in zip(before, first_velocity, slope, strict=True)]
    assert under_way.weights == pytest.approx(moved)


def gradient_of(under_way: Training) -> list[float]:
    return training.objective(under_way.weights, under_way.sizes, under_way.train, 0.0)[2]


@pytest.mark.parametrize("hidden", [0, 8])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_good_settings_learn_the_flowers(hidden: int, seed: int) -> None:
    """Softmax regression and a hidden layer pass 0.93 on flowers never learned from, and the loss falls."""
    under_way, steps = learn(Settings(hidden=hidden, seed=seed), 40)
    result = under_way.validate()
    assert result.accuracy > 0.93
    assert result.recall.keys() == set(SPECIES)
    assert fmean(result.recall.values()) == pytest.approx(result.accuracy)  # 15 flowers of each
    assert steps[-1].loss < steps[0].loss / 3
    assert [step.number for step in steps] == list(range(1, 40 * 7 + 1))


def test_the_same_seed_gives_the_same_numbers() -> None:
    """Two trainings with the same settings agree in every bit, and another seed differs."""
    assert learn(Settings(hidden=4), 2)[1] == learn(Settings(hidden=4), 2)[1]
    assert learn(Settings(hidden=4), 2)[1] != learn(Settings(hidden=4, seed=2), 2)[1]


def test_a_learning_rate_far_too_high_overflows_to_inf_and_then_to_nan() -> None:
    """The loss grows through finite values to inf and ends as NaN, and no step raises."""
    under_way, steps = learn(Settings(learning_rate=1e4), ENOUGH_TO_DIVERGE)
    losses = [step.loss for step in steps]
    kinds = ["nan" if math.isnan(loss) else "inf" if math.isinf(loss) else "finite" for loss in losses]
    assert list(dict.fromkeys(kinds)) == ["finite", "inf", "nan"]
    assert kinds == sorted(kinds, key=["finite", "inf", "nan"].index)
    assert math.isnan(steps[-1].gradient_norm)
    assert math.isnan(under_way.validate().loss)


def test_a_batch_size_that_shrinks_to_nothing_raises_in_mid_training() -> None:
    """Halved from 16, the batch size is 0 in the sixth epoch, and range() refuses it."""
    under_way = start(Settings(batch_size=16, batch_growth=0.5))
    for _ in range(5):
        list(under_way.train_epoch())
    with pytest.raises(ValueError, match=r"range\(\)"):
        list(under_way.train_epoch())
    assert under_way.step == 7 + 14 + 27 + 53 + 105


def test_a_batch_size_that_grows_stops_at_all_flowers() -> None:
    """However long it grows, an epoch never has less than one step."""
    under_way, steps = learn(Settings(batch_growth=1e300), 4)
    assert under_way.batch_size == 105
    assert len(steps) == 7 + 1 + 1 + 1


# What it logs


class FakeTrial:
    """Keep what is recorded; the outcome is None until the trial is left."""

    def __init__(self, client: "FakeClient", project: str, **options: Any) -> None:
        self.client = client
        self.id = f"trial-{len(client.all)}"
        self.project = project
        self.options = options
        self.logged: list[dict[str, Any]] = []
        self.tags: dict[str, str | None] = dict.fromkeys(options["tags"])
        self.metadata: dict[str, Any] = {}
        self.chronos = Counter[str]()
        self.entered = False
        self.outcome: str | None = None

    async def __aenter__(self) -> "FakeTrial":
        self.entered = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.outcome = "completed" if error is None else f"failed: {error}"

    def log(self, **values: Any) -> None:
        assert self.outcome is None
        self.logged.append(values)
        self.client.order.append(self.id)

    @contextmanager
    def chrono(self, name: str) -> Iterator[None]:
        yield
        self.chronos[name] += 1

    def add_tags(self, *names: str, **valued: str) -> None:
        self.tags |= dict.fromkeys(names) | valued

    def set_metadata(self, **metadata: Any) -> None:
        self.metadata |= metadata

    def series(self, subset: str, metric: str) -> list[Any]:
        return [values[metric] for values in self.logged if values["subset"] == subset]


class FakeClient:
    def __init__(self) -> None:
        self.all: dict[str, FakeTrial] = {}
        self.order: list[str] = []

    def trial(self, project: str, **options: Any) -> FakeTrial:
        trial = FakeTrial(self, project, **options)
        self.all[trial.id] = trial
        return trial

    def named(self, name: str) -> FakeTrial:
        (trial,) = (trial for trial in self.all.values() if trial.options["name"] == name)
        return trial


async def run(**options: Any) -> FakeClient:
    client = FakeClient()
    ids = await demo.run(cast("Client", client), **options)
    assert ids == list(client.all)
    return client


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "EPOCHS", ENOUGH_TO_DIVERGE)


@pytest.mark.anyio
async def test_twelve_trials_in_three_groups_end_in_four_ways() -> None:
    """Nine trials complete their epochs; one diverges to NaN, one raises and one is left without a finish."""
    client = await run()
    trials = list(client.all.values())
    assert {trial.project for trial in trials} == {"iris"}
    assert Counter(trial.options["group"] for trial in trials) == {
        "learning-rate": 4,
        "architecture": 4,
        "batch-size": 4,
    }
    assert len({trial.options["name"] for trial in trials}) == 12
    assert len({tuple(trial.options["params"].items()) for trial in trials}) == 12

    diverged = client.named("rate-1e4")
    assert diverged.outcome == "completed"
    assert "diverged" in diverged.tags
    assert any(map(math.isinf, diverged.series("train", "loss")))
    assert math.isnan(diverged.series("train", "loss")[-1])
    assert math.isnan(diverged.series("val", "loss")[-1])

    failed = client.named("batch-halved")
    assert failed.outcome is not None
    assert failed.outcome.startswith("failed: range()")
    assert len(failed.series("train", "loss")) > 100

    unfinished = client.named("tanh-32")
    assert not unfinished.entered
    assert unfinished.outcome is None
    assert len(unfinished.logged) == 7

    others = [trial for trial in trials if trial not in (diverged, failed, unfinished)]
    assert {trial.outcome for trial in others} == {"completed"}
    assert {trial.chronos["epoch"] for trial in others} == {ENOUGH_TO_DIVERGE}
    good = [trial for trial in trials if "good" in trial.tags]
    assert good
    assert all(trial.tags["owner"] == "demo" and trial.series("val", "accuracy")[-1] > 0.93 for trial in good)


@pytest.mark.anyio
async def test_every_mini_batch_is_logged_and_every_epoch_validated() -> None:
    """A trial logs each of its steps in order, and after each epoch loss, accuracy and recall by species."""
    trial = (await run(trials=1)).named("rate-0.1")
    steps = 7 * ENOUGH_TO_DIVERGE
    assert trial.series("train", "step") == list(range(1, steps + 1))
    assert trial.series("val", "step") == list(range(7, steps + 1, 7))
    assert trial.series("val", "epoch") == list(range(1, ENOUGH_TO_DIVERGE + 1))
    assert all(recall.keys() == set(SPECIES) for recall in trial.series("val", "recall"))
    assert trial.chronos == {"epoch": ENOUGH_TO_DIVERGE, "validation": ENOUGH_TO_DIVERGE}
    assert trial.metadata == {"train_rows": 105, "validation_rows": 45, "weights": 15}
    assert trial.options["params"] == Settings()._asdict()
    assert "baseline" in trial.tags


@pytest.mark.anyio
async def test_the_trials_take_turns() -> None:
    """No trial logs twice while another still waits to log its first mini-batch."""
    client = await run(seconds=0)
    assert sorted(client.order[:12]) == sorted(client.all)


@pytest.mark.anyio
async def test_two_runs_log_the_same_numbers() -> None:
    """What each trial logs doesn't depend on how the tasks were scheduled."""
    first, second = await run(trials=6), await run(trials=6)
    for left, right in zip(first.all.values(), second.all.values(), strict=True):
        assert repr(left.logged) == repr(right.logged)  # NaN equals NaN in a repr


@pytest.mark.anyio
async def test_beyond_twelve_the_plans_come_again_with_the_next_seed() -> None:
    """The thirteenth trial is the first with another seed, under a name of its own."""
    client = await run(trials=25, seconds=0)
    for name, seed in [("rate-0.1", 1), ("rate-0.1-seed-2", 2), ("rate-0.1-seed-3", 3)]:
        assert client.named(name).options["params"]["seed"] == seed


@pytest.mark.anyio
async def test_seconds_set_the_time_instead_of_the_epochs() -> None:
    """No time is one epoch, and more time than the epochs need is more epochs."""
    assert (await run(trials=1, seconds=0)).named("rate-0.1").chronos["epoch"] == 1
    assert (await run(trials=1, seconds=0.5)).named("rate-0.1").chronos["epoch"] > ENOUGH_TO_DIVERGE
