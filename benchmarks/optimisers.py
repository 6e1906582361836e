"""Which training steps find a planted Gabor function, from any start, and what do they cost?

    python benchmarks/optimisers.py                       # every section; hours on one core
    python benchmarks/optimisers.py orientation cost      # some of them
    python benchmarks/optimisers.py orientation --methods NaturalGradient
    python benchmarks/optimisers.py --quick --output /tmp/look    # a quick look

orientation   the π/4 experiment: θ alone is free, 72 starts over the half turn, 12 photographs, 6
              shapes, mean squared error and its root
parameters    all six parameters are free: random targets, one random start each; exact gradients,
              mini-batches, noisy responses, noisy gradients; and what else one might do
cost          a step of training with NaturalGradient beside one of Adam alone, in turns

A run goes on where it was interrupted: finished pieces are kept, each with its commit, and
``--again METHOD`` throws some away. Students compute in float32 and have no bias. NaturalGradient
has its defaults, nothing is tuned, and the loss is a black box to it: ``layer(image)``, the loss,
``loss.backward()``, ``optimizer.step()``. All others get more: four to seven times as many steps,
the best of five rates, chosen for each loss with targets of their own (in section orientation on
four of the very photographs; there they have every third of the starts), and a rate that falls to
zero along a cosine unless it is called constant. Their losses are the same numbers, computed from
the covariance of the patches, which is quicker.
Photographs are grey, with mean 0 and variance 1; nothing is padded.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from _report import RESULTS, ROOT, print_table, provenance, write_json
from layer import SHAPES, Shape, timed
from torch import Tensor, nn
from torch.func import jvp, vmap

from gaborium import Gabor2d, GaborConv2d, fit, gabor
from gaborium.optim import NaturalGradient

SIZE = 15  # px of a kernel
CROP = 96  # px of the photograph, from its middle
TURNED, TARGET, CLOSE, LAST = 72, math.pi / 4, 0.01, 10  # starts, rad, rad, steps
SETTINGS = ((6, 3, 1.0), (6, 3, 0.5), (10, 3, 1.0), (10, 5, 0.5), (4, 2, 1.0), (8, 4, 0.5))
FIELDS = ("orientation", "wavelength", "phase", "sigma", "aspect_ratio", "amplitude")
N_TARGETS, N_TUNING = 200, 50
CROPS, CROP_SIZE = 4, 64  # of a mini-batch, px
NOISE = 0.3  # of the gradient's norm
ADAM_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
SGD_RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
PLAIN_RATES = (1e-3, 5e-3, 0.02, 0.1, 0.5)
SHARES = (1.0, 0.5, 0.25, 0.1, 0.05)  # of the way that a step of NaturalGradient goes
NATURALLY, WITHOUT_GLOBAL_STEPS = "NaturalGradient", "the same without global steps"
Row = dict[str, Any]


class Options(NamedTuple):
    quick: bool
    data: Path
    methods: Sequence[str]
    pieces: Pieces

    def wanted(self, method: str) -> bool:
        return not self.methods or any(word in method for word in self.methods)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="few photographs and steps")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--output", type=Path, help="folder of the JSON files")
    parser.add_argument("--methods", nargs="+", default=(), help="words of names; others wait")
    parser.add_argument("--again", nargs="+", default=(), help="words of names to do again")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if options.quick and not options.output:
        parser.error("--quick needs --output: a quick look must not replace results")
    torch.set_num_threads(1)
    # Targets are drawn beyond what a kernel holds, on purpose.
    warnings.filterwarnings("ignore", message=".*do not fit kernel_size")
    for name in options.sections or SECTIONS:
        path = (options.output or RESULTS) / f"optimisers_{name}.json"
        pieces = Pieces(path, options.again)
        SECTIONS[name](Options(options.quick, options.data, options.methods, pieces))
        pieces.write(say=True)


class Pieces:
    """Rows of a section, written as they come; those of an earlier run are taken over."""

    def __init__(self, path: Path, again: Sequence[str]) -> None:
        self.path, self.rows = path, []
        if path.exists():
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            self.rows = [row for row in rows if not any(word in row["method"] for word in again)]
        self.commit = provenance()["commit"]
        self.begin = time.process_time()

    def find(self, **key: Any) -> list[Row]:
        return [row for row in self.rows if all(row.get(k) == v for k, v in key.items())]

    def add(self, **row: Any) -> None:
        self.rows.append({**row, "commit": self.commit})
        print(f"{time.process_time() - self.begin:7.0f} s", *row.values(), flush=True)
        self.write(say=False)

    def write(self, *, say: bool) -> None:
        write_json(self.path, {"rows": self.rows}, say=say)


# -- images, targets, losses ----------------------------------------------------------------------


def photographs(options: Options) -> dict[str, Tensor]:
    """Grey photographs ``(1, 1, height, width)``, normalised."""
    from PIL import Image

    found = {}
    for path in sorted((options.data / "natural" / "kodak").glob("*.png")):
        grey = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")) / 255.0).mean(-1)
        found[path.stem] = normalised(grey[None, None])
    if not found:
        raise SystemExit(f"No Kodak photographs under {options.data}; see --data.")
    return dict(list(found.items())[: 2 if options.quick else 12])


def normalised(image: Tensor) -> Tensor:
    return (image - image.mean()) / image.std()


def middle(image: Tensor, size: int = CROP) -> Tensor:
    top, left = ((side - size) // 2 for side in image.shape[2:])
    return normalised(image[..., top : top + size, left : left + size])


def random_params(n: int, seed: int) -> Gabor2d:
    """Random Gabor functions that kernels of ``SIZE`` hold, more or less."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

    return Gabor2d.of(
        orientation=uniform(0, math.pi),
        wavelength=uniform(2.5, SIZE),
        phase=uniform(-math.pi, math.pi),
        sigma=uniform(SIZE / 12, SIZE / 3),
        aspect_ratio=uniform(0.3, 1.5),
        amplitude=uniform(0.5, 1.5),
    )


