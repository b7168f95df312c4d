"""Measurement of a device's ceilings: memory bandwidth and GEMM throughput by precision."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .clock import seconds_of
from .process import write_json

# A CPU's sizes: beyond its caches, and seconds in all on two cores.
SIZES = {"cpu": {"copy_bytes": 2**28, "size": 3072, "rounds": 9}}
SIZES["dry"] = {"copy_bytes": 2**20, "size": 64, "rounds": 3}


def measure(
    device: torch.device, copy_bytes: int = 2**31, size: int = 8192, rounds: int = 20
) -> dict[str, Any]:
    """Measure a copy, and GEMMs of random matrices in three precisions; return the medians.

    Args:
        copy_bytes: how many bytes the copy reads, and writes. size: the matrices' rows and columns.

    Returns:
        Rates of the copy and of GEMMs of bfloat16 (``product``), float32, and float32 under torch's
        precision "high" (``tf32``), which on a GPU is TF32.
    """
    source = torch.randint(0, 256, (copy_bytes,), dtype=torch.uint8, device=device)
    to = torch.empty_like(source)

    def median(step: Callable[[], object]) -> float:
        for _ in range(3):
            step()
        return statistics.median(seconds_of(step, device) for _ in range(rounds))

    def gemm(dtype: torch.dtype, precision: str) -> float:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return 2 * size**3 / median(lambda: torch.mm(a, b, out=out)) / 1e12
        finally:
            torch.set_float32_matmul_precision(before)

    copy = median(lambda: to.copy_(source))
    return {
        "copy_bytes": 2 * copy_bytes,
        "copy_gigabyte_per_second": 2 * copy_bytes / copy / 1e9,
        "product": f"bfloat16, {size}×{size}×{size}",
        "product_tflop_per_second": gemm(torch.bfloat16, "highest"),
        "float32_tflop_per_second": gemm(torch.float32, "highest"),
        "tf32_tflop_per_second": gemm(torch.float32, "high"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the CPU's ceilings.")
    parser.add_argument("sizes", choices=SIZES)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    write_json(args.output, measure(torch.device("cpu"), **SIZES[args.sizes]))


if __name__ == "__main__":
    main()
