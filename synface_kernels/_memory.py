"""The memory that large results on a CPU share."""

from __future__ import annotations

import torch

from . import _load


def empty_cache() -> None:
    """Gives the memory that is kept for results on the CPU back to the system.

    Large results of `domain_mixup` and gradients of all ops on a CPU (2 MiB and more) leave their
    memory, when they are freed, to those that follow: 512 MiB at most, or as many as the
    environment variable ``SYNFACE_CACHE_MIB`` says (0: none). Nothing in use is touched.
    """
    if _load.extension_error is None:
        torch.ops.synface_kernels._empty_cache()
