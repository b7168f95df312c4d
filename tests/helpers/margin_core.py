"""The core of the margin softmax, its launchers in Triton's interpreter, and its definition."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import synface_kernels as sk
from synface_kernels.ops.margin_cross_entropy import launch_triton
from synface_kernels.ops.margin_cross_entropy.interface import BackwardInputs, ForwardInputs
from synface_kernels.testing import assert_as_exact_as_torch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Core(NamedTuple):
    """The results of forward and backward without filter and sums."""

    negative_lse: Tensor
    negative_max: Tensor
    target_cosine: Tensor
    grad_input: Tensor
    grad_weight: Tensor


class Case(NamedTuple):
    """Arguments of forward and backward, with the gradients by forward's results."""

    input: Tensor
    weight: Tensor
    labels: Tensor
    grad_lse: Tensor
    grad_cosine: Tensor
    scale: float


def make_case(
    n: int, c: int, d: int, k: int, scale: float = 64.0, dtypes: tuple = (F32, F32), seed: int = 0
) -> Case:
    """Make random rows and labels; with enough rows, some are ignored, absent or zero."""
    rng = torch.Generator().manual_seed(seed)
    input = torch.randn(n, d, generator=rng)
    weight = torch.randn(c, d, generator=rng)
    labels = torch.stack([torch.randperm(c, generator=rng)[:k] for _ in range(n)])
    if n > 3:
        labels[1] = -1
        labels[2, 1:] = -1
        input[3] = 0
    if c > 3:
        weight[3] = 0
    grad_lse, grad_cosine = torch.randn(n, generator=rng), torch.randn(n, k, generator=rng)
    return Case(input.to(dtypes[0]), weight.to(dtypes[1]), labels, grad_lse, grad_cosine, scale)


def dense(case: Case, dtype: torch.dtype) -> Core:
    """Compute the core by its definition, all N×C logits in plain torch of one dtype."""
    x, w = case.input.to(dtype), case.weight.to(dtype)
    present, scale = case.labels >= 0, case.scale

    def unit(rows: Tensor) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        r = torch.where(norm <= 1e-12, 0, 1 / norm)
        return rows * r, r

    def tangent(u: Tensor, r: Tensor, v: Tensor) -> Tensor:
        return r * (v - (u * v).sum(1, keepdim=True) * u)

    (x, r_i), (w, r_j) = unit(x), unit(w)
    counted = (case.labels != -1).any(1)
    x, r_i = torch.where(counted[:, None], x, 0), torch.where(counted[:, None], r_i, 0)
    cosine = x @ w.T
    one_hot = torch.zeros(*case.labels.shape, w.shape[0] + 1, dtype=dtype)
    column = torch.where(present, case.labels, w.shape[0])
    one_hot = one_hot.scatter_(2, column[:, :, None], 1)[:, :, :-1]
    negative = (one_hot.sum(1) == 0) & counted[:, None]
    logits = torch.where(negative, scale * cosine, -math.inf)
    lse = logits.logsumexp(1)
    share = torch.where(negative & lse.isfinite()[:, None], (logits - lse[:, None]).exp(), 0)
    target = (one_hot * cosine[:, None, :]).sum(2)
    g = case.grad_lse.to(dtype)[:, None] * scale * share
    g = g + (one_hot * case.grad_cosine.to(dtype)[:, :, None]).sum(1)
    return Core(
        torch.where(counted, lse, 0),
        torch.where(counted, torch.where(negative, cosine, -math.inf).amax(1), 0),
        target,
        tangent(x, r_i, g @ w),
        tangent(w, r_j, g.T @ x),
    )


def run(case: Case, class_ids: Tensor | None = None) -> Core:
    """Run both launchers, without filter and sums."""
    outputs = forward(case, class_ids=class_ids)
    return Core(*outputs[:3], *backward(case, outputs, class_ids=class_ids))


class Forward(NamedTuple):
    """The results of forward without filter and sums."""

    negative_lse: Tensor
    negative_max: Tensor
    target_cosine: Tensor
    saved: Tensor


