"""Settings in TOML files."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from .extras import extra
from .files import write_text
from .textfiles import read_text

MAX_BYTES = 2**22  # of a file of settings
MAX_DEPTH = 100  # of tables and lists in each other


def read_toml(file: Path) -> dict[str, Any]:
    """Return the tables and values of a file.

    Raises:
        ValueError: naming the file, if it cannot be read, is a device or a pipe, has more than
            4 MiB, is not TOML or is nested more than 100 levels deep.
    """
    with extra("train", "reading TOML"):
        tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    text = read_text(file, most=MAX_BYTES)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not TOML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply") from error
    _check_depth(file, values)
    return values


def _check_depth(file: Path, values: dict[str, Any]) -> None:
    """Raise ValueError for tables too deep for recursive readers: a dotted key may be any depth."""
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        inside = [each.values() if isinstance(each, dict) else each for each in level]
        level = [x for each in inside for x in each if isinstance(x, (dict, list))]
    if level:
        raise ValueError(f"{file} is nested too deeply")


def toml_text(values: Mapping[str, Any]) -> str:
    """Return tables and values as TOML: plain values first, then each table under its header.

    Raises:
        TypeError: naming the key, for a value that is not a string, boolean, number, list or table.
    """
    return "\n".join(_tables(values, ())).lstrip("\n") + "\n" if values else ""


def _tables(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    if path and (plain or not values):
        yield f"\n[{'.'.join(map(_key, path))}]"
    for key, value in plain.items():
        yield f"{_key(key)} = {_value(value, '.'.join((*path, key)))}"
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _tables(value, (*path, key))


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _string(key)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, which also wants U+007F escaped; a lone surrogate has no UTF-8.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: object, where: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return repr(float(value))  # TOML writes infinities and NaN as Python does
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(item, where) for item in value)}]"
    if isinstance(value, Mapping):  # a table in a list
        pairs = (f"{_key(key)} = {_value(item, f'{where}.{key}')}" for key, item in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    raise TypeError(f"{where} must be a string, boolean, number, list or table, got {value!r}")


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
