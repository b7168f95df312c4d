"""Support for `torch.autocast`: its dtype for the ops' GEMMs, none of it for their plain torch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Asked once, for torch.compile traces the question in newer versions of torch alone.
_DEVICES = [each for each in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(each)]


def gemm_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype of GEMMs under autocast on the tensor's device; None without it.

    As in torch, autocast leaves float64 as it is.

    Raises:
        ValueError: if autocast's dtype is neither bfloat16 nor float16.
    """
    if tensor.dtype == torch.float64 or not _enabled(tensor.device.type):
        return None
    dtype = torch.get_autocast_dtype(tensor.device.type)
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"autocast's dtype on {tensor.device.type} must be bfloat16 or float16, got {dtype}"
        )
    return dtype


def suspended(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast does not alter plain torch on the device."""
    return off(device) if _enabled(device.type) else nullcontext()


def off(device: torch.device) -> AbstractContextManager[object]:
    """Return `suspended` for a backward pass, which compiles where autocast is off and runs later.

    A compiled graph has no autocast to suspend at the time when it is traced.
    """
    return torch.autocast(device.type, enabled=False) if device.type in _DEVICES else nullcontext()


def _enabled(device: str) -> bool:
    return device in _DEVICES and torch.is_autocast_enabled(device)
