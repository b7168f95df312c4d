"""Packing of unit vectors: an annealed soft maximum of their cosines, minimized on the sphere."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import synface_kernels as sk

from ... import checkpoint
from ...common.check import (
    check_device,
    check_folder,
    check_integer,
    check_memory,
    check_number,
    check_rows,
    describe,
)
from ...common.files import CheckpointError, write_tensors
from ...common.interrupts import interruption, interrupts
from ...common.rng import generator
from ..embeddings import NAME, sha256_of_rows
from . import bounds
from .optimizer import SphereAdam

OBJECTIVES = ("lse", "hyperface", "langevin")
CHECK_EVERY = 25  # steps between evaluations of the exact worst cosine, or
TIMED_CHECKS = 50  # evaluations in a run limited by time
CHECKPOINT_SECONDS = 120.0
DEFAULT_STEPS = 500
DOUBLE_UP_TO = 1000  # points: few enough that float64 costs nothing

# Parameters of "lse", found by trials at N = 600 to 3000, d = 8 to 512 with 100 to 300 steps.
FIRST_STEP = 0.2  # in units of the angle that the bound leaves between neighbors
FIRST_SHARPNESS = 0.5  # t, in units of √d: the cosines of random points spread by 1/√d
LAST_SHARPNESS = 75.0  # likewise; sharper for few points, in proportion
FEW = 1000


@dataclass(frozen=True)
class PackConfig:
    """Configuration of a packing. With ``steps``, two runs on one machine are bitwise the same.

    Attributes:
        count, dim: number of points N and dimension d, both at least 2.
        objective: "lse", "hyperface" or "langevin", see `Packer`.
        steps: number of steps of each restart, or
        minutes: length of the whole run. The annealing then follows the clock, so the result
            depends on the machine's speed. Neither: 500 steps.
        restarts: runs from other random points; the best one is returned. Useful for few points.
        batch: points that repel each other in one step, each point drawn once per pass; None for
            all at once. See `Packer`.
        alpha: weight of the gallery.
        lr: learning rate of "hyperface". 0.001 was the best of seven in a trial (docs/packing.md).
        seed: random seed.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it.
    """

    count: int
    dim: int
    objective: str = "lse"
    steps: int | None = None
    minutes: float | None = None
    restarts: int = 1
    batch: int | None = None
    alpha: float = 0.5
    lr: float = 0.001
    seed: int = 0

    def __post_init__(self) -> None:
        bounds.best(self.count, self.dim)  # checks both
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {OBJECTIVES}, got {self.objective!r}")
        if self.steps is not None and self.minutes is not None:
            raise ValueError(
                f"give steps or minutes, not both, got {self.steps} and {self.minutes}"
            )
        if self.steps is None and self.minutes is None:
            object.__setattr__(self, "steps", DEFAULT_STEPS)
        for name, least in (("restarts", 1), ("seed", 0), ("steps", 1), ("batch", 2)):
            value = getattr(self, name)
            if value is not None or name in ("restarts", "seed"):
                check_integer(name, value, least)
        check_number("alpha", self.alpha, 0)
        for name in ("lr", "minutes"):
            value = getattr(self, name)
            if name == "lr" or value is not None:
                check_number(name, value, 0)
                if value == 0:
                    raise ValueError(f"{name} must be positive, got {value}")
        if self.batch is None:
            return
        if self.batch > self.count:
            raise ValueError(f"batch must be in [2, count = {self.count}], got {self.batch}")
        if self.objective != "lse":
            raise ValueError(f"batch needs the objective 'lse', got {self.objective!r}")

    def metadata(self) -> dict[str, str]:
        """Return the fields as the metadata of a file; strings are not quoted."""
        values = asdict(self).items()
        return {name: v if isinstance(v, str) else json.dumps(v) for name, v in values}


class PackingProgress(Protocol):
    """A progress bar of `Packer.run`."""

    def update(self, done: float, seconds: float, worst: float | None) -> None:
        """Show the share done, the seconds, and the last exact worst cosine."""


@dataclass(frozen=True)
class Packed:
    """A packing.

    Attributes:
        points: (N, d) unit vectors, float32 or (up to 1000 points) float64.
        worst: the largest cosine between two of them, exact.
        pair: the indices of these two.
        bound: lower bound on the worst cosine of N points.
        history: (seconds, steps, worst cosine) of every exact evaluation.
        config: the packing's configuration.
    """

    points: Tensor
    worst: float
    pair: tuple[int, int]
    bound: bounds.Bound
    history: list[tuple[float, int, float]]
    config: PackConfig

    @property
    def gap(self) -> float:
        """The gap of the worst cosine to the bound."""
        return self.worst - self.bound.cosine

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write a safetensors file of "embeddings" (N, d), with the other attributes as metadata.

        Raises:
            FileExistsError: if the file exists and ``overwrite`` is not set.
            OSError: if it cannot be written (a full disk, say); an earlier file is not changed.
        """
        check_output(path, overwrite)
        metadata = {
            **self.config.metadata(),
            "worst_cosine": repr(self.worst),
            "worst_pair": json.dumps(self.pair),
            "bound": repr(self.bound.cosine),
            "bound_name": self.bound.name,
            "history": json.dumps(self.history),
        }
        write_tensors(path, {NAME: self.points.cpu()}, metadata)


