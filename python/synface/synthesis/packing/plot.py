"""Plots of packings: the cosines of nearest neighbors, and the worst cosine over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

import synface_kernels as sk

from ...reporting.plots import (
    QUIET,
    REFERENCE,
    bins_of,
    colors,
    densities,
    density_steps,
    figure,
    finish,
    log_scale,
    save,
    styled,
)
from . import bounds
from .packer import Packed

SAMPLED_FROM = 20_000  # points, of which a plot shows the neighbors of
SAMPLE = 4_000  # evenly spaced ones


@styled()
def plot(packings: Sequence[Packed], path: Path) -> None:
    """Plot nearest neighbors' cosines and the worst one over the run, of packings of one (N, d).

    The second plot is over seconds for runs limited by time, else over steps, so that it is the
    same for the same packings.
    """
    first = packings[0]
    count, dim = first.points.shape
    nearest = [_nearest(p.points) for p in packings]
    worst_random = bounds.random_worst(count, dim)

    new, (left, right) = figure(9.5, 4.2, 1, 2)
    low = min(first.bound.cosine, *(float(n.min()) for n in nearest))
    high = max(worst_random, *(p.worst for p in packings))
    margin = 0.05 * (high - low) + 1e-6
    edges = np.linspace(low - margin, high + margin, 121)
    timed = first.config.minutes is not None
    shades = colors(len(packings))
    for packing, cosines, color in zip(packings, nearest, shades, strict=True):
        label = f"{packing.config.objective}: worst {packing.worst:.4f}"
        density_steps(left, np.histogram(cosines, edges, density=True)[0], edges, color, label)
        seconds, steps, worst = zip(*packing.history, strict=True)
        right.plot(seconds if timed else steps, worst, color=color, label=label)
    random = np.diff(bounds.random_nearest_cdf(edges, count, dim)) / np.diff(edges)
    label = f"random points: worst about {worst_random:.4f}"
    left.stairs(random, edges, color=QUIET, linewidth=1.5, label=label)
    bound = first.bound.cosine
    line = REFERENCE | {"linestyle": ":", "label": f"{first.bound.name} bound {bound:.4f}"}
    left.axvline(bound, **line)
    right.axhline(bound, **line)
    left.set_ylim(bottom=0.5 / count / (edges[1] - edges[0]))  # half a point in a bin
    log_scale(left, "y")  # the packed points' are nearly all the same
    title = f"{count:,} points in {dim} dimensions"
    finish(left, title, "cosine to the nearest neighbor", "density (logarithmic)")
    over, unit = ("time", "seconds") if timed else ("steps", "steps")
    finish(right, f"Worst cosine over the {over} (exact)", unit, "worst cosine")
    save(new, path)


def _nearest(points: Tensor) -> np.ndarray:
    """Return the cosines of evenly spaced points to their nearest neighbors among all."""
    rows = points if len(points) < SAMPLED_FROM else points[:: len(points) // SAMPLE]
    if len(rows) == len(points):
        cosine = sk.nearest_neighbors(points)[0][:, 0]
    else:
        cosine = sk.nearest_neighbors(rows, points, 2)[0][:, 1]  # the first is the point itself
    return cosine.double().cpu().numpy()


def plot_nearest(
    nearest: Tensor, dim: int, path: Path, *, others: int | None = None, **lines: float
) -> None:
    """Plot the cosines of rows to their nearest neighbors, beside those of random points.

    Args:
        nearest: (N,) what `nearest_cosines` returns. dim: of the rows.
        others: number of rows among which neighbors were searched; None if among themselves, for
            which the lower bound on the greatest of these cosines is drawn too.
        lines: further cosines to draw lines at, by name.
    """
    cosine, count = nearest.double().cpu().numpy(), len(nearest)
    rivals = count if others is None else others + 1
    shown = dict(lines)
    if dim > 1 and others is None:
        bound = bounds.certificate(count, dim)[0]
        shown = {f"{bound.name} bound {bound.cosine:.4f}": bound.cosine} | shown
    low, high = float(cosine.min()), float(cosine.max())
    if dim > 1:  # to where all but a thousandth of random points have their neighbor
        axis = np.linspace(-1, 1, 20001)
        share = bounds.random_nearest_cdf(axis, rivals, dim)
        first, last = np.searchsorted(share, (0.0005, 0.9995)).tolist()
        low, high = min(low, float(axis[first])), max(high, float(axis[min(last, 20000)]))
    margin = 0.01 * (high - low) + 1e-6
    edges = np.linspace(low - margin, high + margin, bins_of(count) + 1)
    width = edges[1] - edges[0]
    curves = {"these rows": np.histogram(cosine, edges)[0] / count / width}
    if dim > 1:
        curves["random points"] = np.diff(bounds.random_nearest_cdf(edges, rivals, dim)) / width
    among = "" if others is None else f", to the nearest of {others:,} others"
    densities(
        {name: (density, edges) for name, density in curves.items()},
        path,
        title=f"{count:,} rows in {dim} dimensions{among}",
        x="cosine to the nearest neighbor",
        lines=shown,
    )
