"""Launches the Triton kernels of the hypersphere repulsion, without waiting for the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .._triton import WORKSPACE_BYTES, chip_of, float32_precision, launch, round_up
from .kernel_triton import (
    KINDS,
    NO_KEY,
    REFERENCE,
    _close_kernel,
    _collect_kernel,
    _gradient_kernel,
    _maxima_kernel,
    _nearest_backward_kernel,
    _pairs_kernel,
    _prepare_kernel,
    _project_kernel,
    _select_kernel,
)

# Points of a tile of cosines, and of a group whose greatest cosine the search keeps.
TILE = 128
GROUP = 32


class Points:
    """Rows with their float64 inverse norms (N,)."""

    def __init__(self, rows: Tensor, norms: Tensor) -> None:
        self.rows = rows if rows.stride(1) == 1 else rows.contiguous()
        self.inverse = 1 / norms

    def __len__(self) -> int:
        return self.rows.shape[0]


@dataclass(frozen=True)
class Plan:
    """Dtype, sizes and kernel configurations of a call's GEMMs.

    Attributes:
        dtype: the prepared points' dtype. precision: "ieee" or "tf32", of its GEMMs.
        width: coordinates of a prepared point, a multiple of BLOCK_D.
        size_x, size_y: points of a block, multiples of TILE.
        capability: of the device, as 90.
    """

    dtype: torch.dtype
    precision: str
    width: int
    size_x: int
    size_y: int
    capability: int

    @classmethod
    def make(cls, x: Points, y: Points, *, weights: bool) -> Plan:
        """Return the plan for a GEMM of x and y, with weights for another one or group maxima."""
        dtype, precision = _gemm_dtype(x.rows.dtype, y.rows.dtype, weights)
        d = x.rows.shape[1]
        block_d = min(_depth(dtype, precision), max(16, triton.next_power_of_2(d)))
        width = round_up(d, block_d)
        most = _most(width, dtype, weights)
        sizes = _size(len(x), most), _size(len(y), most)
        return cls(dtype, precision, width, *sizes, chip_of(x.rows.device).capability)

    @property
    def tiles(self) -> dict[str, Any]:
        """The configuration of the kernels that compute tiles of cosines."""
        block_d = min(_depth(self.dtype, self.precision), self.width)
        stages = 4 if _on_cores(self.dtype, self.precision) else 2
        shape = {"BLOCK_N": TILE, "BLOCK_C": TILE, "BLOCK_D": block_d}
        # With 8 warps some energies' registers spill, but tcgen05 takes no more.
        warps = 16 if stages == 4 and self.capability < 100 else 8
        return shape | {"num_warps": warps, "num_stages": stages}

    @property
    def gemm(self) -> dict[str, Any]:
        """The configuration of the gradient's GEMM."""
        on_cores = _on_cores(self.dtype, self.precision)
        block_k = min(128 // self.dtype.itemsize if on_cores else 16, TILE)
        shape = {"BLOCK_N": TILE, "BLOCK_K": block_k, "BLOCK_D": min(128, self.width & -self.width)}
        return shape | {"num_warps": 8, "num_stages": 3 if on_cores else 2}

    def buffers(self, like: Tensor) -> tuple[Block, Block]:
        """Return memory for a block of x and one of y."""
        return tuple(
            Block(
                like.new_empty((size, self.width), dtype=self.dtype),
                like.new_empty(size, dtype=torch.float32),
            )
            for size in (self.size_x, self.size_y)
        )  # type: ignore[return-value]


@dataclass
class Block:
    """A prepared block: its points, their inverse norms, and where it begins."""

    points: Tensor
    scale: Tensor
    start: int = 0
    count: int = 0

    def prepare(self, points: Points, number: int, plan: Plan) -> Block:
        """Prepare the block of this number; return it."""
        size = len(self.scale)
        self.start = number * size
        self.count = min(size, len(points) - self.start)
        rows, end = points.rows, self.start + self.count
        block_d = min(64, plan.width & -plan.width)
        block_r = min(32, TILE)
        launch(
            _prepare_kernel, (size // block_r, plan.width // block_d),
            rows[self.start : end], points.inverse[self.start : end], self.points, self.scale,
            self.count, rows.stride(0), D=rows.shape[1], WIDTH=plan.width,
            PRECISION=plan.precision, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
        return self


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
    needs_grad = needs_x_grad or needs_y_grad
    exponential = kind == "log_sum_exp"
    plan = Plan.make(x, y, weights=True)
    blocks_x, blocks_y = triton.cdiv(len(x), plan.size_x), triton.cdiv(len(y), plan.size_y)
    strips = [(i, j) for i in range(blocks_x) for j in range(i if symmetric else 0, blocks_y)]
    block_x, block_y = plan.buffers(x.inverse)
    weights = new(plan.size_x * plan.size_y, dtype=plan.dtype)

    # Every tile, and for close pairs every point, has a sum of its own, in units of its own.
    grid = plan.size_x // TILE, plan.size_y // TILE
    slots = grid[0] * grid[1]
    sums, shifts = new(slots + len(x)).zero_(), new(slots + len(x)).fill_(-math.inf)
    tile_maximum = new(slots, dtype=torch.float32)
    tile_close = new(slots, dtype=torch.int32)
    # The units of the gradient's weights before each strip, and after the last one.
    references = new((len(strips) + 1, REFERENCE.value), dtype=torch.float32).fill_(-math.inf)
    unit_x = [0] * blocks_x
    unit_y = unit_x if symmetric else [0] * blocks_y

    sizes = {"SIZE_X": plan.size_x, "SIZE_Y": plan.size_y}
    tiles, gemm = plan.tiles, plan.gemm
    most_slots, most_tiles = triton.next_power_of_2(slots), triton.next_power_of_2(max(grid))
    potential = {"KIND": KINDS[kind], "POWER": power}
    common = {**sizes, "WIDTH": plan.width, "PRECISION": plan.precision}
    for strip, (i, j) in enumerate(strips):
        diagonal = symmetric and i == j
        if strip == 0 or strips[strip - 1][0] != i:
            block_x.prepare(x, i, plan)
        own, other = block_x, block_x if diagonal else block_y.prepare(y, j, plan)
        # On sm_90 a 16-bit block with itself spills with 16 warps.
        narrow = diagonal and plan.capability >= 90 and plan.dtype != torch.float32
        warps = {"num_warps": 8} if narrow else {}
        before, after = references[strip:], references[strip + 1 :]
        for repeat in (False, True) if exponential and needs_grad else (False,):
            launch(
                _pairs_kernel, grid,
                own.points, other.points, own.scale, other.scale, weights, tile_maximum, tile_close,
                sums, shifts, before, own.count, other.count, a, DIAGONAL=diagonal, REPEAT=repeat,
                GRADIENT=needs_grad, TILES=most_slots, **potential, **common, **tiles | warps,
            )  # fmt: skip
        for owner_is_y, block, across, gradient, units, number in (
            (False, own, other, grad_x, unit_x, i), (True, other, own, column_grad, unit_y, j),
        ):  # fmt: skip
            if owner_is_y and (diagonal or not gradient.numel()):
                continue
            if gradient.numel():
                launch(
                    _gradient_kernel,
                    (triton.cdiv(block.count, TILE), plan.width // gemm["BLOCK_D"]),
                    weights, across.points, block.scale, gradient[block.start :],
                    references[units[number] :], after, block.count, a, D=d, TRANSPOSED=owner_is_y,
                    EXPONENTIAL=exponential, **common, **gemm,
                )  # fmt: skip
                units[number] = strip + 1
            launch(
                _close_kernel, (block.count,),
                weights, tile_close, x.rows, y.rows, x.inverse, y.inverse, x.rows.stride(0),
                y.rows.stride(0), after, gradient, sums[slots:], shifts[slots:], own.start,
                other.start, a, r_min, D=d, OWNER_IS_Y=owner_is_y, DIAGONAL=diagonal,
                SYMMETRIC=symmetric, VALUE=not owner_is_y, GRADIENT=gradient.numel() > 0,
                TILES=most_tiles, BLOCK_C=TILE, BLOCK_D=triton.next_power_of_2(d), num_warps=4,
                **potential, **sizes,
            )  # fmt: skip

    if exponential:
        shift = shifts.max()
        sums = torch.where(sums > 0, sums * (a * (shifts - shift)).exp(), 0.0)
    total = sums.sum()
    for points, gradient, units, size in (
        (x, grad_x, unit_x, plan.size_x), (y, grad_y, unit_y, plan.size_y),
    ):  # fmt: skip
        if gradient.numel():
            factor = total.new_ones(len(units))
            if exponential:
                reference = torch.stack([references[unit, 0] for unit in units]).double()
                factor = a / total * (a * (reference - shift)).exp()
            launch(
                _project_kernel, (len(points),),
                gradient, points.rows, points.inverse, factor, points.rows.stride(0), D=d,
                SIZE=size, BLOCK_D=triton.next_power_of_2(d), num_warps=4,
            )  # fmt: skip
    return a * shift + total.log() if exponential else total, grad_x, grad_y


def nearest(x: Points, y: Points | None, k: int) -> tuple[Tensor, Tensor]:
    """Return float64 squared distances (N, k) and indices (N, k): see op.py.

    The GEMM takes 16-bit rows as they are, with float32 sums, and float32 rows as torch is set to.
    Only the greatest cosine of a point with each 32 others leaves it, of which each point keeps the
    next_power_of_2(k + 8) best. Groups whose maximum is within the GEMM's error of the k-th best
    are searched in float64; all of them, where there may be more than were kept.

    Memory above the results: a workspace of 64 MiB and O(N·k).
    """
    symmetric, d = y is None, x.rows.shape[1]
    y = x if y is None else y
    room = triton.next_power_of_2(k + 8)
    new = x.inverse.new_empty
    keys = new((len(x), room), dtype=torch.int64)
    keys.copy_(torch.arange(room, device=keys.device) + NO_KEY)
    square, index = new((len(x), k)), new((len(x), k), dtype=torch.int64)
    plan = Plan.make(x, y, weights=False)
    block_x, block_y = plan.buffers(x.inverse)
    of_x, of_y = (new(plan.size_x * plan.size_y // GROUP, dtype=torch.float32) for _ in range(2))
    grid = plan.size_x // TILE, plan.size_y // TILE
    block_r = max(1, min(32, 512 // room))
    block_c = min(128, 1024 // block_r)
    for i in range(triton.cdiv(len(x), plan.size_x)):
        block_x.prepare(x, i, plan)
        for j in range(i if symmetric else 0, triton.cdiv(len(y), plan.size_y)):
            diagonal = symmetric and i == j
            other = block_x if diagonal else block_y.prepare(y, j, plan)
            launch(
                _maxima_kernel, grid,
                block_x.points, other.points, block_x.scale, other.scale, of_x,
                of_x if diagonal else of_y, block_x.count, other.count, DIAGONAL=diagonal,
                COLUMNS=symmetric, SIZE_X=plan.size_x, SIZE_Y=plan.size_y, WIDTH=plan.width,
                GROUP=GROUP, PRECISION=plan.precision, **plan.tiles,
            )  # fmt: skip
            sides = [(of_x, block_x, other, plan.size_y)]
            if symmetric and not diagonal:
                sides.append((of_y, other, block_x, plan.size_x))
            for maxima, owners, others, size in sides:
                launch(
                    _collect_kernel, (triton.cdiv(owners.count, block_r),),
                    maxima, keys, owners.start, others.start, owners.count, others.count,
                    SIZE=size, GROUP=GROUP, ROOM=room, BLOCK_R=block_r, BLOCK_C=block_c,
                    num_warps=4,
                )  # fmt: skip
    launch(
        _select_kernel, (len(x),),
        x.rows, y.rows, x.inverse, y.inverse, x.rows.stride(0), y.rows.stride(0), keys, square,
        index, len(y), 2 * _cosine_error(d, plan), D=d, K=k, SLOTS=triton.next_power_of_2(k),
        ROOM=room, GROUP=GROUP, SYMMETRIC=symmetric, BLOCK_D=min(32, triton.next_power_of_2(d)),
        num_warps=4,
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


def _gemm_dtype(x: torch.dtype, y: torch.dtype, weights: bool) -> tuple[torch.dtype, str]:
    """Return the dtype that points are prepared in, and the precision of its GEMMs.

    Weights have the range of float32, and float16 gradients need more bits of them than TF32 has.
    The search multiplies two 16-bit dtypes as TF32, which holds each of their numbers exactly.
    """
    if x == y and x in ((torch.bfloat16,) if weights else (torch.bfloat16, torch.float16)):
        return x, "ieee"
    if not weights and torch.float32 not in (x, y):
        return torch.float32, "tf32"
    return torch.float32, float32_precision()


def _on_cores(dtype: torch.dtype, precision: str) -> bool:
    """Return whether tensor cores multiply."""
    return dtype != torch.float32 or precision != "ieee"


def _depth(dtype: torch.dtype, precision: str) -> int:
    """Return the coordinates that a tile's GEMM multiplies at a time; more would spill."""
    return 32 if _on_cores(dtype, precision) else 16


def _most(width: int, dtype: torch.dtype, weights: bool) -> int:
    """Return the points of the largest block for which all buffers fit the workspace."""
    per_point = width * dtype.itemsize + 4
    per_pair = dtype.itemsize if weights else 8 / GROUP
    most = (math.sqrt(per_point**2 + per_pair * WORKSPACE_BYTES) - per_point) / per_pair
    step = 4 * TILE if most >= 8 * TILE else TILE
    return max(TILE, int(most) // step * step)


def _size(n: int, most: int) -> int:
    """Return the points of n points' blocks, of about equal size.

    It is a constant of the kernels, so there are few sizes.
    """
    size = triton.cdiv(n, triton.cdiv(n, most))
    step = 4 * TILE if size > 8 * TILE else TILE
    return min(most, round_up(size, step))


def _cosine_error(d: int, plan: Plan) -> float:
    """Return the greatest error of a dot product times two inverse norms.

    Products of 16-bit numbers are exact; float32 sums, rounded or truncated, in any order, lose at
    most (d + 8)·2⁻²³ of Σ|x̂_d·ŷ_d| ≤ 1. TF32 keeps 10 bits of each float32 factor.
    """
    error = (d + 8) * 2.0**-23
    return error + 2.0**-9 if plan.precision == "tf32" else error
