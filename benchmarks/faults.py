"""The fault bench: does `diagnose` name a planted fault first, and does its remedy mend it?

Every faulty set-up is a sound one with one fault planted in it; every sound one learns. `diagnose`
sees neither names nor answers. A remedy is carried out as it is written, and the set-up is trained
again. Run: python benchmarks/faults.py [--quick] [NAME ...]
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _report import RESULTS, print_table, write_json
from torch import Tensor, nn

from gaborium import Gabor1d, Gabor2d, Gabor3d, GaborConv1d, GaborConv2d, GaborConv3d
from gaborium import gabor_jacobian as jacobian
from gaborium.diagnostics import TrainingSetup, diagnose

PI = math.pi
ENOUGH = 0.99  # share of the targets' variance that is explained where learning has arrived
LEARNT = 0.95  # share of the training samples that are classified where it has arrived
N_STEPS = 400


@dataclass(frozen=True)
class Case:
    """A set-up, and what is planted in it: one of ``causes``, or nothing."""

    name: str
    causes: tuple[str, ...]
    setup: TrainingSetup
    n_steps: int = N_STEPS


# -- images ----------------------------------------------------------------------------------------


def photograph(name: str = "camera", size: int = 96) -> Tensor:
    """A photograph that comes with scikit-image, ``(1, 1, size, size)``, in [0, 1]."""
    from skimage import data, transform

    image = torch.from_numpy(getattr(data, name)().copy()).float()
    image = image.mean(-1) if image.ndim == 3 else image
    side = min(image.shape)
    top, left = ((n - side) // 2 for n in image.shape)
    square = image[top : top + side, left : left + side].numpy() / 255
    small = transform.resize(square, (size, size), anti_aliasing=True)
    return torch.from_numpy(small).float()[None, None]


def normalised(image: Tensor) -> Tensor:
    return (image - image.mean()) / image.std()


def digits() -> tuple[Tensor, Tensor]:
    """Images ``(600, 1, 8, 8)`` of digits, and which they are."""
    from sklearn.datasets import load_digits

    whole = load_digits()
    images = torch.from_numpy(whole.images[:600]).float().unsqueeze(1)
    return normalised(images), torch.from_numpy(whole.target[:600])


# -- set-ups ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """What the sound and the faulty set-ups are variations of."""

    photograph: str
    orientation: float
    wavelength: float
    sigma: float
    kernel_size: int
    size: int = 96

    @property
    def target(self) -> Gabor2d:
        """The planted kernel."""
        return Gabor2d.of(
            orientation=self.orientation, wavelength=self.wavelength, sigma=self.sigma
        )

    @property
    def narrow(self) -> Gabor2d:
        """A planted kernel whose basin is half as wide."""
        return self.target.replace(aspect_ratio=torch.tensor(0.5))

    @property
    def bright(self) -> Tensor:
        """The photograph, in [0, 1]."""
        return photograph(self.photograph, self.size)

    @property
    def image(self) -> Tensor:
        """The photograph with mean 0 and variance 1."""
        return normalised(self.bright)

    def student(
        self,
        *,
        image: Tensor | None = None,
        target: Gabor2d | None = None,
        off: float = -0.25,
        kernel_size: int | None = None,
        learn: Any = "orientation",
        loss: Callable[..., Tensor] = F.mse_loss,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        rate: float | None = None,
        coordinates: str = "textbook",
        padding: Any = 0,
        layer: Callable[..., nn.Module] | None = None,
        stride: int = 1,
        momentum: dict[str, Any] | None = None,
        **start: float,
    ) -> TrainingSetup:
        """The student's experiment: a planted kernel, a layer that starts beside it, a descent.

        ``off`` is how far the orientation starts from the planted one, rad; ``start`` sets other
        fields. By default the step is half of the largest that settles.
        """
        image = self.image if image is None else image
        target = self.target if target is None else target
        size = kernel_size or self.kernel_size
        with torch.no_grad():
            targets = GaborConv2d(1, 1, size, stride, padding, bias=False, start=target)(image)
        first = {"orientation": target.orientation.item() + off} | start
        begin = target.replace(**{name: torch.tensor(value) for name, value in first.items()})
        module: nn.Module
        if layer is None:
            module = GaborConv2d(
                1, 1, size, stride, padding, bias=False, learn=learn, coordinates=coordinates,
                start=begin,
            )  # fmt: skip
        else:
            module = layer(begin, size, padding)
        if rate is None:
            slope = jacobian(target, size)["orientation"][None, None]
            rate = 0.5 / F.conv2d(image, slope.float()).square().mean().item()
        descent = optimizer(module.parameters(), lr=rate, **(momentum or {}))
        return TrainingSetup(module, loss, image, targets, descent)


BASES = (
    Base("camera", PI / 4, 6.0, 3.0, 15),
    Base("astronaut", 1.2, 5.0, 2.2, 13),
    Base("coffee", 2.5, 7.0, 2.6, 17),
)


def rmse(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target).sqrt()


class Foreign(nn.Module):
    """A Gabor layer as somebody else might write it: textbook parameters, a grid of its own."""

    def __init__(self, start: Gabor2d, kernel_size: int, padding: Any = 0) -> None:
        super().__init__()
        self.theta = nn.Parameter(start.orientation.detach().clone().reshape(1))
        for name in ("wavelength", "sigma", "aspect_ratio", "phase"):
            self.register_buffer(name, getattr(start, name).detach().clone().reshape(1))
        self.size, self.padding = kernel_size, padding

    def grid(self) -> Tensor:
        return torch.arange(self.size, dtype=torch.float32) - (self.size - 1) / 2

    def kernel(self, theta: Tensor) -> Tensor:
        y, x = torch.meshgrid(self.grid(), self.grid(), indexing="ij")
        along = x * theta.cos() + y * theta.sin()
        across = y * theta.cos() - x * theta.sin()
        envelope = torch.exp(-(along**2 + (self.aspect_ratio * across) ** 2) / (2 * self.sigma**2))
        wave = torch.cos(2 * PI * along / self.wavelength + self.phase)
        return (envelope * wave)[None, None]

    def forward(self, image: Tensor) -> Tensor:
        return F.conv2d(image, self.kernel(self.theta), padding=self.padding)


class ThroughData(Foreign):
    """The kernel is written into a weight behind autograd's back."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.conv = nn.Conv2d(1, 1, self.size, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        self.conv.weight.data = self.kernel(self.theta)
        return self.conv(image)


