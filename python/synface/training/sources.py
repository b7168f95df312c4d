"""Sources of training batches, each a function of only the configuration and the step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..common.renamed import old_keywords
from ..common.rng import generator, seeds
from ..data import Augment
from ..data.formats.image_set import LabeledImages, common_shape, opened
from ..data.loading.loader import ImageLoader, Pairs, TwoDomainLoader
from ..data.loading.pool import Timing
from ..data.loading.sampler import WHOLE, RankSlice, ShuffledOrder
from ..data.loading.transforms import Transforms
from ..data.mixing import DomainMixup, Grid, Mixed, Ratio
from ..data.mixing.ratios import send
from .config import TrainConfig


class Batch(NamedTuple):
    """A training batch.

    Attributes:
        images: (N, C, H, W) float32, the network's input; the next batch may overwrite it.
        target: (N,) or (N, K) int64. target_weight: (N, K) with the latter, else None.
    """

    images: Tensor
    target: Tensor
    target_weight: Tensor | None


class Source(Protocol):
    """Training data.

    Attributes:
        image_shape: (H, W, C). num_classes: C of the head.
        timing: the loader's, once `batches` is iterated over; None if no files are read.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    timing: Timing | None

    def __len__(self) -> int:
        """Return the number of images in an epoch."""
        ...

    def description(self) -> dict[str, Any]:
        """Return a description that identifies the data, in JSON types, for checkpoints."""
        ...

    def batches(
        self,
        config: TrainConfig,
        first: int,
        part: RankSlice = WHOLE,
        device: torch.device | str = "cpu",
    ) -> Generator[tuple[int, Batch]]:
        """Yield (step, batch) of every step of a run from ``first`` on, or a rank's slice of each.

        A step's batch depends on the configuration and the step alone, so a resumed run gets the
        batches of an uninterrupted one. Closing the generator releases its resources. The images
        may be on the network's device already.
        """
        ...


def fingerprint(images: LabeledImages) -> str:
    """Return a digest that identifies a set of images, without reading images from files."""
    pixels, names = images.store.pixels, images.identities
    digest = hashlib.sha256(repr(names if pixels is None else (pixels.shape, names)).encode())
    digest.update(np.asarray(images.labels).tobytes())
    digest.update(images.store.fingerprint())
    return digest.hexdigest()


# One transform, or several in order; see `Transforms`.
Transform = Callable[..., Any] | Sequence[Callable[..., Any]] | Transforms


