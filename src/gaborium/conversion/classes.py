"""From numbers to a class: a list of rules, each a few thresholds, and the first that holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CLASSES = ("gabor", "edge", "blob", "centre-surround", "colour-contrast", "other", "noise")


class Test(NamedTuple):
    number: str
    threshold: float
    width: float
    above: bool = True

    def __call__(self, values: Tensor) -> Tensor:
        z = (values - self.threshold) / self.width
        return torch.sigmoid(z if self.above else -z)


RULES: tuple[tuple[str, tuple[Test, ...]], ...] = (
    ("noise", (Test("noise", 0.6, 0.1), Test("structure", 4.0, 1.0, False), Test("patch", 0.8, 0.05, False))),
    ("gabor", (Test("bar3", 0.25, 0.05), Test("osi", 0.45, 0.05), Test("explained_fair", 0.5, 0.05), Test("crossing", 0.3, 0.05, False))),
    ("colour-contrast", (Test("opponency", 0.6, 0.05), Test("oriented_lum", 0.2, 0.05, False), Test("patch", 0.75, 0.05, False))),
    ("edge", (Test("bar2", 0.4, 0.05), Test("osi", 0.3, 0.05), Test("explained_fair", 0.5, 0.05))),
    ("blob", (Test("patch", 0.7, 0.05),)),
    ("centre-surround", (Test("surround", 0.5, 0.05), Test("ring", 0.2, 0.05), Test("osi", 0.35, 0.05, False))),
)


def probabilities(numbers: dict[str, Tensor], rules=RULES) -> Tensor:
    left = torch.ones_like(numbers["explained"])
    out = {}
    for name, tests in rules:
        holds = torch.stack([t(numbers[t.number]) for t in tests]).prod(0)
        out[name] = left * holds
        left = left * (1 - holds)
    out["other"] = left
    return torch.stack([out[c] for c in CLASSES], -1)
