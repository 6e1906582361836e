"""How often, how exactly and how fast do `fit` and `recover` find Gabor functions?

    python benchmarks/fit.py                    # every section; hours on one core
    python benchmarks/fit.py planted speed      # some of them
    python benchmarks/fit.py --quick            # 1/50 of the counts; written with --output only

planted   kernels without noise: the share that comes back, and what happened to the rest
noise     kernels with white noise: errors against the noise floor, coverage of standard errors
recover   photographs and responses, exact and noisy: errors against the Cramér-Rao bound
wrong     kernels that are no Gabor functions: what they are called
speed     beside scipy's `curve_fit` from a grid of starts, on the same kernels, in turns
real      first layers of trained networks and receptive fields, beside the best of 20 starts of
          scipy's `least_squares` (written by benchmarks/fit_scipy.py, which runs first)

Planted kernels of k x k px have wavelengths uniform in 2.5..k px, sigma in k/12..k/3, aspect ratio
in 0.3..1.5, any orientation and phase. A kernel's error is |K - K*| / |K*|. Every section writes
benchmarks/results/fit_SECTION.json. Times are those of the process, with one thread.
"""

from __future__ import annotations

import argparse
import inspect
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from _report import RESULTS, print_table, write_json
from fit_scipy import DATA, fit_by_grid, real_kernels, reference
from scipy.stats import beta, chi2
from torch import Tensor

from gaborium import FitResult, Gabor2d, Outcome, fit, gabor, gabor_jacobian, recover

F64 = torch.float64
EXACT = 1e-6  # kernel error below which a planted kernel counts as found
REAL_STARTS = 100  # candidates that are followed for the kernels of trained networks
FIELDS = tuple(name for name in Gabor2d.field_names() if name != "center")
SINGLE = {"dtype": torch.float32} if "dtype" in inspect.signature(fit).parameters else None
NO_WAVE = 0.3  # rad that a wave turns within one standard deviation
NORMAL = 0.674490  # median of |x| for a standard normal x
MAX_LISTED = 50  # failures written out with their parameters, for each row
Row = dict[str, Any]


