"""The experiment that the project comes from: a planted Gabor kernel, and three ways to find it.

A photograph is convolved with a known kernel. Its parameters are then estimated from the responses:
by gradient descent on the orientation under the root of the mean squared error, as one would first
try; by ``recover``, which needs no start; and by training a Gabor layer with ``NaturalGradient``.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium.fitting import FitResult, recover
from gaborium.functions.kernels import gabor, orientation_basin
from gaborium.functions.params import UNITS, Gabor2d, plain
from gaborium.layers import GaborConv2d
from gaborium.optim import NaturalGradient

Loss = Callable[[Tensor, Tensor], Tensor]

_LANDSCAPE_POINTS = 360
_NEAR = 0.05  # rad; a descent closer than this has been at the minimum
_SETTLED = 0.01  # rad; a descent that stays closer than this has settled


@dataclass(frozen=True)
class Descent:
    """One run of gradient descent on the orientation.

    Args:
        learning_rate: step size.
        momentum: of the descent.
        orientation: θ before every step and after the last, rad.
        loss: the root of the mean squared error at each of them.
        first_arrival: the first step at which θ was within 0.05 rad of the truth, or ``None``.
        n_ejections: how often θ left the basin after it had been inside.
        final_error: largest error in the last tenth of the run, rad.
    """

    learning_rate: float
    momentum: float
    orientation: list[float]
    loss: list[float]
    first_arrival: int | None
    n_ejections: int
    final_error: float

    @property
    def settled(self) -> bool:
        """Whether θ stays within 0.01 rad of the truth at the end."""
        return self.final_error < _SETTLED

    @property
    def verdict(self) -> str:
        """What happened, in a few words."""
        if math.isnan(self.final_error):
            return "lost: not a number"
        if self.settled:
            return "settles"
        if self.n_ejections:
            times = "once" if self.n_ejections == 1 else f"{self.n_ejections} times"
            return f"thrown out {times}"
        if self.first_arrival is None:
            return "never arrives"
        return f"cycles, ±{math.degrees(self.final_error):.1f}°"


@dataclass(frozen=True)
class Recovery:
    """The results of the experiment.

    Args:
        images: ``(batch, channels, height, width)``, as they were used.
        target: the planted parameters, geometry ``(1, 1)``.
        start: where the descents and the training began.
        kernel_size: (height, width).
        responses: ``(batch, 1, height, width)``, with noise.
        landscape: θ over the whole circle (``orientation``, rad) with ``mse`` and ``rmse``.
        basin: convex half-width of the squared error in θ that theory gives, rad.
        descents: the runs of gradient descent on θ.
        found: the result of ``recover``.
        trained: where a Gabor layer ended that ``NaturalGradient`` trained on all its parameters.
        training: before every step and after the last θ (``orientation``, rad) and the error's
            variance as a share of the responses' (``loss``).
    """

    images: Tensor
    target: Gabor2d
    start: Gabor2d
    kernel_size: tuple[int, int]
    responses: Tensor
    landscape: dict[str, list[float]]
    basin: float
    descents: tuple[Descent, ...]
    found: FitResult
    trained: Gabor2d
    training: dict[str, list[float]]

    def table(self) -> list[dict[str, Any]]:
        """Rows of parameter, unit, found, trained, truth, start, and errors of both."""
        target = self.target.canonical()
        columns = {
            "truth": target.as_dict(),
            "start": self.start.expand().as_dict(),
            "error": self.found.params.difference(target),
            "standard_error": self.found.standard_error,
            "trained_error": self.trained.difference(target),
        }
        rows = []
        for name in (name for name in target.field_names() if name != "center"):
            values = {column: fields[name].flatten().tolist() for column, fields in columns.items()}
            for i, truth in enumerate(values["truth"]):
                row = {column: value[i] for column, value in values.items()}
                # Errors are on the circle and up to symmetry. Truth + error is the found value on
                # the truth's side of it.
                found = {"found": truth + row["error"], "trained": truth + row["trained_error"]}
                parameter = name if len(values["truth"]) == 1 else f"{name}[{i}]"
                rows.append({"parameter": parameter, "unit": UNITS[name], **found, **row})
        return rows

    def to_json(self) -> str:
        """The parameters, paths and errors as JSON text; missing numbers are inf and nan."""
        values = {name: one for name, one in vars(self).items() if not isinstance(one, Tensor)}
        values |= {"kernel_errors": self.kernel_errors(), "table": self.table()}
        values["descents"] = [vars(run) for run in self.descents]
        for name in ("target", "start", "found", "trained"):
            values[name] = json.loads(values[name].to_json())
        return json.dumps(plain(values), allow_nan=False)

    def kernel_errors(self) -> dict[str, float]:
        """L2 distance of the found and the trained kernel from the planted one, as a share."""
        wanted = gabor(self.target, self.kernel_size)
        ends = {"found": self.found.params, "trained": self.trained}
        return {
            name: ((gabor(params, self.kernel_size) - wanted).norm() / wanted.norm()).item()
            for name, params in ends.items()
        }


def recover_planted(
    images: Sequence[Tensor],
    target: Gabor2d,
    *,
    start: Gabor2d,
    kernel_size: int | tuple[int, int] = 15,
    crop: int | None = None,
    noise: float = 0.0,
    learning_rates: Sequence[float] = (0.001, 0.01, 0.1, 1.0),
    momenta: Sequence[float] = (0.0, 0.9),
    n_steps: int = 300,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Recovery:
    """Plant a kernel, convolve photographs with it, and look for it in three ways.

    Args:
        images: photographs ``(channels, height, width)``, values in [0, 1]. The middle of each is
            used, as large as the smallest; grey ones next to colours get equal channels.
        target: the planted Gabor function: geometry of batch shape ``()``, phase and amplitude
            ``()`` or ``(channels,)``.
        start: where the descents and the training begin, in the same shapes. Descents move the
            orientation only, so give them the truth in the rest.
        kernel_size: of all layers, px.
        crop: side of the square that is used of each photograph at most, px.
        noise: standard deviation of white noise on the responses, as a share of their own.
        learning_rates: step sizes of the descents.
        momenta: momenta of the descents.
        n_steps: steps of each descent and of the training.
        seed: of the noise.
        on_progress: called with stage, steps done and steps in all.

    Returns:
        Descents, the result of ``recover``, the training, and the loss over all orientations.

    Raises:
        ValueError: images are constant, not finite or smaller than the kernel.

    Example:
        >>> image = torch.rand(1, 48, 48, generator=torch.Generator().manual_seed(0))
        >>> planted = Gabor2d.of(orientation=0.8, wavelength=5.0, sigma=2.0)
        >>> start = Gabor2d.of(orientation=-0.8, wavelength=5.0, sigma=2.0)
        >>> result = recover_planted(
        ...     [image], planted, start=start, kernel_size=11, n_steps=2, learning_rates=[0.1]
        ... )
        >>> result.found.outcome[0].name, len(result.descents)
        ('CONVERGED', 2)
    """
    batch, target, start, size = _prepare(images, target, start, kernel_size, crop)
    report = on_progress or (lambda *_: None)
    clean = F.conv2d(batch, gabor(target, size).to(batch))
    if not clean.std() > 1e-6 * batch.abs().max():
        raise ValueError(
            "The photograph is constant as far as this kernel sees, so nothing can be recovered; "
            "use an image with structure."
        )
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    responses = clean + noise * clean.std() * white

    descents = []
    settings = list(itertools.product(momenta, learning_rates))
    for momentum, rate in settings:
        layer = _orientation_layer(start, size)
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=momentum)
        path = list(_path(layer, optimizer, rmse, (batch.float(), responses.float()), n_steps))
        descents.append(_descent(rate, momentum, path, target))
        report("gradient descent on θ", len(descents), len(settings))
    report("recover", 0, 1)
    found = recover(batch, responses, size)
    report("recover", 1, 1)
    layer = GaborConv2d(batch.shape[1], 1, size, bias=False, start=start, dtype=torch.float64)
    path, natural = [], NaturalGradient(layer)
    for place in _path(layer, natural, _error_variance, (batch, responses), n_steps):
        path.append(place)
        report("training all parameters", len(path) - 1, n_steps)
    (orientation, losses), variance = zip(*path, strict=True), responses.var(correction=0).item()
    return Recovery(
        images=batch,
        target=target,
        start=start,
        kernel_size=size,
        responses=responses,
        landscape=_landscape(batch, responses, target, size),
        basin=orientation_basin(target).item(),
        descents=tuple(descents),
        found=found,
        trained=layer.params.detach().canonical(),
        training={"orientation": list(orientation), "loss": [loss / variance for loss in losses]},
    )


def planted_setup(
    images: Sequence[Tensor],
    target: Gabor2d,
    *,
    start: Gabor2d,
    kernel_size: int | tuple[int, int] = 15,
    crop: int | None = None,
    loss: Loss | None = None,
    learning_rate: float = 1.0,
    momentum: float = 0.0,
) -> tuple[GaborConv2d, Loss, tuple[Tensor, Tensor], torch.optim.Optimizer]:
    """Return a descent of the experiment: layer, loss, inputs with targets, and optimizer.

    Args:
        images: photographs, as for ``recover_planted``.
        target: the planted Gabor function.
        start: where the layer begins; only its orientation moves.
        kernel_size: of both, px.
        crop: as for ``recover_planted``, px.
        loss: of outputs and responses; by default ``rmse``, as in the experiment.
        learning_rate: step size of the descent.
        momentum: of the descent.

    Raises:
        ValueError: images are not finite, or smaller than the kernel.

    Example:
        >>> from gaborium.diagnostics import diagnose
        >>> image = torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(0))
        >>> planted = Gabor2d.of(orientation=0.8, wavelength=5.0, sigma=2.0)
        >>> start = Gabor2d.of(orientation=0.6, wavelength=5.0, sigma=2.0)
        >>> *setup, optimizer = planted_setup([image], planted, start=start, kernel_size=9)
        >>> diagnose(*setup, optimizer=optimizer).findings[0].cause
        'cone at the minimum'
    """
    batch, target, start, size = _prepare(images, target, start, kernel_size, crop)
    layer, inputs = _orientation_layer(start, size), batch.float()
    targets = F.conv2d(inputs, gabor(target, size).to(inputs))
    optimizer = torch.optim.SGD(layer.parameters(), lr=learning_rate, momentum=momentum)
    return layer, loss or rmse, (inputs, targets), optimizer


def rmse(output: Tensor, target: Tensor) -> Tensor:
    """The root of the mean squared error."""
    return (output - target).square().mean().sqrt()


def _error_variance(output: Tensor, target: Tensor) -> Tensor:
    """The squared error without its mean, which depends on the photograph's brightness only."""
    return (output - target).var(correction=0)


