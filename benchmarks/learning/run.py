"""Does learning Gabor parameters help, when does it not, and does the start matter?

    python benchmarks/learning/run.py few twelve              # these experiments
    python benchmarks/learning/run.py few --only fashion      # the parts with this in their names
    python benchmarks/learning/run.py few --minutes 30        # no new piece after half an hour
    python benchmarks/learning/run.py starts --share 1/4      # one of four processes at a time
    python benchmarks/learning/run.py few --summary           # only what is there, again
    python benchmarks/learning/run.py few --quick --output /tmp/quick    # says nothing

embedded     the textures of gaborium train, which need no data: 900 and 180 samples
few          Fashion-MNIST and CIFAR-10 with 100, 500 and 1000 samples; and the test images
             with noise, blur, less contrast, fog and coarse pixels, in five strengths each
full         all of Fashion-MNIST
starts       a good bank, random filters, equal filters; 8 and 16 of them
textures     KTH-TIPS, images 1-5 to learn from and 6-9 to test with; patches of Brodatz
twelve       12 filters of 7 x 7 and a linear classifier; how much alike the filters become
spoken       spoken digits as raw waveforms, beside a fixed bank on the mel scale

Every first layer has four choices of learning rates. Two networks are trained with each, on seeds
of their own, and measured on training images that were kept apart; the best one on average is
taken. Then a network is trained for every seed, and measured on the test images.

Each network is a piece: a line of benchmarks/results/learning/EXPERIMENT.jsonl as soon as it is
done. Stopped and called again, it goes on. The means are in
benchmarks/results/learning_EXPERIMENT.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from _report import RESULTS, ROOT, in_rows, print_table, provenance
from augmentations import make_flip
from corruptions import KINDS as CORRUPTIONS
from corruptions import N_STRENGTHS, corrupt
from energies import EnergyNetwork, make_equal_start
from plans import EXPERIMENTS, NETWORKS, VARIANTS, Data, Unit, Variant

from gaborium import mel_bank
from gaborium.functions.kernels import quadrature_pair
from gaborium.support import write_text
from gaborium.training import Dataset, Mean, Run, Trained, load_trained, train

TUNING_SEEDS = (1000, 1001)
Line = dict[str, Any]


class Piece(NamedTuple):
    """One network to train: with one of the rates to choose from, or with those chosen."""

    unit: str
    variant: str
    choice: int | None
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--only", default="", help="parts whose names hold this")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="these first layers alone")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which to stop")
    parser.add_argument("--share", default="1/1", help="which of how many processes")
    parser.add_argument("--seeds", type=int, help="instead of those of the plan")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--quick", action="store_true", help="one epoch of next to nothing")
    parser.add_argument("--summary", action="store_true", help="train nothing")
    parser.add_argument("--output", type=Path, help="folder of the results")
    options = parser.parse_args()
    if unknown := set(options.experiments) - set(EXPERIMENTS):
        parser.error(f"no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    if options.quick and not options.output:
        parser.error("--quick needs --output, so that it replaces no result")
    options.share = tuple(map(int, options.share.split("/")))
    options.until = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(1)
    for name in options.experiments:
        experiment = Experiment(name, options)
        try:
            if not options.summary:
                experiment.work()
        except KeyboardInterrupt:
            print("Stopped; the same command goes on.")
            break
        finally:
            experiment.write_summary()


class Experiment:
    """The pieces of an experiment, those that are done and those to do."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.units = {
            one.name: _quick(one) if options.quick else one for one in EXPERIMENTS[name]()
        }
        folder = options.output or RESULTS
        self.file = folder / "learning" / f"{name}.jsonl"
        self.summary_file = folder / f"learning_{name}.json"
        self.checkpoints = ROOT / "runs" / "learning" / name
        self.data = Data(options.data)
        self.made = provenance("cuda" if _on_gpu(options.accelerator) else "cpu")

    def done(self) -> dict[Piece, Line]:
        """All that is on the disk; a line that a kill has cut is none."""
        found: dict[Piece, Line] = {}
        if self.file.exists():
            for text in self.file.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                found[Piece(*(line[name] for name in Piece._fields))] = line
        return found

    def work(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.file.exists() and not self.file.read_bytes().endswith(b"\n"):
            with self.file.open("a") as file:  # what a kill has cut stays a line of its own
                file.write("\n")
        for unit in self.units.values():
            if self.options.only not in unit.name:
                continue
            for piece in self._pieces(unit):
                if piece in self.done():
                    continue
                if time.monotonic() > self.options.until:
                    return
                line = self._train(unit, piece)
                # One write, so that the lines of several processes do not mix.
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(_plain(line)) + "\n")
                chosen = "test" if piece.choice is None else f"choice {piece.choice}"
                print(
                    f"{unit.name} | {piece.variant} | {chosen}, seed {piece.seed}: "
                    f"{_percent(line['accuracy'])}, {line['seconds']:.0f} s",
                    flush=True,
                )

    def _pieces(self, unit: Unit) -> Iterator[Piece]:
        """First the choices of all variants, then seed by seed, to be in balance at every stop."""
        number, of = self.options.share
        wanted = self.options.variants or unit.variants
        variants = [variant for variant in unit.variants if variant in wanted][number - 1 :: of]
        for seed in () if unit.rates_of != unit.name else TUNING_SEEDS:
            for variant in variants:
                for choice in range(len(VARIANTS[variant].rates)):
                    yield Piece(unit.name, variant, choice, seed)
        for seed in range(self.options.seeds or unit.n_seeds):
            for variant in variants:
                yield Piece(unit.name, variant, None, seed)

    def _train(self, unit: Unit, piece: Piece) -> Line:
        variant, tuning = VARIANTS[piece.variant], piece.choice is not None
        choice = piece.choice if tuning else self._chosen(unit, piece.variant)
        recipe = unit.recipe.replace(
            **variant.fields,
            **unit.rates(variant)[choice],
            **(unit.tuning if tuning else {}),
            compare_with=(),
            seeds=(piece.seed,),
            accelerator=self.options.accelerator,
        )
        data = (
            self.data.validation(recipe.data)
            if tuning
            else self.data.test(recipe.data, unit.n_test)
        )
        # Named by the recipe too: what a kill has left of another one is not gone on with.
        digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]
        name = "-".join(map(str, (*piece, digest)))
        place = self.checkpoints / name.replace(", ", "-").replace(" ", "-")
        n_train = len(data.subset(recipe.samples_per_class, piece.seed).labels)
        start: Any = None
        if variant.start == "mel":
            start = mel_bank(recipe.n_filters, recipe.kernel_size, sample_rate=8000)
        elif variant.start == "equal":
            output = "real" if unit.network == "cnn" else "energy"
            start = make_equal_start(recipe, data, piece.seed, output)
        network = None
        if unit.network != "cnn":
            network = EnergyNetwork(NETWORKS[unit.network], recipe, data, start or recipe.start)
        result = train(
            recipe,
            data,
            network=network,
            augment=make_flip(n_train) if unit.flip else None,
            start=start,
            folder=place,
        )
        (run,) = result.runs
        corrupted = {}
        if unit.n_corrupted and not tuning and not run.stopped:
            some = self.data.test(recipe.data, unit.n_corrupted)
            corrupted = under_corruption(load_trained(place, network=network), some)
        shutil.rmtree(place)
        line = {
            **piece._asdict(),
            "rates": unit.rates(variant)[choice],
            "accuracy": run.accuracy,
            "accuracy_reset": run.accuracy_reset,
            "train_accuracy": run.curve[-1].get("accuracy") if run.curve else None,
            "displacement": run.displacement,
            "n_first_parameters": run.n_first_parameters,
            "n_parameters": run.n_parameters,
            "seconds": run.seconds,
            "stopped": run.stopped,
            "n_train": n_train,
            "n_test": len(data.test_labels),
        }
        if corrupted:
            line["corrupted"] = corrupted
        if unit.similarity and run.params and not tuning:
            line["similarity"] = dict(zip(run.epochs, similarities(run), strict=True))
        return line | {name: self.made[name] for name in ("commit", "date", "machine", "versions")}

    def _chosen(self, unit: Unit, variant: str) -> int:
        table = choices(self.done(), unit.rates_of, VARIANTS[variant], variant)
        return max(range(len(table)), key=lambda i: table[i].mean if table[i].n else -1.0)

    # -- means ------------------------------------------------------------------------------------

    def write_summary(self) -> None:
        done = self.done()
        if not done:
            return
        parts = []
        for unit in self.units.values():
            variants = {name: summary(done, unit, name) for name in unit.variants}
            variants = {name: one for name, one in variants.items() if one["accuracy"]["n"]}
            if not variants:
                continue
            for other in ("free", "fixed, bank", "fixed, random", "fixed, mel"):
                for name, one in variants.items():
                    if other in variants and name != other:
                        one[f"difference to {other}"] = _mean(
                            difference(done, unit.name, name, other)
                        )
            recipe = {
                name: getattr(unit.recipe, name)
                for name in (
                    *("data", "samples_per_class", "n_filters", "kernel_size", "stride"),
                    *("epochs", "batch_size", "schedule", "weight_decay", "label_smoothing"),
                )
            }
            recipe["network"] = unit.network
            recipe["augmentation"] = ["flip"] if unit.flip else []
            parts.append({"name": unit.name, "recipe": recipe, "variants": variants})
            _show(unit, variants)
        document = {
            "experiment": self.name,
            "made_with": _different(done.values()),
            "n_networks": len(done),
            "tuning": {"seeds": TUNING_SEEDS, "choices": {k: s.rates for k, s in VARIANTS.items()}},
            "parts": parts,
        }
        self.summary_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.summary_file, in_rows(_plain(document)) + "\n")
        print(f"Wrote {self.summary_file}")


