"""The faces of the CFSM recipe, for training, target domains and verification."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ...common.rng import generator as draws
from ...data import Faces, embedded_faces, normalize, read_folder
from ...synthesis.generators import EMBEDDED as EMBEDDED_GENERATORS
from ...synthesis.generators import open_generator
from ...synthesis.sources import GeneratedSource
from ...training.sources import fingerprint
from ..generated import EMBEDDED, identities
from .config import DataConfig
from .degrade import degrade


@dataclass(frozen=True)
class People:
    """The sets of faces for training, target domains (before degradation) and verification.

    Raises:
        ValueError: for images of different sizes or numbers of channels, or fewer than two target
            images.
    """

    source: Faces
    target: Faces
    held: Faces

    def __post_init__(self) -> None:
        height, width, channels = self.source.images.shape[1:]
        for name, faces in (("target", self.target), ("held", self.held)):
            if faces.images.shape[1:] != self.source.images.shape[1:]:
                got = "×".join(map(str, faces.images.shape[1:]))
                raise ValueError(
                    f"{name} ({faces.source}) must have images of {height}×{width} and {channels} "
                    f"channel(s), as source ({self.source.source}) has, got {got}"
                )
        if len(self.target) < 2:
            raise ValueError(
                f"target ({self.target.source}) must have two images or more, from which a style "
                f"can be learned, got {len(self.target)}"
            )

    @property
    def channels(self) -> int:
        """The number of channels of all images."""
        return self.source.images.shape[3]

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each set, for a checkpoint."""
        return {f.name: fingerprint(getattr(self, f.name)) for f in fields(self)}


def read_people(config: DataConfig, seed: int) -> People:
    """Read or generate the faces, and split them by person.

    Raises:
        ValueError: if too few people are left for training, or the channels differ.
        DataError: for a folder that cannot be read.
    """
    size = (config.size, config.size)
    if config.faces == EMBEDDED:
        faces = embedded_faces(config.images_per_identity, config.size, seed)
    elif config.faces in EMBEDDED_GENERATORS:
        generator = open_generator(config.faces, 64, size=config.size, channels=config.channels)
        people = identities(config.identities, generator.embedding_size, seed)
        faces = GeneratedSource(people, generator, config.images_per_identity, seed=seed).faces()
    else:
        faces = read_folder(Path(config.faces), size)
    rest, held = faces.split(config.held_out_identities)
    if config.target == EMBEDDED:
        source, target = rest.split(config.target_identities)
    else:
        source, target = rest, read_folder(Path(config.target), size, rest.images.shape[3] == 1)
    return People(source, target, held)


def first_images(faces: Faces, count: int) -> Tensor:
    """Return (N, C, H, W) in [−1, 1]: the first image of each of the first ``count`` people."""
    people = range(min(count, len(faces.identities)))
    return normalize(torch.stack([faces.images[faces.labels == i][0] for i in people]))


def degraded(faces: Faces, domain: str, seed: int) -> Faces:
    """Return the faces degraded to a target domain, 16 images at a time."""
    batches = []
    for i, images in enumerate(faces.images.split(16)):
        x = degrade(normalize(images), domain, draws(seed, f"verify {domain}", i))
        batches.append(((x + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1))
    return Faces(torch.cat(batches), faces.labels, faces.identities, f"{faces.source}, {domain}")
