"""SynFace's study: what more identities, more images of each, and each attribute bring.

Networks trained on generated faces alone, with and without identity mixup, are verified on real
people: over identities × images per identity, and with one attribute of the embedded generator
varied at a time, the others held still. Every cell trains for the same number of steps.

Source: Qiu et al., "SynFace", ICCV 2021, section 4.3, which varies expression, pose and light of
its own generator; the embedded one has other attributes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...common.check import check_integer
from ...common.config import load, to_toml
from ...data import Faces
from ...data.mixing import IdentityMixup
from ...evaluation.metrics import pixel_embeddings, verify
from ...reporting.page import table, write_page
from ...reporting.plots import ACCENT, INK, QUIET, figure, save
from ...synthesis.generators import FaceGenerator
from ...synthesis.sources import GeneratedSource
from ...training.config import TrainConfig
from ...training.model import check_network
from ..generated import EIGENFACES, PainterConfig, check_seeds, identities
from ..sweep import Cell, for_steps, machine, run_cells, shown, spread

# Which of the ten numbers of an eigenface's style each attribute has; see `restyle`.
ATTRIBUTES = {
    "none": (),
    "placement": (0, 1, 2, 3),
    "light": (5, 6, 7, 8),
    "blur": (4,),
    "noise": (9,),
    "all": tuple(range(10)),
}
MEANING = {
    "none": "every image of an identity is the same",
    "placement": "rotation in the plane, zoom and shift",
    "light": "its slope, gain and bias",
    "blur": "its width",
    "noise": "its strength",
    "all": "all of these",
}
STILL = torch.zeros(10, dtype=torch.float32, device="cpu")
STILL[[4, 9]] = -8.0  # no blur, no noise: both grow from 0 at the lowest number


@dataclass(frozen=True)
class StudyConfig:
    """All of the study; see study.toml."""

    seeds: tuple[int, ...] = (0,)
    identities: tuple[int, ...] = (1_000, 2_000, 5_000, 10_000)
    images: tuple[int, ...] = (1, 5, 20, 50)
    attributes: tuple[str, ...] = tuple(ATTRIBUTES)
    attribute_identities: int = 5_000
    attribute_images: int = 50
    data: PainterConfig = field(default_factory=PainterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        for name, values, least in (
            ("identities", self.identities, 2),
            ("images", self.images, 1),
            ("attribute_identities", (self.attribute_identities,), 2),
            ("attribute_images", (self.attribute_images,), 1),
        ):
            for value in values:
                check_integer(name, value, least)
            if not values or list(values) != sorted(set(values)):
                raise ValueError(f"{name} must rise, and be at least one, got {list(values)}")
        unknown = [name for name in self.attributes if name not in ATTRIBUTES]
        if unknown or len(set(self.attributes)) < len(self.attributes):
            raise ValueError(
                f"attributes must be different ones of {', '.join(ATTRIBUTES)}, "
                f"got {list(self.attributes)}"
            )
        if self.attributes and self.data.generator != EIGENFACES:
            raise ValueError(
                f"attributes are known of {EIGENFACES} alone: leave them empty ([]) for "
                f"{self.data.generator}"
            )


def load_config(file: Path | None = None) -> StudyConfig:
    """A configuration from TOML; None takes the one beside this file. Errors: see `load`."""
    return load(StudyConfig, file or Path(__file__).with_name("study.toml"))


class OneAttribute:
    """A generator of eigenfaces whose styles vary in one attribute alone."""

    def __init__(self, painter: FaceGenerator, attribute: str) -> None:
        self.painter, self.attribute = painter, attribute
        self.embedding_size, self.style_size = painter.embedding_size, painter.style_size
        self.image_shape = painter.image_shape
        self.description = painter.description | {"varied": attribute}
        self._varied = torch.zeros(painter.style_size, dtype=torch.bool, device="cpu")
        self._varied[list(ATTRIBUTES[attribute])] = True

    def generate(self, embedding: Tensor, style: Tensor, seed: Tensor) -> Tensor:
        """As `FaceGenerator.generate`."""
        return self.painter.generate(embedding, torch.where(self._varied, style, STILL), seed)


def size_name(width: int, depth: int, mixed: bool, seed: int) -> str:
    return f"{width}x{depth}{'-mixup' if mixed else ''}-seed-{seed}"


def attribute_name(attribute: str, mixed: bool, seed: int) -> str:
    return f"{attribute}{'-mixup' if mixed else ''}-seed-{seed}"


def cells(config: StudyConfig, painter: FaceGenerator) -> list[Cell]:
    """A cell for each seed, size or attribute, without and with identity mixup."""
    found = []
    largest = max(config.identities) * max(config.images)
    steps = config.train.epochs * -(-largest // config.train.batch_size)

    def add(
        name: str, painter: FaceGenerator, width: int, depth: int, mixed: bool, seed: int
    ) -> None:
        found.append(
            Cell(
                name,
                replace(for_steps(config.train, width * depth, steps), seed=seed),
                lambda: GeneratedSource(
                    identities(width, config.data.embedding_size, seed),
                    painter,
                    depth,
                    seed=seed,
                    identity_mixup=IdentityMixup() if mixed else None,
                ),
            )
        )

    for seed in config.seeds:
        for mixed in (False, True):
            for width in config.identities:
                for depth in config.images:
                    add(size_name(width, depth, mixed, seed), painter, width, depth, mixed, seed)
            for attribute in config.attributes:
                add(
                    attribute_name(attribute, mixed, seed),
                    OneAttribute(painter, attribute),
                    config.attribute_identities,
                    config.attribute_images,
                    mixed,
                    seed,
                )
    return found


@dataclass(frozen=True, eq=False)
class Results:
    """What the study found: by cell, its figures; and the pixels' on the same people."""

    config: StudyConfig
    held: Faces
    cells: dict[str, dict[str, Any]]
    pixels: dict[str, Any]


