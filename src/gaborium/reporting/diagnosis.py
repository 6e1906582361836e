"""The report of ``gaborium diagnose``: the page, its figures, and the findings as JSON."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from gaborium.diagnostics import (
    Diagnosis,
    Finding,
    GradientCheck,
    Health,
    Identifiability,
    Landscape,
    Severity,
    StepLimit,
    TrainingSetup,
)
from gaborium.errors import require
from gaborium.params import plain
from gaborium.plots import (
    TRAINED,
    plot_identifiability,
    plot_kernels,
    plot_landscape,
    plot_step_limit,
)
from gaborium.reporting.charts import (
    DARK,
    Chart,
    plotly_parts,
    plotly_script,
)
from gaborium.reporting.page import render, versions, write_files
from gaborium.reporting.parts import VERMILION, Figure, figures, half_page, kernels_of, summary
from gaborium.reporting.wording import counted, degrees, number, percent

_JSON_VERSION = 1
_TITLE = "Why does it not learn?"
_N_STEPS = 100  # of a course whose trial did not come to its end
_LONG = 140  # characters of a headline, above which it ends where a bracket begins
_LEARNT = 0.99  # explained share where learning works
_LEAST = 1e-6  # unexplained share, below which a course is not drawn on

# What a number is called, where its name with spaces for underscores would not do.
_WORDS = {
    "basin": "half-width of the basin",
    "change": "change of the loss nearby",
    "condition": "condition of the input",
    "border_area": "share of patches at the border",
    "border_power": "share of the response from the border",
    "drop": "loss to the minimum",
    "exponent": "power with which the slope vanishes",
    "farthest_rad": "farthest there is",
    "filters": "filters concerned",
    "input_rms": "root mean square of the inputs",
    "kernel_norm": "norm of the kernels",
    "limit": "largest step that settles",
    "mean_share": "share of the mean",
    "n_lost": "parameters lost",
    "n_spurious": "worse minima",
    "parameters": "parameters concerned",
    "pull": "slope, as a share of what is needed",
    "share_to_best": "starts that roll down to the best minimum",
    "sharpness": "largest curvature",
    "slope": "slope at the minimum",
    "steepest": "steepest slope",
    "thrown": "one step goes past the minimum by",
    "travel": "way of one step with momentum",
    "white_condition": "condition of white input",
}
_SHARES = ("share", "border_power", "border_area", "mean_share", "largest_share", "share_to_best")
_COUNTS = ("filters", "filter", "parameters", "pairs", "negative_pairs")
_TRIAL = ("explained_without_remedy", "explained_with_remedy", "loss_without_remedy",
          "loss_with_remedy")  # fmt: skip


class Course(NamedTuple):
    """How learning goes, step by step.

    Args:
        values: before each step and after the last; NaN where it broke down.
        is_share: whether they are the share of the targets' variance that is not explained;
            otherwise they are the loss.
    """

    values: list[float]
    is_share: bool


class Entry(NamedTuple):
    """A finding as the page shows it.

    Args:
        found: the finding.
        numbers: names and values in words.
        tried: what became of its remedy, or ``""``.
        course: chart of the training without and with the remedy, or ``None``.
        figures: of the part that it rests on.
        part: the name of that part, or ``""``.
    """

    found: Finding
    numbers: list[tuple[str, str]]
    tried: str
    course: Chart | None
    figures: list[Figure]
    part: str


# -- words ------------------------------------------------------------------------------------


def diagnosis_headline(diagnosis: Diagnosis) -> str:
    """What was found, in one sentence: that of the first finding, if it stands in the way.

    Example:
        >>> from gaborium.diagnostics import TrainingSetup
        >>> layer = torch.nn.Linear(1, 1)
        >>> diagnosis_headline(
        ...     Diagnosis([], {}, {}, [], (0.0, 1.0), TrainingSetup(layer, print, 0, 0))
        ... )
        'Nothing was found that stands in the way of learning.'
    """
    findings = diagnosis.findings
    if not findings or findings[0].severity is Severity.NOTE:
        notes = f"; {counted(len(findings), 'note')}" if findings else ""
        return f"Nothing was found that stands in the way of learning{notes}."
    # Up to the first full stop that ends a sentence: numbers hold others.
    first = re.split(r"(?<=\w\.)\s+(?=[A-ZΑ-Ω])", findings[0].sentence, maxsplit=1)[0]
    told, _, more = first.partition(" (")
    return f"{told}." if len(first) > _LONG and more else first


def worded_numbers(finding: Finding) -> list[tuple[str, str]]:
    """What a finding rests on, with names and units for a reader; trials are told apart.

    Example:
        >>> worded_numbers(Finding("x", Severity.NOTE, "", {"distance_rad": 1.0, "pairs": 2.0}))
        [('distance', '57.3°'), ('pairs', '2')]
    """
    return [
        (_name(name), _value(name, value))
        for name, value in finding.numbers.items()
        if name not in _TRIAL and not (isinstance(value, float) and math.isnan(value))
    ]


def trial_sentence(finding: Finding) -> str:
    """What became of a remedy when it was tried, or ``""``.

    Example:
        >>> numbers = {"explained_without_remedy": 0.1, "explained_with_remedy": 0.9995}
        >>> trial_sentence(Finding("x", Severity.SEVERE, "", numbers))
        "Tried: with the remedy 99.95 % of the targets' variance is explained, without it 10.0 %."
    """
    numbers = finding.numbers
    without, with_it = (numbers.get(name) for name in _TRIAL[:2])
    if without is not None and with_it is not None:
        return (
            f"Tried: with the remedy {_explained(with_it)} of the targets' variance is explained, "
            f"without it {_explained(without)}."
        )
    without, with_it = (numbers.get(name) for name in _TRIAL[2:])
    if without is not None and with_it is not None:
        return (
            f"Tried: with the remedy the loss ends at {number(with_it, 3)}, without it at "
            f"{number(without, 3)}."
        )
    return ""


def joint_advice(diagnosis: Diagnosis) -> str:
    """What to do where no remedy was enough alone, or ``""``.

    Example:
        >>> joint_advice(
        ...     Diagnosis([], {}, {}, [], (0.0, 1.0), TrainingSetup(torch.nn.ReLU(), print, 0, 0))
        ... )
        ''
    """
    if diagnosis.combined_remedies:
        numbers = [
            str(diagnosis.findings.index(found) + 1) for found in diagnosis.combined_remedies
        ]
        listed = ", ".join(numbers[:-1]) + " and " + numbers[-1]
        return (
            f"No remedy was enough alone; those of {listed}, one after the other, are: "
            "diagnosis.with_remedy() carries them out."
        )
    reached = [
        found.numbers["explained_with_remedy"]
        for found in diagnosis.severe
        if "explained_with_remedy" in found.numbers
    ]
    if len(reached) < 2 or any(share > _LEARNT for share in reached):
        return ""
    return (
        "No remedy was enough alone: there is more than one fault. Carry them out one after the "
        "other, and diagnose what remains."
    )


def _name(name: str) -> str:
    if name in _WORDS:
        return _WORDS[name]
    return name.removesuffix("_rad").removesuffix("_px").removeprefix("n_").replace("_", " ")


def _value(name: str, value: float) -> str:
    if not isinstance(value, (int, float)):
        return str(value)
    if name.endswith("_rad"):
        return degrees(value, 3)
    if name in _SHARES and math.isfinite(value):
        return percent(value)
    if name == "exponent":
        return f"{value:.2f}"
    if (name in _COUNTS or name.startswith("n_")) and abs(value) < 1e6 and value == int(value):
        return str(int(value))
    return number(value, 3) + (" px" if name.endswith("_px") else "")


def _explained(value: float) -> str:
    return "nothing" if math.isnan(value) or value <= 0 else percent(value)


def _trial(diagnosis: Diagnosis) -> str:
    """How the set-up did when it was tried as it is."""
    losses, (before, after) = diagnosis.losses, diagnosis.explained
    if not losses:
        return ""
    steps = counted(len(losses) - 1, "step")
    told = f"The loss went from {number(losses[0], 3)} to {number(losses[-1], 3)} in {steps}"
    if math.isnan(after) and math.isnan(before):
        return f"{told}."
    return (
        f"{told}; of the targets' variance {_explained(before)} was explained before, and "
        f"{_explained(after)} after."
    )


# -- JSON, page, files ------------------------------------------------------------------------


def diagnosis_record(diagnosis: Diagnosis, *, facts: Mapping[str, str]) -> dict[str, Any]:
    """All that was found, as plain objects for JSON.

    Convention:
        - angles are in rad, lengths in px
        - numbers that JSON does not have are the texts ``inf``, ``-inf`` and ``nan``

    Args:
        diagnosis: from ``gaborium.diagnostics.diagnose``.
        facts: what was examined, by name, such as the script.

    Returns:
        ``format``, ``version``, ``facts``, ``versions``, ``headline``, what
        ``Diagnosis.to_json`` gives, and ``parts`` with a kind and a sentence for each.

    Example:
        >>> from gaborium.diagnostics import TrainingSetup
        >>> setup = TrainingSetup(torch.nn.Linear(1, 1), print, 0, 0)
        >>> record = diagnosis_record(Diagnosis([], {}, {}, [], (0.0, 1.0), setup), facts={})
        >>> record["headline"]
        'Nothing was found that stands in the way of learning.'
    """
    return plain(
        {
            "format": "gaborium.diagnosis",
            "version": _JSON_VERSION,
            "facts": dict(facts),
            "versions": versions(),
            "headline": diagnosis_headline(diagnosis),
            **diagnosis.to_json(),
            "parts": {
                name: {
                    "kind": type(part).__name__,
                    "sentence": summary(part),
                    **({"table": part.to_table()} if _has_table(part) else {}),
                }
                for name, part in diagnosis.parts.items()
            },
        }
    )


def _has_table(part: Any) -> bool:
    return isinstance(part, (GradientCheck, Health))


def report_diagnosis(diagnosis: Diagnosis, *, title: str = _TITLE, facts: Mapping[str, str]) -> str:
    """Write the page: the answer, the findings with figures and remedies, what was looked at.

    The page is one file that opens without a network: it refers to nothing outside itself, and
    forbids the browser to. Whatever the diagnosis, ``title`` and ``facts`` hold is shown as text.
    The set-up is trained again, on copies, with each remedy that ``diagnose`` tried, for the
    curves.

    Args:
        diagnosis: from ``gaborium.diagnostics.diagnose``.
        title: of the page.
        facts: what was examined, by name, such as the script.

    Returns:
        HTML.

    Raises:
        ImportError: Jinja2, plotly or matplotlib is not installed.

    Example:
        >>> from gaborium import GaborConv2d
        >>> from gaborium.diagnostics import diagnose
        >>> layer, image = GaborConv2d(1, 2, 7, seed=0), torch.rand(1, 1, 16, 16)
        >>> data = image, torch.zeros(1, 2, 10, 10)
        >>> found = diagnose(layer, torch.nn.functional.mse_loss, data, n_steps=3)
        >>> page = report_diagnosis(found, facts={"script": "<mine>"})
        >>> "&lt;mine&gt;" in page, "What was looked at" in page
        (True, True)
    """
    courses = _Courses(diagnosis)
    shown: set[str] = set()
    entries = [_entry(diagnosis, i, courses, shown) for i in range(len(diagnosis.findings))]
    rest = {
        name: figures(diagnosis, name, None, f"part-{i}")
        for i, name in enumerate(diagnosis.parts)
        if name not in shown
    }
    counts = {
        severity.name: sum(found.severity is severity for found in diagnosis.findings)
        for severity in Severity
    }
    before, after = diagnosis.explained
    return render(
        "diagnosis.html.j2",
        {"coded": _coded},
        title=title,
        facts=facts,
        headline=diagnosis_headline(diagnosis),
        entries=entries,
        counts=counts,
        meanings={severity.name: severity.value for severity in Severity},
        trial=" ".join(filter(None, (_trial(diagnosis), joint_advice(diagnosis)))),
        course_caption=(
            "Each from the same start, on copies. Drawn is the loss of each."
            if math.isnan(diagnosis.explained[0])
            else "Each from the same start, on copies. Drawn is the share of the targets' variance "
            "that is left unexplained, whatever the loss, down to a millionth."
        ),
        before=before,
        after=after,
        parts=[(name, summary(part), rest.get(name, [])) for name, part in diagnosis.parts.items()],
        skipped=diagnosis.skipped,
        dark=DARK,
        plotly=plotly_script(),
    )


def write_diagnosis(
    diagnosis: Diagnosis,
    folder: str | os.PathLike[str],
    *,
    title: str = _TITLE,
    facts: Mapping[str, str],
) -> tuple[str, ...]:
    """Write the findings as JSON, as a page, and the figures of the parts.

    Args:
        diagnosis: from ``gaborium.diagnostics.diagnose``.
        folder: where to; it exists, and files of the same names are replaced.
        title: of the page.
        facts: what was examined, by name, such as the script.

    Returns:
        The names of the files: ``report.html``, ``diagnosis.json`` and a PNG for each part that
        has a figure.

    Raises:
        FileNotFoundError: there is no such folder; told before any work is done.
        OSError: a file cannot be written, with the reason.
        ImportError: Jinja2, plotly or matplotlib is not installed.
    """

    def contents() -> Iterator[tuple[str, Any]]:
        record = diagnosis_record(diagnosis, facts=facts)
        yield "report.html", report_diagnosis(diagnosis, title=title, facts=facts)
        yield (
            "diagnosis.json",
            json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n",
        )
        drawn: list[str] = []
        for name, part in diagnosis.parts.items():
            if (draw := _plot_of(diagnosis, name, part)) is not None:
                again = f"-{len(drawn)}" if _slug(name) in drawn else ""
                drawn.append(f"{_slug(name)}{again}")
                yield f"{drawn[-1]}.png", draw()

    return write_files(folder, contents())


def _coded(sentence: str) -> Any:
    """The sentence with what stands in backticks set as code, all else as text."""
    markupsafe = require("markupsafe", extra="report", purpose="Reports")
    parts = sentence.split("`")
    if len(parts) % 2 == 0:  # one of them has no other
        return markupsafe.escape(sentence)
    pieces = [
        markupsafe.Markup("<code>{}</code>").format(part) if i % 2 else markupsafe.escape(part)
        for i, part in enumerate(parts)
    ]
    return markupsafe.Markup("").join(pieces)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "part"


def _plot_of(diagnosis: Diagnosis, name: str, part: Any) -> Callable[[], Any] | None:
    """What draws a part as a figure for a paper, if something does."""
    if isinstance(part, Landscape):
        return lambda: plot_landscape(part)
    if isinstance(part, StepLimit):
        return lambda: plot_step_limit(part)
    if isinstance(part, Identifiability):
        return lambda: plot_identifiability(part)
    if isinstance(part, Health):
        kernels = kernels_of(diagnosis, name)
        if kernels is not None and kernels.ndim == 4:
            return lambda: plot_kernels(kernels)
    return None


# -- findings ---------------------------------------------------------------------------------


def _entry(diagnosis: Diagnosis, index: int, courses: _Courses, shown: set[str]) -> Entry:
    found = diagnosis.findings[index]
    part = _part_of(found, diagnosis.parts)
    shown_here: list[Figure] = []
    if part and (part not in shown or isinstance(diagnosis.parts[part], Health)):
        shown_here = figures(diagnosis, part, found, f"finding-{index}")
        if not isinstance(diagnosis.parts[part], Health):  # of all filters some
            shown.add(part)
    return Entry(
        found,
        worded_numbers(found),
        trial_sentence(found),
        courses.chart(found, f"course-{index}"),
        shown_here,
        part,
    )


def _part_of(found: Finding, parts: Mapping[str, Any]) -> str:
    """The part that a finding rests on; its place decides between parts of the same cause."""
    named = [
        (name, one)
        for name, part in parts.items()
        for one in getattr(part, "findings", [])
        if one.cause == found.cause
    ]
    exact = [name for name, one in named if one.sentence == found.sentence]
    return next(iter([*exact, *(name for name, _ in named)]), "")


class _Courses:
    """Training of the set-up as it is and with remedies, each only once."""

    def __init__(self, diagnosis: Diagnosis) -> None:
        self.diagnosis = diagnosis
        losses = diagnosis.losses
        whole = len(losses) > 1 and math.isfinite(losses[-1])
        self.n_steps = len(losses) - 1 if whole else _N_STEPS
        self._without: Course | None = None

    def chart(self, found: Finding, name: str) -> Chart | None:
        """Both courses in one chart, where a remedy was tried."""
        if not any(number in found.numbers for number in _TRIAL):
            return None
        try:
            with_remedy = _course(self.diagnosis.with_remedy(found), self.n_steps)
        except Exception:  # somebody else's module; diagnose has said what there is to say
            return None
        if self._without is None:
            self._without = _course(self.diagnosis.setup, self.n_steps)
        return _course_chart(name, self._without, with_remedy)


def _course(setup: TrainingSetup, n_steps: int) -> Course:
    """Train a copy: of a regression the share that stays unexplained, of others the loss."""
    own = setup.copy()
    with torch.random.fork_rng():
        if math.isnan(own.explained()):
            losses = own.train(n_steps)
            return Course(losses + [math.nan] * (n_steps + 1 - len(losses)), is_share=False)
        values = [1 - own.explained()]
        while len(values) <= n_steps:
            goes_on = all(map(math.isfinite, own.train(1)))
            values.append(1 - own.explained() if goes_on else math.nan)
    return Course(values, is_share=True)


def _course_chart(name: str, without: Course, with_remedy: Course) -> Chart | None:
    if without.is_share != with_remedy.is_share:
        return None
    objects, _ = plotly_parts()
    figure = objects.Figure()
    positive = True
    for course, label, color, width in (
        (without, "as it is", VERMILION, 2),
        (with_remedy, "with the remedy", TRAINED, 3),
    ):
        # Below rounding there is nothing to see, and a logarithm has no place for 0.
        values = [max(v, _LEAST) if course.is_share else v for v in course.values]
        shown = [v if math.isfinite(v) else None for v in values]
        positive &= all(v is None or v > 0 for v in shown)
        figure.add_trace(
            objects.Scatter(
                x=list(range(len(shown))), y=shown, name=label, mode="lines",
                line={"color": color, "width": width},
                hovertemplate=f"{label}<br>step %{{x}}: %{{y:.3g}}<extra></extra>",
            )
        )  # fmt: skip
    what = "unexplained share" if without.is_share else "loss"
    figure.update_xaxes(title_text="step", rangemode="tozero")
    figure.update_yaxes(title_text=what)
    if positive:
        figure.update_yaxes(type="log", exponentformat="power", dtick=1 if _wide(figure) else None)
    return Chart(
        name,
        f"{what.capitalize()} against the step, without and with the remedy",
        half_page(figure),
    )


def _wide(figure: Any) -> bool:
    values = [v for trace in figure.data for v in trace.y if v]
    return bool(values) and max(values) / min(values) > 1e2
