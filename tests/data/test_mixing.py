"""Mixers against their definitions: pixels, labels, weights, and what they are drawn from."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from synface.data.loading.sampler import CycledOrder
from synface.data.mixing import (
    Beta,
    Constant,
    CutMix,
    DomainMixup,
    Grid,
    IdentityMixup,
    Mixup,
    TimmMixup,
)
from torch import Tensor

import synface_kernels as sk

ROOT = Path(__file__).parents[2]
SIZE = (6, 7)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(batch: int, seed: int = 0, channels: int = 3) -> Tensor:
    shape = (batch, *SIZE, channels)
    return torch.randint(256, shape, generator=seeded(seed), dtype=torch.uint8)


def flat(batch: int) -> Tensor:
    """Image i is all i: what came from where can be read off."""
    shape = (batch, *SIZE, 1)
    return torch.arange(batch, dtype=torch.uint8).view(-1, 1, 1, 1).expand(shape)


def expected(first: Tensor, second: Tensor, share: Tensor, mean: float, std: float) -> Tensor:
    """λ·X + (1 − λ)·X', normalized, of NHWC bytes: NCHW in float64."""
    share = share.double().view(-1, 1, 1, 1)
    mixed = (share * first.double() + (1 - share) * second.double()) / 255
    return ((mixed - mean) / std).permute(0, 3, 1, 2)


def on_grid(weight: Tensor) -> Tensor:
    """The float64 share that a float32 weight stands for, on the grid of 21."""
    share = (weight.double() * 20).round() / 20
    assert (share - weight).abs().max() <= 2**-24
    return share


def assert_weights(weights: Tensor) -> None:
    assert weights.dtype == torch.float32
    assert (weights >= 0).all()
    assert (weights.double().sum(1) == 1).all()


# ---- how shares are distributed ------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 5, 21])
def test_grid_is_uniform_over_exactly_its_values(steps):
    drawn = Grid(steps).sample(2000 * steps, seeded())
    assert drawn.dtype == torch.float64
    counts = Counter(drawn.tolist())
    assert sorted(counts) == [k / (steps - 1) for k in range(steps)]
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_the_default_grid_is_that_of_synface():
    values = Grid().sample(4000, seeded()).unique()
    assert values.tolist() == [k / 20 for k in range(21)]


@pytest.mark.parametrize("parameters", [(1.0,), (0.2,), (0.01, 5.0), (2.0, 5.0), (0.5, 8.0)])
def test_beta_follows_its_distribution(parameters):
    drawn = Beta(*parameters).sample(20_000, seeded(1))
    assert drawn.dtype == torch.float64
    a, b = parameters[0], parameters[-1]
    assert stats.kstest(drawn.numpy(), stats.beta(a, b).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("a", "values"), [(1e-300, {0.0, 1.0}), (1e300, {0.5})])
def test_extreme_betas_are_their_limits(a, values):
    drawn = Beta(a).sample(4000, seeded())
    assert set(drawn.tolist()) == values
    assert abs(drawn.mean().item() - 0.5) < 0.05


