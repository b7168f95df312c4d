"""Packing of unit vectors: an annealed soft maximum of their cosines, minimized on the sphere."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ... import checkpoint
from ...common.check import (
    check_device,
    check_folder,
    check_memory,
    check_rows,
    describe,
)
from ...common.files import CheckpointError, check_output, write_tensors
from ...common.interrupts import interruption, interrupts
from ..embeddings import NAME, sha256_of_rows
from . import bounds
from .config import PackConfig
from .constructions import Construction, is_known
from .objectives import PointSearch
from .search import OrbitSearch, check_restarts

CHECK_EVERY = 25  # steps between evaluations of the exact worst cosine, or
TIMED_CHECKS = 50  # evaluations in a run limited by time
CHECKPOINT_SECONDS = 120.0
DOUBLE_UP_TO = 1000  # points on a CPU: few enough that float64 costs nothing
QUEUED_STEPS = 2  # steps that the host may be ahead of a GPU, so that the clock is right


class PackingProgress(Protocol):
    """A progress bar of `Packer.run`."""

    def update(self, done: float, seconds: float, worst: float | None) -> None:
        """Show the share done, the seconds, and the last exact worst cosine."""


@dataclass(frozen=True)
class Packed:
    """A packing.

    Attributes:
        points: (N, d) unit vectors, float32 or (up to 1000 points on a CPU) float64.
        worst: the largest cosine between two of them, exact; of more than 200,000 points with the
            objective "orbit", between one point of each orbit and all others, which is the same up
            to the points' rounding.
        pair: the indices of these two.
        bound: the highest known lower bound on the worst cosine of N points.
        history: (seconds, steps, worst cosine) of every evaluation.
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

        The history is without its seconds: the file depends on the result alone.

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
            "history": json.dumps([row[1:] for row in self.history]),
        }
        write_tensors(path, {NAME: self.points.cpu()}, metadata)


