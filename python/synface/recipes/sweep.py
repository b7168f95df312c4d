"""Sweeps of training runs; each is verified, and its metrics are stored, so that none runs
twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..common.files import CheckpointError, write_text
from ..common.textfiles import read_json
from ..data import Faces
from ..data.mixing import IdentityMixup
from ..evaluation.embedding import embed, pixel_embeddings
from ..evaluation.metrics import verify
from ..synthesis.generators import FaceGenerator
from ..synthesis.sources import GeneratedSource
from ..training.config import TrainConfig
from ..training.loop import Trained, train
from ..training.model import CONFIG, check_network
from ..training.sources import Source, fingerprint
from .generated import FacesConfig, identities
from .loop import current_training
from .report import spread

RESULT = "result.json"
Bars = Callable[[str], AbstractContextManager[Any]]  # a progress bar, from its description


@dataclass(frozen=True, eq=False)
class Cell:
    """One training run of a sweep, whose source is opened when the run starts."""

    name: str
    config: TrainConfig
    source: Callable[[], Source]


@dataclass(frozen=True, eq=False)
class SweepResults:
    """The metrics of a sweep's training runs.

    Attributes:
        generator: the face generator of the training data. held: the people to verify on.
        cells: by name, see `run_cells`. pixels: verification by raw pixels, of the same people.
    """

    config: Any
    generator: FaceGenerator
    held: Faces
    cells: dict[str, dict[str, Any]]
    pixels: dict[str, Any]

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
) -> GeneratedSource:
    """Return a source of ``images`` generated faces of each of ``count`` random identities.

    Args:
        mixup: mix identities. real: faces to mix the generated ones with.
    """
    return GeneratedSource(
        identities(count, data.embedding_size, seed),
        generator,
        images,
        seed=seed,
        identity_mixup=IdentityMixup() if mixup else None,
        real=real,
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
) -> dict[str, dict[str, Any]]:
    """Train and verify each cell in ``output``/NAME; its metrics are stored in result.json there.

    Args:
        held: the people that all cells are verified on.
        resume: use the metrics of finished cells, and resume those that were begun.
        only: run only this cell; others may run in other processes, or on other machines.
        progress: makes a progress bar for each cell from its description.

    Returns:
        By cell: the metrics of `verify` (without its curves), with the last epoch's "loss" and
        training "top1".

    Raises:
        ValueError: for an ``only`` that is not a cell.
        FileExistsError: if a cell was begun and ``resume`` is not set.
        CheckpointError: for a result that is damaged or of another configuration or data.
    """
    names = [cell.name for cell in cells]
    if only is not None and only not in names:
        raise ValueError(f"cell must be one of {', '.join(names)}, got {only!r}")
    bar = progress or no_bars
    return {
        cell.name: _run(cell, held, output, resume, f"{i} of {len(cells)}: {cell.name}", bar)
        for i, cell in enumerate(cells, 1)
        if only in (None, cell.name)
    }


def no_bars(description: str) -> AbstractContextManager[Any]:
    """Return no progress bar."""
    return nullcontext()


def train_or_resume(
    config: TrainConfig, source: Source | Faces, folder: Path, resume: bool, shown: Any
) -> Trained:
    """Train in a folder; with ``resume``, resume the run in it, if there is one."""
    resume = resume and (folder / CONFIG).exists()
    return train(config, source, folder, resume=resume, progress=shown)


def _run(
    cell: Cell, held: Faces, output: Path, resume: bool, title: str, bar: Bars
) -> dict[str, Any]:
    folder = output / cell.name
    file = folder / RESULT
    source = cell.source()
    made_of = {
        "config": asdict(cell.config),
        "data": source.description(),
        "held": fingerprint(held),
    }
    made_of = json.loads(json.dumps(made_of))
    if resume and file.exists():
        return _stored(file, made_of)
    with bar(title) as shown:
        trained = train_or_resume(cell.config, source, folder, resume, shown)
    last = [row for row in trained.history if row["epoch"] >= cell.config.epochs - 1]
    found = verify(embed(trained.backbone, held.images), held.labels).to_json()
    found |= {
        "loss": sum(row["loss"] for row in last) / len(last),
        "top1": sum(row["accuracy"] for row in last) / len(last),
    }
    write_text(file, json.dumps({"made_of": made_of, "found": found}, indent=1) + "\n")
    return found


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
