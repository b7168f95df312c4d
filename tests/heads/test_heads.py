"""AdaFace and MagFace against their papers' formulas over dense logits in float64."""

import functools
import math

import pytest
import torch
from synface.heads import AdaFace, MagFace, MarginHead
from torch.nn.functional import cross_entropy, normalize

import synface_kernels as sk

N, D, C = 24, 8, 13


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def batch(dtype=torch.float64, length=20.0, n=N):
    """Return embeddings of many lengths, near a common direction so that some cosines are high."""
    x = normalize(torch.randn(n, D, dtype=torch.float64))
    x = x * length * torch.rand(n, 1, dtype=torch.float64).mul(2).add(0.05)
    return x.to(dtype).requires_grad_(), torch.randint(C, (n,))


def dense(x, weight, target, scale, m2, m3):
    """Return each row's loss of s·(cos(θ + m2) − m3) for the target, s·cos θ for other classes."""
    cosine = normalize(x) @ normalize(weight).T
    own = (cosine.gather(1, target[:, None]).squeeze(1).acos() + m2).cos() - m3
    logits = cosine.scatter(1, target[:, None], own[:, None])
    return cross_entropy(scale * logits, target, reduction="none")


def assert_like(head, x, target, expected, **options):
    """Assert that the loss and both gradients are equal."""
    loss = head(x, target, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-11)
    inputs = (x, head.weight)
    ours = torch.autograd.grad(loss.sum(), inputs, retain_graph=True)
    theirs = torch.autograd.grad(expected.sum(), inputs)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("momentum", [0.01, 1.0])
def test_adaface_is_the_papers_formula(momentum, reduction):
    head = AdaFace(D, C, scale=16.0, m=0.4, h=0.333, momentum=momentum, init_std=1.0).double()
    for _ in range(3):  # the running statistics go on from batch to batch
        x, target = batch()
        length = x.detach().norm(dim=1)
        mean = momentum * length.mean() + (1 - momentum) * head.norm_mean
        std = momentum * length.std() + (1 - momentum) * head.norm_std
        quality = ((length - mean) / (std / 0.333)).clip(-1, 1)
        loss = dense(x, head.weight, target, 16.0, -0.4 * quality, 0.4 * quality + 0.4)
        if reduction != "none":
            loss = getattr(loss, reduction)()
        assert_like(head, x, target, loss, reduction=reduction)
        torch.testing.assert_close(head.norm_mean, mean)
        torch.testing.assert_close(head.norm_std, std)


def test_adaface_evaluates_with_the_statistics_that_it_has():
    head = AdaFace(D, C, momentum=1.0).double()
    head(*batch())
    state = {name: value.clone() for name, value in head.state_dict().items()}
    assert set(state) == {"weight", "norm_mean", "norm_std"}
    other = AdaFace(D, C).double()
    other.load_state_dict(state)
    for each in (head, other):
        each.eval()
    x, target = batch()
    assert torch.equal(head(x, target), other(x, target))
    assert torch.equal(head.norm_mean, state["norm_mean"])


def test_adaface_counts_rows_that_count():
    x, target = batch()
    target[:4] = -100
    with torch.no_grad():
        x[4] = math.nan
    head, few = (AdaFace(D, C, momentum=0.5, dtype=torch.float64) for _ in range(2))
    few.load_state_dict(head.state_dict())
    rows = head(x, target, reduction="none")
    expected = few(x[5:], target[5:], reduction="none")
    torch.testing.assert_close(rows[5:], expected)
    assert rows[4].isnan()
    assert not rows[:4].any()
    torch.testing.assert_close(head.norm_mean, few.norm_mean)
    torch.testing.assert_close(head.norm_std, few.norm_std)


def test_adaface_with_one_row_or_none():
    head = AdaFace(D, C, momentum=0.5)
    x, target = batch(torch.float32, n=1)
    assert head(x, target).isfinite()
    torch.testing.assert_close(head.norm_mean, 0.5 * 20 + 0.5 * x.detach().norm())
    assert head.norm_std == 100
    before = head.norm_mean.clone()
    assert head(x, torch.tensor([-100])) == 0
    assert head(x[:0], target[:0]) == 0
    assert torch.equal(head.norm_mean, before)


