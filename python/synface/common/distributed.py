"""The process group of a torchrun launch."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

if dist.is_available():
    # Imported before there is a process group: its functions take the group at the first import,
    # which torch may cause later, as their default, and would keep it alive.
    import torch.distributed.nn.functional

__all__ = ["Rank", "joined", "leave"]


@dataclass(frozen=True)
class Rank:
    """One process of a distributed training run.

    Attributes:
        rank, ranks: its rank, and the number of ranks.
        device: its training device.
    """

    rank: int
    ranks: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Return the first rank's value, on every rank."""
        values = [value]
        if dist.is_initialized():
            dist.broadcast_object_list(values)
        return values[0]


@contextmanager
def joined(device: str = "auto") -> Iterator[Rank]:
    """Join the process group of a torchrun launch, and leave it at the end.

    A process that torchrun did not start is rank 0 of 1, and joins none.

    Args:
        device: "cpu", "cuda" (of several GPUs, the one of the local rank), or "auto": CUDA if
            available.

    Raises:
        ValueError: for another device, or "cuda" if it is not available.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, and torch sees no CUDA device")
    cuda = device != "cpu" and torch.cuda.is_available()
    on = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(on)
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield Rank(0, 1, on)
        return
    # sizes are exchanged through gloo, without a GPU synchronization
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield Rank(dist.get_rank(), dist.get_world_size(), on)
    finally:
        leave()


def leave() -> None:
    """Destroy the default process group, if there is one, and gloo's threads with it.

    The threads may still hold tensors of the last collective, and need the interpreter's lock to
    drop them. If a `DistributedDataParallel` holds the last reference to the group, it waits for
    the threads with the lock held: a deadlock (pytorch issue 56297). If references outlive the
    interpreter, such a thread aborts the process. So modules in reference cycles, and in the frames
    of an error being raised, are collected first; callers must drop those that they hold.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    error = sys.exc_info()[1]
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    gc.collect()
    dist.destroy_process_group()
