"""Every example runs as a user runs it, and its loss falls."""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from synface.heads import PartialFC
from synface.optim.rows import RowSGD

import synface_kernels as sk
from examples import arcface_torch_script
from tests.helpers import watched
from tests.helpers.forked import finished
from tests.helpers.ranks import forked_ranks, on_ranks
from tests.helpers.watched import LATE_GLOO

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS = [
    (1, "plain_torch", "torch", []),
    (1, "lightning_module", "pytorch_lightning", ["--precision", "bf16-mixed"]),
    (1, "lightning_module", "pytorch_lightning", ["--devices", "2"]),  # starts the other itself
    (1, "accelerate_loop", "accelerate", ["--mixed-precision", "bf16"]),
    (2, "accelerate_loop", "accelerate", []),
    (2, "accelerate_loop", "accelerate", ["--shard"]),
    (1, "metric_learning_trainer", "pytorch_metric_learning", []),
    (2, "metric_learning_trainer", "pytorch_metric_learning", []),
    (1, "arcface_torch_script", "torch", ["--fp16", "--sample-rate", "0.5"]),
]

LIGHTNING = """
import pytorch_lightning as pl
import torch
import synface_kernels as sk
from synface.heads import PartialFC
from synface.optim import RowSGD
from torch.utils.data import DataLoader, TensorDataset

{block}

pl.seed_everything(0)
model = Sampled(torch.nn.Linear(8, 8), PartialFC(sk.ArcFace(16.0, 0.2), 8, 30, sample_rate=0.5))
loader = DataLoader(TensorDataset(torch.randn(64, 8), torch.randint(30, (64,))), batch_size=32)
quiet = dict.fromkeys(
    ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
)
for epochs in (1, 20):
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=epochs, **quiet)
    trainer.fit(model, loader)
    print("epoch %d: loss %f" % (epochs, trainer.callback_metrics["loss"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "name", "package", "options"), RUNS)
def test_the_loss_falls(ranks, name, package, options, tmp_path):
    """Two ranks hold 11 and 10 identities."""
    needs(package)
    script = [str(EXAMPLES / f"{name}.py"), "--epochs", "3", "--identities", "21", *options]
    if ranks == 1:
        code, shown = finished(tmp_path / "shown", watched.run, script)
        assert code == 0, shown
    elif options:
        with forked_ranks(tmp_path / "shown", watched.run, script) as processes:
            for output, process in processes.items():
                process.join(300)
                assert process.exitcode == 0, output.read_text()
        shown = (tmp_path / "shown" / "0").read_text()
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        run = run_to_its_end([sys.executable, *launcher, watched.__file__, LATE_GLOO, *script])
        assert run.returncode == 0, run.stdout + run.stderr
        shown = run.stdout
    losses = losses_in(shown)
    assert len(losses) == 3
    assert losses[0] > losses[1] > losses[2]


def needs(package):
    """Skip the test unless the package is installed, which takes seconds to import."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def losses_in(shown):
    return [float(x) for x in re.findall(r"^epoch \d+: loss ([\d.]+)", shown, re.MULTILINE)]


def run_to_its_end(command, environment=()):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment)
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, **options)


STALL = """
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported later, it would keep the group
from synface.common.distributed import joined
from torch.nn.parallel import DistributedDataParallel

def train():
    module = DistributedDataParallel(torch.nn.Linear(2, 2))
    module.itself = module
    module(torch.zeros(1, 2)).sum().backward()
    dist.all_reduce(torch.ones(1))
    raise RuntimeError("as expected")

with joined("cpu"):
    train()
"""


@pytest.mark.slow
def test_a_rank_leaves_its_group_while_gloo_still_holds_tensors(tmp_path):
    script = tmp_path / "stall.py"
    script.write_text(STALL)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torchrun = {"TORCHELASTIC_RUN_ID": "none"}
    # Not forked: such a process is not finalized, where the fault shows.
    run = run_to_its_end([sys.executable, watched.__file__, LATE_GLOO, script], alone | torchrun)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "RuntimeError: as expected" in run.stderr


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {name for _, name, *_ in RUNS}


def arcface_torch(folder, epochs, resume=False):
    settings = argparse.Namespace(
        epochs=epochs, identities=21, sample_rate=1.0, fp16=False, output=folder, resume=resume
    )
    return arcface_torch_script.train(settings)


class Script:
    """insightface's script, once without a break and once resumed after its first epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rank: int, ranks: int) -> list[list[float]]:
        for name in ("whole", "resumed"):
            (self.folder / name).mkdir(exist_ok=True)
        return [
            arcface_torch(self.folder / "whole", 2),
            arcface_torch(self.folder / "resumed", 1)
            + arcface_torch(self.folder / "resumed", 2, resume=True),
        ]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_insightfaces_script_with_its_import_changed(ranks, tmp_path):
    whole, resumed = on_ranks(ranks, Script(tmp_path), tmp_path)[0]
    assert whole[0] > whole[1]
    assert resumed == whole
    saved = {
        name: [
            torch.load(tmp_path / name / f"checkpoint_gpu_{rank}.pt", weights_only=True)
            for rank in range(ranks)
        ]
        for name in ("whole", "resumed")
    }
    torch.testing.assert_close(saved["resumed"], saved["whole"], rtol=0, atol=0)

    shards = [state["state_dict_softmax_fc"] for state in saved["whole"]]
    assert [set(shard) for shard in shards] == [{"weight"}] * ranks
    assert [len(shard["weight"]) for shard in shards] == [[21], [11, 10]][ranks - 1]
    first, *others = (state["state_dict_backbone"] for state in saved["whole"])
    statistics = ("running_mean", "running_var")  # each rank's own: broadcast_buffers=False
    for other in others:
        for name in first:
            if not name.endswith(statistics):
                assert torch.equal(first[name], other[name]), name


def sampled_head_with_gradient():
    head = PartialFC(sk.ArcFace(), 4, 10, sample_rate=0.5)
    loss = head(torch.randn(2, 4), torch.tensor([1, 7]))
    return head, loss


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizers_with_decay_refuse_the_sparse_gradient_of_sampled_classes(optimizer):
    head, loss = sampled_head_with_gradient()
    loss.backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer(head.parameters(), lr=0.1, weight_decay=5e-4).step()
    with pytest.raises(NotImplementedError):
        torch.nn.utils.clip_grad_norm_(head.parameters(), 5)
    head.zero_grad()
    head.sparse = False
    head(torch.randn(2, 4), torch.tensor([1, 7])).backward()
    torch.nn.utils.clip_grad_norm_(head.parameters(), 5)
    optimizer(head.parameters(), lr=0.1, weight_decay=5e-4).step()


def test_a_gradient_scaler_takes_sampled_classes():
    head, loss = sampled_head_with_gradient()
    before = head.weight.detach().clone()
    (expected,) = torch.autograd.grad(loss, head.weight, retain_graph=True)
    optimizer = RowSGD(head.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert scaler.get_scale() == 2.0**10
    torch.testing.assert_close(head.weight.detach(), before - 0.5 * expected.to_dense())


@pytest.mark.slow
def test_sampled_classes_under_lightning_as_documented(tmp_path):
    needs("pytorch_lightning")
    page = (EXAMPLES.parent / "docs" / "migrate.md").read_text()
    (block,) = re.findall(r"```python\n([^`]*?class Sampled.*?)```", page, flags=re.DOTALL)
    script = tmp_path / "sampled.py"
    script.write_text(LIGHTNING.format(block=block))
    code, shown = finished(tmp_path / "shown", watched.run, [str(script)])
    assert code == 0, shown
    first, last = losses_in(shown)
    assert last < first
