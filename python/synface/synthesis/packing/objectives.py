"""Objectives of a packing: one step each, at the share `done` of a restart."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import synface_kernels as sk

from ...common.rng import generator
from ...data.loading.sampler import RankSlice
from . import bounds
from .annealing import FIRST_STEP, Annealing, last_sharpness
from .optimizer import SphereAdam

if TYPE_CHECKING:
    from .config import PackConfig
    from .packer import Packer


class Evaluation(NamedTuple):
    """An evaluation of points: their worst cosine, the pair that has it, the gallery's term.

    The pair is None where symmetry gives the cosine without one.
    """

    worst: float
    pair: tuple[int, int] | None
    term: float


SHARPEST = 1e6  # the sharpest log-sum-exp of the op


def closest_pair(points: Tensor, other: Tensor | None = None) -> tuple[float, tuple[int, int]]:
    """Return the largest cosine of two rows (of points and of other, if given), and their indices.

    Exact. Memory: as `sk.nearest_neighbors`.
    """
    cosine, index = sk.nearest_neighbors(points, other)
    row = int(cosine[:, 0].argmax())
    return cosine[row, 0].item(), (row, int(index[row, 0]))


class _Annealed:
    """An annealed energy of all pairs, or of a batch's, minimized by `SphereAdam`."""

    def __init__(self, packer: Packer) -> None:
        self.packer, self.config = packer, packer.config
        self.angle = math.acos(packer.bound.cosine)
        self.optimizer = SphereAdam(self.config.count, self.config.dim, packer.dtype, packer.device)
        self.batches: tuple[int, tuple[Tensor, ...]] = (-1, ())

    def tensors(self) -> dict[str, Tensor]:
        return self.optimizer.tensors()

    def energy(self, done: float) -> sk.LogSumExp | sk.Hinge:
        raise NotImplementedError

    def length(self, done: float) -> float:
        """Return the length of a step, in radians."""
        return FIRST_STEP * self.angle * (1 - done)

    def step(self, points: Tensor, step: int, done: float) -> None:
        rows, length = self._rows(step), self.length(done)
        if rows is None:
            gradient = _gradient(self.packer, points, self.energy(done))
            self.optimizer.step(points, gradient, length)
        else:
            gradient = _gradient(self.packer, points.index_select(0, rows), self.energy(done))
            self.optimizer.step_rows(points, rows, gradient, length)

    def _rows(self, step: int) -> Tensor | None:
        """Return the points of a step's batch; each point is drawn once per pass."""
        if self.config.batch is None:
            return None
        parts = self.config.count // self.config.batch
        epoch, part = divmod(step, parts)
        if epoch != self.batches[0]:
            device = self.packer.device
            random = generator(self.config.seed, "batches", epoch, device)
            order = torch.randperm(self.config.count, generator=random, device=device)
            self.batches = (epoch, order.tensor_split(parts))
        return self.batches[1][part]


def draws(
    config: PackConfig, points: Tensor, purpose: str, step: int, device: str | torch.device
) -> Tensor:
    """Return standard normal numbers of the points' shape and dtype, drawn on a device."""
    random = generator(config.seed, purpose, step, device)
    return torch.randn(points.shape, dtype=points.dtype, generator=random, device=device)


