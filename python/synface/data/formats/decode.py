"""Decoding of untrusted image files by Pillow, and HEIC where pillow-heif is installed."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ...common.extras import extra
from ...common.renamed import old_names
from ...common.textfiles import read_up_to
from . import metadata

if TYPE_CHECKING:
    from PIL import Image

# Pillow's decoders that files may reach, whatever their suffix (EPS starts Ghostscript).
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
HEIF = (b"heic", b"heix", b"heim", b"heis", b"mif1")  # brands of still images
EXTENSIONS = frozenset(
    {".bmp", ".jpg", ".jpeg", ".png", ".pgm", ".ppm", ".pnm", ".tif", ".tiff", ".webp"}
    | {".heic", ".heif"}
)
# Other formats' suffix is JPEG's.
SUFFIXES = {
    "BMP": "bmp", "HEIF": "heic", "PNG": "png", "PPM": "pnm", "TIFF": "tif", "WEBP": "webp"
}  # fmt: skip
MAX_PIXELS = 1 << 26  # of one image; more counts as a decompression bomb
NAMED = 5  # bad files that an error names
READING = "reading images"  # in errors
GRAYSCALE = ("1", "L", "LA")  # Pillow's modes without color


class DataError(ValueError):
    """Error for unusable face images; the message names the files and the problem."""


def keep(count: int, holdout: int) -> int:
    """Return the number of identities left for training, of `count` in all.

    Raises:
        ValueError: if holdout is negative, or fewer than 2 are left.
    """
    if holdout < 0 or count - holdout < 2:
        raise ValueError(
            f"holdout must lie in [0, {count - 2}] to leave at least 2 of the "
            f"{count} identities for training, got {holdout}"
        )
    return count - holdout


def entries(folder: Path) -> list[Path]:
    """Return a folder's entries in natural order, without hidden entries and macOS metadata."""
    return [Path(entry.path) for entry in scan(folder)]


def scan(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries as `entries` does, as `os.DirEntry` with cached file types."""
    try:
        with os.scandir(folder) as found:
            shown = [e for e in found if e.name[0] != "." and e.name != "__MACOSX"]
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}") from error
    return sorted(shown, key=lambda entry: natural(entry.name))


def walk(root: Path, above: frozenset[str] = frozenset()) -> Iterator[tuple[str, int]]:
    """Yield the files below a folder in natural order; a link to a folder above is not followed.

    Args:
        above: real paths of more folders that are not entered.

    Yields:
        The path of a file, and its depth (1: in the folder itself).

    Raises:
        DataError: for a folder that cannot be listed.
    """
    todo = [(str(root), 0, True, above)]
    while todo:
        path, depth, is_folder, above = todo.pop()
        if not is_folder:
            yield path, depth
        elif (real := os.path.realpath(path)) not in above:
            above |= {real}
            inside = scan(Path(path))
            todo += [(e.path, depth + 1, e.is_dir(), above) for e in reversed(inside)]


def natural(text: str) -> tuple[list[str | int], str]:
    """Return a sort key that puts s2 before s10."""
    # Digits have odd indices in the split, so numbers are only compared with numbers.
    parts = re.split(r"([0-9]{1,4000})", text)  # Python's limit for int()
    return [int(p) if i % 2 else p.casefold() for i, p in enumerate(parts)], text


def _open(file: BinaryIO, whole: bool = False) -> tuple[Image.Image, Mapping[Any, Any]]:
    """Return an image, not decoded yet, and the metadata with its orientation.

    Args:
        whole: read the pixels too, which decoding needs; otherwise only the header.
    """
    with extra("train", READING):
        from PIL import Image

    file, info = metadata.strip(file, whole)
    begin = file.read(12)
    file.seek(0)
    formats: tuple[str, ...] = FORMATS
    if begin[4:8] == b"ftyp" and begin[8:] in HEIF:
        file, formats = _heif(file), ("HEIF",)
    image = Image.open(file, formats=formats)
    _check_size(image.width, image.height)
    if metadata.deep(image):
        raise OSError(f"more than 8 bits per channel (read as mode {image.mode})")
    return image, image.info if info is None else info


def _heif(file: BinaryIO) -> BinaryIO:
    """Return a HEIC file in memory, which Pillow then reads through pillow-heif.

    Raises:
        ImportError: without pillow-heif.
        OSError: for a coded image of too many pixels, which may be cropped to fewer.
    """
    content = read_up_to(file, metadata.MAX_PIXELS)
    for box in _meta(content):
        # The lookahead finds sizes that overlap, so that no bytes before one can hide it.
        for sides in re.findall(rb"(?=ispe.{4}(.{4})(.{4}))", box, re.DOTALL):
            _check_size(*(int.from_bytes(side, "big") for side in sides))
    with extra("heic", "a HEIC image"):
        from pillow_heif import register_heif_opener
    with extra("train", READING):
        from PIL import Image

    if "HEIF" not in Image.OPEN:  # its options are those of the whole process
        register_heif_opener(decode_threads=1, thumbnails=False)
    return io.BytesIO(content)


def _meta(content: bytes) -> Iterator[bytes]:
    """Yield the boxes of metadata at the top level of a HEIC file, which has pixels elsewhere."""
    at = 0
    while len(head := content[at : at + 16]) >= 8:
        size, begin = int.from_bytes(head[:4], "big"), 8
        if size == 1:
            size, begin = int.from_bytes(head[8:], "big"), 16
        elif size == 0:  # the last box
            size = len(content) - at
        if head[4:8] == b"meta":
            yield content[at + begin : at + size]
        at += max(size, begin)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise OSError(f"{width}x{height} pixels, over the limit of {MAX_PIXELS:,}")


def mode(file: BinaryIO) -> str:
    """Return the pixel mode, from the header."""
    return _open(file)[0].mode


def header(file: BinaryIO) -> tuple[str, tuple[int, int]]:
    """Return the file name suffix of the image's format, and (H, W), from the header."""
    image = _open(file)[0]
    return SUFFIXES.get(str(image.format), "jpg"), (image.height, image.width)


def decode(file: BinaryIO) -> Image.Image:
    """Return the image, decoded in full and rotated to its EXIF orientation."""
    return metadata.upright(*_open(file, whole=True))


def loaded(image: Image.Image) -> Image.Image:
    """Return a user's image, decoded and turned by its orientation.

    Returns:
        The image itself if it need not be turned; the user's is not changed but loaded.

    Raises:
        OSError: for too many pixels, or more than 8 bits per channel.
    """
    check_given(image)
    if image.format in ("TIFF", "HEIF"):  # copying turns it, and what is left is in its `info`
        image = image.copy()
    return metadata.upright(image, image.info)


def check_given(image: Image.Image) -> None:
    """Raise OSError for a user's image of too many pixels, or more than 8 bits per channel."""
    _check_size(image.width, image.height)
    if image.mode[0] in "IF":
        raise OSError(f"more than 8 bits per channel (mode {image.mode})")


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Return an image in a mode of Pillow's; the image itself if it has that mode."""
    return image if image.mode == mode else image.convert(mode)


def pixels(
    file: BinaryIO,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    expected: tuple[int, int] | None = None,
) -> NDArray[np.uint8]:
    """Decode an image to (H, W, C) bytes.

    Args:
        size: (H, W) to resize to, antialiased; None keeps the image's size.
        channels: 1 converts to grayscale, 3 to RGB; None keeps the image's own.
        expected: (H, W) required before resizing.

    Raises:
        OSError: if it does not have the expected (H, W).
    """
    image = decode(file)
    if expected is not None and (image.height, image.width) != tuple(expected):
        raise OSError(
            f"decodes to {image.height}x{image.width} pixels, expected "
            f"{expected[0]}x{expected[1]} (height x width)"
        )
    return fit(image, size, channels)


def fit(
    image: Image.Image, size: tuple[int, int] | None = None, channels: int | None = None
) -> NDArray[np.uint8]:
    """Return a decoded image as (H, W, C) bytes, converted and resized as `pixels` says."""
    with extra("train", READING):
        from PIL import Image

    if channels is None:
        channels = 1 if image.mode in GRAYSCALE else 3
    image = in_mode(image, "L" if channels == 1 else "RGB")
    height, width = size or (image.height, image.width)
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, channels)


