"""The loss over one or two parameters: minima, basins, and what share of starts finds the best."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gaborium.diagnostics.causes import Finding, Severity, by_severity
from gaborium.diagnostics.losses import LayerLoss, OutputLoss, Probe
from gaborium.diagnostics.views import (
    GaborLayer,
    filter_moments,
    find_gabor_layer,
    recover_arguments,
)
from gaborium.kernels import orientation_basin
from gaborium.params import POSITIVE_FIELDS, UNITS, Gabor, Gabor2d

Span = tuple[float, float]

_CENTER = {"center_x": 0, "center_y": 1, "center_z": 2}
_PIECE = 2**20  # numbers in the kernels that are evaluated together
_SAME = 1e-4  # of the landscape's range: minima nearer in value than this are equally good
_ZOOMS = 14  # each halves the distance to a minimum
_REFINED = 32  # minima at most that are located between the grid's points
_FLAT = 0.02  # of the way down: what changes less around the start is a plateau


@dataclass(frozen=True)
class Minimum:
    """A local minimum.

    Args:
        position: one value for each field of the landscape, in its unit.
        value: the loss there.
        share: of the landscape's points that roll down to it.
    """

    position: tuple[float, ...]
    value: float
    share: float


@dataclass(frozen=True, eq=False)
class Landscape:
    """A loss over one or two fields, the other parameters being as they are in the layer.

    Args:
        fields: names of what is varied.
        units: of the fields.
        filter: which filter of the layer they belong to.
        layer_name: the Gabor layer's name within the module, ``""`` for the module itself.
        grids: values of each field, ``(n,)``.
        periodic: for each field, whether its last value stands beside its first.
        values: the loss, ``(n,)`` or ``(n, m)``, float64.
        basins: for each point the index of the minimum that steepest descent from it ends at.
        minima: the best first.
        n_best: how many of them are equally good, such as the two of an even kernel.
        present: the layer's own position, which need not be a point of the grid.
        present_value: the loss there.
        present_slope: derivative of the loss there, per unit of each field.
        half_width: distance from the best minimum to where the squared error (of another loss:
            the loss itself) stops being convex, for each field; NaN where it never does.
        predicted_half_width: λ / (√2 π σ/γ) for an orientation, rad, from the layer's present
            values; ``None`` for other fields.
        exact: whether the values come from the patches' covariance, in float64.
        recoverable: the arguments that ``recover`` needs beside inputs, targets and kernel size,
            where it would find the filter; ``None`` where it cannot.
    """

    fields: tuple[str, ...]
    units: tuple[str, ...]
    filter: int
    layer_name: str
    grids: tuple[Tensor, ...]
    periodic: tuple[bool, ...]
    values: Tensor
    basins: Tensor
    minima: tuple[Minimum, ...]
    n_best: int
    present: tuple[float, ...]
    present_value: float
    present_slope: tuple[float, ...]
    half_width: tuple[float, ...]
    predicted_half_width: float | None
    exact: bool
    recoverable: str | None

    @property
    def best(self) -> Minimum:
        """The lowest minimum, and of equals the one nearest to the present position."""
        return min(self.minima[: self.n_best], key=lambda one: self._distance(one.position))

    @property
    def share_to_best(self) -> float:
        """Share of starting points from which steepest descent ends at a best minimum."""
        return sum(one.share for one in self.minima[: self.n_best])

    @property
    def n_spurious(self) -> int:
        """Minima that are worse than the best."""
        return len(self.minima) - self.n_best

    @property
    def present_minimum(self) -> Minimum:
        """Where steepest descent from the present position ends."""
        return self.minima[int(self.basins[self._nearest(self.present)].item())]

    @property
    def findings(self) -> list[Finding]:
        """What stands in the way of a descent over these fields from the present position."""
        return by_severity(_findings(self))

    def _distance(self, position: Sequence[float]) -> float:
        """Largest distance from the present position, in grids' lengths."""
        return max(
            abs(_apart(a, b, periodic, grid)) / _extent(grid)
            for a, b, periodic, grid in zip(
                position, self.present, self.periodic, self.grids, strict=True
            )
        )

    def _nearest(self, position: Sequence[float]) -> tuple[int, ...]:
        return tuple(
            int(min(range(len(grid)), key=lambda i: abs(_apart(grid[i].item(), at, period, grid))))
            for at, period, grid in zip(position, self.periodic, self.grids, strict=True)
        )


