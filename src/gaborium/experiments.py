"""The experiment that the project comes from: a planted Gabor kernel, and three ways to find it.

A photograph is convolved with a known kernel. Then the kernel's parameters are looked for from the
responses alone: by gradient descent on the orientation under the root of the mean squared error,
as one would first try; by ``recover``, which needs no start; and by training a Gabor layer with
gradients in a way that arrives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium.diagnostics import SetUp
from gaborium.errors import as_sizes, one_of
from gaborium.fitting import FitResult, fit, recover
from gaborium.kernels import gabor, orientation_basin
from gaborium.layers import GaborConv2d
from gaborium.params import UNITS, Gabor, Gabor2d
from gaborium.patches import PatchStatistics

Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all

_LANDSCAPE_POINTS = 360
_NEAR = 0.05  # rad; a descent closer than this has been at the minimum
_SETTLED = 0.01  # rad; a descent that stays closer than this has settled
_WHITENING_SIZE = 9  # px
_WHITENING_FLOOR = 1e-3  # of the largest variance: weaker frequencies are noise
_REFIT_EVERY = 25  # steps of training between two global steps


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
        n_ejections: how often θ, having been within the basin, was thrown out of it again.
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
    """A Gabor layer trained by gradients on all its parameters.

    Args:
        params: where it ended, geometry ``(1, 1)``.
        orientation: θ before every step and after the last, rad.
        loss: share of the whitened responses' variance that is left, at each of them.
        jumps: the steps at which a global step was taken.
        kernel_error: of the final kernel, relative to the planted one in L2 norm.
    """

    params: Gabor2d
    orientation: list[float]
    loss: list[float]
    jumps: list[int]
    kernel_error: float


@dataclass(frozen=True)
class Recovery:
    """All that the experiment found.

    Args:
        images: ``(batch, channels, height, width)``, as they were used.
        target: the planted parameters, geometry ``(1, 1)``.
        start: where the descents and the training began.
        kernel_size: (height, width).
        noise: standard deviation of the noise as a share of the responses' own.
        responses: ``(batch, 1, height, width)``, with noise.
        landscape: θ over the whole circle (``orientation``, rad) with ``mse`` and ``rmse``.
        basin: convex half-width of the squared error in θ that theory gives, rad.
        descents: the runs of the first way.
        found: the result of ``recover``.
        training: the third way.
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
        start = self.start.expand()
        found, trained = self.found.params, self.training.params
        errors, trained_errors = found.difference(target), trained.difference(target)
        rows = []
        for name in target.field_names():
            if name == "center":
                continue
            truths = target.as_dict()[name].flatten().tolist()
            for i, truth in enumerate(truths):
                # The error is on the circle and up to symmetry; truth + error is the found value
                # on the truth's side of it.
                error = errors[name].flatten()[i].item()
                trained_error = trained_errors[name].flatten()[i].item()
                rows.append(
                    {
                        "parameter": name if len(truths) == 1 else f"{name}[{i}]",
                        "unit": UNITS[name],
                        "truth": truth,
                        "start": start.as_dict()[name].flatten()[i].item(),
                        "found": truth + error,
                        "error": error,
                        "standard_error": self.found.standard_error[name].flatten()[i].item(),
                        "trained": truth + trained_error,
                        "trained_error": trained_error,
                    }
                )
        return rows

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
        Everything found.

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
    height, width = as_sizes("kernel_size", kernel_size, 2)
    batch = _batch(images, (height, width))
    channels = batch.shape[1]
    target, start = _per_channel(target, channels), _per_channel(start, channels)
    report = on_progress or (lambda *_: None)

    clean = F.conv2d(batch, gabor(target, (height, width)).to(batch))
    if not clean.std() > 1e-6 * batch.abs().max():
        raise ValueError(
            "The photograph is constant as far as this kernel sees, so nothing can be recovered; "
            "use an image with structure."
        )
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    responses = clean + noise * clean.std() * white

    settings = [(rate, momentum) for momentum in momenta for rate in learning_rates]
    landscape = _landscape(batch, responses, target, (height, width))
    descents: list[Descent] = []
    for rate, momentum in settings:

        def step_done(step: int) -> None:
            done = len(descents) * n_steps + step
            report("gradient descent on θ", done, len(settings) * n_steps)

        descents.append(
            _descend(
                batch.float(),
                responses.float(),
                target,
                start,
                (height, width),
                rate,
                momentum,
                n_steps,
                step_done,
            )
        )
    report("recover", 0, 1)
    found = recover(batch, responses, (height, width))
    report("recover", 1, 1)
    training = _train(
        batch,
        responses,
        target,
        start,
        (height, width),
        n_steps,
        lambda step: report("training all parameters", step, n_steps),
    )
    return Recovery(
        images=batch,
        target=target,
        start=start,
        kernel_size=(height, width),
        noise=noise,
        responses=responses,
        landscape=landscape,
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
) -> SetUp:
    """One descent of the experiment as a set-up to diagnose: a layer that learns its orientation.

    Args:
        images: photographs ``(channels, height, width)`` of equal shape.
        target: the planted Gabor function: geometry of batch shape ``()``, phase and amplitude
            ``()`` or ``(channels,)``.
        start: where the layer begins, in the same shapes; what is not its orientation stays.
        kernel_size: of both, px.
        loss: between outputs and responses: ``"rmse"``, as in the experiment, or ``"mse"``.
        learning_rate: step size of the descent.
        momentum: of the descent.
        padding: of both with zeros, px.

    Raises:
        ValueError: images differ in shape, are constant, not finite or smaller than the kernel.

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
    size = as_sizes("kernel_size", kernel_size, 2)
    inputs = _batch(images, (size[0], size[1])).float()
    channels = inputs.shape[1]
    target, start = _per_channel(target, channels), _per_channel(start, channels)
    layer = GaborConv2d(
        channels,
        1,
        (size[0], size[1]),
        padding=padding,
        bias=False,
        learn="orientation",
        coordinates="textbook",
        start=start,
    )
    targets = F.conv2d(inputs, gabor(target, size).to(inputs), padding=padding)
    optimizer = torch.optim.SGD(layer.parameters(), lr=learning_rate, momentum=momentum)
    return SetUp(layer, _rmse if loss == "rmse" else F.mse_loss, inputs, targets, optimizer)


def _rmse(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target).sqrt()


def _batch(images: Sequence[Tensor], kernel_size: tuple[int, int]) -> Tensor:
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) != 1:
        raise ValueError(f"images must be one or more of equal shape, got shapes {shapes}.")
    batch = torch.stack(list(images)).double()
    if batch.ndim != 4:
        raise ValueError(f"images must be (channels, height, width), got shape {shapes[0]}.")
    if not batch.isfinite().all():
        raise ValueError("images must be finite, got NaN or infinity.")
    if any(size > axis for size, axis in zip(kernel_size, batch.shape[2:], strict=True)):
        raise ValueError(
            f"kernel_size {kernel_size} must not be larger than the image, "
            f"{tuple(batch.shape[2:])} px (height, width)."
        )
    if (batch == batch[:, :, :1, :1]).all():
        raise ValueError(
            "The photograph is constant: every kernel of the same sum gives the same responses, "
            "so nothing can be recovered; use an image with structure."
        )
    return batch


def _per_channel(params: Gabor2d, channels: int) -> Gabor2d:
    """Geometry ``(1, 1)``, phase and amplitude ``(1, channels)``, float64."""
    fields = {}
    for name, value in params.detach().to(torch.float64).as_dict().items():
        if name in ("phase", "amplitude"):
            if value.numel() not in (1, channels):
                raise ValueError(
                    f"{name} must be 1 number or one per channel ({channels}), got {value.numel()}."
                )
            fields[name] = value.flatten().expand(channels).unsqueeze(0)
        else:
            one = value.reshape(-1, 2)[:1] if name == "center" else value.reshape(-1)[:1]
            fields[name] = one.unsqueeze(1)
    return Gabor2d(**fields)


def _landscape(
    batch: Tensor, responses: Tensor, target: Gabor2d, kernel_size: tuple[int, int]
) -> dict[str, list[float]]:
    """The loss over the whole circle of orientations, the other parameters being right."""
    around = torch.linspace(-math.pi, math.pi, _LANDSCAPE_POINTS + 1, dtype=torch.float64)
    turned = target.replace(orientation=around.unsqueeze(1))
    kernels = gabor(turned, kernel_size)
    mse = torch.cat(
        [
            (F.conv2d(batch, piece) - responses).square().mean((0, 2, 3))
            for piece in kernels.split(32)
        ]
    )
    return {
        "orientation": around.tolist(),
        "mse": mse.tolist(),
        "rmse": mse.sqrt().tolist(),
    }


def _descend(
    batch: Tensor,
    responses: Tensor,
    target: Gabor2d,
    start: Gabor2d,
    kernel_size: tuple[int, int],
    learning_rate: float,
    momentum: float,
    n_steps: int,
    report: Callable[[int], None],
) -> Descent:
    """The first thing one tries: θ alone, the root of the mean squared error, plain descent."""
    layer = GaborConv2d(
        batch.shape[1], 1, kernel_size, bias=False, learn="orientation",
        coordinates="textbook", start=start,
    )  # fmt: skip
    optimizer = torch.optim.SGD(layer.parameters(), lr=learning_rate, momentum=momentum)
    orientation, losses = [], []
    for step in range(n_steps + 1):
        loss = (layer(batch) - responses).square().mean().sqrt()
        orientation.append(layer.params.orientation.item())
        losses.append(loss.item())
        if step < n_steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        report(step)

    truth = target.orientation.item()
    # Equal kernels repeat after half a turn only when turned back in phase; the experiment's
    # loss does so for even phases. Distances are those of the stripes, which have period π.
    error = [abs(math.remainder(theta - truth, math.pi)) for theta in orientation]
    basin = max(orientation_basin(target).item(), 2 * _NEAR)
    within = [distance <= basin for distance in error]
    first = next((step for step, distance in enumerate(error) if distance < _NEAR), None)
    ejections = sum(before and not now for before, now in itertools.pairwise(within))
    return Descent(
        learning_rate=learning_rate,
        momentum=momentum,
        orientation=orientation,
        loss=losses,
        error=error,
        first_arrival=first,
        n_ejections=ejections,
        final_error=math.nan if math.isnan(error[-1]) else max(error[-max(2, n_steps // 10) :]),
    )


def _train(
    batch: Tensor,
    responses: Tensor,
    target: Gabor2d,
    start: Gabor2d,
    kernel_size: tuple[int, int],
    n_steps: int,
    report: Callable[[int], None],
) -> Training:
    """Train all parameters by gradients, in a way that arrives.

    Four things differ from the descent above. The error is squared, so that its slope vanishes at
    the minimum; its mean, which shows no more than the photograph's brightness, is left out. Images
    and responses are filtered by the same whitening kernel, which leaves the wanted kernel the same
    and takes away the spectrum of the photograph; colour channels are decorrelated, which changes
    amplitudes and phases in a known way. Wave vector and even and odd coefficients are learned, not
    θ, λ and ψ: there is no circle to cross. And every 25 steps the gradient of the *kernel* is
    followed to the minimum that it points at, where the loss has no other, and the Gabor function
    nearest to that is taken if the loss is lower there.
    """
    whitening = _whitening_kernel(batch)
    x, y = _filtered(batch, whitening), _filtered(responses, whitening)
    x = x - x.mean((0, 2, 3), keepdim=True)
    mixing, unmixing = _decorrelation(x)
    x, scale = torch.einsum("dc,bchw->bdhw", mixing, x).float(), y.std()
    y = (y / scale).float()

    layer = GaborConv2d(
        x.shape[1], 1, kernel_size, bias=False, start=_mixed(start, unmixing / scale)
    )
    covariance = _patch_covariance(x, kernel_size)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    orientation, losses, jumps = [], [], []
    for step in range(n_steps + 1):
        if (
            step % _REFIT_EVERY == 0
            and 0 < step < n_steps
            and _global_step(layer, x, y, covariance)
        ):
            jumps.append(step)
            # The running averages belong to another place, and what is left to do is fine work.
            optimizer.state.clear()
            optimizer.param_groups[0]["lr"] *= 0.2
        loss = (layer(x) - y).var(correction=0)
        orientation.append(layer.params.orientation.item())
        losses.append(loss.item())
        if step < n_steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        report(step)
    params = _mixed(layer.params.detach().to(torch.float64), mixing * scale).canonical()
    return Training(params, orientation, losses, jumps, _kernel_error(params, target, kernel_size))


def _global_step(layer: GaborConv2d, x: Tensor, y: Tensor, covariance: Tensor) -> bool:
    """Go where the kernel's gradient points, and take the Gabor function nearest to that.

    In the kernel the squared error is a parabola with the covariance C of the patches as its
    curvature: its minimum is ``kernel - C⁻¹ gradient / 2``, from wherever one stands. Nearness is
    measured by C too, so what the photograph does not show does not count.
    """
    weight = layer.weight.detach().requires_grad_()
    loss = (F.conv2d(x, weight) - y).var(correction=0)
    (gradient,) = torch.autograd.grad(loss, weight)
    weight = weight.detach()
    step = torch.linalg.pinv(covariance, rtol=_WHITENING_FLOOR**2, hermitian=True)
    minimum = weight.double() - 0.5 * (step @ gradient.double().flatten()).reshape(weight.shape)
    there = fit(minimum, geometry="filter", metric=covariance).params
    kernel = gabor(there, layer.kernel_size).to(weight)
    # Smaller gains are the optimiser's, which would lose its averages for them.
    if (F.conv2d(x, kernel) - y).var(correction=0) > 0.5 * loss:
        return False
    layer.params = there
    return True


def _patch_covariance(x: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Covariance of the patches of images, ``(channels · pixels,) * 2``."""
    statistics = PatchStatistics(kernel_size, n_channels=x.shape[1])
    statistics.add(x)
    return statistics.covariance


