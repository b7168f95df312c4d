"""The CUDA source without a GPU: it runs on the host, and compiles within its budgets."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_runs_on_the_host_with_the_cpus_bits(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "emulated"
    sources = ["tests/cuda/emulated.cpp", "csrc/domain_mixup/cpu.cpp", "csrc/simd/isa.cpp"]
    subprocess.run(
        [compiler, "-O0", "-std=c++20", "-ffp-contract=off", "-Wno-unknown-pragmas", "-Icsrc",
         *sources, "-o", str(program)],
        cwd=ROOT, check=True,
    )  # fmt: skip
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_kernels_compile_within_budget() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "cuda_check.py")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
