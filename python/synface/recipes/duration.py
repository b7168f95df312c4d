"""Estimates of how long training runs take, from a few measured steps and images."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..common.rng import generator as draws
from ..data import Faces
from ..synthesis.generators import FaceGenerator
from ..training.config import TrainConfig
from ..training.loop import train
from .generated import identities

if TYPE_CHECKING:
    from .sweep import Cell

BUDGET = 4.0  # seconds of measuring, where a single step takes less
STEPS = 6  # measured for each configuration at most; the first is a warm-up
CLASSES = 64  # of the measured heads


def estimate(cells: Sequence[Cell], image_shape: tuple[int, int, int]) -> list[float]:
    """Return about how many seconds each cell takes in this process.

    A few steps are measured for each training configuration, and a batch of images for each face
    generator. Verification, packing and repeated tries are not included.
    """
    networks = {_network(cell.config): cell.config for cell in cells}
    generators = {_key(cell.generator): cell.generator for cell in cells if cell.generator}
    share = BUDGET / (len(networks) + len(generators))
    step = {key: _step_seconds(each, image_shape, share) for key, each in networks.items()}
    image = {key: _image_seconds(each, share) for key, each in generators.items()}
    found = []
    for cell in cells:
        seconds = cell.steps * step[_network(cell.config)]
        if cell.generator:
            images = cell.epoch_images * cell.config.epochs
            seconds += (cell.generated or images) * image[_key(cell.generator)]
        found.append(seconds)
    return found


def _network(config: TrainConfig) -> TrainConfig:
    """Return a configuration in which all that does not change a step's time is the same."""
    return replace(config, epochs=1, warmup_epochs=0.0, checkpoint_every=1, lr=1e-6, seed=0)


def _key(generator: FaceGenerator) -> str:
    return json.dumps(generator.description, sort_keys=True)


class _EnoughError(Exception):
    """Raised once a measurement has taken its share of the time."""


class _Clock:
    """A progress display that records when each step ends, and raises after ``share`` seconds."""

    def __init__(self, share: float) -> None:
        self.share, self.times = share, [time.perf_counter()]

    def start(self, total_steps: int, step: int) -> None:
        self.times = [time.perf_counter()]

    def step(self, loss: float, accuracy: float, images: int) -> None:
        self.times.append(time.perf_counter())
        if self.times[-1] - self.times[0] > self.share:
            raise _EnoughError


def _step_seconds(config: TrainConfig, shape: tuple[int, int, int], share: float) -> float:
    """Return the seconds of a training step."""
    count = STEPS * config.batch_size
    pixels = torch.randint(
        256, (count, *shape), dtype=torch.uint8, device="cpu", generator=draws(0, "estimate", 0)
    )
    labels = torch.arange(count, device="cpu") % CLASSES
    faces = Faces(pixels, labels, [str(i) for i in range(CLASSES)], "random pixels")
    clock = _Clock(share)
    with tempfile.TemporaryDirectory(prefix="synface-") as folder, suppress(_EnoughError):
        train(_network(config), faces, Path(folder) / "run", progress=clock)
    times = clock.times
    began = 1 if len(times) > 2 else 0
    return (times[-1] - times[began]) / (len(times) - 1 - began)


def _image_seconds(generator: FaceGenerator, share: float, batch: int = 32) -> float:
    """Return the seconds of generating an image."""
    points = identities(batch, generator.embedding_size, 0)
    style = torch.zeros(batch, generator.style_size, dtype=torch.float32, device="cpu")
    seconds = 0.0
    for _ in range(2):  # the first is a warm-up
        began = time.perf_counter()
        generator.generate(points, style, torch.arange(batch, device="cpu"))
        seconds = time.perf_counter() - began
        if seconds > share / 2:
            break
    return seconds / batch
