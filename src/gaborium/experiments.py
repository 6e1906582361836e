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

from gaborium.diagnostics import TrainingSetup
from gaborium.fitting import FitResult, recover
from gaborium.functions.kernels import gabor, orientation_basin
from gaborium.functions.params import UNITS, Gabor, Gabor2d, plain
from gaborium.layers import GaborConv2d
from gaborium.optim import NaturalGradient
from gaborium.support import as_sizes, one_of

Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all

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
        error: distance of θ from the truth at each of them, rad, in [0, π/2].
        first_arrival: the first step at which θ was within 0.05 rad of the truth, or ``None``.
        n_ejections: how often θ left the basin after it had been inside.
        final_error: largest error in the last tenth of the run, rad.
    """

    learning_rate: float
    momentum: float
    orientation: list[float]
    loss: list[float]
    error: list[float]
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
class Training:
    """A Gabor layer trained by ``NaturalGradient`` on all its parameters.

    Args:
        params: where it ended, geometry ``(1, 1)``.
        orientation: θ before every step and after the last, rad.
        loss: variance of the error as a share of the responses' variance, at each of them.
        global_steps: the steps at which a global step was taken.
        kernel_error: of the final kernel, relative to the planted one in L2 norm.
    """

    params: Gabor2d
    orientation: list[float]
    loss: list[float]
    global_steps: list[int]
    kernel_error: float


@dataclass(frozen=True)
class Recovery:
    """The results of the experiment.

    Args:
        images: ``(batch, channels, height, width)``, as they were used.
        target: the planted parameters, geometry ``(1, 1)``.
        start: where the descents and the training began.
        kernel_size: (height, width).
        noise: standard deviation of the noise as a share of the responses' own.
        responses: ``(batch, 1, height, width)``, with noise.
        landscape: θ over the whole circle (``orientation``, rad) with ``mse`` and ``rmse``.
        basin: convex half-width of the squared error in θ that theory gives, rad.
        descents: the runs of gradient descent on θ.
        found: the result of ``recover``.
        training: the training with ``NaturalGradient``.
    """

    images: Tensor
    target: Gabor2d
    start: Gabor2d
    kernel_size: tuple[int, int]
    noise: float
    responses: Tensor
    landscape: dict[str, list[float]]
    basin: float
    descents: tuple[Descent, ...]
    found: FitResult
    training: Training

    def table(self) -> list[dict[str, Any]]:
        """Rows of parameter, unit, truth, start, found, error, standard error, trained."""
        target = self.target.canonical()
        found, trained = self.found.params.difference(target), self.training.params
        columns = {
            "truth": target.as_dict(),
            "start": self.start.expand().as_dict(),
            "error": found,
            "standard_error": self.found.standard_error,
            "trained_error": trained.difference(target),
        }
        rows = []
        for name in target.field_names():
            values = {column: fields[name].flatten() for column, fields in columns.items()}
            n = len(values["truth"])
            for i in range(n if name != "center" else 0):
                row = {column: value[i].item() for column, value in values.items()}
                # Errors are on the circle and up to symmetry. Truth + error is the found value on
                # the truth's side of it.
                rows.append(
                    {
                        "parameter": name if n == 1 else f"{name}[{i}]",
                        "unit": UNITS[name],
                        "found": row["truth"] + row["error"],
                        "trained": row["truth"] + row["trained_error"],
                        **row,
                    }
                )
        return rows

    def to_json(self) -> str:
        """The parameters, paths and errors as JSON text; missing numbers are inf and nan."""
        values = {name: one for name, one in vars(self).items() if not isinstance(one, Tensor)}
        values |= {"kernel_errors": self.kernel_errors(), "table": self.table()}
        records: dict[str, Any] = {"found": self.found, "target": self.target, "start": self.start}
        values |= {name: json.loads(one.to_json()) for name, one in records.items()}
        values["descents"] = [vars(run) for run in self.descents]
        training = {"params": json.loads(self.training.params.to_json())}
        values["training"] = vars(self.training) | training
        return json.dumps(plain(values), allow_nan=False)

    def kernel_errors(self) -> dict[str, float]:
        """L2 distance of the found and the trained kernel from the planted one, as a share."""
        return {
            "found": _kernel_error(self.found.params, self.target, self.kernel_size),
            "trained": self.training.kernel_error,
        }


def recover_planted(
    images: Sequence[Tensor],
    target: Gabor2d,
    *,
    start: Gabor2d,
    kernel_size: int | tuple[int, int] = 15,
    noise: float = 0.0,
    learning_rates: Sequence[float] = (0.001, 0.01, 0.1, 1.0),
    momenta: Sequence[float] = (0.0, 0.9),
    n_steps: int = 300,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Recovery:
    """Plant a kernel, convolve photographs with it, and look for it in three ways.

    Args:
        images: photographs ``(channels, height, width)`` of equal shape, values in [0, 1].
        target: the planted Gabor function: geometry of batch shape ``()``, phase and amplitude
            ``()`` or ``(channels,)``.
        start: where the descents and the training begin, in the same shapes. Descents move the
            orientation only, so give them the truth in the rest.
        kernel_size: of all layers, px.
        noise: standard deviation of white noise on the responses, as a share of their own.
        learning_rates: step sizes of the descents.
        momenta: momenta of the descents.
        n_steps: steps of each descent and of the training.
        seed: of the noise.
        on_progress: called with stage, steps done and steps in all.

    Returns:
        Descents, the result of ``recover``, the training, and the loss over all orientations.

    Raises:
        ValueError: images differ in shape, are constant, not finite or smaller than the kernel.

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
    size, batch, target, start = _prepare(images, target, start, kernel_size)
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
    settings = [(rate, momentum) for momentum in momenta for rate in learning_rates]
    for rate, momentum in settings:
        layer = _orientation_layer(start, size)
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=momentum)
        path = _path(layer, optimizer, _rmse, batch.float(), responses.float(), n_steps)
        descents.append(_descent(rate, momentum, list(path), target))
        report("gradient descent on θ", len(descents), len(settings))
    report("recover", 0, 1)
    found = recover(batch, responses, size)
    report("recover", 1, 1)
    layer = GaborConv2d(batch.shape[1], 1, size, bias=False, start=start, dtype=torch.float64)
    natural, orientation, losses, n_jumps = NaturalGradient(layer), [], [], []
    for theta, loss in _path(layer, natural, _error_variance, batch, responses, n_steps):
        orientation.append(theta)
        losses.append(loss / responses.var(correction=0).item())
        n_jumps.append(natural.n_global_steps)
        report("training all parameters", len(n_jumps) - 1, n_steps)
    trained = layer.params.detach().canonical()
    training = Training(
        params=trained,
        orientation=orientation,
        loss=losses,
        global_steps=[i for i in range(1, len(n_jumps)) if n_jumps[i] > n_jumps[i - 1]],
        kernel_error=_kernel_error(trained, target, size),
    )
    return Recovery(
        images=batch,
        target=target,
        start=start,
        kernel_size=size,
        noise=noise,
        responses=responses,
        landscape=_landscape(batch, responses, target, size),
        basin=orientation_basin(target).item(),
        descents=tuple(descents),
        found=found,
        training=training,
    )


