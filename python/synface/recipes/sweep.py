"""Sweeps of training runs; each is verified, and its metrics are stored, so that none runs
twice.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import checkpoint
from ..common.check import available_memory, check_integer, cores
from ..common.durations import duration
from ..common.files import CheckpointError, write_text
from ..common.textfiles import read_json
from ..data import Faces
from ..data.mixing import IdentityMixup
from ..evaluation.embedding import embed, pixel_embeddings
from ..evaluation.metrics import verify
from ..synthesis.generators import FaceGenerator
from ..synthesis.sources import GeneratedSource
from ..training.config import BUILT_IN, TrainConfig
from ..training.loop import Trained, train
from ..training.model import CONFIG, check_network, load_backbone
from ..training.sources import Source, fingerprint
from .duration import estimate
from .generated import FacesConfig, identities
from .loop import current_training
from .report import machine, spread
from .workers import Steps, run_named

RESULT = "result.json"
Bars = Callable[[str], AbstractContextManager[Any]]  # a progress bar, from its description


@dataclass(frozen=True, eq=False)
class Cell:
    """One training run of a sweep, whose source is opened when the run starts.

    Attributes:
        images: number of images in an epoch; None: that of the source, which is then opened twice.
        generator: the face generator that the source runs, for the estimated duration.
        generated: number of images that it generates; None: those of all steps.
        target_top1: the training accuracy to reach in the last epoch. While it is not reached, the
            run is repeated from the start with half more epochs, up to ``max_steps`` steps.
        held: the people that this cell alone is verified on; None: those of all cells.
    """

    name: str
    config: TrainConfig
    source: Callable[[], Source]
    images: int | None = None
    generator: FaceGenerator | None = None
    generated: int | None = None
    target_top1: float | None = None
    max_steps: int | None = None
    held: Faces | None = None

    def __post_init__(self) -> None:
        if self.target_top1 is None and self.max_steps is None:
            return
        if self.target_top1 is None or not 0 < self.target_top1 <= 1:
            raise ValueError(f"target_top1 must be in (0, 1], got {self.target_top1!r}")
        check_integer("max_steps", self.max_steps, 1)

    @property
    def epoch_images(self) -> int:
        """Return the number of images in an epoch."""
        return len(self.source()) if self.images is None else self.images

    @property
    def steps(self) -> int:
        """Return the number of steps of the first try."""
        return self.config.epochs * -(-self.epoch_images // self.config.batch_size)

    def tries(self, images: int) -> Iterator[TrainConfig]:
        """Yield the configuration of each try, on ``images`` images in an epoch."""
        config, per_epoch = self.config, -(-images // self.config.batch_size)
        yield config
        if self.target_top1 is None or self.max_steps is None:
            return
        while True:
            epochs = min(math.ceil(1.5 * config.epochs), self.max_steps // per_epoch)
            if epochs <= config.epochs:
                return
            config = for_steps(config, images, epochs * per_epoch)
            yield config


OpenCells = Callable[[], tuple[Sequence[Cell], Faces]]  # the cells, and the held people


@dataclass(frozen=True, eq=False)
class SweepResults:
    """The metrics of a sweep's training runs.

    Attributes:
        generator: the face generator of the training data. held: the people to verify on.
        cells: by name, see `run_cells`. pixels: verification by raw pixels, of the same people.
        took: by name, "seconds" (None if it was resumed) and "threads", see `run_times`.
    """

    config: Any
    generator: FaceGenerator
    held: Faces
    cells: dict[str, dict[str, Any]]
    pixels: dict[str, Any]
    took: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, kw_only=True)

    def machine(self) -> str:
        """Return the processor, versions, the training runs' threads and their seconds."""
        return trained_on(self.took.values())

    def over_seeds(self, name: Callable[[int], str], *keys: str) -> dict[str, Any]:
        """Return the `spread` of metrics over the seeds; ``name`` returns a seed's cell name."""
        found = [self.cells[name(seed)] for seed in self.config.seeds]
        return {key: spread([each[key] for each in found]) for key in keys}

    def fields(self) -> dict[str, Any]:
        """Return the fields of a page that all sweeps have, for `write_report`."""
        return {
            "seeds": ", ".join(map(str, self.config.seeds)),
            "shape": "×".join(map(str, self.generator.image_shape)),
            "held": self.held,
            "held_images": len(self.held),
            "held_people": len(self.held.identities),
            "pixels": self.pixels,
        }


