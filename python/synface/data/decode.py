"""Image folders and files, hostile until they are decoded: NumPy and Pillow are all it takes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

# The decoders of Pillow's that files may reach, whatever their name (EPS starts Ghostscript).
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = frozenset(
    {".bmp", ".jpg", ".jpeg", ".png", ".pgm", ".ppm", ".pnm", ".tif", ".tiff", ".webp"}
)
MAX_PIXELS = 1 << 26  # of one image; more is taken for a decompression bomb
NAMED = 5  # bad files that an error names
GREY = ("1", "L", "LA")  # Pillow's modes without colour


class DataError(ValueError):
    """Face images that cannot be used; the message names the files and what is wrong."""


def keep(count: int, holdout: int) -> int:
    """How many of `count` identities are left to train on.

    Raises:
        ValueError: if holdout is negative, or fewer than 2 are left.
    """
    if holdout < 0 or count - holdout < 2:
        raise ValueError(
            f"holdout must lie in [0, {count - 2}] to leave at least 2 of the "
            f"{count} identities for training, got {holdout}"
        )
    return count - holdout


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """The images of a folder, listed but not opened; `list_folder` makes one.

    Attributes:
        files: of the images.
        labels: (N,) int64 in [0, len(identities)), one for each file.
        identities: the name of each label, which is that of its sub-folder.
        source: the folder, for reports.

    Raises:
        ValueError: for labels that do not fit.
    """

    files: list[Path]
    labels: NDArray[np.int64]
    identities: list[str]
    source: str

    def __post_init__(self) -> None:
        labels, count = self.labels, len(self.identities)
        if labels.dtype != np.int64 or labels.shape != (len(self.files),):
            raise ValueError(
                f"labels must be int64 of shape ({len(self.files)},), one for each file, "
                f"got {labels.dtype} {labels.shape}"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < count:
            raise ValueError(
                f"labels must lie in [0, {count}), got {labels.min()} to {labels.max()}"
            )

    def __len__(self) -> int:
        return len(self.files)

    def split(self, holdout: int) -> tuple[ImageFolder, ImageFolder]:
        """Splits by identity: all but the last `holdout`, and the last `holdout`.

        Labels of both start at 0; with holdout 0 the second is empty.

        Raises:
            ValueError: if holdout is negative, or leaves fewer than 2 identities in the first.
        """
        kept = keep(len(self.identities), holdout)
        first, second = np.flatnonzero(self.labels < kept), np.flatnonzero(self.labels >= kept)
        return (
            ImageFolder(
                [self.files[i] for i in first],
                self.labels[first],
                self.identities[:kept],
                self.source,
            ),
            ImageFolder(
                [self.files[i] for i in second],
                self.labels[second] - kept,
                self.identities[kept:],
                self.source,
            ),
        )


def list_folder(path: str | Path) -> ImageFolder:
    """The images of a folder that holds one sub-folder per identity, in natural order.

    Files of other extensions and hidden ones are ignored. No file is opened.

    Raises:
        DataError: for a missing or empty folder, fewer than 2 identities, and an identity without
            images or with folders inside.
    """
    root = Path(path)
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
    raise_if(
        wrong,
        f"of {len(folders)} identity folders in {root}",
        f"each to hold images ({' '.join(sorted(EXTENSIONS))}) and no folders",
    )
    names = [folder.name for folder in folders]
    return ImageFolder(files, np.array(labels, np.int64), names, str(root))


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, in natural order, without hidden entries."""
    try:
        return sorted((e for e in folder.iterdir() if e.name[0] != "."), key=natural)
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}") from error


def natural(path: Path) -> tuple[list[str | int], str]:
    """A key that sorts s2 before s10."""
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
    if image.mode[0] in "IF":
        image.close()
        raise OSError(f"more than 8 bits per channel (mode {image.mode})")
    return image


def mode(path: Path) -> str:
    """The pixel mode, from the header."""
    with _open(path) as image:
        return image.mode


def decode(path: Path) -> Image.Image:
    """The image, decoded in full and turned by its EXIF orientation."""
    from PIL import ImageOps

    with _open(path) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def read_into(pixels: NDArray[np.uint8], path: Path) -> None:
    """Decodes a file into (H, W, C) bytes: converted to grey or RGB, resized (antialiased)."""
    from PIL import Image

    height, width, channels = pixels.shape
    image = decode(path).convert("L" if channels == 1 else "RGB")
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels[:] = np.asarray(image).reshape(pixels.shape)


def attempt(function: Callable) -> Callable:
    """`function`, returning (result, None) or (None, what went wrong).

    Decoders meet hostile bytes with exceptions of any type, so all are caught.
    """

    def attempted(*arguments):
        from PIL import Image, UnidentifiedImageError

        try:
            return function(*arguments), None
        except UnidentifiedImageError:
            return None, f"no image that can be read (known formats: {', '.join(FORMATS)})"
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            return None, f"a decompression bomb: {error}"
        except OSError as error:
            return None, error.strerror or str(error)
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"

    return attempted


def raise_if(wrong: dict[Path, str], of_what: str, expected: str) -> None:
    """Raises a `DataError` that names the first of the wrong files, if there are any."""
    if wrong:
        lines: Iterator[str] = (f"\n  {path}: {wrong[path]}" for path in list(wrong)[:NAMED])
        more = f"\n  and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise DataError(
            f"{len(wrong)} {of_what} cannot be used; expected {expected}:{''.join(lines)}{more}"
        )
