"""HyperFace: packed identities, compared with random ones (ICLR 2025)."""

from ...common.lazy import lazy

__getattr__ = lazy(
    __name__, {"recipe": ("KINDS", "cells", "load_config", "measured", "packed", "run", "write")}
)
