"""The loss as a function of a layer's parameters, evaluated so that the layer never changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium.errors import one_of

LayerLoss = Callable[[Any], Tensor]
Measure = str | Callable[[Tensor, Tensor], Tensor]
_NAMED = ("mse", "rmse")


@dataclass(frozen=True, eq=False)
class OutputLoss:
    """How far a layer's outputs are from their targets: a callable ``loss(layer) -> scalar``.

    Args:
        inputs: what the layer is given.
        targets: what it should answer; for ``"mse"`` and ``"rmse"`` of the outputs' shape.
        measure: ``"mse"``; ``"rmse"``, the root of it; or a function of output and target.

    Raises:
        ValueError: ``measure`` is another word.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> inputs = torch.rand(5, 3)
        >>> OutputLoss(inputs, layer(inputs).detach(), "rmse")(layer).item()
        0.0
    """

    inputs: Tensor
    targets: Tensor
    measure: Measure = "mse"

    def __post_init__(self) -> None:
        for name in ("inputs", "targets"):
            if not isinstance(getattr(self, name), Tensor):
                raise TypeError(
                    f"{name} must be a tensor, got {type(getattr(self, name)).__name__}."
                )
        if isinstance(self.measure, str):
            one_of("measure", self.measure, _NAMED)
        elif not callable(self.measure):
            raise TypeError(
                f"measure must be 'mse', 'rmse' or a function, got {type(self.measure).__name__}."
            )

    def __call__(self, layer: nn.Module) -> Tensor:
        """The measure between ``layer(inputs)`` and the targets.

        Raises:
            ValueError: inputs and layer differ in device or dtype, or the outputs' shape is not
                the targets'.
        """
        check_same_place(layer, self.inputs)
        output = layer(self.inputs)
        if not isinstance(self.measure, str):
            return self.measure(output, self.targets)
        if output.shape != self.targets.shape:
            raise ValueError(
                f"targets must have the outputs' shape {tuple(output.shape)}, got "
                f"{tuple(self.targets.shape)}; other shapes would broadcast."
            )
        squared = F.mse_loss(output, self.targets.to(output))
        return squared if self.measure == "mse" else squared.sqrt()

    def squared(self) -> OutputLoss:
        """The squared error between the same outputs and targets: smooth at its minimum."""
        return OutputLoss(self.inputs, self.targets, "mse")

    def double(self) -> OutputLoss:
        """The same loss in double precision; whole numbers, such as classes, stay as they are."""
        inputs, targets = (
            value.double() if value.is_floating_point() else value
            for value in (self.inputs, self.targets)
        )
        return OutputLoss(inputs, targets, self.measure)

    @torch.no_grad()
    def has_outputs_like_targets(self, layer: nn.Module) -> bool:
        """Whether a squared error between outputs and targets means something."""
        if not self.targets.is_floating_point():
            return False
        return self.is_squared_kind() or duplicate(layer)(self.inputs).shape == self.targets.shape

    def is_squared_kind(self) -> bool:
        """Whether it is the squared error or its root, which have the same minima."""
        return self.measure in _NAMED


class Probe:
    """A loss as a function of named tensors of a layer.

    Every evaluation is of a copy, begins with the same buffers and the same random numbers, and
    leaves the caller's layer, its gradients and torch's generators as they were.

    Args:
        loss: ``loss(layer) -> scalar``.
        layer: any module; it is copied.

    Raises:
        ValueError: the layer is in half precision, or not all on one device; or its loss is no
            finite scalar, or not the same twice.
        TypeError: the loss is not callable, does not return a tensor, or the layer is no module.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> probe = Probe(OutputLoss(torch.ones(1, 1), torch.ones(1, 1)), layer)
        >>> probe({"weight": torch.tensor([[3.0]])}).item()
        4.0
    """

    def __init__(self, loss: LayerLoss, layer: nn.Module) -> None:
        if not callable(loss):
            raise TypeError(f"loss must be a function of the layer, got {type(loss).__name__}.")
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layer must be an nn.Module, got {type(layer).__name__}.")
        self._around = _Around(loss, duplicate(layer))
        self.layer = self._around.layer
        tensors = list(self.layer.parameters())
        self.is_double = all(t.dtype == torch.float64 for t in tensors)
        self._cuda = sorted({t.device.index or 0 for t in tensors if t.is_cuda})
        if len({t.device for t in tensors}) > 1:
            places = ", ".join(sorted({str(t.device) for t in tensors}))
            raise ValueError(f"The layer must be on one device, got {places}; use layer.to(...).")
        for name, value in self.layer.named_parameters():
            if value.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"{name} is {value.dtype}, too coarse for differences of a loss; use "
                    "copy.deepcopy(layer).float() with inputs.float()."
                )
        self.learned = {n: p.detach() for n, p in self.layer.named_parameters() if p.requires_grad}
        with torch.no_grad():
            self.present = self._checked().item()

    def __call__(self, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """The loss with some of the layer's parameters and buffers replaced, by name."""
        fresh = {f"layer.{n}": b.clone() for n, b in self.layer.named_buffers()}
        given = {f"layer.{n}": t for n, t in (tensors or {}).items()}
        with torch.random.fork_rng(devices=self._cuda):
            return torch.func.functional_call(self._around, fresh | given, ())

    def at(self, point: Tensor) -> Tensor:
        """The loss with all learned parameters taken from one flat vector."""
        return self(self.named(point))

    def flat(self) -> Tensor:
        """The learned parameters as one flat vector."""
        return torch.cat([value.flatten() for value in self.learned.values()])

    def named(self, point: Tensor) -> dict[str, Tensor]:
        """A flat vector as the learned parameters that it holds."""
        parts = point.split([value.numel() for value in self.learned.values()])
        return {
            n: part.view_as(v) for part, (n, v) in zip(parts, self.learned.items(), strict=True)
        }

    def slope(self, point: Tensor) -> tuple[float, Tensor]:
        """The loss at a flat vector of learned parameters, and its gradient there.

        Raises:
            ValueError: the loss has no gradient.
        """
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            value = self.at(point)
            if not value.requires_grad:
                raise ValueError(
                    "The loss has no gradient with respect to the layer's learned parameters: it "
                    "must be computed from the layer that it is given, without .item(), .detach() "
                    "or .data; check_gradients tells where the graph breaks."
                )
            (gradient,) = torch.autograd.grad(value, point)
        return value.item(), gradient

    def _checked(self) -> Tensor:
        first = self()
        if not isinstance(first, Tensor):
            raise TypeError(
                f"loss must return a tensor, got {type(first).__name__}; return it before .item()."
            )
        if first.numel() != 1 or not first.is_floating_point():
            raise ValueError(
                f"loss must return one floating number, got shape {tuple(first.shape)} of "
                f"{first.dtype}; take .mean() or .sum()."
            )
        if not first.isfinite():
            raise ValueError(
                f"The loss is {first.item()} for the layer as it is; check inputs and targets for "
                "NaN and infinity, and the layer's parameters."
            )
        second = self().item()
        # Sums by several threads need not be equal to the last bit.
        if abs(second - first.item()) > 1e-5 * max(abs(first.item()), 1e-30):
            raise ValueError(
                f"The loss must be deterministic, got {first.item():.6g} and then {second:.6g} for "
                "the same layer and random numbers; use one fixed batch."
            )
        return first.reshape(())


