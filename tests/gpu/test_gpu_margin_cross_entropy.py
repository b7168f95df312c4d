"""The margin softmax's values on a GPU, against its definition in float64.

Run by `make gpu-evidence`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import synface_kernels as sk
from synface_kernels.ops.margin_cross_entropy import op
from synface_kernels.testing import assert_as_exact_as_torch
from tests.gpu.on_device import (
    BF16,
    DEVICE,
    EPS,
    F16,
    F32,
    F64,
    autocast,
    needs_device,
    normal,
    peak_bytes,
    pick,
    rng,
)

pytestmark = needs_device
COMBINED = sk.CombinedMargin(64.0, 0.9, 0.4, 0.15)
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32)]
SHAPES = pick([(1, 1000, 129), (300, 5000, 512)], [(1, 70, 9), (9, 130, 16)])
SMALL = pick((65, 3000, 128), (6, 60, 16))


class Problem(NamedTuple):
    """Arguments of the margin softmax, and the gradients by its rows' losses."""

    x: Tensor
    w: Tensor
    target: Tensor
    share: Tensor | None
    upstream: Tensor


def make(
    n: int,
    c: int,
    d: int,
    k: int = 1,
    m: int = 1,
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
    classes: int | None = None,
) -> Problem:
    """Return a random problem, whose last row of several is ignored."""
    x = normal(n, d, seed=1, dtype=dtypes[0])
    w = normal(*((c, d) if m == 1 else (c, m, d)), seed=2, dtype=dtypes[1])
    g = rng(3)
    target = torch.randint(0, classes or c, (n, k), generator=g, device=DEVICE)
    if n > 3:
        target[n - 1] = -100
    share = torch.rand(n, k, generator=g, device=DEVICE).softmax(1) if k > 1 else None
    if share is not None and n > 3:
        share[n - 1] = 0
    upstream = torch.rand(n, generator=g, device=DEVICE)
    return Problem(x, w, target if k > 1 else target[:, 0], share, upstream)


def run(
    problem: Problem,
    impl: str,
    dtype: torch.dtype | None = None,
    margin: sk.CombinedMargin = COMBINED,
    **options: Any,
) -> list[Tensor]:
    """Return loss, statistics and gradients, in a dtype or the problem's own."""
    x, w = (v.detach().to(dtype, copy=True).requires_grad_() for v in problem[:2])
    loss, stats = sk.margin_cross_entropy(
        x,
        w,
        problem.target,
        margin,
        target_weight=problem.share,
        reduction="none",
        return_stats=True,
        impl=impl,
        **options,
    )
    grads = torch.autograd.grad(loss, (x, w), problem.upstream.to(loss.dtype))
    dense = (g.to_dense() if g.is_sparse else g for g in grads)
    return [v.detach() for v in (loss, stats.lse, stats.target_cosine)] + list(dense)


def check(problem: Problem, **options: Any) -> None:
    """Check against float64: losses as exact as float32, gradients as torch in the GEMMs' dtype."""
    x, w = problem[:2]
    gemm_dtype = x.dtype if x.dtype == w.dtype else F32
    actual = run(problem, "triton", **options)
    exact = run(problem, "reference", F64, **options)
    plain = run(problem, "reference", **options)
    if gemm_dtype != F32:
        with mock.patch.object(op, "statistics_dtype", return_value=gemm_dtype):
            plain[3:] = run(problem, "reference", **options)[3:]
    scale = options.get("margin", COMBINED).scale
    shortest = [v.flatten(0, -2).norm(dim=1, dtype=F64).min().item() for v in (x, w)]
    unit = EPS * scale
    bounds = [4 * unit, 4 * unit, 4 * EPS, *(4 * unit / length for length in shortest)]
    names = ("loss", "lse", "target_cosine", "grad_input", "grad_weight")
    for name, *results, atol in zip(names, actual, exact, plain, bounds, strict=True):
        assert_as_exact_as_torch(*results, atol=atol, name=name)
    assert actual[3].dtype == x.dtype
    assert actual[4].dtype == w.dtype


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtypes):
    check(make(*shape, dtypes=dtypes))


def test_many_rows_and_classes_match_float64():
    check(make(*pick((1024, 70_001, 512), (20, 300, 16)), dtypes=(BF16, BF16)))


