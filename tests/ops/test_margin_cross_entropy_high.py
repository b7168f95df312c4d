"""The margin softmax of float32 matrices under torch's "high" precision: sums of two bfloat16."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import synface_kernels as sk
from synface_kernels import _load
from tests.ops.test_margin_cross_entropy_bf16 import FLOAT32, MARGIN, gradient_bounds, problem

ISAS = _load.cpu_isas()
BF16_ISAS = [isa for isa in ISAS if isa.endswith("bf16")]
SPLIT = 3 * 2.0**-18  # relative error of a product: each factor's second rounding, and low·low


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def run(precision, isa, x, w, target, upstream, dtype=torch.float32, impl="cpu", **options):
    """Return the loss per row and both gradients."""
    torch.set_float32_matmul_precision(precision)
    x, w = (v.to(dtype, copy=True).requires_grad_() for v in (x, w))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SYNFACE_CPU_ISA", isa)
        loss = sk.margin_cross_entropy(x, w, target, MARGIN, reduction="none", impl=impl, **options)
        grads = torch.autograd.grad(loss, (x, w), upstream.to(loss.dtype))
    return loss.detach(), *(grad.to_dense() for grad in grads)


def inputs(n: int, c: int, d: int) -> tuple[Tensor, ...]:
    """Make a problem of float32 numbers that are not bfloat16."""
    x, w, *rest = problem(n, c, d)
    g = torch.Generator().manual_seed(1)
    x, w = (v.float() * (1 + 0.01 * torch.rand(v.shape, generator=g)) for v in (x, w))
    return x, w, *rest


@pytest.mark.parametrize("isa", BF16_ISAS)
@pytest.mark.parametrize(
    ("n", "c", "d"), [(33, 3000, 512), (520, 700, 65), (3, 40, 1100), (1, 2, 1)]
)
def test_matches_float64(isa, n, c, d):
    case = inputs(n, c, d)
    exact = run("highest", isa, *case, torch.float64, "reference")
    loss, *grads = run("high", isa, *case)
    error = (loss - exact[0]).abs()
    assert error.mean() <= 1e-5 * exact[0].mean()
    assert error.max() <= 2 * MARGIN.scale * (SPLIT + 8 * FLOAT32)
    for grad, reference, bound in zip(
        grads, exact[1:], gradient_bounds(*case, SPLIT, SPLIT + 8 * FLOAT32), strict=True
    ):
        off = (grad - reference).abs()
        assert (off <= 8 * FLOAT32 * reference.abs() + bound).all()
        if d > 1:  # where there is a gradient at all
            assert off.norm() <= 2e-5 * reference.norm()  # measured: 2e-6


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_multiplied_how(isa):
    """GEMMs are split where named and allowed; otherwise results have the bits of "highest"."""
    case = inputs(40, 900, 64)
    exact = run("highest", isa, *case)
    for precision in ("high", "medium"):
        same = [torch.equal(a, b) for a, b in zip(run(precision, isa, *case), exact, strict=True)]
        assert same == [isa not in BF16_ISAS] * 3
    if isa in BF16_ISAS:
        for a, b in zip(run("highest", "avx512", *case), exact, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("isa", BF16_ISAS)
def test_the_backward_pass_goes_by_the_forward_pass(isa, monkeypatch):
    x, w, target, upstream = inputs(40, 900, 64)
    expected = run("high", isa, x, w, target, upstream)
    monkeypatch.setenv("SYNFACE_CPU_ISA", isa)
    x, w = x.requires_grad_(), w.requires_grad_()
    torch.set_float32_matmul_precision("high")
    loss = sk.margin_cross_entropy(x, w, target, MARGIN, reduction="none")
    torch.set_float32_matmul_precision("highest")
    for a, b in zip(torch.autograd.grad(loss, (x, w), upstream), expected[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("isa", BF16_ISAS)
def test_no_bit_depends_on_the_workspace_or_on_class_ids(isa):
    x, w, target, upstream = inputs(520, 700, 48)
    w = w.repeat_interleave(2, 0)
    w[::2] = 0.5
    ids = torch.arange(1, 1400, 2)
    expected = run("high", isa, x, w[ids], target, upstream)
    for workspace in (0, 10**6, 10**9):
        loss, dx, dw = run("high", isa, x, w, target, upstream, class_ids=ids, workspace=workspace)
        for a, b in zip((loss, dx, dw[ids]), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("isa", BF16_ISAS)
def test_norms_zero_rows_and_rows_that_are_not_finite(isa):
    x, w, target, upstream = inputs(20, 300, 40)
    x[3], w[7] = 0, 0
    expected = run("high", isa, x, w, target, upstream)
    assert all(v.isfinite().all() for v in expected)
    assert not expected[1][3].any()
    assert not expected[2][7].any()
    largest = torch.finfo(torch.float32).max  # beyond what rounds to a finite bfloat16
    factor = 2.0 ** math.floor(math.log2(largest / w.abs().max()))
    w[9], grown = w[9] / w[9].abs().max(), w.clone()
    grown[9] = w[9] * largest
    expected = run("high", isa, x, w, target, upstream)
    actual = run("high", isa, x, grown, target, upstream)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        run("high", isa, x, w * factor, target, upstream)[0], expected[0], rtol=1e-4, atol=1e-4
    )
    x[5, 2], upstream[5] = math.nan, 0
    loss, dx, dw = run("high", isa, x, w, target, upstream)
    assert loss.isnan().nonzero().tolist() == [[5]]
    assert dx.isfinite().all()
    assert dw.isfinite().all()


@pytest.mark.parametrize("isa", BF16_ISAS[:1])
def test_a_compiled_step_follows_the_setting(isa, monkeypatch):
    monkeypatch.setenv("SYNFACE_CPU_ISA", isa)
    x, w, target, _ = inputs(40, 900, 64)

    def step(x, w):
        return sk.margin_cross_entropy(x, w, target, MARGIN, reduction="none")

    compiled = torch.compile(step, fullgraph=True, backend="eager")  # the same bits, so
    losses = []
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        losses.append(compiled(x, w))
        assert torch.equal(losses[-1], step(x, w))
    assert not torch.equal(*losses)
