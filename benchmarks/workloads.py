"""The tensors that all peers of a case share.

To add an op, add its workload to `WORKLOADS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import BF16_EMBEDDINGS, Case

# A step runs the op once and returns the loss or the result, or None if it has neither.
Step = Callable[[], "Tensor | None"]


def backward(loss: Tensor) -> Tensor:
    """Run the backward pass of a loss; return the loss, detached."""
    loss.backward()
    return loss.detach()


class Workload:
    """The tensors that all peers of a case share, and the buffers that a step leaves behind."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return memory reused from step to step, by default of the first parameter's dtype."""
        if name not in self.buffers:
            self.buffers[name] = self.parameters[0].new_empty(shape, dtype=dtype)
        return self.buffers[name]

    def clear_gradients(self) -> None:
        """Clear gradients as ``optimizer.zero_grad()`` does before each training step."""
        for parameter in self.parameters:
            parameter.grad = None

    def release(self) -> None:
        """Free everything but the inputs."""
        self.clear_gradients()
        self.buffers.clear()


class MarginWorkload(Workload):
    """Random embeddings (N, D), centers (C, D) and labels (N,).

    Attributes:
        gemm_dtype: dtype of the factors of the GEMMs.
        sampled: how many classes a step samples, or None for all of them.
        generator: the source of the random numbers, of the labels' device.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        n, d, c = case.shape["N"], case.shape["D"], case.shape["C"]
        self.generator = torch.Generator(device).manual_seed(0)
        self.autocast_dtype, self.gemm_dtype = case.autocast, case.gemm_dtype
        self.sampled = case.shape.get("S")
        dtype = torch.bfloat16 if BF16_EMBEDDINGS in case.options else case.torch_dtype
        options: dict[str, Any] = {"device": device, "generator": self.generator}
        self.input = torch.randn(n, d, dtype=dtype, **options).requires_grad_()
        self.weight = torch.randn(c, d, dtype=case.torch_dtype, **options).requires_grad_()
        self.target = torch.randint(c, (n,), **options)
        super().__init__([self.input, self.weight])

    def step(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
        """Return a training step: the loss under the case's autocast, then its backward pass."""

        def step() -> Tensor:
            with torch.autocast(
                self.target.device.type, self.autocast_dtype, self.autocast_dtype is not None
            ):
                loss = function(self.input, self.weight, self.target)
            return backward(loss)

        return step


class MixupWorkload(Workload):
    """Two random uint8 batches (B, H, W, C), and a tensor (B, C, H, W) for results."""

    def __init__(self, case: Case, device: torch.device) -> None:
        b, h, w, c = (case.shape[name] for name in "BHWC")
        generator = torch.Generator(device).manual_seed(0)
        self.synthetic, self.real = (
            torch.randint(
                0, 256, (b, h, w, c), generator=generator, device=device, dtype=torch.uint8
            )
            for _ in range(2)
        )
        channels_last = "channels_last" in case.options
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.dtype, self.fresh, self.bytes = case.torch_dtype, "fresh" in case.options, case.bytes
        self.out = torch.empty(
            (b, c, h, w), device=device, dtype=self.dtype, memory_format=self.format
        ).zero_()
        super().__init__([])


class RepulsionWorkload(Workload):
    """Random points (N, D)."""

    def __init__(self, case: Case, device: torch.device) -> None:
        n, d = case.shape["N"], case.shape["D"]
        generator = torch.Generator(device).manual_seed(0)
        self.points = torch.randn(
            n, d, generator=generator, device=device, dtype=case.torch_dtype
        ).requires_grad_()
        self.row_max = "row-max" in case.options
        super().__init__([self.points])


class RowUpdateWorkload(Workload):
    """A weight (C, D) and its optimizer's states, S of its rows, and their gradient."""

    def __init__(self, case: Case, device: torch.device) -> None:
        classes, touched, dim = (case.shape[name] for name in "CSD")
        generator = torch.Generator(device).manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": device}

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, dim, dtype=case.torch_dtype, **options)

        self.adamw, self.bytes = "adamw" in case.options, case.bytes
        self.weight, self.grad = normal(classes), normal(touched)
        self.states = [normal(classes).abs_() for _ in range(2 if self.adamw else 1)]
        order = torch.randperm(classes, **options)
        self.ids = order[:touched].sort()[0]
        super().__init__([])


class SampleWorkload(Workload):
    """Random labels (N,)."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.classes, self.sampled, self.bytes = case.shape["C"], case.shape["S"], case.bytes
        self.generator = torch.Generator(device).manual_seed(0)
        self.target = torch.randint(
            self.classes, (case.shape["N"],), generator=self.generator, device=device
        )
        super().__init__([])


WORKLOADS: dict[str, Callable[[Case, torch.device], Workload]] = {
    "margin_cross_entropy": MarginWorkload,
    "domain_mixup": MixupWorkload,
    "hypersphere_repulsion": RepulsionWorkload,
    "row_update": RowUpdateWorkload,
    "sample_classes": SampleWorkload,
}
