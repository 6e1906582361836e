"""The result of a fit: parameters, errors and an outcome per filter."""

from __future__ import annotations

import enum
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from gaborium.functions.params import RECORDS, UNITS, Gabor, plain
from gaborium.support import read_tensors, write_tensors

if TYPE_CHECKING:
    from typing_extensions import Self


class Outcome(enum.Enum):
    """How a fit ended. The value is a sentence, with advice where something can be done."""

    CONVERGED = "Converged."
    STALLED = "Stopped improving before the tolerance; try more starts."
    OFF_MODEL = (
        "Converged, but to no Gabor function: too little of the kernel is explained, or two waves "
        "or a centre with its surround explain more; see explained_variance."
    )
    NOT_IDENTIFIABLE = (
        "Converged, but the data do not determine every parameter: those of infinite "
        "standard_error could have other values."
    )
    BAD_INPUT = "The target is zero or not finite; there is nothing to fit."


class Saved:
    """Base of results that can be saved: named tensors, and metadata that are JSON values."""

    kind: ClassVar[str]  # "fit" in files of the name "gaborium.fit"

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the metadata."""
        raise NotImplementedError

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        """The inverse of ``to_tensors``; a ``LookupError`` names what is missing."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result into a safetensors file, all or nothing.

        The file holds numbers and names, no code, and a checksum against damage. Equal results make
        equal bytes.

        Args:
            path: the file, in a folder that exists; an existing file is replaced.

        Raises:
            ImportError: safetensors is not installed.
            OSError: it cannot be written. An earlier file stays.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> from gaborium import Gabor2d, fit, gabor
            >>> result = fit(gabor(Gabor2d.of(wavelength=[5.0, 6.0], sigma=2.0), 11))
            >>> with TemporaryDirectory() as folder:
            ...     result.save(f"{folder}/fit.safetensors")
            ...     FitResult.load(f"{folder}/fit.safetensors")
            FitResult(2 x Gabor2d: 2 CONVERGED)
        """
        tensors, metadata = self.to_tensors()
        header = {"name": f"gaborium.{self.kind}", "format": 1}
        write_tensors(path, tensors, header | metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what ``save`` has written, with its tensors on the CPU.

        Raises:
            ImportError: safetensors is not installed.
            OSError: the file cannot be read.
            ValueError: it is damaged, holds another kind of result, or has a newer format.
        """
        try:
            return cls.from_tensors(*read_tensors(path, kind=cls.kind))
        except LookupError as error:
            raise ValueError(
                f"{os.fspath(path)!r} has no {error} that this version knows; update gaborium."
            ) from None


