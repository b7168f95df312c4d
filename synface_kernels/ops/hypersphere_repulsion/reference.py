"""The definition in plain torch over all pairs, for reading and for running in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._norms import shortened
from .energies import R_MIN


class Neighbors(NamedTuple):
    """Points' nearest neighbors, nearest first.

    Attributes:
        square: (N, k) squared distances, in double.
        indices: (N, k) int64 row indices.
    """

    square: Tensor
    indices: Tensor


def normalize(rows: Tensor) -> Tensor:
    """Return rows divided by their norms."""
    rows = shortened(rows)
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def direction(difference: Tensor, x: Tensor, i: Tensor, j: Tensor, symmetric: bool) -> Tensor:
    """Return unit vectors from x̂_j to x̂_i; for identical points along the axis of `energies`.

    Args:
        difference: (P, D) x̂_i − x̂_j; x: (P, D) x̂_i; i, j: (P,) indices.
        symmetric: whether i and j index the same points.
    """
    dim = x.shape[1]
    axis = (i + j) % dim
    along = x.gather(1, axis[:, None]).squeeze(1).abs() > 0.8
    unit = torch.nn.functional.one_hot((axis + along) % dim, dim).to(x.dtype)
    if symmetric:
        unit = torch.where((i < j)[:, None], unit, -unit)
    length = torch.linalg.vector_norm(difference, dim=1, keepdim=True)
    return torch.where(length > 0, difference / length.where(length > 0, 1), unit)


def _touching(x: Tensor, y: Tensor, i: Tensor, j: Tensor, symmetric: bool) -> Tensor:
    """Return zeros (P,) whose gradient is that of r²/(2·r_min): the pairs' directions."""
    difference = x[i] - y[j]
    unit = direction(difference.detach(), x[i].detach(), i, j, symmetric)
    return ((difference - difference.detach()) * unit).sum(1)


def pair_energy(
    x: Tensor, y: Tensor | None, kind: str, a: float, power: int, r_min: float
) -> Tensor:
    """Return Σ_pairs f(r_ij), or log Σ_pairs exp(a·c_ij).

    Args:
        x: (N, D); y: (M, D), or None for the pairs i < j of x; floating point.
        kind, a, power, r_min: the fields of `energies.Potential`.

    Memory: O(N·M), by definition.
    """
    symmetric = y is None
    x = normalize(x)
    y = x if y is None else normalize(y)
    # Distances from differences of coordinates: 2 − 2·c would cancel for close pairs.
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = torch.ones_like(distance, dtype=torch.bool)
    pairs = pairs.triu(1) if symmetric else pairs
    if x.device.type != "meta":  # where no pair is known to be close
        i, j = (pairs & (distance < r_min)).nonzero(as_tuple=True)
        distance = distance.index_put((i, j), r_min + _touching(x, y, i, j, symmetric))
    square = torch.where(pairs, distance, 1).square()  # others' terms are finite, and left out
    if kind == "log_sum_exp":
        return torch.where(pairs, a * (1 - square / 2), -torch.inf).flatten().logsumexp(0)
    if kind == "riesz":
        terms = square.pow(-a / 2)
    elif kind == "log":
        terms = -square.log() / 2
    else:
        terms = (1 - square / 2 - a).clamp_min(0).pow(power) / power
    return torch.where(pairs, terms, 0).sum()


def nearest(x: Tensor, y: Tensor | None, k: int, dtype: torch.dtype) -> Neighbors:
    """Find each row's k nearest neighbors, by cosines rounded to dtype, then by the lowest index.

    The derivative of r² is 2·max(r, r_min) along the pair's direction.

    Memory: O(N·M), by definition.
    """
    symmetric = y is None
    x = normalize(x)
    y = x if y is None else normalize(y)
    n = x.shape[0]
    square = torch.cdist(
        x.detach(), y.detach(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()
    cosine = (1 - square / 2).to(dtype)
    if symmetric:
        cosine.fill_diagonal_(-torch.inf)
    index = cosine.sort(dim=1, descending=True, stable=True).indices[:, :k]
    i, j = torch.arange(n, device=x.device).repeat_interleave(k), index.flatten()
    square = (x[i] - y[j]).square().sum(1)
    touching = square < R_MIN**2
    gradient = 2 * R_MIN * _touching(x, y, i, j, symmetric)
    square = torch.where(touching, square.detach() + gradient, square)
    return Neighbors(square.view(n, k), index)
