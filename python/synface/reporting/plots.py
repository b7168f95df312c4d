"""Figures in one style, with matplotlib and without a display."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..common.extras import extra
from ..common.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("style.mplstyle")
INK, ACCENT, QUIET = "#1b2733", "#c8402f", "#8b98a5"  # the first two of the style, and reference
REFERENCE = {"color": QUIET, "linewidth": 1.0, "zorder": 1.5}  # a line to compare data with
PALE = 0.25  # opacity of noisy values below their running mean
FEW = 10  # pairs: a rate of fewer is drawn as uncertain


def check_matplotlib() -> None:
    """Raise ImportError, which says what to install, unless figures can be drawn."""
    with extra("train", "drawing figures"):
        import matplotlib.figure  # noqa: F401


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the style of style.mplstyle, and restore matplotlib's settings.

    Many settings are read when something is drawn rather than when its figure is made, so a
    function that draws should have it as a decorator: ``@styled()``.
    """
    with extra("train", "drawing figures"):
        import matplotlib.style
    with matplotlib.style.context(["default", STYLE]):
        yield


@styled()
def figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """Return a new figure, sized in inches, and its axes as `matplotlib.pyplot.subplots` does."""
    with extra("train", "drawing figures"):
        from matplotlib.figure import Figure

    new = Figure(figsize=(width, height))
    return new, new.subplots(rows, columns, **options)


@styled()
def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, atomically."""
    with replacing(path) as part:
        figure.savefig(part, format="png")


@styled()
def colors(count: int) -> list[Any]:
    """Return ``count`` colors that can be distinguished in grayscale, too."""
    with extra("train", "drawing figures"):
        import matplotlib

    cycled = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    if count <= len(cycled):
        return [f"#{color.lstrip('#')}" for color in cycled[:count]]
    return [matplotlib.colormaps["viridis"](i / (count - 1) * 0.9) for i in range(count)]


@styled()
def finish(
    axes: Any, title: str, x: str = "", y: str = "", *, grid: str = "both", **legend: Any
) -> None:
    """Set an axes' title and labels, its grid, and a legend where curves have labels.

    Args:
        grid: "both", "x" or "y".
        legend: options of a legend of this axes alone. By default the figure has one legend below
            its axes, with each label of any of them once.
    """
    axes.set_title(title)
    if x:
        axes.set_xlabel(x)
    if y:
        axes.set_ylabel(y)
    axes.grid(False)
    axes.grid(True, axis=grid)
    if legend:
        axes.legend(**legend)
    else:
        _legend_below(axes.figure)


def _legend_below(figure: Figure) -> None:
    """Draw one legend of all labels below a figure's axes, in as many columns as fit."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        if axes.get_legend() is None:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
    for legend in list(figure.legends):
        legend.remove()
    if handles:
        longest = 0.5 + 0.07 * max(map(len, handles))  # inches
        columns = min(len(handles), max(1, int(figure.get_figwidth() / longest)))
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=columns
        )


BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}  # a legend right of its axes


