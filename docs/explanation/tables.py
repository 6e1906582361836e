"""Print the tables of "Why θ gets stuck", in Markdown, as the page has them.

python docs/explanation/tables.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median
from typing import Any

NUMBERS = Path(__file__).resolve().parents[2] / "benchmarks/results/why_theta_gets_stuck.json"
COLLECTIONS = ("scikit-image", "Kodak")
BORDERS = (("none", "valid", False), ("zeros", "zeros", False), ("zeros, centred", "zeros", True))


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Every table by name."""
    sections = results["sections"]

    def pick(section: str, **wanted: Any) -> list[dict[str, Any]]:
        return [r for r in sections[section] if all(r[k] == v for k, v in wanted.items())]

    made = {}
    rows = [(name, pick("antipode", collection=name)) for name in COLLECTIONS]
    made["antipode"] = table(
        "photographs | pushed one way | the other way | steepness there | RMSE at the truth | "
        "ends at the truth",
        (
            (
                f"{name}, {len(found)}",
                sum(r["slope"] > 0 for r in found),
                sum(r["slope"] < 0 for r in found),
                f"{percent(median(abs(r['slope']) for r in found))} of the steepest",
                f"{median(r['cone_over_start'] for r in found):.0f} times steeper",
                sum(r["arrives"] for r in found),
            )
            for name, found in rows
        ),
    )
    made["basin"] = table(
        "λ | σ | γ | measured | predicted | ratio",
        (
            (
                f"{r['wavelength']:g}",
                f"{r['sigma']:g}",
                r["aspect_ratio"],
                f"{math.degrees(r['measured']):.1f}°",
                f"{math.degrees(r['predicted']):.1f}°",
                f"{r['measured'] / r['predicted']:.2f}",
            )
            for r in pick("basin", sigma=3.0)
        ),
    )
    made["minima"] = table(
        "photographs | γ | border | starts that reach the truth | least, most | "
        "wrong minima per half turn",
        (
            (
                name,
                gamma,
                border,
                percent(mean(shares)),
                f"{percent(min(shares))}, {percent(max(shares))}",
                f"{mean(wrong):.1f} ({min(wrong):.0f} to {max(wrong):.0f})",
            )
            for name in COLLECTIONS
            for gamma in (1.0, 0.5)
            for border, padding, centred in BORDERS
            for found in [
                pick(
                    "minima", collection=name, aspect_ratio=gamma, padding=padding, centred=centred
                )
            ]
            for shares in [[share for r in found for share in r["share"]]]
            for wrong in [[n for r in found for n in r["spurious"]]]
        ),
    )
    columns = [(loss, False) for loss in ("MSE", "RMSE", "L1")] + [("RMSE", True)]
    cells = [{(r["optimiser"], r["rate"]): r for r in pick(f"cone_{loss}", decay=decay)}
             for loss, decay in columns]  # fmt: skip
    header = "optimiser | step | MSE | RMSE | L1 | RMSE, step shrinks to 0"
    made["settles"] = table(
        header,
        (
            (*key, *(f"{percent(cell[key]['of_reaching'])}, {cell[key]['ejections']:.1f}"
                     for cell in cells))
            for key in cells[0]
        ),
    )  # fmt: skip
    made["amplitude"] = table(
        header,
        ((*key, *(power(cell[key]["amplitude"]) for cell in cells)) for key in cells[0]),
    )
    made["window"] = table(
        "step η c² | settles | thrown out",
        (
            (r["rate"], percent(r["settled"]), percent(r["thrown_out"]))
            for r in pick("window", loss="MSE")
        ),
    )
    rmse, absolute = (pick("window", loss=loss, starts="near") for loss in ("RMSE", "L1"))
    made["cycles"] = table(
        "step η c / w | η c / 2, rad | RMSE cycles at | L1 cycles at | RMSE settles | thrown out",
        (
            (
                r["rate"],
                f"{r['predicted']:.4f}",
                *(f"{one['amplitude']:.4f}" if one["amplitude"] else "–" for one in (r, other)),
                percent(r["settled"]),
                percent(r["thrown_out"]),
            )
            for r, other in zip(rmse, absolute, strict=True)
        ),
    )
    made["momentum"] = table(
        "momentum | step η c / w | thrown out | times | settles",
        (
            (
                r["optimiser"].rpartition(" ")[2],
                r["rate"],
                percent(r["thrown_out"]),
                f"{r['ejections']:.1f}",
                percent(r["settled"]),
            )
            for r in pick("window", starts="all")
        ),
    )
    made["scale"] = table(
        "image | border | c | largest step 1/c² | settles with a step of 0.3 | "
        "starts that reach the truth | wrong minima per half turn",
        (
            (
                r["scale"],
                "none" if r["padding"] == "valid" else "zeros",
                f"{r['c']:.3g}",
                f"{r['largest_step']:.2g}",
                percent(r["settled"]),
                percent(r["share"]),
                f"{r['spurious']:.1f}",
            )
            for r in pick("scale")
        ),
    )
    made["conditioning"] = table(
        "photographs | as they are | range | whitened | range | white input",
        (
            (
                f"{name}, {len(found)}",
                *(
                    text
                    for key in ("photograph", "whitened")
                    for values in [[r[key] for r in found]]
                    for text in (f"{median(values):.0f}", f"{min(values):.0f} to {max(values):.0f}")
                ),
                f"{found[0]['white']:.0f}",
            )
            for name in COLLECTIONS
            for found in [pick("conditioning", collection=name)]
        ),
    )
    made["training"] = table(
        "input | images | succeeds | least, most",
        (
            (
                r["input"],
                r["images"],
                percent(r["succeeds"]),
                f"{percent(r['least'])}, {percent(r['most'])}",
            )
            for r in pick("training")
        ),
    )
    remedies = {r["remedy"]: [] for r in sections["remedies_scikit-image"]}
    for name in COLLECTIONS:
        for r in sections[f"remedies_{name}"]:
            remedies[r["remedy"]].append(percent(r["succeeds"]))
    for label, way in (("`recover`", "recovered"), ("`recover`, then fine-tuning", "tuned")):
        remedies[label] = [
            percent(mean(r[f"{way}_kernel_error"] < 0.01 and abs(r[f"{way}_turn"]) < 0.01
                         for r in pick("recovering", collection=name)))
            for name in COLLECTIONS
        ]  # fmt: skip
    made["remedies"] = table(
        "remedy | scikit-image | Kodak", ((name, *shares) for name, shares in remedies.items())
    )
    made["field"] = table(
        "optimiser | step | no border | zeros",
        (
            (a["optimiser"], a["rate"], verdict(a), verdict(b))
            for a, b in zip(
                pick("field", padding="valid"), pick("field", padding="zeros"), strict=True
            )
        ),
    )
    made["shapes"] = table(
        "γ | border | starts that reach the truth | minima between 0° and 180°",
        (
            (
                r["aspect_ratio"],
                "none" if r["padding"] == "valid" else "zeros",
                f"{r['share']:.2f}",
                ", ".join(f"{angle}°" for angle in r["minima"]),
            )
            for r in pick("shapes")
        ),
    )
    return made


