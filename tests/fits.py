"""Planted Gabor functions and comparisons, for the tests of fits."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from gaborium import FitResult, gabor
from gaborium.functions.params import RECORDS, Gabor

F64 = torch.float64
SHARED = {"geometry": "filter"}


def planted(
    n_dims: int, *shape: int, channels: int = 0, center: float = 0.0, seed: int = 0, **fixed: float
) -> Gabor:
    """Gabor functions like those of first layers; with channels, one geometry per row."""
    generator = torch.Generator().manual_seed(seed)
    wide = (*shape[:-1], channels) if channels else shape

    def uniform(low: float, high: float, *sizes: int) -> Tensor:
        return low + (high - low) * torch.rand(sizes, generator=generator, dtype=F64)

    values = {
        "orientation": uniform(0, math.pi, *shape),
        "elevation": uniform(-1.5, 1.5, *shape),
        "wavelength": uniform(3, 8, *shape),
        "phase": uniform(-math.pi, math.pi, *wide),
        "sigma": uniform(1.2, 2.5, *shape),
        "aspect_ratio": uniform(0.6, 1.5, *shape),
        "amplitude": uniform(0.5, 2, *wide),
        "center": uniform(-center, center, *shape, n_dims),
    }
    values |= {name: torch.full_like(values[name], value) for name, value in fixed.items()}
    record = RECORDS[n_dims]
    return record(**{name: values[name] for name in record.field_names()})


def number(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, of another seed than the parameters."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed), dtype=F64)


def rms(kernels: Tensor) -> Tensor:
    """Root mean square of each kernel of two dimensions."""
    return kernels.square().mean((-2, -1), keepdim=True).sqrt()


def with_noise(kernels: Tensor, share: float, seed: int = 0) -> Tensor:
    """Add white noise, with a standard deviation that is a share of each kernel's rms."""
    return kernels + share * rms(kernels) * drawn(*kernels.shape, seed=seed)


def grid(size: int) -> tuple[Tensor, Tensor]:
    """x and y of every pixel, from the middle."""
    u = torch.arange(size, dtype=F64) - (size - 1) / 2
    return u.expand(size, size), u[:, None].expand(size, size)


def kernel_errors(result: FitResult, kernels: Tensor, n_dims: int = 2) -> Tensor:
    """Distance from the wanted kernels, as a share of them."""
    found = gabor(result.params, tuple(kernels.shape[-n_dims:])).reshape(kernels.shape)
    return (found - kernels).flatten(1).norm(dim=1) / kernels.flatten(1).norm(dim=1)


def assert_same_parameters(found: Gabor, wanted: Gabor, atol: float = 1e-6) -> None:
    for name, error in found.difference(wanted).items():
        assert error.abs().max() < atol, name


def assert_same(found: FitResult, wanted: FitResult, atol: float = 1e-6) -> None:
    """The same outcomes, parameters, standard errors and explained shares."""
    assert found.outcome == wanted.outcome
    assert_same_parameters(found.params, wanted.params, atol)
    torch.testing.assert_close(found.standard_error, wanted.standard_error, rtol=1e-4, atol=atol)
    torch.testing.assert_close(found.explained_variance, wanted.explained_variance)


def scores(result: FitResult, params: Gabor) -> Tensor:
    """Errors in units of the standard error: a row for every field but the centre."""
    errors = result.params.difference(params)
    names = [name for name in params.field_names() if name != "center"]
    return torch.stack([errors[name] / result.standard_error[name] for name in names])


def assert_errors_as_stated(result: FitResult, params: Gabor) -> None:
    """Of 300 kernels, the share within has a standard deviation of 0.027, their mean of less."""
    within = (scores(result, params).abs() < 1).double().flatten(1).mean(1)
    assert ((within - 0.683).abs() < 0.06).all(), within
    assert within.mean().item() == pytest.approx(0.683, abs=0.04)


def assert_refused(call: Any, *args: Any, message: str, **options: Any) -> None:
    """In one line that begins with ``message``."""
    with pytest.raises(ValueError, match="^" + re.escape(message)) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
