"""The definition: plain torch in float64, rounded once."""

from __future__ import annotations

from collections.abc import Sequence

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


def derivative(
    synthetic: Tensor,
    real: Tensor,
    psi: Tensor,
    along_synthetic: Tensor,
    along_real: Tensor,
    along_psi: Tensor,
    affine: Tensor,
    flip_synthetic: Tensor | None,
    flip_real: Tensor | None,
) -> Tensor:
    """Derivative of `forward` along a direction in both images and psi, in float64."""
    share, change = psi.view(-1, 1, 1, 1), along_psi.view(-1, 1, 1, 1)
    difference = flipped(synthetic, flip_synthetic).double() - flipped(real, flip_real).double()
    along = share * flipped(along_synthetic, flip_synthetic).double()
    along = along + (1 - share) * flipped(along_real, flip_real).double()
    return (along + change * difference) * affine[:, 1].view(1, -1, 1, 1)


def second_backward(
    along: Sequence[Tensor],
    gradient: Tensor,
    synthetic: Tensor,
    real: Tensor,
    psi: Tensor,
    affine: Tensor,
    flip_synthetic: Tensor | None,
    flip_real: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `backward`, in gradient, both images and psi, given ``along`` for its results.

    All of it is differentiable torch, so that derivatives of any order follow.
    """
    flips = (flip_synthetic, flip_real)
    along_synthetic, along_real, along_psi = along
    # `backward` is bilinear in psi and the images: psi's part moves a pair in opposite ways.
    moved = along_psi.view(-1, 1, 1, 1) * gradient.double() * affine[:, 1].view(1, -1, 1, 1)
    by_psi = backward(gradient, along_synthetic, along_real, psi, affine, *flips)[2]
    by_gradient = derivative(
        synthetic, real, psi, along_synthetic, along_real, along_psi, affine, *flips
    )
    return by_gradient, flipped(moved, flip_synthetic), flipped(-moved, flip_real), by_psi


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`round_once` with the derivative of a cast, which `torch.func` knows too."""
    cast = x.to(dtype)
    if dtype in (torch.float64, torch.float32):
        return cast
    once, twice = round_once(x.detach(), dtype), cast.detach()
    return torch.where(once == twice, cast, cast + (once - twice))  # neighbors: exact


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
