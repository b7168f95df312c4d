"""Batch mixers, which draw the shares, mix pixels in one pass, and return mixed labels.

A mixed image has K labels with weights that sum to 1, in the form that
`synface_kernels.margin_cross_entropy` takes: targets (N, K) and weights (N, K), never (N, C).

Every random number is drawn from the `torch.Generator` that a call is given (None: the CPU's global
one), on that generator's device. So a CPU generator's seed determines the result, whatever device
the images are on. No call synchronizes with a GPU: draws are sent to it, and labels on it are
checked by asynchronous assertions.
"""

from .batch import CutMix, Mixup
from .domain import DomainMixup, IdentityMixup, MixedIdentities
from .parts import Mixed
from .ratios import Beta, Constant, Grid, Ratio
from .timm_mixup import TimmMixup

__all__ = [
    "Beta", "Constant", "CutMix", "DomainMixup", "Grid", "IdentityMixup", "Mixed",
    "MixedIdentities", "Mixup", "Ratio", "TimmMixup",
]  # fmt: skip
