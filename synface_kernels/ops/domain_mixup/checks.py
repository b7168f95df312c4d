"""Argument checks of the domain mixup and the identity mixup."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._check import describe, is_dense
from ..._derivatives import innermost
from ..._layout import check_layout

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_images(synthetic: Tensor, real: Tensor, layout: str) -> None:
    """Raise unless both image batches have a dtype and shape that the layout allows, and match."""
    if layout not in ("NHWC", "NCHW"):
        raise ValueError(f"layout must be 'NHWC' or 'NCHW', got {layout!r}")
    shape = "(B, H, W, C)" if layout == "NHWC" else "(B, C, H, W)"
    for name, images in (("synthetic", synthetic), ("real", real)):
        if not is_dense(images):
            raise TypeError(f"{name} must be a tensor, got {describe(images)}")
        if images.dim() != 4 or images.dtype not in (torch.uint8, *FLOATING):
            raise ValueError(
                f"{name} must be uint8, float32, float16, bfloat16 or float64 of shape {shape}, "
                f"got {describe(images)}"
            )
    if (real.shape, real.dtype, real.device) != (
        synthetic.shape, synthetic.dtype, synthetic.device,
    ):  # fmt: skip
        raise ValueError(
            "real must be of the shape, dtype and device of synthetic, "
            f"got real {describe(real)} and synthetic {describe(synthetic)}"
        )
    check_layout(synthetic.shape, layout)


def constants(name: str, value: float | Sequence[float], channels: int) -> list[float]:
    """Return each channel's mean or standard deviation; raise unless they are finite numbers."""
    if isinstance(value, (int, float)):
        values = [float(value)] * channels
    elif isinstance(value, Sequence) and all(isinstance(v, (int, float)) for v in value):
        values = [float(v) for v in value]
    else:
        raise TypeError(f"{name} must be a number or a sequence of numbers, got {value!r}")
    if len(values) != channels:
        raise ValueError(f"{name} must be one number or C = {channels}, got {len(values)}")
    if not all(abs(v) < math.inf for v in values):  # torch.compile cannot trace math.isfinite
        raise ValueError(f"{name} must be finite, got {value}")
    return values


def flips(flip: Any, batch: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Return the pair (flip_synthetic, flip_real); raise unless each is None or (B,) bool."""
    if flip is None:
        return None, None
    if not isinstance(flip, (tuple, list, Tensor)):
        raise TypeError(f"flip must be None, a pair or a (2, B) bool tensor, got {describe(flip)}")
    if (isinstance(flip, Tensor) and not flip.dim()) or len(flip) != 2:
        raise ValueError(
            "flip must be a pair (flip_synthetic, flip_real) or a (2, B) bool tensor, "
            f"got {describe(flip) if isinstance(flip, Tensor) else f'{len(flip)} elements'}"
        )
    for name, side in zip(("flip_synthetic", "flip_real"), flip, strict=True):
        if side is None:
            continue
        if not is_dense(side):
            raise TypeError(f"{name} must be None or a tensor, got {describe(side)}")
        if side.dtype != torch.bool or side.shape != (batch,) or side.device != device:
            raise ValueError(
                f"{name} must be bool of shape (B,) with B = {batch} on {device}, "
                f"got {describe(side)}"
            )
    return flip[0], flip[1]


def check_result(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Raise unless results can have this dtype and memory format."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {describe(dtype)}")
    if dtype not in FLOATING:
        raise ValueError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
    if not isinstance(memory_format, torch.memory_format):
        raise TypeError(
            f"memory_format must be a torch.memory_format, got {describe(memory_format)}"
        )
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            "memory_format must be torch.contiguous_format or torch.channels_last, "
            f"got {memory_format}"
        )


def check_out(
    out: Tensor, synthetic: Tensor, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Raise unless ``out`` has the result's shape, dtype, device and memory format."""
    if not is_dense(out):
        raise TypeError(f"out must be a tensor, got {describe(out)}")
    expected = (synthetic.shape, dtype, synthetic.device)
    if (out.shape, out.dtype, out.device) != expected:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"out must be {kind} {tuple(synthetic.shape)} on {synthetic.device}, "
            f"got {describe(out)}"
        )
    if not out.is_contiguous(memory_format=memory_format):
        raise ValueError(
            f"out must be contiguous in {memory_format}, got strides {tuple(out.stride())}"
        )


def shares(psi: float | Tensor, batch: int, device: torch.device, name: str = "psi") -> Tensor:
    """Return ψ as (B,) float64; check a number now, a tensor's values where it is used."""
    if isinstance(psi, (int, float)):
        if not 0 <= psi <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {psi}")
        return torch.full((batch,), float(psi), dtype=torch.float64, device=device)
    if not is_dense(psi):
        raise TypeError(f"{name} must be a number or a tensor, got {describe(psi)}")
    if not psi.is_floating_point() or psi.shape not in ((), (batch,)) or psi.device != device:
        raise ValueError(
            f"{name} must be floating point, of shape () or (B,) with B = {batch}, on {device}, "
            f"got {describe(psi)}"
        )
    return psi.double().expand(batch)


def require_shares(psi: Tensor, name: str) -> None:
    """Raise unless shares are in [0, 1], on a GPU by an asynchronous assertion."""
    message = f"{name} must be in [0, 1]"
    compiling = torch.compiler.is_compiling()
    psi = psi if compiling else innermost(psi).detach()
    if psi.device.type != "cpu" or compiling:
        torch._assert_async(((psi >= 0) & (psi <= 1)).all(), message)
    elif psi.numel():
        least, most = (bound.item() for bound in psi.aminmax())  # NaN if any is
        if not (least >= 0 and most <= 1):
            *_, row = at = (~((psi >= 0) & (psi <= 1))).nonzero()[0].tolist()
            raise ValueError(f"{message}, got {psi[tuple(at)].item():g} in row {row}")
