"""Checkpoints: tensors in safetensors, everything else in JSON, written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.extras import extra
from ..common.files import (
    CheckpointError,
    check_names,
    checksum,
    read_state,
    sealed,
    sync,
    verify_files,
    write_tensors,
)

FORMAT = 2
EARLIER = 1  # without checksums
TENSORS, STATE = "tensors.safetensors", "state.json"
# Of what a checkpoint holds (names and shapes), what to read: names, and which rows; None for all.
Wanted = Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, slice | None]]


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Writes ``folder/step-XXXXXXXX``, then removes all but the two newest checkpoints.

    The checkpoint is written under another name, flushed to the disk, and renamed: whatever
    happens on the way, the ones before it stay whole.

    Raises:
        ValueError: for a ``state`` with names that a checkpoint has itself (``step``, say).
        OSError: where it cannot be written (a full disk, say); nothing is lost then.
    """
    check_names(state, ("format", "step", "tensor_bytes", "crc32"))
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    part = folder / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        write_tensors(part / TENSORS, tensors)
        size = (part / TENSORS).stat().st_size
        crc = {TENSORS: checksum(part / TENSORS)}
        state = {"format": FORMAT, "step": step, "tensor_bytes": size, "crc32": crc} | state
        (part / STATE).write_text(sealed(state), encoding="utf-8")
        sync(part / STATE)
        shutil.rmtree(final, ignore_errors=True)  # the same step, written before a resume
        part.rename(final)
        sync(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for old in checkpoints(folder)[:-2]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def find(path: Path) -> Path:
    """The checkpoint that ``path`` is, or the newest one of the run that it is.

    Raises:
        CheckpointError: where there is none.
    """
    for folder in (path, path / "checkpoints"):
        if (folder / STATE).exists() or (folder / TENSORS).exists():
            return folder
        found = checkpoints(folder)
        if found:
            return found[-1]
    raise CheckpointError(
        f"no checkpoint in {path}: expected a run's folder (with checkpoints/step-…), or a "
        f"checkpoint's (with {TENSORS} and {STATE})"
    )


def load_state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors.

    Raises:
        CheckpointError: where it is missing, cut short, damaged or not a checkpoint, naming the
            file.
    """
    state = read_state(path / STATE, FORMAT, EARLIER)
    for name, kind in (("step", int), ("config", dict), ("data", dict)):
        if not isinstance(state.get(name), kind):
            raise CheckpointError(
                f"{path / STATE}: {name} must be {kind.__name__}, got {state.get(name)!r}"
            )
    return state


def load(
    path: Path, wanted: Wanted | None = None, verified: slice = slice(None)
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint.

    Args:
        wanted: which tensors, or rows of them. Default: all.
        verified: which of its files, of which there is one, are compared with their checksums, for
            ranks that share this work.

    Raises:
        CheckpointError: as `load_state`, and for tensors that are not those that were written.
    """
    with extra("train", "reading checkpoints"):
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file

    state = load_state(path)
    file = path / TENSORS
    try:
        size = file.stat().st_size
        if size != state.get("tensor_bytes"):
            raise CheckpointError(
                f"{file} is cut short or changed: expected {state.get('tensor_bytes')} bytes, "
                f"got {size}"
            )
        verify_files(state, [file][verified], FORMAT)
        if wanted is None:
            return load_file(file), state
        with safe_open(file, "pt") as opened:
            names = opened.keys()
            rows = wanted({k: tuple(opened.get_slice(k).get_shape()) for k in names})
            return {
                k: opened.get_tensor(k) if r is None else opened.get_slice(k)[r]
                for k, r in rows.items()
            }, state
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from error


def check_shapes(file: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compares names and shapes with a model's.

    Raises:
        CheckpointError: naming the first tensors that differ.
    """
    problems = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    problems += [f"{name} is unknown" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        want, came = tuple(expected[name].shape), tuple(tensors[name].shape)
        if want != came:
            problems.append(f"{name}: expected shape {want}, got {came}")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        shown = "; ".join(sorted(problems)[:3])
        raise CheckpointError(f"{file} is of another model: {shown}{more}")


def check_same(
    found: Path, came: Mapping[str, Any], wanted: Mapping[str, Any], part: str | None = None
) -> None:
    """Compares what a checkpoint was made of, or a part of that, with what it should be.

    Raises:
        CheckpointError: naming the first key that differs.
    """
    for key, value in wanted.items():
        if came.get(key) != value:
            name = key if part is None else f"{part}'s {key}"
            raise CheckpointError(
                f"{found} is of another run: its {name} is {came.get(key)!r}, expected {value!r}"
            )


def optimizer_tensors(prefix: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's states, named ``prefix.parameter.state``."""
    return {
        f"{prefix}.{index}.{name}": state_tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def state_tensor(value: Any) -> Tensor:
    """Return an optimizer's state as it is if it is a tensor, a number as one of the CPU."""
    if isinstance(value, Tensor):
        return value
    dtype = torch.float32 if isinstance(value, float) else None
    return torch.tensor(value, dtype=dtype, device="cpu")


def restore_optimizer(
    file: Path, prefix: str, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Puts states that `optimizer_tensors` named into an optimizer.

    Raises:
        CheckpointError: for states of other parameters, or of another optimizer; nothing is loaded
            then.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if not key.startswith(f"{prefix}."):
            continue
        index, _, name = key.removeprefix(f"{prefix}.").partition(".")
        if not index.isdecimal() or int(index) >= len(parameters):
            raise CheckpointError(f"{file} is of another optimizer: {key}")
        shape = tuple(parameters[int(index)].shape)
        shape = shape[:1] if name == "last_step" else shape  # of each row
        if value.dim() and tuple(value.shape) != shape:
            raise CheckpointError(
                f"{file}: {key} must be of shape {shape}, got {tuple(value.shape)}"
            )
        states.setdefault(int(index), {})[name] = value
    try:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": states})
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
