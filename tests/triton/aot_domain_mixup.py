"""Compiles domain mixup's Triton kernels without a GPU; see aot.py.

python tests/triton/aot_domain_mixup.py 80 90 100
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from unittest import mock

import aot
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from synface_kernels.ops.domain_mixup import kernel_triton

aot.POINTERS.update({torch.uint8: "*u8", torch.float64: "*fp64"})


def launches() -> Iterator[aot.Launch]:
    """Every distinct launch for NHWC images, flipped."""
    recorded: list[aot.Launch] = []
    flags = torch.empty(64, dtype=torch.bool, device="meta")
    psi = torch.empty(64, dtype=torch.float64, device="meta")
    affine = torch.empty(3, 2, dtype=torch.float64, device="meta")
    floats = (torch.float32, torch.bfloat16)

    def record(kernel, grid, *args, **config):  # type: ignore[no-untyped-def]
        recorded.append(aot.Launch(kernel, args, config))

    with mock.patch.object(kernel_triton, "_launch", record):
        for source, to, flip, memory_format in itertools.product(
            (torch.uint8, *floats), floats, (flags,),
            (torch.contiguous_format, torch.channels_last),
        ):  # fmt: skip
            if source not in (torch.uint8, to):
                continue
            x = torch.empty(64, 112, 112, 3, dtype=source, device="meta").permute(0, 3, 1, 2)
            y = torch.empty(64, 3, 112, 112, dtype=to, device="meta").to(
                memory_format=memory_format
            )
            kernel_triton.forward(x, x, psi, affine, flip, flip, y)
            images = (None, None) if source == torch.uint8 else (torch.empty_like(x),) * 2
            kernel_triton.backward(y, x, x, psi, affine, flip, flip, *images, psi)
    seen = set()
    for launch in recorded:
        if launch.key() not in seen:
            seen.add(launch.key())
            yield launch


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
            report["fused"] = compiled.asm["ptx"].count("fma.rn.f64")
            print(json.dumps(report | {"kernel": launch.kernel.__name__}), flush=True)
