"""The integer labels that heads and mixers take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def labels_of(target: Any, keep_column: bool = False) -> Any:
    """Return integer labels as int64, and (N, 1) as (N,) unless ``keep_column`` is set.

    Invalid labels are returned as they are, for the caller to raise on all ranks of a process
    group: a rank that raised alone would deadlock the others.
    """
    if not isinstance(target, Tensor) or target.dtype == torch.bool:
        return target
    if target.is_floating_point() or target.is_complex():
        return target
    if target.dim() == 2 and target.shape[1] == 1 and not keep_column:
        target = target.squeeze(1)
    return target.to(torch.int64)
