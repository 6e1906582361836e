"""A training set-up as one thing, which can be copied, mended and tried."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gaborium.diagnostics.trials import copied, seeded, tensors_of

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, eq=False)
class SetUp:
    """What a training loop consists of.

    Args:
        module: what learns.
        loss: ``loss(output, target) -> scalar``.
        inputs: a batch.
        targets: what ``loss`` compares the outputs with.
        optimizer: of the loop; ``None``: plain gradient descent with a step of 0.01.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> inputs = torch.rand(8, 2)
        >>> setup = SetUp(layer, nn.functional.mse_loss, inputs, inputs.sum(1, keepdim=True))
        >>> losses = setup.copy().train(50)
        >>> losses[-1] < losses[0]
        True
    """

    module: nn.Module
    loss: Loss
    inputs: Any
    targets: Any
    optimizer: torch.optim.Optimizer | None = None

    def copy(self) -> SetUp:
        """The same with a module and an optimiser of its own."""
        if self.optimizer is None:
            return SetUp(copied(self.module), self.loss, self.inputs, self.targets)
        module, optimizer = copied(self.module, self.optimizer)
        return SetUp(module, self.loss, self.inputs, self.targets, optimizer)

    def mended(self, remedy: str) -> SetUp:
        """A copy on which the code of a remedy has been run.

        Args:
            remedy: of a finding; code in terms of ``module``, ``loss``, ``inputs``, ``targets`` and
                ``optimizer``.
        """
        own = self.copy()
        names: dict[str, Any] = dict(vars(own))
        with own._random_numbers(0):
            exec(compile(remedy, "<remedy>", "exec"), names)
        return SetUp(**{name: names[name] for name in vars(own)})

    def train(self, n_steps: int, *, seed: int = 0) -> list[float]:
        """Take steps in place, and return the loss before each of them and after the last.

        Training stops where the loss is no number.
        """
        optimizer = self.optimizer
        learned = [p for p in self.module.parameters() if p.requires_grad]
        if optimizer is None and learned:
            optimizer = torch.optim.SGD(learned, lr=0.01)
        losses: list[float] = []

        def closure() -> Any:
            if optimizer is not None:
                optimizer.zero_grad()
            value = self.loss(self.output(), self.targets)
            if value.requires_grad:
                value.backward()
            return value

        with self._random_numbers(seed), torch.enable_grad():
            for _ in range(n_steps):
                value = closure()
                losses.append(value.item())
                if optimizer is None or not math.isfinite(losses[-1]):
                    break
                if isinstance(optimizer, torch.optim.LBFGS):
                    optimizer.step(closure)
                else:
                    optimizer.step()
            else:
                losses.append(self.value())
        return losses

    @torch.no_grad()
    def value(self) -> float:
        """The loss as it is."""
        with self._random_numbers(0):
            return self.loss(self.output(), self.targets).item()

    def output(self) -> Any:
        """What the module answers to the inputs."""
        return (
            self.module(*self.inputs)
            if isinstance(self.inputs, tuple)
            else self.module(self.inputs)
        )

    @torch.no_grad()
    def explained(self) -> float:
        """Share of the targets' variance that the outputs explain; NaN where they differ in shape.

        It does not depend on the loss, nor on the scale of images and targets, and so compares
        set-ups before and after a remedy.
        """
        with self._random_numbers(0):
            output, targets = self.output(), self.targets
        if not isinstance(output, Tensor) or not isinstance(targets, Tensor):
            return math.nan
        if output.shape != targets.shape or not targets.is_floating_point():
            return math.nan
        error = (output.double() - targets.double()).square().mean()
        variance = targets.double().var(correction=0)
        return (1 - error / variance).item() if variance > 0 else math.nan

    def _random_numbers(self, seed: int) -> AbstractContextManager[None]:
        return seeded(seed, [*self.module.parameters(), *tensors_of(self.inputs)])
