"""What a packing looks like: its points' nearest neighbors, and the way there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import synface_kernels as sk

from ...reporting.plots import ACCENT, INK, QUIET, figure, save
from . import bounds
from .packer import Packed

COLORS = (ACCENT, INK, "#2980b9")


def plot(packings: Sequence[Packed], path: Path) -> None:
    """Writes a PNG of packings of one (N, d): nearest neighbors' cosines, and worst over time."""
    first = packings[0]
    count, dim = first.points.shape
    nearest = [sk.nearest_neighbors(p.points)[0][:, 0].double().cpu().numpy() for p in packings]
    worst_random = bounds.random_worst(count, dim)

    new, (left, right) = figure(11, 4.4, 1, 2)
    low = min(first.bound.cosine, *(float(n.min()) for n in nearest))
    high = max(worst_random, *(p.worst for p in packings))
    margin = 0.05 * (high - low) + 1e-6
    edges = np.linspace(low - margin, high + margin, 121)
    for packing, cosines, color in zip(packings, nearest, COLORS, strict=False):
        share = np.histogram(cosines, edges)[0] / count
        label = f"{packing.config.objective}: worst {packing.worst:.4f}"
        left.stairs(share, edges, fill=True, alpha=0.6, color=color, label=label)
    random = np.diff(bounds.random_nearest_cdf(edges, count, dim))
    left.stairs(random, edges, color=QUIET, label=f"random: worst about {worst_random:.4f}")
    left.set_xlabel("cosine to the nearest neighbor")
    left.set_ylabel("share of the points")
    left.set_title(f"{count:,} points in {dim} dimensions")

    for packing, color in zip(packings, COLORS, strict=False):
        seconds, _, worst = zip(*packing.history, strict=True)
        right.plot(seconds, worst, color=color, label=packing.config.objective)
    right.set_xlabel("seconds")
    right.set_ylabel("worst cosine")
    right.set_title("Worst cosine over time (exact)")
    name = f"{first.bound.name} bound {first.bound.cosine:.4f}"
    left.axvline(first.bound.cosine, color="black", linestyle=":", label=name)
    right.axhline(first.bound.cosine, color="black", linestyle=":", label=name)
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
    save(new, path)
