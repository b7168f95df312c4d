"""Settings in TOML files."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from .extras import extra


def read_toml(file: Path) -> dict[str, Any]:
    """The tables and values of a file.

    Raises:
        ValueError: for a file that cannot be read or is not TOML, naming it.
    """
    with extra("train", "reading TOML"):
        tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{file} is not TOML: {error}") from error


def write_toml(file: Path, values: Mapping[str, Any]) -> None:
    """Writes values, whole or not at all; those that are None, which TOML has no word for, are
    left out."""
    with extra("train", "writing TOML"):
        import tomli_w

    from . import checkpoint  # and torch, which reading a file does not need

    kept = {name: value for name, value in values.items() if value is not None}
    checkpoint.write(file, tomli_w.dumps(kept))


def check_keys(where: object, keys: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError for the first key that is not known, with what may have been meant."""
    known = list(known)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {key!r}{hint}")
