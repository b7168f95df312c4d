"""The peers of each op.

To add an op, add its peers to `PEERS`: ours first, then the floor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import synface_kernels as sk
from synface_kernels._load import cpu_isas

from . import margin_peers
from .cases import Case
from .margin_peers import MARGIN, SCALE
from .workloads import (
    MarginWorkload,
    MixupWorkload,
    RepulsionWorkload,
    RowUpdateWorkload,
    SampleWorkload,
    Step,
    backward,
)

PSI = 0.35
SHARPNESS = 100.0
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


@dataclass(frozen=True)
class Peer:
    """An implementation to be measured.

    Attributes:
        name: the short name in tables. label: what it is, and what it omits.
        build: makes a workload's step; raises where the peer is not available.
        needs: approximate bytes above the inputs; a case that would not fit is skipped.
    """

    name: str
    label: str
    build: Callable[..., Step]
    needs: Callable[[Case], int]

    @property
    def compiled(self) -> bool:
        """Return whether its first step waits for torch.compile."""
        return self.name.startswith("torch.compile")


def _matrices(case: Case, logits: float, weights: float) -> int:
    n, d, c = case.shape["N"], case.shape["D"], case.shape["C"]
    return int(case.torch_dtype.itemsize * (logits * n * c + weights * c * d + 4 * n * d))


def _ours(work: MarginWorkload, **options: Any) -> Step:
    margin = sk.ArcFace(SCALE, MARGIN)

    def loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        ids = None
        if work.sampled is not None:
            ids, target = sk.sample_classes(target, len(weight), work.sampled, work.generator)
        return sk.margin_cross_entropy(input, weight, target, margin, class_ids=ids, **options)

    return work.step(loss)


def _ours_with_workspace(work: MarginWorkload) -> Step:
    _all_classes(work)
    if work.input.device.type != "cpu":
        raise NotImplementedError("a workspace has no effect on a GPU")
    workspace = 4 * work.input.shape[0] * work.weight.shape[0]  # all cosines, in float32
    return _ours(work, workspace=workspace)


def _all_classes(work: MarginWorkload) -> None:
    if work.sampled is not None:
        raise NotImplementedError("computes all classes")


def _three_gemms(work: MarginWorkload) -> Step:
    # Operands in the dtype of the GEMMs, as autocast would cast them in each step.
    x, w = (v.detach().to(work.gemm_dtype) for v in (work.input, work.weight))
    w = w[: work.sampled]  # None: all of them
    (n, d), c = x.shape, w.shape[0]

    def buffer(name: str, *shape: int) -> Tensor:
        return work.buffer(name, *shape, dtype=work.gemm_dtype)

    def step() -> None:
        logits = torch.mm(x, w.T, out=buffer("logits", n, c))
        torch.mm(logits, w, out=buffer("grad_input", n, d))
        torch.mm(logits.T, x, out=buffer("grad_weight", c, d))

    return step


def _in_torch(work: MarginWorkload, function: Callable[..., Tensor], compiled: bool) -> Step:
    _all_classes(work)
    return work.step(torch.compile(function, dynamic=False) if compiled else function)


def _chunked(work: MarginWorkload) -> Step:
    _all_classes(work)
    rows = margin_peers.rows_per_chunk(len(work.weight))
    return work.step(lambda *tensors: margin_peers.Chunked.apply(*tensors, rows, work.gemm_dtype))


def _partial_fc(work: MarginWorkload) -> Step:
    def loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        ids = None
        if work.sampled is not None:
            ids, target = margin_peers.sample(target, len(weight), work.sampled)
        return margin_peers.partial_fc(input, weight, target, ids)

    return work.step(loss)


def _linear_cross_entropy(work: MarginWorkload) -> Step:
    _all_classes(work)
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return work.step(function)


def _liger(work: MarginWorkload) -> Step:
    _all_classes(work)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return work.step(lambda input, weight, target: loss(weight, input, target))


def _cut_cross_entropy(work: MarginWorkload) -> Step:
    _all_classes(work)
    from cut_cross_entropy import linear_cross_entropy

    return work.step(linear_cross_entropy)


def _pytorch_metric_learning(work: MarginWorkload) -> Step:
    _all_classes(work)
    from pytorch_metric_learning.losses import ArcFaceLoss

    n_features = work.input.shape[1]
    loss = ArcFaceLoss(1, n_features, margin=math.degrees(MARGIN), scale=SCALE)
    loss.num_classes = work.weight.shape[0]
    loss.W = torch.nn.Parameter(work.weight.detach().T)  # its centers are columns
    work.parameters.append(loss.W)
    return work.step(lambda input, _weight, target: loss(input, target))


def _points(case: Case, copies: float) -> int:
    return int(case.torch_dtype.itemsize * copies * case.shape["N"] * case.shape["D"])


def _similarities(case: Case, copies: float) -> int:
    return int(case.torch_dtype.itemsize * copies * case.shape["N"] ** 2)


def _elements(case: Case, bytes_each: int) -> int:
    return math.prod(case.shape.values()) * bytes_each


def _our_mixup(work: MixupWorkload) -> Step:
    return lambda: sk.domain_mixup(
        work.synthetic,
        work.real,
        PSI,
        dtype=work.dtype,
        memory_format=work.format,
        out=None if work.fresh else work.out,
    )


def _copy(device: torch.device, size: int) -> Step:
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def mixup(synthetic: Tensor, real: Tensor) -> Tensor:
    """Mix as pipelines write it, on whole batches."""
    s = synthetic.permute(0, 3, 1, 2).float() / 255
    r = real.permute(0, 3, 1, 2).float() / 255
    return ((PSI * s + (1 - PSI) * r) - 0.5) / 0.5


def _mixup_fresh(work: MixupWorkload, compiled: bool) -> Step:
    def plain(synthetic: Tensor, real: Tensor) -> Tensor:
        return mixup(synthetic, real).to(work.dtype, memory_format=work.format)

    function = torch.compile(plain, dynamic=False) if compiled else plain
    return lambda: function(work.synthetic, work.real)


def _mixup_into(work: MixupWorkload) -> Step:
    def plain(synthetic: Tensor, real: Tensor, out: Tensor) -> Tensor:
        return out.copy_(mixup(synthetic, real))

    compiled = torch.compile(plain, dynamic=False)
    return lambda: compiled(work.synthetic, work.real, work.out)


def _our_repulsion(work: RepulsionWorkload) -> Step:
    energy = sk.MaxCosine() if work.row_max else sk.LogSumExp(SHARPNESS)
    return lambda: backward(sk.hypersphere_repulsion(work.points, energy=energy))


def _our_neighbors(work: RepulsionWorkload) -> Step:
    def step() -> Tensor:
        cosine, _ = sk.nearest_neighbors(work.points.detach())
        return cosine.mean()

    return step


def _our_neighbors_in_float32(work: RepulsionWorkload) -> Step:
    if "avx512_bf16" not in cpu_isas():
        raise RuntimeError(
            "this processor has no bfloat16 instructions: ours searches in float32 anyway"
        )
    step = _our_neighbors(work)

    def in_float32() -> Tensor | None:
        with mock.patch.dict(os.environ, SYNFACE_CPU_ISA="avx512"):
            return step()

    return in_float32


def _half_gemms(work: RepulsionWorkload) -> Step:
    x = work.points.detach()
    n, d = x.shape
    half = x[: n // 2]

    def step() -> None:
        cosines = torch.mm(half, x.T, out=work.buffer("cosines", n // 2, n))
        if not work.row_max:  # the gradients of both sides
            torch.mm(cosines, x, out=work.buffer("rows", n // 2, d))
            torch.mm(cosines.T, half, out=work.buffer("columns", n, d))

    return step


def row_max(points: Tensor) -> Tensor:
    """Compute the mean cosine to the nearest neighbor, over dense similarities."""
    x = F.normalize(points)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    return (x @ x.T).masked_fill(itself, -2).amax(1).mean()


def log_sum_exp(points: Tensor) -> Tensor:
    """Compute the log-mean-exp of all pairs' cosines, over dense similarities."""
    x = F.normalize(points)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    logits = (SHARPNESS * (x @ x.T)).masked_fill(itself, -torch.inf)
    return (logits.logsumexp((0, 1)) - math.log(len(x) * (len(x) - 1))) / SHARPNESS


