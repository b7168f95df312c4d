"""Every implementation of the margin softmax against its definition in float64."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

import synface_kernels as sk
import synface_kernels.numpy
from synface_kernels import _load
from synface_kernels.ops.margin_cross_entropy import op
from synface_kernels.testing import assert_as_exact_as_torch
from tests.helpers.cpu import cpu

ISAS = _load.cpu_isas()
COMBINED = sk.CombinedMargin(64.0, 0.9, 0.4, 0.15)
MARGINS = {
    "arcface": sk.ArcFace(),
    "cosface": sk.CosFace(),
    "sphereface": sk.SphereFace(),
    "combined": COMBINED,
    "m2+m3": sk.CombinedMargin(32.0, 1.0, 0.3, 0.2),
}


def problem(n: int, c: int, d: int, k: int, dtype: torch.dtype, seed: int = 0):
    """Input, weight, target, target_weight and the loss's gradient: float64, exact in dtype."""
    g = torch.Generator().manual_seed(seed + n + 7 * c + 31 * d + 101 * k)
    x = torch.randn(n, d, generator=g).to(dtype).double()
    w = torch.randn(c, d, generator=g).to(dtype).double()
    target = torch.randint(0, c, (n, k), generator=g)
    weight = torch.rand(n, k, generator=g, dtype=torch.float64).softmax(1) if k > 1 else None
    return x, w, target if k > 1 else target[:, 0], weight, torch.rand(n, generator=g).double()


def run(x, w, target, target_weight, upstream, dtype, margin=COMBINED, **options):
    """Loss per row and both gradients, computed in dtype."""
    x, w = (v.to(dtype).requires_grad_() for v in (x, w))
    if target_weight is not None:
        target_weight = target_weight.float() if dtype != torch.float64 else target_weight
    loss = sk.margin_cross_entropy(
        x, w, target, margin, target_weight=target_weight, reduction="none", **options
    )
    return loss.detach(), *torch.autograd.grad(loss, (x, w), upstream.to(loss.dtype))


def assert_matches_float64(case, dtype, margin=COMBINED, products=None, **options):
    """products: the dtype in which plain torch, as the measure of gradients, does everything."""
    exact = run(*case, torch.float64, margin, **options, impl="reference")
    plain = run(*case, dtype, margin, **options, impl="reference")
    if products is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(op, "_statistics_dtype", lambda input: products)
            plain = plain[0], *run(*case, dtype, margin, **options, impl="reference")[1:]
    actual = run(*case, dtype, margin, **options, impl="cpu")
    # The absolute terms: float32's ε times the size of a logit, and of a gradient before the part
    # along the vector is taken out (which leaves nothing at all where D = 1).
    ulp = torch.finfo(torch.float32).eps * margin.scale
    sizes = [1 / v.norm(dim=-1).min().item() for v in case[:2]]
    shifts = gradient_shifts(*case, margin, **options)
    atol = [2 * ulp, *(4 * ulp * size + shift for size, shift in zip(sizes, shifts, strict=True))]
    for name, *results, tol in zip(
        ("loss", "grad_input", "grad_weight"), actual, exact, plain, atol, strict=True
    ):
        assert_as_exact_as_torch(*results, atol=tol, name=name)


