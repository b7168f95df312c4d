"""Codes that are known to be optimal, for which nothing need be searched."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...common.rng import generator
from .objectives import Evaluation, closest_pair

if TYPE_CHECKING:
    from .config import PackConfig
    from .packer import Packer


def is_known(config: PackConfig) -> bool:
    """Return whether `optimal` has the code, and the configuration asks for nothing else."""
    free = config.symmetry == "auto" and config.order is None and not config.polish
    return free and (config.dim == 2 or config.count <= 2 * config.dim)


def optimal(count: int, dim: int) -> Tensor:
    """Return an optimal code (N, d), float64: a simplex, part of an orthoplex, or a polygon.

    Of N ≤ d + 1 points all cosines are −1/(N − 1); of N ≤ 2d none is above 0.

    Source: Rankin, The closest packing of spherical caps in n dimensions, 1955.
    """
    points = torch.zeros(count, dim, dtype=torch.float64, device="cpu")
    rows = torch.arange(count, dtype=torch.int64, device="cpu")
    if dim == 2:
        angles = rows.double() * (2 * math.pi / count)
        return torch.stack([angles.cos(), angles.sin()], 1)
    if count > dim + 1:
        points[rows, rows % dim] = 1.0 - 2.0 * (rows >= dim).double()
        return points
    # Point i has −1/√(N−1) of what is left of its length in each earlier point's direction.
    for i in range(count - 1):
        rest = (1 - points[i].square().sum()).clamp_min(0).sqrt()
        points[i, i] = rest
        points[i + 1 :, i] = (-1 / (count - 1) - points[i + 1 :] @ points[i]) / rest
    return points / torch.linalg.vector_norm(points, dim=1, keepdim=True)


class Construction:
    """An optimal code, turned by a random rotation, in place of a search; see `PointSearch`."""

    rounds = 1
    finished = True

    def __init__(self, packer: Packer) -> None:
        self.packer, config = packer, packer.config
        shape = (config.count, config.dim)
        self.points = torch.zeros(shape, dtype=packer.dtype, device=packer.device)

    def begin(self, restart: int) -> None:
        """Construct the points."""
        config = self.packer.config
        random = generator(config.seed, "rotation", 0)
        shape = (config.dim, config.dim)
        turn = torch.randn(shape, dtype=torch.float64, generator=random, device="cpu")
        points = optimal(config.count, config.dim) @ torch.linalg.qr(turn)[0]
        self.points.copy_(points / torch.linalg.vector_norm(points, dim=1, keepdim=True))

    def turns(self, done: float) -> bool:
        """Return False: see `PointSearch.turns`."""
        return False

    def step(self, step: int, done: float) -> None:
        """Do nothing."""

    def evaluate(self) -> Evaluation:
        """Return the exact worst cosine and its pair."""
        return Evaluation(*closest_pair(self.points), 0.0)

    def keep(self) -> None:
        """Do nothing: there is one code."""

    def result(self) -> tuple[Tensor, Evaluation | None]:
        """Return the points."""
        return self.points, None

    def result_seconds(self) -> float:
        """Return 0: the result is evaluated already."""
        return 0.0

    def finite(self) -> bool:
        """Return True."""
        return True

    def tensors(self) -> dict[str, Tensor]:
        """Return the points, for a checkpoint."""
        return {"points": self.points}
