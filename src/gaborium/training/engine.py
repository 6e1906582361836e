"""The engine: follows a recipe on any number of processes, and goes on after a kill bit for bit."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from gaborium.errors import require
from gaborium.params import Gabor
from gaborium.training.checkpoints import RUN_FILE, load_state
from gaborium.training.datasets import Dataset, load_dataset
from gaborium.training.journal import Journal, Progress, claimed
from gaborium.training.recipe import Recipe
from gaborium.training.results import Run, TrainResult
from gaborium.training.trained import make_network
from gaborium.training.trainer import Job, Trainer, digest, make_optimizers


def train(
    recipe: Recipe,
    *,
    model: nn.Module | None = None,
    dataset: Dataset | None = None,
    start: Gabor | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = True,
    checkpoint_steps: int = 200,
    log_steps: int = 20,
    tensorboard: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train the networks of a recipe: for each of its first layers one for each seed.

    Convention:
        - both first layers of a seed get the same samples in the same order; the batches of an
          epoch differ in size by one image at most
        - images are brought to mean 0 and standard deviation 1 of the training images, channel
          by channel
        - killed and called again with the same arguments, it goes on from the last checkpoint,
          and ends with the same numbers to the last bit, on the same machine and as many processes

    With more than one device, the processes are started here; the calling script must then keep
    what it does under ``if __name__ == "__main__":``. Under ``torchrun`` they are there already.

    Args:
        recipe: what to train.
        model: a network of yours, instead of the one that the recipe names: any module that takes
            ``(batch, channels, *size)`` and returns ``(batch, classes)``, or a record with such
            ``logits``. It is not changed: each run trains a copy, in which a first layer of the
            recipe's kind and of the size of yours stands in for the first convolution.
        dataset: to train on, instead of the one that the recipe names.
        start: where the Gabor filters begin, instead of the recipe's start: a record of as many
            filters, ``(filters, channels or 1)``.
        folder: where checkpoints and ``metrics.jsonl`` go: a new folder, or that of an earlier
            call. By default nothing is written.
        resume: whether to go on with what ``folder`` holds; otherwise it is replaced.
        checkpoint_steps: steps between two checkpoints.
        log_steps: steps between two lines of ``metrics.jsonl``; there is one after each epoch too.
        tensorboard: write the lines for TensorBoard too, where it is installed.
        progress: called with each of these lines as it is written, on the way with ``n_steps``,
            the steps of the whole run.

    Returns:
        All runs. One whose loss stops being finite is stopped, and says so.

    Raises:
        ImportError: Lightning Fabric, safetensors or filelock is not installed.
        ValueError: the recipe cannot be followed with these data or on this machine; or the
            folder holds another recipe, or a damaged checkpoint.
        OSError: a file cannot be written or read; what is there stays. As ``FileExistsError``,
            the folder holds other work; as ``BlockingIOError``, another process works in it.

    Example:
        >>> from gaborium.training import Recipe, train
        >>> recipe = Recipe(data="digits", n_filters=4, kernel_size=5, epochs=1, seeds=(0,))
        >>> result = train(recipe)
        >>> [row["variant"] for row in result.to_table()]
        ['gabor', 'free']
    """
    for name, value in (("checkpoint_steps", checkpoint_steps), ("log_steps", log_steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if dataset is None:
        dataset = load_dataset(recipe.data, recipe.data_folder)
    for field in ("augmentation", "corruption"):
        if getattr(recipe, field) and dataset.n_dims != 2:
            raise ValueError(f"{field} is for images, and {dataset.name!r} has none; leave it out.")
    for variant in recipe.variants:  # what cannot be made is told before anything is written
        seed = recipe.seeds[0]
        data = dataset.subset(recipe.samples_per_class, seed)
        make_optimizers(make_network(recipe, model, data, variant, seed, start=start)[0], recipe)
    job = Job(
        recipe=recipe,
        model=model,
        dataset=dataset,
        start=start,
        sha256=digest(dataset, model, start),
        folder=None if folder is None else Path(folder).absolute(),
        resume=resume,
        checkpoint_steps=checkpoint_steps,
        log_steps=log_steps,
        tensorboard=tensorboard,
    )
    fabric, spawns = _fabric(recipe)
    if spawns:
        runs = _launched(fabric, job, progress)
    else:
        fabric.launch()
        runs = _work(fabric, job, progress)
    return TrainResult(
        recipe,
        tuple(runs),
        data={
            "name": dataset.name,
            "n_train": len(data.labels),
            "n_test": len(dataset.test_labels),
            "n_classes": dataset.n_classes,
            "image_size": list(dataset.image_size),
            "n_channels": dataset.images.shape[1],
            "sha256": job.sha256,
        },
    )


# -- processes ----------------------------------------------------------------------------------


def _fabric(recipe: Recipe) -> tuple[Any, bool]:
    """Fabric for this machine, and whether the processes are still to be started."""
    fabric = require("lightning_fabric", extra="train", purpose="Trainings")
    spawns = False
    options: dict[str, Any] = {"devices": recipe.devices}
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // local
        options = {"devices": local, "num_nodes": nodes, "strategy": "ddp"}
    elif recipe.devices > 1:
        spawns = True
        options["strategy"] = "ddp_spawn"
    try:
        made = fabric.Fabric(accelerator=recipe.accelerator, precision=recipe.precision, **options)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"accelerator={recipe.accelerator!r} with devices={recipe.devices} is not to be had "
            f"on this machine: {' '.join(str(error).split())}"
        ) from None
    return made, spawns


def _launched(fabric: Any, job: Job, progress: Progress | None) -> list[Run]:
    """Start the processes, and read what they found from their files."""
    context = torch.multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    with contextlib.ExitStack() as stack:
        if job.folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            job = replace(job, folder=Path(folder, "run"))
        queue = stack.enter_context(_passed_on(progress))
        try:
            fabric.launch(functools.partial(_spawned, job=job, queue=queue, errors=errors))
        except ProcessRaisedException:
            if errors.empty():
                raise
            raise errors.get() from None
        except ProcessExitedException as error:
            raise ChildProcessError(
                f"A process of the training ended early ({error}): for lack of memory, or because "
                "the script that calls train does so outside of if __name__ == '__main__'."
            ) from None
        return [
            Run.from_state(load_state(job.place(variant, seed) / RUN_FILE)["run"])
            for variant in job.recipe.variants
            for seed in job.recipe.seeds
        ]


def _spawned(fabric: Any, *, job: Job, queue: Any, errors: Any) -> None:
    try:
        _work(fabric, job, None if queue is None else queue.put)
    except (ImportError, OSError, TypeError, ValueError) as error:
        errors.put(error)
        raise


@contextlib.contextmanager
def _passed_on(progress: Progress | None) -> Iterator[Any]:
    """A queue whose lines are passed on to ``progress``, which itself cannot leave its process."""
    if progress is None:
        yield None
        return
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()

    def pass_on() -> None:
        while (line := queue.get()) is not None:
            progress(line)

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        queue.put(None)
        thread.join()


def _work(fabric: Any, job: Job, progress: Progress | None) -> list[Run]:
    """What every process does: all runs, one after the other."""
    recipe = job.recipe
    devices = [fabric.device] if fabric.device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        # The fastest algorithms of a GPU do not give the same bits twice.
        stack.enter_context(
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
        )
        first = fabric.is_global_zero
        if first and job.folder is not None:
            stack.enter_context(claimed(job.folder, recipe, resume=job.resume))
        fabric.barrier()
        journal = stack.enter_context(
            Journal.opened(
                job.folder if first else None,
                tensorboard=job.tensorboard,
                progress=progress if first else None,
            )
        )
        return [
            Trainer(fabric, job, journal, variant, seed).run()
            for variant in recipe.variants
            for seed in recipe.seeds
        ]
