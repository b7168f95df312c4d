"""The folder reader on invalid files of every kind; the embedded faces; augmentation."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from synface.data import Augment, DataError, Faces, embedded, embedded_faces, normalize, read_folder
from synface.data.formats import decode
from synface.data.loading.augment import warp

ORL = Path(__file__).parents[2] / ".." / "shared" / "data" / "orl"


def picture(height: int = 20, width: int = 16, mode: str = "L", seed: int = 0) -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Three people with two grayscale images each."""
    root = tmp_path / "people"
    for i in range(6):
        path = root / f"s{i // 2 + 9}" / f"{i % 2 + 9}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed=i).save(path)
    return root


# -- what is read


def test_identities_and_files_come_in_natural_order(people):
    faces = read_folder(people)
    assert faces.identities == ["s9", "s10", "s11"]
    assert faces.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert faces.images.shape == (6, 20, 16, 1)
    assert len(faces) == 6
    assert faces.source == str(people)
    for i in range(6):  # 9.png before 10.png, every pixel as it was written
        np.testing.assert_array_equal(faces.images[i, :, :, 0], np.asarray(picture(seed=i)))


@given(st.lists(st.text("aB10²٣.-", min_size=1, max_size=6), unique=True))
def test_natural_order_is_total(names):
    backwards = names[::-1]
    assert sorted(names, key=decode.natural) == sorted(backwards, key=decode.natural)


def test_natural_order_reads_numbers():
    names = ["s10", "s2", "S1", "s1b", "a"]
    assert sorted(names, key=decode.natural) == ["a", "S1", "s1b", "s2", "s10"]


def test_hidden_and_other_files_are_ignored(people):
    (people / "README.txt").write_text("about")
    (people / ".git").mkdir()
    (people / "s9" / ".thumb.png").write_text("no image")
    (people / "s9" / "notes.md").write_text("no image")
    picture().save(people / "preview.png")
    (people / "s9" / "9.GIF").write_text("no image that is read")
    (people / "__MACOSX" / "s9").mkdir(parents=True)
    (people / "s10" / "__MACOSX").mkdir()
    with pytest.warns(UserWarning, match="people: 3 files are skipped") as warned:
        assert len(read_folder(people)) == 6
    assert "1 in no sub-folder, 1 .gif, 1 .md" in str(warned[0].message)


@pytest.mark.parametrize("extension", ["bmp", "JPG", "jpeg", "png", "pgm", "ppm", "tiff", "webp"])
def test_every_known_format_is_read(people, extension):
    path = people / "s9" / f"new.{extension}"
    picture(mode="RGB" if extension == "ppm" else "L").save(path)
    faces = read_folder(people, grayscale=True)
    assert len(faces) == 7
    written = Image.open(path).convert("L")
    np.testing.assert_array_equal(faces.images[2, :, :, 0], np.asarray(written))


def test_one_colored_image_makes_all_rgb(people):
    picture(mode="RGB").save(people / "s10" / "color.png")
    faces = read_folder(people)
    assert faces.images.shape == (7, 20, 16, 3)
    assert torch.equal(faces.images[0, :, :, 0], faces.images[0, :, :, 2])
    assert not torch.equal(faces.images[4, :, :, 0], faces.images[4, :, :, 2])
    assert read_folder(people, grayscale=True).images.shape == (7, 20, 16, 1)


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA", "CMYK"])
def test_every_eight_bit_mode_is_read(people, mode):
    path = people / "s9" / ("x.tif" if mode == "CMYK" else "x.png")
    picture(mode="RGB").convert(mode).save(path)
    assert len(read_folder(people)) == 7


def test_the_size_is_the_first_images_or_the_one_asked_for(people):
    picture(40, 64).save(people / "s10" / "big.png")
    assert read_folder(people).images.shape == (7, 20, 16, 1)
    assert read_folder(people, size=(10, 12)).images.shape == (7, 10, 12, 1)


