"""Why does it not learn, and what to do: causes found in any layer, loss and training loop."""

from gaborium.diagnostics.filters import Duplicate, Health, health, reseed
from gaborium.diagnostics.findings import Finding, Severity
from gaborium.diagnostics.gradients import GradientCheck, ParameterCheck, check_gradients
from gaborium.diagnostics.mending import replace_by_gabor
from gaborium.diagnostics.recorder import Recorder, watch

__all__ = [
    "Duplicate",
    "Finding",
    "GradientCheck",
    "Health",
    "ParameterCheck",
    "Recorder",
    "Severity",
    "check_gradients",
    "health",
    "replace_by_gabor",
    "reseed",
    "watch",
]