@pytest.mark.parametrize("mix", ["joint", "separate"])
@pytest.mark.parametrize(("k", "dtype"), [(2, F32), (3, BF16)])
def test_several_labels_match_float64(k, dtype, mix):
    check(make(*SMALL, k, dtypes=(dtype, dtype)), mix=mix)


@pytest.mark.parametrize("margin", [sk.ArcFace(), sk.CosFace(), sk.SphereFace()], ids=str)
def test_margins_match_float64(margin):
    check(make(*SMALL), margin=margin)


OPTIONS: list[tuple[int, int, dict[str, Any]]] = [  # K, M, options
    (1, 1, {"class_ids": True}),
    (2, 1, {"class_ids": True, "mix": "separate"}),
    (1, 3, {}),
    (2, 2, {"class_ids": True}),
    (1, 2, {"margin": sk.ArcFace(interclass_filter=0.1)}),
    (1, 1, {"margin": sk.ArcFace(interclass_filter=0.1)}),
    (1, 1, {"margin": sk.CosFace(interclass_filter=0.0, interclass_filter_mode="zero")}),
    (1, 1, {"label_smoothing": 0.1}),
    (2, 1, {"label_smoothing": 0.3, "class_ids": True, "mix": "separate"}),
]


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize(("k", "m", "options"), OPTIONS, ids=str)
def test_options_match_float64(k, m, options, dtypes):
    n, c, d = SMALL
    options = dict(options)
    if options.pop("class_ids", False):
        ids = torch.arange(1, c, 2, device=DEVICE)
        check(make(n, c, d, k, m, dtypes, classes=len(ids)), class_ids=ids, **options)
    else:
        check(make(n, c, d, k, m, dtypes), **options)


def test_one_class_one_row_and_no_valid_row():
    check(make(1, 1, pick(64, 8)))
    problem = make(*SMALL)
    loss, _, _, *grads = run(
        problem._replace(target=torch.full_like(problem.target, -100)), "triton"
    )
    assert not loss.any()
    assert not any(g.any() for g in grads)


def test_rows_without_embeddings():
    n, c, d = SMALL
    loss, _, _, *grads = run(make(0, c, d), "triton")
    assert loss.shape == (0,)
    assert [g.shape for g in grads] == [(0, d), (c, d)]
    assert not grads[1].any()


def test_forward_without_gradients_agrees():
    x, w, target, _, _ = make(*SMALL)
    fused = sk.margin_cross_entropy(x, w, target, reduction="none", impl="triton")
    x.requires_grad_()
    other = sk.margin_cross_entropy(x, w, target, reduction="none", impl="triton")
    torch.testing.assert_close(fused, other.detach(), rtol=1e-5, atol=1e-4)


def test_top1():
    x, w, target, _, _ = make(*SMALL)
    target = target.clamp_min(0)
    target[:2] = torch.arange(2, device=DEVICE)
    w[:2] = x[:2]  # these rows are at their centers
    _, stats = sk.margin_cross_entropy(x, w, target, return_stats=True, impl="triton")
    cosine = F.normalize(x.double()) @ F.normalize(w.double()).T
    highest = cosine.gather(1, target[:, None])[:, 0] >= cosine.amax(1)
    assert torch.equal(stats.top1, highest)
    assert stats.top1[:2].all()


@pytest.mark.parametrize("design", ["fused", "tiled"])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16)], ids=str)
def test_each_design_matches_float64(design, dtypes, monkeypatch):
    monkeypatch.setenv("SYNFACE_MARGIN_DESIGN", design)
    check(make(*SHAPES[1], dtypes=dtypes))
    check(make(*SMALL, 2, dtypes=dtypes), mix="separate")


# ---- under autocast ------------------------------------------------------------------------------


