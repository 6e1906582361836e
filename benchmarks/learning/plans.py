"""What the experiments on learning compare: data, networks, first layers, and rates to choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from energies import EnergyClassifier
from texture import TextureClassifier

from data import load
from gaborium.training import Dataset, Recipe

Rates = dict[str, float]

# As many to choose from on every variant.
ONE_RATE = tuple({"learning_rate": rate} for rate in (3e-4, 1e-3, 3e-3, 1e-2))
ADAM_RATES, NATURAL_RATES = (
    tuple(
        {"learning_rate": rate, "gabor_learning_rate": gabor}
        for rate, gabor in product((1e-3, 3e-3), pair)
    )
    for pair in ((0.02, 0.08), (0.3, 1.0))
)
NETWORKS = {"energy": EnergyClassifier, "texture": TextureClassifier}
N_VALIDATION = 2000  # training images that are kept to choose rates with, of the large sets


@dataclass(frozen=True)
class Variant:
    """A first layer, and the rates from which its own are chosen.

    ``start`` is ``"mel"`` or ``"equal"``, which a recipe cannot name, or empty.
    """

    fields: dict[str, Any]
    rates: tuple[Rates, ...]
    start: str = ""


def _variants() -> dict[str, Variant]:
    variants = {"free": Variant({"first_layer": "free"}, ONE_RATE)}
    for start in ("bank", "random", "equal", "mel"):
        special = start if start in ("equal", "mel") else ""
        fields = {"start": "bank" if special else start}
        for optimizer, rates in (("adam", ADAM_RATES), ("natural", NATURAL_RATES)):
            learned = {"first_layer": "gabor", "optimizer": optimizer, **fields}
            variants[f"{optimizer}, {start}"] = Variant(learned, rates, special)
        variants[f"fixed, {start}"] = Variant(
            {"first_layer": "gabor-fixed", **fields}, ONE_RATE, special
        )
    variants["mixed, bank"] = Variant({"first_layer": "mixed", "start": "bank"}, ADAM_RATES)
    return variants


VARIANTS = _variants()


@dataclass(frozen=True)
class Unit:
    """First layers that are compared with one another, everything else alike.

    Args:
        name: for people.
        recipe: what all have in common.
        variants: names of ``VARIANTS``.
        n_seeds: networks to train of each.
        tuning: fields of the recipe that are others while rates are chosen, to save time.
        n_test: test images, evenly from all of them; ``None`` for all.
        n_corrupted: test images, evenly from all of them, on which the trained networks are
            measured again with every corruption.
        network: ``"cnn"``, the small network of ``gaborium.training``, or a name of ``NETWORKS``.
        flip: whether training images are mirrored at random.
        similarity: whether to measure how much alike the filters become.
        tuned_as: another part of the same experiment, whose rates are taken.
        rate_factor: of all learning rates but those of Gabor parameters. A linear classifier of
            few numbers can take long steps.
    """

    name: str
    recipe: Recipe
    variants: tuple[str, ...]
    n_seeds: int = 10
    tuning: dict[str, Any] = field(default_factory=dict)
    n_test: int | None = None
    n_corrupted: int = 0
    similarity: bool = False
    tuned_as: str = ""
    rate_factor: float = 1.0
    network: str = "cnn"
    flip: bool = False

    def rates(self, variant: Variant) -> tuple[Rates, ...]:
        """What the rates of a first layer are chosen from."""
        return tuple(
            {**rates, "learning_rate": rates["learning_rate"] * self.rate_factor}
            for rates in variant.rates
        )

    @property
    def rates_of(self) -> str:
        """The part with which the rates of this one are chosen."""
        return self.tuned_as or self.name


_BASE = Recipe(
    n_filters=32, kernel_size=9, schedule="cosine", n_evaluations=1, batch_size=50, epochs=20
)
_LEARNED = ("adam, bank", "natural, bank", "adam, random", "natural, random")
_FIXED = ("fixed, bank", "fixed, random")
# 400 steps each: training images of a class, epochs and images of a step.
_FEW = ((50, 40, 50), (10, 100, 25), (100, 20, 50))


def embedded() -> list[Unit]:
    recipe = replace(
        _BASE, data="textures", n_filters=16, stride=2, epochs=6, samples_per_class=100
    )
    return [
        Unit(
            f"textures, {9 * n} samples, cnn",
            replace(recipe, samples_per_class=n, epochs=epochs),
            ("free", *_LEARNED, *_FIXED, "mixed, bank"),
        )
        for n, epochs in ((100, 6), (20, 30))
    ]


def few() -> list[Unit]:
    """Rates are chosen once for each data set, with 500 samples."""
    units = []
    for data in ("fashion-mnist", "cifar10"):
        tuned_as = _few_name(data, 50)
        for n, epochs, batch in _FEW:
            sizes = {"samples_per_class": n, "epochs": epochs, "batch_size": batch}
            recipe = replace(_BASE, data=data, **sizes)
            variants = ("free", "adam, bank", "natural, bank", *_FIXED, "mixed, bank")
            units.append(Unit(_few_name(data, n), recipe, variants, tuned_as=tuned_as))
        variants = ("free", "adam, bank", "natural, bank", "fixed, bank", "mixed, bank")
        name, sizes = f"{_few_name(data, n)}, corrupted", {"n_test": 2000, "n_corrupted": 2000}
        units.append(Unit(name, recipe, variants, **sizes, tuned_as=tuned_as))
    return units


def _few_name(data: str, samples_per_class: int) -> str:
    return f"{data}, {10 * samples_per_class} samples, cnn"


def full() -> list[Unit]:
    recipe = replace(_BASE, data="fashion-mnist", epochs=5, batch_size=128)
    return [
        Unit(
            "fashion-mnist, all samples, cnn",
            recipe,
            ("free", "adam, bank", "natural, bank", "natural, random", *_FIXED, "mixed, bank"),
            n_seeds=5,
            tuning={"samples_per_class": 500},
            n_corrupted=2000,
        )
    ]


def starts() -> list[Unit]:
    recipe = replace(_BASE, data="cifar10", samples_per_class=100)
    units = [
        Unit(
            f"cifar10, 1000 samples, {network}, {n} filters",
            replace(recipe, n_filters=n),
            ("free", *_LEARNED, "adam, equal", "natural, equal", *_FIXED),
            network=network,
        )
        for network, n in (("energy", 8), ("energy", 16), ("cnn", 16))
    ]
    # 8000 weights behind 16 filters remember 1000 images by heart if nothing holds them back.
    variants = ("free", "adam, bank", "adam, random", *_FIXED)
    held = [
        Unit(
            f"cifar10, 1000 samples, {network}, 16 filters, weight decay",
            replace(recipe, n_filters=16, weight_decay=3.0),
            variants,
            network=network,
        )
        for network in ("energy", "cnn")
    ]
    mirrored = [
        Unit(
            f"{one.name}, mirrored",
            replace(one.recipe, epochs=40),
            variants,
            tuned_as=one.name,
            network=one.network,
            flip=True,
        )
        for one in held
    ]
    longer = Unit(
        f"{mirrored[0].name}, twice as long",
        replace(mirrored[0].recipe, epochs=80),
        variants,
        tuned_as=held[0].name,
        network=held[0].network,
        flip=True,
    )
    return [*units, *held, *mirrored, longer]


def textures() -> list[Unit]:
    photographs = replace(_BASE, data="kth-tips", batch_size=25)
    # Photographs of 128 px hold waves that are longer than a small kernel; and 450 of them are
    # few beside 4500 numbers, by which a classifier must not be too sure.
    held = {"weight_decay": 1.0, "label_smoothing": 0.3, "epochs": 30}
    large = replace(photographs, n_filters=64, kernel_size=21, stride=4, **held)
    patches = replace(_BASE, data="brodatz", epochs=5, batch_size=64)
    variants = ("free", *_LEARNED, *_FIXED)
    units = [
        Unit("kth-tips, texture", large, variants, n_seeds=5, network="texture"),
        Unit(
            "brodatz, texture",
            patches,
            variants,
            n_seeds=5,
            rate_factor=3.0,
            network="texture",
        ),
    ]
    # Energies alone, on the grid that is for objects.
    means = replace(photographs, kernel_size=11, stride=2)
    return [
        *units,
        Unit("kth-tips, energy", means, ("adam, bank", *_FIXED), n_seeds=5, network="energy"),
    ]


def twelve() -> list[Unit]:
    recipe = replace(
        _BASE, n_filters=12, kernel_size=7, epochs=24, batch_size=128,
        n_evaluations=6, samples_per_class=1000,
    )  # fmt: skip
    return [
        Unit(
            f"{data}, 10 000 samples, 12 filters of 7 x 7",
            replace(recipe, data=data),
            ("free", *_LEARNED, *_FIXED),
            tuning={"samples_per_class": 500, "epochs": 12, "n_evaluations": 1},
            similarity=True,
            network="energy",
        )
        for data in ("fashion-mnist", "mnist")
    ]


def spoken() -> list[Unit]:
    recipe = replace(_BASE, data="spoken-digits", kernel_size=201, stride=10, epochs=30)
    return [
        Unit(
            f"spoken-digits, {network}",
            recipe,
            (
                *("free", "adam, mel", "natural, mel", "fixed, mel"),
                *("adam, random", "natural, random", "fixed, random"),
            ),
            tuning={"epochs": 15},
            rate_factor=3.0,
            network=network,
        )
        for network in ("energy", "cnn")
    ]


EXPERIMENTS: dict[str, Callable[[], list[Unit]]] = {
    one.__name__: one for one in (embedded, few, full, starts, textures, twelve, spoken)
}


# -- data -----------------------------------------------------------------------------------------


class Data:
    """The data sets of a folder, each read once, and the parts of them to choose rates with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loaded: dict[str, Dataset] = {}

    def test(self, name: str, n_test: int | None = None) -> Dataset:
        """All that there is to train on, and the test images."""
        if name not in self._loaded:
            self._loaded[name] = load(name, self.folder)
        data = self._loaded[name]
        if n_test is None or n_test >= len(data.test_labels):
            return data
        # Every so many, because some sets lie class by class.
        rows = torch.arange(n_test) * len(data.test_labels) // n_test
        return replace(data, test_images=data.test_images[rows], test_labels=data.test_labels[rows])

    def validation(self, name: str) -> Dataset:
        """Training images alone, some of them to test with."""
        data = self.test(name)
        held = self._held_out(name, data)
        return replace(
            data,
            images=data.images[~held],
            labels=data.labels[~held],
            test_images=data.images[held],
            test_labels=data.labels[held],
        )

    def _held_out(self, name: str, data: Dataset) -> torch.Tensor:
        """Neighbours of one photograph or texture stay together, as they do in the real test."""
        if name == "kth-tips":
            with np.load(self.folder / "textures" / "kth_tips_grey.npz") as file:
                photograph = torch.as_tensor(file["image"])
            return photograph[photograph <= 5] == 5
        if name == "brodatz":
            # Class by class, row by row of the page's upper half.
            n = len(data.labels) // data.n_classes
            return torch.arange(len(data.labels)) % n >= 2 * n // 3
        if name == "textures":
            n = len(data.labels) // data.n_classes
            return torch.arange(len(data.labels)) % n >= 3 * n // 4
        if name == "spoken-digits":
            with np.load(self.folder / "audio" / "fsdd.npz") as file:
                take = torch.as_tensor(file["take"])
            return take[take >= 5] >= 20
        held = torch.zeros(len(data.labels), dtype=torch.bool)
        order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))
        held[order[:N_VALIDATION]] = True
        return held
