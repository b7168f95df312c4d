"""Sub-centers, the inter-class filter and label smoothing of the margin softmax."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import synface_kernels as sk
from tests.helpers.cpu import cpu
from tests.helpers.margin import (
    FILTERED,
    ISAS,
    assert_matches_float64,
    naive_logits,
    problem,
    problem_of,
    run,
    sampled,
)

# N, C, M, D, K: no room for two classes in a tile; odd; one; several tiles
SUB_CENTERS = [(7, 3, 600, 8, 2), (33, 701, 3, 65, 3), (5, 9, 1, 4, 1), (64, 1030, 2, 16, 1)]


def assert_sample_has_the_bits_of_its_rows(case, dtype, **options):
    """Assert that a class sample gives the bits that its rows as the whole weight give."""
    x, w, target, t, upstream = case
    ids = sampled(len(w))
    in_sample = (x, w, target % len(ids), t, upstream)
    for isa in ISAS:
        with cpu(isa=isa):
            of_rows = run(x, w[ids], *in_sample[2:], dtype, **options)
            *others, grad = run(*in_sample, dtype, **options, class_ids=ids)
        assert grad.is_coalesced()
        assert grad.shape == w.shape
        for a, e in zip((*others, grad.values()), of_rows, strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "c", "m", "d", "k"), SUB_CENTERS)
def test_sub_centers_match_float64(dtype, n, c, m, d, k):
    for mix in ("joint", "separate"):
        case = problem_of(n, c, m, d, k, dtype)
        assert_matches_float64(case, dtype, isas=ISAS, mix=mix)
        assert_sample_has_the_bits_of_its_rows(case, dtype, mix=mix)


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


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", FILTERED)
def test_filter_matches_float64(name, k, dtype):
    for mix in ("joint", "separate"):
        for n, c, d in ((7, 1000, 129), (64, 5, 8), (1, 1, 4)):
            case = problem(n, c, d, k, dtype)
            assert_matches_float64(case, dtype, FILTERED[name], ISAS, mix=mix)
    case = problem_of(33, 700, 2, 64, k, dtype)
    assert_matches_float64(case, dtype, FILTERED[name], ISAS)


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
    unfiltered = cosine.masked_fill(dirty, -torch.inf)
    assert torch.equal(stats.top1, unfiltered.argmax(1) == target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mix", ["joint", "separate"])
def test_smoothing_matches_float64(mix, dtype):
    for n, c, d, k in ((7, 1000, 129, 1), (64, 5, 8, 3), (600, 700, 16, 2), (1, 1, 4, 1)):
        case = problem(n, c, d, k, dtype)
        for epsilon in (0.1, 0.9):
            assert_matches_float64(case, dtype, isas=ISAS, mix=mix, label_smoothing=epsilon)
        assert_sample_has_the_bits_of_its_rows(case, dtype, mix=mix, label_smoothing=0.1)


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
