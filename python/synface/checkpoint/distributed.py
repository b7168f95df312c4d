"""Checkpoints of models whose class centers are spread over ranks, by torch.distributed.checkpoint.

A checkpoint is a folder: safetensors files, some from each rank, and state.json. Any number of
ranks can go on from it, however they split the classes. Nothing in it is a pickle: torch's own
format for distributed checkpoints has one, its safetensors storage has none.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ..common.files import (
    CheckpointError,
    check_names,
    checksum,
    read_state,
    sealed,
    sync,
    verify_files,
    write_text,
)
from ..common.textfiles import read_json
from . import single as checkpoint

FORMAT = "sharded-2"
EARLIER = "sharded-1"  # without checksums
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


class Shard(Tensor):
    """This rank's rows of a tensor that is spread over ranks, as torch.distributed.checkpoint takes
    it: a DTensor would prescribe how many rows each rank has.

    Its shape is that of the whole tensor. There is nothing to compute with it.
    """

    rows: Tensor
    start: int

    @staticmethod
    def __new__(cls, rows: Tensor, start: int, total: int) -> Shard:
        shape = (total, *rows.shape[1:])
        shard = Tensor._make_wrapper_subclass(cls, shape, dtype=rows.dtype, device=rows.device)
        shard.rows, shard.start = rows, start
        return shard

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Any, args: Any = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        raise NotImplementedError(f"a Shard stands for rows on other ranks too: no {op}")

    def _chunk(self) -> ChunkStorageMetadata:
        offsets = [self.start] + [0] * (self.rows.dim() - 1)
        return ChunkStorageMetadata(torch.Size(offsets), self.rows.size())

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        chunk = self._chunk()
        properties = TensorProperties.create_from_tensor(self.rows)
        data = TensorWriteData(chunk, properties, self.size())
        return [WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.rows


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizers: Optimizers,
    state: dict[str, Any],
    group: Any = None,
) -> Path:
    """Writes ``folder/step-XXXXXXXX``, then removes all but the two newest checkpoints.

    All ranks call it, with one folder that all of them see. The checkpoint is written under another
    name, flushed to the disk, and renamed once all ranks are done: whatever happens on the way, the
    ones before it stay whole.

    Args:
        model: not wrapped in DistributedDataParallel (its ``.module`` is meant). What a
            `ShardedMarginHead` or `PartialFC` in it holds is saved from each rank, everything else
            from one.
        optimizers: one, or several that share no parameter. Their states are saved by the names of
            the model's parameters; their settings (learning rates and so on) are not: they are the
            caller's.
        state: goes into state.json; the first rank's.
        group: of all ranks that call this. Default: the one of all ranks.

    Raises:
        ValueError: for a ``state`` with names that a checkpoint has itself (``step``, say).
        RuntimeError: where it cannot be written (a full disk, say), or a rank has died; nothing is
            lost then.
    """
    final = folder / f"step-{step:08d}"
    part = folder / f".{final.name}.part"

    def check() -> None:
        check_names(state, ("format", "step", "bytes", "crc32"))

    def begin() -> None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)

    def checksums() -> dict[str, str]:
        return {file.name: checksum(file) for file in _own_share(part, group)}

    def end() -> None:
        sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
        if crc.keys() != sizes.keys():
            different = sorted(crc.keys() ^ sizes.keys())
            raise RuntimeError(
                f"{part}: the ranks see different files ({', '.join(different[:3])}): all of them "
                "must see one folder"
            )
        content = {"format": FORMAT, "step": step, "bytes": sizes, "crc32": crc} | state
        write_text(part / checkpoint.STATE, sealed(content))
        shutil.rmtree(final, ignore_errors=True)  # the same step, written before a resume
        part.rename(final)
        sync(folder)
        for old in checkpoint.checkpoints(folder)[:-2]:
            shutil.rmtree(old)

    first = not dist.is_initialized() or dist.get_rank(group) == 0
    together(check if first else lambda: None, group, ValueError)
    together(begin if first else lambda: None, group, RuntimeError)
    writer = dcp.HuggingFaceStorageWriter(str(part), save_distributed=True)
    dcp.save(_tensors(model, _several(optimizers)), storage_writer=writer, process_group=group)
    sums = together(checksums, group, RuntimeError)
    crc = dict(sorted(chain.from_iterable(each.items() for each in _gathered(sums, group))))
    together(end if first else lambda: None, group, RuntimeError)
    return final


def load(
    path: Path,
    model: nn.Module,
    optimizers: Optimizers = (),
    group: Any = None,
) -> dict[str, Any]:
    """Puts a checkpoint, or the newest one of a folder of them, into a model and its optimizers.

    All ranks call it; they may be more or fewer than those that saved it, and split the classes in
    another way.

    Returns:
        What state.json holds, with ``step``.

    Raises:
        CheckpointError: where there is none, or it is damaged or of another model or optimizer. The
            model may have been overwritten in part then.
    """

    def prepare() -> tuple[dict[str, Any], dict[str, Tensor], dcp.HuggingFaceStorageReader]:
        found = checkpoint.find(path)
        state, reader = load_state(found), dcp.HuggingFaceStorageReader(str(found))
        verify_files(state, _own_share(found, group), FORMAT)
        stored = _stored(found, state, reader)
        return state, _targets(found, model, _several(optimizers), stored), reader

    state, targets, reader = together(prepare, group, CheckpointError)
    try:
        dcp.load(targets, storage_reader=reader, process_group=group)
    except Exception as error:
        raise CheckpointError(f"{reader.path} cannot be read: {error}") from error
    _restore(_several(optimizers), model, targets)
    return state


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint is one of several ranks, as far as its state can be read."""
    try:
        return read_json(path / checkpoint.STATE)["format"] in (FORMAT, EARLIER)
    except (ValueError, TypeError, KeyError):
        return False