class Losses(NamedTuple):
    """The losses of one batch as a function of kernels: one number per filter.

    With patches x, targets T and noise e on the responses, the mean of ``((W - T)·x - e)²``.
    """

    covariance: Tensor  # (pixels, pixels)
    cross: Tensor | float  # mean of e x, (filters, pixels)
    power: Tensor | float  # mean of e², (filters,)

    @classmethod
    def of(cls, images: Tensor, noise: Tensor | None = None) -> Losses:
        x = F.unfold(images.float(), SIZE).transpose(0, 1).flatten(1)  # (pixels, N)
        covariance = x @ x.T / x.shape[1]
        if noise is None:
            return cls(covariance, 0.0, 0.0)
        e = noise.transpose(0, 1).flatten(1)  # (filters, N)
        return cls(covariance, e @ x.T / x.shape[1], e.square().mean(1))

    def mse(self, kernels: Tensor, targets: Tensor) -> Tensor:
        """``(filters,)`` of kernels and targets ``(filters, pixels)``, or several students'."""
        apart = kernels - targets
        copies = len(apart) // len(self.power) if isinstance(self.power, Tensor) else 1
        cross = self.cross.repeat(copies, 1) if isinstance(self.cross, Tensor) else self.cross
        power = self.power.repeat(copies) if isinstance(self.power, Tensor) else self.power
        return (apart * (apart @ self.covariance - 2 * cross)).sum(1) + power


def root(mse: Tensor) -> Tensor:
    """An exact hit, such as a start at the target, has no gradient here; a plain root has NaN."""
    return mse.clamp_min(1e-12).sqrt()


def kernel_errors(found: Tensor, targets: Tensor) -> Tensor:
    """|W - T| / |T|, infinite where nothing is left."""
    found, targets = found.detach().double().flatten(1), targets.double().flatten(1)
    errors = (found - targets).norm(dim=1) / targets.norm(dim=1)
    return errors.nan_to_num(nan=math.inf)


# -- orientation alone ----------------------------------------------------------------------------