def _dense_repulsion(work: RepulsionWorkload, compiled: bool) -> Step:
    energy = row_max if work.row_max else log_sum_exp
    function = torch.compile(energy, dynamic=False) if compiled else energy
    return lambda: backward(function(work.points))


def _faiss(work: RepulsionWorkload) -> Step:
    import faiss

    if not work.row_max:
        raise NotImplementedError("FAISS searches for neighbors alone")
    faiss.omp_set_num_threads(torch.get_num_threads())
    points = F.normalize(work.points.detach().float()).cpu().numpy()

    def step() -> Tensor:
        index = faiss.IndexFlatIP(points.shape[1])
        index.add(points)
        cosine, _ = index.search(points, 2)  # the first is the point itself
        return torch.from_numpy(cosine)[:, 1].mean()

    return step


def _keops(work: RepulsionWorkload) -> Step:
    if work.points.shape[1] > 100:
        raise NotImplementedError("its manual warns of more than 100 dimensions")
    from pykeops.torch import LazyTensor

    if not work.row_max:
        raise NotImplementedError("tried for the row maximum alone")

    def step() -> Tensor:
        x = F.normalize(work.points)
        # The greatest two, of which the first is the point itself.
        distance = -(LazyTensor(x[:, None, :]) | LazyTensor(x[None, :, :]))
        index = distance.argKmin(K=2, dim=1)[:, 1]
        return backward((x * x[index]).sum(1).mean())

    return step