class Packer:
    """Packing of N points on the unit sphere of R^d that minimizes their worst cosine.

    Objectives, annealed over the run:

    - "orbit": as "lse", of points that a cyclic group of rotations permutes. One point of each
      orbit and its images are all that is computed, by FFT, so a step costs N²/p numbers for a
      group of order p. Up to 300 points, many groups compete (`symmetry`), from several starts
      each, for 30 % of the run, and the best codes are refined without symmetry. Where the optimum
      is known in closed form (N ≤ 2d, or d = 2) it is constructed instead.
    - "lse": (1/t)·log Σ_{i<j} exp(t·c_ij), a soft maximum of the cosines, with t rising
      exponentially from √d/2 to 300·√d, or to 75·√d in less than 300 steps or a run limited by
      time, and higher for N ≤ 1000 (all divided by 1 − bound), and steps of `SphereAdam` whose
      length falls linearly to 0, and with 1/t in the end where that is less.
    - "hyperface": max c_ij, the closest pair alone, with Adam and renormalization.
    - "langevin": soft spheres, Σ max(0, c_ij − threshold)²/2, whose threshold falls from random
      points' worst cosine to the bound, with noise that decays to 0.

    A gallery (M, d) adds α·(1/N)·Σ_i min_g (1 − x_i·y_g), which keeps points near it.

    Every pair counts in every step, unless ``batch`` is set; then a step moves ``batch`` points by
    their own pairs only, and includes a given pair in about batch/N of the passes over the points.
    Every worst cosine reported is exact, over all pairs; with ``batch`` it is computed at the end
    of each restart only. During an orbit search it is that of the whole orbits, by their symmetry;
    of the result, of which points were dropped where p does not divide N, all pairs are compared.

    Args:
        config: the configuration.
        gallery: (M, d) embeddings, rows finite and not zero; normalized here.
        start: (N, d) embeddings to start from, likewise, instead of random points (with one
            restart).
        device: the device to compute on. A step on a GPU moves all points at once and draws its
            noise there, and the host does not wait for it: only every evaluation does.
        group: process group whose ranks share the pairs of a step and of an evaluation; every rank
            holds all points and returns the same packing. Needs ``steps``, N ≥ ranks (and batch,
            likewise), and GPUs of one model.

    Raises:
        TypeError: for a gallery, start or device of another Python type.
        ValueError: for a gallery or start of another dtype or shape, or with a zero or non-finite
            row, a device that torch does not have, more points or restarts than the memory holds,
            a group with ``minutes`` or with fewer points than ranks, and for "orbit" with a start,
            a group or, up to 300 points, a gallery.

    Memory: 5·N·d numbers (points, best so far, gradient, moment, scratch), on a GPU 7·N·d, and the
    op's 64 MiB. An orbit search holds 4·d numbers of each orbit, some tens of MiB of correlations
    (`Orbits`), and at the end N·d.
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
        group: Any = None,
    ) -> None:
        self.config = config = config.resolved(
            gallery=gallery is not None, start=start is not None, group=group is not None
        )
        self.device = check_device(device)
        on_cpu = self.device.type == "cpu"
        self.dtype = torch.float64 if on_cpu and config.count <= DOUBLE_UP_TO else torch.float32
        self.group = group
        if group is not None:
            self._check_group()
        if on_cpu:
            copies = 1 if config.objective == "orbit" and not config.polish else 5
            needed = copies * config.count * config.dim * self.dtype.itemsize
            check_memory(f"packing {config.count:,} points in {config.dim} dimensions", needed)
        self.bound = bounds.best(config.count, config.dim)
        self.gallery = None if gallery is None else self._unit("gallery", gallery, None)
        self.start = None if start is None else self._unit("start", start, config.count)
        if config.objective == "orbit" and on_cpu:
            check_restarts(config)

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

    def _check_group(self) -> None:
        ranks, config = dist.get_world_size(self.group), self.config
        if config.minutes is not None:
            raise ValueError(f"a group needs steps, not minutes, got minutes = {config.minutes}")
        for name, points in (("count", config.count), ("batch", config.batch)):
            if points is not None and points < ranks:
                raise ValueError(f"{name} must be at least the {ranks} ranks, got {points}")

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
    """The state of a run: the search, the best so far, the clock."""

    def __init__(
        self, packer: Packer, folder: Path | None, progress: PackingProgress | None
    ) -> None:
        self.packer, self.config, self.progress = packer, packer.config, progress
        self.folder = folder
        self.step = 0
        self.restart = -1
        self.seconds = 0.0
        self.check_seconds = 0.0
        self.reserve = 0.0  # seconds that comparing all pairs of the result will take
        self.history: list[tuple[float, int, float]] = []
        self.score, self.worst, self.pair = math.inf, math.inf, (0, 0)  # of the best so far
        self.search = _search(packer)
        steps = self.config.steps
        self.steps = None if steps is None else steps + (self.config.polish or 0)

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
        if self.config.minutes is not None:
            self.reserve = min(self.search.result_seconds(), 30 * self.config.minutes)
        saved = time.perf_counter()
        queue = _Queue(self.packer.device)
        while True:
            restart, done = self._where()
            if restart != self.restart:
                if restart == self.search.rounds:
                    self._save()  # the last evaluation may be interrupted
                if self.restart >= 0:
                    self._check()
                if restart == self.search.rounds:
                    break
                self._begin(restart)
            if self.config.batch is None and (self._check_needed() or self.search.turns(done)):
                self._check()
            self.search.step(self.step, done)
            queue.push()
            self.step += 1
            self.seconds = time.perf_counter() - began
            if self.progress:
                worst = self.history[-1][2] if self.history else None
                self.progress.update(self._share(), self.seconds, worst)
            late = time.perf_counter() - saved > CHECKPOINT_SECONDS
            stopped, due = _greatest((stop(self.step), late), self.packer.group)
            if stopped or due:
                self._save()
                saved = time.perf_counter()
            if stopped:
                raise interruption(stopped)
        points, last = self.search.result()
        if last is not None and last.pair is not None:
            self.worst, self.pair = last.worst, last.pair
            self.history.append((time.perf_counter() - began, self.step, self.worst))
        return Packed(
            points,
            self.worst,
            self.pair,
            bounds.certificate(self.config.count, self.config.dim)[0],
            self.history,
            self.config,
        )

    def _share(self) -> float:
        """Return the share of the whole run that is done."""
        if self.steps is not None:
            return self.step / (self.steps * self.search.rounds)
        assert self.config.minutes is not None
        # The last evaluation takes time as well.
        budget = self.config.minutes * 60 - 1.2 * self.check_seconds - self.reserve
        return 1.0 if budget <= self.seconds else self.seconds / budget

    def _where(self) -> tuple[int, float]:
        """Return the number of the restart, and the share of it that is done."""
        if self.step == 0:  # at least one is taken
            return 0, 0.0
        if self.search.finished:
            return self.search.rounds, 0.0
        if self.steps is not None:
            restart, step = divmod(self.step, self.steps)
            return restart, step / self.steps
        position = self._share() * self.search.rounds
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
        self.search.begin(restart)

    def _check(self) -> None:
        """Evaluate the exact worst cosine, and save the best points so far.

        The best have the lowest worst cosine plus gallery term, which is HyperFace's objective.
        """
        if not self.search.finite():
            raise FloatingPointError(f"points are not finite after {self.step} steps")
        began = time.perf_counter()
        worst, pair, term = self.search.evaluate()
        self.check_seconds = max(self.check_seconds, time.perf_counter() - began)
        self.history.append((self.seconds, self.step, worst))
        score = worst + term
        if score < self.score:
            self.score, self.worst, self.pair = score, worst, pair or (0, 0)
            self.search.keep()

    def _description(self) -> dict[str, Any]:
        digests = {
            name: None if rows is None else sha256_of_rows(rows)
            for name, rows in (("gallery", self.packer.gallery), ("start", self.packer.start))
        }
        return {"config": asdict(self.config), "data": digests}

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
            {k: v.cpu() for k, v in self.search.tensors().items()},
            self._description() | state,
            self.packer.group,
        )

    def _load(self) -> None:
        if self.folder is None:
            raise ValueError("resume needs a folder")
        found = checkpoint.find(self.folder)
        tensors, state = checkpoint.load(found)
        for part, wanted in self._description().items():
            checkpoint.check_same(found, state.get(part), wanted)
        own = self.search.tensors()
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


def _search(packer: Packer) -> PointSearch | OrbitSearch | Construction:
    if packer.config.objective != "orbit":
        return PointSearch(packer)
    return Construction(packer) if is_known(packer.config) else OrbitSearch(packer)


def _greatest(values: tuple[int, ...], group: Any) -> tuple[int, ...]:
    """Return the greatest of each value on all ranks."""
    if group is None:
        return values
    # The group's CPU backend, if it has one, does not make this wait for a GPU.
    has_cpu = "cpu:" in dist.get_backend_config(group)
    device = torch.device("cpu") if has_cpu else torch.device("cuda", torch.cuda.current_device())
    most = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return tuple(most.tolist())


class _Queue:
    """Steps that a GPU has yet to do: the host waits while there are more than a few."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ends: deque[torch.cuda.Event] = deque()

    def push(self) -> None:
        """Queue the step that was launched last."""
        if self.device.type != "cuda":
            return
        self.ends.append(torch.cuda.current_stream(self.device).record_event())
        if len(self.ends) > QUEUED_STEPS:
            self.ends.popleft().synchronize()
