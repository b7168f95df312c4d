"""Domain mixup in Triton: float64 without fused multiply-adds, rounded once, as everywhere.

Programs go through the result's memory in order and read images by their strides: any layout,
without copies.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch
from .reference import Operands

BLOCK = 1024
MOST_ELEMENTS = 2**31  # of a sample, that are counted in int32
_FORMATS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@triton.jit
def _rounded(x, FORMAT: tl.constexpr):
    """Round float64 to the result's dtype; to 16 bits by way of float32, rounded to odd."""
    nearest = x.to(tl.float32)
    back = nearest.to(tl.float64)
    bits = nearest.to(tl.int32, bitcast=True)
    away = (x > back) == (bits >= 0)  # the exact value is the larger in magnitude
    adjust = ((back < x) | (back > x)) & ((bits & 1) == 0)
    odd = tl.where(adjust, tl.where(away, bits + 1, bits - 1), bits)
    if FORMAT == 0:
        result = nearest
    elif FORMAT == 1:
        result = x
    elif FORMAT == 2:
        # In integers, as the interpreter's own conversion to bfloat16 truncates.
        half = tl.where(nearest == nearest, (odd + 0x7FFF + ((odd >> 16) & 1)) >> 16, 0x7FC0)
        result = half.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = odd.to(tl.float32, bitcast=True).to(tl.float16)
    return result


