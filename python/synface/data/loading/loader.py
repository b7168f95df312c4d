"""Loaders of batches of one set of images, or of pairs from two, decoded by worker processes."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...common.renamed import old_keywords, old_names
from ...common.rng import generator
from ..formats.image_set import LabeledImages, common_shape, opened
from ..mixing import DomainMixup, Mixed
from .pool import Schedule, WorkerPool
from .pool import Timing as Timing
from .pool import WorkerDied as WorkerDied
from .sampler import WHOLE, CycledOrder, Order, RankSlice, ShuffledOrder
from .worker import Task

if TYPE_CHECKING:
    from typing_extensions import Self

BatchT = TypeVar("BatchT")
__getattr__ = old_names(__name__, Domain="LabeledImages")


class Images(NamedTuple):
    """A batch of n images.

    Attributes:
        images: (n, H, W, C) uint8. labels: (n,) int64.
    """

    images: Tensor
    labels: Tensor


class Pairs(NamedTuple):
    """A batch of n pairs of images, ready for a call ``mixup(*pairs, generator=...)``.

    Attributes:
        synthetic, real: (n, H, W, C) uint8.
        synthetic_labels, real_labels: (n,) int64, each from 0.
    """

    synthetic: Tensor
    synthetic_labels: Tensor
    real: Tensor
    real_labels: Tensor


class _Loader(WorkerPool, Generic[BatchT]):
    """An iterator over the batches of one set of images, or of two."""

    def __init__(
        self,
        domains: tuple[LabeledImages, ...],
        order: Order,
        batch_size: int,
        image_shape: tuple[int, int, int],
        schedule: Schedule,
        *,
        seed: int,
        part: RankSlice,
        mixup: DomainMixup | None = None,
    ) -> None:
        self.domains, self.order = domains, order
        self._mixup, self._seed, self._part = mixup, seed, part
        self._labels = [torch.as_tensor(domain.labels, device="cpu") for domain in domains]
        stores = [domain.store for domain in domains]
        mixing = None if mixup is None else (mixup.mean, mixup.std)
        super().__init__(stores, image_shape, batch_size, mixing, schedule)
        self.steps_per_epoch = order.batches(batch_size)

    @abstractmethod
    def _batch(self, slot: Tensor, labels: list[Tensor], step: int) -> BatchT:
        """Return a step's batch from the contents of its slot and the labels of each domain."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[int, BatchT]:
        if not self.close.alive:
            raise ValueError("the loader is closed")
        step = self._next
        if self._last is not None and step >= self._last:
            raise StopIteration
        try:
            asked = time.perf_counter()
            slot = torch.from_numpy(self._slot(step))
            rows = torch.from_numpy(self._rows(step))
            labels = [of[index] for of, index in zip(self._labels, rows, strict=True)]
            count = rows.shape[1]
            batch = self._batch(slot[..., :count, :, :, :], labels, step)
        except BaseException:  # an interrupt may leave a partial message in the pipe
            self.close()
            raise
        now = time.perf_counter()
        self.timing.samples += count
        self.timing.waiting += now - asked
        self.timing.seconds = now - self._began
        return step, batch

    def _rows(self, step: int) -> np.ndarray:
        """Return the indices (domains, n) of the images of a step."""
        return np.stack(self.order.batch(step, self.batch_size, self._part))

    def _drawn(self, step: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Return a step's mixing shares ψ and flips."""
        assert self._mixup is not None
        return self._mixup.draw(count, generator(self._seed, self._part.purpose("mixup"), step))

    def _task(self, step: int) -> Task:
        rows = self._rows(step)
        if self._mixup is None:
            return Task(step, rows, None, None)
        psi, flip = self._drawn(step, rows.shape[1])
        return Task(step, rows, psi.numpy(), None if flip is None else flip.numpy())

    def _image(self, ticket: int) -> str:
        step, index = divmod(ticket, len(self.domains) * self.batch_size)
        side, i = divmod(index, self.batch_size)
        return self.domains[side].name(int(self._rows(step)[side, i]))


class TwoDomainLoader(_Loader[Pairs | Mixed]):
    """An iterator over batches of synthetic and real images, which can start at any step.

    It yields (step, `Pairs`), or with ``mix_in_workers`` (step, `Mixed`); steps are counted across
    epochs. The images are a view of shared memory, valid until the next batch is requested. Tell
    copies to a GPU that do not wait (``non_blocking=True``) by ``loader.sent(device)``: their batch
    stays valid until they are done.

    The order is a `CycledOrder`, a function of (seed, epoch, position). So a loader that starts at
    a step yields the same bits as one that started at 0, with any number of workers. The last batch
    of an epoch is shorter where the batch size does not divide it.

    Args:
        synthetic, real: a `Faces` in memory, an `ImageSet`, or a path for `open_images`. An epoch
            is one pass over the synthetic set.
        batch_size: pairs of images in a batch.
        size: (H, W) in pixels, to which files are resized; None: the size of the domain in memory,
            else that of the first synthetic file.
        grayscale: True for one channel, False for RGB; None: as the domain in memory, else
            grayscale if every file of both domains is.
        seed: random seed of the order and of ``mix_in_workers``.
        first_step, last_step: the steps to yield, last excluded; None: without end.
        workers: processes, at least 1. prefetch: maximum number of batches that each decodes ahead.
        mix_in_workers: mixup that the workers apply, each on one thread; None: they do not mix. A
            step draws from ``generator(seed, "mixup", step)``; the mixup called on the `Pairs` with
            that generator returns the same bits.
        pin: page-lock the memory of the batches for copies to a GPU; None: if CUDA is available.
        part: the slice of every batch that one rank of several loads.

    Use it in a ``with`` statement, or call `close`, which ends the workers and frees the memory.
    Needs a POSIX system.

    Raises (also while iterating):
        DataError: for paths that `open_images` rejects, and compressed shards, which only support
            sequential reads; for an unreadable or truncated image, named when its batch is
            requested.
        WorkerDied: a `DataError`, if a worker died: within a second while waiting for a batch, else
            when the next batch is requested.
        ValueError: for domains of different size or channels, a number out of range, a mixup for
            fewer identities than there are, or whose result is not contiguous float32, and for a
            closed loader.

    Memory: (workers·prefetch + 1) slots of 2·B·H·W·C bytes (4·B·C·H·W if the workers mix, which
    then need 2·B·H·W·C each), a copy of the domains that are in memory, and the paths of the files.
    """

    @old_keywords(grey="grayscale")  # codespell:ignore grey
    def __init__(
        self,
        synthetic: LabeledImages | str | Path,
        real: LabeledImages | str | Path,
        batch_size: int,
        *,
        size: tuple[int, int] | None = None,
        grayscale: bool | None = None,
        seed: int = 0,
        first_step: int = 0,
        last_step: int | None = None,
        workers: int = 2,
        prefetch: int = 2,
        mix_in_workers: DomainMixup | None = None,
        pin: bool | None = None,
        part: RankSlice = WHOLE,
    ) -> None:
        domains = opened(synthetic=synthetic, real=real)
        if mix_in_workers is not None:
            _check_mixup(mix_in_workers, domains)
        super().__init__(
            domains,
            CycledOrder(len(domains[0]), len(domains[1]), seed),
            batch_size,
            common_shape(domains, size, grayscale),
            Schedule(first_step, last_step, workers, prefetch, pin),
            seed=seed,
            part=part,
            mixup=mix_in_workers,
        )

    def _batch(self, slot: Tensor, labels: list[Tensor], step: int) -> Pairs | Mixed:
        if self._mixup is None:
            return Pairs(slot[0], labels[0], slot[1], labels[1])
        psi = self._drawn(step, len(slot))[0]
        return Mixed(slot, *self._mixup.label(labels[0], labels[1], psi))


class ImageLoader(_Loader[Images]):
    """An iterator over batches of one set of images; see `TwoDomainLoader`.

    It yields (step, `Images`). An epoch is one pass over the set, in the seed's `ShuffledOrder`.

    Args:
        images: a `Faces` in memory, an `ImageSet`, or a path for `open_images`.
        size: (H, W) in pixels, to which files are resized; None: the first file's.
        grayscale: True for one channel, False for RGB; None: grayscale if every file is.
        batch_size, seed, first_step, last_step, workers, prefetch, pin, part: see
            `TwoDomainLoader`.

    Raises: as `TwoDomainLoader` does.

    Memory: (workers·prefetch + 1) slots of B·H·W·C bytes, 16 bytes per image for the order, and
        twice the memory of `open_images`.
    """

    @old_keywords(grey="grayscale")  # codespell:ignore grey
    def __init__(
        self,
        images: LabeledImages | str | Path,
        batch_size: int,
        *,
        size: tuple[int, int] | None = None,
        grayscale: bool | None = None,
        seed: int = 0,
        first_step: int = 0,
        last_step: int | None = None,
        workers: int = 2,
        prefetch: int = 2,
        pin: bool | None = None,
        part: RankSlice = WHOLE,
    ) -> None:
        domains = opened(images=images)
        super().__init__(
            domains,
            ShuffledOrder(len(domains[0]), seed),
            batch_size,
            common_shape(domains, size, grayscale),
            Schedule(first_step, last_step, workers, prefetch, pin),
            seed=seed,
            part=part,
        )

    def _batch(self, slot: Tensor, labels: list[Tensor], step: int) -> Images:
        return Images(slot[0], labels[0])


def _check_mixup(mixup: DomainMixup, domains: Sequence[LabeledImages]) -> None:
    """Raise ValueError unless the workers can mix these domains with this mixup."""
    wanted = (torch.float32, torch.contiguous_format, "NHWC")
    if (mixup.dtype, mixup.memory_format, mixup.layout) != wanted:
        raise ValueError(
            "mix_in_workers must make contiguous float32 images from NHWC ones, "
            f"got dtype {mixup.dtype}, {mixup.memory_format} and layout {mixup.layout!r}"
        )
    counts = [len(domain.identities) for domain in domains]
    if mixup.num_synthetic < counts[0] or mixup.num_real < counts[1]:
        raise ValueError(
            f"mix_in_workers is for {mixup.num_synthetic} synthetic and {mixup.num_real} real "
            f"identities, the domains hold {counts[0]} and {counts[1]}"
        )
