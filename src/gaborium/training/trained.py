"""The networks of a recipe: as they begin, and in files for use when they are trained."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gaborium import __version__
from gaborium.conversion import replace_first_conv
from gaborium.errors import one_of
from gaborium.files import read_tensors, write_tensors
from gaborium.params import RECORDS, Gabor
from gaborium.training.checkpoints import RUN_FILE, load_state
from gaborium.training.datasets import Dataset
from gaborium.training.journal import RECIPE_FILE
from gaborium.training.networks import FIRST_OUTPUTS, build_network, make_first_layer
from gaborium.training.recipe import Recipe

NETWORK_FILE = "network.safetensors"
_NAME = "gaborium.network"
_AGAIN = "train again"


@dataclass(frozen=True)
class Inputs:
    """What a network takes, and what it tells apart.

    Args:
        image_size: ``(height, width)`` of images, ``(samples,)`` of sounds.
        classes: the names of the classes, in the order of the network's outputs.
        mean: of the training images, channel by channel, where black is 0 and white is 1.
        std: their standard deviation.
    """

    image_size: tuple[int, ...]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def n_channels(self) -> int:
        """1 of grey images and of sounds, 3 of coloured images."""
        return len(self.mean)

    @property
    def n_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def n_dims(self) -> int:
        """Spatial dimensions: 2 of images, 1 of sounds."""
        return len(self.image_size)


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network, and what its input must be like.

    Args:
        network: from normalised images to a number for each class.
        recipe: by which it was trained.
        variant: kind of its first layer.
        seed: of its run.
        inputs: sizes, classes, and what the images are normalised with.
    """

    network: nn.Module
    recipe: Recipe
    variant: str
    seed: int
    inputs: Inputs

    def preprocess(self, images: Tensor) -> Tensor:
        """Images as the network was trained to see them: normalised channel by channel.

        Args:
            images: as those of a ``Dataset``: uint8 ``(n, channels, height, width)``, or sounds
                ``(n, 1, samples)``. Images of floating point are taken for 0 black to 1 white.

        Raises:
            ValueError: they have another size.
        """
        wanted = (self.inputs.n_channels, *self.inputs.image_size)
        if tuple(images.shape[1:]) != wanted:
            raise ValueError(
                f"images must be (n, {', '.join(map(str, wanted))}), got {tuple(images.shape)}."
            )
        like = next(self.network.parameters())
        shape = (1, -1, *[1] * self.inputs.n_dims)
        mean, std = (
            like.new_tensor(values).reshape(shape) for values in (self.inputs.mean, self.inputs.std)
        )
        return (to_unit_range(images).to(like) - mean) / std


def load_trained(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    seed: int | None = None,
    model: nn.Module | None = None,
) -> Trained:
    """Read a network that ``train`` has trained; nothing is unpickled.

    Args:
        path: the folder that ``train`` has written; or a ``network.safetensors`` in it, or the
            folder of that file, which alone are enough.
        variant: kind of the first layer; by default that of the recipe.
        seed: of the run; by default the first of the recipe.
        model: the network of yours that was given to ``train``, if there was one. It is not
            changed.

    Returns:
        The network in evaluation mode, on the CPU, with what its images are normalised with.

    Raises:
        ImportError: safetensors is not installed.
        OSError: there is no such network (as ``FileNotFoundError``), or it cannot be read.
        ValueError: ``variant`` or ``seed`` is none of the recipe's; the run was stopped or has not
            come to its end; the file is cut off, damaged or of another kind; or ``model`` is
            missing, or another.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from gaborium.training import Recipe, load_dataset, load_trained, train
        >>> data = load_dataset("digits")
        >>> recipe = Recipe(data="digits", n_filters=4, kernel_size=5, epochs=1, seeds=(0,))
        >>> with TemporaryDirectory() as folder:
        ...     result = train(recipe, dataset=data, folder=f"{folder}/mine")
        ...     trained = load_trained(f"{folder}/mine", variant="free")
        >>> scores = trained.network(trained.preprocess(data.test_images))
        >>> hits = scores.argmax(1) == data.test_labels
        >>> abs(hits.double().mean().item() - result.accuracy("free").mean) < 1e-9
        True
    """
    file = find_network(Path(path), variant, seed)
    shown = repr(os.fspath(file))
    tensors, facts = read_tensors(file, kind="network")
    try:
        if facts["own"] and model is None:
            told = f"{shown} was trained with a network of yours; give it as model."
        elif model is not None and not facts["own"]:
            told = f"{shown} was trained with the recipe's own network; leave model out."
        elif variant not in (None, facts["variant"]) or seed not in (None, facts["seed"]):
            told = f"{shown} is of variant {facts['variant']!r} and seed {facts['seed']}, no other."
        else:
            return _built(tensors, facts, model)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        whose = "this model" if model is not None else "a whole network"
        raise ValueError(f"{shown} does not hold {whose} ({why:.300}); {_AGAIN}.") from None
    raise ValueError(told)


