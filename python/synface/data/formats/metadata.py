"""The orientation in image files' metadata; damaged metadata never make an image unreadable."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from ...common.extras import extra
from ...common.textfiles import AT_ONCE, read_up_to

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION, BITS_PER_SAMPLE, XMP_PACKET = 0x0112, 0x0102, 0x02BC  # tags of TIFF
INTEGERS = {1: "B", 3: "H", 4: "I"}  # TIFF's types
XMP, PROFILE = "XML:com.adobe.xmp", "Raw profile type exif"  # of PNG's texts
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
MAX_PIXELS = 1 << 29  # bytes of encoded pixels; 2**26 uncompressed RGBA pixels are half of it
MAX_INFO = 1 << 20  # bytes of a text or of EXIF in a PNG, decompressed


def upright(image: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    """Load an image, and rotate or mirror it to its orientation.

    Other metadata is ignored, even if damaged. An orientation that is unreadable or not in [1, 8]
    has no effect.
    """
    with extra("train", "reading images"):
        from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    if image.format == "TIFF":  # Pillow applies the orientation in load(), and reads all metadata
        exif = Image.Exif()
        tags: Mapping[int, Any] = image.tag_v2  # type: ignore[attr-defined]
        number = tags.get(ORIENTATION)
        exif[ORIENTATION] = _of_xmp({"xmp": tags.get(XMP_PACKET)}) if number is None else number
        image.getexif = lambda: exif  # type: ignore[method-assign]
        image.load()
        return image
    if image.format == "HEIF":  # load() turns it, as its container says; its EXIF does not count
        try:
            image.load()
        except (RuntimeError, EOFError, ValueError) as error:  # libheif's
            raise OSError(str(error).strip()) from error
        return image
    image.load()
    number = _of_exif(_exif(info))
    turn = turns.get(_of_xmp(info) if number is None else number)
    return image if turn is None else image.transpose(turn)


def _exif(info: Mapping[Any, Any]) -> bytes:
    """Return the EXIF bytes from the TIFF header on; empty without EXIF."""
    exif = info.get("exif")
    if exif is None and isinstance(text := info.get(PROFILE), str):
        try:  # ImageMagick's: a kind, a length and lines of hexadecimal digits
            exif = bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            exif = None
    if not isinstance(exif, bytes):
        return b""
    return re.sub(rb"^(Exif\0\0){1,2}", b"", exif)


def _of_exif(exif: bytes) -> int | None:
    """Return the orientation in the first directory."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return None
    (begin,) = struct.unpack_from(f"{order}I", exif, 4)
    if begin + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(f"{order}H", exif, begin)
    for at in range(begin + 2, min(begin + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, values = struct.unpack_from(f"{order}HHI", exif, at)
        if tag == ORIENTATION and kind in INTEGERS and values == 1:
            return int(struct.unpack_from(f"{order}{INTEGERS[kind]}", exif, at + 8)[0])
    return None


def _of_xmp(info: Mapping[Any, Any]) -> int:
    """Return the orientation in XMP, 1 without one."""
    xmp = info.get(XMP) or info.get("xmp") or b""
    if isinstance(xmp, str):
        xmp = xmp.encode()
    found = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp) if isinstance(xmp, bytes) else None
    return int(found[1]) if found else 1


def deep(image: Image.Image) -> bool:
    """Return whether an opened file has more than 8 bits per channel; Pillow truncates RGB to 8."""
    if image.mode[0] in "IF":
        return True
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (1,))) > 8  # type: ignore[attr-defined]
    if image.format == "HEIF":
        return image.info.get("bit_depth", 8) > 8
    if image.format == "PPM":
        decoder, _, _, arguments = image.tile[0]  # type: ignore[attr-defined]
        return decoder.startswith("ppm") and arguments[1] > 255
    return False


def strip(file: BinaryIO, whole: bool) -> tuple[BinaryIO, Mapping[Any, Any] | None]:
    """Return a file without metadata that decoding does not need, and the orientation's metadata.

    Texts and profiles may be of any length and number, so they are not read as a whole; and Pillow
    would reject an image for damage in them.

    Args:
        file: at its beginning.
        whole: include the pixels; otherwise stop before them.

    Returns:
        The file, and the metadata that hold the orientation. Files that are neither JPEG nor PNG
        are returned unchanged with None, and Pillow reads their orientation.

    Raises:
        OSError: for a PNG that has 16 bits per channel, over MAX_PIXELS bytes of pixels, or a wrong
            checksum before the pixels. Other damage is left to the decoder.

    Memory: the file's size without that metadata.
    """
    begin = file.read(len(PNG))
    if begin == PNG:
        return _png(file, whole)
    file.seek(0)
    return _jpeg(file, whole) if begin[:3] == JPEG else (file, None)


