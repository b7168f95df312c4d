"""Training: a backbone and a margin head, with checkpoints that resume bitwise."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy

if TYPE_CHECKING:
    from .config import TrainConfig as TrainConfig
    from .loop import Progress as Progress
    from .loop import Trained as Trained
    from .loop import train as train
    from .model import load_backbone as load_backbone
    from .schedule import learning_rate as learning_rate
    from .sources import Batch as Batch
    from .sources import FacesSource as FacesSource
    from .sources import MixedSource as MixedSource
    from .sources import Source as Source

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
