"""SplitMix64 (Steele et al., OOPSLA 2014) on int64 tensors, which wrap like uint64."""

from __future__ import annotations

from torch import Tensor

GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def signed(word: int) -> int:
    """Return the int64 with the bits of a uint64."""
    return word - 2**64 if word >= 2**63 else word


def shifted(z: Tensor, by: int) -> Tensor:
    """Shift right logically: zeros come in from the left."""
    return (z >> by) & (2 ** (64 - by) - 1)


def mixed(z: Tensor) -> Tensor:
    """Return the generator's output for a state."""
    z = (z ^ shifted(z, 30)) * signed(MIX1)
    z = (z ^ shifted(z, 27)) * signed(MIX2)
    return z ^ shifted(z, 31)
