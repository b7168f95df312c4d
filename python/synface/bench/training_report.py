"""The report of `synface bench training`: a JSON file, a page and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ..common.files import write_text
from ..reporting.page import table, write_page
from ..reporting.plots import (
    INK,
    QUIET,
    REFERENCE,
    colors,
    figure,
    finish,
    log_scale,
    save,
    styled,
)
from .training import PHASES

NAME = "training-speed"
SHARE = 0.1  # of a step, up to which a head counts as small
TITLES = {
    "synface": "`synface train`",
    "torch": "plain torch",
    "fused update": "`synface train --fused-update`",
    "decoding": "decoding alone, in C",
}


def _tuned(result: Mapping[str, Any]) -> str:
    """Return the settings of torch that `synface train` has for this backbone."""
    if result["built_in"]:
        return "channels_last and fused SGD"
    return "fused SGD for the centers"


def _range(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"


def _shares(seconds: Mapping[str, float]) -> dict[str, float]:
    whole = sum(seconds.values())
    return {phase: each / whole for phase, each in seconds.items()}


def summary(result: Mapping[str, Any]) -> str:
    """Return the measurements as a few lines of text."""
    rates, loaders = result["rates"], result["loaders"]
    shares = _shares(result["seconds"]["synface"])
    lines = [
        f"synface train: {median(rates['synface']):.1f} images/s, "
        f"{_range(result['ratios']['torch'])} × plain torch, "
        f"{_range(result['ratios']['tuned'])} × plain torch with {_tuned(result)}",
        "a step: " + ", ".join(f"{phase} {shares[phase]:.1%}" for phase in PHASES),
    ]
    lines += [
        f"head of {row['classes']:,} classes: {row['share']['synface']:.1%} of a step, "
        f"{row['share']['torch']:.1%} in plain torch"
        for row in result["heads"]
    ]
    lines.append(
        f"loader: {median(loaders['synface']):.0f} images/s, "
        f"{_range(result['loader_ratios']['torch'])} × DataLoader and Pillow, "
        f"{_range(result['loader_ratios']['decoding'])} × decoding alone"
    )
    return "\n".join(lines)


def write(result: Mapping[str, Any], folder: Path, command: str) -> Path:
    """Write training-speed.json, .md and .png, and return the page.

    Args:
        command: the command line that the page names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"command": command} | dict(result), indent=1, ensure_ascii=False)
    write_text(folder / f"{NAME}.json", content + "\n")
    plot(result, folder / f"{NAME}.png")
    page = folder / f"{NAME}.md"
    write_page(page, _page(result, command))
    return page


def _page(result: Mapping[str, Any], command: str) -> str:
    config = result["config"]
    height, width = config["size"]
    rounds = {"loops": len(result["rates"]["synface"]), "loaders": len(result["loaders"]["torch"])}
    return f"""# Training speed: results

Written by `{command}`, all numbers included. Measured on {result["machine"]};
{result["load"]:.1f} programs wanted a core when it began (the system's load).

{config["backbone"]} on images of {height}×{width} (H×W), batches of {config["batch_size"]},
{config["embedding_size"]} dimensions, {config["identities"]:,} classes, {config["precision"]}.
Images: {result["images"]}, {config["workers"]} worker processes for each loader. All take turns in
one process; a ratio is the median of the rounds', with the least and the most.

## The loop

{_loops(result)}

Rounds: {rounds["loops"]}. All loops train the same network on the same images. Plain torch is
`DataLoader` with Pillow, an ArcFace head with dense logits and SGD, all in torch's default layout
and implementation, and reads no loss. With {_tuned(result)} it has the settings of torch that
`synface train` has for this backbone.

## Where a step's time goes

{_phases(result)}

The head's part includes its backward pass and the update of its centers; the loader's is what the
training process waits and spends on it, normalization included; the rest is checks and the log.

## The head by the number of classes

{_heads(result)}

A head's step alone, batches of {config["batch_size"]}, and its share of a step whose other parts
take as long as in `synface train` above.

## The loader alone

{_loaders(result)}

Rounds: {rounds["loaders"]}. Decoding alone is Pillow's decoder on encoded bytes in memory, timed
after the loaders' processes ended, on one thread, and multiplied by the workers that have a core
each.

![images per second, a step's phases and the head's share]({NAME}.png)
"""


