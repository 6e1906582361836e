"""What does a classifier that is not linear reach on the energies of textures, fixed and learned?

    python benchmarks/learning/svm.py
    python benchmarks/learning/svm.py --quick --output /tmp/quick

The networks of ``run.py textures`` on KTH-TIPS, with the rates that were chosen there: strength,
spread and flatness of the energies of 64 filters in nine cells, and their correlations, the filters
learned together with the linear classifier or fixed at the good bank. Beside that classifier a
support-vector machine with a Gaussian kernel on the same numbers, its penalty chosen on images that
are kept apart, by the mean over the seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from _report import RESULTS, parsed, print_table, provenance, write_json
from energies import EnergyNetwork
from plans import EXPERIMENTS, VARIANTS, Data
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from texture import TextureClassifier

from gaborium.training import Dataset, Mean, load_trained, train

UNIT = "kth-tips, texture"
PENALTIES = (1.0, 10.0, 100.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options = parsed(parser, quick="one seed and one epoch")
    torch.set_num_threads(1)
    (unit,) = (one for one in EXPERIMENTS["textures"]() if one.name == UNIT)
    done = json.loads((RESULTS / "learning_textures.json").read_text(encoding="utf-8"))
    (part,) = (one for one in done["parts"] if one["name"] == UNIT)
    data = Data(options.data)
    rows: list[dict[str, Any]] = []
    for variant in ("adam, bank", "fixed, bank"):
        rates = part["variants"][variant]["rates"]
        for seed in range(1 if options.quick else unit.n_seeds):
            recipe = unit.recipe.replace(
                **VARIANTS[variant].fields, **rates, compare_with=(), seeds=(seed,),
                **({"epochs": 1} if options.quick else {}),
            )  # fmt: skip
            # Of filters, too, that have not seen the images kept apart.
            _, apart = scores(recipe, data.validation("kth-tips"))
            linear, machines = scores(recipe, data.test("kth-tips"))
            row = {"filters": variant, "seed": seed, "linear": linear}
            row |= {"apart": apart, "svm": machines}
            rows.append(row)
            print(*row.values(), flush=True)
    write_json(
        (options.output or RESULTS) / "learning_svm.json", {**provenance("cpu"), "rows": rows}
    )
    table = []
    for variant in dict.fromkeys(row["filters"] for row in rows):
        some = [row for row in rows if row["filters"] == variant]
        penalty = max(PENALTIES, key=lambda p, some=some: sum(row["apart"][p] for row in some))
        linear, svm = ([row[key] for row in some] for key in ("linear", "svm"))
        table.append([variant, _told(linear), _told([one[penalty] for one in svm]), f"{penalty:g}"])
    print_table(UNIT, ("filters", "linear classifier", "support-vector machine", "penalty"), table)


def scores(recipe: Any, data: Dataset) -> tuple[float, dict[float, float]]:
    """Accuracy of the network, and of the machines on the numbers that its classifier has."""
    with tempfile.TemporaryDirectory() as folder:
        network = EnergyNetwork(TextureClassifier, recipe, data, recipe.start)
        result = train(recipe, data, network=network, folder=f"{folder}/run")
        trained = load_trained(f"{folder}/run", network=network)
    network: Any = trained.network
    with torch.no_grad():
        known, asked = (
            torch.cat(
                [
                    network.statistics(network.first(trained.preprocess(some))).flatten(1)
                    for some in images.split(50)
                ]
            ).numpy()
            for images in (data.images, data.test_images)
        )
    machines = {}
    for penalty in PENALTIES:
        machine = make_pipeline(StandardScaler(), SVC(C=penalty))
        machine.fit(known, data.labels.numpy())
        machines[penalty] = float(machine.score(asked, data.test_labels.numpy()))
    return result.runs[0].accuracy, machines


def _told(values: list[float]) -> str:
    mean = Mean.of(values)
    return f"{100 * mean.mean:.1f} ± {100 * (mean.standard_error or 0):.1f}"


if __name__ == "__main__":
    main()
