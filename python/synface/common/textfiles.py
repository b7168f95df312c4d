"""Readers of untrusted text and JSON files: every error names the file."""

from __future__ import annotations

import io
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

MAX_BYTES = 2**26  # of a text file
AT_ONCE = 2**16  # bytes


def read_text(file: Path, kind: type[ValueError] = ValueError, most: int = MAX_BYTES) -> str:
    """Return the UTF-8 text of a regular file.

    Args:
        kind: exception to raise.
        most: maximum size of the file in bytes.

    Raises:
        ValueError: of this kind, naming the file, if it cannot be read, is a device or a pipe, is
            longer, or is not UTF-8.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a device never ends, a pipe may never begin
            raise kind(f"{file} must be a regular file")
        with file.open("rb") as opened:
            content = read_up_to(opened, most + 1)
    except OSError as error:
        raise kind(f"{file} cannot be read: {error.strerror}") from error
    if len(content) > most:
        raise kind(f"{file} must have at most {most:,} bytes, and has more")
    try:
        return content.decode("utf-8-sig")  # some editors add a byte order mark
    except UnicodeDecodeError as error:
        raise kind(f"{file} is not UTF-8 text: {error}") from error


def read_up_to(file: BinaryIO, most: int) -> bytes:
    """Return at most ``most`` of a file's next bytes.

    Memory: what is read; ``file.read(most)`` would allocate ``most`` bytes first.
    """
    content = io.BytesIO()
    while part := file.read(min(AT_ONCE, most - content.tell())):
        content.write(part)
    return content.getvalue()


def parse_json(text: str | bytes, pairs: Callable[[list[Any]], Any] | None = None) -> Any:
    """Return the value of a JSON text; raise ValueError, not RecursionError, if it is too deep.

    Args:
        pairs: makes an object's value of its pairs (name, value); None makes a dict, where the last
            of equal names counts.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(
    file: Path,
    kind: type[ValueError] = ValueError,
    most: int = MAX_BYTES,
    pairs: Callable[[list[Any]], Any] | None = None,
) -> Any:
    """Return the value of a JSON file, see `parse_json`; raise as `read_text`, or if it is none."""
    text = read_text(file, kind, most)
    try:
        return parse_json(text, pairs)
    except ValueError as error:
        raise kind(f"{file} is damaged: it is not whole JSON: {error}") from error
