"""The orientation in an image's metadata is applied, and all other metadata are ignored."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synface.data import DataError, read_folder
from synface.data.formats import decode

# Blocks of one color each, which JPEG keeps.
UPRIGHT = np.random.default_rng(0).integers(0, 256, (4, 2, 3), np.uint8).repeat(8, 0).repeat(8, 1)
# How an upright image is stored, from EXIF's own words: where row 0 and column 0 are seen.
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],  # top, right
    3: UPRIGHT[::-1, ::-1],  # bottom, right
    4: UPRIGHT[::-1],  # bottom, left
    5: UPRIGHT.transpose(1, 0, 2),  # left, top
    6: UPRIGHT[:, ::-1].transpose(1, 0, 2),  # right, top
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: UPRIGHT[::-1].transpose(1, 0, 2),  # left, bottom
}
OPTIONS = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


def encoded(pixels: np.ndarray, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.save(buffer, form, **OPTIONS.get(form, {}), **options)
    return buffer.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(decode.decode(io.BytesIO(content)))


def check(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got.astype(int), expected.astype(int), rtol=0, atol=3)


def exif(*entries: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """Return EXIF with entries (tag, type, count, the field's four bytes)."""
    raw = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in entries)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return b"Exif\0\0" + head + struct.pack(f"{order}H", len(entries)) + raw + bytes(4)


def turned(number: int, order: str = "<") -> tuple[int, int, int, bytes]:
    return 0x0112, 3, 1, struct.pack(f"{order}HH", number, 0)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(png: bytes, kind: bytes, data: bytes, last: bool = False) -> bytes:
    at = len(png) - 12 if last else 33  # ahead of IEND, or behind IHDR
    return png[:at] + chunk(kind, data) + png[at:]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("number", STORED)
def test_every_orientation_shows_the_image_upright(form, number, order):
    told = Image.Exif()
    told.load(exif(turned(number, order), order=order))
    check(decoded(encoded(STORED[number], form, exif=told)), UPRIGHT)


@pytest.mark.parametrize("fill", [1, 2, 5])
def test_bytes_that_fill_up_to_a_marker_hide_no_orientation(fill):
    told = Image.Exif()
    told.load(exif(turned(6)))
    content = encoded(STORED[6], "JPEG", exif=told)
    at = content.index(b"\xff\xe1")
    check(decoded(content[:at] + b"\xff" * fill + content[at:]), UPRIGHT)


