"""Networks trained on real images, their Gabor layer beside the ordinary one.

``recipe`` says how, ``engine`` follows it on any number of processes, ``trainer`` is one run of it,
with ``checkpoints`` and a ``journal`` that survive kills, and ``results`` is what comes out;
``trained`` is the networks themselves.
``datasets``, ``augmentations``, ``corruptions`` and ``networks`` are what it is made of.
"""

from gaborium.training.augmentations import augment
from gaborium.training.checkpoints import Checkpoints, load_state, save_state
from gaborium.training.corruptions import corrupt
from gaborium.training.datasets import Dataset, load_dataset
from gaborium.training.engine import train
from gaborium.training.networks import build_network, make_first_layer
from gaborium.training.recipe import Recipe
from gaborium.training.results import Mean, Run, TrainResult
from gaborium.training.trained import Inputs, Trained, load_trained

__all__ = [
    "Checkpoints",
    "Dataset",
    "Inputs",
    "Mean",
    "Recipe",
    "Run",
    "TrainResult",
    "Trained",
    "augment",
    "build_network",
    "corrupt",
    "load_dataset",
    "load_state",
    "load_trained",
    "make_first_layer",
    "save_state",
    "train",
]
