"""The natural gradient on the family of Gabor kernels, with steps across the hills of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gaborium.layers import GABOR_LAYERS, KernelGradientHook
from gaborium.optim.kernel_family import KernelFamily
from gaborium.optim.quadratic import Evidence, Metric, inner, pull_of_brightness
from gaborium.optim.steps import Slopes, descend, leap, reseed
from gaborium.patches import mean_patch, patch_moments, sample_patches

_PATCH_MOMENTUM = 0.9  # of the patches' moments, from look to look
_HEEDED = 1e-6  # share of the gradient that the responses' means must have, to be heeded
_STALE = 0.05  # share of a kernel by which it may change before its derivatives are found anew
_SELDOM = 200  # times leap_every: as rare as leaps become
# Standard errors by which a leap must be better: the best of thousands is often better by four.
_CERTAIN = 6.0
# A leap has ended higher where the loss rises there so many times as steeply as it fell where the
# leap began: a quadratic loss does at 1, but its root is a cone, which rises as it falls.
_UPHILL = 1.25
_ALIKE, _SAME = 0.95, 0.99  # correlations of the responses of filters, young and older
_BOLD = 0.5  # share of the largest rate so far, below which it is too late to leap
_YOUNG = 100  # steps in which filters move at every one
_REST = 4  # steps from move to move when they are older


class News(NamedTuple):
    """What the batches since the last move say of the loss, on average."""

    gradient: Tensor  # by the kernels, (filters, members, n)
    offset: Tensor  # by the responses' means, (filters, members); zeros where they do not matter
    mean: Tensor  # patch of the batch, (groups, n)
    heard: Tensor  # of which filters there is news, (filters,)
    n_batches: int = 1


class NaturalGradient(Optimizer):
    """Trains the Gabor layers of a model; any other optimiser trains the rest beside it.

    Of every layer the covariance C of its input patches is known, and from the gradient of the
    *kernels* their loss as a quadratic (see ``gaborium.optim.quadratic``). A step minimises it
    over the Gabor functions near by: Gauss-Newton in the raw parameters with C as the metric,
    which is natural gradient descent on the family of kernels, within a radius that is measured in
    responses. So one learning rate serves all fields, every sigma, and images of any contrast. From
    time to time a filter leaps to the best Gabor function of all, where the quadratic says that it
    is clearly better than the one at hand: out of the minima that no small step leaves. A filter
    that is dead, or responds as another one does, begins again where the loss asks for a filter.

    Give it whole layers: it steps all their parameters but the bias, which belongs to the rest.

    Args:
        layers: a module with Gabor layers in it, a list of Gabor layers, or parameter groups with
            the key ``"layers"``.
        lr: share of the way to the best Gabor function near by that a step goes, in (0, 1].
        momentum: of the running means of kernels and gradients, in [0, 1).
        trust_radius: how far a step may change a filter's responses, as a share of their own
            standard deviation.
        damping: added to the variance of every pixel, as a share of the mean variance.
        leap_every: steps before the first leap; the waits between leaps double, up to 200
            times as many. 0: no leaps, and no filter begins again.
        look_every: steps between two looks at the input's patches, after as many in a row; from
            the hundredth step on three times as many.
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
            hook = family.layer.gradient_hook
            self._families[hook.kernel] = family
            group["params"] += [hook.kernel, hook.offset, *family.parameters()]
        _check(self.defaults | group)
        super().add_param_group(group)

    @property
    def n_global_steps(self) -> int:
        """Global steps taken so far, over all filters and layers."""
        return sum(int(state["leaps"].sum()) for state in self.state.values() if "leaps" in state)

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
        state = self.state[family.layer.gradient_hook.kernel]
        news = self._news(family, state, group)
        if news is not None:
            self._move(family, state, group, news)
        self._listen(family, group)

    def _listen(self, family: KernelFamily, group: dict[str, Any]) -> None:
        """Ask for what the next step needs to know of the responses' means."""
        state = self.state.get(family.layer.gradient_hook.kernel, {})
        step = int(state.get("step", 0)) + 1
        looks = _is_time_to_look(step, group["look_every"])
        family.layer.gradient_hook.needs_output_mean = looks or not state.get("centred", False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self._families:
                    self._listen(self._families[parameter], group)

    def _news(
        self, family: KernelFamily, state: dict[str, Any], group: dict[str, Any]
    ) -> News | None:
        """What the last batches say; nothing yet, where it is not time to move."""
        layer, hook = family.layer, family.layer.gradient_hook
        inputs, seen = list(hook.inputs), _share_of(bool(hook.inputs), hook.kernel)
        hook.inputs.clear()
        shape = (family.n_filters, family.n_members)
        device = layer.log_sigma.device
        gradient = _mean(hook.kernel.grad, hook.kernel).to(device).reshape(*shape, -1)
        offset = _mean(hook.offset.grad, hook.offset).to(device).reshape(shape)
        heard = gradient.isfinite().flatten(1).all(1) & offset.isfinite().all(1)
        if not bool(heard.any()):
            return None
        gradient = torch.where(heard[:, None, None], gradient, 0.0)
        offset = torch.where(heard[:, None], offset, 0.0)
        state["step"] = state.get("step", torch.zeros(())) + 1
        state["boldest"] = max(state.get("boldest", 0.0), float(group["lr"]))

        step = int(state["step"])
        looks = _is_time_to_look(step, group["look_every"])
        if looks and seen > 0:
            draw = torch.Generator().manual_seed(group["seed"] * 1_000_003 + step - 1)
            first, second = (part / seen for part in _moments(family, inputs, draw))
            covariance = second - first.unsqueeze(-1) * first.unsqueeze(-2)
            self._evidence(hook.kernel, group["damping"]).see_patches(covariance, _PATCH_MOMENTUM)
            state.pop("slopes", None)

        # With a bias or a norm behind it, the loss does not mind the responses' means.
        has_bias = layer.bias is not None and layer.bias.requires_grad and layer.output != "energy"
        mean = None
        if looks or has_bias or not state.get("centred", False):
            mean = _mean_patch(family, inputs) / max(seen, 1e-9)
            heeded = self._is_heeded(state, gradient, offset, mean, group["momentum"])
            state["centred"] = has_bias or not heeded
        if mean is not None and not state["centred"]:
            state.pop("waiting", None)
            return News(gradient, offset, mean, heard)
        if mean is not None:
            gradient = gradient - pull_of_brightness(offset, mean)

        # Between two moves the kernels stay, and gradients add up.
        if "waiting" not in state:
            state["waiting"] = torch.zeros_like(gradient)
            state["n_waiting"] = torch.zeros_like(gradient[:, 0, 0])
            state["waits"] = 0
        state["waiting"] += gradient
        state["n_waiting"] += heard
        state["waits"] += 1
        if not _is_time_to_move(step):
            return None
        count = state.pop("n_waiting")
        gradient = state.pop("waiting") / count.clamp_min(1)[:, None, None]
        none = torch.zeros_like(gradient[:1, 0])
        return News(gradient, torch.zeros_like(offset), none, count > 0, state.pop("waits"))

    def _move(
        self, family: KernelFamily, state: dict[str, Any], group: dict[str, Any], news: News
    ) -> None:
        """A step of all filters that are heard of, and now and then leaps of some."""
        evidence = self._evidence(family.layer.gradient_hook.kernel, group["damping"])
        z, heard = family.read(), news.heard
        if "leapt" in state:
            back = inner(news.gradient, state["leap"]) > -_UPHILL * state["leap_slope"]
            back &= state["leapt"]
            home = state["home"]
            if bool(back.any()) and home.shape == z.shape:
                # The loss did not fall that way, whatever the quadratic said.
                z = torch.where(back.unsqueeze(-1), home, z)
                evidence.recall(back)
                state["doubt"] = torch.where(back, 2.0 * state["doubt"], state["doubt"])
                heard = heard & ~back
            for name in ("leapt", "leap_slope", "leap", "home"):
                del state[name]
            evidence.forget()

        kernels = family.kernels(z)
        loss = evidence.see_gradient(
            kernels,
            news.gradient,
            news.offset,
            news.mean,
            group["momentum"] ** news.n_batches,
            centred=bool(state["centred"]),
            heard=heard,
        )
        here = loss.at(kernels)
        length = here.length
        least = evidence.least_length(length, loss.metric)
        radius = group["trust_radius"] * length.clamp_min(least)
        if "trust" not in state:
            state["trust"] = torch.full_like(length, 1e-3)
            state["doubt"] = torch.ones_like(length)
        slopes = self._slopes(family, state, loss.metric, z, kernels)
        near, there, state["trust"] = descend(
            family, loss, z, radius, state["trust"], place=here, slopes=slopes
        )
        moved = z + group["lr"] * (near - z)
        leaps = torch.zeros_like(heard)
        if self._may_leap(state, group, news.n_batches):
            far, beyond = leap(family, loss, near)
            needed = _CERTAIN * state["doubt"] * loss.error * beyond.distance(here)
            leaps = there.value - beyond.value > needed + 1e-6 * length.square()
            leaps &= heard
            if bool(leaps.any()):
                moved = torch.where(leaps.unsqueeze(-1), far, moved)
                along = beyond.kernels - kernels
                evidence.keep()
                state.update(leapt=leaps, leap=along, home=z)
                state["leap_slope"] = -loss.scale * inner(here.downhill, along)
            state["leaps"] = state.get("leaps", torch.zeros_like(length)) + leaps
        if self._may_reseed(state, group, news.n_batches):
            again = state.get("reseeds", torch.zeros_like(length))
            # A running mean of few moves is worth less than its error says.
            past = group["momentum"] ** int(state["step"])
            certain = _CERTAIN * 2.0**again * math.sqrt((1 + past) / (1 - past))
            # Filters that begin alike soon part; of older ones only those that met count.
            same = _ALIKE if int(state["step"]) < group["leap_every"] else _SAME
            moved, new = reseed(family, loss, moved, heard & ~leaps, certain=certain, same=same)
            state["reseeds"] = again + new
        family.write(torch.where(news.heard.unsqueeze(-1), moved, family.read()))

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
        if "slopes" in state and state["slopes"].shape[2] == z.shape[1]:
            known = Slopes(state["slopes"], state["hessian"])
            slopes = known.anew(family, metric, z, moved)
            at = torch.where(moved[:, None, None], kernels, old)
        else:
            slopes, at = Slopes.at(family, metric, z), kernels
        state.update(slopes=slopes.kernels, hessian=slopes.hessian, slopes_at=at)
        return slopes

    def _may_leap(self, state: dict[str, Any], group: dict[str, Any], n_batches: int) -> bool:
        """Whether it was time to leap in the steps since the last move."""
        # Where the rate has fallen the network settles, and has no time to follow a leap.
        is_bold = 0 < group["lr"] >= _BOLD * state["boldest"]
        steps = range(int(state["step"]) - n_batches + 1, int(state["step"]) + 1)
        return is_bold and any(_is_time_to_leap(step, group["leap_every"]) for step in steps)

    def _may_reseed(self, state: dict[str, Any], group: dict[str, Any], n_batches: int) -> bool:
        """As leaps, and at the first steps too: filters that begin alike soon part a little."""
        every = group["leap_every"]
        is_early = every > 0 and 1 < int(state["step"]) < every and group["lr"] > 0
        return is_early or self._may_leap(state, group, n_batches)

    def _is_heeded(
        self,
        state: dict[str, Any],
        gradient: Tensor,
        offset: Tensor,
        mean: Tensor,
        momentum: float,
    ) -> bool:
        """Whether the loss minds the responses' means; behind a norm it does not."""
        size = mean.square().sum(-1).repeat_interleave(len(offset) // len(mean))
        share = (offset.square().sum(-1) * size).sum() / gradient.square().sum().clamp_min(1e-30)
        kept = state.get("heeded", share)
        state["heeded"] = kept + (1 - momentum) * (share - kept)
        return bool(state["heeded"] >= _HEEDED)


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
    if layer.gradient_hook is None:
        layer.gradient_hook = KernelGradientHook(layer.weight.detach())
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


def _is_time_to_look(step: int, every: int) -> bool:
    """The first batches are all looked at, since one alone may be of a cloud; later, few."""
    if step <= every:
        return True
    return step % (every if step <= _YOUNG else 3 * every) == 0


def _is_time_to_move(step: int) -> bool:
    """At every step at first; later the mean of some gradients is worth as much, and costs less."""
    return step <= _YOUNG or step % _REST == 0


def _is_time_to_leap(step: int, every: int) -> bool:
    """After ``every`` steps, then more and more rarely: less and less is new of the loss."""
    if every == 0 or step < every:
        return False
    if step >= _SELDOM * every:
        return step % (_SELDOM * every) == 0
    return step % every == 0 and (step // every).bit_count() == 1


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
        drawn = [sample_patches(layer, part, draw) for part in inputs]
        patches = torch.cat(drawn).to(family.dtype)
    mean, second = patch_moments(patches)
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
