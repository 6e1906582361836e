"""From kernels, or from images and responses, to Gabor parameters.

The output of a convolution is linear in the kernel, and phase and amplitude are linear in it too.
So both problems are one: find the kernel ``K(z)`` nearest to a target in a quadratic metric, by a
search over the geometry z. ``gaborium.patches`` reduces images to that metric, ``start`` finds
where to begin, ``solver`` descends, ``search`` decides how many starts are followed, ``judgement``
turns ends into outcomes and errors. ``shards`` does it for more kernels than memory holds.
"""

from gaborium.fitting.api import fit, recover
from gaborium.fitting.result import FitResult, Outcome
from gaborium.fitting.shards import fit_shards

__all__ = ["FitResult", "Outcome", "fit", "fit_shards", "recover"]
