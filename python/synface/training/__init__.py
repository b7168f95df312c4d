"""Training: a backbone and a margin head, with checkpoints that resume bitwise."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy

if TYPE_CHECKING:
    from .config import TrainConfig
    from .loop import Progress, Trained, train
    from .model import load_backbone
    from .schedule import learning_rate
    from .sources import Batch, FacesSource, MixedSource, Source

__all__ = [
    "Batch",
    "FacesSource",
    "MixedSource",
    "Progress",
    "Source",
    "TrainConfig",
    "Trained",
    "learning_rate",
    "load_backbone",
    "train",
]
__getattr__ = lazy(
    __name__,
    {
        "config": ("TrainConfig",),
        "loop": (
            "Progress",
            "Trained",
            "train",
        ),
        "model": ("load_backbone",),
        "schedule": ("learning_rate",),
        "sources": (
            "Batch",
            "FacesSource",
            "MixedSource",
            "Source",
        ),
    },
)
