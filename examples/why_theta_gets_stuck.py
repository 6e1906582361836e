"""Every figure and number of the article "Why θ gets stuck", in under five minutes on two cores.

    python examples/why_theta_gets_stuck.py                    # rewrites the committed files
    python examples/why_theta_gets_stuck.py --output FOLDER    # writes into a folder instead
    python examples/why_theta_gets_stuck.py --quick            # a few seconds, prints only

Photographs are those inside scikit-image (middle 96 x 96 px, grey, 0...1), and 12 of Kodak's where
the folder of `--data` has them. Each section below returns its rows, and all go into one JSON file.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from joblib import Parallel, delayed
from skimage import data
from torch import Tensor

from gaborium import Gabor2d, GaborConv2d, gabor, gabor_jacobian, plots, recover
from gaborium.diagnostics import Landscape, TrainingSetup, identifiability, landscape, step_limit
from gaborium.readers import read_images

ROOT = Path(__file__).resolve().parent.parent
SCIKIT_IMAGE = (
    *("astronaut", "brick", "camera", "coffee", "coins", "grass"),
    *("gravel", "moon", "page", "rocket", "text"),
)
TRUTH, KERNEL, SETTLED, NEAR = math.pi / 4, 15, 0.01, 0.05
WHITENING, FLOOR = 9, 1e-3  # the whitening filter's size, and its smallest share of variance
PADDINGS = (0, "same")
OPTIMISERS = ("SGD", "momentum 0.9", "Adam")
MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "MSE": lambda gap: gap.square().sum(-1),
    "RMSE": lambda gap: gap.square().sum(-1).sqrt(),
    "L1": lambda gap: gap.abs().mean(-1),
}
RIGHT = "MSE, right step"
REMEDIES = {  # loss, without border and mean, whitened, four starts
    "none": ("RMSE", False, False, False),
    "squared error, same step": ("MSE", False, False, False),
    "squared error, right step": (RIGHT, False, False, False),
    "no border, no mean": ("RMSE", True, False, False),
    "whitening": ("RMSE", False, True, False),
    "best of four starts": ("RMSE", False, False, True),
    "right step + no border, no mean": (RIGHT, True, False, False),
    "right step + whitening": (RIGHT, False, True, False),
    "right step + best of four": (RIGHT, False, False, True),
    "right step + no border, no mean + whitening": (RIGHT, True, True, False),
    "right step + no border, no mean + best of four": (RIGHT, True, False, True),
    "all four": (RIGHT, True, True, True),
}
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """How much is computed, and on which photographs, ``(1, 1, size, size)`` by name."""

    images: dict[str, Tensor]
    kodak: dict[str, Tensor]
    n_starts: int = 12
    n_steps: int = 600
    n_random: int = 100
    full: bool = True

    def starts(self) -> Tensor:
        """Orientations spread evenly over half a turn around the truth, which is none of them."""
        return TRUTH + (torch.arange(self.n_starts) + 0.5) * math.pi / self.n_starts


# -- what all sections use ----------------------------------------------------------------------


def photographs(size: int, names: tuple[str, ...]) -> dict[str, Tensor]:
    found = {}
    for name in names:
        pixels = torch.from_numpy(getattr(data, name)()).double() / 255
        grey = pixels if pixels.ndim == 2 else pixels[..., :3].mean(-1)
        found[name] = middle(grey, size)
    return found


def middle(image: Tensor, size: int) -> Tensor:
    """The middle of a grey photograph, ``(1, 1, size, size)``."""
    top, left = ((side - size) // 2 for side in image.shape)
    return image[None, None, top : top + size, left : left + size]


def planted(aspect_ratio: float = 1.0, orientation: float = TRUTH, **fields: float) -> Gabor2d:
    fields = {"wavelength": 6.0, "sigma": 3.0} | fields
    return Gabor2d.of(orientation=orientation, aspect_ratio=aspect_ratio, **fields)


def problem(image: Tensor, truth: Gabor2d, padding: int | str = 0, loss: Any = F.mse_loss,
            size: int = KERNEL) -> TrainingSetup:  # fmt: skip
    """A layer a quarter turn away from the kernel that made the targets, which learns θ only."""
    layer = GaborConv2d(
        1, 1, size, padding=padding, bias=False, learn="orientation", coordinates="textbook",
        start=truth, dtype=torch.float64,
    )  # fmt: skip
    targets = layer(image).detach()
    layer.params = truth.replace(orientation=truth.orientation - math.pi / 2)
    return TrainingSetup(layer, loss, image, targets)


def circle(*arguments: Any, **options: Any) -> Landscape:
    return landscape(problem(*arguments, **options), "orientation")


def impulse(size: int) -> Tensor:
    """One bright pixel: it shows every tap of a kernel once, and is therefore white."""
    image = torch.zeros(1, 1, 2 * size - 1, 2 * size - 1, dtype=torch.float64)
    image[..., size - 1, size - 1] = 1
    return image


def predicted_width(p: Gabor2d) -> float:
    """λ / (√2 π σ_y), rad."""
    return (p.wavelength * p.aspect_ratio / (math.sqrt(2) * math.pi * p.sigma)).item()


def patches(image: Tensor, padding: int | str = 0) -> Tensor:
    """What each pixel of the output sees, ``(pixels, kernel)``."""
    around = KERNEL // 2 if padding == "same" else 0
    return F.unfold(F.pad(image, [around] * 4), KERNEL)[0].T


def root(seen: Tensor) -> Tensor:
    """``R`` with ``|R w|² = mean((patch . w)²)``: a squared error needs no more of an image."""
    values, vectors = torch.linalg.eigh(seen.T @ seen / len(seen))
    return (vectors * values.clamp_min(0).sqrt()).T


def slope(R: Tensor, p: Gabor2d) -> Tensor:
    """``c = rms(image * dg/dθ)``."""
    return (gabor_jacobian(p, KERNEL)["orientation"].double().flatten(-2) @ R.mT).norm(dim=-1)


def standardised(image: Tensor) -> Tensor:
    return (image - image.mean()) / image.std()


def whitened(image: Tensor) -> Tensor:
    """Filtered by the middle row of C^(-1/2) of its patches, to the same standard deviation."""
    seen = F.unfold(image, WHITENING)[0]
    values, vectors = torch.linalg.eigh(seen.cov())
    rows = (vectors * (values + FLOOR * values[-1]).rsqrt()) @ vectors.T
    result = F.conv2d(image, rows[WHITENING**2 // 2].view(1, 1, WHITENING, WHITENING))
    return result / result.std() * image.std()


def descend(seen: Tensor, truth: Gabor2d, starts: Tensor, measure: str, optimiser: str,
            rate: float, n_steps: int, decay: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Learn θ alone: one filter of a layer for each image and start, which share nothing.

    Returns θ, ``(steps + 1, images, starts)``, and the last loss. The responses are taken from
    ``seen``, ``(images, rows, kernel)``, of which only what θ can change is looked at.
    """
    around = truth.replace(orientation=torch.arange(360).deg2rad())
    left, values, _ = torch.linalg.svd(gabor(around, KERNEL).flatten(-2).double().T)
    basis = left[:, : int((values > 1e-6 * values[0]).sum())]
    view, target = (seen @ basis).float().mT, gabor(truth, KERNEL).flatten() @ basis.float()
    layer = GaborConv2d(
        1, starts.numel(), KERNEL, bias=False, learn="orientation", coordinates="textbook",
        start=truth.replace(orientation=starts.float().reshape(-1, 1)),
    )  # fmt: skip
    kind, _, momentum = optimiser.partition(" ")
    optimizer = (
        torch.optim.Adam(layer.parameters(), rate)
        if kind == "Adam"
        else torch.optim.SGD(layer.parameters(), rate, momentum=float(momentum or 0))
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps) if decay else None
    path = [layer.params.orientation.detach().view_as(starts)]
    for _ in range(n_steps):
        optimizer.zero_grad()
        gap = (layer.weight.flatten(1) @ basis.float() - target).view(*starts.shape, -1)
        loss = MEASURES[measure](gap @ view)
        loss.sum().backward()
        optimizer.step()
        path.append(layer.params.orientation.detach().view_as(starts))
        if schedule:
            schedule.step()
    return torch.stack(path), loss.detach().nan_to_num(math.inf)


