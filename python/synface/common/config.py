"""Configurations: nested dataclasses of numbers and strings, to and from TOML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_type_hints

from .toml import check_keys, read_toml, toml_text

T = TypeVar("T")


def load(
    cls: type[T],
    file: Path,
    earlier: Mapping[str, str] = MappingProxyType({}),
    over: Path | None = None,
) -> T:
    """Return a configuration from a TOML file; a missing key has its default.

    Args:
        over: a TOML file whose values replace those of ``file``.
        earlier: maps each old key that is still read to its new name.

    Raises:
        ValueError: for a file that is not TOML, an unknown key, and a value of a wrong type or out
            of range.
    """
    table = read_toml(file)
    if over is not None:
        table = _replaced(table, read_toml(over))
        file = over
    for old, new in earlier.items():
        if old in table and new in table:
            raise ValueError(f"{file}: {old} is the earlier name of {new}: give only {new}")
    return _build(cls, table, str(file), earlier)


def load_recipe(
    cls: type[T],
    default: Path,
    file: Path | None,
    quick: bool,
    earlier: Mapping[str, str] = MappingProxyType({}),
) -> T:
    """Return a recipe's configuration from a file, by default ``default``, NAME.toml.

    Args:
        quick: replace the default's values by those in NAME.quick.toml beside it.
        earlier: former names of keys, see `load`.

    Raises:
        ValueError: as `load`, and for ``quick`` with a file.
    """
    if not quick:
        return load(cls, file or default, earlier)
    if file is not None:
        raise ValueError(f"quick changes the default configuration, and has no effect on {file}")
    return load(cls, default, earlier, default.with_suffix(".quick.toml"))


def _replaced(table: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with some values replaced, also in the tables in it."""
    return {**table} | {
        key: _replaced(table.get(key, {}), value) if isinstance(value, dict) else value
        for key, value in values.items()
    }


def _build(cls: type, table: dict[str, Any], where: str, earlier: Mapping[str, str]) -> Any:
    hints = get_type_hints(cls)
    check_keys(where, (earlier.get(key, key) for key in table), hints)
    values = {}
    for given, value in table.items():
        key = earlier.get(given, given)
        hint = hints[key]
        if is_dataclass(hint):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {given} must be a table, got {value!r}")
            values[key] = _build(hint, value, f"{where}: [{given}]", {})  # type: ignore[arg-type]
            continue
        values[key] = _typed(where, key, value, hint)
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _typed(where: str, name: str, value: Any, hint: Any) -> Any:
    """Return a value of a field's type, or raise ValueError; a list becomes a tuple."""
    kind = getattr(hint, "__origin__", hint)
    if kind is tuple and isinstance(value, list):
        for item in value:
            _typed(where, f"each of {name}", item, get_args(hint)[0])
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: {name} must be {kind.__name__}, got {value!r}")
    return value


def to_toml(config: Any) -> str:
    """Return the exact configuration, as `load` reads it."""
    return toml_text(asdict(config))
