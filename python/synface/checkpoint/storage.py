"""The tensors of a checkpoint, by torch.distributed.checkpoint on any number of ranks.

A checkpoint is a folder: one safetensors file per rank, and state.json. Nothing in it is a pickle:
torch's own format for distributed checkpoints has one, its safetensors storage has none.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.futures import Future

from ..common.extras import extra
from ..common.files import CheckpointError, checksum, sealed, sync, write_tensors, write_text
from .state import (
    FORMAT,
    STATE,
    TENSORS,
    check_names,
    checkpoints,
    load_state,
    tensor_files,
    verify_files,
)

# Maps the shapes of a checkpoint's tensors to the names, and rows (None for all), to be read.
Wanted = Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, slice | None]]


class Shard(Tensor):
    """Some rows of a tensor that is spread over ranks, as torch.distributed.checkpoint takes it.

    A DTensor would prescribe how many rows each rank has. A shard has the whole tensor's shape and
    supports no operation.
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


class _Writer(dcp.HuggingFaceStorageWriter):
    """A writer of safetensors files that copies no tensor; torch's serializes all of them first."""

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        ranks = len(plans)
        names = [f"tensors-{rank + 1:05d}-of-{ranks:05d}.safetensors" for rank in range(ranks)]
        names = names if ranks > 1 else [TENSORS]
        return [replace(plan, storage_data=name) for plan, name in zip(plans, names, strict=True)]

    def write_data(self, plan: Any, planner: Any) -> Future[list[Any]]:
        tensors = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        offsets = {
            item.index.fqn: {"saved_offsets": item.tensor_data.chunk.offsets} for item in plan.items
        }
        metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
        if tensors:
            write_tensors(Path(self.path) / plan.storage_data, tensors, metadata)
        done: Future[list[Any]] = Future()
        done.set_result([])
        return done


class _Reader(dcp.HuggingFaceStorageReader):
    """A reader that maps a file anew for every 64 MiB; torch's keeps all that it reads resident."""

    def read_data(self, plan: Any, planner: Any) -> Future[None]:
        batch, size = [], 0
        for item in plan.items:
            batch.append(item)
            size += item.lengths.numel() * self.storage_data[item.storage_index].dtype.itemsize
            if size >= 2**26:
                super().read_data(replace(plan, items=batch), planner)
                batch, size = [], 0
        return super().read_data(replace(plan, items=batch), planner)


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], group: Any = None
) -> Path:
    """Write ``folder/step-XXXXXXXX``, then remove all but the two newest checkpoints.

    The checkpoint is written atomically, so a crash never damages the previous ones.

    Args:
        tensors: by name. On several ranks, each `Shard` is written by its rank, every other tensor
            by one of them.
        state: content of state.json besides what every checkpoint has; the first rank's counts.
        group: process group of the ranks that call this with the same folder. Default: this
            process alone.

    Raises:
        ValueError: if ``state`` has keys that are reserved for the checkpoint (``step``, say).
        OSError: if it cannot be written (a full disk, say); on several ranks RuntimeError, also if
            a rank has died. The previous checkpoints stay.
    """
    final = folder / f"step-{step:08d}"
    part = folder / f".{final.name}.part"
    first = group is None or dist.get_rank(group) == 0

    def begin() -> None:
        if first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)

    def checksums() -> dict[str, str]:
        return {file.name: checksum(file) for file in tensor_files(part)[share(group)]}

    def end() -> None:
        if not first:
            return
        sizes = {file.name: file.stat().st_size for file in tensor_files(part)}
        if crc.keys() != sizes.keys():
            different = sorted(crc.keys() ^ sizes.keys())
            raise RuntimeError(
                f"{part}: the ranks see different files ({', '.join(different[:3])}): all of them "
                "must see one folder"
            )
        content = {"format": FORMAT, "step": step, "bytes": sizes, "crc32": crc} | state
        write_text(part / STATE, sealed(content))
        shutil.rmtree(final, ignore_errors=True)  # the same step, written before a resume
        part.rename(final)
        sync(folder)
        for old in checkpoints(folder)[:-2]:
            shutil.rmtree(old)

    together(lambda: check_names(state) if first else None, group, ValueError)
    try:
        together(begin, group, RuntimeError)
        with _torch_checkpoint(group):
            writer = _Writer(str(part), save_distributed=True)
            dcp.save(dict(tensors), storage_writer=writer, **_ranks(group))
        sums = together(checksums, group, RuntimeError)
        crc = dict(sorted(chain.from_iterable(each.items() for each in _gathered(sums, group))))
        together(end, group, RuntimeError)
    except BaseException:
        if group is None:  # other ranks may still be writing
            shutil.rmtree(part, ignore_errors=True)
        raise
    return final


