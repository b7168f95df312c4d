"""The time of a step, by the clock of the device that runs it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

# Runs of a short step follow each other on a GPU for so long, or so often.
TURN_SECONDS, RUNS_MAX = 0.01, 50
# Of a longer step, the start of an idle GPU is too small a part to matter.
LONG_SECONDS = 0.1


def seconds_of(
    step: Callable[[], object],
    device: torch.device,
    between: Callable[[], object] = lambda: None,
) -> float:
    """Return the time of one run: on a CPU of this one, on a GPU the mean of several.

    On a GPU runs follow each other without a wait, as in training, after one or two that are not
    timed, so the time is that of the GPU or of the host, whichever takes longer. (A run by itself
    begins with an idle GPU, which waits for the host, most of a short step's time.) The first run
    also takes from the allocator what other steps held, and leaves its data in the caches.

    Args:
        between: is called after each run of several, in the time.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def run() -> None:
        step()
        between()

    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    alone = time.perf_counter() - start
    runs = min(RUNS_MAX, max(1, math.ceil(TURN_SECONDS / alone)))
    if alone < LONG_SECONDS:
        run()  # keeps the GPU busy while the host queues the next one
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(runs):
        run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3 / runs
