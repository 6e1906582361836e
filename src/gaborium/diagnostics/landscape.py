"""The loss over one or two parameters: its minima, their basins, and the layer's position in it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gaborium.diagnostics.causes import Finding, Severity, by_severity, finding
from gaborium.diagnostics.identifiability import filter_statistics, find_gabor_layer
from gaborium.diagnostics.remedies import recover_code
from gaborium.diagnostics.sandbox import TrainingSetup
from gaborium.functions.kernels import orientation_basin
from gaborium.functions.params import POSITIVE_FIELDS, UNITS, Gabor2d

Span = tuple[float, float]
_Function = Callable[[Tensor], Tensor]

_CENTER = {"center_x": 0, "center_y": 1, "center_z": 2}
_BATCH = 2**20  # numbers in the kernels that are evaluated together
_EQUAL = 1e-4  # share of the landscape's height: minima that differ by less are equally good
_ZOOMS = 14  # each halves the distance to a minimum
_MOST_REFINED = 32  # minima that are located between the points of the grid
_FLAT = 0.02  # share of the descent: around a start on a plateau the loss changes by less


@dataclass(frozen=True)
class Minimum:
    """A local minimum.

    Args:
        position: one value for each field of the landscape, in its unit.
        value: the loss there.
        share: share of the landscape's points that descend to it.
    """

    position: tuple[float, ...]
    value: float
    share: float


@dataclass(frozen=True, eq=False)
class Landscape:
    """A loss over one or two fields; all other parameters keep the layer's values.

    Args:
        fields: names of the fields.
        units: of the fields.
        filter: the filter of the layer that they belong to.
        grids: values of each field, ``(n,)``.
        periodic: for each field, whether its grid is a circle.
        values: the loss, ``(n,)`` or ``(n, m)``, float64.
        basins: for each point the index of the minimum that steepest descent from it reaches.
        minima: the best first.
        n_best: number of minima that are equally good, such as the two of an even kernel.
        best: the lowest minimum; of several equal ones the nearest to the present position.
        present: the layer's own position, which need not be a point of the grid.
        present_value: the loss there.
        present_slope: derivative of the loss there, per unit of each field.
        present_change: range of the loss within a fifth of the way to the best minimum.
        present_minimum: the minimum that steepest descent from the present position reaches.
        half_width: distance from the best minimum to the points where the squared error (of other
            losses: the loss) stops being convex; NaN if it never does, and for two fields.
        predicted_half_width: λ / (√2 π σ/γ) for an orientation, rad, from the layer's present
            values; ``None`` for other fields.
        exact: whether the values come from the patches' covariance, in float64.
        remedy: code that moves the filter to the best minimum, with ``recover`` where it can.
    """

    fields: tuple[str, ...]
    units: tuple[str, ...]
    filter: int
    grids: tuple[Tensor, ...]
    periodic: tuple[bool, ...]
    values: Tensor
    basins: Tensor
    minima: tuple[Minimum, ...]
    n_best: int
    best: Minimum
    present: tuple[float, ...]
    present_value: float
    present_slope: tuple[float, ...]
    present_change: float
    present_minimum: Minimum
    half_width: float
    predicted_half_width: float | None
    exact: bool
    remedy: str

    @property
    def share_to_best(self) -> float:
        """Share of starts from which steepest descent reaches one of the best minima."""
        return sum(one.share for one in self.minima[: self.n_best])

    @property
    def n_spurious(self) -> int:
        """Minima that are worse than the best."""
        return len(self.minima) - self.n_best

    @property
    def findings(self) -> list[Finding]:
        """What prevents descent over these fields from the present position."""
        return by_severity(_findings(self))


def landscape(
    setup: TrainingSetup,
    fields: str | Sequence[str],
    *,
    filter: int = 0,  # noqa: A002 - the field's word
    span: Mapping[str, Span] | None = None,
    n_points: int | None = None,
) -> Landscape:
    """Evaluate a loss over one or two parameters of one filter, all others fixed.

    The squared error of a Gabor layer with a real output, or its root, needs the inputs only once,
    for the covariance of their patches. Any other loss is evaluated once for every point. The
    module is copied and never changed.

    Convention:
        - ``orientation`` and ``phase`` go around the whole circle, 2π rad, and include the
          present value; positive fields are spaced by equal ratios
        - by default a positive field runs from a quarter of its present value to four times it (a
          wavelength not below 2 px), an amplitude to twice its size on either side of 0, a centre
          over half of the kernel
        - if a filter has several values of a field, one per input channel, all of them move
          together; the position is the first one's
        - a start descends on the grid, from each point to its steepest neighbour

    Args:
        setup: with a Gabor layer, a module that contains one (the first is used), or any other
            module.
        fields: one or two fields of the record (for ``center``: ``center_x``, ``center_y``), or
            numbers among the module's own parameters: ``"theta"``, ``"conv.theta[2, 0]"``.
        filter: the filter to vary.
        span: ends of the range, by field: ``{"theta": (-3.0, 3.0)}``. A module's own parameters
            need one; an angle with a span is not periodic.
        n_points: for each field; by default 360 for one field, 100 for each of two.

    Raises:
        ValueError: a field is unknown, a span is missing or empty, or the loss is not a finite
            scalar that is the same twice.

    Example:
        >>> from gaborium import Gabor2d, GaborConv2d
        >>> planted = Gabor2d.of(orientation=0.8, wavelength=5.0, sigma=2.0)
        >>> layer = GaborConv2d(1, 1, 11, bias=False, start=planted)
        >>> image = torch.randn(1, 1, 64, 64)
        >>> setup = TrainingSetup(layer, nn.functional.mse_loss, image, layer(image).detach())
        >>> layer.params = planted.replace(orientation=-0.6)
        >>> found = landscape(setup, "orientation")
        >>> round(found.best.position[0] % math.pi, 3), found.n_best
        (0.8, 2)
    """
    names = (fields,) if isinstance(fields, str) else tuple(fields)
    if len(names) not in (1, 2) or len(set(names)) != len(names):
        raise ValueError(f"fields must be one or two different names, got {fields!r}.")
    n = n_points or (360 if len(names) == 1 else 100)
    if n < 8:
        raise ValueError(f"n_points must be at least 8, got {n}.")
    setup = setup.copy()
    sandbox = setup.sandbox()
    sandbox.check()
    varied = _varied(setup.module, filter, names)
    axes = [_axis(field, (span or {}).get(field.name, field.span), n) for field in varied.fields]
    power = setup.power()
    exact = _from_patches(setup, varied) if power else None

    @torch.no_grad()
    def evaluate(points: Tensor) -> Tensor:
        """The loss at coordinates ``(batch, fields)``; of a root the square, which is smooth."""
        values = torch.stack([axis.value(points[:, i]) for i, axis in enumerate(axes)], 1)
        if exact is not None:
            score = exact(values)
        else:
            losses = [sandbox.run_with(varied.tensors(one)).loss.flatten()[0] for one in values]
            score = torch.stack(losses).double()
            score = score.square() if power == 1 else score
        return score.cpu().nan_to_num(math.inf, posinf=math.inf)

    def loss_of(score: Tensor) -> Tensor:
        return score.sqrt() if power == 1 else score

    points = torch.cartesian_prod(*(axis.coordinates for axis in axes)).view(-1, len(axes))
    score = evaluate(points)
    finite = score[score.isfinite()]
    height = (finite.max() - finite.min()).item() if len(finite) else 0.0
    is_double = all(p.dtype == torch.float64 for p in setup.module.parameters())
    rounding = height * (1e-9 if exact is not None or is_double else 1e-5)
    periodic = tuple(axis.periodic for axis in axes)
    bottoms, basins = _watershed(score.view([n] * len(axes)), periodic, rounding)
    places = points[bottoms]
    places[:_MOST_REFINED] = _refine(evaluate, places[:_MOST_REFINED], axes)
    lows = evaluate(places)
    order = lows.argsort(stable=True)
    places, lows, basins = places[order], lows[order], order.argsort()[basins]
    positions = [axis.value(places[:, i]).tolist() for i, axis in enumerate(axes)]
    shares = basins.flatten().bincount(minlength=len(lows)).double() / basins.numel()
    rows = zip(zip(*positions, strict=True), loss_of(lows).tolist(), shares.tolist(), strict=True)
    minima = tuple(Minimum(*row) for row in rows)
    n_best = int((lows <= lows[0] + _EQUAL * height).sum()) if height else len(minima)

    here = torch.stack([axis.here for axis in axes])

    def away(points: Tensor) -> Tensor:
        """Distance from the present position along each axis, in lengths of the grid."""
        return torch.stack([axis.away(points[:, i]) for i, axis in enumerate(axes)], 1)

    best = int(away(places[:n_best]).amax(1).argmin())
    reach = (away(places[[best]]) / 5).clamp_min(2 / n)
    near = loss_of(score[(away(points) <= reach).all(1) & score.isfinite()])
    return Landscape(
        fields=names,
        units=tuple(field.unit for field in varied.fields),
        filter=filter,
        grids=tuple(axis.value(axis.coordinates) for axis in axes),
        periodic=periodic,
        values=loss_of(score).view(basins.shape),
        basins=basins,
        minima=minima,
        n_best=n_best,
        best=minima[best],
        present=tuple(field.present for field in varied.fields),
        present_value=loss_of(evaluate(here[None])).item(),
        present_slope=_slope(lambda points: loss_of(evaluate(points)), here, axes),
        present_change=(near.max() - near.min()).item() if len(near) else math.inf,
        present_minimum=minima[int(basins.flatten()[away(points).sum(1).argmin()])],
        half_width=_half_width(score, int(bottoms[order[0]]), axes[0])
        if len(axes) == 1
        else math.nan,
        predicted_half_width=varied.predicted_half_width,
        exact=exact is not None,
        remedy=varied.remedy(minima[best].position, exact=exact is not None),
    )


# -- what varies --------------------------------------------------------------------------------


class _Field(NamedTuple):
    """One number of a module: its present value, its unit and the range that it has by default."""

    name: str
    present: float
    unit: str = ""
    span: Span | None = None


class _Axis(NamedTuple):
    """One field's grid, in coordinates in which its points are equally spaced."""

    coordinates: Tensor
    here: Tensor  # the present value's coordinate
    logarithmic: bool = False
    periodic: bool = False

    @property
    def step(self) -> float:
        return (self.coordinates[1] - self.coordinates[0]).item()

    def value(self, coordinate: Tensor) -> Tensor:
        if self.periodic:
            return torch.remainder(coordinate + math.pi, 2 * math.pi) - math.pi
        return coordinate.exp() if self.logarithmic else coordinate

    def away(self, coordinate: Tensor) -> Tensor:
        """Distance from the present value, in lengths of the grid."""
        gap = coordinate - self.here
        if self.periodic:
            gap = torch.remainder(gap + math.pi, 2 * math.pi) - math.pi
        return gap.abs() / (self.coordinates[-1] - self.coordinates[0])


