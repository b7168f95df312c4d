"""Parts of the Triton kernels and launchers that several ops share."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# What a launcher may hold at a time, beside its inputs and results.
WORKSPACE_BYTES = 64 << 20
# CUDA's limits of a grid along x, y and z.
GRID_LIMITS = (2**31 - 1, 65535, 65535)


@triton.jit
def tangent(vector, unit, scale):
    """Return scale·(v − (û·v)·û): a gradient by one row from that by its unit vector û."""
    return scale * (vector - tl.sum(unit * vector, 0) * unit)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **config: Any) -> None:
    """Launch a kernel on the device of its first argument, whatever device is current.

    Every launch of this library comes through here.

    Args:
        kernel: a `triton.jit` function.
        grid: the number of programs along each axis.
        args, config: its arguments, of which the first is a tensor, and its options.

    Raises:
        ValueError: for more programs along an axis than a GPU takes.
    """
    if any(programs > limit for programs, limit in zip(grid, GRID_LIMITS, strict=False)):
        raise ValueError(
            f"{kernel.__name__} would need a grid of {grid} programs, more than {GRID_LIMITS}: "
            "split the batch"
        )
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **config)


def mm(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
    """Write the GEMM a @ b into float32 ``out``, or add it; whatever the factors' dtype."""
    if a.device.type != "cuda":  # the interpreter's CPU has no GEMM of two dtypes
        a, b = a.float(), b.float()
    narrow: dict[str, Any] = {} if a.dtype == torch.float32 else {"out_dtype": torch.float32}
    if accumulate:
        return torch.addmm(out, a, b, out=out, **narrow)
    return torch.mm(a, b, out=out, **narrow)
