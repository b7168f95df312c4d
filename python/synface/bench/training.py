"""Images per second of `synface train` and of the same loop in plain torch, on a CPU.

`train` itself runs, with its loader, checks and log. Its progress display, which it calls after
each step, lets the plain loops take their turns: so all are timed in one process, interleaved.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from synface_kernels import _env

from ..common.check import check_integers, check_number
from ..common.rng import generator, normals, seeded
from ..data import open_images
from ..data.formats.image_set import ImageSet
from ..data.loading.sampler import WHOLE, RankSlice
from ..models.iresnet import ChannelsLastConv2d
from ..training.backbone import build_backbone
from ..training.config import BUILT_IN, TrainConfig
from ..training.loop import train
from ..training.model import build_model
from ..training.sources import Batch, FacesSource
from .loaders import loading, torch_loader, whole_batches, write_faces
from .measure import arcface

PHASES = ("loader", "backbone", "head", "optimizer", "rest")
LOOPS = ("synface", "torch", "tuned")
TURN = 1.0  # seconds of a turn, if a step does not take longer
FILES = 600  # written where no folder is given


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

    def __post_init__(self) -> None:
        check_integers(self, batch_size=1, identities=2, embedding_size=1, workers=1, rounds=1)
        check_number("seconds", self.seconds, 0)
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be float32 or bfloat16, got {self.precision!r}")
        if not self.classes or min(self.classes) < 2:
            raise ValueError(f"classes must be numbers of 2 or more, got {self.classes}")

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
        return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


class _Ended(Exception):
    """The end of a measured run."""


class _TimedSource(FacesSource):
    """A source of faces that claims more identities than it has, and times its batches."""

    def __init__(self, images: ImageSet, config: SpeedConfig, classes: int) -> None:
        super().__init__(images, size=config.size, grayscale=False, workers=config.workers)
        self.num_classes, self.waited = classes, 0.0

    def batches(
        self,
        config: TrainConfig,
        first: int,
        part: RankSlice = WHOLE,
        device: torch.device | str = "cpu",
    ) -> Generator[tuple[int, Batch]]:
        with closing(super().batches(config, first, part, device)) as batches:
            while True:  # a run of this configuration does not end
                began = time.perf_counter()
                each = next(batches)
                self.waited = time.perf_counter() - began
                yield each


class _Clock:
    """Times of the phases of `train`'s steps, by torch's hooks on modules and optimizers.

    The backbone and the head are the modules that are called by no other; the head's time includes
    its backward pass and the update of the centers.
    """

    def __init__(self, stack: ExitStack) -> None:
        for handle in (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave),
            register_optimizer_step_pre_hook(self.stamp),
            register_optimizer_step_post_hook(self.stamp),
        ):
            stack.callback(handle.remove)
        self.depth, self.stamps = 0, list[float]()

    def stamp(self, *_: object) -> None:
        self.stamps.append(time.perf_counter())

    def _enter(self, *_: object) -> None:
        if self.depth == 0:
            self.stamp()
        self.depth += 1

    def _leave(self, module: nn.Module, inputs: object, output: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.stamp()
            if isinstance(output, Tensor) and output.requires_grad and output.dim() == 2:
                output.register_hook(self.stamp)  # the head's backward pass is done

    def phases(self, seconds: float, waited: float) -> dict[str, float]:
        """Return the seconds of each phase of the step that has ended."""
        stamps, self.stamps = self.stamps, []
        return _phases(stamps, seconds, waited)


def _phases(stamps: Sequence[float], seconds: float, waited: float) -> dict[str, float]:
    """Return the seconds of each phase of a step.

    Args:
        stamps: when these began and ended: the backbone's forward pass, the head's, and then when
            these ended or began: the head's backward pass, the backbone's step of its optimizer,
            and the centers' step.
        seconds: of the whole step. waited: for its batch.
    """
    forward, embedded, head, loss, back, step, stepped, centers, done = stamps
    found = {
        "loader": waited,
        "backbone": embedded - forward + step - back,
        "head": back - head + done - centers,
        "optimizer": stepped - step,
    }
    return found | {"rest": seconds - sum(found.values())}


def _sgd(
    config: TrainConfig, parameters: Iterable[nn.Parameter], fused: bool = False
) -> torch.optim.SGD:
    """Return the optimizer of a configuration, in torch's default implementation or fused."""
    return torch.optim.SGD(
        parameters, config.lr, 0.9, weight_decay=config.weight_decay, nesterov=True,
        fused=fused or None,
    )  # fmt: skip


