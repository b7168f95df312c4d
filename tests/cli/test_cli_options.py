"""Every option of a command has an effect, or is refused in a sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from synface.cli import options, verification
from synface.data import open_images, read_folder
from synface.evaluation.embedding import embed
from synface.evaluation.metrics import verify
from synface.training.loop import load_backbone

from tests.helpers.command_line import call, refused
from tests.helpers.figures import blank
from tests.helpers.training import folder as write_folder


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write six people, four images each."""
    return write_folder(tmp_path_factory.mktemp("faces"), 6, 4)


@pytest.fixture(scope="module")
def run(faces: Path) -> Path:
    """Train a run with three of them held out."""
    folder = faces.with_name(f"{faces.name}-run")
    options = ["--epochs", 1, "--size", "16x16", "--embedding-size", 8, "--holdout", 3]
    with blank():
        call("train", "--data", faces, "--output", folder, *options)
    return folder


# -- eval


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.slow
def test_eval_reports_on_the_people_held_out(run, faces, tmp_path, flip):
    report = tmp_path / "new" / "report"
    shown = call("eval", run, "--output", report, "--flip" if flip else "--no-flip")
    assert f"report: {report / 'index.html'}" in shown
    held = read_folder(open_images(faces), (16, 16)).split(3)[1]
    rows = embed(load_backbone(run)[0], held.images, flip=flip)
    wanted = verify(rows, held.labels)
    found = json.loads((report / "results.json").read_text())
    assert [each["name"] for each in found["sets"]] == ["trained network", "raw pixels"]
    assert found["sets"][0]["verification"] == wanted.to_json()
    assert found["sets"][0]["images"] == 12
    assert found["about"]["flip"] is flip
    assert found["about"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["about"]["people"] == "3 never trained on"
    assert f"ROC-AUC: trained {wanted.auc:.4f}" in shown
    assert "raw pixels" in (report / "index.html").read_text()
    for name in ("roc.png", "det.png"):
        assert (report / name).stat().st_size > 1000


def test_eval_passes_on_the_batch_and_the_device(run, monkeypatch):
    calls = []

    def spied(model, images, batch_size, flip, device):
        assert next(model.parameters()).device == device
        calls.append((batch_size, flip, device))
        return embed(model, images, batch_size, flip, device=device)

    monkeypatch.setattr(verification, "embed", spied)
    call("eval", run, "--batch-size", 5, "--no-flip", "--device", "cpu")
    assert calls == [(5, False, torch.device("cpu"))]
    assert "device must be one that torch has here" in refused("eval", run, "--device", "nope")
    assert len(calls) == 1


@pytest.mark.parametrize(("there", "wanted"), [(False, "cpu"), (True, "cuda")])
def test_eval_runs_on_the_gpu_where_there_is_one(monkeypatch, there, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr("synface.common.check.check_device", torch.device)
    assert options.chosen_device("auto") == torch.device(wanted)
    assert options.chosen_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resize"], "--resize has no effect without --set: images are resized"),
        (["--images", "x"], "--images has no effect without --set"),
        (["--relabel"], "--relabel has no effect without --data"),
        (["--set", "x.bin", "--relabel"], "--relabel has no effect with --set"),
        (["--set", "x.bin", "--data", "x"], "--set cannot be combined with --data or"),
    ],
)
def test_eval_refuses_what_would_do_nothing(run, arguments, message):
    assert message in refused("eval", run, *arguments)


def test_a_report_that_cannot_be_written_is_an_error_before_the_work(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(verification, "embed", None)  # it is not reached
    for folder in (tmp_path / "file", tmp_path / "file" / "report"):
        message = refused("eval", run, "--output", folder)
        assert message.startswith("error: --output must be a folder that can be written to")
        assert f"got {folder}: " in message


# -- other commands


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--mix-ratio", "beta:1"], "--mix-ratio has no effect without --synthetic"),
        (["train", "--per-sample"], "--per-sample has no effect without --synthetic and --real"),
        (
            ["train", "--synthetic", "default", "--real", "x", "--memory", "9"],
            "--memory has no effect with --synthetic and --real",
        ),
        (["train", "--power", "3"], "--power has no effect with --schedule cosine"),
        (["train", "--holdout", "0", "--verify-every", "1"], "--verify-every has no effect with"),
        (["pack", "--check", "x.npy", "--dim", "4"], "--dim has no effect with --check"),
        (["pack", "--check", "x.npy", "--resume"], "--resume has no effect with --check"),
        (["pack", "--count", "9", "--dim", "4", "--alpha", "1"], "--alpha has no effect without"),
        (["pack", "--count", "9", "--dim", "4", "--lr", "1"], "--lr has no effect without --obj"),
        (
            ["synthesize", "--preview", "x.png", "--generator", "eigenfaces", "--device", "cpu"],
            "--device has no effect with --generator eigenfaces",
        ),
        (
            ["convert", "x", "y", "--to", "recordio", "--shard-size", "9"],
            "--shard-size has no effect with --to recordio, which has no shards",
        ),
        (
            ["bench", "scale", "--directory", "x", "--resume", "--overwrite"],
            "--overwrite has no effect with --resume",
        ),
        (
            ["bench", "scale", "--optimizer", "adamw", "--momentum", "0.5"],
            "--momentum has no effect with --optimizer adamw",
        ),
        (
            ["recipe", "synface", "--cell", "x", "--no-faces"],
            "--faces/--no-faces has no effect with --cell",
        ),
        (["study", "--cell", "x", "--report", "x"], "--report has no effect with --cell"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)
    assert os.listdir(tmp_path) == []


def test_a_resumed_run_refuses_another_folder_and_options_from_a_file(run):
    (run.parent / "other.toml").write_text("lr = 0.5\n")
    config = ("--config", run.parent / "other.toml")
    for option, value in (("--output", "x"), config):
        message = refused("train", "--resume", run, option, value)
        assert message.startswith(f"error: {option} has no effect with --resume")


def test_values_of_a_file_are_not_refused(run):
    """A run's config.toml holds all options, `power` for one."""
    values = (run / "config.toml").read_text()
    assert "power" in values
    message = refused("train", "--config", run / "config.toml", "--data", "nowhere")
    assert "nowhere does not exist" in message
    assert "has no effect" not in message
