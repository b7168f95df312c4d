"""How the CPU kernels are run: their instruction set, the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def cpu(isa: str | None = None, threads: int | None = None) -> Iterator[None]:
    """None leaves it as it is."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as environment:
        if isa is not None:
            environment.setenv("SYNFACE_CPU_ISA", isa)
        torch.set_num_threads(before if threads is None else threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
