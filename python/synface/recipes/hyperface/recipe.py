"""HyperFace from packing to verification: pack → synthesize → train → evaluate.

Identities packed on the sphere are held against random ones: as many, drawn by the same generator,
with the same styles, and trained on alike.

Source: Shahreza, Marcel, "HyperFace: Generating Synthetic Face Recognition Datasets by Exploring
Face Embedding Hypersphere", ICLR 2025.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import synface_kernels as sk

from ... import checkpoint
from ...common.check import check_integer
from ...common.config import load, to_toml
from ...common.extras import extra
from ...data import Faces, read_folder
from ...evaluation.metrics import pixel_embeddings, verify
from ...reporting.page import table, write_page
from ...reporting.plots import ACCENT, INK, QUIET, figure, image_grid, save
from ...synthesis import packing
from ...synthesis.dataset import styles, synthesize
from ...synthesis.embeddings import read_embeddings
from ...synthesis.generators import FaceGenerator
from ...synthesis.packing import PackConfig, Packer
from ...training.config import TrainConfig
from ...training.model import check_network
from ...training.sources import FacesSource, Source
from ..generated import PainterConfig, check_seeds, identities
from ..sweep import Cell, machine, run_cells, shown, spread

KINDS = ("packed", "random")
Bars = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class DataConfig(PainterConfig):
    """Which faces; see hyperface.toml."""

    embedding_size: int = 512
    identities: int = 10_000
    images_per_identity: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("identities", self.identities, 2)
        check_integer("images_per_identity", self.images_per_identity, 1)


@dataclass(frozen=True)
class PackingConfig:
    """How identities are packed: objective and steps of `synface.synthesis.packing.PackConfig`."""

    objective: str = "lse"
    steps: int = 500

    def __post_init__(self) -> None:
        PackConfig(2, 2, self.objective, self.steps)


@dataclass(frozen=True)
class HyperfaceConfig:
    """All of the recipe, as hyperface.toml has it; without it the sizes are the paper's."""

    seeds: tuple[int, ...] = (0, 1, 2)
    data: DataConfig = field(default_factory=DataConfig)
    pack: PackingConfig = field(default_factory=PackingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_seeds(self.seeds)

    def packing(self, seed: int) -> PackConfig:
        data, pack = self.data, self.pack
        return PackConfig(
            data.identities, data.embedding_size, pack.objective, pack.steps, seed=seed
        )


def load_config(file: Path | None = None) -> HyperfaceConfig:
    """A configuration from TOML; None takes the one beside this file. Errors: see `load`."""
    return load(HyperfaceConfig, file or Path(__file__).with_name("hyperface.toml"))


def cell_name(kind: str, seed: int) -> str:
    return f"{kind}-seed-{seed}"


class _Share:
    """Tells a bar of steps what a packing tells of shares."""

    def __init__(self, bar: Any, steps: int) -> None:
        self.bar, self.steps = bar, steps

    def update(self, done: float, seconds: float, worst: float | None) -> None:
        if self.bar:
            self.bar.start(self.steps, round(done * self.steps))


def packed(config: HyperfaceConfig, output: Path, seed: int, resume: bool, bar: Bars) -> Tensor:
    """(N, D) packed identities, from ``output``/packed-seed-N.safetensors if they are there.

    Raises:
        ValueError: for a file that is damaged or was made by another configuration.
        FileExistsError: where there is one and ``resume`` is not set.
    """
    file, made_of = output / f"packed-seed-{seed}.safetensors", config.packing(seed)
    if resume and file.exists():
        points = read_embeddings(file)
        with extra("train", file):
            from safetensors import safe_open

        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
        wanted = {name: json.dumps(value) for name, value in asdict(made_of).items()}
        wanted["objective"] = made_of.objective
        checkpoint.check_same(file, metadata, wanted)
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
    config: HyperfaceConfig, painter: FaceGenerator, output: Path, resume: bool, bar: Bars
) -> list[Cell]:
    """A cell for each seed and kind, whose source packs and synthesizes what is not there yet."""
    return [
        Cell(
            cell_name(kind, seed),
            replace(config.train, seed=seed),
            partial(_faces, config, painter, output, kind, seed, resume, bar),
        )
        for seed in config.seeds
        for kind in KINDS
    ]


def _faces(
    config: HyperfaceConfig,
    painter: FaceGenerator,
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
            painter,
            folder,
            data.images_per_identity,
            seed=seed,
            resume=resume,
            progress=shown.files if shown else None,
        )
    grayscale = painter.image_shape[2] == 1
    faces = read_folder(folder, painter.image_shape[:2], grayscale)
    source = f"{data.identities} {kind} identities, seed {seed}"  # not where the folder is
    return FacesSource(replace(faces, source=source))


