"""What the compiler says of hypersphere repulsion's Triton kernels, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def test_compiled_kernels() -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "aot_hypersphere_repulsion.py"), *map(str, SHARED)],
        cwd=HERE.parents[1],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    source = HERE.parents[1] / "synface_kernels/ops/hypersphere_repulsion/kernel_triton.py"
    kernels = {
        line.removeprefix("def ").split("(")[0]
        for line in source.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert len(kernels) == 7
    assert {(r["kernel"], r["capability"]) for r in reports} == {
        (kernel, capability) for kernel in kernels for capability in SHARED
    }
    for report in reports:
        assert report["stack"] <= 16, report
        assert report["local"] == 0, report
        assert report["shared"] <= SHARED[report["capability"]], report
        assert report["registers"] <= 128, report
