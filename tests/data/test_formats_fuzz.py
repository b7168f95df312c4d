"""A thousand mutated files for each reader: clear errors, no crash, nothing executed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.helpers import fuzzed
from tests.helpers.forked import finished

FORMATS = ("folder", "recordio", "webdataset", "webdataset-gz", "parquet", "arrow")
FORMATS += ("recordio-scanned", "parquet-paths")
SETS = ("bin", "pairs", "path-pairs", "templates")


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("kind", FORMATS + SETS)
@pytest.mark.slow
def test_mutated_files_are_clear_errors(kind: str, tmp_path: Path) -> None:
    # A crash would end the process: so it is one of its own.
    code, shown = finished(tmp_path / "shown", fuzzed.main, kind, 0, 1000, tmp_path)
    assert code == 0, shown
    found = json.loads(shown.splitlines()[-1])
    assert set(found["errors"]) <= {"DataError", "OSError"}
    assert found["fine"] + sum(found["errors"].values()) == 1000
    assert sum(found["errors"].values()) > 400
    assert found["grown"] < 300 << 20
