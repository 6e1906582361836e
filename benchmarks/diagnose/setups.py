"""A grammar of training set-ups and of faults, from which the bench of `diagnose` draws.

`draw(seed)` makes a case: a set-up that learns (a module, data, a loss, an optimiser), and in most
cases one or two faults planted in it. The same seed makes the same case. The truth is the draw; a
counterfactual checks it: the sound set-up learns, the faulty one does not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium import Gabor2d, GaborConv1d, GaborConv2d, gabor
from gaborium.diagnostics import TrainingSetup
from gaborium.functions.kernels import orientation_basin
from gaborium.optim import NaturalGradient

ENOUGH = 0.99  # share of the targets' variance that is explained where learning has arrived
ACCURACY = 0.95  # of the training samples, where learning has arrived
N_STEPS = 400
RATES = tuple(10 ** (exponent / 2) for exponent in range(4, -10, -1))

# -- data ------------------------------------------------------------------------------------------

PHOTOGRAPHS = ("astronaut", "camera", "coffee", "coins", "moon", "page", "rocket", "text")
TEXTURES = ("brick", "grass", "gravel")


@cache
def _picture(name: str) -> Tensor:
    from skimage import data

    pixels = torch.from_numpy(getattr(data, name)().copy()).float() / 255
    return pixels if pixels.ndim == 3 else pixels[..., None].expand(-1, -1, 3)


def images(kind: str, n: int, size: int, channels: int, rng: np.random.Generator) -> Tensor:
    """Images ``(n, channels, size, size)`` in about [0, 1]; crops where there is structure."""
    if kind == "noise":
        return torch.from_numpy(rng.random((n, channels, size, size))).float()
    crops = []
    for _ in range(n):
        picture = _picture(str(rng.choice(PHOTOGRAPHS if kind == "photographs" else TEXTURES)))
        tries = []
        for _ in range(8):
            top, left = (int(rng.integers(0, side - size)) for side in picture.shape[:2])
            crop = picture[top : top + size, left : left + size].movedim(-1, 0)
            tries.append(crop if channels == 3 else crop.mean(0, keepdim=True))
        crops.append(max(tries, key=lambda crop: crop.std().item()))
    return torch.stack(crops)


def sounds(n: int, size: int, rng: np.random.Generator) -> Tensor:
    """Sounds ``(n, 1, size)``: decaying tones that glide, under pink noise."""
    time = np.arange(size)
    waves = []
    for _ in range(n):
        wave = np.fft.irfft(
            np.fft.rfft(rng.normal(size=size)) / np.sqrt(np.arange(size // 2 + 1) + 1), size
        )
        for _ in range(6):
            begin, frequency = (
                rng.integers(0, size),
                np.exp(rng.uniform(np.log(0.02), np.log(0.35))),
            )
            glide, decay = rng.uniform(-2e-4, 2e-4), rng.uniform(0.002, 0.02)
            after = np.maximum(time - begin, 0)
            tone = np.cos(2 * np.pi * (frequency + glide * after) * after) * np.exp(-decay * after)
            wave += rng.uniform(0.2, 1.0) * tone * (time >= begin)
        waves.append(wave / wave.std())
    return torch.from_numpy(np.stack(waves)).float()[:, None]


def normalised(data: Tensor) -> Tensor:
    return (data - data.mean()) / data.std()


# -- modules ---------------------------------------------------------------------------------------


class Textbook(nn.Module):
    """Gabor filters as a user writes them: one tensor for each symbol, and the formula.

    Args:
        values: the filters, every field of shape ``(n,)``.
        learn: symbols that are parameters; the others are buffers.
        style: ``"plain"``, ``"log"`` (logarithms of wavelength and sigma) or ``"degrees"``.
    """

    def __init__(
        self,
        values: Gabor2d,
        kernel_size: int,
        learn: Sequence[str],
        style: str = "plain",
        padding: Any = 0,
        channels: int = 1,
    ) -> None:
        super().__init__()
        self.style, self.padding, self.channels = style, padding, channels
        self.reach = (kernel_size - 1) / 2
        self.dilation, self.stride = 1, 1
        for name, value in (
            ("theta", values.orientation),
            ("lambd", values.wavelength),
            ("psi", values.phase),
            ("sigma", values.sigma),
            ("gamma", values.aspect_ratio),
        ):
            stored = value.detach().float().clone().reshape(-1)
            if style == "log" and name in ("lambd", "sigma"):
                stored = stored.log()
            if style == "degrees" and name in ("theta", "psi"):
                stored = stored.rad2deg()
            if name in learn:
                self.register_parameter(name, nn.Parameter(stored))
            else:
                self.register_buffer(name, stored)

    def symbol(self, name: str) -> Tensor:
        value: Tensor = getattr(self, name)
        if self.style == "log" and name in ("lambd", "sigma"):
            value = value.exp()
        if self.style == "degrees" and name in ("theta", "psi"):
            value = value.deg2rad()
        return value[:, None, None]

    def grid(self) -> Tensor:
        return torch.arange(-self.reach, self.reach + 0.5)

    def kernel(self) -> Tensor:
        """Kernels ``(n, channels, k, k)``, the same for all channels."""
        y, x = torch.meshgrid(self.grid(), self.grid(), indexing="ij")
        theta = self.symbol("theta")
        along = x * theta.cos() + y * theta.sin()
        across = y * theta.cos() - x * theta.sin()
        distance = along**2 + (self.symbol("gamma") * across) ** 2
        wave = torch.cos(2 * math.pi * along / self.symbol("lambd") + self.symbol("psi"))
        kernel = torch.exp(-distance / (2 * self.symbol("sigma") ** 2)) * wave
        return kernel[:, None].repeat(1, self.channels, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        kernel = self.kernel().to(image.dtype)
        return F.conv2d(image, kernel, None, self.stride, self.padding, self.dilation)


class BandPass(nn.Module):
    """Filters for sounds with two numbers each: ``"sinc"`` or ``"morlet"``."""

    def __init__(self, kind: str, low: Tensor, width: Tensor, kernel_size: int) -> None:
        super().__init__()
        self.kind, self.kernel_size = kind, kernel_size
        self.stride, self.padding, self.dilation = 1, 0, 1
        self.low, self.width = nn.Parameter(low.clone()), nn.Parameter(width.clone())

    def kernel(self) -> Tensor:
        time = torch.arange(self.kernel_size) - (self.kernel_size - 1) / 2
        low, width = self.low[:, None], self.width[:, None]
        if self.kind == "morlet":
            bell = torch.exp(-0.5 * (2 * math.pi * width * time) ** 2)
            return (bell * torch.cos(2 * math.pi * low * time))[:, None]
        upper, lower = low.abs() + width.abs(), low.abs()
        ideal = 2 * upper * torch.sinc(2 * upper * time) - 2 * lower * torch.sinc(2 * lower * time)
        return (ideal * torch.hamming_window(self.kernel_size, periodic=False))[:, None]

    def forward(self, sound: Tensor) -> Tensor:
        kernel = self.kernel().to(sound.dtype)
        return F.conv1d(sound, kernel, None, self.stride, self.padding, self.dilation)


class Network(nn.Module):
    """A small network: perhaps a convolution, the filters, ReLU, and a readout."""

    def __init__(
        self, stem: nn.Module, filters: nn.Module, readout: nn.Module, gain: float
    ) -> None:
        super().__init__()
        self.stem, self.filters, self.readout, self.gain = stem, filters, readout, gain
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, image: Tensor) -> Tensor:
        response = self.gain * self.filters(self.stem(image)) + self.offset
        answer: Tensor = self.readout(F.relu(response))
        return answer


# -- cases -----------------------------------------------------------------------------------------


@dataclass
class Parts:
    """What a set-up is made of, as a user's script would; faults change it in place."""

    module: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Callable[[Any, Any], Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any]  # of the optimiser
    choices: dict[str, Any]  # what was drawn
    filters: str = ""  # name of the submodule with the filters
    teacher: nn.Module | None = None  # of a regression
    learned: list[nn.Parameter] | None = None  # given to the optimiser; by default all
    after: list[Callable[[TrainingSetup], None]] = field(default_factory=list)

    @property
    def layer(self) -> Any:
        return self.module.get_submodule(self.filters)

    @property
    def is_regression(self) -> bool:
        return self.targets.is_floating_point()

    def build(self) -> TrainingSetup:
        learned = self.learned if self.learned is not None else list(self.module.parameters())
        optimizer = self.optimizer(learned, **self.options)
        setup = TrainingSetup(self.module, self.loss, self.inputs, self.targets, optimizer)
        for change in self.after:
            change(setup)
        return setup


