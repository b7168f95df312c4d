"""Classification heads: modules that hold the class centers and return the loss."""

from .margin import AdaFace, MagFace, MarginHead
from .metric_learning import ArcFaceLoss, CosFaceLoss, SubCenterArcFaceLoss
from .partial_fc import PartialFC
from .sharded import ShardedMarginHead

__all__ = [
    "AdaFace",
    "ArcFaceLoss",
    "CosFaceLoss",
    "MagFace",
    "MarginHead",
    "PartialFC",
    "ShardedMarginHead",
    "SubCenterArcFaceLoss",
]
