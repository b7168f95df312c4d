"""Access to the caching allocator of large CPU results."""

from __future__ import annotations

import torch

from . import _load


def empty_cache() -> None:
    """Return the cached memory of freed CPU results to the system.

    CPU results of 2 MiB and more come from a caching allocator, capped at 512 MiB, or at as many
    MiB as the environment variable ``SYNFACE_CACHE_MIB`` says (0: no cache): results and gradients
    of `domain_mixup`, gradients and ``workspace`` of `margin_cross_entropy`, and gradients of
    `hypersphere_repulsion`.
    """
    if _load.extension_error is None:
        torch.ops.synface_kernels._empty_cache()
