"""Steps of filters that are known to have a quadratic loss: down its slope, or across its hills.

And filters of no use, dead ones and those that do what another one does, that begin again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gaborium.kernels import inner_products
from gaborium.optim.family import KernelFamily
from gaborium.optim.quadratic import Metric, Place, Quadratic, inner
from gaborium.params import Gabor

_HOPEFUL = 0.6  # share of what the filter at hand explains
_DEAD = 1e-3  # of the median strength
_WANTED = 0.02  # share of its strength that a filter must be asked to change


class Slopes(NamedTuple):
    """How the kernels of every filter change with z, and how much their responses do."""

    kernels: Tensor  # J, (filters, members, p, n)
    hessian: Tensor  # Jᵀ C J, (filters, p, p)

    @classmethod
    def at(cls, family: KernelFamily, metric: Metric, z: Tensor) -> Slopes:
        """Those at z."""
        _, J = family.jacobian(z)
        return cls(J, (metric.times(J) @ J.mT).sum(1))

    def anew(self, family: KernelFamily, metric: Metric, z: Tensor, moved: Tensor) -> Slopes:
        """These, and those at z for the filters that have moved, ``(filters,)``."""
        index = moved.nonzero().flatten()
        if not len(index):
            return self
        if len(index) == len(z) or len(metric.covariance) > 1:
            return Slopes.at(family, metric, z)
        fresh = Slopes.at(family.only(index), metric, z[index])
        return Slopes(*(a.index_copy(0, index, b) for a, b in zip(self, fresh, strict=True)))


def descend(
    family: KernelFamily,
    loss: Quadratic,
    z: Tensor,
    radius: Tensor,
    damping: Tensor,
    *,
    n_iterations: int = 1,
    place: Place | None = None,
    slopes: Slopes | None = None,
) -> tuple[Tensor, Place, Tensor]:
    """Levenberg-Marquardt on the quadratic, within a radius of where it starts.

    Args:
        family: the layer's kernels.
        loss: the loss of every filter.
        z: rows to start from, ``(filters, p)``.
        radius: how far kernels may move, in the metric's length, ``(filters,)``.
        damping: of the first step, ``(filters,)``.
        n_iterations: steps at most.
        place: what the loss is there, if it is known.
        slopes: how kernels change there, about, if it is known.

    Returns:
        The rows, where they lead, and the damping for next time.
    """
    place = home = loss.at(family.kernels(z)) if place is None else place
    slopes = slopes or Slopes.at(family, loss.metric, z)
    excess: Tensor | None = None
    for i in range(n_iterations):
        J, hessian = slopes
        slope = (J @ place.downhill.unsqueeze(-1)).squeeze(-1).sum(1)
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        # Marquardt's scaling, with a floor for directions that move nothing.
        floor = 1e-7 * diagonal.amax(-1, keepdim=True) + torch.finfo(z.dtype).tiny
        damped = hessian + torch.diag_embed(damping[:, None] * (diagonal + floor) + floor)
        step = torch.nan_to_num(torch.linalg.solve_ex(damped, slope)[0])
        length = (step * (hessian @ step.unsqueeze(-1)).squeeze(-1)).sum(-1).clamp_min(0).sqrt()
        step = step * (radius / length.clamp_min(1e-30)).clamp_max(1.0).unsqueeze(-1)

        new = loss.at(family.kernels(z + step))
        better = (new.value < place.value) & (new.distance(home) <= 1.5 * radius)
        beyond = family.excess(z + step)
        if excess is None and not bool((beyond <= 0).all()):
            excess = family.excess(z)
        if excess is not None:
            better &= beyond <= excess
            excess = torch.where(better, beyond, excess)
        z = torch.where(better.unsqueeze(-1), z + step, z)
        place = new.or_else(place, better)
        damping = torch.where(better, 0.25 * damping, 8.0 * damping).clamp(1e-9, 1e9)
        if i + 1 < n_iterations:
            slopes = slopes.anew(family, loss.metric, z, better)
    return z, place, damping


def leap(
    family: KernelFamily, loss: Quadratic, z: Tensor, *, n_best: int = 2, n_iterations: int = 10
) -> tuple[Tensor, Place]:
    """The best Gabor functions anywhere, as far as a grid of geometries finds them.

    Of every geometry on the grid the best amplitudes and phases are known in closed form. The best
    geometries are polished. With ``geometry="pair"`` one input channel after the other is
    looked at, the others as they are.

    Args:
        family: the layer's kernels.
        loss: the loss of every filter.
        z: the present rows, ``(filters, p)``.
        n_best: geometries that are polished.
        n_iterations: of the polishing.

    Returns:
        Rows ``(filters, p)``, and where they are.
    """
    best, place = z, loss.at(family.kernels(z))
    n_channels = family.record(z).amplitude.shape[1]
    parts = [slice(c, c + 1) for c in range(n_channels)]
    for part in parts if family.layer.geometry == "pair" else [slice(None)]:
        # Candidates of a filter side by side: so the groups stay together.
        rows = [family.rows_of(p) for p in _promising(family, loss, best, part, n_best)]
        start = torch.stack(rows, 1).flatten(0, 1)
        whose = torch.arange(len(z), device=z.device).repeat_interleave(n_best)
        there = loss.pick(whose).at(family.only(whose).kernels(start))
        # What is far below the best need not be polished.
        index = (there.value < _HOPEFUL * place.value[whose]).nonzero().flatten()
        if len(loss.metric.covariance) > 1:
            index = torch.arange(len(whose), device=z.device)
        if not len(index):
            continue
        some = loss.pick(whose[index])
        free, damping = torch.full_like(some.scale, torch.inf), torch.full_like(some.scale, 1e-2)
        polished, reached, _ = descend(
            family.only(whose[index]), some, start[index], free, damping, n_iterations=n_iterations
        )
        end, there = start.index_copy(0, index, polished), there.put(index, reached)
        value = torch.full_like(there.value, torch.inf)
        value[index] = torch.where(reached.value.isnan(), torch.inf, reached.value)
        first = value.unflatten(0, (-1, n_best)).argmin(1)
        first += n_best * torch.arange(len(z), device=z.device)
        better = value[first] < place.value
        best = torch.where(better.unsqueeze(-1), end[first], best)
        place = there.pick(first).or_else(place, better)
    return best, place


def reseed(
    family: KernelFamily,
    loss: Quadratic,
    z: Tensor,
    free: Tensor,
    *,
    certain: Tensor,
    same: float,
) -> tuple[Tensor, Tensor]:
    """Let filters of no use begin again where the loss has use for them.

    Of no use is a filter that is dead, or whose responses another one gives already. It becomes the
    Gabor function nearest to its step alone, to what the loss asks of it, and keeps its strength.
    Where that is no other filter's, and beyond doubt, since what lies behind the layer must learn
    what the filter means now: near a planted kernel nothing is asked for.

    Args:
        family: the layer's kernels.
        loss: the loss of every filter.
        z: the present rows, ``(filters, p)``.
        free: which filters may begin again, ``(filters,)``.
        certain: standard errors that the step must have, ``(filters,)``.
        same: correlation of two filters' responses above which one of them is enough.

    Returns:
        Rows ``(filters, p)``, and which of them are new.
    """
    groups, new = len(loss.metric.covariance), torch.zeros_like(free)
    here = loss.at(family.kernels(z))
    alive = here.length > _DEAD * here.length.median()
    kept, spare = _of_no_use(_alike(here, here, groups) > same, alive, free)
    if not spare or not kept:
        return z, new
    # More or less of itself is nothing that a filter could not do where it is.
    itself = inner(here.downhill, here.kernels) / here.length.square().clamp_min(1e-30)
    step = here.downhill - torch.where(alive, itself, 0.0)[:, None, None] * here.seen
    # Where every group has a metric of its own, no filter may be left out.
    index = torch.tensor(spare if groups == 1 else range(len(z)), device=z.device)
    part, now = family.only(index), loss.pick(index)
    asked = Quadratic(loss.metric, step[index], now.scale, now.error)
    rows, there = leap(part, asked, z[index])

    strength = torch.where(alive, here.length, here.length[alive].median())[index]
    sure = (-2 * there.value).clamp_min(0).sqrt() > certain[index] * now.error
    sure &= there.length > _WANTED * strength
    params, ratio = part.record(rows), strength / there.length.clamp_min(1e-30)
    rows = part.rows_of(params.replace(amplitude=params.amplitude * ratio.unsqueeze(-1)))
    sure &= rows.isfinite().all(1)
    there = now.at(part.kernels(rows))
    like_kept = (_alike(there, here, groups) > same)[:, kept].any(1)
    like_each = (_alike(there, there, groups) > same).tolist()
    taken: list[int] = []
    for row in (sure & ~like_kept).nonzero().flatten().tolist():
        if int(index[row]) in spare and not any(like_each[row][other] for other in taken):
            taken.append(row)
    new[index[taken]] = True
    return z.index_copy(0, index[taken], rows[taken]), new


def _of_no_use(alike: Tensor, alive: Tensor, free: Tensor) -> tuple[list[int], list[int]]:
    """The filters that stay, and those that do what one of these does, or nothing."""
    twins = alike.tolist()
    kept: list[int] = (alive & ~free).nonzero().flatten().tolist()
    spare: list[int] = (free & ~alive).nonzero().flatten().tolist()
    for i in (alive & free).nonzero().flatten().tolist():  # the first of those alike stays
        (spare if any(twins[i][j] for j in kept) else kept).append(i)
    return kept, sorted(spare)


def _alike(these: Place, those: Place, groups: int) -> Tensor:
    """Correlation of the responses of each filter with each, 0 to 1; of pairs at any phase."""
    common = inner_products(these.kernels, those.seen).abs()
    common = common / (these.length[:, None] * those.length).clamp_min(1e-30)
    if groups > 1:  # they see other channels
        rows, columns = (torch.arange(n, device=common.device) * groups // n for n in common.shape)
        common = torch.where(rows[:, None] == columns, common, 0.0)
    return common


def _promising(
    family: KernelFamily, loss: Quadratic, z: Tensor, part: slice, n_best: int
) -> Iterator[Gabor]:
    """Records of the layer's shapes with the best geometries of a grid for some channels."""
    layer, now = family.layer, family.record(z)
    geometry = _grid(layer, now, part)
    groups = loss.metric.covariance.shape[0]
    here = torch.arange(len(z), device=z.device).chunk(groups)
    found = [_search(family, loss, now, geometry, part, i, g, n_best) for g, i in enumerate(here)]
    chosen = torch.cat([index for index, _ in found], 0)  # (filters, n_best)
    pairs = torch.cat([coefficients for _, coefficients in found], 0)  # (filters, n_best, 2, C)
    for i in range(n_best):
        fields = dict(now.as_dict())
        for name in now.field_names():
            if name in ("amplitude", "phase"):
                continue
            value = getattr(geometry, name)
            value = value[chosen[:, i], torch.arange(len(z)) % value.shape[1]]
            whole = getattr(now, name).clone()
            whole[:, part] = value.unsqueeze(1)
            fields[name] = whole
        a, b = pairs[:, i].unbind(1)
        amplitude, phase = now.amplitude.clone(), now.phase.clone()
        if "phase" not in layer.learn:
            # The phase stays, and the amplitude may be negative.
            amplitude[:, part] = a * phase[:, part].cos() + b * phase[:, part].sin()
        elif "amplitude" in layer.learn:
            amplitude[:, part], phase[:, part] = torch.hypot(a, b), torch.atan2(b, a)
        else:
            sign = torch.where(amplitude[:, part] < 0, -1.0, 1.0)
            phase[:, part] = torch.atan2(sign * b, sign * a)
        params = type(now)(**fields | {"amplitude": amplitude, "phase": phase})
        yield _of_unit_norm(family, params) if layer.unit_norm else params


