"""The margin softmax: checks, target mathematics, and the core op that never holds N×C.

The core knows plain cosines and the classes that are not targets; everything about targets
(margins, mixed labels, reductions) is torch code on (N, K) tensors, under ordinary autograd. So
each implementation of the core serves every margin, and the target terms are added at the end:
nothing is subtracted from a log-sum-exp that they dominate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._check import describe, integer, number, require
from ..._derivatives import (
    check_tangents,
    once,
    transforms_active,
)
from ..._derivatives import register as register_autograd
from ..._load import library
from ..._select import always, needs_cpu_extension, needs_triton, register, resolve
from ..row_update.updates import AdamWUpdate, SGDUpdate
from . import reference, sharded
from . import update as fused
from .margins import ArcFace, CombinedMargin

OP = "margin_cross_entropy"
_ARCFACE = ArcFace()
register(OP, {"cpu": needs_cpu_extension, "triton": needs_triton, "reference": always})

library.define(
    f"{OP}_targets(Tensor target, Tensor? target_weight, Tensor? class_ids, SymInt num_classes, "
    "int ignore_index) -> (Tensor labels, Tensor label_weight)"
)
_FORWARD = (
    "(Tensor input, Tensor weight, Tensor? class_ids, Tensor labels, float scale, float limit, "
    "bool needs_input_grad, bool needs_cosine_sum, SymInt workspace, "
    "bool halves{impl}) -> ("
    "Tensor negative_lse, Tensor negative_max, Tensor target_cosine, Tensor filtered, "
    "Tensor cosine_sum, Tensor mean_center, Tensor center_sum, Tensor kept)"
)
_BACKWARD = (
    "(Tensor input, Tensor weight, Tensor? class_ids, Tensor labels, Tensor negative_lse, "
    "Tensor mean_center, Tensor center_sum, Tensor kept, Tensor grad_negative_lse, "
    "Tensor grad_target_cosine, Tensor grad_cosine_sum, float scale, float limit, "
    "bool needs_input_grad, bool needs_weight_grad, bool halves{impl}) -> ("
    "Tensor grad_input, Tensor grad_rows)"
)
for _name, _schema in ((f"{OP}_forward", _FORWARD), (f"{OP}_backward", _BACKWARD)):
    library.define(_name + _schema.format(impl=", str impl"))
    library.define(_name + "_cpu" + _schema.format(impl=""))  # implemented in csrc/bindings.cpp


class MarginStats(NamedTuple):
    """What a training step may want to know besides the loss.

    Attributes:
        lse: (N,) log-sum-exp of the logits, margins included; differentiable (z-loss). With
            ``mix="separate"``, the mean over the labels by their weights.
        target_cosine: (N,), or (N, K) for (N, K) targets: plain cosine with the target's center;
            differentiable; 0 where ignored.
        top1: (N,) bool: no other class has a higher plain cosine than the (best) target, but for
            those that the margin's ``interclass_filter`` filters. Its mean is the training
            accuracy. False where ignored.
    """

    lse: Tensor
    target_cosine: Tensor
    top1: Tensor


def margin_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: CombinedMargin = _ARCFACE,
    *,
    target_weight: Tensor | None = None,
    mix: Literal["joint", "separate"] = "joint",
    class_ids: Tensor | None = None,
    group: Any = None,
    class_start: int = 0,
    update: SGDUpdate | AdamWUpdate | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["none", "mean", "sum"] = "mean",
    return_stats: bool = False,
    workspace: int = 0,
    impl: str = "auto",
) -> Any:
    """Cross entropy of a margin softmax over the cosines of embeddings and class centers.

    With cos_ij = ⟨x_i, w_j⟩/(‖x_i‖·‖w_j‖), margin ψ, scale s, and t_ij ≥ 0 the weight of label j in
    row i (Σ_j t_ij = 1):

    - ``mix="joint"``: z_ij = s·(cos_ij + t_ij·(ψ(cos_ij) − cos_ij)),
      L_i = −Σ_j t_ij·log softmax(z_i)_j. SynFace's loss of mixed identities and domains.
    - ``mix="separate"``: L_i = Σ_k t_ik·CE_ik, where CE_ik has label k as its only target.

    With one label per row both are ArcFace and its kin. With ``label_smoothing`` ε, the weights of
    the logarithms (t, or 1 for label k of CE_ik) become (1 − ε)·t_ij + ε/C, as torch has it; the
    logits keep their margins. The margin's ``interclass_filter`` takes classes out of the softmax.

    Args:
        input: (N, D) embeddings: float32, bfloat16 or float16 (computed in float32), or float64
            together with ``weight``. They need not be normalized nor contiguous.
        weight: (C, D) class centers, likewise; C ≥ 1. Or (C, M, D), M sub-centers for each class:
            its cosine is the greatest of theirs (the first of equals), and its gradient goes there.
        target: (N,) int64 labels in [0, C), or (N, K) for K labels per row. A label that stands
            twice in a row counts once, with the sum of its weights. With ``class_ids``, labels are
            places in it, in [0, S).
        margin: an `ArcFace` (the default), `CosFace`, `SphereFace` or `CombinedMargin`. Angles are
            in radians.
        target_weight: (N, K) weights of (N, K) targets, ≥ 0, each row summing to 1; no gradient.
        mix: how several labels per row combine, see above.
        class_ids: (S,) int64, rising strictly: the rows of weight that take part in this step, as
            if there were no others. `sample_classes` returns them together with the target as
            places in them; they must hold every label. Rows are read where they lie. Weight's
            gradient then is a coalesced sparse COO tensor of weight's shape with S rows: indices
            ``class_ids``, values (S, D), which `torch.optim.SGD` takes as it is, and `row_sgd_` as
            ids and values. (In ``weight.grad`` torch forgets that it is coalesced; what
            `torch.autograd.grad` returns is.) Compiled by torch.compile, which cannot hold sparse
            tensors, the gradient is dense: C·D numbers, zero but for those rows. With a group:
            rows of this rank's weight, which must hold the labels of all ranks that are among its
            classes (see `sample_classes`); all ranks give class_ids, or none, and the target
            remains in [0, C).
        label_smoothing: ε in [0, 1), see above; C is the number of classes that take part. Neither
            with sub-centers nor with an ``interclass_filter``.
        group: a `torch.distributed` process group whose ranks each hold some of the classes, and
            a batch of their own: ``weight`` is (C_r, D), ``input`` (N_r, D), ``target`` is in
            [0, C), C = Σ C_r, N = Σ N_r. N_r may differ, and be 0; so may C_r ≥ 1. The loss and
            the gradients are those of one process that has all rows and all classes:
            ``"mean"`` and ``"sum"`` are over all ranks' rows and the same number on all ranks,
            ``"none"`` and the statistics are of the rank's own rows. All ranks must call this, and
            run its backward pass, or none. Where one rank's argument is wrong all raise its error.
            Not with ``impl="reference"``, nor inside `torch.compile`. See docs/sharding.md for what
            travels, and for the factor that a backbone in `DistributedDataParallel` needs.
        class_start: the first of this rank's classes. The ranks' classes must cover [0, C) without
            a hole or an overlap.
        update: an `SGDUpdate` or `AdamWUpdate`: the backward pass takes this step on ``weight``,
            in place, and the weight's gradient is never held, only a tile of it. Centers and states
            become bit for bit what `row_sgd_` or `row_adamw_` would make of them with the gradient
            (and with ``class_ids``, if given). Weight must not require grad, and be float32,
            bfloat16 or float64. Each forward pass has one backward pass, before the next: so
            gradients cannot be accumulated, nor clipped by a norm, nor looked at before the step.
            Whatever multiplies the loss, as `torch.amp.GradScaler` does, multiplies the centers'
            gradient; a step cannot be left out afterwards. Under no_grad there is no step. With
            a group each rank gives the same rule, numbers and step, with its own rows' states
            and, where they round at random, a seed of its own or none.
            Not inside `torch.compile`.
        ignore_index: a label to leave out. A row of nothing else costs nothing, has loss 0 and
            gradient 0, and is not counted by the mean; beside other labels it must have weight 0.
        reduction: ``"mean"`` over the rows that count (0 if there is none), ``"sum"``, ``"none"``.
        return_stats: also return `MarginStats`.
        workspace: bytes that the forward pass may keep for the backward pass, ≥ 0: the cosines of
            as many classes as fit, 4·N (8·N for float64) a center, which then need not be computed
            again: with all of them a step is three products, not four. No bit of the result depends
            on it. Without effect where weight needs no gradient, and for ``"triton"`` and
            ``"reference"``. With a group: each rank's own, where N is that of all ranks.
        impl: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"``; see `explain`.

    Returns:
        The loss, float32 (float64 for float64 inputs): a scalar, or (N,) for ``"none"``. With
        ``return_stats``, the pair (loss, `MarginStats`).

    Under ``torch.set_float32_matmul_precision("high")`` or ``"medium"`` a CPU with AMX multiplies
    float32 by three products of bfloat16, with sums in float32: cosines are then off by 2^-16 at
    most, and what gradients are sums of by as much of it. Under ``"highest"``, torch's default,
    products are of float32. The backward pass goes by the forward pass's setting. ``"triton"`` goes
    by torch's settings for TF32.

    A vector no longer than 1e-12 counts as zero: its cosines are 0 and its gradient is 0. At
    cos θ = ±1 the slope of the margin is finite, see `CombinedMargin`. A row with a non-finite
    element has a non-finite loss of its own. Gradients have their input's dtype.

    There is one derivative, in reverse mode: by autograd, or by `torch.func`'s grad, vjp and vmap
    (a loop), without ``group`` and ``update``. Second derivatives and forward mode raise.

    Memory above the inputs: forward O(N·(D + K)), buffers of at most 64 MiB, and ``workspace``,
    which is held until the backward pass; backward the gradients, with ``update`` the input's
    alone, and such buffers. Never N×C unless ``workspace`` allows it, except in
    ``impl="reference"``, which also holds the weight's gradient. With a group N is that of all
    ranks, and the embeddings of all of them, N·D, are held from forward to backward. On a CPU,
    memory of freed gradients is kept for the next, 512 MiB at most: see `empty_cache`.

    Raises:
        ValueError: for a wrong dtype, shape, device, label or weight. On a GPU labels and weights
            are checked there, by an asynchronous assertion.
        TypeError: for an argument of a wrong Python type.
        NotImplementedError: for what is not built yet, and for forward-mode derivatives.
        RuntimeError: for an ``impl`` that cannot run here, naming the reason; where a rank of the
            group has died; where the gradient is differentiated.

    Source: Deng et al., "ArcFace", CVPR 2019; Qiu et al., "SynFace", ICCV 2021, eqs. 1 and 5.
    """

    def prepare() -> tuple[str, Tensor, Tensor]:
        nonlocal update, class_start, workspace, ignore_index, label_smoothing
        class_start = integer("class_start", class_start, 0)
        workspace = integer("workspace", workspace, 0)
        ignore_index = integer("ignore_index", ignore_index, -(2**63))
        label_smoothing = number("label_smoothing", label_smoothing)
        _check(
            input,
            weight,
            target,
            margin,
            target_weight,
            mix,
            class_ids,
            label_smoothing,
            reduction,
        )
        if group is None:
            places, num_classes = class_ids, weight.shape[0]
        else:  # labels are numbers of classes, of all ranks'
            places, num_classes = None, sharded.ANY_CLASS
            if class_ids is not None:
                _check_class_ids(class_ids, weight.shape[0])
        labels, label_weight = torch.ops.synface_kernels.margin_cross_entropy_targets(
            target, target_weight, places, num_classes, ignore_index
        )
        if update is not None:
            update = fused.checked(update, input, weight, class_ids)
        return resolve(OP, impl, (input, weight)), labels, label_weight

    if update is not None and torch.compiler.is_compiling():
        raise NotImplementedError(
            "update cannot be compiled, for it writes in the backward pass: call the head outside "
            "of torch.compile, or in a function under torch.compiler.disable"
        )
    transformed = transforms_active()
    if transformed and (update is not None or group is not None):
        raise NotImplementedError(
            "update and group do not go with the transforms of torch.func: call "
            "torch.autograd.grad or loss.backward() outside of them"
        )
    check_tangents(OP, target_weight)
    shards = None
    if group is None:
        chosen, labels, label_weight = prepare()
        if class_start != 0:
            raise ValueError(f"class_start must be 0 without a group, got {class_start}")
    else:
        shards, chosen, labels, label_weight = sharded.agreed(
            prepare,
            input,
            weight,
            margin,
            class_ids,
            class_start,
            ignore_index,
            group,
            mix=mix,
            label_smoothing=label_smoothing,
            reduction=reduction,
            update=fused.facts(update),
        )
    if not torch.is_grad_enabled():
        update = None
    dtype = _statistics_dtype(input)
    if chosen == "reference" or update is not None:
        input = once(OP, input)
    if chosen == "reference":
        if update is None:
            weight = once(OP, weight)
        else:
            input, weight = fused.Reference.apply(fused.anchor(), input, weight, update)
        if class_ids is not None:
            weight = _TakenRows.apply(weight, class_ids)
        loss, lse, cosine, top1 = reference.margin_cross_entropy(
            input.to(dtype),
            weight.to(dtype),
            labels,
            label_weight.to(dtype),
            margin,
            mix,
            label_smoothing,
        )
    else:
        # What a transform of torch.func differentiates does not show from within another one.
        recorded = torch.is_grad_enabled()
        needs_input_grad = transformed or (recorded and input.requires_grad)
        needs_weight_grad = transformed or update is not None or (recorded and weight.requires_grad)
        halves = _halves_allowed()

        def core(input: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            arguments = (
                input,
                weight,
                class_ids,
                labels,
                margin.scale,
                margin.limit,
                needs_input_grad,
                label_smoothing > 0,
                workspace if needs_weight_grad else 0,
                halves,
                chosen,
            )
            if update is None:
                found = _forward(*arguments)
            else:
                found = _Updating.apply(fused.anchor(), *arguments, update)
            lse, most, cosine, filtered, cosine_sum, *_ = found
            sums = [cosine]  # what adds up over the shards of a group, side by side
            if margin.limit < math.inf:
                sums += [filtered[:, None]]
            if label_smoothing > 0:
                count = (weight if class_ids is None else class_ids).shape[0]
                sums += [cosine_sum[:, None], torch.full_like(cosine_sum, count)[:, None]]
            return lse, most, torch.cat(sums, 1)

        statistics = core if shards is None else partial(shards.statistics, core)
        negative_lse, negative_max, sums = statistics(input, labels)
        cosine, *others = sums.split([labels.shape[1]] + [1] * (sums.shape[1] - labels.shape[1]), 1)
        if margin.limit < math.inf and margin.interclass_filter_mode == "zero":
            negative_lse = _with_logits_of_zero(negative_lse, others[0].squeeze(1))
        loss, lse = _target_terms(
            cosine,
            negative_lse,
            labels,
            label_weight,
            margin,
            mix,
            label_smoothing,
            *(each.squeeze(1) for each in others if label_smoothing > 0),
        )
        best = torch.where(labels >= 0, cosine, -torch.inf).amax(1)
        top1 = (labels >= 0).any(1) & (best >= negative_max)

    result = loss
    if reduction != "none":
        result, counted = loss.sum(), (labels >= 0).any(1).sum()
        if shards is not None:
            result, counted = shards.totals(result, counted)
        if reduction == "mean":
            result = result / counted.clamp_min(1)
    result = result.to(dtype)
    if not return_stats:
        return result
    if target.dim() == 1:
        cosine = cosine.squeeze(1)
    elif target.shape[1] > 1:  # a label that stands twice was kept once
        same = target[:, :, None] == target[:, None, :]
        cosine = (same * cosine[:, None, :]).sum(2)
    return result, MarginStats(lse.to(dtype), cosine.to(dtype), top1)


def _with_logits_of_zero(negative_lse: Tensor, count: Tensor) -> Tensor:
    """The log-sum-exp (N,) with so many (N,) more logits, all 0."""
    safe = torch.where(count > 0, negative_lse, 0)  # no NaN where it is not taken
    return torch.where(count > 0, torch.logaddexp(safe, count.clamp_min(1).log()), negative_lse)


def _target_terms(
    cosine: Tensor,
    negative_lse: Tensor,
    labels: Tensor,
    label_weight: Tensor,
    margin: CombinedMargin,
    mix: str,
    label_smoothing: float = 0.0,
    cosine_sum: Tensor | None = None,
    num_classes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss (N,) and log-sum-exp (N,) from the targets' cosines (N, K) and the others' sum.

    In float64: these are N·K numbers, and a margin's slope is steep near cos θ = ±1. With
    label_smoothing: each row's sum of cosines (N,) over so many classes (N,).
    """
    present = labels >= 0
    # A row of NaN stands apart: its NaN · 0 would reach the centers when nobody asks for it.
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


