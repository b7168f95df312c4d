"""What the recipes on generated faces share: who is drawn, and the real people to verify on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from ..common.check import check_integer
from ..common.rng import generator as draws
from ..common.rng import normals
from ..data import Faces, embedded_faces, read_folder
from ..synthesis.generators import FaceGenerator, open_generator

EIGENFACES, EMBEDDED = "eigenfaces", "embedded"
EMBEDDED_IMAGES = 10  # of each of the embedded faces


@dataclass(frozen=True)
class PainterConfig:
    """Who draws the faces, and the real ones beside them.

    Attributes:
        generator: "eigenfaces", or an ONNX or TorchScript file.
        size: height and width of the eigenfaces' images; a file has its own.
        embedding_size: of an identity.
        real: "embedded", or an image folder.
    """

    generator: str = EIGENFACES
    size: int = 112
    embedding_size: int = 64
    real: str = EMBEDDED

    def __post_init__(self) -> None:
        check_integer("size", self.size, 8)
        check_integer("embedding_size", self.embedding_size, 2)

    def painter(self) -> FaceGenerator:
        if self.generator == EIGENFACES:
            return open_generator(None, self.embedding_size, size=self.size)
        return open_generator(self.generator, self.embedding_size)

    def real_people(self, image_shape: tuple[int, int, int], least: int) -> Faces:
        """The real faces, brought to (H, W, C).

        Raises:
            ValueError: for fewer people than ``least``.
            DataError: for a folder that is missing or damaged.
        """
        height, width, channels = image_shape
        if self.real == EMBEDDED:
            faces = embedded_faces(EMBEDDED_IMAGES, height)
        else:
            faces = read_folder(Path(self.real), (height, width), grayscale=channels == 1)
        if len(faces.identities) < least:
            raise ValueError(
                f"{faces.source} must have {least} people or more, got {len(faces.identities)}"
            )
        return faces


def identities(count: int, dim: int, seed: int) -> Tensor:
    """(count, dim) random identities, unit rows, float32."""
    return F.normalize(normals((count, dim), draws(seed, "identities", 0)))


def check_seeds(seeds: tuple[int, ...]) -> None:
    """Raises for seeds that are not integers from 0 on, all different, at least one."""
    for seed in seeds:
        check_integer("seeds", seed, 0)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different, and at least one, got {list(seeds)}")
