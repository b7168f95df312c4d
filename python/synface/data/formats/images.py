"""Sets of encoded images with labels, whatever file format holds them; NumPy is all it takes.

A `Store` hands out the bytes of an image; an `ImageSet` adds labels and the names of the classes.
`open_images` finds out which format a path is of.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...common.textfiles import read_json, read_up_to
from . import decode
from .decode import DataError

MAX_BYTES = 1 << 28  # of one encoded image, and of one file of names
IDENTITIES = "identities.json"  # the classes' names, beside formats that have no place for them


class Names:
    """Many file names in two arrays, which worker processes share.

    Attributes:
        text: (T,) uint8, the names one after the other. ends: (N,) int64, where each ends.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, paths: Iterable[str | Path]) -> Names:
        text, ends = bytearray(), array("q")
        for path in paths:
            text += os.fsencode(path)
            ends.append(len(text))
        return cls(np.frombuffer(text, np.uint8), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> Path:
        begin = self.ends[row - 1] if row else 0
        return Path(os.fsdecode(self.text[begin : self.ends[row]].tobytes()))


class Store(ABC):
    """Where the bytes of encoded images are. It can be pickled, and read by several threads.

    Attributes:
        image_size: (H, W) that every image must decode to, where the format says so.
        streams: the images can be read in order only; any other order takes for ever.
    """

    image_size: tuple[int, int] | None = None
    streams: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, row: int) -> bytes:
        """The bytes of an image; OSError or DataError if they are not there."""

    @abstractmethod
    def name(self, row: int) -> str:
        """Where an image is: a file, or a file and an offset."""

    @abstractmethod
    def take(self, rows: NDArray[np.int64]) -> Store:
        """Some of the images, in another order."""

    @abstractmethod
    def fingerprint(self) -> bytes:
        """Tells this set of files from others by what can be seen without reading them."""

    def open(self, row: int) -> BinaryIO:
        """An image as a file."""
        return io.BytesIO(self.read(row))

    def size_of(self, row: int) -> tuple[int, int]:
        """(H, W) of an image, which is decoded in full."""
        with self.open(row) as file:
            image = decode.decode(file)
        return image.height, image.width

    def read_into(self, pixels: NDArray[np.uint8], row: int) -> None:
        """Decodes an image into (H, W, C) bytes: converted to grayscale or RGB, resized."""
        with self.open(row) as file:
            decode.read_into(pixels, file, self.image_size)


class Files(Store):
    """A file for each image."""

    def __init__(self, paths: Names, rows: NDArray[np.int64] | None = None) -> None:
        self.paths = paths
        self.rows = np.arange(len(paths)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, row: int) -> Path:
        return self.paths[int(self.rows[row])]

    def name(self, row: int) -> str:
        return str(self.path(row))

    def open(self, row: int) -> BinaryIO:
        path = self.path(row)
        if not path.is_file():  # opening a pipe would wait for ever
            raise OSError("no regular file, or a link to nothing")
        return path.open("rb")

    def read(self, row: int) -> bytes:
        with self.open(row) as file:
            return read_at_most(file, MAX_BYTES)

    def take(self, rows: NDArray[np.int64]) -> Files:
        return Files(self.paths, self.rows[rows])

    def fingerprint(self) -> bytes:
        digest = sha256()
        for row in range(len(self)):
            path = self.name(row)
            try:
                size = os.path.getsize(path)
            except OSError:  # for the loader to name, when it is read
                size = -1
            name = os.sep.join(path.rsplit(os.sep, 2)[-2:])
            digest.update(f"{name}\0{size}\0".encode(errors="replace"))
        return digest.digest()


class Spans(Store):
    """Each image is a stretch of one of a few files.

    Attributes:
        files: of the set. file: (N,) int32, each image's. begin, size: (N,) int64, in bytes.
    """

    def __init__(
        self,
        files: Names,
        file: NDArray[np.int32],
        begin: NDArray[np.int64],
        size: NDArray[np.int64],
    ) -> None:
        self.files, self.file, self.begin, self.size = files, file, begin, size

    def __len__(self) -> int:
        return len(self.begin)

    def name(self, row: int) -> str:
        return f"{self.files[int(self.file[row])]}, offset {self.begin[row]}"

    def read(self, row: int) -> bytes:
        with self.files[int(self.file[row])].open("rb") as file:
            return read_span(file, int(self.begin[row]), int(self.size[row]))

    def take(self, rows: NDArray[np.int64]) -> Spans:
        taken = type(self)(self.files, self.file[rows], self.begin[rows], self.size[rows])
        taken.image_size = self.image_size
        return taken

    def fingerprint(self) -> bytes:
        digest = sha256(repr([self.files[i].name for i in range(len(self.files))]).encode())
        for part in (self.file, self.begin, self.size):
            digest.update(part.tobytes())
        return digest.digest()


