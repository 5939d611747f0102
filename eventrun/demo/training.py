"""Teach a small network to tell Fisher's irises apart, by stochastic gradient descent in plain Python.

Nothing here knows of eventrun, and nothing but the standard library is used. A network is a flat list of
weights and a tuple of sizes: (4, 3) is softmax regression, (4, 8, 3) has a hidden layer of 8 tanh units.
Floats are left to overflow as they do in any framework, so a rate far too high ends in inf, then NaN.

`iris.csv` holds the 150 flowers of R. A. Fisher, "The use of multiple measurements in taxonomic problems",
Annals of Eugenics 7 (1936), lengths and widths in centimetres, as shipped with scikit-learn and R. The copy
in the UCI repository differs from the paper in two flowers, the 35th and the 38th.
"""

import csv
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import islice, pairwise
from operator import mul
from statistics import fmean, pstdev
from typing import NamedTuple

SPECIES = ("setosa", "versicolor", "virginica")

Vector = list[float]
Layer = list[Vector]
"""A vector per neuron: a weight for each input, then the bias."""


class Flower(NamedTuple):
    """Four measurements, and the index in SPECIES that is to be told from them."""

    features: Vector
    species: int


class Settings(NamedTuple):
    """What can be varied between two trainings."""

    hidden: int = 0  # tanh units; 0 is softmax regression
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.01
    batch_size: int = 16
    batch_growth: float = 1.0  # the batch size is multiplied by this after each epoch
    seed: int = 1


class Step(NamedTuple):
    """One mini-batch, measured before its update."""

    number: int
    loss: float  # with the penalty for large weights
    accuracy: float
    gradient_norm: float


class Validation(NamedTuple):
    """How a network does on flowers that it has never learned from."""

    loss: float  # cross-entropy alone
    accuracy: float
    recall: dict[str, float]  # by species


# Data


def load() -> list[Flower]:
    """Read the 150 flowers, in Fisher's order."""
    text = resources.files(__package__).joinpath("iris.csv").read_text(encoding="utf-8")
    _header, *rows = csv.reader(text.splitlines())
    return [Flower([float(value) for value in features], SPECIES.index(name)) for *features, name in rows]


def split(flowers: Sequence[Flower], *, seed: int = 0) -> tuple[list[Flower], list[Flower]]:
    """Shuffle the flowers and hold out 30 % of each species: what is left to train on, what was held out."""
    rng = random.Random(seed)
    train: list[Flower] = []
    validation: list[Flower] = []
    for species in range(len(SPECIES)):
        members = [flower for flower in flowers if flower.species == species]
        rng.shuffle(members)
        cut = round(0.3 * len(members))
        validation += members[:cut]
        train += members[cut:]
    return train, validation


def standardise(flowers: Sequence[Flower], *, like: Sequence[Flower]) -> list[Flower]:
    """Shift and scale each feature to mean 0 and standard deviation 1 over the flowers of `like`."""
    columns = list(zip(*(flower.features for flower in like), strict=True))
    scales = [(fmean(column), pstdev(column)) for column in columns]
    return [
        Flower([(x - mean) / sd for x, (mean, sd) in zip(features, scales, strict=True)], species)
        for features, species in flowers
    ]


def datasets() -> tuple[list[Flower], list[Flower]]:
    """Return 105 flowers to train on and 45 to validate with, scaled by what is known of the 105 only."""
    train, validation = split(load())
    return standardise(train, like=train), standardise(validation, like=train)


# The network


def initial_weights(sizes: Sequence[int], rng: random.Random) -> Vector:
    """Draw weights, smaller the more inputs there are, so that no tanh starts saturated; biases are 0."""
    weights: Vector = []
    for inputs, outputs in pairwise(sizes):
        for _ in range(outputs):
            weights += [rng.gauss(0.0, 1 / math.sqrt(inputs)) for _ in range(inputs)]
            weights.append(0.0)
    return weights


def unpack(weights: Sequence[float], sizes: Sequence[int]) -> list[Layer]:
    """Cut the flat weights into layers of neurons."""
    rest = iter(weights)
    return [[list(islice(rest, inputs + 1)) for _ in range(outputs)] for inputs, outputs in pairwise(sizes)]


