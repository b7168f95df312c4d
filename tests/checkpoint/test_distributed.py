"""Heads over several ranks: their gradients under DDP, and checkpoints for any number of ranks."""

from __future__ import annotations

import json
import os
import signal
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from synface import checkpoint
from synface.checkpoint import load_model, save_model, storage
from synface.common.files import CheckpointError
from synface.heads.sharded import ShardedMarginHead
from synface.optim import rows as optim
from torch import Tensor, nn

import synface_kernels as sk
from tests.helpers.forked import start_server
from tests.helpers.ranks import on_ranks

C, D, N = 37, 8, 12
SPLITS = {1: None, 2: [3, 34], 3: [20, 1, 16], 4: None}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=0.1),
    "rows": partial(optim.RowSGD, lr=0.1, momentum=0.9),
}


def build(kind: str) -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
    torch.manual_seed(0)
    head = ShardedMarginHead(D, C, sk.CosFace(16.0), classes=SPLITS[dist.get_world_size()])
    model = nn.ModuleDict({"backbone": nn.Linear(5, D, bias=False), "head": head})
    return model, OPTIMIZERS[kind](model.parameters())


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return the images and labels of all ranks."""
    g = torch.Generator().manual_seed(step)
    return torch.randn(N, 5, generator=g), torch.randint(C, (N,), generator=g)


def train(model: nn.ModuleDict, optimizer: torch.optim.Optimizer, steps: range) -> None:
    backbone = nn.parallel.DistributedDataParallel(model["backbone"])
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in steps:
        images, target = (t.tensor_split(ranks)[rank] for t in batch(step))
        loss = model["head"](backbone(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def tensors(model: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    values = {name: value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            values[f"{name}.{key}"] = torch.as_tensor(value).clone()
    return values


def begin(folder: Path, rank: int, ranks: int) -> dict[str, dict[str, Tensor]]:
    results = {}
    for kind in OPTIMIZERS:
        model, optimizer = build(kind)
        results["untrained"] = tensors(model, optimizer)
        train(model, optimizer, range(3))
        save_model(folder / kind, 3, model, optimizer, {"seen": [1, 2]})
        results[kind] = tensors(model, optimizer)
    return results


def go_on(folder: Path, rank: int, ranks: int) -> dict[str, dict[str, Tensor]]:
    results = {}
    for kind in OPTIMIZERS:
        model, optimizer = build(kind)
        results["untrained"] = tensors(model, optimizer)
        state = load_model(folder / kind, model, optimizer)
        assert state["seen"] == [1, 2]
        results[kind] = tensors(model, optimizer)
        step = state["step"] + 1
        save_model(folder / kind, step, model, optimizer, {"seen": [1, 2]})
        train(model, optimizer, range(3, 5))
        results[f"{kind} trained on"] = tensors(model, optimizer)
        # what was saved is not what was trained on
        assert load_model(folder / kind, model, optimizer)["step"] == step
        for name, value in tensors(model, optimizer).items():
            assert torch.equal(value, results[kind][name])
    return results


def whole(results: list[dict[str, dict[str, Tensor]]], kind: str) -> dict[str, Tensor]:
    """Return all ranks' tensors together: the head's rows concatenated, the rest as it is."""
    together = {}
    for name in results[0][kind]:
        parts = [result[kind][name] for result in results]
        if name.startswith("head.") and parts[0].dim():
            together[name] = torch.cat(parts)
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), name
            together[name] = parts[0]
    return together


@pytest.mark.slow
def test_any_number_of_ranks_goes_on(tmp_path):
    folder = tmp_path / "run"
    runs = []
    for at, ranks in enumerate((4, 2, 3)):
        path = tmp_path / str(at)
        path.mkdir()
        runs.append(on_ranks(ranks, partial(begin if at == 0 else go_on, folder), path))
    for kind in OPTIMIZERS:
        first, initial = whole(runs[0], kind), whole(runs[0], "untrained")
        assert not torch.equal(first["head.weight"], initial["head.weight"])
        for run in runs[1:]:
            assert torch.equal(whole(run, "untrained")["head.weight"], initial["head.weight"])
            resumed = whole(run, kind)
            assert resumed.keys() == first.keys()
            for name, value in resumed.items():
                assert value.dtype == first[name].dtype
                assert torch.equal(value, first[name]), (kind, name)
        # and what follows is the same, though sums have another order
        two, three = (whole(run, f"{kind} trained on") for run in runs[1:])
        for name, value in two.items():
            torch.testing.assert_close(value, three[name], rtol=1e-4, atol=1e-5)
    assert [p.name for p in checkpoint.checkpoints(folder / "sgd")] == [
        "step-00000004",
        "step-00000005",
    ]


def gradients(rank: int, ranks: int) -> list[Tensor]:
    model, _ = build("sgd")
    backbone = nn.parallel.DistributedDataParallel(model["backbone"])
    images, target = batch(0)
    rows = slice(0, 9) if rank == 0 else slice(9, N)  # batches of different sizes
    model["head"](backbone(images[rows]), target[rows]).backward()
    head = ShardedMarginHead(D, C, averaged=False, classes=[36, 1])
    embeddings = model["backbone"](images[rows]).detach().requires_grad_()
    head(embeddings, target[rows]).backward()
    mistaken(rank)
    return [model["head"].weight.detach(), *(p.grad for p in (*model.parameters(), embeddings))]


def test_gradients_under_ddp_are_those_of_one_process(tmp_path):
    results = on_ranks(2, gradients, tmp_path)
    torch.manual_seed(0)
    backbone = nn.Linear(5, D, bias=False)
    centers = nn.Parameter(torch.cat([result[0] for result in results]))
    images, target = batch(0)
    embeddings = backbone(images)
    embeddings.retain_grad()
    sk.margin_cross_entropy(embeddings, centers, target, sk.CosFace(16.0)).backward()
    for result in results:
        torch.testing.assert_close(result[1], backbone.weight.grad)
    torch.testing.assert_close(torch.cat([r[2] for r in results]), centers.grad)
    plain = embeddings.detach().requires_grad_()
    sk.margin_cross_entropy(plain, centers.detach(), target).backward()
    torch.testing.assert_close(torch.cat([r[3] for r in results]), plain.grad)


def dies_in_a_save(folder: Path, path: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=10),
    )
    model, optimizer = build("sgd")
    train(model, optimizer, range(2))
    save_model(folder, 2, model, optimizer, {})
    train(model, optimizer, range(2, 3))
    if rank == 1:
        write = storage._Writer.write_data

        def killed(self, plan, planner):
            write(self, plan, planner).wait()
            os.kill(os.getpid(), signal.SIGKILL)

        storage._Writer.write_data = killed
    try:
        save_model(folder, 3, model, optimizer, {})
    except Exception:
        os._exit(3)


@pytest.mark.slow
def test_an_interrupted_save_leaves_the_last_checkpoint_whole(tmp_path):
    folder, path = tmp_path / "run", str(tmp_path / "killed")
    server = start_server()
    processes = [server.Process(target=dies_in_a_save, args=(folder, path, r)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [3, -signal.SIGKILL]
    assert (folder / ".step-00000003.part").exists()
    path = tmp_path / "again"
    path.mkdir()
    for resumed, never_killed in on_ranks(2, partial(resume, folder), path):
        for name, value in never_killed.items():
            assert torch.equal(resumed[name], value), name
    on_ranks(1, partial(damaged, folder / "step-00000002"), tmp_path)


def resume(folder: Path, rank: int, ranks: int) -> list[dict[str, Tensor]]:
    model, optimizer = build("sgd")
    assert load_model(folder, model, optimizer)["step"] == 2
    save_model(folder, 3, model, optimizer, {})  # over what is left of the one that failed
    assert load_model(folder, model, optimizer)["step"] == 3
    train(model, optimizer, range(2, 5))
    another = build("sgd")
    train(*another, range(5))
    results = [tensors(model, optimizer), tensors(*another)]
    if rank == 1:
        model["backbone"] = nn.Linear(4, D)
    with pytest.raises(CheckpointError, match=r"rank 1: .* is of another model"):
        load_model(folder, model)
    return results


def damaged(found: Path, rank: int, ranks: int) -> None:
    """Checkpoints that are not what was written, or not of this model."""
    model, optimizer = build("sgd")

    def refuses(message: str, model: nn.Module = model, optimizer=optimizer) -> None:
        with pytest.raises(CheckpointError, match=message):
            load_model(found, model, optimizer)

    other = nn.ModuleDict({"backbone": nn.Linear(5, D), "head": ShardedMarginHead(D, C)})
    refuses("of another model: model.backbone.bias is missing", other, None)
    other = nn.ModuleDict({"backbone": nn.Linear(5, D, bias=False)})
    other["head"] = ShardedMarginHead(D, C + 1)
    refuses(r"model.head.weight: expected shape \(38, 8\), got \(37, 8\)", other, None)
    head = torch.optim.SGD(model["head"].parameters(), 0.1)
    refuses("of another optimizer: optimizer.backbone.weight", model, head)

    file = next(iter(sorted(found.glob("*.safetensors"))))
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    refuses(rf"{file.name} is missing, cut short or .*: expected size \d+, got \d+;")
    file.write_bytes(b"\xff" * len(good))
    refuses(f"{file.name} is damaged: its CRC-32 is")
    file.unlink()
    refuses(rf"{file.name} is missing, .*: expected size \d+, got no file")
    other_file = file.with_name("tensors.safetensors")
    file.write_bytes(good)
    other_file.write_bytes(good)
    refuses(f"{other_file.name} is missing, cut short or not of this .*: expected size no file")
    other_file.unlink()
    file.write_bytes(good)
    state = found / checkpoint.STATE
    good_state = state.read_text()
    for bad, message in (
        ("{", "is not whole JSON"),
        ("[]", "expected format 3 or .*sharded-1 or 1, got 'list'"),
        (json.dumps({"format": 4}), "expected format 3 or .*sharded-1 or 1, got 4"),
        (json.dumps({"format": "sharded-1", "step": "3"}), "step must be int"),
        (json.dumps({"format": 3, "step": 3}), "its content has the checksum"),
        (json.dumps({"format": "sharded-2", "step": 3}), "its content has the checksum"),
        (json.dumps({"format": 2, "step": 3}), "its content has the checksum"),
    ):
        state.write_text(bad)
        refuses(message)
    state.write_text(good_state)
    load_model(found, model, optimizer)


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_model(tmp_path, nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["plain", "sharded"])
@pytest.mark.parametrize("name", ["checksum", "crc32", "step", "format"])
def test_names_of_a_checkpoint_itself_are_refused(tmp_path, kind, name):
    state = {"config": {}, name: 3}
    arguments = ({},) if kind == "plain" else (nn.Linear(2, 2), None)
    save = checkpoint.save if kind == "plain" else save_model
    with pytest.raises(ValueError, match=f"state must not hold {name}, which every checkpoint"):
        save(tmp_path, 1, *arguments, state)
    assert not list(tmp_path.iterdir())


def test_a_file_that_no_rank_has_seen_is_no_success(tmp_path, monkeypatch):
    """A save fails where a rank's view of the folder is stale."""
    model = nn.Linear(2, 2)
    save_model(tmp_path, 1, model, None, {})
    with monkeypatch.context() as patched:
        patched.setattr(storage, "share", lambda group: slice(0))
        with pytest.raises(RuntimeError, match=r"ranks see different files \(.*safetensors\): all"):
            save_model(tmp_path, 2, model, None, {})
    assert load_model(tmp_path, model)["step"] == 1


