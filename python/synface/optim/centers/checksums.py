"""Checksums of many rows at once, by multilinear hashing."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK_BYTES = 2**17  # of records at once, so that their widened words stay in the cache


@functools.cache
def _keys(count: int) -> NDArray[np.uint64]:
    """Return the hash's random keys, always the same."""
    return np.random.Philox(key=0x5F3C, counter=0).random_raw(count)


def row_checksums(ids: NDArray[np.int64], last_step: Tensor, records: Tensor) -> NDArray[np.uint32]:
    """Return a checksum of each row's index, last step and record, (N,) uint32.

    It is the upper half of Σ key_i·word_i modulo 2^64 over 32-bit words, with random 64-bit keys:
    two different rows have the same checksum with a probability of 2^-32.

    Args:
        ids: (N,) row indices.
        last_step: (N,) int32.
        records: (N, width), contiguous.

    Source: Lemire and Kaser, "Strongly universal string hashing is fast", 2014: multilinear.
    """
    content = records.view(torch.uint8).numpy()
    if rest := -content.shape[1] % 4:
        content = np.pad(content, ((0, 0), (0, rest)))
    words = content.view(np.uint32)
    keys = _keys(words.shape[1] + 3)
    sums = ids.astype(np.uint64) * keys[0] + keys[2]
    sums += last_step.numpy().astype(np.uint64) * keys[1]
    block = max(1, BLOCK_BYTES // content.shape[1])
    for start in range(0, len(words), block):
        part = slice(start, start + block)
        sums[part] += np.einsum("ij,j->i", words[part].astype(np.uint64), keys[3:])
    return (sums >> np.uint64(32)).astype(np.uint32)
