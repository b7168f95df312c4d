"""Photos, read from files: all formats of image sets, and HEIC."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..common.extras import extra
from ..data.formats import decode
from ..data.formats.decode import MAX_PIXELS

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = decode.EXTENSIONS | {".heic", ".heif"}
# An ISO media file of a brand that holds HEVC-coded images, whatever its suffix.
HEIF = re.compile(rb"....ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL)


def read_photo(path: str | Path) -> Image.Image:
    """Return a photo, decoded in full, in RGB and turned by its EXIF orientation.

    Raises:
        OSError: for a file that cannot be read, is damaged, or has more than 2**26 pixels. As
            decoders of malformed files may raise anything, `decode.attempt` is of use.
        ImportError: for HEIC without pillow-heif.
    """
    with Path(path).open("rb") as file:
        heif = HEIF.match(file.read(12))
        file.seek(0)
        image = _heif(file, path) if heif else decode.decode(file)
        return image.convert("RGB")


def _heif(file: BinaryIO, path: str | Path) -> Image.Image:
    with extra("heic", path):
        import pillow_heif

    opened = pillow_heif.open_heif(file)  # libheif turns images itself
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise OSError(f"{width}x{height} pixels, over the limit of {MAX_PIXELS:,}")
    return opened.to_pillow()
