"""SynFace: identity and domain mixup (Qiu et al., ICCV 2021), and its study of data."""

from ...common.lazy import lazy

_RECIPE = (
    "ROWS", "DataConfig", "Results", "SynfaceConfig", "cell_name", "cells", "load_config",
    "measured", "pictures", "run", "write",
)  # fmt: skip
__getattr__ = lazy(__name__, {"recipe": _RECIPE})