def _axis(field: _Field, span: Span | None, n: int) -> _Axis:
    here = torch.tensor(field.present, dtype=torch.float64)
    if span is None and not field.unit:
        name = field.name
        raise ValueError(f"{name} has an unknown range; give span={{{name!r}: (low, high)}}.")
    if span is None:
        # The present value is a point of the grid, which begins near -π.
        step = 2 * math.pi / n
        first = here - ((here + math.pi) / step).floor() * step
        circle = first + step * torch.arange(n, dtype=torch.float64)
        return _Axis(circle, here, periodic=True)
    is_positive = field.name in POSITIVE_FIELDS
    if not (0 if is_positive else -math.inf) < span[0] < span[1] < math.inf:
        kind = "positive numbers" if is_positive else "numbers"
        raise ValueError(f"The span of {field.name} must be two rising {kind}, got {span}.")
    ends = torch.tensor(span, dtype=torch.float64)
    ends, here = (ends.log(), here.log()) if is_positive else (ends, here)
    grid = torch.linspace(ends[0].item(), ends[1].item(), n, dtype=torch.float64)
    return _Axis(grid, here, logarithmic=is_positive)


def _varied(module: nn.Module, index: int, names: tuple[str, ...]) -> _Parameters | _GaborFields:
    layer_name, layer = find_gabor_layer(module)
    if layer is not None:
        known = {*layer.params.field_names(), *list(_CENTER)[: layer.n_dims]} - {"center"}
        if known >= set(names):
            return _GaborFields(layer_name, layer, index, names)
    return _Parameters(module, names)


