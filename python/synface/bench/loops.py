"""The training loops that `synface bench training` times: `train`'s and plain torch's, in turns.

`train` itself runs, with its loader, checks and log. Its progress display, which it calls after
each step, lets the plain loops take their turns: so all are timed in one process, interleaved.
"""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.check import check_integers, check_number
from ..common.rng import generator, normals, seeded
from ..data.formats.image_set import ImageSet, LabeledImages
from ..data.loading.sampler import WHOLE, RankSlice
from ..models.iresnet import ChannelsLastConv2d
from ..training.backbone import build_backbone
from ..training.config import BUILT_IN, TrainConfig
from ..training.loop import train
from ..training.sources import Batch, FacesSource
from .loaders import plain_batches
from .measure import arcface, reason
from .meter import PHASES, Meter, Stamp, StepHooks, Turn

LOOPS = ("synface", "torch", "tuned")
TURN = 1.0  # seconds of a turn, if a step does not take longer
STEPS = 50  # of a turn, at most
UNTIMED = 3.0  # seconds before a turn, at most, in which a loop uses up the batches that are queued
WARM_UP = {"cpu": 2, "cuda": 4}  # steps; on a GPU kernels are compiled in the first ones


@dataclass(frozen=True)
class SpeedConfig:
    """The settings of the measurement.

    Attributes:
        backbone: as `TrainConfig`'s.
        size: (H, W) of the images. batch_size: of all loops.
        identities: number of class centers C of the loops.
        embedding_size: D.
        classes: numbers of class centers of which the head alone is timed.
        workers: processes that decode images, of each loader.
        rounds: turns of each loop, at most. seconds: time limit; each part has one round at least.
        precision: as `TrainConfig`'s, of all loops.
        device: of all loops: "cpu", or a GPU as "cuda" or "cuda:1".
        memory: MiB of memory for the images, decoded to RGB, of the loops: a set that fits is
            decoded before they begin.
    """

    backbone: str = "iresnet18"
    size: tuple[int, int] = (112, 112)
    batch_size: int = 64
    identities: int = 10_000
    embedding_size: int = 512
    classes: tuple[int, ...] = (1_000, 10_000, 100_000)
    workers: int = 2
    rounds: int = 3
    seconds: float = 150.0
    precision: str = "float32"
    device: str = "cpu"
    memory: int = 0

    def __post_init__(self) -> None:
        check_integers(
            self, batch_size=1, identities=2, embedding_size=1, workers=1, rounds=1, memory=0
        )
        check_number("seconds", self.seconds, 0)
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be float32 or bfloat16, got {self.precision!r}")
        if self.on.type not in WARM_UP:
            raise ValueError(f"device must be a CPU or a CUDA device, got {self.device!r}")
        if not self.classes or min(self.classes) < 2:
            raise ValueError(f"classes must be numbers of 2 or more, got {self.classes}")

    @property
    def on(self) -> torch.device:
        """The device."""
        return torch.device(self.device)

    def training(self) -> TrainConfig:
        """Return the configuration of a run that does not end by itself."""
        return TrainConfig(
            epochs=10**9,
            batch_size=self.batch_size,
            backbone=self.backbone,
            embedding_size=self.embedding_size,
            precision=self.precision,
            lr=0.01,
            scale=64.0,  # with m2, those of `arcface`
            m2=0.5,
            augment=0.0,
            checkpoint_every=1e9,
        )

    def autocast(self) -> torch.autocast:
        """Return the context of forward passes, as in `train`."""
        dtype = getattr(torch, self.precision)
        return torch.autocast(self.on.type, dtype, enabled=dtype != torch.float32)


class _Ended(Exception):
    """The end of a measured run."""


class TimedSource(FacesSource):
    """A source of faces that claims more identities than it has, and times its batches.

    Attributes:
        stamp: called before and after each batch.
    """

    def __init__(self, images: LabeledImages, config: SpeedConfig, classes: int) -> None:
        super().__init__(images, size=config.size, grayscale=False, workers=config.workers)
        self.num_classes = classes
        self.stamp: Callable[[], None] = lambda: None

    def batches(
        self,
        config: TrainConfig,
        first: int,
        part: RankSlice = WHOLE,
        device: torch.device | str = "cpu",
    ) -> Generator[tuple[int, Batch]]:
        with closing(super().batches(config, first, part, device)) as batches:
            while True:  # a run of this configuration does not end
                self.stamp()
                each = next(batches)
                self.stamp()
                yield each


def sgd(
    config: TrainConfig, parameters: Iterable[nn.Parameter], fused: bool = False
) -> torch.optim.SGD:
    """Return the optimizer of a configuration, in torch's default implementation or fused."""
    return torch.optim.SGD(
        parameters, config.lr, 0.9, weight_decay=config.weight_decay, nesterov=True,
        fused=fused or None,
    )  # fmt: skip


