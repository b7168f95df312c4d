"""Samplers: orders of images as stateless functions of (seed, epoch, position)."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...common.check import check_least
from ...common.renamed import old_names


@dataclass(frozen=True)
class RankSlice:
    """The slice of every batch that one rank of a process group trains on.

    Attributes:
        rank, ranks: 0 ≤ rank < ranks.
    """

    rank: int = 0
    ranks: int = 1

    def of(self, count: int) -> slice:
        """Return the slice of a batch of `count`; the ranks' sizes differ by one at most."""
        return slice(count * self.rank // self.ranks, count * (self.rank + 1) // self.ranks)

    def purpose(self, name: str) -> str:
        """Return the key of a rank's random stream; rank 0 has that of a single process."""
        return f"{name} {self.rank}" if self.rank else name


WHOLE = RankSlice()


class Order(ABC):
    """A stateless order of images, with a cache of the last shuffles."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of positions in an epoch."""

    @abstractmethod
    def __call__(self, epoch: int, positions: Any) -> tuple[NDArray[np.int64], ...]:
        """Return, for each set, the indices of its images at some positions of an epoch."""

    def batches(self, batch_size: int) -> int:
        """Return the number of batches in an epoch; the last may be shorter."""
        return -(-len(self) // batch_size)

    def batch(
        self, step: int, batch_size: int, part: RankSlice = WHOLE
    ) -> tuple[NDArray[np.int64], ...]:
        """Return, for each set, the indices of a step's batch, or of a rank's slice of it.

        Steps are counted across epochs.
        """
        epoch, index = divmod(step, self.batches(batch_size))
        begin = index * batch_size
        end = min(begin + batch_size, len(self))
        return self(epoch, np.arange(begin, end)[part.of(end - begin)])


@dataclass(frozen=True)
class ShuffledOrder(Order):
    """The order that reads a set once per epoch, with a new shuffle in each.

    Attributes:
        num_images: number of images in the set. seed: random seed, ≥ 0.

    Memory: 8 bytes per image of a shuffle, of which at most two are cached.
    """

    num_images: int
    seed: int = 0

    def __len__(self) -> int:
        return self.num_images

    def __call__(self, epoch: int, positions: Any) -> tuple[NDArray[np.int64]]:
        return (_epoch_order(self.seed, epoch, self.num_images)[positions],)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    import torch  # imported here, since `CycledOrder` does not need it

    from ...common.rng import generator

    order = torch.randperm(count, generator=generator(seed, "order", epoch), device="cpu").numpy()
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class CycledOrder(Order):
    """The order that pairs each synthetic image with a real one, once per epoch.

    The synthetic set is reshuffled in each epoch. The real set is reshuffled in each of its
    own passes, which do not begin with the epochs: the pair at position p of epoch e is number
    n = e·num_synthetic + p, and its real image is number n mod num_real of pass n // num_real. So a
    shorter real set is cycled to the synthetic one's length, a longer one is continued in the next
    epoch, and each real image is drawn once per pass.

    Only the last shuffles are cached: any process can compute any position of any epoch, with the
    same result in any version of NumPy.

    Attributes:
        num_synthetic, num_real: images in each set, at least 1.
        seed: random seed, ≥ 0.

    Memory: 16 bytes per image of a shuffle, of which at most four of each domain are cached.

    Raises:
        ValueError: for a number out of range.
        TypeError: for a value that is not an integer.
    """

    num_synthetic: int
    num_real: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_synthetic", 1), ("num_real", 1), ("seed", 0)):
            object.__setattr__(self, name, _integer(name, getattr(self, name), least))

    def __len__(self) -> int:
        """Return the number of positions in an epoch."""
        return self.num_synthetic

    def __call__(
        self, epoch: int, positions: ArrayLike
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the indices (synthetic, real) at some positions of an epoch.

        Args:
            epoch: ≥ 0. positions: integers of any shape, each in [0, num_synthetic).

        Returns:
            Two int64 arrays of the shape of ``positions``: indices in [0, num_synthetic) and in
            [0, num_real).

        Raises:
            ValueError, TypeError: for a wrong epoch or position.
        """
        epoch = _integer("epoch", epoch, 0)
        at = np.asarray(positions)
        if at.size == 0:
            at = at.astype(np.int64)
        if not np.issubdtype(at.dtype, np.integer):
            raise TypeError(f"positions must be integers, got {at.dtype} {at.shape}")
        if at.size and (at.min() < 0 or at.max() >= self.num_synthetic):
            raise ValueError(
                f"positions must lie in [0, {self.num_synthetic}), got {at.min()} to {at.max()}"
            )
        number = epoch * self.num_synthetic + at.astype(np.int64)
        passes, within = np.divmod(number, self.num_real)
        real = np.empty_like(within)
        for i in np.unique(passes):
            here = passes == i
            real[here] = _real_order(self.seed, int(i), self.num_real)[within[here]]
        return _synthetic_order(self.seed, epoch, self.num_synthetic)[at], real


def _shuffle(domain: int, seed: int, number: int, count: int) -> NDArray[np.int64]:
    """Return a permutation: the argsort of random words, which are stable across NumPy versions."""
    words = np.random.PCG64(np.random.SeedSequence([seed, number, domain])).random_raw(count)
    order = words.argsort(kind="stable")
    order.flags.writeable = False
    return order


@lru_cache(maxsize=4)
def _synthetic_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return _shuffle(0, seed, epoch, count)


@lru_cache(maxsize=4)
def _real_order(seed: int, number: int, count: int) -> NDArray[np.int64]:
    return _shuffle(1, seed, number, count)


def _integer(name: str, value: object, least: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    check_least(name, number, least)
    return number


__getattr__ = old_names(__name__, Part="RankSlice")
