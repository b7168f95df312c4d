"""What `torch.autocast` asks of the ops, which compute in dtypes of their own otherwise."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


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
    return torch.autocast(device.type, enabled=False) if _enabled(device.type) else nullcontext()


def _enabled(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