def load(
    path: Path, wanted: Wanted | None = None, verified: slice = slice(None)
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the state of a checkpoint, in one process.

    Args:
        path: the checkpoint's own folder; see `find`.
        wanted: which tensors, or rows of them. Default: all.
        verified: which of the files are compared with their checksums, for ranks that share this
            work.

    Raises:
        CheckpointError: as `load_state`, and if a tensor is damaged.

    Memory: the tensors', and one more copy of the largest.
    """
    state = load_state(path)
    verify_files(path, state, verified)
    there = stored(path, state)
    shapes = {name: tuple(each.shape) for name, each in there.items()}
    tensors: dict[str, Tensor] = {}
    for name, rows in (dict.fromkeys(shapes) if wanted is None else wanted(shapes)).items():
        start, stop, _ = (rows or slice(None)).indices(shapes[name][0] if shapes[name] else 1)
        shape = shapes[name] if rows is None else (stop - start, *shapes[name][1:])
        tensors[name] = torch.empty(shape, dtype=there[name].dtype, device="cpu")
        if rows is not None:
            tensors[name] = Shard(tensors[name], start, shapes[name][0])
    read_into(path, tensors)
    return {k: v.rows if isinstance(v, Shard) else v for k, v in tensors.items()}, state


def read_into(path: Path, tensors: Mapping[str, Tensor], group: Any = None) -> None:
    """Overwrite tensors and shards with those of the same names in a checkpoint.

    Raises:
        CheckpointError: if they cannot be read.
    """
    reader = _Reader(str(path))
    try:
        with _torch_checkpoint(group):
            dcp.load(dict(tensors), storage_reader=reader, **_ranks(group))
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def stored(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint on the device "meta": their names, dtypes and shapes.

    Raises:
        CheckpointError: if they cannot be read, or would exceed the size of the files.
    """
    with extra("train", "reading checkpoints"):
        import safetensors  # noqa: F401

    try:
        metadata = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(each.size, dtype=each.properties.dtype, device="meta")
            for name, each in metadata.items()
        }
    except Exception as error:  # whatever a damaged file makes of torch's reader
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    needed, there = sum(each.nbytes for each in tensors.values()), sum(state["bytes"].values())
    if needed > there:
        raise CheckpointError(
            f"{path} cannot be read: its tensors would take {needed:,} bytes, and its files have "
            f"{there:,}"
        )
    return tensors


# ---- ranks ---------------------------------------------------------------------------------------


def together(action: Callable[[], Any], group: Any, kind: type[Exception]) -> Any:
    """Run an action on every rank of a group; if it fails on one, all raise its error.

    Args:
        group: the process group; None for this process alone, which raises its error as it is.
        kind: the exception that all ranks raise.
    """
    if group is None:
        return action()
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


def share(group: Any) -> slice:
    """Return which of a checkpoint's files this rank verifies, of ranks that share the work."""
    if group is None:
        return slice(None)
    return slice(dist.get_rank(group), None, dist.get_world_size(group))


def _gathered(value: Any, group: Any) -> list[Any]:
    """Return every rank's value, in the order of the ranks."""
    values = [value]
    if group is not None:
        values *= dist.get_world_size(group)
        dist.all_gather_object(values, value, group=group)
    return values


def _ranks(group: Any) -> dict[str, Any]:
    return {"process_group": group, "no_dist": group is None}


@contextmanager
def _torch_checkpoint(group: Any) -> Iterator[None]:
    """Raise the error that torch wraps in its own, and be silent that one process is alone."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except dcp.CheckpointException as error:
        rank, (failure, _) = next(iter(error.failures.items()))
        if group is None or not isinstance(failure, Exception):
            raise failure from None
        raise RuntimeError(f"rank {rank}: {type(failure).__name__}: {failure}") from error
