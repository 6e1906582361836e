"""Fetching published data sets, so that a file is there whole and unaltered, or not at all."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from gaborium.files import write_bytes


class Published(NamedTuple):
    """A file as it was published: its name, its size in bytes and its MD5 sum."""

    name: str
    size: int
    md5: str


_MNIST = (
    Published("train-images-idx3-ubyte.gz", 9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    Published("train-labels-idx1-ubyte.gz", 28_881, "d53e105ee54ea40749a09fcbcd1e9432"),
    Published("t10k-images-idx3-ubyte.gz", 1_648_877, "9fb629c4189551a2d022fa330f9573f3"),
    Published("t10k-labels-idx1-ubyte.gz", 4_542, "ec29112dd5afa0611ce80d1b7f02629c"),
)
_FASHION = (
    Published("train-images-idx3-ubyte.gz", 26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
    Published("train-labels-idx1-ubyte.gz", 29_515, "25c81989df183df01b3e8a0aad5dffbe"),
    Published("t10k-images-idx3-ubyte.gz", 4_422_102, "bef4ecab320f06d8554ea6380940ec79"),
    Published("t10k-labels-idx1-ubyte.gz", 5_148, "bb300cfdad3c16e7a12a480ee83cd310"),
)
_CIFAR10 = (Published("cifar-10-binary.tar.gz", 170_052_171, "c32a1d4ab5d03f1284b67883e8d87530"),)

ADDRESSES = {
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", _MNIST),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", _FASHION),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/", _CIFAR10),
}
TIMEOUT = 30.0  # s without a byte


def fetch_files(name: str, folder: str | os.PathLike[str]) -> list[Path]:
    """Fetch what a folder lacks of a published data set.

    Args:
        name: ``"mnist"``, ``"fashion-mnist"`` or ``"cifar10"``.
        folder: where the files go; it is made if missing.

    Returns:
        The files that were fetched. Those that were there are left alone.

    Raises:
        ConnectionError: there is no network, the address does not answer, or the connection
            breaks.
        ValueError: what comes has another size or checksum than was published.
        OSError: a file cannot be written.
    """
    base, files = ADDRESSES[name]
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    fetched = []
    for file in files:
        if not (place / file.name).exists():
            # Kept in memory until its sum is known: the largest has 170 MB.
            write_bytes(place / file.name, _fetch(base + file.name, file, place))
            fetched.append(place / file.name)
    return fetched


def _fetch(address: str, file: Published, folder: Path) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
            content = bytearray()
            # One byte more than there should be tells a longer file, and no more is taken of it.
            while block := answer.read(min(1 << 20, file.size + 1 - len(content))):
                content += block
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the answer, too
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        text = getattr(reason, "strerror", None) or str(reason)
        detail = " ".join(text.split()).rstrip(".") or type(error).__name__
        raise ConnectionError(
            f"Cannot fetch {address}: {detail}; check the network, or put the file into "
            f"{str(folder)!r} yourself."
        ) from None
    if len(content) != file.size:
        found = f"more than {file.size:,}" if len(content) > file.size else f"{len(content):,}"
        raise ValueError(
            f"{address} gave {found} bytes, expected {file.size:,}; try again, or put the file "
            f"into {str(folder)!r} yourself."
        )
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != file.md5:
        raise ValueError(
            f"{address} has the MD5 sum {found}, expected {file.md5}: it is not the published "
            f"file; put that into {str(folder)!r} yourself."
        )
    return bytes(content)
