"""How well does ``census`` agree with two passes by eye, and how Gabor-like are trained networks?

    python benchmarks/census/run.py                # benchmarks/results/census.json
    python benchmarks/census/run.py --calibrate    # and the weights of the stages, made again

Filters of 15 networks were sorted by eye twice (``labels.csv``; GUIDE.md says how, ``sheets.py``
draws the pictures). Half of them, chosen by a hash of network and number, and planted filters
(``planted.py``) set the weights in ``gaborium.conversion.census``; the other half judges. Beside
it stands what the same numbers do on a network that took no part: weights made without it.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from _report import RESULTS, ROOT, print_table, write_json
from planted import planted

from gaborium import Census, census
from gaborium.conversion.census import CLASSES, DEAD, STAGES, Stages, probabilities, term

LABELS = Path(__file__).resolve().parent / "labels.csv"
PLANTED_WEIGHT = 0.2  # of a planted filter, beside 1 of one that both passes were certain of
# The last stage parts what is rare in networks, and rests on planted filters first of all.
WEIGHT_IN_LAST = 1.0
RIDGE = 0.002
# What each stage looks at, in the order in which they are asked.
TERMS = {
    "noise": ("explained", "surround", "noise"),
    "gabor": ("third_bar", "selectivity", "crossing", "even"),
    "colour-contrast": ("opponency", "constant", "one_colour", "oriented_luminance"),
    "edge": ("selectivity", "third_bar", "blob - gabor", "even"),
    "blob": ("third_bar", "constant", "crossing"),
    "centre-surround": ("surround - two_waves",),
}


class Label(NamedTuple):
    network: str
    filter: int
    passes: tuple[str, str]
    sure: tuple[int, int]
    final: str


class Sample(NamedTuple):
    """Filters to set weights by: numbers, the share of each class, and what each counts."""

    numbers: dict[str, Tensor]
    shares: Tensor
    weight: Tensor
    is_planted: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--calibrate", action="store_true", help="make the weights again")
    parser.add_argument("--n-planted", type=int, default=6, help="of each class, size and colour")
    parser.add_argument("--keep", type=Path, help="folder of censuses, to be taken once only")
    parser.add_argument("--output", type=Path, default=RESULTS / "census.json")
    options = parser.parse_args()
    torch.set_num_threads(1)

    labels = read_labels()
    found = {
        name: take(options.data, name, options.keep)
        for name in sorted({one.network for one in labels})
    }
    first = [one for one in labels if not is_judge(one)]
    judges = [one for one in labels if is_judge(one)]
    made = plant(options.n_planted, options.keep, seed=1)
    if options.calibrate:
        stages = calibrate([sample_of(first, found), *made])
        print("\n".join(f'    "{label}": {stage},' for label, stage in stages.items()), flush=True)
    else:
        stages = STAGES

    results: dict[str, Any] = {
        "classes": CLASSES,
        "n_labelled": len(labels),
        "n_calibration": len(first),
        "n_judge": len(judges),
        "between_passes": agreement(
            [one.passes[0] for one in judges], [one.passes[1] for one in judges]
        ),
        "between_passes_all": agreement(
            [one.passes[0] for one in labels], [one.passes[1] for one in labels]
        ),
    }
    answers = answers_of(judges, found, stages)
    finals = [one.final for one in judges]
    results["judge"] = agreement(finals, answers) | {
        "confusion": confusion(finals, answers),
        "by_class": by_class(finals, answers),
        "against_pass_1": agreement([one.passes[0] for one in judges], answers),
        "against_pass_2": agreement([one.passes[1] for one in judges], answers),
        "gabor_or_not": agreement(
            [gabor_or_not(label) for label in finals], [gabor_or_not(label) for label in answers]
        ),
    }
    results["calibration"] = agreement(
        [one.final for one in first], answers_of(first, found, stages)
    )
    results["left_out_network"] = left_out(labels, found, made)
    fresh = plant(options.n_planted, options.keep, seed=2)
    truth = [CLASSES[i] for part in fresh for i in part.shares.argmax(1).tolist()]
    told = [CLASSES[i] for part in fresh for i in probabilities(part.numbers, stages).argmax(1)]
    results["planted"] = agreement(truth, told) | {"by_class": by_class(truth, told)}
    results["networks"] = {
        name: {
            "n_filters": len(one),
            "counts": one.counts,
            "share_of_gabor": round(one.counts["gabor"] / len(one), 4),
            "share_of_gabor_by_eye": by_eye(labels, name),
            "share_explained_over_0.8": round(
                (one.fit.explained_variance > 0.8).double().mean().item(), 4
            ),
        }
        for name, one in found.items()
    }
    show(results)
    write_json(options.output, results)


# -- data -------------------------------------------------------------------------------------


def read_labels() -> list[Label]:
    with LABELS.open(newline="", encoding="utf-8") as file:
        return [
            Label(
                row["network"],
                int(row["filter"]),
                (row["pass1"], row["pass2"]),
                (int(row["sure1"]), int(row["sure2"])),
                row["final"],
            )
            for row in csv.DictReader(file)
        ]


def is_judge(label: Label) -> bool:
    """Whether a filter judges, or sets weights: by a hash, so that nobody has chosen."""
    text = f"{label.network}/{label.filter}"
    return hashlib.sha256(text.encode()).digest()[0] % 2 == 1


def take(data: Path, network: str, keep: Path | None) -> Census:
    with np.load(data / "kernels" / f"{network}.npz") as file:
        kernels = torch.from_numpy(file["weights"])
    return counted(kernels, network, keep)


def counted(kernels: Tensor, name: str, keep: Path | None) -> Census:
    """The census, from a file where there is one."""
    path = None if keep is None else keep / f"{name}.safetensors"
    if path is not None and path.is_file():
        one = Census.load(path)
        # The stages may be others now; the numbers are the same.
        shares = probabilities(one.numbers)
        dead = one.numbers["strength"] <= DEAD
        chosen = shares.argmax(1).masked_fill(dead, CLASSES.index("noise"))
        labels = tuple(CLASSES[i] for i in chosen.tolist())
        return dataclasses.replace(one, labels=labels, probability=shares)
    one = census(kernels)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        one.save(path)
    return one


def sample_of(labels: Sequence[Label], found: dict[str, Census]) -> Sample:
    """Filters of networks. A pass counts as it was sure: 1, 2/3, or 1/3 for a guess."""
    numbers = {
        name: torch.stack([found[one.network].numbers[name][one.filter] for one in labels])
        for name in next(iter(found.values())).numbers
    }
    shares = torch.zeros(len(labels), len(CLASSES), dtype=torch.float64)
    for i, one in enumerate(labels):
        for label, sure in zip(one.passes, one.sure, strict=True):
            shares[i, CLASSES.index(label)] += (1 + sure) / 6
    weight = shares.sum(1)
    return Sample(numbers, shares / weight.unsqueeze(1), weight, False)


def plant(n: int, keep: Path | None, *, seed: int) -> list[Sample]:
    samples = []
    for size in (5, 7, 9, 11):
        for channels in (1, 3):
            labels = [c for c in CLASSES if c != "colour-contrast" or channels > 1]
            start = 10_000 * seed + 100 * size + 10 * channels
            kernels = [
                planted(label, n, size, channels, seed=start + place)
                for place, label in enumerate(labels)
            ]
            shares = torch.zeros(n * len(labels), len(CLASSES), dtype=torch.float64)
            for i in range(len(shares)):
                shares[i, CLASSES.index(labels[i // n])] = 1.0
            weight = torch.full((len(shares),), PLANTED_WEIGHT)
            one = counted(torch.cat(kernels), f"planted-{seed}-{n}-{size}-{channels}", keep)
            samples.append(Sample(one.numbers, shares, weight, True))
    return samples


# -- calibration ------------------------------------------------------------------------------


def calibrate(samples: Sequence[Sample]) -> Stages:
    """Logistic regressions, one after the other, each on what earlier stages leave."""
    shares = torch.cat([sample.shares for sample in samples])
    weight = torch.cat([sample.weight.double() for sample in samples])
    is_planted = torch.cat([torch.full_like(s.weight, s.is_planted).bool() for s in samples])
    rest, counts, stages = torch.ones_like(weight), weight, {}
    for label, names in TERMS.items():
        x = torch.cat(
            [torch.stack([term(sample.numbers, n) for n in names], 1) for sample in samples]
        )
        here = rest > 1e-9
        yes = shares[here, CLASSES.index(label)] / rest[here]
        if label == list(TERMS)[-1]:
            counts = torch.where(is_planted, WEIGHT_IN_LAST, weight)
        slopes, constant = logistic(x[here], yes, (counts * rest)[here])
        rounded = [round(slope, 2) for slope in slopes]
        stages[label] = round(constant, 2), dict(zip(names, rounded, strict=True))
        rest = rest - shares[:, CLASSES.index(label)]
    return stages


def logistic(x: Tensor, yes: Tensor, weight: Tensor) -> tuple[list[float], float]:
    """Ridge on standardised numbers, so that no unit is preferred."""
    mean, scale = x.mean(0), x.std(0)
    z = (x - mean) / scale
    slopes = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    constant = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [slopes, constant], max_iter=500, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        misfit = torch.nn.functional.binary_cross_entropy_with_logits(
            z @ slopes + constant, yes, weight=weight / weight.mean()
        )
        value = misfit + RIDGE * slopes.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    raw = (slopes / scale).detach()
    return raw.tolist(), (constant.detach() - (mean * raw).sum()).item()


# -- agreement --------------------------------------------------------------------------------


def answers_of(labels: Sequence[Label], found: dict[str, Census], stages: Stages) -> list[str]:
    """Classes by the stages alone: the pictures that were sorted do not show dead weights."""
    shares = probabilities(sample_of(labels, found).numbers, stages)
    return [CLASSES[i] for i in shares.argmax(1).tolist()]


def left_out(
    labels: Sequence[Label], found: dict[str, Census], made: list[Sample]
) -> dict[str, float]:
    """Every network judged by weights that were made without any filter of it."""
    finals, answers = [], []
    for network in found:
        own = [one for one in labels if one.network == network]
        others = [one for one in labels if one.network != network and not is_judge(one)]
        stages = calibrate([sample_of(others, found), *made])
        finals += [one.final for one in own]
        answers += answers_of(own, found, stages)
    return agreement(finals, answers)


def agreement(one: Sequence[str], other: Sequence[str]) -> dict[str, float]:
    """Share of equal answers, and Cohen's kappa: the same less what chance would give."""
    n, labels = len(one), sorted({*one, *other})
    same = sum(a == b for a, b in zip(one, other, strict=True)) / n
    first, second = Counter(one), Counter(other)
    chance = sum(first[label] * second[label] for label in labels) / n**2
    return {"accuracy": round(same, 4), "kappa": round((same - chance) / (1 - chance), 4)}


