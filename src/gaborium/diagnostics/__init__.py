"""Why does it not learn, and what to do: causes found in any layer, loss and training loop."""

from gaborium.diagnostics.findings import Finding, Severity
from gaborium.diagnostics.gradients import GradientCheck, ParameterCheck, check_gradients
from gaborium.diagnostics.mending import replace_by_gabor

__all__ = [
    "Finding",
    "GradientCheck",
    "ParameterCheck",
    "Severity",
    "check_gradients",
    "replace_by_gabor",
]