def planted_setup(
    images: Sequence[Tensor],
    target: Gabor2d,
    *,
    start: Gabor2d,
    kernel_size: int | tuple[int, int] = 15,
    loss: str = "rmse",
    learning_rate: float = 1.0,
    momentum: float = 0.0,
    padding: int = 0,
) -> TrainingSetup:
    """One descent of the experiment as a set-up to diagnose: a layer that learns its orientation.

    Args:
        images: photographs, as for ``recover_planted``.
        target: the planted Gabor function.
        start: where the layer begins; only its orientation moves.
        kernel_size: of both, px.
        loss: between outputs and responses: ``"rmse"``, as in the experiment, or ``"mse"``.
        learning_rate: step size of the descent.
        momentum: of the descent.
        padding: of both with zeros, px.

    Raises:
        ValueError: images differ in shape, are not finite, or smaller than the kernel.

    Example:
        >>> from gaborium.diagnostics import diagnose
        >>> image = torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(0))
        >>> planted = Gabor2d.of(orientation=0.8, wavelength=5.0, sigma=2.0)
        >>> start = Gabor2d.of(orientation=0.6, wavelength=5.0, sigma=2.0)
        >>> setup = planted_setup([image], planted, start=start, kernel_size=9)
        >>> data = setup.inputs, setup.targets
        >>> diagnose(setup.module, setup.loss, data, optimizer=setup.optimizer).findings[0].cause
        'cone at the minimum'
    """
    one_of("loss", loss, ("rmse", "mse"))
    size, batch, target, start = _prepare(images, target, start, kernel_size)
    layer, inputs = _orientation_layer(start, size, padding), batch.float()
    targets = F.conv2d(inputs, gabor(target, size).to(inputs), padding=padding)
    optimizer = torch.optim.SGD(layer.parameters(), lr=learning_rate, momentum=momentum)
    return TrainingSetup(layer, _rmse if loss == "rmse" else F.mse_loss, inputs, targets, optimizer)


