"""A checkpoint's folder, and its state.json, which describes the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.files import CheckpointError, read_state

FORMAT = 3
# One process wrote formats 1 and 2, several ranks sharded-1 and sharded-2.
EARLIER, WITHOUT_CHECKSUMS = ("sharded-2", 2), ("sharded-1", 1)
TENSORS, STATE = "tensors.safetensors", "state.json"


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def step_of(path: Path) -> int:
    """Return the number of steps in the name of a checkpoint's folder.

    Raises:
        CheckpointError: for another name.
    """
    number = path.name.removeprefix("step-")
    if not number.isdecimal():
        raise CheckpointError(f"{path} must be named step-…, with a number of steps")
    return int(number)


def find(path: Path) -> Path:
    """Return ``path`` if it is a checkpoint, else the newest checkpoint of the run in it.

    Raises:
        CheckpointError: if there is none.
    """
    for folder in (path, path / "checkpoints"):
        if (folder / STATE).exists() or (folder / TENSORS).exists():
            return folder
        if found := checkpoints(folder):
            return found[-1]
    raise CheckpointError(
        f"no checkpoint in {path}: expected a run's folder (with checkpoints/step-…), or a "
        f"checkpoint's (with {TENSORS} and {STATE})"
    )


def load_state(path: Path) -> dict[str, Any]:
    """Return everything that a checkpoint holds besides tensors.

    Raises:
        CheckpointError: if it is missing or damaged, or if a file of tensors is missing, cut short
            or added. The content of those files is verified when they are read.
    """
    formats = (FORMAT, *EARLIER, *WITHOUT_CHECKSUMS)
    state = read_state(path / STATE, *formats, checked=len(formats) - len(WITHOUT_CHECKSUMS))
    if state["format"] in (1, 2):
        state["bytes"] = {TENSORS: state.pop("tensor_bytes", None)}
    if not isinstance(state.get("step"), int) or not isinstance(state.get("bytes"), dict):
        raise CheckpointError(f"{path / STATE}: step must be int and bytes a dict")
    sizes = {file.name: file.stat().st_size for file in tensor_files(path)}
    for name in sorted(sizes.keys() | state["bytes"].keys()):
        came, expected = sizes.get(name, "no file"), state["bytes"].get(name, "no file")
        if came != expected:
            raise CheckpointError(
                f"{path / name} is missing, cut short or not of this checkpoint: expected size "
                f"{expected}, got {came}; use an earlier checkpoint, or a copy"
            )
    return state


def tensor_files(path: Path) -> list[Path]:
    """Return the files of a checkpoint that hold tensors, by name."""
    return sorted(path.glob("*.safetensors"))


def check_same(found: Path, came: Any, wanted: Mapping[str, Any], part: str | None = None) -> None:
    """Compare a checkpoint's description, or the named part of it, with the expected one.

    Raises:
        CheckpointError: for the first key that differs, or for a part that is not a dict.
    """
    if not isinstance(came, Mapping):
        name = part or "the description"
        raise CheckpointError(f"{found / STATE}: {name} must be dict, got {came!r}")
    for key, value in wanted.items():
        if came.get(key) != value:
            name = key if part is None else f"{part}'s {key}"
            raise CheckpointError(
                f"{found} is of another run: its {name} is {came.get(key)!r}, expected {value!r}"
            )
