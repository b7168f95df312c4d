"""The margin softmax whose backward pass applies the optimizer to the centers.

The gradient of the centers is computed a tile of classes at a time, and the row
update uses each tile at once, so the whole gradient is never stored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from ..._autocast import suspended
from ..._check import describe, is_dense, require_apart
from ..._load import library
from ..row_update.op import check_last_step, check_states, mark_written, take_step
from ..row_update.updates import AdamWUpdate, RowUpdate, SGDUpdate, most_missed
from .interface import OptimizerStep, split_update

OP = "margin_cross_entropy_update"
_SCHEMA = (
    "(Tensor input, Tensor(a!) weight, Tensor? class_ids, Tensor labels, Tensor negative_lse, "
    "Tensor mean_center, Tensor center_sum, Tensor kept, Tensor grad_negative_lse, "
    "Tensor grad_target_cosine, Tensor grad_cosine_sum, float scale, float limit, "
    "bool needs_input_grad, bool halves, str rule, Tensor(b!)[] states, Tensor(c!)? last_step, "
    "float[] numbers, int step, int? seed{impl}, ScalarType? gemm_dtype=None) -> Tensor grad_input"
)
library.define(OP + _SCHEMA.format(impl=", str impl"))
library.define(f"{OP}_cpu" + _SCHEMA.format(impl=""))  # implemented in C++
_ARGUMENTS = torch.ops.synface_kernels.margin_cross_entropy_update.default._schema.arguments


def _run(*arguments: Any) -> Tensor:
    inputs, step, (split_bf16, impl, gemm_dtype) = split_update(arguments)
    if impl == "triton":
        from . import launch_triton

        with suspended(inputs.input.device):
            return launch_triton.update(inputs, step, gemm_dtype=gemm_dtype)
    return torch.ops.synface_kernels.margin_cross_entropy_update_cpu(
        *inputs, split_bf16, *step, gemm_dtype
    )


def _mark_written(keys: Any, *arguments: Any) -> Tensor:
    written = [
        value
        for argument, value in zip(_ARGUMENTS, arguments, strict=False)  # without trailing defaults
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return mark_written(OP, tree_leaves(written), keys, *arguments)


for _key in ("CPU", "CUDA"):
    library.impl(OP, _run, _key)
library.impl(OP, _mark_written, "ADInplaceOrView", with_keyset=True)


@torch.library.register_fake(f"synface_kernels::{OP}")
def _fake(*arguments: Any) -> Tensor:
    inputs, *_ = split_update(arguments)
    return inputs.input.new_empty(inputs.input.shape if inputs.needs_input_grad else (0,))


# ---- checks --------------------------------------------------------------------------------------


def checked(
    update: RowUpdate, input: Tensor, weight: Tensor, class_ids: Tensor | None
) -> RowUpdate:
    """Return the update with its states as matrices, one row per class.

    Raises:
        TypeError, ValueError: where update and weight do not fit together.
    """
    if not isinstance(update, (SGDUpdate, AdamWUpdate)):
        raise TypeError(f"update must be an SGDUpdate or AdamWUpdate, got {describe(update)}")
    if weight.requires_grad:
        raise ValueError(
            "weight must not require grad with update, which takes the place of its gradient: "
            "call weight.requires_grad_(False)"
        )
    states = {name: _matrix(name, state) for name, state in update.states.items()}
    update = replace(update, **states)
    rows = _matrix("weight", weight)
    check_states(update, rows)
    require_apart(
        {"weight": rows, **update.states, "last_step": update.last_step},
        {"input": input, "class_ids": class_ids},
    )
    if update.last_step is not None and update.step is not None:
        last = update.last_step
        if class_ids is not None:
            last = last.index_select(0, class_ids)
        most = most_missed(update.rule, update.numbers, weight.dtype)
        check_last_step(last, update.step - 1, update.step, most)
    return update


def _matrix(name: str, tensor: Any) -> Any:
    """Return a 3-d tensor as a matrix, one row per class, and anything else as it is."""
    if not is_dense(tensor) or tensor.dim() != 3:
        return tensor
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")
    return tensor.detach().flatten(1)


def optimizer_step(update: RowUpdate) -> OptimizerStep:
    """Return the update as the op's schema has it."""
    return OptimizerStep(
        rule=update.rule,
        states=[state for state in update.states.values() if state is not None],
        last_step=update.last_step,
        numbers=[float(number) for number in update.numbers],
        step=update.step or 0,
        seed=update.seed,
    )


def must_match(update: object) -> Any:
    """Return what of an update must be the same on all ranks."""
    if isinstance(update, (SGDUpdate, AdamWUpdate)):
        return update.rule, update.numbers, update.step
    return describe(update)


# ---- in the autograd graph -----------------------------------------------------------------------


def grad_anchor() -> Tensor:
    """Return a tensor that requires grad, as an input of autograd functions.

    The centers don't require grad, and the embeddings need not: without it autograd would not call
    the backward pass, in which the step is taken.
    """
    return torch.zeros((), requires_grad=True, dtype=torch.float32, device="cpu")


def check_unmoved(weight: Tensor, version: int) -> None:
    """Raise RuntimeError if the centers were written since they had this version."""
    if weight._version != version:
        raise RuntimeError(
            "the centers have moved since this forward pass: with update, each forward pass has "
            "one backward pass, before the next forward pass; gradients cannot be accumulated"
        )


class Reference(torch.autograd.Function):
    """The identity of input and weight, whose backward pass takes an update's step on weight.

    apply(grad_anchor, input, weight, update)
    """

    @staticmethod
    def forward(
        ctx: Any, _: Tensor, input: Tensor, weight: Tensor, update: RowUpdate
    ) -> tuple[Tensor, Tensor]:
        ctx.update, ctx.weight, ctx.version = update, weight, weight._version
        return input.view_as(input), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_input: Tensor, grad: Tensor) -> tuple[Any, ...]:
        check_unmoved(ctx.weight, ctx.version)
        if grad.is_sparse:
            class_ids, grad = grad._indices()[0], grad._values()
        else:
            class_ids = torch.arange(len(grad), device=grad.device)
        rows = _matrix("weight", ctx.weight)
        take_step(ctx.update, rows, grad.flatten(1), class_ids, "reference")
        return None, grad_input if ctx.needs_input_grad[1] else None, None, None
