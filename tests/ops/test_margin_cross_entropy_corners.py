"""The margin softmax at its corners: poles, zero and non-finite rows, layouts, threads."""

from __future__ import annotations

import math

import pytest
import torch

import synface_kernels as sk
from tests.helpers.cpu import cpu
from tests.helpers.margin import (
    COMBINED,
    ISAS,
    MARGINS,
    OPTIONS,
    assert_matches_float64,
    problem,
    problem_of,
    run,
)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MARGINS)
def test_gradients_are_finite_at_the_poles(impl, dtype, name):
    x = torch.eye(4, dtype=dtype)[:3].clone().requires_grad_()
    w = torch.stack([x[0], -x[1], x[2]]).detach().clone().requires_grad_()  # cos = 1, −1, 1
    loss = sk.margin_cross_entropy(x, w, torch.arange(3), MARGINS[name], impl=impl)
    for grad in torch.autograd.grad(loss, (x, w)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("norm", [0.0, 1e-13, 1e-30])
def test_zero_vectors_have_zero_cosine_and_gradient(impl, norm):
    x, w, target, _, _ = problem(4, 6, 8, 1, torch.float32)
    x, w = x.float(), w.float()
    target[:] = torch.tensor([0, 1, 2, 3])
    x[1] *= norm / x[1].norm()
    w[2] *= norm / w[2].norm()
    x, w = x.requires_grad_(), w.requires_grad_()
    loss, stats = sk.margin_cross_entropy(
        x, w, target, reduction="none", return_stats=True, impl=impl
    )
    dx, dw = torch.autograd.grad(loss.sum(), (x, w))
    assert loss.isfinite().all()
    assert stats.target_cosine[1] == 0
    assert stats.target_cosine[2] == 0
    assert (dx[1] == 0).all()
    assert (dw[2] == 0).all()
    assert dx.isfinite().all()
    assert dw.isfinite().all()


@pytest.mark.parametrize("factor", [1e-9, 1e-3, 1e15, 1e25])
def test_the_loss_does_not_depend_on_norms(factor):
    x, w, target, _, _ = problem(5, 40, 16, 1, torch.float32)
    exact = sk.margin_cross_entropy(x, w, target, impl="reference", reduction="none")
    actual = sk.margin_cross_entropy(
        (x * factor).float(), (w * factor).float(), target, impl="cpu", reduction="none"
    )
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


def test_rows_far_from_every_center_keep_their_loss():
    """All cosines near −1: a constant shift of the exponent would underflow to log 0."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(3000, 16, generator=g) * 0.01
    w[:, 0] -= 1
    x = torch.zeros(2, 16)
    x[:, 0] = 1
    for scale in (64.0, 500.0):
        margin = sk.ArcFace(scale)
        actual = sk.margin_cross_entropy(x, w, torch.tensor([0, 1]), margin, impl="cpu")
        exact = sk.margin_cross_entropy(
            x.double(), w.double(), torch.tensor([0, 1]), margin, impl="reference"
        )
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_row_spoils_itself_alone(value):
    x, w, target, _, _ = problem(6, 700, 8, 1, torch.float32)
    x, w = x.float(), w.float()
    clean = x.clone().requires_grad_()
    (clean_grad,) = torch.autograd.grad(
        sk.margin_cross_entropy(clean, w, target, reduction="sum"), clean
    )
    clean_loss = sk.margin_cross_entropy(x, w, target, reduction="none")
    x[2, 3] = value
    x.requires_grad_()
    loss = sk.margin_cross_entropy(x, w, target, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    others = torch.arange(6) != 2
    assert not loss[2].isfinite()
    assert torch.equal(loss[others], clean_loss[others])
    assert torch.equal(grad[others], clean_grad[others])


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_row_that_nobody_asks_for_changes_nothing(value, name, impl):
    """A row with a zero upstream gradient affects neither other rows nor the centers."""
    m = 2 if name == "sub-centers" else 1
    x, w, target, t, upstream = problem_of(6, 700, m, 8, 2, torch.float32)
    w = w if m > 1 else w.flatten(0, 1)
    upstream[2] = 0
    others = torch.arange(6) != 2
    options = {"margin": COMBINED, **OPTIONS[name]}
    clean = run(x, w, target, t, upstream, torch.float32, impl=impl, **options)
    x[2, 3] = value
    dirty = run(x, w, target, t, upstream, torch.float32, impl=impl, **options)
    assert not dirty[0][2].isfinite()
    for a, e in zip(dirty[:2], clean[:2], strict=True):
        torch.testing.assert_close(a[others], e[others])
    torch.testing.assert_close(dirty[2], clean[2])
    if impl == "cpu":
        assert not dirty[1][2].any()
    if name == "plain" and impl == "cpu":
        m2 = torch.full((6,), 0.4)
        m2[2] = math.nan
        margin = sk.CombinedMargin(64.0, 0.9, m2, 0.15)
        dirty = run(x, w, target, t, upstream, torch.float32, margin, impl=impl)
        torch.testing.assert_close(dirty[0][others], clean[0][others])
        torch.testing.assert_close(dirty[2], clean[2])


def test_non_contiguous_inputs():
    x, w, target, _, upstream = problem(20, 60, 12, 1, torch.float32)
    expected = run(x, w, target, None, upstream, torch.float32)
    views = {
        "transposed": lambda v: v.float().T.contiguous().T,
        "every other row": lambda v: torch.stack([v, v], 1).float().flatten(0, 1)[::2],
        "columns of a wider one": lambda v: torch.cat([v, v, v], 1).float()[:, 12:24],
        "expanded": lambda v: v.float()[None].expand(2, -1, -1)[1],
    }
    for name, view in views.items():
        a, b = view(x).requires_grad_(), view(w).requires_grad_()
        assert torch.equal(a, x.float()), name
        loss = sk.margin_cross_entropy(a, b, target, COMBINED, reduction="none")
        grads = torch.autograd.grad(loss, (a, b), upstream.float())
        for actual, e in zip((loss.detach(), *grads), expected, strict=True):
            torch.testing.assert_close(actual, e, rtol=1e-5, atol=1e-5, msg=name)
    one_row = x[:1].float().expand(5, -1).requires_grad_()
    sk.margin_cross_entropy(one_row, w.float(), target[:5]).backward()


@pytest.mark.parametrize("name", OPTIONS)
def test_two_runs_agree_bitwise(name):
    case = problem_of(130, 1500, 2, 64, 2, torch.float32)
    if name != "sub-centers":
        case = (case[0], case[1].flatten(0, 1), *case[2:])
    options = {"margin": COMBINED, **OPTIONS[name]}
    first = run(*case, torch.float32, **options)
    for _ in range(3):
        for a, b in zip(run(*case, torch.float32, **options), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    with cpu(threads=threads):
        assert_matches_float64(problem(300, 2000, 16, 2, torch.float32), torch.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_without_negatives_the_log_sum_exp_has_no_gradient(isa, dtype, monkeypatch):
    monkeypatch.setenv("SYNFACE_CPU_ISA", isa)
    op = torch.ops.synface_kernels
    x, w, target, _, _ = problem(6, 90, 8, 1, dtype)
    x, w = x.requires_grad_(), w.requires_grad_()
    for limit, c in ((-1.1, 90), (math.inf, 1)):  # all filtered; none but the label's own
        target = target.clamp_max(c - 1)
        lse, *_ = op.margin_cross_entropy_forward(
            x, w[:c], None, target[:, None], 64.0, limit, True, False, 0, False, "cpu"
        )
        assert lse.isneginf().all()
        for gradient in torch.autograd.grad(lse.sum(), (x, w)):
            assert not gradient.any()  # NaN counts as any


def test_no_second_derivative():
    x, w, target, _, _ = problem(4, 9, 8, 1, torch.float64)
    x.requires_grad_()
    loss = sk.margin_cross_entropy(x, w, target)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()
