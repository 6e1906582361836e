"""Recipes: all that says how a network is trained, in one record that a file can hold."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from gaborium.errors import one_of, require
from gaborium.files import write_text
from gaborium.training.augmentations import KINDS as AUGMENTATIONS
from gaborium.training.corruptions import KINDS as CORRUPTIONS
from gaborium.training.networks import FIRST_STARTS, NETWORKS
from gaborium.training.networks import KINDS as FIRST_LAYERS

_CHOICES: dict[str, tuple[str, ...]] = {
    "network": NETWORKS,
    "first_layer": FIRST_LAYERS,
    "start": FIRST_STARTS,
    "optimizer": ("adam", "natural"),
    "schedule": ("constant", "cosine"),
    "accelerator": ("auto", "cpu", "cuda", "mps"),
    "precision": ("32-true", "bf16-mixed", "64-true"),
}
_LEAST: dict[str, float] = {
    "samples_per_class": 1,
    "n_filters": 1,
    "kernel_size": 1,
    "stride": 1,
    "learning_rate": 0,
    "gabor_learning_rate": 0,
    "weight_decay": 0,
    "label_smoothing": 0,
    "epochs": 1,
    "batch_size": 1,
    "seeds": 0,
    "n_evaluations": 1,
    "accumulate": 1,
    "devices": 1,
}
_TYPES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    tuple[str, ...]: "a list of texts",
    tuple[int, ...]: "a list of whole numbers",
}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: data, network, first layer, steps, and what is compared.

    Every field is checked when a recipe is made, so that a typing error is told before an hour of
    training. The recipe that a run used lies beside its results as ``recipe.toml``.

    Args:
        data: name of a data set, as ``load_dataset`` takes it.
        data_folder: where its files are; by default its own place, or none if it needs no files.
        samples_per_class: training images of each class, drawn with the seed of each run; by
            default all.
        network: ``"cnn"``, a small convolutional network; ``"energy"``, a linear classifier on
            the pooled energy of the first layer; ``"texture"``, one on its mean, spread,
            flatness and correlations.
        first_layer: ``"gabor"``, learned Gabor filters; ``"gabor-fixed"``, the same and they stay
            where they start; ``"free"``, an ordinary convolution; ``"mixed"``, some filters of
            each kind.
        compare_with: first layers to train the same network with, for comparison.
        n_filters: filters of the first layer.
        kernel_size: of the first layer, px along every axis.
        stride: of the first layer, px.
        start: of the Gabor filters: ``"bank"``, ``"random"``, ``"v1"``, or ``"equal"``, all of
            them the same.
        learn: fields of the Gabor filters that train; by default those that the layer trains by
            default.
        optimizer: of the Gabor parameters: ``"adam"``, or ``"natural"``, which is
            ``gaborium.optim.NaturalGradient``. All others have Adam.
        learning_rate: of Adam, for all that is no Gabor parameter.
        gabor_learning_rate: of the optimizer of the Gabor parameters; by default 0.04 of Adam,
            and of the natural gradient its own.
        schedule: of all learning rates: ``"constant"``, or ``"cosine"``, half a cosine from the
            rates above at the first step to 0 after the last.
        weight_decay: decoupled from the gradient, for all that is no Gabor parameter.
        label_smoothing: share of the wanted probability, from 0 to 1, that is spread evenly over
            all classes: with it no step makes sure what is right already.
        epochs: passes over the training images.
        batch_size: images of one step at most, of all processes together.
        seeds: a network is trained for each; the seed decides its start, its samples and their
            order.
        n_evaluations: how often at most the test images are looked at during a run; the last time
            is at its end, and of more than one there is another before the first step.
        augmentation: what is done to training images by chance, anew in each epoch: ``"flip"``,
            left and right exchanged; ``"shift"``, up to an eighth of each variant. See ``augment``.
        corruption: kinds of corruption under which accuracy is measured, as ``corrupt`` takes
            them, each at five strengths.
        accelerator: where to train; ``"auto"`` takes a GPU if there is one.
        devices: processes on this machine, with a device each. Under ``torchrun`` it counts there.
        precision: ``"32-true"``, ``"64-true"``, or ``"bf16-mixed"``, which is autocast.
        accumulate: parts in which each batch of a process goes through the network, one after
            the other, to save memory.

    Raises:
        TypeError: a field is not of its type.
        ValueError: a field has a value that it cannot have.

    Example:
        >>> recipe = Recipe(epochs=3, seeds=(0, 1))
        >>> recipe.replace(first_layer="mixed").first_layer
        'mixed'
    """

    data: str = "textures"
    data_folder: str | None = None
    samples_per_class: int | None = None
    network: str = "cnn"
    first_layer: str = "gabor"
    compare_with: tuple[str, ...] = ("free",)
    n_filters: int = 32
    kernel_size: int = 9
    stride: int = 1
    start: str = "bank"
    learn: tuple[str, ...] | None = None
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    gabor_learning_rate: float | None = None
    schedule: str = "constant"
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    epochs: int = 10
    batch_size: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    n_evaluations: int = 10
    augmentation: tuple[str, ...] = ()
    corruption: tuple[str, ...] = ()
    accelerator: str = "auto"
    devices: int = 1
    precision: str = "32-true"
    accumulate: int = 1

    def __post_init__(self) -> None:
        for name, kind in _kinds().items():
            value = _typed(name, getattr(self, name), kind, optional=name in _OPTIONAL)
            object.__setattr__(self, name, value)
        for name, choices in _CHOICES.items():
            one_of(name, getattr(self, name), choices)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not least <= number < math.inf:
                    raise ValueError(f"{name} must be at least {least:g}, got {number}.")
        if self.label_smoothing > 1:
            raise ValueError(f"label_smoothing must be at most 1, got {self.label_smoothing}.")
        if not self.data:
            raise ValueError("data must be the name of a data set, got an empty text.")
        for name, choices in (
            ("compare_with", FIRST_LAYERS),
            ("augmentation", AUGMENTATIONS),
            ("corruption", CORRUPTIONS),
        ):
            for kind in getattr(self, name):
                one_of(name, kind, choices)
        if not self.seeds:
            raise ValueError("seeds must hold at least one number, got none.")
        for name in ("seeds", "compare_with", "augmentation", "corruption"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must differ from one another, got {list(values)}.")

    @property
    def variants(self) -> tuple[str, ...]:
        """The first layers that are trained: that of the recipe, then those beside it."""
        return tuple(dict.fromkeys((self.first_layer, *self.compare_with)))

    def replace(self, **fields: Any) -> Recipe:
        """The same recipe with other values in some fields."""
        _check_names(fields, "A recipe")
        return dataclasses.replace(self, **fields)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe from a TOML file; a field that it leaves out has its default.

        Raises:
            OSError: the file cannot be read.
            TypeError: a field is not of its type.
            ValueError: it is no TOML, names something that is no field, or a value is illegal.
        """
        shown = repr(os.fspath(path))
        toml = require(
            "tomllib" if sys.version_info >= (3, 11) else "tomli", extra="train", purpose="Recipes"
        )
        try:
            fields = toml.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"There is no recipe {shown}.") from None
        except IsADirectoryError:
            raise IsADirectoryError(f"{shown} is a folder; give a recipe's file.") from None
        except ValueError as error:
            raise ValueError(f"{shown} is no TOML file: {error}.") from None
        _check_names(fields, shown)
        try:
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{shown}: {error}") from None

    def to_toml(self, path: str | os.PathLike[str] | None = None) -> str:
        """The recipe as TOML, all fields that have a value; written to ``path`` if it is given.

        Raises:
            OSError: the file cannot be written.

        Example:
            >>> recipe = Recipe(data="digits", seeds=(3,))
            >>> [line for line in recipe.to_toml().splitlines() if "3]" in line]
            ['seeds = [3]']
        """
        fields = {name: getattr(self, name) for name in _kinds()}
        lines = [f"{name} = {_toml(value)}" for name, value in fields.items() if value is not None]
        text = "\n".join(lines) + "\n"
        if path is not None:
            write_text(path, text)
        return text


_OPTIONAL = ("data_folder", "samples_per_class", "learn", "gabor_learning_rate")


def _kinds() -> dict[str, Any]:
    """The type of every field, without the ``None`` of those that may be left out."""
    kinds = {}
    for name, hint in get_type_hints(Recipe).items():
        union = get_origin(hint) in (types.UnionType, typing.Union)
        kinds[name] = next(k for k in get_args(hint) if k is not type(None)) if union else hint
    return kinds


def _check_names(fields: dict[str, Any], what: str) -> None:
    names = list(_kinds())
    for name in fields:
        if name not in names:
            raise ValueError(f"{what} has no field {name!r}; there are {', '.join(names)}.")


def _typed(name: str, value: Any, kind: Any, *, optional: bool) -> Any:
    """The value in its field's type, where no information is lost; otherwise one clear line."""
    if value is None and optional:
        return None
    if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        entry = get_args(kind)[0]
        if all(_is(entry, one) for one in value):
            return tuple(value)
    elif kind is float and _is(int, value):
        return float(value)
    elif isinstance(kind, type) and _is(kind, value):
        return value
    raise TypeError(f"{name} must be {_TYPES[kind]}, got {value!r:.60}.")


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        # JSON's texts are TOML's, but for one character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
