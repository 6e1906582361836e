"""Questions about what gradients tell of a loss: its scale, its minimum, and how sure that is."""

import pytest
import torch
from torch import Tensor

from gaborium.optim.quadratic import Metric, Quadratic, QuadraticEstimator, inner

N = 9
DARK = torch.zeros(1, N, dtype=torch.float64)


def patches(groups: int = 1, n: int = 400, seed: int = 0) -> Tensor:
    """Correlated pixels with a mean, ``(patches, groups, N)``."""
    draw = torch.Generator().manual_seed(seed)
    white = torch.randn(n, groups, N, dtype=torch.float64, generator=draw)
    return white.cumsum(-1) + 2.0


def covariance_of(samples: Tensor) -> Tensor:
    centred = (samples - samples.mean(0)).transpose(0, 1)
    return centred.mT @ centred / len(samples)


def estimator_for(samples: Tensor, damping: float = 1e-12) -> QuadraticEstimator:
    estimator = QuadraticEstimator({}, damping)
    estimator.update_covariance(covariance_of(samples), 0.9)
    return estimator


def divide(metric: Metric, kernels: Tensor) -> Tensor:
    """C⁻¹ times kernels."""
    return Metric(metric.inverse()).times(kernels)


def watch(
    estimator: QuadraticEstimator,
    target: Tensor,
    scales: list[float],
    *,
    centred: bool = True,
    noise: float = 0.0,
    momentum: float = 0.9,
    speed: float = 1.0,
    seed: int = 0,
) -> tuple[Quadratic, Tensor]:
    """Show random kernels and the gradients of ``scale · ½ (W - T) C (W - T)``.

    Every batch has a brightness m of its own, whose gradient is ``scale · m m·(W - T)``; or, where
    the responses' means do not matter, anything.
    """
    draw = torch.Generator().manual_seed(seed)
    metric = estimator.metric()
    root = torch.linalg.cholesky(metric.covariance).mT
    for scale in scales:
        kernel = target + speed * torch.randn(target.shape, dtype=target.dtype, generator=draw)
        white = torch.randn(target.shape, dtype=target.dtype, generator=draw)
        rough = (white.reshape(len(root), -1, N) @ root).reshape(white.shape)
        gradient = scale * metric.times(kernel - target) + noise * rough
        mean = 2.0 + torch.randn(len(root), N, dtype=target.dtype, generator=draw)
        rows = mean.repeat_interleave(len(target) // len(root), 0).unsqueeze(1)
        if centred:
            offset = torch.randn(target.shape[:2], dtype=target.dtype, generator=draw)
        else:
            offset = scale * ((kernel - target) * rows).sum(-1)
        gradient = gradient + offset.unsqueeze(-1) * rows
        quadratic = estimator.update_gradient(
            kernel, gradient, offset, mean, momentum, centred=centred
        )
    return quadratic, kernel


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("groups", "members"), [(1, 1), (2, 1), (2, 2)])
def test_scale_and_minimum_are_found(groups, members, centred):
    estimator = estimator_for(patches(groups))
    target = torch.randn(4, members, N, dtype=torch.float64)
    quadratic, _ = watch(estimator, target, [3.0] * 6, centred=centred)
    torch.testing.assert_close(quadratic.scale, torch.full((4,), 3.0, dtype=torch.float64))
    # Dividing by an ill-conditioned covariance costs digits.
    best = divide(quadratic.metric, quadratic.linear)
    torch.testing.assert_close(best, target, rtol=1e-6, atol=1e-6)
    brightness = estimator.state["brightness"] * (not centred)
    torch.testing.assert_close(
        quadratic.metric.covariance, estimator.metric().covariance + brightness
    )
    assert quadratic.at(target).descent.abs().max() < 1e-8 * quadratic.linear.abs().max()


def test_every_filter_has_a_scale_of_its_own():
    estimator = estimator_for(patches())
    target = torch.randn(3, 1, N, dtype=torch.float64)
    metric, scale = estimator.metric(), torch.tensor([1.0, 10.0, 0.1]).double()
    for kernel in torch.randn(5, 3, 1, N, dtype=torch.float64):
        gradient = scale[:, None, None] * metric.times(kernel - target)
        zero = torch.zeros(3, 1, dtype=torch.float64)
        quadratic = estimator.update_gradient(kernel, gradient, zero, DARK, 0.9, centred=True)
    torch.testing.assert_close(quadratic.scale, scale)


def test_value_and_slope_belong_together():
    estimator = estimator_for(patches(2))
    target = torch.randn(4, 2, N, dtype=torch.float64)
    quadratic, kernel = watch(estimator, target, [2.0] * 4)
    moving = kernel.clone().requires_grad_()
    (slope,) = torch.autograd.grad(quadratic.at(moving).value.sum(), moving)
    torch.testing.assert_close(-slope, quadratic.at(kernel).descent)
    here, there = quadratic.at(kernel), quadratic.at(target)
    gap = here.value - there.value
    torch.testing.assert_close(here.distance(there), quadratic.at(kernel - target).length)
    torch.testing.assert_close(gap, 0.5 * quadratic.at(kernel - target).length.square())


