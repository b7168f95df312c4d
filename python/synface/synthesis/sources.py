"""A training source of faces that are generated batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.check import check_integer, check_least, check_memory
from ..common.renamed import old_keywords
from ..common.rng import generator as seeded
from ..data import Augment, Faces
from ..data.loading.loader import Timing
from ..data.loading.sampler import WHOLE, CycledOrder, RankSlice
from ..data.mixing import DomainMixup, Grid, IdentityMixup, Ratio
from ..data.mixing.ratios import send
from ..training.config import TrainConfig
from ..training.sources import Batch, fingerprint
from .dataset import checked, styles
from .embeddings import sha256_of_rows
from .generators import FaceGenerator

KEPT_BATCH = 64  # images per call of the generator, where epochs are kept


class _Generated(NamedTuple):
    """Generated images (B, H, W, C) uint8, their labels, and the labels' weights, if mixed."""

    images: Tensor
    target: Tensor
    weight: Tensor | None


class GeneratedSource:
    """Training data generated batch by batch, with identities and domains mixed.

    An epoch is one pass over the images of all identities, reshuffled in each epoch. The classes
    are the identities, then those of the real faces. Both sides of a pair are augmented
    independently.

    Args:
        embeddings: (N, D) floating, one identity per row; finite, no row zero. Normalized here.
        generator: the face generator; ``painter`` is its earlier name.
        images_per_identity: at least 1; image k of identity i has the same style as from
            `synface.synthesis.synthesize` with this seed.
        identity_mixup: generate φ·e + (1 − φ)·e' of two identities of the batch, normalized, with
            two labels; None generates each identity as it is.
        real: faces to mix each image with, cycled to the length of the epoch, or None.
        ratio: distribution of the synthetic share ψ. per_sample: draw a ψ for each image, not one
            for the batch.
        keep_epochs: generate the images of this many epochs once, keep them in memory and repeat
            them; identities are then mixed over the whole set instead of the batch. None generates
            each epoch's images anew. Without ``identity_mixup`` all epochs have the same images, so
            1 changes nothing but speed.

    Raises:
        ValueError: for an argument out of range, or faces of another shape than the generator's.

    Memory: the styles, 4·N·images_per_identity·generator.style_size bytes, the real faces, and
        keep_epochs·N·images_per_identity images of H·W·C bytes, on each rank (and of one epoch
        again while it is generated).

    Source: Qiu et al., "SynFace", ICCV 2021, sections 3.2 and 3.3.
    """

    timing: Timing | None = None

    @old_keywords(painter="generator")
    def __init__(
        self,
        embeddings: Tensor,
        generator: FaceGenerator,
        images_per_identity: int,
        *,
        seed: int = 0,
        identity_mixup: IdentityMixup | None = None,
        real: Faces | None = None,
        ratio: Ratio | None = None,
        per_sample: bool = False,
        keep_epochs: int | None = None,
    ) -> None:
        check_least("images_per_identity", images_per_identity, 1)
        check_integer("keep_epochs", 1 if keep_epochs is None else keep_epochs, 1)
        self.embeddings = checked(embeddings, generator.embedding_size)[1]
        self.generator, self.images_per_identity, self.seed = generator, images_per_identity, seed
        self.identity_mixup, self.real = identity_mixup, real
        self.image_shape = generator.image_shape
        self.num_classes = len(self.embeddings) + (len(real.identities) if real else 0)
        self.domain_mixup = None
        if real:
            if tuple(real.images.shape[1:]) != self.image_shape or not len(real):
                raise ValueError(
                    f"real must hold images of shape {self.image_shape}, as the generator's, "
                    f"got {tuple(real.images.shape)}"
                )
            self.domain_mixup = DomainMixup(
                len(self.embeddings),
                len(real.identities),
                ratio=ratio or Grid(),
                per_sample=per_sample,
                mean=0.0,  # the augmentation has normalized both sides
                std=1.0,
                layout="NCHW",
            )
        identity, image = np.divmod(np.arange(len(self)), images_per_identity)
        self._styles, self._seeds = styles(seed, identity, image, generator.style_size)
        self.keep_epochs = keep_epochs
        self._kept: dict[int, _Generated] = {}

    def __len__(self) -> int:
        return len(self.embeddings) * self.images_per_identity

    def faces(self) -> Faces:
        """Return the images of an epoch in memory, with their labels; not for mixed identities.

        Raises:
            ValueError: for a source with ``identity_mixup``.
        """
        if self.identity_mixup:
            raise ValueError("identity_mixup must be None: mixed identities have two labels")
        check_memory(f"{len(self):,} images", math.prod(self.image_shape) * len(self))
        every = torch.arange(len(self), device="cpu")
        names = [f"generated {i}" for i in range(len(self.embeddings))]
        made = self._generate(every, seeded(self.seed, "identity mixup", 0), KEPT_BATCH)
        return Faces(made.images, made.target, names, "generated")

    def description(self) -> dict[str, Any]:
        """Return what identifies the data, as `Source.description` does."""
        fingerprints = [sha256_of_rows(self.embeddings)]
        if self.real:
            fingerprints.append(fingerprint(self.real))
        mixed = self.domain_mixup
        psi = "no" if mixed is None else f"{mixed.ratio!r}, per sample: {mixed.per_sample}"
        return {
            "source": "generated" + (f", mixed with {self.real.source}" if self.real else ""),
            "fingerprint": " ".join(fingerprints),
            "image_shape": list(self.image_shape),
            "identities": self.num_classes,
            "generator": self.generator.description,
            "images_per_identity": self.images_per_identity,
            "seed": self.seed,
            "identity_mixup": repr(self.identity_mixup),
            "ratio": psi,
            "keep_epochs": self.keep_epochs,
        }

    def batches(
        self,
        config: TrainConfig,
        first: int,
        part: RankSlice = WHOLE,
        device: torch.device | str = "cpu",
    ) -> Generator[tuple[int, Batch]]:
        """Yield batches as `Source.batches` does; augmented and mixed on the device."""
        device = torch.device(device)
        order = CycledOrder(len(self), len(self.real) if self.real else 1, config.seed)
        augment = Augment(config.augment)
        for step in range(first, config.epochs * order.batches(config.batch_size)):
            rows, real = order.batch(step, config.batch_size, part)

            def draws(purpose: str, step: int = step) -> torch.Generator:
                return seeded(config.seed, part.purpose(purpose), step)

            epoch = step // order.batches(config.batch_size)
            indices = torch.from_numpy(rows), torch.from_numpy(real)
            yield step, self._batch(epoch, *indices, augment, draws, device)

    def _generate(
        self, rows: Tensor, generator: torch.Generator, at_once: int | None = None
    ) -> _Generated:
        """Generate the images of some rows, whose identities are mixed with each other.

        Args:
            at_once: images per call of the face generator; None for all.
        """
        target, weight = rows // self.images_per_identity, None
        embeddings = self.embeddings[target]
        if self.identity_mixup:
            embeddings, target, weight = self.identity_mixup(embeddings, target, generator)
            embeddings = F.normalize(embeddings)
        arguments = embeddings, self._styles[rows], self._seeds[rows]
        parts = zip(*(x.split(at_once or len(rows)) for x in arguments), strict=True)
        images = [self.generator.generate(*part) for part in parts]
        return _Generated(torch.cat(images), target, weight)

    def _kept_epoch(self, epoch: int) -> _Generated:
        """Return all images of an epoch, generated at its first use."""
        if epoch not in self._kept:
            count = len(self)
            check_memory(f"an epoch of {count:,} images", math.prod(self.image_shape) * count)
            every = torch.arange(count, device="cpu")
            mixing = seeded(self.seed, "identity mixup", epoch)
            self._kept[epoch] = self._generate(every, mixing, KEPT_BATCH)
        return self._kept[epoch]

    def _batch(
        self,
        epoch: int,
        rows: Tensor,
        real_rows: Tensor,
        augment: Augment,
        draws: Callable[[str], torch.Generator],
        device: torch.device,
    ) -> Batch:
        if self.keep_epochs is None:
            generated, target, weight = self._generate(rows, draws("identity mixup"))
        else:
            kept = self._kept_epoch(epoch % self.keep_epochs)
            generated, target = kept.images[rows], kept.target[rows]
            weight = None if kept.weight is None else kept.weight[rows]
        images = augment(send(generated, device), draws("augment"))
        target = send(target, device)
        weight = None if weight is None else send(weight, device)
        if self.real is None or self.domain_mixup is None:
            return Batch(images, target, weight)
        mixed = self.domain_mixup(
            images,
            target,
            augment(send(self.real.images[real_rows], device), draws("augment real")),
            send(self.real.labels[real_rows], device),
            synthetic_weights=weight,
            generator=draws("mixup"),
        )
        return Batch(*mixed)
