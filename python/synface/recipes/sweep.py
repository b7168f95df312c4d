"""Studies made of many training runs: each is verified, kept in a file, and never run again."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from synface_kernels import _env

from .. import checkpoint
from ..common.files import CheckpointError, write_text
from ..common.textfiles import read_json
from ..data import Faces
from ..evaluation.metrics import embed, verify
from ..training.config import TrainConfig
from ..training.loop import CONFIG, train
from ..training.sources import Source, fingerprint

RESULT = "result.json"


@dataclass(frozen=True, eq=False)
class Cell:
    """One training run of a study. Its source is opened when it is run."""

    name: str
    config: TrainConfig
    source: Callable[[], Source]


def run_cells(
    cells: Sequence[Cell],
    held: Faces,
    output: Path,
    *,
    resume: bool = False,
    only: str | None = None,
    progress: Callable[[str], AbstractContextManager[Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Trains and verifies each cell in ``output``/NAME; what is found stays in its result.json.

    Args:
        held: the people that all cells are verified on.
        resume: take what is finished as it is, and go on with what was begun.
        only: run this cell alone: others may run in other processes, or on other machines.
        progress: a bar for each cell, from its description.

    Returns:
        By cell: the figures of `verify` (without its curves), with the last epoch's "loss" and
        training "top1".

    Raises:
        ValueError: for an ``only`` that is no cell.
        FileExistsError: where a cell was begun and ``resume`` is not set.
        CheckpointError: for a result that is damaged or of another configuration or data.
    """
    names = [cell.name for cell in cells]
    if only is not None and only not in names:
        raise ValueError(f"cell must be one of {', '.join(names)}, got {only!r}")
    bar = progress or (lambda description: nullcontext())
    return {
        cell.name: _run(cell, held, output, resume, f"{i} of {len(cells)}: {cell.name}", bar)
        for i, cell in enumerate(cells, 1)
        if only in (None, cell.name)
    }


def _run(
    cell: Cell,
    held: Faces,
    output: Path,
    resume: bool,
    title: str,
    bar: Callable[[str], AbstractContextManager[Any]],
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
        trained = train(
            cell.config,
            source,
            folder,
            resume=resume and (folder / CONFIG).exists(),
            progress=shown,
        )
    last = [row for row in trained.history if row["epoch"] >= cell.config.epochs - 1]
    found = verify(embed(trained.backbone, held.images), held.labels).to_json()
    found |= {
        "loss": sum(row["loss"] for row in last) / len(last),
        "top1": sum(row["accuracy"] for row in last) / len(last),
    }
    write_text(file, json.dumps({"made_of": made_of, "found": found}, indent=1) + "\n")
    return found


def _stored(file: Path, made_of: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell found, if it was made of this."""
    try:
        stored = read_json(file, CheckpointError)
        found, before = stored["found"], _flat(stored["made_of"])
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from error
    wanted = _flat(made_of)
    wanted.pop("data's source", None)  # where the images are is free
    checkpoint.check_same(file, before, wanted)
    return found


def _flat(made_of: Mapping[str, Any]) -> dict[str, Any]:
    parts = made_of.items()
    nested = {f"{p}'s {k}": v for p, x in parts if isinstance(x, dict) for k, v in x.items()}
    return nested | {part: x for part, x in parts if not isinstance(x, dict)}


def for_steps(config: TrainConfig, images: int, steps: int) -> TrainConfig:
    """The configuration with as many epochs of so many images as come nearest to a number of steps;
    warm-up and checkpoints keep their share of the run.
    """
    epochs = max(1, round(steps / -(-images // config.batch_size)))
    factor = epochs / config.epochs
    return replace(
        config,
        epochs=epochs,
        warmup_epochs=config.warmup_epochs * factor,
        checkpoint_every=max(1, round(config.checkpoint_every * factor)),
    )


def machine() -> str:
    """What the figures of a report were measured on."""
    return (
        f"{_env.processor()}, threads: {torch.get_num_threads()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and (over two values or more) standard deviation, with the values."""
    tensor = torch.tensor(values, dtype=torch.float64, device="cpu")
    std = tensor.std().item() if len(values) > 1 else None
    return {"mean": tensor.mean().item(), "std": std, "values": list(values)}


def shown(values: Mapping[str, Any], digits: int = 4) -> str:
    """Of `spread`, for a table."""
    std = "" if values["std"] is None else f" ± {values['std']:.{digits}f}"
    return f"{values['mean']:.{digits}f}{std}"