def read_span(file: BinaryIO, begin: int, size: int) -> bytes:
    """Exactly `size` bytes from `begin` on; OSError where the file ends before."""
    if size > MAX_BYTES:
        raise OSError(f"an image of {size:,} bytes, over the limit of {MAX_BYTES:,}")
    file.seek(begin)
    content = file.read(size)
    if len(content) < size:
        raise OSError(f"cut short: {len(content)} of {size} bytes are there")
    return content


def read_at_most(file: BinaryIO, limit: int) -> bytes:
    """All of a file; OSError where that is over the limit."""
    content = read_up_to(file, limit + 1)
    if len(content) > limit:
        raise OSError(f"over the limit of {limit:,} bytes")
    return content


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Encoded images with labels, listed but not decoded; `open_images` makes one.

    Attributes:
        store: of the images' bytes.
        labels: (N,) int64 in [0, len(identities)), one for each image.
        identities: the name of each label.
        source: the path, for reports.

    Raises:
        ValueError: for labels that do not fit.
    """

    store: Store
    labels: NDArray[np.int64]
    identities: list[str]
    source: str

    def __post_init__(self) -> None:
        labels, count = self.labels, len(self.identities)
        if labels.dtype != np.int64 or labels.shape != (len(self.store),):
            raise ValueError(
                f"labels must be int64 of shape ({len(self.store)},), one for each image, "
                f"got {labels.dtype} {labels.shape}"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < count:
            raise ValueError(
                f"labels must lie in [0, {count}), got {labels.min()} to {labels.max()}"
            )

    def __len__(self) -> int:
        return len(self.store)

    def name(self, index: int) -> str:
        """Where an image is: a file, or a file and an offset."""
        return self.store.name(index)

    def read(self, index: int) -> bytes:
        """The encoded bytes of an image.

        Raises:
            DataError: if they cannot be read; it names the file and the offset.
        """
        content, problem = decode.attempt(self.store.read)(index)
        if problem:
            raise DataError(f"{self.name(index)}: {problem}")
        return content

    def samples(self) -> Iterator[Sample]:
        """Every image in order, with what its header says; the pixels are not decoded.

        Raises:
            DataError: what `read` does, and for what is no image of a known format.
        """
        for index, label in enumerate(self.labels):
            content = self.read(index)
            header, problem = decode.attempt(decode.header)(io.BytesIO(content))
            if problem:
                raise DataError(f"{self.name(index)}: {problem}")
            yield Sample(int(label), content, *header)

    def split(self, holdout: int) -> tuple[ImageSet, ImageSet]:
        """Splits by identity: all but the last `holdout`, and the last `holdout`.

        Labels of both start at 0; with holdout 0 the second is empty.

        Raises:
            ValueError: if holdout is negative, or leaves fewer than 2 identities in the first.
        """
        kept = decode.keep(len(self.identities), holdout)
        first, second = np.flatnonzero(self.labels < kept), np.flatnonzero(self.labels >= kept)
        return (
            ImageSet(
                self.store.take(first), self.labels[first], self.identities[:kept], self.source
            ),
            ImageSet(
                self.store.take(second),
                self.labels[second] - kept,
                self.identities[kept:],
                self.source,
            ),
        )


class Sample(NamedTuple):
    """An encoded image.

    Attributes:
        label: from 0. content: the file's bytes.
        extension: of the name of such a file. image_size: (H, W) before any turning.
    """

    label: int
    content: bytes
    extension: str
    image_size: tuple[int, int]


class Listed(NamedTuple):
    """What a format's reader finds, before the labels are looked at.

    Attributes:
        labels: (N,) int64, as they stand there.
        names: of the classes, where they are stored. classes: how many, where that is stored.
    """

    store: Store
    labels: NDArray[np.int64]
    names: list[str] | None = None
    classes: int | None = None


def label(listed: Listed, source: Path, relabel: bool = False) -> ImageSet:
    """An `ImageSet`, if the labels are 0, 1, … C-1 and each has an image.

    Args:
        relabel: number the labels that have images from 0 on, in their order, instead of raising.
            Their names are kept; the name of a label without one is its number.

    Raises:
        DataError: for no image, a label out of range, labels without images, and names that are
            not one for each class or not distinct.
    """
    labels, names = listed.labels, listed.names
    if not len(labels):
        raise DataError(f"{source} holds no image")
    if names is not None and len(set(names)) != len(names):
        raise DataError(f"{source}: the names of the {len(names)} classes are not distinct")
    if names is not None and listed.classes not in (None, len(names)):
        raise DataError(f"{source}: {listed.classes} classes, but {len(names)} names of classes")
    present = np.unique(labels)
    count = listed.classes if names is None else len(names)
    if count is None:
        count = int(present[-1]) + 1
    if present[0] < 0 or present[-1] >= count:
        wrong = int(np.flatnonzero((labels < 0) | (labels >= count))[0])
        known = listed.classes is not None or names is not None
        raise DataError(
            f"{listed.store.name(wrong)}: label {labels[wrong]}, expected "
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
            f"{first}; relabel (--relabel) numbers those that have images from 0 on"
        )
    identities = [str(i) if names is None else names[i] for i in present]
    return ImageSet(listed.store, labels, identities, str(source))


def read_names(folder: Path) -> list[str] | None:
    """The classes' names beside files that have no place for them; None if there are none.

    Raises:
        DataError: for a file that is not a list of strings.
    """
    file = folder / IDENTITIES
    if not file.is_file():
        return None
    names = read_json(file, DataError, MAX_BYTES)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{file} must be a list of strings, the names of the classes")
    return names


def natural_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files of a folder with one of these endings, in natural order, hidden ones left out."""
    return [e for e in decode.entries(folder) if e.name.endswith(tuple(suffixes)) and e.is_file()]