class WithoutGrad(Foreign):
    """The kernel is made under no_grad; a gain after it learns."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            kernel = self.kernel(self.theta)
        return self.gain * F.conv2d(image, kernel)


class Rewrapped(Foreign):
    """The kernel is wrapped as a parameter again at every call."""

    def forward(self, image: Tensor) -> Tensor:
        self.weight = nn.Parameter(self.kernel(self.theta))
        return F.conv2d(image, self.weight)


class Cached(Foreign):
    """The kernel is computed at the first call and kept."""

    kept: Tensor | None = None

    def forward(self, image: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.kernel(self.theta).detach()
        alive = self.kernel(self.theta)
        return F.conv2d(image, self.kept + (alive - alive.detach()))


class OffCentre(Foreign):
    """The grid of a published layer: steps of k / (k - 1) px that begin half a pixel too early."""

    def grid(self) -> Tensor:
        return torch.linspace(-self.size // 2 + 1.0, self.size / 2 + 0.5, self.size)


class _Flipped(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, theta: Tensor) -> Tensor:
        return theta.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return -0.5 * gradient


class WrongGradient(Foreign):
    """A derivative written by hand, with the wrong sign."""

    def forward(self, image: Tensor) -> Tensor:
        return F.conv2d(image, self.kernel(_Flipped.apply(self.theta)))


class Classifier(nn.Module):
    """A small network for digits, with a layer of filters first."""

    def __init__(self, first: nn.Module, channels: int, *, norm: bool = False) -> None:
        super().__init__()
        self.first = first
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.head = nn.Linear(channels * 9, 10)

    def forward(self, image: Tensor) -> Tensor:
        answer = F.relu(self.norm(self.first(image)))
        return self.head(F.adaptive_max_pool2d(answer, 3).flatten(1))


def classifier(
    first: nn.Module, channels: int = 12, *, norm: bool = False, rate: float = 0.01, seed: int = 0
) -> TrainingSetup:
    torch.manual_seed(seed)
    images, labels = digits()
    network = Classifier(first, channels, norm=norm)
    return TrainingSetup(
        network, F.cross_entropy, images, labels, torch.optim.Adam(network.parameters(), lr=rate)
    )


def normed(base: Base, amplitude: float) -> TrainingSetup:
    """A layer and the normalisation of its responses, which are known."""
    setup = base.student(learn=None, coordinates="wavevector", phase=1.2, amplitude=amplitude)
    module = nn.Sequential(setup.module, nn.BatchNorm2d(1, affine=False))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    return TrainingSetup(module, setup.loss, setup.inputs, normalised(setup.targets), optimizer)


def filters(n: int = 12, **options: Any) -> GaborConv2d:
    return GaborConv2d(1, n, 5, padding=2, seed=1, start="random", **options)


# -- the faults ------------------------------------------------------------------------------------


def faulty(base: Base) -> dict[str, Callable[[], Case]]:
    """Builders of the faulty cases by name."""
    cases: dict[str, Callable[[], Case]] = {}

    def case(name: str, *causes: str, **options: Any) -> Callable[..., Any]:
        def keep(build: Callable[[], TrainingSetup]) -> Callable[[], TrainingSetup]:
            cases[name] = lambda: Case(name, causes, build(), **options)
            return build

        return keep

    @case("kernel written through .data", "no gradient")
    def _() -> TrainingSetup:
        return base.student(layer=ThroughData)

    @case("kernel made under no_grad", "no gradient")
    def _() -> TrainingSetup:
        return base.student(layer=WithoutGrad)

    @case("kernel wrapped as a parameter again", "no gradient")
    def _() -> TrainingSetup:
        return base.student(layer=Rewrapped)

    @case("degrees for radians", "wrong unit")
    def _() -> TrainingSetup:
        return base.student(
            target=base.narrow, layer=Foreign, orientation=math.degrees(base.orientation - 0.25)
        )

    @case("stale cache", "stale cache")
    def _() -> TrainingSetup:
        return base.student(layer=Cached)

    @case("off-centre grid", "off-centre grid")
    def _() -> TrainingSetup:
        return base.student(layer=OffCentre)

    @case("gradient written by hand, wrong", "wrong gradient")
    def _() -> TrainingSetup:
        return base.student(layer=WrongGradient)

    @case("wavelength below Nyquist", "aliased wavelength")
    def _() -> TrainingSetup:
        target = Gabor2d.of(orientation=0.3, wavelength=3.0, sigma=1.5)
        return base.student(
            target=target, kernel_size=11, learn=None, off=-0.1, wavelength=1.2,
            optimizer=torch.optim.Adam, rate=0.01, coordinates="wavevector",
        )  # fmt: skip

    @case("root of the squared error, fixed step", "cone at the minimum")
    def _() -> TrainingSetup:
        setup = base.student(loss=rmse)
        slope = setup.optimizer.param_groups[0]["lr"] ** -0.5  # c / √0.5
        setup.optimizer.param_groups[0]["lr"] = 0.9 / slope
        return setup

    @case("step too large", "step too large")
    def _() -> TrainingSetup:
        setup = base.student()
        setup.optimizer.param_groups[0]["lr"] *= 40
        return setup

    @case("too much momentum", "momentum too large")
    def _() -> TrainingSetup:
        return base.student(momentum={"momentum": 0.999})

    @case("antipodal start", "antipodal start")
    def _() -> TrainingSetup:
        return base.student(target=base.narrow, off=PI / 2)

    @case("flat plateau", "flat plateau", "outside the basin")
    def _() -> TrainingSetup:
        torch.manual_seed(0)
        target = base.target.replace(aspect_ratio=torch.tensor(0.4))
        noise = torch.randn(1, 1, base.size, base.size)
        return base.student(image=noise, target=target, kernel_size=21, off=-1.0)

    @case("zero padding of a bright image", "zero padding")
    def _() -> TrainingSetup:
        return base.student(
            image=3 * base.bright,
            target=Gabor2d.of(orientation=PI / 4, wavelength=6.0, sigma=3.0),
            padding=7,
            kernel_size=15,
            off=math.radians(-95.0),
        )

    @case("images from 0 to 255", "image scale")
    def _() -> TrainingSetup:
        return base.student(image=255 * base.bright, rate=0.01)

    @case("orientation of a blob", "not identifiable")
    def _() -> TrainingSetup:
        target = Gabor2d.of(orientation=base.orientation, wavelength=1e4, sigma=base.sigma)
        return base.student(target=target, rate=0.001)

    @case("dead filters (digits)", "dead filters")
    def _() -> TrainingSetup:
        layer = filters(learn=("orientation", "wavelength", "sigma", "phase"))
        layer.params = layer.params.replace(amplitude=0 * layer.params.amplitude)
        return classifier(layer)

    @case("duplicate filters (digits)", "duplicate filters")
    def _() -> TrainingSetup:
        layer = filters(learn=("amplitude",), coordinates="textbook")
        layer.params = layer.params[:1]
        return classifier(layer)

    @case("all parameters frozen", "frozen")
    def _() -> TrainingSetup:
        setup = base.student()
        setup.module.requires_grad_(False)
        return setup

    @case("a field left out of learn", "frozen")
    def _() -> TrainingSetup:
        return base.student(learn=("sigma",), sigma=0.9 * base.sigma)

    @case("optimiser of another copy", "frozen")
    def _() -> TrainingSetup:
        setup, other = base.student(), base.student()
        return TrainingSetup(setup.module, setup.loss, setup.inputs, setup.targets, other.optimizer)

    @case("wrong sign of the phase", "wrong sign of phase")
    def _() -> TrainingSetup:
        target = base.target.replace(phase=torch.tensor(1.0))
        return base.student(
            target=target, learn=("sigma",), sigma=0.8 * base.sigma, phase=-1.0, off=0.0,
            optimizer=torch.optim.Adam, rate=0.01,
        )  # fmt: skip

    @case("loss scaled by 1e-6", "loss scale", "vanishing step")
    def _() -> TrainingSetup:
        return base.student(loss=lambda output, target: 1e-6 * F.mse_loss(output, target))

    @case("float16 overflow", "nan gradient")
    def _() -> TrainingSetup:
        setup = base.student(image=255 * base.bright)
        module = setup.module.half()
        return TrainingSetup(
            module, F.mse_loss, setup.inputs.half(), setup.targets.half(),
            torch.optim.SGD(module.parameters(), lr=setup.optimizer.param_groups[0]["lr"]),
        )  # fmt: skip

    @case("root of an exact hit", "nan gradient")
    def _() -> TrainingSetup:
        return base.student(loss=rmse, off=0.0, rate=1e-3)

    @case("amplitude behind batch norm", "amplitude absorbed")
    def _() -> TrainingSetup:
        return normed(base, amplitude=1e4)

    return cases


def sound(base: Base) -> dict[str, Callable[[], Case]]:
    """Builders of the sound cases by name."""
    cases: dict[str, Callable[[], Case]] = {}

    def case(name: str) -> Callable[..., Any]:
        def keep(build: Callable[[], TrainingSetup]) -> Callable[[], TrainingSetup]:
            cases[name] = lambda: Case(name, (), build())
            return build

        return keep

    def all_learn(**options: Any) -> TrainingSetup:
        defaults: dict[str, Any] = {
            "learn": None, "coordinates": "wavevector", "optimizer": torch.optim.Adam,
            "rate": 0.01, "sigma": 0.87 * base.sigma, "wavelength": 1.07 * base.wavelength,
        }  # fmt: skip
        return base.student(**(defaults | options))

    def planted(layer: Any, inputs: Tensor, **other: Any) -> TrainingSetup:
        """A layer that begins beside the one that made the targets."""
        with torch.no_grad():
            targets = layer(inputs)
            params = layer.params.detach()
            layer.params = params.replace(
                wavelength=params.wavelength * 1.05, sigma=params.sigma * 0.93,
                phase=params.phase + 0.2,
            )  # fmt: skip
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        return TrainingSetup(layer, other.get("loss", F.mse_loss), inputs, targets, optimizer)

    case("the student's, squared error")(base.student)
    case("momentum")(lambda: base.student(momentum={"momentum": 0.5}))
    case("Nesterov momentum on the moon")(
        lambda: base.student(
            image=normalised(photograph("moon", base.size)),
            momentum={"momentum": 0.5, "nesterov": True},
        )
    )
    case("all parameters, Adam")(all_learn)
    case("all parameters, textbook coordinates")(lambda: all_learn(coordinates="textbook"))
    case("same padding of a centred image")(lambda: all_learn(padding="same"))
    case("stride 2")(lambda: all_learn(stride=2))
    case("root of the error, Adam with a small step")(lambda: all_learn(loss=rmse, rate=0.002))
    case("mean absolute error, Adam")(lambda: all_learn(loss=F.l1_loss, rate=0.002))
    case("a hand-written layer")(lambda: base.student(layer=Foreign))
    case("already there")(lambda: base.student(off=0.0))

    @case("noise on the targets")
    def _() -> TrainingSetup:
        setup = all_learn()
        torch.manual_seed(0)
        noisy = setup.targets + 0.05 * setup.targets.std() * torch.randn_like(setup.targets)
        return TrainingSetup(setup.module, setup.loss, setup.inputs, noisy, setup.optimizer)

    @case("four filters")
    def _() -> TrainingSetup:
        params = Gabor2d.of(
            orientation=[0.2, 0.9, 1.7, 2.5], wavelength=[5.0, 6.0, 7.0, 4.0], sigma=2.2, phase=0.4
        )
        layer = GaborConv2d(1, 4, 13, start=params, bias=False)
        return planted(layer, base.image)

    @case("one dimension")
    def _() -> TrainingSetup:
        torch.manual_seed(0)
        params = Gabor1d.of(wavelength=[8.0, 5.0], sigma=4.0, phase=0.5)
        return planted(GaborConv1d(1, 2, 25, start=params, bias=False), torch.randn(4, 1, 200))

    @case("three dimensions")
    def _() -> TrainingSetup:
        torch.manual_seed(0)
        params = Gabor3d.of(orientation=[0.5], elevation=0.3, wavelength=4.0, sigma=1.3)
        return planted(
            GaborConv3d(1, 1, 7, start=params, bias=False), torch.randn(2, 1, 14, 14, 14)
        )

    @case("quadrature output")
    def _() -> TrainingSetup:
        params = Gabor2d.of(orientation=[0.4], wavelength=5.0, sigma=2.0)
        layer = GaborConv2d(1, 2, 13, start=params, bias=False, output="quadrature")
        return planted(layer, base.image)

    case("Gabor layer (digits)")(lambda: classifier(filters()))
    case("Gabor layer and batch norm (digits)")(lambda: classifier(filters(), norm=True))
    case("batch norm behind a layer of the right size")(lambda: normed(base, amplitude=0.1))
    case("energy output (digits)")(lambda: classifier(filters(output="energy")))
    case("ordinary convolution (digits)")(
        lambda: classifier(nn.Conv2d(1, 12, 5, padding=2), norm=True)
    )
    case("unit norm and no DC (digits)")(lambda: classifier(filters(unit_norm=True, dc="remove")))
    return cases


# -- the bench -------------------------------------------------------------------------------------


def arrived(setup: TrainingSetup) -> bool:
    """Whether it has learnt: responses are explained, or training samples classified."""
    explained = setup.explained()
    if not math.isnan(explained):
        return explained > ENOUGH
    if setup.targets.is_floating_point():
        return False
    with torch.no_grad():
        guessed = setup.run(setup.module).output.argmax(1)
    return (guessed == setup.targets).float().mean().item() > LEARNT


def trained(setup: TrainingSetup, n_steps: int) -> bool:
    losses = setup.train(n_steps)
    return math.isfinite(losses[-1]) and arrived(setup)


def examined(build: Callable[[], Case]) -> dict[str, Any]:
    """What `diagnose` says of one case, and what becomes of it with the remedy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = build()
        without = trained(case.setup.copy(), case.n_steps)
        began = time.process_time()
        setup = case.setup
        result = diagnose(
            setup.module, setup.loss, (setup.inputs, setup.targets), optimizer=setup.optimizer
        )
        seconds = time.process_time() - began
        first = result.findings[0] if result.findings else None
        with_it = None
        if case.causes and first is not None and first.remedy:
            with_it = trained(result.with_remedy(first), case.n_steps)
    return {
        "name": case.name,
        "planted": list(case.causes),
        "arrives_without_remedy": without,
        "first": None if first is None else first.cause,
        "severity": None if first is None else first.severity.name,
        "named_first": bool(case.causes) and first is not None and first.cause in case.causes,
        "n_severe": len(result.severe),
        "causes": [f"{found.cause} ({found.severity.name})" for found in result.findings],
        "skipped": result.skipped,
        "arrives_with_remedy": with_it,
        "cpu_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Does diagnose name planted faults?")
    parser.add_argument("names", nargs="*", help="cases to look at, by a part of their names")
    parser.add_argument("--quick", action="store_true", help="one photograph of three")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [
        (kind, base, name, build)
        for base in BASES[: 1 if options.quick else None]
        for kind, builders in (("faulty", faulty(base)), ("sound", sound(base)))
        for name, build in builders.items()
        # Digits are the same beside every photograph.
        if base is BASES[0] or not name.endswith("(digits)")
        if not options.names or any(part in name for part in options.names)
    ]
    rows = []
    for kind, base, name, build in cases:
        row = {"kind": kind, "photograph": base.photograph} | examined(build)
        rows.append(row)
        first = f"{row['first']} ({row['severity']})" if row["first"] else "nothing"
        ends = f"arrives: {row['arrives_without_remedy']}, mended: {row['arrives_with_remedy']}"
        print(f"{kind:6s} {base.photograph:9s} {name:45s} {first:32s} {ends}", flush=True)
    summary = summed_up(rows)
    print_table("The fault bench", ["", "of", "n"], [[k, *map(str, v)] for k, v in summary.items()])
    if not options.names:
        found = {name: {"of": of, "n": n} for name, (of, n) in summary.items()}
        write_json(options.output / "faults.json", {"summary": found, "cases": rows})


def summed_up(rows: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """How many cases there are of a kind, and of how many something is true."""
    faults = [row for row in rows if row["kind"] == "faulty"]
    fine = [row for row in rows if row["kind"] == "sound"]
    return {
        "faulty: planted cause named first": (len(faults), sum(r["named_first"] for r in faults)),
        "faulty: arrives with the first remedy": (
            len(faults),
            sum(bool(r["arrives_with_remedy"]) for r in faults),
        ),
        "faulty: arrives without it": (
            len(faults),
            sum(r["arrives_without_remedy"] for r in faults),
        ),
        "sound: no severe finding": (len(fine), sum(r["n_severe"] == 0 for r in fine)),
        "sound: arrives": (len(fine), sum(r["arrives_without_remedy"] for r in fine)),
    }


if __name__ == "__main__":
    main()
