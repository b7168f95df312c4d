"""WebDataset shards, read and written: tar files whose members, grouped by name, are samples.

A sample is an image (``000042.jpg``) and its label: ``000042.cls``, an integer as text, or the
"label" of ``000042.json``. The members of a sample follow one another. Shards are read by the
standard library; nothing is ever extracted.

Source: https://github.com/webdataset/webdataset; POSIX pax archives.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, cast

import numpy as np

from . import decode
from .decode import DataError
from .images import (
    IDENTITIES,
    SUFFIXES,
    FileRanges,
    PackedPaths,
    Sample,
    ScanResult,
    natural_files,
    read_names,
    read_range,
)

MAX_TEXT = 1 << 16  # bytes of a label
MAX_HEADER = 1 << 20  # bytes of an extended header; the standard library accepts any size


# Magic numbers of compressed files, long since a tar begins with a name, such as BZhang.jpg.
COMPRESSED: tuple[tuple[bytes, Callable], ...] = (
    (rb"\x1f\x8b", gzip.open),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.open),
    (rb"\xfd7zXZ\0", lzma.open),
)


def _opener(path: Path) -> Callable | None:
    """Return a shard's decompressor, or None, by its magic number: its suffix may be wrong."""
    with path.open("rb") as file:
        begin = file.read(10)
    return next((opener for magic, opener in COMPRESSED if re.match(magic, begin)), None)


def _opened(path: Path) -> BinaryIO:
    """Open a shard, decompressed."""
    opener = _opener(path)
    return path.open("rb") if opener is None else cast(BinaryIO, opener(path))


class CompressedRanges(FileRanges):
    """Images in compressed shards, read sequentially; one shard is open at a time."""

    streams = True

    def __init__(self, *arrays: Any) -> None:
        super().__init__(*arrays)
        self._lock = Lock()
        self._opened: tuple[int, BinaryIO] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return CompressedRanges, (self.files, self.file, self.begin, self.size)

    def read(self, row: int) -> bytes:
        number = int(self.file[row])
        with self._lock:
            if self._opened is None or self._opened[0] != number:
                if self._opened is not None:
                    self._opened[1].close()
                self._opened = number, _opened(self.files[number])
            return read_range(self._opened[1], int(self.begin[row]), int(self.size[row]))


class _Careful(io.RawIOBase):
    """A file that limits reads, since `tarfile` trusts the sizes in headers."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise OSError(f"an extended header of {size:,} bytes")
        return self.file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


def list_images(path: Path) -> ScanResult:
    """List the images of a folder of shards, in natural order, or of one shard.

    Every shard is scanned once; a compressed one is decompressed completely.

    Raises:
        DataError: for shards that are damaged or cut short, samples without an image or a label or
            whose members are not consecutive, and members that are not files, naming the shard and
            offset.

    Memory: 28 bytes per image, and twice that while they are listed.
    """
    folder = path.parent if path.is_file() else path
    shards = [path] if path.is_file() else natural_files(path, SUFFIXES["webdataset"])
    rows = array("q")
    kind: type[FileRanges] = FileRanges
    for number, shard in enumerate(shards):
        try:
            if _opener(shard) is not None:
                kind = CompressedRanges
            with _opened(shard) as file:
                for sample in _samples(shard, file):
                    rows.extend((number, *sample))
        except DataError:
            raise
        except (
            Exception
        ) as error:  # hostile bytes make decompressors and `tarfile` raise errors of any type
            raise DataError(f"{shard} is not a whole tar file: {error or type(error)}") from error
    file, begin, size, labels = np.frombuffer(rows, np.int64).reshape(-1, 4).T.copy()
    store = kind(PackedPaths.of(shards), file.astype(np.int32), begin, size)
    return ScanResult(store, labels, read_names(folder))


def _samples(shard: Path, file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Yield each image's offset, its size in bytes and its label."""
    key: str | None = None
    image: tuple[int, int] | None = None
    label: int | None = None
    kinds: list[str] = []

    def sample(at: int) -> Iterator[tuple[int, int, int]]:
        if key is None:
            return
        if image is not None and label is not None:
            yield *image, label
            return
        while (later := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]
            if _split(later.name)[0] == key:
                raise DataError(
                    f"{shard}, offset {later.offset}: {later.name!r} does not follow the rest of "
                    f"sample {key!r}, before offset {at}; the members of a sample must follow one "
                    "another, as in an archive that is sorted by name (tar --sort=name)"
                )
        lack = "label (.cls, or .json with a label)"
        if image is None:
            lack = f"image of a known format (it has {', '.join(kinds)})"
        raise DataError(f"{shard}, before offset {at}: sample {key!r} has no {lack}")

    with tarfile.open(fileobj=_Careful(file), mode="r:") as tar:
        at = 0
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # which tarfile keeps otherwise
            where = f"{shard}, offset {member.offset}"
            if member.isdir():
                continue
            at = member.offset_data
            if not member.isreg() or member.issparse() or member.size < 0:
                raise DataError(f"{where}: {member.name!r} is not a regular file")
            name, kind = _split(member.name)
            if name is None:
                continue
            if name != key:
                yield from sample(member.offset)
                key, image, label, kinds = name, None, None, []
            if len(kinds) < decode.NAMED:
                kinds.append(kind)
            if kind in decode.EXTENSIONS:
                if image is not None:
                    raise DataError(f"{where}: sample {key!r} has a second image")
                image = at, member.size
            elif kind in (".cls", ".json"):
                if member.size > MAX_TEXT:
                    raise DataError(f"{where}: a label of {member.size:,} bytes")
                file.seek(at)
                found = _label(kind, file.read(member.size), where)
                if None not in (found, label) and found != label:
                    raise DataError(f"{where}: sample {key!r} has the labels {label} and {found}")
                label = label if found is None else found
        yield from sample(file.tell())


def _split(name: str) -> tuple[str | None, str]:
    """Return a member's sample (None for hidden files and macOS metadata) and its suffix."""
    parent, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    shown = stem and "__MACOSX" not in parent.split("/")
    return f"{parent}/{stem}" if shown else None, "." + extension.rpartition(".")[2].lower()


def _label(kind: str, text: bytes, where: str) -> int | None:
    """Return the label in a .cls or .json file; None if the JSON has none."""
    try:
        value = json.loads(text)
        if kind == ".json":
            if not isinstance(value, dict):
                raise ValueError
            value = value.get("label")
            if value is None:
                return None
        if type(value) is not int or not 0 <= value < 1 << 62:
            raise ValueError
    except (ValueError, RecursionError):
        raise DataError(f"{where}: expected a label, an integer ≥ 0, got {text[:80]!r}") from None
    return value


def write(folder: Path, samples: Iterable[Sample], identities: list[str], shard_bytes: int) -> None:
    """Write shards ``000000.tar``, …, each of about `shard_bytes`, and the identities' names."""
    count = 0
    numbered = enumerate(samples)
    while (first := next(numbered, None)) is not None:
        with tarfile.open(folder / f"{count:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as shard:
            count += 1
            for number, sample in chain([first], numbered):
                for extension, content in (
                    (sample.extension, sample.content),
                    ("cls", str(sample.label).encode()),
                ):
                    member = tarfile.TarInfo(f"{number:09d}.{extension}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
                if shard.offset >= shard_bytes:
                    break
    (folder / IDENTITIES).write_text(json.dumps(identities))
