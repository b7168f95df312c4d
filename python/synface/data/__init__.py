"""Face images: read from folders, in memory or as a stream; or the small set always at hand."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .augment import Augment, normalise
    from .decode import DataError, ImageFolder, list_folder
    from .embedded import embedded_faces
    from .folder import Faces, read_folder
    from .loader import TwoDomainLoader
    from .order import CycledOrder

# Imported when first asked for: worker processes read files without torch.
_HOMES = {
    "Augment": "augment",
    "CycledOrder": "order",
    "DataError": "decode",
    "Faces": "folder",
    "ImageFolder": "decode",
    "TwoDomainLoader": "loader",
    "embedded_faces": "embedded",
    "list_folder": "decode",
    "normalise": "augment",
    "read_folder": "folder",
}

__all__ = [
    "Augment",
    "CycledOrder",
    "DataError",
    "Faces",
    "ImageFolder",
    "TwoDomainLoader",
    "embedded_faces",
    "list_folder",
    "normalise",
    "read_folder",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