def _grid(layer: Any, now: Gabor, part: slice) -> Gabor:
    """Geometries to look at, ``(N, filters)``, or ``(N, 1)`` where they are the same for all."""
    learned = [name for name in now.field_names() if name in layer.learn]
    fields, lines = {}, {}
    alone = len(set(learned) - {"amplitude", "phase"}) == 1
    largest = max(layer.kernel_size)
    around = math.pi if "phase" in learned else 2 * math.pi  # a fixed phase tells k from -k
    few = "center" in learned
    n_angles = 48 if alone else 8 if few or now.n_dims == 3 else 12
    like = now.sigma
    steps = torch.arange(n_angles, dtype=like.dtype, device=like.device)
    lines["orientation"] = around * steps / n_angles
    lines["elevation"] = torch.linspace(-1.2, 1.2, 5).to(like)
    shortest = layer.raw_coordinates.min_wavelength or 0.0
    n_waves = 24 if alone else 6 if few else 9
    waves = torch.linspace(0.0, 0.42, n_waves).to(like).clamp_min(0.1 / largest)
    lines["wavelength"] = waves.reciprocal().clamp_min(1.1 * shortest)
    widths = torch.linspace(math.log(1 / 14), math.log(0.4), 16 if alone else 3 if few else 5)
    lines["sigma"] = (largest * widths.to(like).exp()).clamp_min(0.4)
    lines["aspect_ratio"] = torch.tensor([0.4, 0.7, 1.0, 1.6] if not few else [0.5, 1.0]).to(like)
    names = [name for name in learned if name in lines]
    for axis in range(now.n_dims) if few else ():
        names.append(f"center{axis}")
        size = layer.kernel_size[-1 - axis]
        lines[f"center{axis}"] = torch.tensor([-size / 5, 0.0, size / 5]).to(like)
    points = torch.meshgrid(*(lines[name] for name in names), indexing="ij") if names else ()
    grid = {name: point.flatten().unsqueeze(-1) for name, point in zip(names, points, strict=True)}
    n = next(iter(grid.values())).shape[0] if grid else 1
    whole = now.expand()
    for name in now.field_names():
        if name in ("amplitude", "phase"):
            fields[name] = torch.ones_like(like[:1, :1]).expand(n, 1)
        elif name == "center" and few:
            fields[name] = torch.stack([grid[f"center{i}"] for i in range(now.n_dims)], -1)
        elif name in grid:
            fields[name] = grid[name]
        else:
            own = getattr(whole, name)[:, part][:, 0]  # (filters,) or (filters, d)
            own = own[:1] if bool((own == own[:1]).all()) else own
            fields[name] = own.unsqueeze(0).expand(n, *own.shape)
    return type(now)(**fields)