def orientation_section(options: Options) -> None:
    images = {name: middle(image).float() for name, image in photographs(options).items()}
    pieces, losses = options.pieces, ("mse", "rmse")
    starts = torch.arange(TURNED, dtype=torch.float64) * math.pi / TURNED
    if options.wanted(NATURALLY):
        for name, image in images.items():
            for setting in SETTINGS:
                for loss in losses:
                    key = {
                        "method": NATURALLY,
                        "photograph": name,
                        "setting": list(setting),
                        "loss": loss,
                    }
                    if not pieces.find(**key):
                        error = turn_naturally(image, setting, loss, starts, options)
                        pieces.add(**key, n=TURNED, settled=int(settled(error).sum()))
    some = starts[::3]
    for method, (make, rates, falls) in TURNERS.items():
        if not options.wanted(method):
            continue
        n_steps = 40 if options.quick else 480
        for loss in losses:
            trials = pieces.find(method=method, loss=loss, what="tuning")
            if not trials:
                few = list(images.values())[::3]
                there = sum(
                    settled(turn(image, loss, some, make, rates, falls, n_steps))
                    .unflatten(0, (len(rates), -1))
                    .sum(1)
                    for image in few
                )
                n = len(few) * len(SETTINGS) * len(some)
                for rate, count in zip(rates, there.tolist(), strict=True):
                    key = {"method": method, "loss": loss, "rate": rate, "what": "tuning"}
                    pieces.add(**key, n=n, settled=count)
                trials = pieces.find(method=method, loss=loss, what="tuning")
            rate = max(trials, key=lambda row: row["settled"])["rate"]
            for name, image in images.items():
                key = {"method": method, "loss": loss, "rate": rate, "photograph": name}
                if not pieces.find(**key):
                    there = settled(turn(image, loss, some, make, [rate], falls, n_steps))
                    counts = there.unflatten(0, (len(SETTINGS), -1)).sum(1).tolist()
                    for setting, count in zip(SETTINGS, counts, strict=True):
                        pieces.add(**key, setting=list(setting), n=len(some), settled=count)
    show_orientation(pieces)


def settled(errors: Tensor) -> Tensor:
    """Filters that stay close to the target, of ``(LAST, filters)``."""
    return (errors < CLOSE).all(0)


def turned_layer(settings: Sequence[tuple[float, ...]], starts: Tensor) -> GaborConv2d:
    """A filter for each setting and start."""
    wavelength, sigma, aspect_ratio = (
        torch.tensor(settings).double().repeat_interleave(len(starts), 0).unbind(1)
    )
    params = Gabor2d.of(
        orientation=starts.repeat(len(settings)),
        wavelength=wavelength,
        sigma=sigma,
        aspect_ratio=aspect_ratio,
    )
    return GaborConv2d(1, len(sigma), SIZE, bias=False, learn="orientation", start=params)


def angle_errors(layer: GaborConv2d) -> Tensor:
    off = layer.params.orientation.detach().flatten().double() - TARGET
    return (torch.remainder(off + math.pi / 2, math.pi) - math.pi / 2).abs()


def turn_naturally(
    image: Tensor, setting: tuple[float, ...], loss: str, starts: Tensor, options: Options
) -> Tensor:
    """Errors of θ in the last steps, ``(LAST, filters)``."""
    layer = turned_layer([setting], starts)
    wavelength, sigma, aspect_ratio = setting
    target = Gabor2d.of(
        orientation=TARGET, wavelength=wavelength, sigma=sigma, aspect_ratio=aspect_ratio
    )
    wanted = F.conv2d(image, gabor(target, SIZE).float()[None, None])
    optimizer = NaturalGradient(layer)
    errors = []
    for _ in range(20 if options.quick else 120):
        optimizer.zero_grad()
        mse = (layer(image) - wanted).square().mean((0, 2, 3))
        (mse if loss == "mse" else root(mse)).sum().backward()
        optimizer.step()
        errors.append(angle_errors(layer))
    return torch.stack(errors[-LAST:])


def turn(
    image: Tensor,
    loss: str,
    starts: Tensor,
    make: Callable[..., torch.optim.Optimizer],
    rates: Sequence[float],
    falls: bool,
    n_steps: int,
) -> Tensor:
    """The same with another optimiser: every start of every setting at every rate."""
    layer = turned_layer(SETTINGS * len(rates), starts)
    ends = turned_layer(SETTINGS * len(rates), torch.full_like(starts, TARGET))
    targets = ends.weight.detach().flatten(1)
    batch = Losses.of(image)
    optimizer = make(layer.parameters(), lr=1.0)
    rate = torch.tensor(rates).repeat_interleave(len(SETTINGS) * len(starts))
    errors = []
    for step in range(n_steps):
        optimizer.zero_grad()
        mse = batch.mse(layer.weight.flatten(1), targets)
        (mse if loss == "mse" else root(mse)).sum().backward()
        step_at(optimizer, rate * (falling(step, n_steps) if falls else 1.0))
        errors.append(angle_errors(layer))
    return torch.stack(errors[-LAST:])


