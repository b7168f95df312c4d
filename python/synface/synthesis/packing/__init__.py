"""Packing: identities spread on the hypersphere, and their gap to the theoretical bound."""

from ...common.renamed import old_names
from . import bounds
from .config import OBJECTIVES, PackConfig
from .files import pack
from .objectives import closest_pair
from .packer import Packed, Packer, PackingProgress
from .pairs import ClosePair, PairsAbove, closest_pairs, nearest_cosines, pairs_above
from .selection import farthest_points

__all__ = [
    "OBJECTIVES",
    "ClosePair",
    "PackConfig",
    "Packed",
    "Packer",
    "PackingProgress",
    "PairsAbove",
    "bounds",
    "closest_pair",
    "closest_pairs",
    "farthest_points",
    "nearest_cosines",
    "pack",
    "pairs_above",
]

__getattr__ = old_names(__name__, Progress="PackingProgress")