def _loops(result: Mapping[str, Any]) -> str:
    titles, rows = TITLES | {"tuned": f"plain torch, {_tuned(result)}"}, []
    for name, rates in result["rates"].items():
        ratio = result["ratios"].get(name)
        rows.append([titles[name], f"{median(rates):.1f}", "" if ratio is None else _range(ratio)])
    return table(["", "images/s", "`synface train` ÷ this"], rows)


def _phases(result: Mapping[str, Any]) -> str:
    titles, rows = TITLES | {"tuned": f"plain torch, {_tuned(result)}"}, []
    for name, seconds in result["seconds"].items():
        shares = _shares(seconds)
        cells = [f"{1e3 * seconds[phase]:.1f} ({shares[phase]:.1%})" for phase in PHASES]
        rows.append([titles[name], *cells])
    return table(["ms (share)", *PHASES], rows)


def _heads(result: Mapping[str, Any]) -> str:
    names = ("synface", "fused update", "torch")
    rows = [
        [f"{row['classes']:,}"]
        + [f"{1e3 * row['seconds'][name]:.1f} ({row['share'][name]:.1%})" for name in names]
        for row in result["heads"]
    ]
    return table(["classes, ms (share)", *(TITLES[name] for name in names)], rows)


def _loaders(result: Mapping[str, Any]) -> str:
    titles = TITLES | {"synface": "ours", "torch": "`DataLoader` with Pillow"}
    rows = []
    for name, rates in result["loaders"].items():
        ratio = result["loader_ratios"].get(name)
        rows.append([titles[name], f"{median(rates):.0f}", "" if ratio is None else _range(ratio)])
    return table(["", "images/s", "ours ÷ this"], rows)


@styled()
def plot(result: Mapping[str, Any], path: Path) -> None:
    """Plot the phases of each loop's step, and the head's share by the number of classes."""
    new, (left, right) = figure(9.6, 3.6, 1, 2)
    names = list(result["seconds"])
    begins = [0.0] * len(names)
    for phase, color in zip(PHASES, colors(len(PHASES)), strict=True):
        values = [result["seconds"][name][phase] for name in names]
        left.barh(range(len(names)), values, left=begins, color=color, label=phase)
        begins = [a + b for a, b in zip(begins, values, strict=True)]
    labels = [
        f"{label}\n{median(result['rates'][name]):.1f} images/s"
        for name, label in zip(names, ("synface train", "plain torch", "tuned"), strict=True)
    ]
    left.set_yticks(range(len(names)), labels)
    left.invert_yaxis()
    ratio = result["ratios"]["torch"]["median"]
    finish(left, f"{ratio:.2f} × the images/s of plain torch", "seconds of a step", grid="x")
    _draw_heads(right, result["heads"])
    save(new, path)


def _draw_heads(axes: Any, heads: Sequence[Mapping[str, Any]]) -> None:
    classes = [row["classes"] for row in heads]
    axes.axhline(100 * SHARE, **REFERENCE, linestyle=":")
    for name, label, line, color in (
        ("synface", "synface train", "o-", INK),
        ("fused update", "with --fused-update", "s--", INK),
        ("torch", "plain torch", "^-", QUIET),
    ):
        shares = [100 * row["share"][name] for row in heads]
        axes.plot(classes, shares, line, color=color, label=label)
    axes.set_ylim(bottom=0)
    last = heads[-1]
    title = f"{last['classes']:,} classes: {last['share']['synface']:.1%} of a step"
    finish(axes, title, "classes", "head's share of a step, %", loc="center left")
    log_scale(axes, "x")
