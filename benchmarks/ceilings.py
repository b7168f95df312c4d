"""Measurement of a device's two ceilings: memory bandwidth and GEMM throughput."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from .driver import seconds_of
from .process import write_json


def measure(device: torch.device, copy_bytes: int, size: int, rounds: int = 20) -> dict:
    """Measure a copy and a bfloat16 GEMM of random matrices; return the medians.

    Args:
        copy_bytes: how many bytes the copy reads, and writes. size: the matrices' rows and columns.
    """
    source = torch.randint(0, 256, (copy_bytes,), dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def median(step: Any) -> float:
        for _ in range(3):
            step()
        return statistics.median(seconds_of(step, device) for _ in range(rounds))

    copy, gemm = median(lambda: to.copy_(source)), median(lambda: torch.mm(a, b, out=out))
    return {
        "copy_bytes": 2 * copy_bytes,
        "copy_gigabyte_per_second": 2 * copy_bytes / copy / 1e9,
        "product": f"bfloat16, {size}×{size}×{size}",
        "product_tflop_per_second": 2 * size**3 / gemm / 1e12,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--copy-bytes", type=int, default=2**31)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    write_json(args.output, measure(device, args.copy_bytes, args.size))


if __name__ == "__main__":
    main()
