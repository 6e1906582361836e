"""Does `diagnose` name faults that nobody tuned it on, and do its remedies hold?

    python benchmarks/diagnose/run.py draw --n-cases 300     # cases for work
    python benchmarks/diagnose/run.py examine                # diagnose them
    python benchmarks/diagnose/run.py draw examine --sealed  # the sealed third, looked at once

`setups.py` and `faults.py` are a grammar: a seed draws a set-up that learns, and plants no fault,
one or two in it. A fault counts if the set-up does not learn with it. A cause is named if a
finding has one of the fault's causes; with two faults, either of them may come first. The remedy is
what `diagnose` proposes first, carried out as it is written, and trained for 400 steps.
Both steps go on where they were interrupted: a case is a line of
benchmarks/results/diagnose/NAME.jsonl; the summary is benchmarks/results/diagnose_NAME.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from _report import RESULTS, print_table, provenance, write_json
from faults import Draw, built, draw
from setups import learns

from gaborium.diagnostics import diagnose

SEALED = 1_000_000  # seeds of the sealed third begin here
REASSURING = ("nothing was found", "no fault was found")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("steps", nargs="+", choices=("draw", "examine", "table"))
    parser.add_argument("--n-cases", type=int, default=300, help="cases to draw in all")
    parser.add_argument("--sealed", action="store_true", help="the sealed third")
    parser.add_argument("--fault", help="only cases with this fault; nothing is kept")
    parser.add_argument("--again", action="store_true", help="examine all cases again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name = "sealed" if options.sealed else "work"
    folder = RESULTS / "diagnose"
    folder.mkdir(parents=True, exist_ok=True)
    cases, rows = folder / f"{name}_cases.jsonl", folder / f"{name}.jsonl"
    if "draw" in options.steps:
        _draw(cases, options.n_cases, SEALED if options.sealed else 0)
    if "examine" in options.steps:
        if options.again:
            rows.unlink(missing_ok=True)
        _examine(cases, rows, options.fault)
    if not options.fault:
        results = _lines(rows)
        summary = _summary(results)
        print_table(f"diagnose, {name}", ["", "of", "n", "%"], [
            [what, str(of), str(n), f"{100 * n / of:.1f}" if of else ""]
            for what, (n, of) in summary.items()
        ])  # fmt: skip
        _print_faults(results)
        found = {what: {"n": n, "of": of} for what, (n, of) in summary.items()}
        write_json(RESULTS / f"diagnose_{name}.json", {"summary": found})


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _draw(path: Path, n_cases: int, first_seed: int) -> None:
    """Draw until there are so many cases; a seed without a case leaves a line too."""
    lines = _lines(path)
    n = sum(line["rate"] is not None for line in lines)
    seed = max((line["seed"] for line in lines), default=first_seed - 1) + 1
    while n < n_cases:
        case = draw(seed)
        _append(path, case._asdict() if case else {"seed": seed, "rate": None})
        n += case is not None
        seed += 1


def _examine(cases: Path, rows: Path, fault: str | None) -> None:
    done = {row["seed"] for row in _lines(rows)}
    for line in _lines(cases):
        if line["rate"] is None:
            continue
        case = Draw(**line)
        if (fault is None and case.seed in done) or (fault and fault not in case.faults):
            continue
        row = _examined(case)
        print(
            f"{case.seed:8d} {' + '.join(case.faults) or 'sound':60.60s} "
            f"{', '.join(row['found'][:3]) or 'nothing':70.70s} mended: {row['mended']} "
            f"{row['seconds']:.0f} s", flush=True,
        )  # fmt: skip
        if fault is None:
            _append(rows, row)


def _examined(case: Draw) -> dict[str, Any]:
    """What `diagnose` says of a case, and what becomes of it with its remedy."""
    setup = built(case)
    began = time.process_time()
    error, found, severe, words, mended = None, [], 0, "", None
    try:
        result = diagnose(
            setup.module, setup.loss, (setup.inputs, setup.targets), optimizer=setup.optimizer
        )
    except Exception as problem:  # a set-up that runs must be diagnosed: an error is a failure
        error, seconds = f"{type(problem).__name__}: {problem}", time.process_time() - began
    else:
        seconds = time.process_time() - began
        found = [one.cause for one in result.findings]
        severe, words = len(result.severe), result.headline
        if case.faults and any(one.remedy for one in result.findings):
            mended = learns(result.with_remedy())
    named = [any(cause in found[:3] for cause in causes) for causes in case.causes]
    return {
        "seed": case.seed,
        "faults": list(case.faults),
        "found": found,
        "n_severe": severe,
        "first": bool(found) and any(found[0] in causes for causes in case.causes),
        "in_three": any(named),
        "all_in_three": all(named),
        "headline": words,
        "reassuring": bool(case.faults) and any(word in words.lower() for word in REASSURING),
        "mended": mended,
        "seconds": round(seconds, 1),
        "error": error,
        "commit": provenance()["commit"],
    }


def _summary(rows: Iterable[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """How many cases something is true of, and of how many."""
    faulty = [row for row in rows if row["faults"]]
    sound = [row for row in rows if not row["faults"]]
    questions: dict[str, tuple[list[dict[str, Any]], Callable[[dict[str, Any]], Any]]] = {
        "faulty: a planted cause named first": (faulty, lambda row: row["first"]),
        "faulty: a planted cause in the first three": (faulty, lambda row: row["in_three"]),
        "faulty: all planted causes in the first three": (faulty, lambda row: row["all_in_three"]),
        "faulty: learns with the first remedy": (faulty, lambda row: row["mended"]),
        "faulty: a reassuring headline": (faulty, lambda row: row["reassuring"]),
        "faulty: an error in place of a diagnosis": (faulty, lambda row: row["error"]),
        "sound: a severe finding": (sound, lambda row: row["n_severe"]),
        "sound: an error in place of a diagnosis": (sound, lambda row: row["error"]),
    }
    return {
        what: (sum(bool(true(row)) for row in chosen), len(chosen))
        for what, (chosen, true) in questions.items()
    }


def _print_faults(rows: Iterable[dict[str, Any]]) -> None:
    """For each single fault: how often it is named first, in the first three, and mended."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        if len(row["faults"]) == 1:
            one = counts.setdefault(row["faults"][0], Counter())
            one.update(
                {
                    "n": 1,
                    "first": row["first"],
                    "three": row["in_three"],
                    "mended": bool(row["mended"]),
                }
            )
    print_table("single faults", ["", "of", "first", "three", "mended"], [
        [name, *(str(one[key]) for key in ("n", "first", "three", "mended"))]
        for name, one in sorted(counts.items())
    ])  # fmt: skip


if __name__ == "__main__":
    main()
