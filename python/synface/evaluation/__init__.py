"""Verification and identification: of embeddings, pairs, and the common verification sets."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy

if TYPE_CHECKING:
    from .embedding import embed, embed_pixels, embed_store, pixel_embeddings
    from .leak import Leak, nearest_of_another, pixel_digests
    from .metrics import Identification, Verification, identify, verify, verify_pairs
    from .report import SetResult, evaluate_set
    from .scores import (
        PairScores,
        ScoreDensities,
        ScoredPair,
        hardest_pairs,
        score_densities,
        scores_of_all,
        scores_of_pairs,
    )
    from .sets import PairSet, TemplateSet, open_set, read_bin, read_pairs, read_templates

__all__ = [
    "Identification", "Leak", "PairScores", "PairSet", "ScoreDensities", "ScoredPair", "SetResult",
    "TemplateSet", "Verification", "embed", "embed_pixels", "embed_store", "evaluate_set",
    "hardest_pairs", "identify", "nearest_of_another", "open_set", "pixel_digests",
    "pixel_embeddings", "read_bin", "read_pairs", "read_templates", "score_densities",
    "scores_of_all", "scores_of_pairs", "verify", "verify_pairs",
]  # fmt: skip
_HOMES = {
    "embedding": ("embed", "embed_pixels", "embed_store", "pixel_embeddings"),
    "leak": ("Leak", "nearest_of_another", "pixel_digests"),
    "metrics": ("Identification", "Verification", "identify", "verify", "verify_pairs"),
    "report": ("SetResult", "evaluate_set"),
    "scores": (
        "PairScores",
        "ScoreDensities",
        "ScoredPair",
        "hardest_pairs",
        "score_densities",
        "scores_of_all",
        "scores_of_pairs",
    ),
    "sets": ("PairSet", "TemplateSet", "open_set", "read_bin", "read_pairs", "read_templates"),
}
__getattr__ = lazy(__name__, _HOMES)
