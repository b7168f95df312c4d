"""Compile every csrc/*/cuda.cu by itself and check its kernels' resources against budgets.

    python tools/cuda_check.py        # exit status 1 where a kernel is over

No GPU and no torch are needed, only nvcc: on PATH, or named by NVCC.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 90, 100)
FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]  # as in setup.py
# Budgets of a thread: with 128 registers, 512 threads fit on a multiprocessor.
REGISTERS = 128
STACK = SPILLS = 0


def nvcc() -> str | None:
    return os.environ.get("NVCC") or shutil.which("nvcc")


def compile_kernels(source: Path, architecture: int) -> list[dict[str, int | str]]:
    """Return each kernel of the file with its registers, and bytes of stack and spills."""
    compiler = nvcc()
    assert compiler is not None
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [compiler, *FLAGS, f"-I{ROOT / 'csrc'}", f"-arch=sm_{architecture}", "-Xptxas=-v",
             "-cubin", "-o", f"{folder}/out.cubin", str(source)],
            capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{source.relative_to(ROOT)} does not compile for sm_{architecture}:\n"
                           + done.stderr)  # fmt: skip
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    return [
        {"kernel": name, "stack": int(stack), "spills": int(stores) + int(loads),
         "registers": int(registers)}
        for name, stack, stores, loads, registers in kernels
    ]  # fmt: skip


def over_budget(kernel: dict[str, int | str]) -> bool:
    limits = {"registers": REGISTERS, "stack": STACK, "spills": SPILLS}
    return any(int(kernel[what]) > limit for what, limit in limits.items())


def main() -> int:
    if nvcc() is None:
        sys.exit("nvcc is not on PATH, and NVCC does not name it")
    failures = 0
    for source in sorted((ROOT / "csrc").glob("*/cuda.cu")):
        for architecture in ARCHITECTURES:
            kernels = compile_kernels(source, architecture)
            failed = [kernel for kernel in kernels if over_budget(kernel)]
            most = max(int(kernel["registers"]) for kernel in kernels)
            print(f"{source.relative_to(ROOT)} sm_{architecture}: {len(kernels)} kernels, "
                  f"at most {most} registers, {len(failed)} over budget")  # fmt: skip
            for kernel in failed:
                print(f"  {kernel}")
            failures += len(failed)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