def log_scale(axes: Any, which: str) -> None:
    """Scale an axes' "x" or "y" logarithmically, with plain numbers where it spans few decades.

    It is called last, since the ticks depend on the limits.
    """
    with extra("train", "drawing figures"):
        from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    if high < 100 * low:
        decades = LogLocator(subs=(1, 2, 5))
        axis.set_major_locator(decades if high > 10 * low else MaxNLocator(4))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def literal(text: str) -> str:
    """Return a name of a file, say, without what matplotlib would interpret or cannot draw."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")


@styled()
def image_grid(
    rows: Sequence[NDArray[Any]],
    names: Sequence[str],
    title: str,
    path: Path,
    columns: Sequence[str] = (),
) -> None:
    """Draw rows of images with a name each.

    Args:
        rows: of (N, H, W, C) uint8, or floating in [0, 1], with C 1 or 3; the longest sets the
            width, and the others are padded with white.
        names: of the rows. columns: headings of the columns, if any.
    """
    count = max(map(len, rows))
    height, width = rows[0].shape[1:3]
    white = 255 if rows[0].dtype == np.uint8 else 1
    strips = []
    for row in rows:
        short = [(0, count - len(row)), (0, 0), (0, 0), (0, 0)]
        strips.append(np.concatenate(list(np.pad(row, short, constant_values=white)), axis=1))
    pixels = np.concatenate(strips)
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    side = 0.08 * max(map(len, names))  # the names' width in inches
    new, axes = figure(0.2 + side + 0.8 * count, 0.6 + 0.8 * height / width * len(rows))
    axes.imshow(pixels)
    axes.set_yticks([height * (i + 0.5) for i in range(len(rows))], list(map(literal, names)))
    axes.xaxis.tick_top()
    axes.set_xticks([width * (i + 0.5) for i in range(len(columns))], columns)
    axes.set_title(literal(title))
    _bare(axes)
    save(new, path)


def _bare(axes: Any) -> None:
    """Remove the frame of an axes with images, and the marks of its ticks."""
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def running_mean(values: Sequence[float], window: int) -> NDArray[np.float64]:
    """Return the means of ``window`` values around each, of fewer near the ends.

    Values that are not finite are left out, and a mean of none is NaN.

    Args:
        window: odd number of values.
    """
    numbers = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(numbers)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, numbers, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(numbers))
    first, end = (at - window // 2).clip(0), (at + window // 2 + 1).clip(max=len(numbers))
    count = counts[end] - counts[first]
    empty = np.full(len(numbers), np.nan)
    return np.divide(sums[end] - sums[first], count, out=empty, where=count > 0)


@styled()
def noisy_curve(
    axes: Any, x: Sequence[float], y: Sequence[float], color: Any = INK, label: str = ""
) -> int:
    """Draw the value of each step in a pale color, and the running mean over it.

    Args:
        label: of the running mean; by default both curves are named by what they are.

    Returns:
        The number of steps that are averaged: a fortieth of all, and 1 for few steps, which are
        drawn alone.
    """
    window = len(y) // 40 | 1  # odd
    if window == 1:
        axes.plot(x, y, color=color, label=label or "each step", **_marked(len(y)))
        return window
    pale = {"alpha": PALE, "linewidth": 0.6, "zorder": 1.9}  # below all running means
    axes.plot(x, y, color=color, label=None if label else "each step", **pale)
    axes.plot(
        x, running_mean(y, window), color=color, label=label or f"running mean of {window} steps"
    )
    return window


def _marked(count: int) -> dict[str, str]:
    """Return a marker for a curve of one point, which would be invisible."""
    return {"marker": "o"} if count == 1 else {}


@styled()
def loss_and_accuracy(axes: Sequence[Any], history: Sequence[Mapping[str, Any]], over: str) -> None:
    """Draw a history's "loss" and "accuracy" over "epoch" or "step".

    Args:
        axes: two, one for each; the label of the horizontal axis is drawn where its ticks are.
    """
    x = [row[over] for row in history]
    for ax, key, label in zip(
        axes, ("loss", "accuracy"), ("loss (margin cross entropy)", "training top-1"), strict=True
    ):
        noisy_curve(ax, x, [row[key] for row in history])
        ax.set_ylim(bottom=0 if key == "loss" else -0.02)  # no value lies on the edge
        ax.set(xlabel=over, ylabel=label)
        ax.label_outer()
    axes[1].set_ylim(top=1.02)


@styled()
def loss_curve(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw loss and training accuracy over the epochs, one below the other."""
    new, axes = figure(6.4, 5, 2, 1, sharex=True)
    loss_and_accuracy(axes, history, "epoch")
    finish(axes[0], "Training")
    save(new, path)


