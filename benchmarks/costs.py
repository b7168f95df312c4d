"""Cost functions of the kernels: bytes by argument, FLOP, and operations of each pipe.

To add a kernel, add its function to `COSTS`. Counts of operations per element follow the kernel's
source line by line; a compiler may do a little better or worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .launches import Launch, Region


@dataclass(frozen=True)
class Block:
    """The GEMM of one program: ``count`` times m×n blocks of dot products of k elements.

    Attributes:
        width: the columns of one accumulator; several share the loads of the m rows.
        dtype: the factors'. exact: of float32 factors, whether the product is, without TF32.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    exact: bool = False
    width: int = 256
    count: float = 1

    @property
    def on_tensor_cores(self) -> bool:
        """True if tensor cores have an instruction for it."""
        return self.dtype != torch.float32 or not self.exact


@dataclass
class Work:
    """The work of one launch.

    Attributes:
        reads, writes: bytes of each argument that some program touches, once each.
        again: bytes that programs read again, out of L2.
        block: a program's GEMM. flops: of all of them, both operations of a multiply-add.
        vector, special, double: of all programs, 32-bit operations, results of the special function
            unit (exp, conversions to and from 64 bits), and float64 operations.
        programs: those that do it; 0 for all of the grid.
        pipelined: whether programs' first loads overlap with the program before, as in a library.
        kernels: how many kernels the launch is.
    """

    reads: dict[str, float]
    writes: dict[str, float]
    again: float = 0.0
    block: Block | None = None
    flops: float = 0.0
    vector: float = 0.0
    special: float = 0.0
    double: float = 0.0
    programs: int = 0
    pipelined: bool = False
    kernels: int = 1

    @property
    def traffic(self) -> float:
        """Bytes through the L2."""
        return sum(self.reads.values()) + sum(self.writes.values()) + self.again


Cost = Callable[[Launch], Work]


def work_of(launch: Launch) -> Work:
    """Return what a launch does.

    Raises:
        NotImplementedError: for a Triton kernel without a cost function.
    """
    if not launch.is_triton:
        return _torch(launch)
    if launch.name not in COSTS:
        raise NotImplementedError(
            f"kernel {launch.name} has no cost function: add one to COSTS in benchmarks/costs.py"
        )
    work = COSTS[launch.name](launch)
    work.programs = work.programs or launch.programs
    return work


def _bytes(launch: Launch, *names: str) -> dict[str, float]:
    return {name: launch[name].nbytes for name in names if isinstance(launch[name], Region)}


def _part(launch: Launch, **shares: float) -> dict[str, float]:
    return {name: min(launch[name].nbytes, most) for name, most in shares.items()}


def _item(launch: Launch, name: str) -> int:
    return launch[name].dtype.itemsize


# ---- margin softmax ------------------------------------------------------------------------------


def _prepare_rows(launch: Launch) -> Work:
    count, d = launch["count"], launch["D"]
    read = {"matrix": float(count * d * _item(launch, "matrix"))}
    written = {}
    if launch["NORMS"]:
        written["inverse_norms"] = 4.0 * count
    if launch["COPY"]:
        written["rows"] = float(count * d * _item(launch, "rows"))
    # Convert, |x|, maximum, shrink, square and add; normalize and round.
    return Work(read, written, vector=count * d * 7.0, flops=3.0 * count * d)


def _target_cosines(launch: Launch) -> Work:
    n, d, k, m = launch.programs, launch["D"], launch["K"], launch["M"]
    centers = float(n * k * m * d)
    return Work(
        _bytes(launch, "input", "labels") | _part(launch, weight=centers * _item(launch, "weight")),
        _bytes(launch, "target_cosine", "target_rows"),
        flops=4 * centers, double=6 * centers, special=2 * centers,
    )  # fmt: skip


def _logits(launch: Launch, rows: str, centers: str, products: str) -> dict[str, Any]:
    """Return the part of a kernel's work that makes its dot products."""
    n, columns, d, m = launch["N"], launch["columns"], launch["D"], launch["M"]
    if not launch["FUSED"]:
        return {"reads": {products: 4.0 * n * columns * m}}
    item = _item(launch, rows)
    width, block_n, halves = launch["BLOCK_C"], launch["BLOCK_N"], launch["H"]
    block_c = width * halves
    blocks = math.ceil(n / block_n) * math.ceil(columns / block_c) * m
    reads = {rows: float(n * d * item), centers: float(columns * m * d * item)}
    block = Block(
        block_n, block_c, d, launch[rows].dtype, launch["PRECISION"] == "ieee", width,
        count=blocks / launch.programs,
    )  # fmt: skip
    again = blocks * (block_n + block_c) * d * item - sum(reads.values())
    return {
        "reads": reads, "block": block, "flops": 2.0 * n * columns * m * d,
        "again": max(0.0, again),
    }  # fmt: skip


