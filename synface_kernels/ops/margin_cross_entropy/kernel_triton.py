"""The Triton kernels of the margin softmax's core; `launch_triton` launches them.

Two designs share the arithmetic on a block of logits:

- *fused* (FUSED): the GEMM is inside the kernel, and no logit reaches device memory.
- *tiled*: a GEMM by cuBLAS writes a tile's float32 dot products first, and the kernel reads them.

An operand of the GEMMs is *raw*, as it was given, or *unit*: its rows were normalized before they
were rounded. cos_ij = ⟨x_i, w_j⟩·a_i·b_j, where a and b are inverse norms of raw operands and 1 for
unit ones, so that 16-bit inputs are not rounded twice. All sums have a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._norms import LONG
from .._triton import dot, tangent

_NORM_MIN = tl.constexpr(1e-12)  # as in reference.py
# One compiled kernel serves every tile, the last and narrower one too.
_SIZES = ["N", "count", "columns", "start_class"]
_LONG, _SHRINK = tl.constexpr(LONG), tl.constexpr(2.0**-80)


# ---- rows ----------------------------------------------------------------------------------------


@triton.jit
def _inverse_norm(square):
    """Return 1/norm, correctly rounded, from a sum of squares; 0 for a zero row."""
    if square.dtype == tl.float32:  # whose plain root and quotient are approximations
        norm = tl.sqrt_rn(square)
        inverse = tl.div_rn(1.0, norm)
    else:
        norm = tl.sqrt(square)
        inverse = 1.0 / norm
    return tl.where(norm <= _NORM_MIN, 0.0, inverse)


@triton.jit
def _prepare_rows_kernel(
    matrix, ids, rows, inverse_norms, count, stride, D: tl.constexpr, M: tl.constexpr,
    IDS: tl.constexpr, COPY: tl.constexpr, UNIT: tl.constexpr, NORMS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write a block of rows' inverse norms (NORMS), and their copies in the GEMM's dtype (COPY).

    With IDS row i is that of class ids[i // M]; copies are normalized where UNIT.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = row < count
    source = row
    if IDS:
        source = tl.load(ids + row // M, mask=in_rows, other=0) * M + row % M
    d = tl.arange(0, BLOCK_D)
    mask = in_rows[:, None] & (d < D)[None, :]
    given = tl.load(matrix + source[:, None] * stride + d[None, :], mask=mask, other=0.0)
    given = given.to(tl.float32)
    # Squares of long rows would overflow.
    shrink = tl.where(tl.max(tl.abs(given), 1) > _LONG, _SHRINK, 1.0)
    short = given * shrink[:, None]
    inverse = _inverse_norm(tl.sum(short * short, 1))
    if NORMS:
        tl.store(inverse_norms + row, inverse * shrink, mask=in_rows)
    if COPY:
        if UNIT:
            given = short * inverse[:, None]
        tl.store(rows + row[:, None] * D + d[None, :], given, mask=mask)


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


# ---- blocks of dot products ----------------------------------------------------------------------


@triton.jit
def _multiply(
    x, w, rows, in_rows, centers, first_in, second_in, x_stride, w_stride, D: tl.constexpr,
    STEP: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return the dot products of a block of rows with H = 1 or 2 blocks of centers.

    The second block's centers are STEP further on. Two accumulators share each load of x, in fewer
    registers than one of twice the width: the epilogue takes one after the other.
    """
    d = tl.arange(0, BLOCK_D)
    first = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    second = first
    x_rows = x + rows[:, None] * x_stride
    w_rows = w + centers.to(tl.int64)[None, :] * w_stride
    for start in range(0, D, BLOCK_D):
        at = start + d
        x_mask, first_mask, second_mask = in_rows[:, None], first_in[None, :], second_in[None, :]
        if D % BLOCK_D != 0:
            x_mask &= (at < D)[None, :]
            first_mask &= (at < D)[:, None]
            second_mask &= (at < D)[:, None]
        a = tl.load(x_rows + at[None, :], mask=x_mask, other=0.0)
        b = tl.load(w_rows + at[:, None], mask=first_mask, other=0.0)
        first = dot(a, b, first, PRECISION)
        if H == 2:
            b = tl.load(w_rows + STEP * w_stride + at[:, None], mask=second_mask, other=0.0)
            second = dot(a, b, second, PRECISION)
    return first, second


