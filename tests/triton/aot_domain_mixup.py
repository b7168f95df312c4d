"""Domain mixup's launches, and what its kernels may take; see aot.py."""

from __future__ import annotations

import itertools

import torch

from synface_kernels.ops.domain_mixup import kernel_triton
from synface_kernels.ops.domain_mixup.reference import Operands

REGISTERS = 160
NOT_FUSED = "f64"  # a fused multiply-add would give other bits than the definition


def launch() -> None:
    """Launch for NHWC images, flipped, and for images of more than 2^31 elements."""
    flip = torch.empty(64, dtype=torch.bool, device="meta")
    psi = torch.empty(64, dtype=torch.float64, device="meta")
    affine = torch.empty(3, 2, dtype=torch.float64, device="meta")
    floats = (torch.float32, torch.bfloat16)
    for source, to, memory_format in itertools.product(
        (torch.uint8, *floats), floats, (torch.contiguous_format, torch.channels_last)
    ):
        if source not in (torch.uint8, to):
            continue
        x = torch.empty(64, 112, 112, 3, dtype=source, device="meta").permute(0, 3, 1, 2)
        y = torch.empty(64, 3, 112, 112, dtype=to, device="meta").to(memory_format=memory_format)
        operands = Operands(x, x, psi, affine, flip, flip)
        kernel_triton.forward(operands, y)
        images = (None, None) if source == torch.uint8 else (torch.empty_like(x),) * 2
        kernel_triton.backward(y, operands, *images, psi)
    wide = torch.empty(2, 3, 32768, 32768, device="meta")
    operands = Operands(wide, wide, psi[:2], affine, flip[:2], flip[:2])
    kernel_triton.forward(operands, wide)
    kernel_triton.backward(wide, operands, wide, wide, psi[:2])
