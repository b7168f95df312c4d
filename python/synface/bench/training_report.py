"""The report of `synface bench training`: a JSON file, a page and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ..common.files import write_text
from ..reporting.page import escape, table, write_page
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
from .meter import PHASES

NAME = "training-speed"
SHARE = 0.1  # of a step, up to which a head counts as small
TITLES = {
    "synface": "`synface train`",
    "torch": "plain torch",
    "fused update": "`synface train --fused-update`",
    "decoding": "decoding alone, in C",
}


def _on_gpu(result: Mapping[str, Any]) -> bool:
    return str(result["config"].get("device", "cpu")).startswith("cuda")


def _titles(result: Mapping[str, Any]) -> dict[str, str]:
    return TITLES | {"tuned": f"plain torch with {_tuned(result)}"}


def _tuned(result: Mapping[str, Any]) -> str:
    """Return the settings of the tuned loop; on a CPU they are those of `synface train`."""
    return "channels_last and fused SGD" if result["built_in"] else "fused SGD for the centers"


def _range(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"


def _rate(rates: Sequence[float] | str, digits: int) -> str:
    """Return the median of images/s, or why there is none."""
    return escape(rates) if isinstance(rates, str) else f"{median(rates):.{digits}f}"


def _shares(seconds: Mapping[str, float]) -> dict[str, float]:
    whole = sum(seconds.values())
    return {phase: each / whole for phase, each in seconds.items()}


def limit(result: Mapping[str, Any]) -> str:
    """Return a sentence on whether the loader or the rest of a step limits `synface train`."""
    seconds, loaders = result["seconds"].get("synface"), result["loaders"]
    if seconds is None or isinstance(loaders, str):
        return "What limits `synface train`: not measured."
    loader = median(loaders["synface"])
    rest = result["config"]["batch_size"] / (sum(seconds.values()) - seconds["loader"])
    what = "The loader" if loader < rest else "The rest of a step"
    return (
        f"{what} limits `synface train`: the loader alone gives {loader:.0f} images/s, and a step "
        f"without it would give {rest:.1f}."
    )


def summary(result: Mapping[str, Any]) -> str:
    """Return the measurements as a few lines of text."""
    titles, lines = _titles(result), []
    for name, rates in result["rates"].items():
        ratio = result["ratios"].get(name)
        rate = rates if isinstance(rates, str) else f"{median(rates):.1f} images/s"
        more = "" if ratio is None else f", `synface train` ÷ this: {_range(ratio)}"
        lines.append(f"{titles[name]}: {rate}{more}")
    if "synface" in result["seconds"]:
        shares = _shares(result["seconds"]["synface"])
        lines.append("a step: " + ", ".join(f"{phase} {shares[phase]:.1%}" for phase in PHASES))
    for row in result["heads"]:
        cells = (f"{titles[name]} {_head(row, name)}" for name in ("synface", "torch"))
        lines.append(f"head of {row['classes']:,} classes, ms (share): " + ", ".join(cells))
    loaders = result["loaders"]
    if isinstance(loaders, str):
        lines.append(f"loader: {loaders}")
    else:
        lines.append(
            f"loader: {median(loaders['synface']):.0f} images/s, "
            f"{_range(result['loader_ratios']['torch'])} × DataLoader and Pillow, "
            f"{_range(result['loader_ratios']['decoding'])} × decoding alone"
        )
    return "\n".join([*lines, limit(result)])


def write_json(result: Mapping[str, Any], folder: Path, command: str) -> None:
    """Write training-speed.json, of all parts or the first ones.

    Args:
        command: the command line that it names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"command": command} | dict(result), indent=1, ensure_ascii=False)
    write_text(folder / f"{NAME}.json", content + "\n")


def write(result: Mapping[str, Any], folder: Path, command: str) -> Path:
    """Write training-speed.json, .md and .png, and return the page.

    Args:
        command: the command line that the page names.
    """
    write_json(result, folder, command)
    plot(result, folder / f"{NAME}.png")
    page = folder / f"{NAME}.md"
    write_page(page, _page(result, command))
    return page


def _page(result: Mapping[str, Any], command: str) -> str:
    config = result["config"]
    height, width = config["size"]
    held = ", decoded in memory for the loops" if result.get("resident") else ""
    return f"""# Training speed: results

Written by `{command}`, all numbers included. Measured on {result["machine"]};
{result["load"]:.1f} programs wanted a core when it began (the system's load).

{config["backbone"]} on images of {height}×{width} (H×W), batches of {config["batch_size"]},
{config["embedding_size"]} dimensions, {config["identities"]:,} classes, {config["precision"]}.
Images: {result["images"]}{held}, {config["workers"]} worker processes for each loader. All take
turns in one process; a ratio is the median of the rounds', with the least and the most.

## The loop

{_loops(result)}

{_about_loops(result)}

{limit(result)}

## Where a step's time goes

{_phases(result)}

The head's part includes its backward pass and the update of its centers; {_about_phases(result)}

## The head by the number of classes

{_heads(result)}

A head's step alone, batches of {config["batch_size"]}, and its share of a step whose other parts
take as long as in `synface train` above.

## The loader alone

{_loaders(result)}

![images per second, a step's phases and the head's share]({NAME}.png)
"""


