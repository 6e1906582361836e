"""Steps on a quadratic loss: downhill, to the best Gabor function anywhere, or to begin again."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gaborium.functions.kernels import combine, inner_products
from gaborium.functions.params import Gabor
from gaborium.optim.kernel_family import KernelFamily
from gaborium.optim.quadratic import Evaluation, Metric, Quadratic, inner

_N_BEST = 2  # geometries that are refined for each filter
_MIN_EXPLAINED = 0.6  # of what the present filter explains; below, a candidate is not refined
_DEAD_SHARE = 1e-3  # of the median length; a shorter filter is dead
_MIN_CHANGE = 0.02  # of its length by which the loss must ask a filter to change


class Linearization(NamedTuple):
    """Derivatives of the kernels of every filter, and what they do to its responses."""

    jacobian: Tensor  # J, (filters, members, p, n)
    hessian: Tensor  # J C Jᵀ, (filters, p, p)

    @classmethod
    def at(cls, family: KernelFamily, metric: Metric, z: Tensor) -> Linearization:
        """The derivatives at z."""
        J = family.jacobian(z)
        return cls(J, (metric.times(J) @ J.mT).sum(1))

    def recompute(
        self, family: KernelFamily, metric: Metric, z: Tensor, mask: Tensor
    ) -> Linearization:
        """The derivatives at z for the filters in ``mask``, the old ones for the others."""
        index = mask.nonzero().flatten()
        if not len(index):
            return self
        if len(index) == len(z) or metric.n_groups > 1:
            return Linearization.at(family, metric, z)
        new = Linearization.at(family.select(index), metric, z[index])
        return Linearization(*(a.index_copy(0, index, b) for a, b in zip(self, new, strict=True)))


def descend(
    family: KernelFamily,
    loss: Quadratic,
    z: Tensor,
    radius: Tensor,
    damping: Tensor,
    *,
    n_iterations: int = 1,
    here: Evaluation | None = None,
    linearization: Linearization | None = None,
) -> tuple[Tensor, Evaluation, Tensor]:
    """Levenberg-Marquardt steps on the quadratic, within a radius around the start.

    From rows z ``(filters, p)``, with a radius in the metric's length and a first damping for each
    filter; ``here`` and ``linearization`` are the loss and the derivatives at z, if they are known.
    Returns the new rows, the loss there, and the damping for the next time.
    """
    here = start = here or loss.at(family.kernels(z))
    linearization = linearization or Linearization.at(family, loss.metric, z)
    excess = family.excess(z)
    for i in range(n_iterations):
        J, hessian = linearization
        slope = (J @ here.descent.unsqueeze(-1)).squeeze(-1).sum(1)
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        # Marquardt's scaling, with a floor for directions that change nothing.
        floor = 1e-7 * diagonal.amax(-1, keepdim=True) + torch.finfo(z.dtype).tiny
        damped = hessian + torch.diag_embed(damping[:, None] * (diagonal + floor) + floor)
        step = torch.nan_to_num(torch.linalg.solve_ex(damped, slope)[0])
        length = (step * (hessian @ step.unsqueeze(-1)).squeeze(-1)).sum(-1).clamp_min(0).sqrt()
        step = step * (radius / length.clamp_min(1e-30)).clamp_max(1.0).unsqueeze(-1)

        new = loss.at(family.kernels(z + step))
        better = (new.value < here.value) & (new.distance(start) <= 1.5 * radius)
        new_excess = family.excess(z + step)
        better &= new_excess <= excess
        excess = torch.where(better, new_excess, excess)
        z = torch.where(better.unsqueeze(-1), z + step, z)
        here = new.where(better, here)
        damping = torch.where(better, 0.25 * damping, 8.0 * damping).clamp(1e-9, 1e9)
        if i + 1 < n_iterations:
            linearization = linearization.recompute(family, loss.metric, z, better)
    return z, here, damping


def global_step(
    family: KernelFamily, loss: Quadratic, z: Tensor, n_iterations: int = 10
) -> tuple[Tensor, Evaluation]:
    """The best Gabor functions anywhere, as far as a grid of geometries finds them.

    For every geometry of the grid the best amplitudes and phases are known in closed form. The
    best geometries are refined by ``descend``. With ``geometry="pair"`` one input channel after the
    other is searched while the others stay. Returns rows ``(filters, p)``, and the loss there.
    """
    here = loss.at(family.kernels(z))
    n_channels = family.record(z).amplitude.shape[1]
    channels = [slice(c, c + 1) for c in range(n_channels)]
    for part in channels if family.layer.geometry == "pair" else [slice(n_channels)]:
        # The candidates of a filter follow each other, so that groups stay together.
        start = _candidates(family, loss, z, here, part)
        filters = torch.arange(len(z), device=z.device).repeat_interleave(_N_BEST)
        there = loss.select(filters).at(family.select(filters).kernels(start))
        promising = there.value < _MIN_EXPLAINED * here.value[filters]
        # All groups must keep the same number of filters.
        index = (promising | (loss.metric.n_groups > 1)).nonzero().flatten()
        if not len(index):
            continue
        some = loss.select(filters[index])
        radius, damping = torch.full_like(some.scale, torch.inf), torch.full_like(some.scale, 1e-2)
        part_family, rows = family.select(filters[index]), start[index]
        rows, reached, _ = descend(
            part_family, some, rows, radius, damping, n_iterations=n_iterations
        )
        start[index] = rows
        value = torch.full_like(there.value, torch.inf)
        value[index] = torch.where(reached.value.isnan(), torch.inf, reached.value)
        value, best = value.unflatten(0, (-1, _N_BEST)).min(1)
        best += _N_BEST * filters[::_N_BEST]
        z = torch.where((value < here.value).unsqueeze(-1), start[best], z)
        here = loss.at(family.kernels(z))
    return z, here


def _candidates(
    family: KernelFamily, loss: Quadratic, z: Tensor, here: Evaluation, part: slice
) -> Tensor:
    """Rows ``(filters · _N_BEST, p)`` with the best geometries of a grid for some channels."""
    layer, now = family.layer, family.record(z)
    grid = _grid(layer, now, part)
    linear = loss.linear
    if part != slice(now.amplitude.shape[1]):
        # The other channels stay: their share of the responses is subtracted.
        others = here.kernels.unflatten(-1, (now.amplitude.shape[1], -1)).clone()
        others[:, :, part] = 0.0
        linear = linear - loss.metric.times(others.flatten(2))
    found = []
    filters = torch.arange(len(z), device=z.device)
    for covariance, group in zip(
        loss.metric.covariance, filters.chunk(loss.metric.n_groups), strict=True
    ):
        shared = grid.batch_shape[1] == 1
        for some in [group] if shared else group.split(1):
            geometry = grid if shared else grid[:, some]
            found.append(_search(family, covariance, linear[some], now[some], geometry, part))
    chosen, amplitude, phase = (torch.cat(parts) for parts in zip(*found, strict=True))

    filters = filters.repeat_interleave(_N_BEST)
    family = family.select(filters)
    fields = family.record(z[filters]).as_dict()
    for name, value in fields.items():
        if name in ("amplitude", "phase"):
            best = amplitude if name == "amplitude" else phase
        else:
            of_grid = getattr(grid, name)
            best = of_grid[chosen, filters.reshape(chosen.shape) % of_grid.shape[1]].unsqueeze(2)
        fields[name] = value.clone()
        fields[name][:, part] = best.flatten(0, 1)
    params = type(now)(**fields)
    if layer.unit_norm and "amplitude" in layer.learn:
        # There the amplitude is the kernel's norm.
        wave = params.waveform()
        even, odd = layer.even_odd(wave)
        kernels = combine(even, odd, wave).flatten(2)
        ours = family.kernels(family.rows(params))[:, 0].reshape(kernels.shape)
        ratio = kernels.norm(dim=-1) / ours.norm(dim=-1).clamp_min(1e-30)
        params = params.replace(amplitude=params.amplitude * ratio)
    return family.rows(params)


def _grid(layer: Any, now: Gabor, part: slice) -> Gabor:
    """Geometries to compare, ``(N, filters)``, or ``(N, 1)`` where they are the same for all."""
    learned = [name for name in now.field_names() if name in layer.learn]
    alone = len(set(learned) - {"amplitude", "phase"}) == 1
    with_center, like = "center" in learned, now.sigma
    largest = max(layer.kernel_size)
    n_angles = 48 if alone else 8 if with_center or now.n_dims == 3 else 12
    n_waves, n_widths = (24, 16) if alone else (6, 3) if with_center else (9, 5)
    period = math.pi if "phase" in learned else 2 * math.pi  # a fixed phase distinguishes k from -k
    waves = torch.linspace(0.0, 0.42, n_waves).to(like).clamp_min(0.1 / largest).reciprocal()
    widths = torch.linspace(math.log(1 / 14), math.log(0.4), n_widths).to(like).exp()
    shortest = 1.1 * (layer.min_wavelength or 0.0)
    lines = {
        "orientation": period * torch.arange(n_angles).to(like) / n_angles,
        "elevation": torch.linspace(-1.2, 1.2, 5).to(like),
        "wavelength": waves.clamp_min(shortest),
        "sigma": (largest * widths).clamp_min(0.4),
        "aspect_ratio": torch.tensor([0.5, 1.0] if with_center else [0.4, 0.7, 1.0, 1.6]).to(like),
    }
    names = [name for name in learned if name in lines]
    axes = [f"center{axis}" for axis in range(now.n_dims)] if with_center else []
    for axis, size in zip(axes, reversed(layer.kernel_size), strict=False):
        lines[axis] = torch.tensor([-size / 5, 0.0, size / 5]).to(like)
    ticks = [lines[name] for name in [*names, *axes]]
    points = torch.meshgrid(*ticks, indexing="ij") if ticks else ()
    columns = {
        n: point.flatten()[:, None] for n, point in zip([*names, *axes], points, strict=True)
    }
    n = points[0].numel() if points else 1
    fields = {}
    for name, value in now.expand().as_dict().items():
        own = value[:, part][:, 0]  # (filters,) or (filters, d)
        own = own[:1] if bool((own == own[:1]).all()) else own
        fields[name] = columns.get(name, own.expand(n, *own.shape))
    if with_center:
        fields["center"] = torch.stack([columns[axis] for axis in axes], -1)
    fields |= dict.fromkeys(("amplitude", "phase"), torch.ones_like(like[:1, :1]).expand(n, 1))
    return type(now)(**fields)


def _search(
    family: KernelFamily,
    covariance: Tensor,
    linear: Tensor,
    now: Gabor,
    geometry: Gabor,
    part: slice,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best geometries of some filters, ``(filters, n)``, with their amplitude and phase."""
    learn = family.layer.learn
    even, odd = (p.flatten(1) for p in family.layer.even_odd(geometry[:, 0].waveform()))
    columns = torch.stack([even, -odd]).unsqueeze(1)  # (2, members, N, pixels)
    if family.n_members == 2:
        columns = torch.cat([columns, torch.stack([odd, even]).unsqueeze(1)], 1)
    shape = (-1, even.shape[-1])
    C = covariance.unflatten(0, shape).unflatten(-1, shape)[part][:, :, part]
    wanted = linear.unflatten(-1, shape)[:, :, part]  # (filters, members, channels, pixels)
    n_channels = len(C)
    gram = columns.new_zeros(len(even), 2, n_channels, 2, n_channels)
    for c, d in itertools.product(range(n_channels), repeat=2):
        gram[:, :, c, :, d] = torch.einsum("amnp,bmnp->nab", columns @ C[c, :, d], columns)
    gram = gram.flatten(-2).flatten(1, 2)  # (N, 2C, 2C)
    rhs = torch.einsum("fmcp,amnp->nfac", wanted, columns).flatten(2)  # (N, filters, 2C)
    size = gram.diagonal(dim1=-2, dim2=-1)
    ridge = 1e-6 * size.amax(-1, keepdim=True).expand_as(size) + 1e-30
    root = torch.linalg.cholesky_ex(gram + torch.diag_embed(ridge))[0]
    # A cos ψ and A sin ψ are linear coefficients, which the layer may not be free to choose.
    a, b = torch.cholesky_solve(rhs.mT, root).mT.unflatten(-1, (2, -1)).unbind(-2)
    amplitude, phase = now.amplitude[:, part].expand_as(a), now.phase[:, part].expand_as(a)
    if "phase" in learn:
        sign = torch.where(("amplitude" not in learn) & (amplitude < 0), -1.0, 1.0)
        phase = torch.atan2(sign * b, sign * a)
    if "amplitude" in learn:
        amplitude = a * phase.cos() + b * phase.sin()
    weights = torch.cat([amplitude * phase.cos(), amplitude * phase.sin()], -1)
    value = (weights * (0.5 * (weights @ gram) - rhs)).sum(-1)
    value = torch.where(value.isfinite(), value, torch.inf)
    chosen = value.topk(min(_N_BEST, len(value)), 0, largest=False).indices.T
    chosen = chosen[:, torch.arange(_N_BEST) % chosen.shape[1]]
    filters = torch.arange(len(chosen)).unsqueeze(-1)
    return chosen, amplitude[chosen, filters], phase[chosen, filters]


