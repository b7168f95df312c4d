"""Configurations of the margin softmax's Triton kernels: dtypes, design, blocks and tiles."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from .._triton import Chip, float32_precision, round_up

# Holds whole waves of 132 multiprocessors for both kernels that share a tile: 8,448 classes at
# N = 4096, twice as many at 2048. Tiles that fit the L2 cache would be slower, for their last wave;
# the factor's traffic is hidden under the GEMMs (docs/gpu.md).
WORKSPACE_BYTES = 80 << 20
# Tiles are a multiple of this many classes, so that rows of the workspace stay aligned.
TILE_ALIGNMENT = 128
DESIGN_VARIABLE = "SYNFACE_MARGIN_DESIGN"
DESIGNS = ("auto", "fused", "tiled")


def chosen_design(gemm_dtype: torch.dtype, precision: str) -> str:
    """Return "fused", where the GEMMs of logits are inside the kernels, or "tiled".

    Exact float32 has no tensor cores, and cuBLAS is the faster there. The environment variable
    SYNFACE_MARGIN_DESIGN overrides the choice.

    Raises:
        ValueError: if the variable has another value.
    """
    design = os.environ.get(DESIGN_VARIABLE) or "auto"
    if design not in DESIGNS:
        raise ValueError(f"{DESIGN_VARIABLE} must be one of {DESIGNS}, got {design!r}")
    if design != "auto":
        return design
    return "tiled" if gemm_dtype == torch.float32 and precision == "ieee" else "fused"


class Gemms(NamedTuple):
    """The dtypes and the design of a step's GEMMs.

    Attributes:
        dtype: the operands'; they are accumulated in float32.
        unit_input, unit_weight: whether rows are normalized before they are rounded to dtype.
        plain: whether the gradient factor is without inverse norms, and both gradients' GEMMs take
            unit operands: float16 has no room for norms.
        precision: of float32 operands, as `tl.dot` names it.
        design: "fused" or "tiled".
    """

    dtype: torch.dtype
    unit_input: bool
    unit_weight: bool
    plain: bool
    precision: str
    design: str

    @property
    def fused(self) -> bool:
        return self.design == "fused"


def choose_gemms(input: torch.dtype, weight: torch.dtype, gemm_dtype: torch.dtype | None) -> Gemms:
    """Return how input and weight are multiplied; gemm_dtype is autocast's, if it is on."""
    if gemm_dtype is None:
        gemm_dtype = input if input == weight else torch.float32
    precision = float32_precision() if gemm_dtype == torch.float32 else "ieee"
    narrow = gemm_dtype != torch.float32
    return Gemms(
        dtype=gemm_dtype,
        unit_input=narrow and input != gemm_dtype,
        unit_weight=narrow and weight != gemm_dtype,
        plain=gemm_dtype == torch.float16,
        precision=precision,
        design=chosen_design(gemm_dtype, precision),
    )


def block_config(gemms: Gemms, n: int, sub_centers: int, plain: bool, chip: Chip) -> dict[str, int]:
    """Return the blocks of rows and classes of the kernels that take logits.

    Those that compute dot products take the largest blocks that do not spill; see docs/gpu.md.

    Args:
        plain: whether there is one label, no filter and no sums, which take registers.
    """
    if not gemms.fused:
        block_n = min(4, triton.next_power_of_2(n))
        return {
            "H": 1, "BLOCK_N": block_n, "BLOCK_C": 2048 // block_n, "BLOCK_D": 16, "num_warps": 4,
            "num_stages": 1,
        }  # fmt: skip
    block_n = min(128, max(16, triton.next_power_of_2(n)))
    if gemms.dtype == torch.float32 and gemms.precision == "ieee":  # no tensor cores
        return {
            "H": 1, "BLOCK_N": min(64, block_n), "BLOCK_C": 64, "BLOCK_D": 32,
            "num_warps": 8, "num_stages": 2,
        }  # fmt: skip
    if sub_centers > 1:
        block_n = min(64, block_n)
    two = block_n == 128 and sub_centers == 1 and plain and chip.capability >= 90
    two = two and gemms.dtype.itemsize == 2
    narrow = sub_centers > 1 or chip.capability >= 100 or (chip.capability < 90 and not plain)
    return {
        "H": 2 if two else 1, "BLOCK_N": block_n, "BLOCK_C": 64 if narrow else 128,
        "BLOCK_D": 128 // gemms.dtype.itemsize,
        "num_warps": 8 if block_n == 128 or (sub_centers > 1 and block_n == 64) else 4,
        "num_stages": 3,
    }  # fmt: skip


