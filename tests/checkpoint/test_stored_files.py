"""Files that are written have the mode that the umask leaves; files and sizes that are asked for
are bounded before they take memory.
"""

import contextlib
import json
import os
import stat
import tracemalloc
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from synface import checkpoint
from synface.bench.plan import read_measured
from synface.checkpoint import STATE, TENSORS, load_model, save_model
from synface.checkpoint.jsonl import Lines
from synface.cli.options import parse_size
from synface.common import config, toml
from synface.common.check import check_memory
from synface.common.files import CHECKSUM, CheckpointError, checksum, sealed
from synface.common.textfiles import read_json, read_text, read_up_to
from synface.data import embedded_faces
from synface.data.formats.conversion import convert
from synface.data.formats.images import read_at_most
from synface.data.loading.worker import SharedArray
from synface.recipes import sweep as cells
from synface.synthesis.dataset import MANIFEST, synthesize
from synface.synthesis.embeddings import read_embeddings
from synface.synthesis.generators import EigenfaceGenerator
from synface.synthesis.packing import PackConfig, Packer, pack
from synface.training.config import TrainConfig
from synface.training.model import build_backbone, load_backbone, shapes_of
from torch import nn

SMALL = TrainConfig(widths=(4, 8), depths=(1, 1), embedding_size=16)
DEEP = 100_000


class Quiet:
    def update(self, *_):
        pass


# ---- modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007], ids=oct)
def test_all_that_is_written_follows_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        packed = tmp_path / "made" / "packed.safetensors"
        pack(
            [Packer(PackConfig(6, 4, steps=2))],
            packed,
            progress=lambda _: contextlib.nullcontext(Quiet()),
        )
        packed.chmod(0o600)  # as an earlier version left it
        pack(
            [Packer(PackConfig(6, 4, steps=2))],
            packed,
            overwrite=True,
            progress=lambda _: contextlib.nullcontext(Quiet()),
        )
        checkpoint.save(tmp_path / "made", 1, {"a": torch.ones(2)}, {"config": {}, "data": {}})
        save_model(tmp_path / "made" / "sharded", 1, nn.Linear(2, 2), None, {})
        faces = tmp_path / "made" / "faces"
        synthesize(torch.randn(3, 8), EigenfaceGenerator(8, 8), faces, 2)
        for form in ("folder", "recordio", "webdataset", "parquet", "arrow"):
            convert(faces, tmp_path / "made" / form, form)
        toml.write_toml(tmp_path / "made" / "config.toml", {"lr": 0.1})
    finally:
        os.umask(before)
    entries = list((tmp_path / "made").rglob("*"))
    assert sum(path.suffix == ".safetensors" for path in entries) == 3
    for path in entries:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, (path, oct(mode))


# ---- texts ---------------------------------------------------------------------------------------


def readers(folder):
    """Return everything that reads JSON or TOML from a file, and the file that it then reads."""
    made_of = {"config": {}, "data": {}, "held": ""}
    (folder / "checkpoint").mkdir()
    return {
        "toml": (folder / "a.toml", toml.read_toml),
        "recipe": (folder / "b.toml", lambda path: config.load(TrainConfig, path)),
        "state": (folder / "checkpoint" / STATE, lambda path: checkpoint.load_state(path.parent)),
        "log": (folder / "log.jsonl", lambda path: Lines(path).read()),
        "result": (folder / "result.json", lambda path: cells._stored(path, made_of)),
        "manifest": (
            folder / MANIFEST,
            lambda path: synthesize(
                torch.ones(1, 8), EigenfaceGenerator(8, 8), path.parent, 1, resume=True
            ),
        ),
        "measured": (folder / "measured.json", read_measured),
    }


NAMES = ["toml", "recipe", "state", "log", "result", "manifest", "measured"]


@pytest.mark.parametrize("name", NAMES)
def test_deeply_nested_files_are_named(tmp_path, name):
    file, read = readers(tmp_path)[name]
    opening = "a = " if file.suffix == ".toml" else ""
    file.write_text(opening + "[" * DEEP + "]" * DEEP + "\n")
    with pytest.raises(ValueError, match=rf"{file.name}.* nested too deeply"):
        read(file)


