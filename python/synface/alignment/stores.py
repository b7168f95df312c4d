"""The faces of stored photos, as images that networks embed."""

from __future__ import annotations

from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from ..data.formats import decode
from .aligner import Aligner
from .photos import read_open_photo


class Photos(Protocol):
    """Encoded photos, by index; every `synface.data` store is one.

    Attributes:
        streams: whether only sequential reads are fast.
    """

    streams: bool

    def __len__(self) -> int: ...

    def name(self, row: int) -> str: ...

    def open(self, row: int) -> BinaryIO: ...


class AlignedFaces:
    """The face of each photo of a store, cropped to a template, for `FaceNetwork.embed`.

    Args:
        photos: the store.
        aligner: finds one face in each; its crops are resized and converted for the network, as
            files of them would be.
    """

    def __init__(self, photos: Photos, aligner: Aligner) -> None:
        self.photos, self.aligner = photos, aligner
        self.streams = photos.streams

    def __len__(self) -> int:
        return len(self.photos)

    def name(self, row: int) -> str:
        return self.photos.name(row)

    def decode_into(
        self, pixels: NDArray[np.uint8], row: int, expected: tuple[int, int] | None = None
    ) -> None:
        """Write a photo's face into an array (H, W, C); raise OSError if it has none."""
        with self.photos.open(row) as file:
            faces = self.aligner(read_open_photo(file))
        if not faces:
            raise OSError(self.aligner.no_face)  # as for an image that cannot be decoded
        face = decode.from_bytes(faces[0].pixels)
        pixels[:] = decode.fit(face, pixels.shape[:2], pixels.shape[2])
