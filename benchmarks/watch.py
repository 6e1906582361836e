"""What does watching a Gabor layer add to a step of training?

    python benchmarks/watch.py
    python benchmarks/watch.py --rounds 5 --output /tmp/watch.json    # a quick look

Every round runs the same steps with and without a recorder, one after the other and each first as
often as the other, and gives one ratio. A loop that is watched by nobody runs twice, under two
names, to show what of a ratio is chance. What the recorder takes is less than that; so it is also
timed alone, as a share of the steps that nobody watches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _report import RESULTS, print_table, write_json
from layer import SHAPES, Shape, timed

from gaborium import GaborConv2d
from gaborium.diagnostics import watch

NOBODY = "not watched"
CONTESTANTS = {NOBODY: None, "not watched again": None, "every 11th step": 11, "every step": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "watch.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rows = [row for shape in SHAPES[:2] for row in compare(shape, options.rounds)]
    print_table(
        "Time of training steps over those that nobody watches: median of rounds (quartiles)",
        ["shape", "watched", "ratio", "quartiles", "recorder alone"],
        [
            [
                row["shape"],
                row["watched"],
                f"{row['ratio']:.3f}",
                f"({row['quartiles'][0]:.3f}, {row['quartiles'][1]:.3f})",
                f"{row['share_of_recorder']:.2%}",
            ]
            for row in rows
        ],
    )
    print()
    write_json(options.output, {"rounds": options.rounds, "speed": rows})


def compare(shape: Shape, rounds: int) -> list[dict]:
    loops = {name: Loop(shape, every) for name, every in CONTESTANTS.items()}
    names = list(loops)
    for name in names:
        timed(loops[name].step, "cpu", 2)  # warm up
    times: dict[str, list[float]] = {name: [] for name in names}
    alone: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            # Of 11 steps one is recorded, whichever is the first.
            times[name].append(timed(loops[name].step, "cpu", 11))
            alone[name].append(timed(loops[name].record, "cpu", 11))
    plain = torch.tensor(times[NOBODY], dtype=torch.float64)
    return [
        {
            "shape": str(shape),
            "watched": name,
            "ratio": quantile(torch.tensor(times[name], dtype=torch.float64) / plain, 0.5),
            "quartiles": [
                quantile(torch.tensor(times[name], dtype=torch.float64) / plain, q)
                for q in (0.25, 0.75)
            ],
            "share_of_recorder": quantile(
                torch.tensor(alone[name], dtype=torch.float64) / plain, 0.5
            ),
        }
        for name in names[1:]
    ]


def quantile(ratios: torch.Tensor, q: float) -> float:
    return round(ratios.quantile(q).item(), 5)


class Loop:
    """A first layer in training, watched or not."""

    def __init__(self, shape: Shape, every: int | None) -> None:
        torch.manual_seed(0)
        self.image = torch.randn(shape.batch, shape.in_channels, shape.size, shape.size)
        self.layer = GaborConv2d(
            shape.in_channels,
            shape.out_channels,
            shape.kernel_size,
            shape.stride,
            shape.kernel_size // 2,
            seed=0,
        )
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=1e-6)
        self.recorder = watch(self.layer, every) if every else None
        self.loss = torch.zeros(())

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss = self.layer(self.image).square().mean()
        self.loss.backward()
        self.optimizer.step()
        self.record()

    def record(self) -> None:
        if self.recorder is not None:
            self.recorder.record(self.loss)


if __name__ == "__main__":
    main()
