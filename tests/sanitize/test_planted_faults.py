"""The sanitizers that `make sanitize` runs report faults that are planted."""

from __future__ import annotations

import importlib.util
import re
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


def has_sanitizers() -> bool:
    """Return whether the compiler has its sanitizers' libraries; some distributions part them."""
    if sys.platform != "linux" or shutil.which(sanitize.compiler()) is None:
        return False
    return all(map(sanitize.library, ("libasan.so", "libubsan.so", "libtsan.so")))


@pytest.mark.skipif(not has_sanitizers(), reason="needs GCC with its sanitizers")
@pytest.mark.parametrize("fault", sanitize.FAULTS, ids=lambda fault: fault.file)
def test_a_planted_fault_is_reported(fault, tmp_path):
    status, report = sanitize.report_of(fault, tmp_path)
    assert status != 0
    assert fault.report in report


def test_kernels_are_compiled_as_setup_py_does():
    flags = re.findall(r"-f[\w-]+(?:=\w+)?|-std=[\w+]+", " ".join(
        line for line in (ROOT / "setup.py").read_text().splitlines() if line.startswith("CXX")
    ))  # fmt: skip
    assert set(flags) == {flag for flag in sanitize.KERNELS if not flag.startswith("-I")}


def test_tests_that_are_named_exist():
    assert not [name for name in sanitize.TESTS if not (ROOT / name).exists()]
