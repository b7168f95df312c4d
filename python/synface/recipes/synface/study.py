"""SynFace's study of the number of identities, the images per identity, and each attribute.

Networks trained on generated faces alone, with and without identity mixup, are verified on real
people: over identities × images per identity, and with one attribute of the embedded generator
varied at a time, the others fixed. Every cell trains for the same number of steps.

Source: Qiu et al., "SynFace", ICCV 2021, section 4.3, which varies expression, pose and light of
its own generator; the embedded one has other attributes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...common.check import check_integer
from ...common.config import load_recipe
from ...data import Faces
from ...reporting.page import table
from ...reporting.plots import ACCENT, INK, QUIET, figure, finish, save
from ...synthesis.generators import FaceGenerator
from ...training.config import TrainConfig
from ..generated import EIGENFACES, FacesConfig, check_choices, check_seeds
from ..report import shown, write_report
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

# For each attribute, the indices of its numbers in an eigenface's style; see `restyle`.
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
    """Configuration of the study, see study.toml."""

    seeds: tuple[int, ...] = (0,)
    identities: tuple[int, ...] = (1_000, 2_000, 5_000, 10_000)
    images: tuple[int, ...] = (1, 5, 20, 50)
    attributes: tuple[str, ...] = tuple(ATTRIBUTES)
    attribute_identities: int = 5_000
    attribute_images: int = 50
    data: FacesConfig = field(default_factory=FacesConfig)
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
                raise ValueError(f"{name} must be increasing and not empty, got {list(values)}")
        check_choices("attributes", self.attributes, ATTRIBUTES, 0)
        if self.attributes and self.data.generator != EIGENFACES:
            raise ValueError(
                f"attributes are defined for {EIGENFACES} only: leave them empty ([]) for "
                f"{self.data.generator}"
            )


def load_config(file: Path | None = None, *, quick: bool = False) -> StudyConfig:
    """Return a configuration from TOML, by default study.toml; see `load_recipe`."""
    return load_recipe(StudyConfig, Path(__file__).with_name("study.toml"), file, quick)


class OneAttribute:
    """A generator of eigenfaces whose styles vary in a single attribute."""

    def __init__(self, generator: FaceGenerator, attribute: str) -> None:
        self.generator, self.attribute = generator, attribute
        self.embedding_size, self.style_size = generator.embedding_size, generator.style_size
        self.image_shape = generator.image_shape
        self.description = generator.description | {"varied": attribute}
        self._varied = torch.zeros(generator.style_size, dtype=torch.bool, device="cpu")
        self._varied[list(ATTRIBUTES[attribute])] = True

    def generate(self, embedding: Tensor, style: Tensor, seed: Tensor) -> Tensor:
        """Return images as `FaceGenerator.generate` does."""
        return self.generator.generate(embedding, torch.where(self._varied, style, STILL), seed)


def size_name(width: int, depth: int, mixed: bool, seed: int) -> str:
    """Return the name of a training run on ``width`` identities with ``depth`` images each."""
    return f"{width}x{depth}{'-mixup' if mixed else ''}-seed-{seed}"


def attribute_name(attribute: str, mixed: bool, seed: int) -> str:
    """Return the name of a training run on faces that vary in one attribute."""
    return f"{attribute}{'-mixup' if mixed else ''}-seed-{seed}"


def cells(config: StudyConfig, generator: FaceGenerator) -> list[Cell]:
    """Return a cell for each seed, size or attribute, without and with identity mixup."""
    found = []
    largest = max(config.identities) * max(config.images)
    steps = config.train.epochs * -(-largest // config.train.batch_size)

    def add(
        name: str, generator: FaceGenerator, width: int, depth: int, mixed: bool, seed: int
    ) -> None:
        training = replace(for_steps(config.train, width * depth, steps), seed=seed)
        source = partial(generated_source, config.data, generator, width, depth, seed, mixed)
        found.append(Cell(name, training, source, width * depth, generator))

    few, images = config.attribute_identities, config.attribute_images
    for seed in config.seeds:
        for mixed in (False, True):
            for width in config.identities:
                for depth in config.images:
                    add(size_name(width, depth, mixed, seed), generator, width, depth, mixed, seed)
            for attribute in config.attributes:
                name = attribute_name(attribute, mixed, seed)
                add(name, OneAttribute(generator, attribute), few, images, mixed, seed)
    return found


@dataclass(frozen=True, eq=False)
class Results(SweepResults):
    """The metrics of the study's training runs."""

    config: StudyConfig


def run(
    config: StudyConfig,
    output: Path,
    *,
    resume: bool = False,
    only: str | None = None,
    progress: Bars | None = None,
    workers: int | None = 1,
) -> Results:
    """Train and verify all cells below ``output``; options and errors are those of `run_cells`."""
    generator, held = open_faces(config.data, config.train, 2)
    pixels = verify_pixels(held)
    found = run_cells(
        cells(config, generator),
        held,
        output,
        resume=resume,
        only=only,
        progress=progress,
        workers=workers,
        open_cells=partial(_open_cells, config),
    )
    return Results(config, generator, held, found, pixels, took=run_times(output, found))


def _open_cells(config: StudyConfig) -> tuple[list[Cell], Faces]:
    """Return the cells and the people to verify on, in a worker."""
    generator, held = open_faces(config.data, config.train, 2)
    return cells(config, generator), held


