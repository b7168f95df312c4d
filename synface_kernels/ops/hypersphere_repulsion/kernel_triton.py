"""The Triton kernels of the hypersphere repulsion; `launch_triton` launches them.

Points are compared block by block. A block is prepared first: its rows times powers of two, so that
no GEMM overflows and none of a 16-bit point's bits is lost, padded with zeros. The cosines of two
blocks are computed tile by tile with `tl.dot` and never stored: sums over pairs turn a tile into
its sum and the weights of the gradient's GEMM, the search into the greatest cosine of each group of
points. Every sum has one owner and a fixed order; blocks follow each other on the stream.

Names: SIZE_X and SIZE_Y are the (padded) points of a block, WIDTH their (padded) coordinates, D the
coordinates, BLOCK_* a program's part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton import dot, tangent

# From this cosine on, r² is computed from the coordinates' differences.
_CLOSE = tl.constexpr(0.9375)
# Less than the key of any cosine, with 2^32 to spare.
NO_KEY = -(2**63)
_NO_KEY = tl.constexpr(NO_KEY)
# Exponents of the weights' units may be off by this much from the greatest one.
_SLACK = tl.constexpr(40.0)
# References are this far apart: 16 bytes, as Triton compiles anew for other alignments.
REFERENCE = tl.constexpr(4)
# Stands for the cosine of what is no pair.
_NO_PAIR = tl.constexpr(-2.0)
# A prepared row's norm is in (128, 256].
_LENGTH = tl.constexpr(256.0)

LOG_SUM_EXP, RIESZ, LOG, HINGE = (tl.constexpr(i) for i in range(4))
KINDS = {"log_sum_exp": 0, "riesz": 1, "log": 2, "hinge": 3}


# ---- tiles of cosines ----------------------------------------------------------------------------


@triton.jit
def _round_to_tf32(x):
    """Round float32 to TF32's ten bits; the hardware would cut them off."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["count"])
