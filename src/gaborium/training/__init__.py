"""Networks trained on real images, their Gabor layer beside the ordinary one."""

from gaborium.training.engine import train
from gaborium.training.recipe import Recipe
from gaborium.training.results import TrainResult

__all__ = ["Recipe", "TrainResult", "train"]
