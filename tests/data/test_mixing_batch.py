"""Mixup and CutMix of one batch against their definitions."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from scipy import stats
from synface.data.mixing import (
    Beta,
    Constant,
    CutMix,
    DomainMixup,
    Mixup,
)

from tests.helpers.mixing import (
    SIZE,
    assert_weights,
    boxes_of,
    expected,
    flat,
    kept,
    on_grid,
    pixels,
    seeded,
)


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
    """λ = ½ in 6×7 pixels gives 4×4 boxes around each of 42 centers, clipped at the borders."""
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