class PlainLoop:
    """A training loop as it is usually written in plain torch: `DataLoader`, ArcFace, SGD.

    Args:
        batches: images and labels, on the CPU or on the device already.
        shape: (H, W, C) of the images.
        tuned: with a built-in backbone in torch's channels_last order, as in `train` on a CPU, and
            its optimizer and the centers' fused; otherwise all are torch's defaults.

    Attributes:
        held: bytes of its tensors on a GPU between two steps, once it has taken one.
    """

    def __init__(
        self,
        config: SpeedConfig,
        batches: Iterator[Any],
        shape: tuple[int, ...],
        tuned: bool,
        meter: Meter,
    ) -> None:
        training, self.batches, self.meter = config.training(), batches, meter
        before = meter.allocated()
        with seeded(0):
            self.backbone = build_backbone(training, shape).to(meter.device)
        draw = generator(0, "centers", 0, meter.device)
        weight = normals((config.identities, config.embedding_size), draw).mul_(0.01)
        self.weight = nn.Parameter(weight)
        # Torch's fused SGD fails where a parameter of a user's backbone has no gradient at first.
        built_in = tuned and training.backbone in BUILT_IN
        if built_in and meter.on_gpu:
            self.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if not tuned:
            for module in self.backbone.modules():
                if isinstance(module, ChannelsLastConv2d):
                    module.register_forward_hook(lambda _, inputs, output: output.contiguous())
        self.optimizers = [
            sgd(training, self.backbone.parameters(), built_in),
            sgd(training, [self.weight], tuned),
        ]
        self.autocast = config.autocast()
        self.loss = torch.zeros((), dtype=torch.float32, device=meter.device)
        self.held = meter.allocated() - before

    def warm_up(self) -> None:
        """Take a step, and count what it has allocated."""
        before = self.meter.allocated()
        self.step()
        self.held += self.meter.allocated() - before

    def step(self) -> list[Stamp]:
        """Take a step, and return the stamps of its phases."""
        stamps: list[Stamp] = []

        def stamp(*_: object) -> None:
            stamps.append(self.meter.stamp())

        stamp()
        images, target = (
            each.to(self.meter.device, non_blocking=True) for each in next(self.batches)
        )
        stamp()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        stamp()
        with self.autocast:
            embeddings = self.backbone(images)
        stamp()
        embeddings.register_hook(stamp)
        stamp()
        with self.autocast:
            loss = arcface(embeddings, self.weight, target)
        stamp()
        loss.backward()
        for optimizer in self.optimizers:
            stamp()
            optimizer.step()
            stamp()
        self.loss += loss.detach()  # read now and then, not in each step
        stamp()
        return stamps


@contextmanager
def _cudnn_by_default() -> Iterator[None]:
    """Let cuDNN take any algorithm inside the block, as by default; `train` restricts it."""
    cudnn = torch.backends.cudnn
    before, cudnn.deterministic = cudnn.deterministic, False
    try:
        yield
    finally:
        cudnn.deterministic = before


