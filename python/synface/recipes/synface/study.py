"""SynFace's study of the number of identities, the images per identity, and each attribute.

Networks trained on generated faces alone are verified on real people: over identities × images per
identity, and with one control of the face generator varied at a time, the others neutral, with and
without identity mixup.

Source: Qiu et al., "SynFace", ICCV 2021, section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...common.check import check_integer
from ...common.config import load_recipe
from ...data import Faces
from ...reporting.page import table
from ...reporting.plots import ACCENT, INK, figure, finish, save, styled
from ...synthesis.controls import Vary, check_controls, controls_of
from ...synthesis.generators import FaceGenerator
from ...training.config import TrainConfig
from ..generated import FacesConfig, check_seeds
from ..report import (
    INTERVAL,
    difference,
    far_from_trained,
    plot_differences,
    plot_pixels,
    plot_spread,
    shown,
    shown_difference,
    slope,
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

NONE, ALL = "none", "all"  # attributes beside the generator's controls
MIXUP = {"plain": False, "identity mixup": True}
KEYS = ("accuracy", "auc")
REAL = "ROC-AUC on real people"


@dataclass(frozen=True)
class StudyConfig:
    """Configuration of the study, see study.toml.

    Attributes:
        seeds, attribute_seeds: random seeds of the sizes, and of the attributes; the latter are by
            default the former.
        identities, images: numbers of identities, and of images of each; every pair is a size.
        total: only sizes with this number of images; 0: all.
        target_top1: training accuracy to reach at each size, in at most ``max_steps`` steps; 0: all
            train for the same number of steps. size_mixup: train each size with identity mixup too.
        attributes: "none", controls of the face generator, and "all" of these.
        attribute_identities, attribute_images, attribute_steps: size and number of steps of the
            attributes' training runs; 0 steps: those of the sizes.
        keep_epochs: of mixed identities, see `GeneratedSource`; 0: generate each epoch anew.
    """

    seeds: tuple[int, ...] = (0,)
    attribute_seeds: tuple[int, ...] = ()
    identities: tuple[int, ...] = (1_000, 2_000, 5_000, 10_000)
    images: tuple[int, ...] = (1, 5, 20, 50)
    total: int = 0
    target_top1: float = 0.0
    max_steps: int = 0
    size_mixup: bool = True
    attributes: tuple[str, ...] = (NONE, "expression", "pose", "light", ALL)
    attribute_identities: int = 5_000
    attribute_images: int = 50
    attribute_steps: int = 0
    keep_epochs: int = 0
    data: FacesConfig = field(default_factory=FacesConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        check_seeds(self.seeds_of_attributes)
        for name, values, least in (
            ("identities", self.identities, 2),
            ("images", self.images, 1),
            ("attribute_identities", (self.attribute_identities,), 2),
            ("attribute_images", (self.attribute_images,), 1),
            ("attribute_steps", (self.attribute_steps,), 0),
            ("keep_epochs", (self.keep_epochs,), 0),
            ("total", (self.total,), 0),
            ("max_steps", (self.max_steps,), 0),
        ):
            for value in values:
                check_integer(name, value, least)
            if not values or list(values) != sorted(set(values)):
                raise ValueError(f"{name} must be increasing and not empty, got {list(values)}")
        if not 0 <= self.target_top1 <= 1:
            raise ValueError(f"target_top1 must be in [0, 1], got {self.target_top1}")
        if self.target_top1 and (self.size_mixup or not self.max_steps):
            raise ValueError(
                "target_top1 needs max_steps ≥ 1, and size_mixup = false: mixed images have no "
                f"training accuracy; got max_steps {self.max_steps}, size_mixup {self.size_mixup}"
            )
        if not self.sizes:
            raise ValueError(f"total must be a number of images of a size, got {self.total}")
        if len(set(self.attributes)) < len(self.attributes):
            raise ValueError(f"attributes must be distinct, got {list(self.attributes)}")

    @property
    def seeds_of_attributes(self) -> tuple[int, ...]:
        """Return the seeds of the attributes' training runs."""
        return self.attribute_seeds or self.seeds

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Return identities and images of each size."""
        every = [(width, depth) for width in self.identities for depth in self.images]
        return [(w, d) for w, d in every if self.total in (0, w * d)]

    @property
    def size_kinds(self) -> dict[str, bool]:
        """Return by kind whether identities are mixed, for the sizes."""
        return MIXUP if self.size_mixup else {"plain": False}


def load_config(file: Path | None = None, *, quick: bool = False) -> StudyConfig:
    """Return a configuration from TOML, by default study.toml; see `load_recipe`."""
    return load_recipe(StudyConfig, Path(__file__).with_name("study.toml"), file, quick)


def one_attribute(generator: FaceGenerator, attribute: str) -> FaceGenerator:
    """Return a generator that varies one control of another one, or none, or all of them.

    Raises:
        ValueError: for a control that it lacks.
    """
    names = {NONE: (), ALL: tuple(controls_of(generator))}.get(attribute, (attribute,))
    check_controls("attributes", names, generator)
    return Vary(generator, names)


def size_name(width: int, depth: int, mixed: bool, seed: int) -> str:
    """Return the name of a training run on ``width`` identities with ``depth`` images each."""
    return f"{width}x{depth}{'-mixup' if mixed else ''}-seed-{seed}"


def attribute_name(attribute: str, mixed: bool, seed: int) -> str:
    """Return the name of a training run on faces that vary in one attribute."""
    return f"{attribute}{'-mixup' if mixed else ''}-seed-{seed}"


def cells(
    config: StudyConfig, generator: FaceGenerator, whole: FaceGenerator | None = None
) -> list[Cell]:
    """Return a cell for each seed, size or attribute, without and with identity mixup.

    Args:
        generator: of the sizes. whole: of the attributes, with all controls; None: the same.
    """
    found = []
    batch = config.train.batch_size
    steps = config.train.epochs * -(-max(w * d for w, d in config.sizes) // batch)

    def add(
        name: str,
        generator: FaceGenerator,
        size: tuple[int, int],
        mixed: bool,
        seed: int,
        steps: int,
        target: float = 0.0,
    ) -> None:
        count = size[0] * size[1]
        training = replace(for_steps(config.train, count, steps), seed=seed)
        keep = min(config.keep_epochs, training.epochs if mixed else 1) or None
        source = partial(
            generated_source, config.data, generator, *size, seed, mixed, keep_epochs=keep
        )
        found.append(
            Cell(
                name,
                training,
                source,
                count,
                generator,
                None if keep is None else keep * count,
                target or None,
                config.max_steps if target else None,
            )
        )

    for seed in config.seeds:
        for mixed in config.size_kinds.values():
            for size in config.sizes:
                target = config.target_top1
                add(size_name(*size, mixed, seed), generator, size, mixed, seed, steps, target)
    size = config.attribute_identities, config.attribute_images
    steps = config.attribute_steps or steps
    for seed in config.seeds_of_attributes:
        for mixed in MIXUP.values():
            for attribute in config.attributes:
                varied = one_attribute(whole or generator, attribute)
                add(attribute_name(attribute, mixed, seed), varied, size, mixed, seed, steps)
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
        _cells(config, generator),
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
    return _cells(config, generator), held


def _cells(config: StudyConfig, generator: FaceGenerator) -> list[Cell]:
    """Return all cells; attributes are varied in the generator whose controls the sizes hold."""
    return cells(config, generator, generator.generator if isinstance(generator, Vary) else None)


# -- report --------------------------------------------------------------------------------------


def measured(results: Results) -> dict[str, Any]:
    """Return all numbers, for `json.dumps`: by kind and cell, over the seeds, and differences.

    Sizes are compared with that of the fewest identities, attributes with "none", and identity
    mixup with its absence.
    """
    config = results.config
    sizes = {
        kind: {
            f"{width}x{depth}": _over(
                results, config.seeds, partial(size_name, width, depth, mixed)
            )
            for width, depth in config.sizes
        }
        for kind, mixed in config.size_kinds.items()
    }
    attributes = {
        kind: {
            name: _over(results, config.seeds_of_attributes, partial(attribute_name, name, mixed))
            for name in config.attributes
        }
        for kind, mixed in MIXUP.items()
    }
    return {
        "sizes": sizes,
        "attributes": attributes,
        "differences": {
            "sizes": {kind: _above(found, next(iter(found))) for kind, found in sizes.items()},
            "per doubling of identities": {
                kind: _per_doubling(config, found)
                for kind, found in sizes.items()
                if config.total and len(found) > 1
            },
            "attributes": {
                kind: _above(found, NONE) if NONE in found else {}
                for kind, found in attributes.items()
            },
            "identity mixup, sizes": _mixup_gain(sizes),
            "identity mixup, attributes": _mixup_gain(attributes),
        },
        "raw pixels": results.pixels,
    }


def _over(results: Results, seeds: tuple[int, ...], name: Any) -> dict[str, Any]:
    """Return the spreads of a cell's metrics, and whether all reached the training accuracy."""
    found = [results.cells[name(seed)] for seed in seeds]
    spreads = {key: spread([x[key] for x in found]) for key in (*KEYS, "top1", "steps")}
    if "reached" in found[0]:
        spreads["reached"] = sum(x["reached"] for x in found)
    return spreads