def _prepare(
    images: Sequence[Tensor],
    target: Gabor2d,
    start: Gabor2d,
    kernel_size: int | tuple[int, int],
    crop: int | None,
) -> tuple[Tensor, Gabor2d, Gabor2d, tuple[int, int]]:
    """Images in one float64 batch, both records with one filter's shapes, and the kernel size."""
    shapes, pieces = [tuple(image.shape) for image in images], []
    if {len(shape) for shape in shapes} != {3}:
        raise ValueError(f"images must be (channels, height, width), got shapes {shapes}.")
    channels, smallest = max(shapes)[0], [min(sides) for sides in zip(*shapes, strict=True)]
    height, width = (min(side, crop or side) for side in smallest[1:])
    for image in images:
        top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
        pieces.append(image[:, top : top + height, left : left + width].expand(channels, -1, -1))
    batch = torch.stack(pieces).double()
    if not batch.isfinite().all():
        raise ValueError("images must be finite, got NaN or infinity.")
    size: Any = GaborConv2d(1, 1, kernel_size, seed=0).kernel_size
    if size[0] > height or size[1] > width:
        raise ValueError(
            f"kernel_size {size} must not be larger than the image, {(height, width)} px (height, "
            "width)."
        )
    target, start = (_one_filter(params, channels) for params in (target, start))
    return batch, target, start, size