def read_into(
    out: NDArray[np.uint8], file: BinaryIO, expected: tuple[int, int] | None = None
) -> None:
    """Decode an image into an array (H, W, C), converted and resized to fit, as `pixels` does."""
    out[:] = pixels(file, out.shape[:2], out.shape[2], expected)


def png(image: NDArray[np.uint8]) -> bytes:
    """Encode an image (H, W, 1 or 3) as PNG."""
    file = io.BytesIO()
    from_bytes(image).save(file, "PNG")
    return file.getvalue()


def from_bytes(image: NDArray[np.uint8]) -> Image.Image:
    """Return an image (H, W, 1 or 3) as Pillow's."""
    with extra("train", READING):
        from PIL import Image

    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def attempt(function: Callable) -> Callable:
    """Wrap `function` to return (result, None), or (None, error message) if it raises.

    Decoders may raise any exception on malformed bytes, so all are caught.
    """

    def attempted(*arguments):
        with extra("train", READING):
            from PIL import Image, UnidentifiedImageError

        try:
            return function(*arguments), None
        except UnidentifiedImageError:
            return None, f"not a readable image (known formats: {', '.join(FORMATS)}, HEIC)"
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            return None, f"a decompression bomb: {error}"
        except OSError as error:
            return None, error.strerror or str(error)
        except ImportError as error:
            return None, str(error)
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"

    return attempted


def raise_if(wrong: Mapping[str, str], of_what: str, expected: str) -> None:
    """Raise a `DataError` that names the first bad files, if there are any."""
    if wrong:
        lines: Iterator[str] = (f"\n  {path}: {wrong[path]}" for path in list(wrong)[:NAMED])
        more = f"\n  and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise DataError(
            f"{len(wrong)} {of_what} cannot be used; expected {expected}:{''.join(lines)}{more}"
        )


__getattr__ = old_names(__name__, GREY="GRAYSCALE")  # codespell:ignore grey