@triton.jit
def _element(
    blocks, C, W, pixels, size, INTERLEAVED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Return sample, channel, row and column of a program's elements, and which exist.

    Programs are numbered along one axis, since the others end at 65,535. WIDE: a sample has more
    elements than int32 counts.
    """
    program = tl.program_id(0)
    block = program % blocks
    if WIDE:
        block = block.to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    if INTERLEAVED:
        channel, pixel = i % C, i // C
    else:
        channel, pixel = i // pixels, i % pixels
    return (program // blocks).to(tl.int64), channel, pixel // W, pixel % W, i < size


@triton.jit
def _offsets(sample, channel, row, column, flip, W, s_b, s_c, s_h, s_w, FLIP: tl.constexpr):
    if FLIP:
        column = tl.where(tl.load(flip + sample) != 0, W - 1 - column, column)
    inside = channel.to(tl.int64) * s_c + row.to(tl.int64) * s_h + column.to(tl.int64) * s_w
    return sample * s_b + inside


@triton.jit
def _forward_kernel(
    synthetic, real, psi, affine, flip_synthetic, flip_real, out, blocks, C, W, pixels, size,
    s_b, s_c, s_h, s_w, r_b, r_c, r_h, r_w, o_b, o_c, o_h, o_w,
    FLIP_S: tl.constexpr, FLIP_R: tl.constexpr, INTERLEAVED: tl.constexpr, WIDE: tl.constexpr,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, c, h, w, mask = _element(blocks, C, W, pixels, size, INTERLEAVED, WIDE, BLOCK)
    at_s = _offsets(sample, c, h, w, flip_synthetic, W, s_b, s_c, s_h, s_w, FLIP_S)
    at_r = _offsets(sample, c, h, w, flip_real, W, r_b, r_c, r_h, r_w, FLIP_R)
    x_s = tl.load(synthetic + at_s, mask=mask, other=0).to(tl.float64)
    x_r = tl.load(real + at_r, mask=mask, other=0).to(tl.float64)
    share = tl.load(psi + sample)
    shift = tl.load(affine + 2 * c, mask=mask, other=0.0)
    scale = tl.load(affine + 2 * c + 1, mask=mask, other=0.0)
    mixed = (share * x_s + (1.0 - share) * x_r - shift) * scale
    at = _offsets(sample, c, h, w, flip_real, W, o_b, o_c, o_h, o_w, False)
    tl.store(out + at, _rounded(mixed, FORMAT), mask=mask)


@triton.jit
def _backward_kernel(
    gradient, synthetic, real, psi, affine, flip_synthetic, flip_real,
    grad_synthetic, grad_real, psi_parts, blocks, C, W, pixels, size,
    g_b, g_c, g_h, g_w, s_b, s_c, s_h, s_w, r_b, r_c, r_h, r_w,
    gs_b, gs_c, gs_h, gs_w, gr_b, gr_c, gr_h, gr_w,
    FLIP_S: tl.constexpr, FLIP_R: tl.constexpr, INTERLEAVED: tl.constexpr, WIDE: tl.constexpr,
    FORMAT: tl.constexpr, GRAD_S: tl.constexpr, GRAD_R: tl.constexpr, GRAD_PSI: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample, c, h, w, mask = _element(blocks, C, W, pixels, size, INTERLEAVED, WIDE, BLOCK)
    at = _offsets(sample, c, h, w, flip_real, W, g_b, g_c, g_h, g_w, False)
    scale = tl.load(affine + 2 * c + 1, mask=mask, other=0.0)
    share = tl.load(psi + sample)
    mixed = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float64) * scale
    if GRAD_S:
        to = _offsets(sample, c, h, w, flip_synthetic, W, gs_b, gs_c, gs_h, gs_w, FLIP_S)
        tl.store(grad_synthetic + to, _rounded(share * mixed, FORMAT), mask=mask)
    if GRAD_R:
        to = _offsets(sample, c, h, w, flip_real, W, gr_b, gr_c, gr_h, gr_w, FLIP_R)
        tl.store(grad_real + to, _rounded((1.0 - share) * mixed, FORMAT), mask=mask)
    if GRAD_PSI:
        at_s = _offsets(sample, c, h, w, flip_synthetic, W, s_b, s_c, s_h, s_w, FLIP_S)
        at_r = _offsets(sample, c, h, w, flip_real, W, r_b, r_c, r_h, r_w, FLIP_R)
        x_s = tl.load(synthetic + at_s, mask=mask, other=0).to(tl.float64)
        x_r = tl.load(real + at_r, mask=mask, other=0).to(tl.float64)
        part = tl.sum(tl.where(mask, mixed * (x_s - x_r), 0.0), 0)
        tl.store(psi_parts + tl.program_id(0), part)


def _launch(
    kernel: Any, images: Tensor, tensors: tuple[Tensor, ...], *args: Any, **config: Any
) -> None:
    batch, channels, height, width = images.shape
    pixels, size = height * width, channels * height * width
    blocks, wide = triton.cdiv(size, BLOCK), size + BLOCK > MOST_ELEMENTS
    # Fused multiply-adds would give other bits than the definition.
    launch(
        kernel, (batch * blocks,), *tensors, blocks, channels, width, pixels, size, *args, **config,
        # With 4 warps, ptxas spills some of the forward kernels, and wide ones.
        num_warps=8 if wide or kernel is _forward_kernel else 4,
        WIDE=wide, BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip


def _interleaved(images: Tensor) -> bool:
    return images.shape[1] > 1 and images.stride(1) == 1


def _flags(flip: Tensor | None, psi: Tensor) -> tuple[Tensor, bool]:
    return (psi, False) if flip is None else (flip.view(torch.uint8), True)


def forward(operands: Operands, out: Tensor) -> None:
    """Write the mixed images into ``out``.

    Memory above inputs and output: none. Images of any strides are read in place.
    """
    synthetic, real, psi, affine, flip_synthetic, flip_real = operands
    if out.numel() == 0:
        return
    flags_s, flip_s = _flags(flip_synthetic, psi)
    flags_r, flip_r = _flags(flip_real, psi)
    _launch(
        _forward_kernel,
        out,
        (synthetic, real, psi.contiguous(), affine, flags_s, flags_r, out),
        *synthetic.stride(), *real.stride(), *out.stride(),
        FLIP_S=flip_s, FLIP_R=flip_r, INTERLEAVED=_interleaved(out), FORMAT=_FORMATS[out.dtype],
    )  # fmt: skip


def backward(
    gradient: Tensor,
    operands: Operands,
    grad_synthetic: Tensor | None,
    grad_real: Tensor | None,
    grad_psi: Tensor | None,
) -> None:
    """Write the gradients that are not None.

    Memory above inputs and outputs: 8·B·⌈C·H·W/1024⌉ bytes for ``grad_psi``.
    """
    synthetic, real, psi, affine, flip_synthetic, flip_real = operands
    batch = synthetic.shape[0]
    if synthetic.numel() == 0:
        if grad_psi is not None:
            grad_psi.zero_()
        return
    flags_s, flip_s = _flags(flip_synthetic, psi)
    flags_r, flip_r = _flags(flip_real, psi)
    blocks = triton.cdiv(synthetic[0].numel(), BLOCK)
    parts = psi.new_empty((batch, blocks if grad_psi is not None else 1))
    to_s = gradient if grad_synthetic is None else grad_synthetic
    to_r = gradient if grad_real is None else grad_real
    _launch(
        _backward_kernel,
        synthetic,
        (gradient, synthetic, real, psi.contiguous(), affine, flags_s, flags_r, to_s, to_r, parts),
        *gradient.stride(), *synthetic.stride(), *real.stride(), *to_s.stride(), *to_r.stride(),
        FLIP_S=flip_s, FLIP_R=flip_r, INTERLEAVED=_interleaved(gradient),
        FORMAT=_FORMATS.get(synthetic.dtype, 0), GRAD_S=grad_synthetic is not None,
        GRAD_R=grad_real is not None, GRAD_PSI=grad_psi is not None,
    )  # fmt: skip
    if grad_psi is not None:
        torch.sum(parts, 1, out=grad_psi)