def _variants(launch: Launch) -> int:
    """Return operations per logit of labels, filter, sums and sub-centers."""
    operations = 2 * launch["K"] + 3 * launch["FILTER"] + 2 * launch["SUM"]
    return operations + 4 * (launch["M"] - 1)


def _lse(launch: Launch) -> Work:
    logits = _logits(launch, "x", "w", "products")
    count = float(launch["N"] * launch["columns"])
    logits["reads"] |= _bytes(launch, "labels", "a", "b", "maximum", "total")
    # Two norms, past the last class (2), maximum, scale and shift, ex2's factor, sum.
    return Work(
        **logits, writes=_bytes(launch, "maximum", "total"),
        vector=count * (8 + _variants(launch)), special=count,
    )  # fmt: skip


def _factor(launch: Launch) -> Work:
    logits = _logits(launch, "x", "w", "products")
    n, columns, m = launch["N"], launch["columns"], launch["M"]
    count = float(n * columns)
    logits["reads"] |= _bytes(launch, "labels", "a", "b", "negative_lse", "grad_lse", "grad_target")
    written = {"factor": count * m * _item(launch, "factor")}
    if launch["FUSED"]:
        written["center_sums"] = 4.0 * math.ceil(n / launch["BLOCK_N"]) * columns * m
    # Norm, exponent, ex2's factor, times g, norm, rounded and back, times the product and summed,
    # to another layout and stored.
    return Work(
        **logits, writes=written, vector=count * (8 + _variants(launch)), special=count
    )  # fmt: skip


def _clear_targets(launch: Launch) -> Work:
    count, item = float(launch["N"] * launch["K"]), _item(launch, "factor")
    return Work(
        _bytes(launch, "labels", "target_rows"), {"factor": count * item}, vector=10 * count
    )


def _grad_weight(launch: Launch) -> Work:
    n, count, d = launch["N"], launch["count"], launch["D"]
    block_c, width = launch["BLOCK_C"], launch["BLOCK_D"]
    block_d, item = width * launch["H"], _item(launch, "factor")
    reads = {
        "factor": float(n * count * item),
        "x": float(n * d * item),
        "weight": float(count * d * _item(launch, "weight")),
        "center_sums": 4.0 * launch["row_blocks"] * count,
        "inverse_norms": 4.0 * count,
    }
    again = launch.programs * n * (block_c + block_d) * item - reads["factor"] - reads["x"]
    exact = launch["PRECISION"] == "ieee"
    block = Block(block_c, block_d, n, launch["factor"].dtype, exact, width)
    return Work(
        reads, {"grad_weight": float(count * d * _item(launch, "grad_weight"))},
        again=max(0.0, again), block=block,
        # Unscale, two norms, center, multiply and subtract, convert and store.
        flops=2.0 * n * count * d, vector=8.0 * count * d,
    )  # fmt: skip


def _project_rows(launch: Launch) -> Work:
    count, d = launch["count"], launch["D"]
    reads = _part(launch, product=4.0 * count * d) | {
        "weight": float(count * d * _item(launch, "weight")),
        "inverse_norms": 4.0 * count,
    }
    written = {"grad_weight": float(count * d * _item(launch, "grad_weight"))}
    return Work(reads, written, flops=6.0 * count * d, vector=9.0 * count * d)


def _target_gradients(launch: Launch) -> Work:
    n, d, k = launch.programs, launch["D"], launch["K"]
    centers = float(n * k * d)
    return Work(
        _bytes(launch, "input", "target_rows", "grad_target")
        | _part(launch, weight=centers * _item(launch, "weight")),
        _bytes(launch, "sums"),
        flops=6.0 * n * d, double=(8.0 + 5.0 * k) * n * d, special=(2.0 + k) * n * d,
    )  # fmt: skip


def _grad_input(launch: Launch) -> Work:
    count = float(launch.programs * launch["D"])
    return Work(
        _bytes(launch, "input", "inverse_norms", "sums"), _bytes(launch, "grad_input"),
        flops=6 * count, vector=9 * count,
    )  # fmt: skip


# ---- repulsion -----------------------------------------------------------------------------------


def _prepare_block(launch: Launch) -> Work:
    rows, width = launch["out"].shape
    count = float(rows * width)
    return Work(
        _bytes(launch, "rows", "inverse"), _bytes(launch, "out", "scale"), vector=5 * count,
        double=3.0 * launch.programs * launch["BLOCK_R"],
    )  # fmt: skip


