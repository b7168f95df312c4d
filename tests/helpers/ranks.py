"""Functions run on every rank of a process group, each rank in a process of its own."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from synface.common.distributed import leave

from tests.helpers.forked import start_server


def on_ranks(ranks: int, main: Callable[[int, int], Any], tmp_path: Path) -> list[Any]:
    """Run ``main(rank, ranks)`` on each rank, and return its results: tensors and plain values."""
    tmp_path.mkdir(exist_ok=True)
    path = str(tmp_path / "group")
    start_server()
    mp.start_processes(_rank, (ranks, path, main), nprocs=ranks, start_method="forkserver")
    return [torch.load(f"{path}.{rank}", weights_only=True) for rank in range(ranks)]


def _rank(rank: int, ranks: int, path: str, main: Callable[[int, int], Any]) -> None:
    gc.freeze()  # a rank's end collects garbage; all that is imported needs no search
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    torch.save(main(rank, ranks), f"{path}.{rank}")
    leave()