def find_network(path: Path, variant: str | None = None, seed: int | None = None) -> Path:
    """The file of a network that is named as for ``load_trained``, which tells what is raised."""
    shown = repr(os.fspath(path))
    if not path.is_dir() or (path / NETWORK_FILE).is_file():
        if not path.exists():
            raise FileNotFoundError(f"No trained network at {shown}; check the path.")
        return path / NETWORK_FILE if path.is_dir() else path
    if not (path / RECIPE_FILE).is_file():
        raise FileNotFoundError(
            f"{shown} holds neither {RECIPE_FILE} nor {NETWORK_FILE}; give the folder that "
            "gaborium train has written."
        )
    recipe = Recipe.from_toml(path / RECIPE_FILE)
    variant = one_of("variant", recipe.first_layer if variant is None else variant, recipe.variants)
    seed = recipe.seeds[0] if seed is None else seed
    if seed not in recipe.seeds:
        seeds = ", ".join(map(str, recipe.seeds))
        raise ValueError(f"seed must be one of {seeds}, for which {shown} has runs; got {seed}.")
    place = path / f"{variant}-{seed}"
    if (place / NETWORK_FILE).is_file():
        return place / NETWORK_FILE
    which = f"{shown} holds no trained network of variant {variant!r} and seed {seed}"
    if not (place / RUN_FILE).is_file():
        raise ValueError(f"{which}: its training has not ended; train again, and it goes on.")
    stopped = load_state(place / RUN_FILE)["run"]["stopped"]
    raise ValueError(f"{which}: {stopped or 'its file is gone; train again with --overwrite.'}")


def is_trained(path: Path) -> bool:
    """Whether a path looks like what ``load_trained`` takes, damaged or not."""
    if path.is_dir():
        return True
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return _NAME.encode() in file.read(2**20)
    except OSError:
        return False


def save_trained(
    trained: Trained, path: str | os.PathLike[str], *, start: Gabor | None, own: bool
) -> None:
    """Write a trained network, all or nothing.

    Args:
        trained: the network and all that is known of it.
        path: the file.
        start: the record at which its Gabor filters began, if it was none of the recipe's.
        own: whether it was a network of the caller's.

    Raises:
        ImportError: safetensors is not installed.
        OSError: it cannot be written there. What was there before stays.
    """
    facts = {
        "name": _NAME,
        "format": 1,
        "gaborium": __version__,
        "recipe": vars(trained.recipe),
        "variant": trained.variant,
        "seed": trained.seed,
        "inputs": vars(trained.inputs),
        "start": None if start is None else json.loads(start.to_json()),
        "own": own,
    }
    write_tensors(path, trained.network.state_dict(), facts)


def make_network(
    recipe: Recipe,
    model: nn.Module | None,
    data: Dataset | Inputs,
    variant: str,
    seed: int,
    *,
    start: Gabor | None = None,
) -> tuple[nn.Module, nn.Module]:
    """The network of one run before training, and the first layer in it."""
    made: list[nn.Module] = []

    def layer(**options: Any) -> nn.Module:
        learns = variant in ("gabor", "mixed")
        made.append(
            make_first_layer(
                variant,
                n_dims=data.n_dims,
                start=recipe.start if start is None else start,
                learn=recipe.learn if learns else None,
                seed=seed,
                **options,
            )
        )
        return made[0]

    def replacement(conv: Any) -> nn.Module:
        if conv.groups != 1 or set(conv.dilation) != {1} or conv.padding_mode != "zeros":
            raise ValueError(
                "The first convolution of model must have groups=1, dilation=1 and "
                f"padding_mode='zeros', got {conv}."
            )
        return layer(
            in_channels=conv.in_channels,
            n_filters=conv.out_channels,
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
        )

    if model is not None:
        return replace_first_conv(model, replacement), made[0]
    first = layer(
        in_channels=data.n_channels,
        n_filters=recipe.n_filters,
        kernel_size=recipe.kernel_size,
        stride=recipe.stride,
        output=FIRST_OUTPUTS[recipe.network],
    )
    network = build_network(
        recipe.network,
        first=first,
        image_size=data.image_size,
        n_classes=data.n_classes,
        seed=seed,
    )
    return network, first


def to_unit_range(images: Tensor) -> Tensor:
    """Images of bytes as numbers in [0, 1]; sounds as they are."""
    return images if images.is_floating_point() else images.float() / 255


def _built(tensors: dict[str, Tensor], facts: dict[str, Any], model: nn.Module | None) -> Trained:
    """The network that was saved, made anew and filled."""
    recipe = Recipe(**facts["recipe"])
    given = {name: facts["inputs"][name] for name in (f.name for f in dataclasses.fields(Inputs))}
    inputs = Inputs(**{name: tuple(value) for name, value in given.items()})
    start = facts["start"]
    if start is not None:
        record = {one.__name__: one for one in RECORDS.values()}[start["type"]]
        start = record.from_json(json.dumps(start))
    with warnings.catch_warnings():  # a start that is cut was told when it was trained
        warnings.simplefilter("ignore")
        network, _ = make_network(
            recipe, model, inputs, facts["variant"], facts["seed"], start=start
        )
    network.to(torch.float64 if recipe.precision == "64-true" else torch.float32)
    network.load_state_dict(tensors)
    return Trained(network.eval(), recipe, facts["variant"], facts["seed"], inputs)
