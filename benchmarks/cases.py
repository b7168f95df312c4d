"""The cases: shapes, and the FLOPs and bytes that no implementation can do without.

An op adds a function that makes its `Case`s and an entry in `CASES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One shape of one op, forward and backward.

    Attributes:
        op: the op's name. suite: ``"cpu"``, ``"gpu"``, or ``"dry"`` (tiny, to try the machinery).
        shape: dimension → size. dtype: of the floating-point inputs, as torch spells it.
        flops, bytes: what every implementation must at least compute, and read plus write.
    """

    op: str
    suite: str
    shape: Mapping[str, int]
    dtype: str
    flops: int
    bytes: int

    @property
    def name(self) -> str:
        return " ".join([*(f"{k}={v:,}" for k, v in self.shape.items()), self.dtype])

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def _margin_cross_entropy(suite: str, n: int, d: int, c: int, dtype: str = "float32") -> Case:
    """FLOPs: three products (logits, dX, dW) of 2·N·C·D. Bytes: read W twice (the loss has to be
    known before its gradient) and write dW; read X, write dX; read the labels."""
    item = getattr(torch, dtype).itemsize
    return Case(
        op="margin_cross_entropy",
        suite=suite,
        shape={"N": n, "D": d, "C": c},
        dtype=dtype,
        flops=6 * n * c * d,
        bytes=item * (3 * c * d + 2 * n * d) + 8 * n,
    )


# The first case of a suite is the op's headline.
CASES: dict[str, list[Case]] = {
    "margin_cross_entropy": [
        _margin_cross_entropy("dry", 16, 32, 500),
        # a batch on two cores; a large batch of fewer classes; a million identities
        _margin_cross_entropy("cpu", 512, 512, 200_000),
        _margin_cross_entropy("cpu", 2048, 512, 50_000),
        _margin_cross_entropy("cpu", 128, 512, 1_000_000),
        # a million identities; the same in float32; a gathered batch; what fits any card; launches
        _margin_cross_entropy("gpu", 512, 512, 1_000_000, "bfloat16"),
        _margin_cross_entropy("gpu", 512, 512, 1_000_000),
        _margin_cross_entropy("gpu", 4096, 512, 1_000_000, "bfloat16"),
        _margin_cross_entropy("gpu", 2048, 512, 100_000, "bfloat16"),
        _margin_cross_entropy("gpu", 2048, 512, 100_000),
        _margin_cross_entropy("gpu", 512, 512, 10_000, "bfloat16"),
    ],
}


def cases(suite: str, op: str | None = None) -> list[Case]:
    """All cases of a suite, or those of one op."""
    ops = CASES if op is None else [op]
    return [case for name in ops for case in CASES[name] if case.suite == suite]
