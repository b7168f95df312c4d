"""Margin softmax's launches, and what its kernels may take; see aot.py."""

from __future__ import annotations

import math
from unittest import mock

import torch
import triton

from synface_kernels.ops.margin_cross_entropy import launch_triton
from synface_kernels.ops.margin_cross_entropy.interface import BackwardInputs, ForwardInputs

# Of all kernels but the GEMMs, whose share of a multiprocessor is checked instead.
REGISTERS = 128
# Bytes that a thread may spill, outside of the innermost loops.
STACK = 16 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 72
NOT_FUSED = None
# N, C, K and the dtypes. The last tile of an odd C has its own variants.
CASES = [
    *(
        (n, c, k, dtype, dtype)
        for n, c, k in ((512, 1_000_000, 1), (512, 999_983, 3), (7, 1_000_000, 2))
        for dtype in (torch.float32, torch.bfloat16)
    ),
    (512, 1_000_000, 1, torch.float16, torch.float16),
    (512, 1_000_000, 1, torch.bfloat16, torch.float32),
]
# Of them: also with sums of cosines, with a limit, with sub-centers.
VARIED = [(512, 1_000_000, torch.float32), (512, 1_000_000, torch.bfloat16)]
D = 512


def launch(capability: int) -> None:
    """Launch forward with and without gradients, and backward, for all cases."""
    with mock.patch.object(launch_triton, "_properties", return_value=(capability, 132)):
        for n, c, k, input_dtype, weight_dtype in CASES:
            x = torch.empty((n, D), dtype=input_dtype, device="meta")
            w = torch.empty((c, D), dtype=weight_dtype, device="meta")
            labels = torch.empty((n, k), dtype=torch.int64, device="meta")
            for precision in ("ieee", "tf32") if weight_dtype == torch.float32 else ("ieee",):
                with mock.patch.object(launch_triton, "_float32_precision", return_value=precision):
                    launch_triton.forward(
                        ForwardInputs(x, w, None, labels, 64.0, math.inf, False, False)
                    )
            variants = [(w, 64.0, math.inf, False), (w, 128.0, math.inf, False)]
            if (n, c, input_dtype) in VARIED:
                variants += [
                    (w, 64.0, math.inf, True),
                    (w, 64.0, 0.4, False),
                    (w.view(-1, 2, D), 64.0, math.inf, False),
                ]
            for weight, scale, limit, sums in variants:
                inputs = ForwardInputs(x, weight, None, labels, scale, limit, True, sums)
                outputs = launch_triton.forward(inputs)
                known = inputs._asdict() | outputs._asdict()
                known |= {f"grad_{name}": value for name, value in outputs._asdict().items()}
                given = {name: known[name] for name in BackwardInputs._fields}
                launch_triton.backward(BackwardInputs(**given), True)
