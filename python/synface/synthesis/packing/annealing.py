"""The schedule of an annealed log-sum-exp: its sharpness, and the length of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

# Parameters found by trials at N = 600 to 3000, d = 8 to 512 with 100 to 300 steps.
FIRST_STEP = 0.2  # in units of the angle that the bound leaves between neighbors
FIRST_SHARPNESS = 0.5  # t, in units of √d: the cosines of random points spread by 1/√d
LAST_SHARPNESS = 75.0  # likewise; sharper for few points, in proportion
LONG_SHARPNESS = 300.0  # likewise, of runs of 300 steps or more
LONG = 300
SHARPER_UP_TO = 1000  # points


@dataclass(frozen=True)
class Annealing:
    """The schedule of one search, over its progress from 0 to 1.

    Attributes:
        dim: d.
        bound: lower bound on the worst cosine.
        last: t·(1 − bound)/√d at the end; a tensor for several schedules at once.
        first: likewise at the beginning.
        first_step: length of the first step, in units of the angle of the bound.
    """

    dim: int
    bound: float
    last: float | Tensor
    first: float | Tensor = FIRST_SHARPNESS
    first_step: float = FIRST_STEP

    def sharpness(self, done: float) -> float | Tensor:
        """Return t·(1 − bound)/√d, which rises exponentially."""
        return self.first * (self.last / self.first) ** done

    def t(self, done: float) -> float | Tensor:
        """Return the sharpness t of the log-sum-exp."""
        return self.sharpness(done) * math.sqrt(self.dim) / (1 - self.bound)

    def length(self, done: float) -> float | Tensor:
        """Return the length of a step in radians: falling to 0, and as 1/t at the end."""
        angle = math.acos(self.bound)
        falling, sharp = self.first_step * angle * (1 - done), angle / self.sharpness(done)
        return sharp.clamp_max(falling) if isinstance(sharp, Tensor) else min(sharp, falling)


def last_sharpness(count: int, steps: int) -> float:
    """Return the last sharpness of a run of a number of steps on N points."""
    if count > SHARPER_UP_TO:
        return LONG_SHARPNESS if steps >= LONG else LAST_SHARPNESS
    # Few points converge: with 1000 steps to 1e-7.
    sharper = 1000 * (steps / 1000) ** 3
    return LAST_SHARPNESS * SHARPER_UP_TO / count * min(max(sharper, 1.0), 3000.0)
