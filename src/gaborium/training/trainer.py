"""One run: the network of one first layer and one seed, from its start to what is measured."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium.layers import GABOR_LAYERS, PairEnergy, n_learned
from gaborium.optim import NaturalGradient
from gaborium.params import Gabor
from gaborium.training.augmentations import augment, draw
from gaborium.training.checkpoints import RUN_FILE, Checkpoints, load_state, save_state
from gaborium.training.corruptions import N_STRENGTHS, corrupt
from gaborium.training.datasets import Dataset
from gaborium.training.journal import Journal
from gaborium.training.recipe import Recipe
from gaborium.training.results import Run
from gaborium.training.trained import (
    NETWORK_FILE,
    Inputs,
    Trained,
    make_network,
    save_trained,
    to_unit_range,
)

_ADAM_RATE = 0.04  # of Gabor parameters
_N_SNAPSHOTS = 30  # of the filters
_MOST_FILTERS = 64  # in the snapshots
_EVALUATED = 256  # images at a time
_HELD = 2**31  # bytes of images that are held on the device; more are moved batch by batch


@dataclass(frozen=True)
class Job:
    """What every process must know; the arguments are those of ``train``, and what they are of."""

    recipe: Recipe
    model: nn.Module | None
    dataset: Dataset
    start: Gabor | None
    sha256: str
    folder: Path | None
    resume: bool
    checkpoint_steps: int
    log_steps: int
    tensorboard: bool

    def place(self, variant: str, seed: int) -> Path:
        """Where the files of a run are."""
        if self.folder is None:
            raise ValueError("This job writes nothing.")
        return self.folder / f"{variant}-{seed}"


@dataclass
class _State:
    """What a checkpoint holds beside the tensors of network and optimizers."""

    step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    kernels: list[Tensor] = field(default_factory=list)
    params: list[dict[str, Tensor]] = field(default_factory=list)
    seconds: float = 0.0
    # Loss, hits and images of every step of this epoch in this process, and how many of these
    # steps are logged.
    epoch: list[Tensor] = field(default_factory=list)
    logged: int = 0


class Trainer:
    """Trains the network of one first layer and one seed."""

    def __init__(self, fabric: Any, job: Job, journal: Journal, variant: str, seed: int) -> None:
        self.fabric, self.job, self.journal = fabric, job, journal
        self.variant, self.seed = variant, seed
        self.name = f"{variant}, seed {seed}"
        self.folder = None if job.folder is None else job.place(variant, seed)

    def run(self) -> Run:
        """The finished run, from where an earlier call left it."""
        if self.folder is not None:
            if self.fabric.is_global_zero:
                self.folder.mkdir(exist_ok=True)
            self.fabric.barrier()
            if (self.folder / RUN_FILE).exists():
                return Run.from_state(self._checked(load_state(self.folder / RUN_FILE))["run"])
        self._prepare()
        self._take_up()
        stopped = self._descend()
        result = self._finish(stopped)
        if self.folder is not None and self.fabric.is_global_zero:
            self.journal.mark()
            if not stopped:
                self._keep(self.folder / NETWORK_FILE)
            # Last, because it says that all is done.
            save_state(self.folder / RUN_FILE, {"data": self.job.sha256, "run": result.to_state()})
        self.fabric.barrier()
        return result

    def _prepare(self) -> None:
        """Data, network and optimizers as they are before the first step."""
        recipe, fabric = self.job.recipe, self.fabric
        data = self.job.dataset.subset(recipe.samples_per_class, self.seed)
        self.dtype = torch.float64 if recipe.precision == "64-true" else torch.float32
        self.images, self.labels = self._held(data.images), data.labels.to(fabric.device)
        self.test_images = self._held(data.test_images)
        self.test_labels = data.test_labels.to(fabric.device)
        mean, std = _statistics(data.images)
        self.mean, self.std = (v.to(fabric.device, self.dtype) for v in (mean, std))

        self.n_batches = math.ceil(len(data.labels) / recipe.batch_size)
        self.n_steps = recipe.epochs * self.n_batches
        if len(data.labels) // self.n_batches < fabric.world_size:
            raise ValueError(
                f"batch_size must give each of {fabric.world_size} processes an image, got "
                f"{recipe.batch_size} for {len(data.labels)} training images."
            )
        self.evaluated = _spread(recipe.epochs, recipe.n_evaluations)
        self.seen_after = _spread(recipe.epochs, _N_SNAPSHOTS)
        self.draws: tuple[int, Tensor] = -1, torch.empty(0)  # of an epoch, for augmentation

        self.network, self.first = make_network(
            recipe, self.job.model, data, self.variant, self.seed, start=self.job.start
        )
        self.gabor: Any = gabor_layer(self.first)
        self.start = None if self.gabor is None else self._params()
        self.network.to(fabric.device, self.dtype)
        optimizers = make_optimizers(self.network, recipe)
        # As they are before a checkpoint is taken up, in which they are those of its step.
        self.rates = [[group["lr"] for group in one.param_groups] for one in optimizers]
        self.module, *self.optimizers = fabric.setup(self.network, *optimizers)
        self.state = _State()
        self.begun = time.monotonic()

    def _held(self, images: Tensor) -> Tensor:
        return images.to(self.fabric.device) if images.nbytes <= _HELD else images

    # -- training -----------------------------------------------------------------------------

    def _descend(self) -> str:
        """All steps that are left; returns why it stopped before the last, or nothing."""
        state = self.state
        if state.step == 0 and not state.curve:
            self._save()
            if self.job.recipe.n_evaluations > 1:
                self._evaluate(0)
            self._look(0)
        while state.step < self.n_steps:
            epoch, number = divmod(state.step, self.n_batches)
            order = sample_order(self.seed, epoch, len(self.labels))
            for rows in order.tensor_split(self.n_batches)[number:]:
                self._step(rows, epoch, number)
                state.step, number = state.step + 1, number + 1
                last = number == self.n_batches
                log, save = (
                    state.step % n == 0 for n in (self.job.log_steps, self.job.checkpoint_steps)
                )
                stopped = self._log(epoch, state.step) if log or save or last else ""
                if stopped:
                    return stopped
                if last:
                    self._end_epoch(epoch + 1)
                if save or (last and epoch + 1 in self.evaluated):
                    self._save()
        return ""

    def _end_epoch(self, epoch: int) -> None:
        if epoch in self.evaluated:
            self._evaluate(epoch)
        else:
            self._write("epoch", epoch, **self._means(0))
        if epoch in self.seen_after:
            self._look(epoch)
        self.state.epoch, self.state.logged = [], 0

    def _step(self, rows: Tensor, epoch: int, number: int) -> None:
        """One step on the images ``rows``, of which each process takes its share."""
        fabric = self.fabric
        mine = rows[fabric.global_rank :: fabric.world_size]
        # Whatever is random in the network has its own state in every step, so that a run that is
        # taken up again draws what it would have drawn.
        torch.manual_seed(_key(self.seed, epoch, number, fabric.global_rank))
        self.module.train()
        parts = mine.tensor_split(min(self.job.recipe.accumulate, len(mine)))
        measured = []
        for i, part in enumerate(parts):
            labels = self.labels[part.to(self.labels.device)]
            waits = i + 1 < len(parts) and fabric.world_size > 1
            with fabric.no_backward_sync(self.module) if waits else contextlib.nullcontext():
                scores = self._scores(self.module(self._seen(self.images, part, epoch)))
                smoothing = self.job.recipe.label_smoothing
                loss = F.cross_entropy(scores, labels, reduction="sum", label_smoothing=smoothing)
                # Fabric averages over the processes, whose shares differ in size.
                fabric.backward(loss * (fabric.world_size / len(rows)))
            with torch.no_grad():
                hits = (scores.argmax(1) == labels).sum()
                measured.append(torch.stack([loss.float(), hits.float()]))
        self._set_rates()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        count = loss.new_full((1,), len(mine), dtype=torch.float32)
        self.state.epoch.append(torch.cat([torch.stack(measured).sum(0), count]).detach())

    def _set_rates(self) -> None:
        """The learning rates of this step, which follow from its number alone."""
        if self.job.recipe.schedule == "constant":
            return
        share = (1 + math.cos(math.pi * self.state.step / self.n_steps)) / 2
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share

    def _seen(self, images: Tensor, rows: Tensor, epoch: int | None = None) -> Tensor:
        """Some images as the network sees them; to train with, as they are in an epoch."""
        chosen = to_unit_range(images[rows.to(images.device)].to(self.fabric.device))
        kinds = self.job.recipe.augmentation
        if kinds and epoch is not None:
            if self.draws[0] != epoch:
                self.draws = epoch, draw(len(images), _key(self.seed, epoch, "augmentation"))
            chosen = augment(chosen, kinds, draws=self.draws[1][rows])
        return self._normal(chosen)

    def _normal(self, images: Tensor) -> Tensor:
        return (images.to(self.dtype) - self.mean) / self.std

    def _scores(self, output: Any) -> Tensor:
        """What a network says of each class; some return it within a record."""
        scores: Tensor = output if isinstance(output, Tensor) else output.logits
        n_classes = self.job.dataset.n_classes
        if scores.ndim != 2 or scores.shape[1] != n_classes:
            raise ValueError(
                f"model must return (batch, {n_classes}), a number for each class of "
                f"{self.job.dataset.name!r}, got shape {tuple(scores.shape)}."
            )
        return scores

    # -- measuring ----------------------------------------------------------------------------

    def _means(self, since: int) -> dict[str, float]:
        """Loss and accuracy over the images of all processes in this epoch's steps."""
        if not self.state.epoch[since:]:
            return {}
        values = _gathered(self.fabric, torch.stack(self.state.epoch[since:]))
        loss, hits, count = values.double().sum((0, 1)).tolist()
        return {"loss": loss / count, "accuracy": hits / count}

    def _log(self, epoch: int, step: int) -> str:
        """Write a line on the steps since the last one; returns why the run must stop."""
        state = self.state
        values = _gathered(self.fabric, torch.stack(state.epoch[state.logged :]))
        finite = values[..., 0].isfinite().all(0)
        if not finite.all():
            bad = step - len(finite) + int(finite.int().argmin()) + 1
            told = f"The loss of {self.name} is not finite at step {bad}"
        elif not all(bool(p.isfinite().all()) for p in self.network.parameters()):
            told = f"The parameters of {self.name} are not finite at step {step}"
        else:
            if step % self.job.log_steps == 0:
                self._write("step", epoch + 1, **self._means(state.logged))
                state.logged = len(state.epoch)
            return ""
        kept = "" if self.folder is None else f"; the last good checkpoint is in {self.folder}"
        return f"{told}; try a smaller learning_rate or gabor_learning_rate{kept}."

    def _write(self, kind: str, epoch: int, **measured: Any) -> dict[str, Any]:
        line = {
            "kind": kind,
            "variant": self.variant,
            "seed": self.seed,
            "epoch": epoch,
            "step": self.state.step,
            **measured,
            "displacement": self._displacement(),
        }
        self.journal.write(line, self.n_steps)
        return line

    def _evaluate(self, epoch: int) -> None:
        """Measure on the test images."""
        loss, accuracy = self._tested(self.network)
        measured = {**self._means(0), "test_loss": loss, "test_accuracy": accuracy}
        line = self._write("epoch", epoch, **measured)
        kept = {k: v for k, v in line.items() if k not in ("kind", "variant", "seed")}
        self.state.curve.append(kept)

    def _look(self, epoch: int) -> None:
        """Keep the filters as they are now."""
        state = self.state
        state.epochs.append(epoch)
        state.kernels.append(first_kernels(self.first)[:_MOST_FILTERS])
        if self.gabor is not None:
            state.params.append(self._params().as_dict())

    @torch.no_grad()
    def _tested(
        self, network: nn.Module, corruption: tuple[str, int] | None = None
    ) -> tuple[float, float]:
        """Loss and accuracy on the test images, each process taking its share."""
        fabric = self.fabric
        if fabric.world_size > 1:
            for buffer in network.buffers():  # such as running means, which the processes have
                torch.distributed.broadcast(buffer, 0)
        network.eval()
        total = torch.zeros(3, dtype=torch.float32)
        chunks = torch.arange(len(self.test_labels)).split(_EVALUATED)
        sums = []
        for number in range(fabric.global_rank, len(chunks), fabric.world_size):
            rows = chunks[number]
            if corruption is None:
                seen = self._seen(self.test_images, rows)
            else:
                # On the CPU, so that every machine meets the same images.
                clean = to_unit_range(self.test_images[rows.to(self.test_images.device)].cpu())
                worse = corrupt(clean, *corruption, seed=0, first=int(rows[0]))
                seen = self._normal(worse.to(fabric.device))
            labels = self.test_labels[rows.to(self.test_labels.device)]
            with fabric.autocast():
                scores = self._scores(network(seen)).float()
            loss = F.cross_entropy(scores, labels, reduction="sum")
            hits = (scores.argmax(1) == labels).sum()
            sums.append(torch.stack([loss, hits.float(), loss.new_tensor(float(len(rows)))]))
        if sums:
            total = torch.stack(sums).sum(0)
        values = _gathered(fabric, total.to(fabric.device)).double().sum(0)
        loss_sum, hit_sum, count = values.tolist()
        return loss_sum / count, hit_sum / count

    def _params(self) -> Gabor:
        params: Gabor = self.gabor.params.detach().to("cpu", torch.float32)
        return type(params)(**{name: v.clone() for name, v in params.as_dict().items()})

    def _displacement(self) -> dict[str, float]:
        """Median distance of every field from its start, over the filters."""
        if self.gabor is None or self.start is None:
            return {}
        params, fields = self._params(), {}
        for name, error in params.difference(self.start).items():
            if name != "center" or name in self.gabor.learn:
                distance = error.abs().double()
                # A wave that became a blob, or one that was, has no distance.
                # Not the mean: a filter that has become a plane wave has a sigma of any size.
                finite = distance[distance.isfinite()]
                fields[name] = finite.quantile(0.5).item() if len(finite) else math.nan
        return fields

    # -- end ----------------------------------------------------------------------------------

    def _finish(self, stopped: str) -> Run:
        recipe, state = self.job.recipe, self.state
        accuracy = accuracy_reset = None
        corrupted: dict[str, list[float]] = {}
        if stopped:
            warnings.warn(stopped, stacklevel=2)
            self.journal.write(
                {"kind": "stopped", "variant": self.variant, "seed": self.seed, "epoch": None,
                 "step": state.step, "reason": stopped},
                self.n_steps,
            )  # fmt: skip
        else:
            accuracy = state.curve[-1]["test_accuracy"]
            if self.gabor is not None and any(p.requires_grad for p in self.gabor.parameters()):
                accuracy_reset = self._tested(self._reset_filters())[1]
            for kind in recipe.corruption:
                corrupted[kind] = [
                    self._tested(self.network, (kind, strength))[1]
                    for strength in range(1, N_STRENGTHS + 1)
                ]
        params = None
        if self.start is not None:
            stacked = {
                name: torch.stack([p[name] for p in state.params]) for name in state.params[0]
            }
            params = type(self.start)(**stacked)
        return Run(
            variant=self.variant,
            seed=self.seed,
            accuracy=accuracy,
            corrupted=corrupted,
            accuracy_reset=accuracy_reset,
            n_first_parameters=n_learned(self.first),
            n_parameters=n_learned(self.network),
            curve=state.curve,
            epochs=state.epochs,
            kernels=torch.stack(state.kernels),
            params=params,
            seconds=self._seconds(),
            stopped=stopped,
        )

    def _keep(self, path: Path) -> None:
        """Write the network as it is now, for use."""
        data = self.job.dataset
        trained = Trained(
            network=self.network,
            recipe=self.job.recipe,
            variant=self.variant,
            seed=self.seed,
            inputs=Inputs(
                image_size=data.image_size,
                classes=data.classes,
                mean=tuple(self.mean.flatten().tolist()),
                std=tuple(self.std.flatten().tolist()),
            ),
        )
        save_trained(trained, path, start=self.job.start, own=self.job.model is not None)

    def _reset_filters(self) -> nn.Module:
        """A copy of the network whose Gabor filters are where they started."""
        network = copy.deepcopy(self.network)
        path = next(name for name, one in self.network.named_modules() if one is self.gabor)
        layer: Any = network.get_submodule(path)
        with warnings.catch_warnings():  # a start that is cut was told when it was made
            warnings.simplefilter("ignore")
            layer.params = self.start
        return network

    def _seconds(self) -> float:
        return self.state.seconds + time.monotonic() - self.begun

    # -- checkpoints --------------------------------------------------------------------------

    def _save(self) -> None:
        if self.folder is None:
            return
        state = self.state
        epoch = torch.stack(state.epoch) if state.epoch else torch.zeros(0, 3)
        # What each process has measured stays its own: sums in another order have other bits.
        epochs = _gathered(self.fabric, epoch.to(self.fabric.device))
        if not self.fabric.is_global_zero:
            return
        Checkpoints(self.folder).save(
            state.step,
            {
                "data": self.job.sha256,
                "step": state.step,
                "network": dict(self.network.state_dict()),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "curve": state.curve,
                "epochs": state.epochs,
                "kernels": state.kernels,
                "params": state.params,
                "seconds": self._seconds(),
                "epoch": epochs,
                "logged": state.logged,
                "metrics": self.journal.mark(),
            },
        )

    def _take_up(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        saved = None if self.folder is None else Checkpoints(self.folder).latest()
        if saved is None:
            return
        self._checked(saved)
        self.network.load_state_dict(saved["network"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        epochs = saved["epoch"]
        if len(epochs) == self.fabric.world_size:
            epoch = epochs[self.fabric.global_rank]
        else:
            # Once is enough, whoever has it.
            epoch = epochs.sum(0) * (self.fabric.global_rank == 0)
            if self.fabric.is_global_zero:
                warnings.warn(
                    f"{self.name} was begun on {len(epochs)} processes and goes on with "
                    f"{self.fabric.world_size}: the last digits will be others.",
                    stacklevel=2,
                )
        self.state = _State(
            step=saved["step"],
            curve=saved["curve"],
            epochs=saved["epochs"],
            kernels=saved["kernels"],
            params=saved["params"],
            seconds=saved["seconds"],
            epoch=list(epoch.to(self.fabric.device)),
            logged=saved["logged"],
        )
        self.journal.cut(saved["metrics"])

    def _checked(self, state: dict[str, Any]) -> dict[str, Any]:
        if state["data"] != self.job.sha256:
            raise ValueError(
                f"{str(self.folder)!r} was trained on other data of the name "
                f"{self.job.dataset.name!r}; choose another folder, or replace it with "
                "resume=False (--overwrite)."
            )
        return state


def _gathered(fabric: Any, values: Tensor) -> Tensor:
    """The values of every process: ``(processes, *shape)``, on the CPU."""
    if fabric.world_size == 1:
        return values[None].cpu()
    values = values.contiguous()
    every = [torch.empty_like(values) for _ in range(fabric.world_size)]
    torch.distributed.all_gather(every, values)
    return torch.stack(every).cpu()


def make_optimizers(module: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """The optimizers of a recipe: of the Gabor parameters of a module, and of all others.

    The module must be where it trains, and in the precision in which it does.

    Raises:
        ValueError: the recipe's ``gabor_learning_rate`` is none of its optimizer.
    """
    layers = [one for one in module.modules() if isinstance(one, GABOR_LAYERS)]
    gabor: list[Tensor] = [
        value for one in layers for name, value in one.named_parameters() if name != "bias"
    ]
    optimizers: list[torch.optim.Optimizer] = []
    groups: list[dict[str, Any]] = []
    if gabor and recipe.optimizer == "natural":
        rate = recipe.gabor_learning_rate
        if rate is not None and not rate <= 1:
            raise ValueError(
                f"gabor_learning_rate must be at most 1 with optimizer='natural', got {rate:g}."
            )
        natural = NaturalGradient(module, lr=1.0 if rate is None else rate)
        # What it leaves is for Adam.
        gabor = [value for group in natural.param_groups for value in group["params"]]
        optimizers.append(natural)
    elif gabor:
        rate = recipe.gabor_learning_rate
        rate = _ADAM_RATE if rate is None else rate
        groups.append({"params": gabor, "lr": rate, "weight_decay": 0.0})
    taken = set(map(id, gabor))
    others = [value for value in module.parameters() if id(value) not in taken]
    if others:
        groups.append({"params": others})
    # Decoupled, so that weight decay means the same whatever Adam makes of the gradient.
    adam = torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    return [*optimizers, adam]


def gabor_layer(module: nn.Module) -> nn.Module | None:
    """The first Gabor layer in a module, or ``None``."""
    return next((one for one in module.modules() if isinstance(one, GABOR_LAYERS)), None)


def first_kernels(layer: nn.Module) -> Tensor:
    """The kernels of a first layer now: ``(filters, channels, *size)``; of a pair the first one."""
    inner: Any = layer.pairs if isinstance(layer, PairEnergy) else layer
    kernels: Tensor = inner.weight.detach().to("cpu", torch.float32)
    return (kernels[::2] if getattr(layer, "output", "real") == "energy" else kernels).clone()


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
    # A channel that never changes says nothing, whatever it is divided by.
    return mean, torch.where(variance > 1e-12, variance, 1.0).sqrt()


def _spread(epochs: int, most: int) -> set[int]:
    """At most so many epochs, evenly from the first to the last, which is one of them.

    Example:
        >>> sorted(_spread(25, 4))
        [4, 11, 18, 25]
    """
    return set(range(epochs, 0, -math.ceil(epochs / most)))


def sample_order(seed: int, epoch: int, n: int) -> Tensor:
    """The order in which an epoch, counted from 0, goes through n samples."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(_key(seed, epoch)))


def _key(*parts: object) -> int:
    """A seed of a generator that no other parts give."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def digest(dataset: Dataset, model: nn.Module | None, start: Gabor | None = None) -> str:
    """SHA-256 of what a recipe does not say: the data, and a network or a start of the caller's."""
    found = hashlib.sha256()
    parts = {name: value for name, value in vars(dataset).items() if isinstance(value, Tensor)}
    if model is not None:
        found.update(repr(model).encode())
        parts |= model.state_dict()
    if start is not None:
        parts |= {f"start.{name}": value for name, value in start.as_dict().items()}
    for name, value in parts.items():
        found.update(repr((name, tuple(value.shape), value.dtype)).encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
