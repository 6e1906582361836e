"""The command line: parse, call one public function, write files."""

from __future__ import annotations

import inspect
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

from gaborium import __version__
from gaborium.errors import require

if TYPE_CHECKING:
    from gaborium.diagnostics import TrainingSetup

_BAD_INPUT = 2
_INTERRUPTED = 130
_PIECE = 1024  # kernels between two steps of the progress bar
_PIECE_VALUES = 4_000_000  # numbers in them: large kernels take as much memory as many small ones


def main(tokens: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 2 bad input, 130 interrupted.

    Args:
        tokens: the arguments; by default those of the process.
    """
    # A terminated run must clean up after itself as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    warnings.showwarning = _show_warning
    try:
        cyclopts = require("cyclopts", extra="cli", purpose="Commands")
    except ImportError as error:
        _fail(error)
    try:
        _app(cyclopts)(sys.argv[1:] if tokens is None else list(tokens))
    except cyclopts.CycloptsError as error:
        _fail(f"{error} See gaborium --help.")
    except KeyboardInterrupt:
        _say("Interrupted; nothing was written.")
        sys.exit(_INTERRUPTED)
    except (ValueError, TypeError, OSError, ImportError) as error:
        _fail(error)
    sys.exit(0)


def recover(
    *,
    image: Path | None = None,
    orientation: float = math.pi / 4,
    wavelength: float = 6.0,
    phase: tuple[float, ...] = (0.0,),
    sigma: float = 3.0,
    aspect_ratio: float = 1.0,
    amplitude: tuple[float, ...] = (1.0,),
    start_orientation: float = -math.pi / 4,
    kernel_size: int = 15,
    noise: float = 0.0,
    crop: int = 96,
    max_images: int = 8,
    learning_rate: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0),
    momentum: tuple[float, ...] = (0.0, 0.9),
    steps: int = 300,
    seed: int = 0,
    name: str = "recover",
    out: Path = Path("runs"),
    overwrite: bool = False,
) -> None:
    """Plant a Gabor kernel, convolve a photograph with it, and find it again in three ways.

    First by gradient descent on the orientation under the root of the mean squared error, which
    goes wrong; then by `recover`, from images and responses alone; then by training a Gabor
    layer with gradients in a way that arrives. Writes result.json, report.html and figures.

    Args:
        image: A photograph, or a folder of them; by default scikit-image's "camera".
        orientation: Planted direction of the wave, rad from +x towards +y (y runs down).
        wavelength: Planted wavelength, px.
        phase: Planted phase, rad; one number, or one per colour channel.
        sigma: Planted standard deviation along the wave, px.
        aspect_ratio: Planted aspect ratio; along the stripes the standard deviation is sigma
            over it.
        amplitude: Planted amplitude; one number, or one per colour channel.
        start_orientation: Where the descents and the training begin, rad.
        kernel_size: Height and width of the kernel, px.
        noise: Standard deviation of noise on the responses, as a share of their own.
        crop: Side of the square cut from the middle of each photograph, px; 0 takes all of it.
        max_images: How many photographs of a folder to use.
        learning_rate: Step sizes of the descents.
        momentum: Momenta of the descents.
        steps: Steps of each descent and of the training.
        seed: Seed of the noise.
        name: Name of the run.
        out: Folder of all runs.
        overwrite: Replace an earlier run of this name.
    """
    begun = time.monotonic()
    console = require("rich.console", extra="cli", purpose="Commands").Console()
    _check_experiment(steps, kernel_size, max_images, crop, noise=noise)
    for what, values in (("--learning-rate", learning_rate), ("--momentum", momentum)):
        if not all(0 <= value < math.inf for value in values):
            raise ValueError(f"{what} must not be negative, got {min(values)}.")
    _check_name(name)

    with console.status("Loading PyTorch"):
        import torch

        from gaborium.experiments import recover_planted
        from gaborium.files import new_folder
        from gaborium.params import Gabor2d
        from gaborium.report import write_report

    # On one crop of a photograph a second thread costs more than it gains, and on a busy machine
    # very much more.
    torch.set_num_threads(1)
    given: dict[str, Any] = {
        "wavelength": wavelength,
        "sigma": sigma,
        "aspect_ratio": aspect_ratio,
        "phase": phase if len(phase) > 1 else phase[0],
        "amplitude": amplitude if len(amplitude) > 1 else amplitude[0],
    }
    target = Gabor2d.of(orientation=orientation, **given)
    start = Gabor2d.of(orientation=start_orientation, **given)
    photographs = _photographs(image, crop, max_images)
    names = [title for title, _ in photographs]
    with new_folder(out / name, overwrite=overwrite) as folder:
        with _progress(console) as on_progress:
            result = recover_planted(
                [pixels for _, pixels in photographs],
                target,
                start=start,
                kernel_size=kernel_size,
                noise=noise,
                learning_rates=learning_rate,
                momenta=momentum,
                n_steps=steps,
                seed=seed,
                on_progress=on_progress,
            )
        with console.status("Writing the report"):
            facts = {
                "photograph": ", ".join(names),
                "crop": f"{crop} px" if crop else "none",
                "command": _command(),
                "seed": str(seed),
                "steps": str(steps),
            }
            write_report(result, folder, facts=facts)
    _print_report(console, result)
    _print_end(console, out / name, begun)


def fit(
    file: Path,
    /,
    *,
    key: str | None = None,
    geometry: Literal["pair", "filter"] | None = None,
    n_dims: Literal[1, 2, 3] = 2,
    center: bool = True,
    isotropic: bool = False,
    n_starts: int = 12,
    name: str = "fit",
    out: Path = Path("runs"),
    overwrite: bool = False,
) -> None:
    """Find the Gabor functions nearest to the kernels in a file.

    Writes result.json, result.csv with a row for each filter and parameter, report.html and
    figures.

    Args:
        file: A .npy, .npz, .safetensors, .pt, .pth or .onnx file, or a folder of images. Axes
            are (filters, height, width) or (filters, channels, height, width). Nothing is
            unpickled.
        key: Name of the array in a file with several.
        geometry: "filter": the channels of a filter share orientation, wavelength, sigma, aspect
            ratio and centre. "pair": every channel for itself. By default "filter" where there
            is an axis of channels.
        n_dims: Spatial dimensions of a kernel.
        center: Search for the envelope's centre; otherwise it is the kernel's middle.
        isotropic: Keep the aspect ratio at 1.
        n_starts: Candidates that are followed for each filter at most.
        name: Name of the run.
        out: Folder of all runs.
        overwrite: Replace an earlier run of this name.
    """
    begun = time.monotonic()
    console = require("rich.console", extra="cli", purpose="Commands").Console()
    _check_least(1, n_starts=n_starts)
    _check_name(name)

    with console.status("Loading PyTorch"):
        import torch

        from gaborium.files import new_folder
        from gaborium.fitting import FitResult
        from gaborium.fitting import fit as fit_kernels
        from gaborium.readers import read_kernels
        from gaborium.report import write_report

    torch.set_num_threads(1)  # as in recover
    found = read_kernels(file, key=key, n_dims=n_dims)
    values, shape = found.values, " × ".join(map(str, found.values.shape))
    if geometry is None:
        geometry = "filter" if values.ndim == n_dims + 2 else "pair"
    if geometry == "filter" and values.ndim < n_dims + 2:
        raise ValueError(
            f"--geometry filter needs an axis of channels, got kernels of shape {shape}; leave it "
            "out or use --geometry pair."
        )
    # One filter to an entry, so that pieces of the file are pieces of the result.
    kernels = values.reshape(-1, *values.shape[-n_dims - (geometry == "filter") :])
    step = max(1, min(_PIECE, _PIECE_VALUES // kernels[0].numel()))
    with new_folder(out / name, overwrite=overwrite) as folder:
        results = []
        with _progress(console) as on_progress:
            on_progress("Fitting", 0, len(kernels))
            for piece in kernels.split(step):
                results.append(
                    fit_kernels(
                        piece,
                        n_dims=n_dims,
                        geometry=geometry,
                        center=center,
                        isotropic=isotropic,
                        n_starts=n_starts,
                    )
                )
                on_progress("Fitting", sum(map(len, results)), len(kernels))
        result = FitResult.cat(results)
        with console.status("Writing the report"):
            facts = {
                "file": found.name,
                **({"array": found.key} if found.key else {}),
                "shape": shape,
                "SHA-256": found.sha256,
                "command": _command(),
                "geometry": geometry,
                "centre": "searched for" if center else "the kernel's middle",
                **({"aspect ratio": "1"} if isotropic else {}),
                "starts": str(n_starts),
            }
            write_report(result, folder, kernels=kernels, facts=facts)
    _print_report(console, result, found.name)
    _print_end(console, out / name, begun)


def census(
    source: Path,
    /,
    *,
    key: str | None = None,
    n_dims: Literal[1, 2, 3] = 2,
    n_starts: int = 12,
    name: str = "census",
    out: Path = Path("runs"),
    overwrite: bool = False,
) -> None:
    """Say of every filter of a first layer what it is: a Gabor function, an edge, a blob, noise.

    Writes result.json, result.csv with a row for each filter, report.html, and a figure as PDF,
    SVG and PNG.

    Args:
        source: A .npy, .npz, .safetensors, .pt, .pth or .onnx file, or a folder of images; axes
            are (filters, height, width) or (filters, channels, height, width); nothing is
            unpickled. Or a Python file whose setup() returns a network.
        key: Name of the layer to take instead of the first convolution, as "conv1"; in a file
            also the name of an array, as "conv1.weight".
        n_dims: Spatial dimensions of a kernel in a file.
        n_starts: Candidates that the fit follows for each filter at most.
        name: Name of the run.
        out: Folder of all runs.
        overwrite: Replace an earlier run of this name.
    """
    begun = time.monotonic()
    console = require("rich.console", extra="cli", purpose="Commands").Console()
    _check_least(1, n_starts=n_starts)
    _check_name(name)

    with console.status("Loading PyTorch"):
        import torch

        from gaborium.conversion import census as look_at
        from gaborium.files import new_folder
        from gaborium.readers import read_layer
        from gaborium.report import write_report

    torch.set_num_threads(1)  # as in recover
    conv, found = read_layer(source, key=key, n_dims=n_dims)
    shown, kernels = found.name, conv.weight.detach()
    n_dims = cast("Literal[1, 2, 3]", kernels.ndim - 2)
    facts = {
        "file": found.name,
        **({"array": found.key} if found.key else {}),
        "SHA-256": found.sha256,
    }
    facts |= {
        "shape": " × ".join(map(str, found.values.shape)),
        "command": _command(),
        "starts": str(n_starts),
    }
    with new_folder(out / name, overwrite=overwrite) as folder:
        with _progress(console) as on_progress:
            result = look_at(kernels, n_dims=n_dims, n_starts=n_starts, on_progress=on_progress)
        with console.status("Writing the report"):
            write_report(result, folder, kernels=kernels, facts=facts)
    _print_report(console, result, shown)
    _print_end(console, out / name, begun)


def convert(
    source: Path,
    /,
    *,
    key: str | None = None,
    images: Path | None = None,
    max_images: int = 64,
    threshold: float = 0.8,
    filters: tuple[int, ...] = (),
    stride: int = 1,
    padding: int | None = None,
    n_dims: Literal[1, 2, 3] = 2,
    n_starts: int = 12,
    name: str = "convert",
    out: Path = Path("runs"),
    overwrite: bool = False,
) -> None:
    """Replace the filters of a trained layer by Gabor functions, where they are good enough.

    Writes layer.safetensors, the new layer for gaborium.storage.load_layer; weights.safetensors,
    all that the file or network holds with the new kernels in it, for the network as it was;
    result.json, result.csv, report.html, and a figure as PDF, SVG and PNG.

    Args:
        source: Weights of a network or of a layer: .safetensors, .pt, .pth, .npz or .npy; nothing
            is unpickled. Or a Python file whose setup() returns a network.
        key: Name of the layer to take instead of the first convolution, as "conv1"; in a file
            also the name of an array, as "conv1.weight".
        images: A photograph, or a folder of them. With it the responses to these images are kept,
            and not the kernels; the images are brought to mean 0 and deviation 1.
        max_images: Photographs to take of a folder.
        threshold: Share of a filter's variance that its Gabor function must explain, from 0 to 1.
        filters: Numbers of the filters to convert, whatever is explained.
        stride: Of the layer, which the weights in a file do not tell.
        padding: Of the layer in a file; by default half a kernel.
        n_dims: Spatial dimensions of a kernel in a file.
        n_starts: Candidates that the fit follows for each filter at most.
        name: Name of the run.
        out: Folder of all runs.
        overwrite: Replace an earlier run of this name.
    """
    begun = time.monotonic()
    console = require("rich.console", extra="cli", purpose="Commands").Console()
    _check_least(1, n_starts=n_starts, max_images=max_images, stride=stride)
    _check_least(0, padding=padding)
    _check_name(name)
    if not 0 <= threshold <= 1:
        raise ValueError(f"--threshold must be from 0 to 1, got {threshold}.")

    with console.status("Loading PyTorch"):
        import torch

        from gaborium.conversion import convert as convert_layer
        from gaborium.files import new_folder, write_tensors
        from gaborium.readers import read_layer
        from gaborium.report import write_report
        from gaborium.storage import save_layer

    torch.set_num_threads(1)  # as in recover
    conv, found = read_layer(source, key=key, n_dims=n_dims, stride=stride, padding=padding)
    calibrate = None if images is None else _calibration(images, max_images, conv)
    with new_folder(out / name, overwrite=overwrite) as folder:
        with console.status("Looking for Gabor functions"), _called("filters", "--filters"):
            conversion = convert_layer(
                conv,
                calibrate=calibrate,
                threshold=threshold,
                filters=filters or None,
                n_starts=n_starts,
            )
        with console.status("Writing the report"):
            facts = {
                "file": found.name,
                **({"array": found.key} if found.key else {}),
                "shape": " × ".join(map(str, conv.weight.shape)),
                "SHA-256": found.sha256,
                **({"images": f"{len(calibrate)} from {images}"} if calibrate else {}),
                "command": _command(),
                "starts": str(n_starts),
            }
            if conversion.is_gabor.any():
                save_layer(conversion.layer, folder / "layer.safetensors")
            weights = found.weights_with(conversion.layer)
            write_tensors(
                folder / "weights.safetensors",
                weights,
                {"name": "gaborium.weights", "format": 1, "file": found.name, "array": found.key},
            )
            write_report(conversion, folder, kernels=conv.weight.detach(), facts=facts)
    _print_report(console, conversion, found.name)
    for added in sorted(set(weights) - set(found.arrays)):
        console.print(
            _plain(
                f"weights.safetensors has {added!r}, a bias that keeps the responses' means; a "
                "network that takes these weights needs one in this layer."
            )
        )
    _print_end(console, out / name, begun)


def diagnose(
    file: Path | None = None,
    /,
    *,
    image: Path | None = None,
    orientation: float = math.pi / 4,
    wavelength: float = 6.0,
    phase: tuple[float, ...] = (0.0,),
    sigma: float = 3.0,
    aspect_ratio: float = 1.0,
    start_orientation: float = -math.pi / 4,
    kernel_size: int | None = None,
    padding: int = 0,
    crop: int = 96,
    max_images: int = 8,
    loss: Literal["rmse", "mse"] = "rmse",
    learning_rate: float = 1.0,
    momentum: float = 0.0,
    steps: int = 100,
    key: str | None = None,
    n_dims: Literal[1, 2, 3] = 2,
    name: str = "diagnose",
    out: Path = Path("runs"),
    overwrite: bool = False,
) -> None:
    """Find out why a Gabor layer does not learn, and what to do.

    Without a file it looks at the built-in experiment: a Gabor layer at the wrong orientation is
    to find that of a planted kernel from a photograph and its responses. Writes diagnosis.json,
    report.html and figures.

    Args:
        file: A Python script of yours that defines setup(), which returns (module, loss,
            (inputs, targets)) or the same and the optimizer; it is run. Or a saved Gabor layer
            (a state dict as .safetensors or .pt) or other kernels, as for gaborium fit, whose
            filters are looked at; nothing is unpickled.
        image: Experiment: a photograph, or a folder of them; by default scikit-image's "camera".
        orientation: Experiment: planted direction of the wave, rad from +x towards +y (y runs
            down).
        wavelength: Experiment: of the wave, px.
        phase: Experiment: of the wave, rad; one number, or one per colour channel.
        sigma: Experiment: standard deviation along the wave, px.
        aspect_ratio: Experiment: along the stripes the standard deviation is sigma over it.
        start_orientation: Experiment: where the layer begins, rad.
        kernel_size: Experiment: height and width of the kernel, px; 15 by default. Saved layer:
            its kernel size, which a state dict does not tell.
        padding: Experiment: zeros around the photograph, px.
        crop: Experiment: side of the square cut from the middle of each photograph, px; 0 takes
            all of it.
        max_images: Experiment: how many photographs of a folder to use.
        loss: Experiment: between outputs and responses.
        learning_rate: Experiment: step size of the descent.
        momentum: Experiment: of the descent.
        steps: Of each trial, with and without a remedy.
        key: File: prefix of the layer, or name of the array, in a file with several.
        n_dims: File: spatial dimensions of a kernel.
        name: Name of the run.
        out: Folder of all runs.
        overwrite: Replace an earlier run of this name.
    """
    begun = time.monotonic()
    console = require("rich.console", extra="cli", purpose="Commands").Console()
    is_script = file is not None and file.suffix == ".py"
    if file is not None:
        if kernel_size is not None:
            raise ValueError(
                f"--kernel-size is an option of the experiment; leave it out with {file}."
            )
        given = dict(locals())
        options = {name: given[name] for name in _EXPERIMENT}
        _refuse(diagnose, options, f"of the built-in experiment; leave it out with {file}")
    if file is None or is_script:
        _refuse(diagnose, {"key": key, "n_dims": n_dims}, "of a file of kernels")
    if file is not None and not is_script and steps != _default(diagnose, "steps"):
        raise ValueError("--steps is no option of a file of kernels, which does not train.")
    _check_experiment(
        *(steps, kernel_size, max_images, crop),
        padding=padding,
        learning_rate=learning_rate,
        momentum=momentum,
    )
    _check_name(name)

    with console.status("Loading PyTorch"):
        import torch

        from gaborium.diagnostics import diagnose as examine
        from gaborium.files import new_folder
        from gaborium.readers import read_layer, run_setup, script_errors
        from gaborium.report import write_report

    facts: dict[str, str] = {}
    with new_folder(out / name, overwrite=overwrite) as folder:
        if file is not None and not is_script:
            torch.set_num_threads(1)  # as in recover
            with console.status("Looking at the filters"):
                layer, found = read_layer(file, key=key, n_dims=n_dims)
                facts = {
                    "file": found.name,
                    **({"array": found.key} if found.key else {}),
                    "shape": " × ".join(map(str, found.values.shape)),
                    "SHA-256": found.sha256,
                }
                result = _diagnosis_of_filters(layer)
        else:
            if file is not None:
                setup = run_setup(file)
                facts["script"] = str(file)
            else:
                torch.set_num_threads(1)
                setup, facts = _experiment(
                    image, crop, max_images, kernel_size or 15, loss, learning_rate, momentum,
                    padding, orientation, start_orientation,
                    {"wavelength": wavelength, "sigma": sigma, "aspect_ratio": aspect_ratio,
                     "phase": phase if len(phase) > 1 else phase[0]},
                )  # fmt: skip
            facts |= {"steps": f"{steps} in each trial"}
            guard = script_errors(file) if file is not None else nullcontext()
            with console.status("Looking at the gradients") as status, guard:
                result = examine(
                    setup.module,
                    setup.loss,
                    (setup.inputs, setup.targets),
                    optimizer=setup.optimizer,
                    n_steps=steps,
                    on_progress=lambda part, *_: status.update(_plain(f"Looking at the {part}")),
                )
        with console.status("Writing the report"):
            write_report(result, folder, facts=facts | {"command": _command()})
    _print_report(console, result)
    _print_end(console, out / name, begun)


def train(
    recipe: Path | None = None,
    /,
    *,
    data: str | None = None,
    samples_per_class: int | None = None,
    first_layer: str | None = None,
    compare_with: tuple[str, ...] | None = None,
    n_filters: int | None = None,
    kernel_size: int | None = None,
    stride: int | None = None,
    start: str | None = None,
    learn: tuple[str, ...] | None = None,
    optimizer: str | None = None,
    learning_rate: float | None = None,
    gabor_learning_rate: float | None = None,
    schedule: str | None = None,
    weight_decay: float | None = None,
    label_smoothing: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seeds: tuple[int, ...] | None = None,
    n_evaluations: int | None = None,
    accelerator: str | None = None,
    devices: int | None = None,
    precision: str | None = None,
    tensorboard: bool = False,
    name: str = "train",
    out: Path = Path("runs"),
    overwrite: bool = False,
) -> None:
    """Train a small network, with a Gabor first layer and beside it with an ordinary one.

    Without anything it learns textures that come with scikit-image. Writes recipe.toml,
    metrics.jsonl as it goes, checkpoints, result.json, report.html and figures. Called again with
    the same recipe and name after it was stopped, it goes on where it was.

    Args:
        recipe: A recipe as a TOML file. The options below stand above what it says.
        data: "textures", "digits", "mnist", "fashion-mnist", "cifar10", a folder of images, or an
            .npz file.
        samples_per_class: Training images of each class; by default all.
        first_layer: "gabor", "gabor-fixed", "mixed" or "free".
        compare_with: First layers to train the same network with, for comparison.
        n_filters: Filters of the first layer.
        kernel_size: Of the first layer, px.
        stride: Of the first layer, px.
        start: Of the Gabor filters: "bank", "random" or "v1".
        learn: Fields of the Gabor filters that train.
        optimizer: Of the Gabor parameters: "adam" or "natural".
        learning_rate: Of all that is no Gabor parameter.
        gabor_learning_rate: Of the Gabor parameters.
        schedule: Of all learning rates: "constant" or "cosine", which falls to 0.
        weight_decay: Of all that is no Gabor parameter.
        label_smoothing: Share of the wanted probability that is spread evenly over all classes.
        epochs: Passes over the training images.
        batch_size: Images of one step at most.
        seeds: A network is trained for each.
        n_evaluations: How often at most the test images are looked at during a run.
        accelerator: "auto", "cpu", "cuda" or "mps".
        devices: Processes on this machine, with a device each.
        precision: "32-true", "64-true" or "bf16-mixed".
        tensorboard: Write for TensorBoard too, where it is installed.
        name: Name of the run.
        out: Folder of all runs.
        overwrite: Begin again, and replace an earlier run of this name.
    """
    given = dict(locals())
    begun = time.monotonic()
    console = require("rich.console", extra="cli", purpose="Commands").Console()
    _check_name(name)
    if recipe is not None and not recipe.is_file():
        raise FileNotFoundError(f"There is no recipe {str(recipe)!r}.")

    with console.status("Loading PyTorch"):
        import torch

        from gaborium.report import write_report
        from gaborium.training import Recipe, load_dataset
        from gaborium.training import train as follow

    torch.set_num_threads(1)  # as in recover
    chosen = Recipe() if recipe is None else Recipe.from_toml(recipe)
    fields = {field: given[field] for field in vars(chosen) if given[field] is not None}
    chosen = chosen.replace(**fields)
    # Told before any work is done, and not after it.
    for package in ("jinja2", "matplotlib"):
        require(package, extra="report", purpose="Reports")
    with console.status("Loading the images"):
        dataset = load_dataset(chosen.data)
    folder = out / name
    try:
        with _training_progress(console, chosen) as progress:
            result = follow(
                chosen,
                dataset=dataset,
                folder=folder,
                resume=not overwrite,
                tensorboard=tensorboard,
                progress=progress,
            )
    except KeyboardInterrupt:
        _say(f"Interrupted; the same command goes on from the last checkpoint in {folder}.")
        sys.exit(_INTERRUPTED)
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))):
        return  # only the first of several processes reports
    with console.status("Writing the report"):
        write_report(result, folder, facts={"command": _command()})
    _print_report(console, result)
    _print_end(console, folder, begun)


_EXPERIMENT = (
    *("image", "orientation", "wavelength", "phase", "sigma", "aspect_ratio"),
    *("start_orientation", "padding", "crop", "max_images", "loss", "learning_rate", "momentum"),
)


def _diagnosis_of_filters(layer: Any) -> Any:
    """What is wrong with the filters of a layer, without inputs and a loss."""
    from gaborium.diagnostics import Diagnosis, TrainingSetup, health

    found = health(layer)
    nothing = "A file of kernels holds no inputs, no targets and no loss."
    skipped = dict.fromkeys(("gradients", "landscapes", "step limit", "trials"), nothing)
    setup = TrainingSetup(layer, cast("Any", None), None, None)
    nan = (math.nan, math.nan)
    return Diagnosis(found.findings, {"health": found}, skipped, [], nan, setup)


def _refuse(command: Any, given: Mapping[str, Any], why: str) -> None:
    """An option that would be ignored is a misunderstanding, which is better told."""
    for name, value in given.items():
        if value != _default(command, name):
            raise ValueError(f"--{name.replace('_', '-')} is an option {why}.")


def _default(command: Any, name: str) -> Any:
    return inspect.signature(command).parameters[name].default


def _experiment(
    image: Path | None,
    crop: int,
    max_images: int,
    kernel_size: int,
    loss: str,
    learning_rate: float,
    momentum: float,
    padding: int,
    orientation: float,
    start_orientation: float,
    fields: dict[str, Any],
) -> tuple[TrainingSetup, dict[str, str]]:
    """The set-up of the built-in experiment, and how it was made."""
    from gaborium.experiments import planted_setup
    from gaborium.params import Gabor2d

    photographs = _photographs(image, crop, max_images)
    setup = planted_setup(
        [pixels for _, pixels in photographs],
        Gabor2d.of(orientation=orientation, **fields),
        start=Gabor2d.of(orientation=start_orientation, **fields),
        kernel_size=kernel_size,
        loss=loss,
        learning_rate=learning_rate,
        momentum=momentum,
        padding=padding,
    )
    return setup, {
        "photograph": ", ".join(title for title, _ in photographs),
        "crop": f"{crop} px" if crop else "none",
        "set-up": (
            f"{loss.upper()}, gradient descent on θ from {math.degrees(start_orientation):g}° "
            f"with step size {learning_rate:g}"
            + (f" and momentum {momentum:g}" if momentum else "")
            + f"; planted at {math.degrees(orientation):g}°"
        ),
    }


def _check_experiment(
    steps: int, kernel_size: int | None, max_images: int, crop: int, **others: float
) -> None:
    """Ranges of the built-in experiment's options; the others must not be negative."""
    _check_least(1, steps=steps, kernel_size=kernel_size, max_images=max_images)
    _check_least(0, crop=crop, **others)


def _check_least(least: int, **options: float | None) -> None:
    for name, value in options.items():
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}.")