def choices(done: dict[Piece, Line], unit: str, variant: Variant, name: str) -> list[Mean]:
    """Accuracy on what was kept apart, for each of the rates; a stopped run counts as nothing."""
    found = []
    for choice in range(len(variant.rates)):
        pieces = [Piece(unit, name, choice, seed) for seed in TUNING_SEEDS]
        values = [done[piece]["accuracy"] or 0.0 for piece in pieces if piece in done]
        found.append(Mean.of(values))
    return found


def tested(done: dict[Piece, Line], unit: str, variant: str) -> dict[int, Line]:
    """The lines of the test, by seed."""
    return {
        piece.seed: line
        for piece, line in sorted(done.items(), key=lambda item: item[0].seed)
        if piece.choice is None and (piece.unit, piece.variant) == (unit, variant)
    }


def summary(done: dict[Piece, Line], unit: Unit, name: str) -> Line:
    variant = VARIANTS[name]
    lines = list(tested(done, unit.name, name).values())
    good = [line for line in lines if line["accuracy"] is not None]
    moved = [line for line in good if line["accuracy_reset"] is not None]
    table = choices(done, unit.rates_of, variant, name)
    found: Line = {
        "accuracy": _mean([line["accuracy"] for line in good]),
        "accuracies": [line["accuracy"] for line in lines],
        "n_stopped": len(lines) - len(good),
        "rates": lines[0]["rates"] if lines else None,
        "validation": [_mean(None, mean) for mean in table],
        "seconds": Mean.of([line["seconds"] for line in lines]).mean,
    }
    if lines:
        keys = ("n_first_parameters", "n_parameters", "n_train", "n_test")
        found |= {key: lines[0][key] for key in keys}
    if moved:
        gains = [line["accuracy"] - line["accuracy_reset"] for line in moved]
        found["accuracy_reset"] = _mean([line["accuracy_reset"] for line in moved])
        found["learning_gain"] = _mean(gains)
        found["displacement"] = {
            key: _mean([line["displacement"][key] for line in moved])
            for key in moved[0]["displacement"]
        }
    if good and "corrupted" in good[0]:
        found["corrupted"] = {
            kind: [
                _mean([line["corrupted"][kind][strength] for line in good])
                for strength in range(len(good[0]["corrupted"][kind]))
            ]
            for kind in good[0]["corrupted"]
        }
        found["mean_corrupted"] = _mean([_mean_corrupted(line) for line in good])
    if good and "similarity" in good[0]:
        found["similarity"] = {
            epoch: _mean([line["similarity"][epoch] for line in good])
            for epoch in good[0]["similarity"]
        }
    return found


