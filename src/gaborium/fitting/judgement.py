"""The ends of searches as a result: records, standard errors, an outcome for each filter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gaborium.fitting.model import GaborModel
from gaborium.fitting.result import FitResult, Outcome
from gaborium.fitting.search import (
    EQUAL_COST_FACTOR,
    MIN_EXPLAINED,
    MIN_EXPLAINED_STRUCTURED,
    SECOND_WAVE_SHARE,
    Best,
)
from gaborium.fitting.solver import Target
from gaborium.functions.kernels import gabor_jacobian
from gaborium.functions.params import Gabor

_MIN_EIGENVALUE = 1e-11  # of the scaled Fisher information; below, a direction is unknown
_MAX_UNKNOWN_SHARE = 1e-3  # of a parameter in such directions, up to which it is determined
_DISTINCT = 3.0  # standard errors by which the parameters of two kernels differ
# Standard deviation without any knowledge: of a uniform number between 0 and the period; for a
# positive parameter its own size.
_MAX_ERROR = {
    "orientation": math.pi / math.sqrt(12),
    "elevation": math.pi / math.sqrt(12),
    "phase": 2 * math.pi / math.sqrt(12),
}


@dataclass(frozen=True)
class FitStatistics:
    """Variances and counts from which outcomes and errors follow; all of shape ``(batch,)``."""

    explained: Tensor  # share of the target's power that the kernel explains, for the user
    explained_signal: Tensor  # the same less what noise adds: share of what can be explained
    noise: Tensor  # its variance in the metric's coordinates
    n_left: Tensor  # numbers in a target that are not used up by parameters
    scale: Tensor  # what targets were divided by
    bad: Tensor  # whether the target is zero or not finite


def judge(
    model: GaborModel, target: Target, best: Best, statistics: FitStatistics, *, shared: bool
) -> FitResult:
    """Turn ends into a result; with ``shared`` geometry fields keep their channel axis."""
    solution, bad = best.solution, statistics.bad
    params = model.record(solution.z, solution.coefficients)  # (B, 1) and (B, C)
    standard_error, correlation, names = _errors(model, params, target, statistics.noise)
    for name, error in standard_error.items():
        if name != "center":
            limit = _MAX_ERROR.get(name, params.as_dict()[name])
            standard_error[name] = torch.where(error > limit, torch.inf, error)
    _mark_ambiguous(model, params, best, statistics.n_left, standard_error)
    scale = statistics.scale.double().unsqueeze(-1)
    params = params.replace(amplitude=params.amplitude * scale)
    standard_error["amplitude"] = standard_error["amplitude"] * scale

    def masked(value: Tensor) -> Tensor:
        nothing = bad.reshape(-1, *[1] * (value.ndim - 1))
        value = torch.where(nothing, torch.nan, value.double())
        return value if shared or value.ndim < 2 else value[:, 0]

    return FitResult(
        params=type(params)(**{name: masked(v) for name, v in params.as_dict().items()}),
        outcome=_outcomes(target, best, statistics, standard_error),
        explained_variance=masked(statistics.explained),
        standard_error={name: masked(value) for name, value in standard_error.items()},
        correlation=correlation,
        names=names,
        n_iterations=solution.n_iterations,
    )


def _outcomes(
    target: Target, best: Best, statistics: FitStatistics, standard_error: dict[str, Tensor]
) -> tuple[Outcome, ...]:
    power_of_first = target.power() - best.solution.cost
    least = torch.where(best.structured, MIN_EXPLAINED_STRUCTURED, MIN_EXPLAINED)
    off = ~(statistics.explained_signal >= least) | best.other
    off |= best.structured & (best.second > SECOND_WAVE_SHARE * power_of_first)
    unknown = [error.isinf().flatten(1).any(1) for error in standard_error.values()]
    ends = [Outcome.CONVERGED] * len(off)
    for outcome, mask in (  # a later one overrides an earlier one
        (Outcome.NOT_IDENTIFIABLE, torch.stack(unknown).any(0)),
        (Outcome.OFF_MODEL, off),
        (Outcome.STALLED, ~best.solution.converged),
        (Outcome.BAD_INPUT, statistics.bad),
    ):
        ends = [outcome if is_so else end for end, is_so in zip(ends, mask.tolist(), strict=True)]
    return tuple(ends)


def _mark_ambiguous(
    model: GaborModel, params: Gabor, best: Best, n_left: Tensor, errors: dict[str, Tensor]
) -> None:
    """Where another kernel fits equally well, parameters that differ are not determined.

    Equally well means: within what noise does to misfits. Where more than noise is left, the model
    is wrong and cannot decide between two poor fits.
    """
    rival, cost = best.rival, best.solution.cost
    equal = rival.cost - cost <= EQUAL_COST_FACTOR * cost / n_left
    ambiguous = (equal | (best.structured & rival.cost.isfinite())).nonzero().flatten()
    if len(ambiguous) == 0:
        return
    other = rival.select(ambiguous)
    difference = params[ambiguous.tolist()].difference(model.record(other.z, other.coefficients))
    for name, error in errors.items():
        far = difference[name].abs() > _DISTINCT * error[ambiguous]
        if far.shape != error[ambiguous].shape:  # compared per channel, although all have the same
            far = far.any(1, keepdim=True)
        error[ambiguous] = torch.where(far, torch.inf, error[ambiguous])


def _errors(
    model: GaborModel, params: Gabor, target: Target, noise: Tensor
) -> tuple[dict[str, Tensor], Tensor, tuple[str, ...]]:
    """Standard errors and correlations, from the Fisher information at the solution."""
    one = torch.eye(model.n_channels, dtype=torch.bool, device=noise.device).unsqueeze(-1)

    def by_channel(slope: Tensor) -> Tensor:
        return torch.where(one, slope.unsqueeze(1), 0.0)

    columns: dict[str, Tensor] = {}  # by fields: (B, entries, C, pixels)
    for name, slope in gabor_jacobian(params, model.sizes).items():
        flat = slope.flatten(-model.n_dims)
        if name in ("phase", "amplitude"):
            columns[name] = by_channel(flat)
        elif name == "center":
            columns |= {name: flat.movedim(2, 1)} if model.free_center else {}
        elif name != "aspect_ratio" or model.columns[name] in model.free:
            columns[name] = flat.unsqueeze(1)
    widths = {name: rows.shape[1] for name, rows in columns.items()}
    shared = {*columns} - {"phase", "amplitude", "center"}
    names = tuple(
        name if name in shared else f"{name}[{i}]" for name, n in widths.items() for i in range(n)
    )
    rows = [*columns.values()]
    if model.offset:
        rows.append(by_channel(torch.ones_like(rows[0][:, 0])))
    J = torch.cat(rows, 1)  # (B, p, C, pixels)
    if target.root is not None:
        J = J.flatten(2) @ target.root.double().T
    elif target.weight is not None:
        J = J * target.weight.double().unsqueeze(1)
    J = J.flatten(2)
    F = torch.nan_to_num(J @ J.mT, nan=0.0, posinf=0.0)  # a search that failed has no information
    size = F.diagonal(dim1=-2, dim2=-1).sqrt()
    silent = size <= 1e-12 * size.amax(-1, keepdim=True)
    safe = torch.where(silent, 1.0, size)
    values, vectors = torch.linalg.eigh(F / (safe.unsqueeze(-1) * safe.unsqueeze(-2)))
    weak = values < _MIN_EIGENVALUE
    inverse = torch.where(weak, 0.0, 1 / torch.where(weak, 1.0, values))
    covariance = (vectors * inverse.unsqueeze(-2)) @ vectors.mT
    # A parameter that takes part in a direction without information is not determined.
    free = (vectors.square() * weak.unsqueeze(-2)).sum(-1) > _MAX_UNKNOWN_SHARE
    spread = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    error = spread / safe * noise.double().unsqueeze(-1).sqrt()
    error = torch.where(free | silent, torch.inf, error)
    unit = torch.where(spread > 0, spread, 1.0)
    correlation = covariance / (unit.unsqueeze(-1) * unit.unsqueeze(-2))
    correlation = correlation[:, : len(names), : len(names)]

    parts = error[:, : len(names)].split([*widths.values()], 1)  # less the offsets
    errors = dict(zip(widths, parts, strict=True))
    errors.setdefault("center", error.new_zeros(len(error), model.n_dims))
    errors["center"] = errors["center"].unsqueeze(1)
    zero = torch.zeros_like(error[:, :1])
    return {n: errors.get(n, zero) for n in params.field_names()}, correlation, names