def _one_filter(params: Gabor2d, channels: int) -> Gabor2d:
    """Geometry ``(1, 1)``, phase and amplitude ``(1, channels)``, float64."""
    record = params.detach().to(torch.float64).expand()
    n = record.phase.numel()
    if n not in (1, channels):
        raise ValueError(
            f"phase and amplitude must be 1 number or one per channel ({channels}), got {n}."
        )
    fields = {name: value.reshape(1, n, -1)[:, :1, 0] for name, value in record.as_dict().items()}
    fields["center"] = record.center.reshape(1, n, 2)[:, :1]
    for name in ("phase", "amplitude"):
        fields[name] = getattr(record, name).reshape(1, n).expand(1, channels)
    return Gabor2d(**fields)


def _orientation_layer(start: Gabor2d, kernel_size: tuple[int, int]) -> GaborConv2d:
    """A layer that learns its orientation only."""
    return GaborConv2d(
        start.phase.shape[1], 1, kernel_size, bias=False,
        learn="orientation", coordinates="textbook", start=start,
    )  # fmt: skip


def _landscape(
    batch: Tensor, responses: Tensor, target: Gabor2d, kernel_size: tuple[int, int]
) -> dict[str, list[float]]:
    """The loss over the whole circle of orientations, with the other parameters right."""
    around = torch.linspace(-math.pi, math.pi, _LANDSCAPE_POINTS + 1, dtype=torch.float64)
    kernels = gabor(target.replace(orientation=around.unsqueeze(1)), kernel_size)
    errors = [F.conv2d(batch, piece) - responses for piece in kernels.split(32)]
    mse = torch.cat([error.square().mean((0, 2, 3)) for error in errors])
    return {"orientation": around.tolist(), "mse": mse.tolist(), "rmse": mse.sqrt().tolist()}


