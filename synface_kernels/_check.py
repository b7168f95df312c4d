"""What the ops' argument checks share."""

from __future__ import annotations

import torch
from torch import Tensor


def describe(value: object) -> str:
    """A tensor's dtype, shape and device, or a value's type."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    kind = str(value.dtype).removeprefix("torch.")
    return f"{kind} {tuple(value.shape)} on {value.device}"


def require(condition: Tensor, message: str, values: Tensor) -> None:
    """That all of a condition holds: at once, naming the first value for which it does not, on a
    CPU; without waiting, on a GPU."""
    if condition.device.type != "cpu":
        torch._assert_async(condition.all(), message)
    elif not bool(condition.all()):
        where = tuple((~condition).nonzero()[0].tolist())
        at = where[0] if len(where) == 1 else where
        raise ValueError(f"{message}, got {values[where].item()} at {at}")
