"""The peers of each op, and the workload that they share.

To add an op, add its workload to `WORKLOADS` and its peers to `PEERS`: ours first, then the floor.
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

from .cases import Case

SCALE, MARGIN = 64.0, 0.5
PSI = 0.35
SHARPNESS = 100.0


class Workload:
    """The tensors that all peers of a case share, and the buffers that a step leaves behind."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Return memory reused from step to step, of the first parameter's dtype and device."""
        if name not in self.buffers:
            self.buffers[name] = self.parameters[0].new_empty(shape)
        return self.buffers[name]

    def clear_gradients(self) -> None:
        """Clear gradients as ``optimizer.zero_grad()`` does before each training step."""
        for parameter in self.parameters:
            parameter.grad = None

    def release(self) -> None:
        """Free everything but the inputs."""
        self.clear_gradients()
        self.buffers.clear()


class MarginWorkload(Workload):
    """Random embeddings (N, D), centers (C, D) and labels (N,)."""

    def __init__(self, case: Case, device: torch.device) -> None:
        n, d, c = case.shape["N"], case.shape["D"], case.shape["C"]
        generator = torch.Generator(device).manual_seed(0)
        options: dict[str, Any] = {"device": device, "dtype": case.torch_dtype}
        self.input = torch.randn(n, d, generator=generator, **options).requires_grad_()
        self.weight = torch.randn(c, d, generator=generator, **options).requires_grad_()
        self.target = torch.randint(c, (n,), generator=generator, device=device)
        super().__init__([self.input, self.weight])


class MixupWorkload(Workload):
    """Two random uint8 batches (B, H, W, C), and a tensor (B, C, H, W) for results."""

    def __init__(self, case: Case, device: torch.device) -> None:
        b, h, w, c = (case.shape[name] for name in "BHWC")
        generator = torch.Generator(device).manual_seed(0)
        self.synthetic, self.real = (
            torch.randint(
                0, 256, (b, h, w, c), generator=generator, device=device, dtype=torch.uint8
            )
            for _ in range(2)
        )
        channels_last = "channels_last" in case.options
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.dtype, self.fresh, self.bytes = case.torch_dtype, "fresh" in case.options, case.bytes
        self.out = torch.empty(
            (b, c, h, w), device=device, dtype=self.dtype, memory_format=self.format
        ).zero_()
        super().__init__([])


class RepulsionWorkload(Workload):
    """Random points (N, D)."""

    def __init__(self, case: Case, device: torch.device) -> None:
        n, d = case.shape["N"], case.shape["D"]
        generator = torch.Generator(device).manual_seed(0)
        self.points = torch.randn(
            n, d, generator=generator, device=device, dtype=case.torch_dtype
        ).requires_grad_()
        self.row_max = "row-max" in case.options
        super().__init__([self.points])


# A step runs the op once and returns the loss or the result, or None if it has neither.
Step = Callable[[], "Tensor | None"]


@dataclass(frozen=True)
class Peer:
    """An implementation to be measured.

    Attributes:
        name: the short name in tables. label: what it is, and what it omits.
        build: makes the step; raises where the peer is not available.
        needs: approximate bytes above the inputs; a case that would not fit is skipped.
    """

    name: str
    label: str
    build: Callable[[Any], Step]
    needs: Callable[[Case], int]


def _matrices(case: Case, logits: float, weights: float) -> int:
    n, d, c = case.shape["N"], case.shape["D"], case.shape["C"]
    return int(case.torch_dtype.itemsize * (logits * n * c + weights * c * d + 4 * n * d))


def _backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def _ours(work: MarginWorkload) -> Step:
    margin = sk.ArcFace(SCALE, MARGIN)
    return lambda: _backward(sk.margin_cross_entropy(work.input, work.weight, work.target, margin))


def _ours_with_workspace(work: MarginWorkload) -> Step:
    if work.input.device.type != "cpu":
        raise NotImplementedError("a workspace has no effect on a GPU")
    margin = sk.ArcFace(SCALE, MARGIN)
    workspace = 4 * work.input.shape[0] * work.weight.shape[0]  # all cosines, in float32
    return lambda: _backward(
        sk.margin_cross_entropy(work.input, work.weight, work.target, margin, workspace=workspace)
    )


