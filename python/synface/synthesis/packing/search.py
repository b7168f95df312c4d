"""The orbit search: codes that a group of rotations maps to themselves.

Few points: many groups, each from several random starts, all at once; the best codes are then
refined without symmetry. Many points: one large cyclic group, whose steps cost N²/p numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import synface_kernels as sk

from ...common.check import available_memory
from ...common.rng import generator
from . import symmetries
from .annealing import (
    FIRST_SHARPNESS,
    FIRST_STEP,
    LONG_SHARPNESS,
    Annealing,
    last_sharpness,
)
from .objectives import Evaluation, PointSearch, closest_pair, gallery_term
from .optimizer import SphereAdam
from .orbits import Layout, Orbits

if TYPE_CHECKING:
    from .config import PackConfig
    from .packer import Packer

FEW_POINTS = 300
FEW_STEPS = 1300
SCREENED = 0.3  # share of a few points' search in which the groups compete
# First and last sharpness of the codes that compete, in turn: some are found from far, some near.
SCREENING = ((1.0, 30.0), (5.0, 200.0), (20.0, 300.0))
FINALISTS = 4  # codes refined without symmetry, and half as many of more than
MANY_FINALISTS = 200  # points
REFINED_FROM, REFINING_STEP = 50.0, 0.02  # the begin of their schedule
COSINES = 36_000  # of each order in a step, as far as the number of starts can be chosen
MOST_STARTS = 16
DOUBLE_FROM = 0.95  # share of the search of many points from which correlations are float64
NOISE = 0.3  # added to quadratic phases, in units of a coordinate's root mean square
PHASES_SHARPNESS, PHASES_STEP = 5.0, 0.05  # the schedule's begin from quadratic phases
EXACT_UP_TO = 200_000  # points whose pairs are all compared at the end
THREADED = 2_000_000  # correlations of a step from which it takes all threads
POLISH_TIME = 0.25  # share of a run limited by time


def default_steps(count: int, dim: int) -> int:
    """Return a number of steps that takes some seconds, or minutes for 50,000 points or more."""
    if count <= FEW_POINTS:
        return FEW_STEPS
    return max(200, min(4000, 4_000_000_000 * min(dim, count) // (count * count)))


@contextmanager
def _float32(threads: int) -> Iterator[None]:
    """Compute in float32 at its full precision, and with a number of threads, inside the block.

    Small steps gain little from threads, and lose much where other programs run.
    """
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    if threads != before:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        if threads != before:
            torch.set_num_threads(before)


class _Codes:
    """Orbit codes of one order, their schedules, and the state of their optimizer.

    Attributes:
        rows: (codes, m, width) generators.
    """

    def __init__(self, orbits: Orbits, codes: int, generators: int, annealing: Annealing) -> None:
        self.orbits, self.annealing = orbits, annealing
        shape = (codes, generators, orbits.width)
        self.rows = torch.zeros(shape, dtype=torch.float64, device=orbits.device)
        self.optimizer = SphereAdam(codes * generators, orbits.width, torch.float64, orbits.device)

    def begin(self, random: torch.Generator) -> None:
        drawn = torch.randn(self.rows.shape, dtype=torch.float64, generator=random, device="cpu")
        self.rows.copy_(self.orbits.unit(drawn.to(self.orbits.device)))

    def step(self, done: float, dtype: torch.dtype) -> None:
        codes, generators, _ = self.rows.shape
        t, length = self._per_code(self.annealing.t(done)), self.annealing.length(done)
        gradient = self.orbits.gradient(self.rows, t, dtype)
        lengths = self._per_code(length).repeat_interleave(generators)[:, None]
        self.optimizer.step(self.rows.flatten(0, 1), gradient.flatten(0, 1), lengths)

    @property
    def correlations(self) -> int:
        """The number of correlations of a step."""
        codes, generators, _ = self.rows.shape
        return codes * generators**2 * self.orbits.order

    def points(self, code: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.orbits.points(self.rows[code], code, dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows} | self.optimizer.tensors()

    def _per_code(self, value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value
        return torch.full(self.rows.shape[:1], value, dtype=torch.float64, device=self.rows.device)


class OrbitSearch:
    """A search for orbit codes, with `Packer`'s configuration; see `PointSearch`."""

    rounds = 1
    finished = False

    def __init__(self, packer: Packer) -> None:
        self.packer, config = packer, packer.config
        count, dim = config.count, config.dim
        self.is_few = count <= FEW_POINTS
        self.final: _Codes | None = None  # few points: the best codes, without symmetry
        self.polish: PointSearch | None = None  # many points: likewise
        self.phases = not self.is_few and _phases(config) is not None
        self.codes = []
        for group in _layouts(config).values():
            if self.is_few:
                self.codes.append(self._new(_repeated(group, count, config.restarts)))
            else:
                self.codes.append(self._new(group * (config.restarts or 1)))
        if self.is_few:
            last = last_sharpness(count, config.steps or FEW_STEPS)
            finalists = FINALISTS // (2 if count > MANY_FINALISTS else 1)
            refining = self._annealing(last, REFINED_FROM, REFINING_STEP)
            self.final = self._new([Layout(1, dim)] * finalists, refining)
        elif config.polish:
            self.polish = PointSearch(packer, self._polishing())
        self.finishing = torch.zeros((), dtype=torch.bool, device="cpu")
        self.leader = (0, 0)  # the best codes' index and the code's
        shape = (count, dim) if self.is_few else self.codes[0].rows.shape[1:]
        self.best = torch.zeros(shape, dtype=torch.float64, device=packer.device)

    @property
    def _active(self) -> list[_Codes]:
        """The codes that a step moves: those that compete, or the best ones without symmetry."""
        return [self.final] if self.final is not None and self.finishing else self.codes

    @property
    def _polished(self) -> PointSearch | None:
        """The search without symmetry of many points, once it has begun."""
        return self.polish if self.finishing else None

    @property
    def share(self) -> float:
        """The share of the run that belongs to the search with symmetry."""
        config = self.packer.config
        if self.is_few:
            return SCREENED
        if not config.polish:
            return math.inf
        if config.steps is None:
            return 1 - POLISH_TIME
        return config.steps / (config.steps + config.polish)

    def begin(self, restart: int) -> None:
        """Draw the first generators of all codes."""
        seed = self.packer.config.seed
        for index, codes in enumerate(self.codes):
            codes.begin(generator(seed, "generators", index))
        if self.phases:
            start = symmetries.quadratic(self.codes[0].orbits, self.packer.config.count)
            self.codes[0].rows.copy_(start.expand_as(self.codes[0].rows))

    def turns(self, done: float) -> bool:
        """Return whether the next step is the first without symmetry, from the best code so far."""
        return self.polish is not None and done >= self.share and not self.finishing

    def step(self, step: int, done: float) -> None:
        """Take a step of every code."""
        share = self.share
        if done >= share and not self.finishing:
            self._finish()
        if self._polished is not None:
            self._polished.step(step, (done - share) / (1 - share))
            return
        small = self.is_few or self.codes[0].correlations < THREADED
        with _float32(threads=1 if small else torch.get_num_threads()):
            self._step_codes(step, done, share)

    def _step_codes(self, step: int, done: float, share: float) -> None:
        if self.phases and step == 0:
            self._disturb()
        if self.final is not None and self.finishing:
            self.final.step((done - share) / (1 - share), torch.float64)
            return
        done /= min(share, 1.0)
        dtype = torch.float64 if done >= DOUBLE_FROM and not self.is_few else torch.float32
        for codes in self.codes:
            codes.step(done, dtype)

    def evaluate(self) -> Evaluation:
        """Return the best code's worst cosine: of all pairs, by the group's symmetry."""
        config = self.packer.config
        if self._polished is not None:
            return self._polished.evaluate()
        worst = [codes.orbits.worst(codes.rows) for codes in self._active]
        values = [float(each.min()) for each in worst]
        which = min(range(len(values)), key=lambda index: values[index])
        self.leader = which, int(worst[which].argmin())
        if not self.is_few:
            term = 0.0
            if self.packer.gallery is not None:
                term = float(gallery_term(self.packer, self._points(), config.count))
            return Evaluation(values[which], None, term)
        return Evaluation(*closest_pair(self._points()), 0.0)

    def keep(self) -> None:
        """Keep the code that was evaluated as the best one so far."""
        if self._polished is not None:
            self._polished.keep()
        elif self.is_few:
            self.best.copy_(self._points())
        else:
            self.best.copy_(self.codes[0].rows[self.leader[1]])

    def result(self) -> tuple[Tensor, Evaluation | None]:
        """Return the best points and, unless the last evaluation holds for them, a new one."""
        if self.is_few:
            points = self.best.to(self.packer.dtype)
            rounded = points.dtype != self.best.dtype
            return points, Evaluation(*closest_pair(points), 0.0) if rounded else None
        orbits, count = self.codes[0].orbits, self.packer.config.count
        if self._polished is not None:
            points = self._polished.best
        else:
            points = orbits.points(self.best, 0, self.packer.dtype)[:count]
        if self._compares_all():
            return points, Evaluation(*closest_pair(points), 0.0)
        first = torch.arange(0, count, orbits.order, dtype=torch.int64, device="cpu")
        return points, Evaluation(*_closest_to(points, first.to(points.device)), 0.0)

    def result_seconds(self) -> float:
        """Return an estimate of the seconds that `result` takes: of all pairs in double."""
        count, dim = self.packer.config.count, self.packer.config.dim
        if self.is_few:
            return 0.0
        rows, columns = 512, 4096
        x = torch.ones(rows, dim, dtype=torch.float64, device=self.packer.device)
        y = torch.ones(dim, columns, dtype=torch.float64, device=self.packer.device)
        float(torch.mm(x, y)[0, 0])
        began = time.perf_counter()
        float(torch.mm(x, y)[0, 0])
        compared = count if self._compares_all() else self.codes[0].rows.shape[1]
        return 1.3 * (time.perf_counter() - began) * (compared / rows) * (count / columns)

    def finite(self) -> bool:
        """Return whether all codes are finite."""
        if self._polished is not None:
            return self._polished.finite()
        return all(bool(codes.rows.isfinite().all()) for codes in self._active)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state, for a checkpoint."""
        parts = {str(index): codes.tensors() for index, codes in enumerate(self.codes)}
        for name, part in (("final", self.final), ("polish", self.polish)):
            if part is not None:
                parts[name] = part.tensors()
        found = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.items()}
        return found | {"best": self.best, "finishing": self.finishing}

    def _new(self, layouts: list[Layout], annealing: Annealing | None = None) -> _Codes:
        generators = -(-self.packer.config.count // layouts[0].order)
        orbits = Orbits(layouts, self.packer.device)
        annealing = annealing or self._searching(len(layouts), len(set(layouts)))
        return _Codes(orbits, len(layouts), generators, annealing)

    def _annealing(
        self,
        last: float | Tensor,
        first: float | Tensor = FIRST_SHARPNESS,
        first_step: float = FIRST_STEP,
    ) -> Annealing:
        bound = self.packer.bound.cosine
        return Annealing(self.packer.config.dim, bound, last, first, first_step)

    def _searching(self, codes: int, layouts: int) -> Annealing:
        """Return the schedules of codes of one order, which has a number of layouts."""
        if self.phases:
            return self._annealing(LONG_SHARPNESS, PHASES_SHARPNESS, PHASES_STEP)
        if not self.is_few:
            return self._annealing(LONG_SHARPNESS)
        device = self.packer.device
        # Codes are all layouts of a group, again and again: each layout has every schedule.
        turns = [(i + i // layouts) % len(SCREENING) for i in range(codes)]
        first, last = zip(*(SCREENING[turn] for turn in turns), strict=True)
        return self._annealing(
            torch.tensor(last, dtype=torch.float64, device=device),
            torch.tensor(first, dtype=torch.float64, device=device),
        )

    def _polishing(self) -> Annealing:
        """Return the schedule of the last part: sharp from the begin, or with a gallery, whose term
        moves the points far, the whole one.
        """
        config = self.packer.config
        last = last_sharpness(config.count, config.polish or 0)
        if self.packer.gallery is not None:
            return self._annealing(last)
        return self._annealing(last, last / 4, REFINING_STEP)

    def _compares_all(self) -> bool:
        """Return whether the result's pairs are all compared: few, or not symmetric any more."""
        return self.polish is not None or self.packer.config.count <= EXACT_UP_TO

    def _points(self) -> Tensor:
        """Return the points of the code that was evaluated last."""
        group, code = self.leader
        dtype = torch.float64 if self.is_few else self.packer.dtype
        return self._active[group].points(code, dtype)[: self.packer.config.count]

    def _disturb(self) -> None:
        """Add noise to quadratic phases, whose cosines are equal and would not move else."""
        codes, random = self.codes[0], generator(self.packer.config.seed, "noise", 0)
        noise = torch.randn(codes.rows.shape, dtype=torch.float64, generator=random, device="cpu")
        scale = NOISE / math.sqrt(self.packer.config.dim)
        codes.rows.copy_(codes.orbits.unit(codes.rows + scale * noise.to(codes.rows.device)))

    def _finish(self) -> None:
        """Begin the last part of the search, without symmetry, from the best codes."""
        self.finishing.fill_(True)
        if self.polish is not None:
            points = self.codes[0].orbits.points(self.best, 0, self.packer.dtype)
            self.polish.begin_at(points[: self.packer.config.count])
            self.polish.keep()
        if self.final is None:
            return
        worst = torch.cat([codes.orbits.worst(codes.rows) for codes in self.codes]).cpu()
        places = [(codes, lane) for codes in self.codes for lane in range(len(codes.rows))]
        finalists = len(self.final.rows)
        best = worst.sort(stable=True).indices[:finalists].tolist()
        for to, index in enumerate(best + best[:1] * (finalists - len(best))):
            codes, lane = places[index]
            self.final.rows[to] = self.final.orbits.from_points(codes.points(lane))