@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_some_rows_are_read(tmp_path, kind):
    tensors = {"model.a": torch.randn(7, 3), "model.b": torch.tensor(4)}
    if kind == "plain":
        found = checkpoint.save(tmp_path, 1, tensors, {"config": {}, "data": {}})
    else:
        model = nn.Module()
        for name, value in tensors.items():
            model.register_buffer(name.removeprefix("model."), value)
        found = save_model(tmp_path, 1, model, None, {})
    asked = []

    def wanted(shapes):
        asked.append(shapes)
        return {"model.a": slice(2, 5), "model.b": None}

    came, state = checkpoint.load(found, wanted)
    assert asked == [{"model.a": (7, 3), "model.b": ()}]
    assert came.keys() == tensors.keys()
    assert torch.equal(came["model.a"], tensors["model.a"][2:5])
    assert torch.equal(came["model.b"], tensors["model.b"])
    assert state["step"] == 1


def test_head_needs_a_group():
    with pytest.raises((TypeError, ValueError), match="group"):
        ShardedMarginHead(D, C)


def mistaken(rank: int) -> None:
    for wrong, message in (
        ({"classes": [37, 0]}, "classes must be 2 numbers, one for each rank, at least 1, 37"),
        ({"classes": [20, 18]}, "37 together"),
        ({"classes": [37]}, "classes must be 2 numbers"),
        ({"num_classes": 0}, "num_classes must be"),
        ({"num_classes": 1}, "classes must be 2 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            ShardedMarginHead(**({"embedding_size": D, "num_classes": C} | wrong))
    with pytest.raises(TypeError, match=r"group must be a .* process group"):
        ShardedMarginHead(D, C, group=3)
    assert ("classes=[0, 19)", "classes=[19, 37)")[rank] in repr(ShardedMarginHead(D, C))
    big = ShardedMarginHead(2, 20000).weight  # in several blocks
    assert abs(float(big.std()) - 0.01) < 1e-3
    assert len(big.unique(dim=0)) == 10000
