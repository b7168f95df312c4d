"""HEIC images: read where pillow-heif is installed, upright, within limits, in bad shape."""

import io
import random
import sys

import numpy as np
import pytest
from PIL import Image
from synface.data import DataError, convert, open_images, read_folder
from synface.data.formats import decode, metadata

from tests.data.test_metadata import STORED, UPRIGHT, check, decoded

heif = pytest.importorskip("pillow_heif")


def encoded(pixels: np.ndarray, bits: int = 8, **options) -> bytes:
    options |= {"quality": -1, "chroma": 444}
    height, width = pixels.shape[:2]
    mode = {2: "L", 3: "RGB"}[pixels.ndim] + (";16" if bits > 8 else "")
    content = np.ascontiguousarray(pixels).astype(np.uint8 if bits == 8 else np.uint16)
    file = io.BytesIO()
    heif.from_bytes(mode, (width, height), content.tobytes()).save(file, **options)
    return file.getvalue()


@pytest.fixture
def people(tmp_path):
    for person in ("p0", "p1"):
        (tmp_path / "people" / person).mkdir(parents=True)
        (tmp_path / "people" / person / "1.HEIC").write_bytes(encoded(UPRIGHT))
        Image.fromarray(UPRIGHT).save(tmp_path / "people" / person / "2.png")
    return tmp_path / "people"


def test_heic_is_read_as_other_images_are(people, tmp_path):
    faces = read_folder(people, (32, 16))
    assert len(faces) == 4
    check(faces.images[0].numpy(), faces.images[1].numpy())
    convert(people, tmp_path / "archive", "webdataset")
    check(open_images(tmp_path / "archive")[0][0].numpy(), UPRIGHT)
    check(decoded(encoded(UPRIGHT[..., 0])), UPRIGHT[..., 0])


def test_the_suffix_is_that_of_heic():
    assert decode.header(io.BytesIO(encoded(UPRIGHT))) == ("heic", UPRIGHT.shape[:2])


@pytest.mark.parametrize("number", STORED)
def test_every_orientation_shows_the_image_upright_once(number):
    """An encoder moves EXIF's orientation to the container, which the decoder applies."""
    told = Image.Exif()
    told[metadata.ORIENTATION] = number
    heif.register_heif_opener()
    file = io.BytesIO()
    pixels = Image.fromarray(np.ascontiguousarray(STORED[number]))
    pixels.save(file, "HEIF", quality=-1, chroma=444, exif=told.tobytes())
    check(decoded(file.getvalue()), UPRIGHT)


def test_an_orientation_in_exif_alone_has_no_effect():
    """HEIF's standard (ISO/IEC 23008-12) leaves the orientation to the container."""
    told = Image.Exif()
    told[metadata.ORIENTATION] = 6
    content = encoded(UPRIGHT, exif=told)  # an object, which the encoder does not look into
    assert b"irot" not in content
    check(decoded(content), UPRIGHT)
    assert Image.open(io.BytesIO(content)).info["original_orientation"] == 6


def test_more_than_8_bits_are_refused():
    content = encoded(UPRIGHT.astype(np.uint16) * 257, bits=16)
    with pytest.raises(OSError, match="more than 8 bits per channel"):
        decode.decode(io.BytesIO(content))


def claiming(width: int, height: int) -> io.BytesIO:
    """Return an image whose header has another size."""
    content = encoded(UPRIGHT)
    at = content.index(b"ispe") + 8
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return io.BytesIO(content[:at] + size + content[at + 8 :])


def test_limits_of_the_size_hold_before_decoding():
    with pytest.raises(OSError, match="12000x12000 pixels, over the limit of"):
        decode.decode(claiming(12000, 12000))
    for wrong in ((8, 8), (640, 640)):
        with pytest.raises(OSError, match="size"):
            decode.decode(claiming(*wrong))


def box(kind: bytes, content: bytes) -> bytes:
    return (len(content) + 8).to_bytes(4, "big") + kind + content


HUGE = box(b"ispe", bytes(4) + (12000).to_bytes(4, "big") * 2)


def test_pixels_that_look_like_a_size_are_no_size():
    check(decoded(encoded(UPRIGHT) + box(b"free", HUGE)), UPRIGHT)
    content = encoded(UPRIGHT)  # the first box has the length 0: it would end the file
    assert decode.attempt(decode.decode)(io.BytesIO(bytes(4) + content[4:]))[0] is None


def test_no_bytes_before_a_size_hide_it():
    kind = box(b"ftyp", b"heic" + bytes(4))
    for content in (box(b"free", b"ispe") + HUGE, HUGE):
        for meta in (
            box(b"meta", content),
            (1).to_bytes(4, "big") + b"meta" + (len(content) + 16).to_bytes(8, "big") + content,
            bytes(4) + b"meta" + content,
        ):
            with pytest.raises(OSError, match="12000x12000 pixels, over the limit of"):
                decode.decode(io.BytesIO(kind + box(b"free", b"") + meta))


def test_the_users_options_of_the_decoder_stay(monkeypatch):
    heif.register_heif_opener()
    monkeypatch.setattr(heif.options, "DECODE_THREADS", 3)
    check(decoded(encoded(UPRIGHT)), UPRIGHT)
    assert heif.options.DECODE_THREADS == 3


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_files_are_errors_of_input():
    content, draw = encoded(UPRIGHT), random.Random(0)
    read = decode.attempt(decode.decode)
    for i in range(300):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(content) if i % 2 else 500)] = draw.randrange(256)
        image, error = read(
            io.BytesIO(damaged[: draw.randrange(len(content))] if i % 3 else damaged)
        )
        assert (image is None) == (error is not None)
        assert not (error or "").startswith(("RuntimeError", "EOFError"))


def test_without_the_package_an_error_says_what_to_install(people, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    message = r"1.HEIC: a HEIC image needs pillow_heif.*pip install \"synface-kernels\[heic\]\""
    with pytest.raises(DataError, match=message):
        read_folder(people, (32, 16))
    with pytest.raises(DataError, match=message):
        open_images(people)[0]


def test_other_files_do_not_reach_its_decoder(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    film = b"\0\0\0\x18ftypisom" + bytes(100)
    _, error = decode.attempt(decode.decode)(io.BytesIO(film))
    assert "not a readable image (known formats: BMP, JPEG, PNG, PPM, TIFF, WEBP, HEIC)" in error