class Products(TorchFunctionMode):
    """Keeps the factors and the result of the last product: the definition's cosines."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.matmul:
            self.last = *args, result
        return result


def gradient_shifts(x, w, target, target_weight, upstream, margin, **options) -> list[Tensor]:
    """How far float32's cosines may shift the gradients by input and weight, element by element.

    A cosine, a sum of products, is off by about ε/2, so a probability, relatively, by scale·ε/2
    through its own logit and no more than that through the log-sum-exp: six times as much is beyond
    chance. The log-sum-exp's slope by a cosine is the probabilities' part of the loss's. It moves a
    row along the other side's unit vector, whose part along the row itself is taken out again: what
    is left is no longer than the sine between the two.
    """
    with Products() as products:
        _, stats = sk.margin_cross_entropy(
            x.requires_grad_(), w, target, margin, target_weight=target_weight,
            reduction="none", return_stats=True, impl="reference", **options,
        )  # fmt: skip
    unit_x, unit_w, cosine = products.last
    (slope,) = torch.autograd.grad(stats.lse, cosine, upstream)
    off = 6 * torch.finfo(torch.float32).eps * margin.scale * slope.abs()
    sine = (1 - cosine.square()).clamp_min(0).sqrt()
    shifts = []
    for part, sin, other, own, rows in (
        (off, sine, unit_w.T, unit_x, x), (off.T, sine.T, unit_x, unit_w.T, w)
    ):  # fmt: skip
        shift, own = part @ other.abs(), own.abs()
        shift = shift + own * (own * shift).sum(1, keepdim=True)
        shift = torch.minimum(shift, (part * sin).sum(1, keepdim=True))
        shifts.append((shift.view_as(rows) / rows.norm(dim=-1, keepdim=True)).detach())
    return shifts


# N, C, M, D, K: no room for two classes in a tile; odd; one; several tiles
SUB_CENTERS = [(7, 3, 600, 8, 2), (33, 701, 3, 65, 3), (5, 9, 1, 4, 1), (64, 1030, 2, 16, 1)]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("d", [1, 8, 129, 512])
@pytest.mark.parametrize("c", [1, 5, 1000, 4097])
@pytest.mark.parametrize("isa", ISAS)
def test_float32_matches_float64(isa, c, d, k, monkeypatch):
    monkeypatch.setenv("SYNFACE_CPU_ISA", isa)
    assert _load.cpu_isa() == isa
    for n in (1, 7, 64):
        assert_matches_float64(problem(n, c, d, k, torch.float32), torch.float32)


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
def test_any_shape(n, c, d, k, seed):
    assert_matches_float64(problem(n, c, d, k, torch.float32, seed), torch.float32)


def test_mixed_dtypes_and_autocast():
    x, w, target, _, _ = problem(9, 50, 16, 1, torch.bfloat16)
    x16, w32 = x.bfloat16().requires_grad_(), w.float().requires_grad_()
    exact = sk.margin_cross_entropy(x, w, target, impl="reference")
    with torch.autocast("cpu", torch.bfloat16):
        loss = sk.margin_cross_entropy(x16, w32, target)
        linear = torch.nn.Linear(16, 16)
        sk.margin_cross_entropy(linear(x16), w32, target).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    loss.backward()
    assert x16.grad.dtype == torch.bfloat16
    assert w32.grad.dtype == torch.float32
    assert linear.weight.grad.isfinite().all()


# ---- against formulas that do not share the reference's code ------------------------------------


def naive_logits(x, w, labels, angle_of) -> Tensor:
    """64·cosine with the margin at each row's own label, as trainers write it."""
    cosine = F.normalize(x) @ F.normalize(w).T
    theta = cosine.clamp(-1, 1).acos()
    own = F.one_hot(labels, w.shape[0]).bool()
    return 64 * torch.where(own, angle_of(theta), cosine)


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


# ---- sub-centers, the inter-class filter, label smoothing ----------------------------------------

FILTERED = {
    "drop": sk.ArcFace(interclass_filter=0.05),
    "zero": sk.ArcFace(interclass_filter=0.05, interclass_filter_mode="zero"),
    "all": sk.CosFace(interclass_filter=-1.0),
    "none": sk.SphereFace(interclass_filter=1.0, interclass_filter_mode="zero"),
}


def products_of(dtype: torch.dtype, isa: str) -> torch.dtype | None:
    """bfloat16 where matrices of it are multiplied as they are, with bfloat16 probabilities."""
    return dtype if dtype == torch.bfloat16 and isa.endswith("bf16") else None


