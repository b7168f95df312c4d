"""Checkpoints of a model and its optimizers, by the names of the model's parameters.

One format serves one process and several ranks: any number of ranks can resume from a checkpoint,
however they split the classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..common.files import CheckpointError
from ..common.renamed import old_names
from . import storage
from .state import find
from .storage import Shard, read_into, share, together, verify

Optimizers = (
    Mapping[str, torch.optim.Optimizer]
    | Sequence[torch.optim.Optimizer]
    | torch.optim.Optimizer
    | None
)
__getattr__ = old_names(__name__, save="save_model", load="load_model")
# States that have the shape of their parameter.
_ELEMENTWISE = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def save_model(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizers: Optimizers,
    state: dict[str, Any],
    group: Any = None,
) -> Path:
    """Write ``folder/step-XXXXXXXX``, then remove all but the two newest checkpoints.

    All ranks call it, with one shared folder. The checkpoint is written atomically, so a crash of
    any rank never damages the previous ones.

    Args:
        model: not wrapped in DistributedDataParallel (pass its ``.module``). The class centers of a
            `ShardedMarginHead` or `PartialFC` in it are saved from each rank, everything else from
            one.
        optimizers: one, or several that share no parameter. Their states are saved by the names of
            the model's parameters; their settings (learning rates and so on) are not saved.
        state: further content of state.json; the first rank's is written.
        group: process group of all ranks that call this. Default: all ranks.

    Raises:
        ValueError, OSError, RuntimeError: as `storage.save`.

    Memory: on a CPU no copy of a tensor; from a GPU, this rank's tensors once on the CPU.
    """
    names, sharded = _names(model), _sharding(model)
    tensors = {f"model.{name}": sharded(name, each) for name, each in model.state_dict().items()}
    for parameter, values in chain.from_iterable(o.state.items() for o in _several(optimizers)):
        name = names[parameter]
        for key, value in values.items():
            if not isinstance(value, Tensor):
                dtype = torch.float32 if isinstance(value, float) else None
                value = torch.tensor(value, dtype=dtype, device="cpu")
            tensors[f"optimizer.{name}.{key}"] = sharded(name, value)
    return storage.save(folder, step, tensors, state, _all_ranks(group))


def load_model(
    path: Path, model: nn.Module, optimizers: Optimizers = (), group: Any = None
) -> dict[str, Any]:
    """Load a checkpoint, or the newest one of a run, into a model and its optimizers.

    All ranks call it; their number, and their split of the classes, may differ from the saved ones.

    Args:
        path: a run, or one of its checkpoints.
        model, optimizers, group: as in `save_model`. Checkpoints of one process before format 3
            need the optimizers by name, as they were saved.

    Returns:
        The content of state.json, with ``step``.

    Raises:
        CheckpointError: if there is none, or it is damaged, or of another model or optimizer. The
            model may have been overwritten in part then.

    Memory: the optimizers' new states, and one more copy of the largest tensor.
    """
    group = _all_ranks(group)

    def prepare() -> tuple[Path, dict[str, Any], dict[str, str], dict[str, Tensor]]:
        found = find(path)
        state, there = verify(found, share(group))
        keys = {key: key for key in there}
        if state["format"] in (1, 2):
            keys = _present_keys(there, model, optimizers)
        there = {keys[key]: value for key, value in there.items()}
        return found, state, keys, _targets(found, model, _several(optimizers), there)

    found, state, keys, targets = together(prepare, group, CheckpointError)
    wanted = {key: targets[now] for key, now in keys.items() if now in targets}
    read = {keys[key]: value for key, value in read_into(found, wanted, group).items()}
    _restore(found, model, _several(optimizers), read)
    return state


def check_shapes(
    found: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Compare the names, shapes and dtypes of a checkpoint's tensors with a model's.

    Raises:
        CheckpointError: for the first tensors that differ.
    """
    problems = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    problems += [f"{name} is unknown" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        want, came = expected[name], tensors[name]
        if want.shape != came.shape:
            problems.append(f"{name}: expected shape {tuple(want.shape)}, got {tuple(came.shape)}")
        elif want.dtype != came.dtype:
            problems.append(f"{name}: expected {want.dtype}, got {came.dtype}")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        shown = "; ".join(sorted(problems)[:3])
        raise CheckpointError(f"{found} is of another model: {shown}{more}")


def _all_ranks(group: Any) -> Any:
    """Return the group, by default the one of all ranks; None if there is no other process."""
    initialized = dist.is_available() and dist.is_initialized()
    return dist.group.WORLD if group is None and initialized else group


def _several(optimizers: Optimizers) -> list[torch.optim.Optimizer]:
    if isinstance(optimizers, torch.optim.Optimizer):
        return [optimizers]
    return list(optimizers.values() if isinstance(optimizers, Mapping) else optimizers or ())


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _sharding(model: nn.Module) -> Callable[[str, Tensor], Tensor]:
    """Return a function that makes a `Shard` of this rank's rows of a parameter or of its state."""
    heads: dict[str, Any] = {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if hasattr(module, "class_start")
    }

    def sharded(name: str, value: Tensor) -> Tensor:
        head = heads.get(name)
        if head is None or value.shape[:1] != head.weight.shape[:1]:
            return value
        return Shard(value, head.class_start, head.num_classes)

    return sharded


def _targets(
    found: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    there: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return the tensors to read into: the model's own, and new ones for the optimizers' states."""
    known, sharded = _names(model), _sharding(model)
    targets = {f"model.{name}": sharded(name, each) for name, each in model.state_dict().items()}
    owned = {known[p]: p for p in chain.from_iterable(map(_parameters, optimizers)) if p in known}
    states = {key: each for key, each in there.items() if key.startswith("optimizer.")}
    check_shapes(found, {k: v for k, v in there.items() if k not in states}, targets)
    for key, value in states.items() if optimizers else ():
        name, _, state = key.removeprefix("optimizer.").rpartition(".")
        if name not in owned:
            raise CheckpointError(f"{found} is of another optimizer: {key}")
        whole = targets[f"model.{name}"].shape
        rows = whole[:1] if state == "last_step" else whole
        if value.dim() and state in ("last_step", *_ELEMENTWISE) and value.shape != rows:
            raise CheckpointError(
                f"{found}: {key} must be of shape {tuple(rows)}, got {tuple(value.shape)}"
            )
        by_row = value.dim() and value.shape[:1] == whole[:1]
        shape = (len(owned[name]), *value.shape[1:]) if by_row else value.shape
        device = owned[name].device if value.dim() else "cpu"
        local = torch.empty(shape, dtype=value.dtype, device=device)
        targets[key] = sharded(name, local) if by_row else local
    return targets


def _restore(
    found: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    read: Mapping[str, Tensor],
) -> None:
    """Load the tensors that were read into the model and the optimizers."""
    names, states = _names(model), defaultdict[str, dict[str, Tensor]](dict)
    for key, value in read.items():
        name, _, state = key.partition(".")[2].rpartition(".")
        if key.startswith("optimizer."):
            states[name][state] = value
    # including tensors that are in the model's memory already, so that its hooks run
    own = {k.removeprefix("model."): v for k, v in read.items() if k.startswith("model.")}
    model.load_state_dict(own)
    for optimizer in optimizers:
        parameters = enumerate(_parameters(optimizer))
        known = {index: states[names[p]] for index, p in parameters if names.get(p) in states}
        try:
            optimizer.load_state_dict(optimizer.state_dict() | {"state": known})
        except ValueError as error:
            raise CheckpointError(f"{found}: {error}") from error


def _present_keys(
    stored: Iterable[str], model: nn.Module, optimizers: Optimizers
) -> dict[str, str]:
    """Return the current key of each tensor of a checkpoint of format 1 or 2.

    Training named a state OPTIMIZER.INDEX.STATE, with the parameter's index in the optimizer.
    Recipes put "optimizer." before that, and no "model." before the model's tensors.
    """
    recipe = not any(key.startswith("model.") for key in stored)
    names, renamed = _names(model), {}
    for name, optimizer in optimizers.items() if isinstance(optimizers, Mapping) else ():
        prefix = f"optimizer.{name}" if recipe else name
        for index, parameter in enumerate(_parameters(optimizer)):
            renamed[f"{prefix}.{index}"] = f"optimizer.{names[parameter]}"

    def present(key: str) -> str:
        parameter, _, state = key.rpartition(".")
        if parameter in renamed:
            return f"{renamed[parameter]}.{state}"
        return f"model.{key}" if recipe and not key.startswith("optimizer.") else key

    return {key: present(key) for key in stored}
