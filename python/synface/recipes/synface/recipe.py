"""SynFace: training on generated faces, mixed by identity and with a few real people.

Five rows that differ only in their batches: the generated faces as they are, with identity mixup,
with domain mixup, with both, and the few real people without any generated face.

Source: Qiu, Yu, Gong, Li, Liu, Tao, "SynFace: Face Recognition with Synthetic Data", ICCV 2021.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...common.check import check_integers
from ...common.config import load_recipe
from ...data import Faces
from ...reporting.page import table
from ...reporting.plots import figure, image_grid, save
from ...synthesis.dataset import styles
from ...synthesis.generators import FaceGenerator
from ...training.config import TrainConfig
from ...training.sources import FacesSource, Source
from ..generated import DatasetConfig, check_choices, check_seeds, identities
from ..report import difference, plot_seeds, shown, spread, write_report
from ..sweep import (
    Bars,
    Cell,
    SweepResults,
    for_steps,
    generated_source,
    open_faces,
    run_cells,
    run_times,
    verify_pixels,
)

# By row: whether identities, and domains, are mixed; None for the real people alone.
ROWS: dict[str, tuple[bool, bool] | None] = {
    "synthetic": (False, False),
    "identity mixup": (True, False),
    "domain mixup": (False, True),
    "both": (True, True),
    "real": None,
}


@dataclass(frozen=True)
class DataConfig(DatasetConfig):
    """The generated faces, and the real people to train and to verify on; see synface.toml."""

    real_identities: int = 2_000
    held_out_identities: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, real_identities=2, held_out_identities=2)


@dataclass(frozen=True)
class SynfaceConfig:
    """Configuration of the whole recipe, see synface.toml; the defaults are the paper's sizes."""

    seeds: tuple[int, ...] = (0, 1, 2)
    rows: tuple[str, ...] = tuple(ROWS)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        check_choices("rows", self.rows, ROWS)


def load_config(file: Path | None = None, *, quick: bool = False) -> SynfaceConfig:
    """Return a configuration from TOML, by default synface.toml; see `load_recipe`."""
    return load_recipe(SynfaceConfig, Path(__file__).with_name("synface.toml"), file, quick)


def cells(config: SynfaceConfig, generator: FaceGenerator, real: Faces) -> list[Cell]:
    """Return a cell for each seed and row."""
    return [
        _cell(config, generator, real, row, seed) for seed in config.seeds for row in config.rows
    ]


def cell_name(row: str, seed: int) -> str:
    """Return the name of a row's training run with a seed."""
    return f"{row.replace(' ', '-')}-seed-{seed}"