@dataclass(frozen=True, eq=False)
class Results:
    """What the recipe found.

    Attributes:
        cells: by cell, its figures. pixels: of raw pixels, on the same people.
        points: by kind, for each seed: the (N, D) identities.
        cosines: the same way: the (N,) cosine of each identity with its nearest one.
        drawn: the same of their faces, in one style and with the mean face taken off.
    """

    config: HyperfaceConfig
    painter: FaceGenerator
    held: Faces
    cells: dict[str, dict[str, Any]]
    pixels: dict[str, Any]
    points: dict[str, list[Tensor]]
    cosines: dict[str, list[Tensor]]
    drawn: dict[str, list[Tensor]]


def run(
    config: HyperfaceConfig,
    output: Path,
    *,
    resume: bool = False,
    only: str | None = None,
    progress: Bars | None = None,
) -> Results:
    """Packs, synthesizes, trains and verifies below ``output``; see `run_cells`."""
    bar = progress or (lambda description: nullcontext())
    painter, data = config.data.painter(), config.data
    check_network(config.train, painter.image_shape)
    held = data.real_people(painter.image_shape, 2)
    pixels = verify(pixel_embeddings(held.images), held.labels).to_json()
    found = run_cells(
        cells(config, painter, output, resume, bar),
        held,
        output,
        resume=resume,
        only=only,
        progress=bar,
    )
    seeds = config.seeds if only is None else ()
    points = {
        "packed": [F.normalize(packed(config, output, seed, True, bar)) for seed in seeds],
        "random": [identities(data.identities, data.embedding_size, seed) for seed in seeds],
    }
    drawn = {kind: [_in_one_style(painter, x) for x in points[kind]] for kind in KINDS}
    return Results(config, painter, held, found, pixels, points, _nearest(points), _nearest(drawn))


def _in_one_style(painter: FaceGenerator, points: Tensor) -> Tensor:
    """(N, H·W·C) unit rows: the pixels of each identity's face, less the mean face."""
    style = torch.zeros(len(points), painter.style_size, dtype=torch.float32, device="cpu")
    faces = painter.generate(
        points, style, torch.zeros(len(points), dtype=torch.int64, device="cpu")
    )
    return pixel_embeddings(faces, faces.double().mean(0))


