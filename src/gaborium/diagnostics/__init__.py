"""Why does it not learn, and what to do: causes found in any layer, loss and training loop."""

from gaborium.diagnostics.causes import Finding, Severity
from gaborium.diagnostics.diagnosis import Diagnosis, diagnose, diagnose_filters
from gaborium.diagnostics.filters import Duplicate, Health, health, reinitialize_filters
from gaborium.diagnostics.gradients import GradientCheck, ParameterCheck, check_gradients
from gaborium.diagnostics.identifiability import Identifiability, identifiability
from gaborium.diagnostics.landscape import Landscape, Minimum, landscape
from gaborium.diagnostics.recorder import Recorder, watch
from gaborium.diagnostics.remedies import rebuild_layer, replace_by_gabor
from gaborium.diagnostics.sandbox import TrainingSetup
from gaborium.diagnostics.step_size import StepLimit, step_limit

__all__ = [
    "Diagnosis",
    "Duplicate",
    "Finding",
    "GradientCheck",
    "Health",
    "Identifiability",
    "Landscape",
    "Minimum",
    "ParameterCheck",
    "Recorder",
    "Severity",
    "StepLimit",
    "TrainingSetup",
    "check_gradients",
    "diagnose",
    "diagnose_filters",
    "health",
    "identifiability",
    "landscape",
    "rebuild_layer",
    "reinitialize_filters",
    "replace_by_gabor",
    "step_limit",
    "watch",
]
