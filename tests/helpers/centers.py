"""Class centers with an optimizer step inside the backward pass, or after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import synface_kernels as sk

F32, F64 = torch.float32, torch.float64

RULES: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1, "weight_decay": 0.01},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "nesterov": True},
    "adamw": {"lr": 0.01, "weight_decay": 0.1},
}
MARGIN = sk.CombinedMargin(16.0, 1.0, 0.3, 0.1)


class Centers:
    """Centers with their optimizer's states, and steps on them."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, rule: str, seed: int | None = None
    ) -> None:
        self.weight = normal(*shape, seed=0).to(dtype)
        self.rule, self.seed = rule, seed
        count = {"plain": 0, "nesterov": 1, "adamw": 2}[rule]
        state_dtype = F64 if dtype == F64 else F32
        self.states = [torch.zeros(shape, dtype=state_dtype) for _ in range(count)]
        self.last_step = torch.zeros(shape[0], dtype=torch.int64)

    def update(self, step: int) -> Any:
        shared = {"step": step, "last_step": self.last_step, "seed": self.seed} | RULES[self.rule]
        if self.rule == "adamw":
            return sk.AdamWUpdate(exp_avg=self.states[0], exp_avg_sq=self.states[1], **shared)
        return sk.SGDUpdate(momentum_buffer=self.states[0] if self.states else None, **shared)

    def fused(self, step: int, x: Tensor, target: Tensor, **options: Any) -> list[Tensor]:
        x = x.clone().requires_grad_()
        loss = sk.margin_cross_entropy(
            x, self.weight, target, MARGIN, update=self.update(step), **options
        )
        (8 * loss).backward()
        assert self.weight.grad is None
        assert x.grad is not None
        return [loss.detach(), x.grad]

    def in_two_steps(self, step: int, x: Tensor, target: Tensor, **options: Any) -> list[Tensor]:
        x, weight = x.clone().requires_grad_(), self.weight.detach().requires_grad_()
        loss = sk.margin_cross_entropy(x, weight, target, MARGIN, **options)
        (8 * loss).backward()
        assert x.grad is not None
        grad = weight.grad
        assert grad is not None
        ids = torch.arange(len(weight))
        if grad.is_sparse:
            ids, grad = grad._indices()[0], grad._values()
        first, *states = (each.detach().flatten(1) for each in (self.weight, *self.states))
        shared = {"last_step": self.last_step, "seed": self.seed} | RULES[self.rule]
        shared["impl"] = options.get("impl", "auto")
        if self.rule == "adamw":
            sk.row_adamw_(first, grad.flatten(1), ids, *states, step, **shared)
        else:
            buffer = states[0] if states else None
            sk.row_sgd_(first, grad.flatten(1), ids, momentum_buffer=buffer, step=step, **shared)
        return [loss.detach(), x.grad]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight, *self.states, self.last_step]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def batch(n: int, c: int, d: int, k: int, seed: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return embeddings, targets of which some are ignored, and their weights."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, c, (n, k), generator=g)
    weight = torch.rand(n, k, generator=g).softmax(1)
    target[1::5] = -100
    x = normal(n, d, seed=seed)
    return (x, target, {"target_weight": weight}) if k > 1 else (x, target[:, 0], {})


def assert_bits(rule: str, dtype: torch.dtype, *, c=700, d=40, m=1, k=1, seed=None, ids=False,
                n=70, input_dtype=None, steps=3, **options: Any) -> None:  # fmt: skip
    """Assert that steps inside the backward pass and after it give the same bits."""
    shape = (c, d) if m == 1 else (c, m, d)
    one, two = (Centers(shape, dtype, rule, seed) for _ in range(2))
    before = one.weight.clone()
    for step in range(1, steps + 1):
        x, target, more = batch(n, c, d, k, step)
        x = x.to(input_dtype or (F64 if dtype == F64 else F32))
        if ids:
            g = torch.Generator().manual_seed(step)
            more["class_ids"], target = sk.sample_classes(target, c, c // 3, g)
        got = one.fused(step, x, target, **more, **options)
        expected = two.in_two_steps(step, x, target, **more, **options)
        for a, b in zip(got + one.tensors, expected + two.tensors, strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(one.weight, before)