def _cosines(launch: Launch) -> dict[str, Any]:
    """Return the part of a kernel's work that makes a tile of cosines in each program."""
    width, item = launch["WIDTH"], _item(launch, "x")
    rows, columns = (math.ceil(launch[name] / 128) * 128 for name in ("x_count", "y_count"))
    block_n, block_c = launch["BLOCK_N"], launch["BLOCK_C"]
    programs = math.ceil(rows / block_n) * math.ceil(columns / block_c)
    if launch["DIAGONAL"]:  # programs below it end at once
        programs = (programs + math.ceil(rows / block_n)) // 2
    reads = {"x": float(rows * width * item), "x_scale": 4.0 * rows}
    if not launch["DIAGONAL"]:
        reads |= {"y": float(columns * width * item), "y_scale": 4.0 * columns}
    loaded = programs * (block_n + block_c) * width * item
    return {
        "reads": reads, "again": max(0.0, loaded - sum(reads.values())), "programs": programs,
        "block": Block(
            block_n, block_c, width, launch["x"].dtype, launch["PRECISION"] == "ieee", block_c
        ),
        "flops": 2.0 * programs * block_n * block_c * width,
    }  # fmt: skip


def _pairs(launch: Launch) -> Work:
    if launch["REPEAT"]:  # every program reads all maxima, and ends: the weights' units sufficed
        read = 4.0 * launch["TILES"]
        return Work(
            {"tile_maximum": read}, {}, again=read * launch.programs,
            vector=3.0 * launch["TILES"] * launch.programs,
        )  # fmt: skip
    tiles = _cosines(launch)
    count = float(tiles["programs"] * launch["BLOCK_N"] * launch["BLOCK_C"])
    written = {"tile_sum": 8.0 * tiles["programs"]}
    if launch["GRADIENT"]:
        sides = 2 if launch["DIAGONAL"] else 1
        written["weights"] = sides * count * _item(launch, "weights")
    # Two norms, valid, close and plain (6), maximum, exponent (2), sums (4), weight (6), stored.
    special = count * (2 if launch["KIND"] == 1 else 1)
    return Work(**tiles, writes=written, vector=(14 + 8 * launch["GRADIENT"]) * count,
                special=special)  # fmt: skip


def _gradient(launch: Launch) -> Work:
    d, width, item = launch["D"], launch["WIDTH"], _item(launch, "weights")
    depth = launch["SIZE_X"] if launch["TRANSPOSED"] else launch["SIZE_Y"]
    block_n, block_d = launch["BLOCK_N"], launch["BLOCK_D"]
    count = float(launch["count"])
    reads = {
        "weights": count * depth * item, "other": float(depth * width * item),
        "gradient": 4.0 * count * d, "own_scale": 4.0 * count,
    }  # fmt: skip
    again = launch.programs * depth * (block_n + block_d) * item
    again -= reads["weights"] + reads["other"]
    exact = launch["PRECISION"] == "ieee"
    return Work(
        reads, {"gradient": 4.0 * count * d}, again=max(0.0, again),
        block=Block(block_n, block_d, depth, launch["weights"].dtype, exact),
        flops=2.0 * count * depth * d, vector=6 * count * d,
    )  # fmt: skip


def _close(launch: Launch) -> Work:
    # Random points have next to no close pairs: a program reads its tiles' counts, and ends.
    read = 4.0 * launch["TILES"]
    return Work(
        _bytes(launch, "tile_close"), {}, again=read * launch.programs,
        vector=4.0 * launch["TILES"] * launch.programs,
    )  # fmt: skip


def _project(launch: Launch) -> Work:
    count = float(launch.programs * launch["D"])
    return Work(
        _bytes(launch, "gradient", "points", "inverse"), _bytes(launch, "gradient"),
        flops=5 * count, double=6 * count, special=3 * count,
    )  # fmt: skip


def _maxima(launch: Launch) -> Work:
    tiles = _cosines(launch)
    count = float(tiles["programs"] * launch["BLOCK_N"] * launch["BLOCK_C"])
    written = {"row_maxima": 4 * count / launch["GROUP"]}
    if launch["COLUMNS"]:
        written["column_maxima"] = 4 * count / launch["GROUP"]
    # Two norms, valid (3), and a maximum for each side.
    return Work(**tiles, writes=written, vector=(6 + launch["COLUMNS"]) * count)


