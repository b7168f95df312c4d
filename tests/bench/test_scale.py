"""synface bench scale: its report, and runs that are interrupted and resumed."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from synface.bench import scale
from synface.bench.scale import Clusters, ScaleConfig
from synface.optim.centers import Centers, CentersConfig

from tests.helpers.command_line import call, refused
from tests.helpers.forked import command_without_figures, finished

SMALL = ScaleConfig(
    CentersConfig(2000, 32, seed=5), sample_rate=0.1, batch=32, working_set=64, lr=0.05
)
COMMAND = ["bench", "scale", "--identities", "2k", "--dim", "32", "--sample-rate", "0.1"]
COMMAND += ["--batch", "32", "--working-set", "64", "--seed", "5", "--lr", "0.05"]


def test_clusters_are_what_they_say():
    config = replace(SMALL, centers=CentersConfig(10**7, 512), noise=0.75, batch=200)
    clusters = Clusters(config)
    assert len(clusters.identities.unique()) == 64
    assert clusters.identities.max() > 10**6  # from all identities
    embeddings, labels = clusters.batch(3)
    assert embeddings.shape == (200, 512)
    assert torch.isin(labels, clusters.identities).all()
    directions = clusters.directions(labels)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(200))
    cosine = torch.cosine_similarity(embeddings, directions)
    assert cosine.mean().item() == pytest.approx(1 / math.sqrt(1 + 0.75**2), abs=0.01)
    for again, first in zip(Clusters(config).batch(3), (embeddings, labels), strict=True):
        assert torch.equal(again, first)
    assert not torch.equal(clusters.batch(4)[0], embeddings)
    strangers, others = clusters.strangers()
    assert len(strangers) == len(others) > 190
    assert not torch.isin(others, clusters.identities).any()
    everyone = replace(SMALL, working_set=2000)
    assert len(Clusters(everyone).strangers()[1]) == 0


def test_the_loss_falls_and_the_report_says_so(tmp_path):
    told = []
    with Centers.create(SMALL.centers, tmp_path / "c") as centers:
        result = scale.run(SMALL, centers, steps=60, checkpoint_every=25, progress=told.append)
    scale.write_report(result, tmp_path / "report")
    assert told == result["history"]
    assert json.loads((tmp_path / "report" / "scale.json").read_text()) == json.loads(
        json.dumps(result)
    )
    assert (tmp_path / "report" / "scale.png").read_bytes().startswith(b"\x89PNG")
    losses = [row["loss"] for row in result["history"]]
    assert result["loss"]["first"] == pytest.approx(sum(losses[:6]) / 6)
    assert result["loss"]["last"] == pytest.approx(sum(losses[-6:]) / 6)
    assert result["loss"]["last"] < result["loss"]["first"] / 2
    # Who was never trained on is as far from its center as ever.
    assert result["loss"]["identities never trained on"] > result["loss"]["first"] - 5
    assert result["history"][-1]["accuracy"] > 0.9 > result["history"][0]["accuracy"]
    assert [row["step"] for row in result["history"] if "checkpoint" in row] == [25, 50]
    assert result["steps_per_second"] == pytest.approx(60 / result["seconds"])
    for row in result["history"]:
        assert sum(row[name] for name in scale.PHASES) == pytest.approx(row["seconds"])
        assert all(row[name] > 0 for name in scale.PHASES)
    assert result["centers_bytes"] == 2000 * (2 * 32 * 2 + 4)
    peak = result["peak_bytes"]
    assert peak["anonymous"] > 2**20
    assert peak["file-backed"] > 2**20
    assert max(peak["anonymous"], peak["file-backed"]) < peak["in all"]
    summary = scale.summary(result)
    assert f"{result['steps_per_second']:.3f} steps/s" in summary
    assert f"{result['loss']['last']:.3f} (last 6)" in summary


def test_memory_watch_sees_what_was_held():
    with scale.MemoryWatch() as before:
        pass
    with scale.MemoryWatch() as watch:
        held = torch.ones(2**26)  # 256 MiB
        assert not watch._end.wait(0.3)
    del held
    assert 2**27 < watch.peak["anonymous"] - before.peak["anonymous"] < 2**29


def test_files_and_memory_go_the_same_way(tmp_path):
    results = []
    for directory in (None, tmp_path / "c"):
        centers = Centers.create(SMALL.centers, directory)
        result = scale.run(SMALL, centers, steps=5)
        results.append(([row["loss"] for row in result["history"]], centers.weight.clone()))
        centers.close()
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_minutes():
    centers = Centers.create(SMALL.centers)
    result = scale.run(SMALL, centers, minutes=0.01)
    assert result["seconds"] >= 0.6
    assert result["seconds"] - result["history"][-1]["seconds"] < 0.6 + 0.3
    result = scale.run(SMALL, centers, minutes=0)
    assert result["steps"] == 1


@pytest.mark.slow
def test_command_line_keeps_and_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call(*COMMAND, "--steps", 12, "--output", "whole")  # in memory
    assert "12 steps in" in said
    assert "written: whole/scale.json" in said
    call(*COMMAND, "--steps", 7, "--directory", "centers", "--keep")
    assert sorted(p.name for p in (tmp_path / "centers").iterdir()) == [
        "centers.json", "last_step.bin", "lock", "rows.bin", "sums-1.bin",
    ]  # fmt: skip
    rest = ["--steps", "12", "--directory", "centers", "--output", "rest"]
    assert "centers holds centers" in refused(*COMMAND, *rest)
    call(*COMMAND, *rest, "--resume")
    losses = {
        name: [
            row["loss"]
            for row in json.loads((tmp_path / name / "scale.json").read_text())["history"]
        ]
        for name in ("whole", "scale-report", "rest")
    }
    assert losses["whole"] == losses["scale-report"] + losses["rest"]
    assert "not of" in refused(*COMMAND, *rest, "--resume", "--seed", 6)
    assert (tmp_path / "centers" / "rows.bin").exists()
    call(*COMMAND, *rest, "--overwrite")  # and does not keep them
    assert not (tmp_path / "centers" / "rows.bin").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [("SIGINT", 0), ("SIGTERM", 143)])
def test_ctrl_c_and_sigterm_end_with_the_report(tmp_path, sent, code):
    words = [*COMMAND, "--minutes", "9", "--directory", "new/centers"]
    ended, said = finished(tmp_path / "shown", press_at_step_5, tmp_path, sent, *words)
    assert ended == code, said
    assert "5 steps in" in said
    result = json.loads((tmp_path / "scale-report" / "scale.json").read_text())
    assert result["steps"] == len(result["history"]) == 5
    assert result["ended by"] == sent
    assert not (tmp_path / "new" / "centers").exists()


def press_at_step_5(folder, sent, *words):
    """Run the command line, which gets a signal at the end of a step."""
    os.chdir(folder)
    step = scale._step

    def interrupted(*arguments):
        row = step(*arguments)
        if row["step"] == 5:
            os.kill(os.getpid(), signal.Signals[sent])
        return row

    scale._step = interrupted
    command_without_figures(*words)


def test_command_line_errors(tmp_path, monkeypatch):
    def error(*arguments):
        return refused(*COMMAND, *arguments)

    monkeypatch.chdir(tmp_path)
    assert "--identities must be a count" in error("--identities", "many")
    assert "--working-set must be a count" in error("--working-set", "0")
    assert "working_set must be at most the 2,000" in error("--working-set", "3k")
    assert "need --directory" in error("--keep")
    assert "give steps or minutes" in error("--steps", "3", "--minutes", "1")
    assert "steps must be at least 1" in error("--steps", "0")
    assert "sample_rate must be in" in error("--sample-rate", "0")
    assert "optimizer must be sgd or adamw" in error("--optimizer", "lion")
    assert "dtype must be float32 or bfloat16" in error("--dtype", "int8")
    huge = ["--identities", "2G", "--dim", "4096"]
    assert "of memory are free: give a --directory" in error(*huge)
    assert "GiB are free" in error(*huge, "--directory", "centers")
    assert "holds no centers" in error("--resume", "--directory", "centers")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sample_rate": 1.5}, ValueError, "sample_rate must be in"),
        ({"batch": 0}, ValueError, "batch must be at least 1"),
        ({"working_set": 2001}, ValueError, "working_set must be at most"),
        ({"noise": -1}, ValueError, "noise must be finite"),
        ({"lr": "fast"}, TypeError, "lr must be a number"),
    ],
)
def test_configurations(options, error, message):
    with pytest.raises(error, match=message):
        replace(SMALL, **options)


def test_centers_of_another_configuration():
    centers = Centers.create(replace(SMALL.centers, seed=6))
    with pytest.raises(ValueError, match="not of"):
        scale.run(SMALL, centers, steps=3)
    centers = Centers.create(SMALL.centers)
    scale.run(SMALL, centers, steps=3)
    with pytest.raises(ValueError, match="steps must be more than the 3 taken before"):
        scale.run(SMALL, centers, steps=3)
