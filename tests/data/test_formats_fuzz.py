"""A thousand mutated files for each reader: clear errors, no crash, nothing executed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FUZZED = Path(__file__).parents[1] / "helpers" / "fuzzed.py"
FORMATS = ("folder", "recordio", "webdataset", "webdataset-gz", "parquet", "arrow")
FORMATS += ("recordio-scanned", "parquet-paths")
SETS = ("bin", "pairs", "path-pairs", "templates")


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("kind", FORMATS + SETS)
@pytest.mark.slow
def test_mutated_files_are_clear_errors(kind, tmp_path):
    # A crash would end the process: so it is one of its own.
    command = [sys.executable, "-W", "ignore", FUZZED, kind, "0", "1000", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["errors"]) <= {"DataError", "OSError"}
    assert found["fine"] + sum(found["errors"].values()) == 1000
    assert sum(found["errors"].values()) > 400
    assert found["grown"] < 300 << 20
