"""The gap between generated and real faces, by embeddings and by networks (SynFace, ICCV 2021)."""

from ...common.lazy import lazy

_RECIPE = (
    "DataConfig", "GapConfig", "Results", "cell_name", "cells", "load_config", "measured",
    "pictures", "rows", "run", "write",
)  # fmt: skip
__getattr__ = lazy(__name__, {"recipe": _RECIPE})
