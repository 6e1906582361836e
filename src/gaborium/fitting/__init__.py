"""From kernels, or from images and responses, to Gabor parameters.

The output of a convolution is linear in the kernel, and phase and amplitude are linear in it too.
So both problems are one: the kernel ``K(z)`` nearest to a target in a quadratic metric, where only
the geometry z is searched for. ``patches`` reduces images to that metric, ``start`` finds where
to begin, ``solver`` descends, ``result`` holds what was found and how far to trust it. ``shards``
does it for more kernels than memory holds.
"""

from gaborium.fitting.api import fit, recover
from gaborium.fitting.result import FitResult, Outcome
from gaborium.fitting.shards import FitShards, fit_shards

__all__ = ["FitResult", "FitShards", "Outcome", "fit", "fit_shards", "recover"]
