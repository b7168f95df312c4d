"""Margin softmax's launches, and what its kernels may take; see aot.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from synface_kernels.ops.margin_cross_entropy import config_triton, launch_triton
from synface_kernels.ops.margin_cross_entropy.interface import BackwardInputs, ForwardInputs

# Of all kernels but the GEMMs, whose share of a multiprocessor is checked instead.
REGISTERS = 128
NOT_FUSED = None
D = 512
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Case(NamedTuple):
    """A training step's sizes, dtypes and options."""

    n: int
    c: int
    k: int
    input: torch.dtype
    weight: torch.dtype
    gemm_dtype: torch.dtype | None = None
    precision: str = "ieee"
    design: str = "auto"
    sub_centers: int = 1
    limit: float = math.inf
    sums: bool = False
    ids: bool = False


def cases() -> Iterator[Case]:
    """Yield every kind of step; the last tile of an odd C has its own variants."""
    for n, c, k in ((512, 1_000_000, 1), (512, 999_983, 3), (7, 1_000_000, 2)):
        yield Case(n, c, k, BF16, BF16)
        yield Case(n, c, k, F32, F32)
        yield Case(n, c, k, F32, F32, precision="tf32")
    yield Case(512, 1_000_000, 1, F16, F16)
    yield Case(512, 1_000_000, 1, BF16, F32)
    for gemm_dtype in (BF16, F16):
        yield Case(512, 1_000_000, 1, BF16, F32, gemm_dtype)
        yield Case(512, 1_000_000, 1, F32, F32, gemm_dtype)
    for options in ({"sums": True}, {"limit": 0.4}, {"sub_centers": 2}, {"ids": True}):
        yield Case(512, 1_000_000, 1, BF16, BF16, **options)
        yield Case(512, 1_000_000, 1, F32, F32, **options)
        yield Case(512, 1_000_000, 1, BF16, F32, BF16, **options)
    yield Case(512, 1_000_000, 1, BF16, BF16, design="tiled")
    yield Case(512, 1_000_000, 1, BF16, BF16, design="tiled", sub_centers=2)


def run(case: Case) -> None:
    """Launch forward and backward of a case on meta tensors."""

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    w = empty(case.c, D, dtype=case.weight)
    if case.sub_centers > 1:
        w = w.view(-1, case.sub_centers, D)
    ids = empty(case.c // 10) if case.ids else None
    inputs = ForwardInputs(
        empty(case.n, D, dtype=case.input), w, ids, empty(case.n, case.k), 64.0, case.limit, True,
        case.sums,
    )  # fmt: skip
    outputs = launch_triton.forward(inputs, gemm_dtype=case.gemm_dtype)
    known = inputs._asdict() | outputs._asdict()
    known |= {f"grad_{name}": value for name, value in outputs._asdict().items()}
    given = BackwardInputs(**{name: known[name] for name in BackwardInputs._fields})
    launch_triton.backward(given, True, gemm_dtype=case.gemm_dtype)


def launch() -> None:
    """Launch forward and backward for all cases."""
    for case in cases():
        with (
            mock.patch.object(config_triton, "float32_precision", return_value=case.precision),
            mock.patch.dict("os.environ", SYNFACE_MARGIN_DESIGN=case.design),
        ):
            run(case)
