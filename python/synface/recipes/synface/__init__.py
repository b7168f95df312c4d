"""SynFace: identity and domain mixup (Qiu et al., ICCV 2021), and its study of data."""

from ...common.lazy import lazy

__getattr__ = lazy(
    __name__, {"recipe": ("ROWS", "cells", "load_config", "measured", "run", "write")}
)
