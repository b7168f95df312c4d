"""Parts of the Triton kernels and launchers that several ops share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._select import interpreting

# What a launcher may hold at a time, beside its inputs and results.
WORKSPACE_BYTES = 64 << 20
# CUDA's limits of a grid along x, y and z.
GRID_LIMITS = (2**31 - 1, 65535, 65535)

_INTERPRETED = tl.constexpr(interpreting())


class Chip(NamedTuple):
    """A GPU's compute capability, times ten, and its number of multiprocessors."""

    capability: int
    multiprocessors: int


def chip_of(device: torch.device) -> Chip:
    """Return a GPU's chip; for the interpreter's CPU, an H100's of one multiprocessor."""
    if device.type != "cuda":
        return Chip(90, 1)
    found = torch.cuda.get_device_properties(device)
    return Chip(10 * found.major + found.minor, found.multi_processor_count)


def float32_precision() -> str:
    """Return the precision of torch's own float32 GEMMs on a GPU, as `tl.dot` names it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def round_up(value: int, multiple: int) -> int:
    return triton.cdiv(value, multiple) * multiple


@triton.jit
def dot(a, b, product, PRECISION: tl.constexpr):
    """Return a @ b + product, with float32 sums."""
    if _INTERPRETED:  # whose dot takes bfloat16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, product, input_precision=PRECISION)


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
