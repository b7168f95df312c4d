"""What a run is trained on: batches that are a function of the step alone."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..common.rng import generator
from ..data import Augment, Faces
from ..data.loading.loader import (
    Domain,
    ImageLoader,
    Pairs,
    Timing,
    TwoDomainLoader,
    common_shape,
    opened,
)
from ..data.loading.sampler import WHOLE, Part, ShuffledOrder
from ..data.mixing import DomainMixup, Grid, Mixed, Ratio
from .config import TrainConfig


class Batch(NamedTuple):
    """A training batch.

    Attributes:
        images: (N, C, H, W) float32, the network's input; it may be written over by the next one.
        target: (N,) or (N, K) int64. target_weight: (N, K) with the latter, else None.
    """

    images: Tensor
    target: Tensor
    target_weight: Tensor | None


class Source(Protocol):
    """Training data.

    Attributes:
        image_shape: (H, W, C). num_classes: C of the head.
        timing: of the reading, once `batches` was iterated over; None where nothing is read.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    timing: Timing | None

    def __len__(self) -> int:
        """Images in an epoch."""
        ...

    def description(self) -> dict[str, Any]:
        """What tells this data from other, in JSON's types; a checkpoint keeps it."""
        ...

    def batches(
        self,
        config: TrainConfig,
        first: int,
        part: Part = WHOLE,
        device: torch.device | str = "cpu",
    ) -> Generator[tuple[int, Batch]]:
        """(step, batch) of every step of a run from the step ``first`` on; of each batch a part.

        A step's batch depends on the configuration and the step alone: a resumed run sees what an
        uninterrupted one does. Closing the generator frees what it holds. The images may be on the
        device already, which is where the network is.
        """
        ...


def fingerprint(domain: Domain) -> str:
    """Tells two sets of images apart; of files, by what is seen without reading the images."""
    if isinstance(domain, Faces):
        shape = tuple(domain.images.shape)
        digest = hashlib.sha256(repr((shape, domain.identities)).encode())
        digest.update(domain.labels.numpy().tobytes())
        digest.update(domain.images.contiguous().numpy().data)
    else:
        digest = hashlib.sha256(repr(domain.identities).encode())
        digest.update(domain.labels.tobytes())
        digest.update(domain.store.fingerprint())
    return digest.hexdigest()


class FacesSource:
    """A set of faces, augmented; each epoch has an order of its own.

    Args:
        faces: in memory, or an `ImageSet`, which worker processes decode batch by batch: the same
            batches from either.
        size, grayscale, workers: of an `ImageSet`; see `ImageLoader`.

    Raises:
        DataError: for an `ImageSet` that can be read in order only, and whose shape no file tells.
    """

    def __init__(
        self,
        faces: Domain,
        *,
        size: tuple[int, int] | None = None,
        grayscale: bool | None = None,
        workers: int = 2,
    ) -> None:
        (self.faces,) = opened(faces=faces)
        self.image_shape = common_shape([faces], size, grayscale)
        self.num_classes = len(faces.identities)
        self.workers = workers
        self.timing: Timing | None = None

    def __len__(self) -> int:
        return len(self.faces)

    def description(self) -> dict[str, Any]:
        return {
            "source": self.faces.source,
            "fingerprint": fingerprint(self.faces),
            "image_shape": list(self.image_shape),
            "identities": self.num_classes,
        }

    def batches(
        self,
        config: TrainConfig,
        first: int,
        part: Part = WHOLE,
        device: torch.device | str = "cpu",
    ) -> Generator[tuple[int, Batch]]:
        augment = Augment(config.augment)
        with self._reader(config, first, part, torch.device(device)) as reader:
            for step, (images, labels) in reader:
                varied = generator(config.seed, part.purpose("augment"), step)
                yield step, Batch(augment(images.to(device), varied), labels, None)

    def _reader(
        self, config: TrainConfig, first: int, part: Part, device: torch.device
    ) -> AbstractContextManager[Iterable[tuple[int, tuple[Tensor, Tensor]]]]:
        """(step, (images, labels)) from the step ``first`` on."""
        faces, size = self.faces, config.batch_size
        order = ShuffledOrder(len(self), config.seed)
        last = config.epochs * order.batches(size)
        if isinstance(faces, Faces):
            rows = ((step, order.batch(step, size, part)[0]) for step in range(first, last))
            return nullcontext((step, (faces.images[i], faces.labels[i])) for step, i in rows)
        height, width, channels = self.image_shape
        loader = ImageLoader(
            faces,
            size,
            size=(height, width),
            grayscale=channels == 1,
            seed=config.seed,
            first_step=first,
            last_step=last,
            workers=self.workers,
            pin=device.type == "cuda",
            part=part,
        )
        self.timing = loader.timing
        return loader