def dot(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the scalar product."""
    product: float = sum(map(mul, left, right))
    return product


def forward(layers: Sequence[Layer], features: Vector) -> tuple[list[Vector], Vector]:
    """Return the inputs of each layer, each with a constant 1 for the bias at its end, and the logits."""
    inputs = [[*features, 1.0]]
    for layer in layers[:-1]:
        inputs.append([*(math.tanh(dot(neuron, inputs[-1])) for neuron in layer), 1.0])
    return inputs, [dot(neuron, inputs[-1]) for neuron in layers[-1]]


def log_softmax(logits: Sequence[float]) -> Vector:
    """Turn logits into the logarithms of probabilities."""
    # Less the largest, no exponential overflows; a logit of inf becomes inf - inf, which is NaN.
    largest = max(logits)
    shifted = [logit - largest for logit in logits]
    normaliser = math.log(sum(map(math.exp, shifted)))
    return [logit - normaliser for logit in shifted]


def backward(layers: Sequence[Layer], inputs: Sequence[Vector], slope: Vector) -> Vector:
    """Carry the slope of the loss, given at the logits, back to each weight, in the order of `unpack`."""
    slopes = [slope]
    for layer, outputs in zip(layers[:0:-1], inputs[:0:-1], strict=True):
        arriving = [dot(slopes[0], column) for column in zip(*layer, strict=True)]
        slope = [s * (1 - tanh * tanh) for s, tanh in zip(arriving, outputs, strict=True)]
        slopes.insert(0, slope[:-1])  # the last is the constant 1, which nothing can change
    return [s * x for slope, xs in zip(slopes, inputs, strict=True) for s in slope for x in xs]


def argmax(values: Sequence[float]) -> int:
    """Return the index of the largest value."""
    return max(range(len(values)), key=values.__getitem__)


def objective(
    weights: Vector, sizes: Sequence[int], batch: Sequence[Flower], weight_decay: float
) -> tuple[float, float, Vector]:
    """Return loss, accuracy and gradient; the loss is mean cross-entropy + weight_decay / 2 * |weights|^2."""
    layers = unpack(weights, sizes)
    losses: Vector = []
    hits: list[bool] = []
    gradients: list[Vector] = []
    for features, species in batch:
        inputs, logits = forward(layers, features)
        logs = log_softmax(logits)
        losses.append(-logs[species])
        hits.append(argmax(logs) == species)
        slopes = [math.exp(log) - (index == species) for index, log in enumerate(logs)]
        gradients.append(backward(layers, inputs, slopes))
    loss = sum(losses) / len(batch) + weight_decay / 2 * dot(weights, weights)
    sums = map(sum, zip(*gradients, strict=True))
    gradient = [slope / len(batch) + weight_decay * w for slope, w in zip(sums, weights, strict=True)]
    return loss, sum(hits) / len(batch), gradient


class Training:
    """A network on its way: the same settings and flowers give the same numbers.

    `for step in training.train_epoch(): ...` makes one update per mini-batch as it is iterated.
    """

    def __init__(self, settings: Settings, train: Sequence[Flower], validation: Sequence[Flower]) -> None:
        features = len(train[0].features)
        hidden = (settings.hidden,) if settings.hidden else ()
        self.settings = settings
        self.train = train
        self.validation = validation
        self.rng = random.Random(settings.seed)
        self.sizes = (features, *hidden, len(SPECIES))
        self.weights = initial_weights(self.sizes, self.rng)
        self.velocity = [0.0] * len(self.weights)
        self.batch_size = float(settings.batch_size)
        self.epoch = 0
        self.step = 0

    def train_epoch(self) -> Iterator[Step]:
        """Go once through the flowers in a new order, a mini-batch at a time."""
        self.epoch += 1
        flowers = self.rng.sample(self.train, len(self.train))
        size = int(self.batch_size)
        for start in range(0, len(flowers), size):
            yield self._update(flowers[start : start + size])
        self.batch_size = min(self.batch_size * self.settings.batch_growth, len(flowers))

    def _update(self, batch: Sequence[Flower]) -> Step:
        momentum, rate = self.settings.momentum, self.settings.learning_rate
        loss, accuracy, gradient = objective(self.weights, self.sizes, batch, self.settings.weight_decay)
        self.velocity = [momentum * v - rate * g for v, g in zip(self.velocity, gradient, strict=True)]
        self.weights = [w + v for w, v in zip(self.weights, self.velocity, strict=True)]
        self.step += 1
        return Step(self.step, loss, accuracy, math.hypot(*gradient))

    def validate(self) -> Validation:
        """Measure the network as it is now; nothing is learned."""
        layers = unpack(self.weights, self.sizes)
        loss = 0.0
        found, present = Counter[str](), Counter[str]()
        for features, species in self.validation:
            _inputs, logits = forward(layers, features)
            logs = log_softmax(logits)
            loss -= logs[species]
            found[SPECIES[species]] += argmax(logs) == species
            present[SPECIES[species]] += 1
        recall = {name: found[name] / present[name] for name in present}
        return Validation(loss / len(self.validation), found.total() / present.total(), recall)
