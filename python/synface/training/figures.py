"""A step's figures on their way from a GPU to the host, and settings that make GPUs repeatable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Figures:
    """Numbers that a device computes, read once they have arrived.

    Args:
        numbers: 0-dimensional tensors of one device, by name. From a GPU they are copied behind
            what is queued there, and nothing waits before `read`.
    """

    def __init__(self, **numbers: Tensor) -> None:
        self._names = list(numbers)
        values = torch.stack([number.detach().double() for number in numbers.values()])
        on_gpu = values.device.type == "cuda"
        self._values = values.to("cpu", non_blocking=on_gpu)  # then torch pins the copy
        self._arrived: torch.cuda.Event | None = None
        if on_gpu:
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record(torch.cuda.current_stream(values.device))

    def read(self) -> dict[str, float]:
        """Return the numbers, after waiting for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Restrict cuDNN to deterministic algorithms inside the block, for a GPU.

    The fastest algorithm that it measures may be another in each run, and some add in an order
    that changes.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    if device.type == "cuda":
        cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
