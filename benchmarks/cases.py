"""The benchmark cases: shapes, and the FLOPs and bytes that every implementation needs.

To add an op, write a function that makes its `Case`s and an entry in `CASES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

# Options of the margin softmax's cases.
AUTOCAST = "autocast "
BF16_EMBEDDINGS = "bfloat16 embeddings"
SAMPLED = "sampled"


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
    shape: Mapping[str, int] = field(hash=False)
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

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of autocast, under which the forward pass runs, or None."""
        given = [option for option in self.options if option.startswith(AUTOCAST)]
        return getattr(torch, given[0].removeprefix(AUTOCAST)) if given else None

    @property
    def gemm_dtype(self) -> torch.dtype:
        """The dtype of the factors of the case's GEMMs."""
        return self.autocast or self.torch_dtype


def margin_cross_entropy(
    suite: str,
    n: int,
    d: int,
    c: int,
    dtype: str = "float32",
    *options: str,
    sampled: int | None = None,
) -> Case:
    """Make a case of the margin softmax.

    FLOPs: three GEMMs (logits, dX, dW) of 2·N·C·D. Bytes: read W twice (the loss has to be known
    before its gradient) and write dW; read X, write dX; read the labels. Where only S classes are
    ``sampled``, S in place of C.
    """
    item, rows = getattr(torch, dtype).itemsize, sampled or c
    embedding = 2 if BF16_EMBEDDINGS in options else item
    shape = {"N": n, "D": d, "C": c}
    return Case(
        op="margin_cross_entropy",
        suite=suite,
        shape=shape | {"S": sampled} if sampled else shape,
        dtype=dtype,
        flops=6 * n * rows * d,
        bytes=item * 3 * rows * d + embedding * 2 * n * d + 8 * n,
        options=(*options, SAMPLED) if sampled else options,
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


def _row_update(
    suite: str, classes: int, touched: int, dim: int, rule: str, dtype: str = "float32"
) -> Case:
    """Make a case of a step on ``touched`` rows: ``"sgd"`` (momentum), or ``"adamw"``.

    FLOPs: per element 6 of SGD, 15 of AdamW. Bytes: read and write the rows of the weight and of
    one state, or two; read their gradient and the ids.
    """
    elements, states = touched * dim, 2 if rule == "adamw" else 1
    return Case(
        op="row_update",
        suite=suite,
        shape={"C": classes, "S": touched, "D": dim},
        dtype=dtype,
        flops=elements * (15 if rule == "adamw" else 6),
        bytes=elements * getattr(torch, dtype).itemsize * (3 + 2 * states) + 8 * touched,
        options=(rule,),
    )


def _sample_classes(suite: str, labels: int, classes: int, sampled: int) -> Case:
    """Make a case of class sampling.

    FLOPs: none are counted. Bytes: read the labels, write them remapped, write the ids.
    """
    return Case(
        op="sample_classes",
        suite=suite,
        shape={"N": labels, "C": classes, "S": sampled},
        dtype="int64",
        flops=0,
        bytes=8 * (2 * labels + sampled),
    )


# What a step of each op is, as tables describe it.
STEPS = {
    "margin_cross_entropy": "forward and backward",
    "domain_mixup": "forward only, uint8 (B, H, W, C) to normalized (B, C, H, W)",
    "hypersphere_repulsion": "energy of N points and its gradient",
    "row_update": "an optimizer's step on S of C rows, in place",
    "sample_classes": "S of C classes, all labels among them",
}

# The number of an op's first cases that are headlines; README shows the first of each op.
HEADLINES = {"margin_cross_entropy": 1, "domain_mixup": 5, "hypersphere_repulsion": 3}
HEADLINES |= {"row_update": 2, "sample_classes": 1}

MIXED = (BF16_EMBEDDINGS, AUTOCAST + "bfloat16")

CASES: dict[str, list[Case]] = {
    "margin_cross_entropy": [
        margin_cross_entropy("dry", 6, 32, 150),
        margin_cross_entropy("dry", 6, 32, 150, "bfloat16"),
        margin_cross_entropy("dry", 6, 32, 150, "float32", AUTOCAST + "bfloat16"),
        margin_cross_entropy("dry", 6, 32, 150, "float32", *MIXED),
        margin_cross_entropy("dry", 6, 32, 150, "float32", AUTOCAST + "bfloat16", sampled=15),
        # a batch on two cores; a large batch of fewer classes; a million identities; few classes
        margin_cross_entropy("cpu", 512, 512, 200_000),
        margin_cross_entropy("cpu", 2048, 512, 50_000),
        margin_cross_entropy("cpu", 128, 512, 1_000_000),
        margin_cross_entropy("cpu", 256, 512, 10_000),
        margin_cross_entropy("cpu", 64, 128, 10_000),
        margin_cross_entropy("cpu", 512, 512, 200_000, "bfloat16"),
        margin_cross_entropy("cpu", 128, 512, 1_000_000, "bfloat16"),
        # A million identities: bfloat16 centers, and float32 ones under autocast, which most use.
        margin_cross_entropy("gpu", 512, 512, 1_000_000, "bfloat16"),
        *(
            margin_cross_entropy("gpu", n, 512, 1_000_000, "float32", AUTOCAST + "bfloat16")
            for n in (512, 2048, 4096)
        ),
        margin_cross_entropy("gpu", 4096, 512, 1_000_000, "bfloat16"),
        margin_cross_entropy("gpu", 2048, 512, 1_000_000, "bfloat16"),
        # The backbone's embeddings; GEMMs in float32; a tenth of the classes.
        margin_cross_entropy("gpu", 512, 512, 1_000_000, "float32", *MIXED),
        margin_cross_entropy("gpu", 512, 512, 1_000_000),
        margin_cross_entropy(
            "gpu", 512, 512, 1_000_000, "float32", AUTOCAST + "bfloat16", sampled=100_000
        ),
        # Elements beyond 2^31; what fits any card; launches.
        margin_cross_entropy("gpu", 512, 512, 10_000_000, "bfloat16"),
        margin_cross_entropy("gpu", 2048, 512, 100_000, "bfloat16"),
        margin_cross_entropy("gpu", 2048, 512, 100_000),
        margin_cross_entropy("gpu", 512, 512, 10_000, "bfloat16"),
    ],
    "domain_mixup": [
        domain_mixup("dry", 2, 16, "float32", "contiguous"),
        domain_mixup("dry", 2, 16, "bfloat16", "channels_last", "fresh"),
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
        hypersphere_repulsion("dry", 20, 16, "row-max"),
        hypersphere_repulsion("dry", 20, 16, "log-sum-exp", "bfloat16"),
        # HyperFace's 10k identities; the energy that packs best; few dimensions, as KeOps wants
        hypersphere_repulsion("cpu", 10_000, 512, "row-max"),
        hypersphere_repulsion("cpu", 10_000, 512, "log-sum-exp"),
        hypersphere_repulsion("cpu", 10_000, 64, "row-max"),
        hypersphere_repulsion("gpu", 50_000, 512, "row-max"),
        hypersphere_repulsion("gpu", 50_000, 512, "log-sum-exp"),
        hypersphere_repulsion("gpu", 50_000, 512, "row-max", "bfloat16"),
        hypersphere_repulsion("gpu", 50_000, 512, "log-sum-exp", "bfloat16"),
        hypersphere_repulsion("gpu", 10_000, 512, "row-max"),
    ],
    "row_update": [
        _row_update("dry", 30, 6, 32, "sgd"),
        _row_update("dry", 30, 6, 32, "adamw", "bfloat16"),
        # A tenth of the classes, as they are sampled.
        _row_update("cpu", 400_000, 40_000, 512, "sgd"),
        _row_update("cpu", 400_000, 40_000, 512, "adamw"),
        _row_update("gpu", 1_000_000, 100_000, 512, "sgd"),
        _row_update("gpu", 1_000_000, 100_000, 512, "sgd", "bfloat16"),
        _row_update("gpu", 1_000_000, 100_000, 512, "adamw"),
    ],
    "sample_classes": [
        _sample_classes("dry", 16, 500, 50),
        _sample_classes("cpu", 512, 10_000_000, 1_000_000),
        _sample_classes("gpu", 512, 10_000_000, 1_000_000),
        _sample_classes("gpu", 512, 1_000_000, 100_000),
    ],
}


def cases(suite: str, op: str | None = None) -> list[Case]:
    """Return all cases of a suite, or those of one op."""
    ops = CASES if op is None else [op]
    return [case for name in ops for case in CASES[name] if case.suite == suite]
