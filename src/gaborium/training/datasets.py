"""Data sets to train on: images or sounds with their classes, and a part to test with."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium.errors import require
from gaborium.training.fetching import fetch_files
from gaborium.training.readers import (
    CIFAR_CLASSES,
    decode_jpegs,
    npz_names,
    read_cifar10,
    read_idx,
    read_image_folder,
    read_npz,
)

_DIGITS = tuple(map(str, range(10)))
_FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

# Where each data set's .npz may lie in its folder, and the sub-folder of a larger collection.
_NPZ = {
    "fashion-mnist": ("images", "fashion_mnist.npz"),
    "mnist": ("images", "mnist.npz"),
    "cifar10": ("images", "cifar10_jpeg.npz"),
    "kth-tips": ("textures", "kth_tips_grey.npz"),
    "brodatz": ("textures", "brodatz24.npz"),
    "spoken-digits": ("audio", "fsdd.npz"),
}
_CLASSES = {"fashion-mnist": _FASHION, "mnist": _DIGITS, "cifar10": CIFAR_CLASSES}
DATASETS = ("textures", "digits", *_NPZ)

_IDX = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}

# scikit-image's photographs that come inside its package and are much alike all over.
_PHOTOGRAPHS = (
    *("brick", "grass", "gravel", "moon", "hubble_deep_field", "immunohistochemistry"),
    *("coins", "page", "text"),
)
_PATCH, _PATCH_STEP = 32, 8  # px
_N_PATCHES = 400  # of each photograph's half; the smallest has 420
_PATCH_MEAN, _PATCH_STD = 128.0, 40.0

_BRODATZ_PATCH = 24  # px
_RATE = 8000  # samples a second, and of a spoken digit


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images or sounds with their classes, in a part to learn from and a part to test with.

    Args:
        name: as in ``load_dataset``.
        images: uint8 ``(n, channels, height, width)``, 0 black to 255 white; or sounds, float32
            ``(n, 1, samples)``, within [-1, 1].
        labels: int64 ``(n,)``: indices into ``classes``.
        test_images: as ``images``, of the same size.
        test_labels: as ``labels``.
        classes: the names of the classes.

    Raises:
        ValueError: a shape is another, counts differ, a label names no class.
        TypeError: a dtype is another.

    Example:
        >>> images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1, 0])
        >>> data = Dataset("mine", images, labels, images, labels, classes=("off", "on"))
        >>> data.n_classes, data.image_size, data.n_dims
        (2, (8, 8), 2)
    """

    name: str
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        for part, images, labels in (
            ("", self.images, self.labels),
            ("test_", self.test_images, self.test_labels),
        ):
            self._check(part, images, labels)
        if self.images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"images and test_images of {self.name!r} must have one shape, got "
                f"{tuple(self.images.shape[1:])} and {tuple(self.test_images.shape[1:])}."
            )

    def _check(self, part: str, images: Tensor, labels: Tensor) -> None:
        of = f"of {self.name!r}"
        wanted = {4: torch.uint8, 3: torch.float32}.get(images.ndim)
        if wanted is None or images.numel() == 0:
            raise ValueError(
                f"{part}images {of} must be (n, channels, height, width) or (n, 1, samples) and "
                f"not empty, got shape {tuple(images.shape)}."
            )
        if images.dtype != wanted or labels.dtype != torch.int64:
            raise TypeError(
                f"{part}images {of} must be {_dtype(wanted)} and {part}labels int64, got "
                f"{_dtype(images.dtype)} and {_dtype(labels.dtype)}."
            )
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"{part}labels {of} must be one per image, {len(images)}, got shape "
                f"{tuple(labels.shape)}."
            )
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= self.n_classes:
            raise ValueError(
                f"{part}labels {of} must be 0 to {self.n_classes - 1}, one of its "
                f"{self.n_classes} classes, got {low if low < 0 else high}."
            )
        if images.is_floating_point() and not bool((images.abs() <= 1).all()):
            raise ValueError(
                f"{part}images {of} must lie within [-1, 1], got values beyond it or NaN; divide "
                "sounds by their loudest possible value."
            )

    @property
    def n_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def n_dims(self) -> int:
        """Spatial dimensions: 2 of images, 1 of sounds."""
        return self.images.ndim - 2

    @property
    def image_size(self) -> tuple[int, ...]:
        """``(height, width)``, or ``(samples,)``."""
        return tuple(self.images.shape[2:])

    @property
    def n_channels(self) -> int:
        """1 of grey images and of sounds, 3 of coloured images."""
        return self.images.shape[1]

    def subset(self, samples_per_class: int | None, seed: int) -> Dataset:
        """A few samples of each class to learn from, drawn anew for each seed.

        Convention:
            - the draw depends on the seed and on nothing else; of one seed, the smaller subset is
              a part of the larger one
            - samples keep their order, and the part to test with is kept whole

        Args:
            samples_per_class: how many; ``None`` for all.
            seed: of the draw.

        Raises:
            ValueError: it is below 1, or a class has fewer.
        """
        if samples_per_class is None:
            return self
        if isinstance(samples_per_class, bool) or not isinstance(samples_per_class, int):
            raise TypeError(
                "samples_per_class must be a whole number or None, got "
                f"{type(samples_per_class).__name__}."
            )
        if samples_per_class < 1:
            raise ValueError(f"samples_per_class must be at least 1, got {samples_per_class}.")
        generator = torch.Generator().manual_seed(seed)
        chosen = []
        for index, name in enumerate(self.classes):
            own = (self.labels == index).nonzero().squeeze(1)
            if len(own) < samples_per_class:
                raise ValueError(
                    f"samples_per_class must be at most {len(own)}, what {self.name!r} has of "
                    f"class {name!r}, got {samples_per_class}."
                )
            chosen.append(own[torch.randperm(len(own), generator=generator)[:samples_per_class]])
        kept = torch.cat(chosen).sort().values
        return replace(self, images=self.images[kept], labels=self.labels[kept])