def _our_rows(work: RowUpdateWorkload) -> Step:
    if work.adamw:
        mean, square = work.states
        return lambda: sk.row_adamw_(work.weight, work.grad, work.ids, mean, square, step=10)
    return lambda: sk.row_sgd_(
        work.weight, work.grad, work.ids, momentum_buffer=work.states[0], **SGD
    )


def _indexed_rows(work: RowUpdateWorkload, compiled: bool) -> Step:
    function: Callable[..., None] = indexed_adamw if work.adamw else indexed_sgd
    if compiled:
        function = torch.compile(function, dynamic=False)
    numbers = {"step": 10} if work.adamw else {}
    return lambda: function(work.weight, work.grad, work.ids, *work.states, **numbers)


def indexed_sgd(weight: Tensor, grad: Tensor, ids: Tensor, buffer: Tensor) -> None:
    """Take a step of SGD with momentum on some rows with torch's indexing."""
    w, b = weight[ids].float(), buffer[ids].float()
    b.mul_(SGD["momentum"]).add_(grad.float() + SGD["weight_decay"] * w)
    weight.index_copy_(0, ids, w.sub_(b, alpha=SGD["lr"]).to(weight.dtype))
    buffer.index_copy_(0, ids, b.to(buffer.dtype))


def indexed_adamw(
    weight: Tensor, grad: Tensor, ids: Tensor, mean: Tensor, square: Tensor, step: int
) -> None:
    """Take a step of AdamW on some rows with torch's indexing."""
    w, m, v, g = weight[ids].float(), mean[ids].float(), square[ids].float(), grad.float()
    m.lerp_(g, 0.1)
    v.mul_(0.999).addcmul_(g, g, value=0.001)
    denominator = v.sqrt().div_((1 - 0.999**step) ** 0.5).add_(1e-8)
    w.mul_(1 - 1e-3 * 1e-2).addcdiv_(m, denominator, value=-1e-3 / (1 - 0.9**step))
    for state, rows in ((weight, w), (mean, m), (square, v)):
        state.index_copy_(0, ids, rows.to(state.dtype))


