"""torch.library.opcheck over every op: schema, fake kernel, autograd registration, AOT dispatch."""

import math

import pytest
import torch
from torch.library import opcheck

import synface_kernels  # noqa: F401  (registers the ops)

ops = torch.ops.synface_kernels


DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def margin_samples(dtype):
    """Return arguments of the core's forward pass.

    Class ids, sub-centers, a limit and sums occur once each; no workspace, one that is too small
    for all cosines, and enough; a limit that leaves no negatives.
    """
    labels = torch.tensor([[0, 1], [8, -1], [-1, -1], [3, 4], [5, 0], [7, 2]])
    some = torch.tensor([0, 2, 3, 4, 5, 6, 7, 8])
    x = torch.randn(6, 8, dtype=dtype, requires_grad=True)
    w = torch.randn(9, 8, dtype=dtype, requires_grad=True)
    m = torch.randn(9, 2, 8, dtype=dtype, requires_grad=True)
    return {
        "plain": (x, w, None, labels, 64.0, math.inf, True, False, 0, False, "cpu"),
        "class ids": (
            x.detach(), w, some, labels[:, :1] % 8, 32.0, 0.3, False, False, 300, True, "cpu",
        ),
        "sums": (x, w, None, labels, 64.0, math.inf, True, True, 10**6, True, "cpu"),
        "sub-centers": (x, m, some, labels % 8, 64.0, 0.3, True, False, 300, True, "cpu"),
        "no negatives": (x, m, some, labels % 8, 64.0, -1.1, True, False, 300, True, "cpu"),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", margin_samples(torch.float32))
def test_margin_cross_entropy(name, dtype):
    sample = margin_samples(dtype)[name]
    opcheck(ops.margin_cross_entropy_forward.default, sample)
    sample = tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in sample)
    x, w, class_ids, labels, scale, limit, needs_input_grad, *_, impl = sample
    lse, _, cosine, _, cosine_sum, *saved = ops.margin_cross_entropy_forward(*sample)
    opcheck(
        ops.margin_cross_entropy_backward.default,
        (
            x, w, class_ids, labels, lse, *saved, torch.ones_like(lse), cosine, cosine_sum,
            scale, limit, needs_input_grad, True, False, impl,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", margin_samples(torch.float32))
def test_margin_cross_entropy_in_the_memory_of_the_gradient(name, dtype):
    sample = [v.detach() if isinstance(v, torch.Tensor) else v for v in margin_samples(dtype)[name]]
    sample[8] = -1  # the workspace
    # A part of that memory is not written, so that two results differ.
    without_values = ("test_schema", "test_faketensor")
    opcheck(ops.margin_cross_entropy_forward.default, tuple(sample), test_utils=without_values)
    x, w, class_ids, labels, scale, limit, needs_input_grad, *_, impl = sample
    lse, _, cosine, _, cosine_sum, *saved = ops.margin_cross_entropy_forward(*sample)
    opcheck(
        ops.margin_cross_entropy_backward_over.default,
        (
            x, w, class_ids, labels, lse, *saved, torch.ones_like(lse), cosine, cosine_sum,
            scale, limit, needs_input_grad, False, impl,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
def test_margin_cross_entropy_targets(weighted):
    target = torch.tensor([[0, 1], [2, 2], [-100, -100]])
    weight = torch.tensor([[0.5, 0.5], [0.1, 0.9], [0, 0]]) if weighted else None
    margins = (None, torch.tensor([0.5, 0.1, 99.0]), None)  # the last row is ignored
    sample = (target if weighted else target[:, 0], weight, None, 3, -100, *margins)
    opcheck(ops.margin_cross_entropy_targets.default, sample)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("others", [None, "both", "others alone"])
def test_hypersphere_repulsion(others, dtype):
    n, m = (130, 129) if dtype == torch.bfloat16 else (6, 5)  # enough pairs for bfloat16 GEMMs
    x = torch.randn(n, 8, dtype=dtype, requires_grad=others != "others alone")
    y = None if others is None else torch.randn(m, 8, dtype=dtype, requires_grad=True)
    needs = (x.requires_grad, y is not None and y.requires_grad)
    for kind, a in (("log_sum_exp", 10.0), ("riesz", 1.0), ("log", 0.0), ("hinge", 0.1)):
        opcheck(ops.hypersphere_repulsion_pairs.default, (x, y, kind, a, 2, 1e-6, *needs, "cpu"))
    if x.dtype == torch.float32:
        split = (x, y, "riesz", 1.0, 0, 1e-6, *needs, "cpu", True)
        opcheck(ops.hypersphere_repulsion_pairs.default, split)
    opcheck(ops.hypersphere_repulsion_nearest.default, (x, y, 3, "cpu"))
    x, y = (None if v is None else v.detach() for v in (x, y))
    square, index = ops.hypersphere_repulsion_nearest(x, y, 3, "cpu")
    opcheck(
        ops.hypersphere_repulsion_nearest_backward.default,
        (x, y, index, square, 1e-6, True, y is not None, "cpu"),
    )
    opcheck(ops.hypersphere_repulsion_check.default, (x, "x"))
