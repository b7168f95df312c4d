"""Class sampling in plain torch, on any device: the same classes as the definition samples.

All shapes are known beforehand, so nothing waits for a GPU, except where fewer classes are to be
sampled than the target has elements: then their number depends on the labels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._splitmix import GOLDEN, mixed, shifted, signed


def _draws(seed: Tensor, count: int, num_classes: int) -> Tensor:
    """Return the first draws (count,) of the stream; int64 multiplication wraps like uint64's."""
    z = mixed((torch.arange(1, count + 1, device=seed.device) * signed(GOLDEN)).add_(seed))
    low = shifted((z & 0xFFFFFFFF) * num_classes, 32)
    return shifted(shifted(z, 32) * num_classes + low, 32)


def _enough(distinct: int, num_classes: int) -> int:
    """Return how many draws hold so many distinct classes, with a failure probability below 1e-15.

    Mean and standard deviations of the coupon collector's time, and a margin for geometric tails.
    """
    share = min(distinct / num_classes, 1 - 1 / num_classes)
    mean = -num_classes * math.log1p(-share)
    variance = num_classes * (share / (1 - share) + math.log1p(-share))
    return math.ceil(mean + 12 * math.sqrt(max(variance, 0)) + 64 / (1 - share))


def _distinct(labels: Tensor, num_classes: int) -> Tensor:
    """Return the labels sorted; num_classes replaces repeated and ignored ones, at the end."""
    ordered = labels.sort().values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return ordered.where(first, num_classes).sort().values


def _first_new(draws: Tensor, count: int | Tensor, known: Tensor, num_classes: int) -> Tensor:
    """Return the draws; num_classes replaces all but the first ``count`` distinct, unknown ones."""
    ordered, order = draws.sort(stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    at = torch.searchsorted(known, ordered).clamp_max(known.numel() - 1)
    new &= known[at] != ordered
    by_draw = torch.empty_like(new).scatter_(0, order, new)
    rank = by_draw.cumsum(0)
    torch._assert_async(rank[-1] >= count, "the draws held too few distinct classes")
    return draws.where(by_draw & (rank <= count), num_classes)


class _Sample(NamedTuple):
    """A sample of ``size`` classes: the positives, ``known``, sorted, and negatives."""

    seed: Tensor
    num_classes: int
    size: int
    known: Tensor
    positives: int | Tensor
    most: int

    def by_taking(self) -> Tensor:
        """Return the positives and the first negatives drawn, sorted: (S,)."""
        draws = _draws(self.seed, _enough(self.size, self.num_classes), self.num_classes)
        wanted = self.size - self.positives
        drawn = _first_new(draws, wanted, self.known, self.num_classes)
        return torch.cat([self.known, drawn]).sort().values[: self.size].contiguous()

    def by_leaving_out(self) -> Tensor:
        """Return all but the first negatives drawn, sorted: (S,)."""
        size, num_classes, device = self.size, self.num_classes, self.seed.device
        sampled = torch.ones(num_classes + 1, dtype=torch.bool, device=device)
        if (out_of := num_classes - size) > 0:
            draws = _draws(self.seed, _enough(out_of + self.most, num_classes), num_classes)
            sampled.index_fill_(0, _first_new(draws, out_of, self.known, num_classes), False)
        sampled[num_classes] = False
        to = torch.where(sampled, sampled.cumsum(0) - 1, size)
        ids = to.new_empty(size + 1)
        ids.scatter_(0, to, torch.arange(num_classes + 1, device=device))
        return ids[:size]


def sample(
    target: Tensor, num_classes: int, num_sampled: int, seed: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Sample as `reference.sample_classes` does; ``seed`` is a 0-dimensional int64 tensor."""
    labels = target.flatten()
    labels = labels.where(labels != ignore_index, num_classes)
    known = _distinct(torch.cat([labels, labels.new_full((1,), num_classes)]), num_classes)
    positives: int | Tensor = (known < num_classes).sum()
    most = labels.numel()  # bound of the number of positives
    if num_sampled < most:
        positives = most = int(positives)  # waits for a GPU
    size = max(num_sampled, most)
    drawing = _Sample(seed, num_classes, size, known, positives, most)
    # Draw the smaller set: negatives to take, or to leave out. S − P > C − S ⟺ P < 2S − C. Where
    # the labels decide, do both rather than wait to know.
    excess = 2 * size - num_classes
    if excess > most or size == num_classes:
        ids = drawing.by_leaving_out()
    elif excess <= 0 or isinstance(positives, int):
        ids = drawing.by_taking()
    else:
        ids = torch.where(positives < excess, drawing.by_leaving_out(), drawing.by_taking())
    remapped = torch.searchsorted(ids, target)
    return ids, remapped.where(target != ignore_index, ignore_index)