@dataclass(frozen=True, eq=False)
class FitResult(Saved):
    """Gabor parameters found for a batch of filters, with an outcome for each.

    Args:
        params: the record; geometry ``(filters, 1)`` and phase and amplitude ``(filters,
            channels)`` where channels share a geometry, otherwise every field ``(filters,)``.
        outcome: one per filter.
        explained_variance: ``(filters,)``, the share of a kernel's power, or of a response's
            variance; 1 is a perfect fit.
        standard_error: for every field a tensor in the field's shape and unit: the standard
            deviation that noise like the residual gives it; infinite where the data do not
            determine the field.
        correlation: ``(filters, p, p)`` of the parameters' errors, in the order of ``names``.
        names: the p parameters, such as ``"orientation"`` or ``"amplitude[0]"``.
        n_iterations: ``(filters,)`` steps of the search that found it.
    """

    kind = "fit"
    params: Gabor
    outcome: tuple[Outcome, ...]
    explained_variance: Tensor
    standard_error: dict[str, Tensor]
    correlation: Tensor
    names: tuple[str, ...]
    n_iterations: Tensor

    def __len__(self) -> int:
        return len(self.outcome)

    def __repr__(self) -> str:
        """A line: how many filters, of what, and how they ended."""
        counts = Counter(outcome.name for outcome in self.outcome)
        ends = ", ".join(f"{n} {name}" for name, n in counts.items())
        return f"FitResult({len(self)} x {type(self.params).__name__}: {ends})"

    def __getitem__(self, index: int | slice | Sequence[int]) -> FitResult:
        """The filters at ``index``, as a result again: a number, a slice or a list of numbers."""
        numbers = range(len(self))
        if isinstance(index, slice):
            chosen = list(numbers[index])
        else:
            chosen = [numbers[i] for i in ([index] if isinstance(index, int) else index)]
        tensors, metadata = self.to_tensors()
        return self.from_tensors({name: v[chosen] for name, v in tensors.items()}, metadata)

    @property
    def converged(self) -> Tensor:
        """Whether each filter is a Gabor function that was found: ``(filters,)``, bool."""
        return torch.tensor([outcome is Outcome.CONVERGED for outcome in self.outcome])

    def not_identifiable(self, index: int) -> tuple[str, ...]:
        """The fields of filter ``index`` that the data do not determine."""
        return tuple(
            name
            for name, error in self.standard_error.items()
            if error[index].isinf().any() and not self.params.as_dict()[name][index].isnan().any()
        )

    @classmethod
    def cat(cls, results: Sequence[FitResult]) -> FitResult:
        """One result from several, in their order."""
        parts = [result.to_tensors() for result in results]
        tensors, metadata = parts[0]
        joined = {name: torch.cat([part[0][name] for part in parts]) for name in tensors}
        return cls.from_tensors(joined, metadata)

    def to_json(self, *, indent: int | None = None) -> str:
        """The result as JSON text; infinities and missing numbers are the texts inf and nan."""
        document = {
            "params": json.loads(self.params.to_json()),
            "outcome": [outcome.name for outcome in self.outcome],
            "explained_variance": self.explained_variance.tolist(),
            "standard_error": {name: v.tolist() for name, v in self.standard_error.items()},
            "names": self.names,
            "correlation": self.correlation.tolist(),
            "n_iterations": self.n_iterations.tolist(),
        }
        return json.dumps(plain(document), indent=indent, allow_nan=False)

    def to_table(self) -> list[dict[str, object]]:
        """One row per filter and field: filter, parameter, unit, value, standard_error, outcome.

        Fields with an entry per channel or axis give one row for each, as ``center[0]``.
        """
        rows: list[dict[str, object]] = []
        for index, outcome in enumerate(self.outcome):
            for field, value in self.params.as_dict().items():
                entries = value[index].flatten().tolist()
                errors = self.standard_error[field][index].flatten().tolist()
                for i, (entry, error) in enumerate(zip(entries, errors, strict=True)):
                    name = field if len(entries) == 1 else f"{field}[{i}]"
                    row = {"filter": index, "parameter": name, "unit": UNITS[field]}
                    row |= {"value": entry, "standard_error": error, "outcome": outcome.name}
                    rows.append(row)
        return rows

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors with one entry per filter, and metadata for all filters."""
        # Codes count the names stored with them, because the order in the enum may change.
        names = [outcome.name for outcome in Outcome]
        codes = [names.index(outcome.name) for outcome in self.outcome]
        tensors = {
            "outcome": torch.tensor(codes, dtype=torch.uint8),
            "explained_variance": self.explained_variance,
            "correlation": self.correlation,
            "n_iterations": self.n_iterations,
            **{f"params.{name}": value for name, value in self.params.as_dict().items()},
            **{f"standard_error.{name}": value for name, value in self.standard_error.items()},
        }
        record = type(self.params).__name__
        return tensors, {"record": record, "names": self.names, "outcomes": names}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> FitResult:
        """The inverse of ``to_tensors``."""
        record = {record.__name__: record for record in RECORDS.values()}[metadata["record"]]
        fields, names = record.field_names(), metadata["outcomes"]
        return cls(
            params=record(**{name: tensors[f"params.{name}"] for name in fields}),
            outcome=tuple(Outcome[names[code]] for code in tensors["outcome"].tolist()),
            explained_variance=tensors["explained_variance"],
            standard_error={name: tensors[f"standard_error.{name}"] for name in fields},
            correlation=tensors["correlation"],
            names=tuple(metadata["names"]),
            n_iterations=tensors["n_iterations"],
        )