def load_dataset(
    name: str, folder: str | os.PathLike[str] | None = None, *, download: bool = False
) -> Dataset:
    """Load a data set by its name, or from your own files.

    ==================  ===========================================================  ==============
    name                images and classes                                           needs a folder
    ==================  ===========================================================  ==============
    ``textures``        32 px grey patches of nine photographs that scikit-image      no
                        brings along, all brought to one mean and contrast; to test
                        with, patches of the photographs' other halves
    ``digits``          scikit-learn's handwritten digits, 8 x 8 px; the last third  no
                        to test with
    ``fashion-mnist``   clothes, 28 x 28 px                                          yes
    ``mnist``           handwritten digits, 28 x 28 px                               yes
    ``cifar10``         things and animals in colour, 32 x 32 px                     yes
    ``kth-tips``        ten materials, 128 x 128 px; images 6 to 9 of each to test   yes
                        with
    ``brodatz``         24 px patches of 24 textures; the lower halves to test with  yes
    ``spoken-digits``   a second of raw sound at 8000 Hz; takes 0 to 4 to test with  yes
    ==================  ===========================================================  ==============

    The folder holds the files as they were published (MNIST and Fashion-MNIST: the four IDX files,
    plain or ``.gz``; CIFAR-10: its binary version, unpacked or ``.tar.gz``) or an ``.npz`` of them.

    Your own data is a folder of images, ``<train|test>/<class>/*.png``, or ``<class>/*.png``, of
    which the last fifth of each class (in the order of numbers in the names) is to test with; or
    an ``.npz`` file with ``x_train`` uint8 ``(n, height, width)`` or ``(n, height, width,
    channels)``, ``y_train``, ``x_test``, ``y_test`` and, if you like, ``classes``.

    Args:
        name: one of the above, or the path of a folder or of an ``.npz`` file.
        folder: where the files of a named data set are.
        download: fetch what is missing in ``folder`` from where it was published: MNIST,
            Fashion-MNIST and CIFAR-10. Checksums are compared.

    Returns:
        The data set, all of it in memory.

    Raises:
        FileNotFoundError: there is no such file or folder, or no images in it.
        OSError: a file cannot be opened, or not be fetched.
        ValueError: the name is none of the above, a folder is missing or one too many, or a file
            is not what it should be.
        ImportError: a package that reads it is not installed.

    Example:
        >>> data = load_dataset("textures")
        >>> data.image_size, data.classes[:3]
        ((32, 32), ('brick', 'grass', 'gravel'))
    """
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"name must be a text, got {type(name).__name__}.")
    if name in _EMBEDDED or name not in _NPZ:
        if folder is not None or download:
            raise ValueError(
                f"{str(name)!r} needs no folder and no download; leave them out, or choose one of "
                f"{', '.join(_NPZ)}."
            )
        return _EMBEDDED[name]() if name in _EMBEDDED else _from_path(name)
    if folder is None:
        raise ValueError(
            f"{name!r} needs folder (--folder): where its files are"
            f"{', or where to put them with download=True' if name in _CLASSES else ''}."
        )
    if download:
        if name not in _CLASSES:
            raise ValueError(
                f"download works for {', '.join(_CLASSES)}, got {name!r}; put its file "
                f"{_NPZ[name][1]!r} into {os.fspath(folder)!r} yourself."
            )
        fetch_files(name, folder)
    return _from_folder(name, Path(folder))


