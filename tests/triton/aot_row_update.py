"""The row updates' launches, and what their kernels may take; see aot.py."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from synface_kernels.ops.row_update import kernel_triton
from synface_kernels.ops.row_update.reference import Update

REGISTERS = 128
NOT_FUSED = "f32"  # a fused multiply-add would give other bits than the definition


def launch() -> None:
    """Launch plain steps, and those that catch up, with stochastic rounding where there is any."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ids = empty(4096, dtype=torch.int64)
    for dtype, lazy in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        w, g = empty(10**6, 512, dtype=dtype), empty(4096, 512, dtype=dtype)
        last = empty(10**6, dtype=torch.int64) if lazy else None
        update = Update(w, g, ids, last, step=9, seed=1)
        kernel_triton.sgd(update, None, 0.1, 0.0, 0.1, 0.0, False)
        kernel_triton.sgd(update, w, 0.1, 0.9, 0.1, 0.0, True)
        kernel_triton.adamw(update, w, w, 0.1, 0.9, 0.999, 1e-8, 0.1)
