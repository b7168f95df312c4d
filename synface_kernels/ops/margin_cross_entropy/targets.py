"""The targets' part of the margin softmax: labels merged, margins, losses, on (N, K) tensors.

The core knows plain cosines and the classes that are not targets. The target terms are added to its
log-sum-exp here, under ordinary autograd: nothing is subtracted from a sum that they dominate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._check import require
from ..._load import library
from .checks import check_class_ids
from .interface import Statistics
from .margins import RANGES, CombinedMargin

OP = "margin_cross_entropy_targets"
# The number of classes while only the group knows it.
ANY_CLASS = 2**63 - 1

library.define(
    f"{OP}(Tensor target, Tensor? target_weight, Tensor? class_ids, SymInt num_classes, "
    "int ignore_index, Tensor? m1=None, Tensor? m2=None, Tensor? m3=None) -> "
    "(Tensor labels, Tensor label_weight)"
)


# ---- labels: checked, repeated ones merged -------------------------------------------------------


@torch.library.impl(library, OP, "CompositeExplicitAutograd")
def _targets(
    target: Tensor,
    target_weight: Tensor | None,
    class_ids: Tensor | None,
    num_classes: int,
    ignore_index: int,
    m1: Tensor | None = None,
    m2: Tensor | None = None,
    m3: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return labels (N, K), −1 where absent, and their float64 weights (N, K), 0 there.

    Absent are ignored labels and all but the first of equal labels in a row.
    """
    labels = target[:, None] if target_weight is None else target
    present = labels != ignore_index
    meaning = ""
    if class_ids is not None:
        check_class_ids(class_ids, num_classes)
        num_classes = class_ids.shape[0]
        meaning = ", an index into class_ids, which must hold every label"
    valid = (target == ignore_index) | ((target >= 0) & (target < num_classes))
    classes = f"in [0, {num_classes})" if num_classes < ANY_CLASS else "at least 0"
    message = f"target must be {classes}{meaning}, or ignore_index ({ignore_index})"
    require(valid, message, target)
    for (name, (low, high, hint)), margin in zip(RANGES.items(), (m1, m2, m3), strict=True):
        if margin is not None:  # what is not finite, as of a row of NaN, is its row's alone
            outside = ((margin <= low) | (margin >= high)) & margin.isfinite() & present.any(1)
            message = f"{name} is {hint} and must be between {low:.6g} and {high:.6g}"
            require(~outside, message, margin)
    if target_weight is None:
        weights = present.double()
    else:
        weights = target_weight.double()
        valid_rows = present.any(1)
        valid = weights.isfinite() & (weights >= 0)
        require(valid | ~valid_rows[:, None], "target_weight must be finite and ≥ 0", weights)
        total = torch.where(present, weights, 0).sum(1)
        tolerance = 1e-4 if target_weight.dtype in (torch.float32, torch.float64) else 2e-2
        require(
            ((total - 1).abs() <= tolerance) | ~valid_rows,
            f"each row of target_weight must sum to 1 (±{tolerance:g}) over labels not ignored",
            total,
        )
        same = (labels[:, :, None] == labels[:, None, :]) & present[:, None, :]
        weights = (same * torch.where(present, weights, 0)[:, None, :]).sum(2)
        earlier = same.new_ones(same.shape[1:]).tril(-1)
        present = present & ~(same & earlier).any(2)
        weights = torch.where(present, weights, 0)
    return torch.where(present, labels, -1), weights


@torch.library.register_fake(f"synface_kernels::{OP}")
def _targets_fake(
    target: Tensor,
    target_weight: Tensor | None,
    class_ids: Tensor | None,
    num_classes: int,
    ignore_index: int,
    m1: Tensor | None = None,
    m2: Tensor | None = None,
    m3: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape = (target.shape[0], 1 if target_weight is None else target.shape[1])
    return target.new_empty(shape), target.new_empty(shape, dtype=torch.float64)


# ---- losses --------------------------------------------------------------------------------------


def losses(
    statistics: Statistics,
    labels: Tensor,
    label_weight: Tensor,
    margin: CombinedMargin,
    mix: str,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return each row's loss (N,) and log-sum-exp (N,).

    In float64: these are N·K numbers, and a margin's slope is steep near cos θ = ±1.
    """
    negative_lse, _, cosine, filtered, cosine_sum, num_classes = statistics
    if filtered is not None and margin.interclass_filter_mode == "zero":
        negative_lse = _with_logits_of_zero(negative_lse, filtered)
    present = labels >= 0
    # A row of NaN is replaced by 0: its NaN · 0 would reach the centers even without a gradient.
    broken = negative_lse.isnan() | cosine.isnan().any(1)
    nan = negative_lse + cosine.sum(1)
    negative_lse = torch.where(broken, 0, negative_lse)
    cosine = torch.where(broken[:, None], 0, cosine)

    psi = margin.target_cosine(cosine)
    own = cosine + label_weight * (psi - cosine) if mix == "joint" else psi
    own = torch.where(present, margin.scale * own, 0)
    if mix == "joint":
        logits = own[:, None, :]  # the same logits for each label k
    else:
        is_k = torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
        logits = torch.where(is_k, own[:, None, :], margin.scale * cosine[:, None, :])
    logits = torch.where(present[:, None, :], logits, -torch.inf)
    # log-sum-exp relative to label k's logit: exact where that logit dominates
    terms = torch.cat(
        [
            (negative_lse[:, None] - own)[:, :, None],
            logits - own[:, :, None],
        ],
        dim=2,
    )
    excess = terms.logsumexp(2)  # −log softmax at label k
    loss = (label_weight * excess).sum(1)
    lse = loss + (label_weight * own).sum(1)
    if cosine_sum is not None and num_classes is not None:
        # Each label k adds t_k·(ψ − cos) to the sum of logits, in both mixes.
        added = torch.where(present, label_weight * (psi - cosine), 0).sum(1)
        mean_logit = margin.scale / num_classes * (torch.where(broken, 0, cosine_sum) + added)
        loss = (1 - label_smoothing) * loss + label_smoothing * (lse - mean_logit)
        loss = torch.where(present.any(1), loss, 0)
    return torch.where(broken, nan, loss), torch.where(broken, nan, lse)


def _with_logits_of_zero(negative_lse: Tensor, count: Tensor) -> Tensor:
    """Return the log-sum-exp (N,) with ``count`` (N,) more logits, all 0."""
    safe = torch.where(count > 0, negative_lse, 0)  # no NaN where it is not taken
    return torch.where(count > 0, torch.logaddexp(safe, count.clamp_min(1).log()), negative_lse)


def hits(statistics: Statistics, labels: Tensor) -> Tensor:
    """Return (N,) bool: no other class has a higher cosine than the best label."""
    best = torch.where(labels >= 0, statistics.target_cosine, -torch.inf).amax(1)
    return (labels >= 0).any(1) & (best >= statistics.negative_max)


def in_targets_shape(cosine: Tensor, target: Tensor) -> Tensor:
    """Return the labels' cosines (N, K) in target's shape, with a repeated label's at each."""
    if target.dim() == 1:
        return cosine.squeeze(1)
    if target.shape[1] > 1:
        same = target[:, :, None] == target[:, None, :]
        return (same * cosine[:, None, :]).sum(2)
    return cosine