@contextmanager
def _called(option: str, ours: str) -> Iterator[None]:
    """An option by the name that this command has for it, in errors and warnings."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            yield
        except ValueError as error:
            raise ValueError(str(error).replace(option, ours)) from None
    for one in told:
        warnings.warn(str(one.message).replace(option, ours), one.category, stacklevel=3)


def _check_name(name: str) -> None:
    if not name or Path(name).name != name or name.startswith("."):
        raise ValueError(f"--name must be a plain folder name, got {name!r}.")


def _command() -> str:
    return shlex.join(["gaborium", *sys.argv[1:]])


def _photographs(
    image: Path | None, crop: int, max_images: int, *, alike: bool = True
) -> list[tuple[str, Any]]:
    """Names and pixels, cut to one size so that they make a batch, or each as it is."""
    from gaborium.readers import center_crop, read_images, sample_image

    if image is None:
        photographs = [("camera (scikit-image)", sample_image())]
    else:
        photographs = read_images(image)
        if len(photographs) > max_images:
            _say(
                f"Note: using the first {max_images} of {len(photographs)} photographs in "
                f"{image}; --max-images takes more."
            )
            photographs = photographs[:max_images]
        if not alike:
            return photographs
        if len({pixels.shape[0] for _, pixels in photographs}) > 1:
            # Grey photographs among coloured ones have three equal channels.
            photographs = [(title, p.expand(3, -1, -1)) for title, p in photographs]
    smallest = [min(pixels.shape[axis] for _, pixels in photographs) for axis in (1, 2)]
    side = [min(crop or axis, axis) for axis in smallest]
    return [(title, center_crop(pixels, (side[0], side[1]))) for title, pixels in photographs]


def _calibration(path: Path, max_images: int, layer: Any) -> list[Any]:
    """Photographs as batches of one, as networks are fed: mean 0 and deviation 1."""
    import torch

    n_channels, n_dims = layer.weight.shape[1], layer.weight.ndim - 2
    if n_channels not in (1, 3) or n_dims != 2:
        raise ValueError(
            f"--images is for kernels of 1 or 3 channels and 2 dimensions, got {n_channels} and "
            f"{n_dims}; convert the network in Python, with calibrate."
        )
    photographs = [pixels for _, pixels in _photographs(path, 0, max_images, alike=False)]
    if n_channels == 1:
        photographs = [pixels.mean(0, keepdim=True) for pixels in photographs]
    photographs = [pixels.expand(n_channels, -1, -1) for pixels in photographs]
    values = torch.cat([pixels.flatten(1) for pixels in photographs], 1)
    mean, deviation = values.mean(1)[:, None, None], values.std()
    return [((pixels - mean) / deviation)[None].to(layer.weight) for pixels in photographs]


class _progress:  # noqa: N801  (used like a function)
    """A progress bar per stage on the terminal."""

    def __init__(self, console: Any) -> None:
        progress = require("rich.progress", extra="cli", purpose="Commands")
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Any:
        self._bars.__enter__()
        return self._update

    def __exit__(self, *error: object) -> None:
        self._bars.__exit__(*error)

    def _update(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done)


class _training_progress:  # noqa: N801  (used like a function)
    """A bar for each run on a terminal; elsewhere a line for each evaluation."""

    def __init__(self, console: Any, recipe: Any) -> None:
        self._console, self._recipe = console, recipe
        self._bars = _progress(console) if console.is_terminal else None
        self._update: Any = None

    def __enter__(self) -> Any:
        if self._bars is not None:
            self._update = self._bars.__enter__()
        return self._tell

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.__exit__(*error)

    def _tell(self, line: Mapping[str, Any]) -> None:
        run = f"{line['variant']}, seed {line['seed']}"
        if self._update is not None:
            self._update(run, line["step"], line["n_steps"])
        elif line["kind"] == "epoch" and "test_accuracy" in line and line["step"]:
            loss = f", loss {line['loss']:.3g}" if "loss" in line else ""
            self._console.print(
                f"{run}: epoch {line['epoch']} of {self._recipe.epochs}{loss}, test accuracy "
                f"{100 * line['test_accuracy']:.1f} %",
                highlight=False,
            )


def _print_report(console: Any, result: Any, name: str = "") -> None:
    """The texts, tables and code of the report."""
    from gaborium.report import headline, sections, sentences

    text = require("rich.text", extra="cli", purpose="Commands").Text
    console.print(text(f"{name}: " * bool(name) + headline(result), "bold"), highlight=False)
    for sentence in sentences(result):
        console.print(text(sentence), highlight=False)
    colors = {"severe": "bold red", "warning": "bold yellow", "note": "bold cyan"}
    for section in sections(result):
        if not section.text and not section.table:
            continue
        console.print()
        title = f"{section.title}  {section.tone.upper()}"
        console.print(text(title, colors.get(section.tone, "bold")))
        for paragraph in section.text:
            _print_indented(console, paragraph)
        if section.table:
            n_words = section.table.n_words
            table = _table("", section.table.head[n_words:], first=section.table.head[:n_words])
            for row in section.table.rows:
                table.add_row(*map(text, row))
            console.print(table)
        if section.code:
            _print_code(console, section.code)


def _print_indented(console: Any, words: str, style: str = "") -> None:
    text = require("rich.text", extra="cli", purpose="Commands").Text
    indent = " " * 3
    wrapped = textwrap.fill(
        words, max(console.width, 40), initial_indent=indent, subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    console.print(text(wrapped, style), soft_wrap=True, highlight=False)


def _print_code(console: Any, code: str) -> None:
    """Highlighted on a terminal; elsewhere as it is, so that it can be copied from a log."""
    if not console.is_terminal:
        for line in code.rstrip().splitlines():
            console.print(_plain(f"     {line}"), soft_wrap=True, highlight=False)
        return
    syntax = require("rich.syntax", extra="cli", purpose="Commands")
    padding = require("rich.padding", extra="cli", purpose="Commands")
    block = syntax.Syntax(
        code.rstrip(), "python", theme="ansi_dark", background_color="default", word_wrap=True
    )
    console.print(padding.Padding(block, (0, 0, 0, 5)))


def _plain(words: str) -> Any:
    """Text in which square brackets are no markup."""
    return require("rich.text", extra="cli", purpose="Commands").Text(words)


def _print_end(console: Any, folder: Path, begun: float) -> None:
    """Where the report is, how long it took, and where all runs are listed."""
    from gaborium.report import write_index

    console.print(f"Report: {folder / 'report.html'}", soft_wrap=True, highlight=False)
    console.print(f"Took {time.monotonic() - begun:.0f} s.", highlight=False)
    index = write_index(folder.parent)
    if index is not None:
        console.print(f"All runs: {index}", soft_wrap=True, highlight=False)


def _table(
    title: str, numbers: Sequence[str], last: Sequence[str] = (), *, first: Sequence[str] = ()
) -> Any:
    """A table of numbers between columns of words that fits 80 characters."""
    box = require("rich.box", extra="cli", purpose="Commands")
    rich_table = require("rich.table", extra="cli", purpose="Commands")
    table = rich_table.Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in first:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in last:
        table.add_column(name, no_wrap=True)
    return table


def _app(cyclopts: Any) -> Any:
    app = cyclopts.App(
        name="gaborium",
        help="Convolution layers whose kernels are Gabor functions with learned parameters.",
        version=__version__,
        default_parameter=cyclopts.Parameter(consume_multiple=True, negative=()),
        print_error=False,
        exit_on_error=False,
        suppress_keyboard_interrupt=False,  # main tells what it means for the files
    )
    app.command(recover)
    # A default that is on needs a way to turn it off.
    app.command(diagnose)
    app.command(
        train,
        default_parameter=cyclopts.Parameter(
            negative=None, negative_bool=(), negative_iterable=("no-",)
        ),
    )
    app.command(census)
    app.command(convert)
    app.command(fit, default_parameter=cyclopts.Parameter(negative=None, negative_bool=("no-",)))
    return app


def _fail(error: object) -> NoReturn:
    _say(f"gaborium: {' '.join(str(error).split())}")
    sys.exit(_BAD_INPUT)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"Note: {message}")
