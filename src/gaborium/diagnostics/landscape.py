"""The loss over one or two parameters: its minima, their basins, and the layer's position in it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gaborium.diagnostics.causes import Finding, Severity, by_severity, finding
from gaborium.diagnostics.identifiability import filter_statistics
from gaborium.diagnostics.remedies import recover_code
from gaborium.diagnostics.sandbox import TrainingSetup, tensors_of
from gaborium.functions.kernels import orientation_basin
from gaborium.functions.params import POSITIVE_FIELDS, UNITS, Gabor2d
from gaborium.layers import GABOR_LAYERS

Span = tuple[float, float]
_Function = Callable[[Tensor], Tensor]

_CENTER = ("center_x", "center_y", "center_z")
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
        grids: values of each field, ``(n,)``.
        periods: of the fields whose grid is a circle, in their unit; 0 for the others.
        values: the loss, ``(n,)`` or ``(n, m)``, float64.
        basins: for each point the index of the minimum that steepest descent from it reaches.
        minima: the best first.
        n_best: number of minima that are equally good, such as the two of an even kernel.
        best: the lowest minimum; of several equal ones the nearest to the present position.
        present: the layer's own position, which need not be a point of the grid.
        present_value: the loss there.
        present_slope: derivative of the loss there, per unit of each field.
        present_minimum: the minimum that steepest descent from the present position reaches.
        half_width: distance from the best minimum to the points where the squared error (of other
            losses: the loss) stops being convex; NaN if it never does, and for two fields.
        predicted_half_width: λ / (√2 π σ/γ) for an orientation, rad, from the layer's present
            values; ``None`` for other fields.
        exact: whether the values come from the patches' covariance, in float64.
        findings: what prevents descent over these fields from the present position.
    """

    fields: tuple[str, ...]
    units: tuple[str, ...]
    grids: tuple[Tensor, ...]
    periods: tuple[float, ...]
    values: Tensor
    basins: Tensor
    minima: tuple[Minimum, ...]
    n_best: int
    best: Minimum
    present: tuple[float, ...]
    present_value: float
    present_slope: tuple[float, ...]
    present_minimum: Minimum
    half_width: float
    predicted_half_width: float | None
    exact: bool
    findings: list[Finding]

    @property
    def share_to_best(self) -> float:
        """Share of starts from which steepest descent reaches one of the best minima."""
        return sum(one.share for one in self.minima[: self.n_best])

    @property
    def n_spurious(self) -> int:
        """Minima that are worse than the best."""
        return len(self.minima) - self.n_best


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
        - a module's own parameter goes around the circle if the output comes back after π, 2π, 180
          or 360; otherwise a positive one runs over a decade each way, and any other over 2.5 or
          its size on either side
        - if a filter has several values of a field, one per input channel, all of them move
          together; the position is the first one's
        - a start descends on the grid, from each point to its steepest neighbour

    Args:
        setup: with a Gabor layer, a module that contains one (the first is used), or any other
            module.
        fields: one or two fields of the record (for ``center``: ``center_x``, ``center_y``), or
            numbers among the module's own parameters: ``"theta"``, ``"conv.theta[2, 0]"``.
        filter: the filter to vary.
        span: ends of the range, by field: ``{"theta": (-3.0, 3.0)}``. An angle with a span is not
            periodic.
        n_points: for each field; by default 360 for one field, 100 for each of two.

    Raises:
        IndexError: there is no such filter.
        ValueError: a field is unknown, a span is empty, or the loss is not a finite scalar that is
            the same twice.

    Example:
        >>> from gaborium import Gabor2d, GaborConv2d
        >>> planted = Gabor2d.of(orientation=0.8, wavelength=5.0, sigma=2.0)
        >>> layer = GaborConv2d(1, 1, 11, bias=False, start=planted)
        >>> image = torch.randn(1, 1, 64, 64)
        >>> setup = TrainingSetup(layer, torch.nn.functional.mse_loss, image, layer(image).detach())
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
    loss = setup.check()
    spans = span or {}
    varied = _varied(setup, filter, names, spans)
    grid = _grid(varied.fields, spans, n)
    power = setup.power()
    exact = None
    if power and isinstance(varied, _GaborFields):
        exact = varied.squared_error(setup)

    @torch.no_grad()
    def evaluate(points: Tensor) -> Tensor:
        """The loss at coordinates ``(batch, fields)``; of a root the square, which is smooth."""
        values = grid.value(points)
        if exact is not None:
            score = exact(values)
        else:
            losses = []
            for point in values:
                varied.move(point)
                losses.append(setup.run_with({}).loss.flatten()[0])
            score = torch.stack(losses).double()
            score = score.square() if power == 1 else score
        return score.cpu().nan_to_num(math.inf, posinf=math.inf)

    def loss_of(score: Tensor) -> Tensor:
        return score.sqrt() if power == 1 else score

    points = torch.cartesian_prod(*grid.coordinates.T).view(-1, len(names))
    score = evaluate(points)
    finite = score[score.isfinite()]
    height = (finite.max() - finite.min()).item() if len(finite) else 0.0
    # Rounding makes hollows of about a hundred times the relative precision.
    rounding = height * (1e-9 if exact is not None else max(1e-9, 84 * torch.finfo(loss.dtype).eps))
    periods = tuple(grid.period.tolist())
    bottoms, basins = _watershed(score.view([n] * len(names)), tuple(map(bool, periods)), rounding)
    places = points[bottoms]
    places[:_MOST_REFINED] = _refine(evaluate, places[:_MOST_REFINED], grid)
    lows = evaluate(places)
    order = lows.argsort(stable=True)
    places, lows, basins = places[order], lows[order], order.argsort()[basins]
    positions = map(tuple, grid.value(places).tolist())
    shares = basins.flatten().bincount(minlength=len(lows)).double() / basins.numel()
    minima = tuple(map(Minimum, positions, loss_of(lows).tolist(), shares.tolist()))
    n_best = int((lows <= lows[0] + _EQUAL * height).sum()) if height else len(minima)

    best = int(grid.away(places[:n_best]).amax(1).argmin())
    away, reach = grid.away(points), (grid.away(places[[best]]) / 5).clamp_min(2 / n)
    near = loss_of(score[(away <= reach).all(1) & score.isfinite()])
    found = Landscape(
        fields=names,
        units=tuple(field.unit for field in varied.fields),
        grids=tuple(grid.value(grid.coordinates).T),
        periods=periods,
        values=loss_of(score).view(basins.shape),
        basins=basins,
        minima=minima,
        n_best=n_best,
        best=minima[best],
        present=tuple(field.present for field in varied.fields),
        present_value=loss_of(evaluate(grid.here[None])).item(),
        present_slope=_slope(lambda points: loss_of(evaluate(points)), grid),
        present_minimum=minima[int(basins.flatten()[away.sum(1).argmin()])],
        half_width=_half_width(score, int(bottoms[order[0]]), grid)
        if len(names) == 1
        else math.nan,
        predicted_half_width=varied.predicted_half_width,
        exact=exact is not None,
        findings=[],
    )
    # The range of the loss within a fifth of the way to the best minimum.
    change = (near.max() - near.min()).item() if len(near) else math.inf
    module: Any = setup.module
    remedy = recover_code(module) if exact is not None else None
    remedy = remedy or varied.remedy(found.best.position)
    return replace(found, findings=by_severity(_findings(found, change, remedy)))