def landscape(
    loss: LayerLoss,
    layer: nn.Module,
    fields: str | Sequence[str],
    *,
    filter: int = 0,  # noqa: A002 - the field's word
    span: Span | Mapping[str, Span] | None = None,
    n_points: int | Sequence[int] | None = None,
) -> Landscape:
    """Look at a loss over one or two parameters of one filter, the others staying as they are.

    An ``OutputLoss`` of ``"mse"`` or ``"rmse"`` on a Gabor layer with a real output needs the
    inputs only once, for the covariance of their patches. Any other loss is evaluated once for
    every point. The layer is copied and never changed.

    Convention:
        - ``orientation`` and ``phase`` go around the whole circle, 2π rad, and include the
          present value; positive fields are spaced by equal ratios
        - without a span of its own a positive field runs from a quarter of its present value to
          four times it (a wavelength not below 2 px), an amplitude to twice its size to either
          side of 0, a centre over half of the kernel
        - in a filter with several values of a field, one per input channel, all are moved
          together: the position is that of the first
        - a start rolls down on the grid, from neighbour to steepest neighbour

    Args:
        loss: ``loss(layer) -> scalar``, such as an ``OutputLoss``.
        layer: a Gabor layer, or a module with one in it (of several, the first), or any other.
        fields: one or two fields of the record (of ``center`` its ``center_x``, ``center_y``), or
            numbers among the module's own parameters: ``"theta"``, ``"conv.theta[2, 0]"``.
        filter: which filter to vary; the others stay as they are.
        span: ends of the range: a pair for one field, or pairs by name. A module's own parameters
            need one; an angle that has one no longer goes around.
        n_points: for each field; by default 360 for one, 100 for each of two.

    Raises:
        ValueError: a field is unknown, a span is missing or empty, or the loss is not a finite
            scalar that comes out the same twice.

    Example:
        >>> from gaborium import Gabor2d, GaborConv2d
        >>> planted = Gabor2d.of(orientation=0.8, wavelength=5.0, sigma=2.0)
        >>> layer = GaborConv2d(1, 1, 11, bias=False, start=planted)
        >>> image = torch.randn(1, 1, 64, 64)
        >>> loss = OutputLoss(image, layer(image).detach())
        >>> layer.params = planted.replace(orientation=-0.6)
        >>> found = landscape(loss, layer, "orientation")
        >>> round(found.best.position[0] % math.pi, 3), found.n_best
        (0.8, 2)
    """
    names = (fields,) if isinstance(fields, str) else tuple(fields)
    if len(names) not in (1, 2) or len(set(names)) != len(names):
        raise ValueError(f"fields must be one or two different names, got {fields!r}.")
    probe = Probe(loss, layer)
    layer_name, inner = find_gabor_layer(probe.layer)
    counts = _counts(n_points, len(names))
    spans = _spans(span, names)
    family = _family(probe, layer_name, inner, filter, names)
    axes = [
        _axis(name, family.present[name], spans.get(name), n, inner)
        for name, n in zip(names, counts, strict=True)
    ]

    quadratic = _quadratic(loss, probe.layer, family)
    at: Callable[[Tensor], Tensor] = quadratic or _Directly(probe, family)
    exact = quadratic is not None

    def evaluate(points: Tensor) -> Tensor:
        """The loss at coordinates ``(batch, fields)``, which axes turn into values of fields."""
        columns = [axis.value(points[:, i]) for i, axis in enumerate(axes)]
        return at(torch.stack(columns, 1)).nan_to_num(math.inf, posinf=math.inf)

    mesh = torch.meshgrid(*(axis.coordinates for axis in axes), indexing="ij")
    values = evaluate(torch.stack([part.flatten() for part in mesh], 1)).view(mesh[0].shape)
    # The squared error is compared, also for its root: it is what is smooth at a minimum.
    is_root = isinstance(loss, OutputLoss) and loss.measure == "rmse"
    score = values.square() if is_root else values
    finite = score[score.isfinite()]
    height = (finite.max() - finite.min()).item() if len(finite) else 0.0
    rounding = height * (1e-9 if exact or probe.is_double else 1e-5)
    periodic = tuple(axis.periodic for axis in axes)
    bottoms, basins = _watershed(score, periodic, rounding)

    places = _refine(evaluate, torch.stack([part.flatten()[bottoms] for part in mesh], 1), axes)
    lows = evaluate(places)
    order = lows.argsort(stable=True)
    rank = order.argsort()
    shares = torch.bincount(basins.flatten(), minlength=len(bottoms)).double() / basins.numel()
    minima = tuple(
        Minimum(
            tuple(axis.value(places[i, j]).item() for j, axis in enumerate(axes)),
            lows[i].item(),
            shares[i].item(),
        )
        for i in order.tolist()
    )
    lowest = lows[order].square() if is_root else lows[order]
    n_best = int((lowest <= lowest[0] + _SAME * height).sum().item()) if height else len(minima)

    here = torch.tensor([axis.coordinate(family.present[axis.name]) for axis in axes]).double()
    return Landscape(
        fields=names,
        units=tuple(axis.unit for axis in axes),
        filter=filter,
        layer_name=layer_name,
        grids=tuple(axis.value(axis.coordinates) for axis in axes),
        periodic=periodic,
        values=values,
        basins=rank[basins],
        minima=minima,
        n_best=n_best,
        present=tuple(family.present[name] for name in names),
        present_value=evaluate(here[None]).item(),
        present_slope=_slope(evaluate, here, axes),
        half_width=tuple(
            _half_width(evaluate, places[order[0]], axes, i, is_root=is_root)
            for i in range(len(axes))
        ),
        predicted_half_width=_predicted(family) if "orientation" in names else None,
        exact=exact,
        recoverable=recover_arguments(inner) if exact and inner is not None else None,
    )


