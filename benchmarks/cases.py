"""The benchmark cases: shapes, and the FLOPs and bytes that every implementation needs.

To add an op, write a function that makes its `Case`s and an entry in `CASES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One shape of one op; `STEPS` defines a step.

    Attributes:
        op: the op's name. suite: ``"cpu"``, ``"gpu"``, or ``"dry"`` (tiny shapes, for a dry run).
        shape: dimension → size. dtype: of the floating-point tensors, as torch spells it.
        flops, bytes: lower bounds of the arithmetic, and of the memory traffic (reads and writes).
        options: further properties that distinguish the case from others of its op.
    """

    op: str
    suite: str
    shape: Mapping[str, int]
    dtype: str
    flops: int
    bytes: int
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The shape, dtype and options, as tables show them."""
        sizes = (f"{k}={v:,}" for k, v in self.shape.items())
        return " ".join([*sizes, self.dtype, *self.options])

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's object."""
        return getattr(torch, self.dtype)


def _margin_cross_entropy(suite: str, n: int, d: int, c: int, dtype: str = "float32") -> Case:
    """Make a case of the margin softmax.

    FLOPs: three GEMMs (logits, dX, dW) of 2·N·C·D. Bytes: read W twice (the loss has to be known
    before its gradient) and write dW; read X, write dX; read the labels.
    """
    item = getattr(torch, dtype).itemsize
    return Case(
        op="margin_cross_entropy",
        suite=suite,
        shape={"N": n, "D": d, "C": c},
        dtype=dtype,
        flops=6 * n * c * d,
        bytes=item * (3 * c * d + 2 * n * d) + 8 * n,
    )


def domain_mixup(
    suite: str, b: int, side: int, dtype: str, memory_format: str, result: str = "out="
) -> Case:
    """Make a case of the domain mixup.

    FLOPs: two multiplications and two additions per element (constants folded). Bytes: read both
    uint8 batches, write the result (into ``out=``, or ``"fresh"``).
    """
    elements = b * side * side * 3
    return Case(
        op="domain_mixup",
        suite=suite,
        shape={"B": b, "H": side, "W": side, "C": 3},
        dtype=dtype,
        flops=4 * elements,
        bytes=elements * (2 + getattr(torch, dtype).itemsize),
        options=(memory_format, result),
    )


def hypersphere_repulsion(suite: str, n: int, d: int, energy: str, dtype: str = "float32") -> Case:
    """Make a case of the hypersphere repulsion.

    FLOPs: half of X·Xᵀ, N²·D; a global energy's gradient takes two more such GEMMs. Bytes: read X,
    write dX.
    """
    return Case(
        op="hypersphere_repulsion",
        suite=suite,
        shape={"N": n, "D": d},
        dtype=dtype,
        flops=n * n * d * (3 if energy == "log-sum-exp" else 1),
        bytes=getattr(torch, dtype).itemsize * 2 * n * d,
        options=(energy,),
    )


# What a step of each op is, as tables describe it.
STEPS = {
    "margin_cross_entropy": "forward and backward",
    "domain_mixup": "forward only, uint8 (B, H, W, C) to normalized (B, C, H, W)",
    "hypersphere_repulsion": "energy of N points and its gradient",
}

# The number of an op's first cases that are headlines, which README shows.
HEADLINES = {"margin_cross_entropy": 1, "domain_mixup": 5, "hypersphere_repulsion": 3}

CASES: dict[str, list[Case]] = {
    "margin_cross_entropy": [
        _margin_cross_entropy("dry", 16, 32, 500),
        # a batch on two cores; a large batch of fewer classes; a million identities
        _margin_cross_entropy("cpu", 512, 512, 200_000),
        _margin_cross_entropy("cpu", 2048, 512, 50_000),
        _margin_cross_entropy("cpu", 128, 512, 1_000_000),
        _margin_cross_entropy("cpu", 512, 512, 200_000, "bfloat16"),
        # a million identities; the same in float32; a gathered batch; what fits any card; launches
        _margin_cross_entropy("gpu", 512, 512, 1_000_000, "bfloat16"),
        _margin_cross_entropy("gpu", 512, 512, 1_000_000),
        _margin_cross_entropy("gpu", 4096, 512, 1_000_000, "bfloat16"),
        _margin_cross_entropy("gpu", 2048, 512, 100_000, "bfloat16"),
        _margin_cross_entropy("gpu", 2048, 512, 100_000),
        _margin_cross_entropy("gpu", 512, 512, 10_000, "bfloat16"),
    ],
    "domain_mixup": [
        domain_mixup("dry", 2, 16, "float32", "contiguous"),
        domain_mixup("cpu", 512, 112, "float32", "contiguous"),
        domain_mixup("cpu", 512, 112, "float32", "channels_last"),
        domain_mixup("cpu", 512, 112, "bfloat16", "contiguous"),
        domain_mixup("cpu", 512, 112, "bfloat16", "channels_last"),
        domain_mixup("cpu", 512, 112, "float32", "contiguous", "fresh"),
        domain_mixup("gpu", 4096, 112, "bfloat16", "channels_last"),
        domain_mixup("gpu", 4096, 112, "bfloat16", "contiguous"),
        domain_mixup("gpu", 4096, 112, "float32", "contiguous"),
    ],
    "hypersphere_repulsion": [
        hypersphere_repulsion("dry", 64, 16, "row-max"),
        # HyperFace's 10k identities; the energy that packs best; few dimensions, as KeOps wants
        hypersphere_repulsion("cpu", 10_000, 512, "row-max"),
        hypersphere_repulsion("cpu", 10_000, 512, "log-sum-exp"),
        hypersphere_repulsion("cpu", 10_000, 64, "row-max"),
        hypersphere_repulsion("gpu", 50_000, 512, "row-max"),
        hypersphere_repulsion("gpu", 50_000, 512, "log-sum-exp"),
        hypersphere_repulsion("gpu", 50_000, 512, "row-max", "bfloat16"),
        hypersphere_repulsion("gpu", 10_000, 512, "row-max"),
    ],
}


def cases(suite: str, op: str | None = None) -> list[Case]:
    """Return all cases of a suite, or those of one op."""
    ops = CASES if op is None else [op]
    return [case for name in ops for case in CASES[name] if case.suite == suite]