def read(
    path: Path, wanted: checkpoint.Wanted | None = None, verified: slice = slice(None)
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a checkpoint's model, put together, and its state, in one process.

    Args:
        wanted: which tensors, or rows of them. Default: all of the model's.
        verified: which of its files are compared with their checksums, for ranks that share this
            work.

    Raises:
        CheckpointError: as `load`.
    """
    state = load_state(path)
    verify_files(state, _files(path)[verified], FORMAT)
    reader = dcp.HuggingFaceStorageReader(str(path))
    stored = _stored(path, state, reader)
    shapes = {key: tuple(each.size) for key, each in stored.items() if key.startswith("model.")}
    chosen = dict.fromkeys(shapes) if wanted is None else wanted(shapes)

    def target(key: str, rows: slice | None) -> Tensor:
        shape, dtype = shapes[key], stored[key].properties.dtype
        if rows is None:
            return torch.empty(shape, dtype=dtype, device="cpu")
        start, stop, _ = rows.indices(shape[0])
        own = torch.empty((stop - start, *shape[1:]), dtype=dtype, device="cpu")
        return Shard(own, start, shape[0])

    try:
        tensors = {key: target(key, rows) for key, rows in chosen.items()}
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    except Exception as error:  # whatever a damaged file makes of torch's reader
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return {k: v.rows if isinstance(v, Shard) else v for k, v in tensors.items()}, state


def _stored(
    found: Path, state: dict[str, Any], reader: dcp.HuggingFaceStorageReader
) -> dict[str, Any]:
    """Return what the files say of their tensors; raise unless it fits into the files."""
    try:
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
        needed = sum(t.size.numel() * t.properties.dtype.itemsize for t in stored.values())
    except Exception as error:  # whatever a damaged file makes of torch's reader
        raise CheckpointError(f"{found} cannot be read: {error}") from error
    there = sum(state["bytes"].values())
    if needed > there:
        raise CheckpointError(
            f"{found} cannot be read: its tensors would take {needed:,} bytes, and its files have "
            f"{there:,}"
        )
    return stored


def together(action: Callable[[], Any], group: Any, kind: type[Exception]) -> Any:
    """What it returns, on each rank; where it fails on one, all raise its error."""
    result = failure = None
    try:
        result = action()
    except CheckpointError as error:
        failure = str(error)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    for rank, each in enumerate(_gathered(failure, group)):
        if each is not None:
            raise kind(f"rank {rank}: {each}")
    return result


def _gathered(value: Any, group: Any) -> list[Any]:
    """Return every rank's value, in the order of the ranks."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size(group)
        dist.all_gather_object(values, value, group=group)
    return values


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.name != checkpoint.STATE)


def share(group: Any) -> slice:
    """Return which of a checkpoint's files this rank verifies, of ranks that share the work."""
    if not dist.is_initialized():
        return slice(None)
    return slice(dist.get_rank(group), None, dist.get_world_size(group))


