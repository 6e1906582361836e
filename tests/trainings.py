"""Layers, images and training set-ups that several tests of the diagnostics share."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaborium import Gabor2d, GaborConv2d
from gaborium.diagnostics import Finding, Severity, TrainingSetup

PLANTED = Gabor2d.of(orientation=0.8, wavelength=6.0, sigma=2.5)


def white(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@functools.cache
def camera(size: int = 96) -> Tensor:
    data = pytest.importorskip("skimage.data")
    transform = pytest.importorskip("skimage.transform")
    small = transform.resize(data.camera(), (size, size), anti_aliasing=True)
    return torch.tensor(small)[None, None]


def layer_at(params=PLANTED, *args, **kwargs) -> GaborConv2d:
    settings = {"bias": False, "start": params, "dtype": torch.float64} | kwargs
    return GaborConv2d(*(args or (1, 1, 11)), **settings)


def rmse(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target).sqrt()


def planted(layer, inputs: Tensor, loss=F.mse_loss, optimizer=None) -> TrainingSetup:
    """A set-up whose targets are the layer's present outputs."""
    return TrainingSetup(layer, loss, inputs, layer(inputs).detach(), optimizer)


def causes(found) -> dict[str, Severity]:
    return {finding.cause: finding.severity for finding in found.findings}


def finding(found, cause: str) -> Finding:
    return next(one for one in found.findings if one.cause == cause)


def mended(module: nn.Module, remedy: str, inputs=None) -> nn.Module:
    """A copy of the module after a remedy, whose parameters the optimiser then holds."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    setup = TrainingSetup(module, F.mse_loss, inputs, None, optimizer).with_remedy(remedy)
    known = [id(p) for group in setup.optimizer.param_groups for p in group["params"]]
    assert known == [id(p) for p in setup.module.parameters()]
    return setup.module
