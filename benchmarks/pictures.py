"""Pictures of the committed results: growth and the roofline; `python -m benchmarks.table` draws.

The style is the file of the training layer's plots, which is read without importing it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import growth, roofline
from .process import ROOT
from .table import PAGE, name_of

STYLE = ROOT / "python" / "synface" / "reporting" / "style.mplstyle"
PALE = 0.4  # opacity of the floors
MARKERS = "osD^vPX*"


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