def difference(done: dict[Piece, Line], unit: str, variant: str, other: str) -> list[float]:
    """How much better than the other, seed by seed: both saw the same images in the same order."""
    ours, theirs = (
        {
            seed: line["accuracy"]
            for seed, line in tested(done, unit, name).items()
            if line["accuracy"] is not None
        }
        for name in (variant, other)
    )
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


@torch.no_grad()
def under_corruption(trained: Trained, data: Dataset) -> dict[str, list[float]]:
    """Accuracy for every kind of corruption, at all strengths."""
    found: dict[str, list[float]] = {}
    for kind in CORRUPTIONS:
        found[kind] = []
        for strength in range(1, N_STRENGTHS + 1):
            hits = 0
            for rows in torch.arange(len(data.test_labels)).split(256):
                clean = data.test_images[rows] / 255
                worse = corrupt(clean, kind, strength, seed=0, first=int(rows[0]))
                hits += int((trained(worse).argmax(1) == data.test_labels[rows]).sum())
            found[kind].append(hits / len(data.test_labels))
    return found


def similarities(run: Run) -> list[float]:
    """For every snapshot, how much alike a filter and the one most like it are, on average.

    1 is the same wave, whatever its phase; 0 has nothing in common. Compared are pairs of an even
    and an odd kernel, as complex numbers, all channels together.
    """
    found = []
    for params in run.params:
        even, odd = quadrature_pair(params.expand(), tuple(run.kernels.shape[3:]))
        pairs = torch.complex(even, odd).flatten(1)
        pairs = pairs / pairs.norm(dim=1, keepdim=True).clamp_min(1e-30)
        like = (pairs @ pairs.mH).abs()
        like.diagonal().zero_()
        found.append(like.amax(1).mean().item())
    return found