def confusion(truth: Sequence[str], told: Sequence[str]) -> list[list[int]]:
    counts = Counter(zip(truth, told, strict=True))
    return [[counts[row, column] for column in CLASSES] for row in CLASSES]


def by_class(truth: Sequence[str], told: Sequence[str]) -> dict[str, dict[str, float | None]]:
    right = Counter(a for a, b in zip(truth, told, strict=True) if a == b)
    there, called = Counter(truth), Counter(told)
    return {
        label: {
            "n": there[label],
            "precision": round(right[label] / called[label], 4) if called[label] else None,
            "recall": round(right[label] / there[label], 4) if there[label] else None,
        }
        for label in CLASSES
    }


def gabor_or_not(label: str) -> str:
    return label if label == "gabor" else "not"


def by_eye(labels: Sequence[Label], network: str) -> float:
    own = [one.final for one in labels if one.network == network]
    return round(own.count("gabor") / len(own), 4)


def show(results: dict[str, Any]) -> None:
    judge = results["judge"]
    print_table(
        f"Agreement on {results['n_judge']} filters that set no weight",
        ("", "accuracy", "kappa"),
        [
            (name, f"{one['accuracy']:.3f}", f"{one['kappa']:.3f}")
            for name, one in (
                ("census and final label", judge),
                ("census and first pass", judge["against_pass_1"]),
                ("census and second pass", judge["against_pass_2"]),
                ("the two passes", results["between_passes"]),
                ("Gabor or not", judge["gabor_or_not"]),
                ("on the other half", results["calibration"]),
                ("network left out, all filters", results["left_out_network"]),
                ("fresh planted filters", results["planted"]),
            )
        ],
    )
    print_table(
        "Rows: by eye. Columns: census",
        ("", *CLASSES),
        [(label, *map(str, row)) for label, row in zip(CLASSES, judge["confusion"], strict=True)],
    )
    print_table(
        "By class",
        ("", "n", "precision", "recall"),
        [
            (label, *("-" if one[key] is None else f"{one[key]:g}" for key in one))
            for label, one in judge["by_class"].items()
        ],
    )
    print_table(
        "Networks: filters of each class, in %",
        ("", "filters", *CLASSES, "gabor by eye", "R² > 0.8"),
        [
            (
                name,
                str(one["n_filters"]),
                *(f"{100 * n / one['n_filters']:.0f}" for n in one["counts"].values()),
                f"{100 * one['share_of_gabor_by_eye']:.0f}",
                f"{100 * one['share_explained_over_0.8']:.0f}",
            )
            for name, one in results["networks"].items()
        ],
    )


if __name__ == "__main__":
    main()
