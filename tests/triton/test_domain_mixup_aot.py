"""What the compiler says of domain mixup's Triton kernels, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


def test_compiled_kernels() -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "aot_domain_mixup.py"), "80", "90", "100"],
        cwd=HERE.parents[1],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["kernel"] for r in reports} == {"_forward_kernel", "_backward_kernel"}
    for report in reports:
        assert report["stack"] == report["local"] == 0, report
        assert report["registers"] <= 160, report
        # A fused multiply-add would give other bits than the definition.
        assert report["fused"] == 0, report
