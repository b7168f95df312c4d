"""Training on several ranks: the results of one process, checkpoints for any number of ranks."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synface import checkpoint
from synface.data import embedded_faces
from synface.evaluation.embedding import embed
from synface.heads import ShardedMarginHead
from synface.training.loop import load_backbone, train

from tests.helpers.forked import command_without_figures
from tests.helpers.processes import wait_for
from tests.helpers.ranks import forked_ranks, on_ranks
from tests.helpers.training import SMALL, folder, same

SMALL = replace(
    SMALL, epochs=5, batch_size=32, lr=0.05, dropout=0.0, augment=0.0, freeze_statistics=True
)


def faces():
    return embedded_faces(images_per_identity=10, size=16, identities=13)  # 130 images: 5 steps


def result_of(trained) -> dict[str, torch.Tensor]:
    state = {f"backbone.{k}": v for k, v in trained.backbone.state_dict().items()}
    return state | {
        "centers": trained.head.weight.detach(),
        "losses": torch.tensor([row["loss"] for row in trained.history]),
    }


class Job:
    """Training calls, each with a configuration, a folder and options, as a rank makes them."""

    def __init__(self, *calls):
        self.calls = calls

    def __call__(self, rank: int, ranks: int) -> list:
        results = []
        for config, output, options in self.calls:
            try:
                results.append(result_of(train(config, faces(), Path(output), **options)))
            except (ValueError, OSError) as error:
                results.append(f"{type(error).__name__}: {error}")
        return results


def whole(results: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return all ranks' results as one, whose backbones must be the same."""
    for other in results[1:]:
        for name in other.keys() - {"centers"}:
            assert torch.equal(other[name], results[0][name]), name
    return results[0] | {"centers": torch.cat([result["centers"] for result in results])}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the largest of all tensors, relative to its greatest element where that is over 1."""
    assert a.keys() == b.keys()
    sizes = {k: max(1.0, float(a[k].abs().max())) for k in a}
    return max(float((a[k].double() - b[k].double()).abs().max()) / sizes[k] for k in a)


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"clip_norm": 0.5}], ids=str)
@pytest.mark.slow
def test_two_ranks_are_one_rank(tmp_path, options):
    """20 steps and more of batches of 2 × 16 and 32, in float32."""
    config = replace(SMALL, **options)
    assert 5 * SMALL.epochs >= 20
    ((one,),) = on_ranks(1, Job((config, tmp_path / "one", {})), tmp_path / "1")
    two = on_ranks(2, Job((config, tmp_path / "two", {})), tmp_path / "2")
    assert largest_difference(one, whole([result for (result,) in two])) < 1e-4
    logs = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logs] == list(range(25))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "adamw", "sample_rate": 0.5},
        {"precision": "float16", "clip_norm": 1.0},
        {"fused_update": True, "sample_rate": 0.5},
        {"freeze_statistics": False, "accumulate": 2},
    ],
    ids=str,
)
@pytest.mark.slow
def test_resuming_is_bitwise_the_uninterrupted_run(tmp_path, options):
    config = replace(SMALL, epochs=2, dropout=0.2, augment=1.0, **options)
    job = Job(
        (config, tmp_path / "whole", {}),
        (config, tmp_path / "cut", {"stop_after": 6}),
        (config, tmp_path / "cut", {"resume": True}),
    )
    results = list(zip(*on_ranks(2, job, tmp_path / "2"), strict=True))
    assert same(whole(results[0]), whole(results[2]))
    assert not same(results[0][0], results[1][0])


@pytest.mark.slow
def test_other_numbers_of_ranks_resume(tmp_path):
    """A run of 2 ranks resumes on 3, then on 1, with the result of 2 throughout."""
    first = replace(SMALL, epochs=3)
    begun = on_ranks(2, Job((first, tmp_path / "run", {"stop_after": 4})), tmp_path / "2")
    more = {"resume": True, "stop_after": 9}
    on_ranks(3, Job((first, tmp_path / "run", more)), tmp_path / "3")
    ((end,),) = on_ranks(1, Job((first, tmp_path / "run", {"resume": True})), tmp_path / "1")
    always = on_ranks(2, Job((first, tmp_path / "always", {})), tmp_path / "2b")
    assert len(end["losses"]) == 15
    assert torch.equal(end["losses"][:5], begun[0][0]["losses"])
    assert largest_difference(end, whole([result for (result,) in always])) < 1e-4


def test_a_trained_network_is_read_back_in_one_process(tmp_path):
    config = replace(SMALL, epochs=1)
    results = on_ranks(2, Job((config, tmp_path / "run", {})), tmp_path / "2")
    backbone, state = load_backbone(tmp_path / "run")
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, results[0][0][f"backbone.{name}"]), name
    assert state["step"] == 5
    assert embed(backbone, faces().images[:3]).isfinite().all()


def test_what_cannot_be_done_is_said_by_all_ranks(tmp_path):
    config = replace(SMALL, epochs=1)
    job = Job(
        (replace(config, batch_size=129), tmp_path / "short", {}),
        (config, tmp_path / "run", {"stop_after": 1}),
        (config, tmp_path / "run", {}),
        (replace(config, lr=0.1), tmp_path / "run", {"resume": True}),
        (config, tmp_path / "nothing", {"resume": True}),
    )
    a, b = on_ranks(2, job, tmp_path / "2")
    for of_rank in (a, b):
        assert "each of 2 ranks needs an image of every batch" in of_rank[0]
        assert "holds a run already: resume it" in of_rank[2]
        assert "config's lr is 0.05, expected 0.1" in of_rank[3]
        assert of_rank[4].startswith("CheckpointError: no checkpoint in")
    assert not (tmp_path / "short").exists()
    resumed = train(config, faces(), tmp_path / "run", resume=True)  # in one process
    assert [row["step"] for row in resumed.history] == [0, 1, 2, 3, 4]


def torchrun(ranks: int, *arguments: object) -> subprocess.Popen:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    words += [str(ranks), "-m", "synface", *map(str, arguments)]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


OPTIONS = ["--size", "16x16", "--widths", "4,8", "--depths", "1,1", "--embedding-size", 16]
OPTIONS += ["--batch-size", 10, "--holdout", 2, "--checkpoint-every", 1, "--epochs", 4]


@contextmanager
def under_torchrun(run, *arguments):
    """Start two ranks, wait for more than three steps, and leave nobody behind."""
    running, log = torchrun(2, *arguments, "--output", run), run / "metrics.jsonl"

    def more_than_3_steps() -> bool:
        assert running.poll() is None, running.communicate()[0]
        return log.exists() and len(log.read_text().splitlines()) > 3

    try:
        wait_for(more_than_3_steps, 200)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        yield running, [int(pid) for pid in children]
    finally:
        if running.poll() is None:
            running.terminate()  # torchrun ends its ranks
            running.communicate(timeout=60)


@pytest.mark.slow
def test_ranks_after_kill_9_and_torchrun_end_in_the_same_run(tmp_path):
    words = ["train", *OPTIONS, "--data", folder(tmp_path / "faces", 12, 10)]  # 40 steps
    with forked_ranks(
        tmp_path / "first", command_without_figures, *words, "--output", tmp_path / "whole"
    ) as ranks:
        for output, rank in ranks.items():
            rank.join(300)
            assert rank.exitcode == 0, output.read_text()
        shown = "".join(output.read_text() for output in ranks)
    assert shown.count("ROC-AUC: trained") == 1  # the first rank speaks

    run = tmp_path / "cut"
    log = run / "metrics.jsonl"
    with forked_ranks(
        tmp_path / "killed", command_without_figures, *words, "--output", run
    ) as ranks:

        def more_than_12_steps() -> bool:
            assert all(rank.is_alive() for rank in ranks.values())
            return log.exists() and len(log.read_text().splitlines()) > 12

        wait_for(more_than_12_steps, 200)
        for rank in ranks.values():
            rank.kill()
        for rank in ranks.values():
            rank.join(120)
            assert rank.exitcode != 0
    assert checkpoint.load_state(checkpoint.find(run))["step"] >= 10

    resumed = torchrun(2, "train", "--resume", run)
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    networks = [load_backbone(tmp_path / name)[0].state_dict() for name in ("whole", "cut")]
    assert same(*networks)
    assert log.read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert all(math.isfinite(json.loads(line)["loss"]) for line in log.read_text().splitlines())


@pytest.mark.slow
def test_sigterm_ends_all_ranks_after_one_step(tmp_path):
    """One rank gets the signal first and tells the others; torchrun forwards it too."""
    run = tmp_path / "run"
    log = run / "metrics.jsonl"
    data = folder(tmp_path / "faces", 12, 10)
    words = ["train", *OPTIONS[:-2], "--epochs", 100_000, "--data", data]
    with under_torchrun(run, *words) as (running, children):
        os.kill(children[-1], signal.SIGTERM)
        output, _ = running.communicate(timeout=120)
        assert running.returncode != 0
    assert "terminated: continue with synface train --resume" in output
    codes = re.findall(r"exitcode +: (-?\d+)", output)  # torchrun's table; it ends who lags behind
    assert len(codes) == 2, output
    assert "143" in codes, output
    assert set(codes) <= {"143", "-15"}, output
    found = checkpoint.find(run)
    assert checkpoint.load_state(found)["step"] == len(log.read_text().splitlines()) > 3


def test_centers_do_not_depend_on_the_number_of_ranks(tmp_path):
    def begin(ranks: int) -> torch.Tensor:
        return torch.cat(on_ranks(ranks, first_centers, tmp_path / str(ranks)))

    assert torch.equal(begin(1), begin(3))


def first_centers(rank: int, ranks: int) -> torch.Tensor:
    return ShardedMarginHead(4, 5000, seed=3).weight.detach()
