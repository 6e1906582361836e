"""Data sets to train on: images or sounds with their classes, and a part to test with."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gaborium.readers import read_images, reading
from gaborium.support import require

# Name in OpenML, number of training images, which come first, and the shape of an image.
_PUBLISHED = {
    "mnist": ("mnist_784", 60_000, (1, 28, 28)),
    "fashion-mnist": ("Fashion-MNIST", 60_000, (1, 28, 28)),
    "cifar10": ("CIFAR_10", 50_000, (3, 32, 32)),
}
DATASETS = ("textures", "digits", *_PUBLISHED)

# Photographs inside scikit-image's package that look similar all over.
_PHOTOGRAPHS = (
    *("brick", "grass", "gravel", "moon", "hubble_deep_field", "immunohistochemistry"),
    *("coins", "page", "text"),
)
_PATCH, _PATCH_STEP = 32, 8  # px
_N_PATCHES = 400  # from each half of a photograph; the smallest half has 420
_PATCH_MEAN, _PATCH_STD = 128.0, 40.0


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images or sounds with their classes, in a training part and a test part.

    Args:
        name: name of the data set.
        images: uint8 ``(n, channels, height, width)``, 0 black to 255 white; or sounds, float32
            ``(n, 1, samples)``.
        labels: int64 ``(n,)``: indices into ``classes``.
        test_images: as ``images``, of the same size.
        test_labels: as ``labels``.
        classes: names of the classes.

    Raises:
        ValueError: a shape or dtype is wrong, or a label has no class.

    Example:
        >>> images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1, 0])
        >>> data = Dataset("mine", images, labels, images, labels, classes=("off", "on"))
        >>> data.n_classes, data.image_size
        (2, (8, 8))
    """

    name: str
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        forms, size = ((4, torch.uint8), (3, torch.float32)), self.images.shape[1:]
        for part in ("", "test_"):
            images, labels = getattr(self, f"{part}images"), getattr(self, f"{part}labels")
            is_form = (images.ndim, images.dtype) in forms and images.shape[1:] == size
            if not is_form or images.numel() == 0:
                raise ValueError(
                    f"{part}images of {self.name!r} must be uint8 (n, channels, height, width) or "
                    "float32 (n, 1, samples), all of one size, and not empty, got "
                    f"{images.dtype} of shape {tuple(images.shape)}."
                )
            is_form = labels.dtype == torch.int64 and labels.shape == images.shape[:1]
            if not is_form or not 0 <= labels.min() <= labels.max() < self.n_classes:
                raise ValueError(
                    f"{part}labels of {self.name!r} must be int64 ({len(images)},), each 0 to "
                    f"{self.n_classes - 1}, got {labels.dtype} of shape {tuple(labels.shape)}, "
                    f"{labels.unique().tolist()!s:.40}."
                )

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def image_size(self) -> tuple[int, ...]:
        """``(height, width)`` of images, ``(samples,)`` of sounds."""
        return tuple(self.images.shape[2:])

    def subset(self, samples_per_class: int | None, seed: int) -> Dataset:
        """Draw training samples of each class; the test part is complete.

        Convention:
            - the draw depends on the seed alone; for one seed, a smaller subset is a part of a
              larger one
            - samples keep their order

        Args:
            samples_per_class: number of samples; ``None`` for all.
            seed: seed of the draw.

        Raises:
            ValueError: a class has fewer samples.
        """
        if samples_per_class is None:
            return self
        generator = torch.Generator().manual_seed(seed)
        chosen = []
        for index, name in enumerate(self.classes):
            rows = (self.labels == index).nonzero().squeeze(1)
            if not 1 <= samples_per_class <= len(rows):
                raise ValueError(
                    f"samples_per_class must be 1 to {len(rows)}, the samples of class {name!r} in "
                    f"{self.name!r}, got {samples_per_class}."
                )
            chosen.append(rows[torch.randperm(len(rows), generator=generator)[:samples_per_class]])
        kept = torch.cat(chosen).sort().values
        return replace(self, images=self.images[kept], labels=self.labels[kept])