def problem_of(n: int, c: int, m: int, d: int, k: int, dtype: torch.dtype):
    """A problem with m sub-centers for each class."""
    x, w, target, t, upstream = problem(n, c * m, d, k, dtype)
    return x, w.reshape(c, m, d), target % c, t, upstream


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "c", "m", "d", "k"), SUB_CENTERS)
def test_sub_centers_match_float64(isa, dtype, n, c, m, d, k):
    with cpu(isa=isa):
        for mix in ("joint", "separate"):
            case = problem_of(n, c, m, d, k, dtype)
            products = products_of(dtype, isa)
            assert_matches_float64(case, dtype, products=products, mix=mix)
            ids = sampled(c)
            x, w, target, t, upstream = case
            in_sample = (x, w, target % len(ids), t, upstream)
            of_rows = run(x, w[ids], *in_sample[2:], dtype, mix=mix)
            *others, grad = run(*in_sample, dtype, mix=mix, class_ids=ids)
            assert grad.is_coalesced()
            assert grad.shape == w.shape
            for a, e in zip((*others, grad.values()), of_rows, strict=True):
                assert torch.equal(a, e)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_sub_centers_as_trainers_write_them(impl):
    x, w, target, _, _ = problem_of(20, 30, 3, 16, 1, torch.float64)
    x, w = x.requires_grad_(), w.requires_grad_()
    cosine = torch.einsum("nd,cmd->ncm", F.normalize(x), F.normalize(w, dim=2)).amax(2)
    own = F.one_hot(target, 30).bool()
    expected = F.cross_entropy(64 * torch.where(own, cosine - 0.35, cosine), target)
    loss = sk.margin_cross_entropy(x, w, target, sk.CosFace(), impl=impl)
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, (x, w))
    for a, e in zip(grads, torch.autograd.grad(expected, (x, w)), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_the_first_of_equal_sub_centers_gets_the_gradient(impl):
    x, w, target, _, _ = problem(9, 40, 8, 1, torch.float32)
    w = w.float()[:, None].repeat(1, 3, 1)
    w[:, 2] *= -1
    w.requires_grad_()
    sk.margin_cross_entropy(x.float(), w, target, impl=impl).backward()
    assert w.grad[:, 0].any()
    assert not w.grad[:, 1].any()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_zero_sub_center_has_cosine_zero_and_no_gradient(impl):
    x, w, _, _, _ = problem(1, 6, 8, 1, torch.float32)
    w = torch.stack([-x.float().expand(6, 8) + 0.01 * w.float(), torch.zeros(6, 8)], 1)
    w.requires_grad_()
    loss, stats = sk.margin_cross_entropy(
        x.float(), w, torch.tensor([2]), return_stats=True, impl=impl
    )
    loss.backward()
    assert stats.target_cosine == 0
    assert not w.grad.any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", FILTERED)
def test_filter_matches_float64(name, k, dtype, isa):
    products = products_of(dtype, isa)
    with cpu(isa=isa):
        for mix in ("joint", "separate"):
            for n, c, d in ((7, 1000, 129), (64, 5, 8), (1, 1, 4)):
                case = problem(n, c, d, k, dtype)
                assert_matches_float64(case, dtype, FILTERED[name], products, mix=mix)
        case = problem_of(33, 700, 2, 64, k, dtype)
        assert_matches_float64(case, dtype, FILTERED[name], products)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("mode", ["drop", "zero"])
def test_filter_by_its_definition(mode, impl):
    """zero: insightface's CombinedMarginLoss, which multiplies what is dirty by 0."""
    x, w, target, _, _ = problem(20, 300, 8, 1, torch.float64)
    w[3] = x[0]  # the same person under another label
    target[0] = 5
    x, w = x.requires_grad_(), w.requires_grad_()
    cosine = F.normalize(x) @ F.normalize(w).T
    own = F.one_hot(target, 300).bool()
    dirty = (cosine.detach() > 0.4) & ~own
    assert 20 < dirty.sum() < 2000
    clean = cosine.masked_fill(dirty, -torch.inf) if mode == "drop" else cosine * ~dirty
    expected = F.cross_entropy(64 * torch.where(own, cosine - 0.35, clean), target)
    margin = sk.CosFace(interclass_filter=0.4, interclass_filter_mode=mode)
    loss, stats = sk.margin_cross_entropy(x, w, target, margin, return_stats=True, impl=impl)
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, (x, w))
    for a, e in zip(grads, torch.autograd.grad(expected, (x, w)), strict=True):
        torch.testing.assert_close(a, e)
    kept = cosine.masked_fill(dirty, -torch.inf)
    assert torch.equal(stats.top1, kept.argmax(1) == target)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mix", ["joint", "separate"])
def test_smoothing_matches_float64(mix, dtype, isa):
    with cpu(isa=isa):
        for n, c, d, k in ((7, 1000, 129, 1), (64, 5, 8, 3), (600, 700, 16, 2), (1, 1, 4, 1)):
            case = problem(n, c, d, k, dtype)
            for epsilon in (0.1, 0.9):
                assert_matches_float64(
                    case,
                    dtype,
                    products=products_of(dtype, isa),
                    mix=mix,
                    label_smoothing=epsilon,
                )
            ids = sampled(c)
            x, w, target, t, upstream = case
            case = (x, w, target % len(ids), t, upstream)
            options = {"mix": mix, "label_smoothing": 0.1}
            of_rows = run(x, w[ids], *case[2:], dtype, **options)
            *others, grad = run(*case, dtype, **options, class_ids=ids)
            for a, e in zip((*others, grad.values()), of_rows, strict=True):
                assert torch.equal(a, e)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_smoothing_is_torchs(impl):
    x, w, target, t, _ = problem(16, 40, 12, 3, torch.float64)
    target[5] = -100
    x, w = x.requires_grad_(), w.requires_grad_()
    logits = naive_logits(x, w, target[:, 0].clamp_min(0), lambda a: a.cos() - 0.2)
    expected = F.cross_entropy(logits, target[:, 0], label_smoothing=0.2)
    margin = sk.CosFace(margin=0.2)
    options = {"label_smoothing": 0.2, "impl": impl}
    loss = sk.margin_cross_entropy(x, w, target[:, 0], margin, **options)
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, (x, w))
    for a, e in zip(grads, torch.autograd.grad(expected, (x, w)), strict=True):
        torch.testing.assert_close(a, e)
    # several labels: probabilities as targets
    present = (target >= 0).any(1)
    share = torch.zeros(16, 40, dtype=t.dtype).scatter_add(1, target.clamp_min(0), t)[present]
    logits = 64 * (F.normalize(x) @ F.normalize(w).T)[present] - 64 * 0.2 * share
    expected = F.cross_entropy(logits, share, label_smoothing=0.2)
    loss = sk.margin_cross_entropy(x, w, target, margin, target_weight=t, **options)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("case", ["smoothing", "drop", "zero", "sub-centers"])