# -- small things ---------------------------------------------------------------------------------


def _quick(unit: Unit) -> Unit:
    few = {"samples_per_class": 5, "epochs": 1}
    recipe = unit.recipe.replace(**few)
    tuning = {**unit.tuning, **few}
    return replace(
        unit,
        recipe=recipe,
        tuning=tuning,
        n_seeds=2,
        n_test=100,
        n_corrupted=min(unit.n_corrupted, 100),
    )


def _on_gpu(accelerator: str) -> bool:
    return accelerator in ("auto", "cuda") and torch.cuda.is_available()


def _mean(values: list[float] | None, mean: Mean | None = None) -> Line:
    mean = Mean.of(values or []) if mean is None else mean
    return mean._asdict()


def _mean_corrupted(line: Line) -> float:
    values = [value for kind in line["corrupted"].values() for value in kind]
    return sum(values) / len(values)


def _different(lines: Any) -> list[Line]:
    """Commits, machines and versions, each once, with how many networks were trained with them."""
    found: dict[str, Line] = {}
    for line in lines:
        made = {name: line[name] for name in ("commit", "machine", "versions")}
        one = found.setdefault(json.dumps(made, sort_keys=True), {**made, "n_networks": 0})
        one["n_networks"] += 1
    return list(found.values())


def _plain(value: Any) -> Any:
    """JSON has no word for what is no number."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def _percent(value: float | None) -> str:
    return "stopped" if value is None else f"{100 * value:.1f} %"


def _show(unit: Unit, variants: dict[str, Line]) -> None:
    def told(mean: Line | None, sign: str = "") -> str:
        if not mean or not mean["n"]:
            return ""
        error = mean["standard_error"]
        text = f"{100 * mean['mean']:{sign}.1f}"
        return text if error is None or math.isnan(error) else f"{text} ± {100 * error:.1f}"

    rows = [
        (
            name,
            str(one["accuracy"]["n"]),
            told(one["accuracy"]),
            told(one.get("difference to free"), "+"),
            told(one.get("learning_gain"), "+"),
            told(one.get("mean_corrupted")),
            str(one["n_first_parameters"]),
        )
        for name, one in variants.items()
    ]
    header = ("first layer", "seeds", "accuracy", "over free", "by moving", "corrupted", "numbers")
    print_table(unit.name, header, rows)


if __name__ == "__main__":
    main()