class _Parameters:
    """One or two numbers among a module's own parameters, such as ``"conv.theta[2, 0]"``."""

    predicted_half_width: float | None = None

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        self.parameters = dict(module.named_parameters())
        self.places: list[tuple[str, tuple[int, ...]]] = []
        self.fields: list[_Field] = []
        for field in names:
            name, _, numbers = field.rstrip("]").partition("[")
            try:
                index = tuple(map(int, numbers.split(","))) if numbers else ()
                present = self.parameters[name].detach()[index].item()
            except (KeyError, IndexError, ValueError, RuntimeError):
                shapes = {n: tuple(p.shape) for n, p in list(self.parameters.items())[:12]}
                raise ValueError(
                    f"{field!r} is no field of a Gabor layer and no single number of the module's "
                    f"parameters, such as 'theta[0]'; their shapes are {shapes}."
                ) from None
            self.places.append((name, index))
            self.fields.append(_Field(field, present))

    def tensors(self, point: Tensor) -> dict[str, Tensor]:
        """The changed parameters, by name, at values of the fields."""
        changed: dict[str, Tensor] = {}
        for value, (name, index) in zip(point, self.places, strict=True):
            changed.setdefault(name, self.parameters[name].detach().clone())[index] = value
        return changed

    def remedy(self, position: tuple[float, ...], *, exact: bool) -> str:  # noqa: ARG002
        """Code that sets the fields."""
        return "".join(
            f"module.get_parameter({name!r}).data[{index}] = {value!r}\n"
            for value, (name, index) in zip(position, self.places, strict=True)
        )