def _three_gemms(work: MarginWorkload) -> Step:
    x, w = work.input.detach(), work.weight.detach()
    (n, d), c = x.shape, w.shape[0]

    def step() -> None:
        logits = torch.mm(x, w.T, out=work.buffer("logits", n, c))
        torch.mm(logits, w, out=work.buffer("grad_input", n, d))
        torch.mm(logits.T, x, out=work.buffer("grad_weight", c, d))

    return step


def arcface(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Compute ArcFace over dense logits, the margin applied only at the targets."""
    cosine = F.linear(F.normalize(input), F.normalize(weight))
    at_target = cosine.gather(1, target[:, None])
    theta = at_target.float().clamp(-1 + 1e-7, 1 - 1e-7).acos()
    psi = torch.where(
        theta + MARGIN > math.pi, at_target - MARGIN * math.sin(MARGIN), (theta + MARGIN).cos()
    )
    logits = SCALE * cosine.scatter(1, target[:, None], psi.to(cosine.dtype))
    return F.cross_entropy(logits, target)


def arcface_one_hot(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Compute ArcFace as it is usually written: the margin on all logits, and a one-hot mask."""
    cosine = F.linear(F.normalize(input), F.normalize(weight))
    sine = (1 - cosine.square()).clamp(0, 1).sqrt()
    psi = cosine * math.cos(MARGIN) - sine * math.sin(MARGIN)
    past_pi = cosine <= math.cos(math.pi - MARGIN)
    psi = torch.where(past_pi, cosine - MARGIN * math.sin(MARGIN), psi)
    one_hot = torch.zeros_like(cosine).scatter_(1, target[:, None], 1)
    logits = SCALE * (one_hot * psi + (1 - one_hot) * cosine)
    return F.cross_entropy(logits, target)


def _eager(work: MarginWorkload, one_hot: bool) -> Step:
    function = arcface_one_hot if one_hot else arcface
    return lambda: _backward(function(work.input, work.weight, work.target))


def _compiled(work: MarginWorkload) -> Step:
    compiled = torch.compile(arcface, dynamic=False)
    return lambda: _backward(compiled(work.input, work.weight, work.target))


def _linear_cross_entropy(work: MarginWorkload) -> Step:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return lambda: _backward(function(work.input, work.weight, work.target))


def _pytorch_metric_learning(work: MarginWorkload) -> Step:
    from pytorch_metric_learning.losses import ArcFaceLoss

    n_features = work.input.shape[1]
    loss = ArcFaceLoss(1, n_features, margin=math.degrees(MARGIN), scale=SCALE)
    loss.num_classes = work.weight.shape[0]
    loss.W = torch.nn.Parameter(work.weight.detach().T)  # its centers are columns
    work.parameters.append(loss.W)
    return lambda: _backward(loss(work.input, work.target))


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


def _copy(work: MixupWorkload, size: int) -> Step:
    source, target = (torch.ones(size, dtype=torch.uint8, device=work.out.device) for _ in range(2))
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
    return lambda: _backward(sk.hypersphere_repulsion(work.points, energy=energy))


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
    return lambda: _backward(function(work.points))


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
        return _backward((x * x[index]).sum(1).mean())

    return step


WORKLOADS: dict[str, Callable[[Case, torch.device], Workload]] = {
    "margin_cross_entropy": MarginWorkload,
    "domain_mixup": MixupWorkload,
    "hypersphere_repulsion": RepulsionWorkload,
}

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
            partial(_eager, one_hot=True),
            lambda c: _matrices(c, 14, 3.2),
        ),
        Peer(
            "eager torch, lean",
            "the margin at the targets alone",
            partial(_eager, one_hot=False),
            lambda c: _matrices(c, 5, 3.2),
        ),
        Peer("torch.compile", "the lean one, compiled", _compiled, lambda c: _matrices(c, 5, 3.2)),
        Peer(
            "F.linear_cross_entropy",
            "torch's, as called by default: no margin, no normalization",
            _linear_cross_entropy,
            lambda c: _matrices(c, 4, 1.2),
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
            lambda work: _copy(work, work.bytes // 2),
            lambda c: c.bytes,
        ),
        Peer(
            "copy_ that moves twice as many",
            "torch copy_ of a uint8 tensor of as many bytes as the op reads and writes together",
            lambda work: _copy(work, work.bytes),
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
}


def find(op: str, name: str) -> Peer:
    """Return an op's peer by its name."""
    return next(peer for peer in PEERS[op] if peer.name == name)
