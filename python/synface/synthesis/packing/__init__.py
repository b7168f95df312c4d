"""Packing: identities spread on the hypersphere, and their gap to the theoretical bound."""

from . import bounds
from .files import pack
from .packer import OBJECTIVES, PackConfig, Packed, Packer, Progress, closest_pair

__all__ = [
    "OBJECTIVES",
    "PackConfig",
    "Packed",
    "Packer",
    "Progress",
    "bounds",
    "closest_pair",
    "pack",
]
