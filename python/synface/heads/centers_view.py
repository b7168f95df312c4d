"""pytorch-metric-learning's ``W``: a loss's centers as (D, C), under that library's name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from .sparse_gradient import hook_optimizers


class CentersView(nn.Parameter):
    """A (D, C) view of a loss's ``weight`` that optimizers and gradient clipping accept.

    Its ``grad``, ``data`` and ``requires_grad`` are those of ``weight``, transposed likewise. It is
    not the leaf that ``torch.autograd.grad`` and hooks need: that is ``weight``.
    """

    # results are plain tensors, as those of parameters
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _weight: nn.Parameter

    @staticmethod
    def of(weight: nn.Parameter) -> CentersView:
        view = transposed(weight).as_subclass(CentersView)
        view._weight = weight
        if not torch.compiler.is_compiling():
            hook_optimizers(_before_step)
        return view

    is_leaf = True

    @property
    def grad(self) -> Tensor | None:
        weight = self._weight
        if self.data_ptr() != weight.data_ptr():
            raise RuntimeError(
                "this W is stale: its loss moved to another device or dtype since; make the "
                "optimizer after the move, preferably of loss.weight or loss.parameters()"
            )
        return None if weight.grad is None else transposed(weight.grad)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self._weight.grad = None if value is None else untransposed(value, self._weight)

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

    def requires_grad_(self, mode: bool = True) -> CentersView:
        self._weight.requires_grad_(mode)
        return self

    def register_hook(self, hook: Any) -> Any:
        raise RuntimeError("W is a view of loss.weight: register the hook on loss.weight, (C, D)")

    register_post_accumulate_grad_hook = register_hook

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        return nn.Parameter(self.detach().clone(), self.requires_grad)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Raise if an optimizer cannot step W, or would step the same centers twice."""
    given = [each for group in optimizer.param_groups for each in group["params"]]
    weights = [each._weight for each in given if isinstance(each, CentersView)]
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


def transposed(weight: Tensor) -> Tensor:
    """Return (C, D) or (C, S, D) centers as a (D, C) or (D, C·S) view."""
    return weight.view(-1, weight.shape[-1]).T


def untransposed(columns: Tensor, like: Tensor) -> Tensor:
    """Return a contiguous copy of (D, C) or (D, C·S) centers in the shape of ``like``."""
    return columns.T.reshape(like.shape).contiguous()
