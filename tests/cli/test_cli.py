"""The command line, as a person calls it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TINY = ["--epochs", "2", "--batch-size", "16", "--size", "16x16", "--embedding-size", "8"]


def synface(*arguments, check=True, cwd=None):
    done = subprocess.run(
        [sys.executable, "-m", "synface", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=None,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six people, six images each."""
    random = np.random.default_rng(0)
    for person in range(6):
        face = random.integers(0, 200, (20, 18))
        (tmp_path / "faces" / f"p{person}").mkdir(parents=True)
        for i in range(6):
            pixels = (face + random.integers(0, 40, face.shape)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "faces" / f"p{person}" / f"{i}.png")
    return tmp_path / "faces"


def test_train_eval_and_resume(folder, tmp_path):
    run = tmp_path / "run"
    done = synface("train", "--data", folder, "--holdout", 3, "--output", run, *TINY)
    assert "18 images of 3 people" in done.stdout
    assert "images/s" in done.stdout
    assert "ROC-AUC: trained" in done.stdout
    assert "raw pixels" in done.stdout
    again = synface("eval", run, "--data", folder, "--holdout", 3)
    line = next(x for x in done.stdout.splitlines() if x.startswith("ROC-AUC"))
    assert line in again.stdout
    same = synface("eval", run)  # the people held out in training
    assert line in same.stdout
    assert "3 people never trained on" in same.stdout
    seen = synface("eval", run, "--holdout", 4)
    assert "4 people (24 images)" in seen.stdout
    assert "never trained on" not in seen.stdout
    resumed = synface("train", "--resume", run)
    assert line in resumed.stdout
    refused = synface("train", "--resume", run, "--lr", 0.5, check=False)
    assert refused.returncode == 2
    assert "--lr 0.5 differs from the run's 0.2" in refused.stdout
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
def test_errors_are_one_line(folder, arguments, message):
    import re

    done = synface(*arguments, check=False, cwd=folder.parent)
    assert done.returncode == 2
    assert re.search(message, " ".join(done.stdout.split())), done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not (folder.parent / "runs").exists()


def test_a_corrupt_image_stops_the_run_before_it_starts(folder, tmp_path):
    file = folder / "p2" / "3.png"
    file.write_bytes(file.read_bytes()[:-40])
    done = synface("train", "--data", folder, "--output", tmp_path / "run", check=False)
    assert done.returncode == 2
    assert "3.png" in "".join(done.stdout.split())
    assert not (tmp_path / "run").exists()


def test_info():
    assert "margin_cross_entropy on cpu, float32: cpu" in synface("info").stdout


def test_demo(tmp_path):
    arguments = ["--epochs", "1", "--identities", "10", "--images", "4", "--classes", "2000"]
    done = synface("demo", "--output", tmp_path / "report", *arguments)
    assert "report" in done.stdout
    assert "fused" in done.stdout
    for name in ("faces.png", "loss.png", "roc.png"):
        with Image.open(tmp_path / "report" / name) as picture:
            assert min(picture.size) > 200
    result = json.loads((tmp_path / "report" / "report.json").read_text())
    assert 0 <= result["verification"]["trained"]["auc"] <= 1
    seconds, peak = (result["margin softmax"][k] for k in ("seconds", "peak_bytes"))
    assert seconds["fused"] > 0
    assert seconds["eager"] > 0
    assert peak["eager"] > 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "roc.png" in page
    assert "against fused" in page
