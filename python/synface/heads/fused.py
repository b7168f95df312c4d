"""The heads' base class: sparse gradients, steps in the backward pass, activation checkpointing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker

import synface_kernels as sk

from ..common.check import check_by_op, check_integer, check_number, describe
from ..optim import RowAdamW, RowSGD
from .sparse_gradient import DenseGradient, watch

_TRACKER = ModuleTracker()  # tells whether a backward pass is running
_PENDING = 16  # number of passes that are remembered until their recomputation
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Settled = TypeVar("Settled")


class FusedHead(nn.Module):
    """Base class of heads: class centers, ``weight``, and the fused margin softmax over them.

    Args:
        shape: of the centers, (C, D) or (C, M, D).
        margin: an `ArcFace` (the default), `CosFace`, `SphereFace` or `CombinedMargin`.
        others: as `MarginHead`.
    """

    weight: nn.Parameter
    sparse: bool = True
    workspace: int | Literal["auto"] = "auto"
    _optimizer: RowSGD | RowAdamW | None = None

    def __init__(
        self,
        shape: tuple[int, ...],
        margin: sk.CombinedMargin | None,
        init_std: float = 0.01,
        workspace: int | Literal["auto"] = "auto",
        sparse: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if workspace != "auto":
            check_integer("workspace", workspace, 0)
        check_number("init_std", init_std, 0)
        margin = sk.ArcFace() if margin is None else margin
        if not isinstance(margin, sk.CombinedMargin):
            raise TypeError(
                "margin must be an ArcFace, CosFace, SphereFace or CombinedMargin, "
                f"got {describe(margin)}"
            )
        check_impl(impl)
        self._last = _Last()
        self.margin = margin
        self.init_std, self.workspace, self.sparse, self.impl = init_std, workspace, sparse, impl
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    def _loss(
        self, embeddings: Tensor, target: Tensor, options: dict[str, Any], indices: Any = None
    ) -> Any:
        """Return the margin softmax loss, with the head's settings unless ``options`` has others.

        ``indices``: the target as indices into sampled classes, where classes are sampled.
        """
        settings = {"margin": self.margin, "workspace": self.workspace, "impl": self.impl}
        arguments = self._with_update(settings | options, embeddings, target)
        target = target if indices is None else indices
        result = sk.margin_cross_entropy(embeddings, self._centers(), target, **arguments)
        if self._optimizer is not None and "update" in arguments.keys() - options.keys():
            self._optimizer.count(self.weight, arguments["update"])  # only now: a call may raise
        return result

    def step_in_backward(self, optimizer: RowSGD | RowAdamW) -> None:
        """Apply the optimizer to the centers inside the backward pass, from now on.

        The bits are those of a step with a sparse gradient, which is never stored.

        Each forward pass in training mode reserves the optimizer's next step, with its settings at
        that time; the backward pass, which must come before the next forward pass, applies it. So
        gradients are neither accumulated nor clipped. A forward pass without its backward pass
        counts as a step without a gradient, one that raises does not. The optimizer's ``step()``
        and ``zero_grad()`` do nothing; ``state_dict`` and ``catch_up`` work as before. The centers
        no longer require grad.
        A forward pass with ``update=None``, in evaluation mode or under no_grad reserves no step.
        A forward pass that `torch.utils.checkpoint` recomputes uses the step of the original pass.

        Args:
            optimizer: a `synface.optim.RowSGD` or `RowAdamW` of this head's ``weight``.

        Raises:
            TypeError: for another optimizer. ValueError: for one of other parameters.
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

    def fuse(self, optimizer: RowSGD | RowAdamW) -> None:
        """Call `step_in_backward` with a warning: this is its name in version 0.1."""
        warnings.warn(
            "fuse is deprecated: use step_in_backward; version 0.3 removes the old name",
            DeprecationWarning,
            stacklevel=2,
        )
        self.step_in_backward(optimizer)

    def _with_update(
        self, options: dict[str, Any], embeddings: Tensor, target: Tensor
    ) -> dict[str, Any]:
        """Return the options, with the optimizer's next step if the backward pass applies one."""
        optimizer = self._optimizer
        if optimizer is None or not self.training or "update" in options:
            return options

        def settle() -> Any:  # reentrant checkpointing begins with a pass under no_grad
            return optimizer.upcoming_update(self.weight) if torch.is_grad_enabled() else None

        update = self._settled_eagerly("update", embeddings, target, settle)
        return options if update is None else options | {"update": update}

    def _centers(self) -> Tensor:
        """Return ``weight``, with the kind of gradient that ``sparse`` asks for."""
        if not self.weight.requires_grad:
            return self.weight
        if not self.sparse:
            return DenseGradient.apply(self.weight)
        if not torch.compiler.is_compiling():
            watch(self)
        return self.weight

    def _settled(
        self, name: str, embeddings: Tensor, target: Tensor, settle: Callable[[], Settled]
    ) -> Settled:
        """Return settle(), or what it returned in the forward pass that this one recomputes.

        A forward pass inside a backward pass comes from activation checkpointing
        (`torch.utils.checkpoint`), and must use the original pass's random draws, statistics and
        optimizer step. Passes are identified by checksums of their batches, computed on the
        device; without checkpointing there are none.

        Raises:
            RuntimeError: if the head has seen another batch since the pass that is recomputed, or
                the same one twice; on a GPU, a device-side assertion.
        """
        if torch.compiler.is_compiling():
            return settle()
        if not self.training:  # an evaluation may come between a pass and its recomputation
            name = f"{name} in evaluation mode"
        pending, last, value = self._last.get(name, ((), None, None))
        if not _TRACKER.is_bw:
            last = _fingerprint(embeddings, target) if _may_be_recomputed() else None
            value = settle()
            if last is not None:
                pending = (*pending, last)[-_PENDING:]
            self._last[name] = pending, last, value
            return value
        batch = _fingerprint(embeddings, target)
        message = (
            f"{type(self).__name__} is recomputed in a backward pass {{}}, so its {name} cannot be "
            "restored: call the head outside of torch.utils.checkpoint (it holds no logits "
            "that would be saved), or run each backward pass before the next forward pass"
        )
        other = (
            "for another batch than that of its last forward pass (or other embeddings came of it, "
            "as with dropout and preserve_rng_state=False, or a hook calls the head)"
        )
        torch._assert_async(_alike(last, batch), message.format(other))
        for earlier in pending:
            if earlier is not last:
                twice = "after two forward passes of the same batch"
                torch._assert_async(~_alike(earlier, batch), message.format(twice))
        if value is None:
            value = settle()
        self._last[name] = (), last, value
        return value

    # No graph holds a generator or a step. torch.compiler.disable would import Dynamo here.
    _settled_eagerly = torch._disable_dynamo(_settled)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_last": _Last()} | state)  # older pickles have none