def test_gradcheck_of_the_options(case, impl):
    x, w, target, t, _ = problem_of(5, 7, 2 if case == "sub-centers" else 1, 4, 2, torch.float64)
    w = w if case == "sub-centers" else w.flatten(0, 1)
    limit = 0.3 if case in ("drop", "zero") else None
    mode = case if limit else "drop"
    margin = sk.CombinedMargin(
        8.0, 1.0, 0.3, 0.1, interclass_filter=limit, interclass_filter_mode=mode
    )

    def f(x, w):
        loss, stats = sk.margin_cross_entropy(
            x, w, target, margin, target_weight=t, return_stats=True, impl=impl,
            label_smoothing=0.2 if case == "smoothing" else 0.0,
        )  # fmt: skip
        return loss + 0.1 * stats.lse.square().sum() + stats.target_cosine.sum()

    assert torch.autograd.gradcheck(f, (x.requires_grad_(), w.requires_grad_()))


# ---- statistics, reductions, rows that do not count ---------------------------------------------


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
    keep = torch.arange(12) % 3 != 0
    masked = target.clone()
    masked[~keep] = -7
    x[~keep] = math.nan if impl == "cpu" else 1.0
    x, w = x.requires_grad_(), w.requires_grad_()
    loss = sk.margin_cross_entropy(x, w, masked, target_weight=t, ignore_index=-7, impl=impl)
    t_kept = None if t is None else t[keep]
    expected = sk.margin_cross_entropy(
        x[keep], w, target[keep], target_weight=t_kept, impl="reference"
    )
    torch.testing.assert_close(loss, expected)
    dx, dw = torch.autograd.grad(loss, (x, w))
    edx, edw = torch.autograd.grad(expected, (x, w))
    assert (dx[~keep] == 0).all()
    torch.testing.assert_close(dx[keep], edx[keep])
    torch.testing.assert_close(dw, edw)
    per_row = sk.margin_cross_entropy(
        x, w, masked, target_weight=t, ignore_index=-7, reduction="none", impl=impl
    )
    assert (per_row[~keep] == 0).all()


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


# ---- the corners ---------------------------------------------------------------------------------


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


OPTIONS = {
    "plain": {},
    "separate": {"mix": "separate"},
    "smoothing": {"label_smoothing": 0.1},
    "drop": {"margin": FILTERED["drop"]},
    "zero": {"margin": FILTERED["zero"]},
    "sub-centers": {},
}


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_row_that_nobody_asks_for_changes_nothing(value, name, impl):
    """Not the other rows, nor the centers; nor does it where the margins of its row are NaN."""
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


def test_only_what_is_asked_for_is_computed():
    x, w, target, _, _ = problem(4, 9, 8, 1, torch.float32)
    labels = target[:, None]
    op = torch.ops.synface_kernels
    forward = partial(op.margin_cross_entropy_forward, x, w, None, labels, 64.0, math.inf)
    out = forward(False, False, 0, False, "cpu")
    assert [v.numel() for v in out[3:]] == [0] * 5
    g = torch.ones(4, dtype=torch.float64)
    out = forward(True, False, 0, False, "cpu")
    for needs in itertools.product((False, True), repeat=2):
        grads = op.margin_cross_entropy_backward(
            x,
            w,
            None,
            labels,
            out[0],
            *out[5:],
            g,
            g[:, None],
            g[:0],
            64.0,
            math.inf,
            *needs,
            False,
            "cpu",
        )
        assert [tuple(v.shape) for v in grads] == [
            tuple(v.shape) if need else (0,) for v, need in zip((x, w), needs, strict=True)
        ]
    x.requires_grad_()  # frozen centers
    sk.margin_cross_entropy(x, w, target).backward()
    assert x.grad is not None
    assert w.grad is None


WORKSPACE = {
    **{name: (name, {}, torch.float32) for name in OPTIONS},
    "class ids": ("plain", {"class_ids": torch.arange(1, 1500, 2)}, torch.float32),
    "float64": ("drop", {}, torch.float64),
    "bfloat16": ("plain", {}, torch.bfloat16),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", WORKSPACE)
def test_no_bit_depends_on_the_workspace(name, isa, monkeypatch):
    """Ignored rows, and rows that hold NaN and that nobody asks for, included."""
    monkeypatch.setenv("SYNFACE_CPU_ISA", isa)
    option, more, dtype = WORKSPACE[name]
    options = {"margin": COMBINED, **OPTIONS[option], **more}
    n, m = 530, 2 if option == "sub-centers" else 1  # two blocks of rows, several tiles
    x, w, target, t, upstream = problem_of(n, 1500, m, 24, 2, dtype)
    w = w if m > 1 else w.flatten(0, 1)
    target = target % 750  # places in class_ids
    target[7] = -100
    x[3, 5], upstream[3] = math.nan, 0
    each = m * n * (8 if dtype == torch.float64 else 4)  # bytes of a class
    results = [
        run(x, w, target, t, upstream, dtype, workspace=workspace, **options)
        for workspace in (0, each - 1, 700 * each, 10**9)
    ]
    assert results[0][0].isnan().nonzero().tolist() == [[3]]
    for gradient in results[0][1:]:
        dense = gradient.to_dense()
        assert dense.isfinite().all()
        assert dense.any()
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a.to_dense().nan_to_num(9), b.to_dense().nan_to_num(9))


