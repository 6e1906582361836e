"""A recorder for training loops: how the parameters move, and what goes wrong on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gaborium.diagnostics.causes import Finding, Severity, by_severity, finding
from gaborium.diagnostics.filters import duplicates_of
from gaborium.functions.params import UNITS, Gabor
from gaborium.layers import GABOR_LAYERS

_INTERVAL = 11  # odd, so that period-2 oscillations are sampled
_MIN_RECORDS = 8  # below it the recorder reports only a loss that is not finite
_JUMP = 0.05  # rad, or share of the value, between two records: less is no oscillation
_STILL = 1e-3  # rad, or share of the value


class Recorder:
    """The history of a layer in training; ``watch`` makes it.

    Call ``record`` after every step, and read the rest at any time. Every row holds the loss and
    the gradient of one step, and the parameters before it, at which they were computed. All of it
    is kept on the CPU.

    Attributes:
        steps: the recorded steps, counted from 0.
        loss: the loss at each of them.
        gradient_norm: L2 norm of each raw parameter's gradient, at each of them; NaN without one.
        n_duplicates: pairs of filters with the same kernel up to scale, at each of them.
    """

    def __init__(self, layer: nn.Module, every: int, name: str) -> None:
        if not isinstance(layer, GABOR_LAYERS):
            raise TypeError(f"watch needs a Gabor layer, got {type(layer).__name__}.")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive whole number of steps, got {every!r}.")
        self.layer: Any = layer
        self.every, self.name, self.n_steps = every, name, 0
        self.steps: list[int] = []
        self.loss: list[float] = []
        self.n_duplicates: list[int] = []
        self.gradient_norm: dict[str, list[float]] = {
            name: []
            for name, parameter in layer.named_parameters(recurse=False)
            if name != "bias" and parameter.requires_grad
        }
        self._params: list[Gabor] = []
        self._before = self._snapshot()

    def record(self, loss: Tensor | float) -> None:
        """Record a step: after ``optimizer.step()``, before gradients are cleared.

        Args:
            loss: of this step, a scalar.

        Raises:
            ValueError: the loss is not a scalar.
        """
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}.")
        if self.n_steps % self.every == 0:
            params, n_duplicates = self._before
            self.steps.append(self.n_steps)
            self.loss.append(loss.item() if isinstance(loss, Tensor) else float(loss))
            self.n_duplicates.append(n_duplicates)
            self._params.append(params)
            for name, norms in self.gradient_norm.items():
                gradient = self.layer.get_parameter(name).grad
                norms.append(math.nan if gradient is None else gradient.double().norm().item())
        self.n_steps += 1
        if self.n_steps % self.every == 0:
            # The next step's loss and gradient belong to the present parameters.
            self._before = self._snapshot()

    @torch.no_grad()
    def _snapshot(self) -> tuple[Gabor, int]:
        """The parameters before a step, and the number of duplicates."""
        duplicates = duplicates_of(self.layer, self.layer.n_filters)
        return self.layer.params.to("cpu", copy=True), len(duplicates)

    @property
    def params(self) -> Gabor:
        """The record before each of the steps: fields ``(records, filters, channels or 1)``."""
        if not self._params:
            raise ValueError("There is no record yet: call record(loss) after optimizer.step().")
        rows = [params.as_dict() for params in self._params]
        return type(self._params[0])(**{n: torch.stack([r[n] for r in rows]) for n in rows[0]})

    @property
    def displacement(self) -> dict[str, Tensor]:
        """Change since the first record, by field in its unit, ``(records, filters, channels)``.

        Signed, on the circle and up to symmetry.
        """
        params = self.params.to(torch.float64)
        return params.difference(params[:1])

    @property
    def findings(self) -> list[Finding]:
        """Faults of the training so far, the worst first; hardly any before eight records."""
        if self.loss and not math.isfinite(self.loss[-1]):
            return [*self._diverged()]
        if len(self.steps) < _MIN_RECORDS:
            return []
        questions = (
            self._diverged,
            self._ejected,
            self._oscillating,
            self._still,
            self._frozen,
            self._more_duplicates,
        )
        return by_severity(found for question in questions for found in question())

    # -- one question each ----------------------------------------------------------------------

    def _diverged(self) -> Iterator[Finding]:
        first, last = self.loss[0], self.loss[-1]
        late = torch.tensor(self.loss[-max(2, len(self.steps) // 4) :])
        if not math.isfinite(last) or late.median().item() > 2 * abs(first) + first:
            yield finding("divergence", first_loss=first, last_loss=last)

    def _ejected(self) -> Iterator[Finding]:
        """How often a low loss was followed by one more than half way back to the first."""
        first, least = self.loss[0], min(self.loss)
        drop = first - least
        is_low, n, is_out = False, 0, False
        for loss in self.loss:
            if loss < least + 0.25 * drop:
                is_low, is_out = True, False
            elif loss > least + 0.5 * drop and is_low:
                is_low, is_out, n = False, True, n + 1
        if n and drop > 0.5 * abs(first):  # otherwise it has never arrived anywhere
            yield finding(
                "ejection",
                severity=Severity.SEVERE if n > 1 or is_out else Severity.WARNING,
                times="once" if n == 1 else f"{n} times",
                ejections=n,
                least_loss=least,
                last_loss=self.loss[-1],
            )

    def _oscillating(self) -> Iterator[Finding]:
        """Fields that go back and forth in the later half, with little net movement."""
        half = self.params.to(torch.float64)[len(self.steps) // 2 :]
        amplitudes: dict[str, Any] = {}
        filters: set[int] = set()
        for name, step in half[1:].difference(half[:-1]).items():
            if name == "center" or len(step) < _MIN_RECORDS // 2 - 1:
                continue
            size = step.square().mean(0).sqrt()
            path, net = step.abs().sum(0), step.sum(0).abs()
            turns = (step[1:] * step[:-1] < 0).double().mean(0)
            bad = (turns >= 0.85) & (net <= 0.2 * path) & (size / _scale(name, half) > _JUMP)
            if bool(bad.any()):
                amplitudes[name] = size[bad].max().item()
                filters |= set(bad.any(1).nonzero().flatten().tolist())
        if amplitudes:
            widest = max(amplitudes, key=lambda name: amplitudes[name])
            yield finding(
                "oscillation",
                sorted(filters),
                fields=", ".join(amplitudes),
                n=str(len(filters)),
                total=str(half.batch_shape[1]),
                widest=widest,
                size=f"{amplitudes[widest]:.2g} {UNITS[widest]}",
                **{f"amplitude[{name}]": value for name, value in amplitudes.items()},
            )

    def _still(self) -> Iterator[Finding]:
        params = self.params.to(torch.float64)
        largest: dict[str, Any] = {
            f"moved[{name}]": (value[-1].abs() / _scale(name, params)).nan_to_num().max().item()
            for name, value in self.displacement.items()
        }
        if max(largest.values()) <= _STILL:
            since = f"after {self.steps[-1]} steps"
            yield finding("filters did not move", since=since, **largest)

    def _frozen(self) -> Iterator[Finding]:
        norms = self.gradient_norm
        missing = [name for name, values in norms.items() if all(map(math.isnan, values))]
        zero = [name for name, values in norms.items() if not any(value > 0 for value in values)]
        if missing and len(missing) == len(norms):
            reason = "the loss is cut off from the layer, or gradients are cleared before "
            yield finding("no gradient", missing, confidence=0.8, reason=reason + "record(loss)")
        elif zero:
            reason = "its gradient was missing or exactly zero at every record"
            options: Any = {"severity": Severity.WARNING, "confidence": 0.8, "remedy": ""}
            yield finding("frozen", zero, reason=reason, **options)

    def _more_duplicates(self) -> Iterator[Finding]:
        first, last = self.n_duplicates[0], self.n_duplicates[-1]
        if last > first:
            pairs = duplicates_of(self.layer, self.layer.n_filters)
            yield finding(
                "duplicate filters",
                severity=Severity.WARNING,
                confidence=0.6,
                reason=f"{first} pairs at first, {last} now",
                name=self.name,
                filters=str(sorted({pair.second for pair in pairs if not pair.negative})),
                first_pairs=first,
                last_pairs=last,
            )


def watch(layer: nn.Module, every: int = _INTERVAL, *, name: str = "") -> Recorder:
    """Record how a Gabor layer learns: two lines in any training loop.

    Args:
        layer: a ``GaborConvNd``, before training. It is never changed.
        every: interval of the records, in steps; the first step is recorded. An odd interval also
            shows parameters that alternate at every step; so does 1, at a higher cost.
        name: of the layer in ``module``, for the code of the remedies.

    Returns:
        A recorder. Call its ``record(loss)`` after each ``optimizer.step()``; read its
        ``findings`` at any time: ``"divergence"``, ``"ejection"``, ``"oscillation"``,
        ``"filters did not move"``, ``"no gradient"``, ``"frozen"``, ``"duplicate filters"``.

    Raises:
        TypeError: the layer is not a Gabor layer.
        ValueError: ``every`` is not a positive whole number.

    Example:
        >>> from gaborium import GaborConv2d
        >>> layer = GaborConv2d(1, 4, 7, seed=0)
        >>> optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        >>> recorder = watch(layer, every=5)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     loss = layer(torch.ones(1, 1, 16, 16)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     recorder.record(loss)
        >>> recorder.steps
        [0, 5, 10, 15]
    """
    return Recorder(layer, every, name)


def _scale(name: str, params: Gabor) -> Tensor | float:
    """The size with which a change of a field is compared: 1 rad, 1 px, or the field's own."""
    if UNITS[name] == "rad" or name == "center":
        return 1.0
    size = params.expand().as_dict()[name].abs().mean(0)
    return torch.where(size > 0, size, 1.0)
