"""Tools of the tests and benchmarks: an accuracy check against float64, and peak memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ._memory import empty_cache

__all__ = ["assert_as_exact_as_torch", "peak_bytes", "peak_cuda_bytes"]


def assert_as_exact_as_torch(
    actual: Tensor,
    exact: Tensor,
    torch_result: Tensor,
    *,
    atol: float | Tensor,
    name: str = "result",
) -> None:
    """Assert |actual − exact| ≤ 2·max|torch_result − exact| + atol, elementwise.

    Args:
        actual: the implementation's result; any floating dtype.
        exact: the float64 reference, of the same shape.
        torch_result: the result of plain torch in the implementation's dtype.
        atol: a small absolute term, in the result's unit: one for all elements, or one each.
        name: the result's name in the message.

    Raises:
        AssertionError: with the worst element, its error and the allowed error; also where
            other elements are finite than in ``exact``.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    actual, torch_result = actual.detach().double().cpu(), torch_result.detach().double().cpu()
    exact = exact.detach().double().cpu()
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: non-finite elements differ"
    if not finite.any():
        return
    own = (torch_result - exact)[finite].abs().max()
    error = torch.where(finite, (actual - exact).abs(), 0)
    allowed = (2 * own + atol).expand_as(error)
    worst = (error - allowed).argmax()
    off, most = error.flatten()[worst], allowed.flatten()[worst]
    assert off <= most, (
        f"{name}: error {off:.3g} at flat index {worst} (got {actual.flatten()[worst]:.9g},"
        f" exact {exact.flatten()[worst]:.9g}); allowed {most:.3g}, torch's own {own:.3g}"
    )


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak resident memory of this process during run(), above that before it (Linux).

    Memory that was freed before goes back to the system first, the cache of CPU results included.
    """
    gc.collect()
    empty_cache()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def peak_cuda_bytes(run: Callable[[], object]) -> int:
    """Return the peak of torch's memory on the GPU during run(), above that before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def status(field: str) -> int:
    """Return a field of Linux's process status in bytes: VmRSS (resident) or VmHWM (its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
