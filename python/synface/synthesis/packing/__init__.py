"""Packing: identities spread on the hypersphere, and their gap to the theoretical bound."""

from ...common.renamed import old_names
from . import bounds
from .files import pack
from .objectives import closest_pair
from .packer import OBJECTIVES, PackConfig, Packed, Packer, PackingProgress
from .selection import farthest_points

__all__ = [
    "OBJECTIVES",
    "PackConfig",
    "Packed",
    "Packer",
    "PackingProgress",
    "bounds",
    "closest_pair",
    "farthest_points",
    "pack",
]

__getattr__ = old_names(__name__, Progress="PackingProgress")
