"""pytorch-metric-learning's ``W``: a loss's centers as (D, C), by the name its users know."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


class TheirCenters(nn.Parameter):
    """A view of a loss's ``weight`` as (D, C) that optimizers and clipping take for the parameter.

    Its ``grad``, ``data`` and ``requires_grad`` are those of ``weight``, turned likewise. What it
    cannot be is the leaf that ``torch.autograd.grad`` and hooks need: that is ``weight``.
    """

    # results are plain tensors, as a parameter's
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _weight: nn.Parameter

    @staticmethod
    def of(weight: nn.Parameter) -> TheirCenters:
        view = turned(weight).as_subclass(TheirCenters)
        view._weight = weight
        if not torch.compiler.is_compiling():
            _watch_optimizers()
        return view

    is_leaf = True

    @property
    def grad(self) -> Tensor | None:
        weight = self._weight
        if self.data_ptr() != weight.data_ptr():
            raise RuntimeError(
                "this W was taken before its loss moved to another device or dtype, and is the "
                "loss's no more: make the optimizer afterwards, best of loss.weight or "
                "loss.parameters()"
            )
        return None if weight.grad is None else turned(weight.grad)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self._weight.grad = None if value is None else turned_back(value, self._weight)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Tensor) or value.shape != self.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"W.data must be a tensor of shape {tuple(self.shape)}, got {got}")
        if (value.dtype, value.device) != (self.dtype, self.device):
            raise ValueError(
                f"W.data must be {self.dtype} on {self.device}, as loss.weight is, got "
                f"{value.dtype} on {value.device}: move or cast the loss by loss.to(…)"
            )
        self.detach().copy_(value)

    @property
    def requires_grad(self) -> bool:
        return self._weight.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self._weight.requires_grad = value

    def requires_grad_(self, mode: bool = True) -> TheirCenters:
        self._weight.requires_grad_(mode)
        return self

    def register_hook(self, hook: Any) -> Any:
        raise RuntimeError("W is a view of loss.weight: register the hook on loss.weight, (C, D)")

    register_post_accumulate_grad_hook = register_hook

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        return nn.Parameter(self.detach().clone(), self.requires_grad)


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Raise where an optimizer cannot step W, or would step the same centers twice."""
    given = [each for group in optimizer.param_groups for each in group["params"]]
    weights = [each._weight for each in given if isinstance(each, TheirCenters)]
    if weights and isinstance(optimizer, torch.optim.LBFGS):
        raise RuntimeError(
            "LBFGS flattens its parameters, which loss.W, a transposed view, cannot be: give it "
            "loss.weight or loss.parameters()"
        )
    for weight in weights:
        if sum(each is weight or getattr(each, "_weight", None) is weight for each in given) > 1:
            raise RuntimeError(
                f"{type(optimizer).__name__} would step the same centers more than once: loss.W is "
                "a view of loss.weight, which loss.parameters() holds; give it one of them"
            )


def turned(weight: Tensor) -> Tensor:
    """(D, C) or (D, C·S) of (C, D) or (C, S, D): a view."""
    return weight.view(-1, weight.shape[-1]).T


def turned_back(theirs: Tensor, like: Tensor) -> Tensor:
    """Undo `turned`, contiguously."""
    return theirs.T.reshape(like.shape).contiguous()
