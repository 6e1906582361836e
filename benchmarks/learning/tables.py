"""Print the tables of the documentation from the means in benchmarks/results/learning_*.json.

python benchmarks/learning/tables.py              # what learning brings, a line for each task
python benchmarks/learning/tables.py few starts   # all variants of these experiments
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from _report import RESULTS
from plans import EXPERIMENTS

NAMES = {
    "free": "free",
    "mixed, bank": "half learned, half free, bank",
    **{
        f"{how}, {start}": f"{told}, {start}"
        for how, told in (
            ("adam", "learned by Adam"),
            ("natural", "learned by the natural gradient"),
            ("fixed", "fixed"),
        )
        for start in ("bank", "random", "equal", "mel")
    },
}
OTHERS = {
    "free": "over free",
    "fixed, bank": "over the fixed bank",
    "fixed, mel": "over the fixed mel bank",
    "fixed, random": "over fixed random",
}
UNITS = {"orientation": (180 / math.pi, "°"), "wavelength": (1, " px"), "sigma": (1, " px")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("experiments", nargs="*")
    experiments = parser.parse_args().experiments
    if not experiments:
        table(overview())
    for name in experiments:
        document = results_of(name)
        for part in document["parts"]:
            print(f"\n{part['name']}\n")
            table(compared(part))
            if any("corrupted" in one for one in part["variants"].values()):
                print()
                table(corrupted(part["variants"]))
            if any("similarity" in one for one in part["variants"].values()):
                print()
                table(similarity(part["variants"]))
        for data, parts in by_samples(document["parts"]).items():
            print(f"\n{data}, by the number of samples\n")
            table(of_all_sizes(parts))


def results_of(experiment: str) -> dict[str, Any]:
    path = RESULTS / f"learning_{experiment}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def overview() -> list[list[str]]:
    """For each task: what is gained by Gabor functions, and what by learning them, with Adam."""
    rows = [
        [
            *("task", "fixed bank over free", "learned over fixed bank"),
            *("learned over fixed random", "learned from random over fixed bank"),
        ]
    ]
    done = [name for name in EXPERIMENTS if (RESULTS / f"learning_{name}.json").exists()]
    for name in done:
        for part in results_of(name)["parts"]:
            variants = part["variants"]
            if "corrupted" in part["name"]:  # the same networks as those beside it
                continue
            bank = "mel" if "adam, mel" in variants else "bank"
            pairs = (
                *((f"fixed, {bank}", "free"), (f"adam, {bank}", f"fixed, {bank}")),
                *(("adam, random", "fixed, random"), ("adam, random", f"fixed, {bank}")),
            )
            differences = [
                told(variants.get(one, {}).get(f"difference to {two}"), "+") for one, two in pairs
            ]
            rows.append([part["name"], *differences])
    return rows


def ordered(variants: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(variants.items(), key=lambda variant: -variant[1]["accuracy"]["mean"])


def by_samples(parts: list[Any]) -> dict[str, dict[int, Any]]:
    """Data sets of which several parts differ in the number of samples alone, smallest first."""
    found: dict[str, dict[int, Any]] = {}
    for part in parts:
        recipe = part["recipe"]
        if recipe["samples_per_class"] and "corrupted" not in part["name"]:
            n = next(iter(part["variants"].values()))["n_train"]
            found.setdefault(f"{recipe['data']}, {recipe['network']}", {})[n] = part["variants"]
    return {data: dict(sorted(sizes.items())) for data, sizes in found.items() if len(sizes) > 2}


def of_all_sizes(parts: dict[int, Any]) -> list[list[str]]:
    """Accuracies, in brackets the difference to the free layer, for each number of samples."""
    rows = [["first layer, start", *(f"{n} images" for n in parts), "numbers learned in it"]]
    for name, last in ordered(list(parts.values())[-1]):
        cells = []
        for variants in parts.values():
            difference = (
                told(variants[name].get("difference to free"), "+") if name in variants else ""
            )
            cells.append(
                told(variants[name]["accuracy"]) + (f" ({difference})" if difference else "")
            )
        rows.append([NAMES[name], *cells, str(last["n_first_parameters"])])
    return rows


def compared(part: dict[str, Any]) -> list[list[str]]:
    variants = ordered(part["variants"])
    fields = [
        name for name in UNITS if any(name in one.get("displacement", ()) for _, one in variants)
    ]
    unit = " samples" if part["recipe"]["data"] == "spoken-digits" else " px"
    rows = [
        [
            *("first layer, start", "accuracy", *OTHERS.values()),
            *(f"{', '.join(fields)} moved by", "put back", "numbers learned in it"),
        ]
    ]
    for name, one in variants:
        differences = [told(one.get(f"difference to {other}"), "+") for other in OTHERS]
        moves = moved(one.get("displacement"), fields).replace(" px", unit)
        back, numbers = told(one.get("accuracy_reset")), str(one["n_first_parameters"])
        rows.append([NAMES[name], told(one["accuracy"]), *differences, moves, back, numbers])
    return rows


def told(mean: dict[str, Any] | None, sign: str = "") -> str:
    """Percent or points, with their standard error."""
    if not mean or not mean["n"]:
        return ""
    error = mean["standard_error"]
    text = f"{100 * mean['mean']:{sign}.1f}".replace("-", "−")
    return text if error is None else f"{text} ± {100 * error:.1f}"


def moved(displacement: dict[str, Any] | None, fields: list[str]) -> str:
    if not displacement or not any(one["mean"] for one in displacement.values()):
        return ""
    return ", ".join(
        f"{factor * displacement[name]['mean']:.{1 if unit == '°' else 2}f}{unit}"
        for name, (factor, unit) in UNITS.items()
        if name in fields
    )


def corrupted(variants: dict[str, Any]) -> list[list[str]]:
    """Mean accuracy over the five strengths of each kind."""
    some = [(name, one) for name, one in ordered(variants) if "corrupted" in one]
    kinds = list(some[0][1]["corrupted"])
    rows = [["first layer, start", "clean", "mean", *kinds]]
    for name, one in some:
        means = [
            sum(mean["mean"] for mean in one["corrupted"][kind]) / len(one["corrupted"][kind])
            for kind in kinds
        ]
        rows.append(
            [NAMES[name], told(one["accuracy"]), told(one["mean_corrupted"])]
            + [f"{100 * mean:.1f}" for mean in means]
        )
    return rows


def similarity(variants: dict[str, Any]) -> list[list[str]]:
    some = [(name, one["similarity"]) for name, one in ordered(variants) if "similarity" in one]
    epochs = [epoch for epoch in some[0][1] if int(epoch) in (0, 1, 4, 8, 12, 16, 20, 24)]
    rows = [["filters like their neighbour, epoch", *epochs]]
    rows += [
        [NAMES[name], *(f"{one[epoch]['mean']:.2f}" for epoch in epochs)] for name, one in some
    ]
    return rows


def table(rows: list[Any]) -> None:
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    for number, one in enumerate(rows):
        print("| " + " | ".join(one[i] for i in used) + " |")
        if number == 0:
            print("|" + "---|" * len(used))


if __name__ == "__main__":
    main()
