"""The natural gradient on the family of Gabor kernels, with steps across the hills of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gaborium.layers import GABOR_LAYERS, KernelTap
from gaborium.optim.family import KernelFamily
from gaborium.optim.inputs import draw_patches, mean_patch, moments_of
from gaborium.optim.quadratic import Evidence, Metric
from gaborium.optim.steps import Slopes, descend, leap

_PATCH_MOMENTUM = 0.9  # of the patches' moments, from look to look
_HEEDED = 1e-6  # share of the gradient that the responses' means must have, to be heeded
_STALE = 0.05  # share of a kernel by which it may change before its derivatives are found anew
_SELDOM = 20  # times leap_every: as rare as leaps become
_CERTAIN = 3.0  # standard errors by which a leap must be better


class NaturalGradient(Optimizer):
    """Trains the Gabor layers of a model; any other optimiser trains the rest beside it.

    Of every layer the covariance C of its input patches is known, and from the gradient of the
    *kernels* their loss as a quadratic (see ``gaborium.optim.quadratic``). A step minimises it
    over the Gabor functions near by: Gauss-Newton in the raw parameters with C as the metric,
    which is natural gradient descent on the family of kernels, within a radius that is measured in
    responses. So one learning rate serves all fields, every sigma, and images of any contrast. From
    time to time a filter leaps to the best Gabor function of all, where the quadratic says that it
    is clearly better than the one at hand: out of the minima that no small step leaves.

    Give it whole layers: it steps all their parameters but the bias, which belongs to the rest.

    Args:
        layers: a module with Gabor layers in it, a list of Gabor layers, or parameter groups with
            the key ``"layers"``.
        lr: share of the way to the best Gabor function near by that a step goes, in (0, 1].
        momentum: of the running means of kernels and gradients, in [0, 1).
        trust_radius: how far a step may change a filter's responses, as a share of their own
            standard deviation.
        damping: added to the variance of every pixel, as a share of the mean variance.
        leap_every: steps before the first leap; the waits between leaps grow, up to twenty
            times as many. 0: no leaps.
        look_every: steps between two looks at the input's patches.
        seed: of the choice of patches.

    Raises:
        TypeError: something given is no Gabor layer.
        ValueError: no Gabor layer learns anything, or a number is out of range.

    Example:
        >>> from gaborium import GaborConv2d
        >>> model = torch.nn.Sequential(GaborConv2d(1, 4, 7), torch.nn.ReLU())
        >>> optimizer = NaturalGradient(model)
        >>> loss = model(torch.rand(2, 1, 16, 16)).square().mean()
        >>> loss.backward()
        >>> optimizer.step()

    Reference:
        Amari (1998), Neural Computation 10(2), doi:10.1162/089976698300017746; Martens and Grosse
        (2015), arXiv 1503.05671.
    """

    def __init__(
        self,
        layers: nn.Module | Iterable[Any],
        lr: float = 1.0,
        *,
        momentum: float = 0.9,
        trust_radius: float = 0.3,
        damping: float = 1e-3,
        leap_every: int = 5,
        look_every: int = 20,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "trust_radius": trust_radius,
            "damping": damping,
            "leap_every": leap_every,
            "look_every": look_every,
            "seed": seed,
        }
        self._families: dict[Tensor, KernelFamily] = {}
        self._known: dict[Tensor, Evidence] = {}
        super().__init__(_groups_of(layers), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in further layers: ``{"layers": ..., "lr": ...}``."""
        group = dict(param_group)
        if "layers" not in group:
            raise ValueError(
                "A parameter group of NaturalGradient needs the key 'layers', got only "
                f"{', '.join(group)}; give plain parameters to another optimiser."
            )
        families = [_family_of(layer) for layer in _layers_in(group.pop("layers"))]
        group["params"] = []
        for family in families:
            tap = family.layer.tap
            self._families[tap.kernel] = family
            group["params"] += [tap.kernel, tap.offset, *family.parameters()]
        _check(self.defaults | group)
        super().add_param_group(group)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles know their layers too.
        return super().__getstate__() | {"_families": self._families, "_known": {}}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every layer that has a gradient.

        Args:
            closure: evaluates the model anew and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                family = self._families.get(parameter)
                if (
                    family is not None
                    and family.names
                    and _share_of(parameter.grad is not None, parameter) > 0
                ):
                    self._step(family, group)
        return loss

    def _step(self, family: KernelFamily, group: dict[str, Any]) -> None:
        layer, tap = family.layer, family.layer.tap
        state = self.state[tap.kernel]
        step = int(state.get("step", 0))
        z = family.read()
        shape = (family.n_filters, family.n_members)
        gradient = _mean(tap.kernel.grad, tap.kernel).to(z.device).reshape(*shape, -1)
        offset = _mean(tap.offset.grad, tap.offset).to(z.device).reshape(shape)
        heard = gradient.isfinite().flatten(1).all(1) & offset.isfinite().all(1)
        if not bool(heard.any()):
            return
        gradient = torch.where(heard[:, None, None], gradient, 0.0)
        offset = torch.where(heard[:, None], offset, 0.0)
        evidence = self._evidence(tap.kernel, group["damping"])
        inputs, seen = list(tap.inputs), _share_of(bool(tap.inputs), tap.kernel)
        tap.inputs.clear()
        mean = _mean_patch(family, inputs) / max(seen, 1e-9)
        # The first batches are all looked at: one alone may be of a cloud.
        looks = step < group["look_every"] or step % group["look_every"] == 0
        if looks and seen > 0:
            draw = torch.Generator().manual_seed(group["seed"] * 1_000_003 + step)
            first, second = (part / seen for part in _moments(family, inputs, draw))
            covariance = second - first.unsqueeze(-1) * first.unsqueeze(-2)
            evidence.see_patches(covariance, _PATCH_MOMENTUM)
            state.pop("slopes", None)

        kernels, momentum = family.kernels(z), group["momentum"]
        centred = self._is_centred(layer, state, gradient, offset, mean, momentum)
        loss = evidence.see_gradient(
            kernels, gradient, offset, mean, momentum, centred=centred, heard=heard
        )
        here = loss.at(kernels)
        length = here.length
        least = evidence.least_length(length, loss.metric)
        radius = group["trust_radius"] * length.clamp_min(least)
        if "trust" not in state:
            state["trust"] = torch.full_like(length, 1e-3)
        slopes = self._slopes(family, state, loss.metric, z, kernels)
        near, there, state["trust"] = descend(
            family, loss, z, radius, state["trust"], place=here, slopes=slopes
        )
        moved = z + group["lr"] * (near - z)
        if _is_time_to_leap(step + 1, group["leap_every"]):
            far, beyond = leap(family, loss, near)
            needed = _CERTAIN * loss.error * beyond.distance(here) + 1e-6 * length.square()
            leaps = (there.value - beyond.value > needed) & (group["lr"] > 0)
            moved = torch.where(leaps.unsqueeze(-1), far, moved)
            state["leaps"] = state.get("leaps", torch.zeros_like(length)) + leaps
        family.write(torch.where(heard.unsqueeze(-1), moved, z))
        state["step"] = torch.tensor(float(step + 1))

    def _evidence(self, parameter: Tensor, damping: float) -> Evidence:
        """What is known of a layer's loss; anew where a state has been loaded."""
        state, known = self.state[parameter], self._known.get(parameter)
        if known is None or known.state is not state or known.damping != damping:
            known = self._known[parameter] = Evidence(state, damping)
        return known

    def _slopes(
        self,
        family: KernelFamily,
        state: dict[str, Any],
        metric: Metric,
        z: Tensor,
        kernels: Tensor,
    ) -> Slopes:
        """How kernels change at z; where a filter has hardly moved, how they did before."""
        old = state.get("slopes_at", torch.full_like(kernels, torch.inf))
        moved = (kernels - old).flatten(1).norm(dim=1) > _STALE * kernels.flatten(1).norm(dim=1)
        known = "slopes" in state and state["slopes"].shape[2] == z.shape[1]
        if not known or len(metric.covariance) > 1 or bool(moved.all()):
            slopes = Slopes.at(family, metric, z)
            state.update(slopes=slopes.kernels, hessian=slopes.hessian, slopes_at=kernels)
        elif bool(moved.any()):
            index = moved.nonzero().flatten()
            fresh = Slopes.at(family.only(index), metric, z[index])
            news = {"slopes": fresh.kernels, "hessian": fresh.hessian, "slopes_at": kernels[index]}
            state.update(
                {name: state[name].index_copy(0, index, new) for name, new in news.items()}
            )
        return Slopes(state["slopes"], state["hessian"])

    def _is_centred(
        self,
        layer: Any,
        state: dict[str, Any],
        gradient: Tensor,
        offset: Tensor,
        mean: Tensor,
        momentum: float,
    ) -> bool:
        """Whether the loss does not mind the responses' means: a bias or a norm takes care."""
        if layer.bias is not None and layer.bias.requires_grad and layer.output != "energy":
            return True
        size = mean.square().sum(-1).repeat_interleave(len(offset) // len(mean))
        share = (offset.square().sum(-1) * size).sum() / gradient.square().sum().clamp_min(1e-30)
        kept = state.get("heeded", share)
        state["heeded"] = kept + (1 - momentum) * (share - kept)
        return bool(state["heeded"] < _HEEDED)


def _groups_of(layers: Any) -> list[dict[str, Any]]:
    if isinstance(layers, nn.Module):
        return [{"layers": layers}]
    layers = list(layers)
    if layers and all(isinstance(group, dict) for group in layers):
        return layers
    return [{"layers": layers}]


def _layers_in(layers: Any) -> list[Any]:
    """The Gabor layers of a module, or those listed, that learn anything."""
    if isinstance(layers, nn.Module):
        found = [part for part in layers.modules() if isinstance(part, GABOR_LAYERS)]
        if not found:
            raise ValueError(
                f"NaturalGradient needs a model with a Gabor layer, and {type(layers).__name__} "
                "has none; put a GaborConv2d in its place."
            )
    else:
        found = list(layers)
        for layer in found:
            if not isinstance(layer, GABOR_LAYERS):
                raise TypeError(
                    "NaturalGradient takes Gabor layers, or a module that has some, got "
                    f"{type(layer).__name__}; give its parameters to another optimiser."
                )
    learning = [layer for layer in found if any(True for _ in _learned(layer))]
    if not learning:
        raise ValueError("None of the Gabor layers learns anything; see their learn= argument.")
    return learning


def _learned(layer: Any) -> Iterable[nn.Parameter]:
    return (p for name, p in layer.named_parameters(recurse=False) if name != "bias")


def _family_of(layer: Any) -> KernelFamily:
    if layer.tap is None:
        layer.tap = KernelTap(layer.weight.detach())
    return KernelFamily(layer)


def _check(group: dict[str, Any]) -> None:
    for name, low, high in (
        ("lr", 0.0, 1.0),
        ("momentum", 0.0, 1.0),
        ("trust_radius", 0.0, float("inf")),
        ("damping", 0.0, float("inf")),
    ):
        value = group[name]
        if not low <= float(value) <= high or (name == "momentum" and value == 1.0):
            raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}.")
    for name, least in (("leap_every", 0), ("look_every", 1)):
        if float(group[name]) % 1 != 0 or group[name] < least:
            raise ValueError(f"{name} must be a whole number from {least} on, got {group[name]}.")


