"""The CPU kernels on NumPy arrays, for data-loader workers: single-threaded, without torch.

Importing this module does not import torch. Kernels release Python's global interpreter lock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ._layout import check_layout
from ._limits import SHARPEST

__all__ = ["domain_mixup", "margin_cross_entropy_backward", "margin_cross_entropy_forward"]
_numpy: Any = import_module("._numpy", __package__)
cpu_isa = _numpy.cpu_isa


def domain_mixup(
    synthetic: NDArray,
    real: NDArray,
    psi: float | NDArray,
    *,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    flip: tuple[NDArray | None, NDArray | None] | None = None,
    layout: Literal["NHWC", "NCHW"] = "NHWC",
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    out_layout: Literal["NCHW", "NHWC"] = "NCHW",
    out: NDArray | None = None,
) -> NDArray:
    """Mix two image batches, ψ·X_S + (1 − ψ)·X_R, and normalize the result.

    Bit for bit what `synface_kernels.domain_mixup` returns.

    Args:
        synthetic: (B, H, W, C) images, or (B, C, H, W) with ``layout="NCHW"``; uint8 (in units of
            1/255) or float32. real: likewise, of the same shape and dtype. An array that is not
            C-contiguous is copied. Images that are evidently (B, C, H, W) need ``layout="NCHW"``,
            as with `synface_kernels.domain_mixup`.
        psi: ψ in [0, 1], the share of synthetic: one number, or (B,).
        mean, std: one number, or C of them; std > 0.
        flip: (flip_synthetic, flip_real), each None or (B,) bool: samples to flip horizontally.
        dtype: of the result. ``"bfloat16"``, which NumPy lacks, comes as its bits in uint16.
        out_layout: the layout of the result, which is C-contiguous.
        out: an array to write into; it may not share memory with an image.

    Returns:
        (B, C, H, W), or (B, H, W, C); ``out`` if it was given.

    Raises:
        ValueError: for a wrong dtype, shape or value.
        TypeError: for an argument of a wrong Python type.

    Memory above the inputs: the result.
    """
    for name, value in (("layout", layout), ("out_layout", out_layout)):
        if value not in ("NHWC", "NCHW"):
            raise ValueError(f"{name} must be 'NHWC' or 'NCHW', got {value!r}")
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype must be 'float32', 'float16' or 'bfloat16', got {dtype!r}")
    synthetic, real = np.asarray(synthetic), np.asarray(real)
    if synthetic.ndim != 4 or synthetic.dtype not in (np.uint8, np.float32):
        raise ValueError(
            f"synthetic must be uint8 or float32 of 4 dimensions ({layout}), "
            f"got {synthetic.dtype} {synthetic.shape}"
        )
    if (real.shape, real.dtype) != (synthetic.shape, synthetic.dtype):
        raise ValueError(
            f"real must be like synthetic, got {real.dtype} {real.shape} and synthetic "
            f"{synthetic.dtype} {synthetic.shape}"
        )
    check_layout(synthetic.shape, layout)
    batch, *size = synthetic.shape
    channels, height, width = size if layout == "NCHW" else (size[2], *size[:2])
    shares = _numbers("psi", psi)
    if shares.shape not in ((), (batch,)):
        raise ValueError(f"psi must be one number or (B,) with B = {batch}, got {shares.shape}")
    if not np.all((shares >= 0) & (shares <= 1)):
        raise ValueError(f"psi must be in [0, 1], got {psi}")
    shares = np.broadcast_to(shares, (batch,))
    unit = 255.0 if synthetic.dtype == np.uint8 else 1.0
    means, stds = _constants("mean", mean, channels), _constants("std", std, channels)
    if not np.all(stds > 0):
        raise ValueError(f"std must be > 0, got {std}")
    affine = np.stack([unit * means, 1.0 / (unit * stds)], axis=1)
    flips: list[NDArray | None] = [None, None]
    if isinstance(flip, np.ndarray):
        flip = tuple(flip) if flip.ndim else ()
    if flip is not None and not isinstance(flip, (tuple, list)):
        raise TypeError(
            f"flip must be None or a pair (flip_synthetic, flip_real), got {type(flip).__name__}"
        )
    if flip is not None and len(flip) != 2:
        raise ValueError(
            f"flip must be a pair (flip_synthetic, flip_real), got {len(flip)} elements"
        )
    for i, side in enumerate(flip if flip is not None else ()):
        if side is None:
            continue
        flags = flips[i] = np.asarray(side)
        if flags.dtype != np.bool_ or flags.shape != (batch,):
            raise ValueError(
                f"flip[{i}] must be bool (B,) with B = {batch}, got {_described(flags)}"
            )
    shape = (batch, channels, height, width) if out_layout == "NCHW" else (
        batch, height, width, channels,
    )  # fmt: skip
    stored = np.dtype({"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype])
    if out is None:
        out = np.empty(shape, stored)
    elif not isinstance(out, np.ndarray):
        raise TypeError(f"out must be an array, got {type(out).__name__}")
    elif (out.shape, out.dtype) != (shape, stored) or not out.flags.c_contiguous:
        raise ValueError(
            f"out must be {stored} {shape}, C-contiguous, got {out.dtype} {out.shape} "
            f"with strides {out.strides}"
        )
    elif not out.flags.writeable:
        raise ValueError("out must be writeable")
    read = {"synthetic": synthetic, "real": real, "psi": shares}
    read |= {f"flip[{i}]": flags for i, flags in enumerate(flips) if flags is not None}
    for name, array in read.items():
        if np.may_share_memory(out, array):
            raise ValueError(f"out must not share memory with {name}")
    _numpy.domain_mixup(
        np.ascontiguousarray(synthetic), np.ascontiguousarray(real), shares, affine, *flips,
        layout == "NHWC", out if dtype == "float32" else out.view(np.uint16),
        out_layout == "NHWC", dtype == "bfloat16",
    )  # fmt: skip
    return out


def _described(array: NDArray) -> str:
    return f"{array.dtype} {array.shape}"


def _numbers(name: str, value: object) -> NDArray[np.float64]:
    """Return values as float64; raise TypeError for non-numbers that NumPy would convert."""
    values = np.asarray(value)
    if values.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be a number or an array of them, got {value!r}")
    return values.astype(np.float64, copy=False)


def _constants(name: str, value: float | Sequence[float], channels: int) -> NDArray[np.float64]:
    values = _numbers(name, value)
    if values.shape not in ((), (channels,)) or not np.all(np.isfinite(values)):
        raise ValueError(f"{name} must be one finite number or C = {channels}, got {value}")
    return np.broadcast_to(values, (channels,))


def margin_cross_entropy_forward(
    input: NDArray,
    weight: NDArray,
    labels: NDArray[np.int64],
    scale: float = 64.0,
    needs_input_grad: bool = False,
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Compute the margin softmax's statistics over the classes that are not targets.

    Args:
        input: (N, D) embeddings, float32 or float64; weight: (C, D) centers of the same dtype.
        labels: (N, K) of an integer dtype that int64 holds, in [0, C), −1 where absent, distinct
            within a row. A row of only −1 is ignored: its results are 0.
        scale: s in (0, 1e6], the inverse temperature.
        needs_input_grad: whether to compute mean_center.

    Returns:
        negative_lse (N,), log Σ exp(s·cos) over the classes that are not labels of the row;
        negative_max (N,), their greatest cosine; both −∞ if there is none. target_cosine (N, K).
        mean_center (N, D), their normalized centers weighted by the softmax; (0, D) unless
        needs_input_grad.

    Memory: O(N·D) and a workspace of a few MiB; never N×C.

    Raises:
        ValueError: for a wrong dtype, shape or value.
        TypeError: for an argument of a wrong Python type.
        IndexError: for a label that is not below C.
    """
    return _numpy.margin_cross_entropy_forward(
        *_checked(input, weight, labels, scale), bool(needs_input_grad)
    )


