"""Logs of a run that a checkpoint goes with: a JSON object a line, one of them for each step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..common.files import CheckpointError, sync, write_text
from ..common.textfiles import parse_json, read_text

MAX_BYTES = 2**32  # of a log


class Lines:
    """A log in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, row: Mapping[str, float]) -> None:
        with self.file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")

    def flush(self) -> None:
        """Sees to it that all lines are on the disk."""
        if self.file.exists():
            sync(self.file)

    def rewrite(self, rows: Sequence[Mapping[str, float]]) -> None:
        write_text(self.file, "".join(json.dumps(row) + "\n" for row in rows))

    def read(self, most: int | None = None) -> list[dict[str, float]]:
        """The first so many lines, or all that are whole: a crash may cut the last one short.

        Raises:
            CheckpointError: for a file that cannot be read or is no such log.
        """
        try:
            whole = read_text(self.file, most=MAX_BYTES).split("\n")[:-1]
            rows = [parse_json(line) for line in whole[:most]]
            return [row | {"step": int(row["step"])} for row in rows]
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise self._unfit(error) from error

    def steps(self, count: int) -> list[dict[str, float]]:
        """The lines of steps 0 to count − 1, with which the log must begin.

        Raises:
            CheckpointError: where it does not.
        """
        rows = self.read(count)
        if [row["step"] for row in rows] != list(range(count)):
            raise self._unfit(f"expected steps 0 to {count - 1}, got {len(rows)} lines")
        return rows

    def _unfit(self, reason: object) -> CheckpointError:
        return CheckpointError(f"{self.file} does not fit the checkpoint: {reason}")
