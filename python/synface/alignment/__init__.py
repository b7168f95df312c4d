"""Faces found in photos, and aligned to a common template by five landmarks."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy

if TYPE_CHECKING:
    from .aligner import AlignedFace, Aligner
    from .detector import Detector, RetinaFace
    from .folders import align_photos, find_photos, settings_of
    from .landmarks import read_landmarks
    from .photos import read_photo
    from .stores import AlignedFaces
    from .transform import align, similarity, template

__all__ = [
    "AlignedFace", "AlignedFaces", "Aligner", "Detector", "RetinaFace", "align", "align_photos",
    "find_photos", "read_landmarks", "read_photo", "settings_of", "similarity", "template",
]  # fmt: skip
__getattr__ = lazy(
    __name__,
    {
        "aligner": ("AlignedFace", "Aligner"),
        "detector": ("Detector", "RetinaFace"),
        "folders": ("align_photos", "find_photos", "settings_of"),
        "landmarks": ("read_landmarks",),
        "photos": ("read_photo",),
        "stores": ("AlignedFaces",),
        "transform": ("align", "similarity", "template"),
    },
)
