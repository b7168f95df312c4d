"""Landmarks in files: CSV and JSON."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ..common.textfiles import read_json, read_text
from ..data.formats.decode import DataError
from .transform import check_landmarks

COLUMNS = 11  # a path, and x and y of five points


def read_landmarks(
    file: str | Path, known: Collection[str] | None = None
) -> dict[str, NDArray[np.float64]]:
    """Read five landmarks for each of several images.

    Args:
        file: CSV with rows of a path, x1, y1 … x5, y5, and perhaps a header; or, if it ends in
            .json, an object that maps paths to five [x, y], or to ten numbers. The order of points
            is that of `template`.
        known: the paths that the file may name; None allows any.

    Returns:
        The landmarks (5, 2) in pixels, by path with "/" between folders.

    Raises:
        DataError: for a file that cannot be read, numbers that are no landmarks, a path that is
            named twice or unknown; the message names the file and the line, or the path in JSON.
    """
    file = Path(file)
    found: dict[str, NDArray[np.float64]] = {}
    for where, path, values in (_json if file.suffix.lower() == ".json" else _csv)(file):
        name = PurePosixPath(path.strip().replace("\\", "/")).as_posix()
        if known is not None and name not in known:
            raise DataError(
                f"{where}: {path!r} is none of the {len(known):,} images; expected a path relative "
                "to the input folder, or an input file's name"
            )
        if name in found:
            raise DataError(f"{where}: {path!r} is named twice; expected one face per image")
        try:
            points = np.asarray(values, np.float64)
            found[name] = check_landmarks(points.reshape(5, 2) if points.size == 10 else points)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{where}: {error}") from error
    if not found:
        raise DataError(f"{file} has no landmarks; expected rows of a path, x1, y1 … x5, y5")
    return found


def _csv(file: Path):
    """Yield the line, the path and the numbers of each row of a CSV file."""
    rows = csv.reader(io.StringIO(read_text(file, DataError), newline=""))
    first = True
    try:
        for row in rows:
            where = f"{file}, line {rows.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if first and len(row) == COLUMNS and not any(map(_number, row[1:])):
                first = False
                continue  # the header
            first = False
            if len(row) != COLUMNS:
                raise DataError(
                    f"{where}: expected {COLUMNS} columns, a path and x1, y1 … x5, y5, got "
                    f"{len(row)}"
                )
            for cell in row[1:]:
                if not _number(cell):
                    raise DataError(f"{where}: expected a number of pixels, got {cell[:40]!r}")
            yield where, row[0], [float(cell) for cell in row[1:]]
    except csv.Error as error:
        raise DataError(f"{file}, line {rows.line_num}: {error}") from error


def _number(text: str) -> bool:
    """Return whether a cell is a decimal number, such as -1.5e2."""
    return bool(re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", text))


def _json(file: Path):
    """Yield the place, the path and the points of each entry of a JSON file."""
    content = read_json(file, DataError, pairs=tuple)  # a dict would hide a path's first points
    if not isinstance(content, tuple):
        raise DataError(
            f"{file} must map paths to five points, got a {type(content).__name__} at the top"
        )
    for path, values in content:
        yield f"{file}, {path!r}", path, values
