"""Hypersphere repulsion's launches, and what its kernels may take; see aot.py."""

from __future__ import annotations

from unittest import mock

import torch

from synface_kernels.ops.hypersphere_repulsion import launch_triton

REGISTERS = 128
NOT_FUSED = None
# The potentials, their parameter, and the power of the hinge.
KINDS = (("log_sum_exp", 40.0, 0), ("riesz", 2.5, 0), ("log", 0.5, 0), ("hinge", 0.1, 2))


def launch() -> None:
    """Launch for points alone and with a gallery."""
    for dtype, gallery, kinds, k, precision in (
        (torch.float32, False, KINDS[:1], 1, "ieee"),
        (torch.float32, True, KINDS[1:2], 16, "tf32"),
        (torch.bfloat16, False, KINDS, 16, "ieee"),
        (torch.float16, False, KINDS[:1], 1, "ieee"),
    ):
        x = _points(10_240, 512, dtype)
        y = _points(5_120, 512, dtype) if gallery else None
        with mock.patch.object(launch_triton, "float32_precision", return_value=precision):
            launch_triton.pairs(x, y, *kinds[0], 1e-6, False, False)
            for kind, a, power in kinds:
                launch_triton.pairs(x, y, kind, a, power, 1e-6, True, gallery)
            square, index = launch_triton.nearest(x, y, k)
        launch_triton.nearest_backward(x, y, index, square, 1e-6, True, gallery)


def _points(n: int, d: int, dtype: torch.dtype) -> launch_triton.Points:
    norms = torch.empty(n, dtype=torch.float64, device="meta")
    return launch_triton.Points(torch.empty(n, d, dtype=dtype, device="meta"), norms)