def _decorrelation(x: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric matrix that makes the channels of x white, and its inverse."""
    flat = x.movedim(1, 0).flatten(1)
    values, vectors = torch.linalg.eigh(flat @ flat.T / flat.shape[1])
    values = values + _WHITENING_FLOOR * values[-1]
    return (vectors * values.rsqrt()) @ vectors.T, (vectors * values.sqrt()) @ vectors.T


def _mixed(params: Gabor2d, matrix: Tensor) -> Gabor2d:
    """The same geometry with the complex amplitudes ``A exp(iψ)`` of the channels mixed."""
    mixed = torch.polar(params.amplitude, params.phase) @ matrix.to(torch.complex128)
    return params.replace(amplitude=mixed.abs(), phase=mixed.angle())


def _whitening_kernel(batch: Tensor) -> Tensor:
    """The filter that flattens the photographs' mean spectrum: the middle row of C^(-1/2)."""
    size = min(_WHITENING_SIZE, *(axis // 4 for axis in batch.shape[2:]))
    size += size % 2 - 1  # odd
    grey = batch.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(_patch_covariance(grey, (size, size)))
    root = (values.clamp_min(0) + _WHITENING_FLOOR * values[-1]).rsqrt()
    return ((vectors * root) @ vectors.T)[size**2 // 2].reshape(size, size)


def _filtered(images: Tensor, kernel: Tensor) -> Tensor:
    """Every channel convolved with one kernel."""
    channels = images.shape[1]
    return F.conv2d(images, kernel.expand(channels, 1, *kernel.shape), groups=channels)


def _kernel_error(params: Gabor, target: Gabor, kernel_size: tuple[int, int]) -> float:
    wanted = gabor(target, kernel_size)
    return ((gabor(params, kernel_size) - wanted).norm() / wanted.norm()).item()