class _PlainLoop:
    """A training loop as it is usually written in plain torch: `DataLoader`, ArcFace, SGD.

    Args:
        tuned: with a built-in backbone's activations in torch's channels_last order, as in `train`,
            and its optimizer and the centers' fused; otherwise all are torch's defaults.

    Attributes:
        dtype: of the embeddings of the last step.
    """

    def __init__(
        self, config: SpeedConfig, batches: Iterator[Any], shape: tuple[int, ...], tuned: bool
    ) -> None:
        training, self.batches = config.training(), batches
        with seeded(0):
            self.backbone = build_backbone(training, shape)
        draw = generator(0, "centers", 0)
        weight = normals((config.identities, config.embedding_size), draw).mul_(0.01)
        self.weight = nn.Parameter(weight)
        if not tuned:
            for module in self.backbone.modules():
                if isinstance(module, ChannelsLastConv2d):
                    module.register_forward_hook(lambda _, inputs, output: output.contiguous())
        # Torch's fused SGD fails where a parameter of a user's backbone has no gradient at first.
        fused = tuned and training.backbone in BUILT_IN
        self.optimizers = [
            _sgd(training, self.backbone.parameters(), fused),
            _sgd(training, [self.weight], tuned),
        ]
        self.autocast, self.dtype = config.autocast(), torch.float32
        self.loss = torch.zeros((), dtype=torch.float32, device="cpu")

    def step(self) -> dict[str, float]:
        """Take a step, and return the seconds of its phases."""
        stamps = [time.perf_counter()]

        def stamp(*_: object) -> None:
            stamps.append(time.perf_counter())

        images, target = next(self.batches)
        stamp()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with self.autocast:
            embeddings = self.backbone(images)
        self.dtype = embeddings.dtype
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
        began, *stamps = stamps
        # The backbone's backward pass ends where its optimizer begins.
        return _phases(stamps, time.perf_counter() - began, stamps[0] - began)


class _Race:
    """The progress display of a measured run: it times `train`'s steps and lets others step.

    Args:
        others: the plain loops, by name, until the run has ended.
        rounds: turns of each, at most. more: whether there is time for another round.
    """

    def __init__(
        self,
        source: _TimedSource,
        others: dict[str, _PlainLoop],
        batch_size: int,
        rounds: int,
        more: Callable[[], bool],
        done: Callable[[], None],
    ) -> None:
        self.source, self.others, self.batch_size = source, others, batch_size
        self.rounds, self.more, self.done = rounds, more, done
        self.rates: dict[str, list[float]] = {name: [] for name in ("synface", *others)}
        self.phases: dict[str, list[dict[str, float]]] = {name: [] for name in self.rates}
        self.steps = 0  # of a turn; 0 while the first steps warm up
        self.taken, self.began = 0, 0.0
        self.dtype = torch.float32  # of the backbone's embeddings
        self.hooks = ExitStack()

    def start(self, total_steps: int, step: int) -> None:
        self.clock = _Clock(self.hooks)
        self.began = time.perf_counter()

    def step(self, loss: float, accuracy: float, images: int) -> None:
        now = time.perf_counter()
        seconds, self.taken = now - self.began, self.taken + 1
        if self.steps == 0:
            self._warm_up(seconds)
        else:
            self._seconds.append(seconds)
            self.phases["synface"].append(self.clock.phases(seconds, self.source.waited))
            if self.taken == self.steps:
                self._others()
        self.clock.stamps.clear()
        self.began = time.perf_counter()

    def _warm_up(self, seconds: float) -> None:
        """Let all take a first step, and a second one, whose time says how many a turn has.

        In a long step what is only done in the first one does not count.
        """
        for loop in self.others.values():
            loop.step()
            self.dtype = loop.dtype
        if self.taken == 2 or seconds > TURN:
            self.steps = max(1, min(50, round(TURN / seconds)))
            self.taken, self._seconds = 0, list[float]()

    def _others(self) -> None:
        images = self.steps * self.batch_size
        self.rates["synface"].append(images / sum(self._seconds))
        self.done()
        for name, loop in self.others.items():
            began = time.perf_counter()
            self.phases[name] += [loop.step() for _ in range(self.steps)]
            self.rates[name].append(images / (time.perf_counter() - began))
            self.done()
        self.taken, self._seconds = 0, []
        if len(self.rates["synface"]) == self.rounds or not self.more():
            raise _Ended


def _race(
    config: SpeedConfig,
    images: ImageSet,
    folder: Path,
    more: Callable[[], bool],
    done: Callable[[], None],
) -> _Race:
    """Run the loops, `train` in a folder, and return what was timed."""
    source = _TimedSource(images, config, config.identities)
    others = {
        name: _PlainLoop(
            config,
            torch_loader(images, config.size, config.batch_size, config.workers),
            source.image_shape,
            tuned=name == "tuned",
        )
        for name in LOOPS[1:]
    }
    race = _Race(source, others, config.batch_size, config.rounds, more, done)
    with race.hooks, suppress(_Ended):
        train(config.training(), source, folder, progress=race)
    others.clear()  # and so their loaders' processes
    return race


