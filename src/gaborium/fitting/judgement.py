"""From where searches ended to a result: records, standard errors, an outcome for each filter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gaborium.fitting.result import FitResult, Outcome
from gaborium.fitting.search import ALIKE, LITTLE, MUCH, NOT_ALL, Best
from gaborium.fitting.solver import Family, Solution, Target
from gaborium.kernels import gabor_jacobian
from gaborium.params import RECORDS, Gabor

_WEAK = 1e-11  # eigenvalue of the scaled Fisher information that carries none
# Standard deviation of who knows nothing: of a number between 0 and the period, or, of a positive
# one, its own size.
_IGNORANCE = {
    "orientation": math.pi / math.sqrt(12),
    "elevation": math.pi / math.sqrt(12),
    "phase": 2 * math.pi / math.sqrt(12),
}


@dataclass(frozen=True)
class Evidence:
    """What is known about targets beside where their searches ended; all of shape ``(batch,)``.

    Args:
        explained: share of the target's power that the kernel explains, for the user.
        share: the same less what noise would add to it: share of what can be explained.
        noise: variance of the noise in the metric's coordinates.
        n_left: numbers in a target that are not used up by parameters.
        scale: what targets were divided by.
        bad: whether there was nothing to fit.
    """

    explained: Tensor
    share: Tensor
    noise: Tensor
    n_left: Tensor
    scale: Tensor
    bad: Tensor


def judge(
    family: Family,
    target: Target,
    best: Best,
    evidence: Evidence,
    *,
    shared: bool,
) -> FitResult:
    """Turn ends into a result.

    Args:
        family: what was searched.
        target: what for.
        best: the ends.
        evidence: how far they explain it.
        shared: whether fields keep their channel axis.
    """
    solution = best.solution
    params = record_of(family, solution)  # (B, 1) and (B, C)
    standard_error, correlation, names = _errors(family, params, target, evidence.noise)
    n_left, cost = evidence.n_left, solution.cost
    first = target.y.square().sum((-2, -1)) - cost
    for name, error in standard_error.items():
        if name != "center":
            limit = _IGNORANCE.get(name, params.as_dict()[name])
            standard_error[name] = torch.where(error > limit, torch.inf, error)
    _doubt(family, params, best, n_left, standard_error)
    scale = evidence.scale.double().unsqueeze(-1)
    params = params.replace(amplitude=params.amplitude * scale)
    standard_error["amplitude"] = standard_error["amplitude"] * scale

    unknown = torch.stack(
        [error.isinf().flatten(1).any(1) for error in standard_error.values()]
    ).any(0)
    off = ~(evidence.share >= torch.where(best.structured, NOT_ALL, LITTLE))
    off |= best.structured & (best.second > MUCH * first) | best.other
    code = torch.where(unknown, 3, 4)
    for number, mask in ((2, off), (1, ~solution.converged), (0, evidence.bad)):
        code = torch.where(mask, number, code)
    by_code = (
        *(Outcome.BAD_INPUT, Outcome.STALLED, Outcome.OFF_MODEL),
        *(Outcome.NOT_IDENTIFIABLE, Outcome.CONVERGED),
    )

    def masked(value: Tensor) -> Tensor:
        flat = torch.where(
            evidence.bad.reshape(-1, *[1] * (value.ndim - 1)), torch.nan, value.double()
        )
        return flat if shared or flat.ndim < 2 else flat[:, 0]

    return FitResult(
        params=type(params)(**{name: masked(v) for name, v in params.as_dict().items()}),
        outcome=tuple(by_code[i] for i in code.tolist()),
        explained_variance=masked(evidence.explained),
        standard_error={name: masked(value) for name, value in standard_error.items()},
        correlation=correlation,
        names=names,
        n_iterations=solution.n_iterations,
    )


def record_of(family: Family, solution: Solution) -> Gabor:
    """Geometry ``(batch, 1)``, phase and amplitude ``(batch, channels)``, in float64."""
    z, coefficients = solution.z.double(), solution.coefficients.double()
    columns = family.columns
    frequency, center = z[:, columns["frequency"]], z[:, columns["center"] :]
    fields = {name: z[:, columns[name]] for name in family.angle_names}
    fields |= {
        "wavelength": frequency.abs().reciprocal(),
        "sigma": z[:, columns["sigma"]].exp(),
        "aspect_ratio": z[:, columns["aspect_ratio"]].exp(),
        "center": center,
    }
    record = RECORDS[family.n_dims]
    fields = {
        name: value[:, None] for name, value in fields.items() if name in record.field_names()
    }
    amplitude = coefficients[..., :2].norm(dim=-1)
    phase = torch.atan2(coefficients[..., 1], coefficients[..., 0])
    wave = record(**fields, phase=phase, amplitude=amplitude)
    # The solver counts the phase from the kernel's middle, a record from the envelope's centre.
    k = wave.direction * frequency[:, None, None]
    phase = phase + 2 * math.pi * (k * center[:, None]).sum(-1)
    # A wave that runs backwards is the same one with the opposite phase: cos(-φ + ψ) = cos(φ - ψ).
    phase = torch.where(frequency[:, None] < 0, -phase, phase)
    whole = wave.replace(phase=phase).canonical().as_dict()
    return record(
        **{name: v if name in ("phase", "amplitude") else v[:, :1] for name, v in whole.items()}
    )


def _doubt(
    family: Family,
    params: Gabor,
    best: Best,
    n_left: Tensor,
    standard_error: dict[str, Tensor],
) -> None:
    """Where another kernel fits as well, what differs between the two is not determined.

    As well means: to what noise does to misfits. Where more than noise is left, the model is wrong,
    and says nothing about which of two poor fits is the right one.
    """
    rival, cost = best.rival, best.solution.cost
    alike = rival.cost - cost <= ALIKE * cost / n_left
    doubtful = (alike | (best.structured & rival.cost.isfinite())).nonzero().flatten()
    if len(doubtful) == 0:
        return
    other = record_of(family, rival.pick(doubtful))
    difference = params[doubtful.tolist()].difference(other)
    for name, error in standard_error.items():
        far = difference[name].abs() > 3 * error[doubtful]
        if far.shape != error[doubtful].shape:  # compared channel by channel, where none differs
            far = far.any(1, keepdim=True)
        error[doubtful] = torch.where(far, torch.inf, error[doubtful])


def _errors(
    family: Family, params: Gabor, target: Target, noise: Tensor
) -> tuple[dict[str, Tensor], Tensor, tuple[str, ...]]:
    """Standard errors and correlations, from the Fisher information at the solution."""
    slopes = gabor_jacobian(params, family.sizes)
    C, d = family.n_channels, family.n_dims
    columns: dict[str, Tensor] = {}  # each (B, C, pixels)
    for name, slope in slopes.items():
        if name in ("phase", "amplitude"):
            for channel in range(C):
                alone = torch.zeros_like(slope)
                alone[:, channel] = slope[:, channel]
                columns[f"{name}[{channel}]"] = alone.flatten(2)
        elif name == "center":
            if family.free_center:
                for axis in range(d):
                    columns[f"center[{axis}]"] = slope[:, :, axis].flatten(2)
        elif name != "aspect_ratio" or family.columns[name] in family.free:
            columns[name] = slope.flatten(2)
    names = tuple(columns)
    rows = [*columns.values()]
    if family.offset:
        one = torch.zeros_like(rows[0])
        for channel in range(C):
            rows.append(one.clone())
            rows[-1][:, channel] = 1.0
    J = torch.stack(rows, 1)  # (B, p, C, pixels)
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
    weak = values < _WEAK
    inverse = torch.where(weak, 0.0, 1 / torch.where(weak, 1.0, values))
    covariance = (vectors * inverse.unsqueeze(-2)) @ vectors.mT
    # A parameter that takes part in a direction without information is not determined.
    free = (vectors.square() * weak.unsqueeze(-2)).sum(-1) > 1e-3
    spread = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    error = torch.where(
        free | silent, torch.inf, spread / safe * noise.double().unsqueeze(-1).sqrt()
    )
    unit = torch.where(spread > 0, spread, 1.0)
    correlation = covariance / (unit.unsqueeze(-1) * unit.unsqueeze(-2))
    correlation = correlation[:, : len(names), : len(names)]

    found = dict(zip(names, error.unbind(-1), strict=False))  # less the offsets
    nothing = torch.zeros_like(error[:, 0])
    result = {}
    for name in params.field_names():
        if name in ("phase", "amplitude"):
            result[name] = torch.stack([found[f"{name}[{i}]"] for i in range(C)], -1)
        elif name == "center":
            parts = [found.get(f"center[{i}]", nothing) for i in range(d)]
            result[name] = torch.stack(parts, -1).unsqueeze(1)
        else:
            result[name] = found.get(name, nothing).unsqueeze(-1)
    return result, correlation, names