@styled()
def training_curves(
    history: Sequence[Mapping[str, Any]], verification: Sequence[Mapping[str, Any]], path: Path
) -> None:
    """Draw a run's loss, training accuracy, learning rate and verification over the epochs.

    Args:
        history: rows of metrics.jsonl, with "epoch", "loss", "accuracy" and "lr"; the gradient
            norm is drawn where rows have "gradient_norm".
        verification: rows of verification.jsonl, with "epoch" and metrics by name, of which those
            in [0, 1] are drawn; may be empty.

    Raises:
        ValueError: for an empty history.
    """
    if not history:
        raise ValueError("history must have a row or more, got none: no step is logged yet")
    measures = _measures(verification)
    norms = [row for row in history if "gradient_norm" in row]
    heights = [2.0, 2.0, *[2.0] * bool(measures), 1.0, *[1.0] * bool(norms)]
    new, axes = figure(7.2, 0.8 + sum(heights), len(heights), 1, sharex=True, height_ratios=heights)
    loss_and_accuracy(axes[:2], history, "epoch")
    rest = list(axes[2:])
    if measures:
        _verification_panel(rest.pop(0), measures)
    epochs = [row["epoch"] for row in history]
    rest[0].plot(epochs, [row["lr"] for row in history], color=INK, **_marked(len(history)))
    rest[0].set_ylim(bottom=0)
    rest[0].set_ylabel("learning rate")
    if norms:
        noisy_curve(
            rest[1], [row["epoch"] for row in norms], [row["gradient_norm"] for row in norms]
        )
        rest[1].set_ylabel("gradient norm")
        log_scale(rest[1], "y")
    axes[-1].set_xlabel("epoch")
    finish(axes[0], "Training")
    new.align_ylabels()
    save(new, path)


def _measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Return the epochs and values of each metric of a verification log that is in [0, 1]."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and name not in ("step", "epoch", "threshold"):
                epochs, values = found.setdefault(name, ([], []))
                epochs.append(row["epoch"])
                values.append(value)
    return {name: each for name, each in found.items() if all(0 <= v <= 1 for v in each[1])}


def _verification_panel(axes: Any, measures: Mapping[str, tuple[list[float], list[float]]]) -> None:
    """Draw metrics of held-out people, with a marker at each verification."""
    markers = cycle("os^Dvp")
    for (name, (epochs, values)), color in zip(
        measures.items(), colors(len(measures)), strict=True
    ):
        shown = {"auc": "ROC-AUC"}.get(name, name)
        if name.startswith("tar_at_far_"):
            shown = f"TAR at FAR {name.removeprefix('tar_at_far_')}"
        axes.plot(epochs, values, color=color, marker=next(markers), label=shown.replace("_", " "))
    axes.set_ylabel("held-out people")
    axes.legend(**BESIDE)


class Curve(Protocol):
    """A ROC curve: rates (T,) of false and true accepts, the area, the numbers of pairs."""

    @property
    def fpr(self) -> NDArray[np.float64]: ...
    @property
    def tpr(self) -> NDArray[np.float64]: ...
    @property
    def auc(self) -> float: ...
    @property
    def genuine(self) -> int: ...
    @property
    def impostor(self) -> int: ...


@styled()
def roc_curves(curves: Mapping[str, Curve], path: Path, *, title: str, det: bool = False) -> None:
    """Draw ROC curves, or DET curves: false rejects against false accepts, both logarithmic.

    A curve is dotted where fewer than 10 false accepts (or, of a DET curve, false rejects) decide,
    and ends at one: nothing is measured below.
    """
    with extra("train", "drawing figures"):
        from matplotlib.patches import Rectangle

    new, axes = figure(5.6, 4.4 + 0.2 * len(curves))
    least_x, least_y = 0.1, 0.1
    for (name, curve), color in zip(curves.items(), colors(len(curves)), strict=True):
        y = 1 - curve.tpr if det else curve.tpr
        pairs = f"{curve.genuine:,} genuine, {curve.impostor:,} impostor pairs"
        label = f"{literal(name)}: area {curve.auc:.4f}, {pairs}"
        for count, style in ((1, ":"), (FEW, "-")):
            x_from, y_from = count / curve.impostor, count / curve.genuine if det else 0.0
            (line,) = axes.step(curve.fpr, y, style, where="post", color=color)
            measured = Rectangle((x_from, y_from), 1, 1, transform=axes.transData)
            line.set_clip_path(measured)
        line.set_label(label)
        least_x = min(least_x, 1 / curve.impostor)
        least_y = min(least_y, 1 / curve.genuine)
    few = "false accepts or rejects" if det else "false accepts"
    axes.plot([], [], ":", color=QUIET, label=f"uncertain: fewer than {FEW} {few}")
    axes.set_xlim(least_x, 1)
    axes.set_ylim(*((least_y, 1) if det else (0, 1.02)))
    log_scale(axes, "x")
    if det:
        log_scale(axes, "y")
    finish(axes, title, "false accept rate", "false reject rate" if det else "true accept rate")
    save(new, path)


