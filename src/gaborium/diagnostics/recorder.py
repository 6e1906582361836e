"""A recorder for training loops: where the parameters go, and what is wrong with the way."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gaborium.diagnostics.causes import Finding, Severity, by_severity
from gaborium.diagnostics.filters import duplicates_of
from gaborium.layers import GaborConv1d, GaborConv2d, GaborConv3d
from gaborium.params import UNITS, Gabor, plain

_FORMAT = 1  # of a state dict
# Odd, and no small multiple of anything: what goes to and fro at every step is seen doing it.
_EVERY = 11
_FEW = 8  # records, below which nothing is said of their course
_ANGLES = ("orientation", "elevation", "phase")
_JUMP = 0.05  # rad, or share of the value, between two records: less is no oscillation
_STILL = 1e-3  # rad, or share of the value
_SLOWER = "for group in optimizer.param_groups:\n    group['lr'] *= 0.1\n"


class _Place(NamedTuple):
    """Where the layer stood before a step."""

    fields: dict[str, Tensor]
    raw: dict[str, Tensor]
    duplicates: int


class Recorder:
    """What ``watch`` returns: call ``record`` after every step, read the rest at any time.

    Every row holds the loss and the gradient of one step, and the parameters before it, at which
    they were computed. What is kept lies on the CPU.
    """

    def __init__(self, layer: nn.Module, every: int, name: str) -> None:
        if not isinstance(layer, (GaborConv1d, GaborConv2d, GaborConv3d)):
            raise TypeError(f"watch needs a Gabor layer, got {type(layer).__name__}.")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive whole number of steps, got {every!r}.")
        self.layer, self.every, self.name = layer, every, name
        self.n_steps = 0
        self._record_type: type[Gabor] = type(layer.params)
        self._place: _Place | None = self._here()
        self._last: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None  # raw, gradients
        self._steps: list[int] = []
        self._losses: list[float] = []
        self._duplicates: list[int] = []
        self._fields: dict[str, list[Tensor]] = {n: [] for n in self._record_type.field_names()}
        self._norms: dict[str, list[float]] = {name: [] for name in self._learned()}
        self._curvatures: dict[str, list[float]] = {name: [] for name in self._learned()}

    # -- in the loop ----------------------------------------------------------------------------

    def record(self, loss: Tensor | float) -> None:
        """Take note of a step: after ``optimizer.step()``, before gradients are cleared.

        Args:
            loss: of this step, a scalar.

        Raises:
            ValueError: the loss is no scalar.
        """
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}.")
        if self.n_steps % self.every == 0:
            self._write(loss.item() if isinstance(loss, Tensor) else float(loss))
        self.n_steps += 1
        # The next step's loss and gradient belong to where the layer stands now.
        self._place = self._here() if self.n_steps % self.every == 0 else None

    def _write(self, loss: float) -> None:
        place = self._place or self._here()
        gradients = {
            name: torch.full_like(parameter, math.nan, device="cpu")
            if parameter.grad is None
            else parameter.grad.detach().to("cpu", copy=True)
            for name, parameter in self._learned().items()
        }
        self._steps.append(self.n_steps)
        self._losses.append(loss)
        self._duplicates.append(place.duplicates)
        for name, value in place.fields.items():
            self._fields[name].append(value)
        for name, gradient in gradients.items():
            self._norms[name].append(gradient.double().norm().item())
            self._curvatures[name].append(self._secant(name, place.raw, gradients))
        self._last = (place.raw, gradients)

    def _secant(self, name: str, raw: dict[str, Tensor], gradients: dict[str, Tensor]) -> float:
        """Curvature along the way since the last record: of two slopes, per distance."""
        if self._last is None:
            return math.nan
        way = (raw[name] - self._last[0][name]).double()
        change = (gradients[name] - self._last[1][name]).double()
        length = way.square().sum().item()
        return (way * change).sum().item() / length if length > 0 else math.nan

    def _here(self) -> _Place:
        with torch.no_grad():
            params: Gabor = self.layer.params
            fields = {n: v.detach().to("cpu", copy=True) for n, v in params.as_dict().items()}
            raw = {n: p.detach().to("cpu", copy=True) for n, p in self._learned().items()}
            return _Place(fields, raw, len(duplicates_of(self.layer)))

    def _learned(self) -> dict[str, nn.Parameter]:
        """The Gabor parameters that train, under the names of the state dict."""
        return {
            name: parameter
            for name, parameter in self.layer.named_parameters(recurse=False)
            if name != "bias" and parameter.requires_grad
        }

    # -- what was seen --------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def steps(self) -> list[int]:
        """The steps that were recorded, counted from 0."""
        return list(self._steps)

    @property
    def loss(self) -> list[float]:
        """The loss at each of them."""
        return list(self._losses)

    @property
    def n_duplicates(self) -> list[int]:
        """Pairs of filters with the same kernel up to scale, at each of them."""
        return list(self._duplicates)

    @property
    def gradient_norm(self) -> dict[str, list[float]]:
        """L2 norm of each raw parameter's gradient, at each of them; NaN where there was none."""
        return {name: list(values) for name, values in self._norms.items()}

    @property
    def curvature(self) -> dict[str, list[float]]:
        """Change of slope per distance along the way since the record before, by raw parameter.

        A descent is stable while its learning rate is below 2 over this. Gradients of different
        batches add their noise to it.
        """
        return {name: list(values) for name, values in self._curvatures.items()}

    @property
    def params(self) -> Gabor:
        """The record before each of the steps: fields ``(records, filters, channels or 1)``."""
        if not self._steps:
            raise ValueError("Nothing is recorded yet: call record(loss) after optimizer.step().")
        return self._record_type(**{n: torch.stack(v) for n, v in self._fields.items()})

    @property
    def displacement(self) -> dict[str, Tensor]:
        """Way from the first record, by field in its unit, ``(records, filters, channels)``.

        Signed, on the circle and up to symmetry.
        """
        params = self.params.to(torch.float64)
        return params.difference(params[:1])

    def to_table(self) -> list[dict[str, object]]:
        """One row per record; displacements are root mean squares over filters and channels."""
        if not self._steps:
            return []
        moved = {
            name: value.square().flatten(1).mean(1).sqrt().tolist()
            for name, value in self.displacement.items()
        }
        rows: list[dict[str, object]] = []
        for i, step in enumerate(self._steps):
            row: dict[str, object] = {"step": step, "loss": self._losses[i]}
            row |= {f"moved {n} ({UNITS[n]})": values[i] for n, values in moved.items()}
            row |= {f"gradient {n}": values[i] for n, values in self._norms.items()}
            row |= {f"curvature {n}": values[i] for n, values in self._curvatures.items()}
            rows.append(row | {"duplicates": self._duplicates[i]})
        return rows

    def to_json(self, *, indent: int | None = None) -> str:
        """All records as JSON text; infinities and missing numbers are the texts inf and nan."""
        return json.dumps(
            {
                "every": self.every,
                "n_steps": self.n_steps,
                "steps": self._steps,
                "loss": plain(self._losses),
                "params": json.loads(self.params.to_json()) if self._steps else None,
                "gradient_norm": plain(self._norms),
                "curvature": plain(self._curvatures),
                "n_duplicates": self._duplicates,
            },
            indent=indent,
            allow_nan=False,
        )

    # -- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that it knows, for a checkpoint: tensors, numbers and texts in plain containers."""
        return {
            "format": _FORMAT,
            "record": self._record_type.__name__,
            "every": self.every,
            "n_steps": self.n_steps,
            "steps": list(self._steps),
            "loss": list(self._losses),
            "n_duplicates": list(self._duplicates),
            "fields": {n: torch.stack(v) if v else None for n, v in self._fields.items()},
            "gradient_norm": self.gradient_norm,
            "curvature": self.curvature,
            "place": None if self._place is None else tuple(self._place),
            "last": self._last,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, as if the loop had not been interrupted.

        Raises:
            ValueError: the state is of a layer with other fields, or of a newer format.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(
                f"The recorder's state has format {state.get('format')!r}; this release reads "
                f"format {_FORMAT}."
            )
        if state["record"] != self._record_type.__name__ or set(state["gradient_norm"]) != set(
            self._norms
        ):
            raise ValueError(
                f"The state is of a {state['record']} layer that learns "
                f"{', '.join(state['gradient_norm'])}; this one holds a "
                f"{self._record_type.__name__} and learns {', '.join(self._norms)}."
            )
        self.every, self.n_steps = state["every"], state["n_steps"]
        self._steps, self._losses = list(state["steps"]), list(state["loss"])
        self._duplicates = list(state["n_duplicates"])
        self._fields = {
            n: [] if v is None else list(v.clone().unbind(0)) for n, v in state["fields"].items()
        }
        self._norms = {n: list(v) for n, v in state["gradient_norm"].items()}
        self._curvatures = {n: list(v) for n, v in state["curvature"].items()}
        self._place = None if state["place"] is None else _Place(*state["place"])
        self._last = state["last"]

    # -- what is wrong --------------------------------------------------------------------------

    @property
    def findings(self) -> list[Finding]:
        """What the course shows so far, the worst first; nothing before eight records."""
        found: list[Finding | None] = []
        if self._losses and not math.isfinite(self._losses[-1]):
            found.append(self._diverged())
        elif len(self) >= _FEW:
            found += [
                self._diverged(),
                self._ejected(),
                self._oscillating(),
                self._still(),
                *self._frozen(),
                self._alike(),
            ]
        return by_severity([one for one in found if one is not None])

    def _diverged(self) -> Finding | None:
        first, late = self._losses[0], torch.tensor(self._losses[-max(2, len(self) // 4) :])
        last = self._losses[-1]
        if math.isfinite(last) and not late.median().item() > 2 * abs(first) + first:
            return None
        return Finding(
            "divergence",
            Severity.SEVERE,
            f"The loss grows: {first:.3g} at the first record, {last:.3g} at the last.",
            {"first_loss": first, "last_loss": last},
            _SLOWER,
        )

    def _ejected(self) -> Finding | None:
        """How often a low loss was followed by one more than half way back to the first."""
        first, least = self._losses[0], min(self._losses)
        drop = first - least
        if not drop > 0.5 * abs(first):  # it has never arrived anywhere
            return None
        low, times, out = False, 0, False
        for loss in self._losses:
            if loss < least + 0.25 * drop:
                low, out = True, False
            elif loss > least + 0.5 * drop and low:
                low, out, times = False, True, times + 1
        if not times:
            return None
        return Finding(
            "ejection",
            Severity.SEVERE if times > 1 or out else Severity.WARNING,
            f"The loss had fallen to {least:.3g}, and jumped back up {_times(times)}: steps are "
            "larger than the basin of the minimum is wide.",
            {"ejections": float(times), "least_loss": least, "last_loss": self._losses[-1]},
            _SLOWER,
        )

    def _oscillating(self) -> Finding | None:
        """Fields that go back and forth in the later half, and get nowhere by it."""
        half = self.params.to(torch.float64)[len(self) // 2 :]
        steps = half[1:].difference(half[:-1])
        where: dict[str, float] = {}
        filters: set[int] = set()
        for name, step in steps.items():
            if name == "center":
                continue
            size = step.square().mean(0).sqrt() / self._scale(name, half)
            path, net = step.abs().sum(0), step.sum(0).abs()
            turns = (step[1:] * step[:-1] < 0).double().mean(0)
            bad = (turns >= 0.85) & (net <= 0.2 * path) & (size > _JUMP)
            if len(step) >= _FEW // 2 - 1 and bool(bad.any()):
                where[name] = step.square().mean(0).sqrt()[bad].max().item()
                filters |= set(bad.any(1).nonzero().flatten().tolist())
        if not where:
            return None
        widest = max(where, key=lambda name: where[name])
        return Finding(
            "oscillation",
            Severity.WARNING,
            f"{', '.join(where)} of {len(filters)} of {half.batch_shape[1]} filters keep going "
            f"back and forth, {widest} by {where[widest]:.2g} {UNITS[widest]}.",
            {f"amplitude[{name}]": value for name, value in where.items()},
            _SLOWER,
            tuple(str(i) for i in sorted(filters)),
            0.9,
        )

    def _still(self) -> Finding | None:
        params = self.params.to(torch.float64)
        largest = {
            name: (value[-1].abs() / self._scale(name, params)).nan_to_num().max().item()
            for name, value in self.displacement.items()
        }
        if max(largest.values()) > _STILL:
            return None
        return Finding(
            "filters did not move",
            Severity.WARNING,
            f"After {self._steps[-1]} steps no filter has moved by more than 0.1 %.",
            {f"moved[{name}]": value for name, value in largest.items()},
            "for group in optimizer.param_groups:\n    group['lr'] *= 10\n",
            (),
            0.8,
        )

    def _frozen(self) -> list[Finding]:
        missing = [n for n, values in self._norms.items() if all(map(math.isnan, values))]
        zero = [n for n, values in self._norms.items() if not any(v > 0 for v in values)]
        found = []
        if missing and len(missing) == len(self._norms):
            found.append(
                Finding(
                    "no gradient",
                    Severity.SEVERE,
                    f"{', '.join(missing)} never had a gradient: the loss is cut off from the "
                    "layer, or gradients are cleared before record(loss).",
                    {},
                    "",
                    tuple(missing),
                    0.8,
                )
            )
        elif zero:
            found.append(
                Finding(
                    "frozen",
                    Severity.WARNING,
                    f"{', '.join(zero)} had no gradient, or one of exactly zero, at every record.",
                    {},
                    "",
                    tuple(zero),
                    0.8,
                )
            )
        return found

    def _alike(self) -> Finding | None:
        first, last = self._duplicates[0], self._duplicates[-1]
        if last <= first:
            return None
        return Finding(
            "duplicate filters",
            Severity.WARNING,
            f"Filters become alike: {first} pairs with the same kernel at first, {last} now.",
            {"first_pairs": float(first), "last_pairs": float(last)},
            "from gaborium.diagnostics import health, reseed\n"
            f"layer = module.get_submodule({self.name!r})\n"
            "reseed(layer, health(layer).redundant, seed=0)\n"
            "if optimizer is not None:\n    optimizer.state.clear()\n",
            (),
            0.6,
        )

    @staticmethod
    def _scale(name: str, params: Gabor) -> Tensor | float:
        """What a change of a field is compared with: 1 rad, 1 px, or the field's own size."""
        if name in _ANGLES or name == "center":
            return 1.0
        size = params.expand().as_dict()[name].abs().mean(0)
        return torch.where(size > 0, size, 1.0)


def watch(layer: nn.Module, every: int = _EVERY, *, name: str = "") -> Recorder:
    """Record how a Gabor layer learns: two lines in any training loop.

    Args:
        layer: a ``GaborConvNd``, as it begins. It is only looked at.
        every: a record is made at the first step and at every so many after it. An odd number
            shows also what goes to and fro at every step; so does 1, at a higher cost.
        name: of the layer in ``module``, for the code of the remedies.

    Returns:
        A recorder. Call its ``record(loss)`` after each ``optimizer.step()``; read its
        ``findings`` at any time: ``"divergence"``, ``"ejection"``, ``"oscillation"``,
        ``"filters did not move"``, ``"no gradient"``, ``"frozen"``, ``"duplicate filters"``.

    Raises:
        TypeError: the layer is none of ours.
        ValueError: ``every`` is no positive whole number.

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


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"
