"""The core of the margin softmax: custom ops that never hold N×C, and their autograd.

It knows plain cosines and the classes that are not targets, so each implementation of it serves
every margin; `targets` adds the rest.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import MutableMapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from ..._autocast import suspended
from ..._derivatives import register, transforms_active
from ..._load import library
from ..._precision import may_split_bf16
from ..row_update.updates import RowUpdate
from . import update as fused
from .interface import (
    BackwardInputs,
    ForwardInputs,
    ForwardOutputs,
    Statistics,
    count_classes,
    split_backward,
    split_forward,
    statistics_dtype,
)

OP = "margin_cross_entropy"
_FORWARD = (
    "(Tensor input, Tensor weight, Tensor? class_ids, Tensor labels, float scale, float limit, "
    "bool needs_input_grad, bool needs_cosine_sum, SymInt workspace, "
    "bool halves{impl}, ScalarType? gemm_dtype=None) -> ("
    "Tensor negative_lse, Tensor negative_max, Tensor target_cosine, Tensor filtered, "
    "Tensor cosine_sum, Tensor mean_center, Tensor center_sum, Tensor kept)"
)
_BACKWARD = (
    "(Tensor input, Tensor weight, Tensor? class_ids, Tensor labels, Tensor negative_lse, "
    "Tensor mean_center, Tensor center_sum, Tensor kept, Tensor grad_negative_lse, "
    "Tensor grad_target_cosine, Tensor grad_cosine_sum, float scale, float limit, "
    "bool needs_input_grad, bool needs_weight_grad, bool halves{impl}, "
    "ScalarType? gemm_dtype=None) -> ("
    "Tensor grad_input, Tensor grad_rows)"
)
# The same with the cosines in the memory of the centers' gradient, which it writes over them.
_BACKWARD_OVER = (
    _BACKWARD.replace("Tensor kept", "Tensor(a!) saved")
    .replace("bool needs_weight_grad, ", "")
    .replace("(Tensor grad_input, Tensor grad_rows)", "Tensor grad_input")
)
IN_GRADIENT = -1  # a workspace in that memory
for _name, _schema in (
    (f"{OP}_forward", _FORWARD),
    (f"{OP}_backward", _BACKWARD),
    (f"{OP}_backward_over", _BACKWARD_OVER),
):
    library.define(_name + _schema.format(impl=", str impl"))
    library.define(_name + "_cpu" + _schema.format(impl=""))  # implemented in C++


def statistics(
    inputs: ForwardInputs,
    workspace: int | Literal["auto"],
    impl: str,
    update: RowUpdate | None,
    gemm_dtype: torch.dtype | None = None,
) -> Statistics:
    """Return differentiable statistics of the rows; with an update, backward takes its step.

    The GEMMs of both passes are in ``gemm_dtype``; None: as the tensors' dtypes have it.
    """
    if workspace == "auto":
        early = update is None and impl == "cpu" and _may_allocate_gradient(inputs)
        workspace = IN_GRADIENT if early else 0
    arguments = (*inputs, workspace, may_split_bf16(), impl, gemm_dtype)
    if update is not None:
        found = ForwardOutputs(*_Updating.apply(fused.grad_anchor(), *arguments, update))
    elif workspace == IN_GRADIENT:
        found = ForwardOutputs(*_SavingInGradient.apply(*arguments))
    else:
        found = ForwardOutputs(*_forward(*arguments))
    common = found.negative_lse, found.negative_max, found.target_cosine
    filtered = found.filtered if inputs.limit < math.inf else None
    if not inputs.needs_cosine_sum:
        return Statistics(*common, filtered)
    count = count_classes(inputs.weight, inputs.class_ids)
    return Statistics(*common, filtered, found.cosine_sum, torch.full_like(found.cosine_sum, count))


def _may_allocate_gradient(inputs: ForwardInputs) -> bool:
    """Return whether the forward pass may allocate the centers' gradient, and gains by it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms_active():
        return False
    input, weight = inputs.input, inputs.weight
    plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in (input, weight))
    # Saved-tensor hooks free what a forward pass holds, as activation checkpointing does.
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    if not plain or hooked or forward_ad._current_level >= 0:
        return False
    # Else two gradients of the centers would be in memory, until this or the other one is used.
    before = _gradients_ahead.get(weight)
    if (weight.is_leaf and weight.grad is not None) or (before is not None and before()):
        return False
    fit, rest = divmod(weight.shape[-1] * weight.element_size(), statistics_dtype(input).itemsize)
    return rest == 0 and 8 * fit >= len(input)


# ---- the ops: one implementation per device, fake ------------------------------------------------


def _run_forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (*cpu_options, impl, gemm_dtype) = split_forward(arguments)
    if impl == "triton":  # saves no cosines, and splits no bf16
        from . import launch_triton

        with suspended(inputs.input.device):
            return launch_triton.forward(inputs, gemm_dtype=gemm_dtype)
    return torch.ops.synface_kernels.margin_cross_entropy_forward_cpu(
        *inputs, *cpu_options, gemm_dtype
    )


