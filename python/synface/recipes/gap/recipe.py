"""The gap between generated and real faces: what SynFace looks at first.

Networks are trained on generated faces of three strengths of variation, on a few real people, and
on N real people × S images mixed with the generated ones. One of them embeds real and generated
faces of people that it has not seen: their spread within and between identities, and one map.

Source: Qiu, Yu, Gong, Li, Liu, Tao, "SynFace: Face Recognition with Synthetic Data", ICCV 2021,
sections 3.1 and 4.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.check import check_integer, check_integers, check_number
from ...common.config import load_recipe
from ...data import Faces
from ...evaluation.embedding import embed
from ...reporting.page import table
from ...reporting.plots import ACCENT, INK, figure, finish, image_grid, save, styled
from ...synthesis.controls import Vary, controls_of
from ...synthesis.generators import FaceGenerator
from ...training.config import TrainConfig
from ...training.sources import FacesSource, Source
from ..generated import DatasetConfig, check_seeds, drawn_people
from ..report import (
    INTERVAL,
    difference,
    far_from_trained,
    plot_differences,
    plot_pixels,
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
    trained_network,
    verify_pixels,
)
from .embeddings import across, between, scaled, unpaired, within

KEYS = ("accuracy", "auc")


@dataclass(frozen=True)
class DataConfig(DatasetConfig):
    """The generated faces, and the real people to train and to verify on; see gap.toml."""

    keep_epochs: int = 1
    real_identities: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, real_identities=2)


@dataclass(frozen=True)
class GapConfig:
    """Configuration of the whole recipe, see gap.toml."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5)
    samples: tuple[int, ...] = (10, 2)
    pictured: int = 8
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        for strength in self.strengths:
            check_number("strengths", strength, 0.0)
        if 1 not in self.strengths or len(set(self.strengths)) < len(self.strengths):
            raise ValueError(
                "strengths must be different, and one of them 1, which the others are compared "
                f"with, got {list(self.strengths)}"
            )
        for count in self.samples:
            check_integer("samples", count, 1)
        if max(self.samples, default=0) < 2 or len(set(self.samples)) < len(self.samples):
            raise ValueError(
                f"samples must be different, and one of them at least 2, got {list(self.samples)}"
            )
        check_integers(self, pictured=2)

    @property
    def images(self) -> int:
        """Return the number of images of each person that are embedded."""
        return max(self.samples)


def load_config(file: Path | None = None, *, quick: bool = False) -> GapConfig:
    """Return a configuration from TOML, by default gap.toml; see `load_recipe`."""
    return load_recipe(GapConfig, Path(__file__).with_name("gap.toml"), file, quick)


# -- training runs -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The training data of a row.

    Attributes:
        strength: of the generated faces' variation; None: no generated faces.
        samples: images of each real person; None: no real people.
    """

    strength: float | None = None
    samples: int | None = None


SYNTHETIC = "synthetic, strength 1"  # the row that others are compared with


def rows(config: GapConfig) -> dict[str, Row]:
    """Return the rows by name."""
    found = {f"synthetic, strength {x:g}": Row(strength=x) for x in config.strengths}
    found |= {f"real, S = {count}": Row(samples=count) for count in config.samples}
    return found | {f"mixed, S = {count}": Row(1.0, count) for count in config.samples}


def cell_name(row: str, seed: int) -> str:
    """Return the name of a row's training run with a seed."""
    return f"{re.sub('[^a-zA-Z0-9.]+', '-', row)}-seed-{seed}"


def varied(generator: FaceGenerator, config: GapConfig, strength: float) -> FaceGenerator:
    """Return a face generator whose controls vary by a strength.

    Raises:
        ValueError: for a generator without controls.
    """
    known = controls_of(generator)
    if not known:
        raise ValueError(
            f"generator = {config.data.generator!r} names no controls, whose variation the "
            "strengths scale: say which columns of its input are which (columns)"
        )
    return Vary(generator, dict.fromkeys(config.data.controls or known, strength))


def first_images(people: Faces, count: int) -> Faces:
    """Return the first ``count`` images of each person, sorted by person.

    Raises:
        ValueError: for a person with fewer.
    """
    kept = []
    for label, name in enumerate(people.identities):
        images = (people.labels == label).nonzero()[:count, 0]
        if len(images) < count:
            raise ValueError(
                f"{people.source} must have {count} images or more of each person (samples), got "
                f"{len(images)} of {name}"
            )
        kept.append(images)
    index = torch.cat(kept)
    return replace(people, images=people.images[index], labels=people.labels[index])