def reinitialize_filters(
    family: KernelFamily,
    loss: Quadratic,
    z: Tensor,
    free: Tensor,
    *,
    n_errors: Tensor,
    max_correlation: float,
) -> tuple[Tensor, Tensor]:
    """Give dead and duplicate filters new parameters, where the loss asks for a filter.

    A duplicate responds as another filter does. It becomes the Gabor function nearest to its step,
    without the part of the step that only makes it stronger or weaker, and keeps its strength. It
    stays if another filter is there, or if the step is not clearly longer than its error: the
    following layers must learn what the filter means now, and near a planted kernel no step is
    long.

    Only filters in ``free`` change; a step must be ``n_errors`` standard errors long. Returns rows
    ``(filters, p)``, and which of them are new.
    """
    metric, new = loss.metric, torch.zeros_like(free)
    here = loss.at(family.kernels(z))
    alive = here.length > _DEAD_SHARE * here.length.median()
    duplicates = _correlations(here, here, metric.n_groups) > max_correlation
    kept, spare = _split(duplicates, alive, free)
    if not spare or not kept:
        return z, new
    stretch = inner(here.descent, here.kernels) / here.length.square().clamp_min(1e-30)
    stretch = torch.where(alive, stretch, 0.0)[:, None, None]
    # All groups must keep the same number of filters.
    index = torch.tensor(spare if metric.n_groups == 1 else range(len(z)), device=z.device)
    part, old = family.select(index), loss.select(index)
    step = (here.descent - stretch * here.weighted)[index]
    rows, there = global_step(part, Quadratic(metric, step, old.scale, old.error), z[index])

    strength = torch.where(alive, here.length, here.length[alive].median())[index]
    clear = (-2 * there.value).clamp_min(0).sqrt() > n_errors[index] * old.error
    clear &= there.length > _MIN_CHANGE * strength
    params, ratio = part.record(rows), strength / there.length.clamp_min(1e-30)
    rows = part.rows(params.replace(amplitude=params.amplitude * ratio.unsqueeze(-1)))
    clear &= rows.isfinite().all(1)
    there = old.at(part.kernels(rows))
    like_kept = _correlations(there, here, metric.n_groups)[:, kept] > max_correlation
    like_new = (_correlations(there, there, metric.n_groups) > max_correlation).tolist()
    taken: list[int] = []
    for row in (clear & ~like_kept.any(1)).nonzero().flatten().tolist():
        if int(index[row]) in spare and not any(like_new[row][other] for other in taken):
            taken.append(row)
    new[index[taken]] = True
    return z.index_copy(0, index[taken], rows[taken]), new


def _split(duplicates: Tensor, alive: Tensor, free: Tensor) -> tuple[list[int], list[int]]:
    """The filters that stay, and the dead filters and the duplicates of these."""
    kept: list[int] = (alive & ~free).nonzero().flatten().tolist()
    spare: list[int] = (free & ~alive).nonzero().flatten().tolist()
    for i in (alive & free).nonzero().flatten().tolist():  # the first of several duplicates stays
        (spare if duplicates[i, kept].any() else kept).append(i)
    return kept, sorted(spare)


def _correlations(these: Evaluation, those: Evaluation, n_groups: int) -> Tensor:
    """Correlation of the responses of each filter with each, 0 to 1; of pairs at any phase."""
    common = inner_products(these.kernels, those.weighted).abs()
    common = common / (these.length[:, None] * those.length).clamp_min(1e-30)
    # Filters of different groups see different channels.
    rows, columns = (torch.arange(n, device=common.device) * n_groups // n for n in common.shape)
    return torch.where(rows[:, None] == columns, common, 0.0)
