"""Faces in memory, and the reader of image folders: one sub-folder per identity."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

# The decoders of Pillow's that files may reach, whatever their name (EPS starts Ghostscript).
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = frozenset(
    {".bmp", ".jpg", ".jpeg", ".png", ".pgm", ".ppm", ".pnm", ".tif", ".tiff", ".webp"}
)
MAX_PIXELS = 1 << 26  # of one image; more is taken for a decompression bomb
NAMED = 5  # bad files that an error names


class DataError(ValueError):
    """Face images that cannot be used; the message names the files and what is wrong."""


@dataclass(frozen=True, eq=False)
class Faces:
    """A set of face images with their identities.

    Attributes:
        images: (N, H, W, C) uint8, C = 1 (grey) or 3 (RGB).
        labels: (N,) int64 in [0, len(identities)).
        identities: the name of each label.
        source: where the images come from, for reports.

    Raises:
        ValueError: for another dtype or shape, or a label out of range.
    """

    images: Tensor
    labels: Tensor
    identities: list[str]
    source: str

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(
                "images must be uint8 of shape (N, H, W, 1) or (N, H, W, 3), "
                f"got {_kind(images)} {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels must be int64 of shape ({len(images)},), "
                f"got {_kind(labels)} {tuple(labels.shape)}"
            )
        if len(labels) and (labels.min() < 0 or labels.max() >= len(self.identities)):
            raise ValueError(
                f"labels must lie in [0, {len(self.identities)}), "
                f"got {int(labels.min())} to {int(labels.max())}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def split(self, holdout: int) -> tuple[Faces, Faces]:
        """Splits by identity: all but the last `holdout`, and the last `holdout`.

        Labels of both sets start at 0; with holdout 0 the second set is empty.

        Raises:
            ValueError: if holdout is negative, or leaves fewer than 2 identities in the first set.
        """
        kept = len(self.identities) - holdout
        if holdout < 0 or kept < 2:
            raise ValueError(
                f"holdout must lie in [0, {len(self.identities) - 2}] to leave at least 2 of the "
                f"{len(self.identities)} identities for training, got {holdout}"
            )
        first, second = self.labels < kept, self.labels >= kept
        return (
            Faces(self.images[first], self.labels[first], self.identities[:kept], self.source),
            Faces(
                self.images[second],
                self.labels[second] - kept,
                self.identities[kept:],
                self.source,
            ),
        )


def read_folder(
    path: str | Path,
    size: tuple[int, int] | None = None,
    grey: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    memory_limit: int = 8 << 30,
) -> Faces:
    """Reads a folder that holds one sub-folder of images per identity.

    Identities and files come in natural order (s1, s2, ..., s10). Every image is decoded in full
    before this returns, turned by its EXIF orientation, stripped of alpha, converted, and resized
    (antialiased, the aspect ratio is not kept). Files of other extensions and hidden ones are
    ignored.

    Args:
        path: the folder.
        size: (H, W) in pixels; None takes the first image's.
        grey: True for one channel, False for RGB; None is grey when every file is.
        progress: called as progress(done, total) after each decoded image.
        memory_limit: the most bytes that the decoded images may take together.

    Returns:
        The `Faces`, (N, H, W, 1 or 3) uint8.

    Raises:
        DataError: for a missing or empty folder, fewer than 2 identities, an identity without
            images or with folders inside, more than `memory_limit` bytes, and files that are
            unreadable, no image, truncated, over 2**26 pixels, or not of 8 bits per channel: every
            file is looked at, the first five bad ones are named.
        ValueError: if size or memory_limit makes no sense.

    Memory: N*H*W*C bytes, and one decoded file per thread (at most four).
    """
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be (height, width) in pixels, both at least 1, got {size}")
    if memory_limit < 1:
        raise ValueError(f"memory_limit must be a positive number of bytes, got {memory_limit}")
    root = Path(path)
    identities, files, labels = _list(root)

    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        modes: list[str | None] = []
        wrong: dict[Path, str] = {}
        for file, (mode, problem) in zip(files, pool.map(_attempt(_mode), files), strict=True):
            modes.append(mode)
            if problem:
                wrong[file] = problem
        if grey is None:
            grey = all(mode in ("1", "L", "LA") for mode in modes if mode)
        if size is None:
            # Only a file that decodes has a size; one that does not is an error below.
            decoded = (_attempt(_decode)(file)[0] for file in files if file not in wrong)
            first = next((image for image in decoded if image is not None), None)
            size = (first.height, first.width) if first else (1, 1)

        shape = (len(files), *size, 1 if grey else 3)
        if (total := int(np.prod(shape, dtype=object))) > memory_limit:
            raise DataError(
                f"{root}: {shape[0]} images of {shape[1]}x{shape[2]} pixels and {shape[3]} "
                f"channels take {total:,} bytes, over the memory limit of {memory_limit:,}; "
                "ask for a smaller size"
            )
        images = np.empty(shape, np.uint8)

        def read(index: int) -> None:
            image = _decode(files[index]).convert("L" if grey else "RGB")
            if (image.height, image.width) != size:
                image = image.resize((size[1], size[0]), _bilinear())
            images[index] = np.asarray(image).reshape(shape[1:])

        good = [index for index, file in enumerate(files) if file not in wrong]
        for done, (_, problem) in enumerate(pool.map(_attempt(read), good)):
            if problem:
                wrong[files[good[done]]] = problem
            if progress is not None:
                progress(done + 1, len(good))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest
    wrong = {file: wrong[file] for file in files if file in wrong}  # in the folder's order
    _raise_if(wrong, f"of {len(files)} images in {root}", "readable, complete images")
    return Faces(torch.from_numpy(images), torch.tensor(labels), identities, str(root))


def _list(root: Path) -> tuple[list[str], list[Path], list[int]]:
    """The identities' names, every image file, and each file's label."""
    # os.path answers False where Path raises: without the right to look.
    if not os.path.isdir(root):
        what = "is not a folder" if os.path.exists(root) else "does not exist or may not be entered"
        raise DataError(
            f"{root} {what}; expected a folder with one sub-folder of images per person"
        )
    entries = _entries(root)
    folders = [entry for entry in entries if os.path.isdir(entry)]
    if len(folders) < 2:
        loose = sum(
            entry.suffix.lower() in EXTENSIONS for entry in entries if os.path.isfile(entry)
        )
        raise DataError(
            f"{root} holds {len(folders)} identity folders and {loose} images of its own; "
            "expected at least 2 sub-folders, one per person, with that person's images"
        )
    files: list[Path] = []
    labels: list[int] = []
    wrong: dict[Path, str] = {}
    for label, folder in enumerate(folders):
        inside = _entries(folder)
        nested = [entry for entry in inside if os.path.isdir(entry)]
        images = [e for e in inside if e.suffix.lower() in EXTENSIONS and e not in nested]
        if nested:
            wrong[folder] = f"has the folder {nested[0].name!r} inside"
        elif not images:
            wrong[folder] = f"has no image ({len(inside)} other files)"
        files += images
        labels += [label] * len(images)
    _raise_if(
        wrong,
        f"of {len(folders)} identity folders in {root}",
        f"each to hold images ({' '.join(sorted(EXTENSIONS))}) and no folders",
    )
    return [folder.name for folder in folders], files, labels


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, in natural order, without hidden entries."""
    try:
        return sorted((e for e in folder.iterdir() if e.name[0] != "."), key=_natural)
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}") from error


