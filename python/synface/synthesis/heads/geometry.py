"""The head's surface: a mean and linear deformations, by identity and by expression.

Heights v run down, from the crown (−1) to the chin (1); angles t around the head are 0 in front;
x points to the image's right, y down, z to the viewer. The head's half height is the unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .exact import bell, on_grid, ramp

EYE_X, EYE_Y, BROW_Y, MOUTH_Y, MOUTH_WIDTH = 0.27, 0.0, -0.17, 0.57, 0.19
SHAPES = (
    "head width", "jaw width", "chin length", "forehead", "depth", "cheekbones", "nose length",
    "nose width", "nose bridge", "brow ridge", "eye spacing", "eye height", "mouth height",
    "lip fullness", "chin", "mouth width",
)  # fmt: skip
EXPRESSIONS = ("smile", "jaw", "brows", "frown", "pucker")


@dataclass(frozen=True)
class Surface:
    """Points of the head, then of neck and shoulders.

    Attributes:
        rows, columns: the head's grid; its R·C points come first.
        mean: (3, R·C) float32. basis: (K, 3·R·C) float64, the deformations of `SHAPES`, then of
            `EXPRESSIONS`, on a grid of numbers whose sums are exact.
        neck: (3, M) float32. neck_rows, neck_columns: its grid.
        x, v, t: (R·C + M,) float32, canonical position: sideways, height, |angle|.
        is_neck: (R·C + M,) float32, 1 for neck and shoulders.
    """

    rows: int
    columns: int
    mean: Tensor
    basis: Tensor
    neck: Tensor
    neck_rows: int
    neck_columns: int
    x: Tensor
    v: Tensor
    t: Tensor
    is_neck: Tensor


def surface(side: int) -> Surface:
    """Return a surface with about one point per pixel of an image of that many pixels a side."""
    v, t = _grid(round(2.05 * side), round(2.1 * side), 6 + math.ceil(0.13 * side))
    still = dict.fromkeys(SHAPES + EXPRESSIONS, 0.0)
    mean, x = _head(v, t, still)
    # Shapes act both ways, expressions one way: so the latter are exact at 1.
    names = SHAPES + EXPRESSIONS
    basis = torch.empty(len(names), mean.numel(), dtype=torch.float64, device="cpu")
    for row, name in enumerate(names):
        if name in SHAPES:
            both = [_head(v, t, still | {name: sign})[0] for sign in (1.0, -1.0)]
            moved = (both[0] - both[1]) / 2
        else:
            moved = _head(v, t, still | {name: 1.0})[0] - mean
        basis[row] = on_grid(moved).flatten()
    neck, neck_v = _neck(round(0.7 * side), round(1.2 * side))
    flat = neck_v.flatten()
    rows, columns = v.shape
    return Surface(
        rows,
        columns,
        on_grid(mean).float().flatten(1),
        basis,
        on_grid(neck).float().flatten(1),
        neck_v.shape[0],
        neck_v.shape[1],
        on_grid(torch.cat([x.flatten(), neck[0].flatten()])).float(),
        on_grid(torch.cat([v.flatten(), flat])).float(),
        on_grid(torch.cat([t.flatten().abs(), torch.zeros_like(flat)])).float(),
        torch.cat([torch.zeros_like(v.flatten()), torch.ones_like(flat)]).float(),
    )


def bump(x: Tensor, y: Tensor, center: tuple[float, float], width: tuple[float, float]) -> Tensor:
    """Return a smooth bump in two coordinates."""
    (cx, cy), (wx, wy) = center, width
    return bell((x - cx) * (1.0 / wx)) * bell((y - cy) * (1.0 / wy))


def _grid(rows: int, columns: int, mouth: int) -> tuple[Tensor, Tensor]:
    """Return heights and angles (R, C), dense in front and between the lips, which part."""
    t = _line(-1.0, 1.0, columns)
    t = 2.5 * (0.62 * t + 0.38 * t**3)
    v = torch.cat([_line(-1.0, 1.0, rows - mouth), MOUTH_Y + _line(-0.012, 0.012, mouth)])
    heights, angles = torch.meshgrid(v.sort().values, t, indexing="ij")
    return heights, angles


def _line(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64, device="cpu")


def _head(v: Tensor, t: Tensor, by: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Return points (3, R, C), and x (R, C), the place sideways on the undeformed front."""
    sin, cos = torch.sin(t), torch.cos(t)
    front, low, up = ramp(cos, -0.1, 0.5), v.clamp_min(0), -v
    crown = (1 - v.clamp(max=0).abs() ** 2.5).clamp_min(0) ** 0.5
    crown = crown.clamp_min(0.004)
    end = 1 - ramp(low, 0.90, 1.03) * 0.55
    jaw = 1 - (0.40 - 0.06 * by["jaw width"]) * ramp(low, 0.25, 1.05) - 0.10 * ramp(low, 0.75, 1.0)
    above = v < 0
    width = 0.70 * (1 + 0.05 * by["head width"]) * torch.where(above, crown**0.9, jaw * end)
    width = width * (1 + 0.04 * by["forehead"] * ramp(up, 0.3, 0.8))
    width = width * (1 + 0.03 * by["cheekbones"] * bell((v - 0.18) * 5))
    forward = torch.where(above, crown**0.9, 1 - 0.12 * ramp(low, 0.3, 1.0))
    forward = 0.80 * (1 + 0.03 * by["depth"]) * forward * torch.where(v > 0.9, end, 1.0)
    back = 0.90 * torch.where(above, crown, 1 - 0.55 * ramp(low, 0.1, 0.9))
    rounder = (sin.abs() ** 2.2 + cos.abs() ** 2.2) ** (-1 / 2.2)  # than an ellipse
    points_x, points_y = width * sin * rounder, v.clone()
    points_z = torch.where(cos > 0, forward, back) * cos * rounder
    x = 0.70 * sin * rounder * torch.where(above, 1.0, 1 - 0.25 * ramp(low, 0.2, 1.0))
    side, sign = x.abs(), torch.sign(x)

    def on(*at: float) -> Tensor:  # in the middle of the face
        return bump(x, v, (at[0], at[1]), (at[2], at[3]))

    def both(*at: float) -> Tensor:  # on both sides of it
        return bump(side, v, (at[0], at[1]), (at[2], at[3]))

    nose = by["nose width"]
    ridge = bell(x * (1 / 0.055)) * ramp(v, -0.12, 0.1) * (1 - ramp(v, 0.3, 0.42))
    fold = bell((side - (0.16 + 0.22 * (v - 0.36))) * (1 / 0.03)) * bell((v - 0.46) * 10)
    full, smile, open_ = by["lip fullness"], by["smile"], by["jaw"]
    relief = (
        (0.11 + 0.025 * by["nose bridge"]) * ridge
        + (0.115 + 0.02 * by["nose length"]) * on(0, 0.29, 0.075, 0.085)
        + 0.09 * (1 + 0.25 * nose) * both(0.095 + 0.012 * nose, 0.34, 0.045, 0.05)
        - 0.09 * both(EYE_X, -0.01, 0.12, 0.085)
        + 0.055 * both(EYE_X, EYE_Y, 0.075, 0.045)
        + (0.05 + 0.02 * by["brow ridge"]) * both(0.26, BROW_Y + 0.02, 0.17, 0.06)
        + (0.05 + 0.02 * by["cheekbones"] + 0.035 * smile) * both(0.36, 0.24, 0.13, 0.12)
        - 0.025 * (1 + smile) * fold
        + 0.05 * on(0, MOUTH_Y, 0.26, 0.16)
        + (0.03 + 0.010 * full) * on(0, MOUTH_Y - 0.045, MOUTH_WIDTH * 0.8, 0.028)
        + (0.035 + 0.012 * full) * on(0, MOUTH_Y + 0.055, MOUTH_WIDTH * 0.7, 0.035)
        - 0.03 * on(0, MOUTH_Y, MOUTH_WIDTH, 0.014)
        + (0.08 + 0.03 * by["chin"]) * on(0, 0.86, 0.17, 0.10)
        - 0.03 * on(0, 0.71, 0.2, 0.05)
    )
    points_z = points_z + front * relief
    points_y = points_y + 0.05 * by["chin length"] * ramp(v, 0.4, 1.0)
    points_y = points_y - 0.04 * by["forehead"] * ramp(up, 0.2, 0.9)
    points_y = points_y + 0.025 * by["nose length"] * on(0, 0.3, 0.16, 0.14)
    points_y = points_y + 0.022 * by["mouth height"] * on(0, MOUTH_Y, 0.3, 0.12)
    points_y = points_y + 0.02 * by["eye height"] * both(EYE_X, -0.03, 0.2, 0.1)
    points_x = points_x + sign * 0.022 * by["eye spacing"] * both(EYE_X, 0, 0.14, 0.12)
    points_x = points_x + sign * 0.03 * by["mouth width"] * both(MOUTH_WIDTH, MOUTH_Y, 0.1, 0.08)
    points_x = points_x + sign * 0.014 * nose * both(0.1, 0.33, 0.06, 0.06)

    corner = both(MOUTH_WIDTH, MOUTH_Y, 0.10, 0.09) * front
    points_x = points_x + sign * 0.075 * smile * corner
    points_y = (
        points_y - 0.085 * smile * corner - 0.02 * smile * both(0.33, 0.22, 0.13, 0.1) * front
    )
    points_z = points_z - 0.04 * smile * corner
    # The lower lip falls with the jaw; beside the mouth the skin stretches.
    inside = bell(x * (1 / 0.16))
    parted = ramp(v, MOUTH_Y - 0.011, MOUTH_Y + 0.011)
    lowered = inside**0.5 * parted + (1 - inside**0.5) * ramp(v, 0.40, 0.75)
    lowered = lowered * ramp(cos, -0.05, 0.45)
    points_y = points_y + 0.20 * open_ * lowered
    points_z = points_z - 0.06 * open_ * lowered
    points_z = points_z - 0.10 * open_ * inside * bell((v - MOUTH_Y) * (1 / 0.008))
    narrower = both(MOUTH_WIDTH, MOUTH_Y, 0.08, 0.1) * front
    points_x = points_x - sign * 0.03 * open_ * narrower
    raised = both(0.25, BROW_Y - 0.03, 0.22, 0.10) * front
    points_y = points_y - 0.10 * by["brows"] * raised
    drawn = both(0.13, BROW_Y, 0.1, 0.08) * front
    points_y = points_y + 0.07 * by["frown"] * drawn
    points_x = points_x - sign * 0.035 * by["frown"] * drawn
    points_x = points_x - x * 0.42 * by["pucker"] * on(0, MOUTH_Y, 0.24, 0.12) * front
    points_z = points_z + 0.09 * by["pucker"] * on(0, MOUTH_Y, 0.14, 0.09) * front

    ear = bell((t.abs() - 1.52) * 10) * ramp(v, -0.16, -0.04) * (1 - ramp(v, 0.22, 0.36))
    points_x = points_x + torch.sign(t) * 0.10 * ear
    points_z = points_z - 0.05 * ear
    return torch.stack([points_x, points_y, points_z]), x


def _neck(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return points (3, R, C) of neck and shoulders, and their heights."""
    v, t = torch.meshgrid(_line(0.55, 1.75, rows), _line(-1.75, 1.75, columns), indexing="ij")
    slope = ramp(v, 1.1, 1.5)
    radius = 0.43 + 0.9 * ramp(v, 1.12, 1.6)
    height = v + 0.18 * slope * torch.sin(t).abs()
    depth = (0.42 + 0.25 * slope) * torch.cos(t) - 0.12
    return torch.stack([radius * torch.sin(t), height, depth]), v
