"""The command line alone leads from one's own photos to "are these two the same person?"."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import synface
import torch
from PIL import Image
from synface.models.iresnet import PublishedIResNet

from tests.helpers.chips import chip, needs_orl, needs_weights, orl
from tests.helpers.command_line import call, refused
from tests.helpers.figures import blank

pytestmark = [needs_orl, needs_weights, pytest.mark.usefixtures("blank_figures")]
PAGE = (Path(__file__).parents[2] / "docs" / "use.md").read_text()


def photos(folder: Path, people: range, numbers: range) -> Path:
    """Write loose photos of real people, a folder each."""
    random = np.random.default_rng(0)
    for person in people:
        (folder / f"p{person}").mkdir(parents=True)
        for number in numbers:
            pixels, _ = chip(orl(person, number), random)
            Image.fromarray(pixels).save(folder / f"p{person}" / f"{number}.jpg", quality=95)
    return folder


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Return a folder with photos of people to train on, and four photos of two others."""
    path = tmp_path_factory.mktemp("photos")
    photos(path / "photos", range(1, 15), range(1, 7))
    photos(path, range(39, 41), range(1, 3))
    for name, photo in (("a", "p39/1"), ("b", "p39/2"), ("c", "p40/1")):
        shutil.copy(path / f"{photo}.jpg", path / f"{name}.jpg")
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path / "noise.png")
    return path


@pytest.fixture(scope="module")
def trained(there):
    """Return the folder after the page's commands, with fewer epochs, and what each printed."""
    block = re.search(r"```bash\n(synface align photos.*?)```", PAGE, re.DOTALL)
    commands = [line.partition("#")[0] for line in block[1].splitlines() if line.strip()]
    smaller = {"--epochs": "6", "--holdout": "4", "--size": "56x48"}
    shown = {}
    with pytest.MonkeyPatch.context() as patched, blank():
        patched.chdir(there)
        for command in commands:
            words = shlex.split(command)[1:]
            for option, value in smaller.items():
                if option in words:
                    words[words.index(option) + 1] = value
            shown[words[0]] = call(*words)
    assert list(shown) == ["align", "train", "compare"]
    return there, shown


@pytest.mark.slow
def test_the_pages_commands_answer_the_question(trained):
    there, shown = trained
    assert "84 faces of 84 photos were written" in shown["align"]
    assert "verification on 4 people never trained on (24 images)" in shown["train"]
    assert re.search(r"cosine -?\d\.\d{4}: (same person|different people)", shown["compare"])
    assert "same person: from a cosine of " in shown["compare"]


def test_photos_of_one_person_are_more_alike(trained):
    there, _ = trained
    photos = [there / f"{name}.jpg" for name in "abc"]
    found = json.loads(call("compare", there / "run", *photos, "--align", "--json"))
    cosine = {(p["first"][-5], p["second"][-5]): p["cosine"] for p in found["pairs"]}
    assert cosine["a", "b"] > max(cosine["a", "c"], cosine["b", "c"])
    rows = [json.loads(line) for line in (there / "run" / "verification.jsonl").open()]
    assert found["threshold"] == rows[-1]["threshold"]
    assert [p["same_person"] for p in found["pairs"]] == [
        p["cosine"] >= found["threshold"] for p in found["pairs"]
    ]


def test_faces_that_are_aligned_before_give_the_same_cosine(trained, tmp_path):
    there, _ = trained
    """Training and `compare --align` crop alike, though the network's images are not square."""
    call("align", there / "a.jpg", there / "c.jpg", "--output", tmp_path)
    before = json.loads(call("compare", there / "run", tmp_path / "a.png", tmp_path / "c.png",
                             "--json"))  # fmt: skip
    photos = [there / "a.jpg", there / "c.jpg"]
    found = json.loads(call("compare", there / "run", *photos, "--align", "--json"))
    assert before["pairs"][0]["cosine"] == pytest.approx(found["pairs"][0]["cosine"], abs=1e-6)
    record = json.loads((there / "run" / "alignment.json").read_text())
    assert record == {"size": [112, 112], "margin": 0.0, "grayscale": False}


@pytest.mark.slow
def test_photos_are_cropped_as_the_training_images_were(trained, tmp_path):
    there, _ = trained
    faces = ["--size", "40x40", "--margin", "0.3", "--grayscale"]
    call("align", there / "photos", "--output", tmp_path / "faces", *faces)
    options = ["--holdout", "0", "--size", "32x24", "--epochs", "1", "--output", tmp_path / "run"]
    call("train", "--data", tmp_path / "faces", *options)
    call("align", there / "a.jpg", there / "c.jpg", "--output", tmp_path / "two", *faces)
    two = [tmp_path / "two" / f"{name}.png" for name in "ac"]
    before = json.loads(call("compare", tmp_path / "run", *two, "--json"))
    photos = [there / "a.jpg", there / "c.jpg"]
    found = json.loads(call("compare", tmp_path / "run", *photos, "--align", "--json"))
    assert before["pairs"][0]["cosine"] == pytest.approx(found["pairs"][0]["cosine"], abs=1e-6)
    (tmp_path / "run" / "alignment.json").write_text("[]")
    shown = refused("compare", tmp_path / "run", *photos, "--align")
    assert "alignment.json must hold size, margin and grayscale" in " ".join(shown.split())


