"""Embeddings in files: safetensors or .npy, never pickles."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..common.check import check_memory, check_rows
from ..common.extras import extra

NAME = "embeddings"  # the tensor's name in a safetensors file with several


def read_embeddings(path: str | Path) -> Tensor:
    """Read one embedding per row.

    Args:
        path: a .npy array, or a .safetensors file with one tensor or one named "embeddings".

    Returns:
        (N, D) float32, N at least 1, finite, no row zero; not normalized.

    Raises:
        ValueError: for a file that is missing, damaged or of another kind (a pickle is never
            loaded), or holds other values.

    Memory: the file's size, and 4*N*D bytes.
    """
    path = Path(path)
    if path.suffix not in (readers := {".npy": _read_npy, ".safetensors": _read_safetensors}):
        raise ValueError(f"{path}: expected a .safetensors or .npy file, got {path.suffix!r}")
    try:
        rows = readers[path.suffix](path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    shape = tuple(rows.shape)
    if rows.ndim != 2 or not rows.is_floating_point() or 0 in shape:
        raise ValueError(
            f"{path}: expected embeddings, floating point of shape (N, D), "
            f"got {str(rows.dtype).removeprefix('torch.')} {shape}"
        )
    rows = rows.float()
    check_rows(str(path), rows)
    return rows


def sha256_of_rows(rows: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, in hexadecimal."""
    return hashlib.sha256(rows.cpu().contiguous().numpy().data).hexdigest()


def _read_npy(path: Path) -> Tensor:
    try:
        # Mapped: a header that claims more than the file holds is an error, not an allocation.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # NumPy lets through any exception that an invalid header raises
        raise ValueError(f"{path} is not a whole .npy array: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is an archive of arrays, expected one .npy array")
    if array.dtype.kind != "f":
        raise ValueError(
            f"{path}: expected embeddings, floating point of shape (N, D), "
            f"got {array.dtype} {array.shape}"
        )
    check_memory(f"{path}: {array.dtype} {array.shape}", 4 * array.size)
    with np.errstate(over="ignore"):  # an overflow is not finite, which is checked
        return torch.from_numpy(array.astype(np.float32))


def _read_safetensors(path: Path) -> Tensor:
    with extra("train", path):
        from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) != 1 and NAME not in names:
                shown = ", ".join(sorted(names)[:5])
                raise ValueError(
                    f"{path}: expected one tensor, or one named {NAME!r}, "
                    f"got {len(names)} ({shown})"
                )
            name = NAME if NAME in names else names[0]
            shape = tuple(file.get_slice(name).get_shape())
            check_memory(f"{path}: {name} {shape}", 4 * math.prod(shape))
            return file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