def _collect(launch: Launch) -> Work:
    count = float(launch["owners"] * math.ceil(launch["others"] / launch["GROUP"]))
    keys = 8.0 * launch["owners"] * launch["ROOM"]
    # Keys of 64 bits: three for the order of bits, six to combine, eight to compare.
    return Work({"maxima": 4 * count, "keys": keys}, {"keys": keys}, vector=17 * count)


def _select(launch: Launch) -> Work:
    # Of random points, only the K best groups are within the GEMM's error of the K-th best.
    rows = float(launch.programs * launch["K"] * launch["GROUP"])
    d = launch["D"]
    return Work(
        _bytes(launch, "x", "y", "keys"), _bytes(launch, "square", "index"),
        again=rows * d * _item(launch, "y"), flops=3 * rows * d, double=5 * rows * d,
        special=2 * rows * d,
    )  # fmt: skip


def _nearest_backward(launch: Launch) -> Work:
    rows = 2.0 * launch.programs * launch["K"]
    d = launch["D"]
    return Work(
        _bytes(launch, "x", "y", "index", "grad_square", "chosen_by"), _bytes(launch, "gradient"),
        again=rows * d * _item(launch, "y"), flops=6 * rows * d, double=10 * rows * d,
        special=2 * rows * d,
    )  # fmt: skip


# ---- mixup, row updates --------------------------------------------------------------------------


def _mixup_forward(launch: Launch) -> Work:
    # Float64: five operations; two conversions to it, and two to round.
    count = float(math.prod(launch["out"].shape))
    return Work(
        _bytes(launch, "synthetic", "real", "psi"), _bytes(launch, "out"), flops=5 * count,
        double=5 * count, special=4 * count, vector=20 * count,
    )  # fmt: skip


def _mixup_backward(launch: Launch) -> Work:
    count = float(math.prod(launch["gradient"].shape))
    reads = _bytes(launch, "gradient")
    writes: dict[str, float] = {}
    for needed, name in (("GRAD_S", "grad_synthetic"), ("GRAD_R", "grad_real")):
        if launch[needed]:
            writes |= _bytes(launch, name)
    if launch["GRAD_PSI"]:
        reads |= _bytes(launch, "synthetic", "real")
        writes |= _bytes(launch, "psi_parts")
    return Work(
        reads, writes, flops=6 * count, double=6 * count, special=6 * count, vector=30 * count
    )


def _row_step(launch: Launch, states: list[str], operations: int, special: int) -> Work:
    """Return the work of a step on rows; ``states`` with the weight are read and written."""
    elements = float(math.prod(launch["ids"].shape) * launch["columns"])
    touched = {name: elements * _item(launch, name) for name in ["weight", *states]}
    reads = touched | _bytes(launch, "ids")
    if launch["GRADIENT"]:
        reads["gradient"] = elements * _item(launch, "gradient")
    rounding = 14 * sum(launch[name] == 2 for name in launch.arguments if name.endswith("_FORMAT"))
    return Work(
        reads, touched, flops=operations * elements, vector=(operations + rounding) * elements,
        special=special * elements,
    )  # fmt: skip


def _sgd(launch: Launch) -> Work:
    return _row_step(launch, ["buffer"] if launch["MOMENTUM"] else [], 8, 0)


def _adamw(launch: Launch) -> Work:
    # A root and a quotient, correctly rounded, are some 25 operations.
    return _row_step(launch, ["mean", "square"], 15 + 2 * 25, 2)


COSTS: dict[str, Cost] = {
    "margin_cross_entropy._prepare_rows_kernel": _prepare_rows,
    "margin_cross_entropy._target_cosines_kernel": _target_cosines,
    "margin_cross_entropy._lse_kernel": _lse,
    "margin_cross_entropy._factor_kernel": _factor,
    "margin_cross_entropy._clear_targets_kernel": _clear_targets,
    "margin_cross_entropy._grad_weight_kernel": _grad_weight,
    "margin_cross_entropy._project_rows_kernel": _project_rows,
    "margin_cross_entropy._target_gradients_kernel": _target_gradients,
    "margin_cross_entropy._grad_input_kernel": _grad_input,
    "hypersphere_repulsion._prepare_kernel": _prepare_block,
    "hypersphere_repulsion._pairs_kernel": _pairs,
    "hypersphere_repulsion._gradient_kernel": _gradient,
    "hypersphere_repulsion._close_kernel": _close,
    "hypersphere_repulsion._project_kernel": _project,
    "hypersphere_repulsion._maxima_kernel": _maxima,
    "hypersphere_repulsion._collect_kernel": _collect,
    "hypersphere_repulsion._select_kernel": _select,
    "hypersphere_repulsion._nearest_backward_kernel": _nearest_backward,
    "domain_mixup._forward_kernel": _mixup_forward,
    "domain_mixup._backward_kernel": _mixup_backward,
    "row_update._sgd_kernel": _sgd,
    "row_update._adamw_kernel": _adamw,
}


