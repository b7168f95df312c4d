"""Checkpoints of earlier formats resume bitwise; any number of ranks goes on from either."""

import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from synface import checkpoint
from synface.common.files import CHECKSUM, CheckpointError, checksum, sealed
from synface.data import embedded_faces
from synface.heads import MarginHead, ShardedMarginHead
from synface.recipes.loop import run_steps
from synface.training.loop import TrainConfig, train
from torch import nn

from tests.helpers.ranks import on_ranks

SMALL = TrainConfig(3, 12, widths=(4, 8), depths=(1, 1), embedding_size=16, checkpoint_every=1)
OPTIONS = {
    "sgd": {},
    "adamw": {"optimizer": "adamw", "lr": 0.01},
    "rows": {"fused_update": True},
    "sampled": {"optimizer": "adamw", "lr": 0.01, "sample_rate": 0.5},
}


def people():
    return embedded_faces(3, 16, identities=6)


def write_earlier(found, form, rename):
    """Rewrite a checkpoint as version 0.1 laid it out, with other names of its tensors."""
    state = json.loads((found / checkpoint.STATE).read_text())
    files = sorted(found.glob("*.safetensors"))
    for name in ("format", "bytes", "crc32", CHECKSUM):
        del state[name]
    for rank, file in enumerate(files, 1):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = {rename(key): value for key, value in load_file(file).items()}
        file.unlink()
        if form in (1, 2):
            save_file(tensors, found / "tensors.safetensors")
        else:
            name = f"shard-{rank:05d}-model-00001-of-00001.safetensors"
            save_file(tensors, found / name, metadata)
    files = sorted(found.glob("*.safetensors"))
    sizes = {file.name: file.stat().st_size for file in files}
    size = {"tensor_bytes": sizes["tensors.safetensors"]} if form in (1, 2) else {"bytes": sizes}
    state = {"format": form, "step": state.pop("step")} | size | state
    if form in (1, "sharded-1"):
        text = json.dumps(state, indent=1)
    else:
        text = sealed(state | {"crc32": {file.name: checksum(file) for file in files}})
    (found / checkpoint.STATE).write_text(text)


def by_index(*optimizers):
    """Return the renaming of states to OPTIMIZER.INDEX.STATE, of optimizers' parameters' names."""
    states = {
        parameter: f"{prefix}.{index}"
        for prefix, parameters in optimizers
        for index, parameter in enumerate(parameters)
    }

    def rename(key):
        kind, _, name = key.partition(".")
        parameter, _, state = name.rpartition(".")
        return f"{states[parameter]}.{state}" if kind == "optimizer" else key

    return rename


def learned(run):
    """Return the names of the parameters that the backbone's optimizer has, in its order."""
    parameters = run.backbone.named_parameters()
    return [f"backbone.{name}" for name, each in parameters if each.requires_grad]


def result(trained):
    return {**trained.backbone.state_dict(), "centers": trained.head.weight.detach()}


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("form", [1, 2])
def test_runs_of_one_process_resume(tmp_path, kind, form):
    config = replace(SMALL, **OPTIONS[kind])
    begun = train(config, people(), tmp_path / "a", stop_after=3)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    found = checkpoint.find(tmp_path / "a")
    rename = by_index(("optimizer", learned(begun)), ("centers", ["head.weight"]))
    write_earlier(found, form, rename)
    keys = load_file(found / "tensors.safetensors").keys()
    state = "exp_avg" if config.optimizer == "adamw" else "momentum_buffer"
    assert {"model.head.weight", f"optimizer.0.{state}", f"centers.0.{state}"} <= keys
    assert not any(key.startswith("optimizer.backbone") for key in keys)
    resumed, expected = (
        train(config, people(), tmp_path / name, resume=True) for name in ("a", "b")
    )
    assert_same(result(resumed), result(expected))
    assert resumed.history == expected.history
    newest = [checkpoint.load(checkpoint.find(tmp_path / name))[0] for name in ("a", "b")]
    assert_same(*newest)  # the optimizers' states, too


def test_states_of_another_optimizer_are_refused(tmp_path):
    begun = train(SMALL, people(), tmp_path, stop_after=3)
    found = checkpoint.find(tmp_path)
    turned = by_index(("optimizer", learned(begun)[::-1]), ("centers", ["head.weight"]))
    write_earlier(found, 2, turned)
    with pytest.raises(CheckpointError, match=r"optimizer\.backbone\..* must be of shape"):
        train(SMALL, people(), tmp_path, resume=True)


