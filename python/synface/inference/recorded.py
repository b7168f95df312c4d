"""Records of a run for its use: the threshold of one person, and how its faces were aligned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from .. import checkpoint
from ..checkpoint.jsonl import Lines
from ..common.files import CheckpointError
from ..common.textfiles import read_json
from ..training.model import ALIGNMENT, BEST, CHECKPOINTS, VERIFICATION


class Threshold(NamedTuple):
    """The least cosine of two images that are accepted as the same person.

    Attributes:
        value: the cosine.
        file: the log that it is from.
        step: number of the run's steps before that verification.
        accuracy: of that verification; None if it was not recorded.
    """

    value: float
    file: Path
    step: int
    accuracy: float | None


def recorded_threshold(path: Path) -> Threshold | None:
    """Return the threshold of a run's last verification up to its newest checkpoint (or to one).

    Args:
        path: the folder of the run, or of one of its checkpoints, or a file of weights.

    Returns:
        None if no threshold was recorded.

    Raises:
        CheckpointError: if there is no checkpoint, or the log is damaged.
    """
    file = _file_of(path, VERIFICATION)
    if file is None:
        return None
    last = checkpoint.load_state(checkpoint.find(path))["step"]
    rows = [row for row in Lines(file).read() if row["step"] <= last]
    known = [row for row in rows if row.get("threshold") is not None]
    if not known:
        return None
    row = known[-1]
    numbers = [row[key] for key in ("threshold", "accuracy") if row.get(key) is not None]
    if not all(isinstance(each, (int, float)) and math.isfinite(each) for each in numbers):
        raise CheckpointError(
            f"{file}: threshold and accuracy of step {row['step']} must be finite numbers, got "
            f"{numbers}"
        )
    return Threshold(row["threshold"], file, int(row["step"]), row.get("accuracy"))


def recorded_alignment(path: Path) -> dict[str, Any] | None:
    """Return how the faces were aligned that a run was trained on.

    Args:
        path: as for `recorded_threshold`.

    Returns:
        "size" (H, W), "margin" and "grayscale", as `synface.alignment.Aligner` takes them; None if
        nothing was recorded: then the images were not those of `synface align`.

    Raises:
        CheckpointError: if there is no checkpoint, or the record is damaged.
    """
    file = _file_of(path, ALIGNMENT)
    if file is None:
        return None
    found = read_json(file, CheckpointError)
    if not isinstance(found, dict) or found.keys() != {"size", "margin", "grayscale"}:
        raise CheckpointError(f"{file} must hold size, margin and grayscale, got {found!r}")
    return found | {"size": tuple(found["size"]) if isinstance(found["size"], list) else None}


def _file_of(path: Path, name: str) -> Path | None:
    """Return a file of the run of a path, if it is there."""
    if path.is_file():  # weights alone
        return None
    found = checkpoint.find(path)
    file = found.parent.parent / name
    return file if found.parent.name in (CHECKPOINTS, BEST) and file.is_file() else None
