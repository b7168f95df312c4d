"""The sanitizers that `make sanitize` runs report faults that are planted."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("sanitize", ROOT / "tools" / "sanitize.py")
assert SPEC is not None
assert SPEC.loader is not None
sanitize = importlib.util.module_from_spec(SPEC)
sys.modules["sanitize"] = sanitize
SPEC.loader.exec_module(sanitize)


@pytest.mark.skipif(sys.platform != "linux", reason="GCC's sanitizers for Linux")
@pytest.mark.skipif(shutil.which(sanitize.compiler()) is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("fault", sanitize.FAULTS, ids=lambda fault: fault.file)
def test_a_planted_fault_is_reported(fault, tmp_path):
    status, report = sanitize.report_of(fault, tmp_path)
    assert status != 0
    assert fault.report in report


def test_tests_that_are_named_exist():
    assert not [name for name in sanitize.TESTS if not (ROOT / name).exists()]
