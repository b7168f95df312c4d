"""Benchmark of row updates against torch's indexing, also inside the margin softmax's backward.

`python -m benchmarks.bench_row_update` interleaves the steps and prints medians and ratios.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor

import synface_kernels as sk
from synface_kernels.testing import peak_bytes

from . import table, verify
from .interleave import medians
from .peers import SGD, indexed_adamw, indexed_sgd

OP = "row_update"


def rows(classes: int, touched: int, dim: int, rounds: int) -> str:
    """Return a table of steps on some rows, by optimizer and dtype."""
    rng = torch.Generator().manual_seed(0)
    ids, _ = sk.sample_classes(torch.empty(0, dtype=torch.int64), classes, touched, rng)
    lines: list[list[str]] = []
    for dtype in (torch.float32, torch.bfloat16):
        weight, buffer, square = (
            torch.randn(classes, dim, generator=rng, dtype=dtype) for _ in range(3)
        )
        square.abs_()
        grad = torch.randn(touched, dim, generator=rng, dtype=dtype)
        ours = partial(sk.row_sgd_, weight, grad, ids, momentum_buffer=buffer, **SGD)
        adamw = partial(sk.row_adamw_, weight, grad, ids, buffer, square, 10)
        kinds = {
            "row_sgd_, momentum": (
                ours,
                partial(ours, step=1, seed=0),
                partial(indexed_sgd, weight, grad, ids, buffer),
            ),
            "row_adamw_": (
                adamw,
                partial(adamw, seed=0),
                partial(indexed_adamw, weight, grad, ids, buffer, square, 10),
            ),
        }
        for name, steps in kinds.items():
            labels = ("ours", "ours, random rounding", "index, compute, index_copy_")
            cells = medians(dict(zip(labels, steps, strict=True)), rounds)
            lines = lines or [["step", "dtype", *cells]]
            kind = str(dtype).removeprefix("torch.")
            lines.append([name, kind, *cells.values()])
    return table.markdown(lines)


def catching_up(touched: int, dim: int, rounds: int) -> str:
    """Return a table of steps on rows that missed many steps."""
    ids, lines = torch.arange(touched), [["missed", "row_sgd_", "row_adamw_"]]
    weight, buffer, square, grad = (torch.ones(touched, dim) for _ in range(4))
    last = torch.zeros(touched, dtype=torch.int64)
    for missed in (0, 10, 100, 1000):
        step: dict[str, Any] = {"step": missed + 1, "last_step": last}

        def sgd(step: dict[str, Any] = step) -> None:
            last.zero_()
            sk.row_sgd_(weight, grad, ids, momentum_buffer=buffer, **SGD, **step)

        def adamw(step: dict[str, Any] = step) -> None:
            last.zero_()
            sk.row_adamw_(weight, grad, ids, buffer, square, **step)

        lines.append([f"{missed:,}", *medians({"sgd": sgd}, rounds).values(),
                      *medians({"adamw": adamw}, rounds).values()])  # fmt: skip
    return table.markdown(lines)


def after_backward(x: Tensor, weight: Tensor, target: Tensor, **rule: Any) -> None:
    """Take a training step with a dense gradient of the centers, then `row_sgd_`."""
    leaf = weight.detach().requires_grad_()
    sk.margin_cross_entropy(x, leaf, target).backward()
    assert leaf.grad is not None
    sk.row_sgd_(weight, leaf.grad, torch.arange(len(weight)), **rule)
    x.grad = None


def in_backward(x: Tensor, weight: Tensor, target: Tensor, **rule: Any) -> None:
    """Take a training step that updates the centers inside the backward pass."""
    sk.margin_cross_entropy(x, weight, target, update=sk.SGDUpdate(**rule)).backward()
    x.grad = None


def steps_of_training(classes: int, batch: int, dim: int, rounds: int) -> str:
    """Return a table of margin softmax steps with SGD with momentum on all of its centers."""
    rng = torch.Generator().manual_seed(0)
    embeddings = torch.randn(batch, dim, generator=rng)
    target = torch.randint(0, classes, (batch,), generator=rng)
    lines = [["step", "dtype", "time", "peak extra memory"]]
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(classes, dim, generator=rng, dtype=dtype)
        tensors = (embeddings.to(dtype).requires_grad_(), weight, target)
        rule = SGD | {"momentum_buffer": torch.zeros_like(weight), "step": 1, "seed": 0}
        steps = {
            "update=": partial(in_backward, *tensors, **rule),
            "backward, row_sgd_": partial(after_backward, *tensors, **rule),
        }
        for (name, step), cell in zip(steps.items(), medians(steps, rounds).values(), strict=True):
            memory = f"{peak_bytes(step) / 2**20:,.0f} MiB"
            lines.append([name, str(dtype).removeprefix("torch."), cell, memory])
    return table.markdown(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=400_000)
    parser.add_argument("--touched", type=int, default=40_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    verify.require(OP)
    print(rows(args.classes, args.touched, args.dim, args.rounds))
    print(catching_up(args.touched // 10, args.dim, args.rounds))
    print(steps_of_training(args.classes // 2, 512, args.dim, args.rounds))