# ---- torch's operators ---------------------------------------------------------------------------

GEMMS = ("torch.mm", "torch.addmm")
# They write their first argument without reading it.
_OVERWRITES = {"torch.copy", "torch.zero", "torch.fill"}
# They read, or write, only the elements that indices name.
_GATHERS = {"torch.index_select", "torch.index", "torch.gather", "torch.embedding"}
_SCATTERS = {"torch.scatter", "torch.index_fill", "torch.index_put", "torch.index_copy"}
# A sort of 64-bit keys with their places: eight passes over both, by eight bits each.
_SORT_PASSES = 8


def _torch(launch: Launch) -> Work:
    """Return the work of an operator: each input read, each output written, in one kernel."""
    if launch.name in GEMMS:
        return _gemm(launch)
    tensors = {k: v for k, v in launch.arguments.items() if isinstance(v, Region)}
    outputs = {k: float(v.nbytes) for k, v in tensors.items() if k.startswith("out")}
    inputs = {k: float(v.nbytes) for k, v in tensors.items() if k.startswith("in")}
    elements = max((math.prod(v.shape) for v in tensors.values()), default=0)
    again, kernels = 0.0, 1
    if launch.name in _OVERWRITES:
        inputs.pop("in0", None)
    elif launch.name in _GATHERS and inputs:
        inputs["in0"] = min(inputs["in0"], sum(outputs.values()))
    elif launch.name in _SCATTERS and outputs:
        indices = [v for k, v in inputs.items() if k != "in0"]
        inputs["in0"] = 0.0
        outputs["out0"] = min(outputs["out0"], max(indices, default=0.0))
    elif launch.name == "torch.sort":
        kernels = _SORT_PASSES + 2
        again = (_SORT_PASSES - 1) * 2 * sum(outputs.values())
    elif launch.name == "torch.searchsorted":
        steps = math.ceil(math.log2(max(2, math.prod(tensors["in0"].shape))))
        again = 32.0 * steps * math.prod(tensors["out0"].shape)
    return Work(inputs, outputs, again=again, vector=4.0 * elements, kernels=kernels,
                programs=max(1, elements // 512),
        pipelined=True)  # fmt: skip


# Blocks that cuBLAS chooses from, rows × columns, and splits of the sum.
LIBRARY_BLOCKS = ((128, 256), (256, 128), (128, 128), (64, 256), (256, 64), (64, 128))
SPLITS = (1, 2, 4, 8, 16, 32)


def _gemm(launch: Launch) -> Work:
    """Return the work of a GEMM by cuBLAS, in blocks of 128×256: see `library_works`."""
    return library_works(launch)[0]


def library_works(launch: Launch) -> list[Work]:
    """Return the ways in which cuBLAS may compute a GEMM, by block and split of the sum."""
    names = [name for name in launch.arguments if name.startswith("in")]
    accumulates = launch.name == "torch.addmm"
    a, b = (launch[name] for name in (names[1:3] if accumulates else names[:2]))
    out = launch["out0"]
    (m, k), (_, n) = a.shape, b.shape
    item = a.dtype.itemsize
    at = {region: name for name, region in launch.arguments.items() if isinstance(region, Region)}
    reads = {at[a]: float(a.nbytes), at[b]: float(b.nbytes)}
    if accumulates:
        reads["in0"] = float(out.nbytes)
    exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    found = []
    for rows, columns in LIBRARY_BLOCKS:
        for split in SPLITS:
            if split > 1 and k // split < 512:
                continue
            blocks = math.ceil(m / rows) * math.ceil(n / columns) * split
            depth = math.ceil(k / split)
            # A cluster of two blocks shares the loads of the larger side.
            loads = blocks * (min(rows, columns) + max(rows, columns) / 2) * depth * item
            again = loads - a.nbytes - b.nbytes
            partial = 8.0 * m * n * split if split > 1 else 0.0
            found.append(
                Work(
                    dict(reads),
                    {"out0": float(out.nbytes)},
                    again=max(0.0, again) + partial,
                    block=Block(rows, columns, depth, a.dtype, exact),
                    flops=2.0 * m * n * k,
                    vector=(3.0 + 2.0 * accumulates) * blocks * rows * columns,
                    programs=blocks,
                    pipelined=True,
                    kernels=1 + (split > 1),
                )
            )
    return found