def test_what_the_workspace_keeps():
    x, w, target, _, _ = problem(4, 90, 8, 1, torch.float32)
    target[2] = -1
    op = torch.ops.synface_kernels
    forward = partial(op.margin_cross_entropy_forward, x.float(), w.float(), None, target[:, None])
    counted = [0, 1, 3]
    for workspace, classes in ((0, 0), (4 * 4 - 1, 0), (50 * 4 * 4, 50), (10**6, 90)):
        kept = forward(64.0, math.inf, False, False, workspace, False, "cpu")[-1]
        assert kept.shape == (classes, 4)
        cosine = F.linear(F.normalize(w), F.normalize(x))[:classes, counted]
        cosine[torch.arange(classes)[:, None] == target[counted]] = -torch.inf
        torch.testing.assert_close(kept[:, :3], cosine.float(), rtol=1e-5, atol=1e-6)
        assert not kept[:, 3].any()
    x, w = x.float().requires_grad_(), w.float().requires_grad_()
    loss = sk.margin_cross_entropy(x, w, target, ignore_index=-1, workspace=10**6)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    for a, b in zip(torch.autograd.grad(loss, (x, w)), first, strict=True):
        assert torch.equal(a, b)


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


def sampled(c: int, share: float = 0.3) -> Tensor:
    """Some of C classes, the first and the last among them."""
    ids = torch.rand(c, generator=torch.Generator().manual_seed(c)) < share
    ids[[0, -1]] = True
    return ids.nonzero().squeeze(1)