@pytest.mark.parametrize(
    "entries",
    [
        [turned(6), (0x011A, 4, 1, b"\x48\0\0\0")],  # a resolution that is no fraction
        [turned(6), (0x011A, 7, 4, b"abcd"), (0x0128, 3, 1, b"\2\0\0\0")],
        [(0x010F, 2, 1 << 20, b"\xff\xff\xff\x7f"), turned(6)],  # a maker outside of the file
        [turned(6), (0x011A, 5, 0, bytes(4)), (0x0128, 3, 1, b"\2\0\0\0")],
        [turned(6), (0x8769, 4, 1, b"\xff\xff\xff\xff")],
        [turned(6), (0x8769, 2, 4, b"abc\0"), (0x8825, 3, 1, b"\1\0\0\0")],
        [(0x0112, 4, 1, b"\6\0\0\0")],
    ],
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_is_obeyed_whatever_stands_beside_it(tmp_path, form, entries):
    content = encoded(STORED[6], form, exif=exif(*entries))
    for person in "ab":
        (tmp_path / person).mkdir()
        (tmp_path / person / f"1.{form.lower()}").write_bytes(content)
    check(read_folder(tmp_path).images[1].numpy(), UPRIGHT)


@pytest.mark.parametrize(
    "metadata",
    [
        exif(turned(0)),
        exif(turned(9)),
        exif((0x0112, 3, 2, b"\6\0\6\0")),
        exif((0x0112, 2, 2, b"6\0\0\0")),
        exif(turned(6))[:-10],
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0",
        b"Exif\0\0",
        b"Exif\0\0XX*\0" + exif(turned(6))[10:],
    ],
    ids=range(9),
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_that_cannot_be_read_turns_nothing(form, metadata):
    check(decoded(encoded(UPRIGHT, form, exif=metadata)), UPRIGHT)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_mutated_exif_breaks_no_image(form):
    draw = random.Random(form)
    sound = exif(turned(6), (0x011A, 5, 1, b"\x40\0\0\0"), (0x0128, 3, 1, b"\2\0\0\0"))
    plain = decoded(encoded(STORED[6], form))
    shown = [plain, *(np.rot90(plain, k) for k in (1, 2, 3))]
    shown += [view[:, ::-1] for view in shown]
    for _ in range(500):
        content = bytearray(sound + draw.randbytes(20))
        for _ in range(draw.choice([1, 2, 8])):
            content[draw.randrange(6, len(content))] = draw.choice([0, 1, 5, 7, 128, 255])
        got = decoded(encoded(STORED[6], form, exif=bytes(content)))
        assert any(np.array_equal(got, view) for view in shown)


def test_xmp_and_older_ways_to_tell_the_orientation():
    xmp = XMP.format(6).encode()
    jpeg, segment = encoded(STORED[6], "JPEG"), b"http://ns.adobe.com/xap/1.0/\0" + xmp
    segment = b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment
    check(decoded(jpeg[:2] + segment + jpeg[2:]), UPRIGHT)
    check(decoded(encoded(STORED[6], "WEBP", xmp=xmp)), UPRIGHT)
    check(decoded(encoded(STORED[6], "TIFF", tiffinfo={700: xmp})), UPRIGHT)
    png = encoded(STORED[6], "PNG")
    raw = exif(turned(6)).hex().encode()
    profile = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  44\n" + raw)
    name = b"XML:com.adobe.xmp\0"
    for kind, data in (
        (b"zTXt", profile),
        (b"iTXt", name + b"\0\0\0\0" + xmp),
        (b"iTXt", name + b"\1\0\0\0" + zlib.compress(xmp)),
        (b"eXIf", exif(turned(6))[6:]),
    ):
        for last in (False, True):
            np.testing.assert_array_equal(decoded(with_chunk(png, kind, data, last)), UPRIGHT)
    damaged = with_chunk(png, b"zTXt", b"Raw profile type exif\0\0" + b"not deflated")
    np.testing.assert_array_equal(decoded(damaged), STORED[6])


@pytest.mark.parametrize("last", [False, True])
def test_texts_and_profiles_of_a_png_may_have_any_length(last):
    png = encoded(UPRIGHT, "PNG")
    megabytes = zlib.compress(bytes(5 << 20), 1)
    text = chunk(b"iTXt", b"a\0\0\0\0\0" + b"x" * (1 << 20))
    at = len(png) - 12 if last else 33
    for content in (
        png[:at] + 65 * text + png[at:],
        with_chunk(png, b"tEXt", b"Comment\0" + b"x" * (65 << 20), last),
        with_chunk(png, b"zTXt", b"Comment\0\0" + megabytes, last),
        with_chunk(png, b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + megabytes, last),
        with_chunk(png, b"iCCP", b"profile\0\0" + megabytes, last),
    ):
        file = io.BytesIO(content)
        tracemalloc.start()
        try:
            image = decode.decode(file)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        np.testing.assert_array_equal(np.asarray(image), UPRIGHT)
        assert peak < 4 << 20
        file.seek(0)
        assert decode.header(file) == ("png", (32, 16))


def test_damage_ahead_of_a_pngs_pixels_is_found():
    content = bytearray(with_chunk(encoded(UPRIGHT, "PNG"), b"tEXt", b"Comment\0words"))
    content[content.index(b"words")] ^= 1
    with pytest.raises(OSError, match=r"broken PNG file.*tEXt"):
        decoded(bytes(content))


def test_pngs_keep_what_their_pixels_need():
    frames = [Image.fromarray(np.full((9, 8, 3), value, np.uint8)) for value in (40, 80)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decoded(buffer.getvalue()), np.asarray(frames[0]))
    palette = Image.fromarray(UPRIGHT).convert("P")
    content = encoded(np.asarray(palette), "PNG")
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=3, bits=8)
    image = decode.decode(io.BytesIO(buffer.getvalue()))
    np.testing.assert_array_equal(image.convert("RGBA"), Image.open(buffer).convert("RGBA"))
    assert decode.mode(io.BytesIO(content)) == "L"


def deep_png(color: int, channels: int) -> bytes:
    header = struct.pack(">IIBBBBB", 4, 3, 16, color, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes(4 * channels * 2) for _ in range(3)))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def deep_tiff() -> bytes:
    """Return a 16-bit RGB TIFF of 2 x 1 pixels."""
    entries = [
        (256, 3, 1, 2),
        (257, 3, 1, 1),
        (258, 3, 3, 122),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 128),
        (277, 3, 1, 3),
        (278, 3, 1, 1),
        (279, 4, 1, 12),
    ]
    raw = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + raw + bytes(4)
    assert len(head) == 122
    return head + struct.pack("<HHH", 16, 16, 16) + bytes(12)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rgb.png", deep_png(2, 3)),
        ("rgba.png", deep_png(6, 4)),
        ("gray-alpha.png", deep_png(4, 2)),
        ("grayscale.png", deep_png(0, 1)),
        ("rgb.tif", deep_tiff()),
        ("rgb.ppm", b"P6 2 1 65535\n" + bytes(12)),
        ("plain.ppm", b"P3 1 1 1023\n1 2 3\n"),
    ],
    ids=range(7),
)
def test_more_than_eight_bits_per_channel_is_an_error_that_names_the_file(
    tmp_path: Path, name, content
):
    for person in "ab":
        (tmp_path / person).mkdir()
        (tmp_path / person / "1.png").write_bytes(encoded(UPRIGHT, "PNG"))
    (tmp_path / "b" / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"1 of 3 images(.|\n)*b/{name}: more than 8 bits per ch"):
        read_folder(tmp_path)
