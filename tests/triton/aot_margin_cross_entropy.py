"""Margin softmax's launches, and what its kernels may take; see aot.py."""

from __future__ import annotations

import math
import os
from unittest import mock

import torch

from benchmarks.launches import float32_precision
from synface_kernels.ops.margin_cross_entropy import launch_triton
from synface_kernels.ops.margin_cross_entropy.interface import BackwardInputs, ForwardInputs

REGISTERS = 128
NOT_FUSED = None
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
# N, C, K; the dtypes of input and weight, and autocast's; the precision of float32 GEMMs. The last
# tile of an odd C has its own variants.
CASES = [
    *(
        (n, c, k, dtype, dtype, None, "ieee")
        for n, c, k in ((512, 1_000_000, 1), (512, 999_983, 3), (7, 1_000_000, 2))
        for dtype in (FLOAT32, BFLOAT16)
    ),
    (512, 1_000_000, 1, FLOAT32, FLOAT32, None, "tf32"),
    (512, 1_000_000, 1, FLOAT16, FLOAT16, None, "ieee"),
    (512, 1_000_000, 1, BFLOAT16, FLOAT32, None, "ieee"),
    (512, 1_000_000, 1, BFLOAT16, FLOAT32, BFLOAT16, "ieee"),
    (512, 1_000_000, 1, FLOAT32, FLOAT32, FLOAT16, "ieee"),
]
# Of them: also with sums of cosines, with a limit, with sub-centers, with indices of classes; and
# in the design that is not the default.
VARIED = {(512, 1_000_000, 1, FLOAT32, FLOAT32), (512, 1_000_000, 1, BFLOAT16, BFLOAT16)}
D = 512


def launch(capability: int) -> None:
    """Launch forward and backward for all cases."""
    for n, c, k, *dtypes, autocast, precision in CASES:
        input_dtype, weight_dtype = dtypes
        x = torch.empty((n, D), dtype=input_dtype, device="meta")
        w = torch.empty((c, D), dtype=weight_dtype, device="meta")
        labels = torch.empty((n, k), dtype=torch.int64, device="meta")
        variants = [(w, None, math.inf, False, "")]
        if (n, c, k, *dtypes) in VARIED and autocast is None:
            ids = torch.empty(c // 10, dtype=torch.int64, device="meta")
            other = "fused" if (input_dtype, precision) == (FLOAT32, "ieee") else "tiled"
            variants += [
                (w, None, math.inf, True, ""),
                (w, None, 0.4, False, ""),
                (w.view(-1, 2, D), None, math.inf, False, ""),
                (w, ids, math.inf, False, ""),
                (w, None, math.inf, False, other),
            ]
        for weight, ids, limit, sums, design in variants:
            inputs = ForwardInputs(x, weight, ids, labels, 64.0, limit, True, sums)
            with (
                float32_precision(precision),
                mock.patch.dict(os.environ, SYNFACE_MARGIN_DESIGN=design),
            ):
                outputs = launch_triton.forward(inputs, gemm_dtype=autocast)
                known = inputs._asdict() | outputs._asdict()
                known |= {f"grad_{name}": value for name, value in outputs._asdict().items()}
                given = {name: known[name] for name in BackwardInputs._fields}
                launch_triton.backward(BackwardInputs(**given), True, gemm_dtype=autocast)