# -- what varies --------------------------------------------------------------------------------


class _Field(NamedTuple):
    """One number of a module: its present value, its unit and the range that it has by default."""

    name: str
    present: float
    unit: str
    span: Span = (0.0, 0.0)
    period: float = 0.0  # of an angle, which has no span
    is_positive: bool = False


class _Grid(NamedTuple):
    """The values of all fields, in coordinates in which they are equally spaced."""

    coordinates: Tensor  # (n, fields)
    here: Tensor  # the present values' coordinates, (fields,)
    logarithmic: Tensor
    period: Tensor  # 0 where there is none

    @property
    def step(self) -> Tensor:
        return self.coordinates[1] - self.coordinates[0]

    def value(self, coordinates: Tensor) -> Tensor:
        values = torch.where(self.logarithmic, coordinates.exp(), coordinates)
        return torch.where(self.period > 0, _turned(coordinates, self.period), values)

    def away(self, coordinates: Tensor) -> Tensor:
        """Distances from the present values, in lengths of the grid."""
        gap = coordinates - self.here
        gap = torch.where(self.period > 0, _turned(gap, self.period), gap)
        return gap.abs() / (self.coordinates[-1] - self.coordinates[0])


def _turned(angle: Tensor, period: Tensor) -> Tensor:
    return torch.remainder(angle + period / 2, period) - period / 2


