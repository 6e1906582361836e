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

from gaborium.functions.params import RECORDS, Gabor, plain
from gaborium.support import write_bytes
from gaborium.training.networks import Network, make_network
from gaborium.training.recipe import Recipe

RECIPE_FILE, CHECKPOINT_FILE = "recipe.toml", "checkpoint.pt"
_SNAPSHOTS = ("epochs", "kernels", "params")  # not in JSON


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


@dataclass(eq=False)
class Run:
    """One trained network, of one variant and one seed.

    Args:
        variant: kind of its first layer.
        seed: seed of its initial weights, its samples and their order.
        kernels: kernels of the first layer at the snapshots: ``(snapshots, filters, channels,
            *size)``, at most 64 filters.
        params: Gabor parameters at the snapshots, each ``(filters, channels or 1)``; empty for a
            free layer.
        epochs: epochs of the snapshots: 0 is before the first, then those of ``curve``.
        curve: measurements after some epochs: ``epoch``, ``step``, ``loss`` and ``accuracy`` over
            the training images of the epoch, ``test_loss``, ``test_accuracy``, ``displacement``.
        n_first_parameters: number of learned parameters of the first layer.
        n_parameters: number of learned parameters of the whole network.
        accuracy: test accuracy at the end; ``None`` for a stopped run.
        accuracy_reset: test accuracy of the trained network with its Gabor filters reset to their
            start; ``None`` without learned Gabor filters.
        seconds: time of training and evaluation.
        stopped: empty, or the reason why the run was stopped.
    """

    variant: str
    seed: int
    kernels: Tensor = field(default_factory=lambda: torch.empty(0))
    params: list[Gabor] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    n_first_parameters: int = 0
    n_parameters: int = 0
    accuracy: float | None = None
    accuracy_reset: float | None = None
    seconds: float = 0.0
    stopped: str = ""

    @property
    def start(self) -> Gabor | None:
        """The Gabor parameters before training; ``None`` for a free layer."""
        return self.params[0] if self.params else None

    @property
    def end(self) -> Gabor | None:
        """The Gabor parameters after training; ``None`` for a free layer."""
        return self.params[-1] if self.params else None

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
        """Return the test accuracy of the runs that were not stopped."""
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

    def to_json(self) -> str:
        """Return the result as JSON text.

        Convention:
            - accuracies are shares, angles in rad, lengths in px
            - numbers that JSON does not have are the texts ``inf``, ``-inf`` and ``nan``
            - ``start`` and ``end`` of a run are what ``Gabor2d.from_json`` reads
        """
        first, *others = self.variants
        moved = {variant: self.displacement(variant) for variant in self.variants}
        runs = [
            {name: value for name, value in vars(run).items() if name not in _SNAPSHOTS}
            | {"start": run.start and json.loads(run.start.to_json())}
            | {"end": run.end and json.loads(run.end.to_json())}
            for run in self.runs
        ]
        document = {
            "recipe": vars(self.recipe),
            "data": self.data,
            "table": self.to_table(),
            "displacement": {
                variant: {name: mean._asdict() for name, mean in means.items()}
                for variant, means in moved.items()
            },
            "difference": {other: self.difference(first, other)._asdict() for other in others},
            "runs": runs,
        }
        return json.dumps(plain(document), allow_nan=False)


def _mean_difference(pairs: list[tuple[float | None, float | None]]) -> Mean:
    return Mean.of([a - b for a, b in pairs if a is not None and b is not None])


# -- checkpoints and trained networks ---------------------------------------------------------


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors in containers with a checksum; a kill leaves the file before."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write_bytes(path, hashlib.sha256(content).digest() + content)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Read what ``save_checkpoint`` has written; ``None`` if there is no file."""
    if not path.exists():
        return None
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError(f"{str(path)!r} is damaged; delete it, and its training begins again.")
    # Only tensors, plain containers and these records are unpickled.
    with torch.serialization.safe_globals([Run, *RECORDS.values()]):
        return torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)


class Trained(nn.Module):
    """A trained network with its preprocessing: from images as in a ``Dataset`` to logits.

    Args:
        network: from normalised images to logits of the classes, or a record with such ``logits``.
        mean: mean of the training images in [0, 1], ``(1, channels, 1, ...)``.
        std: their standard deviation.
        classes: names of the classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, mean: Tensor, std: Tensor, classes: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.network, self.classes = network, classes
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalise images of bytes, images in [0, 1], or sounds, as in training."""
        return (to_unit_range(images).to(self.mean.dtype) - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(batch, n_classes)``."""
        output = self.network(self.preprocess(images))
        return getattr(output, "logits", output)


def to_unit_range(images: Tensor) -> Tensor:
    """Return images of bytes as numbers in [0, 1]; sounds are unchanged."""
    return images if images.is_floating_point() else images.float() / 255


def load_trained(
    folder: str | os.PathLike[str],
    *,
    variant: str | None = None,
    seed: int | None = None,
    network: Network | None = None,
) -> Trained:
    """Read a network that ``train`` has trained.

    Args:
        folder: the folder that ``train`` was given.
        variant: kind of the first layer; by default the recipe's ``first_layer``.
        seed: seed of the run; by default the recipe's first.
        network: the network that ``train`` was given, if there was one.

    Returns:
        The network with its preprocessing, in evaluation mode, on the CPU.

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
        >>> hits = trained(data.test_images).argmax(1) == data.test_labels
        >>> abs(hits.double().mean().item() - result.accuracy("free").mean) < 1e-9
        True
    """
    recipe = Recipe.from_toml(Path(folder, RECIPE_FILE))
    variant = recipe.first_layer if variant is None else variant
    seed = recipe.seeds[0] if seed is None else seed
    path = Path(folder, f"{variant}-{seed}", CHECKPOINT_FILE)
    saved = load_checkpoint(path)
    if saved is None or saved["run"].accuracy is None:
        raise FileNotFoundError(
            f"{str(path)!r} does not exist, or its training has not ended or was stopped."
        )
    classes, model = saved["classes"], saved["model"]
    options: dict[str, Any] = {"shape": saved["shape"], "n_classes": len(classes)}
    options |= {"network": network, "start": saved["run"].start}  # of the shape of the filters
    try:
        with warnings.catch_warnings():  # training has warned of filters that are clipped
            warnings.simplefilter("ignore")
            module, _ = make_network(recipe, variant, seed, **options)
        trained = Trained(module.to(model["mean"].dtype), model["mean"], model["std"], classes)
        trained.load_state_dict(model)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is of another network; give the one that train was given: "
            f"{' '.join(str(error).split()):.300}"
        ) from None
    return trained.eval()