def eager(x: Tensor, w: Tensor, target: Tensor, margin: sk.CombinedMargin) -> Tensor:
    """Compute ArcFace of all rows over dense logits in plain torch, as autocast has it."""
    cosine = F.linear(F.normalize(x), F.normalize(w)).float()
    at_target = cosine.gather(1, target[:, None])
    theta = at_target.clamp(-1 + 1e-7, 1 - 1e-7).acos() + margin.m2
    psi = torch.where(theta > math.pi, at_target - margin.m2 * math.sin(margin.m2), theta.cos())
    logits = margin.scale * cosine.scatter(1, target[:, None], psi)
    return F.cross_entropy(logits, target, reduction="none")


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (BF16, BF16)], ids=str)
@pytest.mark.parametrize("gemm_dtype", [BF16, F16], ids=str)
def test_autocast_is_as_exact_as_eager_torch_under_autocast(gemm_dtype, dtypes):
    x, w, target, _, upstream = make(*pick((300, 5000, 512), (9, 130, 16)), dtypes=dtypes)
    target, margin = target.clamp_min(0), sk.ArcFace(64.0, 0.5)

    def results(
        function: Any, dtype: torch.dtype | None, under: torch.dtype | None
    ) -> list[Tensor]:
        leaves = [v.detach().to(dtype, copy=True).requires_grad_() for v in (x, w)]
        with autocast(under):
            loss = function(*leaves)
        grads = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))
        return [loss.detach(), *grads]

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return sk.margin_cross_entropy(x, w, target, margin, reduction="none", impl="triton")

    def reference(x: Tensor, w: Tensor) -> Tensor:
        return sk.margin_cross_entropy(x, w, target, margin, reduction="none", impl="reference")

    actual = results(ours, None, gemm_dtype)
    exact = results(reference, F64, None)
    plain = results(lambda x, w: eager(x, w, target, margin), None, gemm_dtype)
    assert actual[0].dtype == F32
    for leaf, grad in zip((x, w), actual[1:], strict=True):
        assert grad.dtype == leaf.dtype
    for name, *values in zip(
        ("loss", "grad_input", "grad_weight"), actual, exact, plain, strict=True
    ):
        assert_as_exact_as_torch(*values, atol=1e-5, name=name)


# ---- memory, offsets -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_auto_takes_triton_and_peak_memory_is_the_gradients_and_128_mib(dtype):
    assert sk.explain(sk.margin_cross_entropy, device=DEVICE).impl == pick("triton", "cpu")
    n, c, d = pick((2048, 200_000, 256), (7, 60, 16))  # N×C in float32 would be 1.5 GiB
    x, w, target, _, _ = make(n, c, d, dtypes=(dtype, dtype))
    x.requires_grad_()
    w.requires_grad_()
    peak = peak_bytes(lambda: sk.margin_cross_entropy(x, w, target, impl="triton").backward())
    assert peak <= (n + c) * d * dtype.itemsize + (128 << 20)


def test_more_than_2_to_the_31_elements():
    """The last centers' offsets need more than 31 bits, and so do their gradients'."""
    c, d = pick((1 << 23) + 64, 500), pick(256, 32)
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB")
    x, w, target, _, upstream = make(8, c, d, dtypes=(BF16, BF16))
    target[:] = torch.arange(c - 8, c, device=DEVICE)
    w.requires_grad_()
    loss = sk.margin_cross_entropy(x, w, target, reduction="none", impl="triton")
    (grad,) = torch.autograd.grad(loss, w, upstream)
    with torch.no_grad():
        unit = F.normalize(x.double())
        lse = torch.full((8,), -math.inf, device=DEVICE, dtype=F64)
        for part in w.split(1 << 20):
            lse = lse.logaddexp((64 * unit @ F.normalize(part.double()).T).logsumexp(1))
        rows = w[c - 64 :].double()
        cosine = unit @ F.normalize(rows).T
        at_target = cosine[:, 56:].diagonal()
        margined = 64 * (at_target.acos() + 0.5).cos()
        lse = (lse.exp() - (64 * at_target).exp() + margined.exp()).log()
        torch.testing.assert_close(loss.double(), lse - margined, rtol=1e-5, atol=1e-4)
        # The gradient by the 56 centers before the targets.
        factor = 64 * (64 * cosine[:, :56] - lse[:, None]).exp() * upstream.double()[:, None]
        by_unit, units = factor.T @ unit, F.normalize(rows[:56])
        along = (by_unit * units).sum(1, keepdim=True)
        expected = (by_unit - along * units) / rows[:56].norm(dim=1, keepdim=True)
    error = (grad[c - 64 : c - 8].double() - expected).norm() / expected.norm()
    assert error < 2**-7