def _grid(fields: Sequence[_Field], spans: Mapping[str, Span], n: int) -> _Grid:
    columns = []
    for name, present, _, default, period, is_positive in fields:
        if period and name not in spans:
            # The present value is a point of the grid, which begins near minus half a period.
            step = period / n
            first = present - math.floor((present + period / 2) / step) * step
            circle = first + step * torch.arange(n, dtype=torch.float64)
            columns.append((circle, present, False, period))
            continue
        span = spans.get(name, default)
        if not (0 if is_positive else -math.inf) < span[0] < span[1] < math.inf:
            kind = "positive numbers" if is_positive else "numbers"
            raise ValueError(f"The span of {name} must be two rising {kind}, got {span}.")
        places = torch.tensor([*span, present], dtype=torch.float64)
        low, high, own = (places.log() if is_positive else places).tolist()
        line = torch.linspace(low, high, n, dtype=torch.float64)
        columns.append((line, own, is_positive, 0.0))
    lines, here, logarithmic, periods = zip(*columns, strict=True)
    start, around = (torch.tensor(one, dtype=torch.float64) for one in (here, periods))
    return _Grid(torch.stack(lines, 1), start, torch.tensor(logarithmic), around)


def _varied(
    setup: TrainingSetup, index: int, names: tuple[str, ...], spans: Mapping[str, Span]
) -> _Parameters | _GaborFields:
    parts = setup.module.named_modules()
    layers = ((n, part) for n, part in parts if isinstance(part, GABOR_LAYERS))
    layer_name, layer = next(layers, ("", None))
    if layer is not None:
        known = {*layer.params.field_names(), *_CENTER[: layer.n_dims]} - {"center"}
        if known >= set(names):
            return _GaborFields(layer_name, layer, index, names)
    return _Parameters(setup, names, spans)


class _Parameters:
    """One or two numbers among a module's own parameters, such as ``"conv.theta[2, 0]"``."""

    predicted_half_width: float | None = None

    def __init__(
        self, setup: TrainingSetup, names: tuple[str, ...], spans: Mapping[str, Span]
    ) -> None:
        parameters = dict(setup.module.named_parameters())
        self.places: list[tuple[str, Tensor, tuple[int, ...]]] = []
        self.fields: list[_Field] = []
        for field in names:
            name, _, numbers = field.rstrip("]").partition("[")
            try:
                index = tuple(map(int, numbers.split(","))) if numbers else ()
                present = parameters[name].detach()[index].item()
            except (KeyError, IndexError, ValueError, RuntimeError):
                shapes = {n: tuple(p.shape) for n, p in list(parameters.items())[:12]}
                raise ValueError(
                    f"{field!r} is no field of a Gabor layer and no single number of the module's "
                    f"parameters, such as 'theta[0]'; their shapes are {shapes}."
                ) from None
            values = parameters[name].data
            self.places.append((name, values, index))
            self.fields.append(
                _Field(field, present, "")
                if field in spans
                else _own_field(field, present, values, index, setup)
            )

    def move(self, point: Tensor) -> None:
        """Give the fields other values."""
        for value, (_, parameter, index) in zip(point, self.places, strict=True):
            parameter[index] = value

    def remedy(self, position: tuple[float, ...]) -> str:
        """Code that sets the fields."""
        return "".join(
            f"module.get_parameter({name!r}).data[{index}] = {value!r}\n"
            for value, (name, _, index) in zip(position, self.places, strict=True)
        )


