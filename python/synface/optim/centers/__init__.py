"""Class centers in memory or in memory-mapped files, trained by sampled rows.

With sampling a step touches only its rows, so that the number of identities is bounded by the disk.
"""

from .centers import Centers
from .config import CentersConfig

__all__ = ["Centers", "CentersConfig"]
