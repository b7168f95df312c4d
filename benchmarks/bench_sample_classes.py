"""Benchmark of class sampling against insightface's: random numbers for all classes, topk, sort.

`python -m benchmarks.bench_sample_classes` interleaves them and prints medians and ratios.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

import synface_kernels as sk

from . import margin_peers, table, verify
from .interleave import medians

OP = "sample_classes"


def rows(num_classes: int, labels: int, rounds: int) -> str:
    """Return a table of the samplers' times by sample size."""
    target = torch.randint(num_classes, (labels,), generator=torch.Generator().manual_seed(0))
    lines: list[list[str]] = []
    for share in (0.1, 0.01):
        wanted = max(1, int(num_classes * share))
        cells = medians(
            {
                "ours": partial(sk.sample_classes, target, num_classes, wanted),
                "in plain torch": partial(
                    sk.sample_classes, target, num_classes, wanted, impl="torch"
                ),
                "rand + topk + sort": partial(margin_peers.sample, target, num_classes, wanted),
            },
            rounds,
        )
        lines = lines or [["S", *cells]]
        lines.append([f"{wanted:,}", *cells.values()])
    return table.markdown(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=10_000_000)
    parser.add_argument("--labels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    verify.require(OP)
    print(rows(args.classes, args.labels, args.rounds))
