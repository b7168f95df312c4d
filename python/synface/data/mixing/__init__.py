"""Mixing batches: draws the shares, mixes the pixels in one pass, and says what each image now is.

A mixed image has K labels with weights that sum to 1, in the form that
`synface_kernels.margin_cross_entropy` takes: targets (N, K) and weights (N, K), never (N, C).

Every random number is drawn from the `torch.Generator` that a call is given (None: the CPU's global
one), on that generator's device. So one seed of a CPU generator means one result, whatever device
the images are on. A GPU is never waited for: what was drawn is sent to it, and labels on it are
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
