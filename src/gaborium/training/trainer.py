"""Training: a plain loop on Lightning Fabric, which goes on after a kill bit for bit."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium.functions.params import Gabor, plain
from gaborium.layers import GABOR_LAYERS
from gaborium.optim import NaturalGradient
from gaborium.support import locked_folder, require, write_text
from gaborium.training.datasets import Dataset, load_dataset
from gaborium.training.networks import Network, make_network, n_learned
from gaborium.training.recipe import Recipe
from gaborium.training.results import (
    CHECKPOINT_FILE,
    RECIPE_FILE,
    Run,
    Trained,
    TrainResult,
    load_checkpoint,
    save_checkpoint,
    to_unit_range,
)

Progress = Callable[[Mapping[str, Any]], None]
Augment = Callable[[Tensor, Tensor, int], Tensor]

_METRICS_FILE = "metrics.jsonl"
_LOG_STEPS, _CHECKPOINT_STEPS = 20, 200  # between two lines of the metrics, two checkpoints
_GABOR_RATE = 0.04  # Adam's default learning rate of Gabor parameters
_MAX_FILTERS = 64  # in a snapshot of the filters
_EVALUATION_BATCH = 256  # images
_LOCK_TIMEOUT = 5.0  # s; time for other processes of a killed training to end


def train(
    recipe: Recipe,
    dataset: Dataset | None = None,
    *,
    network: Network | None = None,
    augment: Augment | None = None,
    start: Gabor | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = True,
    tensorboard: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train the networks of a recipe: one for each of its first layers and seeds.

    Convention:
        - all first layers of a seed get the same samples in the same order; the batches of an
          epoch differ in size by at most one image
        - images are normalised by the mean and standard deviation of the training images, channel
          by channel
        - killed and called again with the same arguments, it goes on from the last checkpoint and
          ends with the same numbers to the last bit, on the same machine and number of processes

    Args:
        recipe: what to train.
        dataset: data to train on, instead of the recipe's.
        network: a network of yours, instead of the small one. Either a module from ``(batch,
            channels, *size)`` to logits ``(batch, classes)``, or to a record with such
            ``logits``; each run trains a copy whose first convolution is replaced by a first layer
            of the recipe's kind and of the same size. Or a function of variant and seed that
            returns a network and its first layer.
        augment: function that changes training images at random. It gets images in [0, 1], their
            indices in the training set, and a seed that differs between runs and epochs.
        start: start of the Gabor filters, instead of the recipe's: a record of shape ``(filters,
            channels or 1)``.
        folder: folder for checkpoints, metrics and trained networks: a new one, or the folder of
            an earlier call. By default no file is written.
        resume: whether to go on with the content of ``folder``; otherwise it is replaced.
        tensorboard: whether to write the metrics for TensorBoard, too.
        progress: called with each line of the metrics, plus ``n_steps`` of the run.

    Returns:
        All runs. A run whose loss stops being finite is stopped.

    Raises:
        ImportError: Lightning Fabric or filelock is not installed.
        ValueError: the recipe does not fit the data or this machine; or the folder holds another
            recipe or a damaged checkpoint.
        OSError: a file cannot be written or read; ``FileExistsError``: the folder holds other
            work; ``BlockingIOError``: another process uses it.

    Example:
        >>> from gaborium.training import Recipe, train
        >>> recipe = Recipe(data="digits", n_filters=4, kernel_size=5, epochs=1, seeds=(0,))
        >>> result = train(recipe)
        >>> [row["variant"] for row in result.to_table()]
        ['gabor', 'free']
    """
    data = load_dataset(recipe.data) if dataset is None else dataset
    n_train = len(data.subset(recipe.samples_per_class, recipe.seeds[0]).labels)
    shape = tuple(data.images.shape[1:])
    build = functools.partial(
        make_network, recipe, shape=shape, n_classes=data.n_classes, network=network, start=start
    )
    for variant in recipe.variants:  # errors should come before anything is written
        make_optimizers(build(variant, recipe.seeds[0])[0], recipe)
    checksum = _checksum(data, network, start)
    fabric = _make_fabric(recipe)
    fabric.launch()
    place = None if folder is None else Path(folder)
    claimed: Any = contextlib.nullcontext([])
    if place is not None and fabric.is_global_zero:
        claimed = _claimed(place, recipe, resume=resume, tensorboard=tensorboard)
    with (
        torch.random.fork_rng([fabric.device] if fabric.device.type == "cuda" else []),
        # The fastest algorithms of a GPU differ in the last bits from run to run.
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
        claimed as watchers,
    ):
        if progress is not None and fabric.is_global_zero:
            watchers.append(progress)
        fabric.barrier()
        trainer = _Trainer(fabric, recipe, data, build, augment, place, checksum, watchers)
        variants, seeds = recipe.variants, recipe.seeds
        runs = tuple(trainer.train(variant, seed) for variant in variants for seed in seeds)
    facts = {
        "name": data.name,
        "n_train": n_train,
        "n_test": len(data.test_labels),
        "n_classes": data.n_classes,
        "image_size": shape[1:],
        "n_channels": shape[0],
        "sha256": checksum,
    }
    return TrainResult(recipe, runs, facts)