@torch.no_grad()
def step_at(optimizer: torch.optim.Optimizer, rate: Tensor) -> None:
    """A step of an optimiser of rate 1, with a rate of its own for each row of the parameters.

    The steps of SGD and Adam are proportional to their rates, and rows do not mind each other.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.clone() for p in parameters]
    optimizer.step()
    for p, old in zip(parameters, before, strict=True):
        p.copy_(old + rate.reshape(-1, *[1] * (p.ndim - 1)) * (p - old))


def falling(step: int, n_steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / n_steps))


def momentum(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


TURNERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[float, ...], bool]] = {
    "SGD with momentum": (momentum, SGD_RATES, True),
    "SGD with momentum, constant rate": (momentum, SGD_RATES, False),
    "Adam": (torch.optim.Adam, ADAM_RATES, True),
    "Adam, constant rate": (torch.optim.Adam, ADAM_RATES, False),
}


def show_orientation(pieces: Pieces) -> None:
    rows = [row for row in pieces.rows if row.get("what") != "tuning"]

    def share(**key: Any) -> str:
        chosen = [row for row in rows if all(row[k] == v for k, v in key.items())]
        n = sum(row["n"] for row in chosen)
        return f"{sum(row['settled'] for row in chosen) / n:.4f}" if n else "-"

    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        for loss in ("mse", "rmse"):
            key = {"method": method, "loss": loss}
            rates = {row["rate"] for row in pieces.find(**key, what=None) if "rate" in row}
            table.append(
                [
                    method,
                    loss,
                    f"{rates.pop():g}" if rates else "-",
                    str(sum(row["n"] for row in pieces.find(**key, what=None))),
                    share(**key),
                    *(share(**key, setting=list(setting)) for setting in SETTINGS),
                ]
            )
    settings = ["{:g},{:g},{:g}".format(*setting) for setting in SETTINGS]
    print_table(
        f"θ alone: share of starts that settle within {CLOSE:g} rad; by (λ, σ, γ)",
        ["method", "loss", "rate", "n", "all", *settings],
        table,
    )


# -- all six parameters ---------------------------------------------------------------------------


class Task(NamedTuple):
    """Targets to be found, and what is known of them in each step."""

    condition: str
    photograph: Tensor  # whole, (1, 1, height, width)
    targets: Gabor2d
    starts: Gabor2d
    seed: int

    @property
    def kernels(self) -> Tensor:
        """``(filters, 1, SIZE, SIZE)``."""
        return gabor(self.targets, SIZE).float()[:, None]

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Images ``(batch, 1, size, size)`` and noise on the responses, without end."""
        if not self.condition.startswith("batches"):
            image = middle(self.photograph).float()
            while True:
                yield image, None
        generator = torch.Generator().manual_seed(self.seed)
        whole = self.photograph.float()
        power = responses_power(whole, self.kernels) if "0 dB" in self.condition else None
        room = [side - CROP_SIZE + 1 for side in whole.shape[2:]]
        side = CROP_SIZE - SIZE + 1
        while True:
            corners = [torch.randint(n, (CROPS,), generator=generator).tolist() for n in room]
            crops = [
                whole[0, :, top : top + CROP_SIZE, left : left + CROP_SIZE]
                for top, left in zip(*corners, strict=True)
            ]
            noise = None
            if power is not None:
                noise = torch.randn(CROPS, len(power), side, side, generator=generator)
                noise *= power.sqrt()[:, None, None]
            yield torch.stack(crops), noise


def responses_power(image: Tensor, kernels: Tensor) -> Tensor:
    """Variance of each kernel's responses to an image."""
    x = F.unfold(image, SIZE)[0]
    centred = x - x.mean(1, keepdim=True)
    rows = kernels.flatten(1)
    return (rows @ (centred @ centred.T / x.shape[1]) * rows).sum(1)


CONDITIONS = (
    "mse",
    "rmse",
    "batches",
    "batches, 0 dB",
    "white gradient noise",
    "gradient noise of covariance C",
)
COMPARED = ("mse", "rmse", "batches, 0 dB")


