"""Every implementation of the margin softmax against its definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

import synface_kernels as sk
from tests.helpers.margin import (
    COMBINED,
    ISAS,
    MARGINS,
    assert_matches_float64,
    naive_logits,
    problem,
    run,
)


@pytest.mark.pairwise
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("d", [1, 8, 129, 512])
@pytest.mark.parametrize("c", [1, 5, 1000, 4097])
def test_float32_matches_float64(c, d, k):
    for n in (1, 7, 64):
        assert_matches_float64(problem(n, c, d, k, torch.float32), torch.float32, isas=ISAS)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("d", [1, 8, 129, 512])
@pytest.mark.parametrize("c", [1, 5, 1000, 4097])
def test_float64_matches_the_reference(c, d, k):
    for n in (1, 7, 64):
        case = problem(n, c, d, k, torch.float64)
        for a, e in zip(
            run(*case, torch.float64, impl="cpu"),
            run(*case, torch.float64, impl="reference"),
            strict=True,
        ):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "c", "d", "k"), [(7, 1000, 129, 1), (64, 513, 8, 3), (1, 1, 5, 1)])
def test_16_bit_inputs(dtype, n, c, d, k):
    assert_matches_float64(problem(n, c, d, k, dtype), dtype)


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("mix", ["joint", "separate"])
def test_margins_and_mixes(name, mix):
    assert_matches_float64(
        problem(33, 700, 64, 3, torch.float32), torch.float32, MARGINS[name], mix=mix
    )
    assert_matches_float64(
        problem(33, 700, 64, 1, torch.float32), torch.float32, MARGINS[name], mix=mix
    )


@example(n=16, c=1199, d=16, k=3, seed=24)  # once lost to norms rounded to float32
@example(n=20, c=5, d=4, k=2, seed=3)  # once lost to cosines rounded otherwise than the loss's
@given(
    n=st.integers(1, 40),
    c=st.integers(1, 1200),
    d=st.integers(2, 70),
    k=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@pytest.mark.slow
def test_any_shape(n, c, d, k, seed):
    assert_matches_float64(problem(n, c, d, k, torch.float32, seed), torch.float32)


def test_mixed_dtypes_and_autocast():
    x, w, target, _, _ = problem(9, 50, 16, 1, torch.bfloat16)
    x16, w32 = x.bfloat16().requires_grad_(), w.float().requires_grad_()
    exact = sk.margin_cross_entropy(x, w, target, impl="reference")
    loss = sk.margin_cross_entropy(x16, w32, target)
    with torch.autocast("cpu", torch.bfloat16):
        linear = torch.nn.Linear(16, 16)
        sk.margin_cross_entropy(linear(x16), w32, target).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    loss.backward()
    assert x16.grad.dtype == torch.bfloat16
    assert w32.grad.dtype == torch.float32
    assert linear.weight.grad.isfinite().all()


# ---- against formulas that do not share the reference's code -------------------------------------


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_arcface_cosface_and_sphereface_as_trainers_write_them(impl):
    x, w, target, _, _ = problem(20, 30, 16, 1, torch.float64)
    for margin, angle_of in (
        (sk.ArcFace(beyond_pi="none"), lambda t: (t + 0.5).cos()),
        (sk.CosFace(), lambda t: t.cos() - 0.35),
        (sk.SphereFace(margin=1.2, beyond_pi="none"), lambda t: (1.2 * t).cos()),
        (sk.CombinedMargin(64, 0.9, 0.4, 0.15, "none"), lambda t: (0.9 * t + 0.4).cos() - 0.15),
    ):
        expected = F.cross_entropy(naive_logits(x, w, target, angle_of), target)
        torch.testing.assert_close(
            sk.margin_cross_entropy(x, w, target, margin, impl=impl), expected
        )


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("coincide", [False, True])
def test_joint_equals_three_classifiers(impl, coincide):
    """SynFace's published form: three margin classifiers, their logits and losses mixed."""
    x, w, target, t, _ = problem(16, 40, 12, 3, torch.float64)
    if coincide:
        target[:, 1] = target[:, 0]
        target[3] = 5
    x, w = x.requires_grad_(), w.requires_grad_()
    logits = sum(
        t[:, k, None] * naive_logits(x, w, target[:, k], lambda a: (a + 0.5).cos())
        for k in range(3)
    )
    losses = [F.cross_entropy(logits, target[:, k], reduction="none") for k in range(3)]
    expected = (t * torch.stack(losses, 1)).sum(1).mean()
    loss = sk.margin_cross_entropy(
        x, w, target, sk.ArcFace(beyond_pi="none"), target_weight=t, impl=impl
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for a, e in zip(
        torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_separate_is_the_weighted_mean_of_single_label_losses(impl):
    x, w, target, t, _ = problem(16, 40, 12, 3, torch.float64)
    single = [
        sk.margin_cross_entropy(x, w, target[:, k], reduction="none", impl=impl) for k in range(3)
    ]
    loss = sk.margin_cross_entropy(
        x, w, target, target_weight=t, mix="separate", reduction="none", impl=impl
    )
    torch.testing.assert_close(loss, (t * torch.stack(single, 1)).sum(1))


def test_arcface_beyond_pi():
    angles = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    x = torch.stack([angles.cos(), angles.sin()], 1)
    cosine = x[:, :1]
    psi = sk.ArcFace(margin=0.5).target_cosine(cosine)
    beyond = angles + 0.5 > math.pi
    expected = torch.where(
        beyond, angles.cos() - 0.5 * math.sin(math.pi - 0.5), (angles + 0.5).cos()
    )
    torch.testing.assert_close(psi[:, 0], expected)
    for margin in (*MARGINS.values(), sk.SphereFace(margin=4.0), sk.CombinedMargin(64, 1.3, 0.9)):
        psi = margin.target_cosine(cosine)
        if not (isinstance(margin.m1, float) and margin.m1 >= 2):
            assert (psi.diff(dim=0) <= 1e-12).all(), margin  # falls as the angle grows
    raw = sk.ArcFace(beyond_pi="none").target_cosine(cosine)[:, 0]
    torch.testing.assert_close(raw, (angles + 0.5).cos())


def test_target_grad():
    cosine = torch.linspace(-0.8, 0.99, 50, dtype=torch.float64)[:, None].requires_grad_()
    assert torch.autograd.gradcheck(COMBINED.target_cosine, cosine)
    through = sk.ArcFace(target_grad="straight_through").target_cosine(cosine)
    (grad,) = torch.autograd.grad(through.sum(), cosine)
    assert torch.equal(grad, torch.ones_like(grad))
    torch.testing.assert_close(through, sk.ArcFace().target_cosine(cosine))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradcheck_with_margins_per_sample(impl):
    x, w, target, t, _ = problem(5, 7, 4, 2, torch.float64)
    m2 = torch.rand(5, dtype=torch.float64) * 0.5
    m3 = torch.rand(5, dtype=torch.float64) * 0.2

    def f(x, w, m2, m3):
        margin = sk.CombinedMargin(8.0, 1.0, m2, m3)
        loss, stats = sk.margin_cross_entropy(
            x, w, target, margin, target_weight=t, return_stats=True, impl=impl
        )
        return loss + 0.1 * stats.lse.square().sum() + stats.target_cosine.sum()  # z-loss and more

    inputs = [v.requires_grad_() for v in (x, w, m2, m3)]
    assert torch.autograd.gradcheck(f, inputs)


# ---- statistics, reductions, rows that are not valid ---------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_statistics_agree(k):
    x, w, target, t, _ = problem(50, 20, 8, k, torch.float64)
    w[target if k == 1 else target[:, 0]] += 3 * x[:, :8]  # some hits
    options = {"target_weight": t, "return_stats": True}
    loss, stats = sk.margin_cross_entropy(x, w, target, **options, impl="cpu")
    expected_loss, expected = sk.margin_cross_entropy(x, w, target, **options, impl="reference")
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(stats.lse, expected.lse)
    torch.testing.assert_close(stats.target_cosine, expected.target_cosine)
    assert stats.target_cosine.shape == target.shape
    assert torch.equal(stats.top1, expected.top1)
    assert 0 < stats.top1.sum() < 50
    cosine = F.normalize(x) @ F.normalize(w).T
    hit = (cosine.argmax(1)[:, None] == target.reshape(50, k)).any(1)
    assert torch.equal(stats.top1, hit)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("k", [1, 2])
def test_ignored_rows_cost_nothing(impl, k):
    x, w, target, t, _ = problem(12, 30, 8, k, torch.float64)
    valid = torch.arange(12) % 3 != 0
    masked = target.clone()
    masked[~valid] = -7
    x[~valid] = math.nan if impl == "cpu" else 1.0
    x, w = x.requires_grad_(), w.requires_grad_()
    loss = sk.margin_cross_entropy(x, w, masked, target_weight=t, ignore_index=-7, impl=impl)
    t_valid = None if t is None else t[valid]
    expected = sk.margin_cross_entropy(
        x[valid], w, target[valid], target_weight=t_valid, impl="reference"
    )
    torch.testing.assert_close(loss, expected)
    dx, dw = torch.autograd.grad(loss, (x, w))
    edx, edw = torch.autograd.grad(expected, (x, w))
    assert (dx[~valid] == 0).all()
    torch.testing.assert_close(dx[valid], edx[valid])
    torch.testing.assert_close(dw, edw)
    per_row = sk.margin_cross_entropy(
        x, w, masked, target_weight=t, ignore_index=-7, reduction="none", impl=impl
    )
    assert (per_row[~valid] == 0).all()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_all_rows_ignored_and_no_rows(impl):
    for target in (torch.full((4,), -100), torch.empty(0, dtype=torch.int64)):
        x = torch.randn(len(target), 8, requires_grad=True)
        w = torch.randn(5, 8, requires_grad=True)
        loss, stats = sk.margin_cross_entropy(x, w, target, return_stats=True, impl=impl)
        loss.backward()
        assert loss == 0
        assert not stats.top1.any()
        assert x.grad.shape == x.shape
        assert (x.grad == 0).all()
        assert (w.grad == 0).all()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_padding_and_repeated_labels(impl):
    x, w, _, _, _ = problem(3, 10, 8, 2, torch.float64)
    target = torch.tensor([[4, 4, -100], [2, 7, 2], [9, -100, -100]])
    t = torch.tensor([[0.25, 0.75, 0.0], [0.2, 0.5, 0.3], [1.0, 0, 0]], dtype=torch.float64)
    loss, stats = sk.margin_cross_entropy(
        x, w, target, target_weight=t, reduction="none", return_stats=True, impl=impl
    )
    single = sk.margin_cross_entropy(x, w, torch.tensor([4, 2, 9]), reduction="none", impl=impl)
    pair = sk.margin_cross_entropy(
        x[1:2],
        w,
        torch.tensor([[2, 7]]),
        target_weight=torch.tensor([[0.5, 0.5]], dtype=torch.float64),
        reduction="none",
        impl=impl,
    )
    torch.testing.assert_close(loss, torch.stack([single[0], pair[0], single[2]]))
    cosine = F.normalize(x) @ F.normalize(w).T
    expected = torch.where(target >= 0, cosine.gather(1, target.clamp_min(0)), 0)
    torch.testing.assert_close(stats.target_cosine, expected)


def test_reductions():
    x, w, target, _, _ = problem(6, 9, 4, 1, torch.float64)
    rows = sk.margin_cross_entropy(x, w, target, reduction="none")
    torch.testing.assert_close(sk.margin_cross_entropy(x, w, target), rows.mean())
    torch.testing.assert_close(sk.margin_cross_entropy(x, w, target, reduction="sum"), rows.sum())
