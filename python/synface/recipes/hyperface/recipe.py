"""HyperFace from packing to verification: pack → synthesize → train → evaluate.

Packed identities are compared with the same number of random ones, with the same face generator,
styles and training.

Source: Shahreza, Marcel, "HyperFace: Generating Synthetic Face Recognition Datasets by Exploring
Face Embedding Hypersphere", ICLR 2025.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import synface_kernels as sk

from ... import checkpoint
from ...common.config import load_recipe
from ...common.extras import extra
from ...data import Faces, read_folder
from ...evaluation.embedding import pixel_embeddings
from ...reporting.page import table
from ...reporting.plots import ACCENT, INK, QUIET, figure, finish, image_grid, save
from ...synthesis import packing
from ...synthesis.dataset import styles, synthesize
from ...synthesis.embeddings import read_embeddings
from ...synthesis.generators import FaceGenerator
from ...synthesis.packing import PackConfig, Packer
from ...training.config import TrainConfig
from ...training.sources import FacesSource, Source
from ..generated import DatasetConfig, check_seeds, identities
from ..report import difference, plot_seeds, shown, spread, write_report
from ..sweep import (
    Bars,
    Cell,
    SweepResults,
    no_bars,
    open_faces,
    run_cells,
    run_times,
    verify_pixels,
)

KINDS = ("packed", "random")
KEYS = (  # of the cosines in the report
    "worst cosine",
    "mean nearest cosine",
    "worst cosine of the faces",
    "mean nearest cosine of the faces",
)


@dataclass(frozen=True)
class DataConfig(DatasetConfig):
    """The generated faces, and the real people to verify on; see hyperface.toml."""

    embedding_size: int = 512


@dataclass(frozen=True)
class PackingConfig:
    """Objective and steps of the packing; see `synface.synthesis.packing.PackConfig`."""

    objective: str = "lse"
    steps: int = 500

    def __post_init__(self) -> None:
        PackConfig(2, 2, self.objective, self.steps)


@dataclass(frozen=True)
class HyperfaceConfig:
    """Configuration of the whole recipe, see hyperface.toml; the defaults are the paper's sizes."""

    seeds: tuple[int, ...] = (0, 1, 2)
    data: DataConfig = field(default_factory=DataConfig)
    pack: PackingConfig = field(default_factory=PackingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_seeds(self.seeds)

    def packing(self, seed: int) -> PackConfig:
        """Return the configuration of a seed's packing."""
        data, pack = self.data, self.pack
        return PackConfig(
            data.identities, data.embedding_size, pack.objective, pack.steps, seed=seed
        )


def load_config(file: Path | None = None, *, quick: bool = False) -> HyperfaceConfig:
    """Return a configuration from TOML, by default hyperface.toml; see `load_recipe`."""
    return load_recipe(HyperfaceConfig, Path(__file__).with_name("hyperface.toml"), file, quick)


def cell_name(kind: str, seed: int) -> str:
    """Return the name of the training run of a kind of identities with a seed."""
    return f"{kind}-seed-{seed}"


class _Share:
    """An adapter that shows the progress of a packing, a share, on a progress bar of steps."""

    def __init__(self, bar: Any, steps: int) -> None:
        self.bar, self.steps = bar, steps

    def update(self, done: float, seconds: float, worst: float | None) -> None:
        if self.bar:
            self.bar.start(self.steps, round(done * self.steps))


def packed(config: HyperfaceConfig, output: Path, seed: int, resume: bool, bar: Bars) -> Tensor:
    """Return (N, D) packed identities, from ``output``/packed-seed-N.safetensors if it exists.

    Raises:
        ValueError: for a file that is damaged or was made by another configuration.
        FileExistsError: if there is one and ``resume`` is not set.
    """
    file, made_of = output / f"packed-seed-{seed}.safetensors", config.packing(seed)
    if resume and file.exists():
        points = read_embeddings(file)
        with extra("train", file):
            from safetensors import safe_open

        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
        checkpoint.check_same(file, metadata, made_of.metadata())
        return points
    begun = file.with_name(f"{file.stem}-{made_of.objective}.checkpoints")

    @contextmanager
    def share(objective: str) -> Iterator[_Share]:
        with bar(f"packing, {objective}, seed {seed}") as shown:
            yield _Share(shown, config.pack.steps)

    packing.pack(
        [Packer(made_of)],
        file,
        resume=resume and bool(checkpoint.checkpoints(begun)),
        progress=share,
    )
    return read_embeddings(file)


def cells(
    config: HyperfaceConfig, generator: FaceGenerator, output: Path, resume: bool, bar: Bars
) -> list[Cell]:
    """Return a cell for each seed and kind, whose source packs and synthesizes the missing data."""
    images = config.data.identities * config.data.images_per_identity
    return [
        Cell(
            cell_name(kind, seed),
            replace(config.train, seed=seed),
            partial(_faces, config, generator, output, kind, seed, resume, bar),
            images,
            generator,
            generated=images,
        )
        for seed in config.seeds
        for kind in KINDS
    ]


def _faces(
    config: HyperfaceConfig,
    generator: FaceGenerator,
    output: Path,
    kind: str,
    seed: int,
    resume: bool,
    bar: Bars,
) -> Source:
    data, folder = config.data, output / "faces" / cell_name(kind, seed)
    if kind == "packed":
        points = packed(config, output, seed, resume, bar)
    else:
        points = identities(data.identities, data.embedding_size, seed)
    with bar(f"faces, {kind}, seed {seed}") as shown:
        synthesize(
            points,
            generator,
            folder,
            data.images_per_identity,
            seed=seed,
            resume=resume,
            progress=shown.files if shown else None,
        )
    grayscale = generator.image_shape[2] == 1
    faces = read_folder(folder, generator.image_shape[:2], grayscale)
    source = f"{data.identities} {kind} identities, seed {seed}"  # independent of the folder's path
    return FacesSource(replace(faces, source=source))


@dataclass(frozen=True, eq=False)
class Results(SweepResults):
    """The metrics of the recipe's training runs, with the identities and their cosines.

    Attributes:
        points: by kind, for each seed: the (N, D) identities.
        cosines: likewise: the (N,) cosine of each identity with its nearest one.
        face_cosines: likewise, of their faces in one style, with the mean face subtracted.
    """

    config: HyperfaceConfig
    points: dict[str, list[Tensor]]
    cosines: dict[str, list[Tensor]]
    face_cosines: dict[str, list[Tensor]]


def run(
    config: HyperfaceConfig,
    output: Path,
    *,
    resume: bool = False,
    only: str | None = None,
    progress: Bars | None = None,
    workers: int | None = 1,
) -> Results:
    """Pack, synthesize, train and verify below ``output``; see `run_cells`."""
    data = config.data
    generator, held = open_faces(data, config.train, 2)
    pixels = verify_pixels(held)
    found = run_cells(
        cells(config, generator, output, resume, no_bars),
        held,
        output,
        resume=resume,
        only=only,
        progress=progress,
        workers=workers,
        open_cells=partial(_open_cells, config, output, resume),
    )
    seeds = config.seeds if only is None else ()
    points = {
        "packed": [F.normalize(packed(config, output, seed, True, no_bars)) for seed in seeds],
        "random": [identities(data.identities, data.embedding_size, seed) for seed in seeds],
    }
    faces = {kind: [_in_one_style(generator, x) for x in points[kind]] for kind in KINDS}
    cosines = _nearest(points), _nearest(faces)
    took = run_times(output, found)
    return Results(config, generator, held, found, pixels, points, *cosines, took=took)


def _open_cells(config: HyperfaceConfig, output: Path, resume: bool) -> tuple[list[Cell], Faces]:
    """Return the cells and the people to verify on, in a worker."""
    generator, held = open_faces(config.data, config.train, 2)
    return cells(config, generator, output, resume, no_bars), held


def _in_one_style(generator: FaceGenerator, points: Tensor) -> Tensor:
    """Return (N, H·W·C) unit rows: the pixels of each identity's face, less the mean face."""
    style = torch.zeros(len(points), generator.style_size, dtype=torch.float32, device="cpu")
    noise = torch.zeros(len(points), dtype=torch.int64, device="cpu")
    faces = generator.generate(points, style, noise)
    return pixel_embeddings(faces, faces.double().mean(0))


def _nearest(rows: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {kind: [sk.nearest_neighbors(x)[0][:, 0] for x in rows[kind]] for kind in rows}


# -- report --------------------------------------------------------------------------------------


def measured(results: Results) -> dict[str, Any]:
    """Return all numbers, for `json.dumps`: by kind over the seeds, and packed less random."""
    data = results.config.data
    numbers: dict[str, Any] = {}
    for kind in KINDS:
        found = results.cosines[kind], results.face_cosines[kind]
        values = [
            [float(statistic(x)) for x in cosines]
            for cosines in found
            for statistic in (torch.max, torch.mean)
        ]
        numbers[kind] = dict(zip(KEYS, map(spread, values), strict=True))
        name = partial(cell_name, kind)
        numbers[kind] |= results.over_seeds(name, "accuracy", "auc", "loss", "top1")
    packed, random = (numbers[kind] for kind in KINDS)
    numbers["packed less random"] = {
        key: difference(packed[key], random[key]) for key in ("accuracy", "auc")
    }
    bound = packing.bounds.best(data.identities, data.embedding_size)
    numbers["bound"] = {"cosine": bound.cosine, "name": bound.name}
    return numbers | {"raw pixels": results.pixels}


def write(results: Results, folder: Path, command: str, *, faces: bool = True) -> Path:
    """Write hyperface.md, hyperface.json and hyperface-*.png into a folder, and return the page.

    Args:
        command: the command line that the page names.
        faces: show some of the packed identities' faces.
    """
    numbers = measured(results) | {"machine": results.machine()}
    figures = {"kinds": partial(_plot, results, numbers)}
    if faces:
        figures["faces"] = partial(_faces_plot, results)
    fields = results.fields() | _fields(results, numbers) | {"command": command}
    fields["picture"] = "![generated faces](hyperface-faces.png)" if faces else ""
    template = Path(__file__).with_name("hyperface.md")
    return write_report(folder, template, numbers, figures, results.config, **fields)


def _plot(results: Results, numbers: dict[str, Any], path: Path) -> None:
    new, axes = figure(11, 3.4, 1, 3)
    axes[0].axvline(numbers["bound"]["cosine"], color=QUIET, linestyle="--", label="lower bound")
    plots = (("Identities", results.cosines), ("Their faces, by pixels", results.face_cosines))
    for ax, (title, found) in zip(axes, plots, strict=False):
        for kind, color in zip(KINDS, (ACCENT, INK), strict=True):
            values = torch.cat(found[kind]).sort().values
            ax.plot(values.numpy(), np.linspace(0, 1, len(values)), color=color, label=kind)
        finish(ax, title, "cosine to the nearest other identity", "cumulative share")
    aucs = {kind: numbers[kind]["auc"] for kind in KINDS}
    plot_seeds(axes[2], aucs, results.pixels["auc"], "ROC-AUC")
    save(new, path)


def _faces_plot(results: Results, path: Path, people: int = 6, images: int = 8) -> None:
    config, generator = results.config, results.generator
    seed, rows = config.seeds[0], min(people, config.data.identities)
    points = results.points["packed"][0]
    who = np.repeat(np.arange(rows), images)
    style, noise = styles(seed, who, np.tile(np.arange(images), rows), generator.style_size)
    labels = torch.from_numpy(who)
    drawn = generator.generate(points[labels], style, noise)
    grid = list(drawn.unflatten(0, (rows, images)).numpy())
    names = [str(i) for i in range(rows)]
    image_grid(grid, names, "Generated faces of packed identities, one identity per row", path)


def _fields(results: Results, numbers: dict[str, Any]) -> dict[str, Any]:
    pixels = results.pixels
    spheres = table(
        [
            "identities",
            "worst cosine",
            "mean nearest cosine",
            "faces: worst",
            "faces: mean nearest",
        ],
        [[kind, *(shown(numbers[kind][key]) for key in KEYS)] for kind in KINDS],
    )
    less, keys = numbers["packed less random"], ("accuracy", "auc")
    found = table(
        ["trained on", "accuracy", "ROC-AUC", "training top-1, last epoch"],
        [
            [kind, *(shown(numbers[kind][key]) for key in keys), shown(numbers[kind]["top1"], 3)]
            for kind in KINDS
        ]
        + [
            ["packed less random, seed by seed", *(shown(less[key]) for key in keys), ""],
            ["raw pixels, no training", *(shown(pixels[key]) for key in keys), ""],
        ],
    )
    return {
        "spheres": spheres,
        "found": found,
        "better": sum(value > 0 for value in less["auc"]["values"]),
        "count": len(less["auc"]["values"]),
    }
