"""What autograd does around an op that a custom op of torch's library is not told."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch


def transformed(*tensors: Tensor) -> bool:
    """Return whether `torch.func` differentiates here, or a tensor has a forward-mode tangent.

    A custom op fails in the first case and drops the tangent in the second.
    """
    if torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():  # which cannot read the stack of transforms
            return True
        differentiating = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
        stack = _functorch.get_interpreter_stack()
        return any(level.key() in differentiating for level in stack)
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def innermost(tensor: Tensor) -> Tensor:
    """Return the tensor of values inside `torch.func`'s wrappers, with all dimensions."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor
