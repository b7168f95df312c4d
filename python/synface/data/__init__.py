"""Face images: readers of many formats, loaders, mixup, and a small embedded set."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy

if TYPE_CHECKING:
    from .embedded import embedded_faces
    from .formats.conversion import convert
    from .formats.decode import DataError
    from .formats.folder import read_folder
    from .formats.image_set import Faces, ImageSet, list_folder
    from .formats.images import open_images
    from .loading.augment import Augment, normalize
    from .loading.loader import ImageLoader, TwoDomainLoader
    from .loading.sampler import CycledOrder
    from .loading.transforms import Transforms, read_transforms

__all__ = [
    "Augment", "CycledOrder", "DataError", "Faces", "ImageLoader", "ImageSet", "Transforms",
    "TwoDomainLoader", "convert", "embedded_faces", "list_folder", "normalize", "open_images",
    "read_folder", "read_transforms",
]  # fmt: skip
__getattr__ = lazy(
    __name__,
    {
        "embedded": ("embedded_faces",),
        "formats.conversion": ("convert",),
        "formats.decode": ("DataError",),
        "formats.folder": ("read_folder",),
        "formats.image_set": ("Faces", "ImageSet", "list_folder"),
        "formats.images": ("open_images",),
        "loading.augment": ("Augment", "normalise", "normalize"),  # codespell:ignore normalise
        "loading.loader": ("ImageLoader", "TwoDomainLoader"),
        "loading.sampler": ("CycledOrder",),
        "loading.transforms": ("Transforms", "read_transforms"),
    },
)
