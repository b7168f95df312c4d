"""Face images in memory: read from a folder, or the small set that is always at hand."""

from synface.data.augment import Augment, normalise
from synface.data.embedded import embedded_faces
from synface.data.folder import DataError, Faces, read_folder

__all__ = ["Augment", "DataError", "Faces", "embedded_faces", "normalise", "read_folder"]
