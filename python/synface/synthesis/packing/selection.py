"""Selection of points that are far apart, among given ones, by any descriptor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...common.check import check_integer, check_rows, describe


def farthest_points(rows: Tensor, count: int, *, first: int = 0) -> Tensor:
    """Return the indices of ``count`` rows that greedy farthest-point selection chooses.

    It starts at one row, and adds the row whose largest cosine to those chosen is the lowest, the
    first of equal ones. No other choice of as many rows has a smallest angle between two that is
    more than twice this one's.

    It packs identities by what a face generator makes of them: the rows describe the faces of
    candidates, and nothing else is needed of the generator, no gradient either. Packing the
    embeddings instead separates the faces only as far as the generator preserves distances.

    Args:
        rows: (M, D) floating descriptors, finite, no row zero; compared by their cosine.
        count: number of rows to choose, at most M.
        first: index of the row to start at.

    Returns:
        (count,) int64, in the order of selection; their first n are the selection of n rows.

    Raises:
        TypeError, ValueError: for an argument out of range, rows of another shape or dtype, and a
            row that is zero or not finite.

    Memory: 16·M·D bytes. Time: O(count·M·D).
    Source: Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985.
    """
    if not isinstance(rows, Tensor):
        raise TypeError(f"rows must be a tensor, got {type(rows).__name__}")
    if rows.ndim != 2 or not rows.is_floating_point():
        raise ValueError(f"rows must be floating point of shape (M, D), got {describe(rows)}")
    check_integer("count", count, 1)
    check_integer("first", first, 0)
    if count > len(rows):
        raise ValueError(f"count must be at most the {len(rows)} rows, got {count}")
    if first >= len(rows):
        raise ValueError(f"first must be less than the {len(rows)} rows, got {first}")
    unit = (rows.double() / check_rows("rows", rows)).detach().cpu()
    nearest = np.full(len(unit), -np.inf)
    chosen = [first]
    while len(chosen) < count:
        np.maximum(nearest, (unit @ unit[chosen[-1]]).numpy(), out=nearest)
        nearest[chosen[-1]] = np.inf  # never again, also where other rows equal it
        chosen.append(int(nearest.argmin()))
    return torch.tensor(chosen, device="cpu")
