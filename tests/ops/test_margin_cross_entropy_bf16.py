"""The margin softmax of bfloat16 matrices: float32 logits, whatever multiplies them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import synface_kernels as sk
from synface_kernels import _load

ISAS = _load.cpu_isas()
BF16 = 2.0**-8  # the most that rounding to bfloat16 changes a number, relatively
FLOAT32 = torch.finfo(torch.float32).eps
MARGIN = sk.ArcFace(64.0, 0.5)


def problem(n: int, c: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centers, embeddings that lean towards theirs, labels and the loss's gradient."""
    g = torch.Generator().manual_seed(seed + n + 7 * c + 31 * d)
    w = torch.randn(c, d, generator=g)
    target = torch.randint(0, c, (n,), generator=g)
    x = F.normalize(torch.randn(n, d, generator=g)) + 0.7 * F.normalize(w[target])
    x, w = x * 10 ** torch.rand(n, 1, generator=g), w * 10 ** torch.rand(c, 1, generator=g)
    return x.bfloat16(), w.bfloat16(), target, torch.rand(n, generator=g)


def run(x, w, target, upstream, dtype, impl, isa) -> tuple[Tensor, Tensor, Tensor]:
    x, w = (v.to(dtype, copy=True).requires_grad_() for v in (x, w))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SYNFACE_CPU_ISA", isa)
        loss = sk.margin_cross_entropy(x, w, target, MARGIN, reduction="none", impl=impl)
        grads = torch.autograd.grad(loss, (x, w), upstream.to(loss.dtype))
    return loss.detach(), *grads


def gradient_bounds(
    x, w, target, upstream, operand: float = BF16, cosine_error: float = 8 * FLOAT32
) -> tuple[Tensor, Tensor]:
    """Bound the gradients' errors for relative errors of their GEMMs' operands.

    Each probability, such an operand, is off by `operand`, relatively, and cosines by
    `cosine_error`: with G the loss's derivatives by cosines, G·ŵ is off by |G|·|ŵ| of that, and so
    is its projection, without the part along x̂, twice at most.
    """
    x, w, upstream = x.double(), w.double(), upstream.double()
    unit_x, unit_w = F.normalize(x), F.normalize(w)
    cosine = (unit_x @ unit_w.T).requires_grad_()
    hit = F.one_hot(target, len(w)).bool()
    angle = cosine.clamp(-1 + 1e-9, 1 - 1e-9).acos()
    logits = MARGIN.scale * torch.where(hit, (angle + MARGIN.m2).cos(), cosine)
    loss = F.cross_entropy(logits, target, reduction="none")
    (slope,) = torch.autograd.grad(loss, cosine, upstream)
    # the labels' own terms and the exponents of the others are float32's
    rounding = torch.where(
        hit, 64 * MARGIN.scale * FLOAT32, operand + 2 * MARGIN.scale * cosine_error
    )
    share = slope.abs() * rounding + MARGIN.scale * math.exp(-87)  # smaller ones are rounded to 0
    # A logit's own rounding in float64: where a probability is within it of 1, the reference's
    # slope is the difference of two numbers that are.
    share = share + MARGIN.scale * upstream[:, None] * 2 * MARGIN.scale * torch.finfo(x.dtype).eps
    bounds = []
    for part, own, other, norms in (
        (share, unit_x, unit_w, x.norm(dim=1, keepdim=True)),
        (share.T, unit_w, unit_x, w.norm(dim=1, keepdim=True)),
    ):
        off = part @ other.abs()
        bounds.append((off + own.abs() * (off * own.abs()).sum(1, keepdim=True)) / norms)
    return bounds[0], bounds[1]


def assert_close(case: tuple[Tensor, ...], isa: str) -> None:
    x, w, target, upstream = case
    exact = run(x, w, target, upstream, torch.float64, "reference", isa)
    plain = run(x, w, target, upstream, torch.float32, "reference", isa)
    loss, *grads = run(x, w, target, upstream, torch.bfloat16, "cpu", isa)
    assert loss.dtype == torch.float32
    error = (loss - exact[0]).abs()
    own = (plain[0] - exact[0]).abs().max()
    rounding = 2 * MARGIN.scale * FLOAT32
    assert error.max() <= 2 * own + rounding
    assert error.mean() <= 1e-4 * exact[0].mean() + rounding
    for name, grad, reference, bound in zip(
        ("input", "weight"), grads, exact[1:], gradient_bounds(x, w, target, upstream), strict=True
    ):
        assert grad.dtype == torch.bfloat16
        off = (grad.double() - reference).abs() - (BF16 * reference.abs() + bound)
        assert off.max() <= 0, (name, isa, off.max(), off.argmax())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("n", "c", "d"), [(1, 2, 1), (5, 33, 3), (64, 1500, 129), (530, 1030, 64), (33, 700, 512)]
)
def test_matches_float64(isa, n, c, d):
    assert_close(problem(n, c, d), isa)


@given(
    n=st.integers(1, 40),
    c=st.integers(2, 1200),
    d=st.integers(2, 90),  # along a line the gradients are 0
    seed=st.integers(0, 1000),
)
@pytest.mark.slow
def test_any_shape(n, c, d, seed):
    for isa in ISAS[-2:]:
        assert_close(problem(n, c, d, seed), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_slices_of_the_depth(isa):
    assert_close(problem(9, 40, 1537), isa)
    assert_close(problem(9, 40, 1100), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("factor", [2.0**-30, 2.0**40, 2.0**100])
def test_norms_do_not_matter(isa, factor):
    x, w, target, upstream = problem(20, 900, 65)
    loss, *grads = run(x, w, target, upstream, torch.bfloat16, "cpu", isa)
    for x_scaled, w_scaled, which in ((x * factor, w, 0), (x, w * factor, 1)):
        other, *other_grads = run(x_scaled, w_scaled, target, upstream, torch.bfloat16, "cpu", isa)
        torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
        if factor < 1e10:  # else the gradient is too small for its dtype's normal numbers
            grad = grads[which].double()
            off = (other_grads[which].double() * factor - grad).abs().max()
            assert off <= 2 * BF16 * grad.abs().max()


@pytest.mark.parametrize("isa", ISAS)
def test_zero_and_non_finite_rows(isa):
    x, w, target, upstream = problem(20, 900, 65)
    x[3], w[[5, 899]] = 0, 0
    target[target == 5] = 6
    loss, grad_x, grad_w = run(x, w, target, upstream, torch.bfloat16, "cpu", isa)
    exact = run(x, w, target, upstream, torch.float64, "reference", isa)[0]
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    assert not grad_x[3].any()
    assert not grad_w[[5, 899]].any()
    for value in (math.nan, math.inf):
        spoilt = x.clone()
        spoilt[7, 2] = value
        other, other_x, _ = run(spoilt, w, target, upstream, torch.bfloat16, "cpu", isa)
        assert not other[7].isfinite()
        others = torch.arange(20) != 7
        assert torch.equal(other[others], loss[others])
        assert torch.equal(other_x[others], grad_x[others])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_answer_twice(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, w, target, upstream = problem(70, 3000, 96)
        first = run(x, w, target, upstream, torch.bfloat16, "cpu", ISAS[-1])
        second = run(x, w, target, upstream, torch.bfloat16, "cpu", ISAS[-1])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, first, second))
