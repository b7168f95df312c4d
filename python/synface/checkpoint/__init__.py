"""Checkpoints of any number of ranks, and their logs."""

from typing import TYPE_CHECKING

from ..common.files import CheckpointError
from ..common.lazy import lazy
from .state import (  # noqa: F401
    STATE,
    TENSORS,
    check_same,
    checkpoints,
    find,
    load_state,
    step_of,
)

if TYPE_CHECKING:
    from .modules import check_shapes, load_model, save_model  # noqa: F401
    from .storage import Shard, Wanted, load, save, share, together  # noqa: F401

__all__ = [
    "CheckpointError", "Shard", "checkpoints", "find", "load", "load_model", "load_state", "save",
    "save_model", "step_of",
]  # fmt: skip
__getattr__ = lazy(  # torch.distributed.checkpoint takes a second to import
    __name__,
    {
        "modules": ("check_shapes", "load_model", "save_model"),
        "storage": ("Shard", "Wanted", "load", "save", "share", "together"),
    },
)