@torch.compiler.assume_constant_result  # compiled anew where torch.set_float32_… changes it
def _halves_allowed() -> bool:
    """Whether float32 on a CPU may be multiplied as sums of two bfloat16: torch's setting, which
    `torch.set_float32_matmul_precision` sets to "tf32" for "high" and "bf16" for "medium".
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return matmul.fp32_precision in ("tf32", "bf16")


def _statistics_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _check_class_ids(class_ids: Tensor, num_classes: int) -> None:
    inside = (class_ids >= 0) & (class_ids < num_classes)
    require(inside, f"class_ids must be in [0, {num_classes})", class_ids)
    require(class_ids.diff() > 0, "class_ids must rise strictly", class_ids[1:])


def _check(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: CombinedMargin,
    target_weight: Tensor | None,
    mix: str,
    class_ids: Tensor | None,
    label_smoothing: float,
    reduction: str,
) -> None:
    for name, tensor in (("input", input), ("weight", weight), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {describe(tensor)}")
    if not isinstance(margin, CombinedMargin):
        raise TypeError(
            "margin must be an ArcFace, CosFace, SphereFace or CombinedMargin, "
            f"got {type(margin).__name__}"
        )
    allowed = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for name, tensor, dims, shape in (
        ("input", input, (2,), "(N, D)"),
        ("weight", weight, (2, 3), "(C, D) or (C, M, D)"),
    ):
        if tensor.dtype not in allowed or tensor.dim() not in dims:
            raise ValueError(
                f"{name} must be float32, bfloat16, float16 or float64 of shape {shape}, "
                f"got {describe(tensor)}"
            )
    if (input.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise ValueError(
            "input and weight must both be float64 or neither, "
            f"got input {describe(input)} and weight {describe(weight)}"
        )
    if input.shape[1] != weight.shape[-1] or input.shape[1] < 1:
        raise ValueError(
            "input (N, D) and weight (C, D) or (C, M, D) must have the same D ≥ 1, "
            f"got {describe(input)} and {describe(weight)}"
        )
    if weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(
            "weight (C, D) or (C, M, D) must have at least one class, and each class a center, "
            f"got {describe(weight)}"
        )
    n = input.shape[0]
    if target.dtype != torch.int64 or target.dim() not in (1, 2) or target.shape[0] != n:
        raise ValueError(
            f"target must be int64 of shape (N,) or (N, K) with N = {n} as in input, "
            f"got {describe(target)}"
        )
    if target.dim() == 2 and target.shape[1] < 1:
        raise ValueError(f"target (N, K) must have K ≥ 1, got {describe(target)}")
    if target.dim() == 2 and target_weight is None:
        raise ValueError(
            f"target_weight (N, K) is required with (N, K) targets: {describe(target)}"
        )
    if target_weight is not None:
        if not isinstance(target_weight, Tensor):
            raise TypeError(f"target_weight must be a tensor, got {describe(target_weight)}")
        if (
            target.dim() != 2
            or not target_weight.is_floating_point()
            or target_weight.shape != target.shape
        ):
            raise ValueError(
                "target_weight must be floating point of the shape of an (N, K) target, "
                f"got {describe(target_weight)} with target {describe(target)}"
            )
        if target_weight.requires_grad:
            raise ValueError("target_weight gets no gradient: pass target_weight.detach()")
    if class_ids is not None:
        if not isinstance(class_ids, Tensor):
            raise TypeError(f"class_ids must be a tensor, got {describe(class_ids)}")
        if class_ids.dtype != torch.int64 or class_ids.dim() != 1 or class_ids.shape[0] < 1:
            raise ValueError(
                f"class_ids must be int64 of shape (S,), S ≥ 1, got {describe(class_ids)}"
            )
    others = {
        "weight": weight,
        "target": target,
        "target_weight": target_weight,
        "class_ids": class_ids,
    }
    for name, other in others.items():
        if other is not None and other.device != input.device:
            raise ValueError(
                f"{name} must be on input's device {input.device}, got {describe(other)}"
            )
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if label_smoothing > 0 and margin.limit < math.inf:
        raise ValueError(
            "label_smoothing asks for every class what interclass_filter leaves out: give one of "
            f"them, got {label_smoothing} and {margin.interclass_filter}"
        )
    if label_smoothing > 0 and weight.dim() == 3:
        raise NotImplementedError(
            f"label_smoothing is not built for sub-centers, weight (C, M, D): {describe(weight)}"
        )
    if mix not in ("joint", "separate"):
        raise ValueError(f"mix must be 'joint' or 'separate', got {mix!r}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")


# ---- the targets: checked, repeated labels merged ----------------------------------------------


@torch.library.impl(library, f"{OP}_targets", "CompositeExplicitAutograd")
def _targets(
    target: Tensor,
    target_weight: Tensor | None,
    class_ids: Tensor | None,
    num_classes: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Labels (N, K), −1 where absent, and their float64 weights (N, K), 0 there.

    Absent are ignored labels and all but the first of equal labels in a row.
    """
    labels = target[:, None] if target_weight is None else target
    present = labels != ignore_index
    meaning = ""
    if class_ids is not None:
        _check_class_ids(class_ids, num_classes)
        num_classes = class_ids.shape[0]
        meaning = ", a place in class_ids, which must hold every label"
    valid = (target == ignore_index) | ((target >= 0) & (target < num_classes))
    classes = f"in [0, {num_classes})" if num_classes < sharded.ANY_CLASS else "at least 0"
    message = f"target must be {classes}{meaning}, or ignore_index ({ignore_index})"
    require(valid, message, target)
    if target_weight is None:
        weights = present.double()
    else:
        weights = target_weight.double()
        counted = present.any(1)
        valid = weights.isfinite() & (weights >= 0)
        require(valid | ~counted[:, None], "target_weight must be finite and ≥ 0", weights)
        total = torch.where(present, weights, 0).sum(1)
        tolerance = 1e-4 if target_weight.dtype in (torch.float32, torch.float64) else 2e-2
        require(
            ((total - 1).abs() <= tolerance) | ~counted,
            f"each row of target_weight must sum to 1 (±{tolerance:g}) over labels not ignored",
            total,
        )
        same = (labels[:, :, None] == labels[:, None, :]) & present[:, None, :]
        weights = (same * torch.where(present, weights, 0)[:, None, :]).sum(2)
        earlier = same.new_ones(same.shape[1:]).tril(-1)
        present = present & ~(same & earlier).any(2)
        weights = torch.where(present, weights, 0)
    return torch.where(present, labels, -1), weights