def _is_time_to_leap(step: int, every: int) -> bool:
    """After ``every`` steps, then more and more rarely: less and less is new of the loss."""
    if every == 0 or step < every:
        return False
    if step >= _SELDOM * every:
        return step % (_SELDOM * every) == 0
    # Each wait is half as long again as all before it: every · 1, 1.5, 2.25, 3.375, ...
    n = round(math.log(step / every) / math.log(1.5))
    return step == round(every * 1.5**n)


def _mean_patch(family: KernelFamily, inputs: list[Tensor]) -> Tensor:
    """The mean of the patches in all inputs; zeros from a process that had none."""
    layer, n_images = family.layer, sum(map(len, inputs))
    means = [mean_patch(layer, part) * (len(part) / n_images) for part in inputs]
    n = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    none = layer.log_sigma.new_zeros(layer.groups, n, dtype=family.dtype)
    return _mean(torch.stack(means).sum(0).to(family.dtype) if means else none, none)


def _moments(
    family: KernelFamily, inputs: list[Tensor], draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mean and second moment of some patches; zeros from a process that had no inputs."""
    layer = family.layer
    n = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    patches = layer.log_sigma.new_zeros(1, layer.groups, n, dtype=family.dtype)
    if inputs:
        drawn = [draw_patches(layer, part, draw) for part in inputs]
        patches = torch.cat(drawn).to(family.dtype)
    mean, second = moments_of(patches)
    return _mean(mean, mean), _mean(second, second)


def _n_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _share_of(there: bool, like: Tensor) -> float:
    """In what share of the processes of a distributed training something is there."""
    if _n_processes() == 1:
        return float(there)
    # A layer may be unused in one process: all must know, or one would wait for ever.
    return float(_mean(torch.full((), float(there), device=like.device), like))


def _mean(value: Tensor | None, like: Tensor) -> Tensor:
    """The mean over the processes of a distributed training; zeros count where there is none."""
    value = torch.zeros_like(like) if value is None else value
    if _n_processes() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / _n_processes()