def phrases(results: dict[str, Any]) -> list[str]:
    """What the page's sentences say in numbers, as they stand in it."""
    sections = results["sections"]
    mse, rmse = sections["stability"]
    ratios = [
        [r["measured"] / r["predicted"] for r in sections["basin"]
         if low <= r["sigma"] / r["wavelength"] < high]
        for low, high in ((0.5, 9), (0.3, 0.5), (0, 0.3))
    ]  # fmt: skip
    exact = [
        abs(r["measured"] / r["all_angles"] - 1)
        for r in sections["basin"]
        if r["all_angles"] and r["sigma"] / r["wavelength"] >= 0.5
    ]
    bare, centred = (
        next(r for r in sections["scale"] if r["scale"] == name and r["padding"] == "valid")
        for name in ("0…1", "0…1, centred")
    )
    photographs = [r for r in sections["antipode"] if r["collection"]]
    pushed = sum(r["slope"] > 0 for r in photographs)
    over = [r["cone_over_start"] for r in photographs]
    found = [r["recovered_kernel_error"] for r in sections["recovering"]]
    spurious = [n for r in sections["minima"] for n in r["spurious"]]
    trained = {r["input"]: percent(r["succeeds"]) for r in sections["training"]}
    runs = {name: sections[f"remedies_{name}"][0]["runs"] for name in COLLECTIONS}
    return [
        f"below {math.ceil(abs(sections['antipode'][0]['slope']) * 1e7)}e-7 of the steepest",
        f"{pushed} of {len(photographs)} photographs push θ one way",
        f"{min(over):.1f} to {max(over):.0f} times",
        f"{min(ratios[0]):.2f} to {max(ratios[0]):.2f} where σ/λ is at least a half",
        f"{min(ratios[1]):.2f} to {max(ratios[1]):.2f} between a third and a half",
        f"down to {min(ratios[2]):.2f} below a third",
        f"within {100 * max(exact):.2f} %",
        f"from {percent(bare['share'])} to {percent(centred['share'])}",
        f"gives {mse['step_limit']:.4f} as the largest step",
        f"1/c² is {mse['predicted_limit']:.4f}",
        f"slope of {rmse['slope']:.4f}, and c is {rmse['c']:.4f}",
        f"{results['n_starts']} starts evenly around the circle",
        f"last tenth of {results['n_steps']} steps",
        f"{sections['cone_MSE'][0]['runs']} runs in every cell",
        f"{runs['scikit-image']} runs on scikit-image's and {runs['Kodak']} on Kodak's",
        f"between {100 * min(found):.1f} % and {100 * max(found):.1f} %",
        f"{trained['photograph']} unchanged, {trained['whitened']} whitened",
        f"{min(spurious):.0f} to {max(spurious):.0f} wrong minima",
    ]


def table(header: str, rows: Iterable[Iterable[Any]]) -> str:
    names = header.split(" | ")
    lines = [names, ["---"] * len(names)]
    lines += [[f"{v:g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def power(amplitude: float | None) -> str:
    if amplitude is None:
        return "–"
    return (
        "0" if amplitude < 1e-5 else f"{amplitude:.1g}" if amplitude < 1e-3 else f"{amplitude:.3f}"
    )


def verdict(row: dict[str, Any]) -> str:
    """What became of one descent, in a few words."""
    if row["ejections"]:
        n = round(row["ejections"])
        return "thrown out once" if n == 1 else f"thrown out {n} times"
    if row["amplitude"] is None:
        return "never arrives"
    cycles = f"cycles at {row['amplitude']:.2g} rad"
    return f"{cycles}: settles" if row["settled"] else cycles


def main() -> None:
    results = json.loads(NUMBERS.read_text(encoding="utf-8"))
    for name, text in tables(results).items():
        print(f"\n{name}\n\n{text}")
    print("\nphrases\n", *phrases(results), sep="\n")


if __name__ == "__main__":
    main()
