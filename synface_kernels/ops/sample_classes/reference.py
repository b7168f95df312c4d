"""The definition of the classes that a seed samples, draw by draw.

Draw i of a seed is SplitMix64's i-th output h, scaled to floor(h·C / 2^64): uniform up to a bias of
C/2^64. Of S sampled classes P are positives, and the negatives are

- the first S − P distinct classes of the stream that are not positives, or,
- where fewer are left out than sampled, all but the first C − S such classes.

By symmetry either is uniform among the sets of S − P negatives.
"""

from __future__ import annotations

import bisect

from torch import Tensor

from ..._splitmix import GOLDEN, MIX1, MIX2

_WORD = 2**64 - 1


def draw(seed: int, i: int, num_classes: int) -> int:
    """Return draw i of a seed's stream, a class."""
    z = (seed + (i + 1) * GOLDEN) & _WORD
    z = ((z ^ (z >> 30)) * MIX1) & _WORD
    z = ((z ^ (z >> 27)) * MIX2) & _WORD
    return ((z ^ (z >> 31)) * num_classes) >> 64


def sample_classes(
    target: Tensor, num_classes: int, num_sampled: int, seed: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Return the sampled classes (S,), increasing, and the target as indices in them."""
    labels = target.flatten().tolist()
    positives = set(labels) - {ignore_index}
    size = max(num_sampled, len(positives))
    into, out_of = size - len(positives), num_classes - size
    drawn: set[int] = set()
    i = 0
    while len(drawn) < min(into, out_of):
        drawn |= {draw(seed, i, num_classes)} - positives
        i += 1
    chosen = positives | drawn if into <= out_of else set(range(num_classes)) - drawn
    class_ids = sorted(chosen)
    remapped = [
        label if label == ignore_index else bisect.bisect_left(class_ids, label) for label in labels
    ]
    new = target.new_tensor
    return new(class_ids), new(remapped).view(target.shape)