# -- what comes inside packages ---------------------------------------------------------------


def _textures() -> Dataset:
    data = require("skimage.data", extra="train", purpose="Textures")
    color = require("skimage.color", extra="train", purpose="Textures")
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for name in _PHOTOGRAPHS:
        photograph = getattr(data, name)()
        grey = color.rgb2gray(photograph) * 255 if photograph.ndim == 3 else photograph
        image = torch.tensor(grey, dtype=torch.float64)
        if min(image.shape) > 700:  # of the largest, the patches would show next to nothing
            image = F.avg_pool2d(image[None, None], 2)[0, 0]
        middle = image.shape[1] // 2
        for part, half in ((True, image[:, :middle]), (False, image[:, middle:])):
            patches = _patches(half, _PATCH_STEP)
            spread = torch.arange(_N_PATCHES) * len(patches) // _N_PATCHES
            parts[part].append(_even_contrast(patches[spread]))
    labels = torch.arange(len(_PHOTOGRAPHS)).repeat_interleave(_N_PATCHES)
    arrays = [torch.cat(parts[True]), labels, torch.cat(parts[False]), labels]
    return _of_parts("textures", arrays, _PHOTOGRAPHS)


def _patches(image: Tensor, step: int, size: int = _PATCH) -> Tensor:
    """All square patches of an image, ``(n, 1, size, size)``."""
    return image.unfold(0, size, step).unfold(1, size, step).reshape(-1, 1, size, size)


def _even_contrast(patches: Tensor) -> Tensor:
    """Patches of one mean and one contrast: brightness alone would tell photographs apart."""
    axes = (1, 2, 3)
    centred = patches - patches.mean(axes, keepdim=True)
    std = centred.square().mean(axes, keepdim=True).sqrt().clamp_min(1.0)
    even = _PATCH_MEAN + _PATCH_STD * centred / std
    return even.round().clamp(0, 255).to(torch.uint8)


def _digits() -> Dataset:
    data = require("sklearn.datasets", extra="train", purpose="Digits").load_digits()
    # Sixteen grey levels above black.
    images = (torch.tensor(data.images)[:, None] * (255 / 16)).round().to(torch.uint8)
    labels = torch.tensor(data.target, dtype=torch.int64)
    n = len(images) * 2 // 3
    return Dataset("digits", images[:n], labels[:n], images[n:], labels[n:], classes=_DIGITS)


_EMBEDDED: dict[Any, Callable[[], Dataset]] = {"textures": _textures, "digits": _digits}


# -- named data sets --------------------------------------------------------------------------


def _from_folder(name: str, folder: Path) -> Dataset:
    within, file = _NPZ[name]
    shown = repr(str(folder))
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"The folder {shown} {found}; give the folder of {name!r}.")
    for place in (folder / file, folder / within / file):
        if place.is_file():
            return replace(_from_npz(place, _CLASSES.get(name)), name=name)
    sought = [file]
    if name == "cifar10":
        for place in (folder / "cifar-10-batches-bin", folder, folder / "cifar-10-binary.tar.gz"):
            if (place / "data_batch_1.bin").is_file() or place.is_file():
                return _of_arrays(name, read_cifar10(place), CIFAR_CLASSES)
        sought += ["data_batch_1.bin", "cifar-10-binary.tar.gz"]
    elif name in _CLASSES:
        files = {key: _plain_or_packed(folder, stem) for key, stem in _IDX.items()}
        if any(files.values()):
            missing = [_IDX[key] for key, place in files.items() if place is None]
            if missing:
                raise FileNotFoundError(
                    f"{shown} lacks {', '.join(missing)} (plain or .gz) of {name!r}; copy them "
                    "there, or fetch them with download=True."
                )
            return _of_arrays(name, _idx_arrays(files), _CLASSES[name])
        sought.append(_IDX["x_train"] + "[.gz]")
    advice = ", or fetch it with download=True" if name in _CLASSES else ""
    raise FileNotFoundError(
        f"{shown} holds no files of {name!r}, sought {' or '.join(sought)}; give the folder that "
        f"does{advice}."
    )


def _plain_or_packed(folder: Path, stem: str) -> Path | None:
    return next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), None)