def grad_weight_config(gemms: Gemms, block_n: int, d: int, chip: Chip) -> dict[str, int]:
    """Return the blocks of the weight gradient's GEMM: centers, elements, rows per step.

    Args:
        block_n: the factor's, in whose blocks the rows per step fit.
    """
    if gemms.dtype == torch.float32 and gemms.precision == "ieee":
        return {
            "H": 1, "BLOCK_C": 64, "BLOCK_D": 64, "BLOCK_N": min(32, block_n), "num_warps": 8,
            "num_stages": 2,
        }  # fmt: skip
    two = d > 128 and gemms.dtype.itemsize == 2 and chip.capability == 90
    return {
        "H": 2 if two else 1, "BLOCK_C": 128,
        "BLOCK_D": min(128, max(16, triton.next_power_of_2(d))),
        "BLOCK_N": min(128 // gemms.dtype.itemsize, block_n), "num_warps": 8, "num_stages": 3,
    }  # fmt: skip


def row_config(d: int) -> dict[str, int]:
    """Return the blocks of the kernels that hold several whole rows of D elements."""
    block_d = triton.next_power_of_2(d)
    return {"BLOCK_R": max(1, 2048 // block_d), "BLOCK_D": block_d, "num_warps": 4}


def one_row_config(d: int) -> dict[str, int]:
    """Return the blocks of the kernels that hold one row of D elements."""
    block_d = triton.next_power_of_2(d)
    return {"BLOCK_D": block_d, "num_warps": min(8, max(1, block_d // 128))}


@dataclass(frozen=True)
class Programs:
    """Numbers of programs of the fused backward kernels, for a tile of so many classes.

    Attributes:
        row_blocks, block: the factor's blocks of rows, and classes per block.
        sub_centers, center_block, width_blocks: the weight gradient's centers per class and per
            block, and blocks of elements; 0 of these where that GEMM is cuBLAS's.
    """

    row_blocks: int
    block: int
    sub_centers: int
    center_block: int
    width_blocks: int

    def __call__(self, classes: int) -> list[int]:
        factor = self.row_blocks * triton.cdiv(classes, self.block)
        if self.width_blocks == 0:
            return [factor]
        centers = triton.cdiv(classes * self.sub_centers, self.center_block)
        return [factor, centers * self.width_blocks]


def tile_classes(
    count: int, bytes_per_class: int, quantum: int, programs: Programs | None, chip: Chip
) -> int:
    """Return the classes per tile: what fits the workspace, in whole waves of programs.

    Args:
        quantum: a tile is a multiple of so many classes.
        programs: None where the kernels are not fused, and need no whole waves.
    """
    fits = max(1, WORKSPACE_BYTES // bytes_per_class // quantum)
    if fits * quantum >= count:
        return round_up(count, quantum)
    if programs is None:
        return fits * quantum
    return quantum * _quanta_in_whole_waves(fits, quantum, programs, chip)


@lru_cache(maxsize=256)  # of thousands of candidates, a choice takes milliseconds
def _quanta_in_whole_waves(most: int, quantum: int, programs: Programs, chip: Chip) -> int:
    """Return the number of quanta per tile, at most so many, that fills whole waves best."""

    def occupancy(quanta: int) -> tuple[float, int]:
        share = math.prod(_full_waves(each, chip) for each in programs(quanta * quantum))
        return round(share, 2), quanta

    return max(range((most + 1) // 2, most + 1), key=occupancy)


@lru_cache(maxsize=256)
def class_splits(blocks: int, row_blocks: int, chip: Chip) -> int:
    """Return into how many splits the forward pass cuts blocks of classes, in whole waves."""
    most = min(blocks, triton.cdiv(8 * chip.multiprocessors, row_blocks))

    def occupancy(splits: int) -> tuple[float, int]:
        even = blocks / (triton.cdiv(blocks, splits) * splits)
        return round(even * _full_waves(row_blocks * splits, chip), 2), splits

    return max(range((most + 1) // 2, most + 1), key=occupancy)


def _full_waves(programs: int, chip: Chip) -> float:
    """Return the share of the multiprocessors' time that so many equal programs use."""
    return programs / (triton.cdiv(programs, chip.multiprocessors) * chip.multiprocessors)
