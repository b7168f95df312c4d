"""Compiles hypersphere repulsion's Triton kernels without a GPU; see aot.py.

python tests/triton/aot_hypersphere_repulsion.py 80 90 100
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from unittest import mock

import aot
import torch

from synface_kernels.ops.hypersphere_repulsion import kernel_triton

aot.POINTERS.update({torch.float64: "*fp64", torch.int32: "*i32"})


def launches() -> Iterator[aot.Launch]:
    """Every distinct launch, for points alone and with a gallery."""
    recorded: list[aot.Launch] = []

    def record(kernel, grid, *args, **config):  # type: ignore[no-untyped-def]
        recorded.append(aot.Launch(kernel, args, config))

    def points(n: int, d: int, dtype: torch.dtype) -> kernel_triton.Points:
        norms = torch.empty(n, dtype=torch.float64, device="meta")
        return kernel_triton.Points(torch.empty(n, d, dtype=dtype, device="meta"), norms)

    with (
        mock.patch.object(kernel_triton, "_launch", record),
        mock.patch.object(kernel_triton, "_mm", lambda a, b, out: out),  # none on meta tensors
    ):
        kinds = (("log_sum_exp", 40.0), ("riesz", 2.5), ("log", 0.5), ("hinge", 0.1))
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
    seen: set[str] = set()
    for launch in recorded:
        if launch.key() not in seen:
            seen.add(launch.key())
            yield launch


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for launch in launches():
            print(json.dumps(launch.compile(capability)), flush=True)
