"""The definition: plain torch in float64, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor


def affine(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype
) -> list[tuple[float, float]]:
    """Shift and scale of each channel: (x/u − mean)/std = (x − shift)·scale.

    u is 255 for uint8 images and 1 for floating ones.
    """
    unit = 255.0 if dtype == torch.uint8 else 1.0
    return [(unit * m, 1.0 / (unit * s)) for m, s in zip(mean, std, strict=True)]


def flipped(images: Tensor, flip: Tensor | None) -> Tensor:
    """The samples that ``flip`` (B,) names, mirrored left to right."""
    return images if flip is None else torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)


def forward(
    synthetic: Tensor,
    real: Tensor,
    psi: Tensor,
    affine: Tensor,
    flip_synthetic: Tensor | None,
    flip_real: Tensor | None,
) -> Tensor:
    """(ψ·X_S + (1 − ψ)·X_R − shift)·scale in float64.

    Args:
        synthetic, real: (B, C, H, W), any dtype; psi: (B,) float64; affine: (C, 2) float64.
        flip_synthetic, flip_real: (B,) bool or None.

    Memory: several float64 copies of the images.
    """
    x_s = flipped(synthetic, flip_synthetic).double()
    x_r = flipped(real, flip_real).double()
    share = psi.view(-1, 1, 1, 1)
    shift, scale = affine.view(1, -1, 1, 1, 2).unbind(-1)
    return (share * x_s + (1 - share) * x_r - shift) * scale


def backward(
    gradient: Tensor,
    synthetic: Tensor,
    real: Tensor,
    psi: Tensor,
    affine: Tensor,
    flip_synthetic: Tensor | None,
    flip_real: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both images (B, C, H, W) and of psi (B,), in float64."""
    by_mixed = gradient.double() * affine[:, 1].view(1, -1, 1, 1)
    share = psi.view(-1, 1, 1, 1)
    difference = flipped(synthetic, flip_synthetic).double() - flipped(real, flip_real).double()
    return (
        flipped(share * by_mixed, flip_synthetic),
        flipped((1 - share) * by_mixed, flip_real),
        (by_mixed * difference).sum((1, 2, 3)),
    )


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to a narrower type, to nearest even.

    ``x.to(torch.bfloat16)`` rounds to float32 on the way, so twice. Here that step rounds to odd
    (toward zero, the last bit set where inexact), after which rounding on is as if done once.
    """
    if dtype in (torch.float64, torch.float32):
        return x.to(dtype)
    nearest = x.float()
    back = nearest.double()
    toward = torch.where(x > back, torch.inf, -torch.inf).float()
    even = (nearest.view(torch.int32) & 1) == 0
    inexact = (back != x) & ~x.isnan()
    return torch.where(inexact & even, torch.nextafter(nearest, toward), nearest).to(dtype)