def _about_loops(result: Mapping[str, Any]) -> str:
    rates, reads = result["rates"]["synface"], "`DataLoader` with Pillow"
    rounds = "" if isinstance(rates, str) else f"Rounds: {len(rates)}. "
    if result.get("resident"):
        reads = "a loop over shuffled images in memory"
    text = (
        f"{rounds}All loops train the same network on the same images. Plain torch is\n{reads}, "
        "an ArcFace head with dense logits and SGD, all in torch's default layout\nand "
        "implementation, and reads no loss."
    )
    if not _on_gpu(result):
        return (
            f"{text} With {_tuned(result)} it has the settings of torch that\n"
            "`synface train` has for this backbone."
        )
    float32 = result.get("float32", {})
    tf32 = "may" if float32.get("convolutions_tf32") else "do not"
    return f"""{text} `synface train` has that layout and
implementation too, but for the loop with {_tuned(result)}.

All copy batches from page-locked memory without waiting. cuDNN is restricted to deterministic
algorithms in `synface train` alone. In all loops, convolutions of float32 {tf32} use TF32, and the
precision of matrix products of float32 is {float32.get("matmul_precision")}."""


def _about_phases(result: Mapping[str, Any]) -> str:
    if _on_gpu(result):
        return """the loader's is what the
GPU waits for a batch and spends on its copy and normalization; the rest is checks and the log. All
are times of the GPU, which works on a step while the host prepares the next one."""
    return """the loader's is what the
training process waits and spends on it, normalization included; the rest is checks and the log."""


def _loops(result: Mapping[str, Any]) -> str:
    titles, rows, memory = _titles(result), [], result.get("memory")
    for name, rates in result["rates"].items():
        ratio = result["ratios"].get(name)
        rows.append([titles[name], _rate(rates, 1), "" if ratio is None else _range(ratio)])
        if memory is not None:
            rows[-1].append(f"{memory[name] / 2**30:.2f}" if name in memory else "")
    more = [] if memory is None else ["peak memory, GiB"]
    return table(["", "images/s", "`synface train` ÷ this", *more], rows)


def _phases(result: Mapping[str, Any]) -> str:
    titles, rows = _titles(result), []
    for name, seconds in result["seconds"].items():
        shares = _shares(seconds)
        cells = [f"{1e3 * seconds[phase]:.1f} ({shares[phase]:.1%})" for phase in PHASES]
        rows.append([titles[name], *cells])
    return table(["ms (share)", *PHASES], rows)


def _head(row: Mapping[str, Any], name: str) -> str:
    """Return the milliseconds of a head's step and its share, or why there are none."""
    seconds, share = row["seconds"][name], row["share"].get(name)
    if isinstance(seconds, str):
        return seconds
    return f"{1e3 * seconds:.1f}" + ("" if share is None else f" ({share:.1%})")


def _heads(result: Mapping[str, Any]) -> str:
    names = ("synface", "fused update", "torch")
    rows = [
        [f"{row['classes']:,}", *(escape(_head(row, name)) for name in names)]
        for row in result["heads"]
    ]
    return table(["classes, ms (share)", *(TITLES[name] for name in names)], rows)


def _loaders(result: Mapping[str, Any]) -> str:
    loaders = result["loaders"]
    if isinstance(loaders, str):
        return escape(loaders)
    titles = TITLES | {"synface": "ours", "torch": "`DataLoader` with Pillow"}
    rows = []
    for name, rates in loaders.items():
        ratio = result["loader_ratios"].get(name)
        rows.append([titles[name], _rate(rates, 0), "" if ratio is None else _range(ratio)])
    found, rounds = table(["", "images/s", "ours ÷ this"], rows), len(loaders["torch"])
    return f"""{found}

Rounds: {rounds}. Decoding alone is Pillow's decoder on encoded bytes in memory, timed
after the loaders' processes ended, on one thread, and multiplied by the workers that have a core
each."""


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
    labels = {"synface": "synface train", "torch": "plain torch", "tuned": "tuned"}
    rates = [f"{labels[name]}\n{median(result['rates'][name]):.1f} images/s" for name in names]
    left.set_yticks(range(len(names)), rates)
    left.invert_yaxis()
    title = "a step's phases"
    if "torch" in result["ratios"]:
        title = f"{result['ratios']['torch']['median']:.2f} × the images/s of plain torch"
    finish(left, title, "seconds of a step", grid="x")
    _draw_heads(right, result["heads"])
    save(new, path)


def _draw_heads(axes: Any, heads: Sequence[Mapping[str, Any]]) -> None:
    axes.axhline(100 * SHARE, **REFERENCE, linestyle=":")
    for name, label, line, color in (
        ("synface", "synface train", "o-", INK),
        ("fused update", "with --fused-update", "s--", INK),
        ("torch", "plain torch", "^-", QUIET),
    ):
        rows = [row for row in heads if name in row["share"]]
        if rows:  # with none of them, the classes' axis has no logarithm
            shares = [100 * row["share"][name] for row in rows]
            axes.plot([row["classes"] for row in rows], shares, line, color=color, label=label)
    axes.set_ylim(bottom=0)
    last, title = heads[-1], "the head's share"
    if "synface" in last["share"]:
        title = f"{last['classes']:,} classes: {last['share']['synface']:.1%} of a step"
    finish(axes, title, "classes", "head's share of a step, %", loc="center left")
    if any(row["share"] for row in heads):
        log_scale(axes, "x")
