"""Trained networks in use: loading, embeddings of images of any kind, exported files."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy

if TYPE_CHECKING:
    from .export import Exporter as Exporter
    from .export import ExportError as ExportError
    from .files import write_embeddings as write_embeddings
    from .found import find_images as find_images
    from .network import FaceNetwork as FaceNetwork
    from .network import load as load
    from .recorded import Threshold as Threshold
    from .recorded import recorded_alignment as recorded_alignment
    from .recorded import recorded_threshold as recorded_threshold

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