class _GaborFields:
    """One or two fields of one filter of a Gabor layer."""

    def __init__(self, layer_name: str, layer: Any, index: int, names: Sequence[str]) -> None:
        if not 0 <= index < layer.n_filters:
            raise ValueError(
                f"filter must be from 0 to {layer.n_filters - 1} in this layer, got {index}."
            )
        self.layer_name, self.layer, self.index = layer_name, layer, index
        params = layer.params.detach().to(torch.float64)
        self.record = type(params)
        self.base = {name: value[index] for name, value in params.as_dict().items()}
        self.fields: list[_Field] = []
        for name in names:
            of = "center" if name in _CENTER else name
            value = self.base[of][0]
            present = (value[_CENTER[name]] if name in _CENTER else value).item()
            span = _default_span(name, present, layer.kernel_size)
            self.fields.append(_Field(name, present, UNITS[of], span))
        self.predicted_half_width: float | None = None
        if "orientation" in names and self.record is Gabor2d:
            self.predicted_half_width = orientation_basin(params[index])[0].item()

    def tensors(self, point: Tensor) -> dict[str, Tensor]:
        """The layer's tensors, by name in the module, at values of the fields."""
        changed, prefix = {}, self.layer_name and self.layer_name + "."
        for name, row in self._raw(point[None]).items():
            changed[prefix + name] = getattr(self.layer, name).detach().clone()
            changed[prefix + name][self.index] = row[0]
        return changed

    def kernels(self, points: Tensor) -> Tensor:
        """Kernels ``(batch, channels, *size)`` of a layer with a real output, in float64."""
        return self.layer.kernels_at(self._raw(points))

    def _raw(self, points: Tensor) -> dict[str, Tensor]:
        fields = {name: part.expand(len(points), *part.shape) for name, part in self.base.items()}
        for column, (name, present, *_) in enumerate(self.fields):
            value = points[:, column, None].to(fields["sigma"])
            if name in _CENTER:
                axis = torch.eye(self.record.n_dims).to(value)[_CENTER[name]]
                fields["center"] = fields["center"] + (value - present).unsqueeze(-1) * axis
            elif math.isinf(present):
                fields[name] = value.expand_as(fields[name])
            elif name in POSITIVE_FIELDS or (name == "amplitude" and present != 0):
                fields[name] = fields[name] * (value / present)
            else:
                fields[name] = fields[name] + (value - present)
        raw: dict[str, Tensor] = self.layer.raw_coordinates.to_raw(self.record(**fields))
        return raw

    def remedy(self, position: tuple[float, ...], *, exact: bool) -> str:
        """Code that sets the fields, by ``recover`` where it applies."""
        recovering = recover_code(self.layer) if exact else None
        if recovering is not None:
            return recovering
        code = (
            f"layer = module.get_submodule({self.layer_name!r})\nparams = layer.params.detach()\n"
        )
        for (name, *_), value in zip(self.fields, position, strict=True):
            place = f"{name}[{self.index}]"
            if name in _CENTER:
                place = f"center[{self.index}, 0, {_CENTER[name]}]"
            code += f"params.{place} = {value!r}\n"
        return code + "layer.params = params\n"


