"""What the heads share whose centres can be stepped in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..check import describe
from ..optim import RowAdamW, RowSGD


class FusedHead(nn.Module):
    """A head whose ``weight`` holds the centres."""

    weight: nn.Parameter
    _optimizer: RowSGD | RowAdamW | None = None

    def fuse(self, optimizer: RowSGD | RowAdamW) -> None:
        """From now on the backward pass takes this optimiser's steps on the centres that take part,
        to the same bits as with a sparse gradient, which never exists.

        Each forward pass in training mode takes up the optimiser's next step, with the settings
        that it then has, and its own backward pass, before the next forward pass, takes it. So
        gradients are neither accumulated nor clipped. A forward pass without its backward pass
        counts as a step without a gradient. ``step()`` and
        ``zero_grad()`` have nothing to do then; ``state_dict`` and ``catch_up`` are as ever. The
        centres no longer require grad. A forward pass with ``update=None``, in evaluation mode or
        under no_grad takes no step.

        Args:
            optimizer: a `synface.optim.RowSGD` or `RowAdamW` of this head's ``weight``.

        Raises:
            TypeError: for another optimiser. ValueError: for one of other parameters.
        """
        if not isinstance(optimizer, (RowSGD, RowAdamW)):
            raise TypeError(
                f"optimizer must be a synface.optim.RowSGD or RowAdamW, got {describe(optimizer)}"
            )
        if not any(p is self.weight for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer must hold this head's weight: give it head.parameters()")
        self.weight.requires_grad_(False)
        self.weight.grad = None
        self._optimizer = optimizer

    def _with_update(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options, and the optimiser's next step where one is to be taken."""
        if self._optimizer is None or not (self.training and torch.is_grad_enabled()):
            return options
        if "update" in options:
            return options
        return options | {"update": self._optimizer.next_update(self.weight)}
