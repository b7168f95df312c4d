"""The Triton kernels of the margin softmax's core; `launch_triton` launches them.

Two designs share the arithmetic on a block of logits:

- *fused* (`_fused_kernel`): without a gradient of the input, a cast of weight, filter or sums. The
  GEMM runs inside the kernel and logits never reach device memory.
- *tiled* (training): cuBLAS writes the float32 logits of one tile of classes into a reused
  workspace, one kernel turns them into an operand of the next GEMM, by cuBLAS.

In both, cos_ij = (x_i · w_j)·r_i·r_j with r = 1/norm in the epilogue, so nothing normalized is
written and 16-bit inputs are not rounded twice. All sums have a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._norms import LONG
from .._triton import tangent

_NORM_MIN = tl.constexpr(1e-12)  # as in reference.py
_LONG, _SHRINK = tl.constexpr(LONG), tl.constexpr(2.0**-80)


@triton.jit
def _inverse_norm(square):
    """Return 1/norm from a sum of squares; 0 for a zero row."""
    norm = tl.sqrt(square)
    return tl.where(norm <= _NORM_MIN, 0.0, 1.0 / norm)


@triton.jit
def _is_label(labels, rows, in_rows, classes, k, K: tl.constexpr):
    """Return where a class (column) is label k of its row."""
    label = tl.load(labels + rows * K + k, mask=in_rows, other=-1).to(tl.int32)
    return classes[None, :] == label[:, None]


@triton.jit
def _only_negatives(cosine, labels, rows, in_rows, classes, C, K: tl.constexpr):
    """Replace the cosines by −∞ at a row's labels and past the last class."""
    cosine = tl.where(classes[None, :] < C, cosine, float("-inf"))
    for k in tl.static_range(K):
        match = _is_label(labels, rows, in_rows, classes, k, K)
        cosine = tl.where(match, float("-inf"), cosine)
    return cosine


@triton.jit
def _tile_cosines(
    logits, stride, input_r, weight_r, rows, in_rows, columns, in_columns, M: tl.constexpr
):
    """Return classes' cosines from a block of a tile's dot products, and each one's sub-center.

    It is the one with the greatest cosine, the first of equals.
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
    """Write a block of rows' inverse norms."""
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
    """Write a row's cosines with its own labels (classes of weight), one row per program.

    In float64, for near cos θ = ±1 a margin's slope is large. Also the rows of weight that they are
    with, or the negative label itself.
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
    """Reduce a block of rows over one split of classes: maximum, Σ exp(scale·(cos − maximum))."""
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
    """Reduce one chunk of a tile's columns, which are classes of M centers.

    Raises maximum and, unless MAXIMUM_ONLY, adds exp(logit − shift) to total and writes it times
    r_j, the mean center's factor (in place where dtypes agree). With FILTER, cosines above the
    limit are left out, and counted.
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
    """Write a block of G_ij·r_i, where G is the loss's gradient by the cosines.

    In place where dtypes agree; columns are classes of M centers.
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
        if M > 1:  # the label's sub-center was chosen in float64
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
    """Add a program's part of Σ r_j·w_j over a tile's centers to its row, in float64."""
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
    """Write r_j·(A_j − (ŵ_j·A_j)·ŵ_j) for rows A of product (in place where dtypes agree)."""
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
    """Write r_i·(V_i − (x̂_i·V_i)·x̂_i), one row per program; 0 where all its gradients are 0.

    In float64, for near cos θ = ±1 a margin's slope is large and the projected target small.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    v = tl.load(mean_center + row * D + d, mask=in_d, other=0.0).to(tl.float64)
    g = tl.load(grad_negative_lse + row)
    v *= g * scale
    has_grad = g != 0
    if SUM:
        g_sum = tl.load(grad_cosine_sum + row)
        v += g_sum * tl.load(center_sum + d, mask=in_d, other=0.0)
        has_grad |= g_sum != 0
    valid = False
    for k in tl.static_range(K):
        target = tl.load(target_rows + row * K + k)
        present = target >= 0
        valid |= target != -1
        w = tl.load(weight + target * weight_stride + d, mask=present & in_d, other=0.0)
        w = w.to(tl.float64)
        g_k = tl.load(grad_target_cosine + row * K + k)
        v += g_k * _inverse_norm(tl.sum(w * w, 0)) * w
        has_grad |= g_k != 0
    x = tl.load(input + row * input_stride + d, mask=in_d, other=0.0).to(tl.float64)
    r_i = _inverse_norm(tl.sum(x * x, 0))
    unit = x * r_i
    grad = tangent(v, unit, r_i)
    grad = tl.where(valid & has_grad, grad, 0.0).to(tl.float32)
    tl.store(grad_input + row * D + d, grad, mask=in_d)
