"""Argument checks that several ops share."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeGuard

import torch
from torch import Tensor


def describe(value: object) -> str:
    """Return a tensor's dtype, shape and device as text, or the type of any other value."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    kind = str(value.dtype).removeprefix("torch.")
    if value.is_nested:
        return f"nested {kind} on {value.device}, which is not dense"
    if not is_dense(value):
        layout = str(value.layout).removeprefix("torch.")
        return f"{layout} {kind} {tuple(value.shape)} on {value.device}, which is not dense"
    return f"{kind} {tuple(value.shape)} on {value.device}"


def is_dense(value: object) -> TypeGuard[Tensor]:
    """Return whether a value is a tensor, and not a sparse or nested one."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested


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
                raise TypeError  # reading its value might wait for a GPU
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


def capturing(tensor: Tensor) -> bool:
    """Return whether a CUDA graph captures what is done with the tensor, outside of compilers."""
    return (
        tensor.device.type == "cuda"
        and not torch.compiler.is_compiling()
        and torch.cuda.is_current_stream_capturing()
    )


def require(condition: Tensor, message: str, values: Tensor) -> None:
    """Raise ValueError unless a condition holds everywhere; on a GPU, assert asynchronously.

    On a CPU the message ends with the first value for which the condition fails, and its index.
    """
    if condition.device.type != "cpu":
        torch._assert_async(condition.all(), message)
    elif not bool(condition.all()):
        where = tuple((~condition).nonzero()[0].tolist())
        at = where[0] if len(where) == 1 else where
        raise ValueError(f"{message}, got {values[where].item()} at {at}")


def require_apart(written: Mapping[str, object], read: Mapping[str, object]) -> None:
    """Raise ValueError where memory to be written overlaps itself or another argument's.

    Different columns of one larger matrix do not overlap. Arguments other than tensors are skipped.
    """
    tensors = {n: t for n, t in (*written.items(), *read.items()) if isinstance(t, Tensor)}
    spans = {name: _span(tensor) for name, tensor in tensors.items()}
    reached, clear = 0, True
    for begin, end in sorted(spans.values()):
        clear, reached = clear and begin >= reached, max(reached, end)
    for name in written:
        if name not in spans:
            continue
        tensor, (begin, end) = tensors[name], spans.pop(name)
        if not tensor.is_contiguous() and _overlaps_itself(tensor):
            raise ValueError(
                f"{name} must not overlap itself: more than one element of the written-to tensor "
                "refers to a single memory location; clone() it"
            )
        if clear:
            continue
        for other, (first, last) in spans.items():
            if begin < last and first < end and not _side_by_side(tensor, tensors[other]):
                raise ValueError(
                    f"{name} must not share memory with {other}: elements of the input tensor and "
                    "the written-to tensor refer to a single memory location; clone() one of them"
                )


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte and past its last; (0, 0) if it is empty."""
    size = tensor.nbytes
    if size and not tensor.is_contiguous():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        size = (sum((count - 1) * step for count, step in steps) + 1) * tensor.element_size()
    begin = tensor.data_ptr()
    return (begin, begin + size) if size and begin else (0, 0)


def _overlaps_itself(tensor: Tensor) -> bool:
    """Return whether two elements may share an address."""
    reach = 0  # greatest offset that the dimensions of smaller stride reach
    for step, count in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if count > 1 and step <= reach:
            return True
        reach += (count - 1) * step
    return False


def _side_by_side(first: Tensor, second: Tensor) -> bool:
    """Return whether two matrices are different columns of a larger one."""
    if not first.dim() == second.dim() == 2:
        return False
    rows = [[step * t.element_size() for step in t.stride()] for t in (first, second)]
    (pitch, step), (other_pitch, other_step) = rows
    if not pitch or pitch != other_pitch:
        return False
    gap = (second.data_ptr() - first.data_ptr()) % pitch  # from a row of one to a row of the other
    return first.shape[1] * step <= gap <= pitch - second.shape[1] * other_step
