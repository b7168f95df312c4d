"""SynFace: training on generated faces, mixed by identity and with a few real people.

Six rows that differ only in their batches: the generated faces as they are, with identity mixup,
with domain mixup, with both; generated and real faces merged without mixup, the control of domain
mixup; and the few real people without any generated face.

Source: Qiu, Yu, Gong, Li, Liu, Tao, "SynFace: Face Recognition with Synthetic Data", ICCV 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from ..generated import DatasetConfig, check_choices, check_seeds, drawn_people, identities
from ..report import (
    difference,
    far_from_trained,
    plot_differences,
    plot_seeds,
    shown,
    shown_difference,
    spread,
    verdict,
    write_report,
)
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
from .merged import Merged


@dataclass(frozen=True)
class Row:
    """The images that a row of the table is trained on.

    Attributes:
        identity, domain: whether identities, and domains, are mixed.
        generated, real: whether generated, and real, images are in the batches.
    """

    meaning: str
    identity: bool = False
    domain: bool = False
    generated: bool = True
    real: bool = False


ROWS = {
    "synthetic": Row("the generated faces alone"),
    "identity mixup": Row(
        "φ·α₁ + (1 − φ)·α₂ of two identities, normalized, with two labels", identity=True
    ),
    "domain mixup": Row(
        "ψ·synthetic + (1 − ψ)·real, pixel by pixel, with two labels", domain=True, real=True
    ),
    "both": Row("both mixups, with three labels", identity=True, domain=True, real=True),
    "merged": Row(
        "the generated and the same real images, half of each batch each, unmixed: what the real "
        "images bring without mixup",
        real=True,
    ),
    "real": Row("the few real people alone", generated=False, real=True),
}


@dataclass(frozen=True)
class DataConfig(DatasetConfig):
    """The generated faces, and the real people to train and to verify on; see synface.toml.

    Attributes:
        real_identities: number of people to train on: the first ones.
        held_out_identities: number of people to verify on: the last ones.
        draw_people: each seed draws the people to train on, and verifies on all the others; then
            ``held_out_identities`` is the least number of these.
    """

    real_identities: int = 2_000
    held_out_identities: int = 30
    draw_people: bool = False

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


def cells(
    config: SynfaceConfig,
    generator: FaceGenerator,
    real: Faces,
    splits: Mapping[int, Split] | None = None,
) -> list[Cell]:
    """Return a cell for each seed and row.

    Args:
        real: the people to train on. splits: by seed, other people to train and to verify on.
    """
    own = {} if splits is None else splits
    return [
        _cell(config, generator, own.get(seed, Split(real, None)), row, seed)
        for seed in config.seeds
        for row in config.rows
    ]


class Split(NamedTuple):
    """Real people to train on, and to verify on; None: those that all seeds have."""

    real: Faces
    held: Faces | None


def cell_name(row: str, seed: int) -> str:
    """Return the name of a row's training run with a seed."""
    return f"{row.replace(' ', '-')}-seed-{seed}"


