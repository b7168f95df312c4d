"""The folder of a checkpoint and its state.json, which say what a checkpoint is of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.files import CHECKSUM, CheckpointError, read_state, verify

FORMAT = 3
# One process wrote formats 1 and 2, several ranks sharded-1 and sharded-2.
EARLIER, WITHOUT_CHECKSUMS = ("sharded-2", 2), ("sharded-1", 1)
TENSORS, STATE = "tensors.safetensors", "state.json"


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


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
        came, expected = sizes.get(name), state["bytes"].get(name)
        if came is None:
            raise CheckpointError(f"{path / name} is missing: restore a copy of the checkpoint")
        if expected is None:
            raise CheckpointError(f"{path / name} is not of this checkpoint: remove it")
        if came != expected:
            raise CheckpointError(
                f"{path / name} is cut short or changed: expected {expected} bytes, got {came}"
            )
    return state


def tensor_files(path: Path) -> list[Path]:
    """Return the files of a checkpoint that hold tensors, by name."""
    return sorted(path.glob("*.safetensors"))


def verify_files(path: Path, state: Mapping[str, Any], share: slice = slice(None)) -> None:
    """Raise CheckpointError for the first file of tensors whose CRC-32 is not the state's.

    Args:
        share: which of the files, for ranks that share the work.
    """
    crc = state.get("crc32")
    if crc is None and state["format"] in WITHOUT_CHECKSUMS:
        return
    for file in tensor_files(path)[share]:
        verify(file, crc.get(file.name) if isinstance(crc, dict) else crc)


def check_names(state: Mapping[str, Any]) -> None:
    """Raise ValueError if a caller's state has keys that are reserved for the checkpoint."""
    if taken := sorted(state.keys() & {"format", "step", "bytes", "crc32", CHECKSUM}):
        raise ValueError(
            f"state must not hold {', '.join(taken)}, which every checkpoint has: rename them"
        )


def check_same(found: Path, came: Any, wanted: Mapping[str, Any], part: str | None = None) -> None:
    """Compare a checkpoint's description, or one part of it, with the expected one.

    Raises:
        CheckpointError: for the first key that differs, or for a part that is no dict.
    """
    if not isinstance(came, Mapping):
        raise CheckpointError(f"{found / STATE}: {part} must be dict, got {came!r}")
    for key, value in wanted.items():
        if came.get(key) != value:
            name = key if part is None else f"{part}'s {key}"
            raise CheckpointError(
                f"{found} is of another run: its {name} is {came.get(key)!r}, expected {value!r}"
            )
