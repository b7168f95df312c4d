"""Verification and identification: of embeddings, pairs, and the common verification sets."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy

if TYPE_CHECKING:
    from .embedding import embed, embed_store, pixel_embeddings
    from .metrics import Identification, Verification, identify, verify, verify_pairs
    from .report import SetResult, evaluate_set
    from .sets import PairSet, TemplateSet, open_set, read_bin, read_pairs, read_templates

__all__ = [
    "Identification", "PairSet", "SetResult", "TemplateSet", "Verification", "embed",
    "embed_store", "evaluate_set", "identify", "open_set", "pixel_embeddings", "read_bin",
    "read_pairs", "read_templates", "verify", "verify_pairs",
]  # fmt: skip
_HOMES = {
    "embedding": ("embed", "embed_store", "pixel_embeddings"),
    "metrics": ("Identification", "Verification", "identify", "verify", "verify_pairs"),
    "report": ("SetResult", "evaluate_set"),
    "sets": ("PairSet", "TemplateSet", "open_set", "read_bin", "read_pairs", "read_templates"),
}
__getattr__ = lazy(__name__, _HOMES)