def _head_steps(
    config: SpeedConfig, images: ImageSet, classes: int, dtype: torch.dtype
) -> dict[str, Callable[[], None]]:
    """Return steps of the head alone, from a batch's embeddings to the centers' update, by name.

    Args:
        dtype: of the embeddings.
    """
    draw = generator(0, "embeddings", 0)
    embeddings = normals((config.batch_size, config.embedding_size), draw).to(dtype)
    target = torch.randint(classes, (config.batch_size,), generator=draw, device="cpu")
    # A backbone that takes little memory, since only the head is used.
    training = replace(config.training(), backbone="iresnet", widths=(1,), depths=(1,))
    source = _TimedSource(images, config, classes)

    def ours(fused_update: bool) -> Callable[[], None]:
        model = build_model(
            replace(training, fused_update=fused_update), source, True, torch.device("cpu")
        )
        optimizer = model.optimizers["centers"]

        def step() -> None:
            optimizer.zero_grad()
            inputs = embeddings.clone().requires_grad_()
            with config.autocast():
                loss, _ = model.head(inputs, target, reduction="sum", return_stats=True)
            (loss / len(target)).backward()
            optimizer.step()

        return step

    weight = nn.Parameter(normals((classes, config.embedding_size), draw).mul_(0.01))
    sgd = _sgd(training, [weight])

    def theirs() -> None:
        sgd.zero_grad()
        with config.autocast():
            loss = arcface(embeddings.clone().requires_grad_(), weight, target)
        loss.backward()
        sgd.step()

    return {"synface": ours(False), "fused update": ours(True), "torch": theirs}


def _heads(
    config: SpeedConfig,
    images: ImageSet,
    dtype: torch.dtype,
    more: Callable[[], bool],
    done: Callable[[], None],
) -> list[dict[str, Any]]:
    """Return the seconds of the head's step by the number of classes, interleaved.

    Args:
        dtype: of the embeddings.
        more: whether there is time for another round. done: called after each number of classes.
    """
    found = []
    for classes in config.classes:
        steps = _head_steps(config, images, classes, dtype)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():
            step()
        while not times["synface"] or (len(times["synface"]) < config.rounds and more()):
            for name, step in steps.items():
                began, taken = time.perf_counter(), 0
                while not taken or time.perf_counter() - began < TURN / 10:
                    step()
                    taken += 1
                times[name].append((time.perf_counter() - began) / taken)
        done()
        found.append({"classes": classes, "times": times})
    return found


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return the median of the rounds' ratios, the least and the most."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(each), "least": min(each), "most": max(each)}


def _limit(seconds: float) -> Callable[[], bool]:
    """Return a function that says whether there is time left, from now on."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() < end


def measure(
    config: SpeedConfig,
    data: Path | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Return the measurements, ready for JSON.

    Args:
        data: images in any format of `open_images`; None: JPEG files of the embedded faces.
        done: called with the number of turns and of heads that are measured.

    Raises:
        DataError: for images that cannot be read.
        ValueError: for fewer images than a batch has, or more identities than ``config`` says.
    """
    turns, load = count(1), os.getloadavg()[0]

    def turned() -> None:
        done(next(turns))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if data is None:
            files = -(-FILES // config.batch_size) * config.batch_size
            found = write_faces(folder / "faces", config.size, files)
        else:
            found = open_images(data)
        images = whole_batches(found, config.batch_size)
        if len(images.identities) > config.identities:
            raise ValueError(
                f"identities must be at least the {len(images.identities):,} of {images.source}, "
                f"got {config.identities:,}"
            )
        race = _race(config, images, folder / "run", _limit(0.6 * config.seconds), turned)
        loaders = loading(
            images, config.size, config.batch_size, config.workers, _limit(0.1 * config.seconds)
        )
        heads = _heads(config, images, race.dtype, _limit(0.15 * config.seconds), turned)
    seconds = {
        name: {phase: statistics.median(step[phase] for step in steps) for phase in PHASES}
        for name, steps in race.phases.items()
    }
    apart = sum(seconds["synface"].values()) - seconds["synface"]["head"]
    for row in heads:
        row["seconds"] = {name: statistics.median(each) for name, each in row["times"].items()}
        row["share"] = {name: each / (each + apart) for name, each in row["seconds"].items()}
    return {
        "machine": f"{_env.processor()}, threads: {torch.get_num_threads()}, "
        f"torch {torch.__version__}, Python {platform.python_version()}",
        "load": load,
        "config": asdict(config),
        "built_in": config.training().backbone in BUILT_IN,
        "images": f"{len(images)} JPEG files of the embedded faces"
        if data is None
        else f"{len(images)} of {images.source}",
        "rates": race.rates,
        "ratios": {name: ratios(race.rates["synface"], race.rates[name]) for name in LOOPS[1:]},
        "seconds": seconds,
        "heads": heads,
        "loaders": loaders,
        "loader_ratios": {
            name: ratios(loaders["synface"], loaders[name]) for name in ("torch", "decoding")
        },
    }
