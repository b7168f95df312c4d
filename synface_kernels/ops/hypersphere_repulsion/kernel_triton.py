"""Hypersphere repulsion in Triton: kernels, launchers and their default configurations.

A cuBLAS GEMM writes the cosines of two blocks of points into a reused workspace, and kernels turn
them into derivatives or collect neighbors from them. Without a gallery each pair of blocks is taken
once, for both its sides. Every sum has one owner and a fixed order: a program owns a row, or a
column, of the workspace; blocks follow each other on the stream.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import WORKSPACE_BYTES, launch, mm, tangent

BLOCK_ALIGNMENT = 128

# From this cosine on, r² is computed from the coordinates' differences.
_CLOSE = tl.constexpr(0.9375)
# Marks a close pair in the workspace, whose derivative is added separately.
_MARK = tl.constexpr(-1e-30)
# Less than the key of any cosine, with 2^32 to spare.
_NO_KEY = tl.constexpr(-(2**63))

LOG_SUM_EXP, RIESZ, LOG, HINGE = (tl.constexpr(i) for i in range(4))
KINDS = {"log_sum_exp": 0, "riesz": 1, "log": 2, "hinge": 3}


# ---- kernels: sums over pairs --------------------------------------------------------------------


@triton.jit
def _potential(c, square, shift, a, KIND: tl.constexpr, POWER: tl.constexpr):
    """Return F and its derivative by the cosine; LOG_SUM_EXP has units of e^{a·shift}, and no a."""
    if KIND == LOG_SUM_EXP:
        f = tl.exp(a * (c - shift))
        slope = f
    elif KIND == RIESZ:
        f = tl.exp(-0.5 * a * tl.log(square))
        slope = a * f / square
    elif KIND == LOG:
        f = -0.5 * tl.log(square)
        slope = 1.0 / square
    else:
        over = tl.maximum(c - a, 0.0)
        if POWER == 1:
            f = over
            slope = tl.where(c > a, 1.0, 0.0).to(over.dtype)
        else:
            f = 0.5 * over * over
            slope = over
    return f, slope


@triton.jit
def _unit(points, inverse, stride, i, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load one point, normalized, in float64."""
    d = tl.arange(0, BLOCK_D)
    x = tl.load(points + i * stride + d, mask=d < D, other=0.0).to(tl.float64)
    return x * tl.load(inverse + i)