@pytest.mark.parametrize("ratio", [Grid(), Beta(0.3), Constant(0.25)])
def test_any_count_can_be_drawn_and_drawn_again(ratio):
    for count in (0, 1, 5):
        drawn = ratio.sample(count, seeded(3))
        assert drawn.shape == (count,)
        assert torch.equal(drawn, ratio.sample(count, seeded(3)))
    assert torch.equal(Constant(0.25).sample(3), torch.full((3,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Grid(1), ValueError, "steps must be at least 2, got 1"),
        (lambda: Grid(2.5), TypeError, "steps must be an integer ≥ 2, got float"),
        (lambda: Beta(0), ValueError, r"a must be in \[1e-300, 1e\+300\], got 0"),
        (lambda: Beta(1, float("nan")), ValueError, "b must be in .*, got nan"),
        (lambda: Beta("1"), TypeError, "a must be a number"),
        (lambda: Constant(1.5), ValueError, r"value must be in \[0, 1\], got 1.5"),
        (lambda: Constant(None), TypeError, "value must be a number .* got NoneType"),
        (lambda: Grid().sample(-1), ValueError, "count must be at least 0, got -1"),
    ],
)
def test_distribution_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---- SynFace -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "margin", [sk.ArcFace(), sk.CosFace(32.0, 0.2), sk.CombinedMargin(16.0, 1.1, 0.3, 0.1)]
)
def test_two_calls_equal_three_classifiers(margin):
    """Z = Σ_k t_k·(logits with the margin at label k), L = Σ_k t_k·CE(z, label k), in float64."""
    batch, num_synthetic, num_real, size = 12, 7, 5, (4, 5, 3)
    count = num_synthetic + num_real
    alpha = torch.randn(batch, 6, dtype=torch.float64, requires_grad=True)
    generator = torch.randn(6, 60, dtype=torch.float64)
    backbone = torch.randn(60, 16, dtype=torch.float64, requires_grad=True)
    centers = torch.randn(count, 16, dtype=torch.float64, requires_grad=True)
    real = torch.rand(batch, *size, dtype=torch.float64)
    own, other = torch.randint(num_synthetic, (batch,)), torch.randint(num_real, (batch,))
    draws = seeded(5)

    identities = IdentityMixup()(alpha, own, draws)
    synthetic = (identities.coefficients @ generator).sigmoid().view(batch, *size)
    mix = DomainMixup(num_synthetic, num_real, per_sample=True, dtype=torch.float64)
    mixed = mix(
        synthetic, identities.targets, real, other,
        synthetic_weights=identities.weights, generator=draws,
    )  # fmt: skip
    loss = sk.margin_cross_entropy(
        mixed.images.flatten(1) @ backbone, centers, mixed.targets, margin,
        target_weight=mixed.weights,
    )  # fmt: skip
    gradients = torch.autograd.grad(loss, (alpha, backbone, centers), retain_graph=True)

    # The same from the shares alone.
    phi, psi = on_grid(identities.weights[:, 0]), 1 - on_grid(mixed.weights[:, 2])
    partner = identities.targets[:, 1]
    assert torch.equal(identities.targets[:, 0], own)
    assert sorted(partner.tolist()) == sorted(own.tolist())
    labels = torch.stack([own, partner, other + num_synthetic], 1)
    assert torch.equal(mixed.targets, labels)
    share = torch.stack([phi * psi, (1 - phi) * psi, 1 - psi], 1)
    assert (mixed.weights.double() - share).abs().max() <= 2**-24
    assert_weights(mixed.weights)
    assert (labels[:, 0] == labels[:, 1]).any()  # two labels coincide

    share = mixed.weights.double()
    images = psi.view(-1, 1, 1, 1) * synthetic + (1 - psi).view(-1, 1, 1, 1) * real
    x = ((images - 0.5) / 0.5).permute(0, 3, 1, 2).flatten(1) @ backbone
    cosine = F.normalize(x) @ F.normalize(centers).T
    logits = torch.zeros_like(cosine)
    for k in range(3):
        hot = F.one_hot(labels[:, k], count).bool()
        logits = logits + share[:, k, None] * margin.scale * torch.where(
            hot, margin.target_cosine(cosine), cosine
        )
    three = sum(
        (share[:, k] * F.cross_entropy(logits, labels[:, k], reduction="none")).mean()
        for k in range(3)
    )
    torch.testing.assert_close(loss, three, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        gradients, torch.autograd.grad(three, (alpha, backbone, centers)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_identity_mixup_draws_one_share_for_each_image():
    alpha = torch.randn(50, 4, generator=seeded(1), dtype=torch.float64)
    labels = torch.arange(50)
    mixed = IdentityMixup()(alpha, labels, seeded())
    phi = on_grid(mixed.weights[:, 0])
    assert len(phi.unique()) > 10
    partner = mixed.targets[:, 1]
    assert sorted(partner.tolist()) == labels.tolist()
    assert torch.equal(
        mixed.coefficients, phi[:, None] * alpha + (1 - phi[:, None]) * alpha[partner]
    )
    single = IdentityMixup(Constant(0.3))(alpha[:1], labels[:1])
    torch.testing.assert_close(single.coefficients, alpha[:1])
    assert single.targets.tolist() == [[0, 0]]


# ---- two domains ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "others"), [(1, 1), (5, 5), (7, 3), (3, 8), (0, 0), (0, 4)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_domain_mixup_of_any_batches(count, others, per_sample):
    synthetic, real = pixels(count), pixels(others, 1)
    own = torch.arange(count)
    other = torch.arange(others)
    mix = DomainMixup(10, 8, per_sample=per_sample, mean=0.4, std=0.3)
    assert mix.num_classes == 18
    images, targets, weights = mix(synthetic, own, real, other, generator=seeded(count))
    assert images.shape == (count, 3, *SIZE)
    assert targets.dtype == torch.int64
    assert weights.shape == targets.shape == (count, 2)
    if count == 0:
        return
    assert_weights(weights)
    cycle = own % others  # image i meets real image i mod R
    assert torch.equal(targets, torch.stack([own, 10 + cycle], 1))
    psi = on_grid(weights[:, 0])
    exact = expected(synthetic, real[cycle], psi, 0.4, 0.3)
    torch.testing.assert_close(images, exact.float(), rtol=2**-23, atol=0)
    if per_sample and count > 4:
        assert len(psi.unique()) > 1
    if not per_sample:
        assert len(psi.unique()) == 1


def test_each_side_is_flipped_on_its_own():
    batch = 200
    synthetic, real, labels = pixels(batch), pixels(batch, 1), torch.arange(batch)
    mix = DomainMixup(batch, batch, ratio=Constant(0.25), flip=0.5)
    images = mix(synthetic, labels, real, labels, generator=seeded()).images
    share = torch.full((batch,), 0.25)
    sides = [[x, x.flip(2)] for x in (synthetic, real)]
    seen = Counter()
    for i, j in itertools.product((0, 1), (0, 1)):
        exact = expected(sides[0][i], sides[1][j], share, 0.5, 0.5)
        same = ((images - exact).abs() < 1e-6).flatten(1).all(1)
        seen[i, j] = int(same.sum())
    assert sum(seen.values()) == batch
    assert stats.chisquare([seen[i, j] for i in (0, 1) for j in (0, 1)]).pvalue > 1e-3
    always = DomainMixup(batch, batch, ratio=Constant(0.25), flip=1.0)
    both = always(synthetic, labels, real, labels, generator=seeded()).images
    torch.testing.assert_close(
        both, expected(sides[0][1], sides[1][1], share, 0.5, 0.5).float(), rtol=2**-23, atol=0
    )


def test_what_is_drawn_serves_who_mixes_elsewhere():
    synthetic, real, labels = pixels(9), pixels(9, 1), torch.arange(9)
    mix = DomainMixup(9, 9, per_sample=True, flip=0.3)
    mixed = mix(synthetic, labels, real, labels.flip(0), generator=seeded())
    psi, flip = mix.draw(9, seeded())
    assert torch.equal(sk.domain_mixup(synthetic, real, psi, flip=flip), mixed.images)
    targets, weights = mix.label(labels, labels.flip(0), psi)
    assert torch.equal(targets, mixed.targets)
    assert torch.equal(weights, mixed.weights)
    assert DomainMixup(9, 9).draw(9)[1] is None
    with pytest.raises(ValueError, match=r"real_labels must be in \[0, 9\), got 10 in row 1"):
        mix.label(labels, labels + 9 * (labels == 1), psi)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_sum_to_one_whatever_came(dtype):
    """Thirds sum to 1 in no binary format; the results' sum to 1 in all."""
    labels = torch.zeros(300, 3, dtype=torch.int64)
    own = torch.rand(300, 3, generator=seeded(), dtype=torch.float64).softmax(1).to(dtype)
    own[0] = 1 / 3
    mix = DomainMixup(1, 1, ratio=Beta(0.4), per_sample=True)
    weights = mix(
        pixels(300), labels, pixels(300), labels[:, 0], synthetic_weights=own, generator=seeded()
    ).weights
    assert_weights(weights)
    psi = 1 - weights[:, 3:].double()
    shares = psi * own.double() / own.double().sum(1, keepdim=True)
    assert (weights[:, :3] - shares).abs().max() <= 2**-23


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_results_come_as_asked_for(dtype, memory_format):
    synthetic, real, labels = pixels(4), pixels(4, 1), torch.arange(4)
    options = {"dtype": dtype, "memory_format": memory_format, "mean": (0.5, 0.4, 0.3)}
    last = DomainMixup(4, 4, **options)(synthetic, labels, real, labels, generator=seeded())
    assert last.images.dtype == dtype
    assert last.images.is_contiguous(memory_format=memory_format)
    planes = [x.permute(0, 3, 1, 2).contiguous() for x in (synthetic, real)]
    mix = DomainMixup(4, 4, layout="NCHW", **options)
    out = torch.full_like(last.images, torch.nan)
    first = mix(planes[0], labels, planes[1], labels, generator=seeded(), out=out)
    assert first.images is out
    assert torch.equal(out, last.images)


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (lambda: DomainMixup(0, 3), "num_synthetic must be at least 1, got 0"),
        (lambda: DomainMixup(3, 0), "num_real must be at least 1, got 0"),
        (lambda: DomainMixup(3, 3, flip=2.0), r"flip must be in \[0, 1\], got 2"),
        (lambda: DomainMixup(3, 3, layout="HWC"), "layout must be 'NHWC' or 'NCHW', got 'HWC'"),
        (lambda: Mixup(partner="next"), "partner must be 'permutation' or 'reverse', got 'next'"),
    ],
)
def test_mixer_errors(mixer, message):
    with pytest.raises(ValueError, match=message):
        mixer()


