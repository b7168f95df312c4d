"""From points to pixels: pose, projection and depth, shading of the visible points, the sensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Surface

FACING = -0.3  # the least z of the mean surface's normal at which a point is drawn


@dataclass(frozen=True)
class Visible:
    """The point that each pixel shows.

    Attributes:
        hit: (B, P) bool, whether it shows any. index: (B, P) int64, which one.
        normal: three of (B, P), its unit normal, turned with the head.
    """

    hit: Tensor
    index: Tensor
    normal: tuple[Tensor, Tensor, Tensor]


class Rasterizer:
    """Draws a surface's points with a depth buffer; ties are decided by the points' order.

    Args:
        side: height and width of the image, in pixels.
    """

    def __init__(self, surface: Surface, side: int, device: torch.device) -> None:
        self.side = side
        self.neighbors = _neighbors(surface).to(device)
        mean = torch.cat([surface.mean, surface.neck], 1).to(device)
        self.mean_normal = _normal(tuple(mean[:, None]), self.neighbors.T[:, None])

    def __call__(self, points: Tensor, turn: Turn, place: Place) -> Visible:
        """Return what is seen of (B, 3, N) points."""
        side, count = self.side, points.shape[2]
        x, y, z = turned = turn(*points.unbind(1))
        scale = place.zoom / (1.0 - 0.16 * z)
        column = ((x * scale + 0.5 + place.right) * side).floor().long()
        row = ((y * scale + 0.5 + place.down) * side).floor().long()
        facing = turn(*self.mean_normal)[2] > FACING
        inside = (column >= 0) & (column < side) & (row >= 0) & (row < side) & facing
        pixel = torch.where(inside, row * side + column, side * side)
        order = torch.arange(count, dtype=torch.float64, device=points.device)
        key = ((z + 4.0) * 4096.0).round().double() * count + order
        nearest = torch.full(
            (len(points), side * side + 1), -1.0, dtype=torch.float64, device=z.device
        )
        nearest = nearest.scatter_reduce(1, pixel, key, "amax")[:, :-1].view(-1, 1, side, side)
        # Cracks between points: pixels that are mostly surrounded show their nearest neighbor.
        hit = nearest >= 0
        around = F.avg_pool2d(hit.float(), 3, 1, 1) > 0.55
        nearest = torch.where(~hit & around, F.max_pool2d(nearest, 3, 1, 1), nearest).flatten(1)
        hit = nearest >= 0
        index = torch.where(hit, nearest % count, 0.0).long()
        beside = self.neighbors[index].movedim(-1, 0)
        return Visible(hit, index, _normal(turned, beside))


@dataclass(frozen=True)
class Turn:
    """A rotation by yaw, then pitch, then roll; cosine and sine of each, (B, 1)."""

    yaw: tuple[Tensor, Tensor]
    pitch: tuple[Tensor, Tensor]
    roll: tuple[Tensor, Tensor]

    def __call__(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the turned coordinates."""
        cos, sin = self.yaw
        x, z = cos * x + sin * z, cos * z - sin * x
        cos, sin = self.pitch
        y, z = cos * y - sin * z, sin * y + cos * z
        cos, sin = self.roll
        x, y = cos * x - sin * y, sin * x + cos * y
        return x, y, z


@dataclass(frozen=True)
class Place:
    """Zoom and shift of the head in the image, in its sides, (B, 1)."""

    zoom: Tensor
    right: Tensor
    down: Tensor


def shading(
    normal: tuple[Tensor, Tensor, Tensor], toward: tuple[Tensor, ...], ambient: Tensor
) -> Tensor:
    """Return the light that points reflect, by second-order spherical harmonics.

    Args:
        normal: unit normals, (B, P). toward: unit direction of the light, (B, 1). ambient: its
            share of light from everywhere, (B, 1).

    Source: Ramamoorthi, Hanrahan, "An Efficient Representation for Irradiance Environment Maps",
        SIGGRAPH 2001.
    """
    dot = normal[0] * toward[0] + normal[1] * toward[1] + normal[2] * toward[2]
    direct = 0.25 + 0.5 * dot + 0.3125 * (1.5 * dot * dot - 0.5)
    return ambient * (0.85 - 0.15 * normal[1]) + (1.0 - ambient) * direct.clamp_min(0.0) * 1.35


def exposure(light: Tensor) -> Tensor:
    """Return pixels in [0, 1]: bright light is compressed, as film and cameras do."""
    return (1.3 * light / (1.0 + 0.42 * light)).clamp(0.0, 1.0)


def halve(images: Tensor) -> Tensor:
    """Return (B, C, H/2, W/2), the means of 2×2 pixels."""
    a, b = images[..., 0::2, 0::2] + images[..., 0::2, 1::2], images[..., 1::2, 0::2]
    return (a + (b + images[..., 1::2, 1::2])) * 0.25


def blurred(images: Tensor, passes: int) -> Tensor:
    """Return (B, C, H, W) images after so many binomial filters [1, 2, 1] / 4 both ways."""
    for _ in range(passes):
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        across = (padded[..., :-2] + padded[..., 2:]) + 2.0 * padded[..., 1:-1]
        images = ((across[..., :-2, :] + across[..., 2:, :]) + 2.0 * across[..., 1:-1, :]) / 16.0
    return images


def _neighbors(surface: Surface) -> Tensor:
    """Return (N, 4) int64: the points to the left, right, above and below on the same grid."""
    parts, first = [], 0
    for rows, columns in (
        (surface.rows, surface.columns),
        (surface.neck_rows, surface.neck_columns),
    ):
        index = torch.arange(rows * columns, device="cpu").view(1, 1, rows, columns).double()
        padded = F.pad(index, (1, 1, 1, 1), mode="replicate")[0, 0].long() + first
        sides = padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1]
        parts.append(torch.stack(sides, -1).flatten(0, 1))
        first += rows * columns
    return torch.cat(parts)


def _normal(points: tuple[Tensor, ...], beside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return unit normals from (B, N) coordinates and (4, B, P) indices of neighbors."""
    left, right, above, below = beside
    (ux, vx), (uy, vy), (uz, vz) = (
        (x.gather(1, right) - x.gather(1, left), x.gather(1, below) - x.gather(1, above))
        for x in points
    )
    x, y, z = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    length = (x * x + y * y + z * z + 1e-14).sqrt()
    return x / length, y / length, z / length
