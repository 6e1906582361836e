"""How often does each way find a planted kernel? Descent on θ, `recover`, and `NaturalGradient`.

    python benchmarks/recovery.py             # about six minutes on one core

The experiment of `gaborium recover`, on the photographs inside scikit-image (middle 64 x 64 px,
grey), for targets at several orientations and of two shapes, always from the antipodal start
(target - π/2). A success is an orientation within 0.01 rad of the truth and a kernel within 1 %
of it in L2 norm; a descent succeeds when it stays within 0.01 rad for the last tenth of its run.
Prints a table and writes benchmarks/results/recovery.json.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from _report import RESULTS, print_table, write_json
from skimage import data

from gaborium import Gabor2d
from gaborium.experiments import Recovery, recover_planted

PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "coffee", "coins", "grass"),
    *("gravel", "moon", "page", "rocket", "text"),
)
SHAPES = ((6.0, 3.0, 1.0), (6.0, 3.0, 0.5))  # wavelength, sigma, aspect ratio
ORIENTATIONS = tuple(math.pi / 4 + i * math.pi / 4 for i in range(4))
RATES, MOMENTA, N_STEPS, KERNEL_SIZE = (0.001, 0.01, 0.1, 1.0), (0.0, 0.9), 150, 15


def photograph(name: str) -> torch.Tensor:
    """One of scikit-image's photographs, ``(1, height, width)`` in [0, 1]."""
    pixels = torch.from_numpy(getattr(data, name)()).double() / 255
    grey = pixels if pixels.ndim == 2 else pixels[..., :3].mean(-1)
    return grey[None]


def experiment(name: str, orientation: float, shape: tuple[float, float, float]) -> Recovery:
    """One run from the antipodal start."""
    wavelength, sigma, aspect_ratio = shape
    target, start = (
        Gabor2d.of(orientation=angle, wavelength=wavelength, sigma=sigma, aspect_ratio=aspect_ratio)
        for angle in (orientation, orientation - math.pi / 2)
    )
    return recover_planted(
        [photograph(name)],
        target,
        start=start,
        kernel_size=KERNEL_SIZE,
        crop=64,
        learning_rates=RATES,
        momenta=MOMENTA,
        n_steps=N_STEPS,
    )


def outcome(result: Recovery) -> dict[str, Any]:
    """Which ways succeeded."""
    errors = result.kernel_errors()
    angle = {"recover": "error", "trained": "trained_error"}
    orientation = next(row for row in result.table() if row["parameter"] == "orientation")
    return {
        "recover": errors["found"] < 0.01 and abs(orientation[angle["recover"]]) < 0.01,
        "trained": errors["trained"] < 0.01 and abs(orientation[angle["trained"]]) < 0.01,
        "trained_kernel_error": errors["trained"],
        "descents_settled": [descent.settled for descent in result.descents],
        "descents_thrown_out": [descent.n_ejections > 0 for descent in result.descents],
    }


def main() -> None:
    """Run everything, print the shares, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", nargs="+", default=PHOTOGRAPHS, choices=PHOTOGRAPHS)
    parser.add_argument("--output", type=Path, default=RESULTS / "recovery.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    runs: list[dict[str, Any]] = []
    for name in arguments.photographs:
        for shape in SHAPES:
            for orientation in ORIENTATIONS:
                ends = outcome(experiment(name, orientation, shape))
                runs.append({"photograph": name, "shape": shape, "orientation": orientation} | ends)
        print(f"{name} done", flush=True)

    def share(key: str, chosen: list[dict[str, Any]]) -> float:
        return sum(run[key] for run in chosen) / len(chosen)

    settings = [(rate, momentum) for momentum in MOMENTA for rate in RATES]
    descents = [
        {
            "learning_rate": rate,
            "momentum": momentum,
            "settled": sum(run["descents_settled"][i] for run in runs) / len(runs),
            "thrown_out": sum(run["descents_thrown_out"][i] for run in runs) / len(runs),
        }
        for i, (rate, momentum) in enumerate(settings)
    ]
    summary = {"runs": len(runs), "recover": share("recover", runs)}
    summary |= {"trained": share("trained", runs), "descents": descents}
    by_photograph = {
        name: {key: share(key, [r for r in runs if r["photograph"] == name]) for key in
               ("recover", "trained")}
        for name in arguments.photographs
    }  # fmt: skip
    print_table(
        f"Share of {len(runs)} runs that succeed",
        ("way", "succeeds", "thrown out"),
        [
            *(
                (
                    f"descent, step size {row['learning_rate']:g}, momentum {row['momentum']:g}",
                    f"{row['settled']:.2f}",
                    f"{row['thrown_out']:.2f}",
                )
                for row in descents
            ),
            ("NaturalGradient", f"{summary['trained']:.3f}", ""),
            ("recover", f"{summary['recover']:.3f}", ""),
        ],
    )
    write_json(
        arguments.output,
        {"summary": summary, "by_photograph": by_photograph, "n_steps": N_STEPS, "details": runs},
    )


if __name__ == "__main__":
    main()
