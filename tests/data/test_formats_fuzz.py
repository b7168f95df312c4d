"""A thousand mutated files for each reader: clear errors, no crash, nothing executed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.forks import Forks, forks

FUZZED = Path(__file__).parents[1] / "helpers" / "fuzzed.py"
FORMATS = ("folder", "recordio", "webdataset", "webdataset-gz", "parquet", "arrow")
FORMATS += ("recordio-scanned", "parquet-paths")
SETS = ("bin", "pairs", "path-pairs", "templates")


@pytest.fixture(scope="module")
def scripts() -> Iterator[Forks]:
    with forks("synface.data.formats.image_set", "synface.evaluation.sets") as running:
        yield running


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("kind", FORMATS + SETS)
@pytest.mark.slow
def test_mutated_files_are_clear_errors(kind: str, scripts: Forks, tmp_path: Path) -> None:
    # A crash would end the process: so it is one of its own.
    done = scripts.run([str(FUZZED), kind, "0", "1000", str(tmp_path)], tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["errors"]) <= {"DataError", "OSError"}
    assert found["fine"] + sum(found["errors"].values()) == 1000
    assert sum(found["errors"].values()) > 400
    assert found["grown"] < 300 << 20
