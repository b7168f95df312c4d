"""Normalization and random augmentation, from uint8 images to the network's input."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.renamed import old_names


def normalize(images: Tensor) -> Tensor:
    """Convert (B, H, W, C) uint8 to (B, C, H, W) float32 in [-1, 1]: (x/255 - 0.5)/0.5.

    Raises:
        ValueError: for another dtype or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            "images must be uint8 of shape (B, H, W, C), "
            f"got {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        )
    return standard_strides(images.permute(0, 3, 1, 2)).float().div_(127.5).sub_(1.0)


def standard_strides(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) as a contiguous copy, with NCHW strides in every case.

    Of one channel, permuted (B, H, W, 1) images count as contiguous with strides of NHWC, for which
    torch 2.13's backward convolution on CPUs writes outside of its memory.
    """
    return images.clone(memory_format=torch.contiguous_format)


def warp(images: Tensor, angle: Tensor, zoom: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """Rotate, scale, shift and flip each image; edges are replicated outwards.

    Args:
        images: (B, C, H, W) float.
        angle: (B,) radians, counter-clockwise.
        zoom: (B,) factors; above 1 enlarges.
        shift: (B, 2) to the right and down, in widths and heights of the image.
        flip: (B,) bool, flipped left to right.

    Returns:
        (B, C, H, W), bilinear samples.
    """
    height, width = images.shape[-2:]
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    mirror = 1.0 - 2.0 * flip.to(cos.dtype)
    # Coordinates span [-1, 1] on both axes, so a rotation depends on the aspect ratio.
    rows = [mirror * cos, -mirror * sin * (height / width), -2.0 * shift[:, 0]]
    rows += [sin * (width / height), cos, -2.0 * shift[:, 1]]
    theta = torch.stack(rows, 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


class Augment:
    """Random augmentation of training images, of a whole batch at once.

    At strength 1 an image is flipped with probability 0.5, rotated by up to 10 degrees, scaled by
    up to 10 %, shifted by up to 6 % of its sides, changed in contrast (20 %) and brightness (10 %
    of the range), and with probability 0.25 a rectangle of up to 40 % of its sides is erased.
    Strength scales all of these; at 0 the result is `normalize(images)`.

    Args:
        strength: in [0, 2].

    Raises:
        ValueError: for a strength out of range.
    """

    def __init__(self, strength: float = 1.0) -> None:
        if not 0.0 <= strength <= 2.0:
            raise ValueError(f"strength must lie in [0, 2], got {strength}")
        self.strength = strength

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment and normalize a batch.

        Args:
            images: (B, H, W, C) uint8.
            generator: the only source of randomness.

        Returns:
            (B, C, H, W) float32 in [-1, 1].
        """
        x = normalize(images)
        if self.strength == 0.0:
            return x
        s = self.strength
        random = torch.rand(
            len(x), 12, generator=generator, dtype=torch.float32, device=generator.device
        ).to(x.device, non_blocking=x.device.type == "cuda")
        signed = (2.0 * random - 1.0) * s
        x = warp(
            x,
            angle=signed[:, 0] * math.radians(10.0),
            zoom=torch.exp(signed[:, 1] * math.log(1.1)),
            shift=signed[:, 2:4] * 0.06,
            flip=random[:, 4] < 0.5 * min(s, 1.0),
        )
        contrast, brightness = 1.0 + 0.2 * signed[:, 5], 0.2 * signed[:, 6]
        x.mul_(contrast.view(-1, 1, 1, 1)).add_(brightness.view(-1, 1, 1, 1)).clamp_(-1.0, 1.0)
        return self._erase(x, random[:, 7:])

    def _erase(self, x: Tensor, random: Tensor) -> Tensor:
        """Erase rectangles to mid-gray; random (B, 5): whether, height, width, top, left."""
        inside = []
        for axis, length in ((0, x.shape[2]), (1, x.shape[3])):
            side = random[:, 1 + axis] * 0.4 * min(self.strength, 1.0)
            start = random[:, 3 + axis] * (1.0 - side)
            at = (torch.arange(length, dtype=x.dtype, device=x.device) + 0.5) / length
            inside.append((at >= start[:, None]) & (at < (start + side)[:, None]))
        erased = inside[0][:, :, None] & inside[1][:, None, :]
        erased &= (random[:, 0] < 0.25 * self.strength)[:, None, None]
        return x.masked_fill_(erased[:, None], 0.0)


__getattr__ = old_names(__name__, normalise="normalize")  # codespell:ignore normalise