def test_the_metric_serves_every_group_its_own():
    samples = patches(2)
    covariances = torch.stack([samples[:, g].T.cov() for g in range(2)])
    metric = Metric.damped(covariances, 0.0)
    kernels = torch.randn(6, 2, N, dtype=torch.float64)
    for group, part in enumerate(kernels.chunk(2)):
        mine = slice(3 * group, 3 * group + 3)
        torch.testing.assert_close(metric.times(kernels)[mine], part @ covariances[group])
        responses = part @ samples[:, group].T
        spread = responses.var(-1).sum(-1).sqrt()
        length = inner(kernels, metric.times(kernels)).sqrt()
        torch.testing.assert_close(length[mine], spread)
    torch.testing.assert_close(divide(metric, metric.times(kernels)), kernels)
    # Derivatives have an axis more.
    many = torch.randn(6, 2, 5, N, dtype=torch.float64)
    torch.testing.assert_close(metric.times(many)[:, :, 3], metric.times(many[:, :, 3]))


def test_damping_is_a_share_of_the_mean_variance():
    covariance = torch.diag(torch.arange(1.0, 10.0, dtype=torch.float64))[None]
    metric = Metric.damped(covariance, 0.1)
    extra = metric.covariance - covariance
    torch.testing.assert_close(extra[0], 0.5 * torch.eye(N, dtype=torch.float64))
    assert Metric.damped(torch.zeros(1, N, N, dtype=torch.float64), 0.1).inverse().isfinite().all()


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_change_of_scale_is_noticed(factor):
    estimator = estimator_for(patches())
    target = torch.randn(3, 1, N, dtype=torch.float64)
    before, _ = watch(estimator, target, [3.0] * 40)
    torch.testing.assert_close(before.scale, torch.full((3,), 3.0, dtype=torch.float64))
    after, _ = watch(estimator, target, [3.0 * factor] * 60, seed=1)
    # A change of half as much again is not worth forgetting what is known.
    ratio = after.scale / (3.0 * factor)
    assert ((ratio < 1.5) & (ratio > 1 / 1.5)).all(), after.scale


def test_noise_is_no_change_of_scale():
    estimator = estimator_for(patches())
    target = torch.randn(20, 1, N, dtype=torch.float64)
    quadratic, _ = watch(estimator, target, [3.0] * 100, noise=2.0)
    # About 19 moves count, along 9 directions each.
    assert ((quadratic.scale - 3.0).abs() < 1.0).all(), quadratic.scale


def test_the_minimum_is_known_as_well_as_it_says():
    estimator = estimator_for(patches())
    target = torch.randn(400, 1, N, dtype=torch.float64)
    quadratic, _ = watch(estimator, target, [3.0] * 60, noise=2.0, speed=2.0)
    other = target + torch.randn(target.shape, dtype=target.dtype)
    apart = quadratic.at(other - target).length
    truth = 0.5 * apart.square()
    seen = quadratic.at(other).value - quadratic.at(target).value
    errors = (seen - truth) / (quadratic.error * apart)
    # Standard errors, within what running means make of them.
    assert 0.5 < errors.std() < 2.0, errors.std()
    assert (errors.abs() < 3).double().mean() > 0.95


def test_a_target_is_never_believed_to_lie_very_far():
    estimator = estimator_for(patches())
    kernel = torch.randn(2, 1, N, dtype=torch.float64)
    gradient = torch.randn(2, 1, N, dtype=torch.float64)
    zero = torch.zeros(2, 1, dtype=torch.float64)
    quadratic = estimator.update_gradient(kernel, gradient, zero, DARK, 0.9, centred=True)
    # From one gradient nothing is known of the scale.
    away = divide(quadratic.metric, quadratic.linear) - kernel
    assert (quadratic.at(away).length <= 5.001 * quadratic.at(kernel).length).all()


def test_running_means_begin_without_a_bias():
    estimator, (first, second) = QuadraticEstimator({}, 0.0), patches(n=50).chunk(2)
    for half in (first, second):
        estimator.update_covariance(covariance_of(half), 0.9)
    expected = (0.9 * covariance_of(first) + covariance_of(second)) / 1.9
    torch.testing.assert_close(estimator.state["covariance"], expected)


def test_inner_products_are_of_filters():
    one, other = torch.randn(2, 3, 2, N, dtype=torch.float64)
    torch.testing.assert_close(inner(one, other)[1], (one[1] * other[1]).sum())
