"""What training returns: accuracies with standard errors, and the trained networks."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import statistics
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gaborium.files import write_bytes
from gaborium.params import RECORDS, Gabor, plain
from gaborium.training.networks import make_network
from gaborium.training.recipe import Recipe

RECIPE_FILE, CHECKPOINT_FILE = "recipe.toml", "checkpoint.pt"
_FORMAT = 1


class Mean(NamedTuple):
    """A mean over seeds with its standard error.

    Args:
        mean: ``nan`` without values.
        standard_error: ``nan`` for fewer than two values.
        n: number of values.
    """

    mean: float
    standard_error: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> Mean:
        """Return the mean of some values.

        Example:
            >>> Mean.of([0.5, 1.0])
            Mean(mean=0.75, standard_error=0.25, n=2)
        """
        n = len(values)
        error = statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
        return cls(statistics.fmean(values) if values else math.nan, error, n)


@dataclass(frozen=True, eq=False)
class Run:
    """One trained network, of one variant and one seed.

    Args:
        variant: kind of its first layer.
        seed: seed of its initial weights, its samples and their order.
        accuracy: test accuracy at the end; ``None`` for a stopped run.
        accuracy_reset: test accuracy of the trained network with its Gabor filters reset to their
            start; ``None`` where none learns.
        n_first_parameters: number of learned parameters of the first layer.
        n_parameters: number of learned parameters of the whole network.
        curve: measurements after some epochs, 0 is before the first: ``epoch``, ``step``,
            ``loss`` and ``accuracy`` over the training images of the epoch, ``test_loss``,
            ``test_accuracy``, ``displacement``.
        epochs: epochs of the snapshots below: 0 and those of ``curve``.
        kernels: kernels of the first layer: ``(snapshots, filters, channels, *size)``, at most 64
            filters.
        params: Gabor parameters: ``(snapshots, filters, channels or 1)``; ``None`` for a free
            layer.
        seconds: time of training and evaluation.
        stopped: empty, or the reason why the run was stopped.
    """

    variant: str
    seed: int
    accuracy: float | None
    accuracy_reset: float | None
    n_first_parameters: int
    n_parameters: int
    curve: list[dict[str, Any]]
    epochs: list[int]
    kernels: Tensor
    params: Gabor | None
    seconds: float
    stopped: str = ""

    @property
    def start(self) -> Gabor | None:
        """The Gabor parameters before training: ``(filters, channels or 1)``."""
        return None if self.params is None else _at(self.params, 0)

    @property
    def end(self) -> Gabor | None:
        """The Gabor parameters after training: ``(filters, channels or 1)``."""
        return None if self.params is None else _at(self.params, -1)

    @property
    def displacement(self) -> dict[str, float]:
        """Median distance of every field from its start, over the filters; empty if free."""
        return dict(self.curve[-1]["displacement"]) if self.curve else {}


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What ``train`` measured: every run, and means over the seeds.

    Args:
        recipe: the recipe.
        runs: one for each seed, for each variant of the recipe.
        data: the data set: ``name``, ``n_train``, ``n_test``, ``n_classes``, ``image_size``,
            ``n_channels``, ``sha256``.
    """

    recipe: Recipe
    runs: tuple[Run, ...]
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def variants(self) -> tuple[str, ...]:
        """Kinds of first layer, in the recipe's order."""
        return tuple(dict.fromkeys(run.variant for run in self.runs))

    def runs_of(self, variant: str) -> tuple[Run, ...]:
        """Return the runs of one variant."""
        return tuple(run for run in self.runs if run.variant == variant)

    def accuracy(self, variant: str) -> Mean:
        """Return the test accuracy; stopped runs have none."""
        return _mean_difference([(run.accuracy, 0.0) for run in self.runs_of(variant)])

    def accuracy_reset(self, variant: str) -> Mean:
        """Return the test accuracy with the Gabor filters reset to their start."""
        return _mean_difference([(run.accuracy_reset, 0.0) for run in self.runs_of(variant)])

    def learning_gain(self, variant: str) -> Mean:
        """Return the loss of accuracy when the Gabor filters are reset, seed by seed."""
        runs = self.runs_of(variant)
        return _mean_difference([(run.accuracy, run.accuracy_reset) for run in runs])

    def difference(self, variant: str, other: str) -> Mean:
        """Return how much more accurate one variant is than another, seed by seed.

        Both variants of a seed have the same samples in the same order, so that differences vary
        less than the accuracies.
        """
        theirs = {run.seed: run.accuracy for run in self.runs_of(other)}
        runs = self.runs_of(variant)
        return _mean_difference([(run.accuracy, theirs.get(run.seed)) for run in runs])

    def displacement(self, variant: str) -> dict[str, Mean]:
        """Return the median distance of every field from its start, in the field's unit."""
        found = [run.displacement for run in self.runs_of(variant) if not run.stopped]
        return {name: Mean.of([one[name] for one in found]) for name in (found or [{}])[0]}

    def to_table(self) -> list[dict[str, Any]]:
        """Return one row per variant: accuracies with standard errors, numbers of parameters."""
        rows = []
        for variant in self.variants:
            runs = self.runs_of(variant)
            row: dict[str, Any] = {
                "variant": variant,
                "n_seeds": len(runs),
                "n_stopped": sum(bool(run.stopped) for run in runs),
                "n_first_parameters": runs[0].n_first_parameters,
                "n_parameters": runs[0].n_parameters,
            }
            for name in ("accuracy", "accuracy_reset"):
                mean = getattr(self, name)(variant)
                row[name] = mean.mean if mean.n else None
                row[f"{name}_error"] = mean.standard_error if mean.n > 1 else None
            rows.append(row)
        return rows

    def to_record(self) -> dict[str, Any]:
        """Return the result as plain objects for JSON.

        Convention:
            - accuracies are shares, angles in rad, lengths in px
            - numbers that JSON does not have are the texts ``inf``, ``-inf`` and ``nan``
            - ``start`` and ``end`` of a run are what ``Gabor2d.from_json`` reads
        """
        first, *others = self.variants
        runs = []
        for run in self.runs:
            left_out = ("kernels", "params", "epochs")
            record = {name: value for name, value in vars(run).items() if name not in left_out}
            for name, params in (("start", run.start), ("end", run.end)):
                record[name] = None if params is None else json.loads(params.to_json())
            runs.append(record | {"displacement": run.displacement})
        displacements = {variant: self.displacement(variant) for variant in self.variants}
        record = {
            "format": "gaborium.train",
            "version": _FORMAT,
            "recipe": vars(self.recipe),
            "data": self.data,
            "table": self.to_table(),
            "displacement": {
                variant: {name: mean._asdict() for name, mean in fields.items()}
                for variant, fields in displacements.items()
            },
            "difference": {other: self.difference(first, other)._asdict() for other in others},
            "runs": runs,
        }
        return plain(record)


