"""What the ops' argument checks share."""

from __future__ import annotations

from torch import Tensor


def describe(value: object) -> str:
    """A tensor's dtype, shape and device, or a value's type."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    kind = str(value.dtype).removeprefix("torch.")
    return f"{kind} {tuple(value.shape)} on {value.device}"