def _own_share(folder: Path, group: Any) -> list[Path]:
    return _files(folder)[share(group)]


def _several(optimizers: Optimizers) -> Sequence[torch.optim.Optimizer]:
    return (optimizers,) if isinstance(optimizers, torch.optim.Optimizer) else optimizers or ()


def _shards(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Which tensors of a model are spread: where this rank's rows begin, and how many all have."""
    return {
        f"{name}.weight" if name else "weight": (module.class_start, module.num_classes)
        for name, module in model.named_modules()
        if hasattr(module, "class_start")
    }


def _tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """By name: parameters and buffers, and the optimizer's states."""
    shards = _shards(model)
    tensors = {}
    for name, value in model.state_dict().items():
        tensors[f"model.{name}"] = Shard(value, *shards[name]) if name in shards else value
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    for parameter, values in chain.from_iterable(o.state.items() for o in optimizers):
        name = names[parameter]
        for key, value in values.items():
            value = checkpoint.state_tensor(value)
            by_row = name in shards and value.dim() and len(value) == len(parameter)
            tensors[f"optimizer.{name}.{key}"] = Shard(value, *shards[name]) if by_row else value
    return tensors


def load_state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors.

    Raises:
        CheckpointError: where there is none, it is damaged, or files of it are missing or cut
            short. What the files hold is verified when they are read.
    """
    state = read_state(path / checkpoint.STATE, FORMAT, EARLIER)
    if not isinstance(state.get("step"), int) or not isinstance(state.get("bytes"), dict):
        raise CheckpointError(f"{path / checkpoint.STATE}: step must be int and bytes a dict")
    files = {file.name: file.stat().st_size for file in path.iterdir()}
    del files[checkpoint.STATE]
    if files != state["bytes"]:
        different = sorted(set(files.items()) ^ set(state["bytes"].items()))
        raise CheckpointError(
            f"{path}: files are missing, cut short or not of this checkpoint: "
            f"{sorted({name for name, _ in different})}"
        )
    return state


def _targets(
    found: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    stored: dict[str, Any],
) -> dict[str, Tensor]:
    """What to read into: the model's own tensors, and new ones for the optimizer's states."""
    targets, shards = _tensors(model, ()), _shards(model)
    if optimizers:
        parameters = dict(model.named_parameters())
        known = {p for o in optimizers for group in o.param_groups for p in group["params"]}
        for key, metadata in stored.items():
            if not key.startswith("optimizer."):
                continue
            name = key.removeprefix("optimizer.").rpartition(".")[0]
            if parameters.get(name) not in known:
                raise CheckpointError(f"{found} is of another optimizer: {key}")
            device = parameters[name].device if metadata.size else None
            shape, dtype = list(metadata.size), metadata.properties.dtype
            start, total = shards.get(name, (0, -1))
            if shape[:1] == [total]:
                shape[0] = len(parameters[name])
                rows = torch.empty(shape, dtype=dtype, device=device)
                targets[key] = Shard(rows, start, total)
            else:
                targets[key] = torch.empty(shape, dtype=dtype, device=device)
    expected = {key: value for key, value in targets.items() if key.startswith("model.")}
    saved = {key: value for key, value in stored.items() if key.startswith("model.")}
    if saved.keys() != expected.keys():
        raise CheckpointError(
            f"{found} is of another model: {sorted(saved.keys() ^ expected.keys())[:3]} are "
            "missing or unknown"
        )
    for key, value in expected.items():
        came, dtype = saved[key].size, saved[key].properties.dtype
        if came != value.size() or dtype != value.dtype:
            raise CheckpointError(
                f"{found} is of another model: {key} must be {value.dtype} {tuple(value.size())}, "
                f"got {dtype} {tuple(came)}"
            )
    return targets


def _restore(
    optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, targets: dict[str, Tensor]
) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in targets.items():
        if key.startswith("optimizer."):
            name, _, state = key.removeprefix("optimizer.").rpartition(".")
            found.setdefault(name, {})[state] = value.rows if isinstance(value, Shard) else value
    for optimizer in optimizers:
        own = optimizer.state_dict()
        parameters = chain.from_iterable(g["params"] for g in optimizer.param_groups)
        indices = chain.from_iterable(g["params"] for g in own["param_groups"])
        states = {
            index: found[names[parameter]]
            for parameter, index in zip(parameters, indices, strict=True)
            if names[parameter] in found
        }
        optimizer.load_state_dict(own | {"state": states})
