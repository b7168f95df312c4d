"""Row norms without overflow, for rows of any finite length."""

from __future__ import annotations

import torch
from torch import Tensor

# Sums of billions of squares of elements up to this do not overflow float32.
LONG = 2.0**50


def length_unit(rows: Tensor) -> Tensor:
    """Return a divisor (N, 1) per row: 1, or its largest magnitude where squares might overflow."""
    most = rows.detach().abs().amax(1, keepdim=True)
    return torch.where(most > LONG, most, 1.0)


def shortened(rows: Tensor) -> Tensor:
    """Return rows (N, D) in the same directions whose norms do not overflow."""
    return rows / length_unit(rows)
