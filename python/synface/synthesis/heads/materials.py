"""Masks of what is painted on the head, and the fine detail of real faces."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.embedded import FACES, lfw_crops
from .exact import bell, on_grid, ramp, step
from .geometry import BROW_Y, EYE_X, EYE_Y, MOUTH_Y, Surface, bump

LOOKS = (
    "skin tone", "skin redness", "brow darkness", "brow thickness", "lip color", "hair tone",
    "hair hue", "hairline", "hair at the sides", "hair volume", "fringe", "beard", "eye size",
    "iris", "glasses",
)  # fmt: skip
DETAILS = 60  # principal components of the crops' fine detail
TEXELS = 48
STRENGTH, MEAN_STRENGTH = 0.7, 0.35  # of the detail, and of its mean: real light is left in both
# Place and scale of the canonical front in the 25×25 crops, in their pixels.
COLUMN, ROW = (10.3, 15.2), (8.3, 16.5)


@dataclass(frozen=True)
class Masks:
    """Constant masks of each visible point, in [0, 1], and its canonical position."""

    side: Tensor
    v: Tensor
    face: Tensor
    lip: Tensor
    lip_line: Tensor
    cavity: Tensor
    teeth: Tensor
    nostril: Tensor
    beard: Tensor
    socket: Tensor
    brow: Tensor
    glasses: Tensor
    strands: Tensor
    cloth: Tensor
    shadow: Tensor


def masks(surface: Surface) -> Tensor:
    """Return (P, len(fields of `Masks`)) float32 of all points of a surface."""
    x, v, t = (each.double() for each in (surface.x, surface.v, surface.t))
    side, neck = x.abs(), surface.is_neck.double()
    face = 1.0 - neck
    lip = bell(x * (1 / 0.091)) * (
        bell((v - MOUTH_Y + 0.038) * (1 / 0.026)) + bell((v - MOUTH_Y - 0.05) * (1 / 0.032))
    )
    lip = lip.clamp(0, 1) * face
    cavity = step(0.0105 - (v - MOUTH_Y).abs(), 0.002) * step(0.165 - side, 0.015) * face
    beard = ramp(v, 0.42, 0.62) * (1 - ramp(side, 0.5, 0.62)) + bump(x, v, (0, 0.46), (0.13, 0.04))
    beard = beard.clamp(0, 1) * (1 - lip) * face * (1 - ramp(t, 1.3, 1.6))
    rim = ((side - EYE_X) / 0.15).abs() ** 3 + ((v - 0.02) / 0.115).abs() ** 3
    bridge = bell((v + 0.02) * (1 / 0.014))
    glasses = (
        step(0.11 - (rim ** (1 / 3) - 1).abs(), 0.04)
        + bridge * step(0.13 - side, 0.01)
        + bridge * step(side - 0.42, 0.01) * step(1.4 - t, 0.05)
    )
    strands = torch.sin(t * 23 + 2 * torch.sin(v * 5)) * 0.6 + torch.sin(t * 57 - v * 3) * 0.4
    columns = {
        "side": side,
        "v": v,
        "face": face,
        "lip": lip,
        "lip_line": bell((v - MOUTH_Y) * (1 / 0.012)) * bell(x * (1 / 0.15)) * face,
        "cavity": cavity,
        "teeth": cavity * step(MOUTH_Y - 0.003 - v, 0.0015),
        "nostril": bump(side, v, (0.06, 0.385), (0.03, 0.018)) * face,
        "beard": beard,
        "socket": bump(side, v, (EYE_X, EYE_Y), (0.13, 0.07)) * face,
        "brow": step(side - 0.10, 0.02) * step(0.43 - side, 0.03) * face,
        "glasses": glasses.clamp(0, 1) * face,
        "strands": strands,
        "cloth": neck * ramp(v, 1.05, 1.15),
        "shadow": neck * (1 - ramp(v, 1.0, 1.25)),
    }
    return on_grid(torch.stack([columns[name] for name in Masks.__dataclass_fields__], 1)).float()


def brow_height(side: Tensor) -> Tensor:
    """Return the height of the middle of the brow, at a distance from the face's middle."""
    return BROW_Y + 0.10 * (side - 0.25).clamp_min(0.0) - 0.06 * (side - 0.25)


@dataclass(frozen=True)
class Detail:
    """Fine detail of real faces, in logarithms of the reflectance, on a canonical texture.

    Attributes:
        mean: (T²,) float32. components: (K, T²) float64 on a grid, scaled by their deviations.
        corners: (P, 4) int64, the texels around each point. weights: (P, 4) float32.
    """

    mean: Tensor
    components: Tensor
    corners: Tensor
    weights: Tensor


def detail(surface: Surface) -> Detail:
    """Return the detail of the 100 LFW crops, symmetric, without the smooth part that is light.

    Raises:
        DataError: if scikit-image's file is missing or not as expected.
    """
    v, x = torch.meshgrid(_texels(-0.6, 1.0), _texels(-0.75, 0.75), indexing="ij")
    crops = torch.from_numpy(lfw_crops())
    at = torch.stack([COLUMN[0] + COLUMN[1] * x, ROW[0] + ROW[1] * v], -1) + 0.5
    at = (at / 12.5 - 1).expand(FACES, -1, -1, -1)
    seen = F.grid_sample(crops[:, None], at, "bicubic", "border", align_corners=False)[:, 0]
    seen = seen.clamp_min(0.04).log()
    seen = (0.5 * (seen + seen.flip(2))).flatten(1)
    window = bell(x * (1 / 0.34)) * ramp(v, -0.5, -0.3) * (1 - ramp(v, 0.75, 0.95))
    window = window.flatten()
    smooth = torch.stack([torch.ones_like(x), x.abs(), x * x, v, v * v, x.abs() * v], -1)
    smooth, weight = smooth.flatten(0, 1), window[:, None].sqrt()
    fitted = smooth @ torch.linalg.lstsq(weight * smooth, weight * seen.T).solution
    residual = (seen - fitted.T) * window
    mean = residual.mean(0)
    _, singular, components = torch.linalg.svd(residual - mean, full_matrices=False)
    # Signs are free in a factorization: fixed, so that any LAPACK gives the same faces.
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = (components * largest.sign())[:DETAILS] * singular[:DETAILS, None]
    corners, weights = _bilinear(surface)
    return Detail(
        on_grid(MEAN_STRENGTH * mean).float(),
        on_grid(STRENGTH / math.sqrt(FACES - 1) * components),
        corners,
        weights,
    )


def _texels(start: float, end: float) -> Tensor:
    return torch.linspace(start, end, TEXELS, dtype=torch.float64, device="cpu")


def _bilinear(surface: Surface) -> tuple[Tensor, Tensor]:
    last = TEXELS - 1
    column = ((surface.x.double() + 0.75) / 1.5 * last).clamp(0, last - 1e-6)
    row = ((surface.v.double() + 0.6) / 1.6 * last).clamp(0, last - 1e-6)
    left, top = column.floor(), row.floor()
    across, down = column - left, row - top
    first = (top * TEXELS + left).long()
    corners = torch.stack([first, first + 1, first + TEXELS, first + TEXELS + 1], 1)
    each = [(1 - across) * (1 - down), across * (1 - down), (1 - across) * down, across * down]
    # The texture's border is zero, so points outside of it (and on the neck) get no detail.
    weights = torch.stack(each, 1) * (1 - surface.is_neck.double())[:, None]
    return corners, on_grid(weights).float()
