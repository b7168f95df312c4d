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
from torch.distributed.checkpoint import ChunkStorageMetadata, WriteItem, metadata, planner
from torch.futures import Future

from ..common import files
from ..common.extras import extra
from ..common.files import CheckpointError
from ..common.rng import standard_defaults
from .state import FORMAT, STATE, TENSORS, WITHOUT_CHECKSUMS, checkpoints, load_state, tensor_files

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
        index = metadata.MetadataIndex(fqn, self._chunk().offsets)
        properties = metadata.TensorProperties.create_from_tensor(self.rows)
        data = planner.TensorWriteData(self._chunk(), properties, self.size())
        return [WriteItem(index, planner.WriteItemType.SHARD, tensor_data=data)]

    def __get_tensor_shard__(self, index: object) -> Tensor:
        return self.rows


class _Writer(dcp.HuggingFaceStorageWriter):
    """A writer of safetensors files that copies no tensor; torch's serializes all of them first."""

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        if len(plans) == 1:
            return [replace(plans[0], storage_data=TENSORS)]
        name = f"tensors-%05d-of-{len(plans):05d}.safetensors"
        return [replace(plan, storage_data=name % rank) for rank, plan in enumerate(plans, 1)]

    def write_data(self, plan: Any, planner: Any) -> Future[list[Any]]:
        tensors, offsets = {}, {}
        for item in plan.items:
            tensors[item.index.fqn] = planner.resolve_data(item)
            offsets[item.index.fqn] = {"saved_offsets": item.tensor_data.chunk.offsets}
        if tensors:
            # One entry, so that files are reproducible: safetensors writes several in random order.
            info = {"DCP_SHARDING_INFO": json.dumps(offsets, sort_keys=True)}
            files.write_tensors(Path(self.path) / plan.storage_data, tensors, info)
        done: Future[list[Any]] = Future()
        done.set_result([])
        return done


class _Reader(dcp.HuggingFaceStorageReader):
    """A reader that remaps a file every 64 MiB; in torch's reader all pages read stay resident."""

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
        state: further content of state.json; the first rank's is written.
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
        return {file.name: files.checksum(file) for file in tensor_files(part)[share(group)]}

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
        files.write_text(part / STATE, files.sealed(content))
        shutil.rmtree(final, ignore_errors=True)  # the same step, written before a resume
        part.rename(final)
        files.sync(folder)
        for old in checkpoints(folder)[:-2]:
            shutil.rmtree(old)

    together(lambda: _check_names(state) if first else None, group, ValueError)
    try:
        together(begin, group, RuntimeError)
        with standard_defaults(), _torch_checkpoint(group) as ranks:
            writer = _Writer(str(part), save_distributed=True)
            dcp.save(dict(tensors), storage_writer=writer, **ranks)
        sums = together(checksums, group, RuntimeError)
        crc = dict(sorted(chain.from_iterable(each.items() for each in _gathered(sums, group))))
        together(end, group, RuntimeError)
    except BaseException:
        if group is None:  # other ranks may still be writing
            shutil.rmtree(part, ignore_errors=True)
        raise
    return final


def _check_names(state: Mapping[str, Any]) -> None:
    """Raise ValueError if a caller's state has keys that are reserved for the checkpoint."""
    if taken := sorted(state.keys() & {"format", "step", "bytes", "crc32", files.CHECKSUM}):
        raise ValueError(
            f"state must not hold {', '.join(taken)}, which every checkpoint has: rename them"
        )


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
    state, there = verify(path, verified)
    shapes = {name: tuple(each.shape) for name, each in there.items()}
    tensors: dict[str, Tensor] = {}
    for name, rows in (dict.fromkeys(shapes) if wanted is None else wanted(shapes)).items():
        start, stop, _ = (rows or slice(None)).indices(shapes[name][0] if shapes[name] else 1)
        shape = shapes[name] if rows is None else (stop - start, *shapes[name][1:])
        tensors[name] = torch.empty(shape, dtype=there[name].dtype, device="cpu")
        if rows is not None:
            tensors[name] = Shard(tensors[name], start, shapes[name][0])
    return read_into(path, tensors), state


def read_into(path: Path, tensors: Mapping[str, Tensor], group: Any = None) -> dict[str, Tensor]:
    """Overwrite tensors with those of the same names in a checkpoint, and return them.

    Args:
        tensors: tensors and shards. Of a shard, the rows are overwritten and returned.
        group: process group of the ranks that call this. Default: this process alone.

    Raises:
        CheckpointError: if they cannot be read.
    """
    try:
        with standard_defaults(), _torch_checkpoint(group) as ranks:
            dcp.load(dict(tensors), storage_reader=_Reader(str(path)), **ranks)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return {name: each.rows if isinstance(each, Shard) else each for name, each in tensors.items()}


def verify(path: Path, share: slice = slice(None)) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Verify a checkpoint's files; return its state, and its tensors on the device "meta".

    Args:
        share: which of the files are compared with their checksums.

    Raises:
        CheckpointError: as `load_state`, for the first file whose CRC-32 is not the state's, and if
            the tensors cannot be read or would exceed the size of the files.
    """
    with extra("train", "reading checkpoints"):
        import safetensors  # noqa: F401

    state = load_state(path)
    crc = state.get("crc32")
    if crc is not None or state["format"] not in WITHOUT_CHECKSUMS:
        for file in tensor_files(path)[share]:
            files.verify(file, crc.get(file.name) if isinstance(crc, dict) else crc)
    try:
        found: dict[str, Any] = _Reader(str(path)).read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(each.size, dtype=each.properties.dtype, device="meta")
            for name, each in found.items()
        }
    except Exception as error:  # any exception that a damaged file causes in torch's reader
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    needed, there = sum(each.nbytes for each in tensors.values()), sum(state["bytes"].values())
    if needed > there:
        raise CheckpointError(
            f"{path} cannot be read: its tensors would take {needed:,} bytes, and its files have "
            f"{there:,}"
        )
    return state, tensors


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


@contextmanager
def _torch_checkpoint(group: Any) -> Iterator[dict[str, Any]]:
    """Yield torch's arguments for the ranks; raise the original of an error that torch wraps."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield {"process_group": group, "no_dist": group is None}
    except dcp.CheckpointException as error:
        rank, (failure, _) = next(iter(error.failures.items()))
        if group is None or not isinstance(failure, Exception):
            raise failure from None
        raise RuntimeError(f"rank {rank}: {type(failure).__name__}: {failure}") from error