class _GaborFields:
    """One or two fields of one filter of a Gabor layer."""

    def __init__(self, layer_name: str, layer: Any, index: int, names: Sequence[str]) -> None:
        self.layer_name, self.layer, self.index = layer_name, layer, index
        params = layer.params.detach().to(torch.float64)
        self.record = type(params)
        self.base = {name: value[index] for name, value in params.as_dict().items()}
        center = self.base.pop("center")
        self.base |= dict(zip(_CENTER, center.unbind(-1), strict=False))
        self.fields: list[_Field] = []
        for name in names:
            present = self.base[name][0].item()
            unit = UNITS["center" if name in _CENTER else name]
            if name in ("orientation", "phase"):
                self.fields.append(_Field(name, present, unit, period=2 * math.pi))
                continue
            span = _default_span(name, present, layer.kernel_size)
            is_positive = name in POSITIVE_FIELDS
            self.fields.append(_Field(name, present, unit, span, is_positive=is_positive))
        self.predicted_half_width: float | None = None
        if "orientation" in names and self.record is Gabor2d:
            self.predicted_half_width = orientation_basin(params[index])[0].item()

    def move(self, point: Tensor) -> None:
        """Give the fields other values."""
        for name, row in self._raw(point[None]).items():
            getattr(self.layer, name).data[self.index] = row[0]

    def squared_error(self, setup: TrainingSetup) -> _Function | None:
        """The squared error at values ``(batch, fields)``, where patch statistics give it."""
        layer, inputs = self.layer, setup.inputs
        is_linear = layer.output == "real" and all(step == 1 for step in layer.dilation)
        if self.layer_name or not is_linear or getattr(inputs, "ndim", 0) != layer.n_dims + 2:
            return None
        errors = (layer(inputs) - setup.targets).detach().double().square()
        errors = errors.transpose(0, 1).flatten(1).mean(1).cpu()
        others = (errors.sum() - errors[self.index]).clamp_min(0)
        patches = filter_statistics(layer, self.index, inputs, setup.targets)
        n_rows = max(1, _BATCH // len(patches.mean))

        def squared_error(points: Tensor) -> Tensor:
            kernels = (layer.kernels_at(self._raw(some)).cpu() for some in points.split(n_rows))
            return (torch.cat([*map(patches.squared_error, kernels)]) + others) / len(errors)

        return squared_error

    def _raw(self, points: Tensor) -> dict[str, Tensor]:
        fields = {name: part.expand(len(points), *part.shape) for name, part in self.base.items()}
        for (name, present, *_), column in zip(self.fields, points.unbind(1), strict=True):
            value = column[:, None].to(fields["sigma"])
            if math.isinf(present):
                fields[name] = value.expand_as(fields[name])
            elif name in POSITIVE_FIELDS or (name == "amplitude" and present != 0):
                fields[name] = fields[name] * (value / present)
            else:
                fields[name] = fields[name] + (value - present)
        center = torch.stack([fields.pop(name) for name in _CENTER[: self.record.n_dims]], -1)
        raw: dict[str, Tensor] = self.layer.raw_coordinates.to_raw(
            self.record(center=center, **fields)
        )
        return raw

    def remedy(self, position: tuple[float, ...]) -> str:
        """Code that sets the fields."""
        code = (
            f"layer = module.get_submodule({self.layer_name!r})\nparams = layer.params.detach()\n"
        )
        for (name, *_), value in zip(self.fields, position, strict=True):
            place = f"{name}[{self.index}]"
            if name in _CENTER:
                place = f"center[{self.index}, 0, {_CENTER.index(name)}]"
            code += f"params.{place} = {value!r}\n"
        return code + "layer.params = params\n"


def _own_field(
    name: str, present: float, parameter: Tensor, index: tuple[int, ...], setup: TrainingSetup
) -> _Field:
    """A module's own parameter, with the period after which the output comes back."""

    @torch.no_grad()
    def output(value: float) -> list[Tensor]:
        parameter[index] = value
        return tensors_of(setup.run().output)

    try:
        still = output(present)
        for period, unit in ((math.pi, "rad"), (2 * math.pi, "rad"), (180.0, "°"), (360.0, "°")):
            turned, other = (output(present + share * period) for share in (1, 0.37))
            if _is_close(turned, still) and not _is_close(other, still):
                return _Field(name, present, unit, period=period)
    finally:
        parameter[index] = present
    if present > 0:
        return _Field(name, present, "", (present / 10, 10 * present), is_positive=True)
    reach = max(2.5, abs(present))
    return _Field(name, present, "", (present - reach, present + reach))


def _is_close(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether outputs are equal up to rounding."""
    return all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
        for a, b in zip(one, other, strict=True)
        if a.is_floating_point()
    )


def _default_span(field: str, present: float, kernel_size: tuple[int, ...]) -> Span:
    if field == "elevation":
        return -math.pi / 2, math.pi / 2
    if field in _CENTER:
        quarter = kernel_size[-1 - _CENTER.index(field)] / 4
        return present - quarter, present + quarter
    if field == "amplitude":
        reach = 2 * abs(present) or 1.0
        return -reach, reach
    if math.isinf(present):
        return 2.0, 4.0 * max(kernel_size)
    low = present / 4 if field != "wavelength" else max(min(2.0, present), present / 4)
    return low, 4 * present


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
    below: dict[int, int] = {}  # of a point: one that it descends to; a minimum: itself

    def bottom(i: int) -> int:
        while below[i] != i:
            i = below[i]
        return i

    # Points from the lowest up, so that all that a point can descend to is known already.
    for i in sorted(range(len(flat)), key=flat.__getitem__):
        lower = []
        for step in steps:
            moved = zip(places[i], step, shape, periodic, strict=True)
            j = index.get(tuple((x + s) % n if around else x + s for x, s, n, around in moved))
            if j in below:
                lower.append(((flat[i] - flat[j]) / math.hypot(*step), j))
        below[i] = bottom(max(lower)[1]) if lower else i
        for _, j in lower:  # where two basins meet
            low, high = sorted((bottom(i), bottom(j)), key=flat.__getitem__)
            if low != high and not flat[i] - flat[high] > rounding:
                below[high] = low
    ends = [bottom(i) for i in range(len(flat))]
    bottoms = sorted(set(ends), key=lambda end: (flat[end], end))
    number = {end: i for i, end in enumerate(bottoms)}
    return torch.tensor(bottoms), torch.tensor([number[end] for end in ends]).view(shape)


def _refine(evaluate: _Function, places: Tensor, grid: _Grid) -> Tensor:
    """Minima between the grid's points: ever smaller stencils around the lowest point so far."""
    n_fields, steps = len(grid.here), grid.step
    stencil = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=n_fields))).double()
    low = torch.where(grid.period > 0, -math.inf, grid.coordinates[0])
    high = torch.where(grid.period > 0, math.inf, grid.coordinates[-1])
    for _ in range(_ZOOMS):
        steps = steps / 2
        points = (places.unsqueeze(1) + stencil * steps).clamp(low, high)
        values = evaluate(points.flatten(0, 1)).view(points.shape[:2])
        places = points[torch.arange(len(places)), values.argmin(1)]
    return places


