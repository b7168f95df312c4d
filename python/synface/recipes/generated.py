"""Configuration of recipes on generated faces: the face generator, and the real faces beside it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.check import check_integer, check_integers
from ..common.rng import generator as draws
from ..common.rng import normals
from ..data import Faces, embedded_faces, read_folder
from ..synthesis.controls import Vary
from ..synthesis.generators import EMBEDDED as EMBEDDED_GENERATORS
from ..synthesis.generators import FaceGenerator, open_generator

EMBEDDED = "embedded"
EMBEDDED_IMAGES = 10  # images per embedded identity


@dataclass(frozen=True)
class FacesConfig:
    """The face generator, and the real faces to verify on.

    Attributes:
        generator: "heads" or "eigenfaces", or an ONNX or TorchScript file.
        size: height and width of an embedded generator's images; those of a file are fixed.
        channels: 1 (grayscale) or 3 (RGB), of the heads.
        controls: the controls of the generator to vary, the others being held neutral; empty: all.
        columns: which columns of a file's input are which, see `open_generator`; "" for a file that
            takes embedding and style, or says it itself.
        embedding_size: dimension of an identity's embedding.
        real: "embedded", or an image folder.
    """

    generator: str = "heads"
    size: int = 112
    channels: int = 1
    controls: tuple[str, ...] = ()
    columns: str = ""
    embedding_size: int = 64
    real: str = EMBEDDED

    def __post_init__(self) -> None:
        check_integers(self, size=8, embedding_size=2)

    def face_generator(self) -> FaceGenerator:
        """Return the face generator; raises as `open_generator`, and for controls it lacks."""
        embedded = self.generator in EMBEDDED_GENERATORS
        generator = open_generator(
            self.generator,
            self.embedding_size,
            size=self.size if embedded else None,
            channels=self.channels if embedded else None,
            columns=self.columns or None,
        )
        return Vary(generator, self.controls) if self.controls else generator

    def real_people(self, image_shape: tuple[int, int, int], least: int) -> Faces:
        """Return the real faces as images of shape (H, W, C).

        Raises:
            ValueError: for fewer people than ``least``.
            DataError: for a folder that is missing or damaged.
        """
        height, width, channels = image_shape
        if self.real == EMBEDDED:
            faces = embedded_faces(EMBEDDED_IMAGES, height)
            if channels == 3:
                faces = replace(faces, images=faces.images.expand(-1, -1, -1, 3).contiguous())
        else:
            faces = read_folder(Path(self.real), (height, width), grayscale=channels == 1)
        if len(faces.identities) < least:
            raise ValueError(
                f"{faces.source} must have {least} people or more, got {len(faces.identities)}"
            )
        return faces


@dataclass(frozen=True)
class DatasetConfig(FacesConfig):
    """The generated faces to train on, of so many identities, and the real ones to verify on.

    Attributes:
        keep_epochs: number of epochs whose images are generated once and repeated; 0: each epoch's
            are generated anew.
    """

    identities: int = 10_000
    images_per_identity: int = 50
    keep_epochs: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, identities=2, images_per_identity=1, keep_epochs=0)


def drawn_people(people: Faces, count: int, seed: int) -> tuple[Faces, Faces]:
    """Return ``count`` people, drawn at random by the seed, and all others.

    Raises:
        ValueError: unless both parts have two people or more.
    """
    total = len(people.identities)
    if not 2 <= count <= total - 2:
        raise ValueError(
            f"{people.source} must have {count + 2} people or more to train on {count} and verify "
            f"others, got {total}"
        )
    order = torch.randperm(total, generator=draws(seed, "real people", 0), device="cpu")
    label = torch.argsort(order)[people.labels]
    rows = torch.argsort(label, stable=True)
    names = [people.identities[i] for i in order.tolist()]
    return Faces(people.images[rows], label[rows], names, people.source).split(total - count)


def identities(count: int, dim: int, seed: int) -> Tensor:
    """Return (count, dim) random identities, unit rows, float32."""
    return F.normalize(normals((count, dim), draws(seed, "identities", 0)))


def check_seeds(seeds: tuple[int, ...]) -> None:
    """Raise unless there is at least one seed, and all are different integers ≥ 0."""
    for seed in seeds:
        check_integer("seeds", seed, 0)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different, and at least one, got {list(seeds)}")


def check_choices(name: str, chosen: Sequence[str], known: Collection[str], least: int = 1) -> None:
    """Raise ValueError unless at least ``least`` names are chosen, all known and different."""
    if not set(chosen) <= set(known) or not least <= len(set(chosen)) == len(chosen):
        raise ValueError(f"{name} must be distinct names of {', '.join(known)}, got {list(chosen)}")