# -- what is varied -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Axis:
    """One field's grid, in coordinates in which its points are equally spaced."""

    name: str
    unit: str
    coordinates: Tensor
    periodic: bool
    logarithmic: bool

    @property
    def step(self) -> float:
        return (self.coordinates[1] - self.coordinates[0]).item()

    def value(self, coordinate: Tensor) -> Tensor:
        if self.periodic:
            return torch.remainder(coordinate + math.pi, 2 * math.pi) - math.pi
        return coordinate.exp() if self.logarithmic else coordinate

    def coordinate(self, value: float) -> float:
        return math.log(value) if self.logarithmic else value


def _counts(n_points: int | Sequence[int] | None, n_fields: int) -> list[int]:
    if n_points is None:
        n_points = 360 if n_fields == 1 else 100
    counts = [n_points] * n_fields if isinstance(n_points, int) else list(n_points)
    if len(counts) != n_fields or min(counts) < 8:
        raise ValueError(
            f"n_points must be a number of at least 8, or one for each of {n_fields} fields, got "
            f"{n_points!r}."
        )
    return counts


def _spans(span: Span | Mapping[str, Span] | None, names: tuple[str, ...]) -> dict[str, Span]:
    if span is None:
        return {}
    if not isinstance(span, Mapping):
        if len(names) > 1:
            raise ValueError(
                f"span must name its field where there are two: {{{names[0]!r}: ...}}."
            )
        span = {names[0]: span}
    for name, ends in span.items():
        if name not in names:
            raise ValueError(f"span names {name!r}, which is not among the fields {names}.")
        if len(ends) != 2 or not -math.inf < ends[0] < ends[1] < math.inf:
            raise ValueError(f"The span of {name} must be two rising numbers, got {ends!r}.")
    return dict(span)


def _axis(name: str, present: float, span: Span | None, n: int, inner: GaborLayer | None) -> _Axis:
    unit = UNITS.get("center" if name in _CENTER else name, "")
    if name in ("orientation", "phase") and span is None and unit:
        around = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
        # The present value is a point of the grid, and the grid begins near -π.
        first = present - math.floor((present + math.pi) / (2 * math.pi / n)) * (2 * math.pi / n)
        return _Axis(name, unit, first + around, True, False)
    logarithmic = name in POSITIVE_FIELDS
    low, high = span or _default_span(name, present, inner)
    if logarithmic:
        if low <= 0:
            raise ValueError(f"The span of {name} must be positive, got {(low, high)}.")
        low, high = math.log(low), math.log(high)
    return _Axis(name, unit, torch.linspace(low, high, n, dtype=torch.float64), False, logarithmic)


