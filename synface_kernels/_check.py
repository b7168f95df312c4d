"""What the ops' argument checks share."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def describe(value: object) -> str:
    """A tensor's dtype, shape and device, or a value's type."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    kind = str(value.dtype).removeprefix("torch.")
    return f"{kind} {tuple(value.shape)} on {value.device}"


def number(name: str, value: Any, expected: str = "a float") -> float:
    """Return a real number, NumPy's too, as a float; raise TypeError for anything else."""
    kinds = (int, float, torch.SymInt, torch.SymFloat, Real)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name} must be {expected}, got {_shown(value)}")
    return float(value)


def integer(name: str, value: Any, least: int, expected: str = "an int") -> int:
    """Return an integer, NumPy's too, as an int in [least, 2^63); raise TypeError or ValueError."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be {expected}, got {_shown(value)}")
    if not isinstance(value, (int, torch.SymInt)):
        try:
            if isinstance(value, Tensor):
                raise TypeError  # whose value might be on a GPU
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be {expected}, got {_shown(value)}") from None
    if value < least:
        bound = f"be at least {least}" if least else "not be negative"
        raise ValueError(f"{name} must {bound}, got {value}")
    if value >= 2**63:
        raise ValueError(f"{name} must be less than 2^63, got {value}")
    return value


def _shown(value: object) -> str:
    return describe(value) if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"


def require(condition: Tensor, message: str, values: Tensor) -> None:
    """That all of a condition holds: at once, naming the first value for which it does not, on a
    CPU; without waiting, on a GPU."""
    if condition.device.type != "cpu":
        torch._assert_async(condition.all(), message)
    elif not bool(condition.all()):
        where = tuple((~condition).nonzero()[0].tolist())
        at = where[0] if len(where) == 1 else where
        raise ValueError(f"{message}, got {values[where].item()} at {at}")
