"""Stores of images in any file format, and detection of a path's format.

A `Store` reads images by their index. This module does not import torch, which the command line's
help and the loaders' workers must not wait for; `image_set` adds labels, and makes a torch dataset
of a store.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...common.renamed import old_names
from ...common.textfiles import read_json, read_up_to
from . import decode
from .decode import DataError

if TYPE_CHECKING:
    from .image_set import ImageSet

MAX_BYTES = 1 << 28  # per encoded image, and per file of names
IDENTITIES = "identities.json"  # the classes' names, for formats that cannot store them


class PackedPaths:
    """A list of paths in two arrays, which worker processes can share.

    Attributes:
        text: (T,) uint8, all paths, concatenated. ends: (N,) int64, the end offset of each path.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, paths: Iterable[str | Path]) -> PackedPaths:
        """Pack paths."""
        text, ends = bytearray(), array("q")
        for path in paths:
            text += os.fsencode(path)
            ends.append(len(text))
        return cls(np.frombuffer(text, np.uint8), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Path:
        begin = self.ends[index - 1] if index else 0
        return Path(os.fsdecode(self.text[begin : self.ends[index]].tobytes()))


class Store(ABC):
    """Images, read by index. A store can be pickled and is thread-safe.

    Attributes:
        image_size: (H, W) that every image must decode to, if the format declares it.
        streams: whether only sequential reads are fast; others decompress a shard from its start.
        pixels: (N, H, W, C) uint8, all images if they are decoded in memory, else None.
    """

    image_size: tuple[int, int] | None = None
    streams: bool = False
    pixels: NDArray[np.uint8] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, row: int) -> bytes:
        """Return the encoded bytes of an image; raise OSError or DataError if that fails."""

    @abstractmethod
    def name(self, row: int) -> str:
        """Return an image's location: a file, or a file and an offset."""

    @abstractmethod
    def take(self, rows: NDArray[np.int64]) -> Store:
        """Return a store of the images at the given indices, in that order."""

    @abstractmethod
    def fingerprint(self) -> bytes | memoryview:
        """Return bytes that identify this store, without reading images from files."""

    def open(self, row: int) -> BinaryIO:
        """Return an image's encoded bytes as a file."""
        return io.BytesIO(self.read(row))

    def mode(self, row: int) -> str:
        """Return an image's pixel mode, from its header."""
        with self.open(row) as file:
            return decode.mode(file)

    def decode(
        self, row: int, size: tuple[int, int] | None = None, channels: int | None = None
    ) -> NDArray[np.uint8]:
        """Return an image (H, W, C), converted and resized as `decode.pixels` says."""
        with self.open(row) as file:
            return decode.pixels(file, size, channels, self.image_size)

    def size_of(self, row: int) -> tuple[int, int]:
        """Return (H, W) of an image, which is decoded in full."""
        with self.open(row) as file:
            return decode.pixels(file).shape[:2]

    def read_into(self, pixels: NDArray[np.uint8], row: int) -> None:
        """Decode an image into an array (H, W, C), converted and resized to fit."""
        pixels[:] = self.decode(row, pixels.shape[:2], pixels.shape[2])

    def decode_into(
        self, pixels: NDArray[np.uint8], row: int, expected: tuple[int, int] | None = None
    ) -> None:
        """Decode an image as `decode.read_into` does, whatever size the format declares."""
        with self.open(row) as file:
            decode.read_into(pixels, file, expected)


class Files(Store):
    """A store with one file per image."""

    def __init__(self, paths: PackedPaths, rows: NDArray[np.int64] | None = None) -> None:
        self.paths = paths
        self.rows = np.arange(len(paths)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, row: int) -> Path:
        """Return an image's file."""
        return self.paths[int(self.rows[row])]

    def name(self, row: int) -> str:
        return str(self.path(row))

    def open(self, row: int) -> BinaryIO:
        return open_regular(self.path(row))

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
            except OSError:  # the loader reports it when it reads the file
                size = -1
            name = os.sep.join(path.rsplit(os.sep, 2)[-2:])
            digest.update(f"{name}\0{size}\0".encode(errors="replace"))
        return digest.digest()