def _default_span(name: str, present: float, inner: GaborLayer | None) -> Span:
    if inner is None or (name not in UNITS and name not in _CENTER):
        raise ValueError(f"{name} is a parameter of unknown range; give span=(low, high).")
    if name == "elevation":
        return -math.pi / 2, math.pi / 2
    if name == "wavelength":
        if not math.isfinite(present):
            return 2.0, 4.0 * max(inner.kernel_size)
        return max(min(2.0, present), present / 4), 4 * present
    if name in POSITIVE_FIELDS:
        return present / 4, 4 * present
    if name == "amplitude":
        reach = 2 * abs(present) or 1.0
        return -reach, reach
    half = inner.kernel_size[inner.n_dims - 1 - _CENTER[name]] / 4
    return present - half, present + half


class _RecordFamily:
    """Records of one filter of a Gabor layer with one or two of its fields varied."""

    def __init__(self, name: str, layer: GaborLayer, index: int, fields: tuple[str, ...]) -> None:
        if not 0 <= index < layer.n_filters:
            raise ValueError(
                f"filter must be from 0 to {layer.n_filters - 1} in this layer, got {index}."
            )
        self.prefix, self.layer = name and name + ".", layer
        self.index, self.fields = index, fields
        self.base = layer.params.detach().to(torch.float64)[index]  # batch shape (channels,)
        whole = self.base.as_dict()
        self.present = {
            field: (
                whole["center"][0, _CENTER[field]] if field in _CENTER else whole[field][0]
            ).item()
            for field in fields
        }

    def record(self, points: Tensor) -> Gabor:
        """Gabor functions ``(batch, channels)`` with the fields at points ``(batch, fields)``."""
        n, channels = len(points), len(self.base)
        fields = {
            name: value.expand(n, *value.shape) for name, value in self.base.as_dict().items()
        }
        for column, name in enumerate(self.fields):
            to, present = points[:, column, None].to(self.base.device), self.present[name]
            if name in _CENTER:
                axis = torch.eye(self.base.n_dims, dtype=torch.float64, device=to.device)
                shift = (to - present).unsqueeze(-1) * axis[_CENTER[name]]
                fields["center"] = fields["center"] + shift
            elif name in POSITIVE_FIELDS or (name == "amplitude" and present != 0):
                infinite = math.isinf(present)
                fields[name] = to.expand(n, channels) if infinite else fields[name] * (to / present)
            else:
                fields[name] = fields[name] + (to - present)
        if self.layer.geometry == "filter":
            shared = [name for name in fields if name not in ("phase", "amplitude")]
            fields |= {name: fields[name][:, :1] for name in shared}
        return type(self.base)(**fields)

    def kernels(self, points: Tensor) -> Tensor:
        """Kernels ``(batch, channels, *size)`` of a layer with a real output, in float64."""
        return self.layer.kernels_at(self.layer.raw_coordinates.to_raw(self.record(points)))

    @property
    def fits_in_two(self) -> bool:
        """Whether two mixtures of the channels tell as much as all of them, and are fewer.

        Channels that share a geometry differ in amplitude A and phase ψ alone, so their kernels are
        ``A cos ψ`` times the even kernel less ``A sin ψ`` times the odd one. What varies here turns
        all phases and scales all amplitudes alike, and so stays within the same two mixtures.
        """
        loudest = self.base.amplitude.abs().amax()
        return (
            len(self.base) > 2
            and self.layer.geometry == "filter"
            and not self.layer.unit_norm
            and bool(loudest > 0)
            and not ("amplitude" in self.fields and self.present["amplitude"] == 0)
        )

    def mixing(self) -> Tensor:
        """The two mixtures, ``(2, channels)``: for the even kernel, and for its partner at π/2."""
        waves = torch.polar(self.base.amplitude, self.base.phase)
        return torch.stack([waves.real, waves.imag])

    def kernels_in_two(self, points: Tensor) -> Tensor:
        """Kernels ``(batch, 2, *size)`` for the mixtures, with the responses of ``kernels``."""
        record = self.record(points)
        channel = int(self.base.amplitude.abs().argmax())
        scale = record.amplitude[:, channel, None] / self.base.amplitude[channel]
        turn = record.phase[:, channel, None] - self.base.phase[channel]
        quarter = turn.new_tensor([0.0, math.pi / 2])
        fields = record.as_dict() | {"phase": turn + quarter, "amplitude": scale.expand(-1, 2)}
        two = type(record)(**fields)
        return self.layer.kernels_at(self.layer.raw_coordinates.to_raw(two))

    def tensors(self, points: Tensor) -> list[dict[str, Tensor]]:
        """The layer's own tensors, by name, for each of the points."""
        raw = self.layer.raw_coordinates.to_raw(self.record(points))
        found = []
        for i in range(len(points)):
            whole = {}
            for name, value in raw.items():
                tensor = getattr(self.layer, name).detach().clone()
                tensor[self.index] = value[i].to(tensor)
                whole[self.prefix + name] = tensor
            found.append(whole)
        return found