def run(
    config: StudyConfig,
    output: Path,
    *,
    resume: bool = False,
    only: str | None = None,
    progress: Callable[[str], AbstractContextManager[Any]] | None = None,
) -> Results:
    """Trains and verifies all cells below ``output``; arguments and errors as of `run_cells`."""
    painter = config.data.painter()
    check_network(config.train, painter.image_shape)
    held = config.data.real_people(painter.image_shape, 2)
    pixels = verify(pixel_embeddings(held.images), held.labels).to_json()
    found = run_cells(
        cells(config, painter), held, output, resume=resume, only=only, progress=progress
    )
    return Results(config, held, found, pixels)


# -- report --------------------------------------------------------------------------------------

MIXUP = {"plain": False, "identity mixup": True}


def measured(results: Results) -> dict[str, Any]:
    """All figures, for `json.dumps`: accuracy and ROC-AUC over the seeds, by kind and cell."""
    config = results.config

    def over_seeds(name: Callable[[int], str]) -> dict[str, Any]:
        found = [results.cells[name(seed)] for seed in config.seeds]
        return {key: spread([x[key] for x in found]) for key in ("accuracy", "auc", "top1")}

    sizes = {
        kind: {
            str(width): {
                str(depth): over_seeds(lambda seed: size_name(width, depth, mixed, seed))  # noqa: B023
                for depth in config.images
            }
            for width in config.identities
        }
        for kind, mixed in MIXUP.items()
    }
    attributes = {
        kind: {
            attribute: over_seeds(lambda seed: attribute_name(attribute, mixed, seed))  # noqa: B023
            for attribute in config.attributes
        }
        for kind, mixed in MIXUP.items()
    }
    return {"sizes": sizes, "attributes": attributes, "raw pixels": results.pixels}