# -- report --------------------------------------------------------------------------------------

MIXUP = {"plain": False, "identity mixup": True}


def measured(results: Results) -> dict[str, Any]:
    """Return all numbers, for `json.dumps`: by kind and cell, over the seeds."""
    config, keys = results.config, ("accuracy", "auc", "top1")
    sizes = {
        kind: {
            str(width): {
                str(depth): results.over_seeds(partial(size_name, width, depth, mixed), *keys)
                for depth in config.images
            }
            for width in config.identities
        }
        for kind, mixed in MIXUP.items()
    }
    attributes = {
        kind: {
            attribute: results.over_seeds(partial(attribute_name, attribute, mixed), *keys)
            for attribute in config.attributes
        }
        for kind, mixed in MIXUP.items()
    }
    return {"sizes": sizes, "attributes": attributes, "raw pixels": results.pixels}


def write(results: Results, folder: Path, command: str) -> Path:
    """Write study.md, study.json and study-*.png into a folder, and return the page.

    Args:
        command: the command line that the page names.
    """
    numbers = measured(results) | {"machine": results.machine()}
    figures = {"sizes": partial(_sizes_plot, results.config, numbers)}
    if results.config.attributes:
        figures["attributes"] = partial(_attributes_plot, numbers)
    fields = results.fields() | _fields(results.config, numbers) | {"command": command}
    template = Path(__file__).with_name("study.md")
    return write_report(folder, template, numbers, figures, results.config, **fields)


def _sizes_plot(config: StudyConfig, numbers: dict[str, Any], path: Path) -> None:
    new, axes = figure(9, 3.6, 1, 2, sharey=True)
    shades = [QUIET, INK, ACCENT]
    for ax, (kind, widths) in zip(axes, numbers["sizes"].items(), strict=True):
        for i, (width, depths) in enumerate(widths.items()):
            ax.plot(
                config.images,
                [x["auc"]["mean"] for x in depths.values()],
                marker="o",
                color=shades[i % 3],
                linestyle=("-", "--", ":")[i // 3 % 3],
                label=f"{width} identities",
            )
        ax.axhline(numbers["raw pixels"]["auc"], color=QUIET, linestyle="--", linewidth=1)
        ax.set_xscale("log", base=2)
        ax.set_xticks(config.images, [str(n) for n in config.images])
        finish(ax, f"{kind.capitalize()}; dashed: raw pixels", "images per identity")
    axes[0].set_ylabel("ROC-AUC on real people")
    save(new, path)


def _attributes_plot(numbers: dict[str, Any], path: Path) -> None:
    new, axes = figure(6.8, 3.6)
    for offset, color, (kind, found) in zip(
        (-0.2, 0.2), (INK, ACCENT), numbers["attributes"].items(), strict=True
    ):
        at = [i + offset for i in range(len(found))]
        bars = [x["auc"]["mean"] for x in found.values()]
        axes.bar(at, bars, width=0.38, color=color, label=kind, alpha=0.6)
        for x, each in zip(at, found.values(), strict=True):
            values = each["auc"]["values"]
            axes.scatter([x] * len(values), values, color=color, s=12, zorder=3)
    axes.axhline(numbers["raw pixels"]["auc"], color=QUIET, linestyle="--", linewidth=1)
    axes.set_xticks(range(len(found)), list(found))
    axes.set_ylim(0.5, 1.05)  # 0.5 is chance; room for the legend above the bars
    title = "One attribute varied at a time; dashed: raw pixels"
    finish(axes, title, y="ROC-AUC on real people", grid="y", loc="upper left", ncols=2)
    save(new, path)


def _fields(config: StudyConfig, numbers: dict[str, Any]) -> dict[str, Any]:
    sizes = numbers["sizes"]
    head = ["identities", "", *(f"{n} images each" for n in config.images)]
    tables = {
        key: table(
            head,
            [
                [width, kind, *(shown(x[key]) for x in sizes[kind][width].values())]
                for width in map(str, config.identities)
                for kind in MIXUP
            ],
        )
        for key in ("accuracy", "auc")
    }
    plain, mixed = (
        [x["auc"]["mean"] for depths in sizes[kind].values() for x in depths.values()]
        for kind in MIXUP
    )
    gains = [b - a for a, b in zip(plain, mixed, strict=True)]
    attributes = "No attribute was varied."
    if config.attributes:
        rows = [
            [
                f"{name}: {MEANING[name]}",
                *(
                    shown(numbers["attributes"][kind][name][key])
                    for key in ("accuracy", "auc")
                    for kind in MIXUP
                ),
            ]
            for name in config.attributes
        ]
        head = ["varied", *(f"{f}, {kind}" for f in ("accuracy", "ROC-AUC") for kind in MIXUP)]
        attributes = f"{table(head, rows)}\n\n![ROC-AUC by attribute](study-attributes.png)"
    over = "Mean ± 95 % interval over the seeds" if len(config.seeds) > 1 else "One seed:"
    return tables | {
        "over": over,
        "better": sum(gain > 0 for gain in gains),
        "cells": len(gains),
        "gain": sum(gains) / len(gains),
        "attributes": attributes,
    }
