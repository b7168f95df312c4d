"""The threshold of a run's last verification, above which two images show one person."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from .. import checkpoint
from ..checkpoint.jsonl import Lines
from ..common.files import CheckpointError
from ..training.model import BEST, CHECKPOINTS, VERIFICATION


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
        path: the folder of the run, or of one of its checkpoints.

    Returns:
        None if no threshold was recorded.

    Raises:
        CheckpointError: if there is no checkpoint, or the log is damaged.
    """
    found = checkpoint.find(path)
    file = found.parent.parent / VERIFICATION
    if found.parent.name not in (CHECKPOINTS, BEST) or not file.is_file():
        return None
    last = checkpoint.load_state(found)["step"]
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
