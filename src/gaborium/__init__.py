"""Convolution layers whose kernels are Gabor functions with learned parameters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where the public names are defined. They are imported when first used, so that the command line
# can answer --help without loading torch.
_NAMES = {
    "functions.params": "Gabor1d Gabor2d Gabor3d",
    "functions.kernels": "gabor gabor_jacobian gabor_spectrum quadrature_pair dc_response "
    "bandwidth_from_sigma sigma_from_bandwidth suggest_kernel_size",
    "starts": "mel_bank",
    "layers": "GaborConv1d GaborConv2d GaborConv3d MixedConv",
    "fitting": "FitResult Outcome fit fit_shards recover",
    "conversion": "Census Conversion census convert",
    "training": "Recipe TrainResult train",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
_MODULES = ("diagnostics", "interop", "optim", "storage", "training")

if TYPE_CHECKING:
    from gaborium import diagnostics as diagnostics
    from gaborium import interop as interop
    from gaborium import optim as optim
    from gaborium import storage as storage
    from gaborium import training as training
    from gaborium.conversion.census import Census as Census
    from gaborium.conversion.census import census as census
    from gaborium.conversion.convert import Conversion as Conversion
    from gaborium.conversion.convert import convert as convert
    from gaborium.fitting import FitResult as FitResult
    from gaborium.fitting import Outcome as Outcome
    from gaborium.fitting import fit as fit
    from gaborium.fitting import fit_shards as fit_shards
    from gaborium.fitting import recover as recover
    from gaborium.functions.kernels import bandwidth_from_sigma as bandwidth_from_sigma
    from gaborium.functions.kernels import dc_response as dc_response
    from gaborium.functions.kernels import gabor as gabor
    from gaborium.functions.kernels import gabor_jacobian as gabor_jacobian
    from gaborium.functions.kernels import gabor_spectrum as gabor_spectrum
    from gaborium.functions.kernels import quadrature_pair as quadrature_pair
    from gaborium.functions.kernels import sigma_from_bandwidth as sigma_from_bandwidth
    from gaborium.functions.kernels import suggest_kernel_size as suggest_kernel_size
    from gaborium.functions.params import Gabor1d as Gabor1d
    from gaborium.functions.params import Gabor2d as Gabor2d
    from gaborium.functions.params import Gabor3d as Gabor3d
    from gaborium.layers import GaborConv1d as GaborConv1d
    from gaborium.layers import GaborConv2d as GaborConv2d
    from gaborium.layers import GaborConv3d as GaborConv3d
    from gaborium.layers import MixedConv as MixedConv
    from gaborium.starts import mel_bank as mel_bank
    from gaborium.training import Recipe as Recipe
    from gaborium.training import TrainResult as TrainResult
    from gaborium.training import train as train

__all__ = ["__version__", *_HOMES, *_MODULES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gaborium' has no attribute {name!r}")
    module = importlib.import_module(f"gaborium.{_HOMES.get(name, name)}")
    value = getattr(module, name) if name in _HOMES else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