def load_dataset(name: str | os.PathLike[str]) -> Dataset:
    """Load a data set by its name, or from your own files.

    ==================  =========================================================================
    name                images and classes
    ==================  =========================================================================
    ``textures``        32 px grey patches of nine photographs inside scikit-image's package, all
                        with one mean and one contrast; the test patches are from the other half
                        of each photograph
    ``digits``          scikit-learn's handwritten digits, 8 x 8 px; the last third is the test
    ``mnist``,          handwritten digits or clothes, 28 x 28 px, or things and animals in
    ``fashion-mnist``,  colour, 32 x 32 px; the last 10 000 are the test. Downloaded once from
    ``cifar10``         OpenML with ``sklearn.datasets.fetch_openml``, into scikit-learn's folder
    a folder            images of one size, ``train/<class>/*.png`` and ``test/<class>/*.png``;
                        or ``<class>/*.png``, of which the last fifth of each class is the test
    an ``.npz`` file    ``x_train``, ``y_train``, ``x_test``, ``y_test``: uint8 images ``(n,
                        height, width[, channels])`` and labels from 0; and perhaps ``classes``
    ==================  =========================================================================

    Args:
        name: one of the names above, or the path of a folder or an ``.npz`` file.

    Returns:
        The data set, all of it in memory.

    Raises:
        OSError: a file cannot be read, or the data set cannot be downloaded.
        ValueError: there is no such data set, or a file has other content.
        ImportError: a package that reads it is not installed.

    Example:
        >>> data = load_dataset("textures")
        >>> data.image_size, data.classes[:3]
        ((32, 32), ('brick', 'grass', 'gravel'))
    """
    path = Path(name)
    if name == "textures":
        return _textures()
    if name == "digits":
        return _digits()
    if name in _PUBLISHED:
        return _fetched(str(name))
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_npz(path)
    raise ValueError(
        f"There is no data set and no file {str(name)!r}; choose one of "
        f"{', '.join(DATASETS)}, or give the path of a folder of images or of an .npz file."
    )