# -- which format a path is of


class Format(NamedTuple):
    """A format of image sets, and where its reader and writer are.

    Attributes:
        name: as `convert` has it. title: for people.
        module: of its functions ``list_images(path)`` and, called `writer`,
            ``(folder, samples, identities, shard_bytes)``.
    """

    name: str
    title: str
    module: str
    writer: str = "write"


FORMATS = {
    each.name: each
    for each in (
        Format("folder", "a folder with one sub-folder of images per person", "imagefolder"),
        Format("recordio", "insightface's RecordIO (train.rec, .idx, property)", "recordio"),
        Format("webdataset", "WebDataset shards (.tar, .tar.gz, .tar.bz2, .tar.xz)", "webdataset"),
        Format("parquet", "Parquet files", "tables", "write_parquet"),
        Format("arrow", "a folder by Hugging Face datasets' save_to_disk", "tables", "write_arrow"),
    )
}
SUFFIXES = {
    "recordio": (".rec", ".idx"),
    "webdataset": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}


def detect(path: str | Path) -> Format:
    """The format of a file, by its ending, or of a folder, by what it holds.

    Raises:
        DataError: for a path that does not exist, a file of another kind, or a folder that holds
            files of several formats.
    """
    path = Path(path)
    if os.path.isfile(path):
        for name, suffixes in SUFFIXES.items():
            if path.name.endswith(suffixes):
                return FORMATS[name]
        known = ", ".join(suffix for each in SUFFIXES.values() for suffix in each)
        raise DataError(f"{path} is not a folder, nor a file that ends in {known}")
    if not os.path.isdir(path):
        what = "is neither a file nor a folder" if os.path.exists(path) else "does not exist"
        raise DataError(
            f"{path} {what}, or may not be entered; expected "
            f"{', or '.join(each.title for each in FORMATS.values())}"
        )
    markers = ("dataset_info.json", "dataset_dict.json", "state.json")
    if any((path / marker).is_file() for marker in markers):
        return FORMATS["arrow"]
    files = [entry.name for entry in decode.entries(path) if entry.is_file()]
    inner = path / "data"
    if not any(name.endswith(s) for name in files for each in SUFFIXES.values() for s in each):
        inside = decode.entries(inner) if inner.is_dir() else []
        files += [entry.name for entry in inside if entry.name.endswith(".parquet")]
    found = [
        name
        for name, suffixes in SUFFIXES.items()
        if any(file.endswith(suffixes) for file in files)
    ]
    if len(found) > 1:
        raise DataError(
            f"{path} holds files of several formats ({', '.join(found)}); name one of the files"
        )
    return FORMATS[found[0] if found else "folder"]


def open_images(path: str | Path, relabel: bool = False) -> ImageSet:
    """The images of a folder or file, in any of the formats of `FORMATS`.

    Nothing is decoded, and nothing in the files is run.

    Args:
        path: see `detect`.
        relabel: see `label`; of no use for an image folder, whose labels have no gaps.

    Raises:
        DataError: for a path of no known format, damaged files, and labels with gaps.
        ImportError: where a format needs a package that is not installed (pyarrow).

    Memory: about 30 bytes per image, and its file's name in an image folder.
    """
    path = Path(path)
    listed: Callable[[Path], Listed]
    listed = import_module(f".{detect(path).module}", __package__).list_images
    return label(listed(path), path, relabel)
