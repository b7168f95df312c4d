"""HyperFace: packed identities compared with random ones (ICLR 2025)."""

from ...common.lazy import lazy

_RECIPE = (
    "KINDS", "DataConfig", "HyperfaceConfig", "PackingConfig", "Results", "cell_name", "cells",
    "load_config", "neutral_faces", "points_of", "run",
)  # fmt: skip
__getattr__ = lazy(__name__, {"recipe": _RECIPE, "report": ("measured", "pictures", "write")})