class _ImagesSource:
    """Training data that are decoded from sets of images; an epoch is one pass over the first."""

    def __init__(
        self,
        *domains: LabeledImages,
        size: tuple[int, int] | None,
        grayscale: bool | None,
        workers: int,
        transform: Transform | None,
    ) -> None:
        self._domains, self.workers = domains, workers
        self.image_shape = common_shape(domains, size, grayscale)
        if transform is not None and not isinstance(transform, Transforms):
            transform = Transforms(transform)
        if transform is not None:
            transform.check(self.image_shape)
        self.transforms = transform
        self.num_classes = sum(len(domain.identities) for domain in domains)
        self.timing: Timing | None = None

    def __len__(self) -> int:
        return len(self._domains[0])

    def description(self) -> dict[str, Any]:
        return {
            "source": ", mixed with ".join(domain.source for domain in self._domains),
            "fingerprint": " ".join(map(fingerprint, self._domains)),
            "image_shape": list(self.image_shape),
            "identities": self.num_classes,
            "transforms": None if self.transforms is None else self.transforms.description,
        }

    def _transform(
        self, images: Tensor, config: TrainConfig, step: int, part: RankSlice, purpose: str
    ) -> None:
        """Apply the user's transforms to a step's images, in place."""
        if self.transforms is not None:
            self.transforms(images, seeds(config.seed, part.purpose(purpose), step))

    def _steps(self, config: TrainConfig) -> int:
        """Return the number of steps of a run."""
        return config.epochs * -(-len(self) // config.batch_size)

    def _reading(self, config: TrainConfig, first: int, part: RankSlice) -> dict[str, Any]:
        """Return the options that both loaders take, to read from the step ``first`` on."""
        height, width, channels = self.image_shape
        return {
            "size": (height, width),
            "grayscale": channels == 1,
            "seed": config.seed,
            "first_step": first,
            "last_step": self._steps(config),
            "workers": self.workers,
            "part": part,
        }


class FacesSource(_ImagesSource):
    """One set of faces, augmented and reshuffled in each epoch.

    Args:
        faces: in memory, or an `ImageSet`, which worker processes decode batch by batch; both
            give the same batches.
        size, grayscale, workers: of an `ImageSet`; see `ImageLoader`.
        transform: transforms of single uint8 images, which precede the built-in augmentation; see
            `Transforms`. With ``config.augment`` of 0 they are the only augmentation.

    Raises:
        DataError: for an `ImageSet` that only supports sequential reads, or whose first file
            determines the size and cannot be decoded; and for a transform that fails, or changes
            the size, on a gray image.
        TypeError: for a transform that is not callable.
    """

    @old_keywords(grey="grayscale")  # codespell:ignore grey
    def __init__(
        self,
        faces: LabeledImages,
        *,
        size: tuple[int, int] | None = None,
        grayscale: bool | None = None,
        workers: int = 2,
        transform: Transform | None = None,
    ) -> None:
        (self.faces,) = opened(faces=faces)
        super().__init__(
            faces, size=size, grayscale=grayscale, workers=workers, transform=transform
        )

    def batches(
        self,
        config: TrainConfig,
        first: int,
        part: RankSlice = WHOLE,
        device: torch.device | str = "cpu",
    ) -> Generator[tuple[int, Batch]]:
        augment, device = Augment(config.augment), torch.device(device)
        with self._reader(config, first, part, device) as reader:
            for step, (images, labels) in reader:
                self._transform(images, config, step, part, "transform")
                varied = generator(config.seed, part.purpose("augment"), step)
                images = send(images, device)
                if isinstance(reader, ImageLoader):
                    reader.sent(device)
                yield step, Batch(augment(images, varied), send(labels, device), None)

    def _reader(
        self, config: TrainConfig, first: int, part: RankSlice, device: torch.device
    ) -> AbstractContextManager[Iterable[tuple[int, tuple[Tensor, Tensor]]]]:
        """Return an iterable of (step, (images, labels)) from the step ``first`` on."""
        faces, size, pin = self.faces, config.batch_size, device.type == "cuda"
        if faces.store.pixels is not None:
            images = torch.from_numpy(faces.store.pixels)
            labels = torch.as_tensor(faces.labels, device="cpu")
            order, steps = ShuffledOrder(len(self), config.seed), range(first, self._steps(config))
            rows = ((step, order.batch(step, size, part)[0]) for step in steps)
            # A copy to a GPU from memory that is not page-locked waits for the step before.
            return nullcontext(
                (step, (images[i].pin_memory() if pin else images[i], labels[i]))
                for step, i in rows
            )
        loader = ImageLoader(faces, size, pin=pin, **self._reading(config, first, part))
        self.timing = loader.timing
        return loader


class MixedSource(_ImagesSource):
    """Synthetic images mixed with real ones, pixel by pixel, decoded by worker processes.

    An epoch is one pass over the synthetic set; the classes are the synthetic identities, then the
    real ones, and each image has one label from each. For augmentation, each side of a pair is
    flipped independently with probability 0.5 (0.5·augment below a strength of 1).

    Args:
        synthetic, real, size, grayscale, workers: see `TwoDomainLoader`.
        ratio: distribution of the synthetic share ψ. per_sample: draw a ψ for each image, else one
            for the batch.
        mix_in_workers: mix in the workers, each on one thread, not in the training process.
        transform: transforms of single uint8 images of both sides, before they are mixed; see
            `Transforms`.

    Raises:
        ValueError: for a transform with ``mix_in_workers``; otherwise as `FacesSource`.

    Source: Qiu et al., "SynFace", ICCV 2021, section 3.3.
    """

    @old_keywords(grey="grayscale")  # codespell:ignore grey
    def __init__(
        self,
        synthetic: LabeledImages,
        real: LabeledImages,
        *,
        ratio: Ratio | None = None,
        per_sample: bool = False,
        size: tuple[int, int] | None = None,
        grayscale: bool | None = None,
        workers: int = 2,
        mix_in_workers: bool = False,
        transform: Transform | None = None,
    ) -> None:
        if transform is not None and mix_in_workers:
            raise ValueError("transform precedes the mixing: it needs mix_in_workers=False")
        super().__init__(
            synthetic, real, size=size, grayscale=grayscale, workers=workers, transform=transform
        )
        self.synthetic, self.real, self.mix_in_workers = synthetic, real, mix_in_workers
        self.ratio, self.per_sample = ratio or Grid(), per_sample

    def description(self) -> dict[str, Any]:
        drawn = "per sample" if self.per_sample else "per batch"
        return super().description() | {"ratio": f"{self.ratio!r}, {drawn}"}

    def batches(
        self,
        config: TrainConfig,
        first: int,
        part: RankSlice = WHOLE,
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
            mix_in_workers=mixup if self.mix_in_workers else None,
            pin=mixed.is_cuda,
            **self._reading(config, first, part),
        ) as loader:
            self.timing = loader.timing
            for step, batch in loader:
                if isinstance(batch, Pairs):
                    self._transform(batch.synthetic, config, step, part, "transform")
                    self._transform(batch.real, config, step, part, "transform real")
                batch = type(batch)(*(send(each, mixed.device) for each in batch))
                loader.sent(mixed.device)
                if isinstance(batch, Pairs):
                    draws = generator(config.seed, part.purpose("mixup"), step)
                    out = mixed[: len(batch.real)]
                    batch = Mixed(*mixup(*batch, generator=draws, out=out))
                yield step, Batch(*batch)