def parameters_section(options: Options) -> None:
    images = list(photographs(options).items())[:: 1 if options.quick else 4]  # three
    for number, (name, photograph) in enumerate(images):
        for condition in CONDITIONS:
            if options.wanted(NATURALLY):
                task = planted(condition, photograph, options, seed=10 + number)
                report(
                    options, NATURALLY, name, condition, lambda task=task: naturally(task, options)
                )
    name, photograph = images[0]
    for condition in COMPARED:
        compare(options, name, condition, photograph)
    show_parameters(options.pieces)


def planted(condition: str, photograph: Tensor, options: Options, seed: int) -> Task:
    n = 8 if options.quick else N_TARGETS if seed >= 10 else N_TUNING
    return Task(condition, photograph, random_params(n, seed), random_params(n, seed + 100), seed)


def report(
    options: Options,
    method: str,
    photograph: str,
    condition: str,
    run: Callable[[], Tensor],
    **more: Any,
) -> list[Row]:
    key = {"method": method, "photograph": photograph, "condition": condition, **more}
    if not options.pieces.find(**key):
        errors = run()
        options.pieces.add(
            **key,
            n=len(errors),
            within_1=int((errors < 0.01).sum()),
            within_5=int((errors < 0.05).sum()),
            median_error=f"{errors.median().item():.3g}",
        )
    return options.pieces.find(**key)


def score(row: Row) -> tuple[int, int, float]:
    """What a rate is chosen by."""
    first, second = ("within_5", "within_1") if "dB" in row["condition"] else ("within_1",) * 2
    return row[first], row[second], -float(row["median_error"])


def compare(options: Options, name: str, condition: str, photograph: Tensor) -> None:
    """Every other method: five rates on targets for tuning, the best one on the targets."""
    tuning = planted(condition, photograph, options, seed=1)
    task = planted(condition, photograph, options, seed=10)
    method = WITHOUT_GLOBAL_STEPS
    if options.wanted(method):
        trials: list[Row] = []
        for lr in SHARES:
            trials += report(
                options,
                method,
                name,
                condition,
                lambda lr=lr: naturally(tuning, options, lr=lr, global_step_interval=0),
                rate=lr,
                what="tuning",
            )
        lr = max(trials, key=score)["rate"]
        report(
            options,
            method,
            name,
            condition,
            lambda: naturally(task, options, lr=lr, global_step_interval=0),
            rate=lr,
            what="test",
        )

    key = {"photograph": name, "condition": condition}
    methods = [method for method in STUDENTS if options.wanted(method)]
    together(tuning, {method: STUDENTS[method][1] for method in methods}, "tuning", key, options)
    best = {}
    for method in methods:
        trials = options.pieces.find(method=method, **key, what="tuning")
        best[method] = (max(trials, key=score)["rate"],)
    if ONE_START in best and options.wanted(TEN_STARTS):
        best[TEN_STARTS] = best[ONE_START]
    together(task, best, "test", key, options)


def naturally(task: Task, options: Options, **settings: Any) -> Tensor:
    """Kernel errors after training with NaturalGradient."""
    layer = learner(task.starts)
    optimizer = NaturalGradient(layer, **settings)
    if "gradient noise" in task.condition:
        layer.gradient_hook.kernel.register_hook(noisy(task))
    for (images, noise), _ in zip(
        task.batches(), range(20 if options.quick else 150), strict=False
    ):
        optimizer.zero_grad()
        wanted = F.conv2d(images, task.kernels)
        if noise is not None:
            wanted += noise
        mse = (layer(images) - wanted).square().mean((0, 2, 3))
        (root(mse) if task.condition == "rmse" else mse).sum().backward()
        optimizer.step()
    return kernel_errors(layer.weight, task.kernels)


def noisy(task: Task) -> Callable[[Tensor], Tensor]:
    """Adds noise to the gradient of the kernels, each filter's in proportion to its own norm."""
    generator = torch.Generator().manual_seed(task.seed)
    colour = torch.eye(SIZE**2, dtype=torch.float64)
    if "covariance" in task.condition:
        covariance = Losses.of(middle(task.photograph)).covariance.double()
        colour = torch.linalg.cholesky(covariance + 1e-9 * covariance.trace() * colour)

    def hook(gradient: Tensor) -> Tensor:
        rows = gradient.flatten(1).double()
        noise = torch.randn(rows.shape, generator=generator, dtype=rows.dtype) @ colour.T
        # Of the norm in expectation, so that its length varies as a real one's does.
        expected = colour.square().sum().sqrt()
        noise *= NOISE * rows.norm(dim=1, keepdim=True) / expected
        return gradient + noise.reshape(gradient.shape).to(gradient)

    return hook


