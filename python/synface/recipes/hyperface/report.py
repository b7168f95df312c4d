"""The report of the HyperFace recipe: distances, accuracies, and what their intervals tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...reporting.page import table
from ...reporting.plots import REFERENCE, colors, figure, finish, image_grid, save, styled
from ...synthesis import packing
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
from .recipe import RECOGNIZER, Results, cell_name, neutral_faces

METRICS = ("accuracy", "auc")
# Statistics of the nearest identities, by where they are measured.
DISTANCE = " distance of the faces, gray levels"
COSINES = ("", " of the faces", " of the faces in the recognizer")
KEYS = (
    *(f"{statistic} cosine{place}" for place in COSINES for statistic in ("worst", "mean nearest")),
    *(f"{statistic}{DISTANCE}" for statistic in ("smallest", "mean nearest")),
)


MEANINGS = {
    "random": "drawn uniformly on the sphere.",
    "packed": "far apart on the sphere ({0.objective}, {0.steps} steps).",
    "packed, gallery": "likewise, with HyperFace's gallery term (α = {0.alpha}), which keeps them "
    "near {0.gallery:,} random identities.",
    "packed by faces": "of {0.candidates} random candidates for each identity, those whose faces "
    "are far apart, by greedy farthest-point selection on the distance of their pixels.",
}


def measured(results: Results) -> dict[str, Any]:
    """Return all numbers, for `json.dumps`: by kind over the seeds, and each less the first."""
    data = results.config.data
    first, *others = results.config.kinds
    numbers: dict[str, Any] = {}
    for kind in results.config.kinds:
        values = [
            [float(statistic(x)) for x in cosines[kind]]
            for cosines in (results.cosines, results.face_cosines, results.recognizer_cosines)
            for statistic in (torch.max, torch.mean)
        ]
        distances = results.face_distances[kind]
        values += [[float(f(x)) for x in distances] for f in (torch.min, torch.mean)]
        numbers[kind] = dict(zip(KEYS, map(spread, values), strict=True))
        name = partial(cell_name, kind)
        numbers[kind] |= results.over_seeds(name, *METRICS, "loss", "top1")
    for kind in others:
        numbers[f"{kind} less {first}"] = {
            key: difference(numbers[kind][key], numbers[first][key]) for key in (*METRICS, *KEYS)
        }
    bound = packing.bounds.best(data.identities, data.embedding_size)
    numbers["bound"] = {"cosine": bound.cosine, "name": bound.name}
    recognizer = results.cells[RECOGNIZER]
    return numbers | {RECOGNIZER: recognizer, "raw pixels": results.pixels}


def write(results: Results, folder: Path, command: str, *, faces: bool = True) -> Path:
    """Write hyperface.md, hyperface.json and hyperface-*.png into a folder, and return the page.

    Args:
        command: the command line that the page names. faces: show some faces of each kind.
    """
    numbers = measured(results) | {"machine": results.machine()}
    figures = {"distances": partial(_distances_plot, results, numbers)} | pictures(numbers)
    if faces:
        figures["faces"] = partial(_faces_plot, results)
    fields = results.fields() | _fields(results, numbers) | {"command": command}
    picture = "![faces of each kind in the neutral style](hyperface-faces.png)"
    fields["picture"] = picture if faces else ""
    template = Path(__file__).with_name("hyperface.md")
    return write_report(folder, template, numbers, figures, results.config, **fields)


def conclusions(numbers: Mapping[str, Any], first: str, others: list[str]) -> str:
    """Return what the intervals of the differences to the first kind tell, in Markdown."""
    lines = []
    verdicts = {}
    for kind in others:
        less = numbers[f"{kind} less {first}"]
        auc, accuracy = (_with_verdict(less[key]) for key in ("auc", "accuracy"))
        cosine = _with_verdict(less[f"mean nearest cosine{COSINES[-1]}"])
        distance = _with_verdict(less[f"mean nearest{DISTANCE}"], 2)
        lines.append(
            f"- {kind}, against {first}: ROC-AUC {auc}; accuracy {accuracy}. "
            f"Distance of the nearest faces in gray levels {distance}; cosine of the "
            f"nearest faces in the recognizer {cosine}."
        )
        verdicts[kind] = verdict(less["auc"])
    lines.append("")
    for word in ("higher", "lower"):
        which = [f"“{kind}”" for kind, found in verdicts.items() if found == word]
        count = " and ".join(which) if which else "No kind"
        verb = "have" if len(which) > 1 else "has"
        lines.append(f"{count} {verb} a {word} ROC-AUC than “{first}”, by the 95 % interval.")
    if any(numbers[f"{kind} less {first}"]["auc"]["ci95"] is None for kind in others):
        lines[-2:] = ["One seed has no interval: nothing is concluded."]
    if sentence := far_from_trained({kind: numbers[kind] for kind in (first, *others)}):
        lines += ["", sentence]
    return "\n".join(lines)


def _with_verdict(found: Mapping[str, Any], digits: int = 4) -> str:
    """Return the verdict on a difference, with its numbers."""
    word = "" if found["ci95"] is None else f"{verdict(found)} "
    return f"{word}({shown_difference(found, digits)})"


@styled()
def _distances_plot(results: Results, numbers: Mapping[str, Any], path: Path) -> None:
    kinds = results.config.kinds
    new, axes = figure(8.5, 6.6, 2, 2)
    axes[0, 0].axvline(numbers["bound"]["cosine"], **REFERENCE, linestyle="--", label="lower bound")
    cosine = "cosine to the nearest identity"
    for ax, title, label, found in zip(
        axes.flat,
        ("Identities", "Faces, by pixels", "Faces, by gray levels", "Faces, by the recognizer"),
        (cosine, cosine, "distance to the nearest identity, gray levels", cosine),
        (results.cosines, results.face_cosines, results.face_distances, results.recognizer_cosines),
        strict=True,
    ):
        for kind, color in zip(kinds, colors(len(kinds)), strict=True):
            values = torch.cat(found[kind]).sort().values
            ax.plot(values.numpy(), np.linspace(0, 1, len(values)), color=color, label=kind)
        finish(ax, title, label, "cumulative share")
    save(new, path)


def pictures(numbers: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
    """Return what draws those pictures of a report whose numbers it has, by name."""
    return {"kinds": partial(_kinds_plot, numbers)}


def _kinds_plot(numbers: Mapping[str, Any], path: Path) -> None:
    """Draw ROC-AUC and accuracy by kind, and the differences to the first kind."""
    pairs = [name.split(" less ") for name in numbers if " less " in name]
    others, first = [kind for kind, _ in pairs], pairs[0][1]
    new, axes = figure(9.5, 6.6, 2, 2)
    for row, key, label in zip(axes, ("auc", "accuracy"), ("ROC-AUC", "accuracy"), strict=True):
        found = {kind: numbers[kind][key] for kind in (first, *others)}
        plot_seeds(row[0], found, numbers["raw pixels"][key], label, x="kind of identities")
        gains = {kind: numbers[f"{kind} less {first}"][key] for kind in others}
        plot_differences(row[1], gains, f"{label} above {first}", y="kind of identities")
    save(new, path)


def _faces_plot(results: Results, path: Path, count: int = 10) -> None:
    kinds, size = results.config.kinds, results.config.data.identities
    some = torch.from_numpy(np.linspace(0, size - 1, min(count, size)).astype(np.int64))
    grid = [neutral_faces(results.generator, results.points[kind][0][some]) for kind in kinds]
    title = f"Faces in the neutral style, seed {results.config.seeds[0]}"
    image_grid([row.numpy() for row in grid], kinds, title, path)


def _fields(results: Results, numbers: dict[str, Any]) -> dict[str, Any]:
    first, *others = results.config.kinds
    pixels = results.pixels
    kinds = results.config.kinds
    names = (
        "identities, cosine: closest two",
        "identities, cosine: mean",
        "faces, cosine of pixels: closest two",
        "faces, cosine of pixels: mean",
        "faces, cosine in the recognizer: closest two",
        "faces, cosine in the recognizer: mean",
        "faces, gray levels: closest two",
        "faces, gray levels: mean",
    )
    distances = table(
        ["nearest identities", *kinds],
        [
            [name, *(shown(numbers[kind][key], 1 if "gray" in key else 3) for kind in kinds)]
            for name, key in zip(names, KEYS, strict=True)
        ],
    )
    rows = [
        [kind, *(shown(numbers[kind][key]) for key in METRICS), shown(numbers[kind]["top1"], 3)]
        for kind in kinds
    ]
    rows.append(["raw pixels, no training", *(shown(pixels[key]) for key in METRICS), ""])
    headings = ["trained on", "accuracy", "ROC-AUC", "training top-1, last epoch"]
    compared = table(
        [f"less {first}, seed by seed", "accuracy", "ROC-AUC", "higher ROC-AUC"],
        [
            [
                kind,
                *(shown_difference(less[key]) for key in METRICS),
                f"{sum(v > 0 for v in less['auc']['values'])} of {len(results.config.seeds)} seeds",
            ]
            for kind in others
            for less in [numbers[f"{kind} less {first}"]]
        ],
    )
    pack = results.config.pack
    return {
        "meanings": "\n".join(f"- *{kind}*: {MEANINGS[kind].format(pack)}" for kind in kinds),
        "distances": distances,
        "found": table(headings, rows),
        "compared": compared,
        "conclusions": conclusions(numbers, first, others),
    }
