"""The registered ops, called directly with wrong arguments: errors, and never a crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from synface_kernels import _load

RAW_OPS = Path(__file__).parents[1] / "helpers" / "raw_ops.py"


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.skipif(_load.extension_error is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("isa", ["base", None])
@pytest.mark.slow
def test_wrong_arguments_are_errors(isa, monkeypatch):
    if isa is not None:
        monkeypatch.setenv("SYNFACE_CPU_ISA", isa)
    # A crash would end the process: so it is one of its own.
    command = [sys.executable, "-W", "ignore", str(RAW_OPS), "0", "3000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"row_update_sgd_cpu", "margin_cross_entropy_update_cpu"} <= set(found["ops"])
    # Every op takes sound arguments, and refuses some of the wrong ones if it has any.
    assert [name for name, (returned, _) in found["ops"].items() if returned == 0] == []
    assert sum(raised for _, raised in found["ops"].values()) > 500
    assert "empty" not in found["errors"]