class _OwnFamily:
    """Numbers among a module's own parameters."""

    def __init__(self, module: nn.Module, fields: tuple[str, ...]) -> None:
        self.module, self.fields = module, fields
        self.places = {field: _place(module, field) for field in fields}
        self.present = {
            field: tensor[index].item() for field, (_, tensor, index) in self.places.items()
        }

    def tensors(self, points: Tensor) -> list[dict[str, Tensor]]:
        """The parameters, by name, for each of the points."""
        found = []
        for point in points:
            whole: dict[str, Tensor] = {}
            for value, (name, tensor, index) in zip(point, self.places.values(), strict=True):
                whole.setdefault(name, tensor.detach().clone())[index] = value.to(tensor)
            found.append(whole)
        return found


def _family(
    probe: Probe, layer_name: str, inner: GaborLayer | None, index: int, names: tuple[str, ...]
) -> _RecordFamily | _OwnFamily:
    if inner is not None:
        known = {name for name in inner.params.field_names() if name != "center"}
        known |= {name for name, axis in _CENTER.items() if axis < inner.n_dims}
        if known >= set(names):
            return _RecordFamily(layer_name, inner, index, names)
        if known & set(names):
            raise ValueError(
                f"fields must be fields of the record ({', '.join(sorted(known))}) or parameters "
                f"of the module, not one of each, got {names}."
            )
    return _OwnFamily(probe.layer, names)


def _place(module: nn.Module, field: str) -> tuple[str, Tensor, tuple[int, ...]]:
    """The parameter that a name such as ``"conv.theta[2, 0]"`` means, and the index in it."""
    found = re.fullmatch(r"([\w.]+)(?:\[([\d,\s]+)\])?", field)
    parameters = dict(module.named_parameters())
    if found is None or found[1] not in parameters:
        listed = ", ".join(list(parameters)[:12])
        raise ValueError(
            f"The module has no field or parameter {field!r}; its parameters are {listed}."
        )
    tensor = parameters[found[1]]
    index = tuple(int(part) for part in found[2].split(",")) if found[2] else ()
    if not index and tensor.numel() == 1:
        index = (0,) * tensor.ndim
    if len(index) != tensor.ndim or any(i >= n for i, n in zip(index, tensor.shape, strict=True)):
        raise ValueError(
            f"{found[1]} has shape {tuple(tensor.shape)}: name one of its numbers, such as "
            f"'{found[1]}[{', '.join('0' * tensor.ndim)}]', got {field!r}."
        )
    return found[1], tensor, index


# -- the loss at many points --------------------------------------------------------------------


class _Directly:
    """One evaluation of the loss for every point."""

    def __init__(self, probe: Probe, family: _RecordFamily | _OwnFamily) -> None:
        self.probe, self.family = probe, family

    @torch.no_grad()
    def __call__(self, points: Tensor) -> Tensor:
        values = [self.probe(tensors).detach() for tensors in self.family.tensors(points)]
        return torch.stack(values).flatten().double().cpu()


