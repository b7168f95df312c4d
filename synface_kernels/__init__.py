"""Fused kernels for training face recognition on synthetic faces: drop-in torch ops."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._memory import empty_cache
    from ._select import explain
    from .ops.domain_mixup.op import domain_mixup, identity_mixup
    from .ops.hypersphere_repulsion.energies import (
        ClosestPair,
        Gaussian,
        Hinge,
        KoLeo,
        Log,
        LogSumExp,
        MaxCosine,
        Riesz,
    )
    from .ops.hypersphere_repulsion.op import hypersphere_repulsion, nearest_neighbors
    from .ops.margin_cross_entropy.margins import ArcFace, CombinedMargin, CosFace, SphereFace
    from .ops.margin_cross_entropy.op import MarginStats, margin_cross_entropy
    from .ops.row_update.op import row_adamw_, row_sgd_
    from .ops.row_update.updates import AdamWUpdate, SGDUpdate
    from .ops.sample_classes.op import sample_classes

try:
    __version__ = version("synface-kernels")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

# The module of each public name. Unless torch is imported already, they are imported on first
# access, so that `synface_kernels.numpy` works without torch.
_HOMES = {
    "AdamWUpdate": "ops.row_update.updates",
    "ArcFace": "ops.margin_cross_entropy.margins",
    "ClosestPair": "ops.hypersphere_repulsion.energies",
    "CombinedMargin": "ops.margin_cross_entropy.margins",
    "CosFace": "ops.margin_cross_entropy.margins",
    "Gaussian": "ops.hypersphere_repulsion.energies",
    "Hinge": "ops.hypersphere_repulsion.energies",
    "KoLeo": "ops.hypersphere_repulsion.energies",
    "Log": "ops.hypersphere_repulsion.energies",
    "LogSumExp": "ops.hypersphere_repulsion.energies",
    "MarginStats": "ops.margin_cross_entropy.op",
    "MaxCosine": "ops.hypersphere_repulsion.energies",
    "Riesz": "ops.hypersphere_repulsion.energies",
    "SGDUpdate": "ops.row_update.updates",
    "SphereFace": "ops.margin_cross_entropy.margins",
    "domain_mixup": "ops.domain_mixup.op",
    "empty_cache": "_memory",
    "explain": "_select",
    "hypersphere_repulsion": "ops.hypersphere_repulsion.op",
    "identity_mixup": "ops.domain_mixup.op",
    "margin_cross_entropy": "ops.margin_cross_entropy.op",
    "nearest_neighbors": "ops.hypersphere_repulsion.op",
    "row_adamw_": "ops.row_update.op",
    "row_sgd_": "ops.row_update.op",
    "sample_classes": "ops.sample_classes.op",
}

__all__ = [
    "AdamWUpdate",
    "ArcFace",
    "ClosestPair",
    "CombinedMargin",
    "CosFace",
    "Gaussian",
    "Hinge",
    "KoLeo",
    "Log",
    "LogSumExp",
    "MarginStats",
    "MaxCosine",
    "Riesz",
    "SGDUpdate",
    "SphereFace",
    "domain_mixup",
    "empty_cache",
    "explain",
    "hypersphere_repulsion",
    "identity_mixup",
    "margin_cross_entropy",
    "nearest_neighbors",
    "row_adamw_",
    "row_sgd_",
    "sample_classes",
]


def _import_all() -> None:
    """Import every public name, which also registers the ops with torch."""
    globals().update({n: getattr(import_module(f".{h}", __name__), n) for n, h in _HOMES.items()})


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _import_all()
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


if "torch" in sys.modules:
    _import_all()