def _idx_arrays(files: Mapping[str, Path | None]) -> dict[str, Tensor]:
    arrays = {}
    for key, file in files.items():
        assert file is not None  # the caller has looked
        axes = 3 if key.startswith("x") else 1
        arrays[key] = read_idx(file)
        if arrays[key].ndim != axes:
            raise ValueError(
                f"{str(file)!r} holds an array of {arrays[key].ndim} axes, expected {axes}; check "
                "that images and labels were not exchanged."
            )
    return arrays


def _of_arrays(name: str, arrays: Mapping[str, Any], classes: tuple[str, ...] | None) -> Dataset:
    """The data set in ``x_train``, ``y_train``, ``x_test``, ``y_test``, tensors or arrays."""
    parts: list[Tensor] = []
    for part in ("train", "test"):
        images = torch.as_tensor(arrays[f"x_{part}"])
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[1] not in (1, 3):
            images = images.movedim(-1, 1).contiguous()
        parts += [images, torch.as_tensor(arrays[f"y_{part}"]).long()]
    if classes is None:
        classes = tuple(map(str, range(1 + max(int(y.max()) for y in parts[1::2] if len(y)))))
    return _of_parts(name, parts, classes)


def _of_parts(name: str, parts: list[Tensor], classes: tuple[str, ...]) -> Dataset:
    images, labels, test_images, test_labels = parts
    return Dataset(name, images, labels, test_images, test_labels, classes)


# -- .npz files, each layout by the arrays that it has ----------------------------------------


def _from_npz(file: Path, classes: tuple[str, ...] | None = None) -> Dataset:
    names = npz_names(file)
    for keys, read in _LAYOUTS.items():
        if set(keys) <= set(names):
            return read(file, classes, names)
    layouts = "; ".join(", ".join(keys) for keys in _LAYOUTS)
    raise ValueError(
        f"{str(file)!r} holds {', '.join(map(repr, names[:12])) or 'no arrays'}, expected one of "
        f"these sets: {layouts}."
    )


def _class_names(file: Path, names: tuple[str, ...]) -> tuple[str, ...] | None:
    if "classes" not in names:
        return None
    return tuple(map(str, read_npz(file, {"classes": "U 1"})["classes"]))


def _read_split(file: Path, classes: tuple[str, ...] | None, names: tuple[str, ...]) -> Dataset:
    kinds = {"x_train": "u1 3,4", "y_train": "i 1", "x_test": "u1 3,4", "y_test": "i 1"}
    return _of_arrays(file.stem, read_npz(file, kinds), classes or _class_names(file, names))


def _read_jpegs(file: Path, classes: tuple[str, ...] | None, names: tuple[str, ...]) -> Dataset:
    arrays: dict[str, Any] = {}
    for part in ("train", "test"):
        kinds = {f"jpeg_{part}": "u1 1", f"offset_{part}": "i 1", f"y_{part}": "i 1"}
        held = read_npz(file, kinds)
        blob, offsets, labels = held.values()
        arrays[f"x_{part}"] = decode_jpegs(blob, offsets, f"'jpeg_{part}' of {str(file)!r}")
        arrays[f"y_{part}"] = labels
    return _of_arrays(file.stem, arrays, classes or _class_names(file, names))


def _read_materials(file: Path, _: Any, names: tuple[str, ...]) -> Dataset:
    held = read_npz(file, {"x": "u1 3", "y": "i 1", "image": "i 1"})
    _check_counts(file, held)
    for_training = held["image"] <= 5
    arrays = {
        "x_train": held["x"][for_training],
        "y_train": held["y"][for_training],
        "x_test": held["x"][~for_training],
        "y_test": held["y"][~for_training],
    }
    return _of_arrays(file.stem, arrays, _class_names(file, names))


def _read_albums(file: Path, *_: Any) -> Dataset:
    held = read_npz(file, {"x": "u1 3", "name": "U 1"})
    _check_counts(file, held)
    pages = torch.as_tensor(held["x"])
    middle = pages.shape[1] // 2
    if min(middle, pages.shape[2]) < _BRODATZ_PATCH:
        raise ValueError(
            f"The textures in {str(file)!r} have {pages.shape[1]} x {pages.shape[2]} px, too small "
            f"for patches of {_BRODATZ_PATCH} px in each half."
        )
    arrays: dict[str, Any] = {}
    for part, half in (("train", pages[:, :middle]), ("test", pages[:, middle:])):
        patches = [_patches(page, _BRODATZ_PATCH, _BRODATZ_PATCH) for page in half]
        arrays[f"x_{part}"] = torch.cat(patches)
        arrays[f"y_{part}"] = torch.arange(len(pages)).repeat_interleave(len(patches[0]))
    return _of_arrays(file.stem, arrays, tuple(map(str, held["name"])))