def test_a_ratio_must_be_one():
    for mixer in (IdentityMixup, Mixup, CutMix):
        with pytest.raises(TypeError, match="ratio must be a Grid, Beta or Constant, got float"):
            mixer(ratio=0.5)


HALF = torch.full((2, 2), 0.5)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"synthetic_labels": torch.tensor([0, 3])}, ValueError,
         r"synthetic_labels must be in \[0, 3\), got 3 in row 1"),
        ({"real_labels": torch.tensor([2, 0])}, ValueError,
         r"real_labels must be in \[0, 2\), got 2 in row 0"),
        ({"real_labels": torch.tensor([0, -1])}, ValueError, "got -1 in row 1"),
        ({"real_labels": torch.tensor([0, 1, 1])}, ValueError,
         r"real_labels must be int64 of shape \(N,\) with N = 2 on cpu, got int64 \(3,\)"),
        ({"real_labels": torch.tensor([0.0, 1.0])}, ValueError, "must be int64"),
        ({"synthetic_labels": [0, 1]}, TypeError, "synthetic_labels must be a tensor, got list"),
        ({"synthetic_labels": torch.zeros(2, 2, dtype=torch.int64)}, ValueError,
         r"synthetic_weights \(N, J\) is required with synthetic_labels int64 \(2, 2\)"),
        ({"synthetic_weights": HALF}, ValueError, r"must be None with \(N,\) synthetic_labels"),
        ({"synthetic_labels": torch.zeros(2, 2, dtype=torch.int64),
          "synthetic_weights": HALF / 2}, ValueError,
         "each row of synthetic_weights must sum to 1, got 0.5 in row 0"),
        ({"synthetic_labels": torch.zeros(2, 2, dtype=torch.int64),
          "synthetic_weights": torch.tensor([[2.0, -1.0]] * 2)}, ValueError,
         "finite and ≥ 0, got -1.0 in row 0"),
        ({"synthetic_labels": torch.zeros(2, 2, dtype=torch.int64),
          "synthetic_weights": HALF[:1]}, ValueError, "of the shape and device"),
        ({"real": pixels(0), "real_labels": torch.zeros(0, dtype=torch.int64)}, ValueError,
         "real must hold at least one image, got uint8"),
        ({"real": pixels(2)[:, :3]}, ValueError, "real must be of the shape, dtype and device"),
        ({"real": pixels(2)[0]}, ValueError, r"real must be uint8 .* \(N, H, W, C\), got uint8"),
        ({"synthetic": pixels(2).int()}, ValueError, "synthetic must be uint8 or floating point"),
        ({"synthetic": None}, TypeError, "synthetic must be a tensor, got NoneType"),
        ({"out": torch.empty(2, 3, 1, 1)}, ValueError, "out must be float32"),
    ],
)  # fmt: skip
def test_domain_mixup_names_what_is_wrong(changed, error, message):
    arguments = {
        "synthetic": pixels(2),
        "synthetic_labels": torch.tensor([0, 2]),
        "real": pixels(2, 1),
        "real_labels": torch.tensor([1, 0]),
    }
    DomainMixup(3, 2)(**arguments)
    with pytest.raises(error, match=message):
        DomainMixup(3, 2)(**arguments | changed)


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int16, torch.uint8, torch.uint16, torch.uint64]
)
def test_other_integers_and_columns_are_labels_too(dtype):
    labels = torch.tensor([1, 0, 2])
    other = torch.tensor([0, 1])
    column = labels[:, None].to(dtype)
    for mixer in (Mixup(), CutMix(), TimmMixup(1.0, 1.0, num_classes=3, layout="NHWC")):
        pictures = pixels(3)
        wanted = mixer(pictures, labels, seeded())
        torch.testing.assert_close(mixer(pictures, column, seeded()), wanted, rtol=0, atol=0)
    rows = torch.rand(3, 4)
    wanted = IdentityMixup()(rows, labels, seeded())
    torch.testing.assert_close(IdentityMixup()(rows, column, seeded()), wanted, rtol=0, atol=0)
    mix = DomainMixup(3, 2)
    wanted = mix(pixels(3), labels, pixels(2), other, generator=seeded())
    column_of_two = other[:, None].to(dtype)
    mixed = mix(pixels(3), column, pixels(2), column_of_two, generator=seeded())
    torch.testing.assert_close(mixed, wanted, rtol=0, atol=0)
    psi = torch.tensor([0.25, 1.0, 0.5], dtype=torch.float64)
    targets, weights = mix.label(column, other[[0, 1, 0], None].to(dtype), psi)
    assert targets.tolist() == [[1, 3], [0, 4], [2, 3]]
    assert targets.dtype == torch.int64
    assert weights.tolist() == [[0.25, 0.75], [1, 0], [0.5, 0.5]]


