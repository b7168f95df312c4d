"""Optimizers that step only the rows which have a gradient, and class centers on disk."""

from .rows import RowAdamW, RowSGD

__all__ = ["RowAdamW", "RowSGD"]
