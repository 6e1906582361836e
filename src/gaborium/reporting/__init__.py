"""Reports: what an experiment found, as a page to read, figures to print and JSON to compute with.

``wording`` says it in words and numbers, ``charts`` draws it for the page, ``recovery`` puts the
page together and writes the files.
"""

from gaborium.reporting.recovery import recovery_record, report_recovery, write_recovery
from gaborium.reporting.wording import headline, outcome_sentences

__all__ = [
    "headline",
    "outcome_sentences",
    "recovery_record",
    "report_recovery",
    "write_recovery",
]
