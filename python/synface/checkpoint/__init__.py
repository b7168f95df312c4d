"""Checkpoints of any number of ranks, and the logs that go with them."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy

if TYPE_CHECKING:
    from ..common.files import CheckpointError as CheckpointError
    from .modules import check_shapes as check_shapes
    from .modules import load_model as load_model
    from .modules import save_model as save_model
    from .state import STATE as STATE
    from .state import TENSORS as TENSORS
    from .state import check_same as check_same
    from .state import checkpoints as checkpoints
    from .state import find as find
    from .state import load_state as load_state
    from .storage import Shard as Shard
    from .storage import Wanted as Wanted
    from .storage import load as load
    from .storage import save as save
    from .storage import share as share
    from .storage import together as together

__getattr__ = lazy(
    __name__,
    {
        ".common.files": ("CheckpointError",),
        "modules": ("check_shapes", "load_model", "save_model"),
        "state": ("STATE", "TENSORS", "check_same", "checkpoints", "find", "load_state"),
        "storage": ("Shard", "Wanted", "load", "save", "share", "together"),
    },
)