def _search(
    family: KernelFamily,
    loss: Quadratic,
    now: Gabor,
    geometry: Gabor,
    part: slice,
    filters: Tensor,
    group: int,
    n_best: int,
) -> tuple[Tensor, Tensor]:
    """The best geometries of some filters, ``(filters, n)``, and ``A cos ψ, A sin ψ`` of each."""
    layer = family.layer
    whole = geometry.expand()
    if whole.batch_shape[1] > 1:
        whole = whole[:, filters]
    even, odd = (p.flatten(2) for p in layer.even_odd(whole.waveform()))  # (N, F or 1, pixels)
    columns = torch.stack([even, -odd]).unsqueeze(1)  # (2, members, N, F or 1, pixels)
    if family.n_members == 2:
        columns = torch.cat([columns, torch.stack([odd, even]).unsqueeze(1)], 1)
    pixels = even.shape[-1]
    C = loss.metric.covariance[group].unflatten(0, (-1, pixels)).unflatten(-1, (-1, pixels))
    linear = loss.linear[filters].unflatten(-1, (-1, pixels))  # (F, members, channels, pixels)
    C, wanted = C[part][:, :, part], linear[:, :, part]
    n_channels = C.shape[0]
    if n_channels < linear.shape[2]:
        # The other channels stay: their share of the responses is taken off.
        others = family.kernels(family.rows_of(now))[filters].unflatten(-1, (-1, pixels)).clone()
        others[:, :, part] = 0.0
        seen = others.flatten(2) @ loss.metric.covariance[group]
        wanted = wanted - seen.unflatten(-1, (-1, pixels))[:, :, part]

    gram = columns.new_zeros(*even.shape[:2], 2, n_channels, 2, n_channels)
    for c, d in itertools.product(range(n_channels), repeat=2):
        seen = columns @ C[c, :, d]
        gram[..., :, c, :, d] = torch.einsum("amnfp,bmnfp->nfab", seen, columns)
    gram = gram.flatten(-2).flatten(2, 3)  # (N, F or 1, 2C, 2C)
    if even.shape[1] == 1:
        rhs = torch.einsum("fmcp,amnp->nfac", wanted, columns[..., 0, :])
    else:
        rhs = torch.einsum("fmcp,amnfp->nfac", wanted, columns)
    rhs = rhs.flatten(2)  # (N, F, 2C)
    size = gram.diagonal(dim1=-2, dim2=-1)
    ridge = 1e-6 * size.amax(-1, keepdim=True).expand_as(size) + 1e-30
    root = torch.linalg.cholesky_ex(gram + torch.diag_embed(ridge))[0]
    if gram.shape[1] == 1:  # all filters have these systems in common
        flat = torch.cholesky_solve(rhs.mT, root[:, 0]).mT
    else:
        flat = torch.cholesky_solve(rhs.unsqueeze(-1), root).squeeze(-1)
    pairs = _allowed(layer, now, flat.unflatten(-1, (2, -1)), filters, part)
    flat = pairs.flatten(2)
    seen = flat @ gram[:, 0] if gram.shape[1] == 1 else (gram @ flat.unsqueeze(-1)).squeeze(-1)
    value = (flat * (0.5 * seen - rhs)).sum(-1)
    value = torch.where(value.isfinite(), value, torch.inf)
    chosen = value.topk(min(n_best, len(value)), 0, largest=False).indices.T
    chosen = chosen[:, torch.arange(n_best) % chosen.shape[1]]
    return chosen, pairs[chosen, torch.arange(len(filters)).unsqueeze(-1)]


