"""Is the converted first layer of a trained network a good start for another task?

    python benchmarks/second_task.py                          # all; it goes on where it stopped
    python benchmarks/second_task.py --quick --output /tmp/look

A small CNN with 32 first kernels of 9 px is trained on Fashion-MNIST and its first layer converted,
every filter, by its responses. New small CNNs then learn a second task from few images, 400 steps
each: MNIST with 100 images, and the texture patches of ``gaborium train`` with 180. They begin with
that layer, or with a fresh one: Gabor functions of the good bank or drawn at random, learned and
fixed; and an ordinary layer, fresh or with the kernels of the first task. All that lies behind is
fresh and the same. Rates are those that were chosen most often in ``benchmarks/learning``.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _report import RESULTS, parsed, print_table, provenance, write_json
from convert import EPOCHS, N_CALIBRATE, RATE, Data, small_cnn, trained
from learning.data import load
from torch import Tensor, nn

from gaborium import convert
from gaborium.layers import GABOR_LAYERS
from gaborium.training import SmallCNN, make_first_layer

FIRST = "fashion-mnist"
TASKS = {"mnist": 10, "textures": 20}  # and images of each class
SEEDS = range(5)
N_STEPS, BATCH, GABOR_RATE = 400, 50, 0.02
SIZES: dict[str, Any] = {"n_dims": 2, "in_channels": 1, "n_filters": 32, "kernel_size": 9}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options = parsed(parser, quick="next to no training")
    torch.set_num_threads(1)
    path = (options.output or RESULTS) / "second_task.json"
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    first = Data(FIRST, options)
    seconds = {name: Second(name, options) for name in TASKS}
    for seed in SEEDS[:2] if options.quick else SEEDS:
        if any(row["seed"] == seed for row in rows):
            continue
        network = small_cnn(FIRST, 9, seed)
        trained(network, first, 1 if options.quick else EPOCHS[FIRST], RATE, seed)
        for task, data in seconds.items():
            for name, make in starts(network.eval(), first.images[:N_CALIBRATE], seed).items():
                row = {
                    "task": task,
                    "start": name,
                    "seed": seed,
                    "accuracy": data.accuracy(make(), seed, 2 if options.quick else N_STEPS),
                    "commit": provenance()["commit"],
                }
                rows.append(row)
                print(*row.values(), flush=True)
        write_json(path, {"rows": rows}, say=False)
    show(rows)


def starts(network: Any, images: Tensor, seed: int) -> dict[str, Callable[[], nn.Module]]:
    """First layers of the second task, by name."""
    everything = range(len(network.first.weight))
    found = convert(network, calibrate=images, filters=everything).layer

    def converted(learned: bool) -> nn.Module:
        # Its bias kept the means for a network that is not there any more.
        layer: Any = copy.deepcopy(found)
        layer.bias = None
        return layer.requires_grad_(learned)

    def fresh(kind: str, **options: Any) -> nn.Module:
        return make_first_layer(kind, **SIZES, **options, seed=1000 + seed)

    return {
        "learned, converted": lambda: converted(True),
        "learned, bank": lambda: fresh("gabor", start="bank"),
        "learned, random": lambda: fresh("gabor", start="random"),
        "fixed, converted": lambda: converted(False),
        "fixed, bank": lambda: fresh("gabor-fixed", start="bank"),
        "fixed, random": lambda: fresh("gabor-fixed", start="random"),
        "free, of the first task": lambda: copy.deepcopy(network.first),
        "free, fresh": lambda: fresh("free"),
    }


class Second:
    """A task with few images to learn from."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.data = load(name, options.data)
        self.n, self.last = TASKS[name], 500 if options.quick else None

    def accuracy(self, first: nn.Module, seed: int, n_steps: int) -> float:
        """On the test images, of a network that was trained behind a first layer."""
        some = self.data.subset(self.n, seed)
        mean, std = some.images.float().mean(), some.images.float().std()
        images, labels = (some.images.float() - mean) / std, some.labels
        network = SmallCNN(
            first, self.data.n_classes, image_size=self.data.image_size, seed=seed
        ).train()
        gabor = list(first.parameters()) if isinstance(first, GABOR_LAYERS) else []
        others = [p for p in network.parameters() if not any(p is q for q in gabor)]
        optimizer = torch.optim.AdamW(
            [{"params": others}, {"params": gabor, "lr": GABOR_RATE, "weight_decay": 0.0}], lr=RATE
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
        draw = torch.Generator().manual_seed(seed)
        rows: list[int] = []
        for _ in range(n_steps):
            if len(rows) < BATCH:
                rows = torch.randperm(len(labels), generator=draw).tolist()
            now, rows = rows[:BATCH], rows[BATCH:]
            optimizer.zero_grad()
            F.cross_entropy(network(images[now]), labels[now]).backward()
            optimizer.step()
            schedule.step()
        network.eval()
        hits = 0
        with torch.no_grad():
            for part, answer in zip(
                self.data.test_images[: self.last].split(500),
                self.data.test_labels[: self.last].split(500),
                strict=True,
            ):
                hits += (network((part.float() - mean) / std).argmax(1) == answer).sum().item()
        return hits / len(self.data.test_labels[: self.last])


def show(rows: list[Row]) -> None:
    for task, n in TASKS.items():
        own: dict[str, dict[int, float]] = {}
        for row in rows:
            if row["task"] == task:
                own.setdefault(row["start"], {})[row["seed"]] = row["accuracy"]
        table = []
        for name, values in sorted(own.items(), key=lambda item: -np.mean(list(item[1].values()))):
            over = [
                _mean([values[seed] - own[other][seed] for seed in values], "+")
                for other in ("learned, bank", "free, fresh")
            ]
            table.append([name, str(len(values)), _mean(list(values.values())), *over])
        header = ("first layer", "seeds", "accuracy", "over learned, bank", "over free, fresh")
        print_table(f"{task}, {n} images of each class", header, table)


def _mean(values: list[float], sign: str = "") -> str:
    percents = 100 * np.array(values)
    error = percents.std(ddof=1) / len(percents) ** 0.5 if len(percents) > 1 else 0.0
    return f"{percents.mean():{sign}.1f} ± {error:.1f}"


if __name__ == "__main__":
    main()