class Options(NamedTuple):
    quick: bool
    data: Path
    crop: int

    def count(self, n: int) -> int:
        return max(4, n // 50) if self.quick else n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="1/50 of the counts")
    parser.add_argument("--crop", type=int, default=256, help="px of the photographs, 0: whole")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of kernels, natural, v1")
    parser.add_argument("--output", type=Path, help="folder of the JSON files")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    for name in options.sections or SECTIONS:
        results = SECTIONS[name](Options(options.quick, options.data, options.crop))
        # A quick look must not replace results.
        if folder := options.output or (None if options.quick else RESULTS):
            write_json(folder / f"fit_{name}.json", results)


# -- what all sections use ------------------------------------------------------------------------


def planted(n: int, size: int, seed: int, *, reach: float = 0.0) -> Gabor2d:
    """Random Gabor functions of the distribution above, centred within ``reach`` px."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator, dtype=F64)

    return Gabor2d(
        orientation=uniform(0, math.pi),
        wavelength=uniform(2.5, size),
        phase=uniform(-math.pi, math.pi),
        sigma=uniform(size / 12, size / 3),
        aspect_ratio=uniform(0.3, 1.5),
        amplitude=torch.ones(n, dtype=F64),
        center=uniform(-reach, reach, 2),
    )


def timed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    begin = time.process_time()
    result = function(*args, **kwargs)
    return result, time.process_time() - begin


def kernel_errors(result: FitResult, kernels: Tensor) -> Tensor:
    """|K - K*| / |K*|, infinite where nothing was found."""
    found = gabor(result.params.to(F64), kernels.shape[-1]).reshape(kernels.shape)
    errors = (found - kernels).flatten(1).norm(dim=1) / kernels.flatten(1).norm(dim=1)
    return errors.nan_to_num(nan=math.inf)


def outcomes(result: FitResult) -> dict[str, int]:
    """How many ended how; those of no filter are left out."""
    counts = Counter(outcome.name for outcome in result.outcome)
    return {outcome.name: counts[outcome.name] for outcome in Outcome if counts[outcome.name]}


def in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items())


def share(chosen: Tensor) -> float:
    return chosen.double().mean().item()


def finite(value: float) -> float | str:
    """JSON has no word for infinity."""
    return value if math.isfinite(value) else str(value)


def at_most(n_events: int, n: int, confidence: float = 0.95) -> float:
    """Upper bound of a rate of which ``n_events`` of ``n`` were seen (Clopper and Pearson)."""
    return 1.0 if n_events == n else beta.ppf(confidence, n_events + 1, n - n_events).item()


# -- planted kernels ------------------------------------------------------------------------------


def planted_section(options: Options) -> Row:
    rows = []
    n = options.count(10_000)
    for size in (7, 11, 15, 21, 31):
        for free in (False, True):
            params = planted(n, size, seed=size, reach=size / 8 if free else 0.0)
            kernels = gabor(params, size)
            for dtype, settings in ((F64, {}), (torch.float32, SINGLE)):
                if settings is None:  # this release computes in float64 only
                    continue
                result, seconds = timed(fit, kernels.to(dtype), center=free, **settings)
                errors = kernel_errors(result, kernels)
                limit = EXACT if dtype == F64 else 10 * EXACT
                rows.append({
                    "size": size,
                    "center": "free" if free else "fixed",
                    "dtype": str(dtype).removeprefix("torch."),
                    "n": n,
                    "success": share(errors < limit),
                    "success_1e-6": share(errors < EXACT),
                    "median_error": errors.median().item(),
                    "fits_per_cpu_second": round(n / seconds, 1),
                    "outcomes": outcomes(result),
                    "converged_but_wrong": int((result.converged & (errors >= limit)).sum()),
                    "found_but_not_converged": int((~result.converged & (errors < limit)).sum()),
                    "failures": failures(params, kernels, result, errors, limit),
                })  # fmt: skip
                print(*list(rows[-1].values())[:5], flush=True)
    print_table(
        "Planted kernels without noise: share found within 1e-6 (float32: 1e-5; and within 1e-6)",
        ["k", "centre", "dtype", "found", "within 1e-6", "fits per CPU-second", "outcomes"],
        [
            [
                str(row["size"]),
                row["center"],
                row["dtype"],
                f"{row['success']:.4f}",
                f"{row['success_1e-6']:.4f}",
                f"{row['fits_per_cpu_second']:.0f}",
                in_words(row["outcomes"]),
            ]
            for row in rows
        ],
    )
    return {"exact": EXACT, "planted": rows}


def failures(
    params: Gabor2d, kernels: Tensor, result: FitResult, errors: Tensor, limit: float
) -> list[Row]:
    """The worst of them, with everything needed to try again."""
    rms = kernels.flatten(1).square().mean(1).sqrt()  # the amplitude is 1: 0 is an empty kernel
    order = errors.argsort(descending=True)[: int((errors >= limit).sum())][:MAX_LISTED].tolist()
    return [
        {
            "index": i,
            **{name: value[i].tolist() for name, value in params.as_dict().items()},
            "rms": rms[i].item(),
            "error": finite(errors[i].item()),
            "outcome": result.outcome[i].name,
        }
        for i in order
    ]


# -- kernels with noise ---------------------------------------------------------------------------


def noise_section(options: Options) -> Row:
    rows = []
    n = options.count(2000)
    for size in (11, 15, 21):
        params = planted(n, size, seed=100 + size)
        kernels = gabor(params, size)
        generator = torch.Generator().manual_seed(size)
        for level in (0.1, 0.3, 1.0):
            sigma = level * kernels.std((-2, -1), correction=0, keepdim=True)
            noise = torch.randn(kernels.shape, generator=generator, dtype=F64)
            result = fit(kernels + sigma * noise)
            # |K - K*| that six parameters owe to the noise, as a share of |K*|.
            floor = math.sqrt(len(FIELDS)) * sigma.flatten() / kernels.flatten(1).norm(dim=1)
            errors = kernel_errors(result, kernels)
            rows.append(
                {
                    "size": size,
                    "noise": level,
                    "n": n,
                    "median_error": errors.median().item(),
                    "median_floor": floor.median().item(),
                    "median_ratio": (errors / floor).median().item(),
                    "share_above_twice_floor": share(errors > 2 * floor),
                    "coverage": coverage(result, params),
                    "outcomes": outcomes(result),
                }
            )
            print(size, level, flush=True)
    expected = math.sqrt(chi2.median(len(FIELDS)) / len(FIELDS))
    print_table(
        f"Kernels with noise: error over floor (a normal error has {expected:.3f} in the median), "
        "share with standard errors, and of these the share within one (normal: 0.683)",
        [
            "k",
            "noise",
            "error",
            "floor",
            "ratio",
            "> 2 floors",
            "stated",
            "covered",
            *FIELDS,
            "outcomes",
        ],
        [
            [
                str(row["size"]),
                f"{row['noise']:g}",
                f"{row['median_error']:.4f}",
                f"{row['median_floor']:.4f}",
                f"{row['median_ratio']:.3f}",
                f"{row['share_above_twice_floor']:.4f}",
                *(f"{value:.3f}" for value in row["coverage"].values()),
                in_words(row["outcomes"]),
            ]
            for row in rows
        ],
    )
    return {"expected_ratio": expected, "noise": rows}


def coverage(result: FitResult, params: Gabor2d) -> dict[str, float]:
    """Share of errors within one standard error, over the fits that state one for every field."""
    stated = torch.stack([result.standard_error[name] for name in FIELDS])
    chosen = stated.isfinite().all(0)
    errors = result.params.difference(params)
    within = {
        name: share((errors[name].abs() < result.standard_error[name])[chosen]) for name in FIELDS
    }
    return {"stated": share(chosen), "all": sum(within.values()) / len(FIELDS)} | within


# -- photographs and responses --------------------------------------------------------------------

LEVELS = {"exact": math.inf, "20 dB": 20.0, "0 dB": 0.0, "-10 dB": -10.0}
SIZE, BAND = 11, 50  # px; targets whose responses at all levels are recovered at once


def recover_section(options: Options) -> Row:
    rows, failed = [], []
    n = options.count(1000)
    for number, (name, photograph) in enumerate(photographs(options).items()):
        covariance, n_patches = patch_covariance(photograph)
        targets = planted(n, SIZE, seed=1000 + number)[:, None]  # one input channel
        generator = torch.Generator().manual_seed(number)
        found, variances, seconds = recover_in_bands(photograph, targets, generator)
        kernels = gabor(targets, SIZE)
        for level, result in found.items():
            errors = kernel_errors(result, kernels)
            row = {"photograph": name, "level": level, "n": n, "outcomes": outcomes(result)}
            row["success"] = share(errors < EXACT)
            row["fits_per_cpu_second"] = round(n * len(LEVELS) / seconds, 1)  # of all levels
            if level == "exact":
                lost = failures(targets, kernels, result, errors, EXACT)
                failed += [{"photograph": name} | failure for failure in lost]
            else:
                row |= beside_bound(result, targets, covariance, variances[level] / n_patches)
            rows.append(row)
        print(name, rows[-len(LEVELS)]["success"], flush=True)
    exact = [row for row in rows if row["level"] == "exact"]
    print_table(
        f"recover, {n} targets, {SIZE} x {SIZE} px, responses without noise",
        ["photograph", f"error < {EXACT:g}", "fits per CPU-second", "outcomes"],
        [
            [
                row["photograph"],
                f"{row['success']:.4f}",
                f"{row['fits_per_cpu_second']:.0f}",
                in_words(row["outcomes"]),
            ]
            for row in exact
        ],
    )
    print_table(
        "recover from noisy responses: error over the Cramér-Rao bound, and each field's median",
        ["photograph", "signal to noise", "rms", "median", *FIELDS, "outcomes"],
        [
            [
                row["photograph"],
                row["level"],
                f"{float(row['rms_ratio']):.3f}",
                f"{row['median_ratio']:.3f}",
                *(f"{ratio:.3f}" for ratio in row["ratios"].values()),
                in_words(row["outcomes"]),
            ]
            for row in rows
            if row["level"] != "exact"
        ],
    )
    return {"crop": options.crop, "size": SIZE, "recover": rows, "failures": failed[:MAX_LISTED]}


def photographs(options: Options) -> dict[str, Tensor]:
    """Grey photographs ``(1, 1, height, width)`` in [0, 1], or their middles."""
    from PIL import Image

    found = {}
    for path in sorted((options.data / "natural" / "kodak").glob("*.png")):
        grey = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")) / 255.0).mean(-1)
        if options.crop:
            top, left = ((size - options.crop) // 2 for size in grey.shape)
            grey = grey[top : top + options.crop, left : left + options.crop]
        found[path.stem] = grey[None, None]
    return found


def recover_in_bands(
    photograph: Tensor, targets: Gabor2d, generator: torch.Generator
) -> tuple[dict[str, FitResult], dict[str, Tensor], float]:
    """For each level of noise what was recovered, and the noise's variance; and the time taken."""
    results: dict[str, list[FitResult]] = {level: [] for level in LEVELS}
    variances: dict[str, list[Tensor]] = {level: [] for level in LEVELS}
    total = 0.0
    for first in range(0, len(targets), BAND):
        clean = F.conv2d(photograph, gabor(targets[first : first + BAND], SIZE))
        power = clean.var((0, 2, 3), correction=0)
        responses = []
        for level, decibels in LEVELS.items():
            variances[level].append(power * 10 ** (-decibels / 10))
            noise = torch.randn(clean.shape, generator=generator, dtype=F64)
            responses.append(clean + variances[level][-1].sqrt()[:, None, None] * noise)
        result, seconds = timed(recover, photograph, torch.cat(responses, 1), SIZE)
        total += seconds
        n = clean.shape[1]
        for i, level in enumerate(LEVELS):
            results[level].append(result[i * n : (i + 1) * n])
    return (
        {level: FitResult.cat(pieces) for level, pieces in results.items()},
        {level: torch.cat(pieces) for level, pieces in variances.items()},
        total,
    )


def patch_covariance(photograph: Tensor) -> tuple[Tensor, int]:
    patches = F.unfold(photograph, SIZE)[0]
    return torch.cov(patches, correction=0), patches.shape[1]


def beside_bound(result: FitResult, params: Gabor2d, covariance: Tensor, variance: Tensor) -> Row:
    """Errors over the Cramér-Rao bound of the true parameters; ``variance``: noise over patches.

    1 is an estimate that attains the bound: in the root of the mean square of the error in the
    metric of the responses, in its median (of chi-squared numbers), and field by field.
    """
    slopes = gabor_jacobian(params, SIZE)
    J = torch.stack([slopes[name].flatten(1) for name in FIELDS], 1)  # (filters, 6, pixels)
    information = J @ covariance @ J.mT / variance[:, None, None]
    # Parameters have different units: the inverse is taken without them.
    size = information.diagonal(dim1=-2, dim2=-1).sqrt()
    alike = information / (size.unsqueeze(-1) * size.unsqueeze(-2))
    bound = torch.linalg.inv_ex(alike)[0].diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt() / size

    missed = (gabor(result.params, SIZE) - gabor(params, SIZE)).flatten(1)
    excess = ((missed @ covariance) * missed).sum(-1) / variance / len(FIELDS)
    excess = excess.nan_to_num(nan=math.inf)
    errors = result.params.difference(params)
    scores = {
        name: (errors[name][:, 0].abs() / bound[:, i]).nan_to_num(nan=math.inf)
        for i, name in enumerate(FIELDS)
    }
    return {
        "rms_ratio": finite(excess.mean().sqrt().item()),
        "median_ratio": (excess.median() / (chi2.median(len(FIELDS)) / len(FIELDS))).sqrt().item(),
        "ratios": {name: score.median().item() / NORMAL for name, score in scores.items()},
    }


# -- kernels that are no Gabor functions ----------------------------------------------------------


def wrong_section(options: Options) -> Row:
    rows = []
    for size in (7, 11, 15):
        models = wrong_models(size, options.count(200), seed=size)
        generator = torch.Generator().manual_seed(size)
        n = options.count(2_000)
        models["white noise"] = torch.randn(n, size, size, generator=generator, dtype=F64)
        if size == 7:
            models["hardly trained network, k = 9"] = negative_control(options)
        for name, kernels in models.items():
            for free in (False, True):
                result = fit(kernels, center=free)
                counts = outcomes(result)
                called = counts.get("CONVERGED", 0)
                explained = result.explained_variance[result.converged]
                rows.append(
                    {
                        "model": name,
                        "size": kernels.shape[-1],
                        "center": "free" if free else "fixed",
                        "n": len(kernels),
                        "false_alarm_rate": called / len(kernels),
                        "at_most": at_most(called, len(kernels)),
                        "explained_by_false_alarms": explained.median().item() if called else None,
                        "outcomes": counts,
                    }
                )
        print(size, flush=True)
    names = list(dict.fromkeys(row["model"] for row in rows))
    groups = {
        (name, center): [row for row in rows if (row["model"], row["center"]) == (name, center)]
        for name in names
        for center in ("fixed", "free")
    }
    print_table(
        "Kernels that are no Gabor functions, k = 7, 11 and 15: none should have CONVERGED",
        ["model", "centre", "n", *(outcome.name for outcome in Outcome), "explained by false"],
        [
            [
                name,
                center,
                str(sum(row["n"] for row in group)),
                *(str(sum(row["outcomes"].get(end.name, 0) for row in group)) for end in Outcome),
                " ".join(
                    "-" if (v := row["explained_by_false_alarms"]) is None else f"{v:.2f}"
                    for row in group
                ),
            ]
            for (name, center), group in groups.items()
        ],
    )
    print_table(
        "White noise that is called a Gabor function",
        ["k", "centre", "n", "rate", "with 95 % confidence at most"],
        [
            [
                str(row["size"]),
                row["center"],
                str(row["n"]),
                f"{row['false_alarm_rate']:.5f}",
                f"{row['at_most']:.5f}",
            ]
            for row in rows
            if row["model"] == "white noise"
        ],
    )
    return {"wrong": rows}


def wrong_models(size: int, n: int, seed: int) -> dict[str, Tensor]:
    """Kernels ``(n, size, size)`` of shapes that a Gabor function should not pass for."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator, dtype=F64)

    def noise() -> Tensor:
        return torch.randn(n, size, size, generator=generator, dtype=F64)

    u = torch.arange(size, dtype=F64) - (size - 1) / 2
    x, y = u.expand(size, size), u[:, None].expand(size, size)
    constant = uniform(0.5, 2.0).expand(n, size, size)
    models = {
        "constant": constant[:4],
        "constant and 1 % noise": constant * (1 + 0.01 * noise()),
        "constant and 10 % noise": constant * (1 + 0.1 * noise()),
    }
    for reach, where in ((0.0, "centred"), (size / 4, "off centre")):
        for ratio in (1.2, 1.6, 2.0, 3.0, 5.0):
            square = (x - uniform(-reach, reach)) ** 2 + (y - uniform(-reach, reach)) ** 2
            sigma = uniform(size / 12, size / 5)
            middle = (-square / (2 * sigma**2)).exp()
            around = (-square / (2 * (ratio * sigma) ** 2)).exp() / ratio**2
            models[f"difference of Gaussians 1:{ratio:g}, {where}"] = middle - around
    for period in (1, 2, 3, 4):
        shifted = [((v + uniform(0, 2 * period).floor()) / period).floor() for v in (x, y)]
        models[f"checkerboard of {period} px"] = 1 - 2 * (sum(shifted) % 2)
    # Of more than a stripe each, and far enough apart to be two.
    one = Gabor2d(
        orientation=uniform(0, math.pi),
        wavelength=uniform(3.0, size / 2),
        phase=uniform(-math.pi, math.pi),
        sigma=uniform(size / 5, size / 3),
        aspect_ratio=uniform(0.5, 1.0),
        amplitude=torch.ones(n, 1, 1, dtype=F64),
        center=torch.zeros(n, 1, 1, 2, dtype=F64),
    )[:, 0, 0]
    turn, phase = uniform(math.pi / 4, math.pi / 2)[:, 0, 0], uniform(0, 2 * math.pi)[:, 0, 0]
    other = gabor(one.replace(orientation=one.orientation + turn, phase=phase), size)
    for weight in (1.0, 0.7, 0.5):
        models[f"plaid of amplitudes 1 and {weight:g}"] = gabor(one, size) + weight * other
    angle, place = uniform(0, 2 * math.pi), uniform(-size / 4, size / 4)
    along = x * angle.cos() + y * angle.sin() - place
    models["step edge"] = along.sign()
    models["line"] = (along.abs() < 0.7).double()
    radius, width = uniform(size / 3.5, size / 2.5), uniform(0.5, 0.8)
    models["ring"] = (-0.5 * ((x.hypot(y) - radius) / width) ** 2).exp()
    return models


def negative_control(options: Options) -> Tensor:
    path = next((options.data / "kernels").glob("NEGATIVE*.npz"))
    return torch.from_numpy(np.load(path)["weights"]).double()[:, 0]


# -- speed ----------------------------------------------------------------------------------------


def speed_section(options: Options) -> Row:
    """Rounds of 4000 new kernels each, of which scipy gets the first ten."""
    n, n_scipy, n_rounds = 4000, 10, options.count(20)
    contestants: dict[str, Callable[[Tensor], Any]] = {"gaborium": fit}
    if SINGLE is not None:
        contestants["gaborium, float32"] = lambda kernels: fit(kernels.float(), **SINGLE)
    scipy_ways = {
        "curve_fit, 18 starts": {},
        "curve_fit, 18 starts, derivatives": {"derivatives": True},
        "curve_fit, first of 18 that is exact": {"derivatives": True, "enough": EXACT**2},
    }
    rates: dict[str, list[float]] = {name: [] for name in (*contestants, *scipy_ways)}
    found: dict[str, list[Tensor]] = {name: [] for name in rates}
    fit(gabor(planted(8, SIZE, seed=0), SIZE))  # warm up
    for i in range(n_rounds):
        kernels = gabor(planted(n, SIZE, seed=2000 + i), SIZE)
        names = list(rates)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if name in contestants:
                result, seconds = timed(contestants[name], kernels)
                found[name].append(kernel_errors(result, kernels) < EXACT)
                rates[name].append(n / seconds)
            else:
                some = kernels[:n_scipy].numpy()
                misfits, seconds = timed(
                    lambda some, way: [fit_by_grid(kernel, **way)[1] for kernel in some],
                    some,
                    scipy_ways[name],
                )
                found[name].append(torch.tensor(misfits) < EXACT**2)
                rates[name].append(n_scipy / seconds)
        print(f"round {i + 1} of {n_rounds}", flush=True)
    rows = []
    for name, rate in rates.items():
        ratios = np.array(rates["gaborium"]) / np.array(rate)
        rows.append(
            {
                "contestant": name,
                "fits_per_cpu_second": float(np.median(rate)),
                "gaborium_is_faster_by": float(np.median(ratios)),
                "quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
                "success": share(torch.cat(found[name])),
                "n": sum(len(found_) for found_ in found[name]),
            }
        )
    print_table(
        f"Planted kernels, {SIZE} x {SIZE} px, no noise, one thread",
        ["contestant", "fits per CPU-second", "gaborium is faster by", "quartiles", "success"],
        [
            [
                row["contestant"],
                f"{row['fits_per_cpu_second']:.1f}",
                f"{row['gaborium_is_faster_by']:.2f}",
                "({:.2f}, {:.2f})".format(*row["quartiles"]),
                f"{row['success']:.4f}",
            ]
            for row in rows
        ],
    )
    return {"size": SIZE, "batch": n, "rounds": n_rounds, "speed": rows}


# -- real kernels ---------------------------------------------------------------------------------


def real_section(options: Options) -> Row:
    rows = []
    for name, weight in real_kernels(options.data).items():
        theirs = reference(name)
        if theirs is None:
            print(f"{name}: no reference yet; run python benchmarks/fit_scipy.py")
            continue
        kernels = torch.from_numpy(weight[: options.count(len(weight))])
        result, seconds = timed(fit, kernels, geometry="filter", center=True, n_starts=REAL_STARTS)
        explained = result.explained_variance.nan_to_num(nan=0.0)
        best = torch.tensor(theirs["explained_variance"], dtype=F64)[: len(kernels)]
        lost = best - explained
        worse = (lost > EXACT).nonzero().flatten().tolist()
        # Towards frequency zero the pair becomes a Gaussian times (a + b x'), of endless amplitude.
        geometry = theirs["geometry"]
        turn = 2 * math.pi * np.abs(geometry["frequency"]) * np.exp(geometry["log_sigma"])
        rows.append(
            {
                "file": name,
                "shape": list(weight.shape),
                "n": len(kernels),
                "median_explained_variance": explained.median().item(),
                "scipy_median_explained_variance": best.median().item(),
                "worst_difference": lost.max().item(),
                "best_difference": lost.min().item(),
                "worse": [
                    {"filter": i, "lost": lost[i].item(), "outcome": result.outcome[i].name}
                    for i in sorted(worse, key=lambda i: -lost[i])
                ],
                "worse_without_wave": sum(bool(turn[i] < NO_WAVE) for i in worse),
                "worse_by_1e-3": int((lost > 1e-3).sum()),
                "better": int((lost < -EXACT).sum()),
                "fits_per_cpu_second": round(len(kernels) / seconds, 1),
                "outcomes": outcomes(result),
            }
        )
        print(name, flush=True)
    print_table(
        "Real kernels: explained variance beside the best of 20 starts of least_squares; how many "
        f"are worse or better by {EXACT:g}, worse where scipy's has hardly a wave, worse by 0.001",
        [
            "file",
            "n",
            "median",
            "scipy's",
            "worst",
            "worse",
            "no wave",
            "> 0.001",
            "better",
            "fits/s",
        ],
        [
            [
                row["file"],
                str(row["n"]),
                f"{row['median_explained_variance']:.4f}",
                f"{row['scipy_median_explained_variance']:.4f}",
                f"{-row['worst_difference']:.1e}",
                str(len(row["worse"])),
                str(row["worse_without_wave"]),
                str(row["worse_by_1e-3"]),
                str(row["better"]),
                f"{row['fits_per_cpu_second']:.1f}",
            ]
            for row in rows
        ],
    )
    return {"real": rows}


SECTIONS: dict[str, Callable[[Options], Row]] = {
    "planted": planted_section,
    "noise": noise_section,
    "recover": recover_section,
    "wrong": wrong_section,
    "speed": speed_section,
    "real": real_section,
}

if __name__ == "__main__":
    main()
