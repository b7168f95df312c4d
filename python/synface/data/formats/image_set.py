"""Sets of labeled images as torch datasets: listed in files, or decoded in memory."""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ...common.renamed import old_keywords
from . import decode, imagefolder
from .decode import DataError
from .images import DecodedImages, Sample, ScanResult, Store, open_images

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


class LabeledImages(Dataset[tuple[Tensor, int]]):
    """A set of images with identity labels, as a map-style torch dataset.

    Item i is image i, (H, W, C) uint8 in its own size with 1 or 3 channels, and its label; a
    `DataLoader` can batch the set if all images have the same size.

    Attributes:
        store: the images, without their labels.
        labels: (N,) int64 in [0, len(identities)).
        identities: the name of each label.
        source: where the images come from, for reports.
    """

    store: Store
    labels: NDArray[np.int64] | Tensor
    identities: list[str]
    source: str

    @abstractmethod
    def _take(self, rows: NDArray[np.int64], first: int, last: int) -> Self:
        """Return the images at `rows`, whose labels in [first, last) are renumbered from 0."""

    def _check_labels(self, kind: str, count: int, note: str = "") -> None:
        labels, names = self.labels, len(self.identities)
        if kind != "int64" or tuple(labels.shape) != (count,):
            raise ValueError(
                f"labels must be int64 of shape ({count},){note}, got {kind} {tuple(labels.shape)}"
            )
        if count and not 0 <= labels.min() <= labels.max() < names:
            raise ValueError(
                f"labels must lie in [0, {names}), got {int(labels.min())} to {int(labels.max())}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image, decoded, and its label.

        Raises:
            IndexError: for an index out of range.
            DataError: for an image that cannot be decoded; it names the file.
        """
        index = range(len(self))[index]
        pixels = self.attempt(self.store.decode, index)
        return torch.from_numpy(pixels.copy()), int(self.labels[index])

    def name(self, index: int) -> str:
        """Return an image's location: a file, a file and an offset, or its index in memory."""
        return self.store.name(index)

    def attempt(self, function: Callable[[int], T], index: int) -> T:
        """Return ``function(index)``; if it fails, raise a DataError that names the image."""
        result, problem = decode.attempt(function)(index)
        if problem:
            raise DataError(f"{self.name(index)}: {problem}; expected a readable, complete image")
        return result

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of an image; one in memory is encoded as PNG.

        Raises:
            DataError: if they cannot be read; it names the file and the offset.
        """
        return self.attempt(self.store.read, index)

    def samples(self) -> Iterator[Sample]:
        """Yield every image in order, with its format and size from the header, without decoding.

        Raises:
            DataError: as `read` does, and for files that are not images of a known format.
        """

        def sample(index: int) -> Sample:
            content = self.store.read(index)
            return Sample(int(self.labels[index]), content, *decode.header(io.BytesIO(content)))

        for index in range(len(self)):
            yield self.attempt(sample, index)

    def split(self, holdout: int) -> tuple[Self, Self]:
        """Split by identity: all but the last `holdout`, and the last `holdout`.

        Labels of both sets start at 0; with holdout 0 the second set is empty.

        Raises:
            ValueError: if holdout is negative, or leaves fewer than 2 identities in the first set.
        """
        count = len(self.identities)
        trained = decode.keep(count, holdout)
        train = np.asarray(self.labels) < trained
        return (
            self._take(np.flatnonzero(train), 0, trained),
            self._take(np.flatnonzero(~train), trained, count),
        )


@dataclass(frozen=True, eq=False)
class ImageSet(LabeledImages):
    """Encoded images with labels, listed but not decoded, as returned by `open_images`.

    Attributes:
        store: reads the images.
        labels: (N,) int64 in [0, len(identities)), one for each image.
        identities: the name of each label.
        source: the path, for reports.

    Raises:
        ValueError: for labels of a wrong dtype or shape, or out of range.
    """

    store: Store
    labels: NDArray[np.int64]
    identities: list[str]
    source: str

    def __post_init__(self) -> None:
        self._check_labels(str(self.labels.dtype), len(self.store), ", one for each image")

    def _take(self, rows: NDArray[np.int64], first: int, last: int) -> ImageSet:
        labels, names = self.labels[rows] - first, self.identities[first:last]
        return ImageSet(self.store.take(rows), labels, names, self.source)


@dataclass(frozen=True, eq=False)
class Faces(LabeledImages):
    """Decoded images with labels, all of one size, in memory, as returned by `read_folder`.

    Attributes:
        images: (N, H, W, C) uint8, C = 1 (grayscale) or 3 (RGB).
        labels: (N,) int64 in [0, len(identities)).
        identities: the name of each label.
        source: where the images come from, for reports.

    Raises:
        ValueError: for a wrong dtype or shape, or a label out of range.
    """

    images: Tensor
    labels: Tensor
    identities: list[str]
    source: str

    def __post_init__(self) -> None:
        images = self.images
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(
                "images must be uint8 of shape (N, H, W, 1) or (N, H, W, 3), got "
                f"{_kind(images)} {tuple(images.shape)}"
            )
        self._check_labels(_kind(self.labels), len(images))

    @property
    def store(self) -> DecodedImages:  # type: ignore[override]
        """The images as an in-memory store; it shares their memory."""
        return DecodedImages(self.images.numpy(), self.source)

    def _take(self, rows: NDArray[np.int64], first: int, last: int) -> Faces:
        index = torch.from_numpy(rows)
        labels, names = self.labels[index] - first, self.identities[first:last]
        return Faces(self.images[index], labels, names, self.source)


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def label(scan: ScanResult, source: Path, relabel: bool = False) -> ImageSet:
    """Return an `ImageSet` after checking that each label in 0, 1, … C-1 has an image.

    Args:
        relabel: number the labels that have images from 0 on, in their order, instead of raising.
            Their names stay; the name of a label without one is its number.

    Raises:
        DataError: for an empty set, a label out of range, labels without images, and names that are
            not distinct or not one per class.
    """
    labels, names = scan.labels, scan.names
    if not len(labels):
        raise DataError(f"{source} holds no image")
    if names is not None and len(set(names)) != len(names):
        raise DataError(f"{source}: the names of the {len(names)} classes are not distinct")
    if names is not None and scan.classes not in (None, len(names)):
        raise DataError(f"{source}: {scan.classes} classes, but {len(names)} names of classes")
    present = np.unique(labels)
    count = scan.classes if names is None else len(names)
    if count is None:
        count = int(present[-1]) + 1
    if present[0] < 0 or present[-1] >= count:
        wrong = int(np.flatnonzero((labels < 0) | (labels >= count))[0])
        known = scan.classes is not None or names is not None
        raise DataError(
            f"{scan.store.name(wrong)}: label {labels[wrong]}, expected "
            + (
                f"one in [0, {count})"
                if known
                else "integers from 0 on (leave out images that have no label)"
            )
        )
    if relabel:
        labels = np.searchsorted(present, labels).astype(np.int64)
    elif len(present) < count:
        gaps = np.flatnonzero(present != np.arange(len(present)))
        first = int(gaps[0]) if len(gaps) else len(present)
        raise DataError(
            f"{source}: {count - len(present):,} of {count:,} labels have no image, the first is "
            f"{first}; relabel (--relabel) renumbers the labels that have images from 0"
        )
    identities = [str(i) if names is None else names[i] for i in present]
    return ImageSet(scan.store, labels, identities, str(source))


def list_folder(path: str | Path) -> ImageSet:
    """List the images of a folder that holds one sub-folder per identity, in natural order.

    Hidden files and macOS metadata (``__MACOSX``) are ignored. Files of other extensions, and
    images beside the sub-folders, are skipped with a warning that counts them. No file is opened.

    Raises:
        DataError: for a missing or empty folder, fewer than 2 identities, and an identity without
            images or with folders inside.
    """
    return label(imagefolder.list_images(Path(path)), Path(path))


def check_size(size: tuple[int, int] | None) -> None:
    """Raise ValueError unless size is (height, width), or None."""
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be (height, width) in pixels, both at least 1, got {size}")


def opened(**sources: LabeledImages | str | Path) -> tuple[LabeledImages, ...]:
    """Return named sets of images to train on; paths are opened by `open_images`.

    Raises:
        DataError: for paths that `open_images` rejects, and sets that only support sequential
            reads.
        ValueError: for a set without images.
    """
    sets = tuple(
        source if isinstance(source, LabeledImages) else open_images(source)
        for source in sources.values()
    )
    for name, images in zip(sources, sets, strict=True):
        if not len(images):
            raise ValueError(f"{name} holds no images ({images.source})")
        if images.store.streams:
            raise DataError(
                f"{images.source} only supports sequential reads, but training shuffles; "
                "convert it first (synface convert)"
            )
    return sets


@old_keywords(grey="grayscale")  # codespell:ignore grey
def common_shape(
    sets: Sequence[LabeledImages], size: tuple[int, int] | None, grayscale: bool | None
) -> tuple[int, int, int]:
    """Return the (H, W, C) of the images of all sets; see `TwoDomainLoader`.

    Raises:
        DataError: if the file that determines the size or the color cannot be decoded.
        ValueError: if a set in memory has another shape.
    """
    in_memory = [
        (each, each.store.pixels.shape[1:]) for each in sets if each.store.pixels is not None
    ]
    check_size(size)
    if size is None:
        if in_memory:
            size = in_memory[0][1][:2]
        else:
            size = sets[0].store.image_size or sets[0].attempt(sets[0].store.size_of, 0)
    if grayscale is None:
        if in_memory:
            grayscale = in_memory[0][1][2] == 1
        else:
            modes = (each.attempt(each.store.mode, i) for each in sets for i in range(len(each)))
            grayscale = all(mode in decode.GRAYSCALE for mode in modes)
    shape = (*size, 1 if grayscale else 3)
    for each, own in in_memory:
        if own != shape:
            raise ValueError(
                "the images of both domains must have one shape (height, width, channels): "
                f"expected {shape}, got {own} from {each.source}"
            )
    return shape
