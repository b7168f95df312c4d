"""Synthetic faces: generators, packed identities, and image folders made from both."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy

if TYPE_CHECKING:
    from .controls import Vary as Vary
    from .dataset import synthesize as synthesize
    from .embeddings import read_embeddings as read_embeddings
    from .generators import EigenfaceGenerator as EigenfaceGenerator
    from .generators import FaceGenerator as FaceGenerator
    from .generators import HeadGenerator as HeadGenerator
    from .generators import OnnxGenerator as OnnxGenerator
    from .generators import TorchScriptGenerator as TorchScriptGenerator
    from .generators import open_generator as open_generator
    from .sources import GeneratedSource as GeneratedSource

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
