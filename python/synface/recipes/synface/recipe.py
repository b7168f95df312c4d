"""SynFace: generated faces, mixed by identity and with a few real people, verified on others.

Five rows that differ in the batches alone: the generated faces as they are, with identity mixup,
with domain mixup, with both, and the few real people without any generated face.

Source: Qiu, Yu, Gong, Li, Liu, Tao, "SynFace: Face Recognition with Synthetic Data", ICCV 2021.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...common.check import check_integer
from ...common.config import load, to_toml
from ...data import Faces
from ...data.mixing import IdentityMixup
from ...evaluation.metrics import pixel_embeddings, verify
from ...reporting.page import table, write_page
from ...reporting.plots import ACCENT, INK, QUIET, figure, image_grid, save
from ...synthesis.dataset import styles
from ...synthesis.generators import FaceGenerator
from ...synthesis.sources import GeneratedSource
from ...training.config import TrainConfig
from ...training.model import check_network
from ...training.sources import FacesSource, Source
from ..generated import PainterConfig, check_seeds, identities
from ..sweep import Cell, for_steps, machine, run_cells, shown, spread

# By row: is the identity mixed, is the domain mixed. The real people alone have no such choice.
ROWS: dict[str, tuple[bool, bool] | None] = {
    "synthetic": (False, False),
    "identity mixup": (True, False),
    "domain mixup": (False, True),
    "both": (True, True),
    "real": None,
}


@dataclass(frozen=True)
class DataConfig(PainterConfig):
    """Which faces; see synface.toml."""

    identities: int = 10_000
    images_per_identity: int = 50
    real_identities: int = 2_000
    held_out_identities: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("images_per_identity", self.images_per_identity, 1)
        for name in ("identities", "real_identities", "held_out_identities"):
            check_integer(name, getattr(self, name), 2)


@dataclass(frozen=True)
class SynfaceConfig:
    """All of the recipe, as synface.toml has it; without it the sizes are the paper's."""

    seeds: tuple[int, ...] = (0, 1, 2)
    rows: tuple[str, ...] = tuple(ROWS)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        unknown = [row for row in self.rows if row not in ROWS]
        if unknown or not self.rows or len(set(self.rows)) < len(self.rows):
            raise ValueError(
                f"rows must be different ones of {', '.join(ROWS)}, got {list(self.rows)}"
            )


def load_config(file: Path | None = None) -> SynfaceConfig:
    """A configuration from TOML; None takes the one beside this file. Errors: see `load`."""
    return load(SynfaceConfig, file or Path(__file__).with_name("synface.toml"))


def cells(config: SynfaceConfig, painter: FaceGenerator, real: Faces) -> list[Cell]:
    """A cell for each seed and row."""
    return [_cell(config, painter, real, row, seed) for seed in config.seeds for row in config.rows]


def cell_name(row: str, seed: int) -> str:
    return f"{row.replace(' ', '-')}-seed-{seed}"


def _cell(config: SynfaceConfig, painter: FaceGenerator, real: Faces, row: str, seed: int) -> Cell:
    data, training = config.data, replace(config.train, seed=seed)
    mixing = ROWS[row]
    if mixing is None:
        steps = training.epochs * -(
            -data.identities * data.images_per_identity // training.batch_size
        )
        training = for_steps(training, len(real), steps)

    def source() -> Source:
        if mixing is None:
            return FacesSource(real)
        identity, domain = mixing
        return GeneratedSource(
            identities(data.identities, data.embedding_size, seed),
            painter,
            data.images_per_identity,
            seed=seed,
            identity_mixup=IdentityMixup() if identity else None,
            real=real if domain else None,
        )

    return Cell(cell_name(row, seed), training, source)


@dataclass(frozen=True, eq=False)
class Results:
    """What the recipe found: by cell, its figures; and the pixels' on the same people."""

    config: SynfaceConfig
    painter: FaceGenerator
    real: Faces
    held: Faces
    cells: dict[str, dict[str, Any]]
    pixels: dict[str, Any]


def run(
    config: SynfaceConfig,
    output: Path,
    *,
    resume: bool = False,
    only: str | None = None,
    progress: Callable[[str], AbstractContextManager[Any]] | None = None,
) -> Results:
    """Trains and verifies all cells below ``output``; arguments and errors as of `run_cells`."""
    painter, data = config.data.painter(), config.data
    check_network(config.train, painter.image_shape)
    few, others = data.real_identities, data.held_out_identities
    rest, held = data.real_people(painter.image_shape, few + others).split(others)
    real = rest.split(len(rest.identities) - few)[0]
    pixels = verify(pixel_embeddings(held.images), held.labels).to_json()
    found = run_cells(
        cells(config, painter, real), held, output, resume=resume, only=only, progress=progress
    )
    return Results(config, painter, real, held, found, pixels)


# -- report --------------------------------------------------------------------------------------


def measured(results: Results) -> dict[str, Any]:
    """All figures, for `json.dumps`: by row over the seeds, and what each adds to the first."""
    config = results.config
    by_row = {
        row: [results.cells[cell_name(row, seed)] for seed in config.seeds] for row in config.rows
    }
    rows = {
        row: {
            "accuracy": spread([x["accuracy"] for x in found]),
            "auc": spread([x["auc"] for x in found]),
            "tar": {far: _known([x["tar"][far] for x in found]) for far in found[0]["tar"]},
            "loss": spread([x["loss"] for x in found]),
            "top1": spread([x["top1"] for x in found]),
        }
        for row, found in by_row.items()
    }
    first = config.rows[0]
    gains = {
        row: {
            figure: spread(
                [x[figure] - y[figure] for x, y in zip(by_row[row], by_row[first], strict=True)]
            )
            for figure in ("accuracy", "auc")
        }
        for row in config.rows[1:]
    }
    return {"rows": rows, f"above {first}": gains, "raw pixels": results.pixels}


