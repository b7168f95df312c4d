"""Head and backbone."""

import pytest
import torch
from synface.heads import MarginHead
from synface.models.iresnet import IResNet

import synface_kernels as sk


def test_head_is_the_op():
    head = MarginHead(8, 20, sk.CosFace())
    x, target = torch.randn(4, 8), torch.tensor([0, 5, 19, 3])
    expected = sk.margin_cross_entropy(x, head.weight, target, sk.CosFace(), reduction="none")
    assert torch.equal(head(x, target, reduction="none"), expected)
    loss, stats = head(x, target, return_stats=True, margin=sk.ArcFace())
    assert torch.equal(loss, sk.margin_cross_entropy(x, head.weight, target))
    assert stats.top1.shape == (4,)
    mixed = head(x, torch.stack([target, target.flip(0)], 1), torch.full((4, 2), 0.5))
    mixed.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.isfinite().all()
    assert "num_classes=20" in repr(head)


def test_head_errors():
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        MarginHead(8, 0)
    with pytest.raises(ValueError, match=r"\[0, 20\), got 20 in row 1|target must be in \[0, 20\)"):
        MarginHead(8, 20)(torch.randn(2, 8), torch.tensor([0, 20]))


@pytest.mark.parametrize(("size", "channels"), [((56, 46), 1), ((17, 33), 3)])
def test_backbone_shapes(size, channels):
    model = IResNet(size, channels, widths=(4, 8, 8, 8), embedding_size=16)
    assert model(torch.randn(3, channels, *size)).shape == (3, 16)


@pytest.mark.parametrize("widths", [(4, 8), (4, 4, 8, 8)])  # ends in 4×4 pixels, and in one
def test_a_last_batch_of_one(widths):
    model = IResNet((16, 16), 1, widths, depths=(1,) * len(widths), embedding_size=16)
    model(torch.randn(8, 1, 16, 16))  # the running statistics are not the initial ones
    running = model.norm.running_mean.clone()
    out = model(torch.randn(1, 1, 16, 16))
    assert out.isfinite().all()
    assert out.abs().max() > 0
    assert torch.equal(model.norm.running_mean, running)
    out.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": (8, 64)}, "at least 16 pixels a side for 4 stages, got 8×64"),
        ({"image_size": (64, 64), "depths": (1, 1)}, "equally many"),
        ({"image_size": (64, 64), "embedding_size": 0}, "positive"),
    ],
)
def test_backbone_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        IResNet(**arguments)
