"""Fused kernels for training face recognition on synthetic faces: drop-in torch ops."""

from importlib.metadata import PackageNotFoundError, version

from ._select import explain
from .ops.domain_mixup.op import domain_mixup, identity_mixup
from .ops.margin_cross_entropy.margins import ArcFace, CombinedMargin, CosFace, SphereFace
from .ops.margin_cross_entropy.op import MarginStats, margin_cross_entropy

try:
    __version__ = version("synface-kernels")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "ArcFace",
    "CombinedMargin",
    "CosFace",
    "MarginStats",
    "SphereFace",
    "domain_mixup",
    "explain",
    "identity_mixup",
    "margin_cross_entropy",
]
