"""Riemannian Adam on the sphere."""

from __future__ import annotations

from itertools import repeat

import torch
from torch import Tensor

BLOCK = 256  # rows updated together on a CPU: at d = 512 they stay in cache for a whole step
NO_FORCE = 1e-28  # squared gradients this small have no direction in float32


class SphereAdam:
    """Riemannian Adam for unit vectors: step and renormalization in one pass over the rows.

    The second moment is one number per point, the mean square of its gradient's norm, so a rotation
    of all points rotates the result. Gradients are projected onto the tangent space, as is the
    first moment each time its point moves. A step has about the same length, in radians, for every
    point: ``length`` where the gradient keeps its direction.

    Args:
        count, dim, dtype, device: shape, dtype and device of the points.
        betas: decay of the first and of the second moment per step.

    Memory: N·d numbers of the points' dtype, and 2·N float64. A step takes 3·N·d numbers more on a
    GPU, where all rows move at once, and as much for 256 rows on a CPU.
    Source: Bécigneul and Ganea, "Riemannian adaptive optimization methods", ICLR 2019.
    """

    def __init__(
        self,
        count: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        betas: tuple[float, float] = (0.9, 0.9),
    ) -> None:
        self.betas = betas
        self.mean = torch.zeros(count, dim, dtype=dtype, device=device)
        self.square = torch.zeros(count, 1, dtype=torch.float64, device=device)
        self.steps = torch.zeros(count, 1, dtype=torch.float64, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state, for a checkpoint."""
        return {"mean": self.mean, "square": self.square, "steps": self.steps}

    def step(self, points: Tensor, gradient: Tensor, length: float | Tensor) -> None:
        """Move all points (N, d), in place, against the gradient (N, d).

        ``length`` may be one number per point, (N, 1).
        """
        tensors = (points, gradient, self.mean, self.square, self.steps)
        if points.device.type != "cpu":
            self._step(tensors, length)
            return
        lengths = length.split(BLOCK) if isinstance(length, Tensor) else repeat(length)
        for *block, each in zip(*(x.split(BLOCK) for x in tensors), lengths, strict=False):
            self._step(tuple(block), each)

    def step_rows(self, points: Tensor, rows: Tensor, gradient: Tensor, length: float) -> None:
        """Move ``points[rows]``, in place, against their gradient."""
        state = (self.mean, self.square, self.steps)
        x, mean, square, steps = (tensor.index_select(0, rows) for tensor in (points, *state))
        self._step((x, gradient, mean, square, steps), length)
        for whole, part in zip((points, *state), (x, mean, square, steps), strict=True):
            whole.index_copy_(0, rows, part)

    def _step(self, block: tuple[Tensor, ...], length: float | Tensor) -> None:
        x, gradient, mean, square, steps = block
        beta1, beta2 = self.betas
        gradient = gradient - (gradient * x).sum(1, keepdim=True) * x
        norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True, dtype=torch.float64)
        steps += 1
        square.lerp_(norm.square(), 1 - beta2)
        mean.sub_((mean * x).sum(1, keepdim=True) * x).lerp_(gradient, 1 - beta1)
        size = (square / (1 - beta2**steps)).sqrt()
        factor = torch.where(size > NO_FORCE, length / (1 - beta1**steps) / size, 0.0)
        x.sub_(mean * factor.to(x.dtype))
        x.div_(torch.linalg.vector_norm(x, dim=1, keepdim=True))