class Scores(Protocol):
    """Densities (B,) of the scores of genuine and impostor pairs, and edges (B + 1,) of bins."""

    @property
    def edges(self) -> NDArray[np.float64]: ...
    @property
    def genuine(self) -> NDArray[np.float64]: ...
    @property
    def impostor(self) -> NDArray[np.float64]: ...


def score_histogram(
    scores: Scores,
    path: Path,
    *,
    genuine: int,
    impostor: int,
    threshold: float | None = None,
    title: str = "Scores of people never trained on",
) -> None:
    """Draw the densities of the scores of genuine and impostor pairs, and a threshold.

    Args:
        genuine, impostor: numbers of pairs.
        threshold: drawn as a line, if any.
    """
    densities(
        {
            f"impostor ({impostor:,} pairs)": (scores.impostor, scores.edges),
            f"genuine ({genuine:,} pairs)": (scores.genuine, scores.edges),
        },
        path,
        title=literal(title),
        x="cosine of the pair's embeddings",
        lines={} if threshold is None else {f"threshold {threshold:.3f}": threshold},
    )


@styled()
def densities(
    curves: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    path: Path,
    *,
    title: str,
    x: str,
    lines: Mapping[str, float] | None = None,
    log: bool = False,
) -> None:
    """Draw histograms as densities, and vertical lines, with a legend below them.

    Args:
        curves: densities (B,), of area 1, and edges (B + 1,) of their bins, by label.
        x: the label of the horizontal axis, which covers the bins that are not empty.
        lines: where vertical lines are drawn, by label.
        log: scale the densities logarithmically.
    """
    new, axes = figure(6.4, 4.2)
    lines = lines or {}
    used = [*lines.values()]
    for (name, (density, edges)), color in zip(curves.items(), colors(len(curves)), strict=True):
        density_steps(axes, density, edges, color, name)
        filled = np.flatnonzero(density)
        used += [edges[filled[0]], edges[filled[-1] + 1]] if len(filled) else []
    for (name, at), style in zip(lines.items(), cycle((":", "--", "-.", "-"))):
        axes.axvline(at, **REFERENCE | {"color": INK}, linestyle=style, label=name)
    if used:
        margin = 0.03 * (max(used) - min(used)) + 1e-6
        axes.set_xlim(min(used) - margin, max(used) + margin)
    if log:
        log_scale(axes, "y")
    finish(axes, title, x, "density (logarithmic)" if log else "density")
    save(new, path)


def bins_of(count: int) -> int:
    """Return a number of bins that suits the histogram of so many values: 20 to 100."""
    return int(np.clip(4 * np.cbrt(count), 20, 100))


@styled()
def density_steps(
    axes: Any, density: NDArray[np.float64], edges: NDArray[np.float64], color: Any, label: str
) -> None:
    """Draw a histogram as a filled outline, through which others are seen."""
    axes.stairs(density, edges, fill=True, color=color, alpha=PALE)
    axes.stairs(density, edges, color=color, linewidth=1.5, label=label)


@styled()
def image_pairs(
    groups: Mapping[str, Sequence[tuple[NDArray[Any], NDArray[Any], str]]], title: str, path: Path
) -> None:
    """Draw pairs of images side by side, a row of pairs for each group.

    Args:
        groups: pairs of (H, W, C) images, uint8 or floating in [0, 1], with C 1 or 3, and their
            captions, by the groups' names. At least one group has a pair.
    """
    columns = max(map(len, groups.values()))
    new, grid = figure(1.2 + 1.9 * columns, 0.4 + 1.5 * len(groups), len(groups), columns,
                       squeeze=False)  # fmt: skip
    for (name, pairs), row in zip(groups.items(), grid, strict=True):
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
            _bare(axes)
        row[0].set_ylabel(name)
        for axes, (first, second, caption) in zip(row, pairs, strict=False):
            white = 255 if first.dtype == np.uint8 else 1
            gap = np.full_like(first[:, : max(1, first.shape[1] // 24)], white)
            pixels = np.concatenate([first, gap, second], axis=1)
            axes.imshow(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
            axes.set_title(caption, loc="center", fontsize="small")
    new.suptitle(literal(title))
    save(new, path)
