"""Face images: of many formats, in memory or as a stream; or the small set always at hand."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .embedded import embedded_faces
    from .formats.conversion import convert
    from .formats.decode import DataError
    from .formats.folder import Faces, read_folder
    from .formats.imagefolder import list_folder
    from .formats.images import ImageSet, open_images
    from .loading.augment import Augment, normalise
    from .loading.loader import ImageLoader, TwoDomainLoader
    from .loading.sampler import CycledOrder

# Imported when first asked for: worker processes read files without torch.
_HOMES = {
    "Augment": "augment",
    "CycledOrder": "order",
    "DataError": "decode",
    "Faces": "folder",
    "ImageLoader": "loader",
    "ImageSet": "images",
    "convert": "conversion",
    "TwoDomainLoader": "loader",
    "embedded_faces": "embedded",
    "list_folder": "imagefolder",
    "normalise": "augment",
    "open_images": "images",
    "read_folder": "folder",
}

__all__ = [
    "Augment",
    "CycledOrder",
    "DataError",
    "Faces",
    "ImageLoader",
    "ImageSet",
    "TwoDomainLoader",
    "convert",
    "embedded_faces",
    "list_folder",
    "normalise",
    "open_images",
    "read_folder",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
