"""Heads that step in the backward pass give the bits of the optimizer's step after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from synface.heads import AdaFace, MagFace, MarginHead, PartialFC
from synface.optim.rows import RowAdamW, RowSGD
from torch import Tensor

import synface_kernels as sk

D, C = 8, 60
HEADS: dict[str, Callable[[], Any]] = {
    "margin": lambda: MarginHead(D, C),
    "workspace": lambda: MarginHead(D, C, workspace=10**6),
    "bfloat16": lambda: MarginHead(D, C, dtype=torch.bfloat16),
    "sub-centers": lambda: MarginHead(D, C, sub_centers=3),
    "adaface": lambda: AdaFace(D, C),
    "magface": lambda: MagFace(D, C),
    "partial": lambda: PartialFC(sk.ArcFace(), D, C, sample_rate=0.3),
}
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: RowSGD(p, 0.1, momentum=0.9, weight_decay=1e-2, nesterov=True, seed=3),
    "plain": lambda p: RowSGD(p, 0.1, catch_up=False),
    "adamw": lambda p: RowAdamW(p, 1e-2, seed=3, state_dtype=torch.bfloat16),
}


def build(name: str, optimizer: str, fused: bool) -> tuple[Any, Any]:
    torch.manual_seed(0)
    head = HEADS[name]()
    steps = OPTIMIZERS[optimizer](head.parameters())
    if fused:
        head.step_in_backward(steps)
    return head, steps


def train(head: Any, optimizer: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)  # draws a partial head's classes too
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        x = torch.randn(12, D, requires_grad=True)
        loss = head(x, torch.randint(0, C, (12,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert x.grad is not None
        losses += [loss.item(), x.grad.double().sum().item()]
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", HEADS)
def test_fused_and_apart_are_the_same(name: str, optimizer: str) -> None:
    apart, fused = build(name, optimizer, False), build(name, optimizer, True)
    assert train(*apart, range(5)) == train(*fused, range(5))
    assert fused[0].weight.grad is None
    assert torch.equal(apart[0].weight, fused[0].weight)
    states = [optimizer.state_dict()["state"][0] for _, optimizer in (apart, fused)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    for _, optimizer in (apart, fused):
        optimizer.catch_up()
    assert torch.equal(apart[0].weight, fused[0].weight)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_dicts_go_on_bitwise(optimizer: str) -> None:
    whole = build("partial", optimizer, True)
    train(*whole, range(6))
    first, second = (build("partial", optimizer, True) for _ in range(2))
    train(*first, range(3))
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    train(*second, range(3, 6))
    assert torch.equal(whole[0].weight, second[0].weight)


def test_no_step_but_in_training() -> None:
    head, optimizer = build("margin", "sgd", True)
    x, target = torch.randn(4, D, requires_grad=True), torch.arange(4)
    before = head.weight.clone()
    head(x, target, update=None).backward()
    head.eval()
    head(x, target).backward()  # a gradient of the embeddings alone
    head.train()
    with torch.no_grad():
        head(x, target)
    assert torch.equal(head.weight, before)
    assert not optimizer.state
    head(x, target).backward()
    assert not torch.equal(head.weight, before)
    assert int(optimizer.state[head.weight]["step"]) == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", HEADS)
def test_a_pass_that_raises_is_no_step(name: str, optimizer: str) -> None:
    expected, found = (build(name, optimizer, True) for _ in range(2))
    for head, steps in (expected, found):
        train(head, steps, range(2))
        if head is found[0]:
            before = {k: v.clone() for k, v in steps.state_dict()["state"][0].items()}
            for labels, options, message in (
                (torch.full((12,), C), {}, "target must be in"),
                (torch.zeros(12, dtype=torch.long), {"reduction": "max"}, "reduction must be"),
                (torch.zeros(12), {}, "target must be int64"),
            ):
                with pytest.raises(ValueError, match=message):
                    head(torch.randn(12, D), labels, **options)
            for key, value in before.items():
                assert torch.equal(value, steps.state_dict()["state"][0][key]), key
        train(head, steps, range(2, 4))
    for key, value in expected[0].state_dict().items():
        assert torch.equal(value, found[0].state_dict()[key]), key
    assert int(found[1].state_dict()["state"][0]["step"]) == 4


def test_a_pass_in_several_processes_without_shards_is_no_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head, optimizer = build("margin", "sgd", True)
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(ValueError, match="shard them"):
        head(torch.randn(4, D), torch.arange(4))
    assert int(optimizer.state[head.weight]["step"]) == 0


def test_what_cannot_be_fused() -> None:
    head, other = MarginHead(D, C), MarginHead(D, C)
    with pytest.raises(TypeError, match="RowSGD or RowAdamW, got SGD"):
        head.step_in_backward(torch.optim.SGD(head.parameters(), 0.1))  # type: ignore[arg-type]
    optimizer = RowSGD(other.parameters(), 0.1)
    with pytest.raises(ValueError, match="must hold this head's weight"):
        head.step_in_backward(optimizer)
    assert head.weight.requires_grad
    stranger: Tensor = head.weight
    with pytest.raises(ValueError, match="parameter must be one of this optimizer's"):
        optimizer.next_update(stranger)


def test_the_old_name_warns() -> None:
    head = MarginHead(D, C)
    optimizer = RowSGD(head.parameters(), 0.1)
    with pytest.deprecated_call(match="fuse is deprecated: use step_in_backward"):
        head.fuse(optimizer)
    assert head._optimizer is optimizer