def check_impl(impl: str) -> None:
    """Raise ValueError unless `synface_kernels.margin_cross_entropy` has an implementation."""
    if impl != "auto":
        row = torch.empty(1, 1, dtype=torch.float32, device="meta")
        target = torch.empty(1, dtype=torch.int64, device="meta")
        check_by_op(lambda: sk.margin_cross_entropy(row, row, target, impl=impl))


def _may_be_recomputed() -> bool:
    """Return whether a forward pass may be under activation checkpointing, of either kind."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None or not torch.is_grad_enabled()


@torch.library.custom_op("synface::raise_if_recomputed", mutates_args=())
def raise_if_recomputed(value: Tensor) -> Tensor:
    """Return a copy of a compiled head's new state, but raise in a recomputed forward pass.

    Compiled code cannot tell whether it runs inside a backward pass.
    """
    if _TRACKER.is_bw:
        raise RuntimeError(
            "a compiled head would count this batch a second time when torch.utils.checkpoint "
            "recomputes it, and with other numbers: call the head outside of the checkpointed "
            "function, or leave the head uncompiled (torch.compiler.disable(head))"
        )
    return value.clone()


@raise_if_recomputed.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


class _Last(dict[str, Any]):
    """Results of a head's last forward passes, by name; neither copied nor pickled."""

    def __reduce__(self) -> Any:
        return _Last, ()


def _alike(first: tuple[Tensor, ...] | None, second: tuple[Tensor, ...]) -> Tensor:
    """Return whether two fingerprints are equal, without waiting for a GPU."""
    if not first or len(first) != len(second):
        return torch.zeros((), dtype=torch.bool, device="cpu")
    return torch.stack([one == other for one, other in zip(first, second, strict=True)]).all()


@torch.no_grad()
def _fingerprint(*batch: Any) -> tuple[Tensor, ...]:
    """Return int64 sums of each tensor's bits, in their order, without waiting for a GPU."""
    sums = []
    for tensor in batch:
        if not isinstance(tensor, Tensor) or tensor.dim() not in (1, 2) or tensor.is_complex():
            continue  # the op will raise
        bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
        for dim in range(bits.dim()):
            line = bits if bits.dim() == 1 else bits.sum(1 - dim)
            odd = torch.arange(len(line), device=line.device).mul_(2).add_(1)
            sums.append((line * odd).sum())
    return tuple(sums)
