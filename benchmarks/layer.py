"""What does a Gabor layer cost beside nn.Conv2d, and does it begin with the same output scale?

    python benchmarks/layer.py
    python benchmarks/layer.py --device cuda
    python benchmarks/layer.py --rounds 3 --output /tmp/layer.json    # a quick look

Speeds are ratios, never times: every round runs all contestants, one after the other, and each is
divided by the plain layer of its own round, so that a machine that slows down slows all of them.
With one thread it is the process's own time that counts, so that other processes disturb it less. A
second nn.Conv2d among the contestants shows what of the ratio is chance.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from _report import RESULTS, print_table, write_json
from torch import Tensor, nn

from gaborium import GaborConv2d
from gaborium.starts import STARTS

SHORTEST_MEASUREMENT = 0.5  # s; faster steps are repeated until they take as long


class Shape(NamedTuple):
    """A first layer and its input."""

    batch: int
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    size: int

    def __str__(self) -> str:
        return (
            f"{self.batch} x {self.in_channels} x {self.size}², {self.in_channels}->"
            f"{self.out_channels}, k={self.kernel_size}, stride {self.stride}"
        )


SHAPES = [
    Shape(batch=32, in_channels=3, out_channels=64, kernel_size=11, stride=1, size=64),
    Shape(batch=8, in_channels=3, out_channels=64, kernel_size=7, stride=2, size=224),
    Shape(batch=8, in_channels=1, out_channels=96, kernel_size=31, stride=1, size=128),
]
CONTESTANTS: dict[str, Callable[..., nn.Module]] = {
    "nn.Conv2d": nn.Conv2d,
    "nn.Conv2d again": nn.Conv2d,
    "wavevector": lambda *args, **kwargs: GaborConv2d(*args, **kwargs, coordinates="wavevector"),
    "textbook": lambda *args, **kwargs: GaborConv2d(*args, **kwargs, coordinates="textbook"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--rounds", type=int, default=15, help="rounds per shape (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--output", type=Path, default=RESULTS / "layer.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    speed = [
        {"shape": str(shape), "work": work, **measured}
        for shape in SHAPES
        for work in ("training", "inference")
        for measured in compare(shape, work, options.device, options.rounds)
    ]
    print_table(
        "Time of a step over that of nn.Conv2d: median of rounds (quartiles)",
        ["shape", "work", "layer", "ratio", "quartiles"],
        [
            [
                row["shape"],
                row["work"],
                row["layer"],
                f"{row['ratio']:.3f}",
                f"({row['quartiles'][0]:.3f}, {row['quartiles'][1]:.3f})",
            ]
            for row in speed
        ],
    )
    variance = output_variance()
    print_table(
        "Variance of the outputs of a new layer, 64 filters, k=11: mean over filters",
        ["start", *variance],
        [
            [start, *(f"{variance[image][start]:.3f}" for image in variance)]
            for start in next(iter(variance.values()))
        ],
    )
    print()
    results = {"rounds": options.rounds, "speed": speed, "output_variance": variance}
    write_json(options.output, results, device=options.device)


def compare(shape: Shape, work: str, device: str, rounds: int) -> list[dict]:
    """Ratios to the plain layer's time, contestant by contestant."""
    torch.manual_seed(0)
    image = torch.randn(shape.batch, shape.in_channels, shape.size, shape.size, device=device)
    steps = {}
    for name, make in CONTESTANTS.items():
        layer = make(
            shape.in_channels,
            shape.out_channels,
            shape.kernel_size,
            shape.stride,
            shape.kernel_size // 2,
            device=device,
        )
        steps[name] = training_step(layer, image) if work == "training" else inference(layer, image)
    seconds = {name: timed(step, device, 1) for name, step in steps.items()}  # warm up
    seconds = {name: timed(step, device, 1) for name, step in steps.items()}
    repeats = max(1, round(SHORTEST_MEASUREMENT / seconds["nn.Conv2d"]))

    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        # Everybody is first as often as anybody else.
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(timed(steps[name], device, repeats))
    measured = torch.tensor([times[name] for name in names], dtype=torch.float64)
    ratios = measured / measured[0]
    return [
        {
            "layer": name,
            "ratio": round(row.quantile(0.5).item(), 4),
            "quartiles": [round(row.quantile(q).item(), 4) for q in (0.25, 0.75)],
        }
        for name, row in zip(names[1:], ratios[1:], strict=True)
    ]


def training_step(layer: nn.Module, image: Tensor) -> Callable[[], None]:
    """Forward, backward and a step of gradient descent, as of a network's first layer."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-6)
    # Stands for the rest of the network, at no cost.
    gradient = torch.randn_like(layer(image))

    def step() -> None:
        optimizer.zero_grad()
        layer(image).backward(gradient)
        optimizer.step()

    return step


def inference(layer: nn.Module, image: Tensor) -> Callable[[], None]:
    layer.eval()

    def step() -> None:
        with torch.inference_mode():
            layer(image)

    return step


def timed(step: Callable[[], None], device: str, repeats: int) -> float:
    """Seconds that ``repeats`` steps take, the work that a GPU has only queued included."""
    on_gpu = torch.device(device).type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    # Several threads would add up their times.
    clock = time.perf_counter if on_gpu or torch.get_num_threads() > 1 else time.process_time
    wait()
    begin = clock()
    for _ in range(repeats):
        step()
    wait()
    return clock() - begin


def output_variance(n_seeds: int = 4) -> dict[str, dict[str, float]]:
    """Mean variance of a filter's responses, by image and start."""
    torch.manual_seed(0)
    images = {"white noise": torch.randn(1, 1, 256, 256)}
    try:
        from skimage.data import camera
    except ImportError:
        print("Without scikit-image there is no photograph to measure.")
    else:
        photograph = torch.from_numpy(camera()).float()[None, None]
        images["photograph"] = (photograph - photograph.mean()) / photograph.std()

    def variance(make: Callable[[int], nn.Module], image: Tensor) -> float:
        with torch.inference_mode():
            responses = torch.cat([make(seed)(image)[0] for seed in range(n_seeds)])
        return round(responses.flatten(1).var(1).mean().item(), 4)

    def plain(_: int) -> nn.Module:
        return nn.Conv2d(1, 64, 11)

    def gabor(start: str) -> Callable[[int], nn.Module]:
        return lambda seed: GaborConv2d(1, 64, 11, start=start, seed=seed)

    makers = {"nn.Conv2d": plain} | {start: gabor(start) for start in STARTS}
    return {
        name: {label: variance(make, image) for label, make in makers.items()}
        for name, image in images.items()
    }


if __name__ == "__main__":
    main()