def _nearest(rows: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {kind: [sk.nearest_neighbors(x)[0][:, 0] for x in rows[kind]] for kind in rows}


# -- report --------------------------------------------------------------------------------------


def measured(results: Results) -> dict[str, Any]:
    """All figures, for `json.dumps`: by kind, over the seeds, and packed less random."""
    config, data = results.config, results.config.data
    figures: dict[str, Any] = {}
    for kind in KINDS:
        found = [results.cells[cell_name(kind, seed)] for seed in config.seeds]
        figures[kind] = {
            "worst cosine": spread([x.max().item() for x in results.cosines[kind]]),
            "mean nearest cosine": spread([x.mean().item() for x in results.cosines[kind]]),
            "worst cosine of the faces": spread([x.max().item() for x in results.drawn[kind]]),
            "mean nearest cosine of the faces": spread(
                [x.mean().item() for x in results.drawn[kind]]
            ),
        } | {key: spread([x[key] for x in found]) for key in ("accuracy", "auc", "loss", "top1")}
    figures["packed less random"] = {
        key: spread(
            [a - b for a, b in zip(*(figures[kind][key]["values"] for kind in KINDS), strict=True)]
        )
        for key in ("accuracy", "auc")
    }
    bound = packing.bounds.best(data.identities, data.embedding_size)
    figures["bound"] = {"cosine": bound.cosine, "name": bound.name}
    return figures | {"raw pixels": results.pixels}


def write(results: Results, folder: Path, command: str, *, faces: bool = True) -> Path:
    """Writes hyperface.md, hyperface.json and hyperface-*.png into a folder; returns the page.

    Args:
        command: what makes this report. faces: show some of the packed identities' faces.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = measured(results) | {"machine": machine()}
    (folder / "hyperface.json").write_text(json.dumps(figures, indent=1) + "\n")
    _plot(results, figures, folder / "hyperface-kinds.png")
    if faces:
        _faces_plot(results, folder / "hyperface-faces.png")
    page = folder / "hyperface.md"
    write_page(page, _page(results, figures, command, faces))
    return page


def _plot(results: Results, figures: dict[str, Any], path: Path) -> None:
    new, axes = figure(11, 3.4, 1, 3)
    titles = ("identities", "their faces, by pixels")
    for ax, found, title in zip(axes, (results.cosines, results.drawn), titles, strict=False):
        for kind, color in zip(KINDS, (ACCENT, INK), strict=True):
            values = torch.cat(found[kind]).sort().values
            ax.plot(values.numpy(), np.linspace(0, 1, len(values)), color=color, label=kind)
        ax.set_title(title, color=INK, fontsize=10)
        ax.set_xlabel("cosine to the nearest other person")
    axes[0].set_ylabel("share that is no nearer")
    axes[0].axvline(figures["bound"]["cosine"], color=QUIET, linestyle="--", label="bound")
    axes[0].legend(frameon=False, fontsize=8)
    for i, kind in enumerate(KINDS):
        values = figures[kind]["auc"]["values"]
        axes[2].scatter([i] * len(values), values, color=INK, s=14, zorder=3)
        axes[2].hlines(figures[kind]["auc"]["mean"], i - 0.3, i + 0.3, color=ACCENT, linewidth=2)
    axes[2].axhline(results.pixels["auc"], color=QUIET, linestyle="--", linewidth=1)
    axes[2].set_xticks(range(len(KINDS)), KINDS)
    axes[2].set_ylabel("ROC-AUC on real people")
    axes[2].set_title("each seed, mean; dashed: raw pixels", color=INK, fontsize=10)
    for ax in axes:
        ax.grid(alpha=0.25)
    save(new, path)


def _faces_plot(results: Results, path: Path, people: int = 6, images: int = 8) -> None:
    config, painter = results.config, results.painter
    seed, rows = config.seeds[0], min(people, config.data.identities)
    points = results.points["packed"][0]
    who = np.repeat(np.arange(rows), images)
    style, noise = styles(seed, who, np.tile(np.arange(images), rows), painter.style_size)
    labels = torch.from_numpy(who)
    drawn = painter.generate(points[labels], style, noise)
    grid = list(drawn.unflatten(0, (rows, images)).numpy())
    names = [str(i) for i in range(rows)]
    image_grid(grid, names, "Generated faces of packed identities, one identity a row", path)


def _page(results: Results, figures: dict[str, Any], command: str, faces: bool) -> str:
    config, held, pixels = results.config, results.held, results.pixels
    data, bound = config.data, figures["bound"]
    spheres = table(
        [
            "identities",
            "worst cosine",
            "mean nearest cosine",
            "faces: worst",
            "faces: mean nearest",
        ],
        [
            [
                kind,
                *(
                    shown(figures[kind][key])
                    for key in (
                        "worst cosine",
                        "mean nearest cosine",
                        "worst cosine of the faces",
                        "mean nearest cosine of the faces",
                    )
                ),
            ]
            for kind in KINDS
        ],
    )
    rows = [
        [kind, *(shown(figures[kind][key]) for key in ("accuracy", "auc")),
         shown(figures[kind]["top1"], 3)]
        for kind in KINDS
    ]  # fmt: skip
    less = figures["packed less random"]
    better = sum(value > 0 for value in less["auc"]["values"])
    rows.append(
        ["packed less random, seed by seed", shown(less["accuracy"]), shown(less["auc"]), ""]
    )
    rows.append(
        ["raw pixels, no training", f"{pixels['accuracy']:.4f}", f"{pixels['auc']:.4f}", ""]
    )
    found = table(["trained on", "accuracy", "ROC-AUC", "training top-1, last epoch"], rows)
    picture = "\n![generated faces](hyperface-faces.png)\n" if faces else ""
    return f"""# HyperFace: what came out

Written by `{command}`; none of the figures is typed in. Measured on {figures["machine"]}.

{data.identities} identities in {data.embedding_size} dimensions, packed ({config.pack.objective},
{config.pack.steps} steps) or random, each drawn {data.images_per_identity} times
({data.generator}, {"×".join(map(str, results.painter.image_shape))}), train a network of their own.
Verified on {len(held)} real images of {len(held.identities)} people ({held.source}):
{pixels["genuine"]:,} genuine and {pixels["impostor"]:,} impostor pairs. Mean and standard deviation
over the seeds {", ".join(map(str, config.seeds))}; a seed draws identities, styles, the network's
start and the batches, for both kinds the same.

## On the sphere

No {data.identities} points have a worst cosine below {bound["cosine"]:.4f} ({bound["name"]}).

{spheres}

Of the faces: cosines of their pixels in one style, with the mean face taken off.

## Trained on them

{found}

Packed identities gave the higher ROC-AUC in {better} of {len(config.seeds)} seeds.

![nearest cosines, and ROC-AUC](hyperface-kinds.png)
{picture}
## Configuration

```toml
{to_toml(config)}```
"""
