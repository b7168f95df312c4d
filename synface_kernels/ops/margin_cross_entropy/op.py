"""The public function of the margin softmax."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..._autocast import gemm_dtype, suspended
from ..._check import integer, number
from ..._derivatives import apply, check_tangents, once, transforms_active
from ..._select import always, needs_cpu_extension, needs_triton, register, resolve
from ..row_update.updates import AdamWUpdate, SGDUpdate
from . import core, reference, sharded, targets
from . import update as fused
from .checks import check_arguments, check_class_ids, checked_workspace
from .interface import ForwardInputs, Prepared, Statistics, statistics_dtype
from .margins import RANGES, ArcFace, CombinedMargin

OP = "margin_cross_entropy"
_ARCFACE = ArcFace()


def _design(dtypes: Sequence[torch.dtype]) -> str:
    """Return what `explain` says of the Triton kernels' design for such tensors."""
    from .config_triton import DESIGN_VARIABLE, choose_gemms

    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    gemms = choose_gemms(dtypes[0], dtypes[-1], autocast)
    return f"the {gemms.design} design, which {DESIGN_VARIABLE} overrides"


register(
    OP,
    {"cpu": needs_cpu_extension, "triton": needs_triton, "reference": always},
    {"triton": _design},
)


class MarginStats(NamedTuple):
    """Statistics of a training step beside the loss.

    Attributes:
        lse: (N,) log-sum-exp of the logits, margins included; differentiable (z-loss). With
            ``mix="separate"``, the mean over the labels by their weights.
        target_cosine: (N,), or (N, K) for (N, K) targets: plain cosine with the target's center;
            differentiable; 0 where ignored.
        top1: (N,) bool: no other class has a higher plain cosine than the (best) target,
            those filtered by the margin's ``interclass_filter`` aside. Its mean is the training
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
    workspace: int | Literal["auto"] = "auto",
    impl: str = "auto",
) -> Any:
    """Compute the cross entropy of a margin softmax over cosines of embeddings and class centers.

    With cos_ij = ⟨x_i, w_j⟩/(‖x_i‖·‖w_j‖), margin ψ, scale s, and t_ij ≥ 0 the weight of label j in
    row i (Σ_j t_ij = 1):

    - ``mix="joint"``: z_ij = s·(cos_ij + t_ij·(ψ(cos_ij) − cos_ij)),
      L_i = −Σ_j t_ij·log softmax(z_i)_j. SynFace's loss of mixed identities and domains.
    - ``mix="separate"``: L_i = Σ_k t_ik·CE_ik, where CE_ik has label k as its only target.

    With one label per row both are the usual margin softmax. With ``label_smoothing`` ε, the
    weights of the logarithms (t, or 1 for label k of CE_ik) become (1 − ε)·t_ij + ε/C, as torch has
    it, on logits with margins. The margin's ``interclass_filter`` removes classes from the softmax.

    Args:
        input: (N, D) embeddings: float32, bfloat16 or float16 (computed in float32), or float64
            together with ``weight``. They need not be normalized nor contiguous.
        weight: (C, D) class centers, likewise; C ≥ 1. Or (C, M, D), M sub-centers for each class:
            its cosine is their maximum (the first of equals), which receives the gradient.
        target: (N,) int64 labels in [0, C), or (N, K) for K labels per row. A label that
            occurs twice in a row counts once, with the sum of its weights. With ``class_ids``,
            labels are indices into it, in [0, S).
        margin: an `ArcFace` (the default), `CosFace`, `SphereFace` or `CombinedMargin`. Angles are
            in radians.
        target_weight: (N, K) weights of (N, K) targets, ≥ 0, each row summing to 1; no gradient.
        mix: how several labels per row combine, see above.
        class_ids: (S,) int64, strictly increasing: the rows of weight used in this step, as if
            there were no others. They must include every label; `sample_classes` returns them,
            and the target as indices into them. Rows are read in place, not gathered. Weight's
            gradient then is a coalesced sparse COO tensor of weight's shape with S rows: indices
            ``class_ids``, values (S, D), which `torch.optim.SGD` takes as it is, and `row_sgd_` as
            ids and values. (``weight.grad`` loses torch's mark that it is coalesced; the result of
            `torch.autograd.grad` has it.) Under torch.compile, which cannot hold sparse tensors,
            the gradient is dense: C·D numbers, zero outside of those rows. With a group:
            rows of this rank's weight, which must include the labels of all ranks that are among
            its classes (see `sample_classes`); all ranks give class_ids, or none, and the target
            remains in [0, C).
        label_smoothing: ε in [0, 1), see above; C is the number of classes used. Neither with
            sub-centers nor with an ``interclass_filter``.
        group: a `torch.distributed` process group whose ranks each hold some of the classes, and
            a batch of their own: ``weight`` is (C_r, D), ``input`` (N_r, D), ``target`` is in
            [0, C), C = Σ C_r, N = Σ N_r. N_r may differ, and be 0; so may C_r ≥ 1. The loss and
            the gradients are those of one process that has all rows and all classes:
            ``"mean"`` and ``"sum"`` are over all ranks' rows and the same number on all ranks,
            ``"none"`` and the statistics are of the rank's own rows. All ranks must call this, and
            run its backward pass, or none. If one rank's argument is wrong, all raise its error.
            Not with ``impl="reference"``, nor inside `torch.compile`. docs/sharding.md lists the
            collectives, and the factor that a backbone in `DistributedDataParallel` needs.
        class_start: the first of this rank's classes. The ranks' classes must cover [0, C) without
            a hole or an overlap.
        update: an `SGDUpdate` or `AdamWUpdate`: the backward pass takes this step on ``weight``,
            in place, and only a tile of the weight's gradient is stored. Centers and states get the
            same bits as by `row_sgd_` or `row_adamw_` with the gradient
            (and with ``class_ids``, if given). Weight must not require grad, and be float32,
            bfloat16 or float64. Each forward pass has one backward pass, before the next: so
            gradients can be neither accumulated, clipped nor inspected before the step.
            A factor of the loss, as of `torch.amp.GradScaler`, is one of the centers' gradient; a
            step cannot be skipped afterwards. Under no_grad there is no step. With a group each
            rank passes the same rule, hyperparameters and step, with its own rows' states and,
            where they round stochastically, a seed of its own or none. Not inside `torch.compile`.
        ignore_index: a label to leave out. A valid row has other labels, beside which this one must
            have weight 0. Rows that are not valid are skipped: loss 0, gradient 0.
        reduction: ``"mean"`` over the valid rows (0 if there is none), ``"sum"``, ``"none"``.
        return_stats: also return `MarginStats`.
        workspace: memory in which the forward pass may save cosines for the backward pass, which
            then does not recompute them: with all of them a step is three GEMMs, not four.
            ``"auto"``: that of weight's gradient, which is allocated early: each center's row of
            D numbers takes the cosines of min(N, 512, D) embeddings, min(N, 512, D/2) where weight
            has 16 bits. Or a number of bytes, ≥ 0, for the cosines of as many classes as fit, 4·N
            (8·N for float64) per center; this is faster where N is larger than such a row. The
            result has the same bits. Without effect where weight needs no gradient, and for
            ``"triton"`` and ``"reference"``. ``"auto"`` has none where it would add to the peak of
            memory: if weight has a gradient already (clear it before the forward pass), or an
            earlier loss of the same weight waits for its backward pass; nor with ``update``, inside
            `torch.compile`, the transforms of `torch.func` and saved-tensor hooks (activation
            checkpointing), and where fewer than an eighth of the embeddings would fit. With a
            group: each rank's own, where N is that of all ranks.
        impl: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"``; see `explain`.

    Returns:
        The loss, float32 (float64 for float64 inputs): a scalar, or (N,) for ``"none"``. With
        ``return_stats``, the pair (loss, `MarginStats`).

    Under ``torch.set_float32_matmul_precision("high")`` or ``"medium"`` a CPU with AMX multiplies
    float32 by three bfloat16 GEMMs, accumulated in float32: cosines are then off by 2^-16 at most,
    and each term of a gradient by that, relatively. Under ``"highest"``, torch's default, GEMMs are
    float32. The backward pass uses the forward pass's setting. ``"triton"`` follows torch's
    settings for TF32.

    Under `torch.autocast` GEMMs are in its dtype, bfloat16 or float16, unless the tensors are
    float64. A matrix of another dtype is normalized in float32 and rounded, as autocast makes of
    ``F.linear(F.normalize(input), F.normalize(weight))``; one of that dtype is multiplied as it is.
    Sums, logits and the labels' own cosines are as without autocast, but for label smoothing's sum
    of cosines in ``"triton"``, which is of the rounded ones. The backward pass uses the forward
    pass's dtype.

    A vector no longer than 1e-12 counts as zero: its cosines are 0 and its gradient is 0. At
    cos θ = ±1 the slope of the margin is finite, see `CombinedMargin`. A row with a non-finite
    element has a non-finite loss of its own. Gradients have their input's dtype.

    There is one derivative, in reverse mode: by autograd, or by `torch.func`'s grad, vjp and vmap
    (a loop), without ``group`` and ``update``. Second derivatives and forward mode raise.

    Memory above the inputs: forward O(N·(D + K)), buffers of at most 64 MiB (80 MiB for
    ``"triton"``), and ``workspace`` (``"auto"``: weight's gradient), which is held until the
    backward pass; backward the gradients (with ``update`` only the input's) and such buffers. Never
    N×C unless ``workspace`` allows it, except in ``impl="reference"``, which also holds the
    weight's gradient. With a group N is that of all ranks, and the embeddings of all of them, N·D,
    are held from forward to backward. On a CPU, gradients come from a caching allocator: see
    `empty_cache`.

    Raises:
        ValueError: for a wrong dtype, shape, device, label or weight, or another dtype of autocast.
            On a GPU labels and weights are checked there, by an asynchronous assertion.
        TypeError: for an argument of a wrong Python type.
        NotImplementedError: for combinations that are not built, and forward-mode derivatives.
        RuntimeError: for an ``impl`` that cannot run here, naming the reason; where a rank of the
            group has died; where the gradient is differentiated.

    Source: Deng et al., "ArcFace", CVPR 2019; Qiu et al., "SynFace", ICCV 2021, eqs. 1 and 5.
    """

    def prepare() -> Prepared:
        nonlocal update, class_start, workspace, ignore_index, label_smoothing
        class_start = integer("class_start", class_start, 0)
        workspace = checked_workspace(workspace)
        ignore_index = integer("ignore_index", ignore_index, -(2**63))
        label_smoothing = number("label_smoothing", label_smoothing)
        check_arguments(
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
            indexed, num_classes = class_ids, weight.shape[0]
        else:  # labels are numbers of classes, of all ranks'
            indexed, num_classes = None, targets.ANY_CLASS
            if class_ids is not None:
                check_class_ids(class_ids, weight.shape[0])
        # Within a transform of torch.func, the op could not see values.
        tensors = {} if transformed else margin.tensors()
        margins = [tensors[name].detach() if name in tensors else None for name in RANGES]
        labels, label_weight = torch.ops.synface_kernels.margin_cross_entropy_targets(
            target, target_weight, indexed, num_classes, ignore_index, *margins
        )
        if update is not None:
            update = fused.checked(update, input, weight, class_ids)
        return Prepared(resolve(OP, impl, (input, weight)), labels, label_weight, gemm_dtype(input))

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
        prepared = prepare()
        if class_start != 0:
            raise ValueError(f"class_start must be 0 without a group, got {class_start}")
    else:
        shards, prepared = sharded.prepare_on_all_ranks(
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
            update=fused.must_match(update),
        )
    chosen, labels, label_weight, autocast = prepared
    if not torch.is_grad_enabled():
        update = None
    dtype = statistics_dtype(input)
    if chosen == "reference" or update is not None:
        input = once(OP, input)
    with suspended(labels.device):
        if chosen == "reference":
            if update is None:
                weight = once(OP, weight)
            else:
                input, weight = fused.Reference.apply(fused.grad_anchor(), input, weight, update)
            if class_ids is not None:
                weight = apply(core.SelectRows, weight, class_ids)
            loss, lse, cosine, top1 = reference.margin_cross_entropy(
                input.to(dtype),
                weight.to(dtype),
                labels,
                label_weight.to(dtype),
                margin,
                mix,
                label_smoothing,
                (
                    None if input.dtype == autocast else autocast,
                    None if weight.dtype == autocast else autocast,
                ),
            )
        else:
            # Within a transform of torch.func, requires_grad does not show what an outer one
            # differentiates.
            recorded = torch.is_grad_enabled()
            needs_input_grad = transformed or (recorded and input.requires_grad)
            needs_weight_grad = (
                transformed or update is not None or (recorded and weight.requires_grad)
            )

            def of_rows(input: Tensor, labels: Tensor) -> Statistics:
                return core.statistics(
                    ForwardInputs(
                        input=input,
                        weight=weight,
                        class_ids=class_ids,
                        labels=labels,
                        scale=margin.scale,
                        limit=margin.limit,
                        needs_input_grad=needs_input_grad,
                        needs_cosine_sum=label_smoothing > 0,
                    ),
                    workspace if needs_weight_grad else 0,
                    chosen,
                    update,
                    autocast,
                )

            compute = of_rows if shards is None else partial(shards.statistics, of_rows)
            statistics = compute(input, labels)
            loss, lse = targets.losses(
                statistics, labels, label_weight, margin, mix, label_smoothing
            )
            cosine, top1 = statistics.target_cosine, targets.hits(statistics, labels)

    result = loss
    if reduction != "none":
        result, valid_rows = loss.sum(), (labels >= 0).any(1).sum()
        if shards is not None:
            result, valid_rows = shards.totals(result, valid_rows)
        if reduction == "mean":
            result = result / valid_rows.clamp_min(1)
    result = result.to(dtype)
    if not return_stats:
        return result
    cosine = targets.in_targets_shape(cosine, target)
    return result, MarginStats(lse.to(dtype), cosine.to(dtype), top1)