def _allowed(layer: Any, now: Gabor, pairs: Tensor, filters: Tensor, part: slice) -> Tensor:
    """``A cos ψ, A sin ψ`` ``(N, F, 2, C)``, as near as what the layer learns can come."""
    phase, amplitude = now.phase[filters, part], now.amplitude[filters, part]
    if "phase" not in layer.learn:
        direction = torch.stack([phase.cos(), phase.sin()], -2)
        if "amplitude" not in layer.learn:
            return (amplitude.unsqueeze(-2) * direction).expand_as(pairs)
        return (pairs * direction).sum(-2, keepdim=True) * direction
    if "amplitude" not in layer.learn:
        size = pairs.square().sum(-2, keepdim=True).sqrt().clamp_min(1e-30)
        return pairs / size * amplitude.abs().unsqueeze(-2)
    return pairs


def _of_unit_norm(family: KernelFamily, params: Gabor) -> Gabor:
    """The same kernels where the amplitude is the kernel's norm."""
    if "amplitude" not in family.layer.learn:
        return params
    wave = params.waveform()
    even, odd = (part.flatten(2) for part in family.layer.even_odd(wave))
    kernel = wave.even.unsqueeze(-1) * even - wave.odd.unsqueeze(-1) * odd
    ours = family.kernels(family.rows_of(params))[:, 0]
    ratio = kernel.flatten(1).norm(dim=1) / ours.norm(dim=1).clamp_min(1e-30)
    return params.replace(amplitude=params.amplitude * ratio.unsqueeze(-1))
