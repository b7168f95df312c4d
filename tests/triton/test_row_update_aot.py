"""The row updates' Triton kernels compile without a GPU, and spill nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled_kernels(capability: int) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, str(HERE / "aot_row_update.py"), str(capability)],
        cwd=HERE.parents[1], env=env | {"PYTHONPATH": "."}, stdout=subprocess.PIPE, text=True,
        check=True,
    )  # fmt: skip
    reports = [json.loads(line) for line in child.stdout.splitlines()]
    assert {report["kernel"] for report in reports} == {"_sgd_kernel", "_adamw_kernel"}
    for report in reports:
        assert report["stack"] == report["local"] == 0, report
        assert report["registers"] <= 128, report
        assert not report["fused"], report  # they would give other bits than the definition