def _gradient(packer: Packer, points: Tensor, energy: Any) -> Tensor:
    rows, counts = _own(packer, points)
    x = points[rows].detach().requires_grad_()
    loss = sk.hypersphere_repulsion(x, energy=energy, group=packer.group)
    own = torch.autograd.grad(loss + gallery_term(packer, x, len(points)), x)[0]
    if packer.group is None:
        return own
    most = own.new_zeros((max(counts), own.shape[1]))
    most[: len(own)] = own
    parts = [torch.empty_like(most) for _ in counts]
    dist.all_gather(parts, most, group=packer.group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gallery_term(packer: Packer, x: Tensor, count: int) -> Tensor | float:
    """Return the part of points x, of all count points, in the gallery's term."""
    if packer.gallery is None:
        return 0.0
    nearest = sk.hypersphere_repulsion(x, packer.gallery, energy=sk.MaxCosine())
    return packer.config.alpha * (1 - nearest) * (len(x) / count)


def evaluation(packer: Packer, points: Tensor) -> Evaluation:
    """Return the exact worst cosine, the pair that has it, and the gallery's term."""
    if packer.group is None:
        term = gallery_term(packer, points, len(points))
        return Evaluation(*closest_pair(points), float(term))
    rows, counts = _own(packer, points)
    cosine, index = sk.nearest_neighbors(points[rows], group=packer.group)
    row = cosine[:, 0].argmax()
    term = torch.as_tensor(gallery_term(packer, points[rows], len(points)), device=points.device)
    own = torch.stack([v.double() for v in (cosine[row, 0], row + rows.start, index[row, 0], term)])
    every = [torch.empty_like(own) for _ in counts]
    dist.all_gather(every, own, group=packer.group)
    found = torch.stack(every).tolist()
    worst, i, j, _ = max(found, key=lambda each: each[0])  # the first of equals
    return Evaluation(worst, (int(i), int(j)), sum(each[3] for each in found))


def _own(packer: Packer, points: Tensor) -> tuple[slice, list[int]]:
    """Return the rows that this rank computes, and the number of each rank's."""
    rank, ranks = 0, 1
    if packer.group is not None:
        rank, ranks = dist.get_rank(packer.group), dist.get_world_size(packer.group)
    parts = [RankSlice(each, ranks).of(len(points)) for each in range(ranks)]
    return parts[rank], [part.stop - part.start for part in parts]


class _LogSumExp(_Annealed):
    def __init__(self, packer: Packer, annealing: Annealing | None = None) -> None:
        super().__init__(packer)
        config = self.config
        last = last_sharpness(config.count, config.steps or 0)
        self.annealing = annealing or Annealing(config.dim, packer.bound.cosine, last)

    def energy(self, done: float) -> sk.LogSumExp:
        return sk.LogSumExp(min(float(self.annealing.t(done)), SHARPEST))

    def length(self, done: float) -> float:
        return float(self.annealing.length(done))


class _Langevin(_Annealed):
    NOISE = 0.1  # length of the noise, in units of a step's length

    def energy(self, done: float) -> sk.Hinge:
        low = self.packer.bound.cosine
        high = bounds.random_worst(self.config.count, self.config.dim)
        return sk.Hinge(min(high + (low - high) * done, math.nextafter(1, 0)))

    def step(self, points: Tensor, step: int, done: float) -> None:
        super().step(points, step, done)
        noise = draws(self.config, points, "noise", step, points.device)
        length = self.NOISE * self.length(done) * (1 - done)
        points.add_(noise, alpha=length / self.config.dim**0.5)
        points.div_(torch.linalg.vector_norm(points, dim=1, keepdim=True))


class _HyperFace:
    """HyperFace's objective: the closest pair only, with Adam and renormalization as in the
    paper.
    """

    def __init__(self, packer: Packer) -> None:
        self.packer = packer
        shape = (packer.config.count, packer.config.dim)
        self.parameter = torch.zeros(shape, dtype=packer.dtype, device=packer.device)
        self.optimizer = torch.optim.Adam([self.parameter], packer.config.lr, fused=True)
        self.parameter.grad = torch.zeros_like(self.parameter)
        self.optimizer.state[self.parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=packer.device),
            "exp_avg": torch.zeros_like(self.parameter),
            "exp_avg_sq": torch.zeros_like(self.parameter),
        }

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.optimizer.state[self.parameter])

    def step(self, points: Tensor, step: int, done: float) -> None:
        gradient = _gradient(self.packer, points, sk.ClosestPair())
        self.parameter.data = points  # the same memory
        self.parameter.grad = gradient
        self.optimizer.step()
        points.div_(torch.linalg.vector_norm(points, dim=1, keepdim=True))


STEPS: dict[str, Callable[[Packer], Any]] = {
    "lse": _LogSumExp,
    "hyperface": _HyperFace,
    "langevin": _Langevin,
}


class PointSearch:
    """A search that moves the points themselves, by an objective of all pairs or of batches.

    A search has ``rounds``, the number of restarts one after another, and `begin`, `step`,
    `evaluate`, `keep`, `result`, `finite` and `tensors`.

    Args:
        packer: the packer.
        annealing: the schedule of "lse"; None: the usual one.
    """

    def __init__(self, packer: Packer, annealing: Annealing | None = None) -> None:
        self.packer, self.annealing = packer, annealing
        config = packer.config
        self.rounds = config.restarts or 1
        self.finished = False  # whether no step is left to take
        shape = (config.count, config.dim)
        self.points = torch.zeros(shape, dtype=packer.dtype, device=packer.device)
        self.best = self.points.clone()
        self.objective = self._objective()

    def begin(self, restart: int) -> None:
        """Set the first points of a restart."""
        if self.packer.start is not None:
            points = self.packer.start.clone()
        else:
            points = draws(self.packer.config, self.points, "points", restart, "cpu")
            points = points.to(self.packer.device)  # the same on every device
            points = points / torch.linalg.vector_norm(points, dim=1, keepdim=True)
        self.begin_at(points)

    def begin_at(self, points: Tensor) -> None:
        """Set the points, and forget the optimizer's state."""
        self.points = points
        self.objective = self._objective()

    def turns(self, done: float) -> bool:
        """Return whether the best points must be known before the next step."""
        return False

    def step(self, step: int, done: float) -> None:
        """Take a step, at the share ``done`` of a restart."""
        self.objective.step(self.points, step, done)

    def evaluate(self) -> Evaluation:
        """Return the exact worst cosine, its pair, and the gallery's term."""
        return evaluation(self.packer, self.points)

    def keep(self) -> None:
        """Keep the points as the best so far."""
        self.best.copy_(self.points)

    def result(self) -> tuple[Tensor, Evaluation | None]:
        """Return the best points; their evaluation is the last one kept."""
        return self.best, None

    def result_seconds(self) -> float:
        """Return an estimate of the seconds that `result` takes."""
        return 0.0

    def finite(self) -> bool:
        """Return whether all points are finite."""
        return bool(self.points.isfinite().all())

    def tensors(self) -> dict[str, Tensor]:
        """Return the state, for a checkpoint."""
        optimizer = {f"optimizer.{k}": v for k, v in self.objective.tensors().items()}
        return {"points": self.points, "best": self.best} | optimizer

    def _objective(self) -> Any:
        if self.annealing is not None:
            return _LogSumExp(self.packer, self.annealing)
        return STEPS[self.packer.config.objective](self.packer)