def trained_on(runs: Iterable[Mapping[str, Any]]) -> str:
    """Return the processor, versions, and the threads and seconds of training runs.

    Args:
        runs: "threads" of torch, and "seconds", None for a run that was resumed.
    """
    runs = list(runs)
    threads, seconds = (
        sorted({each["threads"] for each in runs}),
        [each["seconds"] for each in runs],
    )
    found = machine(" or ".join(map(str, threads)) or None)
    if not seconds or None in seconds:
        return found
    return f"{found}; {len(seconds)} training runs, {duration(sum(seconds))} summed over them"


def open_faces(data: FacesConfig, training: TrainConfig, least: int) -> tuple[FaceGenerator, Faces]:
    """Return the face generator and the real people of a sweep, at least ``least`` people.

    Raises:
        ValueError, ImportError, DataError: if a generator, faces or a network cannot be made.
    """
    generator = data.face_generator()
    check_network(training, generator.image_shape)
    return generator, data.real_people(generator.image_shape, least)


def generated_source(
    data: FacesConfig,
    generator: FaceGenerator,
    count: int,
    images: int,
    seed: int,
    mixup: bool,
    real: Faces | None = None,
    keep_epochs: int | None = None,
) -> GeneratedSource:
    """Return a source of ``images`` generated faces of each of ``count`` random identities.

    Args:
        mixup: mix identities. real: faces to mix the generated ones with. keep_epochs: see
            `GeneratedSource`.
    """
    return GeneratedSource(
        identities(count, data.embedding_size, seed),
        generator,
        images,
        seed=seed,
        identity_mixup=IdentityMixup() if mixup else None,
        real=real,
        keep_epochs=keep_epochs,
    )


def verify_pixels(held: Faces) -> dict[str, Any]:
    """Return how well raw pixels verify people, as `Verification.to_json` does."""
    return verify(pixel_embeddings(held.images), held.labels).to_json()


def run_cells(
    cells: Sequence[Cell],
    held: Faces,
    output: Path,
    *,
    resume: bool = False,
    only: str | None = None,
    progress: Bars | None = None,
    workers: int | None = 1,
    open_cells: OpenCells | None = None,
) -> dict[str, dict[str, Any]]:
    """Train and verify each cell in ``output``/NAME; its metrics are stored in result.json there.

    Args:
        held: the people that all cells are verified on.
        resume: use the metrics of finished cells, and resume those that were begun.
        only: run only this cell, in this process; others may run on other machines.
        progress: makes a progress bar of the steps of all cells, from a description that says how
            long they take. A bar with a method ``cells`` is told of finished ones: (done, total).
        workers: number of processes that train, with an equal share of the cores each; 1: this
            process, with torch's threads; None: one for each core that has 1 GiB of memory. Other
            numbers need ``open_cells``, and a main module that can be imported. Results depend on
            the number of threads.
        open_cells: a picklable function that returns the cells and the held people again, in each
            worker: a `functools.partial` of a module's function and its configuration.

    Returns:
        By cell: the metrics of `verify` (without its curves), with the last epoch's "loss" and
        training "top1", and "steps". With a target of the training accuracy, also "tries", the
        steps and top1 of each, and "reached".

    Raises:
        ValueError: for an ``only`` that is not a cell, cells of one name, or too few workers.
        FileExistsError: if a cell was begun and ``resume`` is not set.
        CheckpointError: for a result that is damaged or of another configuration or data.
        ChildProcessError: if a worker dies.
        KeyboardInterrupt, Terminated: on Ctrl-C and on SIGTERM, once checkpoints are written.
    """
    names = [cell.name for cell in cells]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"cells must have different names, got more than one {repeated[0]!r}")
    if only is not None and only not in names:
        raise ValueError(f"cell must be one of {', '.join(names)}, got {only!r}")
    if only is not None:
        workers = 1
    if workers is None:
        workers = default_workers() if open_cells else 1
    check_integer("workers", workers, 1)
    if workers > 1 and open_cells is None:
        raise ValueError(f"{workers} workers need open_cells, which opens the cells in each")
    chosen = [cell for cell in cells if only in (None, cell.name)]
    found = {
        cell.name: _stored(output / cell.name / RESULT, _made_of(cell, cell.source(), held))
        for cell in chosen
        if resume and (output / cell.name / RESULT).exists()
    }
    left = [cell for cell in chosen if cell.name not in found]
    threads = share_of_threads(workers)
    processes = min(workers, len(left))
    if left:
        with using_threads(threads):
            title = "" if progress is None else _title(left, held, processes)
            with (progress or no_bars)(title) as bar:
                shown = _Shown(bar, left, len(found))
                if processes > 1:
                    assert open_cells is not None
                    prepare = partial(_prepare, open_cells, output, resume)
                    todo = [cell.name for cell in left]
                    found |= run_named(todo, prepare, processes, threads, shown.update)
                else:
                    for cell in left:
                        found[cell.name] = _run(cell, held, output, resume, shown)
                        shown.finished(len(found))
    return {cell.name: found[cell.name] for cell in chosen}


