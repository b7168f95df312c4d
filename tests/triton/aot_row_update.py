"""Compiles the row updates' Triton kernels without a GPU; see aot.py.

python tests/triton/aot_row_update.py 80 90 100
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from unittest import mock

import aot
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from synface_kernels.ops.row_update import kernel_triton

aot.POINTERS.update({torch.float64: "*fp64"})


def launches() -> Iterator[aot.Launch]:
    """Plain steps, and those that catch up, with random rounding where there is any."""
    recorded: list[aot.Launch] = []

    def record(kernel, class_ids, columns, *args, **config):  # type: ignore[no-untyped-def]
        recorded.append(aot.Launch(kernel, args, config | {"BLOCK": kernel_triton.BLOCK}))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ids = empty(4096, dtype=torch.int64)
    with mock.patch.object(kernel_triton, "_launch", record):
        for dtype, lazy in itertools.product((torch.float32, torch.bfloat16), (False, True)):
            w, g = empty(10**6, 512, dtype=dtype), empty(4096, 512, dtype=dtype)
            last = empty(10**6, dtype=torch.int64) if lazy else None
            kernel_triton.sgd(w, g, ids, None, last, 0.1, 0.0, 0.1, 0.0, False, 9, 1)
            kernel_triton.sgd(w, g, ids, w, last, 0.1, 0.9, 0.1, 0.0, True, 9, 1)
            kernel_triton.adamw(w, g, ids, w, w, last, 0.1, 0.9, 0.999, 1e-8, 0.1, 9, 1)
    return iter(recorded)


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for launch in launches():
            source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
            compiled = compile(
                source,
                target=GPUTarget("cuda", capability, 32),
                options=launch.options | {"enable_fp_fusion": False},
            )
            report = aot.resources(compiled.asm["cubin"])
            report["fused"] = compiled.asm["ptx"].count("fma.rn.f32")
            print(json.dumps(report | {"kernel": launch.kernel.__name__}), flush=True)
