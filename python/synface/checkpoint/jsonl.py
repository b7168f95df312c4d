"""Logs of a run in JSON Lines: one object per step, which a checkpoint refers to by its step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..common.files import CheckpointError, sync, write_text
from ..common.textfiles import parse_json, read_text

MAX_BYTES = 2**32  # size limit of a log


class Lines:
    """A log in a JSON Lines file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, row: Mapping[str, float]) -> None:
        with self.file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")

    def flush(self) -> None:
        """Flush all lines to the disk."""
        if self.file.exists():
            sync(self.file)

    def rewrite(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Make these rows the whole log; a file that has them already is not touched.

        Several processes may then restore one finished run at a time.
        """
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if not (self.file.exists() and self.file.read_bytes() == text.encode()):
            write_text(self.file, text)

    def read(self, most: int | None = None) -> list[dict[str, float]]:
        """Return the complete lines; a crash may have cut the last one short.

        Args:
            most: maximum number of lines, from the first on.

        Raises:
            CheckpointError: for a file that cannot be read or is not such a log.
        """
        try:
            whole = read_text(self.file, most=MAX_BYTES).split("\n")[:-1]
            rows = [parse_json(line) for line in whole[:most]]
            return [row | {"step": int(row["step"])} for row in rows]
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise self._unfit(error) from error

    def steps(self, count: int) -> list[dict[str, float]]:
        """Return the lines of steps 0 to count - 1, with which the log must begin.

        Raises:
            CheckpointError: if it does not.
        """
        rows = self.read(count)
        if [row["step"] for row in rows] != list(range(count)):
            raise self._unfit(f"expected steps 0 to {count - 1}, got {len(rows)} lines")
        return rows

    def _unfit(self, reason: object) -> CheckpointError:
        return CheckpointError(f"{self.file} does not fit the checkpoint: {reason}")