def default_workers() -> int:
    """Return the number of cores, but at most one for each GiB of available memory."""
    free = available_memory()
    return cores() if free is None else max(1, min(cores(), free // 2**30))


def share_of_threads(workers: int) -> int:
    """Return the number of torch's threads in each of so many workers."""
    threads = torch.get_num_threads()
    return threads if workers == 1 else max(1, min(threads, cores() // workers))


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Use so many of torch's threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def trained_network(folder: Path, config: TrainConfig) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a finished cell, and its checkpoint's state; see `load_backbone`."""
    return load_backbone(folder, None if config.backbone in BUILT_IN else config.backbone)


def run_times(output: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return "seconds" and "threads" of finished cells, without those of an earlier version."""
    stored = {name: read_json(output / name / RESULT, CheckpointError) for name in names}
    return {name: each["took"] for name, each in stored.items() if "took" in each}


def _title(cells: Sequence[Cell], held: Faces, processes: int) -> str:
    """Return how many cells there are, and about how long they take."""
    _, *shape = held.images.shape
    each = estimate(cells, (shape[0], shape[1], shape[2]))
    seconds = max(sum(each) / processes, *each)
    count = "1 training run" if len(cells) == 1 else f"{len(cells)} training runs"
    among = f" with {processes} workers" if processes > 1 else ""
    about = "at least" if any(cell.target_top1 for cell in cells) else "about"
    return f"{count}, {about} {duration(seconds)}{among}"


class _Shown:
    """The progress of all cells, on a bar that may be None."""

    def __init__(self, bar: Any, cells: Sequence[Cell], found: int) -> None:
        self.bar, self.found, self.count = bar, found, found + len(cells)
        self.done = 0
        self.total = sum(cell.steps for cell in cells) if bar else 0
        self.finished(found)
        if bar:
            bar.start(self.total, 0)

    def finished(self, cells: int) -> None:
        if hasattr(self.bar, "cells"):
            self.bar.cells(cells, self.count)

    def start(self, total_steps: int, step: int) -> None:
        self.total -= step  # done before, and not to be done again
        if self.bar:
            self.bar.start(self.total, self.done)

    def step(self, loss: float, accuracy: float, images: int) -> None:
        self.done += 1
        if self.bar:
            self.bar.step(loss, accuracy, images)

    def extend(self, steps: int) -> None:
        self.total += steps
        if self.bar:
            self.bar.start(self.total, self.done)

    def update(self, results: int, done: int, more: int) -> None:
        """Show what workers have done."""
        self.finished(self.found + results)
        if self.bar:
            self.bar.start(self.total + more, done)


def no_bars(description: str) -> AbstractContextManager[Any]:
    """Return no progress bar."""
    return nullcontext()


def train_or_resume(
    config: TrainConfig, source: Source | Faces, folder: Path, resume: bool, shown: Any
) -> Trained:
    """Train in a folder; with ``resume``, resume the run in it, if there is one."""
    resume = resume and (folder / CONFIG).exists()
    return train(config, source, folder, resume=resume, progress=shown)


def _prepare(
    open_cells: OpenCells, output: Path, resume: bool, steps: Steps
) -> Callable[[str], dict[str, Any]]:
    """Return the function that runs a cell, by its name, in a worker."""
    cells, held = open_cells()
    by_name = {cell.name: cell for cell in cells}
    return lambda name: _run(by_name[name], held, output, resume, steps)


def _made_of(cell: Cell, source: Source, held: Faces) -> dict[str, Any]:
    """Return what a result depends on, in JSON types."""
    found: dict[str, Any] = {
        "config": asdict(cell.config),
        "data": source.description(),
        "held": fingerprint(cell.held or held),
        "target_top1": cell.target_top1,
        "max_steps": cell.max_steps,
    }
    return json.loads(json.dumps(found))


def _run(cell: Cell, held: Faces, output: Path, resume: bool, shown: Any) -> dict[str, Any]:
    """Train and verify a cell; store its metrics, and return them."""
    with _in_cell(cell.name):
        folder, began = output / cell.name, time.perf_counter()
        begun = (folder / CONFIG).exists()
        source = cell.source()
        tries: list[dict[str, Any]] = []
        for config in cell.tries(len(source)):
            place = folder
            if tries:
                place = folder / f"try-{len(tries) + 1}"
                shown.extend(config.epochs * -(-len(source) // config.batch_size))
            trained = train_or_resume(config, source, place, resume, shown)
            last = [row for row in trained.history if row["epoch"] >= config.epochs - 1]
            top1 = sum(row["accuracy"] for row in last) / len(last)
            tries.append({"steps": len(trained.history), "top1": top1})
            if cell.target_top1 is None or top1 >= cell.target_top1:
                break
        people = cell.held or held
        found = verify(embed(trained.backbone, people.images), people.labels).to_json()
        found |= {"loss": sum(row["loss"] for row in last) / len(last)} | tries[-1]
        if cell.target_top1 is not None:
            found |= {"tries": tries, "reached": top1 >= cell.target_top1}
        took = {
            "seconds": None if begun else time.perf_counter() - began,
            "threads": torch.get_num_threads(),
        }
        stored = {"made_of": _made_of(cell, source, held), "found": found, "took": took}
        write_text(folder / RESULT, json.dumps(stored, indent=1) + "\n")
    return found


@contextmanager
def _in_cell(name: str) -> Iterator[None]:
    """Name the cell in the message of an error."""
    try:
        yield
    except Exception as error:
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (f"{name}: {error.args[0]}",)
        elif hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"in the training run {name}")
        raise


def _stored(file: Path, made_of: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics in a file, after checking that they are of this configuration and data."""
    stored = read_json(file, CheckpointError)
    try:
        found, before = stored["found"], stored["made_of"]
        before = _flat(before | {"config": current_training(before["config"])})
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from error
    wanted = _flat(made_of)
    wanted.pop("data's source", None)  # the images may have moved
    checkpoint.check_same(file, before, wanted)
    return found


def _flat(made_of: Mapping[str, Any]) -> dict[str, Any]:
    parts = made_of.items()
    nested = {f"{p}'s {k}": v for p, x in parts if isinstance(x, dict) for k, v in x.items()}
    return nested | {part: x for part, x in parts if not isinstance(x, dict)}


def for_steps(config: TrainConfig, images: int, steps: int) -> TrainConfig:
    """Return the configuration with the number of epochs that is nearest to ``steps`` steps.

    Warm-up and checkpoints keep their share of the run.

    Args:
        images: number of images in an epoch.
    """
    epochs = max(1, round(steps / -(-images // config.batch_size)))
    factor = epochs / config.epochs
    return replace(
        config,
        epochs=epochs,
        warmup_epochs=config.warmup_epochs * factor,
        checkpoint_every=max(1, round(config.checkpoint_every * factor)),
    )
