"""Norms of rows of any finite length."""

from __future__ import annotations

import torch
from torch import Tensor

# Squares of elements up to this do not overflow float32, nor do sums of billions of them.
LONG = 2.0**50


def length_unit(rows: Tensor) -> Tensor:
    """Return (N, 1): 1, or a row's largest magnitude where its squares might overflow."""
    most = rows.detach().abs().amax(1, keepdim=True)
    return torch.where(most > LONG, most, 1.0)


def shortened(rows: Tensor) -> Tensor:
    """Return (N, D) rows of the same directions, none of which is too long for a norm."""
    return rows / length_unit(rows)
