"""Settings in TOML files."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from .extras import extra
from .files import write_text
from .textfiles import read_text

MAX_BYTES = 2**22  # of a file of settings


def read_toml(file: Path) -> dict[str, Any]:
    """Return the tables and values of a file.

    Raises:
        ValueError: naming the file, if it cannot be read, is a device or a pipe, has more than
            4 MiB or is not TOML.
    """
    with extra("train", "reading TOML"):
        tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    text = read_text(file, most=MAX_BYTES)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not TOML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply") from error


def toml_text(values: Mapping[str, Any]) -> str:
    """Return tables and values as TOML."""
    with extra("train", "writing TOML"):
        import tomli_w

    return tomli_w.dumps(values)


def write_toml(file: Path, values: Mapping[str, Any]) -> None:
    """Write values atomically, omitting None, which TOML cannot represent."""
    given = {name: value for name, value in values.items() if value is not None}
    write_text(file, toml_text(given))


def check_keys(where: object, keys: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for the first unknown key, and suggest the most similar known one."""
    known = list(known)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {key!r}{hint}")