def learner(start: Gabor2d, coordinates: str = "wavevector") -> GaborConv2d:
    return GaborConv2d(
        1, len(start.sigma), SIZE, bias=False, learn=FIELDS, start=start, coordinates=coordinates
    )


def together(
    task: Task, rates: dict[str, Sequence[float]], what: str, key: Row, options: Options
) -> None:
    """Train students on the same batches, each at all its rates, and write what they reach."""
    rates = {
        method: values
        for method, values in rates.items()
        if not options.pieces.find(method=method, **key, what=what)
    }
    if not rates:
        return
    shrink = 25 if options.quick else 1
    students = {
        method: (TenStarts if method == TEN_STARTS else STUDENTS[method][0])(task, values, shrink)
        for method, values in rates.items()
    }
    targets = task.kernels.flatten(1)
    batch = None
    for step, (images, noise) in enumerate(task.batches()):
        busy = [student for student in students.values() if step < student.n_steps]
        if not busy:
            break
        if batch is None or task.condition.startswith("batches"):
            batch = Losses.of(images, noise)
        for student in busy:
            student.step(step, batch, targets)
    for method, student in students.items():
        found = student.best().unflatten(0, (len(rates[method]), -1))
        for rate, kernels in zip(rates[method], found, strict=True):
            report(
                options,
                method,
                key["photograph"],
                key["condition"],
                lambda kernels=kernels: kernel_errors(kernels, targets),
                rate=rate,
                what=what,
            )


class Student:
    """Adam on a Gabor layer, with a filter for every rate and target."""

    coordinates = "wavevector"
    steps = 1000
    n_starts = 1

    def __init__(self, task: Task, rates: Sequence[float], shrink: int) -> None:
        self.task, self.n_steps = task, self.steps // shrink
        self.n_copies = len(rates) * self.n_starts
        n = self.n_starts * len(task.targets.sigma)
        self.rates = torch.tensor(rates).repeat_interleave(n)
        self.layer = learner(self.start(), self.coordinates)
        self.mean = torch.zeros(len(self.rates))  # of the losses lately
        self.optimizer = self.make_optimizer(list(self.layer.parameters()))

    def start(self) -> Gabor2d:
        fields = self.task.starts.as_dict()
        return Gabor2d.of(**{name: fields[name].repeat(self.n_copies) for name in FIELDS})

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=1.0)

    def kernels(self) -> Tensor:
        return self.layer.weight.flatten(1)

    def step(self, step: int, batch: Losses, targets: Tensor) -> None:
        self.optimizer.zero_grad()
        self.losses(self.kernels(), batch, targets).sum().backward()
        step_at(self.optimizer, self.rates * self.pace(step))

    def pace(self, step: int) -> float:
        return falling(step, self.n_steps)

    def losses(self, kernels: Tensor, batch: Losses, targets: Tensor) -> Tensor:
        mse = batch.mse(kernels, targets.repeat(self.n_copies, 1))
        self.mean.lerp_(mse.detach(), 0.05)
        return root(mse) if self.task.condition == "rmse" else mse

    def best(self) -> Tensor:
        """The kernels in the end, ``(rates x targets, pixels)``."""
        return self.kernels().detach()


class TextbookStudent(Student):
    coordinates = "textbook"


class TenStarts(Student):
    """Ten starts for every target; the loss chooses, averaged over the last steps."""

    n_starts = 10

    def start(self) -> Gabor2d:
        return random_params(len(self.rates), seed=self.task.seed + 1000)

    def best(self) -> Tensor:
        mean = self.mean.nan_to_num(nan=math.inf).unflatten(0, (self.n_copies, -1))
        kernels = self.kernels().detach().unflatten(0, (self.n_copies, -1))
        return kernels[mean.argmin(0), torch.arange(kernels.shape[1])]