def check_output(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError if a file would be replaced, IsADirectoryError for a folder."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: choose another output")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another output, or --overwrite")


def closest_pair(points: Tensor, other: Tensor | None = None) -> tuple[float, tuple[int, int]]:
    """Return the largest cosine of two rows (of points and of other, if given), and their indices.

    Exact. Memory: as `sk.nearest_neighbors`.
    """
    cosine, index = sk.nearest_neighbors(points, other)
    row = int(cosine[:, 0].argmax())
    return cosine[row, 0].item(), (row, int(index[row, 0]))


class Packer:
    """Packing of N points on the unit sphere of R^d that minimizes their worst cosine.

    Objectives, annealed over the run:

    - "lse": (1/t)·log Σ_{i<j} exp(t·c_ij), a soft maximum of the cosines, with t rising
      exponentially from √d/2 to 75·max(1, 1000/N)·√d (both divided by 1 − bound), and steps of
      `SphereAdam` whose length falls linearly to 0, and with 1/t in the end where that is less.
    - "hyperface": max c_ij, the closest pair alone, with Adam and renormalization.
    - "langevin": soft spheres, Σ max(0, c_ij − threshold)²/2, whose threshold falls from random
      points' worst cosine to the bound, with noise that decays to 0.

    A gallery (M, d) adds α·(1/N)·Σ_i min_g (1 − x_i·y_g), which keeps points near it.

    Every pair counts in every step, unless ``batch`` is set; then a step moves ``batch`` points by
    their own pairs only, and includes a given pair in about batch/N of the passes over the points.
    Every worst cosine reported is exact, over all pairs; with ``batch`` it is computed at the end
    of each restart only.

    Args:
        config: the configuration.
        gallery: (M, d) embeddings, rows finite and not zero; normalized here.
        start: (N, d) embeddings to start from, likewise, instead of random points (with one
            restart).
        device: the device to compute on.

    Raises:
        TypeError: for a gallery, start or device of another Python type.
        ValueError: for a gallery or start of another dtype or shape, or with a zero or non-finite
            row, a device that torch does not have, and more points than the memory holds.

    Memory: 5·N·d numbers (points, best so far, gradient, moment, scratch) and the op's 64 MiB.
    Sources: Shahreza and Marcel, "HyperFace", ICLR 2025; Geissbühler et al., "Synthetic face
    datasets generation via latent space exploration from Brownian identity diffusion", 2024.
    """

    def __init__(
        self,
        config: PackConfig,
        *,
        gallery: Tensor | None = None,
        start: Tensor | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config = config
        self.device = check_device(device)
        self.dtype = torch.float64 if config.count <= DOUBLE_UP_TO else torch.float32
        if self.device.type == "cpu":
            needed = 5 * config.count * config.dim * self.dtype.itemsize
            check_memory(f"packing {config.count:,} points in {config.dim} dimensions", needed)
        self.bound = bounds.best(config.count, config.dim)
        self.gallery = None if gallery is None else self._unit("gallery", gallery, None)
        self.start = None if start is None else self._unit("start", start, config.count)
        if start is not None and config.restarts > 1:
            raise ValueError(f"restarts must be 1 with a start, got {config.restarts}")

    def run(
        self,
        folder: Path | None = None,
        *,
        resume: bool = False,
        progress: PackingProgress | None = None,
        stop_after: int | None = None,
    ) -> Packed:
        """Pack the points.

        Args:
            folder: folder of checkpoints, written every two minutes, on Ctrl-C and at the end;
                None: no checkpoints.
            resume: resume from the newest checkpoint. With ``steps`` in the configuration, the
                result is bitwise that of an uninterrupted run.
            progress: display that is updated after every step.
            stop_after: end early, after this step, as Ctrl-C would.

        Raises:
            CheckpointError: for a checkpoint that is damaged or of another run.
            FileExistsError: if ``folder`` holds checkpoints and ``resume`` is not set.
            FloatingPointError: once the points are not finite.
            KeyboardInterrupt, Terminated: on Ctrl-C and on SIGTERM, once the step is done and a
                checkpoint of it is written.
            OSError: if a checkpoint cannot be written; earlier ones remain.
        """
        with interrupts() as interrupted:
            return _Run(self, folder, progress).run(
                resume, lambda step: interrupted() or step == stop_after
            )

    def _unit(self, name: str, rows: Tensor, count: int | None) -> Tensor:
        dim = self.config.dim
        if not isinstance(rows, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(rows).__name__}")
        if (
            not rows.is_floating_point()
            or rows.dim() != 2
            or rows.shape[1] != dim
            or (count is not None and len(rows) != count)
        ):
            wanted = f"({'M' if count is None else count}, {dim})"
            raise ValueError(
                f"{name} must be floating point of shape {wanted}, got {describe(rows)}"
            )
        rows = rows.to(self.device, torch.float64)
        return (rows / check_rows(name, rows)).to(self.dtype)


class _Run:
    """The state of a run: points, moments, the best so far, the clock."""

    def __init__(
        self, packer: Packer, folder: Path | None, progress: PackingProgress | None
    ) -> None:
        self.packer, self.config, self.progress = packer, packer.config, progress
        self.folder = folder
        self.step = 0
        self.restart = -1
        self.seconds = 0.0
        self.check_seconds = 0.0
        self.history: list[tuple[float, int, float]] = []
        self.score, self.worst, self.pair = math.inf, math.inf, (0, 0)  # of the best so far
        shape = (self.config.count, self.config.dim)
        self.points = torch.zeros(shape, dtype=packer.dtype, device=packer.device)
        self.best_points = self.points.clone()
        self.objective = _OBJECTIVES[self.config.objective](packer)

    def run(self, resume: bool, stop: Callable[[int], int]) -> Packed:
        if resume:
            self._load()
        elif self.folder is not None and checkpoint.checkpoints(self.folder):
            raise FileExistsError(
                f"{self.folder} holds a run already: resume it, or choose another folder"
            )
        if self.folder is not None:
            check_folder("folder", self.folder)
        began = time.perf_counter() - self.seconds
        saved = time.perf_counter()
        while True:
            restart, done = self._where()
            if restart != self.restart:
                if restart == self.config.restarts:
                    self._save()  # the last evaluation may be interrupted
                if self.restart >= 0:
                    self._check()
                if restart == self.config.restarts:
                    break
                self._begin(restart)
            if self.config.batch is None and self._check_needed():
                self._check()
            self.objective.step(self.points, self.step, done)
            self.step += 1
            self.seconds = time.perf_counter() - began
            if self.progress:
                worst = self.history[-1][2] if self.history else None
                self.progress.update(self._share(), self.seconds, worst)
            stopped = stop(self.step)
            if stopped or time.perf_counter() - saved > CHECKPOINT_SECONDS:
                self._save()
                saved = time.perf_counter()
            if stopped:
                raise interruption(stopped)
        return Packed(
            self.best_points,
            self.worst,
            self.pair,
            self.packer.bound,
            self.history,
            self.config,
        )

    def _share(self) -> float:
        """Return the share of the whole run that is done."""
        if self.config.steps is not None:
            return self.step / (self.config.steps * self.config.restarts)
        assert self.config.minutes is not None
        budget = self.config.minutes * 60 - 1.2 * self.check_seconds  # for the last evaluation
        return 1.0 if budget <= self.seconds else self.seconds / budget

    def _where(self) -> tuple[int, float]:
        """Return the number of the restart, and the share of it that is done."""
        if self.config.steps is not None:
            restart, step = divmod(self.step, self.config.steps)
            return restart, step / self.config.steps
        position = self._share() * self.config.restarts
        return int(position), position % 1

    def _check_needed(self) -> bool:
        """Return whether to evaluate: every 25 steps, or in a timed run for at most a sixth of the
        time.
        """
        if self.config.minutes is None or not self.history:
            return self.step % CHECK_EVERY == 0
        since = self.seconds - self.history[-1][0]
        return since >= max(self.config.minutes * 60 / TIMED_CHECKS, 5 * self.check_seconds)

    def _begin(self, restart: int) -> None:
        self.restart = restart
        if self.packer.start is not None:
            self.points = self.packer.start.clone()
        else:
            points = _draws(self.config, self.points, "points", restart)
            self.points = points / torch.linalg.vector_norm(points, dim=1, keepdim=True)
        self.objective = _OBJECTIVES[self.config.objective](self.packer)

    def _check(self) -> None:
        """Evaluate the exact worst cosine, and save the best points so far.

        The best have the lowest worst cosine plus gallery term, which is HyperFace's objective.
        """
        if not self.points.isfinite().all():
            raise FloatingPointError(f"points are not finite after {self.step} steps")
        began = time.perf_counter()
        worst, pair = closest_pair(self.points)
        self.check_seconds = max(self.check_seconds, time.perf_counter() - began)
        self.history.append((self.seconds, self.step, worst))
        score = worst + float(_gallery_term(self.packer, self.points))
        if score < self.score:
            self.score, self.worst, self.pair = score, worst, pair
            self.best_points.copy_(self.points)

    def _description(self) -> dict[str, Any]:
        digests = {
            name: None if rows is None else sha256_of_rows(rows)
            for name, rows in (("gallery", self.packer.gallery), ("start", self.packer.start))
        }
        return {"config": asdict(self.config), "data": digests}

    def _tensors(self) -> dict[str, Tensor]:
        optimizer = {f"optimizer.{k}": v for k, v in self.objective.tensors().items()}
        return {"points": self.points, "best": self.best_points} | optimizer

    def _save(self) -> None:
        if self.folder is None:
            return
        state = {
            "restart": self.restart,
            "seconds": self.seconds,
            "check_seconds": self.check_seconds,
            "best": None if math.isinf(self.score) else [self.score, self.worst, *self.pair],
            "history": self.history,
        }
        checkpoint.save(
            self.folder,
            self.step,
            {k: v.cpu() for k, v in self._tensors().items()},
            self._description() | state,
        )

    def _load(self) -> None:
        if self.folder is None:
            raise ValueError("resume needs a folder")
        found = checkpoint.find(self.folder)
        tensors, state = checkpoint.load(found)
        for part, wanted in self._description().items():
            checkpoint.check_same(found, state.get(part), wanted)
        own = self._tensors()
        checkpoint.check_shapes(found, tensors, own)
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        try:
            self.step, self.restart = int(state["step"]), int(state["restart"])
            self.seconds = float(state["seconds"])
            self.check_seconds = float(state["check_seconds"])
            if state["best"] is not None:
                score, worst, i, j = state["best"]
                self.score, self.worst, self.pair = float(score), float(worst), (int(i), int(j))
            self.history = [(float(s), int(k), float(c)) for s, k, c in state["history"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{found / checkpoint.STATE} is damaged: {error!r}") from error


# ---- objectives: one step each, at the share `done` of a restart ---------------------------------


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
            gradient = _gradient(self.packer, points[rows], self.energy(done))
            self.optimizer.step_rows(points, rows, gradient, length)

    def _rows(self, step: int) -> Tensor | None:
        """Return the points of a step's batch; each point is drawn once per pass."""
        if self.config.batch is None:
            return None
        parts = self.config.count // self.config.batch
        epoch, part = divmod(step, parts)
        if epoch != self.batches[0]:
            random = generator(self.config.seed, "batches", epoch)
            order = torch.randperm(self.config.count, generator=random, device="cpu").to(
                self.packer.device
            )
            self.batches = (epoch, order.tensor_split(parts))
        return self.batches[1][part]


def _draws(config: PackConfig, points: Tensor, purpose: str, step: int) -> Tensor:
    """Return standard normal numbers of the points' shape, dtype and device."""
    random = generator(config.seed, purpose, step)
    numbers = torch.randn(points.shape, dtype=points.dtype, generator=random, device="cpu")
    return numbers.to(points.device)


def _gradient(packer: Packer, points: Tensor, energy: Any) -> Tensor:
    x = points.detach().requires_grad_()
    loss = sk.hypersphere_repulsion(x, energy=energy)
    return torch.autograd.grad(loss + _gallery_term(packer, x), x)[0]


def _gallery_term(packer: Packer, x: Tensor) -> Tensor | float:
    if packer.gallery is None:
        return 0.0
    nearest = sk.hypersphere_repulsion(x, packer.gallery, energy=sk.MaxCosine())
    return packer.config.alpha * (1 - nearest)


class _LogSumExp(_Annealed):
    def sharpness(self, done: float) -> float:
        """Return t·(1 − bound)/√d."""
        last = LAST_SHARPNESS * max(1.0, FEW / self.config.count)
        return FIRST_SHARPNESS * (last / FIRST_SHARPNESS) ** done

    def energy(self, done: float) -> sk.LogSumExp:
        t = self.sharpness(done) * self.config.dim**0.5 / (1 - self.packer.bound.cosine)
        return sk.LogSumExp(min(t, 1e6))  # its sharpest

    def length(self, done: float) -> float:
        return min(super().length(done), self.angle / self.sharpness(done))


class _Langevin(_Annealed):
    NOISE = 0.1  # length of the noise, in units of a step's length

    def energy(self, done: float) -> sk.Hinge:
        low = self.packer.bound.cosine
        high = bounds.random_worst(self.config.count, self.config.dim)
        return sk.Hinge(min(high + (low - high) * done, math.nextafter(1, 0)))

    def step(self, points: Tensor, step: int, done: float) -> None:
        super().step(points, step, done)
        noise = _draws(self.config, points, "noise", step)
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


_OBJECTIVES: dict[str, Callable[[Packer], Any]] = {
    "lse": _LogSumExp,
    "hyperface": _HyperFace,
    "langevin": _Langevin,
}
