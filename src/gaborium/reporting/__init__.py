"""Reports: what was found, as a page to read, figures to print and JSON to compute with.

``recovery`` is the page of an experiment with a planted kernel, with its words in ``wording`` and
its charts in ``charts``; ``fits`` is the page of kernels and the Gabor functions nearest to them.
``page`` is what both need.
"""

from gaborium.reporting.fits import (
    fit_headline,
    fit_record,
    fit_summary,
    percent,
    report_fit,
    write_fit,
)
from gaborium.reporting.recovery import recovery_record, report_recovery, write_recovery
from gaborium.reporting.wording import headline, outcome_sentences

__all__ = [
    "fit_headline",
    "fit_record",
    "fit_summary",
    "headline",
    "outcome_sentences",
    "percent",
    "recovery_record",
    "report_fit",
    "report_recovery",
    "write_fit",
    "write_recovery",
]
