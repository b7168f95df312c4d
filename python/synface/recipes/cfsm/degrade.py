"""Degradations that turn good images into target domains, for recipes without real ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.rng import normals


def _low_resolution(x: Tensor, random: torch.Generator) -> Tensor:
    factor = _uniform(2.5, 5.0, (), random).item()
    small = [max(2, round(side / factor)) for side in x.shape[2:]]
    low = F.interpolate(x, small, mode="area")
    return F.interpolate(low, x.shape[2:], mode="bicubic", align_corners=False)


def _blurred(x: Tensor, random: torch.Generator) -> Tensor:
    sigma = _uniform(1 / 24, 1 / 12, (), random).item() * x.shape[3]
    radius = min(math.ceil(2.5 * sigma), *(side - 1 for side in x.shape[2:]))
    at = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    taps = torch.softmax(-0.5 * (at / sigma) ** 2, 0).expand(x.shape[1], 1, 1, -1)
    padded = F.pad(x, (radius,) * 4, mode="reflect")
    across = F.conv2d(padded, taps, groups=x.shape[1])
    return F.conv2d(across, taps.transpose(2, 3), groups=x.shape[1])


def _noisy(x: Tensor, random: torch.Generator) -> Tensor:
    strength = _uniform(0.2, 0.5, (len(x), 1, 1, 1), random)
    return x + strength * normals(x.shape, random)


def _dark(x: Tensor, random: torch.Generator) -> Tensor:
    gain = _uniform(0.15, 0.4, (len(x), 1, 1, 1), random)
    return (x + 1.0) * gain - 1.0 + 0.04 * normals(x.shape, random)


def _mixed(x: Tensor, random: torch.Generator) -> Tensor:
    """Degrade each image in one of the four ways."""
    changed = torch.stack([f(x, random) for f in (_low_resolution, _blurred, _noisy, _dark)])
    which = torch.randint(len(changed), (len(x),), generator=random, device="cpu")
    return changed[which, torch.arange(len(x), device="cpu")]


def _uniform(low: float, high: float, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(
        shape, generator=random, dtype=torch.float32, device="cpu"
    )


DOMAINS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "low_resolution": _low_resolution,
    "blurred": _blurred,
    "noisy": _noisy,
    "dark": _dark,
    "mixed": _mixed,
    "as_is": lambda x, random: x,  # target images that need no degradation
}


def degrade(images: Tensor, domain: str, random: torch.Generator) -> Tensor:
    """Return (N, C, H, W) float32 images in [−1, 1] degraded to a domain, on the CPU.

    Raises:
        ValueError: for a domain that is not one of `DOMAINS`.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(DOMAINS)}, got {domain!r}")
    return DOMAINS[domain](images, random).clamp(-1.0, 1.0)