class _Around(nn.Module):
    """Lets ``functional_call`` swap tensors of the layer under a function that takes the layer."""

    def __init__(self, loss: LayerLoss, layer: nn.Module) -> None:
        super().__init__()
        self.loss, self.layer = [loss], layer  # a list: a loss may be a module, and is not part

    def forward(self) -> Tensor:
        return self.loss[0](self.layer)


def duplicate(layer: nn.Module) -> Any:
    """A deep copy, or one clear line why there is none."""
    try:
        return copy.deepcopy(layer)
    except RuntimeError as error:
        raise ValueError(
            "The layer cannot be copied: it keeps a tensor that still has its graph, such as "
            f"a kernel stored in forward; store tensor.detach() instead ({error})."
        ) from None


def check_same_place(layer: nn.Module, inputs: Tensor) -> None:
    """Raise ``ValueError`` where inputs and layer differ in device or dtype."""
    first = next(layer.parameters(), None)
    if first is None or not inputs.is_floating_point():
        return
    if first.device != inputs.device:
        raise ValueError(
            f"inputs are on {inputs.device} and the layer on {first.device}; use "
            f"inputs.to('{first.device}')."
        )
    if first.dtype != inputs.dtype and not torch.is_autocast_enabled():
        raise ValueError(
            f"inputs are {inputs.dtype} and the layer is {first.dtype}; use "
            f"inputs.to({first.dtype})."
        )