def test_one_batch_mixers_name_what_is_wrong():
    for call in (
        lambda y: Mixup()(pixels(2), y),
        lambda y: CutMix()(pixels(2), y),
        lambda y: IdentityMixup()(torch.rand(2, 3), y),
    ):
        with pytest.raises(ValueError, match="labels must be ≥ 0, got -5 in row 1"):
            call(torch.tensor([0, -5]))
        with pytest.raises(ValueError, match="labels must be int64 of shape"):
            call(torch.tensor([[0, 1], [1, 0]]))
    with pytest.raises(ValueError, match=r"alpha must be floating point \(N, D\), got int64"):
        IdentityMixup()(torch.ones(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"target must be in \[0, 2\), got 2 in row 0"):
        TimmMixup(num_classes=2)(pixels(1).permute(0, 3, 1, 2), torch.tensor([2]))


# ---- one batch with itself -----------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize("partner", ["permutation", "reverse"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_mixup(batch, partner, per_sample):
    images, labels = pixels(batch), torch.arange(batch)
    mix = Mixup(per_sample=per_sample, partner=partner, std=0.25)
    mixed, targets, weights = mix(images, labels, seeded(2))
    assert_weights(weights)
    assert torch.equal(targets[:, 0], labels)
    other = targets[:, 1]
    assert sorted(other.tolist()) == labels.tolist()
    if partner == "reverse":
        assert torch.equal(other, labels.flip(0))
    share = on_grid(weights[:, 0])
    exact = expected(images, images[other], share, 0.5, 0.25)
    torch.testing.assert_close(mixed, exact.float(), rtol=2**-23, atol=0)
    assert (len(share.unique()) > 1) == (per_sample and batch > 1)


def boxes_of(mixed: Tensor, own: Tensor, other: Tensor) -> list[tuple[int, int, int, int] | None]:
    """Top, bottom, left, right of what was pasted into each of `flat`'s images; None if nothing."""
    values = (mixed.double() * 255).round().long()[:, 0]
    found = []
    for image, i, j in zip(values, own.tolist(), other.tolist(), strict=True):
        inside = image == j
        assert (inside | (image == i)).all()
        if i == j or not inside.any():
            found.append(None)
            continue
        rows, columns = inside.any(1), inside.any(0)
        assert torch.equal(inside, rows[:, None] & columns)  # a rectangle
        y, x = rows.nonzero().flatten(), columns.nonzero().flatten()
        box = int(y[0]), int(y[-1]) + 1, int(x[0]), int(x[-1]) + 1
        assert inside.sum() == (box[1] - box[0]) * (box[3] - box[2])
        found.append(box)
    return found


def kept(box: tuple[int, int, int, int]) -> float:
    pixels = SIZE[0] * SIZE[1]
    return (pixels - (box[1] - box[0]) * (box[3] - box[2])) / pixels


@pytest.mark.parametrize("batch", [1, 2, 5, 40])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_cutmix_weighs_by_the_pixels_kept(batch, per_sample, layout):
    images, labels = flat(batch), torch.arange(batch)
    mix = CutMix(per_sample=per_sample, ratio=Beta(1.0), mean=0.0, std=1.0, layout=layout)
    if layout == "NCHW":
        images = images.permute(0, 3, 1, 2)
    mixed, targets, weights = mix(images, labels, seeded(2))
    assert_weights(weights)
    boxes = boxes_of(mixed, *targets.T)
    for box, i, j, weight in zip(boxes, *targets.T.tolist(), weights, strict=True):
        if box is not None:
            assert abs(weight[0].item() - kept(box)) <= 2**-24
        elif i != j:
            assert weight.tolist() == [1, 0]
    if batch == 40:
        assert (len({b for b in boxes if b}) > 1) == per_sample


def test_boxes_are_where_the_definition_puts_them():
    """With λ = ½ in 6×7 pixels: 4×4, round each of the 42 centers alike, cut off at the borders."""
    batch = 4200
    height, width = SIZE
    definition = Counter(
        (max(y - 2, 0), min(y + 2, height), max(x - 2, 0), min(x + 2, width))
        for y in range(height)
        for x in range(width)
    )
    images = torch.tensor([0, 1], dtype=torch.uint8).repeat(batch // 2)
    images = images.view(-1, 1, 1, 1).expand(batch, *SIZE, 1)
    mix = CutMix(ratio=Constant(0.5), per_sample=True, partner="reverse", mean=0.0, std=1.0)
    mixed, targets, _ = mix(images, images[:, 0, 0, 0].long(), seeded(7))
    seen = Counter(boxes_of(mixed, *targets.T))
    assert set(seen) == set(definition)
    theory = [definition[box] * batch / (height * width) for box in seen]
    assert stats.chisquare(list(seen.values()), theory).pvalue > 1e-3


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_boxes_are_pasted_alike_with_and_without_gradients(layout, per_sample):
    images = torch.rand(5, *SIZE, 3, generator=seeded())
    images = images if layout == "NHWC" else images.permute(0, 3, 1, 2)
    mix = CutMix(per_sample=per_sample, layout=layout)
    plain = mix(images, torch.arange(5), seeded(1)).images
    tracked = mix(images.clone().requires_grad_(), torch.arange(5), seeded(1)).images
    assert torch.equal(plain, tracked)


def test_cutmix_keeps_what_is_not_finite_where_it_is():
    images = flat(20).double().clone()
    images[3] = torch.nan
    mix = CutMix(ratio=Constant(0.5), dtype=torch.float64, mean=0.0, std=1.0)
    clean, targets, _ = mix(flat(20).double(), torch.arange(20), seeded())
    mixed = mix(images, torch.arange(20), seeded()).images
    assert targets[3, 1] != 3
    assert torch.equal(mixed.isnan(), clean == 3)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_all_and_nothing(ratio):
    images, labels = pixels(3), torch.arange(3)
    for mix in (Mixup(ratio=Constant(ratio), partner="reverse"), DomainMixup(3, 3)):
        if isinstance(mix, DomainMixup):
            mix = DomainMixup(3, 3, ratio=Constant(ratio))
            result = mix(images, labels, images.flip(0), labels.flip(0))
        else:
            result = mix(images, labels)
        exact = expected(images, images.flip(0), torch.full((3,), ratio), 0.5, 0.5)
        torch.testing.assert_close(result.images, exact.float(), rtol=2**-23, atol=0)
        assert result.weights.tolist() == [[ratio, 1 - ratio]] * 3
    untouched = CutMix(ratio=Constant(1.0))(images, labels)
    assert untouched.weights.tolist() == [[1, 0]] * 3


# ---- in timm's place -----------------------------------------------------------------------------


def timm_dense(labels: Tensor, share: Tensor, classes: int, smoothing: float) -> Tensor:
    """λ·smooth(y) + (1 − λ)·smooth(y reversed), smooth(y) = (1 − ε)·onehot(y) + ε/C."""
    hot = [F.one_hot(y, classes).double() for y in (labels, labels.flip(0))]
    smooth = [(1 - smoothing) * h + smoothing / classes for h in hot]
    share = share.double()[:, None]
    return share * smooth[0] + (1 - share) * smooth[1]


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("batch", [1, 2, 7, 8])
@pytest.mark.parametrize("methods", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_timm_definition(mode, batch, methods, smoothing):
    classes = 9
    x = torch.rand(batch, 3, *SIZE, generator=seeded(3), dtype=torch.float64)
    x[:, :, 0, 0] = torch.arange(batch)[:, None]  # so that no pixel is another image's by chance
    before = x.clone()
    labels = torch.randint(classes, (batch,), generator=seeded(4))
    options = {"mode": mode, "num_classes": classes, "prob": 0.8}
    for seed in range(5):
        mixed, (targets, weights) = TimmMixup(*methods, **options)(x, labels, seeded(seed))
        smooth = TimmMixup(*methods, label_smoothing=smoothing, dense=True, **options)
        same, dense = smooth(x, labels, seeded(seed))
        assert torch.equal(x, before)
        assert torch.equal(same, mixed)
        assert mixed.dtype == torch.float64
        assert_weights(weights)
        assert torch.equal(targets, torch.stack([labels, labels.flip(0)], 1))
        share = weights[:, 0]
        assert dense.dtype == torch.float32
        theirs = timm_dense(labels, share, classes, smoothing)
        torch.testing.assert_close(dense.double(), theirs, rtol=0, atol=2**-23)
        if mode == "batch":
            assert len(share.unique()) == 1
        if mode == "pair":
            assert torch.equal(share, share.flip(0))
        for i in range(batch):
            own, other, result = x[i], x[-1 - i], mixed[i]
            pasted = result != own
            if methods[1] and torch.equal(result, torch.where(pasted, other, own)):
                if batch > 1 and i != batch - 1 - i:
                    box = 1 - pasted[0].double().mean()
                    assert abs(share[i].double() - box) <= 2**-24
            else:
                assert methods[0]
                blend = share[i].double() * own + (1 - share[i].double()) * other
                torch.testing.assert_close(result, blend, rtol=1e-6, atol=1e-6 * batch)


def test_timm_draws():
    """How often it mixes and switches, and what λ follows."""
    x = flat(200).permute(0, 3, 1, 2)
    labels = torch.arange(200)
    mix = TimmMixup(0.4, 1.0, prob=0.6, switch_prob=0.3, mode="elem", num_classes=200)
    counts = Counter()
    blends = []
    for seed in range(20):
        mixed, (targets, weights) = mix(x, labels, seeded(seed))
        values = mixed[:, 0] * 255
        one_value = (values == values[:, :1, :1]).flatten(1).all(1)
        whole = weights[:, 0] == 1
        counts["whole"] += int(whole.sum())
        counts["cut"] += int((~one_value).sum())
        blend = one_value & ~whole
        counts["mixed"] += int((blend & (weights[:, 0] != 0)).sum())
        blends.append(weights[blend, 0])
    total = 200 * 20
    # Boxes that cover nothing read as whole, those that cover all as blends: so bounds.
    assert counts["whole"] / total > 0.4 - 0.03
    assert 0.6 * 0.3 * 0.7 < counts["cut"] / total < 0.6 * 0.3 + 0.03
    assert abs(counts["mixed"] / total - 0.6 * 0.7) < 0.03
    alone = TimmMixup(0.4, mode="elem", num_classes=200)
    shares = torch.cat([alone(x, labels, seeded(s))[1][1][:, 0] for s in range(20)])
    assert stats.kstest(shares.double().numpy(), stats.beta(0.4, 0.4).cdf).pvalue > 1e-3


def test_timm_without_correction_weighs_by_the_draw():
    x, labels = flat(40).permute(0, 3, 1, 2), torch.arange(40)
    options = {"mode": "elem", "num_classes": 40}
    mixed, (targets, raw) = TimmMixup(0.0, 1.0, correct_lam=False, **options)(x, labels, seeded())
    same, (_, corrected) = TimmMixup(0.0, 1.0, **options)(x, labels, seeded())
    assert torch.equal(mixed, same)
    assert stats.kstest(raw[:, 0].double().numpy(), stats.uniform().cdf).pvalue > 1e-3
    whole = 0
    for box, share, by_pixels in zip(
        boxes_of(mixed, *targets.T), raw[:, 0].tolist(), corrected[:, 0].tolist(), strict=True
    ):
        sides = [int(n * (1 - share) ** 0.5) // 2 * 2 for n in SIZE]
        if box is None:
            assert by_pixels == 1
            continue
        assert by_pixels == pytest.approx(kept(box), rel=1e-6)
        cut = box[1] - box[0], box[3] - box[2]
        assert cut[0] <= sides[0]
        assert cut[1] <= sides[1]
        whole += list(cut) == sides
    assert whole > 0


def test_timm_boxes_within_bounds():
    x, labels = flat(400 // 2).permute(0, 3, 1, 2), torch.arange(200)
    mix = TimmMixup(0.0, cutmix_minmax=(0.35, 0.9), correct_lam=False, mode="elem", num_classes=200)
    mixed, (targets, weights) = mix(x, labels, seeded())
    heights, widths = set(), set()
    for box, share in zip(boxes_of(mixed, *targets.T), weights[:, 0].tolist(), strict=True):
        assert box is not None
        assert share == pytest.approx(kept(box), rel=1e-6)
        heights.add(box[1] - box[0])
        widths.add(box[3] - box[2])
    assert heights == {2, 3, 4}  # ⌊6·0.35⌋ to ⌊6·0.9⌋, which is left out
    assert widths == {2, 3, 4, 5}


def test_timm_as_it_is_used():
    x = torch.rand(6, 3, *SIZE, generator=seeded()).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(6)
    mix = TimmMixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=6)
    mixed, _ = mix(x.bfloat16(), labels)
    assert mixed.dtype == torch.bfloat16
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert mix(x.contiguous(), labels)[0].is_contiguous()
    mix.mixup_enabled = False
    same, (_, weights) = mix(x, labels)
    assert torch.equal(same, x)
    assert weights.tolist() == [[1, 0]] * 6
    data = pixels(6)
    mix = TimmMixup(num_classes=6, prob=0.0, mean=0.5, std=0.5, layout="NHWC")
    exact = expected(data, data, torch.ones(6), 0.5, 0.5)
    result = mix(data, labels)[0]
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, exact.float(), rtol=2**-23, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "num_classes must be at least 1, got 0"),
        ({"mixup_alpha": 0.0, "num_classes": 3}, "mixup_alpha or cutmix_alpha must be > 0"),
        ({"mixup_alpha": -1.0, "num_classes": 3}, "mixup_alpha must be finite and ≥ 0, got -1"),
        ({"cutmix_minmax": (0.9, 0.2), "num_classes": 3}, "0 ≤ min ≤ max ≤ 1, got"),
        ({"label_smoothing": 0.1, "num_classes": 3}, "label_smoothing = 0.1 needs dense=True"),
        ({"mode": "half", "num_classes": 3}, "mode must be 'batch', 'pair' or 'elem', got 'half'"),
        ({"prob": 1.5, "num_classes": 3}, r"prob must be in \[0, 1\], got 1.5"),
    ],
)
def test_timm_errors(options, message):
    with pytest.raises(ValueError, match=message):
        TimmMixup(**options)


@pytest.mark.parametrize("minmax", [5, "01", (0.1, "1"), (None, 1)])
def test_timm_bounds_of_another_type(minmax):
    with pytest.raises(TypeError, match=r"cutmix_minmax must be a sequence of two numbers.*got"):
        TimmMixup(cutmix_minmax=minmax, num_classes=3)


# ---- what holds for all --------------------------------------------------------------------------


def results(mixer, generator, images=None):
    """What a mixer makes of a batch of 6, as a list of tensors."""
    labels = torch.arange(6)
    images = pixels(6) if images is None else images
    if isinstance(mixer, IdentityMixup):
        return list(mixer(images.flatten(1).double(), labels, generator))
    if isinstance(mixer, DomainMixup):
        real = pixels(6, 1).to(images.dtype)
        return list(mixer(images, labels, real, labels, generator=generator))
    if isinstance(mixer, TimmMixup):
        mixed, (targets, weights) = mixer(images, labels, generator)
        return [mixed, targets, weights]
    return list(mixer(images, labels, generator))


MIXERS = [
    DomainMixup(6, 6, flip=0.5),
    DomainMixup(6, 6, ratio=Beta(0.5), per_sample=True, dtype=torch.float64),
    IdentityMixup(),
    Mixup(ratio=Beta(0.2), per_sample=True, dtype=torch.float64),
    CutMix(per_sample=True, dtype=torch.float64),
    TimmMixup(1.0, 1.0, mode="elem", num_classes=6, layout="NHWC"),
]


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda m: type(m).__name__)
def test_a_seed_means_one_result(mixer):
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        first = results(mixer, seeded(9))
        assert torch.equal(torch.get_rng_state(), state)  # the global generator was left alone
        for a, b in zip(first, results(mixer, seeded(9)), strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(first[0], results(mixer, seeded(10))[0])
        torch.manual_seed(9)
        for a, b in zip(first, results(mixer, None), strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(torch.get_rng_state(), state)
    assert_weights(first[2])


@pytest.mark.parametrize("mixer", MIXERS[1:], ids=lambda m: type(m).__name__)
def test_gradients_flow_to_floating_images(mixer):
    images = torch.rand(6, 2, 3, 1, dtype=torch.float64, generator=seeded(), requires_grad=True)
    if isinstance(mixer, DomainMixup):
        real = torch.rand(2, 2, 3, 1, dtype=torch.float64, generator=seeded(1), requires_grad=True)
        labels = torch.arange(6)

        def mixed(x, y):
            return mixer(x, labels, y, labels[:2], generator=seeded(2)).images

        assert torch.autograd.gradcheck(mixed, (images, real))
    else:
        assert torch.autograd.gradcheck(lambda x: results(mixer, seeded(2), x)[0], (images,))


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda m: type(m).__name__)
def test_a_gpu_is_not_waited_for(mixer, monkeypatch):
    """On tensors without values, anything that reads one raises."""
    monkeypatch.setattr(sk, "domain_mixup", lambda a, b, psi, **_: a * psi.view(-1, 1, 1, 1) + b)
    monkeypatch.setattr(
        sk, "identity_mixup", lambda a, b, phi: phi[:, None] * a + (1 - phi[:, None]) * b
    )
    device = "meta"
    labels = torch.zeros(6, dtype=torch.int64, device=device)
    images = torch.zeros(6, *SIZE, 3, dtype=torch.uint8, device=device)
    if isinstance(mixer, IdentityMixup):
        result = list(mixer(images.flatten(1).double(), labels))
    elif isinstance(mixer, DomainMixup):
        result = list(
            mixer(
                images, torch.stack([labels, labels], 1), images[:4], labels[:4],
                synthetic_weights=torch.zeros(6, 2, device=device),
            )
        )  # fmt: skip
    elif isinstance(mixer, TimmMixup):
        mixed, (targets, weights) = mixer(images, labels)
        result = [mixed, targets, weights]
    else:
        result = list(mixer(images, labels))
    assert all(tensor.device.type == device for tensor in result)


# ---- the order of two domains --------------------------------------------------------------------


@pytest.mark.parametrize(("synthetic", "real"), [(1, 1), (7, 3), (3, 7), (10, 5), (5, 5), (6, 1)])
def test_the_real_set_is_cycled_to_the_synthetic_ones_length(synthetic, real):
    order = CycledOrder(synthetic, real, seed=4)
    assert len(order) == synthetic
    stream: list[int] = []
    for epoch in range(6):
        first, second = order(epoch, np.arange(synthetic))
        assert sorted(first.tolist()) == list(range(synthetic))
        assert first.dtype == second.dtype == np.int64
        stream += second.tolist()
    for start in range(0, len(stream), real):  # every pass is complete before the next one begins
        part = stream[start : start + real]
        assert len(set(part)) == len(part)
        assert set(part) <= set(range(real))


def test_shuffles_differ_and_do_not_depend_on_what_was_asked_before():
    order = CycledOrder(50, 20, seed=1)
    everything = {e: order(e, np.arange(50)) for e in range(3)}
    for epoch, at in ((2, 49), (0, 3), (1, 20)):
        fresh = CycledOrder(50, 20, seed=1)(epoch, at)
        assert [int(x) for x in fresh] == [int(x[at]) for x in everything[epoch]]
    grid = np.arange(50).reshape(5, 10)[:, ::-1]
    assert np.array_equal(order(1, grid)[1], everything[1][1][grid])
    firsts = {tuple(first.tolist()) for first, _ in everything.values()}
    passes = {tuple(everything[0][1][i : i + 20].tolist()) for i in (0, 20)}
    assert len(firsts) == 3
    assert len(passes) == 2
    assert not np.array_equal(CycledOrder(50, 20, seed=2)(0, range(50))[0], everything[0][0])
    same = CycledOrder(20, 20, seed=1)(0, range(20))
    assert not np.array_equal(*same)  # a shuffle of its own
    assert [part.shape for part in order(0, [])] == [(0,), (0,)]


def test_every_order_of_three_is_as_frequent():
    counts = Counter(tuple(CycledOrder(3, 1)(e, range(3))[0].tolist()) for e in range(1200))
    assert len(counts) == 6
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CycledOrder(0, 1), ValueError, "num_synthetic must be at least 1, got 0"),
        (lambda: CycledOrder(1, 0.5), TypeError, "num_real must be an integer, got float"),
        (lambda: CycledOrder(1, 1, -1), ValueError, "seed must be at least 0, got -1"),
        (lambda: CycledOrder(4, 2)(-1, 0), ValueError, "epoch must be at least 0, got -1"),
        (lambda: CycledOrder(4, 2)(0, [0, 4]), ValueError, r"lie in \[0, 4\), got 0 to 4"),
        (lambda: CycledOrder(4, 2)(0, [0.5]), TypeError, "positions must be integers, got float"),
    ],
)
def test_order_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_order_needs_no_torch_and_is_the_same_in_every_process():
    code = """
import sys
sys.modules["torch"] = None  # importing it would raise
from synface.data.loading.sampler import CycledOrder
print([part.tolist() for part in CycledOrder(7, 3, 2**70)(5, range(7))])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [part.tolist() for part in CycledOrder(7, 3, 2**70)(5, range(7))]
    assert run.stdout.strip() == str(here)


# ---- the documentation ---------------------------------------------------------------------------


def test_the_example_runs():
    page = (ROOT / "docs" / "mixing.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            exec(compile(block, "docs/mixing.md", "exec"), names)
    loss = names["loss"]
    assert isinstance(loss, Tensor)
    assert loss.isfinite()
