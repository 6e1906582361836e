"""Reports: what was found, as a page to read, figures to print and JSON to compute with.

``recovery`` is the page of an experiment with a planted kernel, with its words in ``wording`` and
its charts in ``charts``; ``fits`` is the page of kernels and the Gabor functions nearest to them,
``census`` that of what the kernels are, and ``conversion`` of what became of them; ``diagnosis`` is
that of a training loop that does not learn; ``training`` is that of networks which do. ``index``
lists the runs of a folder, and ``page`` is what all of them need.
"""

from gaborium.reporting.census import (
    census_headline,
    census_record,
    report_census,
    write_census,
)
from gaborium.reporting.conversion import (
    conversion_headline,
    conversion_record,
    conversion_sentences,
    report_conversion,
    write_conversion,
)
from gaborium.reporting.diagnosis import (
    diagnosis_headline,
    diagnosis_record,
    joint_advice,
    report_diagnosis,
    trial_sentence,
    worded_numbers,
    write_diagnosis,
)
from gaborium.reporting.fits import fit_headline, fit_record, fit_summary, report_fit, write_fit
from gaborium.reporting.index import write_index
from gaborium.reporting.recovery import recovery_record, report_recovery, write_recovery
from gaborium.reporting.training import (
    in_percent,
    report_training,
    training_headline,
    training_record,
    training_sentences,
    write_training,
)
from gaborium.reporting.wording import headline, outcome_sentences, percent

__all__ = [
    "census_headline",
    "census_record",
    "conversion_headline",
    "conversion_record",
    "conversion_sentences",
    "diagnosis_headline",
    "diagnosis_record",
    "fit_headline",
    "fit_record",
    "fit_summary",
    "headline",
    "in_percent",
    "joint_advice",
    "outcome_sentences",
    "percent",
    "recovery_record",
    "report_census",
    "report_conversion",
    "report_diagnosis",
    "report_fit",
    "report_recovery",
    "report_training",
    "training_headline",
    "training_record",
    "training_sentences",
    "trial_sentence",
    "worded_numbers",
    "write_census",
    "write_conversion",
    "write_diagnosis",
    "write_fit",
    "write_index",
    "write_recovery",
    "write_training",
]
