"""The definition of the margin softmax: plain torch over all N×C logits, for float64."""

from __future__ import annotations

import torch
from torch import Tensor

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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the loss per row, log-sum-exp, target cosines and top-1 from dense logits.

    Args:
        input: (N, D); weight: (C, D), or (C, M, D) with M sub-centers per class; floating point.
        labels: (N, K) int64, distinct within a row, −1 where absent; label_weight: (N, K), 0 there.
        margin, mix, label_smoothing: as in `synface_kernels.margin_cross_entropy`.

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
    cosine = embedding @ normalize(weight.flatten(0, -2)).T
    if weight.dim() == 3:
        cosine = cosine.unflatten(1, weight.shape[:2]).max(2).values  # the first of equals
    psi = margin.target_cosine(cosine)
    share = torch.zeros_like(cosine).scatter_add(1, label, label_weight)
    is_label = torch.zeros_like(cosine).scatter_add(1, label, present.to(cosine.dtype)) > 0
    filtered = ~is_label & (cosine > margin.limit)
    instead = -torch.inf if margin.interclass_filter_mode == "drop" else 0.0

    def cross_entropy(own: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.where(filtered, instead, margin.scale * own)
        lse = logits.logsumexp(1)
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
    top1 = valid & finite & (best >= torch.where(filtered, -torch.inf, cosine).amax(1))
    target_cosine = torch.where(present & ~finite[:, None], broken[:, None], target_cosine)
    loss, lse = (torch.where(valid, torch.where(finite, value, broken), 0) for value in (loss, lse))
    return loss, lse, target_cosine, top1
