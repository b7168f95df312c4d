"""The integer labels that heads and mixers take."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

_NO_CLASS = -(2**63)  # unlike -1 or -100 no label that a caller may have meant


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


def ignored_outside(target: Any, ignore_index: Any, num_classes: int) -> tuple[Any, Any]:
    """Return labels whose ignored ones are outside [0, num_classes), and the value of these.

    `synface_kernels.sample_classes` replaces labels by indices, and a class's index may equal an
    ``ignore_index`` inside. Invalid arguments are returned as they are, for the op to raise.
    """
    valid = isinstance(ignore_index, Integral) and not isinstance(ignore_index, bool)
    if not (valid and 0 <= ignore_index < num_classes and isinstance(target, Tensor)):
        return target, ignore_index
    return target.masked_fill(target == ignore_index, _NO_CLASS), _NO_CLASS