def _above(found: Mapping[str, Any], base: str) -> dict[str, Any]:
    return {
        name: {key: difference(x[key], found[base][key]) for key in KEYS}
        for name, x in found.items()
        if name != base
    }


def _per_doubling(config: StudyConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the slopes of the metrics over the logarithm of the number of identities."""
    doublings = [math.log2(width) for width, _ in config.sizes]
    return {key: slope([x[key] for x in found.values()], doublings) for key in KEYS}


def _mixup_gain(kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    if len(kinds) < 2:
        return {}
    plain, mixed = kinds.values()
    return {
        name: {key: difference(mixed[name][key], x[key]) for key in KEYS}
        for name, x in plain.items()
    }


def write(results: Results, folder: Path, command: str) -> Path:
    """Write study.md, study.json and study-*.png into a folder, and return the page.

    Args:
        command: the command line that the page names.
    """
    numbers = measured(results) | {"machine": results.machine()}
    fields = results.fields() | _fields(results.config, numbers) | {"command": command}
    template = Path(__file__).with_name("study.md")
    return write_report(folder, template, numbers, pictures(numbers), results.config, **fields)


def pictures(numbers: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
    """Return what draws the pictures of a report's numbers, by name."""
    found: dict[str, Callable[[Path], None]] = {"sizes": partial(_sizes_plot, numbers)}
    if any(numbers["attributes"].values()):
        found["attributes"] = partial(_attributes_plot, numbers)
    return found


@styled()
def _sizes_plot(numbers: Mapping[str, Any], path: Path) -> None:
    """Draw ROC-AUC over the sizes, and the differences to the first one."""
    new, axes = figure(9.5, 4, 1, 2)
    names = {name: name.replace("x", " × ") for name in numbers["sizes"]["plain"]}
    _plot_kinds(axes[0], numbers["sizes"], numbers["raw pixels"]["auc"])
    axes[0].set_xticks(range(len(names)), [name.replace("× ", "\n× ") for name in names.values()])
    finish(axes[0], "ROC-AUC by size", "identities × images of each", REAL, grid="y")
    first, *_ = names.values()
    compared = numbers["differences"]["sizes"]["plain"]
    aucs = {names[name]: x["auc"] for name, x in compared.items()}
    plot_differences(axes[1], aucs, f"ROC-AUC above {first}", y="identities × images of each")
    save(new, path)


@styled()
def _attributes_plot(numbers: Mapping[str, Any], path: Path) -> None:
    """Draw ROC-AUC by attribute, the differences to none, and what identity mixup gains."""
    new, axes = figure(7.2, 9, 3, 1)
    _plot_kinds(axes[0], numbers["attributes"], numbers["raw pixels"]["auc"])
    varied = list(numbers["attributes"]["plain"])
    axes[0].set_xticks(range(len(varied)), varied)
    finish(axes[0], "ROC-AUC by attribute", "attribute varied", REAL, grid="y")
    differences = numbers["differences"]
    for ax, title, label, found in (
        (axes[1], "", "ROC-AUC above none, without mixup", differences["attributes"]["plain"]),
        (
            axes[2],
            "What identity mixup gains, seed by seed",
            "ROC-AUC with identity mixup above without",
            differences["identity mixup, attributes"],
        ),
    ):
        aucs = {name: x["auc"] for name, x in found.items()}
        plot_differences(ax, aucs, label, title, "attribute varied")
    save(new, path)


def _plot_kinds(axes: Any, kinds: Mapping[str, Mapping[str, Any]], pixels: float) -> None:
    """Draw the ROC-AUCs of several kinds of training data side by side, a color each."""
    for index, ((kind, found), color) in enumerate(zip(kinds.items(), (ACCENT, INK), strict=False)):
        for i, each in enumerate(found.values()):
            at = i + 0.35 * (index - (len(kinds) - 1) / 2)
            label = f"{kind}: {INTERVAL}" if len(kinds) > 1 else INTERVAL
            plot_spread(axes, at, each["auc"], gap=0.07, color=color, label=label)
    plot_pixels(axes, pixels)


def _fields(config: StudyConfig, numbers: dict[str, Any]) -> dict[str, Any]:
    return {
        "controls": ", ".join(config.data.controls) or "all",
        "attribute_seeds": ", ".join(map(str, config.seeds_of_attributes)),
        "trained": _trained(config),
        "sizes": _sizes_text(config, numbers),
        "attributes": _attributes_text(config, numbers),
    }


def _trained(config: StudyConfig) -> str:
    if not config.target_top1:
        return "Every size trains for about as many steps as the largest"
    return (
        f"Each network is trained until its training accuracy in an epoch reaches "
        f"{config.target_top1:g}: again from the start with half more epochs while it does not, up "
        f"to {config.max_steps:,} steps"
    )


def _sizes_text(config: StudyConfig, numbers: dict[str, Any]) -> str:
    rows = []
    for kind, found in numbers["sizes"].items():
        for name, x in found.items():
            reached = f"{x['reached']} of {len(config.seeds)}" if "reached" in x else "–"
            steps = f"{x['steps']['mean']:.0f}"
            cells = [shown(x["top1"], 3), steps, reached]
            rows.append([name, kind, *(shown(x[key]) for key in KEYS), *cells])
    head = ["identities × images", "", "accuracy", "ROC-AUC", "training top-1", "steps, mean"]
    text = [table([*head, "accuracy reached"], rows)]
    base = next(iter(numbers["sizes"]["plain"]))
    for kind, found in numbers["differences"]["sizes"].items():
        if not found:
            continue
        text.append(_compared(f"{kind}, above {base}", found))
    if trends := numbers["differences"]["per doubling of identities"]:
        text.append(
            f"With {config.total:,} images in all, per doubling of the number of identities: the "
            "slope of each seed's line through all sizes."
        )
        text.append(_compared("per doubling of identities", trends))
    if gains := numbers["differences"]["identity mixup, sizes"]:
        text.append(_compared("identity mixup above plain", gains))
    return "\n\n".join(text)


def _attributes_text(config: StudyConfig, numbers: dict[str, Any]) -> str:
    if not config.attributes:
        return "No attribute was varied."
    kinds = numbers["attributes"]
    titles = ("accuracy", "ROC-AUC", "training top-1")
    head = ["varied", *(f"{title}, {kind}" for title in titles for kind in MIXUP)]
    shows = [(key, 4) for key in KEYS] + [("top1", 3)]
    rows = [
        [name, *(shown(kinds[kind][name][key], digits) for key, digits in shows for kind in MIXUP)]
        for name in config.attributes
    ]
    text = [table(head, rows)]
    for kind, found in numbers["differences"]["attributes"].items():
        if found:
            text.append(_compared(f"{kind}, above none", found))
    gains = numbers["differences"]["identity mixup, attributes"]
    text.append(_compared("identity mixup above plain", gains))
    of_kinds = {
        f"{name}, {kind}": kinds[kind][name] for name in config.attributes for kind in MIXUP
    }
    if sentence := far_from_trained(of_kinds):
        text.append(sentence)
    return "\n\n".join([*text, "![ROC-AUC by attribute](study-attributes.png)"])


def _compared(title: str, found: Mapping[str, Any]) -> str:
    """Return a table of paired differences."""
    rows = [
        [name, *(shown_difference(x[key]) for key in KEYS), verdict(x["auc"])]
        for name, x in found.items()
    ]
    return table([title, "accuracy", "ROC-AUC", "ROC-AUC is"], rows)
