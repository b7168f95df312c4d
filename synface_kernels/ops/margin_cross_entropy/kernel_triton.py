"""The core of the margin softmax in Triton: kernels, launchers and their default configurations.

Two designs share the arithmetic on a block of logits:

- *fused* (`_forward_fused`): no gradient of the input is asked for, and weight is taken as it is,
  without filter or sums. The product runs inside the kernel and logits never reach device memory.
- *tiled* (training): cuBLAS writes the float32 logits of one tile of classes into a reused
  workspace, one kernel turns them into the second product's factor, and cuBLAS takes that product.

In both, cos_ij = (x_i · w_j)·r_i·r_j with r = 1/norm in the epilogue, so nothing normalized is
written and 16-bit inputs are not rounded twice. All sums have a fixed order.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._norms import LONG
from ..row_update import kernel_triton as row_update

# Takes the gradient of the centers of classes from one on, rows (·, D) that are then written over.
TakeRows = Callable[[int, Tensor], None]

# What the tiled design may hold at a time.
WORKSPACE_BYTES = 64 << 20
# Tiles are a multiple of this many classes, so that rows of the workspace stay aligned.
TILE_ALIGNMENT = 128

# exp() of a logit minus a row's shift must stay in float32's range, e^±87, also when it is
# multiplied by an inverse norm: at most 1e12 = e^27.6, at least some e^-12.
EXPONENT_MAX = 60.0
EXPONENT_MIN = -75.0

_NORM_MIN = tl.constexpr(1e-12)  # as in reference.py
_LONG, _SHRINK = tl.constexpr(LONG), tl.constexpr(2.0**-80)


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def _inverse_norm(square):
    """1/norm from a sum of squares; 0 for a zero row."""
    norm = tl.sqrt(square)
    return tl.where(norm <= _NORM_MIN, 0.0, 1.0 / norm)


@triton.jit
def _is_label(labels, rows, in_rows, classes, k, K: tl.constexpr):
    """Where a class (column) is label k of its row."""
    label = tl.load(labels + rows * K + k, mask=in_rows, other=-1).to(tl.int32)
    return classes[None, :] == label[:, None]


@triton.jit
def _only_negatives(cosine, labels, rows, in_rows, classes, C, K: tl.constexpr):
    """The cosines, −∞ at a row's labels and past the last class."""
    cosine = tl.where(classes[None, :] < C, cosine, float("-inf"))
    for k in tl.static_range(K):
        match = _is_label(labels, rows, in_rows, classes, k, K)
        cosine = tl.where(match, float("-inf"), cosine)
    return cosine


@triton.jit
def _tile_cosines(
    logits, stride, input_r, weight_r, rows, in_rows, columns, in_columns, M: tl.constexpr
):
    """Classes' cosines from a block of a tile's products, and each one's sub-center: the greatest,
    the first of equals.
    """
    mask = in_rows[:, None] & in_columns[None, :]
    r_i = tl.load(input_r + rows, mask=in_rows, other=0.0)
    for m in tl.static_range(M):
        centers = columns * M + m
        product = tl.load(logits + rows[:, None] * stride + centers[None, :], mask=mask, other=0.0)
        r_j = tl.load(weight_r + centers, mask=in_columns, other=0.0)
        cosine = product * r_i[:, None] * r_j[None, :]
        if m == 0:
            best = cosine
            nearest = tl.zeros_like(cosine).to(tl.int32)
        else:
            better = (cosine > best) | (cosine != cosine)
            best = tl.where(better, cosine, best)
            nearest = tl.where(better, m, nearest)
    return best, nearest


