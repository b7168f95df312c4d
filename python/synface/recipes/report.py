"""Reports of recipes: a page of Markdown with its figures, and all its numbers as JSON."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from synface_kernels import _env

from ..common.config import to_toml
from ..common.extras import extra
from ..common.textfiles import read_json
from ..reporting.page import write_page
from ..reporting.plots import ACCENT, REFERENCE, finish, styled

Figures = Mapping[str, Callable[[Path], None]]  # by name, what draws a figure into a file

# The sentence of a report of the quick size; a template has it as {quick}.
QUICK = "This is the quick size: too few seeds and steps for conclusions. "


def write_report(
    folder: Path,
    template: Path,
    numbers: Mapping[str, Any],
    figures: Figures,
    config: Any,
    **fields: Any,
) -> Path:
    """Write NAME.md, NAME.json and NAME-FIGURE.png into a folder, and return the page.

    Args:
        template: NAME.md, the page in Markdown with {fields} of `str.format`.
        numbers: the content of NAME.json.
        figures: by name, a function that draws a figure into a file.
        config: the recipe's configuration; a template may use its fields, and the numbers'.
        fields: further fields of the template; a ``command`` with --quick sets its {quick}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{template.stem}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    _draw(folder, template.stem, figures)
    fields["quick"] = QUICK if "--quick" in str(fields.get("command", "")).split() else ""
    fields |= {"numbers": numbers, "config": config, "toml": to_toml(config)}
    text = template.read_text(encoding="utf-8").format(**fields)
    page = folder / template.name
    write_page(page, re.sub("\n{3,}", "\n\n", text))  # a field may be empty
    return page


