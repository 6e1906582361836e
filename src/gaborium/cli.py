"""The command line: one frame serves all commands, and records describe the options."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import shlex
import signal
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_type_hints

from gaborium import __version__
from gaborium.support import require

if TYPE_CHECKING:
    from torch import Tensor

_BAD_INPUT = 2
_INTERRUPTED = 130
_PIECE = 1024  # kernels between two updates of the progress bar
_SEVERITY_STYLES = {"severe": "bold red", "warning": "bold yellow", "note": "bold cyan"}


def _at_least(least: int, **options: float) -> None:
    for name, value in options.items():
        if not least <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value:g}.")


@dataclass(frozen=True)
class Output:
    """Where a command writes.

    Args:
        name: Name of the run; by default that of the command.
        out: Folder of all runs.
        overwrite: Replace an earlier run of this name.
    """

    name: str | None = None
    out: Path = Path("runs")
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.name is not None and (Path(self.name).name != self.name or self.name[:1] == "."):
            raise ValueError(f"--name must be a plain folder name, got {self.name!r}.")


@dataclass(frozen=True)
class Experiment:
    """The built-in experiment: photographs, a planted kernel, and the start of the search.

    Args:
        image: A photograph, or a folder of photographs; by default scikit-image's "camera".
        crop: Side of the square cut from the middle of each photograph, px; 0 uses all of it.
        orientation: Planted direction of the wave, rad from +x towards +y (y runs down).
        start_orientation: Orientation at the start, rad.
        wavelength: Planted wavelength, px.
        phase: Planted phase, rad; one number, or one per colour channel.
        sigma: Planted standard deviation along the wave, px.
        aspect_ratio: Planted aspect ratio; the standard deviation along the stripes is sigma
            divided by it.
        amplitude: Planted amplitude; one number, or one per colour channel.
        kernel_size: Height and width of the kernel, px.
    """

    image: Path | None = None
    crop: int = 96
    orientation: float = math.pi / 4
    start_orientation: float = -math.pi / 4
    wavelength: float = 6.0
    phase: tuple[float, ...] = (0.0,)
    sigma: float = 3.0
    aspect_ratio: float = 1.0
    amplitude: tuple[float, ...] = (1.0,)
    kernel_size: int = 15

    def __post_init__(self) -> None:
        _at_least(0, crop=self.crop)
        _at_least(1, kernel_size=self.kernel_size)

    def arguments(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return arguments of the functions in ``experiments``, and facts about them."""
        from gaborium import Gabor2d
        from gaborium.readers import read_images, sample_image

        named = {"camera (scikit-image)": sample_image()}
        if self.image is not None:
            named = dict(read_images(self.image))
        fields = {name: getattr(self, name) for name in ("wavelength", "sigma", "aspect_ratio")}
        fields |= {"phase": list(self.phase), "amplitude": list(self.amplitude)}
        target = Gabor2d.of(orientation=self.orientation, **fields)
        arguments = {
            "images": list(named.values()),
            "target": target,
            "start": Gabor2d.of(orientation=self.start_orientation, **fields),
            "kernel_size": self.kernel_size,
            "crop": self.crop or None,
        }
        return arguments, {"photograph": ", ".join(named)}