def _cell(
    config: SynfaceConfig, generator: FaceGenerator, real: Faces, row: str, seed: int
) -> Cell:
    data, training = config.data, replace(config.train, seed=seed)
    mixing, images = ROWS[row], data.identities * data.images_per_identity
    if mixing is None:
        steps = training.epochs * -(-images // training.batch_size)
        training = for_steps(training, len(real), steps)

    def source() -> Source:
        if mixing is None:
            return FacesSource(real)
        count, each, (identity, domain) = data.identities, data.images_per_identity, mixing
        others = real if domain else None
        return generated_source(data, generator, count, each, seed, identity, others)

    name = cell_name(row, seed)
    if mixing is None:
        return Cell(name, training, source, len(real))
    return Cell(name, training, source, images, generator)


@dataclass(frozen=True, eq=False)
class Results(SweepResults):
    """The metrics of the recipe's training runs, with the real people that were trained on."""

    config: SynfaceConfig
    real: Faces


def run(
    config: SynfaceConfig,
    output: Path,
    *,
    resume: bool = False,
    only: str | None = None,
    progress: Bars | None = None,
    workers: int | None = 1,
) -> Results:
    """Train and verify all cells below ``output``; options and errors are those of `run_cells`."""
    generator, real, held = _opened(config)
    pixels = verify_pixels(held)
    found = run_cells(
        cells(config, generator, real),
        held,
        output,
        resume=resume,
        only=only,
        progress=progress,
        workers=workers,
        open_cells=partial(_open_cells, config),
    )
    return Results(config, generator, held, found, pixels, real, took=run_times(output, found))


def _opened(config: SynfaceConfig) -> tuple[FaceGenerator, Faces, Faces]:
    """Return the face generator, the real people to train on, and those to verify on."""
    few, others = config.data.real_identities, config.data.held_out_identities
    generator, people = open_faces(config.data, config.train, few + others)
    rest, held = people.split(others)
    return generator, rest.split(len(rest.identities) - few)[0], held


def _open_cells(config: SynfaceConfig) -> tuple[list[Cell], Faces]:
    """Return the cells and the people to verify on, in a worker."""
    generator, real, held = _opened(config)
    return cells(config, generator, real), held


# -- report --------------------------------------------------------------------------------------


def measured(results: Results) -> dict[str, Any]:
    """Return all numbers, for `json.dumps`: by row over the seeds, and compared with the first."""
    first, *others = results.config.rows
    rows = {}
    for row in results.config.rows:
        name = partial(cell_name, row)
        rows[row] = results.over_seeds(name, "accuracy", "auc", "loss", "top1")
        tars = [results.cells[name(seed)]["tar"] for seed in results.config.seeds]
        rows[row]["tar"] = {
            far: None if None in (values := [tar[far] for tar in tars]) else spread(values)
            for far in tars[0]
        }
    gains = {
        row: {key: difference(rows[row][key], rows[first][key]) for key in ("accuracy", "auc")}
        for row in others
    }
    return {"rows": rows, f"above {first}": gains, "raw pixels": results.pixels}


def write(results: Results, folder: Path, command: str, *, faces: bool = True) -> Path:
    """Write synface.md, synface.json and synface-*.png into a folder, and return the page.

    Args:
        command: the command line that the page names. faces: show some of the generated faces.
    """
    numbers = measured(results) | {"machine": results.machine()}
    figures = {"rows": partial(_rows_plot, numbers)}
    if faces:
        figures["faces"] = partial(_faces_plot, results)
    fields = results.fields() | _fields(results, numbers, faces) | {"command": command}
    template = Path(__file__).with_name("synface.md")
    return write_report(folder, template, numbers, figures, results.config, **fields)


def _rows_plot(numbers: dict[str, Any], path: Path) -> None:
    new, axes = figure(9, 3.4, 1, 2)
    for ax, key, label in zip(axes, ("accuracy", "auc"), ("accuracy", "ROC-AUC"), strict=True):
        spreads = {row: found[key] for row, found in numbers["rows"].items()}
        plot_seeds(ax, spreads, numbers["raw pixels"][key], label)
    save(new, path)


def _faces_plot(results: Results, path: Path, count: int = 9) -> None:
    """Draw two identities in several styles, and mixtures of both in one style."""
    data, generator = results.config.data, results.generator
    seed = results.config.seeds[0]
    pair = identities(data.identities, data.embedding_size, seed)[:2]
    share = torch.linspace(1, 0, count, dtype=torch.float32, device="cpu")[:, None]
    between = F.normalize(share * pair[0] + (1 - share) * pair[1])
    style, noise = styles(seed, np.zeros(count, int), np.arange(count), generator.style_size)
    rows = [
        generator.generate(pair[0].expand(count, -1), style, noise),
        generator.generate(between, torch.zeros_like(style), noise),
        generator.generate(pair[1].expand(count, -1), style, noise),
    ]
    names = ["identity 1", "mixed, φ = 1 … 0", "identity 2"]
    title = "Generated faces, in several styles and mixed"
    image_grid([row.numpy() for row in rows], names, title, path)


def _fields(results: Results, numbers: dict[str, Any], faces: bool) -> dict[str, Any]:
    config, real, pixels = results.config, results.real, results.pixels
    far = next(reversed([f for f, tar in pixels["tar"].items() if tar is not None]))
    keys = ("accuracy", "auc")
    rows = table(
        ["trained on", "accuracy", "ROC-AUC", f"TAR at FAR {far}", "training top-1, last epoch"],
        [
            [row, *(shown(x[key]) for key in keys), shown(x["tar"][far]), shown(x["top1"], 3)]
            for row, x in numbers["rows"].items()
        ]
        + [
            [
                "raw pixels, no training",
                *(shown(pixels[key]) for key in keys),
                shown(pixels["tar"][far]),
                "–",
            ]
        ],
    )
    first = config.rows[0]
    compared = table(
        [f"gain over {first}, seed by seed", "accuracy", "ROC-AUC", "better in ROC-AUC"],
        [
            [
                row,
                *(shown(x[key]) for key in keys),
                f"{sum(v > 0 for v in x['auc']['values'])} of {len(config.seeds)} seeds",
            ]
            for row, x in numbers[f"above {first}"].items()
        ],
    )
    picture = "![generated faces, and two identities mixed](synface-faces.png)"
    return {
        "real_images": len(real),
        "real_people": len(real.identities),
        "rows": rows,
        "compared": compared,
        "best": max(config.rows, key=lambda row: numbers["rows"][row]["auc"]["mean"]),
        "picture": picture if faces else "",
    }