def _make_fabric(recipe: Recipe) -> Any:
    """Fabric on the processes of torchrun or, without it, on the recipe's devices."""
    fabric = require("lightning_fabric", extra="train", purpose="Trainings")
    devices = n_processes = recipe.devices
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices, n_processes = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    try:
        return fabric.Fabric(
            accelerator=recipe.accelerator,
            precision=recipe.precision,
            devices=devices,
            num_nodes=n_processes // devices,
            strategy="ddp" if n_processes > 1 else "auto",
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"accelerator={recipe.accelerator!r} with devices={devices} is not available on this "
            f"machine: {' '.join(str(error).split())}"
        ) from None


def make_optimizers(module: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return the optimisers of a recipe: of a module's Gabor parameters, and of all others.

    The module must be on its device and have its precision.
    """
    rate = recipe.gabor_learning_rate
    optimizers: list[torch.optim.Optimizer] = []
    groups: list[dict[str, Any]] = []
    gabor: list[Tensor] = [
        value
        for layer in module.modules()
        if isinstance(layer, GABOR_LAYERS)
        for name, value in layer.named_parameters()
        if name != "bias"
    ]
    if gabor and recipe.optimizer == "natural":
        optimizers.append(NaturalGradient(module, lr=1.0 if rate is None else rate))
        gabor = [value for group in optimizers[0].param_groups for value in group["params"]]
    elif gabor:
        rate = _GABOR_RATE if rate is None else rate
        groups.append({"params": gabor, "lr": rate, "weight_decay": 0.0})
    taken = set(map(id, gabor))
    if others := [value for value in module.parameters() if id(value) not in taken]:
        groups.append({"params": others})
    adam = torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    return [*optimizers, adam]


@dataclass
class _Trainer:
    """Trains one network after another."""

    fabric: Any
    recipe: Recipe
    data: Dataset
    build: Callable[[str, int], tuple[nn.Module, nn.Module]]
    augment: Augment | None
    place: Path | None
    checksum: str
    watchers: list[Progress]

    def train(self, variant: str, seed: int) -> Run:
        """Return the finished run; go on where an earlier call ended."""
        self.folder = None if self.place is None else self.place / f"{variant}-{seed}"
        saved = None if self.folder is None else load_checkpoint(self.folder / CHECKPOINT_FILE)
        if saved is not None and saved["checksum"] != self.checksum:
            raise ValueError(
                f"{str(self.folder)!r} was trained with other data, network or start; choose "
                "another folder, or replace it with resume=False (--overwrite)."
            )
        self.run = saved["run"] if saved else Run(variant, seed)
        if self.run.accuracy is None:
            self._prepare(saved)
            self._descend()
            if self.run.stopped:
                warnings.warn(self.run.stopped, stacklevel=3)
                self._write("stopped", reason=self.run.stopped)
            else:
                self._finish()
        return self.run

    def _prepare(self, saved: dict[str, Any] | None) -> None:
        """Make the data, the network and the optimisers, and restore the checkpoint."""
        recipe, fabric, run, device = self.recipe, self.fabric, self.run, self.fabric.device
        data = self.data.subset(recipe.samples_per_class, run.seed)
        self.images, self.labels = data.images.to(device), data.labels.to(device)
        self.test_images = data.test_images.to(device)
        self.test_labels = data.test_labels.to(device)
        self.n_batches = math.ceil(len(data.labels) / recipe.batch_size)
        self.n_steps = recipe.epochs * self.n_batches
        interval = math.ceil(recipe.epochs / recipe.n_evaluations)
        self.evaluated = set(range(recipe.epochs, 0, -interval))
        self.evaluated |= {0} if recipe.n_evaluations > 1 else set()

        network, self.first = self.build(run.variant, run.seed)
        layers = (one for one in self.first.modules() if isinstance(one, GABOR_LAYERS))
        self.gabor: Any = next(layers, None)
        self.start = None if self.gabor is None else self._params()
        run.n_first_parameters, run.n_parameters = n_learned(self.first), n_learned(network)
        dtype = torch.float64 if recipe.precision == "64-true" else torch.float32
        self.model = Trained(network, *_statistics(data.images), data.classes)
        self.model.to(device, dtype)
        optimizers = make_optimizers(self.model, recipe)
        self.rates = [[group["lr"] for group in one.param_groups] for one in optimizers]
        self.module, *self.optimizers = fabric.setup(self.model, *optimizers)

        self.step, self.begun = 0, time.monotonic() - run.seconds
        self.lines: list[dict[str, Any]] = []
        # Sums of losses, hits and images: over the epoch, and since the last line of the metrics.
        self.sums = torch.zeros(2, 3, dtype=torch.float64)
        self.pending: list[Tensor] = []  # the same of single steps, not in the sums yet
        if saved:
            self.step, self.lines, self.sums = (saved[name] for name in ("step", "lines", "sums"))
            self.model.load_state_dict(saved["model"])
            for optimizer, values in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(values)
        if self.folder is not None and fabric.is_global_zero:
            self.folder.mkdir(exist_ok=True)
            write_text(self.folder / _METRICS_FILE, "".join(map(_json_line, self.lines)))

    def _descend(self) -> None:
        """Do all steps that are left, unless the loss stops being finite."""
        if not self.run.epochs:
            self._end_epoch(0)
            self._save()
        batches: tuple[Tensor, ...] = ()
        while self.step < self.n_steps:
            epoch, number = divmod(self.step, self.n_batches)
            if not batches or number == 0:
                order = sample_order(self.run.seed, epoch, len(self.labels))
                batches = order.tensor_split(self.n_batches)
            self._do_step(batches[number], epoch, number)
            self.step += 1
            log, save = (self.step % n == 0 for n in (_LOG_STEPS, _CHECKPOINT_STEPS))
            last = number + 1 == self.n_batches
            if (log or save or last) and not self._add_up():
                kept = self.folder and f"; the last good checkpoint is in {str(self.folder)!r}"
                self.run.stopped = (
                    f"The loss or a parameter of {self.run.variant}, seed {self.run.seed} is not "
                    f"finite at step {self.step}; try smaller learning rates{kept or ''}."
                )
                return
            if log:
                self._write("step", epoch=epoch + 1, **_means(self.sums[1]))
                self.sums[1] = 0
            if last:
                self._end_epoch(epoch + 1)
            if save or (last and epoch + 1 in self.evaluated):
                self._save()

    def _do_step(self, batch: Tensor, epoch: int, number: int) -> None:
        """Do one step on the images with these indices; each process takes its share."""
        fabric = self.fabric
        rows = batch[fabric.global_rank :: fabric.world_size]
        # Seeded at every step, so that random layers of a resumed run draw the same numbers.
        torch.manual_seed(_key(self.run.seed, epoch, number, fabric.global_rank))
        self.module.train()
        images, labels = to_unit_range(self.images[rows]), self.labels[rows]
        if self.augment is not None:
            images = self.augment(images, rows, _key(self.run.seed, epoch, "augmentation"))
        logits = self.module(images)
        smoothing = self.recipe.label_smoothing
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        # Fabric averages over the processes, whose shares differ in size.
        fabric.backward(loss * (fabric.world_size / len(batch)))
        if self.recipe.schedule == "cosine":
            share = (1 + math.cos(math.pi * self.step / self.n_steps)) / 2
            for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
                for group, rate in zip(optimizer.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * share
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        hits = (logits.argmax(1) == labels).sum()
        self.pending.append(torch.stack([loss.detach(), hits, hits.new_tensor(len(rows))]))

    def _add_up(self) -> bool:
        """Add the last steps of all processes to the sums; return whether all is finite."""
        sums = torch.stack(self.pending).cpu().double().sum(0)
        self.pending.clear()
        if self.fabric.world_size > 1:
            sums = self.fabric.all_reduce(sums.to(self.fabric.device), reduce_op="sum").cpu()
        self.sums += sums
        return all(bool(v.isfinite().all()) for v in (sums, *self.model.parameters()))

    def _end_epoch(self, epoch: int) -> None:
        """Measure after an epoch; 0 is before the first."""
        run, measured = self.run, _means(self.sums[0])
        if epoch in self.evaluated:
            measured["test_loss"], measured["test_accuracy"] = self._test()
        self._write("epoch", epoch=epoch, **measured)
        if epoch in self.evaluated:
            run.curve.append(self.lines[-1])
        if epoch in {0, *self.evaluated}:
            first: Any = self.first
            kernels = first.weight.detach().to("cpu", torch.float32)[None, :_MAX_FILTERS]
            run.epochs.append(epoch)
            run.kernels = torch.cat([run.kernels, kernels])
            run.params += [] if self.gabor is None else [self._params()]
        self.sums.zero_()

    @torch.no_grad()
    def _test(self) -> tuple[float, float]:
        """Loss and accuracy on the test images; of several processes, the first one counts."""
        self.model.eval()
        parts = []
        for rows in torch.arange(len(self.test_labels)).split(_EVALUATION_BATCH):
            labels = self.test_labels[rows]
            with self.fabric.autocast():
                logits = self.model(self.test_images[rows]).float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            parts.append(torch.stack([loss, (logits.argmax(1) == labels).sum()]))
        loss_sum, n_hits = torch.stack(parts).sum(0).tolist()
        return loss_sum / len(self.test_labels), n_hits / len(self.test_labels)

    def _write(self, kind: str, **measured: Any) -> None:
        """Add a line to the metrics."""
        run, displacement = self.run, self._displacement()
        line = {"kind": kind, "variant": run.variant, "seed": run.seed, "step": self.step}
        line |= {**measured, "displacement": displacement}
        self.lines.append(line)
        if self.folder is not None and self.fabric.is_global_zero:
            with (self.folder / _METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(_json_line(line))
        for watch in self.watchers:
            watch({**line, "n_steps": self.n_steps})

    def _params(self) -> Gabor:
        params: Gabor = self.gabor.params.detach().to("cpu", torch.float32)
        return type(params)(**{name: value.clone() for name, value in params.as_dict().items()})

    def _displacement(self) -> dict[str, float]:
        """Median distance of every field from its start, over the filters."""
        if self.start is None:
            return {}
        return {
            # Filters that became a plane wave or a blob have no finite distance.
            name: error.abs().double().nan_to_num(math.nan, math.nan).nanquantile(0.5).item()
            for name, error in self._params().difference(self.start).items()
            if name != "center" or name in self.gabor.learn
        }

    # -- the end, and checkpoints -------------------------------------------------------------

    def _finish(self) -> None:
        """Measure the accuracy with the Gabor filters at their start, where they have learned."""
        if self.gabor is not None and any(p.requires_grad for p in self.gabor.parameters()):
            learned = copy.deepcopy(self.gabor.state_dict())
            with warnings.catch_warnings():  # the start has warned of filters that are clipped
                warnings.simplefilter("ignore")
                self.gabor.params = self.start
            self.run.accuracy_reset = self._test()[1]
            self.gabor.load_state_dict(learned)
        self.run.accuracy = self.run.curve[-1]["test_accuracy"]
        self._save()

    def _save(self) -> None:
        self.run.seconds = time.monotonic() - self.begun
        if self.folder is not None and self.fabric.is_global_zero:
            saved = {
                "checksum": self.checksum,
                "run": self.run,
                "step": self.step,
                "lines": self.lines,
                "sums": self.sums,
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "shape": tuple(self.data.images.shape[1:]),
                "classes": self.data.classes,
            }
            save_checkpoint(self.folder / CHECKPOINT_FILE, saved)


# -- small things -----------------------------------------------------------------------------


def _means(sums: Tensor) -> dict[str, float]:
    loss, hits, count = sums.tolist()
    return {"loss": loss / count, "accuracy": hits / count} if count else {}


def _json_line(line: dict[str, Any]) -> str:
    return json.dumps(plain(line), allow_nan=False) + "\n"


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, ``(1, channels, 1, ...)``."""
    axes = (0, *range(2, images.ndim))
    count = images.numel() // images.shape[1]
    total = squares = torch.zeros(1, images.shape[1], *[1] * (images.ndim - 2)).double()
    for some in images.split(4096):
        values = to_unit_range(some).double()
        total = total + values.sum(axes, keepdim=True)
        squares = squares + values.square().sum(axes, keepdim=True)
    mean = total / count
    variance = squares / count - mean.square()
    return mean, torch.where(variance > 1e-12, variance, 1.0).sqrt()


def sample_order(seed: int, epoch: int, n: int) -> Tensor:
    """Return the order in which an epoch, counted from 0, goes through n samples."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(_key(seed, epoch)))


def _key(*parts: object) -> int:
    """A generator's seed that differs between different parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _checksum(data: Dataset, network: Network | None, start: Gabor | None) -> str:
    """SHA-256 of the arguments of ``train`` that are not in the recipe."""
    tensors = {name: value for name, value in vars(data).items() if isinstance(value, Tensor)}
    tensors |= {} if start is None else {f"start.{k}": v for k, v in start.as_dict().items()}
    name = getattr(network, "__qualname__", type(network).__name__)  # of a function, a module
    if isinstance(network, nn.Module):
        name, tensors = repr(network), tensors | network.state_dict()
    digest = hashlib.sha256(name.encode())
    for name, value in tensors.items():
        digest.update(repr((name, tuple(value.shape), value.dtype)).encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def _claimed(
    folder: Path, recipe: Recipe, *, resume: bool, tensorboard: bool
) -> Iterator[list[Progress]]:
    """Keep a folder for this recipe and this process; yields the function that logs, if any."""
    with locked_folder(folder, RECIPE_FILE, timeout=_LOCK_TIMEOUT) as known:
        if known and resume:
            old, new = vars(Recipe.from_toml(folder / RECIPE_FILE)), vars(recipe)
            different = [
                f"{name} ({old[name]!r:.40} there, {new[name]!r:.40} here)"
                for name in old
                if old[name] != new[name] and name not in ("accelerator", "devices")
            ]
            if different:
                raise ValueError(
                    f"{str(folder)!r} holds another recipe: {', '.join(different)}; choose another "
                    "folder, give that recipe, or replace it with resume=False (--overwrite)."
                )
        elif known:
            for path in folder.iterdir():
                if path.name not in (".lock", RECIPE_FILE):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        recipe.to_toml(folder / RECIPE_FILE)
        if not tensorboard:
            yield []
            return
        from torch.utils.tensorboard import SummaryWriter

        def log(line: Mapping[str, Any]) -> None:
            for name, value in line.items():
                if isinstance(value, float):
                    tag = f"{line['variant']}, seed {line['seed']}/{line['kind']} {name}"
                    writer.add_scalar(tag, value, line["step"])

        with SummaryWriter(str(folder / "tensorboard")) as writer:
            yield [log]
