"""What every benchmark does with its numbers: print a table, and write where they came from."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import gaborium
from gaborium.support import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def parsed(parser: argparse.ArgumentParser, *, quick: str) -> argparse.Namespace:
    """Options that benchmarks on shared data have in common, and those of the parser.

    Args:
        parser: with the options of its own.
        quick: what ``--quick`` leaves out.
    """
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    options = parser.parse_args()
    if options.quick and not options.output:
        parser.error("--quick needs --output, so that it replaces no result")
    return options


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Commit, machine and versions; nothing that names the machine or its folders."""
    machine = {"cpu": _cpu_model(), "cores": os.cpu_count(), "system": platform.system()}
    if torch.device(device).type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return {
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gaborium": gaborium.__version__,
        },
    }


def write_json(
    path: Path, results: dict[str, Any], *, device: str = "cpu", say: bool = True
) -> None:
    """Write results with their provenance, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = provenance(device) | results
    write_text(path, in_rows(document) + "\n")
    if say:
        print(f"Wrote {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


def in_rows(value: Any, indent: str = "") -> str:
    """JSON with one line for each row of a list and for each entry that is not nested further.

    Example:
        >>> print(in_rows({"commit": "1de3405", "rows": [{"seed": 0}, {"seed": 1}]}))
        {
          "commit": "1de3405",
          "rows": [
            {"seed": 0},
            {"seed": 1}
          ]
        }
    """
    deeper = indent + "  "
    if isinstance(value, dict) and any(isinstance(entry, dict | list) for entry in value.values()):
        lines = [
            f"{json.dumps(key, allow_nan=False)}: {in_rows(entry, deeper)}"
            for key, entry in value.items()
        ]
        return "{\n" + ",\n".join(deeper + line for line in lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(row, dict | list) for row in value):
        rows = [json.dumps(row, allow_nan=False) for row in value]
        return "[\n" + ",\n".join(deeper + row for row in rows) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as their widest entry: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(f"\n{title}\n")
    for row in (header, ["-" * width for width in widths], *rows):
        first, *others = (
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())


def _commit() -> str:
    """Short hash, marked when the code differs from it; other results do not count."""
    try:
        return _git("rev-parse", "--short=12", "HEAD") + (
            "+changes" if _git("status", "--porcelain", "--", "src", "benchmarks/*.py") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _cpu_model() -> str:
    """The processor's name as its maker gives it, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
