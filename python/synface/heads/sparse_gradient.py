"""Sparse gradients of sampled centers: densified on request; errors that name the remedy."""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

PLAIN = ("SGD", "Adagrad")  # take sparse gradients unless weight_decay or fused is set
_HEADS: WeakSet[nn.Module] = WeakSet()
hook_optimizers = functools.cache(register_optimizer_step_pre_hook)  # each hook once


class DenseGradient(torch.autograd.Function):
    """Identity whose backward pass turns a sparse gradient into a dense one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to_dense() if grad.is_sparse else grad


def watch(head: nn.Module) -> None:
    """Raise when an optimizer that refuses sparse gradients steps the head, naming the remedy.

    torch's own message ("add(sparse, dense) is not supported") names neither head nor remedy.
    """
    _HEADS.add(head)
    hook_optimizers(_before_step)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        return _check(optimizer)

    def checked() -> Any:  # the closure computes the gradients
        loss = closure()
        _check(optimizer)
        return loss

    if len(args) > 1:
        return (args[0], checked, *args[2:]), kwargs
    return args, kwargs | {"closure": checked}


def _check(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None or not parameter.grad.is_sparse or _takes(optimizer, group):
                continue
            for head in _HEADS:
                if head.weight is parameter:
                    kind = type(optimizer).__name__
                    reasons = (each for each in ("weight_decay", "fused") if group.get(each))
                    settings = f" with {' and '.join(reasons)}" if kind in PLAIN else ""
                    name = type(head).__name__
                    raise RuntimeError(
                        f"{kind}{settings} takes no sparse gradient, such as that of "
                        f"{name}'s sampled classes: make the head with sparse=False (or set "
                        "head.sparse = False) for a dense gradient, as insightface's, or step its "
                        "weight by synface.optim.RowSGD or RowAdamW"
                    )


def _takes(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Return whether an optimizer takes sparse gradients; True for those that are not torch's."""
    optim = torch.optim
    if isinstance(optimizer, (optim.SparseAdam, optim.LBFGS)):
        return True
    if isinstance(optimizer, (optim.SGD, optim.Adagrad)):
        return not (group["weight_decay"] or group.get("fused"))
    return not type(optimizer).__module__.startswith("torch.optim")
