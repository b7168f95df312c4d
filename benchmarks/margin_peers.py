"""ArcFace in plain torch, as others compute it: rivals for machines without their packages.

The code is this project's own; each function names the source of its idea.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SCALE, MARGIN = 64.0, 0.5
# The logits that `Chunked` holds at a time.
CHUNK_LOGITS = 1 << 27


def with_margin(cosine: Tensor) -> Tensor:
    """Return cos(θ + m) of cosines of a row with its target; beyond π, cos θ − m·sin m."""
    theta = cosine.float().clamp(-1 + 1e-7, 1 - 1e-7).acos()
    past_pi = theta + MARGIN > math.pi
    return torch.where(past_pi, cosine - MARGIN * math.sin(MARGIN), (theta + MARGIN).cos())


def arcface(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Compute ArcFace over dense logits, the margin applied only at the targets."""
    cosine = F.linear(F.normalize(input), F.normalize(weight))
    psi = with_margin(cosine.gather(1, target[:, None]))
    logits = SCALE * cosine.scatter(1, target[:, None], psi.to(cosine.dtype))
    return F.cross_entropy(logits, target)


def arcface_one_hot(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Compute ArcFace as it is usually written: the margin on all logits, and a one-hot mask.

    Source: Deng et al., "ArcFace", CVPR 2019, and its many reimplementations.
    """
    cosine = F.linear(F.normalize(input), F.normalize(weight))
    sine = (1 - cosine.square()).clamp(0, 1).sqrt()
    psi = cosine * math.cos(MARGIN) - sine * math.sin(MARGIN)
    past_pi = cosine <= math.cos(math.pi - MARGIN)
    psi = torch.where(past_pi, cosine - MARGIN * math.sin(MARGIN), psi)
    one_hot = torch.zeros_like(cosine).scatter_(1, target[:, None], 1)
    logits = SCALE * (one_hot * psi + (1 - one_hot) * cosine)
    return F.cross_entropy(logits, target)


# ---- a fused linear cross entropy, in chunks of rows ---------------------------------------------


def rows_per_chunk(classes: int) -> int:
    """Return how many rows' logits `Chunked` holds at a time."""
    return max(1, CHUNK_LOGITS // classes)


class Chunked(torch.autograd.Function):
    """ArcFace whose forward pass turns the logits of a chunk of rows into gradients at once.

    apply(input, weight, target, rows, gemm_dtype)

    Source: the idea of Liger's fused linear cross entropy (Hsu et al., "Liger Kernel: Efficient
    Triton Kernels for LLM Training", 2024), which has neither margin nor normalization. Its chunks
    are of about N·D logits, which for a million classes would be one row; here they are larger.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, target: Tensor, rows: int, gemm_dtype: torch.dtype
    ) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            loss, grad_input, grad_weight = _chunks(input, weight, target, rows, gemm_dtype)
        ctx.save_for_backward(grad_input, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_input, grad_weight = ctx.saved_tensors
        return grad_input * grad, grad_weight * grad, None, None, None


def _chunks(
    input: Tensor, weight: Tensor, target: Tensor, rows: int, gemm_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    units = [F.normalize(v).to(gemm_dtype) for v in (input, weight)]
    x, w = units
    loss = torch.zeros((), device=input.device)
    grad_x, grad_w = torch.empty_like(x), torch.zeros_like(w)
    for chunk, labels, to in zip(
        x.split(rows), target.split(rows), grad_x.split(rows), strict=True
    ):
        logits = (chunk @ w.T).float()
        with torch.enable_grad():
            cosine = logits.gather(1, labels[:, None]).requires_grad_()
            psi = with_margin(cosine)
            (slope,) = torch.autograd.grad(psi.sum(), cosine)
        logits.scatter_(1, labels[:, None], psi.detach()).mul_(SCALE)
        lse = logits.logsumexp(1, keepdim=True)
        loss += (lse - SCALE * psi.detach()).sum() / len(x)
        factor = logits.sub_(lse).exp_()
        at_target = (factor.gather(1, labels[:, None]) - 1) * slope
        factor.scatter_(1, labels[:, None], at_target).mul_(SCALE / len(x))
        factor = factor.to(gemm_dtype)
        torch.mm(factor, w, out=to)
        grad_w.addmm_(factor.T, chunk)
    tangents = (
        _tangent(grad, unit, vector)
        for grad, unit, vector in zip((grad_x, grad_w), units, (input, weight), strict=True)
    )
    return loss, *tangents  # type: ignore[return-value]


def _tangent(grad: Tensor, unit: Tensor, vector: Tensor) -> Tensor:
    """Return the gradient by a vector from that by its unit vector."""
    along = (grad * unit).sum(1, keepdim=True, dtype=torch.float32)
    norm = torch.linalg.vector_norm(vector, dim=1, keepdim=True, dtype=torch.float32)
    return ((grad - along * unit) / norm).to(vector.dtype)


# ---- insightface's Partial FC --------------------------------------------------------------------


def sample(target: Tensor, num_classes: int, num_sampled: int) -> tuple[Tensor, Tensor]:
    """Sample as insightface's Partial FC does: positives score 2, the others below 1.

    Source: An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face
    Recognition CNNs by Partial FC", CVPR 2022; arcface_torch/partial_fc_v2.py of insightface.
    """
    positive = target.unique(sorted=True)
    if num_sampled < positive.numel():
        return positive, torch.searchsorted(positive, target)
    perm = torch.rand(num_classes, device=target.device)
    perm[positive] = 2.0
    index = torch.topk(perm, k=num_sampled)[1].sort()[0]
    return index, torch.searchsorted(index, target)


def partial_fc(input: Tensor, weight: Tensor, target: Tensor, ids: Tensor | None) -> Tensor:
    """Compute ArcFace by the steps of insightface's Partial FC, on one device.

    The (sampled) centers and the embeddings are normalized and multiplied, the cosines clamped; the
    margin follows in float32, and a softmax that overwrites the logits, as does its gradient.
    insightface takes the margin outside of autograd, so that its slope is 1, and a probability of
    at least 1e-30; here the margin has its slope, and the loss no bound.

    Source: see `sample`; arcface_torch/losses.py and partial_fc_v2.py of insightface.
    """
    centers = weight if ids is None else weight[ids]
    cosine = F.linear(F.normalize(input), F.normalize(centers)).float().clamp(-1, 1)
    psi = with_margin(cosine.gather(1, target[:, None]))
    return _SoftmaxInPlace.apply(SCALE * cosine.scatter(1, target[:, None], psi), target)


class _SoftmaxInPlace(torch.autograd.Function):
    """The mean cross entropy of logits that become probabilities, and then their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        logits.sub_(logits.amax(1, keepdim=True))
        at_target = logits.gather(1, target[:, None])
        total = logits.exp_().sum(1, keepdim=True)
        ctx.save_for_backward(target)
        ctx.probabilities = logits.div_(total)
        return (total.log() - at_target).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (target,), factor = ctx.saved_tensors, ctx.probabilities
        at_target = factor.gather(1, target[:, None]) - 1
        factor.scatter_(1, target[:, None], at_target)
        return factor.mul_(grad / len(target)), None
