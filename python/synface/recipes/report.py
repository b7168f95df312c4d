"""Reports of recipes: a page of Markdown with its figures, and all its numbers as JSON."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from synface_kernels import _env

from ..common.config import to_toml
from ..reporting.page import write_page
from ..reporting.plots import ACCENT, INK, QUIET, finish


def write_report(
    folder: Path,
    template: Path,
    numbers: Mapping[str, Any],
    figures: Mapping[str, Callable[[Path], None]],
    config: Any,
    **fields: Any,
) -> Path:
    """Write NAME.md, NAME.json and NAME-FIGURE.png into a folder, and return the page.

    Args:
        template: NAME.md, the page in Markdown with {fields} of `str.format`.
        numbers: the content of NAME.json.
        figures: by name, a function that draws a figure into a file.
        config: the recipe's configuration; a template may use its fields, and the numbers'.
        fields: further fields of the template.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{template.stem}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    for figure, draw in figures.items():
        draw(folder / f"{template.stem}-{figure}.png")
    fields |= {"numbers": numbers, "config": config, "toml": to_toml(config)}
    text = template.read_text(encoding="utf-8").format(**fields)
    page = folder / template.name
    write_page(page, re.sub("\n{3,}", "\n\n", text))  # a field may be empty
    return page


def machine() -> str:
    """Return the processor, the number of threads and the versions that results depend on."""
    return (
        f"{_env.processor()}, threads: {torch.get_num_threads()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, standard deviation (None for one value) and the values themselves."""
    tensor = torch.tensor(values, dtype=torch.float64, device="cpu")
    std = tensor.std().item() if len(values) > 1 else None
    return {"mean": tensor.mean().item(), "std": std, "values": list(values)}


def difference(of: Mapping[str, Any], less: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `spread` of the differences of two spreads, seed by seed."""
    return spread([a - b for a, b in zip(of["values"], less["values"], strict=True)])


def shown(number: Mapping[str, Any] | float | None, digits: int = 4) -> str:
    """Return a number or a `spread` as text for a table; None as "not measured"."""
    if number is None:
        return "not measured"
    if not isinstance(number, Mapping):
        return f"{number:.{digits}f}"
    std = "" if number["std"] is None else f" ± {number['std']:.{digits}f}"
    return f"{number['mean']:.{digits}f}{std}"


def plot_seeds(
    axes: Any, spreads: Mapping[str, Mapping[str, Any]], baseline: float, label: str
) -> None:
    """Draw each seed's value as a point, the means as lines, and raw pixels' as a dashed line."""
    for i, found in enumerate(spreads.values()):
        axes.scatter([i] * len(found["values"]), found["values"], color=INK, s=14, zorder=3)
        axes.hlines(found["mean"], i - 0.3, i + 0.3, color=ACCENT, linewidth=2)
    axes.axhline(baseline, color=QUIET, linestyle="--", linewidth=1)
    axes.set_xticks(range(len(spreads)), [name.replace(" ", "\n") for name in spreads], fontsize=8)
    title = "Seeds and mean; dashed: raw pixels"
    finish(axes, title, y=f"{label} on real people", grid="y")