def check_restarts(config: PackConfig) -> None:
    """Raise ValueError if the generators and correlations of all restarts exceed the memory."""
    needed, device, restarts = 0, torch.device("cpu"), config.restarts or 1
    for order, layouts in _layouts(config).items():
        generators, codes = -(-config.count // order), len(layouts) * restarts
        width = Orbits(layouts[:1], device).width
        needed += 8 * codes * generators * (4 * width + 6 * order)
    free = available_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"restarts must fit into memory: {restarts:,} of {config.count:,} points in "
            f"{config.dim} dimensions take {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB "
            "are free"
        )


def _layouts(config: PackConfig) -> dict[int, list[Layout]]:
    """Return the layouts to search, by order."""
    if config.count > FEW_POINTS:
        layouts = [_phases(config) or symmetries.many(*_wanted(config))]
    else:
        layouts = symmetries.few(*_wanted(config))
    return {order: list(group) for order, group in groupby(layouts, lambda each: each.order)}


def _wanted(config: PackConfig) -> tuple[int, int, str, int | None]:
    return config.count, config.dim, config.symmetry, config.order


def _phases(config: PackConfig) -> Layout | None:
    free = config.symmetry == "auto" and config.order is None
    return symmetries.phases(config.count, config.dim) if free else None


def _closest_to(points: Tensor, rows: Tensor) -> tuple[float, tuple[int, int]]:
    """Return the largest cosine of some rows with all other points, and the pair."""
    cosine, index = sk.nearest_neighbors(points[rows], points, 2)
    other = index[:, 0] == rows  # a point is its own nearest, unless another one equals it
    place = other.long()[:, None]
    cosine, index = cosine.gather(1, place)[:, 0], index.gather(1, place)[:, 0]
    row = int(cosine.argmax())
    return cosine[row].item(), (int(rows[row]), int(index[row]))


def _repeated(group: list[Layout], count: int, restarts: int | None) -> list[Layout]:
    """Return the layouts of one order as often as each is started: more where it costs less."""
    affordable = COSINES * group[0].order // count**2
    if restarts is None:
        group = group[: max(1, 2 * affordable)]
        restarts = max(1, min(MOST_STARTS, affordable // len(group)))
    return group * restarts