@pytest.mark.parametrize("mix", ["joint", "separate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", ISAS)
def test_class_ids_give_the_bits_of_the_rows_that_they_name(isa, dtype, mix, monkeypatch):
    monkeypatch.setenv("SYNFACE_CPU_ISA", isa)
    for n, c, d, k in ((64, 4097, 129, 3), (7, 2000, 8, 1), (5, 9, 1, 2), (1, 1, 4, 1)):
        x, w, _, t, upstream = problem(n, c, d, k, dtype)
        ids = sampled(c)
        target = torch.randint(0, len(ids), (n, k) if k > 1 else (n,))
        results = []
        for impl, weight, class_ids in (
            ("cpu", w, ids),
            ("cpu", w[ids], None),
            ("reference", w, ids),
            ("reference", w[ids], None),
        ):
            loss, dx, dw = run(
                x, weight, target, t, upstream, dtype, mix=mix, class_ids=class_ids, impl=impl
            )
            if class_ids is not None:
                assert dw.is_coalesced()
                assert dw.shape == w.shape
                assert torch.equal(dw.indices()[0], ids)
                dw = dw.values()
            results.append((loss, dx, dw))
        for with_ids, of_rows in (results[:2], results[2:]):
            for a, e in zip(with_ids, of_rows, strict=True):
                assert torch.equal(a, e)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_step_on_sampled_classes(impl):
    x, w, target, _, _ = problem(20, 500, 16, 1, torch.float64)
    target[3] = -100
    ids, places = sk.sample_classes(target, 500, 60, torch.Generator().manual_seed(1))
    weight = w.clone().requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for scale in (1, 2):  # two losses of one step
        (scale * sk.margin_cross_entropy(x, weight, places, class_ids=ids, impl=impl)).backward()
    optimizer.step()
    rows = w[ids].requires_grad_()
    (grad,) = torch.autograd.grad(sk.margin_cross_entropy(x, rows, places, impl="reference"), rows)
    torch.testing.assert_close(weight.detach()[ids], w[ids] - 0.3 * grad)
    others = torch.ones(500, dtype=torch.bool).index_fill(0, ids, False)
    assert torch.equal(weight.detach()[others], w[others])
    loss = sk.margin_cross_entropy(x, weight, places, class_ids=ids, impl=impl)
    (grad,) = torch.autograd.grad(loss, weight)
    before = weight.detach().clone()
    with torch.no_grad():
        sk.row_sgd_(weight, grad.values(), ids, lr=0.1)
    torch.testing.assert_close(weight.detach(), before - 0.1 * grad.to_dense())


GATHERED = """
import torch, synface_kernels as sk
from synface_kernels.testing import peak_bytes
n, c, d = 8, 120_000, 512
x, w = torch.randn(n, d), torch.randn(c, d)
ids = torch.arange(0, c, 2)
t = torch.randint(0, len(ids), (n,))
sk.margin_cross_entropy(x, w[:9], t * 0, class_ids=ids[:2])
peak = peak_bytes(lambda: sk.margin_cross_entropy(x, w, t, class_ids=ids))
print(peak / 2**20, len(ids) * d * 4 / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sampled_rows_are_not_gathered():
    done = subprocess.run([sys.executable, "-c", GATHERED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, gathered = map(float, done.stdout.split())
    assert peak < gathered / 4


MEMORY = """
import torch, synface_kernels as sk
from synface_kernels.testing import peak_bytes
n, c, d = 512, 100_000, 64
x = torch.randn(n, d, requires_grad=True)
w = torch.randn(c, d, requires_grad=True)
t = torch.randint(0, c, (n,))
sk.margin_cross_entropy(x[:2], w[:2], t[:2] * 0).backward()
x.grad = w.grad = None
peak = peak_bytes(lambda: sk.margin_cross_entropy(x, w, t, workspace=WORKSPACE << 20).backward())
print(peak / 2**20, (n + c) * d * 4 / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("workspace", [0, 100])
def test_peak_memory_is_the_gradients_the_workspace_and_64_mib(workspace):
    code = MEMORY.replace("WORKSPACE", str(workspace))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, gradients = map(float, done.stdout.split())
    kept = 0.9 * workspace  # it was used
    assert gradients / 2 + kept < peak <= gradients + workspace + 64  # N×C would be 195 MiB


# ---- torch's machinery ---------------------------------------------------------------------------


def test_compile_fullgraph():
    x, w, target, t, _ = problem(8, 40, 16, 2, torch.float32)
    x, w = x.float().requires_grad_(), w.float().requires_grad_()

    def step(x, w, target, t):
        loss, stats = sk.margin_cross_entropy(
            x, w, target, sk.ArcFace(), target_weight=t, return_stats=True, workspace=1000
        )
        return loss + 1e-4 * stats.lse.square().mean(), stats.top1

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for n in (8, 5):
        args = (x[:n], w, target[:n], t[:n].float())
        actual, top1 = compiled(*args)
        expected, expected_top1 = step(*args)
        torch.testing.assert_close(actual, expected)
        assert torch.equal(top1, expected_top1)
        for a, e in zip(
            torch.autograd.grad(actual, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True
        ):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["smoothing", "zero", "sub-centers"])
def test_compile_fullgraph_with_options(name):
    x, w, target, t, _ = problem_of(8, 40, 2, 16, 2, torch.float32)
    w = w if name == "sub-centers" else w.flatten(0, 1)
    x, w, t = x.float().requires_grad_(), w.float().requires_grad_(), t.float()

    def step(x, w, target, t):
        return sk.margin_cross_entropy(x, w, target, target_weight=t, **OPTIONS[name])

    actual = torch.compile(step, fullgraph=True)(x, w, target, t)
    expected = step(x, w, target, t)
    torch.testing.assert_close(actual, expected)
    grads = torch.autograd.grad(actual, (x, w))
    for a, e in zip(grads, torch.autograd.grad(expected, (x, w)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_compile_fullgraph_with_class_ids(impl):
    x, w, target, _, _ = problem(8, 40, 16, 1, torch.float32)
    x, w = x.float().requires_grad_(), w.float().requires_grad_()

    def step(x, w, target, ids):
        return sk.margin_cross_entropy(x, w, target, class_ids=ids, impl=impl)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for num_sampled in (12, 17):
        ids, places = sk.sample_classes(target, 40, num_sampled)
        dx, dw = torch.autograd.grad(compiled(x, w, places, ids), (x, w))
        assert not dw.is_sparse
        expected = torch.autograd.grad(step(x, w, places, ids), (x, w))
        torch.testing.assert_close(dx, expected[0])
        torch.testing.assert_close(dw, expected[1].to_dense())


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, x, w, target):
            return sk.margin_cross_entropy(x, w, target, sk.CosFace())

    x, w, target, _, _ = problem(8, 40, 16, 1, torch.float32)
    args = (x.float(), w.float(), target)
    exported = torch.export.export(Loss(), args)
    torch.testing.assert_close(exported.module()(*args), Loss()(*args))


# ---- bad input -----------------------------------------------------------------------------------

X, W, T = torch.ones(4, 8), torch.ones(5, 8), torch.tensor([0, 1, 2, 3])
T2, TW = torch.tensor([[0, 1]] * 4), torch.tensor([[0.5, 0.5]] * 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, W, T.float()), {}, ValueError, r"target must be int64 .* got float32 \(4,\)"),
        ((X, W, T.int()), {}, ValueError, "got int32"),
        ((X, W, T[:3]), {}, ValueError, r"N = 4 .* got int64 \(3,\)"),
        ((X, W, T[:, None, None]), {}, ValueError, "target must be int64"),
        ((X, W, T2[:, :0]), {"target_weight": TW[:, :0]}, ValueError, "K ≥ 1"),
        ((X, W[:, :7], T), {}, ValueError, r"same D .*\(4, 8\).*\(5, 7\)"),
        ((X[0], W, T), {}, ValueError, r"input must be .* \(N, D\), got float32 \(8,\)"),
        ((X, W[None, None], T), {}, ValueError, r"weight must be"),
        ((X.int(), W, T), {}, ValueError, "input must be .* got int32"),
        ((X.double(), W, T), {}, ValueError, "both be float64"),
        ((X, W[:0], T), {}, ValueError, "at least one class"),
        ((X, W[:, None][:, :0], T), {}, ValueError, r"each class a center, got .*\(5, 0, 8\)"),
        ((X, W, T), {"label_smoothing": 1.0}, ValueError, r"in \[0, 1\), got 1.0"),
        ((X, W, T), {"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a float"),
        (
            (X, W, T, sk.ArcFace(interclass_filter=0.3)),
            {"label_smoothing": 0.1},
            ValueError,
            "what interclass_filter leaves out",
        ),
        ((X, W[:, None], T), {"label_smoothing": 0.1}, NotImplementedError, "for sub-centers"),
        ((X, W, torch.tensor([0, 1, 5, 2])), {}, ValueError, r"\[0, 5\).* got 5 at 2"),
        ((X, W, torch.tensor([0, -1, 0, 2])), {}, ValueError, "got -1 at 1"),
        ((X, W, T2), {}, ValueError, "target_weight .* is required"),
        ((X, W, T), {"target_weight": TW}, ValueError, "target_weight must be"),
        ((X, W, T2), {"target_weight": TW[:, :1]}, ValueError, "target_weight must be"),
        ((X, W, T2), {"target_weight": TW.long()}, ValueError, "floating point"),
        ((X, W, T2), {"target_weight": TW * 0.9}, ValueError, "sum to 1 .* got 0.89"),
        ((X, W, T2), {"target_weight": torch.tensor([[1.5, -0.5]] * 4)}, ValueError, "got -0.5"),
        ((X, W, T2), {"target_weight": TW * math.nan}, ValueError, "finite"),
        ((X, W, T2), {"target_weight": TW.clone().requires_grad_()}, ValueError, "no gradient"),
        ((X, W, T.to("meta")), {}, ValueError, "input's device cpu, got int64 .* on meta"),
        ((X, W, T, "arcface"), {}, TypeError, "margin must be .* got str"),
        ((X, W, [0, 1, 2, 3]), {}, TypeError, "target must be a tensor, got list"),
        ((X, W, T), {"reduction": "avg"}, ValueError, "reduction must be .* got 'avg'"),
        ((X, W, T), {"mix": "sum"}, ValueError, "mix must be"),
        ((X, W, T), {"impl": "cuda"}, ValueError, "impl must be one of .* got 'cuda'"),
        ((X, W, T), {"impl": "triton"}, RuntimeError, "impl='triton' .* cannot run here: runs on"),
        ((X, W, T), {"class_ids": [0, 1]}, TypeError, "class_ids must be a tensor, got list"),
        ((X, W, T), {"class_ids": T.int()}, ValueError, "class_ids must be int64 .* got int32"),
        (
            (X, W, T),
            {"class_ids": T[None]},
            ValueError,
            r"of shape \(S,\), S ≥ 1, got int64 \(1, 4",
        ),
        ((X, W, T), {"class_ids": T[:0]}, ValueError, "S ≥ 1, got int64"),
        ((X, W, T), {"class_ids": T.to("meta")}, ValueError, "class_ids must be on input's device"),
        ((X, W, T), {"class_ids": T + 2}, ValueError, r"class_ids must be in \[0, 5\), got 5 at 3"),
        ((X, W, T), {"class_ids": T - 1}, ValueError, "class_ids must be .* got -1 at 0"),
        ((X, W, T), {"class_ids": T.flip(0)}, ValueError, "class_ids must rise strictly, got 2"),
        ((X, W, T), {"class_ids": T // 2}, ValueError, "class_ids must rise strictly, got 0"),
        (
            (X, W, T),
            {"class_ids": T[:3]},
            ValueError,
            r"target must be in \[0, 3\), a place in class_ids, which must hold every label, .*"
            "got 3 at 3",
        ),
        ((X, W, T), {"group": object()}, TypeError, "group must be a .* process group, got object"),
        ((X, W, T), {"workspace": -1}, ValueError, "workspace must not be negative, got -1"),
        ((X, W, T), {"workspace": 1e9}, TypeError, "workspace must be an int, got float"),
        ((X, W, T), {"workspace": True}, TypeError, "workspace must be an int, got bool"),
        ((X, W, T), {"class_start": 3}, ValueError, "class_start must be 0 without a group, got 3"),
        (
            (X, W, T, sk.ArcFace(margin=torch.zeros(3))),
            {},
            ValueError,
            r"shape \(4,\) .* got \(3,\)",
        ),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        sk.margin_cross_entropy(*arguments, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sk.ArcFace(margin=28.6), ValueError, "angle in radians .* got 28.6"),
        (lambda: sk.ArcFace(scale=0.0), ValueError, "scale must be finite and positive, got 0"),
        (lambda: sk.ArcFace(scale=math.inf), ValueError, "got inf"),
        (lambda: sk.ArcFace(scale="64"), TypeError, "scale must be a float, got str"),
        (lambda: sk.CosFace(margin=math.nan), ValueError, "got nan"),
        (lambda: sk.CosFace(margin=2.5), ValueError, "difference of cosines"),
        (lambda: sk.SphereFace(margin=0.0), ValueError, "m1 is a factor of the angle"),
        (lambda: sk.ArcFace(margin=[0.5]), TypeError, "m2 must be a float or a tensor, got list"),
        (lambda: sk.ArcFace(margin=torch.zeros(2, 2)), ValueError, r"shape \(N,\), got"),
        (lambda: sk.ArcFace(beyond_pi="clip"), ValueError, "beyond_pi must be .* got 'clip'"),
        (lambda: sk.ArcFace(interclass_filter=1.5), ValueError, r"in \[-1, 1\] or None, got 1.5"),
        (lambda: sk.CosFace(interclass_filter="0"), TypeError, "must be a float or None, got str"),
        (
            lambda: sk.SphereFace(interclass_filter_mode="skip"),
            ValueError,
            "must be 'drop' or 'zero', got 'skip'",
        ),
        (lambda: sk.ArcFace(target_grad="ste"), ValueError, "target_grad must be .* got 'ste'"),
    ],
)
def test_margins_that_make_no_sense(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_bad_isa_is_named(monkeypatch):
    monkeypatch.setenv("SYNFACE_CPU_ISA", "avx1024")
    with pytest.raises(ValueError, match=r"SYNFACE_CPU_ISA must be one of .*base.* got avx1024"):
        sk.margin_cross_entropy(X, W, T)


def test_explain():
    choice = sk.explain(sk.margin_cross_entropy, X, W, T)
    assert choice.impl == "cpu"
    assert "triton" in str(sk.explain("margin_cross_entropy", device="cuda"))
    with pytest.raises(
        ValueError, match=r"op must be one of .*margin_cross_entropy.* got 'softmax'"
    ):
        sk.explain("softmax")


# ---- NumPy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("isa", ISAS)
def test_numpy_binding_agrees(isa, dtype, monkeypatch):
    monkeypatch.setenv("SYNFACE_CPU_ISA", isa)
    assert synface_kernels.numpy.cpu_isa() == isa.replace("onednn", "avx512")  # has no oneDNN
    x, w, target, _, upstream = problem(9, 1100, 24, 2, torch.float32)
    x, w, g = x.numpy().astype(dtype), w.numpy().astype(dtype), upstream.numpy()
    target[:, 1] = (target[:, 0] + 1) % 1100
    target[4] = -1
    op = torch.ops.synface_kernels
    as_torch = [torch.from_numpy(v) for v in (x, w)]
    lse, most, cosine, _, _, *kept = op.margin_cross_entropy_forward(
        *as_torch, None, target, 64.0, math.inf, True, False, 0, False, "cpu"
    )
    mean = kept[0]
    actual = synface_kernels.numpy.margin_cross_entropy_forward(x, w, target.numpy(), 64.0, True)
    gc = np.stack([g, -g], 1)
    grads = op.margin_cross_entropy_backward(
        *as_torch,
        None,
        target,
        lse,
        *kept,
        *map(torch.from_numpy, (g, gc)),
        lse[:0],
        64.0,
        math.inf,
        True,
        True,
        False,
        "cpu",
    )
    expected = (lse, most, cosine, mean, *grads)
    actual += synface_kernels.numpy.margin_cross_entropy_backward(
        x, w, target.numpy(), actual[0], actual[3], g, gc, 64.0
    )
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.numpy().dtype
        np.testing.assert_allclose(
            a, e.numpy(), rtol=1e-4 if dtype == np.float32 else 1e-10, atol=1e-5
        )


def test_numpy_bad_input():
    x, w = np.zeros((3, 4), np.float32), np.zeros((5, 4), np.float32)
    labels = np.array([[0], [1], [5]])
    with pytest.raises(IndexError, match=r"labels must be in \[-2, 5\), got 5 in row 2"):
        synface_kernels.numpy.margin_cross_entropy_forward(x, w, labels)
    with pytest.raises(
        ValueError, match="both be float32 or both float64, got float32 and float64"
    ):
        synface_kernels.numpy.margin_cross_entropy_forward(x, w.astype(float), labels)
    with pytest.raises(ValueError, match="do not fit together"):
        synface_kernels.numpy.margin_cross_entropy_forward(x, w[:, :3], labels)