@dataclass(frozen=True)
class Kernels:
    """The kernels to use from a file.

    Args:
        key: Name of the layer, as "conv1", or of the array, as "conv1.weight"; by default the
            first convolution, or the only array of kernels.
        n_dims: Spatial dimensions of a kernel.
    """

    key: str | None = None
    n_dims: Literal[1, 2, 3] = 2

    def read(self, file: Path) -> tuple[Any, dict[str, str]]:
        """Return the kernels of a file, and facts about them."""
        from gaborium.readers import read_kernels

        found = read_kernels(file, key=self.key, n_dims=self.n_dims)
        facts = {
            "file": file.name,
            "array": found.key,
            "shape": " × ".join(map(str, found.values.shape)),
        }
        if file.is_file():
            facts["SHA-256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        return found, {name: fact for name, fact in facts.items() if fact}


# Defaults of the commands; frozen records can be shared.
_OUTPUT, _EXPERIMENT, _KERNELS = Output(), Experiment(), Kernels()


def main(tokens: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 2 bad input, 130 interrupted.

    Args:
        tokens: the arguments; by default those of the process.
    """
    # A terminated run cleans up like an interrupted one. One that ignores Ctrl-C still does.
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    warnings.showwarning = _show_warning
    tokens = sys.argv[1:] if tokens is None else list(tokens)
    try:
        cyclopts = require("cyclopts", extra="cli", purpose="Commands")
    except ImportError as error:
        _fail(error)
    try:
        _app(cyclopts, tokens)(tokens)
    except cyclopts.CycloptsError as error:
        _fail(f"{error} See gaborium --help.")
    except KeyboardInterrupt as stop:
        _say(f"Interrupted; {str(stop) or 'nothing was written.'}")
        sys.exit(_INTERRUPTED)
    except (ValueError, TypeError, OSError, ImportError) as error:
        _fail(error)
    sys.exit(0)


def recover(
    *,
    experiment: Experiment = _EXPERIMENT,
    noise: float = 0.0,
    learning_rate: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0),
    momentum: tuple[float, ...] = (0.0, 0.9),
    steps: int = 300,
    seed: int = 0,
    output: Output = _OUTPUT,
) -> None:
    """Plant a Gabor kernel, convolve a photograph with it, and find it again in three ways.

    First by gradient descent on the orientation under the root of the mean squared error, which
    gets stuck; then by `recover`, from images and responses alone; then by training a Gabor layer
    with the library's own optimiser.

    Args:
        noise: Standard deviation of noise on the responses, as a share of their own.
        learning_rate: Step sizes of the descents.
        momentum: Momenta of the descents.
        steps: Steps of each descent.
        seed: Seed of the noise.
    """
    _at_least(1, steps=steps)
    _at_least(0, noise=noise, learning_rate=min(learning_rate), momentum=min(momentum))

    with _run("recover", output) as run:
        from gaborium.experiments import recover_planted

        arguments, run.facts = experiment.arguments()
        run.result = recover_planted(
            **arguments,
            noise=noise,
            learning_rates=learning_rate,
            momenta=momentum,
            n_steps=steps,
            seed=seed,
            on_progress=run.progress,
        )


def fit(
    file: Path,
    /,
    *,
    kernels: Kernels = _KERNELS,
    geometry: Literal["pair", "filter"] | None = None,
    fixed_center: bool = False,
    isotropic: bool = False,
    n_starts: int = 12,
    output: Output = _OUTPUT,
) -> None:
    """Find the Gabor functions nearest to the kernels in a file.

    Args:
        file: A .npy, .npz, .safetensors, .pt, .pth or .onnx file, or a folder of images. Axes
            are (filters, height, width) or (filters, channels, height, width). Nothing is
            unpickled.
        geometry: "filter": the channels of a filter share orientation, wavelength, sigma, aspect
            ratio and centre. "pair": each channel has its own. By default "filter" if there is
            an axis of channels.
        fixed_center: Keep the envelope's centre at the kernel's middle.
        isotropic: Keep the aspect ratio at 1.
        n_starts: Maximum number of starts for each filter.
    """
    with _run("fit", output) as run:
        from gaborium import FitResult
        from gaborium import fit as fit_kernels

        found, run.facts = kernels.read(file)
        share = geometry or ("filter" if found.values.ndim >= found.n_dims + 2 else "pair")
        # One filter per entry, so that pieces of the file are pieces of the result.
        size = found.values.shape[-found.n_dims - (share == "filter") :]
        run.kernels = found.values.reshape(-1, *size)
        results: list[FitResult] = []
        for piece in run.kernels.split(_PIECE):
            run.progress("Fitting", sum(map(len, results)), len(run.kernels))
            results.append(
                fit_kernels(
                    piece,
                    n_dims=found.n_dims,
                    geometry=share,
                    center=not fixed_center,
                    isotropic=isotropic,
                    n_starts=n_starts,
                )
            )
        run.progress("Fitting", len(run.kernels), len(run.kernels))
        run.result = FitResult.cat(results)


def census(
    file: Path,
    /,
    *,
    kernels: Kernels = _KERNELS,
    n_starts: int = 12,
    output: Output = _OUTPUT,
) -> None:
    """Classify every filter of a first layer: Gabor function, edge, blob, noise and so on.

    Args:
        file: A file as for gaborium fit, or a Python script whose setup() returns a network; the
            script is run.
        n_starts: Maximum number of starts of the fit for each filter.
    """
    with _run("census", output) as run:
        from gaborium import census as classify

        found, run.facts = kernels.read(file)
        run.kernels = found.layer().weight.detach()
        options: Any = {"n_dims": found.n_dims, "n_starts": n_starts}
        run.result = classify(run.kernels, **options, on_progress=run.progress)


def convert(
    file: Path,
    /,
    *,
    kernels: Kernels = _KERNELS,
    images: Path | None = None,
    max_images: int = 64,
    threshold: float = 0.8,
    filters: tuple[int, ...] = (),
    stride: int = 1,
    padding: int | None = None,
    n_starts: int = 12,
    output: Output = _OUTPUT,
) -> None:
    """Replace the filters of a trained layer by Gabor functions that explain them.

    Also writes layer.safetensors, the new layer for gaborium.storage.load_layer, and
    weights.safetensors, all tensors of the file or network with the new kernels.

    Args:
        file: Weights of a network or a layer: .safetensors, .pt, .pth, .npz or .npy. Or a Python
            script whose setup() returns a network; the script is run.
        images: A photograph, or a folder of photographs. With it the responses to these images
            are preserved, not the kernels; the images are normalised to mean 0 and deviation 1.
        max_images: Maximum number of photographs from a folder.
        threshold: Share of a filter's variance that its Gabor function must explain, 0 to 1.
        filters: Numbers of the filters to convert, regardless of the share.
        stride: Stride of the layer, which a file of weights does not contain.
        padding: Padding of the layer; by default half a kernel.
        n_starts: Maximum number of starts of the fit for each filter.
    """
    _at_least(1, max_images=max_images, stride=stride)
    _at_least(0, padding=padding or 0)
    if not 0 <= threshold <= 1:
        raise ValueError(f"--threshold must be from 0 to 1, got {threshold}.")

    with _run("convert", output) as run:
        from gaborium import convert as convert_layer
        from gaborium.storage import save_layer
        from gaborium.support import write_tensors

        found, run.facts = kernels.read(file)
        layer = found.layer(stride=stride, padding=padding)
        run.kernels = layer.weight.detach()
        batches = None
        if images is not None:
            batches = _calibration(images, max_images, run.kernels)
            run.facts["images"] = f"{len(batches)} from {images}"
        run.result = convert_layer(
            layer,
            calibrate=batches,
            threshold=threshold,
            filters=filters or None,
            n_starts=n_starts,
        )
        if run.result.is_gabor.any():
            save_layer(run.result.layer, run.folder / "layer.safetensors")
        weights = found.weights_with(run.result.layer)
        header = {"name": "gaborium.weights", "format": 1, "file": file.name, "array": found.key}
        write_tensors(run.folder / "weights.safetensors", weights, header)
        for name in sorted(weights.keys() - found.arrays.keys() - {"weight"}):
            _say(f"Note: weights.safetensors has a new bias {name!r}, for the responses' means.")


def diagnose(
    file: Path | None = None,
    /,
    *,
    experiment: Experiment = _EXPERIMENT,
    loss: Literal["rmse", "mse"] = "rmse",
    learning_rate: float = 1.0,
    momentum: float = 0.0,
    steps: int = 400,
    kernels: Kernels = _KERNELS,
    output: Output = _OUTPUT,
) -> None:
    """Find out why a Gabor layer does not learn, and how to fix it.

    Without a file it diagnoses the built-in experiment: a Gabor layer at the wrong orientation
    learns that of a planted kernel, from a photograph and its responses.

    Args:
        file: A Python script that defines setup(), which returns (module, loss, (inputs,
            targets)), and optionally the optimizer; the script is run. Or a layer from
            gaborium.storage.save_layer, or kernels as for gaborium fit, whose filters are checked.
        loss: Experiment: loss between outputs and responses.
        learning_rate: Experiment: step size of the descent.
        momentum: Experiment: momentum of the descent.
        steps: Steps of each trial, with and without a remedy.
    """
    _at_least(1, steps=steps)
    _at_least(0, learning_rate=learning_rate, momentum=momentum)
    options = (experiment, loss, learning_rate, momentum)
    if file is not None and options != (_EXPERIMENT, "rmse", 1.0, 0.0):
        raise ValueError(f"Options of the built-in experiment have no effect on {str(file)!r}.")
    is_script = file is not None and file.suffix == ".py"
    if (file is None or is_script) and kernels != _KERNELS:
        raise ValueError("--key and --n-dims are options of a file of kernels.")
    if file is not None and not is_script and steps != 400:
        raise ValueError(f"--steps is the length of trials, and {str(file)!r} has none.")

    with _run("diagnose", output) as run:
        from torch.nn.functional import mse_loss

        from gaborium import diagnostics
        from gaborium.experiments import planted_setup, rmse
        from gaborium.readers import run_setup, script_errors

        if file is not None and not is_script:
            found, run.facts = kernels.read(file)
            run.result = diagnostics.diagnose_filters(found.layer())
            return
        if file is not None:
            setup, run.facts = run_setup(file), {"script": str(file)}
        else:
            arguments, run.facts = experiment.arguments()
            descent: Any = {"learning_rate": learning_rate, "momentum": momentum}
            arguments["loss"] = rmse if loss == "rmse" else mse_loss
            setup = planted_setup(**arguments, **descent)
        with nullcontext() if file is None else script_errors(file):
            run.result = diagnostics.diagnose(
                *setup[:3],
                optimizer=setup[3],
                n_steps=steps,
                on_progress=lambda part: run.progress(part, 1, 1),
            )


def train(
    recipe: Path | None = None,
    /,
    *,
    options: Any = None,
    tensorboard: bool = False,
    output: Output = _OUTPUT,
) -> None:
    """Train a small network with a Gabor first layer, and compare it with an ordinary one.

    By default it learns textures from scikit-image. Also writes recipe.toml, checkpoints, and
    metrics.jsonl during the training. The same command continues a stopped training.

    Args:
        recipe: A recipe as a TOML file. The options override it.
        tensorboard: Write for TensorBoard too.
    """
    if recipe is not None and not recipe.is_file():
        raise FileNotFoundError(f"There is no recipe {str(recipe)!r}.")
    with _run("train", output, resume=True) as run:
        from gaborium import Recipe
        from gaborium import train as train_networks

        chosen = Recipe() if recipe is None else Recipe.from_toml(recipe)
        given = {name: value for name, value in vars(options).items() if value is not None}

        def report(line: Mapping[str, Any]) -> None:
            run.progress(f"{line['variant']}, seed {line['seed']}", line["step"], line["n_steps"])

        run.result = train_networks(
            chosen.replace(**given),
            folder=run.folder,
            resume=not output.overwrite,
            tensorboard=tensorboard,
            progress=report,
        )


@contextmanager
def _run(command: str, output: Output, *, resume: bool = False) -> Iterator[Any]:
    """The frame of all commands: load torch, let them work, write the report, print the answer.

    A command gets ``folder`` and ``progress`` (stage, steps done, steps in all), and sets
    ``result``, and perhaps ``kernels`` and ``facts`` of the report. With ``resume`` it keeps its
    own folder; others get one that appears when it is complete.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    begun, place = time.monotonic(), output.out / (output.name or command)
    console = _console()
    with console.status("Loading PyTorch"):
        import torch

        from gaborium.report import describe, write_index, write_report
        from gaborium.support import new_folder
    # Small tensors: a second thread costs more than it gains, especially on a busy machine.
    torch.set_num_threads(1)

    is_first = not int(os.environ.get("RANK", "0"))  # of the processes of torchrun
    own = nullcontext(place) if resume else new_folder(place, overwrite=output.overwrite)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    bars = Progress(*columns, TimeElapsedColumn(), console=console)

    def progress(stage: str, done: int, total: int) -> None:
        task = next((task.id for task in bars.tasks if task.description == stage), None)
        bars.update(bars.add_task(stage) if task is None else task, completed=done, total=total)

    try:
        with own as folder:
            with bars:
                run = SimpleNamespace(folder=folder, progress=progress, kernels=None, facts={})
                yield run
            if is_first:
                run.facts["command"] = shlex.join(["gaborium", *sys.argv[1:]])
                with console.status("Writing the report"):
                    write_report(run.result, folder, kernels=run.kernels, facts=run.facts)
    except KeyboardInterrupt:
        if resume:
            raise KeyboardInterrupt(
                f"the same command continues from the last checkpoint in {place}."
            ) from None
        raise
    if is_first:
        _print_report(console, describe(run.result))
        console.print(f"Report: {place / 'report.html'}", soft_wrap=True)
        if (index := write_index(output.out)) is not None:
            console.print(f"All runs: {index}", soft_wrap=True)
        console.print(f"Took {time.monotonic() - begun:.0f} s.")


def _console(**options: Any) -> Any:
    """A terminal on which texts are shown as they are."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **options)


def _print_report(console: Any, report: Any) -> None:
    """Print the sections of the report that are text: the same words and tables as on the page."""
    from rich.box import SIMPLE_HEAD
    from rich.padding import Padding
    from rich.table import Table

    console.print(report.headline, style="bold")
    for sentence in report.sentences:
        console.print(sentence)
    for section in report.sections:
        table: Any = section.table
        if table and not all(isinstance(cell, str) for row in table.rows for cell in row):
            table = None  # of pictures
        if not (section.tone or table):
            continue
        console.print()
        console.print(section.title, style=_SEVERITY_STYLES.get(section.tone, "bold"))
        for paragraph in section.text:
            console.print(Padding.indent(paragraph, 3))
        if table:
            shown = Table(box=SIMPLE_HEAD, padding=(0, 0))
            for index, name in enumerate(table.head):
                shown.add_column(name, justify="left" if index < table.n_words else "right")
            for row in table.rows:
                shown.add_row(*row)
            console.print(shown)
        if section.code:
            console.print()
            console.print(textwrap.indent(section.code.rstrip(), " " * 5), soft_wrap=True)


def _calibration(path: Path, max_images: int, kernels: Tensor) -> list[Tensor]:
    """Photographs as batches of one, with mean 0 and standard deviation 1 over all of them."""
    import torch

    from gaborium.readers import read_images

    n_channels, n_dims = kernels.shape[1], kernels.ndim - 2
    if n_channels not in (1, 3) or n_dims != 2:
        raise ValueError(
            f"--images needs kernels of 1 or 3 channels and 2 dimensions, got {n_channels} and "
            f"{n_dims}; convert the network in Python, with calibrate."
        )
    images = [pixels for _, pixels in read_images(path, max_images)]
    if n_channels == 1:
        images = [pixels.mean(0, keepdim=True) for pixels in images]
    images = [pixels.expand(n_channels, -1, -1) for pixels in images]
    values = torch.cat([pixels.flatten(1) for pixels in images], 1)
    mean, deviation = values.mean(1)[:, None, None], values.std()
    return [((pixels - mean) / deviation)[None].to(kernels) for pixels in images]


def _app(cyclopts: Any, tokens: Sequence[str]) -> Any:
    app = cyclopts.App(
        name="gaborium",
        help="Convolution layers whose kernels are Gabor functions with learned parameters.",
        version=__version__,
        default_parameter=cyclopts.Parameter(consume_multiple=True, negative=()),
        print_error=False,
        exit_on_error=False,
        suppress_keyboard_interrupt=False,
    )
    for record in (Output, Experiment, Kernels):
        cyclopts.Parameter(name="*")(record)
    for command in (recover, fit, census, convert, diagnose):
        app.command(command)
    if tokens[:1] == ["train"]:  # reading the recipe's fields takes a while
        kind = _recipe_options(cyclopts)
        train.__annotations__["options"] = kind
        train.__kwdefaults__ = {**(train.__kwdefaults__ or {}), "options": kind()}
    # An empty list needs an option of its own, such as --no-compare-with.
    negative = {"negative": None, "negative_bool": (), "negative_iterable": ("no-",)}
    app.command(train, default_parameter=cyclopts.Parameter(**negative))
    return app


def _recipe_options(cyclopts: Any) -> Any:
    """The fields of a recipe as options, all ``None`` unless given, so that a file can set them."""
    from gaborium.training.recipe import Recipe

    hints, fields = get_type_hints(Recipe), []
    for field in dataclasses.fields(Recipe):
        shown = cyclopts.Parameter(show_default=lambda _, default=field.default: str(default))
        fields.append((field.name, Annotated[hints[field.name] | None, shown], None))
    options = dataclasses.make_dataclass("Options", fields, frozen=True)
    options.__doc__, options.__module__ = Recipe.__doc__, __name__
    return cyclopts.Parameter(name="*")(options)


class _Interrupted(KeyboardInterrupt):
    """Python exits with a code of its own after an exact KeyboardInterrupt in a string of code."""


def _interrupt(*_: object) -> NoReturn:
    raise _Interrupted


def _fail(error: object) -> NoReturn:
    _say(f"gaborium: {' '.join(str(error).split())}")
    sys.exit(_BAD_INPUT)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"Note: {message}")