@pytest.mark.parametrize("name", NAMES)
def test_files_without_an_end_are_refused(tmp_path, name):
    file, read = readers(tmp_path)[name]
    file.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=rf"{file.name} must be a regular file"):
        read(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=rf"{file.name} must be a regular file"):
        read(file)


def test_settings_are_at_most_four_mebibytes(tmp_path):
    file = tmp_path / "big.toml"
    with file.open("wb") as opened:
        opened.truncate(2**40)  # a hole: nothing of it is read
    with pytest.raises(ValueError, match=r"big\.toml must have at most 4,194,304 bytes"):
        toml.read_toml(file)


def test_texts(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"é": [1, 2.5, null]}', encoding="utf-8")
    assert read_json(file) == {"é": [1, 2.5, None]}
    assert read_text(file, most=24).startswith("{")
    with pytest.raises(CheckpointError, match=r"a\.json must have at most 21 bytes"):
        read_text(file, CheckpointError, 21)
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a\.json is not UTF-8 text"):
        read_json(file)
    with pytest.raises(ValueError, match=r"b\.json cannot be read: No such file"):
        read_json(tmp_path / "b.json")


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.fixture
def little(monkeypatch):
    """Pretend that the machine has 1 GiB of free memory."""
    monkeypatch.setattr("synface.common.check.available_memory", lambda: 2**30)


def test_memory(little):
    check_memory("it", 2**30)
    with pytest.raises(
        ValueError, match=r"^it would take 2\.0 GiB of memory, and 1\.0 GiB are free"
    ):
        check_memory("it", 2**31)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Packer(PackConfig(2**40, 8, "lse")),
            r"packing 1,099,511,627,776 points in 8 dimensions would take 163,840\.0 GiB",
        ),
        (  # an orbit search holds the points once
            lambda: Packer(PackConfig(2**40, 8)),
            r"packing 1,099,511,627,776 points in 8 dimensions would take 32,768\.0 GiB",
        ),
        (lambda: embedded_faces(size=60_000), r"faces of 60000x60000 pixels would take [\d,]+"),
        (
            lambda: EigenfaceGenerator(8, 60_000).generate(
                torch.nn.functional.normalize(torch.ones(2, 8)),
                torch.zeros(2, 10),
                torch.zeros(2, dtype=torch.int64),
            ),
            r"2 faces of 60000x60000 pixels at once would take [\d,.]+ GiB",
        ),
        (lambda: SharedArray((2**20, 2**20), np.uint8), r"shape \(1048576, 1048576\) would take"),
        (
            lambda: build_backbone(replace(SMALL, embedding_size=2**31), (16, 16, 1)),
            r"a network of .* would take [\d,.]+ GiB",
        ),
        (
            lambda: build_backbone(SMALL, (60_000, 60_000, 3)),
            r"a network of .* would take [\d,.]+ GiB",
        ),
        (
            lambda: build_backbone(replace(SMALL, embedding_size=2**62), (16, 16, 1)),
            "the backbone cannot be built",
        ),
        (
            lambda: build_backbone(replace(SMALL, depths=(1, 10**12)), (16, 16, 1)),
            "depths must be at most 1,000 together, got 1,000,000,000,001",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_made(little, make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_embeddings_that_do_not_fit(tmp_path, little, suffix):
    """Files that are mostly holes, with right headers, are refused before they are read."""
    file, shape = tmp_path / f"big{suffix}", (2**24, 32)
    with file.open("wb") as opened:
        if suffix == ".npy":
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(opened, header)
        else:
            entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 2**31]}
            text = json.dumps({"embeddings": entry}).encode()
            opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(opened.tell() + 2**31)
    with pytest.raises(ValueError, match=rf"big{suffix}: .*\(16777216, 32\) would take 2\.0 GiB"):
        read_embeddings(file)