def _rmse(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean().sqrt()


def _error_variance(output: Tensor, target: Tensor) -> Tensor:
    """The squared error without its mean, which depends on the photograph's brightness only."""
    return (output - target).var(correction=0)


def _prepare(
    images: Sequence[Tensor],
    target: Gabor2d,
    start: Gabor2d,
    kernel_size: int | tuple[int, int],
) -> tuple[tuple[int, int], Tensor, Gabor2d, Gabor2d]:
    """Kernel size, images in one float64 batch, and both records with one filter's shapes."""
    height, width = as_sizes("kernel_size", kernel_size, 2)
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) != 1:
        raise ValueError(f"images must be one or more of equal shape, got shapes {shapes}.")
    if len(shapes[0]) != 3:
        raise ValueError(f"images must be (channels, height, width), got shape {shapes[0]}.")
    batch = torch.stack(list(images)).double()
    if not batch.isfinite().all():
        raise ValueError("images must be finite, got NaN or infinity.")
    channels, *room = shapes[0]
    if height > room[0] or width > room[1]:
        raise ValueError(
            f"kernel_size {(height, width)} must not be larger than the image, {tuple(room)} px "
            "(height, width)."
        )
    target, start = (_one_filter(params, channels) for params in (target, start))
    return (height, width), batch, target, start


def _one_filter(params: Gabor2d, channels: int) -> Gabor2d:
    """Geometry ``(1, 1)``, phase and amplitude ``(1, channels)``, float64."""
    fields = {}
    for name, value in params.detach().to(torch.float64).as_dict().items():
        if name not in ("phase", "amplitude"):
            fields[name] = (
                value.reshape(1, -1, 2)[:, :1] if name == "center" else value.reshape(1, -1)[:, :1]
            )
        elif value.numel() in (1, channels):
            fields[name] = value.reshape(1, -1).expand(1, channels)
        else:
            raise ValueError(
                f"{name} must be 1 number or one per channel ({channels}), got {value.numel()}."
            )
    return Gabor2d(**fields)


def _orientation_layer(
    start: Gabor2d, kernel_size: tuple[int, int], padding: int = 0
) -> GaborConv2d:
    """A layer that learns its orientation only."""
    return GaborConv2d(
        start.phase.shape[1], 1, kernel_size, padding=padding, bias=False,
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
    optimizer: torch.optim.Optimizer,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    batch: Tensor,
    responses: Tensor,
    n_steps: int,
) -> Iterator[tuple[float, float]]:
    """Orientation and loss before every step of a training and after the last."""
    for step in range(n_steps + 1):
        loss = loss_function(layer(batch), responses)
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
        error=error,
        first_arrival=next((step for step, away in enumerate(error) if away < _NEAR), None),
        n_ejections=sum(before and not now for before, now in itertools.pairwise(within)),
        final_error=math.nan if math.isnan(error[-1]) else max(error[-last_tenth:]),
    )


def _kernel_error(params: Gabor, target: Gabor, kernel_size: tuple[int, int]) -> float:
    wanted = gabor(target, kernel_size)
    return ((gabor(params, kernel_size) - wanted).norm() / wanted.norm()).item()
