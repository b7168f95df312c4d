"""Synthetic faces: generators, packed identities, and image folders made from both."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy

if TYPE_CHECKING:
    from .controls import Vary
    from .dataset import synthesize
    from .embeddings import read_embeddings
    from .generators import (
        EigenfaceGenerator,
        FaceGenerator,
        HeadGenerator,
        OnnxGenerator,
        TorchScriptGenerator,
        open_generator,
    )
    from .sources import GeneratedSource

__all__ = [
    "EigenfaceGenerator",
    "FaceGenerator",
    "GeneratedSource",
    "HeadGenerator",
    "OnnxGenerator",
    "TorchScriptGenerator",
    "Vary",
    "open_generator",
    "read_embeddings",
    "synthesize",
]
__getattr__ = lazy(
    __name__,
    {
        "controls": ("Vary",),
        "dataset": ("synthesize",),
        "embeddings": ("read_embeddings",),
        "generators": (
            "EigenfaceGenerator",
            "FaceGenerator",
            "HeadGenerator",
            "OnnxGenerator",
            "TorchScriptGenerator",
            "open_generator",
        ),
        "sources": ("GeneratedSource",),
    },
)