class Race:
    """The progress display of a measured run: it times `train`'s steps and lets others step.

    Args:
        others: the plain loops, by name, until the run has ended.
        queued: batches that a loader prepares ahead.
        more: called after each round: whether there is time for another. done: after each turn.

    Attributes:
        rates: images/s of each loop's turns.
        phases: seconds of the phases of each step of these.
        peaks: most bytes of tensors on a GPU in these, without those of the other loops.
        failed: why a loop was not measured to the end.
        dtype: of the backbone's embeddings.
    """

    def __init__(
        self,
        config: SpeedConfig,
        meter: Meter,
        source: TimedSource,
        others: dict[str, PlainLoop],
        queued: int,
        more: Callable[[Race], bool],
        done: Callable[[], None],
    ) -> None:
        self.config, self.meter, self.source, self.others = config, meter, source, others
        self.queued, self.more, self.done = queued, more, done
        self.rates: dict[str, list[float]] = {name: [] for name in LOOPS}
        self.phases: dict[str, list[dict[str, float]]] = {name: [] for name in LOOPS}
        self.peaks: dict[str, list[int]] = {name: [] for name in LOOPS}
        self.failed: dict[str, str] = {}
        self.dtype = torch.float32
        self.steps, self.untimed = 0, 0  # of a turn and before it; 0 while the first ones warm up
        self.taken = 0
        self.turn: Turn | None = None
        self.hooks, self.before = ExitStack(), meter.allocated()

    def start(self, total_steps: int, step: int) -> None:
        self.recorder = StepHooks(self.meter, self.hooks)
        self.source.stamp = self.recorder.stamp
        self.began = time.perf_counter()

    def step(self, loss: float, accuracy: float, images: int) -> None:
        # On a GPU the figures are those of the step before; there is one call for each step queued.
        self.recorder.stamp()
        self.taken += 1
        if self.steps == 0:
            self._warm_up()
        elif self.turn is not None:
            self.turn.stamps.append(self.recorder.stamps)
            self.dtype = self.recorder.dtype
            if self.taken == self.steps:
                others = sum(loop.held for loop in self.others.values())
                self._add("synface", self.turn, others + self.before)
                self.turn, self.taken = None, 0
                self._let_others(self._take_turn)
                if not self.more(self) or len(self.rates["synface"]) == self.config.rounds:
                    raise _Ended
        if self.steps and self.turn is None and self.taken == self.untimed:
            self.turn, self.taken = Turn(self.meter), 0
        self.recorder.stamps = []

    def _warm_up(self) -> None:
        """Let all take their first steps, of which the last one's time says how many a turn has."""
        self.meter.wait()
        seconds = time.perf_counter() - self.began
        self._let_others(lambda name: self.others[name].warm_up())
        self.meter.wait()
        # In a long step of a CPU what is only done in the first one does not count.
        if self.taken == WARM_UP[self.meter.device.type] or (
            seconds > TURN and not self.meter.on_gpu
        ):
            self.steps = steps_of_turn(seconds)
            self.untimed = min(self.queued, round(UNTIMED / seconds))
            self.taken = 0
        self.began = time.perf_counter()

    def _let_others(self, run: Callable[[str], None]) -> None:
        with _cudnn_by_default():
            for name in list(self.others):
                self.attempt(name, run)

    def attempt(self, name: str, run: Callable[[str], None]) -> None:
        """Call a function with a plain loop's name; if it fails, the loop takes no further part."""
        try:
            run(name)
        except Exception as error:  # such as too little memory on a GPU
            self.failed[name] = failure(error)
            self.others.pop(name, None)

    def _take_turn(self, name: str) -> None:
        loop = self.others[name]
        for _ in range(self.untimed):
            loop.step()
        turn = Turn(self.meter)
        turn.stamps += (loop.step() for _ in range(self.steps))
        self._add(name, turn, turn.before - loop.held)

    def _add(self, name: str, turn: Turn, others: int) -> None:
        """End a turn; ``others``: bytes on a GPU that are not this loop's."""
        self.phases[name] += turn.end()
        self.rates[name].append(self.steps * self.config.batch_size / turn.seconds)
        self.peaks[name].append(turn.peak - others)
        self.done()

    def result(self) -> dict[str, Any]:
        """Return what was measured, and why the rest was not, for JSON."""
        found = [name for name in LOOPS if name not in self.failed]
        result: dict[str, Any] = {
            "rates": self.rates | self.failed,
            "ratios": {name: ratios(self.rates["synface"], self.rates[name]) for name in found[1:]},
            "seconds": {
                name: {
                    phase: statistics.median(step[phase] for step in self.phases[name])
                    for phase in PHASES
                }
                for name in found
            },
        }
        if self.meter.on_gpu:
            result["memory"] = {name: max(self.peaks[name]) for name in found}
            result["float32"] = {
                "matmul_precision": torch.get_float32_matmul_precision(),
                "convolutions_tf32": torch.backends.cudnn.allow_tf32,
            }
        return result


def steps_of_turn(seconds: float) -> int:
    """Return the number of steps of a turn, where one takes so many seconds."""
    return max(1, min(STEPS, round(TURN / seconds)))


def failure(error: Exception) -> str:
    """Print an error with its traceback, and return why something was not measured."""
    traceback.print_exception(error)
    return reason(error)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return the median of the rounds' ratios, the least and the most."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(each), "least": min(each), "most": max(each)}


def race(
    config: SpeedConfig,
    images: LabeledImages,
    folder: Path,
    more: Callable[[Race], bool],
    done: Callable[[], None],
) -> Race:
    """Run the loops, `train` in a folder, and return what was timed.

    Args:
        images: in files, which loaders decode, or in memory.
        more, done: as for `Race`.
    """
    meter, source = Meter(config.on), TimedSource(images, config, config.identities)
    others: dict[str, PlainLoop] = {}
    # On a CPU a step takes longer than its batch.
    queued = 2 * config.workers + 1 if meter.on_gpu and isinstance(images, ImageSet) else 0
    found = Race(config, meter, source, others, queued, more, done)

    def build(name: str) -> None:
        batches = plain_batches(
            images, config.size, config.batch_size, config.workers, meter.device
        )
        tuned = name == "tuned"
        others[name] = PlainLoop(config, batches, source.image_shape, tuned, meter)

    for name in LOOPS[1:]:
        found.attempt(name, build)
    try:
        with found.hooks, suppress(_Ended):
            train(config.training(), source, folder, progress=found, device=meter.device)
    except Exception as error:
        found.failed = dict.fromkeys(LOOPS, failure(error)) | found.failed
    others.clear()  # and so their loaders' processes
    gc.collect()  # `train` leaves its model in reference cycles
    return found
