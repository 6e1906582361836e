"""Networks trained on real images, with a Gabor first layer and with an ordinary one.

``recipe`` says how, ``datasets`` on what, ``networks`` which; ``trainer`` is the loop, and
``results`` what it returns.
"""

from gaborium.training.datasets import Dataset, load_dataset
from gaborium.training.networks import SmallCNN, make_first_layer
from gaborium.training.recipe import Recipe
from gaborium.training.results import Mean, Run, Trained, TrainResult, load_trained
from gaborium.training.trainer import train

__all__ = ["Dataset", "Mean", "Recipe", "Run", "SmallCNN", "TrainResult", "Trained"]
__all__ += ["load_dataset", "load_trained", "make_first_layer", "train"]
