"""The CPU kernels on NumPy arrays, for data-loader workers: one thread, and torch plays no part."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import _numpy  # type: ignore[attr-defined]

cpu_isa = _numpy.cpu_isa


def margin_cross_entropy_forward(
    input: NDArray,
    weight: NDArray,
    labels: NDArray[np.int64],
    scale: float = 64.0,
    needs_input_grad: bool = False,
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """The margin softmax's pass over the classes, without their targets.

    Args:
        input: (N, D) embeddings, float32 or float64; weight: (C, D) centres of the same dtype.
        labels: (N, K) int64 in [0, C), −1 where absent, distinct within a row. A row of −1 is
            left out: its results are 0.
        scale: s, the inverse temperature.
        needs_input_grad: whether to compute mean_center.

    Returns:
        negative_lse (N,), log Σ exp(s·cos) over the classes that are no label of the row;
        negative_max (N,), their greatest cosine; both −∞ if there is none. target_cosine (N, K).
        mean_center (N, D), their normalised centres averaged by softmax; (0, D) if not asked for.

    Memory: O(N·D) and a workspace of a few MiB; never N×C.

    Raises:
        ValueError: for a wrong dtype or shape.
        IndexError: for a label out of range.
    """
    return _numpy.margin_cross_entropy_forward(
        *_same_dtype(input, weight), labels, scale, needs_input_grad
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
    """Gradients (N, D) and (C, D) of `margin_cross_entropy_forward`.

    Args:
        negative_lse, mean_center: as the forward pass returned them (with needs_input_grad).
        grad_negative_lse: (N,); grad_target_cosine: (N, K): what arrives from the loss.
        The others: as they went into the forward pass.

    Raises:
        ValueError: for a wrong dtype or shape.
    """
    return _numpy.margin_cross_entropy_backward(
        *_same_dtype(input, weight),
        labels,
        negative_lse,
        mean_center,
        grad_negative_lse,
        grad_target_cosine,
        scale,
    )


def _same_dtype(input: NDArray, weight: NDArray) -> tuple[NDArray, NDArray]:
    if input.dtype != weight.dtype or input.dtype not in (np.float32, np.float64):
        raise ValueError(
            "input and weight must both be float32 or both float64, "
            f"got {input.dtype} and {weight.dtype}"
        )
    return np.ascontiguousarray(input), np.ascontiguousarray(weight)
