"""Face images: readers of many formats, loaders, mixers, and a small embedded set."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy

if TYPE_CHECKING:
    from .embedded import embedded_faces as embedded_faces
    from .formats.conversion import convert as convert
    from .formats.decode import DataError as DataError
    from .formats.folder import read_folder as read_folder
    from .formats.image_set import Faces as Faces
    from .formats.image_set import ImageSet as ImageSet
    from .formats.image_set import list_folder as list_folder
    from .formats.images import open_images as open_images
    from .loading.augment import Augment as Augment
    from .loading.augment import normalize as normalize
    from .loading.loader import ImageLoader as ImageLoader
    from .loading.loader import TwoDomainLoader as TwoDomainLoader
    from .loading.sampler import CycledOrder as CycledOrder

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
    },
)
