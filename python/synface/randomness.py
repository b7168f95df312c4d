"""Random numbers without state: each purpose and step of a run has a generator of its own."""

from __future__ import annotations

import numpy as np
import torch


def seeds(seed: int, purpose: str, step: int) -> int:
    """A seed of its own for each purpose and step."""
    words = [seed, step, *purpose.encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, purpose: str, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seeds(seed, purpose, step))