def test_shrinking_is_antialiased(people):
    stripes = np.tile(np.array([0, 255], np.uint8), (20, 32))
    Image.fromarray(stripes).save(people / "s9" / "0.png")
    image = read_folder(people, size=(20, 16)).images[0].float()
    assert image.mean() == pytest.approx(127.5, abs=1)
    assert image.std() < 30  # nearest neighbors would leave bands of 0 or 255


def test_exif_orientation_is_applied(people):
    image = picture(16, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    image.save(people / "s9" / "0.png", exif=exif)
    faces = read_folder(people)
    assert faces.images.shape == (7, 20, 16, 1)
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(faces.images[0, :, :, 0], upright)


def test_progress_counts_every_image(people):
    calls: list[tuple[int, int]] = []
    read_folder(people, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, 6) for i in range(6)]


def test_an_interrupt_ends_the_reading(people, monkeypatch):
    for i in range(300):
        picture(seed=i).save(people / "s9" / f"more{i}.png")
    decoded = []
    read = decode.decode
    monkeypatch.setattr(decode, "decode", lambda path: decoded.append(path) or read(path))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_folder(people, size=(2000, 2000), grayscale=True, progress=interrupt)
    assert len(decoded) < 300


def test_reading_twice_gives_the_same(people):
    a, b = read_folder(people, size=(13, 11)), read_folder(people, size=(13, 11))
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.labels, b.labels)


# -- what is refused


def encoded(extension: str) -> bytes:
    buffer = io.BytesIO()
    picture(64, 64).save(buffer, extension)
    return buffer.getvalue()