def _natural(path: Path) -> tuple[list[str | int], str]:
    # Digits stand at the odd places of the split, so numbers only ever meet numbers.
    parts = re.split(r"([0-9]+)", path.name)
    return [int(p) if i % 2 else p.casefold() for i, p in enumerate(parts)], path.name


def _open(path: Path) -> Image.Image:
    from PIL import Image

    if not path.is_file():  # opening a pipe would wait for ever
        raise OSError("no regular file, or a link to nothing")
    image = Image.open(path, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise OSError(f"{image.width}x{image.height} pixels, over the limit of {MAX_PIXELS:,}")
    return image


def _mode(path: Path) -> str:
    """The pixel mode, from the header."""
    with _open(path) as image:
        if image.mode[0] in "IF":
            raise OSError(f"more than 8 bits per channel (mode {image.mode})")
        return image.mode


def _decode(path: Path) -> Image.Image:
    from PIL import ImageOps

    with _open(path) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def _bilinear() -> Image.Resampling:
    from PIL import Image

    return Image.Resampling.BILINEAR


def _attempt(function: Callable) -> Callable:
    """`function`, returning (result, None) or (None, what went wrong).

    Decoders meet hostile bytes with exceptions of any type, so all are caught.
    """

    def attempt(argument):
        from PIL import Image, UnidentifiedImageError

        try:
            return function(argument), None
        except UnidentifiedImageError:
            return None, f"no image that can be read (known formats: {', '.join(FORMATS)})"
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            return None, f"a decompression bomb: {error}"
        except OSError as error:
            return None, error.strerror or str(error)
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"

    return attempt


def _raise_if(wrong: dict[Path, str], of_what: str, expected: str) -> None:
    if wrong:
        lines: Iterator[str] = (f"\n  {path}: {wrong[path]}" for path in list(wrong)[:NAMED])
        more = f"\n  and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise DataError(
            f"{len(wrong)} {of_what} cannot be used; expected {expected}:{''.join(lines)}{more}"
        )


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