class _Quadratic:
    """The squared error or its root from the moments of the patches."""

    @torch.no_grad()
    def __init__(self, loss: OutputLoss, family: _RecordFamily) -> None:
        layer, index = family.layer, family.index
        self.family, self.is_root, self.n_outputs = (
            family,
            loss.measure == "rmse",
            layer.out_channels,
        )
        residual = (layer(loss.inputs) - loss.targets).double().square()
        self.others = residual.mean((0, *range(2, residual.ndim))).sum().item()
        self.others -= residual[:, index].mean().item()
        self.in_two = family.fits_in_two
        mixing = family.mixing() if self.in_two else None
        self.moments = filter_moments(layer, index, loss.inputs, loss.targets, mixing=mixing)

    @torch.no_grad()
    def __call__(self, points: Tensor) -> Tensor:
        moments = self.moments
        rows = max(1, _PIECE // len(moments.mean))
        kernels = self.family.kernels_in_two if self.in_two else self.family.kernels
        own = torch.cat([moments.squared_error(kernels(p).cpu()) for p in points.split(rows)])
        squared = (own + max(self.others, 0.0)) / self.n_outputs
        return squared.sqrt() if self.is_root else squared


def _quadratic(
    loss: LayerLoss, module: nn.Module, family: _RecordFamily | _OwnFamily
) -> _Quadratic | None:
    """The short way, where there is one."""
    if not isinstance(loss, OutputLoss) or not isinstance(family, _RecordFamily):
        return None
    layer = family.layer
    fits = (
        layer is module
        and loss.is_squared_kind()
        and layer.output == "real"
        and all(step == 1 for step in layer.dilation)
        and loss.inputs.ndim == layer.n_dims + 2
    )
    return _Quadratic(loss, family) if fits else None


# -- minima and basins --------------------------------------------------------------------------


def _watershed(
    values: Tensor, periodic: tuple[bool, ...], rounding: float
) -> tuple[Tensor, Tensor]:
    """The minima of a grid (flat indices), and for each point which of them it rolls down to.

    A hollow shallower than ``rounding`` is none: what rolls into it goes on over its rim.
    """
    shape, flat = values.shape, values.flatten()
    index = torch.arange(flat.numel()).view(shape)
    steps = [(1,)] if values.ndim == 1 else [(0, 1), (1, 0), (1, 1), (1, -1)]
    neighbours = []  # pairs of flat indices, and their distance
    for step in steps:
        here, there = index, index
        for axis, shift in enumerate(step):
            n = shape[axis]
            if shift and periodic[axis]:
                there = there.roll(-shift, axis)
            elif shift > 0:
                here, there = here.narrow(axis, 0, n - 1), there.narrow(axis, 1, n - 1)
            elif shift < 0:
                here, there = here.narrow(axis, 1, n - 1), there.narrow(axis, 0, n - 1)
        neighbours.append((here.flatten(), there.flatten(), math.sqrt(sum(map(abs, step)))))

    steepest, target = torch.zeros_like(flat), torch.arange(flat.numel())
    for one, other, distance in neighbours:
        for here, there in ((one, other), (other, one)):
            fall = ((flat[here] - flat[there]) / distance).nan_to_num(0.0)
            better = fall > steepest[here]
            steepest[here[better]] = fall[better]
            target[here[better]] = there[better]
    while not torch.equal(target[target], target):
        target = target[target]

    # Ridges between basins from the lowest up: the higher of two basins ends where it is shallow.
    owner = {bottom: bottom for bottom in target.unique().tolist()}

    def root(bottom: int) -> int:
        while owner[bottom] != bottom:
            bottom = owner[bottom]
        return bottom

    first = torch.cat([one for one, _, _ in neighbours])
    second = torch.cat([other for _, other, _ in neighbours])
    ridge = torch.maximum(flat[first], flat[second])
    between = (target[first] != target[second]).nonzero().flatten()
    between = between[ridge[between].argsort(stable=True)]
    rows = zip(
        target[first[between]].tolist(),
        target[second[between]].tolist(),
        ridge[between].tolist(),
        strict=True,
    )
    for one, other, height in rows:
        low, high = sorted((root(one), root(other)), key=lambda bottom: flat[bottom].item())
        if low != high and not height - flat[high].item() > rounding:
            owner[high] = low
    bottoms = sorted({root(bottom) for bottom in owner}, key=lambda bottom: flat[bottom].item())
    number = torch.zeros(flat.numel(), dtype=torch.long)
    for bottom in owner:
        number[bottom] = bottoms.index(root(bottom))
    return torch.tensor(bottoms), number[target].view(shape)


def _refine(evaluate: Callable[[Tensor], Tensor], places: Tensor, axes: Sequence[_Axis]) -> Tensor:
    """Minima between the grid's points: ever smaller stencils around the lowest point so far."""
    places = places.clone()
    near = places[:_REFINED]
    steps = torch.tensor([axis.step for axis in axes], dtype=torch.float64)
    offsets = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0]).double()] * len(axes))
    offsets = offsets.view(-1, len(axes))
    low = [-math.inf if axis.periodic else axis.coordinates[0].item() for axis in axes]
    high = [math.inf if axis.periodic else axis.coordinates[-1].item() for axis in axes]
    for _ in range(_ZOOMS):
        steps = steps / 2
        stencil = near.unsqueeze(1) + offsets * steps
        stencil = torch.minimum(
            torch.maximum(stencil, stencil.new_tensor(low)), stencil.new_tensor(high)
        )
        values = evaluate(stencil.flatten(0, 1)).view(stencil.shape[:2])
        near = stencil[torch.arange(len(near)), values.argmin(1)]
    places[:_REFINED] = near
    return places


