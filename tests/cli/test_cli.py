"""The command line, called as users call it."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.command_line import call, refused
from tests.helpers.forked import command_without_figures, finished
from tests.helpers.training import TINY, score
from tests.helpers.training import folder as write_folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """Write six people, six images each."""
    return write_folder(tmp_path / "faces", 6, 6)


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_train_eval_and_resume(folder, tmp_path):
    run = tmp_path / "run"
    words = ["train", "--data", folder, "--holdout", 3, "--output", run, *TINY]
    code, shown = finished(tmp_path / "shown", command_without_figures, *words)
    assert code == 0, shown
    assert "18 images of 3 people" in shown
    assert "images/s" in shown
    assert "ROC-AUC: trained" in shown
    assert "raw pixels" in shown
    line = score(shown)
    assert line in call("eval", run, "--data", folder, "--holdout", 3)
    same = call("eval", run)  # the people held out in training
    assert line in same
    assert "3 people never trained on" in same
    seen = call("eval", run, "--holdout", 4)
    assert "4 people (24 images)" in seen
    assert "never trained on" not in seen
    assert line in call("train", "--resume", run)
    message = "--lr 0.5 differs from the run's 0.2"
    assert message in refused("train", "--resume", run, "--lr", 0.5)
    assert json.loads((run / "config.json").read_text())["command"]["holdout"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "missing"], "does not exist"),
        (["train", "--data", "faces", "--holdout", "5"], "at least 2|2 identities|two"),
        (["train", "--data", "faces", "--holdout", "1"], "cannot be verified on"),
        (["train", "--data", "faces", "--size", "big"], "HEIGHTxWIDTH, such as 112x112, got 'big'"),
        (["train", "--data", "faces", "--holdout", "3", "--m2", "30"], "angle in radians"),
        (["train", "--resume", "missing"], "holds no run to resume"),
        (["eval", "faces"], "no checkpoint in faces"),
    ],
)
def test_errors_are_one_line(folder, arguments, message, monkeypatch):
    monkeypatch.chdir(folder.parent)
    shown = refused(*arguments)
    assert re.search(message, " ".join(shown.split())), shown
    assert not (folder.parent / "runs").exists()


def test_a_corrupt_image_stops_the_run_before_it_starts(folder, tmp_path):
    file = folder / "p2" / "3.png"
    file.write_bytes(file.read_bytes()[:-40])
    assert "3.png" in refused("train", "--data", folder, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_info():
    assert "margin_cross_entropy on cpu, float32: cpu" in call("info")


@pytest.mark.slow
def test_demo(tmp_path):
    arguments = ["--epochs", "1", "--identities", "10", "--images", "4", "--classes", "2000"]
    shown = call("demo", "--output", tmp_path / "report", *arguments, "--points", "50")
    for line in ("identity and domain mixup", "50 points in 128", "fused", "report"):
        assert line in shown
    page = (tmp_path / "report" / "index.html").read_text()
    for name in ("mixing", "packing", "faces", "loss", "roc", "scores", "hardest"):
        assert f'src="{name}.png"' in page
        with Image.open(tmp_path / "report" / f"{name}.png") as picture:
            assert min(picture.size) > 200
    for text in ("against fused", "images/s", "8 people", "What to do next", "synface study"):
        assert text in page
    result = json.loads((tmp_path / "report" / "report.json").read_text())
    assert result["date"] in page
    assert result["training"]["images"] == 32
    assert result["training"]["images_per_second"] > 0
    packed = result["packing"]
    assert packed["bound"] <= packed["worst_cosine"] < packed["random_worst_cosine"]
    found = result["verification"]
    assert 0 <= found["trained"]["auc"] <= 1
    kinds = found["hardest_pairs"]
    assert all(len(set(pair["people"])) == 1 for pair in kinds["genuine"])
    shown = [tuple(sorted(pair["people"])) for pair in kinds["impostor"]]
    assert len(shown) == len(set(shown)) == 1  # of two people
    assert len(found["score_densities"]["edges"]) == len(found["score_densities"]["genuine"]) + 1
    seconds, peak = (result["margin softmax"][k] for k in ("seconds", "peak_bytes"))
    assert seconds["fused"] > 0
    assert seconds["eager"] > 0
    assert peak["eager"] > 0
