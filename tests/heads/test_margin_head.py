"""The margin head is the op with centers as its parameter."""

import pytest
import torch
from synface.heads import AdaFace, ArcFaceLoss, MagFace, MarginHead

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
    for margin in ("m", 0.5):
        with pytest.raises(TypeError, match=rf"margin must be an ArcFace, .* {margin!r}"):
            MarginHead(8, 20, margin)
    with pytest.raises(ValueError, match="init_std must be finite and ≥ 0, got -1"):
        MarginHead(8, 20, init_std=-1)
    for made in (MarginHead, AdaFace, MagFace, ArcFaceLoss):
        made(8, 20, impl="triton")  # which runs once it is moved to a GPU
        with pytest.raises(ValueError, match=r"impl must be one of .*, got 'foo'"):
            made(8, 20, impl="foo")
    with pytest.raises(ValueError, match=r"\[0, 20\), got 20 in row 1|target must be in \[0, 20\)"):
        MarginHead(8, 20)(torch.randn(2, 8), torch.tensor([0, 20]))
