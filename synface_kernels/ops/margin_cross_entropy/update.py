"""The margin softmax whose backward pass takes the centers' optimizer step itself.

The gradient of the centers is computed a tile of classes at a time, and each tile goes straight
into the row update: it is never held as a whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._check import describe, require_apart
from ..._load import library
from ..row_update.op import check_last_step, check_states, mark_written, take_step
from ..row_update.updates import AdamWUpdate, RowUpdate, SGDUpdate, most_missed

OP = "margin_cross_entropy_update"
_SCHEMA = (
    "(Tensor input, Tensor(a!) weight, Tensor? class_ids, Tensor labels, Tensor negative_lse, "
    "Tensor mean_center, Tensor center_sum, Tensor kept, Tensor grad_negative_lse, "
    "Tensor grad_target_cosine, Tensor grad_cosine_sum, float scale, float limit, "
    "bool needs_input_grad, bool halves, str rule, Tensor(b!)[] states, Tensor(c!)? last_step, "
    "float[] numbers, int step, int? seed{impl}) -> Tensor grad_input"
)
library.define(OP + _SCHEMA.format(impl=", str impl"))
library.define(f"{OP}_cpu" + _SCHEMA.format(impl=""))  # implemented in csrc/bindings.cpp
_WRITTEN = {"weight": 1, "states": 16, "last_step": 17}  # places in the schema


def _run(*arguments: Any) -> Tensor:
    *inputs, impl = arguments
    if impl == "triton":  # keeps no cosines, and makes no halves
        from . import kernel_triton

        return kernel_triton.update(*inputs[:7], *inputs[8:14], *inputs[15:])
    return torch.ops.synface_kernels.margin_cross_entropy_update_cpu(*inputs)


def _mark_written(keys: Any, *arguments: Any) -> Tensor:
    weight, states, last_step = (arguments[place] for place in _WRITTEN.values())
    return mark_written(OP, [weight, *states, last_step], keys, *arguments)


for _key in ("CPU", "CUDA"):
    library.impl(OP, _run, _key)
library.impl(OP, _mark_written, "ADInplaceOrView", with_keyset=True)


@torch.library.register_fake(f"synface_kernels::{OP}")
def _fake(input: Tensor, *arguments: Any) -> Tensor:
    needs_input_grad = arguments[12]
    return input.new_empty(input.shape if needs_input_grad else (0,))


# ---- checks --------------------------------------------------------------------------------------


def checked(
    update: RowUpdate, input: Tensor, weight: Tensor, class_ids: Tensor | None
) -> RowUpdate:
    """The update with states that are matrices, of a row for each class.

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
    """With a row for each class, if it is a tensor."""
    if not isinstance(tensor, Tensor) or tensor.dim() != 3:
        return tensor
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")
    return tensor.detach().flatten(1)


def arguments(update: RowUpdate) -> tuple[Any, ...]:
    """As the schema has them: rule … seed."""
    return (
        update.rule,
        [state for state in update.states.values() if state is not None],
        update.last_step,
        [float(number) for number in update.numbers],
        update.step or 0,
        update.seed,
    )


def facts(update: object) -> Any:
    """What must be the same on all ranks."""
    if isinstance(update, (SGDUpdate, AdamWUpdate)):
        return update.rule, update.numbers, update.step
    return describe(update)


# ---- in the autograd graph -----------------------------------------------------------------------


def anchor() -> Tensor:
    """What makes a backward pass where nothing else requires grad."""
    return torch.zeros((), requires_grad=True, dtype=torch.float32, device="cpu")


def check_unmoved(weight: Tensor, version: int) -> None:
    if weight._version != version:
        raise RuntimeError(
            "the centers have moved since this forward pass: with update, each forward pass has "
            "one backward pass, before the next forward pass; gradients cannot be accumulated"
        )


class Reference(torch.autograd.Function):
    """Input and weight as they are; the backward pass takes the step, once it has both gradients.

    apply(anchor, input, weight, update)
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
