"""Support for forward mode and `torch.func`, which PyTorch does not pass on to custom ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._load import NAMESPACE

_functorch = torch._C._functorch


def transforms_active() -> bool:
    """Return whether a `torch.func` transform (grad, vjp, vmap, …) is active, uncompiled."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def under_vmap() -> bool:
    """Return whether `torch.vmap` is among the active transforms."""
    return transforms_active() and any(
        level.key() == _functorch.TransformType.Vmap for level in _functorch.get_interpreter_stack()
    )


def transformed(*tensors: Tensor) -> bool:
    """Return whether `torch.func` differentiates here, or a tensor has a forward-mode tangent.

    A custom op fails in the first case and drops the tangent in the second.
    """
    if torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():  # Dynamo cannot read the stack of transforms
            return True
        differentiating = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
        stack = _functorch.get_interpreter_stack()
        return any(level.key() in differentiating for level in stack)
    return _has_tangent(tensors)


def _has_tangent(tensors: Iterable[Tensor | None]) -> bool:
    return forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )


def innermost(tensor: Tensor) -> Tensor:
    """Return the tensor of values inside `torch.func`'s wrappers, with all dimensions."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def check_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raise where a tensor has a forward-mode tangent, which a custom op would drop."""
    if not torch.compiler.is_compiling() and _has_tangent(tensors):
        raise _no_forward_mode(op)


def once(op: str, tensor: Tensor, *, forward_mode: bool = False) -> Tensor:
    """Return the tensor for torch code that is differentiable once; a second derivative raises.

    Args:
        forward_mode: whether the code is differentiable in forward mode; else that raises too.
    """
    if torch.compiler.is_compiling():
        return tensor
    return (_OnceInReverse if forward_mode else _Once).apply(tensor, op)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Apply an autograd function that has a ``setup_context``.

    Where no gradient passes it, Dynamo (torch 2.13) gives its forward a context that it lacks.
    """
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    passes = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if torch.compiler.is_compiling() and not passes:
        return function.forward(*arguments)
    return function.apply(*arguments)


def final(
    op: str, gradients: Iterable[Tensor | None], sources: Iterable[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return gradients by the sources; differentiating them (``create_graph``) raises.

    `torch.autograd.function.once_differentiable` raises only where the incoming gradient requires
    grad.
    """
    sources = [source for source in sources if source is not None]
    return tuple(
        None if gradient is None else _Final.apply(gradient, op, *sources) for gradient in gradients
    )


def register(
    name: str,
    op: str,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[[Any, Any, Any], None] | None = None,
) -> Callable[..., Any]:
    """Register the autograd of ``torch.ops.synface_kernels.<name>``; return a function to call it.

    `torch.library.register_autograd` supports neither `torch.func` nor forward mode. Under the
    transforms of `torch.func` the call goes through an autograd function that supports them
    (`vmap` loops over the op), and a forward-mode tangent raises.

    Args:
        op: the public function's name, for error messages.
        backward, setup_context: as `torch.library.register_autograd` takes them. Without a
            backward, for an op that computes a first derivative, differentiating it raises.
    """

    def raise_twice(ctx: Any, *_: Any) -> Any:
        raise _no_second_derivative(op)

    backward = backward or raise_twice
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)
    run = getattr(getattr(torch.ops, NAMESPACE), name)

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return run(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            if setup_context is not None:
                setup_context(ctx, inputs, output)

        @staticmethod
        def jvp(ctx: Any, *_: Any) -> Any:
            raise _no_forward_mode(op)

    Transformed.backward = staticmethod(backward)  # type: ignore[method-assign]

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError(
                    f"{op} under torch.func's transforms cannot be compiled: leave them outside of "
                    "torch.compile"
                )
            return run(*arguments)
        if torch._C._are_functorch_transforms_active():
            return Transformed.apply(*arguments)
        if forward_ad._current_level >= 0:  # skips the scan of the arguments outside forward mode
            check_tangents(op, *(a for a in arguments if isinstance(a, Tensor)))
        return run(*arguments)

    return call


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, op: str) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        tensor, ctx.op = inputs
        ctx.save_for_backward(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            return *final(ctx.op, [grad], ctx.saved_tensors), None
        return grad, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise _no_forward_mode(ctx.op)


class _OnceInReverse(_Once):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return tangent.view_as(tangent)


class _Final(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, op: str, *sources: Tensor) -> Tensor:
        return gradient.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.op = inputs[1]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise _no_second_derivative(ctx.op)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise _no_forward_mode(ctx.op)


def _no_second_derivative(op: str) -> RuntimeError:
    return RuntimeError(
        f"{op} has no second derivative: it cannot be differentiated twice, as a gradient penalty "
        "or a Hessian asks for (create_graph=True)"
    )


def _no_forward_mode(op: str) -> NotImplementedError:
    return NotImplementedError(
        f"{op} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, "
        "torch.autograd.forward_ad): take reverse mode, loss.backward() or torch.func.grad"
    )
