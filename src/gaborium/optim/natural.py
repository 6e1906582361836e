"""Natural gradient descent on the family of Gabor kernels, with global steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gaborium.layers import GABOR_LAYERS
from gaborium.optim.kernel_family import KernelFamily
from gaborium.optim.quadratic import Metric, QuadraticEstimator, gradient_of_mean, inner, where
from gaborium.optim.steps import Linearization, descend, global_step, reinitialize_filters
from gaborium.patches import mean_patch, patch_moments, sample_patches

_MAX_INPUTS = 32  # inputs that a layer's hook keeps for the next step
_PATCH_MOMENTUM = 0.9  # of the patch covariance
_MIN_OFFSET_SHARE = 1e-6  # of the gradient, for the responses' means to be used
_MAX_CHANGE = 0.05  # of a kernel, for its derivatives to be used again
_WARMUP_STEPS = 100  # in which filters move at every step
_UPDATE_INTERVAL = 4  # steps from move to move after that
_MAX_INTERVALS = 200  # global_step_interval grows to at most this many times itself
_MIN_RATE_SHARE = 0.5  # of the largest rate so far; below, no global steps
# Standard errors that a global step must gain: the best of thousands often seems to gain four.
_Z_SCORE = 6.0
# A global step is undone if the loss rises at its end more steeply than this times its fall at the
# start. A quadratic rises at 1, but the root of one is a cone, which rises as steeply as it falls.
_MAX_SLOPE_RATIO = 1.25
_EARLY_CORRELATION, _MAX_CORRELATION = 0.95, 0.99  # of two filters' responses; above: duplicates


class KernelGradientHook:
    """Gives the gradient of the loss by a layer's kernels and by the mean of each channel.

    They are the gradients of ``kernel`` and ``offset``, zeros that the layer adds to its kernels
    and its bias and that never change. Like all gradients they add up, and are scaled and reduced
    with the others. Without ``needs_output_mean`` a layer without bias is spared ``offset``, a sum
    over all responses.
    """

    def __init__(self, weight: Tensor) -> None:
        zeros = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        self.kernel = nn.Parameter(zeros)
        self.offset = nn.Parameter(zeros.flatten(1)[:, 0].clone())
        self.inputs: deque[Tensor] = deque(maxlen=_MAX_INPUTS)
        self.needs_output_mean = True

    def __call__(
        self, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Kernels and bias with the zeros added."""
        self.inputs.append(input.detach())
        if bias is None and not self.needs_output_mean:
            return weight + self.kernel.to(weight), None
        offset = self.offset.to(weight)
        return weight + self.kernel.to(weight), offset if bias is None else bias + offset


class GradientAverage(NamedTuple):
    """Mean gradients of the batches since the last move."""

    gradient: Tensor  # by the kernels, (filters, members, n)
    offset: Tensor  # by the responses' means, (filters, members); zeros where they do not matter
    mean: Tensor  # patch of the batch, (groups, n)
    valid: Tensor  # filters that have a finite gradient, (filters,)
    n_batches: int = 1


class NaturalGradient(Optimizer):
    """Trains the Gabor layers of a model; another optimiser trains the other layers.

    The optimiser estimates the covariance C of each layer's input patches, and from the gradient
    of the *kernels* their loss as a quadratic (see ``gaborium.optim.quadratic``). A step minimises
    the quadratic over the Gabor functions near by: Gauss-Newton in the raw parameters with C as
    the metric, which is natural gradient descent on the family of kernels, within a radius that is
    measured in responses. So one learning rate serves all fields, every sigma, and images of any
    contrast. From time to time a filter takes a global step to the best Gabor function anywhere,
    if the quadratic is clearly lower there: so it leaves minima that small steps do not leave.
    Dead and duplicate filters are reinitialised where the loss asks for a filter.

    It takes whole layers and steps all their parameters except the bias, which belongs to the
    other optimiser.

    Args:
        layers: a module with Gabor layers in it, a list of Gabor layers, or parameter groups with
            the key ``"layers"``.
        lr: share of the way to the best Gabor function near by that a step goes, in (0, 1].
        momentum: of the running means of kernels and gradients, in [0, 1).
        trust_radius: how far a step may change a filter's responses, as a share of their standard
            deviation.
        damping: added to the variance of every pixel, as a share of the mean variance.
        global_step_interval: steps before the first global step; the interval doubles each time,
            up to 200 times this. 0: no global steps, and no filter is reinitialised.
        patch_interval: steps between two samples of the input's patches, after a sample in each of
            the first ``patch_interval`` steps; three times as long from step 100 on.
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
        global_step_interval: int = 5,
        patch_interval: int = 20,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "trust_radius": trust_radius,
            "damping": damping,
            "global_step_interval": global_step_interval,
            "patch_interval": patch_interval,
            "seed": seed,
        }
        self._families: dict[Tensor, KernelFamily] = {}
        groups = layers if isinstance(layers, nn.Module) else list(layers)
        if isinstance(groups, nn.Module) or not (groups and isinstance(groups[0], dict)):
            groups = [{"layers": groups}]
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in further layers: ``{"layers": ..., "lr": ...}``."""
        group = dict(param_group)
        if "layers" not in group:
            raise ValueError(
                "A parameter group of NaturalGradient needs the key 'layers', got only "
                f"{', '.join(group)}; give plain parameters to another optimiser."
            )
        group["params"] = []
        for layer in _layers_in(group.pop("layers")):
            hook = layer.gradient_hook or KernelGradientHook(layer.weight.detach())
            layer.gradient_hook = hook
            family = self._families[hook.kernel] = KernelFamily(layer)
            group["params"] += [hook.kernel, hook.offset, *family.parameters()]
        _check(self.defaults | group)
        super().add_param_group(group)

    @property
    def n_global_steps(self) -> int:
        """Global steps taken so far, over all filters and layers."""
        counts = [state["global_steps"] for state in self.state.values() if "global_steps" in state]
        return int(sum(count.sum() for count in counts))

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles keep their layers.
        return super().__getstate__() | {"_families": self._families}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every layer that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for kernel, family, group in self._layers():
            if family.names and _mean_over_processes(kernel.grad is not None, kernel) > 0:
                state = self.state[kernel]
                average = self._average_gradient(family, state, group)
                if average is not None:
                    self._move(family, state, group, average)
                self._request_output_mean(family, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state."""
        super().load_state_dict(state_dict)
        for _, family, group in self._layers():
            self._request_output_mean(family, group)

    def _layers(self) -> list[tuple[Tensor, KernelFamily, dict[str, Any]]]:
        """The kernel's zeros, the family and the group of every layer."""
        pairs = [(part, group) for group in self.param_groups for part in group["params"]]
        return [(p, self._families[p], group) for p, group in pairs if p in self._families]

    def _request_output_mean(self, family: KernelFamily, group: dict[str, Any]) -> None:
        """Have the layer give the gradient by the responses' means, if the next step needs it."""
        hook = family.layer.gradient_hook
        state = self.state.get(hook.kernel, {})
        step = int(state.get("step", 0)) + 1
        due = _is_patch_step(step, group["patch_interval"])
        hook.needs_output_mean = due or not state.get("centred", False)

    def _average_gradient(
        self, family: KernelFamily, state: dict[str, Any], group: dict[str, Any]
    ) -> GradientAverage | None:
        """The mean gradient since the last move, or ``None`` if it is not time to move."""
        layer, hook = family.layer, family.layer.gradient_hook
        inputs = list(hook.inputs)
        hook.inputs.clear()
        share = _mean_over_processes(bool(inputs), hook.kernel)
        shape, device = (family.n_filters, family.n_members), layer.log_sigma.device
        gradient = _all_reduced(hook.kernel.grad, hook.kernel).to(device).reshape(*shape, -1)
        offset = _all_reduced(hook.offset.grad, hook.offset).to(device).reshape(shape)
        valid = gradient.isfinite().flatten(1).all(1) & offset.isfinite().all(1)
        if not bool(valid.any()):
            return None
        gradient, offset = where(valid, gradient, 0.0), where(valid, offset, 0.0)
        state["step"] = state.get("step", torch.zeros(())) + 1
        state["max_lr"] = max(state.get("max_lr", 0.0), float(group["lr"]))

        step = int(state["step"])
        is_patch_step = _is_patch_step(step, group["patch_interval"])
        if is_patch_step and share > 0:
            generator = torch.Generator().manual_seed(group["seed"] * 1_000_003 + step - 1)
            first, second = (part / share for part in _patch_moments(family, inputs, generator))
            covariance = second - first.unsqueeze(-1) * first.unsqueeze(-2)
            estimator = QuadraticEstimator(state, group["damping"])
            estimator.update_covariance(covariance, _PATCH_MOMENTUM)
            state.pop("jacobian", None)

        # A bias or a normalisation that follows compensates the responses' means.
        has_bias = layer.bias is not None and layer.bias.requires_grad and layer.output != "energy"
        if is_patch_step or has_bias or not state.get("centred", False):
            mean = _mean_patch(family, inputs) / max(share, 1e-9)
            matters = _offset_matters(state, gradient, offset, mean, group["momentum"])
            state["centred"] = has_bias or not matters
            if not state["centred"]:
                state.pop("gradient_sum", None)
                return GradientAverage(gradient, offset, mean, valid)
            gradient = gradient - gradient_of_mean(offset, mean)

        # Between two moves the kernels stay, so that gradients can be averaged.
        if "gradient_sum" not in state:
            state["gradient_sum"] = torch.zeros_like(gradient)
            state["n_summed"] = torch.zeros_like(gradient[:, 0, 0])
            state["n_batches"] = 0
        state["gradient_sum"] += gradient
        state["n_summed"] += valid
        state["n_batches"] += 1
        if step > _WARMUP_STEPS and step % _UPDATE_INTERVAL:
            return None
        count = state.pop("n_summed")
        return GradientAverage(
            gradient=state.pop("gradient_sum") / count.clamp_min(1)[:, None, None],
            offset=torch.zeros_like(offset),
            mean=torch.zeros_like(gradient[:1, 0]),
            valid=count > 0,
            n_batches=state.pop("n_batches"),
        )

    def _move(
        self,
        family: KernelFamily,
        state: dict[str, Any],
        group: dict[str, Any],
        average: GradientAverage,
    ) -> None:
        """Move all filters with a gradient; some take a global step or are reinitialised."""
        estimator = QuadraticEstimator(state, group["damping"])
        z, valid = _undo_global_steps(state, estimator, family.read(), average)
        kernels, momentum = family.kernels(z), group["momentum"]
        loss = estimator.update_gradient(
            kernels,
            average.gradient,
            average.offset,
            average.mean,
            momentum**average.n_batches,
            centred=bool(state["centred"]),
            valid=valid,
        )
        here = loss.at(kernels)
        length = here.length
        radius = length.clamp_min(estimator.min_length(length, loss.metric))
        if "damping" not in state:
            state["damping"] = torch.full_like(length, 1e-3)
            state["acceptance_factor"] = torch.ones_like(length)
        near, there, state["damping"] = descend(
            family,
            loss,
            z,
            group["trust_radius"] * radius,
            state["damping"],
            here=here,
            linearization=_linearize(family, state, loss.metric, z, kernels),
        )
        moved, taken = z + group["lr"] * (near - z), torch.zeros_like(valid)
        step, interval = int(state["step"]), group["global_step_interval"]
        # Once the rate has fallen, the rest of the network cannot follow a global step.
        is_due = 0 < group["lr"] >= _MIN_RATE_SHARE * state["max_lr"] and any(
            _is_global_step(i, interval) for i in range(step - average.n_batches + 1, step + 1)
        )
        if is_due:
            far, beyond = global_step(family, loss, near)
            needed = state["acceptance_factor"] * _Z_SCORE * loss.error * beyond.distance(here)
            taken = there.value - beyond.value > needed + 1e-6 * length.square()
            taken &= valid
            if bool(taken.any()):
                moved = where(taken, far, moved)
                direction = beyond.kernels - kernels
                state["pending"] = {
                    "taken": taken,
                    "direction": direction,
                    "slope": -loss.scale * inner(here.descent, direction),
                    "previous": z,
                    "estimates": estimator.snapshot(),
                }
            state["global_steps"] = state.get("global_steps", torch.zeros_like(length)) + taken
        is_early = 1 < step < interval and group["lr"] > 0
        if is_due or is_early:
            n_before = state.get("reinitializations", torch.zeros_like(length))
            # A running mean of few values is less certain than its error says.
            past = momentum**step
            moved, new = reinitialize_filters(
                family,
                loss,
                moved,
                valid & ~taken,
                n_errors=_Z_SCORE * 2.0**n_before * math.sqrt((1 + past) / (1 - past)),
                # Filters that start equal soon become different.
                max_correlation=_EARLY_CORRELATION if step < interval else _MAX_CORRELATION,
            )
            state["reinitializations"] = n_before + new
        family.write(where(average.valid, moved, family.read()))


def _undo_global_steps(
    state: dict[str, Any], estimator: QuadraticEstimator, z: Tensor, average: GradientAverage
) -> tuple[Tensor, Tensor]:
    """Undo the last global steps that ended at a higher loss: z, and which filters may move."""
    pending, valid = state.pop("pending", None), average.valid
    if pending is None or pending["previous"].shape != z.shape:
        return z, valid
    rise = inner(average.gradient, pending["direction"])
    undone = pending["taken"].bool() & (rise > -_MAX_SLOPE_RATIO * pending["slope"])
    if bool(undone.any()):
        z = where(undone, pending["previous"], z)
        estimator.restore(pending["estimates"], undone)
        factor = state["acceptance_factor"]
        state["acceptance_factor"] = torch.where(undone, 2.0 * factor, factor)
    return z, valid & ~undone


def _linearize(
    family: KernelFamily, state: dict[str, Any], metric: Metric, z: Tensor, kernels: Tensor
) -> Linearization:
    """Derivatives at z; the previous ones for filters that have hardly changed since."""
    known, at = state.get("jacobian"), state.get("jacobian_at")
    if known is not None and at is not None and known.shape[2] == z.shape[1]:
        changed = (kernels - at).flatten(1).norm(dim=1)
        changed = changed > _MAX_CHANGE * kernels.flatten(1).norm(dim=1)
        linearization = Linearization(known, state["hessian"])
        linearization = linearization.recompute(family, metric, z, changed)
        kernels = where(changed, kernels, at)
    else:
        linearization = Linearization.at(family, metric, z)
    state["jacobian"], state["hessian"] = linearization
    state["jacobian_at"] = kernels
    return linearization


def _offset_matters(
    state: dict[str, Any], gradient: Tensor, offset: Tensor, mean: Tensor, momentum: float
) -> bool:
    """Whether the loss depends on the responses' means; before a normalisation it does not."""
    size = mean.square().sum(-1).repeat_interleave(len(offset) // len(mean))
    share = (offset.square().sum(-1) * size).sum() / gradient.square().sum().clamp_min(1e-30)
    old = state.get("offset_share", share)
    state["offset_share"] = old + (1 - momentum) * (share - old)
    return bool(state["offset_share"] >= _MIN_OFFSET_SHARE)


def _layers_in(layers: Any) -> list[Any]:
    """The Gabor layers of a module or a list that learn any field."""
    if isinstance(layers, nn.Module):
        found = [part for part in layers.modules() if isinstance(part, GABOR_LAYERS)] or [layers]
    else:
        found = list(layers)
    for layer in found:
        if not isinstance(layer, GABOR_LAYERS):
            raise TypeError(
                "NaturalGradient takes Gabor layers, or a module that has some, got "
                f"{type(layer).__name__}; give its parameters to another optimiser."
            )
    learning = [layer for layer in found if layer.learn]
    if not learning:
        raise ValueError("None of the Gabor layers learns anything; see their learn= argument.")
    return learning


def _check(group: dict[str, Any]) -> None:
    for name in ("lr", "momentum", "trust_radius", "damping"):
        high = 1.0 if name in ("lr", "momentum") else math.inf
        value = group[name]
        if not 0.0 <= float(value) <= high or (name == "momentum" and value == 1.0):
            raise ValueError(f"{name} must be in [0, {high:g}], got {value}.")
    for name, least in (("global_step_interval", 0), ("patch_interval", 1)):
        if float(group[name]) % 1 != 0 or group[name] < least:
            raise ValueError(f"{name} must be a whole number from {least} on, got {group[name]}.")


def _is_patch_step(step: int, interval: int) -> bool:
    """Whether to sample patches: of all first batches, which differ much, and of few later."""
    return step <= interval or step % (interval if step <= _WARMUP_STEPS else 3 * interval) == 0


def _is_global_step(step: int, interval: int) -> bool:
    """Whether to search globally: after 1, 2, 4, ... intervals, since the loss changes less."""
    if interval == 0 or step < interval:
        return False
    if step >= _MAX_INTERVALS * interval:
        return step % (_MAX_INTERVALS * interval) == 0
    return step % interval == 0 and (step // interval).bit_count() == 1


def _mean_patch(family: KernelFamily, inputs: list[Tensor]) -> Tensor:
    """The mean of the patches in all inputs; zeros in a process without inputs."""
    layer, n_images = family.layer, sum(map(len, inputs))
    mean = layer.log_sigma.new_zeros(layer.groups, family.n_pixels, dtype=family.dtype)
    if inputs:
        means = [mean_patch(layer, part) * (len(part) / n_images) for part in inputs]
        mean = torch.stack(means).sum(0).to(family.dtype)
    return _all_reduced(mean, mean)


def _patch_moments(
    family: KernelFamily, inputs: list[Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mean and second moment of sampled patches; zeros in a process without inputs."""
    layer = family.layer
    patches = layer.log_sigma.new_zeros(1, layer.groups, family.n_pixels, dtype=family.dtype)
    if inputs:
        samples = [sample_patches(layer, part, generator) for part in inputs]
        patches = torch.cat(samples).to(family.dtype)
    mean, second = patch_moments(patches)
    return _all_reduced(mean, mean), _all_reduced(second, second)


def _n_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _mean_over_processes(value: bool, like: Tensor) -> float:
    """Share of the processes in which something is true, such as that a layer was used."""
    if _n_processes() == 1:
        return float(value)
    # All processes must decide the same, or one would wait for ever.
    return float(_all_reduced(torch.full((), float(value), device=like.device), like))


def _all_reduced(value: Tensor | None, like: Tensor) -> Tensor:
    """The mean over the processes of a distributed training; a missing value counts as zeros."""
    value = torch.zeros_like(like) if value is None else value
    if _n_processes() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / _n_processes()