def _at(params: Gabor, index: int) -> Gabor:
    return type(params)(**{name: value[index] for name, value in params.as_dict().items()})


def _mean_difference(pairs: list[tuple[float | None, float | None]]) -> Mean:
    return Mean.of([a - b for a, b in pairs if a is not None and b is not None])


# -- checkpoints and trained networks ---------------------------------------------------------


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors in plain containers with a checksum, all or nothing; keep the file before."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    if _read(path) is not None:
        path.replace(path.with_suffix(".old"))
    write_bytes(path, hashlib.sha256(content).digest() + content)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return the newest checkpoint that is not damaged; ``None`` if there is no file."""
    paths = [one for one in (path, path.with_suffix(".old")) if one.exists()]
    for one in paths:
        content = _read(one)
        if content is not None:
            # Only tensors and plain containers are unpickled.
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        warnings.warn(f"{str(one)!r} is damaged; trying the checkpoint before.", stacklevel=2)
    if paths:
        raise ValueError(f"{str(path)!r} is damaged; train again with resume=False (--overwrite).")
    return None


def _read(path: Path) -> bytes | None:
    """The content of a file if its checksum is right."""
    content = path.read_bytes() if path.exists() else b""
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network, and how its input must be preprocessed.

    Args:
        network: from preprocessed images to logits of the classes.
        recipe: the recipe of its training.
        variant: kind of its first layer.
        seed: seed of its run.
        classes: names of the classes, in the order of the network's outputs.
        mean: mean of the training images in [0, 1], ``(1, channels, 1, ...)``.
        std: their standard deviation.
    """

    network: nn.Module
    recipe: Recipe
    variant: str
    seed: int
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalise images channel by channel, as in training.

        Args:
            images: as in a ``Dataset``: uint8 ``(n, channels, height, width)``, or sounds ``(n, 1,
                samples)``; or images of floating point, 0 black to 1 white.
        """
        like = next(self.network.parameters())
        return (to_unit_range(images).to(like) - self.mean.to(like)) / self.std.to(like)


def to_unit_range(images: Tensor) -> Tensor:
    """Return images of bytes as numbers in [0, 1]; sounds are unchanged."""
    return images if images.is_floating_point() else images.float() / 255


def load_trained(
    folder: str | os.PathLike[str],
    *,
    variant: str | None = None,
    seed: int | None = None,
    network: nn.Module | type[nn.Module] | None = None,
) -> Trained:
    """Read a network that ``train`` has trained.

    Args:
        folder: the folder that ``train`` was given.
        variant: kind of the first layer; by default the recipe's ``first_layer``.
        seed: seed of the run; by default the recipe's first.
        network: the network of yours that ``train`` was given, if there was one.

    Returns:
        The network in evaluation mode, on the CPU, with its preprocessing.

    Raises:
        FileNotFoundError: there is no such run, or it has not ended or was stopped.
        ValueError: a file is damaged, or ``network`` is missing or another one.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from gaborium.training import Recipe, load_dataset, load_trained, train
        >>> data = load_dataset("digits")
        >>> recipe = Recipe(data="digits", n_filters=4, kernel_size=5, epochs=1, seeds=(0,))
        >>> with TemporaryDirectory() as folder:
        ...     result = train(recipe, data, folder=f"{folder}/mine")
        ...     trained = load_trained(f"{folder}/mine", variant="free")
        >>> logits = trained.network(trained.preprocess(data.test_images))
        >>> hits = logits.argmax(1) == data.test_labels
        >>> abs(hits.double().mean().item() - result.accuracy("free").mean) < 1e-9
        True
    """
    recipe = Recipe.from_toml(Path(folder, RECIPE_FILE))
    variant = recipe.first_layer if variant is None else variant
    seed = recipe.seeds[0] if seed is None else seed
    place = Path(folder, f"{variant}-{seed}")
    saved = load_checkpoint(place / CHECKPOINT_FILE)
    if saved is None or not saved["state"]["finished"]:
        raise FileNotFoundError(
            f"{str(place)!r} holds no trained network: there is no such run, or it has not ended "
            "or was stopped."
        )
    first_params = saved["state"]["params"][:1]  # their shape is that of the filters
    start = RECORDS[len(saved["shape"]) - 1](**first_params[0]) if first_params else None
    try:
        with warnings.catch_warnings():  # training has warned of filters that are clipped
            warnings.simplefilter("ignore")
            module, _ = make_network(
                recipe, variant, seed, shape=saved["shape"], n_classes=len(saved["classes"]),
                network=network, start=start,
            )  # fmt: skip
        module.to(saved["mean"].dtype).load_state_dict(saved["network"])
    except (RuntimeError, ValueError) as error:
        detail = " ".join(str(error).split())
        raise ValueError(
            f"{str(place)!r} was trained with another network; give the one that train was given, "
            f"or none ({detail:.300})."
        ) from None
    preprocessing = saved["classes"], saved["mean"], saved["std"]
    return Trained(module.eval(), recipe, variant, seed, *preprocessing)