class MixedSource:
    """Synthetic images mixed with real ones, pixel by pixel, as worker processes decode them.

    An epoch is one pass over the synthetic set; the classes are the synthetic identities, then the
    real ones, and each image has one label of either. The augmentation is that each side of a pair
    is mirrored by itself, with probability 0.5 (0.5·augment below a strength of 1).

    Args:
        synthetic, real: see `TwoDomainLoader`, as for size, grayscale and workers.
        ratio: of the synthetic share ψ. per_sample: a ψ for each image, else one for the batch.
        mix_in_workers: mix there, on a thread in each, and not in the training process.

    Source: Qiu et al., "SynFace", ICCV 2021, section 3.3.
    """

    def __init__(
        self,
        synthetic: Domain,
        real: Domain,
        *,
        ratio: Ratio | None = None,
        per_sample: bool = False,
        size: tuple[int, int] | None = None,
        grayscale: bool | None = None,
        workers: int = 2,
        mix_in_workers: bool = False,
    ) -> None:
        self.synthetic, self.real = synthetic, real
        self.ratio, self.per_sample = ratio or Grid(), per_sample
        self.image_shape = common_shape((synthetic, real), size, grayscale)
        self.num_classes = len(synthetic.identities) + len(real.identities)
        self.workers, self.mix_in_workers = workers, mix_in_workers
        self.timing: Timing | None = None

    def __len__(self) -> int:
        return len(self.synthetic)

    def description(self) -> dict[str, Any]:
        fingerprints = [fingerprint(domain) for domain in (self.synthetic, self.real)]
        return {
            "source": f"{self.synthetic.source}, mixed with {self.real.source}",
            "fingerprint": " ".join(fingerprints),
            "image_shape": list(self.image_shape),
            "identities": self.num_classes,
            "ratio": f"{self.ratio!r}, {'per sample' if self.per_sample else 'per batch'}",
        }

    def batches(
        self,
        config: TrainConfig,
        first: int,
        part: Part = WHOLE,
        device: torch.device | str = "cpu",
    ) -> Generator[tuple[int, Batch]]:
        mixup = DomainMixup(
            len(self.synthetic.identities),
            len(self.real.identities),
            ratio=self.ratio,
            per_sample=self.per_sample,
            flip=0.5 * min(config.augment, 1.0),
        )
        height, width, channels = self.image_shape
        mixed = torch.empty(
            config.batch_size, channels, height, width, dtype=torch.float32, device=device
        )
        with TwoDomainLoader(
            self.synthetic,
            self.real,
            config.batch_size,
            size=(height, width),
            grayscale=channels == 1,
            seed=config.seed,
            first_step=first,
            last_step=config.epochs * -(-len(self) // config.batch_size),
            workers=self.workers,
            mix_in_workers=mixup if self.mix_in_workers else None,
            pin=mixed.is_cuda,
            part=part,
        ) as loader:
            self.timing = loader.timing
            for step, batch in loader:
                if isinstance(batch, Pairs):
                    batch = Pairs(*(each.to(device) for each in batch))
                    draws = generator(config.seed, part.purpose("mixup"), step)
                    out = mixed[: len(batch.real)]
                    batch = Mixed(*mixup(*batch, generator=draws, out=out))
                yield step, Batch(*batch)