def _jpeg(file: BinaryIO, whole: bool) -> tuple[BinaryIO, dict[str, bytes | str]]:
    """Return a JPEG without APP1 to APP13, APP15 and comments, and their EXIF and XMP."""
    stripped = io.BytesIO()
    stripped.write(file.read(2))
    info: dict[str, bytes | str] = {}
    while (
        len(head := _marker(file)) == 4
        and head[0] == 0xFF
        and 0xC0 <= head[1] < 0xFF
        and stripped.tell() < MAX_PIXELS
    ):
        kind, content = head[1], file.read(max(0, int.from_bytes(head[2:], "big") - 2))
        if kind == 0xE1:
            if content.startswith(b"Exif\0\0"):
                info.setdefault("exif", content)
            elif content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                info.setdefault("xmp", content)
        if not (0xE1 <= kind <= 0xED or kind in (0xEF, 0xFE)):
            stripped.write(head + content)
        if kind == 0xDA:  # the pixels follow
            head = b""
            break
    stripped.write(head)
    if whole or head:
        stripped.write(read_up_to(file, MAX_PIXELS))
    stripped.seek(0)
    return stripped, info


def _marker(file: BinaryIO) -> bytes:
    """Return a JPEG's next marker and length, without fill bytes of 0xFF."""
    head = file.read(4)
    while head[:2] == b"\xff\xff" and (more := file.read(1)):
        head = head[1:] + more
    return head


def _png(file: BinaryIO, whole: bool) -> tuple[BinaryIO, dict[str, bytes | str]]:
    """Return a PNG's critical chunks and transparency alone, and the others' EXIF and XMP."""
    stripped = io.BytesIO()
    stripped.write(PNG)
    info: dict[str, bytes | str] = {}
    pixels = False
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        pixels |= kind == b"IDAT"
        if not kind[0] & 32 or kind == b"tRNS" or not kind.isalpha():
            if stripped.tell() + length > MAX_PIXELS:
                raise OSError(f"a PNG of more than {MAX_PIXELS:,} bytes of pixels")
            stripped.write(head)
            if pixels and not whole:
                break
            content = file.read(length + 4)
            stripped.write(content)
            if kind == b"IHDR" and content[8:9] == b"\x10":
                raise OSError("more than 8 bits per channel (16)")
            if kind == b"IEND":
                break
        elif kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") and length <= MAX_INFO:
            content = file.read(length)
            _check(file, zlib.crc32(content, zlib.crc32(kind)), kind, pixels)
            _add(info, kind, content)
        elif pixels:
            file.seek(length + 4, os.SEEK_CUR)
        else:
            checksum = zlib.crc32(kind)
            while length and (part := file.read(min(length, AT_ONCE))):
                checksum = zlib.crc32(part, checksum)
                length -= len(part)
            _check(file, checksum, kind, pixels)
    stripped.seek(0)
    return stripped, info


def _check(file: BinaryIO, checksum: int, kind: bytes, pixels: bool) -> None:
    """Raise OSError if a chunk before the pixels is damaged."""
    if file.read(4) != checksum.to_bytes(4, "big") and not pixels:
        raise OSError(f"broken PNG file (wrong checksum or cut short in {kind.decode()})")


def _add(info: dict[str, bytes | str], kind: bytes, content: bytes) -> None:
    """Add a chunk's EXIF or XMP, if it holds any, under the keys of Pillow's ``info``."""
    if kind == b"eXIf":
        info.setdefault("exif", content)
        return
    keyword, _, text = content.partition(b"\0")
    name = keyword.decode("latin-1")
    if name not in (XMP, PROFILE) or name in info:
        return
    packed, method = kind == b"zTXt", text[:1]
    if kind == b"iTXt":
        packed, method = text[:1] == b"\1", text[1:2]
        text = text[2:].split(b"\0", 2)[-1]
    elif packed:
        text = text[1:]
    if packed:
        inflate = zlib.decompressobj()
        try:
            text = inflate.decompress(text, MAX_INFO) if method == b"\0" else b""
        except zlib.error:
            return
    info[name] = text.decode("latin-1")
