"""Class centers in memory or in memory-mapped files, trained by sampled rows.

A step reads and writes only its sampled rows, so disk space limits the number of identities.
"""

from .centers import Centers
from .config import CentersConfig

__all__ = ["Centers", "CentersConfig"]
