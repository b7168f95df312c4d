"""Access to the caching allocator of large CPU results."""

from __future__ import annotations

import torch

from . import _load


def empty_cache() -> None:
    """Return the cached memory of freed CPU results to the system.

    CPU results of 2 MiB and more come from a caching allocator: results and gradients of
    `domain_mixup`, gradients and ``workspace`` of `margin_cross_entropy`, and gradients of
    `hypersphere_repulsion`. It keeps up to 512 MiB of freed memory and the last freed result that
    is larger, such as the gradient of a weight, which the next step needs again; the system takes
    that one's pages where memory is short. The environment variable ``SYNFACE_CACHE_MIB`` says how
    many MiB it keeps in all (0: none).
    """
    if _load.extension_error is None:
        torch.ops.synface_kernels._empty_cache()
