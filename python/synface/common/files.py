"""Files that are written atomically, and verified by checksum when they are read."""

from __future__ import annotations

import csv
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .extras import extra
from .textfiles import MAX_BYTES, read_json

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM = "checksum"  # the key of a state's checksum


class CheckpointError(ValueError):
    """Error for a checkpoint that is missing, damaged, or of another model or run."""


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to, which then replaces ``path`` atomically and is flushed.

    If an error is raised inside, ``path`` is not changed.
    """
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    try:
        yield part
        sync(part)
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def check_output(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError if a file would be replaced, IsADirectoryError for a folder."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: choose another output")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another output, or --overwrite")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table as CSV, atomically; names of files keep their bytes."""
    with (
        replacing(path) as part,
        part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors, each in its own memory, as safetensors requires."""
    found, seen = {}, set()
    for name, value in tensors.items():
        value = value.detach().contiguous()
        memory = value.untyped_storage()._cdata
        found[name] = value.clone() if memory in seen else value
        seen.add(memory)
    return found


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; the same contents always give the same bytes.

    Raises:
        OSError: if it cannot be written (a full disk, say).
    """
    with extra("train", "writing checkpoints and embeddings"):
        from safetensors import SafetensorError
        from safetensors.torch import save_file

    try:
        with replacing(path) as part:
            part.touch()
            mode = stat.S_IMODE(part.stat().st_mode)  # what the umask leaves; safetensors' is 0600
            save_file(_separate(tensors), part, metadata)
            _sort_metadata(part)
            part.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _sort_metadata(file: Path) -> None:
    """Sort the metadata of a safetensors file, which the library writes in random order."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        if not header["__metadata__"]:
            return
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size  # both write compact JSON; the rest is spaces
        opened.seek(8)
        opened.write(text.ljust(size))


def checksum(file: Path) -> str:
    """Return the CRC-32 of a file's bytes, in hexadecimal."""
    crc, chunk = 0, bytearray(2**22)
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(chunk):
            crc = zlib.crc32(memoryview(chunk)[:count], crc)
    return f"{crc:08x}"


def verify(file: Path, expected: object) -> None:
    """Raise CheckpointError unless a file has the expected CRC-32."""
    came = checksum(file)
    if came != expected:
        raise CheckpointError(
            f"{file} is damaged: its CRC-32 is {came}, and was {expected} when it was written; "
            "use an earlier checkpoint, or a copy"
        )


def sealed(state: Mapping[str, Any]) -> str:
    """Return a state as JSON, with a checksum of its content; `read_state` reads it."""
    content = json.loads(json.dumps(state))
    return json.dumps(content | {CHECKSUM: _content_checksum(content)}, indent=1)


def _content_checksum(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def read_state(
    file: Path, *formats: object, checked: int = 1, most: int = MAX_BYTES
) -> dict[str, Any]:
    """Return a state that `sealed` wrote, without its checksum.

    Args:
        formats: accepted values of "format", the newest first.
        checked: number of formats, from the newest on, that must have the checksum.
        most: maximum size of the file in bytes.

    Raises:
        CheckpointError: for a file that is missing, incomplete, of another format or damaged.
    """
    state = read_json(file, CheckpointError, most)
    if not isinstance(state, dict) or state.get("format") not in formats:
        came = state.get("format") if isinstance(state, dict) else type(state).__name__
        known = " or ".join(map(str, formats))
        raise CheckpointError(f"{file}: expected format {known}, got {came!r}")
    came, found = state.pop(CHECKSUM, None), _content_checksum(state)
    if came != found and (came is not None or state["format"] in formats[:checked]):
        raise CheckpointError(
            f"{file} is damaged: its content has the checksum {found}, and it names {came!r}; use "
            "an earlier checkpoint, or a copy"
        )
    return state
