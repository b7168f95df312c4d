"""The closest pairs of rows, and the pairs above a threshold: exact, in blocks, never N×N.

A cosine here is what `sk.nearest_neighbors` returns: computed in double precision, then rounded to
float32, or not rounded for float64 rows. Each row's nearest neighbor says which rows can be in a
close pair at all; these are compared with the others by float64 GEMMs of tiles. A GEMM's cosine is
off by less than `_error`, so only pairs nearer than that to a limit are computed from the
difference of their unit vectors, as the definition does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import synface_kernels as sk

from ...common.check import check_integer, check_number, describe

Progress = Callable[[int, int], None]
_Columns = tuple[np.ndarray, np.ndarray, np.ndarray]  # cosine, i, j of some pairs

TILE_ROWS = 512
TILE_NUMBERS = 1 << 22  # of a tile's cosines, and of its unit vectors
BLOCK = 1 << 30  # pairs that one search for nearest neighbors compares


class ClosePair(NamedTuple):
    """A pair of rows and its cosine.

    Attributes:
        cosine: of the two rows.
        i: index of the first row. j: of the second, in the other rows if there are any, else > i.
    """

    cosine: float
    i: int
    j: int


class PairsAbove(NamedTuple):
    """The pairs whose cosine exceeds a threshold.

    Attributes:
        total: their number.
        pairs: those of the greatest cosines, in the order of `closest_pairs`.
    """

    total: int
    pairs: list[ClosePair]


def number_of_pairs(points: Tensor, other: Tensor | None = None) -> int:
    """Return the number of unordered pairs of rows, or of pairs across two sets of rows."""
    count = len(points)
    return count * (count - 1) // 2 if other is None else count * len(other)


def nearest_cosines(
    points: Tensor, other: Tensor | None = None, *, progress: Progress | None = None
) -> Tensor:
    """Return each row's greatest cosine to a row of other; to another row of its own set if None.

    Exact, as `sk.nearest_neighbors`.

    Args:
        points: (N, D) floating, of any length, no row zero. N ≥ 2, or N ≥ 1 with other.
        other: (M, D) likewise, M ≥ 1; both float64 or neither.
        progress: called as progress(done, total) with numbers of rows, after each block of them.

    Returns:
        (N,) float32, or float64 for float64 rows.

    Raises:
        TypeError, ValueError: for other shapes and dtypes, and rows that are zero or not finite.

    Memory: that of `sk.nearest_neighbors`. Time: half the pairs are computed where there is one set
    of up to 32,768 rows, else all.
    """
    _check(points, other)
    count, gallery = len(points), points if other is None else other
    if other is None and count * count <= BLOCK:
        cosine = sk.nearest_neighbors(points)[0][:, 0]
        if progress is not None:
            progress(count, count)
        return cosine
    size, found = max(1024, BLOCK // len(gallery)), []
    for begin in range(0, count, size):
        rows = points[begin : begin + size]
        if other is None:  # a row may be found itself, or, if there are two others as near, not
            cosine, index = sk.nearest_neighbors(rows, gallery, 2)
            own = torch.arange(begin, begin + len(rows), device=index.device)
            found.append(torch.where(index[:, 0] == own, cosine[:, 1], cosine[:, 0]))
        else:
            found.append(sk.nearest_neighbors(rows, gallery)[0][:, 0])
        if progress is not None:
            progress(begin + len(rows), count)
    return torch.cat(found)


def closest_pairs(
    points: Tensor,
    other: Tensor | None = None,
    count: int = 1,
    *,
    nearest: Tensor | None = None,
    progress: Progress | None = None,
) -> list[ClosePair]:
    """Return the pairs of greatest cosine: of two rows, or of one row each from points and other.

    Exact: no pair that is left out has a greater cosine. Without other, each unordered pair counts
    once.

    Args:
        points, other: as in `nearest_cosines`.
        count: number of pairs, at least 1; all pairs are returned if there are fewer.
        nearest: what `nearest_cosines` returns for these rows, if it is known.
        progress: called as progress(done, total) with numbers of rows, by `nearest_cosines` and
            then by the comparison of the rows that can be in these pairs.

    Returns:
        The pairs by falling cosine; of equal cosines, the lower i and then the lower j comes first.

    Raises:
        TypeError, ValueError: as `nearest_cosines`; for a count under 1.

    Memory: that of `nearest_cosines`, some 100 MiB for tiles, and 100 bytes a pair. Time: that of
    `nearest_cosines`, and N·D for each row that is as near to another as these pairs are: few rows,
    unless count exceeds N or many pairs are equally close.
    """
    check_integer("count", count, 1)
    nearest = _nearest(points, other, nearest, progress)
    slack = _slack(points)
    # Each row's nearest neighbor makes a pair; without other a pair may be there from both ends.
    rank = count if other is not None else 2 * count
    least = -np.inf
    if rank <= len(nearest):
        least = float(nearest.kthvalue(len(nearest) - rank + 1).values)
    best: _Columns = np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64)
    for tile in _tiles(points, other, _rows(nearest, least - slack), progress):
        # No cosine exceeds 1, and rows ascend: then pairs of later rows come after these.
        if least == 1.0 and len(best[0]) == count and int(tile.rows[0]) > best[1][-1]:
            break
        near = tile.cosine >= max(least - slack, -2.0)
        if int(near.sum()) > count:
            kth = float(tile.cosine[near].topk(count, sorted=True).values[-1])
            least = max(least, kth - slack)
            near &= tile.cosine >= least - slack
        best = _best(count, best, tile.exact(near))
        if len(best[0]) == count:
            least = max(least, float(best[0][-1]))
    return [ClosePair(*pair) for pair in zip(*(each.tolist() for each in best), strict=True)]


def pairs_above(
    points: Tensor,
    other: Tensor | None,
    threshold: float,
    limit: int,
    *,
    nearest: Tensor | None = None,
    progress: Progress | None = None,
) -> PairsAbove:
    """Count the pairs whose cosine exceeds a threshold, and return the closest of them.

    Exact: a pair whose cosine equals the threshold is not above it.

    Args:
        points, other, nearest, progress: as in `closest_pairs`.
        threshold: in [-1, 1].
        limit: how many pairs to return at most, at least 0; all are counted.

    Raises:
        TypeError, ValueError: as `closest_pairs`; for a threshold or limit out of range.

    Memory: that of `closest_pairs` for ``limit`` pairs. Time: likewise, and N·D for each row in a
    pair above the threshold.
    """
    check_number("threshold", threshold, -1, 1)
    check_integer("limit", limit, 0)
    nearest = _nearest(points, other, nearest, progress)
    border, error = _border(points, threshold), _error(points)
    count = 0
    for tile in _tiles(points, other, _rows(nearest, threshold - _slack(points)), progress):
        count += int((tile.cosine > border + error).sum())
        near = (tile.cosine - border).abs_() <= error
        count += int((tile.exact(near)[0] > threshold).sum())
    pairs: list[ClosePair] = []
    if count and limit:
        pairs = closest_pairs(points, other, min(count, limit), nearest=nearest, progress=progress)
    return PairsAbove(count, pairs)


class _Tile(NamedTuple):
    """The cosines of some rows with consecutive others.

    Attributes:
        rows: (R,) their indices. start: index of the first other row.
        cosine: (R, C) float64, -inf where a pair does not count.
        left: (R, D), right: (C, D) float64 unit vectors.
        dtype: of exact cosines.
    """

    rows: Tensor
    start: int
    cosine: Tensor
    left: Tensor
    right: Tensor
    dtype: torch.dtype

    def exact(self, chosen: Tensor) -> _Columns:
        """Return the exact cosines of chosen pairs, as float64, and both rows' indices."""
        i, j = chosen.nonzero(as_tuple=True)
        size = max(1, TILE_NUMBERS // self.left.shape[1])
        squares = [
            (self.left[a] - self.right[b]).square_().sum(1)
            for a, b in zip(i.split(size), j.split(size), strict=True)
        ]
        cosine = (1 - torch.cat(squares) / 2).to(self.dtype)
        found = cosine.double(), self.rows[i], j + self.start
        cosines, first, second = (each.cpu().numpy() for each in found)
        return cosines, first, second


def _tiles(
    points: Tensor, other: Tensor | None, rows: Tensor, progress: Progress | None
) -> Iterator[_Tile]:
    """Yield all pairs of the given rows, ascending, and the others; of one set, those after them.

    `progress` is called after each block of rows.
    """
    gallery = points if other is None else other
    columns = max(256, min(TILE_NUMBERS // TILE_ROWS, TILE_NUMBERS // points.shape[1]))
    done = 0
    for block in rows.split(TILE_ROWS):
        if not len(block):
            return
        left = _unit(points[block])
        for start in range(0 if other is not None else int(block[0]) + 1, len(gallery), columns):
            right = _unit(gallery[start : start + columns])
            cosine = left @ right.T
            if other is None:
                index = torch.arange(start, start + len(right), device=block.device)
                cosine.masked_fill_(index <= block[:, None], -torch.inf)
            yield _Tile(block, start, cosine, left, right, _dtype(points))
        done += len(block)
        if progress is not None:
            progress(done, len(rows))


def _best(count: int, *found: _Columns) -> _Columns:
    """Return the first ``count`` pairs among several lists of them, in order."""
    cosine, i, j = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((j, i, -cosine))[:count]
    return cosine[order], i[order], j[order]


def _unit(rows: Tensor) -> Tensor:
    """Return rows as float64 unit vectors; no square overflows or vanishes."""
    rows = rows.double()
    rows = rows / rows.abs().amax(1, keepdim=True)
    return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def _dtype(points: Tensor) -> torch.dtype:
    return torch.float64 if points.dtype == torch.float64 else torch.float32


def _error(points: Tensor) -> float:
    """Return a bound on how far a GEMM's cosine may be from the exact one before its rounding.

    With u = 2⁻⁵³, a sum of D products is off by D·u, half a squared distance of up to 4 by 2·D·u.
    """
    return (points.shape[1] + 16) * 2.0**-51


def _slack(points: Tensor) -> float:
    """Return how far a GEMM's cosine, or the search's, may be from the exact one, rounded."""
    return 2 * _error(points) + torch.finfo(_dtype(points)).eps


def _border(points: Tensor, threshold: float) -> float:
    """Return the number above which a cosine in double precision is rounded to over a threshold."""
    if _dtype(points) == torch.float64:
        return threshold
    below = np.float32(threshold)
    if float(below) > threshold:
        below = np.nextafter(below, np.float32(-np.inf))
    return (float(below) + float(np.nextafter(below, np.float32(np.inf)))) / 2


def _rows(nearest: Tensor, least: float) -> Tensor:
    """Return the rows whose nearest neighbor has at least some cosine."""
    return (nearest.double() >= least).nonzero()[:, 0]


def _nearest(
    points: Tensor, other: Tensor | None, nearest: Tensor | None, progress: Progress | None
) -> Tensor:
    if nearest is None:
        return nearest_cosines(points, other, progress=progress)
    _check(points, other)
    if nearest.shape != points.shape[:1] or nearest.dtype != _dtype(points):
        raise ValueError(
            f"nearest must be what nearest_cosines returns for these {len(points)} rows, "
            f"got {describe(nearest)}"
        )
    return nearest


def _check(points: Tensor, other: Tensor | None) -> None:
    for name, rows, shape in (("points", points, "(N, D)"), ("other", other, "(M, D)")):
        if rows is None and name == "other":
            continue
        if not isinstance(rows, Tensor):
            raise TypeError(f"{name} must be a tensor, got {describe(rows)}")
        if rows.ndim != 2 or not rows.is_floating_point() or 0 in rows.shape:
            raise ValueError(
                f"{name} must be floating point of shape {shape}, got {describe(rows)}"
            )
    if other is None and len(points) < 2:
        raise ValueError("points must have at least 2 rows without other, got 1")
    if other is not None and points.shape[1] != other.shape[1]:
        raise ValueError(
            "points and other must have the same dimension, got "
            f"{points.shape[1]} and {other.shape[1]}"
        )