def _run_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, (needs_weight_grad, split_bf16, impl, gemm_dtype) = split_backward(arguments)
    if impl == "triton":
        from . import launch_triton

        with suspended(inputs.input.device):
            return launch_triton.backward(inputs, needs_weight_grad, gemm_dtype=gemm_dtype)
    return torch.ops.synface_kernels.margin_cross_entropy_backward_cpu(
        *inputs, needs_weight_grad, split_bf16, gemm_dtype
    )


def _run_backward_over(*arguments: Any) -> Tensor:
    inputs, (split_bf16, _, gemm_dtype) = split_backward(arguments, 3)
    return torch.ops.synface_kernels.margin_cross_entropy_backward_over_cpu(
        *inputs, split_bf16, gemm_dtype
    )


library.impl(f"{OP}_backward_over", _run_backward_over, "CPU")
for _key in ("CPU", "CUDA"):
    library.impl(f"{OP}_forward", _run_forward, _key)
    library.impl(f"{OP}_backward", _run_backward, _key)


@torch.library.register_fake(f"synface_kernels::{OP}_forward")
def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (workspace, _, impl, _) = split_forward(arguments)
    n, d = inputs.input.shape
    new, dtype = inputs.input.new_empty, statistics_dtype(inputs.input)
    cpu, count = impl == "cpu", count_classes(inputs.weight, inputs.class_ids)
    centers = math.prod(inputs.weight.shape[1:-1])  # of a class
    if cpu and workspace == IN_GRADIENT:
        saved = inputs.weight.new_empty((count, *inputs.weight.shape[1:]))
    elif cpu:
        classes = torch.sym_min(count, workspace // torch.sym_max(1, centers * n * dtype.itemsize))
        saved = new((centers * classes, n), dtype=dtype)
    else:
        saved = new((centers * count,), dtype=dtype)
    return ForwardOutputs(
        negative_lse=new((n,), dtype=torch.float64),
        negative_max=new((n,), dtype=dtype),
        target_cosine=new(inputs.labels.shape, dtype=torch.float64),
        filtered=new((n if inputs.limit < math.inf else 0,), dtype=torch.float64),
        cosine_sum=new((n if inputs.needs_cosine_sum else 0,), dtype=torch.float64),
        mean_center=new((n, d) if cpu and inputs.needs_input_grad else (0,), dtype=dtype),
        center_sum=new((d if cpu and inputs.needs_cosine_sum else 0,), dtype=torch.float64),
        saved=saved,
    )


@torch.library.register_fake(f"synface_kernels::{OP}_backward")
def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, (needs_weight_grad, *_) = split_backward(arguments)
    input, weight = inputs.input, inputs.weight
    count = count_classes(weight, inputs.class_ids)
    return (
        input.new_empty(input.shape if inputs.needs_input_grad else (0,)),
        weight.new_empty((count, *weight.shape[1:]) if needs_weight_grad else (0,)),
    )


@torch.library.register_fake(f"synface_kernels::{OP}_backward_over")
def _backward_over_fake(*arguments: Any) -> Tensor:
    inputs, _ = split_backward(arguments, 3)
    return inputs.input.new_empty(inputs.input.shape if inputs.needs_input_grad else (0,))


# ---- autograd ------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    given, (_, ctx.split_bf16, ctx.impl, ctx.gemm_dtype) = split_forward(inputs)
    found = ForwardOutputs(*output)
    for_backward = found.mean_center, found.center_sum, found.saved
    ctx.mark_non_differentiable(found.negative_max, found.filtered, *for_backward)
    ctx.set_materialize_grads(False)  # else zeros as large as the workspace, read by nobody
    ctx.scale, ctx.limit, ctx.has_cosine_sum = given.scale, given.limit, given.needs_cosine_sum
    ctx.save_for_backward(
        given.input, given.weight, given.class_ids, given.labels, found.negative_lse,
        *for_backward,
    )  # fmt: skip


def _backward_inputs(
    ctx: Any, grads: Sequence[Tensor | None], needs_input_grad: bool
) -> BackwardInputs:
    """Return a backward op's arguments: what `_setup_context` saved, and the outputs' gradients."""
    (
        input, weight, class_ids, labels, negative_lse, mean_center, center_sum, saved
    ) = ctx.saved_tensors  # fmt: skip
    by = ForwardOutputs(*grads)  # type: ignore[arg-type]
    zeros = negative_lse.new_zeros

    def or_zeros(grad: Tensor | None, *shape: int) -> Tensor:
        return zeros(shape) if grad is None else grad

    return BackwardInputs(
        input=input,
        weight=weight,
        class_ids=class_ids,
        labels=labels,
        negative_lse=negative_lse,
        mean_center=mean_center,
        center_sum=center_sum,
        saved=saved,
        grad_negative_lse=or_zeros(by.negative_lse, *negative_lse.shape),
        grad_target_cosine=or_zeros(by.target_cosine, *labels.shape),
        grad_cosine_sum=or_zeros(by.cosine_sum, len(labels) if ctx.has_cosine_sum else 0),
        scale=ctx.scale,
        limit=ctx.limit,
        needs_input_grad=needs_input_grad,
    )


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    needs_input_grad, needs_weight_grad, *_ = ctx.needs_input_grad
    inputs = _backward_inputs(ctx, grads, needs_input_grad)
    grad_input, grad_rows = _backward(
        *inputs, needs_weight_grad, ctx.split_bf16, ctx.impl, ctx.gemm_dtype
    )
    return _gradients(ctx, inputs, grad_input, grad_rows)


def _gradients(
    ctx: Any, inputs: BackwardInputs, grad_input: Tensor, grad_rows: Tensor
) -> tuple[Any, ...]:
    """Return the gradients of the forward op's arguments."""
    needs_input_grad, needs_weight_grad, *others = ctx.needs_input_grad
    grad_weight = grad_rows if needs_weight_grad else None
    if needs_weight_grad and inputs.class_ids is not None:
        grad_weight = _scattered(inputs.class_ids, grad_rows, inputs.weight.shape)
    return grad_input if needs_input_grad else None, grad_weight, *[None] * len(others)


class _GradientAhead(dict[str, Tensor]):
    """Holds the gradient of some centers between a forward and a backward pass, or is empty."""


# Of centers, where the gradient of a forward pass was allocated.
_gradients_ahead: MutableMapping[Tensor, weakref.ref[_GradientAhead]] = WeakIdKeyDictionary()


class _SavingInGradient(torch.autograd.Function):
    """Calls the op margin_cross_entropy_forward with cosines in the memory of weight's gradient.

    apply(*arguments of the op, with the workspace IN_GRADIENT). The first backward pass reads them
    and returns that memory as the gradient; further ones compute the cosines again.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        output = ForwardOutputs(*torch.ops.synface_kernels.margin_cross_entropy_forward(*arguments))
        # Not among the saved tensors: another reference would make autograd copy the gradient.
        ctx.ahead = _GradientAhead(rows=output.saved)
        given, _ = split_forward(arguments)
        _gradients_ahead[given.weight] = weakref.ref(ctx.ahead)
        output = output._replace(saved=output.mean_center.new_empty((0, len(given.input))))
        _setup_context(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        rows = ctx.ahead.pop("rows", None)
        # With create_graph, in a batch of gradients and in a trace the op must be functional.
        traced = torch.is_grad_enabled() or torch.compiler.is_compiling() or transforms_active()
        batched = any(grad is not None and is_legacy_batchedtensor(grad) for grad in grads)
        if rows is None or traced or batched:
            del rows
            return _autograd(ctx, *grads)
        inputs = _backward_inputs(ctx, grads, ctx.needs_input_grad[0])._replace(saved=rows)
        grad_input = torch.ops.synface_kernels.margin_cross_entropy_backward_over(
            *inputs, ctx.split_bf16, ctx.impl, ctx.gemm_dtype
        )
        return _gradients(ctx, inputs, grad_input, rows)


class _Updating(torch.autograd.Function):
    """The op margin_cross_entropy_forward, whose backward pass takes an update's step.

    apply(grad_anchor, *arguments of the op, update)
    """

    @staticmethod
    def forward(ctx: Any, _: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *inputs, ctx.update = arguments
        output = torch.ops.synface_kernels.margin_cross_entropy_forward(*inputs)
        _setup_context(ctx, inputs, output)
        # Saved-tensor hooks may return a copy; the step must write this very tensor.
        ctx.weight = split_forward(inputs)[0].weight
        ctx.version = ctx.weight._version
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        fused.check_unmoved(ctx.weight, ctx.version)
        _, needs_input_grad, *others = ctx.needs_input_grad
        inputs = _backward_inputs(ctx, grads, needs_input_grad)._replace(weight=ctx.weight)
        grad_input = torch.ops.synface_kernels.margin_cross_entropy_update(
            *inputs, ctx.split_bf16, *fused.optimizer_step(ctx.update), ctx.impl, ctx.gemm_dtype
        )
        return None, grad_input if needs_input_grad else None, *[None] * len(others)


def _scattered(class_ids: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """Return a gradient that is zero outside of the rows class_ids, which were checked.

    It is sparse, but dense in compiled graphs and torch.func, as Inductor and vmap do not support
    sparse tensors.
    """
    if torch.compiler.is_compiling() or transforms_active():
        return rows.new_zeros(shape).index_copy(0, class_ids, rows)
    return torch.sparse_coo_tensor(
        class_ids[None], rows, shape, device=rows.device, is_coalesced=True, check_invariants=False
    )


class SelectRows(torch.autograd.Function):
    """The rows weight[class_ids], with the kernels' sparse gradient, for the reference."""

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


_forward = register(f"{OP}_forward", OP, _autograd, _setup_context)
_backward = register(f"{OP}_backward", OP)
