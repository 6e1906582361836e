"""The faults that the bench of `diagnose` plants, each with the causes that name it rightly."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from setups import BandPass, Network, Parts, Textbook, learns, sound_parts, working_rate
from torch import Tensor, nn

from gaborium import GaborConv1d, GaborConv2d
from gaborium.diagnostics import TrainingSetup

Plant = Callable[[Parts, np.random.Generator], None]


class Fault(NamedTuple):
    """A kind of fault.

    Args:
        name: of the fault.
        group: faults of one group are not planted together.
        causes: findings of these causes name it.
        fits: whether it can be planted in a set-up.
        plant: plants it, as much of it as the generator says.
    """

    name: str
    group: str
    causes: tuple[str, ...]
    fits: Callable[[Parts], bool]
    plant: Plant


FAULTS: list[Fault] = []


def fault(
    name: str, group: str, *causes: str, fits: Callable[[Parts], bool] = lambda _: True
) -> Callable[[Plant], Plant]:
    def keep(plant: Plant) -> Plant:
        FAULTS.append(Fault(name, group, causes, fits, plant))
        return plant

    return keep


def _own(parts: Parts) -> bool:
    return isinstance(parts.layer, (GaborConv1d, GaborConv2d))


def _textbook(parts: Parts) -> bool:
    return isinstance(parts.layer, Textbook)


def _written(parts: Parts) -> bool:
    return isinstance(parts.layer, (Textbook, BandPass))


def _network(parts: Parts) -> bool:
    return isinstance(parts.module, Network)


def _plain_descent(parts: Parts) -> bool:
    return parts.optimizer is torch.optim.SGD


def _torch_optimizer(parts: Parts) -> bool:
    return parts.optimizer in (torch.optim.SGD, torch.optim.Adam)


def _regression(parts: Parts) -> bool:
    return parts.is_regression


# -- data ------------------------------------------------------------------------------------------

STEP = ("step too large", "momentum too large", "image scale", "loss scale")


@fault("inputs from 0 to 255", "data", *STEP, fits=_regression)
def _(parts: Parts, rng: np.random.Generator) -> None:
    factor = float(rng.uniform(30, 255))
    parts.inputs, parts.targets = parts.inputs * factor, parts.targets * factor


@fault("shifted targets", "data", "shifted targets", fits=_regression)
def _(parts: Parts, rng: np.random.Generator) -> None:
    pixels = int(rng.choice([-2, -1, 1, 2]))
    parts.targets = parts.targets.roll(pixels, dims=int(rng.integers(2, parts.targets.ndim)))


@fault("shuffled targets", "data", "shuffled targets", fits=lambda parts: len(parts.inputs) >= 3)
def _(parts: Parts, rng: np.random.Generator) -> None:
    order = rng.permutation(len(parts.targets))
    while not parts.is_regression and (parts.targets[order] == parts.targets).double().mean() > 0.5:
        order = rng.permutation(len(parts.targets))
    parts.targets = parts.targets[order if parts.is_regression is False else np.roll(order, 1)]


@fault("targets with another sign", "data", "target scale", fits=_regression)
def _(parts: Parts, _: np.random.Generator) -> None:
    parts.targets = -parts.targets


@fault("targets on another scale", "data", "target scale", fits=_regression)
def _(parts: Parts, rng: np.random.Generator) -> None:
    parts.targets = parts.targets * float(rng.choice([0.1, 0.3, 3.0, 10.0, 255.0]))


@fault("channels in another order", "data", "channel order",
       fits=lambda parts: parts.is_regression and parts.inputs.shape[1] == 3)  # fmt: skip
def _(parts: Parts, _: np.random.Generator) -> None:
    parts.inputs = parts.inputs.flip(1)


@fault("constant inputs", "data", "constant data")
def _(parts: Parts, rng: np.random.Generator) -> None:
    parts.inputs = torch.full_like(parts.inputs, float(rng.choice([0.0, 0.5, 1.0])))


# -- loss ------------------------------------------------------------------------------------------


def _times(factor: float, loss: Callable[..., Tensor], output: Any, target: Any) -> Tensor:
    return factor * loss(output, target)


@fault("negated loss", "loss", "negated loss")
def _(parts: Parts, _: np.random.Generator) -> None:
    parts.loss = partial(_times, -1.0, parts.loss)


@fault("loss that ignores the targets", "loss", "loss ignores the targets", fits=_regression)
def _(parts: Parts, _: np.random.Generator) -> None:
    parts.loss = lambda output, _: output.square().mean()


@fault("loss times a small number", "loss", "loss scale", "vanishing step", fits=_plain_descent)
def _(parts: Parts, rng: np.random.Generator) -> None:
    factor = 10.0 ** rng.uniform(-8, -4)
    parts.loss = partial(_times, factor, parts.loss)


@fault("sum in place of the mean", "loss", "loss reduction", *STEP,
       fits=lambda parts: parts.is_regression and _plain_descent(parts))  # fmt: skip
def _(parts: Parts, _: np.random.Generator) -> None:
    parts.loss = lambda output, target: (output - target).square().sum()


@fault("softmax before cross entropy", "loss", "double softmax",
       fits=lambda parts: not parts.is_regression)  # fmt: skip
def _(parts: Parts, _: np.random.Generator) -> None:
    parts.loss = lambda output, target: F.cross_entropy((10 * output).softmax(1), target)


# -- optimiser -------------------------------------------------------------------------------------

IDLE = ("vanishing step", "loss scale", "does not move")


@fault("learning rate of zero", "optimizer", *IDLE, fits=_torch_optimizer)
def _(parts: Parts, _: np.random.Generator) -> None:
    parts.options["lr"] = 0.0


@fault("schedule that has ended", "optimizer", *IDLE, fits=_torch_optimizer)
def _(parts: Parts, _: np.random.Generator) -> None:
    def end(setup: TrainingSetup) -> None:
        assert setup.optimizer is not None
        for group in setup.optimizer.param_groups:
            group["initial_lr"], group["lr"] = group["lr"], 1e-9 * group["lr"]

    parts.after.append(end)


@fault("tiny learning rate", "optimizer", *IDLE, fits=_torch_optimizer)
def _(parts: Parts, rng: np.random.Generator) -> None:
    parts.options["lr"] *= 10.0 ** rng.uniform(-7, -4)


@fault("large learning rate", "optimizer", *STEP, "cone at the minimum", fits=_torch_optimizer)
def _(parts: Parts, rng: np.random.Generator) -> None:
    parts.options["lr"] *= 10.0 ** rng.uniform(1.5, 3)


@fault("large momentum", "optimizer", "momentum too large", "step too large", fits=_plain_descent)
def _(parts: Parts, rng: np.random.Generator) -> None:
    parts.options["momentum"] = float(rng.choice([0.99, 0.995, 0.999]))


@fault("weight decay", "optimizer", "weight decay", fits=_torch_optimizer)
def _(parts: Parts, rng: np.random.Generator) -> None:
    parts.options["weight_decay"] = 10.0 ** rng.uniform(0, 1.5)


@fault("filters not given to the optimizer", "given", "frozen", fits=_torch_optimizer)
def _(parts: Parts, _: np.random.Generator) -> None:
    own = {id(p) for p in parts.layer.parameters()}
    others = [p for p in parts.module.parameters() if id(p) not in own]
    parts.learned = others or [nn.Parameter(torch.zeros(1))]


@fault("optimizer of another copy", "given", "frozen", fits=_torch_optimizer)
def _(parts: Parts, _: np.random.Generator) -> None:
    parts.learned = list(copy.deepcopy(parts.module).parameters())


@fault("parameters that need no gradient", "given", "frozen",
       fits=lambda parts: _torch_optimizer(parts) and _network(parts))  # fmt: skip
def _(parts: Parts, _: np.random.Generator) -> None:
    parts.layer.requires_grad_(False)


ALTERED = ("altered gradient", "wrong gradient", "no gradient", "vanishing step")


@fault("hook that makes the gradient small", "gradient", *ALTERED, fits=_plain_descent)
def _(parts: Parts, rng: np.random.Generator) -> None:
    factor = 10.0 ** rng.uniform(-9, -5)
    for parameter in parts.layer.parameters():
        parameter.register_hook(lambda gradient: factor * gradient)


@fault("hook that turns the gradient round", "gradient", *ALTERED, fits=_plain_descent)
def _(parts: Parts, _: np.random.Generator) -> None:
    for parameter in parts.layer.parameters():
        parameter.register_hook(lambda gradient: -gradient)


# -- behind the layer ------------------------------------------------------------------------------


@fault("dead units", "behind", "dead units", "no gradient", fits=_network)
def _(parts: Parts, rng: np.random.Generator) -> None:
    with torch.no_grad():
        parts.module.offset.fill_(-(10.0 ** rng.uniform(2, 4)))  # type: ignore[operator,union-attr]


@fault("gradient that vanishes behind the layer", "behind", "vanishing gradient", "vanishing step",
       fits=lambda parts: _network(parts) and _plain_descent(parts))  # fmt: skip
def _(parts: Parts, rng: np.random.Generator) -> None:
    parts.module.gain = 10.0 ** rng.uniform(-8, -4)


# -- layer -----------------------------------------------------------------------------------------


def _becomes(parts: Parts, kind: type[Any]) -> None:
    """Give the layer another class with the same attributes."""
    parts.layer.__class__ = kind


class _ThroughData:
    def kernel(self) -> Tensor:
        kernel = torch.zeros_like(super().kernel())  # type: ignore[misc]
        kernel.data = super().kernel().data  # type: ignore[misc]
        return kernel


class _WithoutGrad:
    def kernel(self) -> Tensor:
        with torch.no_grad():
            return super().kernel()  # type: ignore[misc,no-any-return]


class _Stale:
    def kernel(self) -> Tensor:
        alive = super().kernel()  # type: ignore[misc]
        if not hasattr(self, "kept"):
            self.kept = alive.detach().clone()
        return self.kept + (alive - alive.detach())


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return -0.5 * gradient


class _WrongGradient:
    def kernel(self) -> Tensor:
        return _Turned.apply(super().kernel())  # type: ignore[misc,no-any-return]


class _OffCentre:
    def grid(self) -> Tensor:
        return super().grid() - self.shift  # type: ignore[misc,attr-defined,no-any-return]


def _mixed(parts: Parts, mixin: type[Any]) -> None:
    base = type(parts.layer)
    _becomes(parts, type(mixin.__name__.strip("_"), (mixin, base), {}))


@fault("kernel through .data", "layer", "no gradient", fits=_written)
def _(parts: Parts, _: np.random.Generator) -> None:
    # Something must have a gradient, or the loop stops with an error of its own.
    parts.layer.gain = nn.Parameter(torch.ones(()))
    _mixed(parts, _ThroughData)
    _gained(parts)


@fault("kernel without gradient", "layer", "no gradient", fits=_written)
def _(parts: Parts, _: np.random.Generator) -> None:
    parts.layer.gain = nn.Parameter(torch.ones(()))
    _mixed(parts, _WithoutGrad)
    _gained(parts)


def _gained(parts: Parts) -> None:
    base = type(parts.layer)
    forward = base.forward
    kind = type(base.__name__, (base,), {"forward": lambda self, x: self.gain * forward(self, x)})
    _becomes(parts, kind)


@fault("kernel computed once", "layer", "stale cache", fits=_written)
def _(parts: Parts, _: np.random.Generator) -> None:
    _mixed(parts, _Stale)


@fault("wrong derivative", "layer", "wrong gradient", fits=_written)
def _(parts: Parts, _: np.random.Generator) -> None:
    _mixed(parts, _WrongGradient)


@fault("grid around another point", "layer", "off-centre grid", "shifted targets", fits=_textbook)
def _(parts: Parts, rng: np.random.Generator) -> None:
    parts.layer.shift = float(rng.choice([-1.0, -0.5, 0.5, 1.0]))
    _mixed(parts, _OffCentre)


@fault("degrees for radians", "start", "wrong unit",
       fits=lambda parts: _textbook(parts) and parts.layer.style == "plain")  # fmt: skip
def _(parts: Parts, _: np.random.Generator) -> None:
    parts.layer.theta.data = parts.layer.theta.data.rad2deg()


@fault("frequency for wavelength", "start", "wrong unit", "aliased wavelength",
       fits=lambda parts: _textbook(parts) and parts.layer.style == "plain")  # fmt: skip
def _(parts: Parts, _: np.random.Generator) -> None:
    parts.layer.lambd.data = 1 / parts.layer.lambd.data


@fault("another dilation than the targets'", "layer", "other convolution",
       fits=lambda parts: parts.is_regression and _written(parts))  # fmt: skip
def _(parts: Parts, _: np.random.Generator) -> None:
    parts.layer.dilation = 2
    margin = (parts.layer.kernel().shape[-1] - 1) // 2
    parts.layer.padding = margin


@fault("bound above the planted wavelength", "layer", "out of reach",
       fits=lambda parts: parts.is_regression and isinstance(parts.layer, GaborConv2d)
       and "wavelength" in parts.layer.learn and parts.filters == "")  # fmt: skip
def _(parts: Parts, _: np.random.Generator) -> None:
    old = parts.layer
    bound = 1.3 * parts.teacher.params.wavelength.max().item()  # type: ignore[union-attr]
    start = old.params.replace(wavelength=old.params.wavelength.clamp_min(1.05 * bound))
    parts.module = GaborConv2d(
        old.in_channels, old.out_channels, old.kernel_size, bias=False, learn=old.learn,
        start=start, min_wavelength=bound,
    )  # fmt: skip


@fault("half precision", "precision", "nan gradient", "vanishing step", "half precision",
       "image scale", fits=lambda parts: _written(parts) and _torch_optimizer(parts))  # fmt: skip
def _(parts: Parts, _: np.random.Generator) -> None:
    parts.module = parts.module.half()
    parts.inputs = 300 * parts.inputs.half()
    if parts.is_regression:
        parts.targets = (300 * parts.targets).half()


# -- start -----------------------------------------------------------------------------------------

FAR = ("antipodal start", "outside the basin", "flat plateau", "spurious minima")


def _turns(parts: Parts) -> bool:
    return parts.is_regression and (
        (_textbook(parts) and parts.layer.theta.requires_grad)
        or (isinstance(parts.layer, GaborConv2d) and "orientation" in parts.layer.learn)
    )


@fault("orientation far off", "start", *FAR, fits=_turns)
def _(parts: Parts, rng: np.random.Generator) -> None:
    _turn(parts, float(rng.uniform(0.35, 0.5) * math.pi))


@fault("opposite orientation", "start", *FAR, fits=_turns)
def _(parts: Parts, _: np.random.Generator) -> None:
    _turn(parts, math.pi / 2)


def _turn(parts: Parts, angle: float) -> None:
    layer, teacher = parts.layer, parts.teacher
    assert teacher is not None
    true: Any = teacher.get_submodule(parts.filters)
    if isinstance(layer, GaborConv2d):
        orientation = true.params.orientation.detach() + angle
        layer.params = layer.params.replace(orientation=orientation)
    else:
        unit = 180 / math.pi if layer.style == "degrees" else 1.0
        layer.theta.data = true.theta.detach() + unit * angle


# -- the draw --------------------------------------------------------------------------------------


class Draw(NamedTuple):
    """A drawn case, as it is kept in a file; ``built`` makes its set-ups again.

    Args:
        seed: of the case.
        rate: learning rate of the sound set-up.
        faults: names of what is planted.
        choices: what the sound set-up is made of.
    """

    seed: int
    rate: float
    faults: tuple[str, ...]
    choices: dict[str, Any]

    @property
    def causes(self) -> list[tuple[str, ...]]:
        """Of each fault, the causes that name it rightly."""
        return [_named(name).causes for name in self.faults]


def _named(name: str) -> Fault:
    return next(one for one in FAULTS if one.name == name)


def built(draw: Draw, *, faulty: bool = True) -> TrainingSetup:
    """The set-up of a case, with its faults or without them."""
    parts = sound_parts(draw.seed, draw.rate)
    rng = np.random.default_rng((draw.seed, 1))
    for name in draw.faults if faulty else ():
        _named(name).plant(parts, rng)
    return parts.build()


def draw(seed: int) -> Draw | None:
    """Draw a case: a quarter of them sound, a fifth with two faults; None if it is no case.

    The sound set-up learns. With its faults it does not: a fault that does no harm is drawn again.
    """
    rate = working_rate(seed)
    if rate is None:
        return None
    parts = sound_parts(seed, rate)
    rng = np.random.default_rng((seed, 2))
    n_faults = int(rng.choice([0, 1, 2], p=[0.25, 0.55, 0.2]))
    if not n_faults:
        return Draw(seed, rate, (), parts.choices)
    for _ in range(6):
        chosen: list[Fault] = []
        for fault in rng.permutation(len(FAULTS)):
            one = FAULTS[fault]
            if (
                len(chosen) < n_faults
                and one.fits(parts)
                and one.group not in {c.group for c in chosen}
            ):
                chosen.append(one)
        found = Draw(seed, rate, tuple(one.name for one in chosen), parts.choices)
        try:
            if not learns(built(found)):
                return found
        except RuntimeError:
            continue  # the loop stops with an error: no case for a diagnosis
    return None
