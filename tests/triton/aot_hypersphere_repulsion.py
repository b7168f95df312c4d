"""Hypersphere repulsion's launches, and what its kernels may take; see aot.py."""

from __future__ import annotations

from unittest import mock

import torch

from synface_kernels.ops.hypersphere_repulsion import kernel_triton

REGISTERS, STACK = 128, 16
NOT_FUSED = None


def launch(capability: int) -> None:
    """Launch for points alone and with a gallery."""

    def points(n: int, d: int, dtype: torch.dtype) -> kernel_triton.Points:
        norms = torch.empty(n, dtype=torch.float64, device="meta")
        return kernel_triton.Points(torch.empty(n, d, dtype=dtype, device="meta"), norms)

    kinds = (("log_sum_exp", 40.0), ("riesz", 2.5), ("log", 0.5), ("hinge", 0.1))
    with mock.patch.object(kernel_triton, "mm", lambda a, b, out: out):  # none on meta tensors
        for dtype, gallery, potentials, k in (
            (torch.float32, False, kinds, 1),
            (torch.float32, True, kinds[:1], 16),
            (torch.bfloat16, False, kinds[:1], 16),
        ):
            x = points(10_000, 512, dtype)
            y = points(5_001, 512, dtype) if gallery else None
            for kind, a in potentials:
                kernel_triton.pairs(x, y, kind, a, 2, 1e-6, True, gallery)
            square, index = kernel_triton.nearest(x, y, k)
            kernel_triton.nearest_backward(x, y, index, square, 1e-6, True, gallery)
