"""Robust fits: a few wild pixels lose their weight.

A robust loss ρ is minimised by weighted least squares with weights ``ρ'(r) / r`` of the last
residuals (iteratively reweighted least squares). The first weights come from the kernel alone: a
pixel far from the median of its neighbours is not trusted.

Reference:
    Holland and Welsch (1977), Commun. Stat. Theory Methods 6(9), doi:10.1080/03610927708827533.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium.fitting.model import GaborModel
from gaborium.fitting.search import Best, Search
from gaborium.fitting.solver import Target, kernels_of

LOSSES = ("squared", "huber", "cauchy")
_TUNING = {"huber": 1.345, "cauchy": 2.385}  # 95 % efficient if the noise is normal
_MAX_ROUNDS = 50
_N_SEARCHES = 2  # of these rounds, how many try all starts
_TOLERANCE = 1e-6  # change of the kernel, as a share of the residuals' scale


def reweighted(target: Target, search: Search, loss: str) -> tuple[Best, Tensor, Tensor]:
    """Search under a robust loss.

    Returns the best ends, with the cost under the last weights; the variance of noise that gives
    the right standard errors in the metric of ``target``, ``(batch,)``; and the last weights,
    between 0 and 1, ``(batch, channels, pixels)``.
    """
    model, y = search.model, target.y
    own = torch.ones_like(y) if target.weight is None else target.weight.expand_as(y)
    counted = own > 0
    # Residuals are in units of each pixel's noise, as the target weighs them.
    difference, spread = _from_neighbours(torch.where(counted, y / own, 0.0), model)
    difference, spread = difference * own, spread * own
    scale = _spread(difference, counted)
    # Without a fit, rather too little trust than too much.
    trust = _trust(difference, "cauchy", torch.maximum(scale[:, None, None], spread)).square()
    before = torch.zeros_like(y)
    best: Best | None = None
    everyone = torch.arange(len(y), device=y.device)
    for round_ in range(_MAX_ROUNDS):
        last = trust
        root = trust.sqrt()
        here = Target(y * root, None, own * root)
        if best is None or round_ < _N_SEARCHES:
            best = search.best(here)
        else:
            z = best.solution.z
            best = replace(best, solution=search.follow(here, z, everyone, search.tolerance))
        coefficients = best.solution.coefficients
        kernels = kernels_of(model, best.solution.z, coefficients)
        now = own * (kernels + coefficients[..., 2:].sum(-1, keepdim=True))  # and the offset
        residual = y - now
        scale = _spread(residual, counted)
        trust = _trust(residual, loss, scale[:, None, None])
        change = (now - before).square().sum((-2, -1)).sqrt()
        if round_ >= _N_SEARCHES and (change <= _TOLERANCE * scale).all():
            break
        before = now
    assert best is not None
    noise = _noise(residual / scale[:, None, None], loss, counted, model) * scale.square()
    return best, noise, torch.where(counted, last, 0.0)


def _from_neighbours(kernels: Tensor, model: GaborModel) -> tuple[Tensor, Tensor]:
    """Differences from the median of a pixel and its neighbours, and the spread of these.

    Both ``(batch, channels, pixels)``. Where the kernel oscillates, neighbours differ without being
    wild.
    """
    d = model.n_dims
    around = kernels.unflatten(-1, model.sizes).flatten(0, 1).unsqueeze(1)
    # Replicate padding has one to three axes; reflecting does not work on single pixels.
    around = F.pad(around, (1, 1) * d, mode="replicate")
    for axis in range(2, 2 + d):
        around = around.unfold(axis, 3, 1)
    around = around.flatten(2 + d)
    middle = around.median(-1, keepdim=True).values
    spread = 1.4826 * (around - middle).abs().median(-1).values
    return kernels - middle.reshape(kernels.shape), spread.reshape(kernels.shape)


def _spread(residual: Tensor, counted: Tensor) -> Tensor:
    """Robust standard deviation of residuals, by their median: ``(batch,)``."""
    size = torch.where(counted, residual.abs(), torch.nan).flatten(1)
    least = 1e2 * torch.finfo(residual.dtype).eps
    return (1.4826 * size.nanmedian(1).values).clamp_min(least)


def _trust(residual: Tensor, loss: str, scale: Tensor) -> Tensor:
    """Weights ``ρ'(r) / r`` in [0, 1]."""
    t = residual.abs() / (_TUNING[loss] * scale)
    return 1 / t.clamp_min(1.0) if loss == "huber" else 1 / (1 + t.square())


def _noise(t: Tensor, loss: str, counted: Tensor, model: GaborModel) -> Tensor:
    """Variance of normal noise, in squared scales, that gives the same standard errors."""
    c = _TUNING[loss]
    if loss == "huber":
        force, slope = t.clamp(-c, c), (t.abs() < c).to(t)
    else:
        u = 1 + (t / c).square()
        force, slope = t / u, (2 - u) / u.square()
    n = counted.expand_as(t).sum((-2, -1))
    left = (n - model.n_parameters).clamp_min(1)
    of_force = torch.where(counted, force.square(), 0.0).sum((-2, -1)) / left
    of_slope = torch.where(counted, slope, 0.0).sum((-2, -1)) / n
    return of_force / of_slope.square()