@pytest.mark.parametrize("text", ["60000x60000", "1x67108865", f"{'9' * 5000}x1"])
def test_sizes_of_images_are_bounded(text):
    with pytest.raises(
        ValueError, match=r"^--size must (have at most 67,108,864 pixels|be HEIGHTx)"
    ):
        parse_size(text)
    assert parse_size("8192×8192") == (8192, 8192)


def test_reading_takes_memory_for_what_is_there_not_for_the_limit(tmp_path):
    file = tmp_path / "log"
    file.write_bytes(b"x" * 200_000)
    tracemalloc.start()
    try:
        assert read_text(file, most=2**40) == "x" * 200_000
        with file.open("rb") as opened:
            assert read_at_most(opened, 2**40) == file.read_bytes()
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()
    with file.open("rb") as opened:
        assert read_up_to(opened, 70_000) == b"x" * 70_000
        assert read_up_to(opened, 2**40) == b"x" * 130_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding_size": 2**31}, r"of another model: .*expected shape \(2147483648"),
        ({"embedding_size": 2**62}, "the backbone cannot be built"),
        ({"depths": [10**9, 1]}, "depths must be at most 1,000 together"),
        ({"widths": [2**40, 8]}, "the backbone cannot be built|of another model"),
    ],
)
def test_sizes_in_a_checkpoint_are_compared_with_its_tensors(tmp_path, change, message):
    """The check takes no memory that follows what the state says, on any machine."""
    network = build_backbone(SMALL, (16, 16, 1))
    tensors = {f"model.backbone.{name}": value for name, value in network.state_dict().items()}
    state = {"config": asdict(SMALL), "data": {"image_shape": [16, 16, 1]}}
    found = checkpoint.save(tmp_path, 1, tensors, state)
    read, _ = load_backbone(found)
    for name, value in network.state_dict().items():
        assert torch.equal(read.state_dict()[name], value)
    state = checkpoint.load_state(found)
    state["config"] |= change
    (found / STATE).write_text(sealed(state))
    with pytest.raises(CheckpointError, match=message):
        load_backbone(found)


def test_the_shapes_of_a_backbone_take_no_random_numbers():
    before = torch.get_rng_state()
    shapes = shapes_of(SMALL, (16, 16, 1)).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    real = build_backbone(SMALL, (16, 16, 1)).state_dict()
    assert {name: value.shape for name, value in shapes.items()} == {
        name: value.shape for name, value in real.items()
    }


def test_tensors_of_a_sharded_checkpoint_fit_into_its_files(tmp_path):
    found = save_model(tmp_path, 1, nn.Linear(2, 2), None, {})
    (file,) = found.glob("*.safetensors")
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    offsets = header["__metadata__"]["DCP_SHARDING_INFO"]  # as if another rank's rows came before
    header["__metadata__"]["DCP_SHARDING_INFO"] = offsets.replace("[0, 0]", f"[{2**40}, 0]")
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    state = json.loads((found / STATE).read_text())
    del state[CHECKSUM]
    state["bytes"][file.name] = file.stat().st_size
    state["crc32"][file.name] = checksum(file)
    (found / STATE).write_text(sealed(state))
    message = r"its tensors would take 8,796,093,022,232 bytes, and its files have \d+"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(found)
    with pytest.raises(CheckpointError, match=message):
        load_model(found, nn.Linear(2, 2))


def test_names_of_tensors_come_from_the_file_alone(tmp_path):
    """A header that is nested deeply, or claims more than the file holds, is refused."""
    for text in (
        b"[" * DEEP,
        b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}',
    ):
        file = tmp_path / "a.safetensors"
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        with pytest.raises(ValueError, match=r"a\.safetensors is not a safetensors file"):
            read_embeddings(file)
    found = checkpoint.save(tmp_path, 1, {"a": torch.ones(2)}, {"config": {}, "data": {}})
    save_file({"a": torch.ones(2)}, found / TENSORS, {"more": "x"})
    with pytest.raises(CheckpointError, match=f"{TENSORS} is missing, cut short or not of this"):
        checkpoint.load(found)
