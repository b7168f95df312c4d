"""Outputs of packings and faces are checked before any work, and errors name them."""

import tempfile

import pytest
import torch
from synface.synthesis.dataset import synthesize
from synface.synthesis.generators import EigenfaceGenerator
from synface.synthesis.packing import PackConfig, Packer, pack

from tests.helpers.command_line import refused

CONFIG = PackConfig(20, 4, steps=2)


class Untouched(EigenfaceGenerator):
    def generate(self, *_):
        pytest.fail("faces were drawn")


def unwritable(tmp_path, monkeypatch, kind):
    """Return a folder into which nothing can be written, and why."""
    blocker = tmp_path / "blocker"
    blocker.touch()
    if kind == "file":
        return blocker, "Not a directory"
    if kind == "below a file":
        return blocker / "below", "Not a directory"

    def refused(dir, **_):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refused)  # root may write anywhere
    return tmp_path / "refused", "Permission denied"


def wanted(name, folder, why):
    return f"{name} must be a folder that can be written to, got {folder}: .*{why}"


KINDS = pytest.mark.parametrize("kind", ["file", "below a file", "refused"])


@KINDS
def test_a_packing_that_cannot_be_written_is_not_begun(tmp_path, monkeypatch, kind):
    folder, why = unwritable(tmp_path, monkeypatch, kind)
    monkeypatch.setattr(Packer, "run", lambda *_, **__: pytest.fail("points were packed"))
    with pytest.raises(OSError, match=wanted("the folder of a.safetensors", folder, why)):
        pack([Packer(CONFIG)], folder / "a.safetensors", progress=pytest.fail)


@KINDS
def test_checkpoints_that_cannot_be_written_are_found_at_once(tmp_path, monkeypatch, kind):
    folder, why = unwritable(tmp_path, monkeypatch, kind)
    packer = Packer(CONFIG)
    monkeypatch.setattr("synface.synthesis.packing.optimizer.SphereAdam.step", pytest.fail)
    with pytest.raises(OSError, match=wanted("folder", folder, why)):
        packer.run(folder)


@pytest.mark.parametrize("name", ["a.safetensors", "a.png", "a-hyperface.safetensors"])
def test_a_folder_is_no_output_and_costs_no_checkpoint(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    old = tmp_path / "a-lse.checkpoints" / "step-00000001"
    old.mkdir(parents=True)
    monkeypatch.setattr(Packer, "run", lambda *_, **__: pytest.fail("points were packed"))
    packers = [Packer(PackConfig(20, 4, objective)) for objective in ("lse", "hyperface")]
    with pytest.raises(IsADirectoryError, match=f"{name} is a folder: choose another output"):
        pack(packers, tmp_path / "a.safetensors", overwrite=True, progress=pytest.fail)
    assert old.exists()


def test_overwriting_keeps_the_checkpoints_where_nothing_can_be_written(tmp_path, monkeypatch):
    old = tmp_path / "refused" / "a-lse.checkpoints" / "step-00000001"
    old.mkdir(parents=True)
    folder, _ = unwritable(tmp_path, monkeypatch, "refused")
    with pytest.raises(PermissionError):
        pack([Packer(CONFIG)], folder / "a.safetensors", overwrite=True, progress=pytest.fail)
    assert old.exists()


@KINDS
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_faces_that_cannot_be_written_is_not_begun(tmp_path, monkeypatch, kind, resume):
    if kind == "refused":
        synthesize(torch.eye(4), EigenfaceGenerator(4, 16), tmp_path / "refused", 1)
    folder, why = unwritable(tmp_path, monkeypatch, kind)
    with pytest.raises(OSError, match=wanted("output", folder, why)):
        synthesize(torch.eye(4), Untouched(4, 16), folder, 1, resume=resume)


def test_the_command_says_what_was_wanted(tmp_path):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "a.safetensors"
    text = refused("pack", "--count", 20, "--dim", 4, "--output", output)
    assert wanted("the folder of a.safetensors", output.parent, "")[:-2] in text
    assert "packing, orbit" not in text