def test_an_error_leaves_adafaces_statistics_as_they_were():
    head = AdaFace(D, C)
    x, target = batch(torch.float32)
    with pytest.raises(ValueError, match=r"target must be in \[0, 13\)"):
        head(x, target + C)
    assert head.norm_mean == 20
    assert head.norm_std == 100


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_magface_is_the_papers_formula(reduction):
    settings = {"l_a": 10.0, "u_a": 30.0, "l_m": 0.3, "u_m": 0.8, "lambda_g": 5.0}
    head = MagFace(D, C, scale=16.0, beyond_pi="none", init_std=1.0, **settings).double()
    x, target = batch()
    length = x.norm(dim=1)
    assert (length < 10).any()
    assert (length > 30).any()
    a = length.clip(10, 30)
    margin = 0.3 + (0.8 - 0.3) / (30 - 10) * (a - 10)
    loss = dense(x, head.weight, target, 16.0, margin, 0.0) + 5.0 * (1 / a + a / 30**2)
    if reduction != "none":
        loss = getattr(loss, reduction)()
    assert_like(head, x, target, loss, reduction=reduction)


def test_magface_gradient_by_differences():
    head = MagFace(D, C, scale=8.0, l_a=1.0, u_a=50.0, lambda_g=5.0, dtype=torch.float64)
    x, target = batch(n=4)

    def loss(x, weight):
        return torch.func.functional_call(head, {"weight": weight}, (x, target))

    torch.autograd.gradcheck(loss, (x, head.weight))


CASTS = {
    "bfloat16": lambda head: head.bfloat16(),
    "half": lambda head: head.half(),
    "to": lambda head: head.to(torch.bfloat16),
    "within a model": lambda head: torch.nn.Sequential(head).to("cpu", torch.bfloat16)[0],
    "assigned": lambda head: assigned(head, torch.bfloat16),
    "back from float64": lambda head: head.double().bfloat16(),
}


def assigned(head, dtype):
    state = {name: value.to(dtype) for name, value in head.state_dict().items()}
    head.load_state_dict(state, assign=True)
    return head


def converge(head):
    """Let statistics go from 20 and 100 to lengths of 24 ± 4, by steps of a hundredth."""
    draws = torch.Generator().manual_seed(0)
    for _ in range(600):
        x = normalize(torch.randn(N, D, generator=draws))
        x = x * (24 + 4 * torch.randn(N, 1, generator=draws))
        head(x.to(head.weight.dtype).float(), torch.zeros(N, dtype=torch.long))
    return head


@functools.cache
def converged():
    return converge(AdaFace(D, C, dtype=torch.float32))


@pytest.mark.parametrize("cast", CASTS)
def test_adafaces_statistics_are_not_cast(cast):
    low = CASTS[cast](AdaFace(D, C))
    assert low.weight.dtype in (torch.bfloat16, torch.float16)
    plain = converged()
    converge(low)
    assert low.norm_mean.dtype == low.norm_std.dtype == torch.float32
    torch.testing.assert_close(low.norm_mean, plain.norm_mean, rtol=1e-3, atol=0)
    torch.testing.assert_close(low.norm_std, plain.norm_std, rtol=1e-2, atol=0)
    assert abs(low.norm_mean - 24) < 0.3


def test_adaface_made_under_another_default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        head = AdaFace(D, C)
    finally:
        torch.set_default_dtype(before)
    assert head.weight.dtype == torch.bfloat16
    assert head.norm_mean.dtype == head.norm_std.dtype == torch.float32
    head.norm_mean.data = head.norm_mean.data.bfloat16()  # as FSDP's buffer_dtype does
    with pytest.raises(ValueError, match=r"must be float32.*got bfloat16.*buffer_dtype=None"):
        head(torch.randn(4, D), torch.arange(4))


