"""Pictures of the committed results; `python -m benchmarks.table` draws them.

The style is the file of the training layer's plots, which is read without importing it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import growth, roofline, table
from .cases import cases
from .process import ROOT
from .table import PAGE, name_of

STYLE = ROOT / "python" / "synface" / "reporting" / "style.mplstyle"
PALE = 0.4  # opacity of the floors
MARKERS = "osD^vPX*"
HEADLINE = "headline-{}.png"
# Each panel's op, and what its step does.
HEADLINE_OPS = {
    "margin_cross_entropy": "Margin softmax, loss and gradients",
    "hypersphere_repulsion": "Repulsion of points, energy and gradient",
    "domain_mixup": "Mixing and normalizing images",
}
PICTURED = ("eager torch", "torch.compile")  # beside ours and the floor


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the style of style.mplstyle, and restore matplotlib's settings."""
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):
        yield


def draw_all(folder: Path = PAGE.parent) -> list[Path]:
    """Draw every picture of the page of all results into its folder; return their paths."""
    paths = []
    for name, result in growth.results().items():
        paths.append(folder / growth.PICTURE.format(name))
        draw_growth(result, paths[-1])
    for name, result in roofline.drawn().items():
        paths.append(folder / roofline.PICTURE.format(name))
        draw_roofline(result, paths[-1])
    for name, result in table.committed().items():
        paths.append(folder / HEADLINE.format(name))
        draw_headline(result, paths[-1])
    return paths


@styled()
def draw_growth(result: dict[str, Any], path: Path) -> None:
    """Draw time over each size, a panel for each, with exponents and pale floors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7))
    figure.suptitle(f"Time of a step on {name_of(result['machine'])}", x=0.01, ha="left")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, growth.PANELS.items(), strict=True):
        all_sizes: set[int] = set()
        for number, name in enumerate(names):
            series, color = growth.SERIES[name], f"C{number}"
            measured = growth.cases_of(series, result)
            floor = growth.floor_of(series.op)
            fits = growth.fits(series, measured)
            for peer in ("ours", floor):
                sizes, seconds = growth.times(series.axis, measured, peer)
                all_sizes.update(sizes)
                what = series.label if peer == "ours" else floor
                label = f"{what}: exponent {growth.shown(fits[peer])}"
                options: dict[str, Any] = {"marker": "o"}
                if peer != "ours":
                    options = {"alpha": PALE, "zorder": 1.5}
                if sizes:
                    axes.plot(sizes, seconds, color=color, label=label, **options)
        axes.set(title=title, xlabel=series.axis, ylabel="seconds")
        if not axes.lines:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
            continue
        axes.set(xscale="log", yscale="log")
        shown = sorted(all_sizes)[:: math.ceil(len(all_sizes) / 5)]
        axes.set_xticks(shown, [f"{size:,}" for size in shown])
        axes.set_xticks([], minor=True)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16))
    figure.savefig(path, format="png", metadata={"Software": None})


@styled()
def draw_roofline(result: dict[str, Any], path: Path) -> None:
    """Draw the attained FLOP rate of every op over its intensity, under the measured ceilings."""
    from matplotlib.figure import Figure

    found, limits = roofline.points(result), roofline.ceilings(result)
    assert limits is not None
    copy, gemms = limits
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    intensities = [point.intensity for point in found]
    span = [min(intensities) / 2, max(intensities) * 2]
    for dtype in roofline.ROOFS:
        rate = gemms[dtype]
        line: dict[str, Any] = {"color": "0.55", "linewidth": 1.0, "zorder": 1.5}
        corner = rate / copy
        axes.plot([span[0], corner, span[1]], [copy * span[0], rate, rate], **line)
        text = f"{dtype} GEMM, {rate / 1e9:,.0f} GFLOP/s"
        axes.annotate(text, (corner, rate), (24, 3), textcoords="offset points", fontsize=8)
    axes.annotate(f"copy, {copy / 1e9:.0f} GB/s", (span[0], copy * span[0]), (12, 0),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    for number, label in enumerate(dict.fromkeys(point.label for point in found)):
        mine = [point for point in found if point.label == label]
        x, y = ([getattr(point, name) for point in mine] for name in ("intensity", "rate"))
        axes.plot(x, y, MARKERS[number], color=f"C{number}", label=label)
    axes.set(
        title=f"Roofline of {name_of(result['machine'])}",
        xlabel="FLOP per byte, the least that a case needs",
        ylabel="attained FLOP per second",
        xscale="log",
        yscale="log",
    )
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, format="png", metadata={"Software": None})


@styled()
def draw_headline(result: dict[str, Any], path: Path) -> None:
    """Draw time and memory of three ops' first cases as bars, beside torch's and the floor."""
    from matplotlib.figure import Figure

    suite = table.suite_of(result)
    figure = Figure(figsize=(8, 5.2))
    machine = name_of(result["machine"])
    figure.suptitle(f"One step on {machine}", x=0.01, ha="left")
    for (op, title), (left, right) in zip(
        HEADLINE_OPS.items(), figure.subplots(len(HEADLINE_OPS), 2), strict=True
    ):
        case = cases(suite, op)[0]
        found = table.find(result, op, case.name)
        rows = {row["peer"]: row for row in found["peers"]} if found else {}
        floor = growth.floor_of(op)
        names = ["ours", floor, *PICTURED]
        _bars(left, rows, names, "seconds", table.duration)
        _bars(right, rows, names, "peak_bytes", table.size)
        shape = " ".join(f"{key}={size:,}" for key, size in case.shape.items())
        left.set_title(f"{title}\n{shape} {case.dtype}: time", fontsize=9)
        right.set_title("peak memory above the inputs", fontsize=9)
        left.set_yticks(range(len(names)), ["synface_kernels", f"floor: {floor}", *PICTURED])
        left.get_yticklabels()[0].set_fontweight("bold")
        left.tick_params(length=0)
    figure.savefig(path, format="png", metadata={"Software": None})


def _bars(
    axes: Any, rows: dict[str, Any], names: list[str], key: str, text: Callable[[float], str]
) -> None:
    """Draw a bar for each name, with its number, and a time's multiple of ours."""
    found = [rows.get(name, {}) for name in names]
    numbers = [row.get(key) or 0 for row in found]
    for place, (row, number) in enumerate(zip(found, numbers, strict=True)):
        color = ("C1", "0.75", "C0", "C0")[place]
        axes.barh(place, number, height=0.72, color=color)
        label = text(number) if key in row else "not measured"
        if key == "seconds" and place and "ratio" in row:
            label += f", {row['ratio']:.2f}×"
        axes.annotate(label, (number, place), (4, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    axes.set(xlim=(0, 1.5 * max(*numbers, 1e-9)), ylim=(len(names) - 0.5, -0.5))
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