def ends(path: Tensor, truth: Gabor2d) -> dict[str, Tensor]:
    """What became of each descent, judged by the last tenth of its steps."""
    half = math.pi / 2
    error = ((path - truth.orientation + half).remainder(math.pi) - half).abs()
    error = error.nan_to_num(math.inf)
    last, inside = error[-len(error) // 10 :], error <= predicted_width(truth)
    leaves = (inside[:-1] & ~inside[1:]).sum(0)
    stays = inside[-len(error) // 10 :].all(0)
    return {
        "settled": last.amax(0) < SETTLED,
        "thrown_out": leaves > 0,
        "ejections": leaves.double(),
        "amplitude": torch.where(stays, last.mean(0).double(), math.nan),
    }


def summary(found: dict[str, Tensor]) -> dict[str, Any]:
    """Shares, the mean number of ejections, the median amplitude of those that stay near."""
    amplitude = found["amplitude"].nanmedian().item()
    return {
        "runs": found["settled"].numel(),
        "settled": mean(found["settled"]),
        "thrown_out": mean(found["thrown_out"]),
        "ejections": mean(found["ejections"]),
        "amplitude": None if math.isnan(amplitude) else amplitude,
    }


def recovers(row: dict[str, Any], way: str) -> bool:
    """Kernel within 1 %, and θ as near as for a descent."""
    return row[f"{way}_kernel_error"] < 0.01 and abs(row[f"{way}_turn"]) < SETTLED


def mean(values: Any) -> float:
    return torch.as_tensor(values).double().mean().item()


def both(plan: Plan) -> list[tuple[str, str, Tensor]]:
    """Collection, name and image of every photograph."""
    pairs = (("scikit-image", plan.images), ("Kodak", plan.kodak))
    return [(where, name, image) for where, images in pairs for name, image in images.items()]


# -- the sections -------------------------------------------------------------------------------


def antipode(plan: Plan) -> Rows:
    """The slope at the start, a quarter turn from the truth, as a share of the steepest."""
    rows = []
    for where, name, image in [("", "white", impulse(KERNEL)), *both(plan)]:
        found = circle(image, planted())
        step = math.tau / len(found.values)
        steepest = (found.values.roll(-1) - found.values.roll(1)).abs().max().item() / (2 * step)
        (start,), (end,) = found.present_slope, found.present_minimum.position
        # The root's slope is that of the square over twice the root.
        tip = slope(root(patches(image)), planted()).item() * 2 * math.sqrt(found.present_value)
        row = {"collection": where, "image": name, "slope": start / steepest}
        row["cone_over_start"] = tip / abs(start) if where else None
        rows.append(row | {"arrives": abs(math.remainder(end - TRUTH, math.pi)) < SETTLED})
    return rows


def basin(plan: Plan) -> Rows:
    """The convex half-width on white input, measured and predicted, rad."""
    grid = itertools.product((4.0, 6.0, 8.0, 12.0), (2.0, 3.0, 4.0), (1.0, 0.7, 0.5))
    rows = []
    for wavelength, sigma, gamma in itertools.islice(grid, 0, None, 1 if plan.full else 11):
        truth, size = planted(gamma, wavelength=wavelength, sigma=sigma), int(6 * sigma / gamma) | 1
        row = {"wavelength": wavelength, "sigma": sigma, "aspect_ratio": gamma}
        row["measured"] = circle(impulse(size), truth, size=size).half_width
        a = (math.tau * sigma / wavelength) ** 2
        row["all_angles"] = math.acos((math.sqrt(1 + a * a) - 1) / a) if gamma == 1 else None
        rows.append(row | {"predicted": predicted_width(truth)})
    return rows


def minima(plan: Plan) -> Rows:
    """Minima over half a turn, and the share of starts that roll down to the truth."""
    angles = [math.pi * i / 4 for i in range(4)] if plan.full else [TRUTH]
    rows = []
    for where, name, image in both(plan):
        for gamma in (1.0, 0.5):
            for padding, centred in ((0, False), ("same", False), ("same", True)):
                used = image - image.mean() if centred else image
                found = [circle(used, planted(gamma, angle), padding) for angle in angles]
                rows.append(
                    {
                        "collection": where,
                        "image": name,
                        "aspect_ratio": gamma,
                        "padding": "valid" if padding == 0 else "zeros",
                        "centred": centred,
                        "share": [one.share_to_best for one in found],
                        "spurious": [one.n_spurious / 2 for one in found],
                    }
                )
    return rows


def cone(plan: Plan, measure: str) -> Rows:
    """Optimiser by step size, on standardised photographs, γ = 1, no padding.

    The absolute error looks at every fourth pixel, the others at all.
    """
    truth = planted()
    images = [standardised(image) for image in plan.images.values()]
    seen = torch.stack([patches(i)[::4] if measure == "L1" else root(patches(i)) for i in images])
    starts = plan.starts().expand(len(images), -1)
    reach = torch.stack([_reaches(image, truth, plan.starts()) for image in images])
    rows = []
    for decay in (False, True) if measure == "RMSE" else (False,):
        for name in OPTIMISERS:
            for rate in (0.001, 0.01, 0.1, 1.0) if plan.full else (0.01, 0.1):
                path, _ = descend(seen, truth, starts, measure, name, rate, plan.n_steps, decay)
                found = ends(path, truth)
                row = {"loss": measure, "optimiser": name, "decay": decay, "rate": rate}
                rows.append(row | summary(found) | {"of_reaching": mean(found["settled"][reach])})
    return rows


def _reaches(image: Tensor, truth: Gabor2d, starts: Tensor) -> Tensor:
    """Whether steepest descent from these starts ends at the truth."""
    found = circle(image, truth)
    gaps = (found.grids[0][:, None] - starts + math.pi).remainder(math.tau) - math.pi
    return found.basins[gaps.abs().argmin(0)] < found.n_best


def window(plan: Plan) -> Rows:
    """Steps in the theory's units, from starts within the basin: measured beside predicted."""
    truth, width = planted(), predicted_width(planted())
    images = [standardised(image) for image in plan.images.values()]
    R = torch.stack([root(patches(image)) for image in images])
    P = torch.stack([patches(image)[::4] for image in images])
    slopes = gabor_jacobian(truth, KERNEL)["orientation"].double().flatten()
    unit = {  # of these c is 1
        "RMSE": R / (R @ slopes).norm(dim=-1)[:, None, None],
        "L1": P / (P @ slopes).abs().mean(-1)[:, None, None],
    }
    unit["MSE"] = unit["RMSE"]
    near = TRUTH + width * torch.linspace(-0.7, 0.7, 8).expand(len(images), -1)
    everywhere = plan.starts().expand(len(images), -1)
    runs = [("MSE", "SGD", "η c²", rate, near)
            for rate in (0.02, 0.1, 0.5, 0.9, 0.98, 1.02, 1.1, 1.5, 2.0)]  # fmt: skip
    runs += [(m, "SGD", "η c / w", rate, near)
             for m in ("RMSE", "L1") for rate in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)]  # fmt: skip
    runs += [("RMSE", f"momentum {beta}", "η c / w", rate, everywhere)
             for beta in (0.0, 0.5, 0.9, 0.99) for rate in (0.03, 0.3)]  # fmt: skip
    rows = []
    for measure, optimiser, name, rate, starts in runs[:: 1 if plan.full else 2]:
        step = rate * (1 if measure == "MSE" else width)
        path, _ = descend(unit[measure], truth, starts, measure, optimiser, step, 200)
        row = {"loss": measure, "optimiser": optimiser, "unit": name, "rate": rate}
        row["predicted"] = 0.0 if measure == "MSE" else step / 2
        row["starts"] = "near" if starts is near else "all"
        rows.append(row | summary(ends(path, truth)))
    return rows


def scale(plan: Plan) -> Rows:
    """What the image's scale, mean and padding do to slope, step window and minima."""
    truth, rows = planted(), []
    ways = {
        "0…1": lambda image: image,
        "0…255": lambda image: 255 * image,
        "0…1, centred": lambda image: image - image.mean(),
        "mean 0, deviation 1": standardised,
    }
    for name, changed in ways.items():
        for padding in PADDINGS:
            images = [changed(image) for image in plan.images.values()]
            R = torch.stack([root(patches(image, padding)) for image in images])
            c = slope(R, truth)
            found = [circle(image, truth, padding) for image in images]
            starts = plan.starts().expand(len(images), -1)
            row = {"scale": name, "padding": "valid" if padding == 0 else "zeros"}
            row |= {"c": c.median().item(), "largest_step": c.median().item() ** -2}
            row |= {"share": mean([one.share_to_best for one in found])}
            row |= {"spurious": mean([one.n_spurious / 2 for one in found])}
            path, _ = descend(R, truth, starts, "MSE", "SGD", 0.3, plan.n_steps)
            rows.append(row | {"settled": mean(ends(path, truth)["settled"])})
    return rows


def stability(plan: Plan) -> Rows:
    """`step_limit` on one photograph, beside c from the patches."""
    image, truth = plan.images["camera"], planted()
    c = slope(root(patches(image)), truth).item()
    rows = []
    for name, loss in (("mse", F.mse_loss), ("rmse", lambda a, b: F.mse_loss(a, b).sqrt())):
        found = step_limit(problem(image, truth, loss=loss))
        row = {"loss": name, "exponent": found.exponent, "slope": found.slopes[-1]}
        row |= {"c": c, "is_cone": found.is_cone, "step_limit": found.step_limit}
        rows.append(row | {"predicted_limit": 0.0 if found.is_cone else c**-2})
    return rows


def conditioning(plan: Plan) -> Rows:
    """Condition of the information about all six parameters: photograph, white, whitened."""
    rows = []
    for where, name, image in both(plan):
        layer = GaborConv2d(1, 1, KERNEL, bias=False, start=planted(), dtype=torch.float64)
        seen, flat = identifiability(layer, image), identifiability(layer, whitened(image))
        row = {"collection": where, "image": name, "photograph": seen.condition.item()}
        rows.append(row | {"whitened": flat.condition.item(), "white": seen.white_condition.item()})
    return rows


def training(plan: Plan) -> Rows:
    """All six parameters by Adam from one random start each: how often does the kernel arrive?"""
    generator = torch.Generator().manual_seed(0)
    truth, start = random_gabors(plan.n_random, generator), random_gabors(plan.n_random, generator)
    wanted = gabor(truth, KERNEL).flatten(1)
    white = torch.eye(KERNEL**2, dtype=torch.float64)
    rows = []
    for kind, change in (("white", None), ("photograph", standardised), ("whitened", whitened)):
        shares = []
        for image in [None] if change is None else plan.images.values():
            R = (white if image is None else root(patches(change(image)))).float().T
            power = (wanted @ R).square().sum(-1)
            layer = GaborConv2d(1, plan.n_random, KERNEL, bias=False, coordinates="textbook",
                                start=start)  # fmt: skip
            optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.n_steps)
            for _ in range(plan.n_steps):
                optimizer.zero_grad()
                gap = layer.weight.flatten(1) - wanted
                ((gap @ R).square().sum(-1) / power).sum().backward()
                optimizer.step()
                schedule.step()
            gap = layer.weight.detach().flatten(1) - wanted
            shares.append(mean(gap.norm(dim=-1) < 0.01 * wanted.norm(dim=-1)))
        rows.append({"input": kind, "images": len(shares), "succeeds": mean(shares),
                     "least": min(shares), "most": max(shares)})  # fmt: skip
    return rows


