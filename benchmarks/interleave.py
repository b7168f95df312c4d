"""Timing of several steps, interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

from .driver import seconds_of
from .table import duration


def medians(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, str]:
    """Return each step's median time and its ratio to the first step's, as table cells."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            seconds = seconds_of(step, torch.device(device))
            if turn > 0:  # the first warms up
                samples[name].append(seconds)
    first = next(iter(samples.values()))
    cells = {}
    for name, times in samples.items():
        ratio = statistics.median(t / f for t, f in zip(times, first, strict=True))
        cells[name] = duration(statistics.median(times)) + (
            f" ({ratio:.1f}×)" if times is not first else ""
        )
    return cells