def test_magface_rewards_length_and_ignores_rows():
    head = MagFace(D, C, lambda_g=1e6)
    x, target = batch(torch.float32, length=50.0)
    target[0] = -100
    loss, stats = head(x, target, return_stats=True)
    loss.backward()
    length = x.detach().norm(dim=1)
    inside = (length > 10) & (length < 110)
    inside[0] = False
    assert inside.any()
    assert ((x.grad * x).sum(1)[inside] < 0).all()  # a step down makes the embedding longer
    assert not x.grad[0].any()
    assert stats.top1.shape == (N,)


@pytest.mark.parametrize("kind", [AdaFace, MagFace])
def test_k_hot_targets_share_the_rows_margin(kind):
    head = kind(D, C).double().eval()
    x, target = batch()
    pairs = torch.stack([target, target], 1)
    both = head(x, pairs, torch.full((N, 2), 0.5, dtype=torch.float64))
    torch.testing.assert_close(both, head(x, target))


@pytest.mark.parametrize("kind", [AdaFace, MagFace])
def test_bfloat16_embeddings_and_strides(kind):
    head = kind(D, C).eval()
    x, target = batch(torch.bfloat16)
    loss = head(x, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, head(x.float(), target), rtol=1e-6, atol=1e-6)
    spread = torch.zeros(D, 2 * N).T[::2].copy_(x)
    assert not spread.is_contiguous()
    torch.testing.assert_close(head(spread, target), head(x.float(), target))


@pytest.mark.parametrize("kind", [MarginHead, AdaFace, MagFace])
def test_sub_centers(kind):
    """A class's cosine is its best sub-center's; the others get no gradient."""
    head = kind(D, C, sub_centers=3, init_std=1.0).double().eval()
    assert head.weight.shape == (C, 3, D)
    assert "sub_centers=3" in repr(head)
    x, target = batch()
    row = x[:1].detach()
    best = (normalize(row) @ normalize(head.weight.flatten(0, 1)).T).view(C, 3).argmax(1)
    chosen = head.weight.detach()[torch.arange(C), best]
    one = kind(D, C).double().eval()
    one.load_state_dict(head.state_dict() | {"weight": chosen})
    loss = head(row, target[:1])
    torch.testing.assert_close(loss, one(row, target[:1]))
    loss.backward()
    touched = head.weight.grad.abs().sum(2) > 0
    assert torch.equal(touched, torch.nn.functional.one_hot(best, 3).bool())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (MarginHead, {"sub_centers": 0}, "sub_centers must be at least 1, got 0"),
        (AdaFace, {"m": 1.0}, r"m must be in \[0, 1\), got 1.0"),
        (AdaFace, {"h": 0.0}, "h must be finite and positive, got 0.0"),
        (AdaFace, {"momentum": math.nan}, r"momentum must be in \(0, 1\], got nan"),
        (MagFace, {"l_a": 110.0}, "0 < l_a < u_a, got 110.0 and 110.0"),
        (MagFace, {"u_m": 45.0}, "angles in radians.*got 0.45 and 45.0"),
        (MagFace, {"lambda_g": -1.0}, "lambda_g must be finite and ≥ 0, got -1.0"),
        (MagFace, {"scale": 0.0}, "scale must be finite and positive"),
    ],
)
def test_settings_that_make_no_sense(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(D, C, **options)


@pytest.mark.parametrize("kind", [AdaFace, MagFace])
def test_bad_input(kind):
    head = kind(D, C)
    x, target = batch(torch.float32)
    with pytest.raises(TypeError, match="margin cannot be given"):
        head(x, target, margin=sk.ArcFace())
    with pytest.raises(TypeError, match="embeddings must be a tensor, got list"):
        head(x.tolist(), target)
    with pytest.raises(TypeError, match="target must be a tensor, got list"):
        head(x, target.tolist())
    with pytest.raises(ValueError, match=r"shape \(N, D\), got float32 \(8,\)"):
        head(x[0], target)
    with pytest.raises(ValueError, match=r"N = 24 as in embeddings, got int64 \(3,\)"):
        head(x, target[:3])
    with pytest.raises(ValueError, match="same D"):
        head(x[:, :3], target)