def _default_span(field: str, present: float, kernel_size: tuple[int, ...]) -> Span | None:
    if field in ("orientation", "phase"):
        return None  # the whole circle
    if field == "elevation":
        return -math.pi / 2, math.pi / 2
    if field in _CENTER:
        quarter = kernel_size[-1 - _CENTER[field]] / 4
        return present - quarter, present + quarter
    if field == "amplitude":
        reach = 2 * abs(present) or 1.0
        return -reach, reach
    if math.isinf(present):
        return 2.0, 4.0 * max(kernel_size)
    low = present / 4 if field != "wavelength" else max(min(2.0, present), present / 4)
    return low, 4 * present


def _from_patches(setup: TrainingSetup, varied: _Parameters | _GaborFields) -> _Function | None:
    """The squared error at values ``(batch, fields)``, where patch statistics give it."""
    if not isinstance(varied, _GaborFields) or not isinstance(setup.inputs, Tensor):
        return None
    layer, index = varied.layer, varied.index
    if (
        varied.layer_name
        or layer.output != "real"
        or any(step != 1 for step in layer.dilation)
        or setup.inputs.ndim != layer.n_dims + 2
    ):
        return None
    errors = (layer(setup.inputs) - setup.targets).detach().double().square()
    errors = errors.transpose(0, 1).flatten(1).mean(1).cpu()
    others = (errors.sum() - errors[index]).clamp_min(0)
    patches = filter_statistics(layer, index, setup.inputs, setup.targets)
    n_rows = max(1, _BATCH // len(patches.mean))

    def squared_error(points: Tensor) -> Tensor:
        parts = [patches.squared_error(varied.kernels(p).cpu()) for p in points.split(n_rows)]
        return (torch.cat(parts) + others) / len(errors)

    return squared_error


# -- minima and basins --------------------------------------------------------------------------


def _watershed(
    values: Tensor, periodic: tuple[bool, ...], rounding: float
) -> tuple[Tensor, Tensor]:
    """The minima of a grid (flat indices), and for each point which of them it descends to.

    Minima at most ``rounding`` deep do not count: descent goes on over their rims.
    """
    shape, flat = values.shape, values.flatten().tolist()
    places = list(itertools.product(*map(range, shape)))
    index = {place: i for i, place in enumerate(places)}
    steps = [step for step in itertools.product((0, 1, -1), repeat=len(shape)) if any(step)]
    label: dict[int, int] = {}  # of a point: the minimum below it
    owner: dict[int, int] = {}  # of a minimum: the one that it was merged with

    def root(bottom: int) -> int:
        while owner[bottom] != bottom:
            bottom = owner[bottom]
        return bottom

    # Points from the lowest up, so that all that a point can descend to is labelled already.
    for i in sorted(range(len(flat)), key=flat.__getitem__):
        lower = []
        for step in steps:
            moved = zip(places[i], step, shape, periodic, strict=True)
            j = index.get(tuple((x + s) % n if around else x + s for x, s, n, around in moved))
            if j in label:
                lower.append(((flat[i] - flat[j]) / math.hypot(*step), j))
        label[i] = label[max(lower)[1]] if lower else i
        owner.setdefault(label[i], i)
        for _, j in lower:  # where two basins meet
            low, high = sorted((root(label[i]), root(label[j])), key=flat.__getitem__)
            if low != high and not flat[i] - flat[high] > rounding:
                owner[high] = low
    bottoms = sorted((b for b in owner if owner[b] == b), key=flat.__getitem__)
    basins = [bottoms.index(root(label[i])) for i in range(len(flat))]
    return torch.tensor(bottoms), torch.tensor(basins).view(shape)


def _refine(evaluate: _Function, places: Tensor, axes: Sequence[_Axis]) -> Tensor:
    """Minima between the grid's points: ever smaller stencils around the lowest point so far."""
    steps = torch.tensor([axis.step for axis in axes], dtype=torch.float64)
    stencil = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=len(axes)))).double()
    ends = [torch.stack([axis.coordinates[0], axis.coordinates[-1]]) for axis in axes]
    for i, axis in enumerate(axes):
        if axis.periodic:
            ends[i] = torch.tensor([-math.inf, math.inf]).double()
    low, high = torch.stack(ends, 1)
    for _ in range(_ZOOMS):
        steps = steps / 2
        points = (places.unsqueeze(1) + stencil * steps).clamp(low, high)
        values = evaluate(points.flatten(0, 1)).view(points.shape[:2])
        places = points[torch.arange(len(places)), values.argmin(1)]
    return places