def _known(values: list[float | None]) -> dict[str, Any] | None:
    return None if None in values else spread([v for v in values if v is not None])


def write(results: Results, folder: Path, command: str, *, faces: bool = True) -> Path:
    """Writes synface.md, synface.json and synface-*.png into a folder; returns the page.

    Args:
        command: what makes this report. faces: show some of the generated faces.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = measured(results) | {"machine": machine()}
    (folder / "synface.json").write_text(json.dumps(figures, indent=1) + "\n")
    _rows_plot(figures, folder / "synface-rows.png")
    if faces:
        _faces_plot(results, folder / "synface-faces.png")
    page = folder / "synface.md"
    write_page(page, _page(results, figures, command, faces))
    return page


def _rows_plot(figures: dict[str, Any], path: Path) -> None:
    new, axes = figure(9, 3.4, 1, 2)
    names = [row.replace(" ", "\n") for row in figures["rows"]]
    for ax, name, title in zip(axes, ("accuracy", "auc"), ("accuracy", "ROC-AUC"), strict=True):
        for i, found in enumerate(figures["rows"].values()):
            values = found[name]["values"]
            ax.scatter([i] * len(values), values, color=INK, s=14, zorder=3)
            ax.hlines(found[name]["mean"], i - 0.3, i + 0.3, color=ACCENT, linewidth=2)
        ax.axhline(figures["raw pixels"][name], color=QUIET, linestyle="--", linewidth=1)
        ax.set_xticks(range(len(names)), names, fontsize=8)
        ax.set_ylabel(f"{title} on real people")
        ax.set_title("each seed, mean; dashed: raw pixels", color=INK, fontsize=10)
        ax.grid(alpha=0.25, axis="y")
    save(new, path)


def _faces_plot(results: Results, path: Path, count: int = 9) -> None:
    """Two identities in several styles, and all between them in one style."""
    data, painter = results.config.data, results.painter
    seed = results.config.seeds[0]
    pair = identities(data.identities, data.embedding_size, seed)[:2]
    share = torch.linspace(1, 0, count, dtype=torch.float32, device="cpu")[:, None]
    between = F.normalize(share * pair[0] + (1 - share) * pair[1])
    style, noise = styles(seed, np.zeros(count, int), np.arange(count), painter.style_size)
    rows = [
        painter.generate(pair[0].expand(count, -1), style, noise),
        painter.generate(between, torch.zeros_like(style), noise),
        painter.generate(pair[1].expand(count, -1), style, noise),
    ]
    names = ["identity 1", "mixed, φ = 1 … 0", "identity 2"]
    title = "Generated faces, in several styles and mixed"
    image_grid([row.numpy() for row in rows], names, title, path)


def _page(results: Results, figures: dict[str, Any], command: str, faces: bool) -> str:
    config, real, held = results.config, results.real, results.held
    data, training = config.data, config.train
    far = next(reversed([f for f, tar in results.pixels["tar"].items() if tar is not None]))
    pixels = results.pixels

    def tar(found: dict[str, Any] | None) -> str:
        return "not measured" if found is None else shown(found)

    rows = table(
        ["trained on", "accuracy", "ROC-AUC", f"TAR at FAR {far}", "training top-1, last epoch"],
        [
            [
                row,
                shown(x["accuracy"]),
                shown(x["auc"]),
                tar(x["tar"][far]),
                shown(x["top1"], 3),
            ]
            for row, x in figures["rows"].items()
        ]
        + [
            [
                "raw pixels, no training",
                f"{pixels['accuracy']:.4f}",
                f"{pixels['auc']:.4f}",
                f"{pixels['tar'][far]:.4f}",
                "–",
            ]
        ],
    )
    first = config.rows[0]
    gains = figures[f"above {first}"]
    count = len(config.seeds)
    compared = table(
        [f"above {first}, seed by seed", "accuracy", "ROC-AUC", "better in ROC-AUC"],
        [
            [
                row,
                shown(x["accuracy"]),
                shown(x["auc"]),
                f"{sum(v > 0 for v in x['auc']['values'])} of {count} seeds",
            ]
            for row, x in gains.items()
        ],
    )
    picture = "\n![generated faces, and two identities mixed](synface-faces.png)\n" if faces else ""
    best = max(figures["rows"], key=lambda row: figures["rows"][row]["auc"]["mean"])
    return f"""# SynFace: what came out

Written by `{command}`; none of the figures is typed in. Measured on {figures["machine"]}.

Trained on {data.identities} generated identities ({data.generator}) with
{data.images_per_identity} images each and {len(real)} real images of {len(real.identities)} people;
verified on {len(held)} real images of {len(held.identities)} other people
({pixels["genuine"]:,} genuine and {pixels["impostor"]:,} impostor pairs). Real faces:
{held.source}. Images are {"×".join(map(str, results.painter.image_shape))}. Mean and standard
deviation over the seeds {", ".join(map(str, config.seeds))}; a seed draws identities, styles, the
network's start and the batches, for all rows the same.

{rows}

- synthetic: the generated faces alone, {training.epochs} epochs.
- identity mixup: φ·α₁ + (1 − φ)·α₂ of two identities of the batch, two labels.
- domain mixup: ψ·synthetic + (1 − ψ)·real, pixel by pixel, two labels; all classes in one head.
- both: three labels.
- real: the few real people alone, for as many steps.

All rows get the same augmentation. Best mean ROC-AUC: {best}.

{compared}

![accuracy and ROC-AUC by row](synface-rows.png)
{picture}
## Configuration

```toml
{to_toml(config)}```
"""
