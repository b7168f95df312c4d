"""Classification heads: modules that hold the class centres and return the loss."""

from .margin import AdaFace, MagFace, MarginHead

__all__ = ["AdaFace", "MagFace", "MarginHead"]
