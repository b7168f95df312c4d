"""Arithmetic whose float32 results are the same bits in any batch, on any number of threads.

Additions, products, quotients and square roots are rounded correctly everywhere; library functions
such as exponentials, and sums of unknown order, are not. So pixels are computed with the former
alone. Library functions are evaluated in float64 on the few numbers of an image, and on constants,
and rounded to a grid, which hides their last bits (unless a value falls within some 1e-16 of a
boundary of the grid). Sums of many products are of numbers on a grid, which are exact in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def on_grid(x: Tensor, bits: int = 20) -> Tensor:
    """Return x rounded to multiples of 2^-bits.

    Sums of products of numbers on two grids are exact in float64 while they stay below
    2^(53 − the bits of both).
    """
    return torch.round(x * 2.0**bits) / 2.0**bits


def bell(x: Tensor) -> Tensor:
    """Return (1 − x²/8)⁴ where |x| < √8, else 0: a Gaussian of variance 1, without exponential."""
    y = (1.0 - x * x * 0.125).clamp_min(0.0)
    y = y * y
    return y * y


def ramp(x: Tensor, low: float, high: float) -> Tensor:
    """Return a smooth step from 0 at ``low`` to 1 at ``high``."""
    t = ((x - low) * (1.0 / (high - low))).clamp(0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def step(x: Tensor, width: float) -> Tensor:
    """Return a smooth step from 0 to 1 around 0, about as a logistic function of that width."""
    return ramp(x, -2.5 * width, 2.5 * width)


def exponential(x: Tensor) -> Tensor:
    """Return (1 + x/16)¹⁶, near e^x for small |x|."""
    y = (1.0 + x * 0.0625).clamp_min(0.0)
    for _ in range(4):
        y = y * y
    return y