def _cell(
    config: SynfaceConfig, generator: FaceGenerator, split: Split, row: str, seed: int
) -> Cell:
    data, training, made = config.data, replace(config.train, seed=seed), ROWS[row]
    images = data.identities * data.images_per_identity
    generated: int | None = images
    steps = training.epochs * -(-images // training.batch_size)
    keep = min(data.keep_epochs, training.epochs if made.identity else 1) or None

    def source() -> Source:
        if not made.generated:
            return FacesSource(split.real)
        mixed = split.real if made.domain else None
        found = generated_source(
            data, generator, data.identities, data.images_per_identity, seed, made.identity, mixed,
            keep,
        )  # fmt: skip
        return Merged(found, split.real) if made.real and not made.domain else found

    if not made.generated:
        images, generated = len(split.real), 0
    elif made.real and not made.domain:
        images *= 2
    elif keep is None:
        generated = None
    else:
        generated = keep * images
    if images != data.identities * data.images_per_identity:  # as many steps as the others
        training = for_steps(training, images, steps)
    return Cell(
        cell_name(row, seed),
        training,
        source,
        images,
        generator if made.generated else None,
        generated,
        held=split.held,
    )


@dataclass(frozen=True, eq=False)
class Results(SweepResults):
    """The metrics of the recipe's training runs, with the real people that were trained on.

    Attributes:
        real: of the first seed, as ``held``. pixels_of: by seed, verification by raw pixels.
    """

    config: SynfaceConfig
    real: Faces
    pixels_of: Mapping[int, Mapping[str, Any]]


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
    generator, splits = _opened(config)
    first = splits[config.seeds[0]]
    found = run_cells(
        *_cells(config, generator, splits),
        output,
        resume=resume,
        only=only,
        progress=progress,
        workers=workers,
        open_cells=partial(_open_cells, config),
    )
    # Seeds that share their people share the object, so it is verified once.
    verified = {held: verify_pixels(held) for held in {_held(each) for each in splits.values()}}
    pixels = {seed: verified[_held(split)] for seed, split in splits.items()}
    return Results(
        config,
        generator,
        _held(first),
        found,
        pixels[config.seeds[0]],
        first.real,
        pixels,
        took=run_times(output, found),
    )


def _opened(config: SynfaceConfig) -> tuple[FaceGenerator, dict[int, Split]]:
    """Return the face generator, and each seed's real people to train and to verify on."""
    few, others = config.data.real_identities, config.data.held_out_identities
    generator, people = open_faces(config.data, config.train, few + others)
    if config.data.draw_people:
        return generator, {seed: Split(*drawn_people(people, few, seed)) for seed in config.seeds}
    rest, held = people.split(others)
    real = rest.split(len(rest.identities) - few)[0]
    return generator, dict.fromkeys(config.seeds, Split(real, held))


def _cells(
    config: SynfaceConfig, generator: FaceGenerator, splits: Mapping[int, Split]
) -> tuple[list[Cell], Faces]:
    first = splits[config.seeds[0]]
    return cells(config, generator, first.real, splits), _held(first)


def _held(split: Split) -> Faces:
    assert split.held is not None
    return split.held


def _open_cells(config: SynfaceConfig) -> tuple[list[Cell], Faces]:
    """Return the cells and the people to verify on, in a worker."""
    return _cells(config, *_opened(config))


# -- report --------------------------------------------------------------------------------------


KEYS = ("accuracy", "auc")
BASES = ("synthetic", "merged")  # rows that the others are compared with


def measured(results: Results) -> dict[str, Any]:
    """Return all numbers, for `json.dumps`: by row over the seeds, and paired differences."""
    config = results.config
    rows = {}
    for row in config.rows:
        name = partial(cell_name, row)
        rows[row] = results.over_seeds(name, *KEYS, "loss", "top1", "steps")
        rows[row]["tar"] = _tars([results.cells[name(seed)] for seed in config.seeds])
    found = {
        f"above {base}": {
            row: {key: difference(rows[row][key], rows[base][key]) for key in KEYS}
            for row in config.rows
            if row != base
        }
        for base in _bases(config)
    }
    each = [results.pixels_of[seed] for seed in config.seeds]
    pixels = {key: spread([x[key] for x in each]) for key in KEYS} | {"tar": _tars(each)}
    return {"rows": rows, **found, "raw pixels": pixels}


def _tars(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return by FAR the spread of the TARs; None where a seed has too few pairs."""
    tars = [each["tar"] for each in found]
    return {
        far: None if None in (values := [tar[far] for tar in tars]) else spread(values)
        for far in tars[0]
    }


def _bases(config: SynfaceConfig) -> list[str]:
    return [row for row in BASES if row in config.rows] or [config.rows[0]]


def write(results: Results, folder: Path, command: str, *, faces: bool = True) -> Path:
    """Write synface.md, synface.json and synface-*.png into a folder, and return the page.

    Args:
        command: the command line that the page names. faces: show some of the generated faces.
    """
    numbers = measured(results) | {"machine": results.machine()}
    figures = pictures(numbers)
    if faces:
        figures["faces"] = partial(_faces_plot, results)
    fields = results.fields() | _fields(results, numbers, faces) | {"command": command}
    template = Path(__file__).with_name("synface.md")
    return write_report(folder, template, numbers, figures, results.config, **fields)


def pictures(numbers: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
    """Return what draws the pictures of a report's numbers, by name."""
    found: dict[str, Callable[[Path], None]] = {"rows": partial(_rows_plot, numbers)}
    if len(numbers["rows"]) > 1:
        found["differences"] = partial(_differences_plot, numbers)
    return found


def _rows_plot(numbers: Mapping[str, Any], path: Path) -> None:
    new, axes = figure(9.5, 3.8, 1, 2)
    for ax, key, label in zip(axes, KEYS, ("accuracy", "ROC-AUC"), strict=True):
        spreads = {row: found[key] for row, found in numbers["rows"].items()}
        plot_seeds(ax, spreads, numbers["raw pixels"][key]["mean"], label)
    save(new, path)


def _differences_plot(numbers: Mapping[str, Any], path: Path) -> None:
    compared = {
        name.removeprefix("above "): found
        for name, found in numbers.items()
        if name.startswith("above ")
    }
    new, axes = figure(4.75 * len(compared), 3.4, 1, len(compared), squeeze=False)
    for ax, (base, rows) in zip(axes[0], compared.items(), strict=True):
        found = {row: each["auc"] for row, each in rows.items()}
        plot_differences(ax, found, f"ROC-AUC above {base}")
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
    config, real, pixels = results.config, results.real, numbers["raw pixels"]
    known = [far for far, tar in pixels["tar"].items() if tar is not None]
    far = known[-1] if known else next(iter(pixels["tar"]))
    rows = table(
        ["trained on", "accuracy", "ROC-AUC", f"TAR at FAR {far}", "training top-1", "steps"],
        [
            [row, *(shown(x[key]) for key in KEYS), shown(x["tar"][far]), *trained]
            for row, x, *trained in [
                *(
                    (row, x, shown(x["top1"], 3), f"{x['steps']['mean']:.0f}")
                    for row, x in numbers["rows"].items()
                ),
                ("raw pixels, no training", pixels, "–", "–"),
            ]
        ],
    )
    compared = []
    for base in _bases(config):
        found = numbers[f"above {base}"]
        if not found:
            continue
        head = [f"above {base}, seed by seed", "accuracy", "ROC-AUC", "ROC-AUC is"]
        lines = [
            [row, *(shown_difference(x[key]) for key in KEYS), verdict(x["auc"])]
            for row, x in found.items()
        ]
        compared.append(table(head, lines))
    picture = "![generated faces, and two identities mixed](synface-faces.png)"
    return {
        "real_images": len(real),
        "real_people": len(real.identities),
        "split": SPLITS[config.data.draw_people],
        "controls": ", ".join(config.data.controls) or "all",
        "rows": rows,
        "meanings": "\n".join(f"- {row}: {ROWS[row].meaning}." for row in config.rows),
        "compared": "\n\n".join(compared) or "One row: nothing to compare.",
        "differences": DIFFERENCES if compared else "",
        "conclusion": _conclusion(config, numbers),
        "picture": picture if faces else "",
    }


SPLITS = {
    False: "the same people for all seeds",
    True: "each seed draws the people to train on and is verified on all the rest",
}
DIFFERENCES = "![differences in ROC-AUC](synface-differences.png)"


def _conclusion(config: SynfaceConfig, numbers: dict[str, Any]) -> str:
    """Return sentences about the differences, by their intervals."""
    sentences = []
    for base in _bases(config):
        groups: dict[str, list[str]] = {}
        for row, found in numbers[f"above {base}"].items():
            groups.setdefault(verdict(found["auc"]), []).append(row)
        parts = [f"{how} for {', '.join(rows)}" for how, rows in sorted(groups.items())]
        if parts:
            sentences.append(f"Against {base}, ROC-AUC is {'; '.join(parts)}.")
    sentences.append(far_from_trained(numbers["rows"]))
    return " ".join(filter(None, sentences))
