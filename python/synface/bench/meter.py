"""Time and memory of a device's work, measured without waiting for it in each step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

PHASES = ("loader", "backbone", "head", "optimizer", "rest")
Stamp = Any  # a time in seconds, or a `torch.cuda.Event`


class Meter:
    """Time and memory of the work that a CPU does, or that is queued on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"

    def stamp(self) -> Stamp:
        """Return the time at which the device will have done the work so far."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, stamps: Sequence[Stamp]) -> list[float]:
        """Return the seconds from the first stamp to each, once the device has passed them."""
        first = stamps[0]
        if not self.on_gpu:
            return [stamp - first for stamp in stamps]
        return [first.elapsed_time(stamp) / 1e3 for stamp in stamps]

    def wait(self) -> None:
        """Wait until the device has done the work so far."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def allocated(self) -> int:
        """Return the bytes of tensors on a GPU; 0 for a CPU."""
        return torch.cuda.memory_allocated(self.device) if self.on_gpu else 0


class Turn:
    """Consecutive steps of one loop, from an idle device to the end of their work.

    Attributes:
        stamps: of each step, as for `phases`.
        seconds: of the whole turn, once it has ended.
        before, peak: bytes of tensors on a GPU at the beginning, and the most of them meanwhile.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter, self.stamps = meter, list[list[Stamp]]()
        self.seconds, self.peak = 0.0, 0
        meter.wait()
        self.before = meter.allocated()
        if meter.on_gpu:
            torch.cuda.reset_peak_memory_stats(meter.device)
        self._began = time.perf_counter()

    def end(self) -> list[dict[str, float]]:
        """Wait for the device, and return the seconds of each step's phases."""
        self.meter.wait()
        self.seconds = time.perf_counter() - self._began
        if self.meter.on_gpu:
            self.peak = torch.cuda.max_memory_allocated(self.meter.device)
        return [phases(self.meter.seconds(each)) for each in self.stamps]


def phases(stamps: Sequence[float]) -> dict[str, float]:
    """Return the seconds of each phase of a step.

    Args:
        stamps: when these began and ended: the wait for a batch, the backbone's forward pass, the
            head's; then when these ended or began: the head's backward pass, the backbone's step of
            its optimizer, and the centers' step; at last the end of the step.
    """
    asked, given, forward, embedded, head, loss, back, step, stepped, centers, done, end = stamps
    found = {
        "loader": given - asked,
        "backbone": embedded - forward + step - back,
        "head": back - head + done - centers,
        "optimizer": stepped - step,
    }
    return found | {"rest": end - asked - sum(found.values())}


class StepHooks:
    """Stamps of `train`'s steps, by torch's hooks on modules and optimizers.

    The backbone and the head are the modules that are called by no other; the head's time includes
    its backward pass and the update of the centers.

    Attributes:
        stamps: as for `phases`, but for those of the batch and the end.
        dtype: of the last embeddings.
    """

    def __init__(self, meter: Meter, stack: ExitStack) -> None:
        self.meter, self.depth, self.stamps = meter, 0, list[Stamp]()
        self.dtype = torch.float32
        for handle in (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave),
            register_optimizer_step_pre_hook(self.stamp),
            register_optimizer_step_post_hook(self.stamp),
        ):
            stack.callback(handle.remove)

    def stamp(self, *_: object) -> None:
        self.stamps.append(self.meter.stamp())

    def _enter(self, *_: object) -> None:
        if self.depth == 0:
            self.stamp()
        self.depth += 1

    def _leave(self, module: nn.Module, inputs: object, output: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.stamp()
            if isinstance(output, Tensor) and output.requires_grad and output.dim() == 2:
                output.register_hook(self.stamp)  # the head's backward pass is done
                self.dtype = output.dtype