def machine(threads: int | str | None = None) -> str:
    """Return the processor, the number of threads and the versions that results depend on.

    Args:
        threads: of each training run; by default torch's number in this process.
    """
    return (
        f"{_env.processor()}, threads: {threads or torch.get_num_threads()}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


# -- statistics ----------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, standard deviation, confidence interval and the values themselves.

    Returns:
        "mean", "values"; "std" and "ci95", the half-width of the mean's 95 % interval by Student's
        t distribution: both None for one value.
    """
    tensor = torch.tensor(values, dtype=torch.float64, device="cpu")
    std = ci95 = None
    if len(values) > 1:
        std = tensor.std().item()
        ci95 = float(_student().ppf(0.975, len(values) - 1)) * std / math.sqrt(len(values))
    return {"mean": tensor.mean().item(), "std": std, "ci95": ci95, "values": list(values)}


def difference(of: Mapping[str, Any], less: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `spread` of the differences of two spreads, seed by seed, and their "p".

    Returns:
        As `spread`; "p" is that of the two-sided paired t-test: None for one seed, and where all
        differences are zero.
    """
    return _tested([a - b for a, b in zip(of["values"], less["values"], strict=True)])


def _tested(values: Sequence[float]) -> dict[str, Any]:
    """Return the `spread` of values, and "p" of the t-test that their mean is 0."""
    found = spread(values)
    mean, std, count = found["mean"], found["std"], len(found["values"])
    found["p"] = None
    if std is not None and any(found["values"]):
        t = abs(mean) * math.sqrt(count) / std if std else math.inf
        found["p"] = 2 * float(_student().sf(t, count - 1))
    return found


def slope(spreads: Sequence[Mapping[str, Any]], at: Sequence[float]) -> dict[str, Any]:
    """Return the slope of each seed's values over ``at``, by least squares, as `difference` does.

    Args:
        spreads: a `spread` over the same seeds for each number of ``at``.
    """
    values = torch.tensor([each["values"] for each in spreads], dtype=torch.float64, device="cpu")
    x = torch.tensor(at, dtype=torch.float64, device="cpu")
    x = x - x.mean()
    return _tested(((x @ values) / (x @ x)).tolist())


def verdict(difference: Mapping[str, Any]) -> str:
    """Return "higher", "lower" or "not resolved", where a difference's 95 % interval contains 0.

    Without an interval, the text is "one seed: no interval".
    """
    mean, ci95 = difference["mean"], difference["ci95"]
    if ci95 is None:
        return "one seed: no interval"
    if abs(mean) <= ci95:
        return "not resolved"
    return "higher" if mean > 0 else "lower"


TRAINED = 0.5  # training top-1 below which a page says that a row is far from trained


def far_from_trained(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a sentence that names the rows whose networks are far from trained, or no text.

    Args:
        rows: by name, of which ``top1`` is a `spread` of the last epoch's training accuracy.
    """
    far = [name for name, found in rows.items() if found["top1"]["mean"] < TRAINED]
    if not far:
        return ""
    return (
        f"Far from trained, with a training top-1 below {TRAINED}, so that more steps may change "
        f"what is said of them: {'; '.join(far)}."
    )


def _student() -> Any:
    """Return Student's t distribution."""
    with extra("train", "statistics of training runs"):
        from scipy.stats import t

    return t


def shown(number: Mapping[str, Any] | float | None, digits: int = 4) -> str:
    """Return a number or a `spread`, mean ± 95 % interval, as text; None as "not measured"."""
    if number is None:
        return "not measured"
    if not isinstance(number, Mapping):
        return f"{number:.{digits}f}"
    return f"{number['mean']:.{digits}f}{_interval(number, digits)}"


def shown_difference(difference: Mapping[str, Any], digits: int = 4) -> str:
    """Return a `difference` for a table, as +0.0213 ± 0.0102, p = 0.002."""
    text = f"{difference['mean']:+.{digits}f}{_interval(difference, digits)}"
    p = difference["p"]
    if p is None:
        return text
    return f"{text}, p = {p:.2g}" if p >= 0.001 else f"{text}, p < 0.001"


def _interval(number: Mapping[str, Any], digits: int) -> str:
    return "" if number["ci95"] is None else f" ± {number['ci95']:.{digits}f}"


# -- plots ---------------------------------------------------------------------------------------

INTERVAL = "mean, 95 % interval"


@styled()
def plot_spread(
    axes: Any,
    at: float,
    found: Mapping[str, Any],
    *,
    gap: float = 0.1,
    across: bool = False,
    color: Any = ACCENT,
    label: str | None = INTERVAL,
) -> None:
    """Draw each seed's value as a hollow point, and beside them their mean with its 95 % interval.

    Args:
        at: position on the other axis. gap: distance of points and mean from it.
        across: draw values along the horizontal axis, the points above the mean.
        label: of the mean in the legend; None: this spread is not in it.
    """
    values, mean, interval = found["values"], found["mean"], found["ci95"]
    x, y = [at - gap] * len(values), values
    point, bars = (at + gap, mean), {"yerr": interval}
    if across:
        x, y, point, bars = y, x, point[::-1], {"xerr": interval}
    points = {"marker": "o", "markersize": 3.5, "fillstyle": "none", "linestyle": ""}
    axes.plot(x, y, color=color, label=label and "one seed", **points)
    axes.errorbar(*point, **bars, color=color, marker="o", linestyle="", label=label)


@styled()
def plot_seeds(
    axes: Any,
    spreads: Mapping[str, Mapping[str, Any]],
    baseline: float,
    label: str,
    title: str = "",
    x: str = "trained on",
) -> None:
    """Draw the spreads over the seeds side by side, and raw pixels' value as a dashed line.

    Args:
        label: the metric. x: label of the horizontal axis.
    """
    for i, found in enumerate(spreads.values()):
        plot_spread(axes, i, found)
    plot_pixels(axes, baseline)
    axes.set_xticks(range(len(spreads)), [name.replace(" ", "\n") for name in spreads])
    title = title or f"{label[:1].upper()}{label[1:]} of each seed"
    finish(axes, title, x, f"{label} on real people", grid="y")


@styled()
def plot_pixels(axes: Any, value: float) -> None:
    """Draw what raw pixels reach as a dashed line."""
    axes.axhline(value, **REFERENCE, linestyle="--", label="raw pixels")


@styled()
def plot_differences(
    axes: Any,
    differences: Mapping[str, Mapping[str, Any]],
    label: str,
    title: str = "",
    y: str = "trained on",
) -> None:
    """Draw paired differences with their 95 % intervals, one row each, and a line at zero.

    Args:
        label: of the horizontal axis. y: label of the vertical axis, which the rows' names are on.
    """
    for i, found in enumerate(differences.values()):
        plot_spread(axes, i, found, across=True)
    axes.axvline(0, **REFERENCE)
    axes.locator_params(axis="x", nbins=6)
    axes.set_yticks(range(len(differences)), list(differences))
    axes.set_ylim(len(differences) - 0.5, -0.5)  # the first on top
    finish(axes, title or "Differences, seed by seed", label, y, grid="x")


def redraw(folder: Path, name: str, figures: Callable[[Mapping[str, Any]], Figures]) -> list[Path]:
    """Draw a report's pictures again from the numbers in its NAME.json, and return their paths.

    Args:
        folder: of the report.
        figures: returns the pictures of the numbers, as in `write_report`.

    Raises:
        ValueError: for a file that is damaged, or of another recipe.
        OSError: for a file that cannot be read or written.
    """
    file = folder / f"{name}.json"
    numbers = read_json(file)
    try:
        return _draw(folder, name, figures(numbers))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no report of the recipe {name}: {error!r}") from error


def _draw(folder: Path, name: str, figures: Figures) -> list[Path]:
    """Draw pictures into the files NAME-FIGURE.png, and return their paths."""
    drawn = []
    for figure, draw in figures.items():
        drawn.append(folder / f"{name}-{figure}.png")
        draw(drawn[-1])
    return drawn
