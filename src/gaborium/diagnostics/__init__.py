"""Why does it not learn, and what to do: causes found in any layer, loss and training loop."""

from gaborium.diagnostics.findings import Finding, Severity
from gaborium.diagnostics.information import Identifiability, identifiability
from gaborium.diagnostics.landscape import Landscape, Minimum, landscape
from gaborium.diagnostics.losses import OutputLoss
from gaborium.diagnostics.stability import StepLimit, step_limit

__all__ = [
    "Finding",
    "Identifiability",
    "Landscape",
    "Minimum",
    "OutputLoss",
    "Severity",
    "StepLimit",
    "identifiability",
    "landscape",
    "step_limit",
]
