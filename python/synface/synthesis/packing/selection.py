"""Selection of points that are far apart, among given ones, by any descriptor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...common.check import check_integer, describe


def farthest_points(rows: Tensor, count: int, *, first: int = 0) -> Tensor:
    """Return the indices of ``count`` rows that greedy farthest-point selection chooses.

    It starts at one row, and adds the row that is farthest from its nearest among those chosen,
    the first of equal ones. No other choice of as many rows has a smallest distance between two
    that is more than twice this one's.

    It packs identities by what a face generator makes of them: the rows describe the faces of
    candidates, and nothing else is needed of the generator, no gradient either. Packing the
    embeddings instead separates the faces only as far as the generator preserves distances.

    Args:
        rows: (M, D) floating descriptors, finite, compared by their Euclidean distance; of unit
            rows this is by their cosine.
        count: number of rows to choose, at most M.
        first: index of the row to start at.

    Returns:
        (count,) int64, in the order of selection; the first n are the selection of n rows.

    Raises:
        TypeError, ValueError: for an argument out of range, and rows of another shape or dtype or
            that are not finite.

    Memory: 8·M·D bytes. Time: O(count·M·D).
    Source: Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985.
    """
    if not isinstance(rows, Tensor):
        raise TypeError(f"rows must be a tensor, got {type(rows).__name__}")
    if rows.ndim != 2 or not rows.is_floating_point():
        raise ValueError(f"rows must be floating point of shape (M, D), got {describe(rows)}")
    if len(bad := (~rows.isfinite().all(1)).nonzero()):
        raise ValueError(f"rows must be finite, row {int(bad[0])} is not")
    check_integer("count", count, 1)
    check_integer("first", first, 0)
    if count > len(rows):
        raise ValueError(f"count must be at most the {len(rows)} rows, got {count}")
    if first >= len(rows):
        raise ValueError(f"first must be less than the {len(rows)} rows, got {first}")
    rows = rows.detach().cpu().double()
    nearest = np.full(len(rows), np.inf)
    chosen = [first]
    while len(chosen) < count:
        # Without matrix products, so that equal rows are at distance 0.
        mode = "donot_use_mm_for_euclid_dist"
        distance = torch.cdist(rows, rows[chosen[-1:]], compute_mode=mode)[:, 0]
        np.minimum(nearest, distance.numpy(), out=nearest)
        nearest[chosen[-1]] = -np.inf  # never again, also where other rows equal it
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen, device="cpu")
