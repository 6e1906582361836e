"""What a training returns: accuracies with standard errors, and what became of the filters."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from gaborium.params import RECORDS, Gabor, plain
from gaborium.training.recipe import Recipe

_FORMAT = 1


class Mean(NamedTuple):
    """A mean over seeds with its standard error.

    Args:
        mean: ``nan`` of no values.
        standard_error: ``nan`` of fewer than two values.
        n: how many values.
    """

    mean: float
    standard_error: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> Mean:
        """Of some values.

        Example:
            >>> Mean.of([0.5, 1.0])
            Mean(mean=0.75, standard_error=0.25, n=2)
        """
        n = len(values)
        error = statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
        return cls(statistics.fmean(values) if values else math.nan, error, n)


@dataclass(frozen=True, eq=False)
class Run:
    """One trained network: of one first layer and one seed.

    Args:
        variant: kind of its first layer.
        seed: of its start, its samples and their order.
        accuracy: share of the test images told right, at the end; ``None`` if it was stopped.
        corrupted: for each kind of corruption the accuracy at strengths 1 to 5.
        accuracy_reset: the same as ``accuracy``, when only the Gabor filters are put back to
            where they started; ``None`` where none learns.
        n_first_parameters: numbers that the first layer learns.
        n_parameters: numbers that the whole network learns.
        curve: what was measured after some of the epochs, 0 is before the first: ``epoch``,
            ``step``, ``loss`` and ``accuracy`` over the epoch's training images, ``test_loss``,
            ``test_accuracy``, ``displacement``.
        epochs: after which the snapshots below were taken.
        kernels: of the first layer then: ``(snapshots, filters, channels, *size)``, at
            most 64 filters.
        params: Gabor parameters then, ``(snapshots, filters, channels or 1)``; ``None``
            of a free layer.
        seconds: spent in training and evaluation.
        stopped: empty, or a line that says why it was stopped.
    """

    variant: str
    seed: int
    accuracy: float | None
    corrupted: dict[str, list[float]]
    accuracy_reset: float | None
    n_first_parameters: int
    n_parameters: int
    curve: list[dict[str, Any]]
    epochs: list[int]
    kernels: Tensor
    params: Gabor | None
    seconds: float
    stopped: str = ""

    @property
    def start(self) -> Gabor | None:
        """The Gabor parameters before training: ``(filters, channels or 1)``."""
        return None if self.params is None else _at(self.params, 0)

    @property
    def end(self) -> Gabor | None:
        """The Gabor parameters after training, as ``start``."""
        return None if self.params is None else _at(self.params, -1)

    @property
    def displacement(self) -> dict[str, float]:
        """Median distance over the filters of every field from its start; empty if free."""
        return dict(self.curve[-1]["displacement"]) if self.curve else {}

    def to_state(self) -> dict[str, Any]:
        """The run as nested dicts, which ``save_state`` writes and ``from_state`` reads."""
        state = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        if self.params is not None:
            state["params"] = {"n_dims": self.params.n_dims, **self.params.as_dict()}
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Run:
        """The inverse of ``to_state``."""
        fields = dict(state)
        if fields["params"] is not None:
            params = dict(fields["params"])
            fields["params"] = RECORDS[params.pop("n_dims")](**params)
        return cls(**fields)

    def to_record(self) -> dict[str, Any]:
        """The run as plain objects for JSON, without the snapshots between start and end."""
        left_out = ("kernels", "params", "epochs")
        record = {
            one.name: getattr(self, one.name)
            for one in dataclasses.fields(self)
            if one.name not in left_out
        }
        for name, params in (("start", self.start), ("end", self.end)):
            record[name] = None if params is None else json.loads(params.to_json())
        record["displacement"] = self.displacement
        return record


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What ``train`` found: every run, and means over the seeds.

    Args:
        recipe: that was followed.
        runs: for each first layer of the recipe one for each seed.
        data: what it was trained on: ``name``, ``n_train``, ``n_test``, ``n_classes``,
            ``image_size``, ``n_channels``, ``sha256``.
    """

    recipe: Recipe
    runs: tuple[Run, ...]
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def variants(self) -> tuple[str, ...]:
        """Kinds of first layer, in the recipe's order."""
        return tuple(dict.fromkeys(run.variant for run in self.runs))

    def runs_of(self, variant: str) -> tuple[Run, ...]:
        """The runs of one kind of first layer."""
        return tuple(run for run in self.runs if run.variant == variant)

    def accuracy(self, variant: str) -> Mean:
        """Test accuracy over the seeds; runs that were stopped have none."""
        return _mean([run.accuracy for run in self.runs_of(variant)])

    def accuracy_reset(self, variant: str) -> Mean:
        """Test accuracy with the Gabor filters put back to their start."""
        return _mean([run.accuracy_reset for run in self.runs_of(variant)])

    def learning_gain(self, variant: str) -> Mean:
        """What the accuracy loses when the Gabor filters are put back, seed by seed."""
        return _mean(
            [
                run.accuracy - run.accuracy_reset
                for run in self.runs_of(variant)
                if run.accuracy is not None and run.accuracy_reset is not None
            ]
        )

    def difference(self, variant: str, other: str) -> Mean:
        """How much more accurate one first layer is than another, seed by seed.

        Both variants of a seed have the same samples in the same order, so that differences vary
        less than the accuracies.
        """
        theirs = {run.seed: run.accuracy for run in self.runs_of(other)}
        pairs = [(run.accuracy, theirs.get(run.seed)) for run in self.runs_of(variant)]
        return _mean([a - b for a, b in pairs if a is not None and b is not None])

    def corrupted(self, variant: str, kind: str) -> tuple[Mean, ...]:
        """Accuracy under a kind of corruption, at strengths 1 to 5."""
        rows = [run.corrupted[kind] for run in self.runs_of(variant) if kind in run.corrupted]
        return tuple(_mean(list(values)) for values in zip(*rows, strict=True))

    def mean_corrupted(self, variant: str) -> Mean:
        """Accuracy over all kinds and strengths of corruption, seed by seed."""
        runs = [
            [v for kind in run.corrupted.values() for v in kind] for run in self.runs_of(variant)
        ]
        return _mean([statistics.fmean(values) for values in runs if values])

    def displacement(self, variant: str) -> dict[str, Mean]:
        """Median distance over the filters of every field from its start, in the field's unit."""
        found = [run.displacement for run in self.runs_of(variant) if not run.stopped]
        names = found[0] if found else {}
        return {name: _mean([one[name] for one in found]) for name in names}

    def to_table(self) -> list[dict[str, Any]]:
        """One row per first layer: its accuracies with standard errors, and its parameters."""
        rows = []
        for variant in self.variants:
            runs = self.runs_of(variant)
            row: dict[str, Any] = {
                "variant": variant,
                "n_seeds": len(runs),
                "n_stopped": sum(bool(run.stopped) for run in runs),
                "n_first_parameters": runs[0].n_first_parameters,
                "n_parameters": runs[0].n_parameters,
            }
            for name, mean in (
                ("accuracy", self.accuracy(variant)),
                ("accuracy_reset", self.accuracy_reset(variant)),
                ("corrupted", self.mean_corrupted(variant)),
            ):
                row[name] = mean.mean if mean.n else None
                row[f"{name}_error"] = mean.standard_error if mean.n > 1 else None
            rows.append(row)
        return rows

    def to_record(self) -> dict[str, Any]:
        """The result as plain objects for JSON.

        Convention:
            - accuracies are shares, angles in rad, lengths in px
            - numbers that JSON does not have are the texts ``inf``, ``-inf`` and ``nan``
            - ``start`` and ``end`` of a run are what ``Gabor2d.from_json`` reads
        """
        return plain(
            {
                "format": "gaborium.train",
                "version": _FORMAT,
                "recipe": {
                    one.name: getattr(self.recipe, one.name)
                    for one in dataclasses.fields(self.recipe)
                },
                "data": self.data,
                "table": self.to_table(),
                "displacement": {
                    variant: {
                        name: mean._asdict() for name, mean in self.displacement(variant).items()
                    }
                    for variant in self.variants
                },
                "difference": {
                    variant: self.difference(self.variants[0], variant)._asdict()
                    for variant in self.variants[1:]
                },
                "runs": [run.to_record() for run in self.runs],
            }
        )

    def to_json(self, *, indent: int | None = None) -> str:
        """The result as JSON text, as ``to_record`` has it."""
        return json.dumps(self.to_record(), indent=indent, allow_nan=False, ensure_ascii=False)


def _mean(values: list[float | None]) -> Mean:
    return Mean.of([value for value in values if value is not None])


def _at(params: Gabor, index: int) -> Gabor:
    return type(params)(**{name: value[index] for name, value in params.as_dict().items()})
