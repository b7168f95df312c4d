"""Trained networks in use: loading, embeddings of images of any kind, exported files."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy

if TYPE_CHECKING:
    from .export import Exporter, ExportError
    from .files import write_embeddings
    from .found import find_images
    from .network import FaceNetwork, load
    from .recorded import Threshold, recorded_alignment, recorded_threshold

__all__ = [
    "ExportError",
    "Exporter",
    "FaceNetwork",
    "Threshold",
    "find_images",
    "load",
    "recorded_alignment",
    "recorded_threshold",
    "write_embeddings",
]
__getattr__ = lazy(
    __name__,
    {
        "export": ("Exporter", "ExportError"),
        "files": ("write_embeddings",),
        "found": ("find_images",),
        "network": ("FaceNetwork", "load"),
        "recorded": ("Threshold", "recorded_alignment", "recorded_threshold"),
    },
)