def cells(config: GapConfig, generator: FaceGenerator, people: Faces) -> list[Cell]:
    """Return a cell for each seed and row, which is verified on the people left by the seed."""
    return [
        _cell(config, generator, people, name, row, seed)
        for seed in config.seeds
        for name, row in rows(config).items()
    ]


def _cell(
    config: GapConfig, generator: FaceGenerator, people: Faces, name: str, row: Row, seed: int
) -> Cell:
    data, training = config.data, replace(config.train, seed=seed)
    real, held = drawn_people(people, data.real_identities, seed)
    if row.samples is not None:
        real = first_images(real, row.samples)
    count, each = data.identities, data.images_per_identity
    images, called = count * each, cell_name(name, seed)
    if row.strength is None:
        steps = training.epochs * -(-images // training.batch_size)
        training = for_steps(training, len(real), steps)
        return Cell(called, training, partial(FacesSource, real), len(real), held=held)
    scaled_by = varied(generator, config, row.strength)
    others = None if row.samples is None else real

    def source() -> Source:
        keep = data.keep_epochs or None
        return generated_source(data, scaled_by, count, each, seed, False, others, keep)

    kept = images * data.keep_epochs or None
    return Cell(called, training, source, images, scaled_by, kept, held=held)


@dataclass(frozen=True, eq=False)
class Results(SweepResults):
    """The metrics of the recipe's training runs, and the embeddings of one network.

    Attributes:
        held: all real people; each seed's runs are verified on those that it does not train on.
        pixels: over the seeds, each on its own people.
        embeddings: (N, K, D) of people that the network has not seen: "real", and by strength.
        step: of the network's checkpoint.
    """

    config: GapConfig
    embeddings: Mapping[str, Tensor]
    step: int | None


def run(
    config: GapConfig,
    output: Path,
    *,
    resume: bool = False,
    only: str | None = None,
    progress: Bars | None = None,
    workers: int | None = 1,
) -> Results:
    """Train and verify all cells below ``output``, and embed; see `run_cells`."""
    generator, people = _opened(config)
    found = run_cells(
        cells(config, generator, people),
        people,
        output,
        resume=resume,
        only=only,
        progress=progress,
        workers=workers,
        open_cells=partial(_open_cells, config),
    )
    pixels: dict[str, Any] = {}
    embeddings: dict[str, Tensor] = {}
    step = None
    if only is None:
        held = [drawn_people(people, config.data.real_identities, seed)[1] for seed in config.seeds]
        each = [verify_pixels(others) for others in held]
        pixels = {key: spread([x[key] for x in each]) for key in KEYS}
        embeddings, step = _embedded(config, generator, held[0], output)
    took = run_times(output, found)
    return Results(config, generator, people, found, pixels, embeddings, step, took=took)


def _opened(config: GapConfig) -> tuple[FaceGenerator, Faces]:
    """Return the face generator and all real people, after checks."""
    # Three held-out people or more, for an interval of the distances between them.
    generator, people = open_faces(config.data, config.train, config.data.real_identities + 3)
    first_images(people, config.images)
    return generator, people


def _open_cells(config: GapConfig) -> tuple[list[Cell], Faces]:
    """Return the cells and the people, in a worker."""
    generator, people = _opened(config)
    return cells(config, generator, people), people


def network(config: GapConfig) -> str:
    """Return the row whose network of the first seed embeds faces; it has seen both domains."""
    return f"mixed, S = {config.images}"


def unseen_faces(
    config: GapConfig, generator: FaceGenerator, strength: float, count: int, images: int
) -> Tensor:
    """Return images (count, images, H, W, C) of identities that no seed trains on.

    Identities and styles are the same for every strength.
    """
    seed = max(config.seeds) + 1
    drawn = varied(generator, config, strength)
    source = generated_source(config.data, drawn, count, images, seed, mixup=False)
    return source.faces().images.unflatten(0, (count, images))


def _embedded(
    config: GapConfig, generator: FaceGenerator, held: Faces, output: Path
) -> tuple[dict[str, Tensor], int]:
    """Return the embeddings of real and of as many generated people, and the network's step."""
    run = output / cell_name(network(config), config.seeds[0])
    backbone, state = trained_network(run, config.train)
    count, images = len(held.identities), config.images
    faces = {"real": first_images(held, images).images}
    for strength in config.strengths:
        drawn = unseen_faces(config, generator, strength, count, images)
        faces[f"strength {strength:g}"] = drawn.flatten(0, 1)
    found = {name: embed(backbone, x).unflatten(0, (count, images)) for name, x in faces.items()}
    return found, state["step"]


# -- report --------------------------------------------------------------------------------------


def measured(results: Results) -> dict[str, Any]:
    """Return all numbers, for `json.dumps`: of rows over the seeds, differences, and embeddings."""
    config, found = results.config, {}
    for row in rows(config):
        found[row] = results.over_seeds(partial(cell_name, row), *KEYS, "loss", "top1")
    pairs = {f"{row} − {SYNTHETIC}": (row, SYNTHETIC) for row in found if row != SYNTHETIC}
    for count in config.samples:
        pair = f"mixed, S = {count}", f"real, S = {count}"
        pairs[" − ".join(pair)] = pair
    differences = {
        name: {key: difference(found[of][key], found[less][key]) for key in KEYS}
        for name, (of, less) in pairs.items()
    }
    real = results.embeddings["real"]
    faces = {
        name: {"within": within(x), "between": between(x)}
        | ({} if name == "real" else {"to real": across(x, real)})
        for name, x in results.embeddings.items()
    }
    wider = {
        name: {key: unpaired(x[key], faces["real"][key]) for key in ("within", "between")}
        | {"to real": unpaired(x["to real"], faces["real"]["between"])}
        for name, x in faces.items()
        if name != "real"
    }
    pictured = min(config.pictured, len(real))
    both = [results.embeddings[name][:pictured].flatten(0, 1) for name in ("real", "strength 1")]
    points, share = scaled(torch.cat(both))
    return {
        "rows": found,
        "differences": differences,
        "embeddings": faces,
        "above real": wider,
        "map": {"people": pictured, "share": share, "points": points.tolist()},
        "raw pixels": results.pixels,
    }


def write(results: Results, folder: Path, command: str, *, faces: bool = True) -> Path:
    """Write gap.md, gap.json and gap-*.png into a folder, and return the page.

    Args:
        command: the command line that the page names. faces: show some of the generated faces.
    """
    numbers = measured(results) | {"machine": results.machine()}
    figures = pictures(numbers)
    if faces:
        figures["faces"] = partial(_faces_plot, results)
    fields = results.fields() | _fields(results, numbers) | {"command": command}
    picture = "![generated faces at each strength](gap-faces.png)"
    fields["picture"] = picture if faces else ""
    template = Path(__file__).with_name("gap.md")
    return write_report(folder, template, numbers, figures, results.config, **fields)


def pictures(numbers: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
    """Return what draws the pictures of a report's numbers, by name."""
    return {
        "rows": partial(_rows_plot, numbers),
        "map": partial(_map_plot, numbers),
        "spread": partial(_spread_plot, numbers),
    }


def _rows_plot(numbers: Mapping[str, Any], path: Path) -> None:
    new, (above, below) = figure(8, 7.4, 2, 1)
    # Labels break at spaces, but not within "S = 10".
    aucs = {
        row.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"): found["auc"]
        for row, found in numbers["rows"].items()
    }
    plot_seeds(above, aucs, numbers["raw pixels"]["auc"]["mean"], "ROC-AUC")
    gains = {
        name.replace(" − ", " −\n"): found["auc"] for name, found in numbers["differences"].items()
    }
    plot_differences(below, gains, "difference in ROC-AUC")
    save(new, path)


@styled()
def _map_plot(numbers: Mapping[str, Any], path: Path) -> None:
    """Draw the map: a color for each person, and a marker for each domain."""
    points, people = np.array(numbers["map"]["points"]), numbers["map"]["people"]
    images = len(points) // (2 * people)
    who = np.tile(np.repeat(np.arange(people), images), 2)
    new, axes = figure(6.8, 5.8)
    half = people * images
    map_ = "tab10" if people <= 10 else "gist_rainbow"
    for part, marker, name in (
        (slice(half), "o", "real"),
        (slice(half, None), "^", "generated, strength 1"),
    ):
        x, y = points[part].T
        axes.scatter(x, y, c=who[part], cmap=map_, marker=marker)
        axes.plot([], [], marker, color=INK, label=name)  # for all people
    axes.set_aspect("equal", adjustable="datalim")
    title = f"Embeddings of {people} people of each domain, a color and {images} images each"
    finish(axes, title, "first axis of the map", "second axis of the map")
    save(new, path)


@styled()
def _spread_plot(numbers: Mapping[str, Any], path: Path) -> None:
    """Draw ROC-AUC against the spread within identities, and real faces' spread as a line."""
    new, axes = figure(6.8, 4.4)
    for name, faces in numbers["embeddings"].items():
        if name == "real":
            continue
        within, auc = faces["within"], numbers["rows"][f"synthetic, {name}"]["auc"]
        at = within["mean"], auc["mean"]
        bars = {"xerr": within["ci95"], "yerr": auc["ci95"]}
        axes.errorbar(*at, **bars, color=ACCENT, marker="o", linestyle="", label=INTERVAL)
        axes.annotate(name, at, (6, 6), textcoords="offset points")
    real = numbers["embeddings"]["real"]["within"]
    low, high = real["mean"] - real["ci95"], real["mean"] + real["ci95"]
    axes.axvline(real["mean"], color=INK, label="spread of real faces")
    axes.axvspan(low, high, color=INK, alpha=0.1, linewidth=0, label="its 95 % interval")
    plot_pixels(axes, numbers["raw pixels"]["auc"]["mean"])
    x = "spread of the training faces: mean cosine distance to their identity's center"
    title = "Accuracy against the spread of generated training faces"
    finish(axes, title, x, "ROC-AUC on real people")
    save(new, path)


def _faces_plot(results: Results, path: Path, people: int = 2, images: int = 10) -> None:
    grid, names = [], []
    for strength in results.config.strengths:
        drawn = unseen_faces(results.config, results.generator, strength, people, images)
        grid += list(drawn.numpy())
        names += [f"{strength:g}: person {i + 1}" for i in range(people)]
    image_grid(grid, names, "Generated faces at each strength, in the same styles", path)


def _fields(results: Results, numbers: dict[str, Any]) -> dict[str, Any]:
    config, pixels = results.config, numbers["raw pixels"]
    verified = table(
        ["trained on", "accuracy", "ROC-AUC", "training top-1, last epoch"],
        [
            [row, *(shown(x[key]) for key in KEYS), shown(x["top1"], 3)]
            for row, x in numbers["rows"].items()
        ]
        + [["raw pixels, no training", *(shown(pixels[key]) for key in KEYS), "–"]],
    )
    compared = table(
        ["difference, seed by seed", "accuracy", "ROC-AUC", "the first one's ROC-AUC is"],
        [
            [name, *(shown_difference(x[key]) for key in KEYS), verdict(x["auc"])]
            for name, x in numbers["differences"].items()
        ],
    )
    faces, above = numbers["embeddings"], numbers["above real"]
    head = [
        "faces",
        "within identities",
        "less that of real faces",
        "it is",
        "between identities",
        "to real identities",
    ]
    spreads = table(
        head,
        [
            [
                name,
                shown(x["within"]),
                *(
                    [shown_difference(above[name]["within"]), verdict(above[name]["within"])]
                    if name in above
                    else ["–", "–"]
                ),
                shown(x["between"]),
                shown(x["to real"]) if "to real" in x else "–",
            ]
            for name, x in faces.items()
        ],
    )
    first = results.cells[cell_name(SYNTHETIC, config.seeds[0])]
    people = len(results.held.identities)
    return {
        "verified": verified,
        "compared": compared,
        "spreads": spreads,
        "conclusions": _conclusions(config, numbers),
        "network": f"{network(config)}, seed {config.seeds[0]}",
        "steps": results.step,
        "others": people - config.data.real_identities,
        "genuine": first["genuine"],
        "impostor": first["impostor"],
        "controls": ", ".join(config.data.controls or controls_of(results.generator)),
    }


def _conclusions(config: GapConfig, numbers: dict[str, Any]) -> str:
    """Return what the differences' intervals say, as a Markdown list."""
    lines = []
    for name, found in numbers["differences"].items():
        of, less = name.split(" − ")
        lines.append(f"- ROC-AUC of *{of}* against *{less}*: {verdict(found['auc'])}.")
    for name, found in numbers["above real"].items():
        lines.append(
            f"- Spread within identities at {name} against real faces: {verdict(found['within'])}."
        )
    for name, found in numbers["above real"].items():
        lines.append(
            f"- Distance of identities at {name} to real ones, against that between real ones: "
            f"{verdict(found['to real'])}."
        )
    if sentence := far_from_trained(numbers["rows"]):
        lines += ["", sentence]
    return "\n".join(lines)
