"""Training on what the loaders yield: interrupted, killed and resumed runs."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synface import checkpoint
from synface.common.files import CheckpointError
from synface.data import (
    CycledOrder,
    DataError,
    embedded_faces,
    list_folder,
)
from synface.data.mixing import Beta, Constant
from synface.training.loop import TIMING, TrainConfig, train
from synface.training.sources import MixedSource

from tests.helpers.command_line import call, refused
from tests.helpers.forked import command, forked
from tests.helpers.images import folder, truncate
from tests.helpers.processes import children, is_running, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

ORL = Path(__file__).parents[2] / ".." / "shared" / "data" / "orl"
SMALL = TrainConfig(
    epochs=3,
    batch_size=5,  # 12 synthetic images: batches of 5, 5 and 2
    widths=(4, 8),
    depths=(1, 1),
    embedding_size=16,
    checkpoint_every=1,
)


def mixed(synthetic: Path, real: Path, **options) -> MixedSource:
    size = options.pop("size", (16, 16))
    return MixedSource(list_folder(synthetic), list_folder(real), size=size, **options)


def weights(result) -> list[torch.Tensor]:
    return [*result.backbone.state_dict().values(), *result.head.state_dict().values()]


@pytest.mark.parametrize("mix_in_workers", [False, True])
def test_a_killed_worker_costs_nothing(synthetic, real, tmp_path, mix_in_workers):
    """The step is saved, the file named, and training resumes with the next batch."""
    whole = train(SMALL, mixed(synthetic, real), tmp_path / "whole")

    class Killer:
        """Kills a worker after the fifth step, of nine."""

        steps = 0

        def start(self, total_steps: int, step: int) -> None:
            assert (total_steps, step) == (9, 0)

        def step(self, loss: float, accuracy: float, images: int) -> None:
            self.steps += 1
            if self.steps == 5:
                for worker in children():
                    os.kill(worker, signal.SIGKILL)
                wait_for(lambda: not any(is_running(str(pid)) for pid in children()))

    source = mixed(synthetic, real, mix_in_workers=mix_in_workers)
    config = replace(SMALL, checkpoint_every=100)
    with pytest.raises(DataError, match="was killed by signal 9"):
        train(config, source, tmp_path / "run", progress=Killer())
    assert children() == []
    found = checkpoint.find(tmp_path / "run")
    assert checkpoint.load_state(found)["step"] == 5
    source = mixed(synthetic, real, workers=1)  # how many, and who mixes, makes no difference
    resumed = train(config, source, tmp_path / "run", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    assert resumed.history == whole.history
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "run")]
    assert logs[0] == logs[1]
    assert len((tmp_path / "run" / TIMING).read_text().splitlines()) == 2
    assert resumed.timing is not None
    assert resumed.timing["samples"] == 36 - 22


def test_a_truncated_file_keeps_the_steps_before_it(synthetic, real, tmp_path):
    source = mixed(synthetic, real)
    third_step = CycledOrder(12, 6, SMALL.seed)(0, 11)[0]
    file = source.synthetic.store.path(third_step)
    good = file.read_bytes()
    whole = train(SMALL, source, tmp_path / "whole")
    file.write_bytes(good[:60] + bytes(len(good) - 60))  # the size is what tells files apart
    with pytest.raises(DataError, match=str(file)):
        train(SMALL, source, tmp_path / "run")
    assert checkpoint.load_state(checkpoint.find(tmp_path / "run"))["step"] == 2
    file.write_bytes(good)
    resumed = train(SMALL, source, tmp_path / "run", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def test_other_data_or_another_mixture_is_refused(synthetic, real, tmp_path):
    train(SMALL, mixed(synthetic, real), tmp_path / "run", stop_after=1)
    for other, message in (
        (mixed(synthetic, real, ratio=Constant(0.5)), "data's ratio is .* expected 'Constant"),
        (mixed(synthetic, real, per_sample=True), "data's ratio is .*, per batch', expected"),
        (mixed(synthetic, real, size=(20, 16)), "data's image_shape"),
        (mixed(real, synthetic), "data's fingerprint is not that of"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(SMALL, other, tmp_path / "run", resume=True)
    truncate(real / "p1" / "1.png")
    with pytest.raises(CheckpointError, match="data's fingerprint"):
        train(SMALL, mixed(synthetic, real), tmp_path / "run", resume=True)


def test_the_loss_falls_on_mixed_images(synthetic, real, tmp_path):
    config = replace(SMALL, epochs=15, augment=0.0, checkpoint_every=100)
    history = train(config, mixed(synthetic, real, ratio=Beta(0.1)), tmp_path / "run").history
    losses = [row["loss"] for row in history]
    assert sum(losses[-9:]) < 0.8 * sum(losses[:9])


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_the_command_line_mixes_verifies_and_resumes(tmp_path):
    run, real = tmp_path / "run", folder(tmp_path / "real", 5, 4, seed=4)
    tiny = ["--size", "16x16", "--embedding-size", "8", "--batch-size", "500", "--epochs", "1"]
    domains = ["--synthetic", "default", "--real", real, "--holdout", "2"]
    mixing = ["--mix-ratio", "beta:0.5", "--per-sample", "--workers", "1"]
    trained = call("train", *domains, *mixing, *tiny, "--output", run)
    shown = " ".join(trained.split())
    assert "2000 images of 100 people from scikit" in shown
    assert "mixed with 12 images of 3 people from" in shown
    assert "pairs of images/s; 1 workers, " in shown
    line = next(x for x in trained.splitlines() if x.startswith("ROC-AUC"))
    for words in (("eval", run), ("train", "--resume", run, "--workers", "2")):
        again = call(*words)
        assert line in again
        assert "2 people never trained on" in again
    shown = " ".join(refused("train", "--resume", run, "--mix-ratio", "grid").split())
    assert "--mix-ratio grid differs from the run's beta:0.5" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--synthetic", "default"], "--synthetic and --real go together"),
        (["--real", "real", "--data", "real"], "--synthetic and --real go together"),
        (["--synthetic", "real", "--real", "real/"], "are the same folder"),
        (
            ["--synthetic", "default", "--real", "real", "--mix-ratio", "beta"],
            "--mix-ratio must be grid, beta:A with A > 0 or constant:V .* got 'beta'",
        ),
        (
            ["--synthetic", "default", "--real", "real", "--mix-ratio", "constant:2"],
            "got 'constant:2'",
        ),
        (["--synthetic", "default", "--real", "missing"], "missing does not exist"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, message, monkeypatch):
    folder(tmp_path / "real", 4, 2, seed=4)
    monkeypatch.chdir(tmp_path)
    shown = " ".join(refused("train", "--holdout", "2", *options).split())
    assert re.search(message, shown), shown
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("sent", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
    ids=["Ctrl-C", "SIGTERM"],
)
@pytest.mark.slow
def test_ctrl_c_and_sigterm_go_to_the_trainer_alone(synthetic, real, tmp_path, sent, code, word):
    """Workers ignore a signal that a terminal or SLURM sends to the whole process group."""
    run, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    words = ["train", "--synthetic", synthetic, "--real", real, "--holdout", "0", "--size", "16x16"]
    words += ["--epochs", "100000", "--embedding-size", "8", "--output", run]
    with forked(tmp_path / "shown", command, *words) as trainer:
        wait_for(lambda: checkpoint.checkpoints(run / "checkpoints"))
        time.sleep(0.5)
        os.killpg(trainer.pid, sent)
        trainer.join(60)
        text = (tmp_path / "shown").read_text()
        assert trainer.exitcode == code, text
    assert f"{word}: continue with synface train --resume" in text
    assert "Traceback" not in text
    assert "killed" not in text
    state = checkpoint.load_state(checkpoint.find(run))
    assert state["step"] == len(log.read_text().splitlines()) > 0


@pytest.mark.skipif(not ORL.is_dir(), reason="../shared/data/orl (the ORL faces) is not there")
def test_orl_mixed_with_the_embedded_faces(tmp_path):
    real, held = list_folder(ORL).split(10)
    assert (len(real), len(held)) == (300, 100)
    source = MixedSource(embedded_faces(), real)
    assert (len(source), source.num_classes, source.image_shape) == (2000, 130, (48, 48, 1))
    result = train(TrainConfig(), source, tmp_path / "run", stop_after=3)
    assert result.timing is not None
    assert result.timing["samples"] == 4 * 32
