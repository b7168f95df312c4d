"""Figures in one style, with matplotlib and without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..common.extras import extra
from ..common.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, ACCENT, QUIET = "#22313f", "#c0392b", "#95a5a6"


def check_matplotlib() -> None:
    """Raise ImportError, which says what to install, unless figures can be drawn."""
    with extra("train", "drawing figures"):
        import matplotlib.figure  # noqa: F401


def figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """Return a new figure, sized in inches, and its axes as `matplotlib.pyplot.subplots` does."""
    with extra("train", "drawing figures"):
        from matplotlib.figure import Figure

    new = Figure(figsize=(width, height), layout="constrained")
    return new, new.subplots(rows, columns, **options)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, atomically."""
    with replacing(path) as part:
        figure.savefig(part, dpi=120, format="png")


def colors(count: int) -> list[Any]:
    """Return ``count`` colors that can be distinguished in grayscale, too."""
    with extra("train", "drawing figures"):
        import matplotlib

    return [matplotlib.colormaps["viridis"](i / max(1, count - 1) * 0.9) for i in range(count)]


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
    new, axes = figure(1.4 + 0.8 * count, 0.5 + 0.85 * len(rows))
    axes.imshow(pixels)
    axes.set_yticks([height * (i + 0.5) for i in range(len(rows))], names)
    axes.xaxis.tick_top()
    axes.set_xticks([width * (i + 0.5) for i in range(len(columns))], columns)
    axes.tick_params(length=0, labelsize=8)
    axes.set_title(title, color=INK, fontsize=10)
    for spine in axes.spines.values():
        spine.set_visible(False)
    save(new, path)


def loss_and_accuracy(axes: Any, history: Sequence[Mapping[str, Any]], over: str) -> None:
    """Draw a history's "loss" and "accuracy", each with its own axis, over "epoch" or "step"."""
    x = [row[over] for row in history]
    axes.plot(x, [row["loss"] for row in history], color=ACCENT, linewidth=1.2)
    axes.set_xlabel(over)
    axes.set_ylabel("loss (margin cross entropy)", color=ACCENT)
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    other.plot(x, [row["accuracy"] for row in history], color=INK, linewidth=0.8, alpha=0.7)
    other.set_ylabel("training top-1 accuracy", color=INK)
    other.set_ylim(0, 1.02)
    axes.grid(alpha=0.25)


def loss_curve(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw loss and training accuracy over the epochs."""
    new, axes = figure(6.4, 3.8)
    loss_and_accuracy(axes, history, "epoch")
    axes.set_title("Training", color=INK)
    save(new, path)


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


def roc_curves(curves: Mapping[str, Curve], path: Path, *, title: str, det: bool = False) -> None:
    """Draw ROC curves, or DET curves: false rejects against false accepts, both logarithmic."""
    new, axes = figure(5.6, 4.4)
    for name, curve in curves.items():
        x = curve.fpr.clip(0.5 / curve.impostor)
        y = (1 - curve.tpr).clip(0.5 / curve.genuine) if det else curve.tpr
        axes.step(x, y, where="post", linewidth=1.2, label=f"{name}: area {curve.auc:.4f}")
    axes.set_xscale("log")
    axes.set_xlim(right=1)
    axes.set_xlabel("false accept rate")
    axes.set_ylabel("false reject rate" if det else "true accept rate")
    if det:
        axes.set_yscale("log")
        axes.set_ylim(top=1)
    else:
        axes.set_ylim(0, 1.02)
    axes.set_title(title, color=INK)
    axes.legend(loc="lower left" if det else "lower right", frameon=False)
    axes.grid(alpha=0.25, which="both")
    save(new, path)


def finish(
    axes: Any, title: str, x: str = "", y: str = "", *, grid: str = "both", **legend: Any
) -> None:
    """Set an axes' title and labels, and draw its grid.

    Args:
        grid: "both", "x" or "y".
        legend: options of the legend, which is drawn where curves have labels.
    """
    axes.set_title(title, color=INK, fontsize=10)
    if x:
        axes.set_xlabel(x)
    if y:
        axes.set_ylabel(y)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8, **legend)
    axes.grid(alpha=0.25, axis=grid)


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
    used: list[float] = [*(lines or {}).values()]
    for (name, (density, edges)), color in zip(curves.items(), colors(len(curves)), strict=True):
        axes.stairs(density, edges, fill=True, color=color, alpha=0.55, label=name)
        filled = np.flatnonzero(density)
        used += [edges[filled[0]], edges[filled[-1] + 1]] if len(filled) else []
    for (name, at), style in zip((lines or {}).items(), (":", "--", "-.", "-"), strict=False):
        axes.axvline(at, color=INK, linestyle=style, linewidth=1.2, label=name)
    if used:
        margin = 0.03 * (max(used) - min(used)) + 1e-6
        axes.set_xlim(min(used) - margin, max(used) + margin)
    if log:
        axes.set_yscale("log")
    y = "density (logarithmic)" if log else "density"
    finish(axes, title, x, y, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    save(new, path)


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
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(name, color=INK, fontsize=9)
        for axes, (first, second, caption) in zip(row, pairs, strict=False):
            white = 255 if first.dtype == np.uint8 else 1
            gap = np.full_like(first[:, : max(1, first.shape[1] // 24)], white)
            pixels = np.concatenate([first, gap, second], axis=1)
            axes.imshow(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
            axes.set_title(caption, color=INK, fontsize=8)
    new.suptitle(title, color=INK, fontsize=10)
    save(new, path)
