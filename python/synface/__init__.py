"""The training layer over `synface_kernels`: data, heads, training, evaluation, inference."""

from typing import TYPE_CHECKING

from .common.lazy import lazy
from .common.renamed import install

if TYPE_CHECKING:
    from .inference import load

__all__ = ["load"]
install()
__getattr__ = lazy(__name__, {"inference": ("load",)})