@pytest.mark.parametrize("command", ["compare", "embed"])
def test_a_missing_detector_is_an_error_of_its_own(trained, tmp_path, monkeypatch, command):
    there, _ = trained
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    options = ["--output", tmp_path / "x.npz"] if command == "embed" else []
    shown = refused(command, there / "run", there / "a.jpg", there / "b.jpg", "--align", *options)
    assert "onnxruntime" in shown
    assert "no face" not in shown


def test_a_photo_without_a_face_ends_with_status_1(trained, tmp_path):
    there, _ = trained
    shown = call("compare", there / "run", there / "a.jpg", there / "noise.png", "--align", code=1)
    assert f"{there / 'noise.png'}: no face found of 40 pixels or more" in shown
    assert "person" not in shown
    output = tmp_path / "x.npz"
    options = ["embed", there / "run", there / "a.jpg", there / "noise.png", "--align"]
    assert "no face found" in call(*options, "--output", output, code=1)
    assert not output.exists()
    shown = call(*options, "--output", output, "--skip-bad", code=1)
    assert "1 of 2 images have no face, or cannot be decoded, and were left out" in shown
    with np.load(output) as arrays:
        assert arrays["names"].tolist() == [str(there / "a.jpg")]
        face = json.loads(call("compare", there / "run", there / "a.jpg", there / "a.jpg",
                               "--align", "--json"))  # fmt: skip
        assert face["pairs"][0]["cosine"] == pytest.approx(1)
        assert arrays["embeddings"].shape == (1, 128)


def test_a_file_of_weights_is_a_network_too(there, tmp_path):
    torch.manual_seed(0)
    network = PublishedIResNet((1, 1, 1, 1), (32, 32), 3, 16).eval()
    torch.save({"module." + k: v for k, v in network.state_dict().items()}, tmp_path / "w.pth")
    loaded = synface.load(tmp_path / "w.pth")
    assert (loaded.image_shape, loaded.embedding_size) == ((32, 32, 3), 16)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        x = images / 127.5 - 1
        wanted = torch.nn.functional.normalize(network(x) + network(x.flip(-1)))
        assert torch.allclose(loaded(images), wanted, atol=1e-5)
    photos = [there / "a.jpg", there / "b.jpg"]
    shown = call("compare", tmp_path / "w.pth", *photos, "--align")
    assert "no verdict" in shown
    shown = call("compare", tmp_path / "w.pth", *photos, "--align", "--threshold", "-1")
    assert "same person" in shown
    call("export", tmp_path / "w.pth", "--safetensors", tmp_path / "w.safetensors")
    again = synface.load(tmp_path / "w.safetensors")
    assert torch.equal(again(images), loaded(images))
    shown = refused("compare", tmp_path / "w.pth", *photos, "--backbone", "a:b")
    assert "is a file of weights" in shown


@pytest.mark.slow
def test_a_file_of_weights_is_verified(trained, tmp_path):
    there, _ = trained
    weights, report = tmp_path / "w.safetensors", tmp_path / "report"
    call("export", there / "run", "--safetensors", weights)
    run = call("eval", there / "run", "--data", there / "aligned", "--holdout", "4")
    shown = call("eval", weights, "--data", there / "aligned", "--holdout", "4", "--output", report)
    assert "verification on 4 people (24 images)" in shown  # which it may have been trained on
    assert [line for line in run.splitlines() if "ROC-AUC" in line] == [
        line for line in shown.splitlines() if "ROC-AUC" in line
    ]
    about = json.loads((report / "results.json").read_text())["about"]
    assert (about["run"], about["people"]) == (str(weights), "4")
    assert "give --set or --data" in " ".join(refused("eval", weights).split())


def test_weights_of_images_that_are_not_square_know_their_size(trained, tmp_path):
    there, _ = trained
    call("export", there / "run", "--safetensors", tmp_path / "w.safetensors")
    loaded, run = synface.load(tmp_path / "w.safetensors"), synface.load(there / "run")
    assert loaded.image_shape == run.image_shape == (56, 48, 3)
    batch = torch.randint(256, (2, 56, 48, 3), dtype=torch.uint8)
    assert torch.equal(loaded(batch), run(batch))


@pytest.mark.slow
def test_the_best_checkpoint_has_its_own_threshold(trained, tmp_path):
    there, _ = trained
    options = ["--data", there / "aligned", "--holdout", "4", "--size", "28x24", "--epochs", "3"]
    call("train", *options, "--verify-every", "1", "--best", "auc", "--output", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "verification.jsonl").open()]
    best = max(rows, key=lambda row: row["auc"])
    photos = [there / "a.jpg", there / "b.jpg"]
    found = json.loads(call("compare", tmp_path / "run" / "best", *photos, "--align", "--json"))
    assert (found["threshold"], found["accuracy"]) == (best["threshold"], best["accuracy"])
