"""What does it cost to convert the first layer of a trained network to Gabor functions?

    python benchmarks/convert.py                          # all; it goes on where it stopped
    python benchmarks/convert.py --only fashion           # those with this in their names
    python benchmarks/convert.py --quick --output /tmp/look

Small CNNs with first kernels of 7, 9 and 11 px on Fashion-MNIST and CIFAR-10, and a ResNet of
transformers with its 7 px stem on CIFAR-10, are trained as ordinary networks. Then their first
layer is converted: where its kernels are explained well enough (default threshold), or the
responses to 512 training images (no labels), or every filter whatever it explains. Measured on the
test images: the accuracy at once, also with batch norms as they were, and after one further epoch,
in which the network that was not converted is trained too.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _report import RESULTS, parsed, print_table, provenance, write_json
from learning.data import load
from torch import Tensor, nn

from gaborium import convert
from gaborium.training import SmallCNN, make_first_layer

BATCH, RATE, DECAY = 128, 3e-3, 0.05
EPOCHS = {"fashion-mnist": 4, "cifar10": 8}
N_TRAIN = 20_000
SEEDS = (0, 1, 2)
N_CALIBRATE = 512
FURTHER_RATE = 5e-4  # of the further epoch
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="networks with this in their names")
    options = parsed(parser, quick="next to no training")
    torch.set_num_threads(1)
    path = (options.output or RESULTS) / "convert.json"
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    for seed in SEEDS[: 1 if options.quick else None]:
        for name, (data, make) in NETWORKS.items():
            if options.only not in name or any(
                (row["network"], row["seed"]) == (name, seed) for row in rows
            ):
                continue
            rows += measured(name, Data(data, options), make, seed)
            write_json(path, {"rows": rows}, say=False)
    show(rows)


class Data:
    """Images with mean 0 and deviation 1, some to train with."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        data = load(name, options.data)
        n = 640 if options.quick else N_TRAIN
        chosen = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))[:n]
        images = data.images[chosen].float()
        mean, std = (f((0, 2, 3), keepdim=True) for f in (images.mean, images.std))
        self.images, self.labels = (images - mean) / std, data.labels[chosen]
        n_test = 500 if options.quick else None
        self.test_images = (data.test_images[:: 20 if n_test else 1].float() - mean) / std
        self.test_labels = data.test_labels[:: 20 if n_test else 1]
        self.epochs = 1 if options.quick else EPOCHS[name]

    def batches(self, epoch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(1000 * seed + epoch)
        for rows in torch.randperm(len(self.labels), generator=draw).split(BATCH):
            yield self.images[rows], self.labels[rows]


def small_cnn(data: str, kernel_size: int, seed: int) -> nn.Module:
    channels, side = (1, 28) if data == "fashion-mnist" else (3, 32)
    first = make_first_layer(
        "free", n_dims=2, in_channels=channels, n_filters=32, kernel_size=kernel_size, seed=seed
    )
    return SmallCNN(first, 10, image_size=(side, side), seed=seed)


def resnet(seed: int) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1]}
    config = ResNetConfig(**sizes, layer_type="basic", num_labels=10)
    return ResNetForImageClassification(config)


NETWORKS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    **{
        f"{data}, small CNN, {k} px": (data, lambda seed, data=data, k=k: small_cnn(data, k, seed))
        for data in EPOCHS
        for k in (7, 9, 11)
    },
    "cifar10, ResNet stem, 7 px": ("cifar10", resnet),
}


def measured(name: str, data: Data, make: Callable[[int], nn.Module], seed: int) -> list[Row]:
    begin = time.process_time()
    network = make(seed)
    trained(network, data, data.epochs, RATE, seed)
    calm = network.eval()
    before = accuracy(network, data)
    further = copy.deepcopy(network)
    trained(further, data, 1, FURTHER_RATE, seed + 50)
    stayed = accuracy(further, data)
    images = data.images[:N_CALIBRATE]
    everything = range(len(next(network.parameters())))
    rows = []
    for how, options in (
        ("kernels", {}),
        ("responses", {"calibrate": images}),
        ("responses, all filters", {"calibrate": images, "filters": everything}),
    ):
        conversion = convert(calm, **options)
        kept = conversion
        if "calibrate" in options:
            kept = convert(calm, **options, adapt_norms=False)
        row = {
            "network": name,
            "seed": seed,
            "how": how,
            "share": conversion.is_gabor.double().mean().item(),
            "explained": conversion.fit.explained_variance.median().item(),
            "n_first_parameters": conversion.n_first_parameters,
            "accuracy_before": before,
            "accuracy_after": accuracy(conversion.model, data),
            "accuracy_norms_kept": accuracy(kept.model, data),
            "accuracy_before_further": stayed,
        }
        trained(conversion.model, data, 1, FURTHER_RATE, seed + 50)
        row["accuracy_after_further"] = accuracy(conversion.model, data)
        row["commit"] = provenance()["commit"]
        rows.append(row)
        print(f"{time.process_time() - begin:5.0f} s", *row.values(), flush=True)
    return rows


def scores(network: nn.Module, images: Tensor) -> Tensor:
    output = network(images)
    return output if isinstance(output, Tensor) else output.logits


def trained(network: nn.Module, data: Data, epochs: int, rate: float, seed: int) -> None:
    """AdamW with a rate that falls to 0 along half a cosine."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=DECAY)
    n_steps = epochs * -(-len(data.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for epoch in range(epochs):
        for images, labels in data.batches(epoch, seed):
            optimizer.zero_grad()
            F.cross_entropy(scores(network, images), labels).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(network: nn.Module, data: Data) -> float:
    network.eval()
    hits = [
        (scores(network, images).argmax(1) == labels).sum().item()
        for images, labels in zip(
            data.test_images.split(500), data.test_labels.split(500), strict=True
        )
    ]
    return sum(hits) / len(data.test_labels)


def show(rows: list[Row]) -> None:
    table = []
    for name in dict.fromkeys(row["network"] for row in rows):
        for how in dict.fromkeys(row["how"] for row in rows):
            some = [row for row in rows if (row["network"], row["how"]) == (name, how)]
            if not some:
                continue

            def mean(key: str, less: str | None = None, some: list[Row] = some) -> str:
                values = [100 * (row[key] - (row[less] if less else 0)) for row in some]
                error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
                return f"{np.mean(values):{'+' if less else ''}.1f} ± {error:.1f}"

            first, last = (np.mean([row["n_first_parameters"][i] for row in some]) for i in (0, 1))
            table.append(
                [
                    name,
                    how,
                    str(len(some)),
                    mean("share"),
                    mean("accuracy_before"),
                    mean("accuracy_after", "accuracy_before"),
                    mean("accuracy_norms_kept", "accuracy_before"),
                    mean("accuracy_after_further", "accuracy_before"),
                    mean("accuracy_after_further", "accuracy_before_further"),
                    f"{first:.0f} -> {last:.0f}",
                ]
            )
    header = (
        *("network", "fitted", "seeds", "% Gabor", "accuracy", "converted", "norms kept"),
        *("and an epoch", "over the free one's epoch", "numbers in the layer"),
    )
    print_table("Accuracy in percent, changes in points, with standard errors", header, table)


if __name__ == "__main__":
    main()
