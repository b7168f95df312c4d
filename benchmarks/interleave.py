"""Timing of several steps, interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

from .clock import seconds_of
from .table import duration


def samples(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    after: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Return each step's times, after one turn that warms up; ``after`` runs after each run."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            seconds = seconds_of(step, device, after)
            after()
            if turn > 0:
                found[name].append(seconds)
    return found


def medians(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, str]:
    """Return each step's median time and its ratio to the first step's, as table cells."""
    found = samples(steps, rounds, torch.device("cpu"))
    first = next(iter(found.values()))
    cells = {}
    for name, times in found.items():
        ratio = statistics.median(t / f for t, f in zip(times, first, strict=True))
        cells[name] = duration(statistics.median(times)) + (
            f" ({ratio:.1f}×)" if times is not first else ""
        )
    return cells
