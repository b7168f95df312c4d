"""The definition: plain torch over all N×C logits, meant to be read and to be run in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .margins import CombinedMargin

# A row no longer than this counts as zero: its cosines are 0 and its gradient is 0.
NORM_MIN = 1e-12


def normalize(rows: Tensor) -> Tensor:
    """Rows divided by their norm; a zero row stays zero and passes no gradient."""
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss per row, log-sum-exp, target cosines and top-1, from dense logits.

    Args:
        input: (N, D); weight: (C, D); floating point.
        labels: (N, K) int64, distinct within a row, −1 where absent; label_weight: (N, K), 0 there.
        margin, mix: as in `synface_kernels.margin_cross_entropy`.

    Returns:
        loss (N,), lse (N,), target_cosine (N, K), top1 (N,) bool. All 0 (False) for a row without
        labels.

    Memory: O(N·C), by definition.
    """
    present = labels >= 0
    cosine = normalize(input) @ normalize(weight).T
    psi = margin.target_cosine(cosine)
    share = torch.zeros_like(cosine).scatter_add(1, labels.clamp_min(0), label_weight)

    if mix == "joint":
        logits = margin.scale * (cosine + share * (psi - cosine))
        lse = logits.logsumexp(1)
        loss = -(share * (logits - lse[:, None])).sum(1)
    else:
        loss = lse = cosine.new_zeros(cosine.shape[0])
        for label, t in zip(labels.clamp_min(0).T, label_weight.T, strict=True):
            is_target = torch.zeros_like(cosine, dtype=torch.bool).scatter(1, label[:, None], True)
            logits = margin.scale * torch.where(is_target, psi, cosine)
            lse_k = logits.logsumexp(1)
            loss = loss + t * (lse_k - logits.gather(1, label[:, None]).squeeze(1))
            lse = lse + t * lse_k

    counted = present.any(1)
    target_cosine = torch.where(present, cosine.gather(1, labels.clamp_min(0)), 0)
    best = torch.where(present, target_cosine, -torch.inf).amax(1)
    top1 = counted & (best >= cosine.amax(1))
    zero = torch.zeros_like(loss)
    return torch.where(counted, loss, zero), torch.where(counted, lse, zero), target_cosine, top1
