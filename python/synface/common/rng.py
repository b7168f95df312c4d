"""Stateless random numbers: each purpose and step of a run has its own generator."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def seeds(seed: int, purpose: str, step: int) -> int:
    """Return the seed of a purpose and step."""
    words = [seed, step, *purpose.encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(
    seed: int, purpose: str, step: int, device: str | torch.device = "cpu"
) -> torch.Generator:
    """Return a generator with the seed of a purpose and step; on a GPU it draws other numbers."""
    return torch.Generator(device).manual_seed(seeds(seed, purpose, step))


def normals(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return float32 standard normal draws, for any default device and dtype of torch."""
    return torch.randn(
        tuple(shape), generator=generator, dtype=torch.float32, device=generator.device
    )


@contextmanager
def standard_defaults() -> Iterator[None]:
    """Make new tensors float32 on the CPU inside the block, for any defaults of torch.

    Modules built inside have the same parameters in every program.
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
    """Seed torch's global generators of the CPU and of one GPU, and restore them at the end.

    Unlike `torch.manual_seed`, it does not seed other GPUs' generators.
    """
    gpus = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def seeded_globally(seed: int) -> Iterator[None]:
    """Seed the global generators of torch's CPU, Python and NumPy, and restore them at the end."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    # From the seed itself, NumPy's generator would draw the same words as torch's.
    np.random.seed(np.random.SeedSequence(seed).generate_state(4))  # noqa: NPY002
    try:
        with seeded(seed):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