def _read_sounds(file: Path, *_: Any) -> Dataset:
    held = read_npz(file, {"offset": "i 1", "digit": "i 1", "take": "i 1", "rate": "i 0"})
    _check_counts(file, {"digit": held["digit"], "take": held["take"]})
    samples = read_npz(file, {"samples": "i 1"})["samples"]
    places = [int(place) for place in held["offset"]]
    ordered = all(start < end for start, end in pairwise(places))
    if (
        len(places) != len(held["digit"]) + 1
        or not ordered
        or places[0]
        or places[-1] != len(samples)
    ):
        raise ValueError(
            f"'offset' of {str(file)!r} must rise from 0 to its {len(samples):,} samples, one per "
            "clip and one for the end; save the file again."
        )
    if int(held["rate"]) != _RATE or str(samples.dtype) != "int16":
        raise ValueError(
            f"{str(file)!r} must hold int16 samples at {_RATE} Hz, got {samples.dtype} at "
            f"{int(held['rate'])} Hz."
        )
    sounds = torch.zeros(len(places) - 1, 1, _RATE)
    for index, start in enumerate(places[:-1]):
        clip = samples[start : min(places[index + 1], start + _RATE)]
        sounds[index, 0, : len(clip)] = torch.as_tensor(clip) / 2**15
    labels, for_test = torch.as_tensor(held["digit"]).long(), torch.as_tensor(held["take"] < 5)
    return Dataset(
        file.stem,
        sounds[~for_test],
        labels[~for_test],
        sounds[for_test],
        labels[for_test],
        classes=_DIGITS,
    )


def _check_counts(file: Path, held: Mapping[str, Any]) -> None:
    counts = {key: len(array) for key, array in held.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        listed = ", ".join(f"{count} of {key!r}" for key, count in counts.items())
        raise ValueError(f"{str(file)!r} must hold as many of each, got {listed}; save it again.")


_LAYOUTS: dict[tuple[str, ...], Callable[..., Dataset]] = {
    ("x_train", "y_train", "x_test", "y_test"): _read_split,
    ("jpeg_train", "offset_train", "y_train", "jpeg_test", "offset_test", "y_test"): _read_jpegs,
    ("x", "y", "image"): _read_materials,
    ("x", "name"): _read_albums,
    ("samples", "offset", "digit", "take", "rate"): _read_sounds,
}


# -- a user's own -----------------------------------------------------------------------------


def _from_path(name: str | os.PathLike[str]) -> Dataset:
    path = Path(name)
    if path.is_file() and path.suffix.lower() == ".npz":
        return _from_npz(path)
    if path.is_dir():
        return _from_images(path)
    if path.exists():
        raise ValueError(
            f"{str(path)!r} is neither a folder of images nor an .npz file; give one of them."
        )
    raise ValueError(
        f"No data set is called {str(name)!r}, and nothing lies at that path; choose one of "
        f"{', '.join(DATASETS)}, or give the path of a folder of images or of an .npz file."
    )


def _from_images(folder: Path) -> Dataset:
    name = folder.resolve().name
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        _, images, classes = read_image_folder(folder / "train")
        _, test_images, test_classes = read_image_folder(folder / "test")
        if classes != test_classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise ValueError(
                f"'train' and 'test' in {str(folder)!r} must hold the same classes, got "
                f"{', '.join(map(repr, odd))} in one of them only; move or remove it."
            )
    else:
        files, whole, classes = read_image_folder(folder)
        images, test_images = [], []
        for label, own in enumerate(whole):
            n_test = -(-len(own) // 5)
            if n_test == len(own):
                raise ValueError(
                    f"{str(files[label][0].parent)!r} holds one image, expected at least 2: one to "
                    "learn from and one to test with."
                )
            images.append(own[:-n_test])
            test_images.append(own[-n_test:])
    n_channels = max(images[0].shape[1], test_images[0].shape[1])
    parts = [*_joined(images, n_channels), *_joined(test_images, n_channels)]
    return _of_parts(name, parts, classes)


def _joined(groups: list[Tensor], n_channels: int) -> tuple[Tensor, Tensor]:
    images = torch.cat([group.expand(-1, n_channels, -1, -1) for group in groups])
    counts = torch.tensor([len(group) for group in groups])
    return images, torch.arange(len(groups)).repeat_interleave(counts)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
