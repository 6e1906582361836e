"""Why does it not learn, and what to do: causes found in any layer, loss and training loop."""

from gaborium.diagnostics.findings import Finding, Severity

__all__ = ["Finding", "Severity"]