class FileRanges(Store):
    """A store whose images are byte ranges of a few files.

    Attributes:
        files: paths of the files. file: (N,) int32, index of each image's file.
        begin, size: (N,) int64, in bytes.
    """

    def __init__(
        self,
        files: PackedPaths,
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
            return read_range(file, int(self.begin[row]), int(self.size[row]))

    def take(self, rows: NDArray[np.int64]) -> FileRanges:
        taken = type(self)(self.files, self.file[rows], self.begin[rows], self.size[rows])
        taken.image_size = self.image_size
        return taken

    def fingerprint(self) -> bytes:
        digest = sha256(repr([self.files[i].name for i in range(len(self.files))]).encode())
        for part in (self.file, self.begin, self.size):
            digest.update(part.tobytes())
        return digest.digest()


class DecodedImages(Store):
    """A store of decoded images in memory.

    Attributes:
        pixels: (N, H, W, C) uint8. source: where they come from, for messages.
    """

    pixels: NDArray[np.uint8]

    def __init__(self, pixels: NDArray[np.uint8], source: str) -> None:
        self.pixels, self.source = pixels, source

    def __reduce__(self) -> tuple[Any, ...]:
        return DecodedImages, (np.ascontiguousarray(self.pixels), self.source)

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, row: int) -> str:
        return f"image {row} of {self.source}"

    def read(self, row: int) -> bytes:
        return decode.png(self.pixels[row])

    def decode(
        self, row: int, size: tuple[int, int] | None = None, channels: int | None = None
    ) -> NDArray[np.uint8]:
        image = self.pixels[row]
        if size in (None, image.shape[:2]) and channels in (None, image.shape[2]):
            return image
        return super().decode(row, size, channels)

    def take(self, rows: NDArray[np.int64]) -> DecodedImages:
        return DecodedImages(self.pixels[rows], self.source)

    def fingerprint(self) -> memoryview:
        return np.ascontiguousarray(self.pixels).data


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read it; raise OSError for anything else."""
    if not path.is_file():  # opening a pipe would block
        raise OSError("not a regular file, or a broken link")
    return path.open("rb")


def read_range(file: BinaryIO, begin: int, size: int) -> bytes:
    """Return exactly `size` bytes from offset `begin`; raise OSError if the file is too short."""
    if size > MAX_BYTES:
        raise OSError(f"an image of {size:,} bytes, over the limit of {MAX_BYTES:,}")
    file.seek(begin)
    content = file.read(size)
    if len(content) < size:
        raise OSError(f"cut short: {len(content)} of {size} bytes are there")
    return content


def read_at_most(file: BinaryIO, limit: int) -> bytes:
    """Return all of a file; raise OSError if it is over the limit."""
    content = read_up_to(file, limit + 1)
    if len(content) > limit:
        raise OSError(f"over the limit of {limit:,} bytes")
    return content


class Sample(NamedTuple):
    """An encoded image.

    Attributes:
        label: identity, from 0. content: the file's bytes.
        extension: of the file name. image_size: (H, W) before rotation to the orientation.
    """

    label: int
    content: bytes
    extension: str
    image_size: tuple[int, int]


class ScanResult(NamedTuple):
    """A store and its labels as a format's reader finds them, before the labels are checked.

    Attributes:
        labels: (N,) int64, as stored.
        names: of the classes, if stored. classes: number of classes, if stored.
    """

    store: Store
    labels: NDArray[np.int64]
    names: list[str] | None = None
    classes: int | None = None


def read_names(folder: Path) -> list[str] | None:
    """Return the classes' names from a folder's identities.json; None if there is no such file.

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
    """Return a folder's files with one of these suffixes, in natural order, without hidden ones."""
    return [e for e in decode.entries(folder) if e.name.endswith(tuple(suffixes)) and e.is_file()]


# -- formats


class Format(NamedTuple):
    """A format of image sets, its reader and its writer.

    Attributes:
        name: the value of `convert`'s ``to``. title: description for users.
        module: the module of its reader, ``list_images(path)``.
        writer: the writer in that module, ``(folder, samples, identities, shard_bytes)``.
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
    """Return the format of a file, by its suffix, or of a folder, by its contents.

    Raises:
        DataError: for a path that does not exist, a file of another kind, or a folder that holds
            files of several formats.
    """
    path = Path(path)
    known = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
    if os.path.isfile(path):
        for name, suffixes in SUFFIXES.items():
            if path.name.endswith(suffixes):
                return FORMATS[name]
        raise DataError(f"{path} is not a folder, nor a file that ends in {', '.join(known)}")
    if not os.path.isdir(path):
        what = "is neither a file nor a folder" if os.path.exists(path) else "does not exist"
        raise DataError(
            f"{path} {what} or is not accessible; expected "
            f"{', or '.join(each.title for each in FORMATS.values())}"
        )
    markers = ("dataset_info.json", "dataset_dict.json", "state.json")
    if any((path / marker).is_file() for marker in markers):
        return FORMATS["arrow"]
    files = [entry.name for entry in decode.entries(path) if entry.is_file()]
    inner = path / "data"
    if not any(name.endswith(known) for name in files):
        inside = decode.entries(inner) if inner.is_dir() else []
        files += [entry.name for entry in inside if entry.name.endswith(".parquet")]
    found = [name for name, ends in SUFFIXES.items() if any(file.endswith(ends) for file in files)]
    if len(found) > 1:
        raise DataError(
            f"{path} holds files of several formats ({', '.join(found)}); name one of the files"
        )
    return FORMATS[found[0] if found else "folder"]


def open_images(path: str | Path, relabel: bool = False) -> ImageSet:
    """Return the images of a folder or file, in any of the formats of `FORMATS`, as a dataset.

    No image is decoded, and nothing that the files hold is executed.

    Args:
        path: see `detect`.
        relabel: see `image_set.label`; without effect on image folders, whose labels have no gaps.

    Raises:
        DataError: for an unknown format, damaged files, and labels with gaps.
        ImportError: if a format needs a package that is not installed (pyarrow).

    Memory: about 30 bytes per image, and its path in an image folder.
    """
    from .image_set import label

    path = Path(path)
    scan: ScanResult = import_module(f".{detect(path).module}", __package__).list_images(path)
    return label(scan, path, relabel)


__getattr__ = old_names(
    __name__,
    Listed="ScanResult",
    Names="PackedPaths",
    Spans="FileRanges",
    read_span="read_range",
)