@pytest.mark.parametrize("form", [1, 2])
def test_runs_of_recipes_resume(tmp_path, form):
    def steps(folder, checkpoint_every=100, **options):
        torch.manual_seed(0)
        modules = {"generator": nn.Linear(4, 3), "critic": nn.Linear(3, 1)}
        optimizers = {name: torch.optim.Adam(each.parameters()) for name, each in modules.items()}

        def step(number):
            random = torch.Generator().manual_seed(number)
            judged = modules["critic"](modules["generator"](torch.randn(5, 4, generator=random)))
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            judged.square().sum().backward()
            for optimizer in optimizers.values():
                optimizer.step()
            return {"loss": judged.sum().item()}

        description = {"config": {"lr": 1}, "data": {}}
        stage = SimpleNamespace(steps=6, checkpoint_every=checkpoint_every)
        run_steps(folder, description, modules, optimizers, step, stage, **options)
        return {k: v for each in modules.values() for k, v in each.state_dict().items()}

    expected = steps(tmp_path / "whole")
    steps(tmp_path / "cut", checkpoint_every=1, stop_after=2)
    rename = by_index(
        ("optimizer.generator", ["generator.weight", "generator.bias"]),
        ("optimizer.critic", ["critic.weight", "critic.bias"]),
    )
    found = checkpoint.find(tmp_path / "cut")
    write_earlier(found, form, lambda key: rename(key).removeprefix("model."))
    keys = load_file(found / "tensors.safetensors").keys()
    assert {"generator.weight", "optimizer.critic.1.exp_avg_sq"} <= keys
    assert_same(steps(tmp_path / "cut", resume=True), expected)


def trained(folder, options, rank, ranks):
    run = train(replace(SMALL, batch_size=12), people(), folder, **options)
    return result(run)


@pytest.mark.parametrize("form", ["sharded-1", "sharded-2"])
@pytest.mark.slow
def test_runs_of_several_ranks_resume(tmp_path, form):
    on_ranks(2, partial(trained, tmp_path / "a", {"stop_after": 3}), tmp_path / "begun")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write_earlier(checkpoint.find(tmp_path / "a"), form, str)
    runs = [
        on_ranks(2, partial(trained, tmp_path / name, {"resume": True}), tmp_path / f"on {name}")
        for name in ("a", "b")
    ]
    for resumed, expected in zip(*runs, strict=True):
        assert_same(resumed, expected)


def built(sharded):
    torch.manual_seed(0)
    head = ShardedMarginHead(8, 7) if sharded else MarginHead(8, 7)
    model = nn.ModuleDict({"backbone": nn.Linear(5, 8), "head": head})
    return model, torch.optim.AdamW(model.parameters())


def loaded(folder, rank, ranks):
    model, optimizer = built(True)
    assert checkpoint.load_model(folder / "one", model, optimizer)["step"] == 1
    checkpoint.save_model(folder / "several", 1, model, optimizer, {})
    states = {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()}
    return model["head"].weight.detach(), states["head.weight"], states["backbone.weight"]


def test_one_process_and_several_ranks_resume_each_others(tmp_path):
    model, optimizer = built(False)
    loss = model["head"](model["backbone"](torch.randn(4, 5)), torch.tensor([0, 2, 4, 6]))
    loss.backward()
    optimizer.step()
    checkpoint.save_model(tmp_path / "one", 1, model, optimizer, {})
    rows, states, rest = zip(*on_ranks(2, partial(loaded, tmp_path), tmp_path / "2"), strict=True)
    moment = {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()}
    assert torch.equal(torch.cat(rows), model["head"].weight)
    assert torch.equal(torch.cat(states), moment["head.weight"])
    assert all(torch.equal(each, moment["backbone.weight"]) for each in rest)
    again, other = built(False)
    checkpoint.load_model(tmp_path / "several", again, other)
    found = checkpoint.save_model(tmp_path / "again", 1, again, other, {})
    for file in found.iterdir():  # equal states are equal files
        assert file.read_bytes() == (tmp_path / "one" / found.name / file.name).read_bytes()
    assert_same(again.state_dict(), model.state_dict())
    one, two = optimizer.state_dict()["state"], other.state_dict()["state"]
    for index, values in one.items():
        assert_same(values, two[index])