def _our_samples(work: SampleWorkload) -> Step:
    return lambda: sk.sample_classes(work.target, work.classes, work.sampled, work.generator)[0]


def _insightface_samples(work: SampleWorkload) -> Step:
    return lambda: margin_peers.sample(work.target, work.classes, work.sampled)[0]


def _copy_bytes(work: RowUpdateWorkload | SampleWorkload) -> Step:
    device = work.target.device if isinstance(work, SampleWorkload) else work.weight.device
    return _copy(device, work.bytes // 2)


# The floor of ops that only move bytes.
_COPY = Peer(
    "copy_ that moves as many bytes",
    "torch copy_ of a uint8 tensor of half the bytes that the op moves",
    _copy_bytes,
    lambda c: c.bytes,
)

PEERS: dict[str, list[Peer]] = {
    "margin_cross_entropy": [
        Peer("ours", "synface_kernels.margin_cross_entropy", _ours, lambda c: _matrices(c, 0, 1.2)),
        Peer(
            "ours, workspace",
            "the same with workspace=4·N·C, which saves all cosines for the backward pass",
            _ours_with_workspace,
            lambda c: _matrices(c, 4 / c.torch_dtype.itemsize, 1.2),
        ),
        Peer(
            "three products",
            "torch.mm three times into reused outputs: logits, dX, dW; the floor, no loss",
            _three_gemms,
            lambda c: _matrices(c, 1, 1),
        ),
        Peer(
            "eager torch",
            "ArcFace over dense logits as it is mostly written, with a one-hot matrix",
            partial(_in_torch, function=margin_peers.arcface_one_hot, compiled=False),
            lambda c: _matrices(c, 14, 3.2),
        ),
        Peer(
            "eager torch, lean",
            "the margin at the targets alone",
            partial(_in_torch, function=margin_peers.arcface, compiled=False),
            lambda c: _matrices(c, 5, 3.2),
        ),
        Peer(
            "torch.compile",
            "the lean one, compiled",
            partial(_in_torch, function=margin_peers.arcface, compiled=True),
            lambda c: _matrices(c, 5, 3.2),
        ),
        Peer(
            "chunked, after Liger",
            "in plain torch, with normalization and margin: the logits of some rows at a time "
            "become gradients at once",
            _chunked,
            lambda c: _matrices(c, 0, 4.2) + 8 * margin_peers.CHUNK_LOGITS,
        ),
        Peer(
            "Partial FC's steps",
            "insightface's, in plain torch: (sampled) centers, normalization, GEMM, margin, "
            "softmax in place; the margin has its gradient",
            _partial_fc,
            lambda c: _matrices(c, 6 if "S" not in c.shape else 1, 3.2),
        ),
        Peer(
            "F.linear_cross_entropy",
            "torch's, as called by default: no margin, no normalization",
            _linear_cross_entropy,
            lambda c: _matrices(c, 4, 1.2),
        ),
        Peer(
            "Liger",
            "LigerFusedLinearCrossEntropyLoss: no margin, no normalization",
            _liger,
            lambda c: _matrices(c, 1, 2.2),
        ),
        Peer(
            "CCE",
            "cut_cross_entropy.linear_cross_entropy: no margin, no normalization",
            _cut_cross_entropy,
            lambda c: _matrices(c, 0, 1.2),
        ),
        Peer(
            "pytorch-metric-learning",
            "its ArcFaceLoss (margin in degrees)",
            _pytorch_metric_learning,
            lambda c: _matrices(c, 7, 3.2),
        ),
    ],
    "domain_mixup": [
        Peer(
            "ours",
            "synface_kernels.domain_mixup",
            _our_mixup,
            lambda c: _elements(c, c.torch_dtype.itemsize if "fresh" in c.options else 0),
        ),
        Peer(
            "copy_ that moves as many bytes",
            "torch copy_ of a uint8 tensor of half the bytes that the op moves: it reads one half "
            "and writes the other",
            lambda work: _copy(work.out.device, work.bytes // 2),
            lambda c: c.bytes,
        ),
        Peer(
            "copy_ that moves twice as many",
            "torch copy_ of a uint8 tensor of as many bytes as the op reads and writes together",
            lambda work: _copy(work.out.device, work.bytes),
            lambda c: 2 * c.bytes,
        ),
        Peer(
            "eager torch",
            "the expression as pipelines write it, on whole batches; a fresh result",
            partial(_mixup_fresh, compiled=False),
            lambda c: _elements(c, 24),
        ),
        Peer(
            "torch.compile",
            "the same, compiled; a fresh result",
            partial(_mixup_fresh, compiled=True),
            lambda c: _elements(c, c.torch_dtype.itemsize),
        ),
        Peer(
            "torch.compile, into out",
            "the same, compiled with a copy_ into a standing tensor",
            _mixup_into,
            lambda c: 0,
        ),
    ],
    "hypersphere_repulsion": [
        Peer(
            "ours",
            "synface_kernels.hypersphere_repulsion",
            _our_repulsion,
            lambda c: (64 << 20) + _points(c, 4),
        ),
        Peer(
            "half products",
            "torch.mm of half of X·Xᵀ into a reused output (and of both gradients, for a global "
            "energy); the floor, no energy",
            _half_gemms,
            lambda c: _similarities(c, 0.5),
        ),
        Peer(
            "eager torch",
            "the same energy over dense similarities",
            partial(_dense_repulsion, compiled=False),
            lambda c: _similarities(c, 5),
        ),
        Peer(
            "torch.compile",
            "the same, compiled",
            partial(_dense_repulsion, compiled=True),
            lambda c: _similarities(c, 4),
        ),
        Peer(
            "ours, neighbors",
            "synface_kernels.nearest_neighbors: no gradient",
            _our_neighbors,
            lambda c: (64 << 20) + _points(c, 1),
        ),
        Peer(
            "ours, neighbors by float32",
            "the same without bfloat16 GEMMs (SYNFACE_CPU_ISA=avx512)",
            _our_neighbors_in_float32,
            lambda c: (64 << 20) + _points(c, 1),
        ),
        Peer("FAISS", "IndexFlatIP, the nearest two: no gradient", _faiss, lambda c: _points(c, 4)),
        Peer(
            "KeOps", "arg-min over a LazyTensor, the nearest two", _keops, lambda c: _points(c, 4)
        ),
    ],
    "row_update": [
        Peer(
            "ours",
            "synface_kernels.row_sgd_ or row_adamw_",
            _our_rows,
            lambda c: 64 * c.shape["S"],
        ),
        _COPY,
        Peer(
            "eager torch",
            "indexing, arithmetic in float32, index_copy_",
            partial(_indexed_rows, compiled=False),
            lambda c: 24 * c.shape["S"] * c.shape["D"],
        ),
        Peer(
            "torch.compile",
            "the same, compiled",
            partial(_indexed_rows, compiled=True),
            lambda c: 24 * c.shape["S"] * c.shape["D"],
        ),
    ],
    "sample_classes": [
        Peer(
            "ours",
            "synface_kernels.sample_classes",
            _our_samples,
            lambda c: c.shape["C"] // 8 + 64 * c.shape["S"],
        ),
        _COPY,
        Peer(
            "insightface's",
            "random numbers for all classes, topk, sort",
            _insightface_samples,
            lambda c: 16 * c.shape["C"] + 32 * c.shape["S"],
        ),
    ],
}


def find(op: str, name: str) -> Peer:
    """Return an op's peer by its name."""
    return next(peer for peer in PEERS[op] if peer.name == name)
