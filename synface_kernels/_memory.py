"""The memory that large results on a CPU share."""

from __future__ import annotations

import torch

from . import _load


def empty_cache() -> None:
    """Gives the memory that is kept for results on the CPU back to the system.

    On a CPU, results and gradients of `domain_mixup`, gradients and ``workspace`` of
    `margin_cross_entropy`, and the gradients that `hypersphere_repulsion` computes leave their
    memory, if it is 2 MiB or more, to those that follow when they are freed: 512 MiB at most, or as
    many as the environment variable ``SYNFACE_CACHE_MIB`` says (0: none).
    """
    if _load.extension_error is None:
        torch.ops.synface_kernels._empty_cache()