def _path(
    layer: GaborConv2d,
    optimizer: Any,
    loss_function: Loss,
    data: tuple[Tensor, Tensor],
    n_steps: int,
) -> Iterator[tuple[float, float]]:
    """Orientation and loss before every step of a training and after the last."""
    for step in range(n_steps + 1):
        loss = loss_function(layer(data[0]), data[1])
        yield layer.params.orientation.item(), loss.item()
        if step < n_steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _descent(
    rate: float, momentum: float, path: Sequence[tuple[float, float]], target: Gabor2d
) -> Descent:
    """What the orientations and losses of a path mean."""
    truth, (orientation, losses) = target.orientation.item(), map(list, zip(*path, strict=True))
    # Distances are those of stripes, which have period π: for even phases so has the loss.
    error = [abs(math.remainder(theta - truth, math.pi)) for theta in orientation]
    basin = max(orientation_basin(target).item(), 2 * _NEAR)
    within = [distance <= basin for distance in error]
    last_tenth = max(2, (len(path) - 1) // 10)
    return Descent(
        learning_rate=rate,
        momentum=momentum,
        orientation=orientation,
        loss=losses,
        first_arrival=next((step for step, away in enumerate(error) if away < _NEAR), None),
        n_ejections=sum(before and not now for before, now in itertools.pairwise(within)),
        final_error=math.nan if math.isnan(error[-1]) else max(error[-last_tenth:]),
    )