@triton.jit
def _inverse_norms_kernel(
    matrix, out, count, stride, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None] & (d < D)[None, :]
    x = tl.load(matrix + rows[:, None] * stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
    # Squares of long rows would overflow.
    shrink = tl.where(tl.max(tl.abs(x), 1) > _LONG, _SHRINK, 1.0)
    x = x * shrink[:, None]
    tl.store(out + rows, _inverse_norm(tl.sum(x * x, 1)) * shrink, mask=rows < count)


@triton.jit
def _target_cosines_kernel(
    input, weight, labels, target_cosine, target_rows, input_stride, weight_stride,
    D: tl.constexpr, K: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row per program: its cosines with its own labels (classes of weight), in float64, for
    near cos θ = ±1 a margin's slope is large; and the rows of weight that they are with, or what
    stands for no label.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    x = tl.load(input + row * input_stride + d, mask=d < D, other=0.0).to(tl.float64)
    r_i = _inverse_norm(tl.sum(x * x, 0))
    for k in tl.static_range(K):
        label = tl.load(labels + row * K + k)
        present = label >= 0
        for m in tl.static_range(M):
            center = label * M + m
            w = tl.load(weight + center * weight_stride + d, mask=present & (d < D), other=0.0)
            w = w.to(tl.float64)
            cosine = tl.sum(x * w, 0) * r_i * _inverse_norm(tl.sum(w * w, 0))
            if m == 0:
                best, target = cosine, center
            else:
                better = (cosine > best) | (cosine != cosine)
                best = tl.where(better, cosine, best)
                target = tl.where(better, center, target)
        best = tl.where(present, best, 0.0)
        target = tl.where(present, target, label)
        tl.store(target_cosine + row * K + k, best)
        tl.store(target_rows + row * K + k, target)


@triton.jit
def _fused_kernel(
    input, weight, labels, input_r, weight_r, maximum, total, N, C, classes_per_split,
    input_stride, weight_stride, scale, D: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Maximum and Σ exp(scale·(cos − maximum)) of a block of rows over one split of the classes."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    in_rows = rows < N
    d = tl.arange(0, BLOCK_D)
    r_i = tl.load(input_r + rows, mask=in_rows, other=0.0)
    row_maximum = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    row_total = tl.zeros((BLOCK_N,), tl.float32)

    # A while loop: with numpy 2.4, Triton 3.6's interpreter takes no tensor for a bound of range().
    start = split * classes_per_split
    end = min(start + classes_per_split, C)
    while start < end:
        classes = start + tl.arange(0, BLOCK_C)
        in_classes = classes < C
        product = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for d_start in range(0, D, BLOCK_D):
            in_d = d_start + d < D
            x = tl.load(
                input + rows[:, None] * input_stride + (d_start + d)[None, :],
                mask=in_rows[:, None] & in_d[None, :],
                other=0.0,
            )
            w = tl.load(
                weight + classes.to(tl.int64)[None, :] * weight_stride + (d_start + d)[:, None],
                mask=in_classes[None, :] & in_d[:, None],
                other=0.0,
            )
            product = tl.dot(x, w, product, input_precision=PRECISION)
        r_j = tl.load(weight_r + classes, mask=in_classes, other=0.0)
        cosine = product * r_i[:, None] * r_j[None, :]
        cosine = _only_negatives(cosine, labels, rows, in_rows, classes, C, K)

        new_maximum = tl.maximum(row_maximum, tl.max(cosine, 1))
        reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        row_total *= tl.exp(scale * (row_maximum - reference))
        row_total += tl.sum(tl.exp(scale * (cosine - reference[:, None])), 1)
        row_maximum = new_maximum
        start += BLOCK_C

    tl.store(maximum + split * N + rows, row_maximum, mask=in_rows)
    tl.store(total + split * N + rows, row_total, mask=in_rows)


@triton.jit
def _tile_statistics_kernel(
    logits, probabilities, labels, input_r, weight_r, shift, maximum, total, filtered, N, columns,
    stride, start, chunk, scale, limit, K: tl.constexpr, M: tl.constexpr, FILTER: tl.constexpr,
    MAXIMUM_ONLY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One chunk of a tile's columns, which are classes of M centers: raises maximum and, unless
    MAXIMUM_ONLY, adds exp(logit − shift) to total and writes it times r_j, the mean center's factor
    (in place where dtypes agree). With FILTER, what is above the limit is left out, and counted.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < N
    row_shift = tl.load(shift + rows, mask=in_rows, other=0.0)
    c = tl.program_id(1) * chunk
    slot = tl.program_id(1) * N + rows
    row_maximum = tl.load(maximum + slot, mask=in_rows, other=float("-inf"))
    row_total = tl.load(total + slot, mask=in_rows, other=0.0)
    if FILTER:
        row_filtered = tl.load(filtered + slot, mask=in_rows, other=0)
    end = min(c + chunk, columns)
    while c < end:
        column = c + tl.arange(0, BLOCK_C)
        in_columns = column < columns
        cosine, nearest = _tile_cosines(
            logits, stride, input_r, weight_r, rows, in_rows, column, in_columns, M
        )
        cosine = _only_negatives(cosine, labels, rows, in_rows, start + column, start + columns, K)
        if FILTER:
            above = cosine > limit
            cosine = tl.where(above, float("-inf"), cosine)
            if not MAXIMUM_ONLY:
                row_filtered += tl.sum(above.to(tl.int32), 1)
        row_maximum = tl.maximum(row_maximum, tl.max(cosine, 1))
        if not MAXIMUM_ONLY:
            p = tl.exp(scale * cosine - row_shift[:, None])
            row_total += tl.sum(p, 1)
            for m in tl.static_range(M):
                centers = column * M + m
                r_j = tl.load(weight_r + centers, mask=in_columns, other=0.0)
                share = p * r_j[None, :]
                if M > 1:
                    share = tl.where(nearest == m, share, 0.0)
                out = probabilities + rows[:, None] * stride + centers[None, :]
                tl.store(out, share, mask=in_rows[:, None] & in_columns[None, :])
        c += BLOCK_C
    tl.store(maximum + slot, row_maximum, mask=in_rows)
    tl.store(total + slot, row_total, mask=in_rows)
    if FILTER:
        tl.store(filtered + slot, row_filtered, mask=in_rows)


@triton.jit
def _tile_gradient_kernel(
    logits, gradient, labels, target_rows, input_r, weight_r, negative_lse, grad_negative_lse,
    grad_target_cosine, N, columns, stride, start, scale, limit, K: tl.constexpr, M: tl.constexpr,
    FILTER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of G_ij·r_i, where G is the loss's gradient by the cosines (in place where dtypes
    agree); columns are classes of M centers.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < N
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_columns = column < columns
    cosine, nearest = _tile_cosines(
        logits, stride, input_r, weight_r, rows, in_rows, column, in_columns, M
    )

    lse = tl.load(negative_lse + rows, mask=in_rows, other=0.0)
    g = tl.load(grad_negative_lse + rows, mask=in_rows, other=0.0) * scale
    gradient_ij = tl.exp(scale * cosine - lse[:, None]) * g[:, None]
    if FILTER:
        gradient_ij = tl.where(cosine > limit, 0.0, gradient_ij)
    for k in tl.static_range(K):
        target = tl.load(grad_target_cosine + rows * K + k, mask=in_rows, other=0.0)
        match = _is_label(labels, rows, in_rows, start + column, k, K)
        gradient_ij = tl.where(match, target[:, None], gradient_ij)
        if M > 1:  # found again in float64
            center = tl.load(target_rows + rows * K + k, mask=in_rows, other=0) % M
            nearest = tl.where(match, center.to(tl.int32)[:, None], nearest)
    r_i = tl.load(input_r + rows, mask=in_rows, other=0.0)
    scaled = gradient_ij * r_i[:, None]
    for m in tl.static_range(M):
        centers = column * M + m
        own = scaled
        if M > 1:
            own = tl.where(nearest == m, scaled, 0.0)
        out = gradient + rows[:, None] * stride + centers[None, :]
        tl.store(out, own, mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def _center_sums_kernel(
    own, weight_r, center_sums, count, stride, per_program, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Adds a program's share of Σ r_j·w_j over a tile's centers to its row, in float64."""
    d = tl.arange(0, BLOCK_D)
    slot = center_sums + tl.program_id(0) * D + d
    total = tl.load(slot, mask=d < D, other=0.0)
    row = tl.program_id(0).to(tl.int64) * per_program
    end = tl.minimum(row + per_program, count)
    while row < end:
        w = tl.load(own + row * stride + d, mask=d < D, other=0.0).to(tl.float64)
        total += w * tl.load(weight_r + row)
        row += 1
    tl.store(slot, total, mask=d < D)


@triton.jit
def _grad_weight_kernel(
    weight, weight_r, product, grad_weight, count, weight_stride, D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """r_j·(A_j − (ŵ_j·A_j)·ŵ_j) for rows A of product (in place where dtypes agree)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None] & (d < D)[None, :]
    r = tl.load(weight_r + rows, mask=rows < count, other=0.0)[:, None]
    w = tl.load(weight + rows[:, None] * weight_stride + d[None, :], mask=mask, other=0.0)
    unit = w.to(tl.float32) * r
    out = rows[:, None] * D + d[None, :]
    a = tl.load(product + out, mask=mask, other=0.0)
    grad = r * (a - tl.sum(unit * a, 1)[:, None] * unit)
    tl.store(grad_weight + out, grad, mask=mask)


@triton.jit
def _grad_input_kernel(
    input, weight, target_rows, mean_center, center_sum, grad_negative_lse, grad_target_cosine,
    grad_cosine_sum, grad_input, input_stride, weight_stride, scale, D: tl.constexpr,
    K: tl.constexpr, SUM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row per program: r_i·(V_i − (x̂_i·V_i)·x̂_i), in float64, for near cos θ = ±1 a margin's
    slope is large and what is left of its target small. 0 where nothing is asked of the row.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    v = tl.load(mean_center + row * D + d, mask=in_d, other=0.0).to(tl.float64)
    g = tl.load(grad_negative_lse + row)
    v *= g * scale
    asked = g != 0
    if SUM:
        g_sum = tl.load(grad_cosine_sum + row)
        v += g_sum * tl.load(center_sum + d, mask=in_d, other=0.0)
        asked |= g_sum != 0
    counted = False
    for k in tl.static_range(K):
        target = tl.load(target_rows + row * K + k)
        present = target >= 0
        counted |= target != -1
        w = tl.load(weight + target * weight_stride + d, mask=present & in_d, other=0.0)
        w = w.to(tl.float64)
        g_k = tl.load(grad_target_cosine + row * K + k)
        v += g_k * _inverse_norm(tl.sum(w * w, 0)) * w
        asked |= g_k != 0
    x = tl.load(input + row * input_stride + d, mask=in_d, other=0.0).to(tl.float64)
    r_i = _inverse_norm(tl.sum(x * x, 0))
    unit = x * r_i
    grad = r_i * (v - tl.sum(unit * v, 0) * unit)
    grad = tl.where(counted & asked, grad, 0.0).to(tl.float32)
    tl.store(grad_input + row * D + d, grad, mask=in_d)


# ---- configurations ------------------------------------------------------------------------------


def _fused_config(n: int, product: torch.dtype, precision: str, capability: int) -> dict[str, int]:
    """The largest blocks that fit two programs on a multiprocessor and spill (next to) nothing."""
    block_n = min(128, max(16, triton.next_power_of_2(n)))
    if product == torch.float32 and precision == "ieee":  # no tensor cores
        return {
            "BLOCK_N": min(64, block_n), "BLOCK_C": 64, "BLOCK_D": 32,
            "num_warps": 8, "num_stages": 2,
        }  # fmt: skip
    return {
        "BLOCK_N": block_n, "BLOCK_C": 128 if capability == 90 or block_n < 128 else 64,
        "BLOCK_D": 128 // product.itemsize, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def _tile_config(n: int) -> dict[str, int]:
    """Blocks of the kernels that read a tile of logits."""
    block_n = min(4, triton.next_power_of_2(n))
    return {"BLOCK_N": block_n, "BLOCK_C": 2048 // block_n, "num_warps": 4}


def _row_config(d: int) -> dict[str, int]:
    """Blocks of the kernels that hold whole rows of D elements."""
    block_d = triton.next_power_of_2(d)
    return {"BLOCK_R": max(1, 2048 // block_d), "BLOCK_D": block_d, "num_warps": 4}


def _one_row_config(d: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(d)
    return {"BLOCK_D": block_d, "num_warps": min(8, max(1, block_d // 128))}


def _tile_classes(c: int, bytes_per_class: int) -> int:
    """Classes per tile: as many as the workspace holds, in tiles of about equal width."""
    fits = max(1, WORKSPACE_BYTES // bytes_per_class // TILE_ALIGNMENT) * TILE_ALIGNMENT
    return _round_up(triton.cdiv(c, triton.cdiv(c, fits)), TILE_ALIGNMENT)


def _round_up(value: int, multiple: int) -> int:
    return triton.cdiv(value, multiple) * multiple


# ---- launchers -----------------------------------------------------------------------------------


def forward(
    input: Tensor,
    weight: Tensor,
    class_ids: Tensor | None,
    labels: Tensor,
    scale: float,
    limit: float,
    needs_input_grad: bool,
    needs_cosine_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of the classes that are not a row's labels.

    Args:
        input: (N, D), weight: (C, D) or (C, M, D); float32, bfloat16 or float16, on one CUDA device
            (or on the CPU in Triton's interpreter). Where their dtypes differ, both are taken as
            float32.
        class_ids: (S,) int64 rows of weight that take part; None: all, S = C.
        labels: (N, K) int64 in [0, S), distinct within a row, −1 where absent, −2 where a label's
            center is not in weight.
        scale: of the logits.
        limit: other classes with a larger cosine are filtered, left out; ∞ for none.
        needs_input_grad: whether the mean center is asked for.
        needs_cosine_sum: whether the sum of all cosines is asked for; not with sub-centers.

    Returns:
        negative_lse (N,), negative_max (N,), target_cosine (N, K); filtered (N,), how many classes
        are, and cosine_sum (N,); mean_center (N, D); center_sum (D,), of all normalized centers.
        In float32 are negative_max and mean_center, in float64 the others, though lse and target
        cosines are computed in float32. What is not asked for is (0,). All 0 for a row without
        labels; lse and max −∞ for a row that has no other classes.

    Memory above inputs and outputs, in bytes:
        of a plain weight without the mean center 4·C + 8·N·(splits + 1),
        splits ≤ ⌈4·SMs/⌈N/128⌉⌉; else max(64 MiB, 128 classes) of tile at (4·N + 2·N [bfloat16] +
        4·D [float16 or mixed dtypes] + 4 + a row of weight [class_ids]) per center, and O(N·D). An
        input or weight whose rows are not contiguous is copied.

    Raises:
        ValueError: for float64, which has no kernel here.
    """
    input, weight, labels = _check(input, weight, labels)
    (n, d), filters = input.shape, limit < math.inf
    input_r = torch.empty(n, dtype=torch.float32, device=input.device)
    target_cosine = input_r.new_empty(labels.shape)
    exact = input_r.new_zeros(n, dtype=torch.float64)
    if n == 0:
        mean_center = input_r.new_empty((0, d) if needs_input_grad else 0)
        center_sum = exact.new_zeros(d if needs_cosine_sum else 0)
        return (
            exact,
            input_r,
            target_cosine.double(),
            exact.clone(),
            exact.clone(),
            mean_center,
            center_sum,
        )
    with _on_device_of(input):
        _find_targets(input, weight, class_ids, labels, target_cosine)
        # As in backward: a last bit more or less in r_i, times the scale, is in every probability.
        _inverse_norms(input, input_r)
        plain = class_ids is None and weight.dim() == 2 and not filters and not needs_cosine_sum
        cast = weight.dtype != _product_dtypes(input, weight)[0]
        if plain and not cast and not needs_input_grad:
            negative_lse, negative_max = _forward_fused(input, weight, labels, input_r, scale)
            filtered, mean_center, center_sum = exact[:0], input_r[:0], exact[:0]
        else:
            negative_lse, negative_max, filtered, mean_center, center_sum = _forward_tiled(
                input, weight, class_ids, labels, input_r, scale, limit, needs_input_grad,
                needs_cosine_sum,
            )  # fmt: skip
        # The hardware's maximum skips a NaN, the sum does not.
        negative_max = torch.where(negative_lse.isnan(), torch.nan, negative_max)
        present = (labels != -1).any(1)
        if needs_input_grad:
            mean_center = torch.where(present[:, None], mean_center, 0)
        if filters:
            filtered = torch.where(present, filtered, 0)
        cosine_sum = exact[:0]
        if needs_cosine_sum:
            sums = (input.double() @ center_sum) * input_r
            cosine_sum = torch.where(present, sums, 0)
        return (
            torch.where(present, negative_lse, 0).double(),
            torch.where(present, negative_max, 0),
            target_cosine.double(),
            filtered,
            cosine_sum,
            mean_center,
            center_sum,
        )


def _find_targets(
    input: Tensor,
    weight: Tensor,
    class_ids: Tensor | None,
    labels: Tensor,
    target_cosine: Tensor,
) -> Tensor:
    """Fills target_cosine (N, K); returns the rows of weight, its centers (C·M, D), that they are
    with, or what stands for no label.
    """
    n, d = input.shape
    centers = _centers(weight)
    target_rows = torch.empty_like(labels)
    classes = labels
    if class_ids is not None:
        classes = torch.where(labels >= 0, class_ids[labels.clamp_min(0)], labels)
    _target_cosines_kernel[(n,)](
        input, centers, classes, target_cosine, target_rows,
        input.stride(0), centers.stride(0), D=d, K=labels.shape[1], M=_sub_centers(weight),
        **_one_row_config(d),
    )  # fmt: skip
    return target_rows


def _forward_fused(
    input: Tensor, weight: Tensor, labels: Tensor, input_r: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """For a weight in the product's dtype: in the kernel, a cast before `tl.dot` must not be, for
    then Triton 3.6 and 3.7 take TF32 on compute capability 10, whatever the precision asked for.
    """
    (n, d), c = input.shape, weight.shape[0]
    product = weight.dtype
    input = input.to(product)
    precision = _float32_precision() if product == torch.float32 else "ieee"
    capability, multiprocessors = _properties(input.device)
    config = _fused_config(n, product, precision, capability)
    if product == torch.bfloat16 and input.device.type == "cpu":
        # The interpreter's dot takes bfloat16 for integers.
        input, weight = input.float(), weight.float()

    row_blocks, class_blocks = triton.cdiv(n, config["BLOCK_N"]), triton.cdiv(c, config["BLOCK_C"])
    splits = min(class_blocks, triton.cdiv(4 * multiprocessors, row_blocks))
    classes_per_split = triton.cdiv(class_blocks, splits) * config["BLOCK_C"]
    splits = triton.cdiv(c, classes_per_split)

    weight_r = _inverse_norms(weight, input_r.new_empty(c))
    maximum = input_r.new_empty((splits, n))
    total = torch.empty_like(maximum)
    _fused_kernel[(row_blocks, splits)](
        input, weight, labels, input_r, weight_r, maximum,
        total, n, c, classes_per_split, input.stride(0), weight.stride(0), scale,
        D=d, K=labels.shape[1], PRECISION=precision, **config,
    )  # fmt: skip
    negative_max = maximum.amax(0)
    reference = torch.where(negative_max == -torch.inf, 0, negative_max)
    total = (total * torch.exp(scale * (maximum - reference))).sum(0)
    return scale * reference + torch.log(total), negative_max


def _forward_tiled(
    input: Tensor,
    weight: Tensor,
    class_ids: Tensor | None,
    labels: Tensor,
    input_r: Tensor,
    scale: float,
    limit: float,
    needs_mean_center: bool,
    needs_center_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, d = input.shape
    product, factor = _product_dtypes(input, weight)
    tiles = _Tiles(input, weight, class_ids, product, _bytes_per_center(input, weight, class_ids))
    config = _tile_config(n)
    row_blocks = triton.cdiv(n, config["BLOCK_N"])
    chunks = min(triton.cdiv(tiles.classes, config["BLOCK_C"]), triton.cdiv(1024, row_blocks))
    chunk = _round_up(triton.cdiv(tiles.classes, chunks), config["BLOCK_C"])

    # One shift serves all cosines, unless exp() of what is left can leave float32's range: then
    # the shift follows each row's maximum, tile by tile, up from the least logit.
    middle = max(0.0, scale - EXPONENT_MAX)
    follow = -scale - middle < EXPONENT_MIN
    shift = torch.full_like(input_r, -scale if follow else middle)
    maximum = input_r.new_full((chunks, n), -torch.inf)
    total = torch.zeros_like(maximum)
    mean_center = input_r.new_zeros((n, d) if needs_mean_center else 0)
    part = torch.empty_like(mean_center)
    filtered = input_r.new_zeros((chunks, n) if limit < math.inf else 0, dtype=torch.int32)
    center_sums = input_r.new_zeros((64, d) if needs_center_sum else 0, dtype=torch.float64)
    probabilities = tiles.factor(factor)
    for start, own, rows, weight_r in tiles:
        columns = rows.shape[0] // tiles.sub_centers
        if needs_center_sum:
            programs = center_sums.shape[0]
            _center_sums_kernel[(programs,)](
                own, weight_r, center_sums, own.shape[0],
                own.stride(0), triton.cdiv(own.shape[0], programs), D=d, **_one_row_config(d),
            )  # fmt: skip
        for maximum_only in (True, False) if follow else (False,):
            _tile_statistics_kernel[(row_blocks, triton.cdiv(columns, chunk))](
                tiles.logits,
                probabilities, labels, input_r, weight_r, shift, maximum, total, filtered, n,
                columns, tiles.stride, start, chunk, scale, limit, K=labels.shape[1],
                M=tiles.sub_centers, FILTER=limit < math.inf, MAXIMUM_ONLY=maximum_only, **config,
            )  # fmt: skip
            if maximum_only:
                raised = torch.maximum(shift, scale * maximum.amax(0))
                decay = torch.exp(shift - raised)
                total *= decay
                if needs_mean_center:
                    mean_center *= decay[:, None]
                shift = raised
        if needs_mean_center:
            mean_center += _mm(probabilities[:, : rows.shape[0]], rows.to(factor), part)
    total = total.sum(0)
    if needs_mean_center:
        mean_center /= torch.where(total == 0, 1, total)[:, None]
    return (
        shift + torch.log(total),
        maximum.amax(0),
        filtered.sum(0).double() if limit < math.inf else filtered.double(),
        mean_center,
        center_sums.sum(0) if needs_center_sum else center_sums,
    )


def backward(
    input: Tensor,
    weight: Tensor,
    class_ids: Tensor | None,
    labels: Tensor,
    negative_lse: Tensor,
    mean_center: Tensor,
    center_sum: Tensor,
    grad_negative_lse: Tensor,
    grad_target_cosine: Tensor,
    grad_cosine_sum: Tensor,
    scale: float,
    limit: float,
    needs_input_grad: bool,
    needs_weight_grad: bool,
    *,
    take: TakeRows | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients from those of negative_lse (N,), target_cosine (N, K) and cosine_sum: (N,), or (0,)
    where it was not asked for. They come in float64; but for the last, float32 is computed with.

    Args:
        input, weight, class_ids, labels, scale, limit: as in `forward`; negative_lse, mean_center,
            center_sum: its results.
        needs_input_grad, needs_weight_grad: which gradients are asked for; the input's needs the
            mean center.
        take: is given the weight's gradient, a tile at a time, in the place of grad_rows.

    Returns:
        grad_input (N, D) in input's dtype, grad_rows (S, D) or (S, M, D) in weight's dtype; (0,)
        for one not asked for. Rows without labels give and get no gradient; nor do those of which
        all three gradients are 0, whatever they hold.

    Memory above the gradients: as forward's tile, and 4·D more per class for a 16-bit weight.

    Raises:
        ValueError: for float64, which has no kernel here.
    """
    input, weight, labels = _check(input, weight, labels)
    n, d = input.shape
    negative_lse, mean_center = negative_lse.float().contiguous(), mean_center.contiguous()
    grad_negative_lse = grad_negative_lse.float().contiguous()
    grad_target_cosine = grad_target_cosine.float().contiguous()
    grad_cosine_sum = grad_cosine_sum.contiguous()
    grad_input = input.new_empty((n, d) if needs_input_grad else 0)
    shape = (_count(weight, class_ids), *weight.shape[1:])
    grad_rows = weight.new_empty(shape if needs_weight_grad else 0)
    if n == 0:
        return grad_input, grad_rows.zero_()
    with _on_device_of(input):
        cosine = torch.empty_like(grad_target_cosine)
        target_rows = _find_targets(input, weight, class_ids, labels, cosine)
        if needs_input_grad:
            centers = _centers(weight)
            _grad_input_kernel[(n,)](
                input, centers, target_rows, mean_center, center_sum,
                grad_negative_lse, grad_target_cosine, grad_cosine_sum, grad_input,
                input.stride(0), centers.stride(0), scale, D=d, K=labels.shape[1],
                SUM=center_sum.numel() > 0, **_one_row_config(d),
            )  # fmt: skip
        if needs_weight_grad or take is not None:
            _fill_grad_rows(
                _centers(grad_rows) if take is None else None, take, input, weight, class_ids,
                labels, target_rows, negative_lse, grad_negative_lse, grad_target_cosine,
                grad_cosine_sum, scale, limit,
            )  # fmt: skip
    return grad_input, grad_rows


def update(*arguments: Any) -> Tensor:
    """`backward`, in which each tile's gradient goes into an optimizer's step on its centers.

    Args:
        arguments: `backward`'s up to needs_input_grad, of which the weight's rows are contiguous,
            and written; then rule, states, last_step, numbers, step and seed, as
            `row_update.updates` has them, the states (C, M·D).

    Returns:
        grad_input, as `backward`.

    Memory above the gradient: as backward's tile, and M·D more of the weight per class.
    """
    *of_loss, rule, states, last_step, numbers, step, seed = arguments
    input, weight, class_ids = of_loss[:3]
    matrix = weight.flatten(1)

    def take(start: int, rows: Tensor) -> None:
        rows = rows.view(-1, matrix.shape[1])
        end = start + rows.shape[0]
        if class_ids is None:
            ids = torch.arange(start, end, device=weight.device)
        else:
            ids = class_ids[start:end]
        tile = row_update.Update(matrix, rows, ids, last_step, step, seed)
        own: list[Any] = [*states, *numbers]
        if rule == "sgd":
            own = [states[0] if states else None, *numbers[:-1], bool(numbers[-1])]
        getattr(row_update, rule)(tile, *own)

    if input.shape[0] == 0:
        take(0, weight.new_zeros(matrix.shape[1]).expand(_count(weight, class_ids), -1))
    gradients: Any = partial(backward, *of_loss)
    return gradients(False, take=take)[0]


def _fill_grad_rows(
    grad_rows: Tensor | None,
    take: TakeRows | None,
    input: Tensor,
    weight: Tensor,
    class_ids: Tensor | None,
    labels: Tensor,
    target_rows: Tensor,
    negative_lse: Tensor,
    grad_negative_lse: Tensor,
    grad_target_cosine: Tensor,
    grad_cosine_sum: Tensor,
    scale: float,
    limit: float,
) -> None:
    n, d = input.shape
    # What stands in a row without labels, or one of which nothing is asked, must not reach the
    # sums over rows.
    asked = (grad_negative_lse != 0) | (grad_target_cosine != 0).any(1)
    if grad_cosine_sum.numel() > 0:
        asked |= grad_cosine_sum != 0
    asked &= (labels != -1).any(1)
    input = torch.where(asked[:, None], input, 0)
    # exp(logit − ∞) is 0 at any scale: where the softmax is empty, or nothing is asked of it.
    shares = asked & (grad_negative_lse != 0) & (negative_lse != -math.inf)
    negative_lse = torch.where(shares, negative_lse, math.inf)
    input_r = _inverse_norms(input, negative_lse.new_empty(n))
    product, factor = _product_dtypes(input, weight)
    x = input.to(factor)
    in_place = weight.dtype == torch.float32
    per_center = _bytes_per_center(input, weight, class_ids) + (0 if in_place else 4 * d)
    per_center += 0 if take is None else weight.itemsize * d
    tiles = _Tiles(input, weight, class_ids, product, per_center)
    sums = None if in_place else negative_lse.new_empty((tiles.stride, d))
    tile_rows = weight.new_empty((tiles.stride, d)) if grad_rows is None else None
    config, row_config = _tile_config(n), _row_config(d)
    gradient = tiles.factor(factor)
    common = None  # to all centers, from the sum of all cosines
    if grad_cosine_sum.numel() > 0:
        common = ((grad_cosine_sum * input_r) @ input.double()).float()
    for start, own, _, weight_r in tiles:
        count = own.shape[0]
        columns = count // tiles.sub_centers
        grid = (triton.cdiv(n, config["BLOCK_N"]), triton.cdiv(columns, config["BLOCK_C"]))
        _tile_gradient_kernel[grid](
            tiles.logits, gradient, labels, target_rows, input_r,
            weight_r, negative_lse, grad_negative_lse, grad_target_cosine, n, columns,
            tiles.stride, start, scale, limit, K=labels.shape[1], M=tiles.sub_centers,
            FILTER=limit < math.inf, **config,
        )  # fmt: skip
        first = start * tiles.sub_centers
        if tile_rows is not None:
            out = tile_rows[:count]
        elif grad_rows is not None:
            out = grad_rows[first : first + count]
        a = _mm(gradient[:, :count].t(), x, out if sums is None else sums[:count])
        if common is not None:
            a += common
        _grad_weight_kernel[(triton.cdiv(count, row_config["BLOCK_R"]),)](
            own, weight_r, a,
            out, count, own.stride(0), D=d, **row_config,
        )  # fmt: skip
        if take is not None:
            take(start, out)


class _Tiles:
    """Tiles of classes with their logits, in buffers that serve one tile after the other.

    A tile has ``classes`` of ``sub_centers`` each, ``stride`` columns of logits together.
    """

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        class_ids: Tensor | None,
        product: torch.dtype,
        bytes_per_center: int,
    ) -> None:
        self.input, self.weight, self.class_ids = input.to(product), weight, class_ids
        self.sub_centers = _sub_centers(weight)
        self.count = _count(weight, class_ids)
        self.classes = _tile_classes(self.count, self.sub_centers * bytes_per_center)
        self.stride = self.classes * self.sub_centers
        new = torch.empty(
            (input.shape[0] + 1, self.stride), dtype=torch.float32, device=input.device
        )
        self.logits, self.weight_r = new[:-1], new[-1]

    def factor(self, dtype: torch.dtype) -> Tensor:
        """The buffer for the second product's factor: the logits' own if the dtype allows."""
        return self.logits if dtype == torch.float32 else torch.empty_like(self.logits, dtype=dtype)

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """(first class, its centers, the same in the product's dtype, inverse norms)."""
        for start in range(0, self.count, self.classes):
            end = start + self.classes
            if self.class_ids is None:
                own = _centers(self.weight[start:end])
            else:
                own = _centers(self.weight.index_select(0, self.class_ids[start:end]))
            _inverse_norms(own, self.weight_r)
            rows = own.to(self.input.dtype)
            _mm(self.input, rows.t(), self.logits[:, : rows.shape[0]])
            yield start, own, rows, self.weight_r


def _sub_centers(weight: Tensor) -> int:
    return weight.shape[1] if weight.dim() == 3 else 1


def _centers(weight: Tensor) -> Tensor:
    """All centers (C·M, D), one class's after the other."""
    return weight.flatten(0, 1) if weight.dim() == 3 else weight


def _count(weight: Tensor, class_ids: Tensor | None) -> int:
    """How many classes take part."""
    return (weight if class_ids is None else class_ids).shape[0]


def _inverse_norms(matrix: Tensor, out: Tensor) -> Tensor:
    count, d = matrix.shape
    config = _row_config(d)
    _inverse_norms_kernel[(triton.cdiv(count, config["BLOCK_R"]),)](
        matrix, out, count,
        matrix.stride(0), D=d, **config,
    )  # fmt: skip
    return out


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """A @ b into float32 out, whatever the factors' dtype."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":  # under the interpreter; no such overload
        return torch.mm(a.float(), b.float(), out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _check(input: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    for name, tensor in (("input", input), ("weight", weight)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name} must be float32, bfloat16 or float16 for impl='triton', "
                f"got {tensor.dtype}: take impl='cpu' or impl='reference'"
            )
    input = input if input.stride(1) == 1 else input.contiguous()
    if weight.stride(-1) != 1 or (
        weight.dim() == 3 and weight.stride(0) != weight.shape[1] * weight.stride(1)
    ):
        weight = weight.contiguous()
    return input, weight, labels.contiguous()


def _product_dtypes(input: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of the logits' product, and of the second one, by probabilities or gradients.

    Those leave float16's range, so that float16 gives way to float32 there.
    """
    product = input.dtype if input.dtype == weight.dtype else torch.float32
    return product, torch.float32 if product == torch.float16 else product


def _bytes_per_center(input: Tensor, weight: Tensor, class_ids: Tensor | None) -> int:
    """Of a tile: logits and inverse norms, the second factor, and copies of weight's rows."""
    n, d = input.shape
    product, factor = _product_dtypes(input, weight)
    copies = (product != weight.dtype) * product.itemsize + (factor != product) * factor.itemsize
    copies += (class_ids is not None) * weight.itemsize
    return 4 * (n + 1) + (0 if factor == torch.float32 else factor.itemsize * n) + copies * d


def _float32_precision() -> str:
    """That of torch's own float32 products, as `tl.dot` names it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _properties(device: torch.device) -> tuple[int, int]:
    """Compute capability times ten, and number of multiprocessors."""
    if device.type != "cuda":  # the interpreter
        return 80, 1
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
