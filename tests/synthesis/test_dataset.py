"""Image folders of generated faces: whole, resumed to the bit, never lost by mistake."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from synface.data import read_folder
from synface.synthesis.dataset import MANIFEST, styles, synthesize
from synface.synthesis.generators import EigenfaceGenerator, TorchScriptGenerator

from tests.helpers.command_line import call, refused
from tests.helpers.forked import forked
from tests.helpers.generators import Noisy, scripted, tree, unit

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def test_the_folder_holds_every_image_of_every_identity(tmp_path):
    embeddings, generator = unit(5, 16), EigenfaceGenerator(16, 24)
    seen: list[tuple[int, int]] = []
    made = synthesize(embeddings, generator, tmp_path / "a", 3, progress=lambda *x: seen.append(x))
    assert made == 15
    assert seen == [(i, 15) for i in range(16)]
    faces = read_folder(tmp_path / "a")
    assert faces.identities == [f"{i:06d}" for i in range(5)]
    assert faces.labels.tolist() == [i for i in range(5) for _ in range(3)]
    assert faces.images.shape == (15, 24, 24, 1)
    assert len(torch.unique(faces.images.flatten(1), dim=0)) == 15  # no image comes twice
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    assert manifest["generator"] == generator.description
    assert manifest["embeddings"]["shape"] == [5, 16]

    # The same images whatever the batches, the workers and the number of identities and images.
    synthesize(embeddings[:3], generator, tmp_path / "b", 5, batch_size=4, workers=1)
    other = read_folder(tmp_path / "b")
    assert torch.equal(other.images.view(3, 5, 24, 24)[:, :3], faces.images.view(5, 3, 24, 24)[:3])
    synthesize(3.0 * embeddings.half(), generator, tmp_path / "c", 3, seed=1, workers=5)
    assert not torch.equal(read_folder(tmp_path / "c").images, faces.images)


class Interrupted(EigenfaceGenerator):
    """Raises once it was called so many times."""

    def __init__(self, calls: int, error: BaseException):
        super().__init__(16, 24)
        self.calls, self.error = calls, error

    def generate(self, *arguments):
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return super().generate(*arguments)


@pytest.mark.parametrize("scale", [2.0**84, 2.0**-50, 2.0**-100])
def test_faces_depend_on_directions_alone(tmp_path, scale):
    generator = EigenfaceGenerator(16, 24)
    synthesize(unit(3, 16), generator, tmp_path / "a", 2)
    synthesize(unit(3, 16) * scale, generator, tmp_path / "b", 2)
    faces, scaled = (read_folder(tmp_path / name) for name in "ab")
    assert torch.equal(faces.images, scaled.images)


class Careless(EigenfaceGenerator):
    """An eigenface generator whose images are changed by a function."""

    def __init__(self, change):
        super().__init__(16, 24)
        self.change = change

    def generate(self, *arguments):
        return self.change(super().generate(*arguments))


@pytest.mark.parametrize(
    ("change", "came"),
    [
        (lambda images: images.numpy(), "ndarray"),
        (lambda images: images.float(), r"float32 \(6, 24, 24, 1\) on cpu"),
        (lambda images: images[1:], r"uint8 \(5, 24, 24, 1\) on cpu"),
        (lambda images: images.permute(0, 3, 1, 2), r"uint8 \(6, 1, 24, 24\) on cpu"),
        (lambda images: images.to("meta"), r"uint8 \(6, 24, 24, 1\) on meta"),
    ],
)
def test_what_a_generator_returns_is_checked(tmp_path, change, came):
    message = rf"generator must return uint8 \(6, 24, 24, 1\) on cpu, got {came}"
    with pytest.raises(ValueError, match=message):
        synthesize(unit(3, 16), Careless(change), tmp_path / "x", 2)
    assert list(tree(tmp_path / "x")) == [MANIFEST]


def test_a_resumed_folder_is_bitwise_the_same(tmp_path):
    embeddings, options = unit(9, 16), {"images_per_identity": 4, "batch_size": 5}
    generator = EigenfaceGenerator(16, 24)
    synthesize(embeddings, generator, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        synthesize(embeddings, Interrupted(5, KeyboardInterrupt()), tmp_path / "x", **options)
    left = tree(tmp_path / "x")
    assert 10 < len(left) < 36
    (tmp_path / "x" / "000000" / "002.png").unlink()  # inside a batch that was done
    (tmp_path / "x" / "000001" / ".003.png.part").write_bytes(b"cut sh")
    (tmp_path / "x" / "000001" / "003.png").unlink()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "x").rglob("*.png")}
    made = synthesize(embeddings, generator, tmp_path / "x", **options, resume=True)
    assert made == 36 - len(before)
    assert tree(tmp_path / "x") == tree(tmp_path / "whole")
    assert all(p.stat().st_mtime_ns == when for p, when in before.items())  # none made twice
    assert synthesize(embeddings, generator, tmp_path / "x", **options, resume=True) == 0


def test_a_model_whose_rounding_depends_on_the_batch_resumes_bitwise_too(tmp_path):
    path = scripted(Noisy(), tmp_path / "g.pt")  # here all of an image depends on its batch
    generator = TorchScriptGenerator(path, 16, 2)
    synthesize(unit(6, 16), generator, tmp_path / "whole", 3, batch_size=4)
    synthesize(unit(6, 16), generator, tmp_path / "x", 3, batch_size=4)
    for gone in ("000001/000.png", "000005/002.png"):
        (tmp_path / "x" / gone).unlink()
    assert synthesize(unit(6, 16), generator, tmp_path / "x", 3, batch_size=4, resume=True) == 2
    assert tree(tmp_path / "x") == tree(tmp_path / "whole")


def write_faces(root):
    synthesize(unit(60, 16), EigenfaceGenerator(16, 24), root, 40, batch_size=16)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.slow
def test_kill_9_leaves_whole_images_alone(tmp_path):
    rows, root, shown = unit(60, 16), tmp_path / "x", tmp_path / "shown"
    with forked(shown, write_faces, root) as child:
        deadline = time.monotonic() + 120
        while not (root / "000004").exists():
            assert child.is_alive(), shown.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        child.kill()
        child.join()
    left = [image for image in root.rglob("*.png") if image.name[0] != "."]
    assert 100 < len(left) < 2400
    for image in left:
        with Image.open(image) as opened:
            opened.load()
    made = synthesize(rows, EigenfaceGenerator(16, 24), root, 40, batch_size=16, resume=True)
    assert made == 2400 - len(left)
    write_faces(tmp_path / "whole")
    assert tree(root) == tree(tmp_path / "whole")


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    whole, generator = tmp_path / "whole", EigenfaceGenerator(16, 24)
    synthesize(unit(6, 16), generator, whole, 4, batch_size=4)
    written, replace = [], Path.replace

    def full(self, target):
        if len(written) >= 9 and self.suffix == ".part":
            raise OSError(28, "No space left on device")
        written.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device, after \d of 24 images"):
        synthesize(unit(6, 16), generator, tmp_path / "x", 4, batch_size=4, workers=1)
    monkeypatch.undo()
    left = tree(tmp_path / "x")
    assert len(left) == 9
    assert not [name for name in left if name.endswith(".part")]
    assert synthesize(unit(6, 16), generator, tmp_path / "x", 4, batch_size=4, resume=True) == 16
    assert tree(tmp_path / "x") == tree(whole)


def test_what_is_there_is_not_lost_by_mistake(tmp_path):
    generator, root = EigenfaceGenerator(16, 24), tmp_path / "x"
    synthesize(unit(4, 16), generator, root, 2)
    before = tree(root)
    for changes, message in (
        ({}, r"was synthesized before: resume it \(--resume\) or replace it \(--overwrite\)"),
        ({"resume": True, "seed": 1}, "its seed is 0, expected 1"),
        ({"resume": True, "images_per_identity": 3}, "its images_per_identity is 2, expected 3"),
        ({"resume": True, "batch_size": 3}, "its batch_size is 64, expected 3"),
        ({"resume": True, "embeddings": unit(4, 16, seed=1)}, "its embeddings is"),
        ({"resume": True, "generator": EigenfaceGenerator(16, 25)}, "its generator is"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"images_per_identity": 0}, "images_per_identity must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"embeddings": unit(4, 15)}, r"of shape \(N, 16\), as the generator .* \(4, 15\)"),
        ({"embeddings": torch.zeros(4, 16)}, "embeddings: 4 of 4 rows are zero"),
    ):
        given = {"embeddings": unit(4, 16), "generator": generator, "images_per_identity": 2}
        with pytest.raises((ValueError, FileExistsError), match=message):
            synthesize(output=root, **(given | changes))
        assert tree(root) == before
    (root / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"synthesis\.json is damaged"):
        synthesize(unit(4, 16), generator, root, 2, overwrite=True)
    (root / MANIFEST).unlink()
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match="were not synthesized"):
            synthesize(unit(4, 16), generator, root, 2, **options)


def test_overwriting_leaves_only_the_new_identities(tmp_path):
    generator, root = EigenfaceGenerator(16, 24), tmp_path / "x"
    synthesize(unit(4, 16), generator, root, 3)
    (root / "notes.txt").write_text("mine")
    synthesize(unit(2, 16), generator, root, 2, overwrite=True)
    assert (root / "notes.txt").read_text() == "mine"
    (root / "notes.txt").unlink()
    synthesize(unit(2, 16), generator, tmp_path / "new", 2)
    assert tree(root) == tree(tmp_path / "new")


def test_a_folder_whose_manifest_was_never_finished_is_empty(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / f"{MANIFEST}.part").write_text("{")
    assert synthesize(unit(2, 16), EigenfaceGenerator(16, 24), tmp_path / "x", 1, resume=True) == 2


def test_draws_of_different_images_are_unlike():
    many = np.arange(4000)
    style, seed = styles(0, many // 20, many % 20, 10)
    assert len(seed.unique()) == 4000
    assert seed.min() >= 0
    assert style.mean().abs() < 0.02
    assert style.std() == pytest.approx(1.0, abs=0.02)
    lag = torch.corrcoef(torch.stack([style[:-1].flatten(), style[1:].flatten()]))[0, 1]
    assert lag.abs() < 0.02


# -- the command


@pytest.mark.slow
def test_from_packed_embeddings_to_a_trained_network(tmp_path, monkeypatch):
    save_file({"embeddings": unit(8, 32)}, tmp_path / "packed.safetensors")
    made = ["synthesize", "--packed", "packed.safetensors", "--images-per-identity", 4]
    made += ["--size", "24x24", "--output", "faces"]
    monkeypatch.chdir(tmp_path)
    shown = call(*made)
    assert "8 identities, 4 images of each in faces: 32 made" in shown
    assert "images/s" in shown
    assert read_folder(tmp_path / "faces").images.shape == (32, 24, 24, 1)
    tiny = ["--epochs", 2, "--batch-size", 8, "--size", "16x16", "--embedding-size", 8]
    shown = call("train", "--data", "faces", "--holdout", 4, "--output", "run", *tiny)
    assert "16 images of 4 people" in shown
    assert "ROC-AUC: trained" in shown

    for options, message in (
        ([], "--resume) or replace it (--overwrite)"),
        (["--resume", "--seed", 1], "its seed is 0, expected 1"),
        (["--generator", "g.pt"], "size is for the eigenfaces"),
        (["--packed", "packed.pt"], "expected a .safetensors or .npy file, got '.pt'"),
        (["--packed", "missing.npy"], "missing.npy cannot be read"),
        (["--size", "24x20"], "the eigenfaces are square, got --size 24x20"),
    ):
        assert message in " ".join(refused(*made, *options).split())