def _prepare_kernel(
    rows, inverse, out, scale, count, stride, D: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write a block's rows times powers of two, padded with zeros, and their inverse norms.

    Reads count×D points and count float64 inverse norms; writes BLOCK_R×BLOCK_D a program.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    factor = tl.load(inverse + row, mask=row < count, other=1.0)
    power = (factor.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    power *= _LENGTH
    mask = (row < count)[:, None] & (d < D)[None, :]
    x = tl.load(rows + row[:, None] * stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
    x *= power.to(tl.float32)[:, None]
    if PRECISION == "tf32":
        x = _round_to_tf32(x)
    tl.store(out + row[:, None] * WIDTH + d[None, :], x.to(out.dtype.element_ty))
    if tl.program_id(1) == 0:
        tl.store(scale + row, (factor / power).to(tl.float32))


@triton.jit
def _cosines(
    x, y, x_scale, y_scale, n, c, x_count, y_count, DIAGONAL: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return rows and columns of tile (n, c) of two prepared blocks, cosines, and which are pairs.

    With DIAGONAL the two blocks are one.
    """
    row, column = n * BLOCK_N + tl.arange(0, BLOCK_N), c * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    x += row[:, None] * WIDTH + d[None, :]
    y += column[None, :] * WIDTH + d[:, None]
    product = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        product = dot(tl.load(x + start), tl.load(y + start), product, PRECISION)
    cosine = product * tl.load(x_scale + row)[:, None] * tl.load(y_scale + column)[None, :]
    valid = (row < x_count)[:, None] & (column < y_count)[None, :]
    if DIAGONAL:
        valid &= row[:, None] != column[None, :]
    return row, column, cosine, valid


# ---- sums over pairs -----------------------------------------------------------------------------


@triton.jit
def _potential(c, square, shift, a, KIND: tl.constexpr, POWER: tl.constexpr):
    """Return F and its derivative by the cosine; LOG_SUM_EXP has units of e^{a·shift}, and no a."""
    if KIND == LOG_SUM_EXP:
        f = tl.exp(a * (c - shift))
        slope = f
    elif KIND == RIESZ:
        slope = a * tl.exp(-(0.5 * a + 1) * tl.log(square))
        f = slope * square * (1 / a)
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
def _rescaling(before, after, a):
    """Return the factor from e^{a·before} to e^{a·after} as units; −∞ has no terms yet."""
    return tl.where(before == after, 1.0, tl.exp(a * (before - after)))


@triton.jit(do_not_specialize=["x_count", "y_count"])
def _pairs_kernel(
    x, y, x_scale, y_scale, weights, tile_maximum, tile_close, tile_sum, tile_shift, reference,
    x_count, y_count, a, KIND: tl.constexpr, POWER: tl.constexpr, DIAGONAL: tl.constexpr,
    REPEAT: tl.constexpr, GRADIENT: tl.constexpr, SIZE_X: tl.constexpr, SIZE_Y: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Reduce a tile of two blocks' pairs, and write the weights of the gradient's GEMM.

    Reads the two prepared blocks, BLOCK_N×WIDTH and BLOCK_C×WIDTH a program. Adds the tile's Σ f to
    its own slot of tile_sum (for LOG_SUM_EXP in units of e^{a·tile_shift}, the greatest cosine so
    far), and writes its number of close pairs and BLOCK_N×BLOCK_C weights: slope times both inverse
    norms; −0 for a close pair, which `_close_kernel` adds. Without GRADIENT only tiles with close
    pairs are written, for these. With DIAGONAL the two blocks are one: tiles above the diagonal are
    written to both sides.

    LOG_SUM_EXP's weights are in units of e^{a·reference}. With REPEAT, the second launch, they are
    written again only where the tiles' greatest cosine is too far above it; the next reference is
    what holds then.
    """
    n, c = tl.program_id(0), tl.program_id(1)
    TILES_C: tl.constexpr = SIZE_Y // BLOCK_C
    tile = n * TILES_C + c
    if KIND == LOG_SUM_EXP:
        units = tl.load(reference)
        if REPEAT:
            slot = tl.arange(0, TILES)
            mask = slot < SIZE_X // BLOCK_N * TILES_C
            most = tl.max(tl.load(tile_maximum + slot, mask=mask, other=float("-inf")), 0)
            repeat = a * (most - units) > _SLACK
            units = tl.where(repeat, most, units)
            if tile == 0:
                tl.store(reference + REFERENCE, units)
            if not repeat:
                return
    if DIAGONAL:  # noqa: SIM102 (compiled only then)
        if n > c:
            return
    row, column, cosine, valid = _cosines(
        x, y, x_scale, y_scale, n, c, x_count, y_count, DIAGONAL, WIDTH, PRECISION, BLOCK_N,
        BLOCK_C, BLOCK_D,
    )  # fmt: skip
    # Masks are found again in the values, as they would not fit the registers beside them.
    cosine = tl.where(valid, cosine, _NO_PAIR)
    most = 0.0
    if KIND == LOG_SUM_EXP:
        greatest = tl.max(cosine)
        most = tl.where(greatest > _NO_PAIR, greatest, 0.0)
        greatest = tl.where(greatest > _NO_PAIR, greatest, float("-inf"))
    plain = (cosine > _NO_PAIR) & (cosine < _CLOSE)
    marked = tl.where(cosine >= _CLOSE, -1.0, 0.0)
    cosine = tl.where(plain, cosine, most)
    f, slope = _potential(cosine, 2.0 - 2.0 * cosine, most, a, KIND, POWER)
    slope = tl.where(plain, slope, marked)
    number = tl.sum((slope < 0).to(tl.int32))
    if not REPEAT:
        total = tl.sum(tl.where(plain, f, 0.0)).to(tl.float64)
        if DIAGONAL:
            total *= tl.where(n == c, 0.5, 1.0)  # both halves are there
        tl.store(tile_close + tile, number)
        before = tl.load(tile_sum + tile)
        if KIND == LOG_SUM_EXP:
            tl.store(tile_maximum + tile, greatest)
            old = tl.load(tile_shift + tile)
            new = tl.maximum(old, greatest)
            before *= _rescaling(old, new, a)
            total *= _rescaling(greatest, new, a)
            tl.store(tile_shift + tile, new)
        tl.store(tile_sum + tile, before + total)
        if DIAGONAL and GRADIENT:
            tl.store(tile_close + c * TILES_C + n, number)
            if KIND == LOG_SUM_EXP:
                tl.store(tile_maximum + c * TILES_C + n, greatest)
    at = weights + row[:, None] * SIZE_Y + column[None, :]
    mark = tl.full((), -(2**31), tl.int32).to(tl.float32, bitcast=True)  # a literal −0 becomes 0
    if GRADIENT:
        weight = slope * tl.load(x_scale + row)[:, None] * tl.load(y_scale + column)[None, :]
        if KIND == LOG_SUM_EXP:  # a tile without pairs may be far above all others' cosines
            weight *= tl.where(greatest > float("-inf"), tl.exp(a * (most - units)), 0.0)
        if PRECISION == "tf32":
            weight = _round_to_tf32(weight)
        weight = tl.where(slope < 0, mark, weight).to(weights.dtype.element_ty)
        tl.store(at, weight)
        if DIAGONAL:  # noqa: SIM102
            if n < c:
                tl.store(weights + column[None, :] * SIZE_Y + row[:, None], weight)
    else:
        marks = tl.where(slope < 0, mark, 0.0).to(weights.dtype.element_ty)
        tl.store(at, marks, mask=number > 0)


@triton.jit(do_not_specialize=["count"])
def _gradient_kernel(
    weights, other, own_scale, gradient, before, after, count, a, D: tl.constexpr,
    SIZE_X: tl.constexpr, SIZE_Y: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr,
    EXPONENTIAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the GEMM weights @ other (TRANSPOSED: weights.T @ other) to count×D of the gradient.

    Reads BLOCK_N×SIZE_Y weights and SIZE_Y×BLOCK_D of the other block's points (TRANSPOSED:
    SIZE_X); reads and writes BLOCK_N×BLOCK_D float32 of the gradient. EXPONENTIAL: its units go
    from e^{a·before} to e^{a·after} first.
    """
    start_row, start_d = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_D
    row, d, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    if TRANSPOSED:
        weights += start_row
    else:
        weights += start_row * SIZE_Y
    other += start_d
    product = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, SIZE_X if TRANSPOSED else SIZE_Y, BLOCK_K):
        if TRANSPOSED:
            w = tl.load(weights + (start + k)[None, :] * SIZE_Y + row[:, None])
        else:
            w = tl.load(weights + row[:, None] * SIZE_Y + (start + k)[None, :])
        v = tl.load(other + (start + k)[:, None] * WIDTH + d[None, :])
        product = dot(w, v, product, PRECISION)
    at = gradient + start_row * D + start_d + row[:, None] * D + d[None, :]
    mask = (start_row + row < count)[:, None] & (start_d + d < D)[None, :]
    old = tl.load(at, mask=mask, other=0.0)
    if EXPONENTIAL:
        old *= _rescaling(tl.load(before), tl.load(after), a)
    tl.store(at, old + product / tl.load(own_scale + start_row + row)[:, None], mask=mask)


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
def _is_marked(weight):
    """Return where weights are −0."""
    if weight.dtype.primitive_bitwidth == 16:
        return weight.to(tl.int16, bitcast=True) == -(2**15)
    else:
        return weight.to(tl.int32, bitcast=True) == -(2**31)


@triton.jit
def _close_kernel(
    weights, tile_close, x, y, x_inverse, y_inverse, x_stride, y_stride, reference, gradient,
    pair_sum, pair_shift, x_start, y_start, a, r_min, D: tl.constexpr, KIND: tl.constexpr,
    POWER: tl.constexpr, OWNER_IS_Y: tl.constexpr, DIAGONAL: tl.constexpr,
    SYMMETRIC: tl.constexpr, VALUE: tl.constexpr, GRADIENT: tl.constexpr, SIZE_X: tl.constexpr,
    SIZE_Y: tl.constexpr, TILES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the close pairs of one point (a row of the weights, or a column), one after the other.

    Reads a number for each of the point's tiles of BLOCK_C, and, only where these have close pairs,
    its weights in them, of which −0 marks a close pair, and both points of each. Adds F to the
    point's pair_sum (for LOG_SUM_EXP in units of e^{a·pair_shift}), and D float32 to its gradient.
    """
    own = tl.program_id(0)
    slot = tl.arange(0, TILES)
    SIZE: tl.constexpr = SIZE_X if OWNER_IS_Y else SIZE_Y
    if OWNER_IS_Y:
        at = tile_close + slot * (SIZE_Y // BLOCK_C) + own // BLOCK_C
    else:
        at = tile_close + own // BLOCK_C * (SIZE_Y // BLOCK_C) + slot
    here = slot < SIZE // BLOCK_C
    if DIAGONAL and not GRADIENT:  # the tiles before are not written, as their pairs are others'
        here &= slot >= own // BLOCK_C
    counts = tl.load(at, mask=here, other=0)
    if tl.sum(counts, 0) == 0:
        return
    d = tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_C)
    i = ((y_start if OWNER_IS_Y else x_start) + own).to(tl.int64)
    units = tl.zeros((), tl.float64)
    shift = tl.zeros((), tl.float64)
    total = tl.zeros((), tl.float64)
    push = tl.zeros((BLOCK_D,), tl.float64)
    if VALUE:
        total = tl.load(pair_sum + i)
    if KIND == LOG_SUM_EXP:
        if GRADIENT:
            units = tl.load(reference).to(tl.float64)
        if VALUE:
            shift = tl.load(pair_shift + i)
    start = 0
    while start < SIZE:
        left = tl.sum(tl.where(slot == start // BLOCK_C, counts, 0), 0)
        marked = (k + start < SIZE) & (left > 0)
        if OWNER_IS_Y:
            w = tl.load(weights + (start + k) * SIZE_Y + own, mask=marked, other=0.0)
        else:
            w = tl.load(weights + own * SIZE_Y + start + k, mask=marked, other=0.0)
        marked = _is_marked(w)
        left = tl.sum(marked.to(tl.int32), 0)
        while left > 0:
            first = tl.min(tl.where(marked, k, BLOCK_C), 0)
            marked &= k != first
            if OWNER_IS_Y:
                j = (x_start + start + first).to(tl.int64)
                x_at, y_at = j, i
            else:
                j = (y_start + start + first).to(tl.int64)
                x_at, y_at = i, j
            x_i = _unit(x, x_inverse, x_stride, x_at, D, BLOCK_D)
            y_j = _unit(y, y_inverse, y_stride, y_at, D, BLOCK_D)
            r, direction = _apart(x_i, y_j, x_at, y_at, r_min, D, SYMMETRIC, BLOCK_D)
            if OWNER_IS_Y:
                direction = -direction
            c = 1 - 0.5 * r * r
            f, slope = _potential(c, r * r, units, a, KIND, POWER)
            push += slope * direction
            if VALUE:
                counted = True
                if DIAGONAL:
                    counted = j > i
                if counted:
                    if KIND == LOG_SUM_EXP:
                        higher = tl.maximum(shift, c)
                        total *= _rescaling(shift, higher, a)
                        total += tl.exp(a * (c - higher))
                        shift = higher
                    else:
                        total += f
            left -= 1
        start += BLOCK_C
    if VALUE:
        tl.store(pair_sum + i, total)
        if KIND == LOG_SUM_EXP:
            tl.store(pair_shift + i, shift)
    if GRADIENT:
        to = gradient + i * D + d
        old = tl.load(to, mask=d < D, other=0.0)
        tl.store(to, (old - push).to(tl.float32), mask=d < D)


@triton.jit
def _project_kernel(
    gradient, points, inverse, factor, stride, D: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Project a gradient in place, one row per program: factor/‖x‖·(g − (g·x̂)·x̂).

    Reads a point and D float32, and writes D float32; factor holds one number per block.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    x = _unit(points, inverse, stride, row, D, BLOCK_D)
    g = tl.load(gradient + row * D + d, mask=d < D, other=0.0).to(tl.float64)
    out = tangent(g, x, tl.load(factor + row // SIZE) * tl.load(inverse + row))
    tl.store(gradient + row * D + d, out.to(tl.float32), mask=d < D)


# ---- nearest neighbors ---------------------------------------------------------------------------


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


@triton.jit(do_not_specialize=["x_count", "y_count"])
def _maxima_kernel(
    x, y, x_scale, y_scale, row_maxima, column_maxima, x_count, y_count, DIAGONAL: tl.constexpr,
    COLUMNS: tl.constexpr, SIZE_X: tl.constexpr, SIZE_Y: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the greatest cosine of each row with each GROUP of columns; with COLUMNS, vice versa.

    Reads the two prepared blocks, BLOCK_N×WIDTH and BLOCK_C×WIDTH a program; writes one number for
    GROUP cosines. With DIAGONAL the two blocks are one, as are the two results.
    """
    n, c = tl.program_id(0), tl.program_id(1)
    if DIAGONAL:  # noqa: SIM102 (compiled only then)
        if n > c:
            return
    row, column, cosine, valid = _cosines(
        x, y, x_scale, y_scale, n, c, x_count, y_count, DIAGONAL, WIDTH, PRECISION, BLOCK_N,
        BLOCK_C, BLOCK_D,
    )  # fmt: skip
    cosine = tl.where(valid, cosine, float("-inf"))
    most = tl.max(tl.reshape(cosine, (BLOCK_N, BLOCK_C // GROUP, GROUP)), 2)
    group = c * (BLOCK_C // GROUP) + tl.arange(0, BLOCK_C // GROUP)
    tl.store(row_maxima + row[:, None] * (SIZE_Y // GROUP) + group[None, :], most)
    if COLUMNS:
        most = tl.max(tl.reshape(cosine, (BLOCK_N // GROUP, GROUP, BLOCK_C)), 1)
        group = n * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
        tl.store(column_maxima + column[None, :] * (SIZE_X // GROUP) + group[:, None], most)


@triton.jit(do_not_specialize=["owners", "others"])
def _collect_kernel(
    maxima, keys, own_start, other_start, owners, others, SIZE: tl.constexpr, GROUP: tl.constexpr,
    ROOM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge a block's maxima into the ROOM best groups of each point.

    Reads SIZE / GROUP float32 a point; reads and writes its ROOM keys.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = row < owners
    own = own_start + row.to(tl.int64)
    slots = keys + own[:, None] * ROOM + tl.arange(0, ROOM)[None, :]
    best = tl.load(slots, mask=in_rows[:, None], other=_NO_KEY)
    worst = tl.min(best, 1)
    start = 0
    while start * GROUP < others:
        group = start + tl.arange(0, BLOCK_C)
        valid = in_rows[:, None] & (group < SIZE // GROUP)[None, :]
        at = maxima + row[:, None] * (SIZE // GROUP) + group[None, :]
        most = tl.load(at, mask=valid, other=float("-inf"))
        key = _key(most, (other_start // GROUP + group)[None, :])
        key = tl.where(most > float("-inf"), key, _NO_KEY)
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


@triton.jit(do_not_specialize=["others"])
def _select_kernel(
    x, y, x_inverse, y_inverse, x_stride, y_stride, keys, square, index, others, margin,
    D: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, ROOM: tl.constexpr,
    GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Choose the K best of a point's candidate groups in float64, one point per program.

    Reads its ROOM keys, and GROUP×D points for each group whose maximum is within the margin of the
    K-th best. All points are searched where there may be more such groups than keys. Writes K
    squared distances and indices.
    """
    i = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, ROOM)
    candidates = tl.load(keys + i * ROOM + slot)
    kth = candidates
    for _ in range(K - 1):
        kth = tl.where(kth == tl.max(kth, 0), _NO_KEY, kth)
    best_key = tl.max(kth, 0)
    threshold = _cosine_of(best_key) - margin
    threshold = tl.where(best_key < _NO_KEY + ROOM, float("-inf"), threshold)
    least = tl.min(candidates, 0)
    enough = (least < _NO_KEY + ROOM) | (_cosine_of(least) < threshold)
    count = tl.where(enough, ROOM, (others + GROUP - 1) // GROUP)

    lane = tl.arange(0, GROUP)
    d = tl.arange(0, BLOCK_D)
    r_i = tl.load(x_inverse + i)
    best = _NO_KEY + tl.arange(0, SLOTS).to(tl.int64)
    squares = tl.zeros((SLOTS,), tl.float64)
    c = 0
    while c < count:
        candidate = tl.max(tl.where(slot == c, candidates, _NO_KEY), 0)
        group = tl.where(enough, _index_of(candidate), c)
        wanted = (candidate >= _NO_KEY + ROOM) & (_cosine_of(candidate) >= threshold)
        if wanted | (enough == 0):
            j = group * GROUP + lane
            valid = j < others
            if SYMMETRIC:
                valid &= j != i
            r_j = tl.load(y_inverse + j, mask=valid, other=0.0)
            total = tl.zeros((GROUP,), tl.float64)
            for start in range(0, D, BLOCK_D):
                in_d = start + d < D
                x_i = tl.load(x + i * x_stride + start + d, mask=in_d, other=0.0)
                y_j = tl.load(
                    y + j[:, None] * y_stride + (start + d)[None, :],
                    mask=valid[:, None] & in_d[None, :],
                    other=0.0,
                )
                difference = (x_i.to(tl.float64) * r_i)[None, :] - y_j.to(tl.float64) * r_j[:, None]
                total += tl.sum(difference * difference, 1)
            key = tl.where(valid, _key((1 - 0.5 * total).to(tl.float32), j), _NO_KEY)
            first, worst = tl.max(key, 0), tl.min(best, 0)
            while first > worst:
                replaced = best == worst
                best = tl.where(replaced, first, best)
                squares = tl.where(replaced, tl.sum(tl.where(key == first, total, 0.0), 0), squares)
                key = tl.where(key == first, _NO_KEY, key)
                first, worst = tl.max(key, 0), tl.min(best, 0)
        c += 1

    for k in range(K):
        first = tl.max(best, 0)
        tl.store(square + i * K + k, tl.sum(tl.where(best == first, squares, 0.0), 0))
        tl.store(index + i * K + k, _index_of(first))
        best = tl.where(best == first, _NO_KEY, best)


@triton.jit
def _nearest_backward_kernel(
    x, y, x_inverse, y_inverse, x_stride, y_stride, index, grad_square, chosen_by, begin, gradient,
    r_min, D: tl.constexpr, K: tl.constexpr, SYMMETRIC: tl.constexpr, AS_X: tl.constexpr,
    AS_Y: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum the gradients by one point per program: of its neighbors, and of pairs that it is in.

    Reads the other point of each of its pairs (2·K of them on average), and writes D float32.
    """
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