def random_gabors(n: int, generator: torch.Generator) -> Gabor2d:
    def within(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, generator=generator)

    wavelength = within(4.0, 6.5)
    return Gabor2d.of(
        orientation=within(0, math.pi), wavelength=wavelength, phase=within(-math.pi, math.pi),
        sigma=wavelength * within(0.3, 0.5), aspect_ratio=within(0.7, 1.0),
        amplitude=within(0.5, 2.0),
    )  # fmt: skip


def remedies(plan: Plan, collection: str) -> Rows:
    """Each remedy alone and together, learning θ from all starts, γ = 1 and 0.5."""
    images = {"scikit-image": plan.images, "Kodak": plan.kodak}[collection]
    shares: dict[str, list[float]] = {name: [] for name in REMEDIES}
    for gamma in (1.0, 0.5) if images else ():
        truth = planted(gamma)
        around, done = truth.replace(orientation=torch.arange(0.0, 360, 4).deg2rad()), {}
        for name, (way, bare, whiten, several) in REMEDIES.items():
            if (way, bare, whiten) not in done:
                R = torch.stack([_root_of(image, bare, whiten) for image in images.values()])
                if "right" in way:  # 1 / (2 c²), with the largest c that there is
                    R = R / (2 * slope(R, around).square().amax(-1)).sqrt()[:, None, None]
                rate, measure = 1.0 if "right" in way else 0.1, way.partition(",")[0]
                starts = plan.starts().expand(len(R), -1)
                path, loss = descend(R, truth, starts, measure, "SGD", rate, plan.n_steps)
                done[way, bare, whiten] = ends(path, truth)["settled"], loss
            settled, loss = done[way, bare, whiten]
            if several:  # four starts an eighth of a turn apart, of which the lowest loss is kept
                loss, settled = loss.unflatten(1, (4, -1)), settled.unflatten(1, (4, -1))
                settled = settled.gather(1, loss.argmin(1, keepdim=True))
            shares[name].append(mean(settled))
    n = len(images) * plan.n_starts * 2
    return [
        {"remedy": name, "collection": collection, "runs": n, "succeeds": mean(found)}
        for name, found in shares.items()
        if found
    ]