def _slope(evaluate: _Function, here: Tensor, axes: Sequence[_Axis]) -> tuple[float, ...]:
    """Derivatives at one position, per unit of each field, by central differences."""
    steps = torch.tensor([axis.step / 4 for axis in axes]).double()
    difference = evaluate(here + steps.diag()) - evaluate(here - steps.diag())
    values = [axis.value(here[i]) if axis.logarithmic else 1.0 for i, axis in enumerate(axes)]
    return tuple((difference / (2 * steps) / torch.tensor(values)).tolist())


def _half_width(score: Tensor, bottom: int, axis: _Axis) -> float:
    """Distance from a minimum to the first inflections of a spline through the score."""
    n = len(score)
    if axis.periodic:
        score, bottom = score.roll(n // 2 - bottom), n // 2
    # Second derivatives of a cubic spline solve a system with the band (1, 4, 1).
    band = 3 * torch.eye(n - 2) + torch.ones(n - 2, n - 2).tril(1).triu(-1)
    bend = torch.zeros(n, dtype=torch.float64)
    bend[1:-1] = torch.linalg.solve(band.double(), score.diff().diff())
    bent = (bend[1:-1] <= 0).nonzero().flatten() + 1
    left, right = bent[bent < bottom], bent[bent > bottom]
    if not bend[bottom] > 0 or not len(left) or not len(right):
        return math.nan
    ends = []
    for outer, inner in ((int(left[-1]), int(left[-1]) + 1), (int(right[0]), int(right[0]) - 1)):
        share = (bend[inner] / (bend[inner] - bend[outer])).item()
        end = axis.coordinates[0] + axis.step * (inner + share * (outer - inner))
        ends.append(end.exp() if axis.logarithmic else end)
    return ((ends[1] - ends[0]) / 2).item()


# -- findings -----------------------------------------------------------------------------------


def _findings(found: Landscape) -> Iterator[Finding]:
    top, best = found.values[found.values.isfinite()].max().item(), found.best.value
    height, left = top - best, found.present_value - best
    field = " and ".join(found.fields)
    if not height > 1e-12 * max(abs(top), 1e-300):
        yield finding(
            "flat plateau", found.fields, severity=Severity.SEVERE, confidence=1.0, field=field,
            reason="it is the same for every value", range=height,
        )  # fmt: skip
        return
    lost = found.present_minimum not in found.minima[: found.n_best]
    build = partial(
        finding,
        location=found.fields,
        remedy=found.remedy,
        field=field,
        share_to_best=found.share_to_best,
        present_loss=found.present_value,
    )
    if "orientation" in found.fields and left > 0.1 * height:
        axis = found.fields.index("orientation")
        best_angles = [one.position[axis] for one in found.minima[: found.n_best]]
        gaps = [math.remainder(found.present[axis] - angle, 2 * math.pi) for angle in best_angles]
        away, farthest = min(map(abs, gaps)), math.pi / min(len(gaps), 2)
        # The share of the descent that the present slope would cover on the way to the minimum.
        pull = abs(found.present_slope[axis]) * away / left
        narrow = min(found.predicted_half_width or math.pi, farthest)
        if away > 0.8 * farthest and (pull < 0.1 or lost) and away > narrow:
            yield build(
                "antipodal start",
                distance=f"{math.degrees(away):.0f}°",
                farthest=f"{math.degrees(farthest):.0f}°",
                distance_rad=away,
                farthest_rad=farthest,
                pull=pull,
            )
    if lost and left > 0:
        yield build("outside the basin", reached_loss=found.present_minimum.value, best_loss=best)
    if left > 0.1 * height and found.present_change < _FLAT * left:
        yield build(
            "flat plateau",
            severity=Severity.SEVERE if lost else Severity.WARNING,
            reason=f"near the present value only by {found.present_change / left:.1%} of the way "
            "down to the minimum, so the gradient is too small to find the way",
            change=found.present_change,
            drop=left,
        )
    if found.share_to_best < 0.9 and found.n_spurious:
        yield build("spurious minima", n_spurious=found.n_spurious)
