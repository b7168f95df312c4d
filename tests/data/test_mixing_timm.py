"""TimmMixup against the definitions of timm's mixup and CutMix."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from synface.data.mixing import (
    TimmMixup,
)
from torch import Tensor

from tests.helpers.mixing import (
    SIZE,
    assert_weights,
    boxes_of,
    expected,
    flat,
    kept,
    pixels,
    seeded,
)


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
    """Mixing, switching and λ have the frequencies and the distribution asked for."""
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
