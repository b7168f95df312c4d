"""The statements of docs/security.md on files of unknown origin, tried with hostile ones."""

from __future__ import annotations

import io
import pickle
import random
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from synface.alignment import read_landmarks
from synface.common.files import CheckpointError
from synface.common.toml import read_toml
from synface.data import DataError, open_images
from synface.data.formats import decode
from synface.data.loading.transforms import read_transforms
from synface.evaluation.sets import open_set
from synface.reporting.page import escape, write_page
from synface.training.initial import read_weights

from tests.helpers.fuzzed import mutated


class Hostile:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_the_hostile_pickle_is_one(tmp_path):
    pickle.loads(pickle.dumps(Hostile(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_weights_that_call_are_refused_and_nothing_runs(tmp_path, suffix, zipped):
    file, marker = tmp_path / f"w{suffix}", tmp_path / "executed"
    content = {"weight": torch.zeros(3), "hook": Hostile(marker)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        read_weights(file)
    file.write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        read_weights(file)
    assert not marker.exists()


def test_a_program_of_torchscript_is_no_file_of_weights(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "w.pt"))
    with (
        pytest.warns(UserWarning, match="TorchScript archive"),
        pytest.raises(CheckpointError, match="cannot be read as weights"),
    ):
        read_weights(tmp_path / "w.pt")


def test_a_verification_set_that_calls_is_refused_and_nothing_runs(tmp_path):
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(([Hostile(tmp_path / "executed")], [True])))
    with pytest.raises(DataError, match="never executed"):
        open_set(tmp_path / "lfw.bin")
    assert not (tmp_path / "executed").exists()


def picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_names_of_a_tars_members_are_no_paths(tmp_path):
    folder = tmp_path / "inside" / "set"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, content in (("../../outside.png", picture()), ("../../outside.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    images = open_images(folder)
    assert images.store.read(0) == picture()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["0.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(DataError, match=r"'a\.png' is not a regular file"):
        open_images(tmp_path)


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes whose header promises many pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("sides", [(8193, 8192), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_images_of_too_many_pixels_are_refused_from_their_header(sides):
    image, problem = decode.attempt(decode.decode)(io.BytesIO(bomb(*sides)))
    assert image is None
    assert "over the limit" in problem or "bomb" in problem


def test_formats_whose_decoder_starts_a_program_are_not_opened(tmp_path):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    problem = decode.attempt(decode.decode)(io.BytesIO(postscript))[1]
    assert "not a readable image" in problem


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("os:system", "code that a run's folder names is not imported"),
        ("synface.data:convert", "code that a run's folder names is not imported"),
        ("torchvision.transforms.v2:functional.os.system", "is no class|cannot be imported"),
    ],
)
def test_a_runs_folder_names_no_code(tmp_path, use, message):
    file = tmp_path / "transforms.toml"
    file.write_text(f"[[transform]]\nuse = '{use}'\ncommand = 'touch {tmp_path}/executed'\n")
    with pytest.raises(ValueError, match=message):
        read_transforms(file, trusted=False)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("text", ["a = " + "[" * 101 + "]" * 101, ".".join("a" * 2000) + " = 1"])
def test_settings_that_are_nested_too_deeply_are_refused(tmp_path, text):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ValueError, match=r"x\.toml is nested too deeply"):
        read_toml(tmp_path / "x.toml")


def test_names_of_files_are_no_markup_in_a_report(tmp_path):
    name = '<script>alert("x")</script> [a](javascript:alert(1)) <img src=x onerror=alert(1)>'
    write_page(tmp_path / "page.html", f"# {escape(name)}\n\n{escape(name)}\n\n{name}\n")
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text
    assert "<img" not in text
    assert "href=" not in text


# Text and weights from elsewhere, as they came and mutated. Image sets and verification sets are in
# tests/data/test_formats_fuzz.py, checkpoints in tests/checkpoint/test_damage.py.
LANDMARKS = "path,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5\n" + "a/b.png,1,2,3,4,5.5,6,7,8,9,1e1\n"
POINTS = '{"a/b.png": [[1, 2], [3, 4], [5.5, 6], [7, 8], [9, 10]]}'
TRANSFORMS = "[[transform]]\nuse = 'torch.nn:Identity'\nsizes = [1, 2.5, { a = 'b' }]\n"


def weights(file: Path) -> None:
    names = {"conv.weight": torch.zeros(2, 3), "bn.bias": torch.ones(4, dtype=torch.float16)}
    if file.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(names, file)
    else:
        torch.save(names, file, _use_new_zipfile_serialization=file.suffix == ".pt")


READERS = {
    "a.csv": (lambda file: file.write_text(LANDMARKS), read_landmarks),
    "a.json": (lambda file: file.write_text(POINTS), read_landmarks),
    "a.toml": (lambda file: file.write_text(TRANSFORMS), read_toml),
    "transforms.toml": (
        lambda file: file.write_text(TRANSFORMS),
        lambda file: read_transforms(file, trusted=False),
    ),
    "w.safetensors": (weights, read_weights),
    "w.pt": (weights, read_weights),
    "w.pth": (weights, read_weights),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_mutated_files_raise_nothing_but_a_value_error_that_names_them(tmp_path, name):
    write, read = READERS[name]
    file, draw, errors = tmp_path / name, random.Random(0), []
    write(file)
    content = file.read_bytes()
    for _ in range(300):
        file.write_bytes(mutated(content, draw))
        try:
            read(file)
        except ValueError as error:
            errors.append(str(error))
    assert all(str(file) in error for error in errors)
    assert len(errors) > 30
