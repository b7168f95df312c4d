"""Verification and identification: of embeddings, pairs, and the field's sets."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy

if TYPE_CHECKING:
    from .metrics import Identification as Identification
    from .metrics import Verification as Verification
    from .metrics import embed as embed
    from .metrics import embed_store as embed_store
    from .metrics import identify as identify
    from .metrics import pixel_embeddings as pixel_embeddings
    from .metrics import verify as verify
    from .metrics import verify_pairs as verify_pairs
    from .report import SetResult as SetResult
    from .report import evaluate_set as evaluate_set
    from .sets import PairSet as PairSet
    from .sets import TemplateSet as TemplateSet
    from .sets import open_set as open_set
    from .sets import read_bin as read_bin
    from .sets import read_pairs as read_pairs
    from .sets import read_templates as read_templates

__getattr__ = lazy(
    __name__,
    {
        "metrics": (
            "Identification",
            "Verification",
            "embed",
            "embed_store",
            "identify",
            "pixel_embeddings",
            "verify",
            "verify_pairs",
        ),
        "report": (
            "SetResult",
            "evaluate_set",
        ),
        "sets": (
            "PairSet",
            "TemplateSet",
            "open_set",
            "read_bin",
            "read_pairs",
            "read_templates",
        ),
    },
)
