"""Instruction set and number of threads of the CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def cpu(isa: str | None = None, threads: int | None = None) -> Iterator[None]:
    """Run the block with this instruction set and number of threads; None leaves one unchanged."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as environment:
        if isa is not None:
            environment.setenv("SYNFACE_CPU_ISA", isa)
        torch.set_num_threads(before if threads is None else threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
