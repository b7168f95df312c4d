"""Mixers refuse batches of the other layout, and take batches without a pixel."""

import pytest
import torch
from synface.data.mixing import Beta, CutMix, DomainMixup, Mixup, TimmMixup
from torch import Tensor


def mixed(kind: str, images: Tensor, layout: str) -> Tensor:
    """Return the images that a mixer makes of a batch of bytes."""
    labels = torch.arange(len(images))
    if kind == "domain":
        return DomainMixup(9, 9, layout=layout)(images, labels, images, labels).images
    if kind in ("timm", "timm's box"):
        alpha = 1.0 if kind == "timm" else 0.0
        mix = TimmMixup(alpha, cutmix_alpha=1.0, num_classes=9, layout=layout)
        return mix(images, labels)[0]
    mixer = {"mixup": Mixup, "cutmix": CutMix}[kind]
    return mixer(ratio=Beta(1.0), layout=layout)(images, labels).images


@pytest.mark.parametrize("kind", ["domain", "mixup", "cutmix", "timm", "timm's box"])
def test_every_mixer_names_the_layout(kind: str) -> None:
    planar = torch.randint(256, (4, 3, 16, 12), dtype=torch.uint8)
    interleaved = planar.permute(0, 2, 3, 1)
    for images, wrong, right in ((planar, "NHWC", "NCHW"), (interleaved, "NCHW", "NHWC")):
        assert mixed(kind, images, right).shape == planar.shape
        with pytest.raises(
            ValueError, match=f'channels in layout="{wrong}": give layout="{right}"'
        ):
            mixed(kind, images, wrong)


@pytest.mark.parametrize("kind", ["domain", "mixup", "cutmix", "timm", "timm's box"])
@pytest.mark.parametrize("shape", [(0, 4, 5, 3), (3, 0, 5, 3), (3, 4, 0, 3), (2, 0, 0, 3)])
def test_every_mixer_takes_images_without_pixels(kind: str, shape: tuple[int, ...]) -> None:
    images = torch.zeros(shape, dtype=torch.uint8)
    batch, height, width, channels = shape
    expected = (batch, channels, height, width)
    assert mixed(kind, images, "NHWC").shape == expected
    assert mixed(kind, images.permute(0, 3, 1, 2).contiguous(), "NCHW").shape == expected


def test_what_a_layer_made_is_taken_by_its_layout() -> None:
    """Square maps of many channels may be 4 wide."""
    maps, labels = torch.rand(2, 512, 4, 4), torch.arange(2)
    for alphas in ((1.0, 0.0), (0.0, 1.0)):
        assert TimmMixup(*alphas, num_classes=2)(maps, labels)[0].shape == maps.shape