@torch.library.register_fake(f"synface_kernels::{OP}_targets")
def _targets_fake(
    target: Tensor,
    target_weight: Tensor | None,
    class_ids: Tensor | None,
    num_classes: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    shape = (target.shape[0], 1 if target_weight is None else target.shape[1])
    return target.new_empty(shape), target.new_empty(shape, dtype=torch.float64)


# ---- the core: one implementation per device, fake, autograd -----------------------------------


def _run(name: str, *arguments: Any) -> tuple[Tensor, ...]:
    """An op of the core: hands what its schema says to the implementation."""
    *inputs, impl = arguments
    if impl == "triton":  # keeps no cosines, and makes no halves
        from . import kernel_triton

        if name == "forward":
            outputs = kernel_triton.forward(*inputs[:-2])
            return *outputs, outputs[1].new_empty((0, outputs[1].shape[0]))
        return kernel_triton.backward(*inputs[:7], *inputs[8:-1])
    return getattr(torch.ops.synface_kernels, f"{OP}_{name}_cpu")(*inputs)


for _key in ("CPU", "CUDA"):
    for _name in ("forward", "backward"):
        library.impl(f"{OP}_{_name}", partial(_run, _name), _key)


@torch.library.register_fake(f"synface_kernels::{OP}_forward")
def _forward_fake(
    input: Tensor, weight: Tensor, class_ids: Tensor | None, labels: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    _, limit, needs_input_grad, needs_cosine_sum, workspace, _, impl = options
    n, d = input.shape
    new = input.new_empty
    dtype = _statistics_dtype(input)
    kept = 0
    if impl == "cpu":
        classes = (weight if class_ids is None else class_ids).shape[0]
        centers = math.prod(weight.shape[1:-1])  # of a class
        kept = centers * torch.sym_min(
            classes, workspace // torch.sym_max(1, centers * n * dtype.itemsize)
        )
    return (
        new((n,), dtype=torch.float64),
        new((n,), dtype=dtype),
        new(labels.shape, dtype=torch.float64),
        new((n if limit < math.inf else 0,), dtype=torch.float64),
        new((n if needs_cosine_sum else 0,), dtype=torch.float64),
        new((n, d) if needs_input_grad else (0,), dtype=dtype),
        new((d if needs_cosine_sum else 0,), dtype=torch.float64),
        new((kept, n), dtype=dtype),
    )


@torch.library.register_fake(f"synface_kernels::{OP}_backward")
def _backward_fake(
    input: Tensor, weight: Tensor, class_ids: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    *_, needs_input_grad, needs_weight_grad, _, _ = arguments
    rows = weight if class_ids is None else class_ids
    return (
        input.new_empty(input.shape if needs_input_grad else (0,)),
        weight.new_empty((rows.shape[0], *weight.shape[1:]) if needs_weight_grad else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, weight, class_ids, labels, ctx.scale, ctx.limit, _, _, _, ctx.halves, ctx.impl = inputs
    negative_lse, negative_max, _, filtered, _, *kept = output
    ctx.mark_non_differentiable(negative_max, filtered, *kept)
    ctx.set_materialize_grads(False)  # zeros as large as the workspace, which nobody reads
    ctx.save_for_backward(input, weight, class_ids, labels, negative_lse, *kept)


def _upstream(saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The gradients that the backward ops take, of those of the forward op's outputs."""
    labels, negative_lse, _, center_sum, _ = saved
    zeros = negative_lse.new_zeros
    grad_lse, _, grad_cosine, _, grad_sum, *_ = grads
    return (
        zeros(negative_lse.shape) if grad_lse is None else grad_lse,
        zeros(labels.shape) if grad_cosine is None else grad_cosine,
        zeros(len(labels) if len(center_sum) else 0) if grad_sum is None else grad_sum,
    )


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    input, weight, class_ids, *saved = ctx.saved_tensors
    needs_input_grad, needs_weight_grad = ctx.needs_input_grad[:2]
    grad_input, grad_rows = _backward(
        input,
        weight,
        class_ids,
        *saved,
        *_upstream(saved, grads),
        ctx.scale,
        ctx.limit,
        needs_input_grad,
        needs_weight_grad,
        ctx.halves,
        ctx.impl,
    )
    grad_weight = grad_rows if needs_weight_grad else None
    if needs_weight_grad and class_ids is not None:
        grad_weight = _scattered(class_ids, grad_rows, weight.shape)
    return (grad_input if needs_input_grad else None, grad_weight, *[None] * 9)


class _Updating(torch.autograd.Function):
    """The op margin_cross_entropy_forward, whose backward pass takes an update's step.

    apply(anchor, *arguments of the op, update)
    """

    @staticmethod
    def forward(ctx: Any, _: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *inputs, ctx.update = arguments
        output = torch.ops.synface_kernels.margin_cross_entropy_forward(*inputs)
        _setup_context(ctx, tuple(inputs), output)
        # What is saved might be moved elsewhere; it is this very tensor that is to be written.
        ctx.weight, ctx.version = inputs[1], inputs[1]._version
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        fused.check_unmoved(ctx.weight, ctx.version)
        input, _, class_ids, *saved = ctx.saved_tensors
        needs_input_grad = ctx.needs_input_grad[1]
        grad_input = torch.ops.synface_kernels.margin_cross_entropy_update(
            input,
            ctx.weight,
            class_ids,
            *saved,
            *_upstream(saved, grads),
            ctx.scale,
            ctx.limit,
            needs_input_grad,
            ctx.halves,
            *fused.arguments(ctx.update),
            ctx.impl,
        )
        return None, grad_input if needs_input_grad else None, *[None] * 11


def _scattered(class_ids: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """A gradient that is zero but for the rows class_ids, which were checked: sparse, but dense in
    compiled graphs and torch.func, for Inductor's passes and vmap stop at sparse tensors.
    """
    if torch.compiler.is_compiling() or transforms_active():
        return rows.new_zeros(shape).index_copy(0, class_ids, rows)
    return torch.sparse_coo_tensor(
        class_ids[None], rows, shape, device=rows.device, is_coalesced=True, check_invariants=False
    )


class _TakenRows(torch.autograd.Function):
    """weight[class_ids] with the kernels' sparse gradient, for the reference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, class_ids: Tensor) -> Tensor:
        return weight.index_select(0, class_ids)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        weight, class_ids = inputs
        ctx.save_for_backward(class_ids)
        ctx.shape = weight.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _scattered(ctx.saved_tensors[0], grad, ctx.shape), None


_forward = register_autograd(f"{OP}_forward", OP, _autograd, _setup_context)
_backward = register_autograd(f"{OP}_backward", OP)
