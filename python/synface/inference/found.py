"""Images found in files and folders, with their identities where there are any."""

from __future__ import annotations

import os
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data.formats import decode
from ..data.formats.decode import EXTENSIONS, DataError
from ..data.formats.images import SUFFIXES, Files, PackedPaths, Store, detect, open_images

SETS = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)


class JoinedStores:
    """Several stores as one, in their order.

    Args:
        stores: one or more.
    """

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores = stores
        self.begins = [0, *accumulate(map(len, stores))]
        self.streams = any(store.streams for store in stores)

    def __len__(self) -> int:
        return self.begins[-1]

    def _at(self, row: int) -> tuple[Store, int]:
        index = bisect_right(self.begins, row) - 1
        return self.stores[index], row - self.begins[index]

    def name(self, row: int) -> str:
        """Return an image's location."""
        store, own = self._at(row)
        return store.name(own)

    def open(self, row: int) -> BinaryIO:
        """Return an image's encoded bytes as a file."""
        store, own = self._at(row)
        return store.open(own)

    def decode_into(
        self, pixels: NDArray[np.uint8], row: int, expected: tuple[int, int] | None = None
    ) -> None:
        """Decode an image into an array (H, W, C), converted and resized to fit."""
        store, own = self._at(row)
        store.decode_into(pixels, own, expected)


class Found(NamedTuple):
    """Images of some paths.

    Attributes:
        store: the images, which `FaceNetwork.embed` takes.
        identities: the name of each image's identity; None for an image without one.
    """

    store: JoinedStores
    identities: list[str | None]


def find_images(paths: Sequence[str | Path]) -> Found:
    """Return the images of files and folders, in the order of the paths; none is decoded.

    Args:
        paths: image files, sets of images in any of the formats of `synface.data.open_images`, and
            folders, whose images are found recursively, in natural order. If all images of a folder
            are in its sub-folders, and none deeper, these are the identities.

    Raises:
        DataError: for a path that does not exist, a folder without images, a set that
            `open_images` rejects, and an identity of one number in two paths.

    Memory: about 30 bytes per image, and its path.
    """
    stores: list[Store] = []
    files: list[str] = []
    identities: list[str | None] = []
    owner: dict[str, Path] = {}  # the path of each identity that has a number for a name

    def close() -> None:
        if files:
            stores.append(Files(PackedPaths.of(files)))
            files.clear()

    for path in map(Path, paths):
        before = len(identities)
        if os.path.isdir(path) and detect(path).name == "folder":
            inside = _in_folder(path)
            people = all(depth == 2 for _, depth in inside)
            files += (file for file, _ in inside)
            identities += (Path(file).parent.name if people else None for file, _ in inside)
        elif path.is_dir() or path.name.endswith(SETS):
            close()
            images = open_images(path, relabel=True)
            stores.append(images.store)
            identities += (images.identities[i] for i in images.labels)
        elif os.path.exists(path):
            files.append(str(path))
            identities.append(None)
        else:
            raise DataError(f"{path} does not exist or is not accessible")
        numbers = {each for each in identities[before:] if each is not None and each.isdecimal()}
        for name in numbers:  # sets without names number their identities
            if owner.setdefault(name, path) != path:
                raise DataError(
                    f"{owner[name]} and {path} both have an identity {name!r}, which may be two "
                    "people: embed them apart, or rename one"
                )
    close()
    return Found(JoinedStores(stores), identities)


def _in_folder(root: Path) -> list[tuple[str, int]]:
    """Return the image files in a folder, each with its depth (1: in the folder itself)."""
    files = list(decode.walk(root))
    images = [each for each in files if os.path.splitext(each[0])[1].lower() in EXTENSIONS]
    endings = " ".join(sorted(EXTENSIONS))
    if not images:
        raise DataError(f"{root} holds no image: none of {len(files):,} files ends in {endings}")
    if len(images) < len(files):
        warnings.warn(
            f"{root}: {len(files) - len(images):,} files are skipped, which do not end in "
            f"{endings}",
            stacklevel=3,
        )
    return images
