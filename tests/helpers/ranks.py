"""Functions run on every rank of a process group, each rank in a process of its own."""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from synface.common.distributed import leave

from tests.helpers.forked import forked, start_server


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


@contextmanager
def forked_ranks(
    folder: Path, run: Callable[..., object], *arguments: object
) -> Iterator[dict[Path, Any]]:
    """Yield two `forked` ranks by the files of what they print, begun as by torchrun."""
    folder.mkdir()
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    launch = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2"}
    launch |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with ExitStack() as stack:
        ranks = {}
        for name in ("0", "1"):
            rank = forked(folder / name, run, *arguments, **launch, RANK=name, LOCAL_RANK=name)
            ranks[folder / name] = stack.enter_context(rank)
        yield ranks