class NarrowFirst(Student):
    """Coarse to fine: every envelope begins narrow and stays so for a third of the steps."""

    def start(self) -> Gabor2d:
        start = super().start()
        return start.replace(sigma=torch.full_like(start.sigma, SIZE / 12))

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return super().make_optimizer([p for p in parameters if p is not self.layer.log_sigma])

    def step(self, step: int, batch: Losses, targets: Tensor) -> None:
        if step == self.n_steps // 3:
            self.optimizer.add_param_group({"params": [self.layer.log_sigma]})
        super().step(step, batch, targets)


class FreeThenFit(Student):
    """An ordinary convolution, the Gabor functions nearest to its kernels, and these trained on."""

    def __init__(self, task: Task, rates: Sequence[float], shrink: int) -> None:
        super().__init__(task, rates, shrink)
        torch.manual_seed(task.seed)
        conv = nn.Conv2d(1, len(self.rates), SIZE, bias=False)
        self.free: nn.Parameter | None = conv.weight
        self.optimizer = self.make_optimizer([conv.weight])
        self.n_free, self.n_fine = self.n_steps, max(1, 100 // shrink)
        self.n_steps += self.n_fine

    def kernels(self) -> Tensor:
        return super().kernels() if self.free is None else self.free.flatten(1)

    def pace(self, step: int) -> float:
        if step < self.n_free:
            return falling(step, self.n_free)
        return falling(step - self.n_free, self.n_fine)

    def step(self, step: int, batch: Losses, targets: Tensor) -> None:
        if step == self.n_free and self.free is not None:
            self.layer.params = fit(self.free.detach().double()[:, 0]).params
            self.free = None
            self.optimizer = self.make_optimizer(list(self.layer.parameters()))
        super().step(step, batch, targets)


class PlainNatural(Student):
    """Natural gradient with the kernels' own metric: Gauss-Newton steps with JᵀJ."""

    radius, damping = 0.3, 1e-3

    def step(self, step: int, batch: Losses, targets: Tensor) -> None:
        raw = dict(self.layer.named_parameters())
        z = torch.cat([value.detach().double().flatten(1) for value in raw.values()], 1)
        kernels, J = self.jacobian(z)
        at = kernels.float().requires_grad_()
        (gradient,) = torch.autograd.grad(self.losses(at, batch, targets).sum(), at)
        hessian = J @ J.mT
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        damped = hessian + torch.diag_embed(self.damping * diagonal + 1e-12)
        slope = (J @ gradient.double().unsqueeze(-1)).squeeze(-1)
        move = -torch.nan_to_num(torch.linalg.solve_ex(damped, slope)[0])
        move *= self.pace(step) * self.rates.double().unsqueeze(1)
        length = (move.unsqueeze(1) @ J).norm(dim=(1, 2))
        allowed = self.radius * kernels.norm(dim=1)
        move *= (allowed / length.clamp_min(1e-300)).clamp_max(1.0).unsqueeze(1)
        sound = self.kernels_of(z + move).isfinite().all(1, keepdim=True)
        with torch.no_grad():
            for name, value in self.split(torch.where(sound, z + move, z)).items():
                raw[name].copy_(value)

    def jacobian(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Kernels ``(filters, pixels)`` and their derivatives ``(filters, p, pixels)``."""
        tangents = torch.eye(z.shape[1], dtype=z.dtype)[:, None].expand(-1, *z.shape)
        kernels, J = vmap(lambda tangent: jvp(self.kernels_of, (z,), (tangent,)))(tangents)
        return kernels[0], J.transpose(0, 1)

    def kernels_of(self, z: Tensor) -> Tensor:
        frozen = {name: value.double() for name, value in self.layer.named_buffers()}
        return self.layer.kernels_at(frozen | self.split(z)).flatten(1)

    def split(self, z: Tensor) -> dict[str, Tensor]:
        raw = dict(self.layer.named_parameters())
        parts = z.split([value[0].numel() for value in raw.values()], 1)
        return {
            name: part.reshape(value.shape)
            for (name, value), part in zip(raw.items(), parts, strict=True)
        }


# Ten starts are not tuned apart: they take the rate of one.
ONE_START, TEN_STARTS = "Adam, wavevector coordinates", "Adam, best of ten starts"
STUDENTS: dict[str, tuple[type[Student], tuple[float, ...]]] = {
    "Adam, textbook coordinates": (TextbookStudent, ADAM_RATES),
    ONE_START: (Student, ADAM_RATES),
    "Gauss-Newton on the kernels, not whitened": (PlainNatural, PLAIN_RATES),
    "Adam, sigma from narrow": (NarrowFirst, ADAM_RATES),
    "free kernels by Adam, fit, Adam": (FreeThenFit, ADAM_RATES),
}


def show_parameters(pieces: Pieces) -> None:
    table = [
        [
            row["method"],
            row["photograph"],
            row["condition"],
            f"{row['rate']:g}" if "rate" in row else "-",
            str(row["n"]),
            f"{row['within_1'] / row['n']:.3f}",
            f"{row['within_5'] / row['n']:.3f}",
            row["median_error"],
        ]
        for row in sorted(pieces.rows, key=lambda row: CONDITIONS.index(row["condition"]))
        if row.get("what") != "tuning"
    ]
    print_table(
        "All six parameters: share of targets whose kernel is found within 1 % and within 5 %",
        ["method", "photograph", "loss", "rate", "n", "1 %", "5 %", "median error"],
        table,
    )


# -- cost -----------------------------------------------------------------------------------------

ADAM, AGAIN, NATURAL = "Adam for all", "Adam for all, again", "NaturalGradient, Adam for the rest"
PERIOD, N_PERIODS = 100, 4  # of that many steps; global steps are frequent in the first only
BLOCK = 20  # steps that give one ratio, for the spread


def cost_section(options: Options) -> None:
    period = BLOCK if options.quick else PERIOD
    for shape in SHAPES:
        if options.pieces.find(shape=str(shape)):
            continue
        steps = {name: training_step(shape, name) for name in (ADAM, AGAIN, NATURAL)}
        names = list(steps)
        times: dict[str, list[float]] = {name: [] for name in names}
        for i in range(N_PERIODS * period):
            # In turns step by step: what slows the machine slows all of them.
            for name in names[i % 3 :] + names[: i % 3]:
                times[name].append(timed(steps[name], "cpu", 1))
        for name in names[1:]:
            for first in range(0, N_PERIODS * period, period):
                part = slice(first, first + period)
                ours, theirs = np.array(times[name][part]), np.array(times[ADAM][part])
                blocks = ours.reshape(-1, BLOCK).sum(1) / theirs.reshape(-1, BLOCK).sum(1)
                options.pieces.add(
                    method=name,
                    shape=str(shape),
                    steps=f"{first + 1}-{first + period}",
                    ratio=round(float(ours.sum() / theirs.sum()), 4),
                    quartiles=np.quantile(blocks, [0.25, 0.75]).round(4).tolist(),
                    median_step=round(float(np.median(ours) / np.median(theirs)), 4),
                )
    print_table(
        f"Time of training over that with Adam for all, quartiles of {BLOCK} steps each, median "
        "step over median step",
        ["shape", "optimisers", "steps", "ratio", "quartiles", "median step"],
        [
            [
                row["shape"],
                row["method"],
                row["steps"],
                f"{row['ratio']:.3f}",
                "({:.3f}, {:.3f})".format(*row["quartiles"]),
                f"{row['median_step']:.3f}",
            ]
            for row in options.pieces.rows
        ],
    )


def training_step(shape: Shape, name: str) -> Callable[[], None]:
    torch.manual_seed(0)
    first = GaborConv2d(
        shape.in_channels,
        shape.out_channels,
        shape.kernel_size,
        shape.stride,
        shape.kernel_size // 2,
        bias=False,
        seed=0,
    )
    rest = nn.Sequential(
        nn.BatchNorm2d(shape.out_channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(shape.out_channels, 10),
    )
    model = nn.Sequential(first, rest)
    images = torch.randn(shape.batch, shape.in_channels, shape.size, shape.size)
    labels = torch.randint(10, (shape.batch,))
    if name == NATURAL:
        optimizers = [NaturalGradient(first), torch.optim.Adam(rest.parameters())]
    else:
        optimizers = [torch.optim.Adam(model.parameters())]

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


SECTIONS: dict[str, Callable[[Options], None]] = {
    "orientation": orientation_section,
    "parameters": parameters_section,
    "cost": cost_section,
}

if __name__ == "__main__":
    main()