def _root_of(image: Tensor, bare: bool, whiten: bool) -> Tensor:
    """Responses to the image padded by zeros or, bare, to it alone and less their mean.

    Whitening filters image and responses, which changes no kernel.
    """
    image = F.pad(image, [0 if bare else KERNEL // 2] * 4)
    seen = patches(whitened(image) if whiten else image)
    return root(seen - seen.mean(0) if bare else seen)


def recovering(plan: Plan, noise: float = 0.1) -> Rows:
    """`recover` from zero-padded, un-centred images, and a fine-tuning by gradients after it."""
    generator, rows = torch.Generator().manual_seed(0), []
    for where, name, image in both(plan):
        for gamma in (1.0, 0.5):
            truth = planted(gamma)
            clean = problem(image, truth, "same").targets
            white = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
            targets = clean + noise * clean.std() * white
            found = recover(image, targets, KERNEL, padding="same")
            layer = GaborConv2d(1, 1, KERNEL, padding="same", bias=False, start=found.params,
                                dtype=torch.float64)  # fmt: skip
            optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
            for _ in range(50):
                optimizer.zero_grad()
                F.mse_loss(layer(image), targets).backward()
                optimizer.step()
                schedule.step()
            row = {"collection": where, "image": name, "aspect_ratio": gamma, "noise": noise}
            for way, params in (("recovered", found.params), ("tuned", layer.params.detach())):
                wanted = gabor(truth, KERNEL).double()
                gap = gabor(params, KERNEL).view_as(wanted) - wanted
                row[f"{way}_kernel_error"] = (gap.norm() / wanted.norm()).item()
                row[f"{way}_turn"] = math.remainder(params.orientation.item() - TRUTH, math.pi)
            rows.append(row)
    return rows


def field(plan: Plan) -> Rows:
    """The experiment as it was first told: RMSE, θ only, from -π/4, ten optimisers' settings."""
    image, truth, rows = plan.images["camera"], planted(), []
    start = torch.tensor([[TRUTH - math.pi / 2]])
    settings = [(name, rate) for name in OPTIMISERS for rate in (0.01, 0.1, 1.0)]
    for padding in PADDINGS:
        for name, rate in [*settings, ("Adam", 0.001)]:
            R = root(patches(image, padding))[None]
            path, _ = descend(R, truth, start, "RMSE", name, rate, plan.n_steps)
            found = {key: value.item() for key, value in ends(path, truth).items()}
            row = {"padding": "valid" if padding == 0 else "zeros", "optimiser": name, "rate": rate}
            amplitude = None if math.isnan(found["amplitude"]) else found["amplitude"]
            rows.append(row | found | {"amplitude": amplitude, "end": path[-1].item()})
    return rows


def shapes(plan: Plan) -> Rows:
    """The minima of one photograph under the same conditions."""
    rows = []
    for gamma in (1.0, 0.5):
        for padding in PADDINGS:
            found = circle(plan.images["camera"], planted(gamma), padding)
            at = sorted({round(math.degrees(one.position[0])) % 180 for one in found.minima})
            row = {"aspect_ratio": gamma, "padding": "valid" if padding == 0 else "zeros"}
            rows.append(row | {"share": found.share_to_best, "minima": at})
    return rows


# -- the figures -----------------------------------------------------------------------------------


def figures(plan: Plan, sections: dict[str, Rows]) -> dict[str, Any]:
    """The article's pictures; of photographs only losses are drawn."""
    from matplotlib.figure import Figure

    blue, orange, green, red = "#0072B2", "#E69F00", "#009E73", "#D55E00"

    def panels(*titles: str, height: float = 2.7) -> tuple[Figure, list[Any]]:
        figure = Figure(figsize=(7.2, height), layout="constrained")
        places = figure.subplots(1, len(titles), squeeze=False)[0].tolist()
        for place, title in zip(places, titles, strict=True):
            place.set_title(title)
        return figure, places

    made = {}
    made["antipode"], (place,) = figure, _ = panels("Squared error over θ, everything else right")
    angles = torch.linspace(-90, 90, 361)
    turned = gabor(planted().replace(orientation=angles.deg2rad()), KERNEL).flatten(-2).double()
    gaps = turned - gabor(planted(), KERNEL).flatten().double()
    for image in plan.images.values():
        curve = (gaps @ root(patches(image)).T).square().sum(-1)
        place.plot(angles, curve / curve.max(), color=blue, alpha=0.45, linewidth=0.8,
                   label="photographs of scikit-image")  # fmt: skip
    curve = gaps.square().sum(-1)
    place.plot(angles, curve / curve.max(), color=plots.INK, linewidth=2, label="white input")
    for at, name in ((-45, "start"), (45, "truth")):
        place.axvline(at, color=red, linestyle=":")
        place.text(at, 1.03, name, color=red, ha="center")
    place.set(xlabel="θ, degrees", ylabel="share of the largest", xticks=range(-90, 91, 45),
              ylim=(-0.02, 1.1))  # fmt: skip
    names = dict(zip(*reversed(place.get_legend_handles_labels()), strict=True))
    figure.legend(names.values(), names.keys(), loc="outside lower center", ncols=2)

    made["basin"], (place,) = panels("Half-width of the basin on white input", height=3.4)
    for gamma, mark, color in ((1, "o", blue), (0.7, "s", orange), (0.5, "^", green)):
        rows = [row for row in sections["basin"] if row["aspect_ratio"] == gamma]
        x, y = ([math.degrees(row[key]) for row in rows] for key in ("predicted", "measured"))
        place.plot(x, y, mark, color=color, markersize=4, label=f"γ = {gamma:g}")
    place.plot([0, 80], [0, 80], color=plots.MUTED, linestyle=":", label="equal")
    place.set(xlabel="λ / (√2 π σ_y), degrees", ylabel="measured, degrees")
    place.legend()

    made["minima"], places = panels("γ = 1", "γ = 0.5")
    kinds = (("no border", "valid", False), ("zeros", "zeros", False),
             ("zeros,\ncentred", "zeros", True))  # fmt: skip
    for place, gamma in zip(places, (1.0, 0.5), strict=True):
        for i, (_, padding, centred) in enumerate(kinds):
            rows = [r for r in sections["minima"] if r["aspect_ratio"] == gamma
                    and r["padding"] == padding and r["centred"] == centred]  # fmt: skip
            shares = [100 * s for r in rows for s in r["share"]]
            spread = [i + 0.5 * (j / len(shares) - 0.5) for j in range(len(shares))]
            place.plot(spread, shares, ".", color=blue, markersize=3)
            place.plot([i - 0.3, i + 0.3], [mean(shares)] * 2, color=red, linewidth=2)
        place.set(xticks=range(3), xticklabels=[name for name, *_ in kinds], ylim=(0, 105))
    places[0].set_ylabel("starts that roll down to the truth, %")

    camera = plan.images["camera"]
    made["zeros"] = plots.plot_landscape(circle(camera, planted(), "same"))

    made["cone"], places = panels("The losses at the truth", "θ, step by step")
    near = torch.linspace(-12, 12, 121)
    gaps = gabor(planted().replace(orientation=TRUTH + near.deg2rad()), KERNEL).flatten(-2).double()
    error = (gaps - gabor(planted(), KERNEL).flatten().double()) @ root(patches(camera)).T
    for curve, name, color in ((error.norm(dim=-1), "RMSE", red),
                               (error.square().sum(-1), "squared error", blue)):  # fmt: skip
        places[0].plot(near, curve / curve.max(), color=color, label=name)
    places[0].set(xlabel="θ − truth, degrees", ylabel="share of the largest drawn")
    R, c = root(patches(camera)), slope(root(patches(camera)), planted()).item()
    start = torch.tensor([[TRUTH + 0.5]])
    runs = [("RMSE", 0.02 / c, "#F0B090"), ("RMSE", 0.2 / c, red), ("MSE", 0.3 / c**2, blue)]
    for measure, rate, color in runs:
        path, _ = descend(R[None], planted(), start, measure, "SGD", rate, 60)
        name = f"{'η c²' if measure == 'MSE' else 'η c'} = {rate * c ** (1 + (measure == 'MSE')):g}"
        places[1].plot((path.flatten() - TRUTH).rad2deg(), color=color, label=f"{measure}, {name}")
    places[1].set(xlabel="step", ylabel="θ − truth, degrees")
    for place in places:
        place.legend()

    made["window"], places = panels("Squared error: who settles", "RMSE and L1: how far it cycles")
    rows = [r for r in sections["window"] if r["starts"] == "near"]
    mse = [r for r in rows if r["loss"] == "MSE"]
    places[0].plot([r["rate"] for r in mse], [100 * r["settled"] for r in mse], "o-", color=blue)
    places[0].axvline(1, color=plots.MUTED, linestyle=":")
    places[0].set(xlabel="η c²", ylabel="settle, %")
    for measure, mark, color in (("RMSE", "o", red), ("L1", "+", green)):
        chosen = [r for r in rows if r["loss"] == measure and r["amplitude"] is not None]
        places[1].loglog([r["predicted"] for r in chosen], [r["amplitude"] for r in chosen], mark,
                         color=color, label=measure, markersize=9, fillstyle="none")  # fmt: skip
    ends_of_line = [min(r["predicted"] for r in rows if r["predicted"]), predicted_width(planted())]
    places[1].plot(ends_of_line, ends_of_line, color=plots.MUTED, linestyle=":", label="equal")
    places[1].set(xlabel="η c / 2, rad", ylabel="measured, rad")
    places[1].legend()

    made["conditioning"], (place,) = panels("Condition of the information, six parameters")
    rows = sorted(sections["conditioning"], key=lambda row: row["photograph"])
    for key, color in (("photograph", red), ("whitened", blue), ("white", plots.MUTED)):
        style = "-" if key == "white" else "o"
        place.semilogy([r[key] for r in rows], style, color=color, markersize=4, label=key)
    place.set(xticks=range(len(rows)), ylabel="condition")
    place.set_xticklabels([r["image"] for r in rows], rotation=60, ha="right")
    place.legend(loc="upper left")

    rows = [r for r in sections["remedies_scikit-image"] if r["collection"] == "scikit-image"]
    told = [(r["remedy"], r["succeeds"]) for r in rows]
    for name, way in (("recover", "recovered"), ("recover, then fine-tuning", "tuned")):
        rows = [r for r in sections["recovering"] if r["collection"] == "scikit-image"]
        told.append((name, mean([recovers(r, way) for r in rows])))
    made["remedies"], (place,) = panels("Runs that find the truth", height=3.6)
    colors = [plots.MUTED] + [orange] * 5 + [blue] * 6 + [green] * 2
    place.barh([name for name, _ in told], [100 * share for _, share in told], color=colors)
    for i, (_, share) in enumerate(told):
        place.text(100 * share + 1, i, f"{100 * share:.0f} %", va="center")
    place.invert_yaxis()
    place.set(xlim=(0, 108), xlabel="%")
    return made


# -- the script ---------------------------------------------------------------------------------


def compute(plan: Plan, n_jobs: int) -> dict[str, Rows]:
    """All sections, the longest first."""
    tasks: dict[str, tuple[Any, ...]] = {
        "cone_RMSE": (cone, "RMSE"), "cone_L1": (cone, "L1"),
        **{f"remedies_{name}": (remedies, name) for name in ("scikit-image", "Kodak")},
        "minima": (minima,), "training": (training,), "window": (window,),
        "cone_MSE": (cone, "MSE"), "recovering": (recovering,), "scale": (scale,),
        "basin": (basin,), "conditioning": (conditioning,), "stability": (stability,),
        "antipode": (antipode,), "field": (field,), "shapes": (shapes,),
    }  # fmt: skip
    done = Parallel(n_jobs=n_jobs)(
        delayed(_run)(name, function, plan, *rest) for name, (function, *rest) in tasks.items()
    )
    return dict(zip(tasks, done, strict=True))


def _run(name: str, function: Callable[..., Rows], *arguments: Any) -> Rows:
    torch.set_num_threads(1)
    begin = time.perf_counter()
    rows = function(*arguments)
    print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="a folder for figures and numbers")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two small photographs, few starts")
    arguments = parser.parse_args()

    if arguments.quick:
        plan = Plan(photographs(48, ("camera", "gravel")), {}, 4, 80, 10, full=False)
    else:
        folder = arguments.data / "natural" / "kodak"
        files = read_images(folder) if folder.is_dir() else []
        kodak = {name.partition(".")[0]: middle(image.mean(0), 96)
                 for name, image in files}  # fmt: skip
        plan = Plan(photographs(96, SCIKIT_IMAGE), kodak)
    sections = compute(plan, 1 if arguments.quick else arguments.jobs)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from _report import RESULTS, print_table, write_json

    for name, rows in sections.items():
        if rows:
            print_table(name, list(rows[0]), [[told(v) for v in row.values()] for row in rows])
    if arguments.quick and arguments.output is None:
        return
    draw(arguments.output or ROOT / "docs" / "_static" / "why", plan, sections)
    results = {"n_starts": plan.n_starts, "n_steps": plan.n_steps, "sections": sections}
    write_json((arguments.output or RESULTS) / "why_theta_gets_stuck.json", results)


def told(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def draw(folder: Path, plan: Plan, sections: dict[str, Rows]) -> None:
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context():
        mpl.rcParams.update(plots.STYLE)
        # Equal numbers give an equal file.
        mpl.rcParams.update({"svg.hashsalt": "gaborium", "svg.fonttype": "path"})
        for name, figure in figures(plan, sections).items():
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            print(f"Drew {name}.svg")


if __name__ == "__main__":
    main()