def margin_cross_entropy_backward(
    input: NDArray,
    weight: NDArray,
    labels: NDArray[np.int64],
    negative_lse: NDArray,
    mean_center: NDArray,
    grad_negative_lse: NDArray,
    grad_target_cosine: NDArray,
    scale: float = 64.0,
) -> tuple[NDArray, NDArray]:
    """Compute the gradients (N, D) and (C, D) of `margin_cross_entropy_forward`.

    Args:
        negative_lse, mean_center: as the forward pass returned them (with needs_input_grad).
        grad_negative_lse: (N,); grad_target_cosine: (N, K): gradients of the loss by these.
        input, weight, labels, scale: as in the forward pass.

    Raises:
        ValueError, TypeError, IndexError: as `margin_cross_entropy_forward`.
    """
    *given, number = _checked(input, weight, labels, scale)
    (n, d), k = given[0].shape, given[2].shape[1]
    upstream = [
        _floating("negative_lse", negative_lse, (n,)),
        _floating("mean_center", mean_center, (n, d)),
        _floating("grad_negative_lse", grad_negative_lse, (n,)),
        _floating("grad_target_cosine", grad_target_cosine, (n, k)),
    ]
    return _numpy.margin_cross_entropy_backward(*given, *upstream, number)


def _checked(
    input: NDArray, weight: NDArray, labels: NDArray, scale: float
) -> tuple[NDArray, NDArray, NDArray[np.int64], float]:
    """Return the arguments of both passes, checked, with the dtypes and layout of the kernels."""
    input, weight, labels = np.asarray(input), np.asarray(weight), np.asarray(labels)
    if input.dtype != weight.dtype or input.dtype not in (np.float32, np.float64):
        raise ValueError(
            "input and weight must both be float32 or both float64, "
            f"got {input.dtype} and {weight.dtype}"
        )
    if labels.dtype.kind not in "iu" or not np.can_cast(labels.dtype, np.int64):
        raise ValueError(
            f"labels must be of an integer dtype that int64 holds, got {_described(labels)}"
        )
    if (
        not input.ndim == weight.ndim == labels.ndim == 2
        or input.shape != (len(labels), weight.shape[1])
        or not len(weight)
    ):
        raise ValueError(
            "input (N, D), weight (C, D) and labels (N, K) do not fit together: got "
            f"{input.shape}, {weight.shape} and {labels.shape}"
        )
    allowed = f"labels must be in [-1, {len(weight)})"
    if labels.size and int(labels.min()) < -1:
        raise ValueError(f"{allowed}, got {int(labels.min())}")
    if labels.size and int(labels.max()) >= len(weight):
        row, column = np.unravel_index(labels.argmax(), labels.shape)
        raise IndexError(f"{allowed}, got {labels[row, column]} in row {row}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.integer, np.floating)):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be finite and positive, got {scale}")
    if scale > SHARPEST:
        raise ValueError(f"scale must be at most {SHARPEST:g}, got {scale}")
    return (
        np.ascontiguousarray(input),
        np.ascontiguousarray(weight),
        np.ascontiguousarray(labels, dtype=np.int64),
        float(scale),
    )


def _floating(name: str, value: NDArray, shape: tuple[int, ...]) -> NDArray:
    array = np.asarray(value)
    if array.dtype.kind != "f" or array.shape != shape:
        raise ValueError(f"{name} must be floating point {shape}, got {_described(array)}")
    return array
