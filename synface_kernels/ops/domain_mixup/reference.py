"""The definition: plain torch in float64, rounded once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Operands(NamedTuple):
    """The inputs of an implementation.

    Attributes:
        synthetic, real: (B, C, H, W) images, any dtype and strides.
        psi: (B,) float64, each sample's share of synthetic.
        affine: (C, 2) float64, each channel's shift and scale, see `affine`.
        flip_synthetic, flip_real: (B,) bool, samples to flip horizontally, or None.
    """

    synthetic: Tensor
    real: Tensor
    psi: Tensor
    affine: Tensor
    flip_synthetic: Tensor | None
    flip_real: Tensor | None


class Gradients(NamedTuple):
    """Gradients of both images (B, C, H, W) and of psi (B,)."""

    synthetic: Tensor
    real: Tensor
    psi: Tensor


def affine(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype
) -> list[tuple[float, float]]:
    """Return each channel's shift and scale: (x/u − mean)/std = (x − shift)·scale.

    u is 255 for uint8 images and 1 for floating ones.
    """
    unit = 255.0 if dtype == torch.uint8 else 1.0
    return [(unit * m, 1.0 / (unit * s)) for m, s in zip(mean, std, strict=True)]


def flipped(images: Tensor, flip: Tensor | None) -> Tensor:
    """Return the images, those samples flipped horizontally where ``flip`` (B,) is true."""
    return images if flip is None else torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)


def forward(operands: Operands) -> Tensor:
    """Compute (ψ·X_S + (1 − ψ)·X_R − shift)·scale in float64.

    Memory: several float64 copies of the images.
    """
    synthetic, real, psi, affine, flip_synthetic, flip_real = operands
    x_s = flipped(synthetic, flip_synthetic).double()
    x_r = flipped(real, flip_real).double()
    share = psi.view(-1, 1, 1, 1)
    shift, scale = affine.view(1, -1, 1, 1, 2).unbind(-1)
    return (share * x_s + (1 - share) * x_r - shift) * scale


def backward(gradient: Tensor, operands: Operands) -> Gradients:
    """Compute the gradients of `forward`, in float64."""
    synthetic, real, psi, affine, flip_synthetic, flip_real = operands
    by_mixed = gradient.double() * affine[:, 1].view(1, -1, 1, 1)
    share = psi.view(-1, 1, 1, 1)
    difference = flipped(synthetic, flip_synthetic).double() - flipped(real, flip_real).double()
    return Gradients(
        flipped(share * by_mixed, flip_synthetic),
        flipped((1 - share) * by_mixed, flip_real),
        (by_mixed * difference).sum((1, 2, 3)),
    )


def derivative(operands: Operands, direction: Gradients) -> Tensor:
    """Compute the derivative of `forward` along a direction in both images and psi, in float64."""
    synthetic, real, psi, affine, flip_synthetic, flip_real = operands
    share, change = psi.view(-1, 1, 1, 1), direction.psi.view(-1, 1, 1, 1)
    difference = flipped(synthetic, flip_synthetic).double() - flipped(real, flip_real).double()
    along = share * flipped(direction.synthetic, flip_synthetic).double()
    along = along + (1 - share) * flipped(direction.real, flip_real).double()
    return (along + change * difference) * affine[:, 1].view(1, -1, 1, 1)


def second_backward(
    upstream: Gradients, gradient: Tensor, operands: Operands
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `backward` in gradient, both images and psi.

    All of it is differentiable torch, so that derivatives of any order follow.

    Args:
        upstream: gradients of the results of `backward`.
    """
    scale = operands.affine[:, 1].view(1, -1, 1, 1)
    # `backward` is bilinear in psi and the images: psi's part changes a pair in opposite ways.
    moved = upstream.psi.view(-1, 1, 1, 1) * gradient.double() * scale
    at_upstream = operands._replace(synthetic=upstream.synthetic, real=upstream.real)
    return (
        derivative(operands, upstream),
        flipped(moved, operands.flip_synthetic),
        flipped(-moved, operands.flip_real),
        backward(gradient, at_upstream).psi,
    )


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round as `round_once` does, with the derivative of a cast, under `torch.func` too."""
    cast = x.to(dtype)
    if dtype in (torch.float64, torch.float32):
        return cast
    once, twice = round_once(x.detach(), dtype), cast.detach()
    # once and twice are adjacent numbers, so their difference is exact.
    return torch.where(once == twice, cast, cast + (once - twice))


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to a narrower dtype, to nearest even.

    ``x.to(torch.bfloat16)`` rounds twice, first to float32. Here the first rounding is to odd
    (toward zero, the last bit set where inexact), so the second gives the correct result.
    """
    if dtype in (torch.float64, torch.float32):
        return x.to(dtype)
    nearest = x.float()
    back = nearest.double()
    toward = torch.where(x > back, torch.inf, -torch.inf).float()
    even = (nearest.view(torch.int32) & 1) == 0
    inexact = (back != x) & ~x.isnan()
    return torch.where(inexact & even, torch.nextafter(nearest, toward), nearest).to(dtype)