@triton.jit
def _dot_products(
    x, w, products, rows, in_rows, column, columns, x_stride, w_stride, stride, m,
    D: tl.constexpr, M: tl.constexpr, FUSED: tl.constexpr, H: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return dot products with sub-center m of H blocks of classes: computed, or a tile's."""
    centers = column * M + m
    if FUSED:
        first, second = _multiply(
            x, w, rows, in_rows, centers, column < columns, column + BLOCK_C < columns, x_stride,
            w_stride, D, BLOCK_C * M, H, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D,
        )  # fmt: skip
    else:
        first = tl.load(
            products + rows[:, None] * stride + centers[None, :],
            mask=in_rows[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        second = first
    return first, second


@triton.jit
def _is_label(labels, rows, in_rows, classes, k, K: tl.constexpr):
    """Return where a class (column) is label k of its row."""
    label = tl.load(labels + rows * K + k, mask=in_rows, other=-1).to(tl.int32)
    return classes[None, :] == label[:, None]


# ---- forward -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_SIZES)
def _lse_kernel(
    x, w, products, labels, a, b, maximum, total, filtered, cosine_sum, N, columns,
    columns_per_split, x_stride, w_stride, stride, start_class, scale, limit, D: tl.constexpr,
    K: tl.constexpr, M: tl.constexpr, FILTER: tl.constexpr, SUM: tl.constexpr, FUSED: tl.constexpr,
    PRECISION: tl.constexpr, H: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Reduce a block of rows over one split of a tile's classes.

    Updates the split's maximum and total = Σ exp(scale·(cos − maximum)) over classes that are not
    the row's labels; FILTER leaves out, and counts, cosines above the limit; SUM adds all cosines.
    Reads N·D of x and, for each block of rows, columns·M·D of w.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    in_rows = rows < N
    a_i = tl.load(a + rows, mask=in_rows, other=0.0)
    slot = split * N + rows
    row_maximum = tl.load(maximum + slot, mask=in_rows, other=float("-inf"))
    row_total = tl.load(total + slot, mask=in_rows, other=0.0)
    if FILTER:
        row_filtered = tl.load(filtered + slot, mask=in_rows, other=0)
    if SUM:
        row_sum = tl.load(cosine_sum + slot, mask=in_rows, other=0.0)

    # A while loop: since numpy 2.4, Triton 3.6's interpreter takes no tensor to bound range().
    start = split * columns_per_split
    end = min(start + columns_per_split, columns)
    while start < end:
        block = start + tl.arange(0, BLOCK_C)
        for m in tl.static_range(M):
            first, second = _dot_products(
                x, w, products, rows, in_rows, block, columns, x_stride, w_stride, stride, m, D, M,
                FUSED, H, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D,
            )  # fmt: skip
            if M > 1:
                b_j = tl.load(b + block * M + m, mask=block < columns, other=0.0)
                cosine = first * a_i[:, None] * b_j[None, :]
                if m == 0:
                    best = cosine
                else:
                    best = tl.where((cosine > best) | (cosine != cosine), cosine, best)
        for h in tl.static_range(H):
            column = block + h * BLOCK_C
            in_columns = column < columns
            if M == 1:
                b_j = tl.load(b + column, mask=in_columns, other=0.0)
                best = (first if h == 0 else second) * a_i[:, None] * b_j[None, :]
            cosine = tl.where(in_columns[None, :], best, float("-inf"))
            if SUM:
                row_sum += tl.sum(tl.where(in_columns[None, :], best, 0.0), 1)
            for k in tl.static_range(K):
                match = _is_label(labels, rows, in_rows, start_class + column, k, K)
                cosine = tl.where(match, float("-inf"), cosine)
            if FILTER:
                above = cosine > limit
                cosine = tl.where(above, float("-inf"), cosine)
                row_filtered += tl.sum(above.to(tl.int32), 1)
            new_maximum = tl.maximum(row_maximum, tl.max(cosine, 1))
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            row_total *= tl.exp(scale * (row_maximum - shift))
            row_total += tl.sum(tl.exp(scale * (cosine - shift[:, None])), 1)
            row_maximum = new_maximum
        start += H * BLOCK_C

    tl.store(maximum + slot, row_maximum, mask=in_rows)
    tl.store(total + slot, row_total, mask=in_rows)
    if FILTER:
        tl.store(filtered + slot, row_filtered, mask=in_rows)
    if SUM:
        tl.store(cosine_sum + slot, row_sum, mask=in_rows)


# ---- backward ------------------------------------------------------------------------------------


@triton.jit
def _write_factor(
    product, b_j, nearest, labels, target_rows, a, negative_lse, grad_lse, grad_target, grad_sum,
    factor, center_sums, rows, in_rows, column, columns, stride, start_class, scale, limit,
    K: tl.constexpr, M: tl.constexpr, FILTER: tl.constexpr, SUM: tl.constexpr,
    PLAIN: tl.constexpr, FUSED: tl.constexpr, CENTER_SUMS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write one block of the gradient factor, see `_factor_kernel`."""
    in_columns = column < columns
    a_i = tl.load(a + rows, mask=in_rows, other=0.0)
    lse = tl.load(negative_lse + rows, mask=in_rows, other=0.0)
    own_a = 1.0 if PLAIN else a_i
    g = tl.load(grad_lse + rows, mask=in_rows, other=0.0) * own_a
    if factor.dtype.element_ty == tl.float32 or PLAIN or FILTER:
        # Rounded as in the forward pass: the scale makes a last bit's difference count.
        cosine = product * a_i[:, None] * b_j
        gradient = tl.exp(scale * cosine - lse[:, None]) * g[:, None]
    else:  # bfloat16's rounding of G hides it; fewer registers
        gradient = tl.exp(product * b_j * (a_i * scale)[:, None] - lse[:, None]) * g[:, None]
    if FILTER:
        gradient = tl.where(cosine > limit, 0.0, gradient)
    for k in tl.static_range(K):
        match = _is_label(labels, rows, in_rows, start_class + column, k, K)
        target = tl.load(grad_target + rows * K + k, mask=in_rows, other=0.0) * own_a
        gradient = tl.where(match, target[:, None], gradient)
        if M > 1:  # the label's sub-center was chosen in float64
            center = tl.load(target_rows + rows * K + k, mask=in_rows, other=0) % M
            nearest = tl.where(match, center.to(tl.int32)[:, None], nearest)
    if SUM:
        gradient += (tl.load(grad_sum + rows, mask=in_rows, other=0.0) * own_a)[:, None]
    if not PLAIN:
        gradient *= b_j
    for m in tl.static_range(M):
        own = gradient
        if M > 1:
            own = tl.where(nearest == m, own, 0.0)
        own = own.to(factor.dtype.element_ty)
        centers = column * M + m
        if CENTER_SUMS:
            # Σ G·cos, of the rounded factor as the GEMM has it, so that the projection is exact.
            if PLAIN:
                sums = tl.sum(own.to(tl.float32) * cosine, 0)
            else:
                sums = tl.sum(own.to(tl.float32) * product, 0)
            tl.store(center_sums + tl.program_id(0) * stride + centers, sums, mask=in_columns)
        # One 64-bit address for all, and 32-bit offsets.
        out = factor + tl.program_id(0).to(tl.int64) * BLOCK_N * stride
        out += tl.arange(0, BLOCK_N)[:, None] * stride + centers[None, :]
        if FUSED:  # there is room for whole blocks
            tl.store(out, own)
        else:
            tl.store(out, own, mask=in_rows[:, None] & in_columns[None, :])


@triton.jit(do_not_specialize=_SIZES)
def _factor_kernel(
    x, w, products, labels, target_rows, a, b, negative_lse, grad_lse, grad_target, grad_sum,
    factor, center_sums, N, columns, x_stride, w_stride, stride, start_class, scale, limit,
    D: tl.constexpr, K: tl.constexpr, M: tl.constexpr, FILTER: tl.constexpr, SUM: tl.constexpr,
    PLAIN: tl.constexpr, FUSED: tl.constexpr, CENTER_SUMS: tl.constexpr, PRECISION: tl.constexpr,
    H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write a block of the gradient factor F_ij = G_ij·a_i·b_j (PLAIN: G_ij).

    G is the loss's gradient by the cosines, in units of the factor's scale; grad_lse is times the
    softmax's scale. With CENTER_SUMS also the block's part of Σ_i G_ij·cos_ij per center. Unless
    FUSED, F may be written over the dot products.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < N
    block = tl.program_id(1) * (H * BLOCK_C) + tl.arange(0, BLOCK_C)
    for m in tl.static_range(M):
        first, second = _dot_products(
            x, w, products, rows, in_rows, block, columns, x_stride, w_stride, stride, m, D, M,
            FUSED, H, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        if M > 1:
            a_i = tl.load(a + rows, mask=in_rows, other=0.0)[:, None]
            own_b = tl.load(b + block * M + m, mask=block < columns, other=0.0)[None, :]
            if m == 0:
                product, b_j = first, tl.broadcast_to(own_b, (BLOCK_N, BLOCK_C))
                nearest = tl.zeros((BLOCK_N, BLOCK_C), tl.int32)
            else:
                better = (first * a_i * own_b > product * a_i * b_j) | (first != first)
                product = tl.where(better, first, product)
                b_j = tl.where(better, own_b, b_j)
                nearest = tl.where(better, m, nearest)
    for h in tl.static_range(H):
        column = block + h * BLOCK_C
        if M == 1:
            product = first if h == 0 else second
            b_j = tl.load(b + column, mask=column < columns, other=0.0)[None, :]
            nearest = 0
        _write_factor(
            product, b_j, nearest, labels, target_rows, a, negative_lse, grad_lse, grad_target,
            grad_sum, factor, center_sums, rows, in_rows, column, columns, stride,
            start_class, scale, limit, K, M, FILTER, SUM, PLAIN, FUSED, CENTER_SUMS, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _clear_targets_kernel(
    factor, labels, target_rows, a, b, grad_sum, N, columns, stride, start_class, K: tl.constexpr,
    M: tl.constexpr, SUM: tl.constexpr, PLAIN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take the labels' own gradients out of the factor; the input's has them in float64."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < N
    for k in tl.static_range(K):
        label = tl.load(labels + rows * K + k, mask=in_rows, other=-1) - start_class
        here = in_rows & (label >= 0) & (label < columns)
        at = label * M + tl.load(target_rows + rows * K + k, mask=here, other=0) % M
        value = tl.zeros((BLOCK_N,), tl.float32)
        if SUM:
            value += tl.load(grad_sum + rows, mask=here, other=0.0)
            if not PLAIN:
                value *= tl.load(a + rows, mask=here, other=0.0)
                value *= tl.load(b + at, mask=here, other=0.0)
        tl.store(factor + rows * stride + at, value, mask=here)


@triton.jit(do_not_specialize=_SIZES)
def _grad_weight_kernel(
    factor, x, weight, ids, inverse_norms, center_sums, unscale, grad_weight, N, count, row_blocks,
    stride, x_stride, weight_stride, D: tl.constexpr, M: tl.constexpr, IDS: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write H blocks of the gradient by a tile's centers: Fᵀx, projected to their tangents.

    F has r_j as a factor unless UNIT. ROWS is N in the interpreter, and None where compiled: a
    `for` loop is pipelined, and since numpy 2.4, Triton 3.6's interpreter takes no tensor for the
    bound of one.
    """
    center = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.program_id(1) * (H * BLOCK_D) + tl.arange(0, BLOCK_D)
    in_centers = center < count
    first = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    second = first
    step = tl.arange(0, BLOCK_N)
    f_block = factor + step.to(tl.int64)[None, :] * stride + center[:, None]
    x_block = x + step.to(tl.int64)[:, None] * x_stride + d[None, :]
    f_step = tl.full((), BLOCK_N, tl.int64) * stride
    for start in range(0, N if ROWS is None else ROWS, BLOCK_N):
        in_rows = start + step < N
        f = tl.load(f_block)  # there is room for whole blocks, zeros past the last row
        own = tl.load(x_block, mask=in_rows[:, None] & (d < D)[None, :], other=0.0)
        first = dot(f, own, first, PRECISION)
        if H == 2:
            in_block = in_rows[:, None] & (d + BLOCK_D < D)[None, :]
            own = tl.load(x_block + BLOCK_D, mask=in_block, other=0.0)
            second = dot(f, own, second, PRECISION)
        f_block += f_step
        x_block += x_stride * BLOCK_N

    center_sum = tl.zeros((BLOCK_C,), tl.float32)
    block = 0
    while block < row_blocks:
        center_sum += tl.load(center_sums + block * stride + center, mask=in_centers, other=0.0)
        block += 1
    r_j = tl.load(inverse_norms + center, mask=in_centers, other=0.0)
    scale = tl.load(unscale)
    center_sum = center_sum * scale * r_j  # scale·r_j alone underflows for long centers
    source = center.to(tl.int64)
    if IDS:
        source = tl.load(ids + center // M, mask=in_centers, other=0) * M + center % M
    for h in tl.static_range(H):
        at = d + h * BLOCK_D
        mask = in_centers[:, None] & (at < D)[None, :]
        w = tl.load(weight + source[:, None] * weight_stride + at[None, :], mask=mask, other=0.0)
        grad = (first if h == 0 else second) * scale
        if UNIT:
            grad *= r_j[:, None]
        grad -= center_sum[:, None] * (w.to(tl.float32) * r_j[:, None])
        out = grad_weight + center.to(tl.int64)[:, None] * D + at[None, :]
        tl.store(out, grad, mask=mask)


@triton.jit
def _project_rows_kernel(
    weight, ids, inverse_norms, product, unscale, grad_weight, count, weight_stride,
    D: tl.constexpr, M: tl.constexpr, IDS: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the gradient by a block of rows of weight from Σ_i F_ij·x_i (in place if it may be)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = row < count
    d = tl.arange(0, BLOCK_D)
    mask = in_rows[:, None] & (d < D)[None, :]
    source = row
    if IDS:
        source = tl.load(ids + row // M, mask=in_rows, other=0) * M + row % M
    r_j = tl.load(inverse_norms + row, mask=in_rows, other=0.0)[:, None]
    w = tl.load(weight + source[:, None] * weight_stride + d[None, :], mask=mask, other=0.0)
    unit = w.to(tl.float32) * r_j
    out = row[:, None] * D + d[None, :]
    total = tl.load(product + out, mask=mask, other=0.0) * tl.load(unscale)
    if UNIT:
        total *= r_j
    grad = total - tl.sum(unit * total, 1)[:, None] * unit
    tl.store(grad_weight + out, grad, mask=mask)


@triton.jit
def _target_gradients_kernel(
    input, weight, target_rows, inverse_norms, factor_scale, grad_target, has_grad, sums,
    input_stride, weight_stride, D: tl.constexpr, K: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the labels' part of Σ_j F_ij·w_j, projected to the row's tangent, one row per program.

    In float64, for near cos θ = ±1 a margin's slope is large and the projected target small.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    x = tl.load(input + row * input_stride + d, mask=in_d, other=0.0).to(tl.float64)
    v = tl.zeros((BLOCK_D,), tl.float64)
    for k in tl.static_range(K):
        target = tl.load(target_rows + row * K + k)
        w = tl.load(weight + target * weight_stride + d, mask=(target >= 0) & in_d, other=0.0)
        w = w.to(tl.float64)
        v += tl.load(grad_target + row * K + k) * _inverse_norm(tl.sum(w * w, 0)) * w
    scale = tl.load(factor_scale).to(tl.float64)
    if not UNIT:
        scale *= tl.load(inverse_norms + row)
    v = tangent(v, x * _inverse_norm(tl.sum(x * x, 0)), scale)
    v = tl.where(tl.load(has_grad + row) != 0, v, 0.0).to(tl.float32)
    tl.store(sums + row * D + d, v, mask=in_d)


@triton.jit
def _grad_input_kernel(
    input, inverse_norms, sums, unscale, has_grad, grad_input, input_stride, D: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write V_i − (x̂_i·V_i)·x̂_i for V_i = Σ_j F_ij·w_j, one row per program; 0 without gradients.

    F has r_i as a factor unless UNIT.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    r_i = tl.load(inverse_norms + row)
    v = tl.load(sums + row * D + d, mask=in_d, other=0.0) * tl.load(unscale)
    if UNIT:
        v *= r_i
    x = tl.load(input + row * input_stride + d, mask=in_d, other=0.0).to(tl.float32)
    grad = tangent(v, x * r_i, 1.0)
    grad = tl.where(tl.load(has_grad + row) != 0, grad, 0.0)
    tl.store(grad_input + row * D + d, grad, mask=in_d)
