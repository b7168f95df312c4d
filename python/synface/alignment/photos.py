"""Photos, read from files in all formats of image sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..data.formats import decode

if TYPE_CHECKING:
    from PIL import Image


def read_photo(path: str | Path) -> Image.Image:
    """Return a photo, decoded in full, in RGB and turned by its EXIF orientation.

    Raises:
        OSError: for a file that cannot be read, is damaged, or has more than 2**26 pixels. As
            decoders of malformed files may raise anything, `decode.attempt` is of use.
        ImportError: for HEIC without pillow-heif.
    """
    with Path(path).open("rb") as file:
        try:
            return read_open_photo(file)
        except ImportError as error:
            raise ImportError(f"{path}: {error}", name=error.name) from error


def read_open_photo(file: BinaryIO) -> Image.Image:
    """Return the photo in an open file as `read_photo` does; errors do not name the file."""
    photo = decode.in_mode(decode.decode(file), "RGB")
    photo.info.clear()  # or its orientation would turn it once more
    return photo
