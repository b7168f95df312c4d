"""Optimizers that step only the rows that have a gradient, and class centers in files."""

from .rows import RowAdamW, RowSGD

__all__ = ["RowAdamW", "RowSGD"]