def _slope(
    evaluate: Callable[[Tensor], Tensor], here: Tensor, axes: Sequence[_Axis]
) -> tuple[float, ...]:
    """Derivatives at the present position, per unit of each field, by central differences."""
    slopes = []
    for i, axis in enumerate(axes):
        step = torch.zeros_like(here)
        step[i] = axis.step / 4
        ahead, behind = evaluate(torch.stack([here + step, here - step])).tolist()
        per_value = axis.value(here[i]).item() if axis.logarithmic else 1.0
        slopes.append((ahead - behind) / (2 * step[i].item() * per_value))
    return tuple(slopes)


def _half_width(
    evaluate: Callable[[Tensor], Tensor],
    best: Tensor,
    axes: Sequence[_Axis],
    number: int,
    *,
    is_root: bool,
) -> float:
    """Distance along one axis to where a spline through the loss has its first inflections."""
    axis = axes[number]
    n = len(axis.coordinates)
    line = best.repeat(n, 1)
    if axis.periodic:
        line[:, number] = best[number] + (torch.arange(n) - n // 2) * axis.step
    else:
        line[:, number] = axis.coordinates
    values = evaluate(line)
    bend = _second_differences(values.square() if is_root else values, periodic=axis.periodic)
    at = line[:, number]
    middle = int((at - best[number]).abs().argmin().item())
    ends = []
    for direction in (-1, 1):
        i = middle
        while 0 <= i + direction < n and bend[i + direction] > 0:
            i += direction
        if not 0 <= i + direction < n or not bend[middle] > 0:
            return math.nan
        share = bend[i] / (bend[i] - bend[i + direction])
        ends.append(at[i] + direction * axis.step * share)
    if axis.logarithmic:
        ends = [end.exp() for end in ends]
    return ((ends[1] - ends[0]) / 2).item()


def _second_differences(values: Tensor, *, periodic: bool) -> Tensor:
    """Second derivatives, in squared steps, of the cubic spline through equally spaced values."""
    n = len(values)
    system = 4 * torch.eye(n, dtype=values.dtype)
    system += torch.eye(n, dtype=values.dtype).roll(1, 0) + torch.eye(n, dtype=values.dtype).roll(
        -1, 0
    )
    right = 6 * (values.roll(1) + values.roll(-1) - 2 * values)
    if not periodic:  # straight at its ends
        system[0], system[-1], right[0], right[-1] = 0.0, 0.0, 0.0, 0.0
        system[0, 0] = system[-1, -1] = 1.0
    return torch.linalg.solve(system, right)


def _predicted(family: _RecordFamily | _OwnFamily) -> float | None:
    """Half-width in θ of the basin of the first filter, where one is in two dimensions."""
    if not isinstance(family, _RecordFamily) or not isinstance(family.base, Gabor2d):
        return None
    return orientation_basin(family.base).flatten()[0].item()


# -- findings -----------------------------------------------------------------------------------


def _apart(a: float, b: float, periodic: bool, grid: Tensor) -> float:
    if periodic:
        return math.remainder(a - b, 2 * math.pi)
    return a - b if grid[0] <= 0 else math.log(a / b) if a > 0 and b > 0 else math.inf


def _extent(grid: Tensor) -> float:
    return abs(_apart(grid[-1].item(), grid[0].item(), False, grid))


def _findings(found: Landscape) -> list[Finding]:
    top = found.values[found.values.isfinite()].max().item()
    best = found.best
    height = top - best.value
    of = " and ".join(found.fields)
    if not height > 1e-12 * max(abs(top), 1e-300):
        sentence = f"The loss is the same for every value of {of}: nothing can be learned from it."
        return [
            Finding("flat plateau", Severity.SEVERE, sentence, {"range": height}, "", found.fields)
        ]
    findings = []
    where = found.fields
    left = found.present_value - best.value
    remedy = _remedy(found)
    lost = found.present_minimum not in found.minima[: found.n_best]
    numbers = {"share_to_best": found.share_to_best, "present_loss": found.present_value}

    if "orientation" in found.fields and left > 0.1 * height:
        axis = found.fields.index("orientation")
        away = [
            abs(math.remainder(found.present[axis] - one.position[axis], 2 * math.pi))
            for one in found.minima[: found.n_best]
        ]
        farthest = math.pi / max(1, min(len(away), 2))
        # Downhill at the present slope, what share of the way down lies between here and there?
        pull = abs(found.present_slope[axis]) * min(away) / left
        narrow = min(found.predicted_half_width or math.pi, farthest)
        if min(away) > 0.8 * farthest and (pull < 0.1 or lost) and min(away) > narrow:
            findings.append(
                Finding(
                    "antipodal start",
                    Severity.SEVERE,
                    f"The orientation starts {math.degrees(min(away)):.0f}° from the best minimum, "
                    f"about as far as there is ({math.degrees(farthest):.0f}°). There the gradient "
                    "vanishes on an isotropic input, and on a photograph its sign is chance.",
                    {"distance_rad": min(away), "farthest_rad": farthest, "pull": pull} | numbers,
                    remedy,
                    where,
                )
            )
    if lost and left > 0:
        end = found.present_minimum
        findings.append(
            Finding(
                "outside the basin",
                Severity.SEVERE,
                f"From its present value, {of} rolls down to a minimum with loss {end.value:.3g}, "
                f"not to the best one with {best.value:.3g}.",
                {"reached_loss": end.value, "best_loss": best.value} | numbers,
                remedy,
                where,
                0.9,
            )
        )
    change = _change_around(found)
    if left > 0.1 * height and change < _FLAT * left:
        findings.append(
            Finding(
                "flat plateau",
                Severity.SEVERE if lost else Severity.WARNING,
                f"Around its present value, {of} hardly changes the loss: by {change / left:.1%} "
                "of what lies between here and the minimum. The gradient is too small to find the "
                "way.",
                {"change": change, "drop": left} | numbers,
                remedy,
                where,
                0.8,
            )
        )
    if found.share_to_best < 0.9 and found.n_spurious:
        findings.append(
            Finding(
                "spurious minima",
                Severity.WARNING,
                f"Only {found.share_to_best:.0%} of starting values of {of} roll down to the best "
                f"minimum; the others end in {found.n_spurious} worse ones.",
                {"n_spurious": float(found.n_spurious)} | numbers,
                remedy,
                where,
                0.7,
            )
        )
    return findings


def _change_around(found: Landscape) -> float:
    """Range of the loss within a fifth of the way from here to the best minimum."""
    near = torch.ones_like(found.values, dtype=torch.bool)
    for axis, grid in enumerate(found.grids):
        period, here = found.periodic[axis], found.present[axis]
        reach = abs(_apart(found.best.position[axis], here, period, grid)) / 5
        reach = max(reach, 2 * _extent(grid) / len(grid))
        inside = torch.tensor(
            [abs(_apart(at, here, period, grid)) <= reach for at in grid.tolist()]
        )
        near &= inside.view(*(-1 if i == axis else 1 for i in range(found.values.ndim)))
    values = found.values[near & found.values.isfinite()]
    return (values.max() - values.min()).item() if len(values) else math.inf


def _remedy(found: Landscape) -> str:
    """``recover`` where it applies; otherwise the position of the minimum that was found."""
    if found.recoverable is not None:
        return (
            "from gaborium import recover\n"
            "module.params = recover(\n"
            f"    inputs, targets, module.kernel_size{found.recoverable}\n"
            ").params"
        )
    named = f'module.get_submodule("{found.layer_name}")' if found.layer_name else "module"
    lines = [f"layer = {named}"] if any(found.units) else []
    for name, unit, value in zip(found.fields, found.units, found.best.position, strict=True):
        if not unit:
            tensor, _, index = name.partition("[")
            place = f"[{index}" if index else ".view(-1)[0]"
            target = f'module.get_parameter("{tensor}").data'
            lines.append(f"{target}{place} = {value!r}")
            continue
        field = "center" if name in _CENTER else name
        place = f", 0, {_CENTER[name]}" if name in _CENTER else ""
        lines += [
            "params = layer.params.detach()",
            f"{field} = params.{field}.clone()",
            f"{field}[{found.filter}{place}] = {value!r}",
            f"layer.params = params.replace({field}={field})",
        ]
    return "\n".join(lines)
