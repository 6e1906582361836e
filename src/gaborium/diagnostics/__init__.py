"""Why does it not learn, and what to do: causes found in any layer, loss and training loop."""

from gaborium.diagnostics.findings import Finding, Severity
from gaborium.diagnostics.landscape import Landscape, Minimum, landscape
from gaborium.diagnostics.losses import OutputLoss
from gaborium.diagnostics.stability import StepLimit, step_limit

__all__ = [
    "Finding",
    "Landscape",
    "Minimum",
    "OutputLoss",
    "Severity",
    "StepLimit",
    "landscape",
    "step_limit",
]
