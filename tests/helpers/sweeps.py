"""Small sweeps of training runs, whose cells can be opened in worker processes."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from synface.data import Faces
from synface.recipes import workers
from synface.recipes.sweep import Cell
from synface.training.config import TrainConfig
from synface.training.sources import FacesSource

from tests.helpers.forked import start_server

CONFIG = TrainConfig(
    epochs=3,
    batch_size=8,
    lr=0.05,
    warmup_epochs=0.5,
    widths=(4, 8),
    depths=(1, 1),
    embedding_size=8,
    checkpoint_every=1,
)


def faces(count: int, images: int, seed: int = 0) -> Faces:
    """Return random images of so many people, the same ones each time."""
    draws = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count * images, 16, 16, 1), dtype=torch.uint8, generator=draws)
    labels = torch.arange(count).repeat_interleave(images)
    return Faces(pixels, labels, [f"p{i}" for i in range(count)], "random pixels")


class Slow(FacesSource):
    """Takes a while for each batch."""

    def batches(self, *args: Any, **options: Any) -> Any:
        for each in super().batches(*args, **options):
            time.sleep(0.03)
            yield each


def _source(kind: str, seed: int) -> FacesSource:
    if kind == "broken":
        raise ValueError("no faces here")
    if kind == "dead":
        os._exit(7)
    return (Slow if kind == "slow" else FacesSource)(faces(4, 6, seed))


def open_cells(
    kinds: tuple[str, ...], config: TrainConfig = CONFIG, **options: Any
) -> tuple[list[Cell], Faces]:
    """Return a cell for each kind, and the people to verify on."""
    cells = [
        Cell(f"{kind}-{i}", config, partial(_source, kind, i), 24, **options)
        for i, kind in enumerate(kinds)
    ]
    return cells, faces(5, 4, 99)


def unopened() -> tuple[list[Cell], Faces]:
    """Fail to open the cells."""
    raise FileNotFoundError(2, "nobody", "here")


@contextmanager
def forked_workers() -> Iterator[None]:
    """Fork workers from a server, which takes a tenth of the time of spawning them."""
    server = start_server()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(workers, "get_context", lambda method: server)
        patched.setattr(workers, "_serve", _serve)
        yield


def _serve(*arguments: Any) -> None:
    workers.parent_process = lambda: None  # the server started this process, not the parent
    workers._serve(*arguments)
