"""Embeddings with the names of their images, written to files that other programs read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..common.extras import extra
from ..common.files import replacing, write_csv, write_tensors

FORMATS = (".safetensors", ".npy", ".npz", ".parquet")


def files_of(path: Path) -> list[Path]:
    """Return the files that `write_embeddings` writes for a path.

    Raises:
        ValueError: for a path of another suffix.
    """
    if path.suffix not in FORMATS:
        raise ValueError(
            f"embeddings are written to a file that ends in {', '.join(FORMATS)}, got {path}"
        )
    return [path, path.with_suffix(".names.csv")] if path.suffix == ".npy" else [path]


def write_embeddings(
    path: Path,
    rows: Tensor,
    names: Sequence[str],
    identities: Sequence[str | None],
    about: Mapping[str, object],
) -> None:
    """Write embeddings and the names of their images, atomically, in the format of the suffix.

    Args:
        path: a file that ends in .safetensors (tensors "embeddings", "names" and, if an image has
            an identity, "labels" and "identities"; names are JSON in bytes, the label of an image
            without identity is -1), .npz (arrays of the same names, of strings), .npy (embeddings,
            and beside it NAME.names.csv) or .parquet (columns name, identity, embedding).
        rows: (N, D) float32, on the CPU.
        names: of the images, N.
        identities: of the images, N; None for an image without one.
        about: facts in JSON types, for the metadata of .safetensors and .parquet.

    Raises:
        ValueError: for a path of another suffix, and other numbers of names or identities.
        ImportError: if the format needs a package that is not installed.
        OSError: if it cannot be written.

    Memory: a copy of the rows for .safetensors and .npz, and the names.
    """
    files = files_of(path)
    if not len(rows) == len(names) == len(identities):
        raise ValueError(
            f"rows, names and identities must be equally many, got {len(rows)}, {len(names)} and "
            f"{len(identities)}; leave out the images that have no row"
        )
    people = list(dict.fromkeys(each for each in identities if each is not None))
    number = {name: i for i, name in enumerate(people)}
    labels = np.array([-1 if each is None else number[each] for each in identities], np.int64)
    facts = {key: json.dumps(value) for key, value in about.items()}
    if path.suffix == ".safetensors":
        tensors = {"embeddings": rows, "names": _json(names)}
        if people:
            tensors |= {"labels": torch.from_numpy(labels), "identities": _json(people)}
        write_tensors(path, tensors, facts)
    elif path.suffix == ".npz":
        arrays: dict[str, NDArray] = {"embeddings": rows.numpy(), "names": np.array(names)}
        if people:
            arrays |= {"labels": labels, "identities": np.array(people)}
        with replacing(path) as part, part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    elif path.suffix == ".npy":
        with replacing(path) as part, part.open("wb") as file:
            np.save(file, rows.numpy())
        columns = [names, identities] if people else [names]
        write_csv(files[1], ("name", "identity")[: len(columns)], zip(*columns, strict=True))
    else:
        _write_parquet(path, rows, names, identities if people else None, facts)


def _json(names: Sequence[str]) -> Tensor:
    """Return names as JSON, in bytes: (B,) uint8."""
    return torch.frombuffer(bytearray(json.dumps(list(names)).encode()), dtype=torch.uint8)


def _write_parquet(
    path: Path,
    rows: Tensor,
    names: Sequence[str],
    identities: Sequence[str | None] | None,
    facts: dict[str, str],
) -> None:
    with extra("parquet", path):
        import pyarrow as pa
        import pyarrow.parquet as pq

    flat = pa.array(rows.contiguous().view(-1).numpy())
    columns = {"name": pa.array(map(_utf8, names), pa.string())}
    if identities is not None:
        known = (None if each is None else _utf8(each) for each in identities)
        columns["identity"] = pa.array(known, pa.string())
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])
    with replacing(path) as part:
        pq.write_table(pa.table(columns).replace_schema_metadata(facts), part)


def _utf8(name: str) -> str:
    """Return a file's name as Parquet can hold it: bytes that are not UTF-8 are replaced."""
    return os.fsencode(name).decode("utf-8", "replace")