def _slope(evaluate: _Function, grid: _Grid) -> tuple[float, ...]:
    """Derivatives at the present position, per unit of each field, by central differences."""
    steps = grid.step / 4
    difference = evaluate(grid.here + steps.diag()) - evaluate(grid.here - steps.diag())
    units = torch.where(grid.logarithmic, grid.value(grid.here), 1.0)
    return tuple((difference / (2 * steps) / units).tolist())


def _half_width(score: Tensor, bottom: int, grid: _Grid) -> float:
    """Distance from a minimum to the first inflections of a spline through the score."""
    n = len(score)
    if grid.period:
        score, bottom = score.roll(n // 2 - bottom), n // 2
    # Second derivatives of a cubic spline solve a system with the band (1, 4, 1).
    band = 3 * torch.eye(n - 2) + torch.ones(n - 2, n - 2).tril(1).triu(-1)
    bend = torch.zeros(n, dtype=torch.float64)
    bend[1:-1] = torch.linalg.solve(band.double(), score.diff().diff())
    before = 1 + ((bend[1:-2] > 0) != (bend[2:-1] > 0)).nonzero().flatten()
    ends = before + bend[before] / (bend[before] - bend[before + 1])
    left, right = ends[ends < bottom], ends[ends > bottom]
    if not bend[bottom] > 0 or not len(left) or not len(right):
        return math.nan
    places = grid.coordinates[0] + grid.step * torch.stack([left[-1], right[0]])
    return ((places.exp() if grid.logarithmic else places).diff() / 2).item()


# -- findings -----------------------------------------------------------------------------------


def _findings(found: Landscape, change: float, remedy: str) -> Iterator[Finding]:
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
        remedy=remedy,
        field=field,
        share_to_best=found.share_to_best,
        present_loss=found.present_value,
    )
    circles = [i for i, period in enumerate(found.periods) if period]
    for axis in circles if left > 0.1 * height else ():
        name, period = found.fields[axis], found.periods[axis]
        if name == "phase":  # its gradient does not vanish far away
            continue
        best_angles = [one.position[axis] for one in found.minima[: found.n_best]]
        gaps = [math.remainder(found.present[axis] - angle, period) for angle in best_angles]
        away, farthest = min(map(abs, gaps)), period / 2 / min(len(gaps), 2)
        # The share of the descent that the present slope would cover on the way to the minimum.
        pull = abs(found.present_slope[axis]) * away / left
        narrow = min(found.predicted_half_width or 0.0, farthest)
        if away > 0.8 * farthest and (pull < 0.1 or lost) and away > narrow:
            in_degrees = 180 / math.pi if found.units[axis] == "rad" else 1.0
            yield build(
                "antipodal start",
                field=name,
                distance=f"{in_degrees * away:.0f}°",
                farthest=f"{in_degrees * farthest:.0f}°",
                distance_rad=math.radians(in_degrees * away),
                farthest_rad=math.radians(in_degrees * farthest),
                pull=pull,
            )
    if lost and left > 0:
        yield build("outside the basin", reached_loss=found.present_minimum.value, best_loss=best)
    if left > 0.1 * height and change < _FLAT * left:
        yield build(
            "flat plateau",
            severity=Severity.SEVERE if lost else Severity.WARNING,
            reason=f"near the present value only by {change / left:.1%} of the way "
            "down to the minimum, so the gradient is too small to find the way",
            change=change,
            drop=left,
        )
    if found.share_to_best < 0.9 and found.n_spurious:
        yield build("spurious minima", n_spurious=found.n_spurious)