def forward(case: Case, *, class_ids: Tensor | None = None) -> Forward:
    """Run forward's launcher without filter and sums."""
    outputs = launch_triton.forward(
        ForwardInputs(
            input=case.input,
            weight=case.weight,
            class_ids=class_ids,
            labels=case.labels,
            scale=case.scale,
            limit=math.inf,
            needs_input_grad=True,
            needs_cosine_sum=False,
        )
    )
    assert outputs.filtered.numel() == outputs.cosine_sum.numel() == 0
    assert outputs.center_sum.numel() == outputs.mean_center.numel() == 0
    return Forward(*(getattr(outputs, name) for name in Forward._fields))


def backward(
    case: Case,
    outputs: Forward,
    needs_input_grad: bool = True,
    needs_weight_grad: bool = True,
    *,
    limit: float = math.inf,
    class_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run backward's launcher without sums."""
    none = torch.empty(0, dtype=torch.float64)
    return launch_triton.backward(
        BackwardInputs(
            input=case.input,
            weight=case.weight,
            class_ids=class_ids,
            labels=case.labels,
            negative_lse=outputs.negative_lse,
            mean_center=none,
            center_sum=none,
            saved=outputs.saved,
            grad_negative_lse=case.grad_lse,
            grad_target_cosine=case.grad_cosine,
            grad_cosine_sum=none,
            scale=case.scale,
            limit=limit,
            needs_input_grad=needs_input_grad,
        ),
        needs_weight_grad,
    )


def assert_close(name: str, actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Assert an error of at most twice plain torch's largest, plus a few float32 roundings."""
    finite = exact.isfinite()
    assert torch.equal(actual[~finite].double(), exact[~finite]), name
    size = exact[finite].abs().max().item() if finite.any() else 0.0
    few = 8 * torch.finfo(F32).eps * max(1.0, size)
    assert_as_exact_as_torch(actual, exact, plain, atol=few, name=name)


def check(case: Case, actual: Core | None = None) -> Core:
    """Check forward and backward against float64."""
    same = case.input.dtype == case.weight.dtype
    exact = dense(case, torch.float64)
    plain = dense(case, case.input.dtype if same else F32)
    plain = plain._replace(
        grad_input=plain.grad_input.to(case.input.dtype),
        grad_weight=plain.grad_weight.to(case.weight.dtype),
    )
    actual = run(case) if actual is None else actual
    for name in Core._fields:
        assert_close(name, getattr(actual, name), getattr(exact, name), getattr(plain, name))
    assert actual.grad_input.dtype == case.input.dtype
    assert actual.grad_weight.dtype == case.weight.dtype
    return actual


def public(
    case: Case, impl: str, dtype: torch.dtype | None, weights: Tensor | None, **options: Any
) -> tuple[Tensor, ...]:
    """Return losses of all rows, statistics and the gradients of the losses' weighted sum.

    Computed in a dtype, or in the case's own.
    """
    input = case.input.detach().to(dtype, copy=True).requires_grad_()
    weight = case.weight.detach().to(dtype, copy=True).requires_grad_()
    target = torch.where(case.labels >= 0, case.labels, -100)
    target = target if weights is not None else target[:, 0]
    losses, stats = sk.margin_cross_entropy(
        input, weight, target, target_weight=weights, reduction="none", return_stats=True,
        impl=impl, **options,
    )  # fmt: skip
    (losses * case.grad_lse.to(losses.dtype)).sum().backward()
    assert input.grad is not None
    assert weight.grad is not None
    return (
        losses.detach(),
        stats.lse.detach(),
        stats.target_cosine.detach(),
        input.grad,
        weight.grad,
    )


def check_public(case: Case, weights: Tensor | None, plain: Any = None, **options: Any) -> None:
    """Check the public function's Triton kernels against its definition in float64.

    ``plain`` computes the measure of errors: the definition in the case's dtypes, by default.
    """
    plain = plain or (lambda: public(case, "reference", None, weights, **options))
    results = (
        public(case, "triton", None, weights, **options),
        public(case, "reference", torch.float64, weights, **options),
        plain(),
    )
    for i, values in enumerate(zip(*results, strict=True)):
        assert_close(f"output {i}", *(v.to_dense() if v.is_sparse else v for v in values))