@dataclass(frozen=True)
class Case:
    """A set-up, and the faults in it.

    Args:
        seed: from which it was drawn.
        choices: what was drawn.
        faults: names of the planted faults.
        causes: for each of them, the causes that name it.
        sound: builds the set-up without the faults.
        faulty: builds it with them.
    """

    seed: int
    choices: dict[str, Any]
    faults: tuple[str, ...]
    causes: tuple[tuple[str, ...], ...]
    sound: Callable[[], TrainingSetup]
    faulty: Callable[[], TrainingSetup]


LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {
    "mse": F.mse_loss,
    "rmse": lambda output, target: F.mse_loss(output, target).sqrt(),
    "l1": F.l1_loss,
    "smooth l1": F.smooth_l1_loss,
}
SYMBOLS = ("theta", "lambd", "psi", "sigma", "gamma")
FIELDS = dict(
    zip(SYMBOLS, ("orientation", "wavelength", "phase", "sigma", "aspect_ratio"), strict=True)
)


def sound_parts(seed: int, rate: float) -> Parts:
    """The sound set-up of a seed, with a learning rate."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    family = str(rng.choice(
        ["ours", "textbook", "free", "band-pass", "network", "classifier"],
        p=[0.2, 0.3, 0.08, 0.12, 0.15, 0.15],
    ))  # fmt: skip
    make = {"band-pass": _band_pass, "classifier": _classifier}.get(family, _regression)
    parts = make(family, rng)
    named = {"family": family, "loss": "cross entropy"}
    if parts.is_regression:
        named["loss"] = str(rng.choice(list(LOSSES), p=[0.4, 0.25, 0.15, 0.2]))
        parts.loss = LOSSES[named["loss"]]
    choices = ["sgd", "sgd with momentum", "adam"]
    if isinstance(parts.layer, (GaborConv1d, GaborConv2d)) and parts.filters == "":
        choices.append("natural gradient")
    named["optimizer"] = name = str(rng.choice(choices))
    parts.optimizer = torch.optim.Adam if name == "adam" else torch.optim.SGD
    parts.options = {"lr": rate} | ({"momentum": 0.9} if "momentum" in name else {})
    if name == "natural gradient":
        parts.optimizer = lambda _, **options: NaturalGradient(parts.module, **options)
        parts.options = {"lr": min(rate, 1.0)}
    parts.choices = parts.choices | named
    return parts


def _filters(rng: np.random.Generator, n: int, narrow: bool = False) -> Gabor2d:
    """Planted filters, every field of shape ``(n,)``."""
    wavelength = rng.uniform(4, 8, n)
    return Gabor2d.of(
        orientation=torch.from_numpy(rng.uniform(0, math.pi, n)),
        wavelength=torch.from_numpy(wavelength),
        phase=torch.from_numpy(rng.uniform(-math.pi, math.pi, n)),
        sigma=torch.from_numpy(wavelength * rng.uniform(0.35, 0.55, n)),
        aspect_ratio=torch.from_numpy(rng.uniform(0.5, 0.7 if narrow else 1.1, n)),
    )


def _near(planted: Gabor2d, learn: Sequence[str], rng: np.random.Generator) -> Gabor2d:
    """A start beside the planted filters, within their basin."""
    n = len(planted.orientation)
    sign = torch.from_numpy(rng.choice([-1.0, 1.0], (5, n)))
    share = torch.from_numpy(rng.uniform(0.3, 1.0, (5, n)))
    moves = sign * share
    basin = orientation_basin(planted)
    values = {
        "orientation": planted.orientation + 0.5 * basin * moves[0],
        "wavelength": planted.wavelength * (1 + 0.08 * moves[1]),
        "phase": planted.phase + 0.4 * moves[2],
        "sigma": planted.sigma * (1 + 0.1 * moves[3]),
        "aspect_ratio": planted.aspect_ratio * (1 + 0.1 * moves[4]),
    }
    return planted.replace(**{FIELDS[name]: values[FIELDS[name]] for name in learn})


def _regression(family: str, rng: np.random.Generator) -> Parts:
    """Responses of planted filters, perhaps behind a network, are to be matched."""
    data = str(rng.choice(["photographs", "textures", "noise"]))
    channels, n_filters = int(rng.choice([1, 1, 3])), int(rng.integers(1, 4))
    learn = [SYMBOLS[:1], SYMBOLS[:2], SYMBOLS][rng.integers(0, 3)]
    style = str(rng.choice(["plain", "log", "degrees"])) if family == "textbook" else ""
    n_images, size, kernel_size = int(rng.integers(1, 5)), int(rng.integers(32, 49)), 13
    inputs = normalised(images(data, n_images, size, channels, rng))
    planted = _filters(rng, n_filters)
    start = _near(planted, learn, rng)
    coordinates = str(rng.choice(["textbook", "wavevector"]))
    gains = torch.from_numpy(rng.uniform(0.5, 1.5, (n_filters, channels)))

    def filters(values: Gabor2d) -> nn.Module:
        if family == "textbook" or (family == "network" and style):
            return Textbook(values, kernel_size, learn, style, channels=channels)
        if family == "free":
            layer = nn.Conv2d(channels, n_filters, 7, bias=False)
            with torch.no_grad():
                kernels = gabor(values.replace(sigma=values.sigma.clamp_max(2.0)), (7, 7))
                layer.weight.copy_(kernels[:, None] * gains[:, :, None, None])
            return layer
        record = Gabor2d.of(
            **{name: getattr(values, name)[:, None] for name in FIELDS.values()}
            | {"phase": values.phase[:, None].expand(-1, channels)},
            amplitude=gains,
        )
        return GaborConv2d(
            channels, n_filters, kernel_size, bias=False, start=record, coordinates=coordinates,
            learn=[FIELDS[name] for name in learn],
        )  # fmt: skip

    teacher, student = filters(planted), filters(start)
    if family == "free":
        nn.init.normal_(student.weight, std=0.05)  # type: ignore[arg-type]
    if family == "network":
        n_hidden = int(rng.integers(4, 9))
        readout = nn.Conv2d(n_filters, n_hidden, 1)
        teacher = Network(nn.Identity(), teacher, readout, 1.0)
        student = Network(nn.Identity(), student, copy.deepcopy(readout), 1.0)
    with torch.no_grad():
        targets = teacher(inputs)
    choices = {
        "data": data, "channels": channels, "n_filters": n_filters, "n_images": n_images,
        "learn": list(learn), "style": style, "coordinates": coordinates,
    }  # fmt: skip
    return Parts(
        student, inputs, targets, F.mse_loss, torch.optim.SGD, {}, choices,
        filters="filters" if family == "network" else "", teacher=teacher,
    )  # fmt: skip


def _band_pass(_: str, rng: np.random.Generator) -> Parts:
    """Responses of planted band-pass filters to sounds are to be matched."""
    kind, n = str(rng.choice(["sinc", "morlet"])), int(rng.integers(1, 4))
    inputs = sounds(int(rng.integers(1, 5)), 600, rng)
    low = torch.from_numpy(rng.uniform(0.05, 0.25, n)).float()
    width = torch.from_numpy(rng.uniform(0.03, 0.06, n)).float()
    shift = torch.from_numpy(rng.choice([-1.0, 1.0], n) * rng.uniform(0.2, 0.4, n)).float()
    teacher = BandPass(kind, low, width, 41)
    student = BandPass(kind, low + shift * width, width * (1 - 0.5 * shift), 41)
    with torch.no_grad():
        targets = teacher(inputs)
    choices = {"data": "sounds", "kind": kind, "n_filters": n, "n_images": len(inputs)}
    return Parts(
        student, inputs, targets, F.mse_loss, torch.optim.SGD, {}, choices, teacher=teacher
    )


def _classifier(_: str, rng: np.random.Generator) -> Parts:
    """Patches of three textures are to be told apart by a small network."""
    where, ours = str(rng.choice(["first", "middle"])), bool(rng.integers(0, 2))
    n_each, size, n_filters = 12, 20, 8
    patches = [torch.stack([_patch(name, size, rng) for _ in range(n_each)]) for name in TEXTURES]
    inputs = torch.cat(patches)
    inputs = (inputs - inputs.mean((1, 2, 3), keepdim=True)) / inputs.std((1, 2, 3), keepdim=True)
    labels = torch.arange(len(TEXTURES)).repeat_interleave(n_each)
    channels = 1 if where == "first" else 3
    stem = nn.Identity() if where == "first" else nn.Conv2d(1, channels, 3, padding=1)
    if ours:
        filters: nn.Module = GaborConv2d(
            channels, n_filters, 7, bias=False, start="random", seed=int(rng.integers(1000))
        )
    else:
        filters = Textbook(_filters(rng, n_filters), 7, SYMBOLS, channels=channels)
    readout = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * n_filters, 3))
    network = Network(stem, filters, readout, 1.0)
    choices = {"data": "textures", "where": where, "style": "ours" if ours else "plain"}
    return Parts(
        network, inputs, labels, F.cross_entropy, torch.optim.SGD, {}, choices, filters="filters"
    )


def _patch(name: str, size: int, rng: np.random.Generator) -> Tensor:
    picture = _picture(name).mean(-1)
    top, left = (int(rng.integers(0, side - size)) for side in picture.shape)
    return picture[None, top : top + size, left : left + size]


# -- the truth -------------------------------------------------------------------------------------


def has_learned(setup: TrainingSetup) -> bool:
    """Whether responses are explained, or training samples classified."""
    if setup.targets.is_floating_point():
        return setup.explained() > ENOUGH
    with torch.no_grad():
        guessed = setup.run(setup.module).output.argmax(1)
    return (guessed == setup.targets).double().mean().item() > ACCURACY


def learns(setup: TrainingSetup, n_steps: int = N_STEPS) -> bool:
    """Whether a copy of a set-up learns, and holds what it has learned to the last steps."""
    trial = setup.copy()
    if not all(map(math.isfinite, trial.train(n_steps - 20))) or not has_learned(trial):
        return False
    return all(math.isfinite(loss) for loss in trial.train(20)) and has_learned(trial)


def working_rate(seed: int) -> float | None:
    """A learning rate below the largest with which the sound set-up of a seed learns.

    None: it learns with too few rates, so it is no sound set-up.
    """
    above = False
    for rate in RATES:
        works = learns(sound_parts(seed, rate).build())
        if works and above:
            return rate
        above = works
    return None
