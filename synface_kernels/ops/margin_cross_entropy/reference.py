"""The definition of the margin softmax: plain torch over all N×C logits, for float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._autocast import off
from ..._derivatives import apply
from ..._norms import shortened
from .margins import CombinedMargin

# A row no longer than this counts as zero: its cosines are 0 and its gradient is 0.
NORM_MIN = 1e-12


def normalize(rows: Tensor) -> Tensor:
    """Divide rows by their norms; a zero row stays zero and passes no gradient."""
    rows = shortened(rows)
    norm = torch.linalg.vector_norm(rows.detach(), dim=1, keepdim=True)
    zero = norm <= NORM_MIN
    safe = torch.where(zero, torch.ones_like(rows), rows)
    unit = safe / torch.linalg.vector_norm(safe, dim=1, keepdim=True)
    return torch.where(zero, torch.zeros_like(unit), unit)


def margin_cross_entropy(
    input: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_weight: Tensor,
    margin: CombinedMargin,
    mix: str,
    label_smoothing: float = 0.0,
    rounded_to: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the loss per row, log-sum-exp, target cosines and top-1 from dense logits.

    Under autocast, a class that is not a row's label enters its log-sum-exp (and filter, and top-1)
    by the product of rounded unit vectors. Gradients pass through the rounding as if it were the
    identity.

    Args:
        input: (N, D); weight: (C, D), or (C, M, D) with M sub-centers per class; floating point.
        labels: (N, K) int64, distinct within a row, −1 where absent; label_weight: (N, K), 0 there.
        margin, mix, label_smoothing: as in `synface_kernels.margin_cross_entropy`.
        rounded_to: autocast's dtype for embeddings and for centers, or None for those that were
            given in it, and without autocast.

    Returns:
        loss (N,), lse (N,), target_cosine (N, K), top1 (N,) bool. All 0 (False) for a row that is
        not valid, without labels.

    Memory: O(N·C), by definition.
    """
    present, label = labels >= 0, labels.clamp_min(0)
    valid, finite = present.any(1), input.isfinite().all(1)
    # Rows that are not finite are replaced by 0: their NaN · 0 would reach the centers.
    embedding = normalize(torch.where((valid & finite)[:, None], input, 0))
    broken = (torch.where((valid & ~finite)[:, None], input, 0) * torch.nan).sum(1)
    centers = normalize(weight.flatten(0, -2))

    def of_classes(cosine: Tensor) -> Tensor:
        if weight.dim() == 2:
            return cosine
        return cosine.unflatten(1, weight.shape[:2]).max(2).values  # the first of equals

    cosine = others = of_classes(apply(_Product, embedding, centers, None, None))
    if rounded_to != (None, None):
        others = of_classes(apply(_Product, embedding, centers, *rounded_to))
    psi = margin.target_cosine(cosine)
    share = torch.zeros_like(cosine).scatter_add(1, label, label_weight)
    is_label = torch.zeros_like(cosine).scatter_add(1, label, present.to(cosine.dtype)) > 0
    filtered = ~is_label & (others > margin.limit)
    instead = -torch.inf if margin.interclass_filter_mode == "drop" else 0.0

    def cross_entropy(own: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.where(filtered, instead, margin.scale * own)
        lse = torch.where(is_label | filtered, logits, margin.scale * others).logsumexp(1)
        q = (1 - label_smoothing) * share + label_smoothing / cosine.shape[1]
        return -torch.where(q > 0, q * (logits - lse[:, None]), 0).sum(1), lse

    if mix == "joint":
        loss, lse = cross_entropy(cosine + share * (psi - cosine), share)
    else:
        loss = lse = cosine.new_zeros(cosine.shape[0])
        for k, t in zip(label.T, label_weight.T, strict=True):
            is_target = torch.zeros_like(cosine).scatter(1, k[:, None], 1)
            loss_k, lse_k = cross_entropy(torch.where(is_target > 0, psi, cosine), is_target)
            loss = loss + torch.where(t > 0, t * loss_k, 0)  # an absent label's may be ∞
            lse = lse + t * lse_k

    target_cosine = torch.where(present, cosine.gather(1, label), 0)
    best = torch.where(present, target_cosine, -torch.inf).amax(1)
    rivals = torch.where(is_label, cosine, others)
    top1 = valid & finite & (best >= torch.where(filtered, -torch.inf, rivals).amax(1))
    target_cosine = torch.where(present & ~finite[:, None], broken[:, None], target_cosine)
    loss, lse = (torch.where(valid, torch.where(finite, value, broken), 0) for value in (loss, lse))
    return loss, lse, target_cosine, top1


class _Product(torch.autograd.Function):
    """The products of unit vectors, of which each matrix is rounded to a dtype or, by None, is not.

    Of embeddings, centers, dtype of embeddings, dtype of centers.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(embeddings: Tensor, centers: Tensor, *dtypes: torch.dtype | None) -> Tensor:
        return _rounded(embeddings, dtypes[0]) @ _rounded(centers, dtypes[1]).T

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        embeddings, centers, *ctx.dtypes = inputs
        ctx.save_for_backward(embeddings, centers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        embeddings, centers = map(_rounded, ctx.saved_tensors, ctx.dtypes)
        with off(grad.device):  # it may be on where the backward pass runs
            return grad @ centers, grad.T @ embeddings, None, None


def _rounded(rows: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return rows rounded to float32, then to a 16-bit dtype, in their own dtype."""
    return rows if dtype is None else rows.float().to(dtype).to(rows.dtype)
