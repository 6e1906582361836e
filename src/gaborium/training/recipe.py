"""Recipes: how a network is trained, in one record that a TOML file can hold."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gaborium.support import one_of, require, write_text

# A variant is a kind of first layer; a recipe compares networks that differ in it alone.
Variant = Literal["free", "gabor", "gabor-fixed", "mixed"]

_WORDS = {str: "a text", int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: the data, the network, its first layer, the steps.

    Every field is checked when the recipe is made. ``train`` writes the recipe of a run next to
    its results, as ``recipe.toml``.

    Args:
        data: data set, as for ``load_dataset``: ``"textures"``, ``"digits"``, ``"mnist"``,
            ``"fashion-mnist"``, ``"cifar10"``, a folder of images or an ``.npz`` file.
        samples_per_class: training images of each class, drawn with the seed of each run; by
            default all.
        first_layer: ``"gabor"``, learned Gabor filters; ``"gabor-fixed"``, the same filters
            without learning; ``"free"``, an ordinary convolution; ``"mixed"``, half Gabor and
            half free filters.
        compare_with: first layers with which the same network is trained for comparison.
        n_filters: filters of the first layer.
        kernel_size: kernel size of the first layer, px along every axis.
        stride: stride of the first layer, px.
        start: start of the Gabor filters: ``"bank"``, ``"random"`` or ``"v1"``.
        learn: fields of the Gabor filters that train; by default the layer's own choice.
        optimizer: optimiser of the Gabor parameters: ``"adam"``, or ``"natural"``, which is
            ``gaborium.optim.NaturalGradient``. All other parameters are trained by Adam.
        learning_rate: Adam's learning rate of all parameters that are not Gabor parameters.
        gabor_learning_rate: learning rate of the Gabor parameters; by default 0.04 with Adam and
            1 with the natural gradient.
        schedule: schedule of all learning rates: ``"constant"``, or ``"cosine"``, half a cosine
            from the full rate at the first step to 0 after the last.
        weight_decay: decoupled weight decay of all parameters that are not Gabor parameters.
        label_smoothing: share of the target probability, 0 to 1, that is spread over all classes.
        epochs: passes over the training images.
        batch_size: maximum number of images in one step, over all processes.
        seeds: one network is trained for each seed; it decides the initial weights, the samples
            and their order.
        n_evaluations: maximum number of evaluations on the test images after a step; the last one
            is at the end. With more than one there is also an evaluation before the first step.
        accelerator: where to train: ``"cpu"``, ``"cuda"``, ``"mps"``, or ``"auto"``, a GPU if
            there is one.
        devices: processes on this machine, one device each. ``torchrun`` overrides it.
        precision: ``"32-true"``, ``"64-true"``, or ``"bf16-mixed"``, which is autocast.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has an illegal value.

    Example:
        >>> recipe = Recipe(epochs=3, seeds=(0, 1))
        >>> recipe.replace(first_layer="mixed").variants
        ('mixed', 'free')
    """

    data: str = "textures"
    samples_per_class: int | None = None
    first_layer: Variant = "gabor"
    compare_with: tuple[Variant, ...] = ("free",)
    n_filters: int = 32
    kernel_size: int = 9
    stride: int = 1
    start: Literal["bank", "random", "v1"] = "bank"
    learn: tuple[str, ...] | None = None
    optimizer: Literal["adam", "natural"] = "adam"
    learning_rate: float = 1e-3
    gabor_learning_rate: float | None = None
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    epochs: int = 10
    batch_size: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    n_evaluations: int = 10
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = 1
    precision: Literal["32-true", "64-true", "bf16-mixed"] = "32-true"

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Recipe).items():
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, name, value)
            _check(name, value, kind)
        if self.label_smoothing > 1:
            raise ValueError(f"label_smoothing must be at most 1, got {self.label_smoothing}.")
        if not self.seeds:
            raise ValueError("seeds must hold at least one number.")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ from one another, got {list(self.seeds)}.")

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The first layers that are trained: ``first_layer``, then ``compare_with``."""
        return tuple(dict.fromkeys((self.first_layer, *self.compare_with)))

    def replace(self, **fields: Any) -> Recipe:
        """Return the same recipe with other values in some fields."""
        return dataclasses.replace(self, **fields)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe from a TOML file; a field that is not there has its default.

        Raises:
            OSError: the file cannot be read.
            TypeError: a field has the wrong type.
            ValueError: the file is not TOML, has an unknown field, or a value is illegal.
        """
        toml = require(
            "tomllib" if sys.version_info >= (3, 11) else "tomli", extra="train", purpose="Recipes"
        )
        text, names = Path(path).read_text(encoding="utf-8"), get_type_hints(cls)
        try:
            fields = toml.loads(text)
            for name in fields:
                one_of("A field", name, names)
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{os.fspath(path)!r}: {error}") from None

    def to_toml(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the recipe as TOML, and write it to ``path`` if that is given.

        Raises:
            OSError: the file cannot be written.

        Example:
            >>> recipe = Recipe(data="digits", seeds=(3,))
            >>> [line for line in recipe.to_toml().splitlines() if "3]" in line]
            ['seeds = [3]']
        """
        text = "".join(
            f"{name} = {_toml(value)}\n" for name, value in vars(self).items() if value is not None
        )
        if path is not None:
            write_text(path, text)
        return text


def _check(name: str, value: Any, kind: Any) -> None:
    """Raise one clear line unless a value has the type of its field, and numbers are in range."""
    options = get_args(kind)
    if get_origin(kind) is Literal:
        one_of(name, value, options)
    elif get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            raise TypeError(f"{name} must be a list, got {value!r:.60}.")
        for entry in value:
            _check(name, entry, options[0])
    elif types.NoneType in options:
        if value is not None:
            _check(name, value, options[0])
    elif isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise TypeError(f"{name} must be {_WORDS[kind]}, got {value!r:.60}.")
    elif kind is not str:
        least = 1 if kind is int and name != "seeds" else 0
        if not least <= value < math.inf:
            raise ValueError(f"{name} must be at least {least}, got {value}.")


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        # JSON strings are TOML strings, except for the delete character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