def write(results: Results, folder: Path, command: str) -> Path:
    """Writes study.md, study.json and study-*.png into a folder; returns the page.

    Args:
        command: what makes this report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = measured(results) | {"machine": machine()}
    (folder / "study.json").write_text(json.dumps(figures, indent=1) + "\n")
    _sizes_plot(results.config, figures, folder / "study-sizes.png")
    if results.config.attributes:
        _attributes_plot(figures, folder / "study-attributes.png")
    page = folder / "study.md"
    write_page(page, _page(results, figures, command))
    return page


def _sizes_plot(config: StudyConfig, figures: dict[str, Any], path: Path) -> None:
    new, axes = figure(9, 3.6, 1, 2, sharey=True)
    shades = [QUIET, INK, ACCENT]
    for ax, (kind, widths) in zip(axes, figures["sizes"].items(), strict=True):
        for i, (width, depths) in enumerate(widths.items()):
            ax.plot(
                config.images,
                [x["auc"]["mean"] for x in depths.values()],
                marker="o",
                color=shades[i % 3],
                linestyle=("-", "--", ":")[i // 3 % 3],
                label=f"{width} identities",
            )
        ax.axhline(figures["raw pixels"]["auc"], color=QUIET, linestyle="--", linewidth=1)
        ax.set_xscale("log", base=2)
        ax.set_xticks(config.images, [str(n) for n in config.images])
        ax.set_xlabel("images per identity")
        ax.set_title(f"{kind}; dashed: raw pixels", color=INK, fontsize=10)
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("ROC-AUC on real people")
    axes[0].legend(frameon=False, fontsize=8)
    save(new, path)


def _attributes_plot(figures: dict[str, Any], path: Path) -> None:
    new, axes = figure(6.8, 3.6)
    for offset, color, (kind, found) in zip(
        (-0.2, 0.2), (INK, ACCENT), figures["attributes"].items(), strict=True
    ):
        at = [i + offset for i in range(len(found))]
        bars = [x["auc"]["mean"] for x in found.values()]
        axes.bar(at, bars, width=0.38, color=color, label=kind, alpha=0.6)
        for x, each in zip(at, found.values(), strict=True):
            values = each["auc"]["values"]
            axes.scatter([x] * len(values), values, color=color, s=12, zorder=3)
    axes.axhline(figures["raw pixels"]["auc"], color=QUIET, linestyle="--", linewidth=1)
    axes.set_xticks(range(len(found)), list(found))
    axes.set_ylim(0.5, 1.05)  # 0.5 is chance; room for the legend above the bars
    axes.set_ylabel("ROC-AUC on real people")
    axes.set_title("One attribute varied at a time; dashed: raw pixels", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    axes.grid(alpha=0.25, axis="y")
    save(new, path)


def _page(results: Results, figures: dict[str, Any], command: str) -> str:
    config, held, pixels = results.config, results.held, results.pixels
    sections = []
    for key, title in (("accuracy", "Accuracy"), ("auc", "ROC-AUC")):
        rows = [
            [width, kind, *(shown(x[key]) for x in figures["sizes"][kind][width].values())]
            for width in map(str, config.identities)
            for kind in MIXUP
        ]
        head = ["identities", "", *(f"{n} images each" for n in config.images)]
        sections.append(f"{title}:\n\n{table(head, rows)}")
    gains = [
        _gain(figures["sizes"], str(width), str(depth))
        for width in config.identities
        for depth in config.images
    ]
    attributes = ""
    if config.attributes:
        rows = [
            [
                f"{name}: {MEANING[name]}",
                *(
                    shown(figures["attributes"][kind][name][key])
                    for key in ("accuracy", "auc")
                    for kind in MIXUP
                ),
            ]
            for name in config.attributes
        ]
        head = ["varied", *(f"{f}, {kind}" for f in ("accuracy", "ROC-AUC") for kind in MIXUP)]
        attributes = f"""
## One attribute at a time

{config.attribute_identities} identities with {config.attribute_images} images each; what is not
varied is held still. The embedded generator turns no heads and has no expressions: these are the
attributes that it has.

{table(head, rows)}

![ROC-AUC by attribute](study-attributes.png)
"""
    seeds = ", ".join(map(str, config.seeds))
    over = "Mean and standard deviation over the seeds" if len(config.seeds) > 1 else "One seed:"
    return f"""# Depth, width and attributes of generated faces: what came out

Written by `{command}`; none of the figures is typed in. Measured on {figures["machine"]}.

Networks trained on generated faces alone ({config.data.generator}), verified on {len(held)} real
images of {len(held.identities)} people ({held.source}): {pixels["genuine"]:,} genuine and
{pixels["impostor"]:,} impostor pairs. {over} {seeds}. Every cell trains for about as many steps as
the largest (epochs: {config.train.epochs}), on batches of {config.train.batch_size}. Raw
pixels have an accuracy of {pixels["accuracy"]:.4f} and a ROC-AUC of {pixels["auc"]:.4f}.

## Identities × images per identity

{sections[0]}

{sections[1]}

Identity mixup raised the mean ROC-AUC in {sum(g > 0 for g in gains)} of {len(gains)} cells, by
{sum(gains) / len(gains):+.4f} on average.

![ROC-AUC over identities and images per identity](study-sizes.png)
{attributes}
## Configuration

```toml
{to_toml(config)}```
"""


def _gain(sizes: dict[str, Any], width: str, depth: str) -> float:
    plain, mixed = (sizes[kind][width][depth]["auc"]["mean"] for kind in MIXUP)
    return mixed - plain