def _textures() -> Dataset:
    data = require("skimage.data", extra="train", purpose="Textures")
    color = require("skimage.color", extra="train", purpose="Textures")
    halves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name in _PHOTOGRAPHS:
        photograph = getattr(data, name)()
        grey = color.rgb2gray(photograph) * 255 if photograph.ndim == 3 else photograph
        image = torch.tensor(grey, dtype=torch.float64)
        if min(image.shape) > 700:  # patches of the largest photographs would show too little
            image = F.avg_pool2d(image[None, None], 2)[0, 0]
        middle = image.shape[1] // 2
        for patches, half in zip(halves, (image[:, :middle], image[:, middle:]), strict=True):
            found = half.unfold(0, _PATCH, _PATCH_STEP).unfold(1, _PATCH, _PATCH_STEP)
            found = found.reshape(-1, 1, _PATCH, _PATCH)
            patches.append(_equalise(found[torch.arange(_N_PATCHES) * len(found) // _N_PATCHES]))
    labels = torch.arange(len(_PHOTOGRAPHS)).repeat_interleave(_N_PATCHES)
    images, test_images = map(torch.cat, halves)
    return Dataset("textures", images, labels, test_images, labels, _PHOTOGRAPHS)


def _equalise(patches: Tensor) -> Tensor:
    """Give all patches one mean and one contrast: else brightness alone identifies photographs."""
    axes = (1, 2, 3)
    centred = patches - patches.mean(axes, keepdim=True)
    std = centred.square().mean(axes, keepdim=True).sqrt().clamp_min(1.0)
    return (_PATCH_MEAN + _PATCH_STD * centred / std).round().clamp(0, 255).to(torch.uint8)


def _digits() -> Dataset:
    data = require("sklearn.datasets", extra="train", purpose="Digits").load_digits()
    images = (torch.tensor(data.images)[:, None] * (255 / 16)).round().to(torch.uint8)
    labels, n = torch.tensor(data.target, dtype=torch.int64), len(images) * 2 // 3
    classes = tuple(map(str, range(10)))
    return Dataset("digits", images[:n], labels[:n], images[n:], labels[n:], classes)


def _fetched(name: str) -> Dataset:
    datasets = require("sklearn.datasets", extra="train", purpose="Published data sets")
    published, n, shape = _PUBLISHED[name]
    # pandas reads these files ten times faster, but is not required.
    parser = "pandas" if importlib.util.find_spec("pandas") else "liac-arff"
    try:
        found = datasets.fetch_openml(published, version=1, as_frame=False, parser=parser)
    except OSError as error:
        raise ConnectionError(
            f"Cannot download {name!r} from OpenML: {error}; check the network or use other data."
        ) from None
    images = torch.as_tensor(found.data).to(torch.uint8).reshape(-1, *shape)
    classes = tuple(sorted(set(found.target)))
    labels = torch.tensor([classes.index(label) for label in found.target])
    return Dataset(name, images[:n], labels[:n], images[n:], labels[n:], classes)


def _from_npz(path: Path) -> Dataset:
    numpy = require("numpy", extra="train", purpose="Data sets")
    parts: dict[str, Tensor] = {}
    with reading(path), path.open("rb") as stream:
        file = numpy.load(stream, allow_pickle=False)
        for kind in ("train", "test"):
            images, labels = (torch.as_tensor(file[f"{name}_{kind}"]) for name in "xy")
            if images.ndim == 3 and images.dtype == torch.uint8:
                images = images[:, None]
            elif images.ndim == 4 and images.shape[1] not in (1, 3):
                images = images.movedim(-1, 1).contiguous()
            prefix = "test_" if kind == "test" else ""
            parts |= {f"{prefix}images": images, f"{prefix}labels": labels.long()}
        n_classes = 1 + max(int(parts[name].max()) for name in ("labels", "test_labels"))
        classes = tuple(map(str, file.get("classes", range(n_classes))))
    return Dataset(path.stem, **parts, classes=classes)


def _from_folder(folder: Path) -> Dataset:
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        train, test = _read_classes(folder / "train"), _read_classes(folder / "test")
    else:
        whole = _read_classes(folder)
        train = {name: images[: len(images) * 4 // 5] for name, images in whole.items()}
        test = {name: images[len(images) * 4 // 5 :] for name, images in whole.items()}
    missing = train.keys() ^ test.keys() | {name for name, images in train.items() if not images}
    if missing:
        raise ValueError(
            f"{str(folder)!r} must hold training and test images of every class, got only one of "
            f"them for {', '.join(map(repr, sorted(missing)))}."
        )
    every = [image for part in (train, test) for images in part.values() for image in images]
    sizes = sorted({tuple(image.shape[1:]) for image in every})
    if len(sizes) > 1:
        raise ValueError(f"The images in {str(folder)!r} must have one size, got {sizes[:9]}.")
    images = torch.stack([image.expand(max(map(len, every)), -1, -1) for image in every])
    labels, test_labels = (
        torch.tensor([label for label, one in enumerate(part.values()) for _ in one])
        for part in (train, test)
    )
    n, name = len(labels), folder.resolve().name
    return Dataset(name, images[:n], labels, images[n:], test_labels, tuple(train))


def _read_classes(folder: Path) -> dict[str, list[Tensor]]:
    """Read the images of ``folder/<class>``, in the order of their names."""
    classes = {
        entry.name: [(255 * image).round().to(torch.uint8) for _, image in read_images(entry)]
        for entry in sorted(folder.iterdir())
        if entry.is_dir() and entry.name[0] != "."
    }
    if not classes:
        raise FileNotFoundError(f"{str(folder)!r} holds no folders, one for each class of images.")
    return classes
