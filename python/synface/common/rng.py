"""Random numbers without state: each purpose and step of a run has a generator of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def seeds(seed: int, purpose: str, step: int) -> int:
    """A seed of its own for each purpose and step."""
    words = [seed, step, *purpose.encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """On the CPU, at that seed."""
    return torch.Generator().manual_seed(seeds(seed, purpose, step))


def normals(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Float32 standard normal draws of a shape, whatever torch's default device and dtype are."""
    return torch.randn(
        tuple(shape), generator=generator, dtype=torch.float32, device=generator.device
    )


@contextmanager
def standard_defaults() -> Iterator[None]:
    """Make tensors float32 on the CPU by default, whatever torch's defaults are.

    For building modules: their parameters are then the same in every program.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Torch's global generators of the CPU and of a GPU begin at a seed, and go back to what they
    were; those of other GPUs are left alone, as `torch.manual_seed` would not.
    """
    gpus = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