@triton.jit
def _apart(x, y, i, j, r_min, D: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the distance of x̂_i and ŷ_j, r_min at least, and it times the direction from ŷ_j."""
    d = tl.arange(0, BLOCK_D)
    difference = x - y
    r = tl.sqrt(tl.sum(difference * difference, 0))
    axis = (i + j) % D
    along = tl.sum(tl.where(d == axis, x, 0.0), 0)
    axis = tl.where(tl.abs(along) > 0.8, (axis + 1) % D, axis)
    push = r_min
    if SYMMETRIC:
        push = tl.where(i > j, -r_min, r_min)
    scale = tl.maximum(r, r_min) / tl.where(r > 0, r, 1.0)
    direction = tl.where(r > 0, difference * scale, tl.where(d == axis, push, 0.0))
    return tl.maximum(r, r_min), direction


@triton.jit
def _close_pair(
    x, y, x_inverse, y_inverse, x_stride, y_stride, i, j, shift, a, r_min, D: tl.constexpr,
    KIND: tl.constexpr, POWER: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return F of one pair, and slope·direction: its gradient by ŷ_j, and minus that by x̂_i."""
    x_i = _unit(x, x_inverse, x_stride, i, D, BLOCK_D)
    y_j = _unit(y, y_inverse, y_stride, j, D, BLOCK_D)
    r, direction = _apart(x_i, y_j, i, j, r_min, D, SYMMETRIC, BLOCK_D)
    f, slope = _potential(1 - 0.5 * r * r, r * r, shift.to(tl.float64), a, KIND, POWER)
    return f, slope * direction


@triton.jit
def _row_maximum_kernel(tile, out, columns, stride, DIAGONAL: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write the greatest cosine of each row (of its pairs i < j on the diagonal)."""
    row = tl.program_id(0).to(tl.int64)
    most = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    start = 0
    while start < columns:
        column = start + tl.arange(0, BLOCK_C)
        valid = column < columns
        if DIAGONAL:
            valid &= column > row
        c = tl.load(tile + row * stride + column, mask=valid, other=float("-inf"))
        most = tl.maximum(most, c)
        start += BLOCK_C
    tl.store(out + row, tl.max(most, 0))


@triton.jit
def _derivatives_kernel(
    tile, x, y, x_inverse, y_inverse, x_stride, y_stride, shift, grad_x, row_sum, row_close,
    row_start, column_start, columns, stride, a, r_min, D: tl.constexpr, KIND: tl.constexpr,
    POWER: tl.constexpr, DIAGONAL: tl.constexpr, SYMMETRIC: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Turn a row of cosines into derivatives, in place, and sum its f.

    Close pairs add their gradient by the row's point here, one after the other, and are counted in
    row_close.
    """
    row = tl.program_id(0).to(tl.int64)
    i = row_start + row
    unit = tl.load(shift)
    total = tl.zeros((), tl.float64)
    any_close = 0
    d = tl.arange(0, BLOCK_D)
    start = 0
    while start < columns:
        column = start + tl.arange(0, BLOCK_C)
        valid = column < columns
        if DIAGONAL:
            valid &= column > row
        c = tl.load(tile + row * stride + column, mask=valid, other=0.0)
        close = valid & (c >= _CLOSE)
        plain = valid & (c < _CLOSE)
        c = tl.where(plain, c, 0.0)
        f, slope = _potential(c, 2.0 - 2.0 * c, unit, a, KIND, POWER)
        total += tl.sum(tl.where(plain, f, 0.0), 0).to(tl.float64)
        slope = tl.where(plain, slope, tl.where(close, _MARK, 0.0))
        tl.store(tile + row * stride + column, slope, mask=column < columns)
        left = tl.sum(close.to(tl.int32), 0)
        any_close += left
        while left > 0:
            next_column = tl.min(tl.where(close, column, columns), 0)
            close &= column != next_column
            pair_f, push = _close_pair(
                x, y, x_inverse, y_inverse, x_stride, y_stride, i, column_start + next_column,
                unit, a, r_min, D, KIND, POWER, SYMMETRIC, BLOCK_D,
            )  # fmt: skip
            total += pair_f
            if GRADIENT:
                to = grad_x + i * D + d
                before = tl.load(to, mask=d < D, other=0.0)
                tl.store(to, (before - push).to(tl.float32), mask=d < D)
            left -= 1
        start += BLOCK_C
    tl.store(row_sum + row, total)
    tl.store(row_close + row, any_close)


@triton.jit
def _close_columns_kernel(
    tile, x, y, x_inverse, y_inverse, x_stride, y_stride, shift, grad_y, row_close, row_start,
    column_start, rows, stride, a, r_min, D: tl.constexpr, KIND: tl.constexpr,
    POWER: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the close pairs' gradients by one column's point."""
    column = tl.program_id(0).to(tl.int64)
    j = column_start + column
    unit = tl.load(shift)
    d = tl.arange(0, BLOCK_D)
    to = grad_y + j * D + d
    start = 0
    while start < rows:
        row = start + tl.arange(0, BLOCK_R)
        close = tl.load(row_close + row, mask=row < rows, other=0) > 0
        if tl.sum(close.to(tl.int32), 0) > 0:
            slope = tl.load(tile + row.to(tl.int64) * stride + column, mask=close, other=0.0)
            close &= slope == _MARK
            left = tl.sum(close.to(tl.int32), 0)
            while left > 0:
                next_row = tl.min(tl.where(close, row, rows), 0)
                close &= row != next_row
                f, push = _close_pair(
                    x, y, x_inverse, y_inverse, x_stride, y_stride, row_start + next_row, j,
                    unit, a, r_min, D, KIND, POWER, SYMMETRIC, BLOCK_D,
                )  # fmt: skip
                before = tl.load(to, mask=d < D, other=0.0)
                tl.store(to, (before + push).to(tl.float32), mask=d < D)
                left -= 1
        start += BLOCK_R


@triton.jit
def _project_kernel(
    gradient, points, inverse, factor, stride, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Project a gradient in place, one row per program: factor/‖x‖·(g − (g·x̂)·x̂)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    x = _unit(points, inverse, stride, row, D, BLOCK_D)
    g = tl.load(gradient + row * D + d, mask=d < D, other=0.0).to(tl.float64)
    out = tangent(g, x, tl.load(factor) * tl.load(inverse + row))
    tl.store(gradient + row * D + d, out.to(tl.float32), mask=d < D)


# ---- kernels: nearest neighbors -----------------------------------------------------------------


@triton.jit
def _key(cosine, index):
    """Return an int64 that is greater for a greater cosine, and among equals for a lower index."""
    bits = cosine.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def _index_of(key):
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def _cosine_of(key):
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _collect_kernel(
    tile, keys, own_inverse, other_inverse, own_start, other_start, owners, others, own_stride,
    other_stride, EXCLUDE_SELF: tl.constexpr, ROOM: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge a tile's cosines into the ROOM best of each owner (a row, or a column)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = row < owners
    own = own_start + row
    slots = keys + own[:, None] * ROOM + tl.arange(0, ROOM)[None, :]
    best = tl.load(slots, mask=in_rows[:, None], other=_NO_KEY)
    r_i = tl.load(own_inverse + own, mask=in_rows, other=0.0).to(tl.float32)
    worst = tl.min(best, 1)
    start = 0
    while start < others:
        column = start + tl.arange(0, BLOCK_C).to(tl.int64)
        other = other_start + column
        valid = in_rows[:, None] & (column < others)[None, :]
        if EXCLUDE_SELF:
            valid &= other[None, :] != own[:, None]
        at = tile + row[:, None] * own_stride + column[None, :] * other_stride
        product = tl.load(at, mask=valid, other=0.0)
        r_j = tl.load(other_inverse + other, mask=column < others, other=0.0).to(tl.float32)
        key = _key(product * r_i[:, None] * r_j[None, :], other[None, :])
        key = tl.where(valid, key, _NO_KEY)
        first = tl.max(key, 1)
        left = tl.sum((first > worst).to(tl.int32), 0)
        while left > 0:
            better = (first > worst)[:, None]
            best = tl.where(better & (best == worst[:, None]), first[:, None], best)
            key = tl.where(key == first[:, None], _NO_KEY, key)
            worst = tl.min(best, 1)
            first = tl.max(key, 1)
            left = tl.sum((first > worst).to(tl.int32), 0)
        start += BLOCK_C
    tl.store(slots, best, mask=in_rows[:, None])


@triton.jit
def _select_kernel(
    x, y, x_inverse, y_inverse, x_stride, y_stride, keys, square, index, others, margin,
    D: tl.constexpr, K: tl.constexpr, ROOM: tl.constexpr, SYMMETRIC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Choose the K best of a row's candidates in float64, one row per program.

    All points are searched where the K best might not be among the candidates.
    """
    i = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, ROOM)
    candidates = tl.load(keys + i * ROOM + slot)
    x_i = _unit(x, x_inverse, x_stride, i, D, BLOCK_D)

    kth = candidates
    for _ in range(K - 1):
        kth = tl.where(kth == tl.max(kth, 0), _NO_KEY, kth)
    least = tl.min(candidates, 0)
    enough = (least < _NO_KEY + ROOM) | (_cosine_of(least) < _cosine_of(tl.max(kth, 0)) - margin)
    count = tl.where(enough, ROOM, others)

    best = _NO_KEY + slot.to(tl.int64)
    c = 0
    while c < count:
        candidate = tl.max(tl.where(slot == c, candidates, _NO_KEY), 0)
        j = tl.where(enough, _index_of(candidate), c)
        valid = tl.where(enough, candidate >= _NO_KEY + ROOM, True)
        if SYMMETRIC:
            valid &= j != i
        if valid:
            difference = x_i - _unit(y, y_inverse, y_stride, j, D, BLOCK_D)
            cosine = 1 - 0.5 * tl.sum(difference * difference, 0)
            key = _key(cosine.to(tl.float32), j)
            worst = tl.min(best, 0)
            best = tl.where((key > worst) & (best == worst), key, best)
        c += 1

    for k in range(K):
        first = tl.max(best, 0)
        best = tl.where(best == first, _NO_KEY, best)
        j = _index_of(first)
        difference = x_i - _unit(y, y_inverse, y_stride, j, D, BLOCK_D)
        tl.store(square + i * K + k, tl.sum(difference * difference, 0))
        tl.store(index + i * K + k, j)


@triton.jit
def _nearest_backward_kernel(
    x, y, x_inverse, y_inverse, x_stride, y_stride, index, grad_square, chosen_by, begin, gradient,
    r_min, D: tl.constexpr, K: tl.constexpr, SYMMETRIC: tl.constexpr, AS_X: tl.constexpr,
    AS_Y: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum the gradients by one point per program: of its neighbors, and of pairs that it is in."""
    own = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float64)
    if AS_X:
        unit = _unit(x, x_inverse, x_stride, own, D, BLOCK_D)
        inverse = tl.load(x_inverse + own)
        for k in range(K):
            j = tl.load(index + own * K + k)
            y_j = _unit(y, y_inverse, y_stride, j, D, BLOCK_D)
            r, direction = _apart(unit, y_j, own, j, r_min, D, SYMMETRIC, BLOCK_D)
            total += 2 * tl.load(grad_square + own * K + k) * direction
    else:
        unit = _unit(y, y_inverse, y_stride, own, D, BLOCK_D)
        inverse = tl.load(y_inverse + own)
    if AS_Y:
        at = tl.load(begin + own)
        end = tl.load(begin + own + 1)
        while at < end:
            pair = tl.load(chosen_by + at)
            i = pair // K
            x_i = _unit(x, x_inverse, x_stride, i, D, BLOCK_D)
            r, direction = _apart(x_i, unit, i, own, r_min, D, SYMMETRIC, BLOCK_D)
            total -= 2 * tl.load(grad_square + pair) * direction
            at += 1
    out = tangent(total, unit, inverse)
    tl.store(gradient + own * D + d, out.to(tl.float32), mask=d < D)


# ---- launchers -----------------------------------------------------------------------------------


class Points:
    """Rows with their float64 inverse norms (N,)."""

    def __init__(self, rows: Tensor, norms: Tensor) -> None:
        self.rows = rows if rows.stride(1) == 1 else rows.contiguous()
        self.inverse = 1 / norms

    def __len__(self) -> int:
        return self.rows.shape[0]

    def units(self, block: slice) -> Tensor:
        """Return a block's normalized rows, float32."""
        return (self.rows[block] * self.inverse[block, None]).float()


def pairs(
    x: Points,
    y: Points | None,
    kind: str,
    a: float,
    power: int,
    r_min: float,
    needs_x_grad: bool,
    needs_y_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ_pairs f, or log Σ_pairs exp, in float64, and its float32 gradients: see op.py.

    Memory above the gradients: a workspace of 64 MiB and O(N).
    """
    symmetric, d = y is None, x.rows.shape[1]
    y = x if y is None else y
    new = x.inverse.new_empty
    grad_x = new((len(x), d) if needs_x_grad else 0, dtype=torch.float32).zero_()
    grad_y = new((len(y), d) if needs_y_grad else 0, dtype=torch.float32).zero_()
    column_grad = grad_x if symmetric else grad_y
    exponential = kind == "log_sum_exp"
    block = _block(d)
    blocks_x, blocks_y = _blocks(len(x), block), _blocks(len(y), block)
    # Each block's sum, and its shift: the sum is in units of e^{a·shift}.
    none = -math.inf if exponential else 0.0
    shift_x, shift_y = ([new(()).fill_(none) for _ in b] for b in (blocks_x, blocks_y))
    shift_y = shift_x if symmetric else shift_y
    sums = [new(()).zero_() for _ in blocks_x]
    row_sum, row_close = new(block), new(block, dtype=torch.int32)
    workspace = new(block * block, dtype=torch.float32)
    row_maximum = new(block, dtype=torch.float32)

    def scaling(before: Tensor, after: Tensor) -> Tensor:
        """Return the factor from one shift's units to another's; a shift of −∞ has no terms yet."""
        return torch.where(before == after, 1.0, (a * (before - after)).exp())

    def raise_shift(shifts: list[Tensor], gradient: Tensor, at: int, rows: slice, to: Tensor):
        factor = scaling(shifts[at], to)
        if gradient.numel():
            gradient[rows].mul_(factor)
        shifts[at] = to
        return factor

    config = {"D": d, "BLOCK_D": triton.next_power_of_2(d)}
    potential = {"KIND": KINDS[kind], "POWER": power, "SYMMETRIC": symmetric}
    for i, rows in enumerate(blocks_x):
        units = x.units(rows)
        for j in range(i if symmetric else 0, len(blocks_y)):
            columns, diagonal = blocks_y[j], symmetric and i == j
            others = units if diagonal else y.units(columns)
            n, m = len(units), len(others)
            tile = workspace[: n * m].view(n, m)
            torch.mm(units, others.t(), out=tile)
            if exponential:
                launch(
                    _row_maximum_kernel, (n,),
                    tile, row_maximum, m, m, DIAGONAL=diagonal,
                    BLOCK_C=1024, num_warps=4,
                )  # fmt: skip
                most = torch.maximum(row_maximum[:n].max().double(), shift_x[i])
                if column_grad.numel():
                    most = torch.maximum(most, shift_y[j])
                sums[i] *= raise_shift(shift_x, grad_x, i, rows, most)
                if not diagonal and column_grad.numel():
                    factor = raise_shift(shift_y, column_grad, j, columns, most)
                    if symmetric:
                        sums[j] *= factor
            args = (
                tile, x.rows, y.rows, x.inverse, y.inverse, x.rows.stride(0), y.rows.stride(0),
                shift_x[i],
            )  # fmt: skip
            launch(
                _derivatives_kernel, (n,),
                *args, grad_x, row_sum, row_close, rows.start,
                columns.start, m, m, a, r_min, DIAGONAL=diagonal, GRADIENT=needs_x_grad,
                **potential, **config, BLOCK_C=1024, num_warps=4,
            )  # fmt: skip
            sums[i] += row_sum[:n].sum()
            if column_grad.numel():
                launch(
                    _close_columns_kernel, (m,),
                    *args, column_grad, row_close, rows.start,
                    columns.start, n, m, a, r_min, **potential, **config, BLOCK_R=1024,
                    num_warps=4,
                )  # fmt: skip
                column_grad[columns].addmm_(tile.t(), units)
            if needs_x_grad:
                grad_x[rows].addmm_(tile, others)
    if exponential:
        shift = torch.stack(shift_x).max()
        terms = [s * scaling(m, shift) for s, m in zip(sums, shift_x, strict=True)]
    else:
        shift, terms = shift_x[0], sums
    total = torch.stack(terms).sum()
    for points, blocks, shifts, gradient in (
        (x, blocks_x, shift_x, grad_x), (y, blocks_y, shift_y, grad_y),
    ):  # fmt: skip
        for rows, own in zip(blocks if gradient.numel() else (), shifts, strict=False):
            factor = a / total * scaling(own, shift) if exponential else torch.ones_like(total)
            count = rows.stop - rows.start
            launch(
                _project_kernel, (count,),
                gradient[rows], points.rows[rows],
                points.inverse[rows], factor, points.rows.stride(0), **config, num_warps=4,
            )  # fmt: skip
    return a * shift + total.log() if exponential else total, grad_x, grad_y


def nearest(x: Points, y: Points | None, k: int) -> tuple[Tensor, Tensor]:
    """Return float64 squared distances (N, k) and indices (N, k): see op.py.

    The GEMM takes 16-bit rows as they are, with float32 sums, and float32 rows as torch is set to.
    Each row has its next_power_of_2(k + 8) best candidates. If these may not be all that are
    within the GEMM's error of the k-th best, the row is searched again in float64.

    Memory above the results: a workspace of 64 MiB and O(N·k).
    """
    symmetric, d = y is None, x.rows.shape[1]
    y = x if y is None else y
    room = triton.next_power_of_2(k + 8)
    new = x.inverse.new_empty
    keys = new((len(x), room), dtype=torch.int64)
    keys.copy_(torch.arange(room, device=keys.device) + _NO_KEY.value)
    square, index = new((len(x), k)), new((len(x), k), dtype=torch.int64)
    dtype = x.rows.dtype if x.rows.dtype == y.rows.dtype else torch.float32
    block = _block(d)
    workspace = new(block * block, dtype=torch.float32)
    blocks_x, blocks_y = _blocks(len(x), block), _blocks(len(y), block)
    config = {"ROOM": room, "BLOCK_R": 16, "BLOCK_C": 64, "num_warps": 4}
    for i, rows in enumerate(blocks_x):
        for j in range(i if symmetric else 0, len(blocks_y)):
            columns, diagonal = blocks_y[j], symmetric and i == j
            n, m = rows.stop - rows.start, columns.stop - columns.start
            tile = workspace[: n * m].view(n, m)
            mm(x.rows[rows].to(dtype), y.rows[columns].to(dtype).t(), tile)
            launch(
                _collect_kernel, (triton.cdiv(n, 16),),
                tile, keys, x.inverse, y.inverse,
                rows.start, columns.start, n, m, m, 1, EXCLUDE_SELF=diagonal, **config,
            )  # fmt: skip
            if symmetric and not diagonal:
                launch(
                    _collect_kernel, (triton.cdiv(m, 16),),
                    tile, keys, y.inverse, x.inverse,
                    columns.start, rows.start, m, n, 1, m, EXCLUDE_SELF=False, **config,
                )  # fmt: skip
    launch(
        _select_kernel, (len(x),),
        x.rows, y.rows, x.inverse, y.inverse, x.rows.stride(0),
        y.rows.stride(0), keys, square, index, len(y), 2 * _cosine_error(d, dtype), D=d, K=k,
        ROOM=room, SYMMETRIC=symmetric, BLOCK_D=triton.next_power_of_2(d), num_warps=4,
    )  # fmt: skip
    return square, index


def nearest_backward(
    x: Points,
    y: Points | None,
    index: Tensor,
    grad_square: Tensor,
    r_min: float,
    needs_x_grad: bool,
    needs_y_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return gradients in their points' dtypes: see op.py."""
    symmetric, d = y is None, x.rows.shape[1]
    y = x if y is None else y
    grad_x = x.rows.new_empty((len(x), d) if needs_x_grad else 0)
    grad_y = y.rows.new_empty((len(y), d) if needs_y_grad else 0)
    index, grad_square = index.contiguous(), grad_square.contiguous()
    # For each point the pairs in which it is the neighbor, in order.
    chosen, chosen_by = index.flatten().sort(stable=True)
    begin = torch.searchsorted(chosen, torch.arange(len(y) + 1, device=chosen.device))
    for gradient, as_x, as_y in ((grad_x, True, symmetric), (grad_y, False, True)):
        if gradient.numel():
            out = torch.empty_like(gradient, dtype=torch.float32)
            launch(
                _nearest_backward_kernel, (len(gradient),),
                x.rows, y.rows, x.inverse,
                y.inverse, x.rows.stride(0), y.rows.stride(0), index, grad_square, chosen_by,
                begin, out, r_min, D=d, K=index.shape[1], SYMMETRIC=symmetric, AS_X=as_x,
                AS_Y=as_y, BLOCK_D=triton.next_power_of_2(d), num_warps=4,
            )  # fmt: skip
            gradient.copy_(out)
    return grad_x, grad_y


def _block(d: int) -> int:
    """Return the points of a block: two blocks' units and their cosines fit the workspace."""
    most = math.isqrt(d * d + WORKSPACE_BYTES // 4) - d
    return max(1, most // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT


def _blocks(n: int, block: int) -> list[slice]:
    """Return blocks of about equal size, beginning at multiples of the alignment."""
    size = triton.cdiv(triton.cdiv(n, triton.cdiv(n, block)), BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _cosine_error(d: int, dtype: torch.dtype) -> float:
    """Return the greatest error of a dot product times two inverse norms.

    Products of 16-bit numbers are exact; float32 sums, rounded or truncated, in any order, lose at
    most (d + 8)·2⁻²³ of Σ|x̂_d·ŷ_d| ≤ 1. TF32 keeps 10 bits of each float32 factor.
    """
    error = (d + 8) * 2.0**-23
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        error += 2.0**-9
    return error