def bomb() -> bytes:
    """Return a PNG of a few bytes whose header claims 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
BAD = {
    "half.jpg": (encoded("jpeg")[:-600], "truncated"),
    "half.png": (encoded("png")[:-1500], "truncated|broken"),
    "half.bmp": (encoded("bmp")[:-1500], "truncated"),
    "half.pgm": (encoded("ppm")[:-1500], "truncated|large enough"),
    "text.jpg": (b"not an image at all", "not a readable image"),
    "empty.png": (b"", "not a readable image"),
    "header.png": (encoded("png")[:20], "."),
    "postscript.jpg": (EPS, "not a readable image"),
    "gif.png": (encoded("gif"), "not a readable image"),
    "bomb.png": (bomb(), "bomb"),
    "huge.pgm": (b"P5 8200 8200 255\n", "67,240,000|over the limit"),
    "deep.pgm": (b"P5 1 1 65535\n\0\0", "8 bits per channel"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named(people, name):
    content, problem = BAD[name]
    (people / "s10" / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"1 of 7 images(.|\n)*s10/{name}: .*({problem})"):
        read_folder(people)


def test_a_flipped_byte_in_a_png_is_found(people):
    content = bytearray((people / "s9" / "9.png").read_bytes())
    content[content.index(b"IDAT") + 20] ^= 0xFF
    (people / "s9" / "9.png").write_bytes(content)
    with pytest.raises(DataError, match=r"s9/9\.png"):
        read_folder(people)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged metadata
@given(st.binary(max_size=200), st.sampled_from(["jpeg", "png", "ppm", "bmp", "webp", "tiff"]))
@pytest.mark.slow
def test_hostile_bytes_raise_nothing_but_a_data_error(tmp_path_factory, tail, kind):
    root = tmp_path_factory.mktemp("hostile")
    for person in "ab":
        (root / person).mkdir()
        picture().save(root / person / "1.png")
    (root / "a" / f"2.{'ppm' if kind == 'ppm' else 'png'}").write_bytes(encoded(kind)[:60] + tail)
    try:
        message = f"a/2. {len(read_folder(root))} images"
    except DataError as error:
        message = str(error)
    assert "a/2." in message


def test_all_bad_files_are_counted_and_five_are_named(people):
    for i in range(7):
        (people / "s11" / f"bad{i}.jpg").write_text("x")
    (people / "s9" / "cut.jpg").write_bytes(encoded("jpeg")[:-600])
    with pytest.raises(DataError, match="8 of 14 images") as error:
        read_folder(people)
    named = [line.split("/")[-1].split(":")[0] for line in str(error.value).splitlines()[1:6]]
    assert named == ["cut.jpg", "bad0.jpg", "bad1.jpg", "bad2.jpg", "bad3.jpg"]
    assert "and 3 more" in str(error.value)


def test_a_first_image_that_is_bad_is_named_too(people):
    (people / "s9" / "0.jpg").write_bytes(encoded("jpeg")[:-600])
    with pytest.raises(DataError, match=r"1 of 7 images(.|\n)*s9/0\.jpg"):
        read_folder(people)


def test_a_folder_of_bad_files_alone(tmp_path):
    for person in "ab":
        (tmp_path / person).mkdir()
        (tmp_path / person / "1.jpg").write_text("x")
    with pytest.raises(DataError, match="2 of 2 images"):
        read_folder(tmp_path)


def test_a_pipe_and_a_dangling_link_are_no_images(people):
    os.mkfifo(people / "s9" / "pipe.jpg")
    (people / "s9" / "link.jpg").symlink_to(people / "nowhere.jpg")
    with pytest.raises(DataError, match="2 of 8 images") as error:
        read_folder(people)
    assert "s9/pipe.jpg: not a regular file" in str(error.value)
    assert "s9/link.jpg: not a regular file" in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_files_and_folders(people):
    (people / "s9" / "9.png").chmod(0)
    with pytest.raises(DataError, match=r"s9/9\.png: Permission denied"):
        read_folder(people)
    (people / "s9" / "9.png").chmod(0o600)
    for mode, problem in ((0, "s9 cannot be listed: Permission denied"), (0o600, "s9/")):
        (people / "s9").chmod(mode)
        try:
            with pytest.raises(DataError, match=problem):
                read_folder(people)
        finally:
            (people / "s9").chmod(0o700)


def test_folders_that_are_not_there_or_hold_nothing(tmp_path, people):
    with pytest.raises(DataError, match="nowhere does not exist"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"9\.png is not a folder"):
        read_folder(people / "s9" / "9.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="0 identity folders and 0 images"):
        read_folder(tmp_path / "empty")
    with pytest.raises(DataError, match="0 identity folders and 2 images of its own"):
        read_folder(people / "s9")
    (tmp_path / "one" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="1 identity folders"):
        read_folder(tmp_path / "one")


def test_identity_folders_without_images_or_with_folders(people):
    (people / "nobody").mkdir()
    (people / "nobody" / "notes.txt").write_text("x")
    (people / "s9" / "more.jpg").mkdir()
    with pytest.raises(DataError, match="2 of 4 identity folders") as error:
        read_folder(people)
    assert "nobody: has no image (1 other files: 1 .txt)" in str(error.value)
    assert "s9: has the folder 'more.jpg' inside" in str(error.value)


def test_the_memory_limit_is_checked_before_anything_is_decoded(people):
    needed = 6 * 20 * 16
    assert len(read_folder(people, memory_limit=needed)) == 6
    with pytest.raises(DataError, match="1,920 bytes, over the memory limit of 1,919"):
        read_folder(people, memory_limit=needed - 1)
    with pytest.raises(DataError, match="over the memory limit"):
        read_folder(people, size=(1 << 40, 1 << 40))


@pytest.mark.parametrize("size", [(0, 4), (4, -1), (4,), (1, 2, 3)])
def test_a_size_that_makes_no_sense(people, size):
    with pytest.raises(ValueError, match="size must be"):
        read_folder(people, size=size)


def test_orl():
    if not ORL.is_dir():
        pytest.skip("no ORL faces in ../shared/data/orl")
    faces = read_folder(ORL)
    assert faces.images.shape == (400, 112, 92, 1)
    assert faces.identities == [f"s{i}" for i in range(1, 41)]
    assert torch.equal(faces.labels, torch.arange(40).repeat_interleave(10))
    _, unseen = faces.split(10)
    assert unseen.identities == [f"s{i}" for i in range(31, 41)]


# -- Faces


@given(count=st.integers(2, 9), data=st.data())
def test_a_split_loses_nothing_and_shares_nobody(count, data):
    labels = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), max_size=30)), dtype=int)
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    faces = Faces(images, labels, [str(i) for i in range(count)], "test")
    holdout = data.draw(st.integers(0, count - 2))
    first, second = faces.split(holdout)
    assert first.identities + second.identities == faces.identities
    assert len(second.identities) == holdout
    seen = {}
    for part in (first, second):
        for image, label in zip(part.images.flatten(), part.labels, strict=True):
            seen[int(image)] = part.identities[label]
    assert seen == {i: str(int(label)) for i, label in enumerate(labels)}


@pytest.mark.parametrize("holdout", [-1, 2, 3, 99])
def test_a_split_that_leaves_too_few(holdout):
    faces = Faces(
        torch.zeros(3, 2, 2, 1, dtype=torch.uint8), torch.arange(3), ["a", "b", "c"], "test"
    )
    with pytest.raises(ValueError, match=rf"\[0, 1\].*of the 3 .*got {holdout}"):
        faces.split(holdout)


def test_faces_check_what_they_hold():
    images = torch.zeros(2, 4, 4, 1, dtype=torch.uint8)
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"images must be uint8.*got float32 \(2, 4, 4, 1\)"):
        Faces(images.float(), labels, ["a", "b"], "")
    with pytest.raises(ValueError, match=r"images must be.*\(2, 1, 4, 4\)"):
        Faces(images.permute(0, 3, 1, 2), labels, ["a", "b"], "")
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(2,\), got int32"):
        Faces(images, labels.int(), ["a", "b"], "")
    with pytest.raises(ValueError, match=r"\[0, 1\), got 0 to 1"):
        Faces(images, labels, ["a"], "")


# -- the embedded faces


def test_embedded_faces_are_the_crops_and_variations_of_them():
    faces = embedded_faces(images_per_identity=4, size=25)
    assert faces.images.shape == (400, 25, 25, 1)
    assert faces.images.dtype == torch.uint8
    assert len(faces.identities) == 100
    assert torch.equal(faces.labels, torch.arange(100).repeat_interleave(4))
    crops = torch.from_numpy(embedded.lfw_crops())
    first = faces.images[::4, :, :, 0] / 255.0
    torch.testing.assert_close(first.double(), crops, atol=0.51 / 255, rtol=0)
    grouped = faces.images.view(100, 4, -1).float()
    for k in range(1, 4):  # every variation differs from the crop, and stays near it
        assert ((grouped[:, k] - grouped[:, 0]).abs().mean(1) > 1).all()
        flat = grouped - grouped.mean(2, keepdim=True)
        own = torch.cosine_similarity(flat[:, k], flat[:, 0], dim=1)
        other = torch.cosine_similarity(flat[:, k], flat[:, 0].roll(1, 0), dim=1)
        assert own.mean() > other.mean() + 0.3


def test_embedded_faces_come_from_the_seed_alone():
    state = torch.get_rng_state()
    a = embedded_faces(3, 24, seed=5, identities=7)
    torch.manual_seed(1)
    b = embedded_faces(3, 24, seed=5, identities=7)
    c = embedded_faces(3, 24, seed=6, identities=7)
    more = embedded_faces(5, 24, seed=5, identities=7)
    torch.set_rng_state(state)
    assert torch.equal(a.images, b.images)
    assert not torch.equal(a.images, c.images)
    assert torch.equal(a.images[::3], c.images[::3])
    assert torch.equal(more.images.view(7, 5, -1)[:, :3], a.images.view(7, 3, -1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images_per_identity": 0}, "images_per_identity must be at least 1, got 0"),
        ({"size": 7}, "size must be at least 8 pixels, got 7"),
        ({"identities": 1}, r"identities must lie in \[2, 100\], got 1"),
        ({"identities": 101}, r"identities must lie in \[2, 100\], got 101"),
    ],
)
def test_embedded_faces_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        embedded_faces(**arguments)


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"\x93NUMPY cut short",
        saved(np.array([{}], dtype=object)),
        saved(np.zeros((200, 25, 24))),
        saved(np.full((200, 25, 25), np.nan)),
    ],
    ids=["missing", "empty", "cut", "pickle", "shape", "nan"],
)
def test_an_embedded_file_that_is_not_as_expected(tmp_path, monkeypatch, content):
    (tmp_path / "data").mkdir()
    if content is not None:
        (tmp_path / "data" / "lfw_subset.npy").write_bytes(content)
    monkeypatch.setattr(embedded.resources, "files", lambda _: tmp_path)
    with pytest.raises(DataError, match=r"embedded faces.*scikit-image"):
        embedded_faces()


# -- normalization and augmentation


def batch(n: int = 6, height: int = 20, width: int = 14, channels: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (n, height, width, channels), generator=g, dtype=torch.uint8)


def test_normalize():
    x = batch()
    want = ((x.double() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
    got = normalize(x)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=0)
    ends = normalize(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1))
    assert ends.flatten().tolist() == [-1.0, 1.0]
    with pytest.raises(ValueError, match=r"images must be uint8.*got float32 \(6, 20, 14, 3\)"):
        normalize(x.float())
    with pytest.raises(ValueError, match=r"\(B, H, W, C\), got uint8 \(20, 14, 3\)"):
        normalize(x[0])


def test_augmentation_comes_from_the_generator_alone():
    x, augment = batch(), Augment()
    state = torch.get_rng_state()
    a = augment(x, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    b = augment(x, torch.Generator().manual_seed(1))
    c = augment(x, torch.Generator().manual_seed(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.shape == (6, 3, 20, 14)
    assert a.dtype == torch.float32
    assert a.abs().max() <= 1.0


@pytest.mark.parametrize("channels", [1, 3])
def test_normalized_images_have_the_strides_of_nchw(channels):
    """Torch 2.13 corrupts memory with others, which (B, H, W, 1) images have when permuted."""
    images = torch.zeros(2, 5, 7, channels, dtype=torch.uint8)
    wanted = (35 * channels, 35, 7, 1)
    assert normalize(images).stride() == wanted
    assert Augment(0.0)(images, torch.Generator()).stride() == wanted
    assert Augment(1.0)(images, torch.Generator()).stride() == wanted


def test_augmentation_of_no_strength_is_normalization():
    assert torch.equal(Augment(0.0)(batch(), torch.Generator()), normalize(batch()))


def test_augmentation_grows_with_strength():
    x = embedded_faces(1, 32).images
    change = [
        float((Augment(s)(x, torch.Generator().manual_seed(0)) - normalize(x)).abs().mean())
        for s in (0.0, 0.1, 0.5, 1.0)
    ]
    assert change == sorted(change)
    assert change[0] == 0.0
    assert change[-1] > 0.1


@pytest.mark.parametrize("strength", [-0.1, 2.1, float("nan"), float("inf")])
def test_augmentation_refuses(strength):
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 2\]"):
        Augment(strength)


def warped(x, angle=0.0, zoom=1.0, shift=(0.0, 0.0), flip=False):
    n = len(x)
    return warp(
        x,
        torch.full((n,), angle),
        torch.full((n,), zoom),
        torch.tensor([shift] * n),
        torch.full((n,), flip),
    )


def test_warp_is_what_it_says():
    x = normalize(batch())
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(warped(x), x, **close)
    torch.testing.assert_close(warped(x, flip=True), x.flip(-1), **close)
    torch.testing.assert_close(warped(x, angle=torch.pi), x.flip(-1, -2), **close)
    down = warped(x, shift=(2 / 14, 5 / 20))  # two pixels right, five down
    torch.testing.assert_close(down[..., 5:, 2:], x[..., :-5, :-2], **close)
    # A quarter turn keeps the aspect ratio: the middle square turns exactly.
    middle = x[..., 3:17, :]
    turned = warped(x, angle=torch.pi / 2)[..., 3:17, :]
    torch.testing.assert_close(turned, torch.rot90(middle, 1, (-2, -1)), **close)
    assert warped(x, zoom=1.5).std() < x.std()  # enlarged noise is smoother
