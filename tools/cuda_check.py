"""Compile every csrc/*/cuda.cu by itself and check its kernels' resources against budgets.

Of domain mixup's fast kernels, also the instructions: that all images are read and written 16 bytes
at a time, and how much float64 arithmetic bytes take on their way to bfloat16.

    python tools/cuda_check.py        # exit status 1 where a kernel is over

No GPU and no torch are needed, only nvcc: on PATH, or named by NVCC.
"""

from __future__ import annotations

import heapq
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 90, 100)
FLAGS = [
    "-O3",
    "-std=c++20",
    "--expt-relaxed-constexpr",
]  # those of synface_kernels/_cuda_toolkit.py, which needs torch
# Budgets of a thread: with 128 registers, 512 threads fit on a multiprocessor.
REGISTERS = 128
STACK = SPILLS = 0
# Float64 instructions per element of bfloat16: cards have as few as 1/64 of float32's units. They
# split the constants of 16 pixels; each element itself is computed in float32.
FLOAT64 = 1.0


def nvcc() -> str | None:
    return os.environ.get("NVCC") or shutil.which("nvcc")


def run_nvcc(source: Path, architecture: int, output: str, *options: str) -> str:
    """Compile the file; return what the compiler reports."""
    compiler = nvcc()
    assert compiler is not None
    done = subprocess.run(
        [compiler, *FLAGS, f"-I{ROOT / 'csrc'}", f"-arch=sm_{architecture}", *options, "-o", output,
         str(source)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{source.relative_to(ROOT)} does not compile for sm_{architecture}:\n"
                           + done.stderr)  # fmt: skip
    return done.stderr


def compile_kernels(source: Path, architecture: int) -> list[dict[str, int | str]]:
    """Return each kernel of the file with its registers, and bytes of stack and spills."""
    with tempfile.TemporaryDirectory() as folder:
        report = run_nvcc(source, architecture, f"{folder}/out.cubin", "-Xptxas=-v", "-cubin")
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        report,
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


def ptx(source: Path, architecture: int) -> str:
    """Return the file's PTX code."""
    with tempfile.TemporaryDirectory() as folder:
        run_nvcc(source, architecture, f"{folder}/out.ptx", "-ptx")
        return Path(folder, "out.ptx").read_text()


def blocks(body: str) -> list[tuple[list[str], list[int]]]:
    """Return a kernel's basic blocks: their instructions, and which may follow."""
    parts: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for line in map(str.strip, body.splitlines()):
        if label := re.fullmatch(r"(\$\w+):", line):
            parts.append([])
            labels[label[1]] = len(parts) - 1
        elif line and not line.startswith((".", "//")):
            parts[-1].append(line)
            if re.match(r"(@\S+ )?(bra|ret)", line):
                parts.append([])
    found = []
    for index, part in enumerate(parts):
        last = part[-1] if part else ""
        follow = [labels[name] for name in re.findall(r"bra\S*\s+(\$\w+)", last)]
        if not re.match(r"(bra|ret)", last) and index + 1 < len(parts):
            follow.append(index + 1)
        found.append((part, follow))
    return found


def least_float64(body: str) -> int:
    """Return the least number of float64 instructions from a kernel's first wide load to its end.

    That is the path of elements that float32 determines.
    """
    graph = blocks(body)
    costs = [
        sum(".f64" in line and re.match(r"ld|st|mov", line) is None for line in part)
        for part, _ in graph
    ]
    start = next(i for i, (part, _) in enumerate(graph) if any("ld.global.v4" in x for x in part))
    queue, best = [(costs[start], start)], {start: costs[start]}
    while queue:
        cost, index = heapq.heappop(queue)
        part, follow = graph[index]
        if any(line.startswith("ret") for line in part):
            return cost
        for after in follow:
            if cost + costs[after] < best.get(after, cost + costs[after] + 1):
                best[after] = cost + costs[after]
                heapq.heappush(queue, (best[after], after))
    raise ValueError("the kernel has no end")


def mixup_problems(code: str) -> list[str]:
    """Return what is wrong with the instructions of domain mixup's fast kernels."""
    problems, count = [], 0
    for name, body in re.findall(r"\.entry (\w+)\(.*?\n\{(.*?)\n\}", code, re.DOTALL):
        kind = re.search(r"mix_groupsINS0_\d+([A-Z][a-z]+\d+)ELi(\d)ELb", name)
        if kind is None:
            continue
        count += 1
        elements = 16 * int(kind[2])
        size = {"Bfloat16": 2, "Float16": 2, "Float32": 4, "Float64": 8}[kind[1]]
        wide = {
            "loads": (len(re.findall(r"ld\.global\.v4\.\w32", body)), 2 * int(kind[2])),
            "stores": (len(re.findall(r"st\.global\.v(?:4\.\w32|2\.\w64)", body)),
                       elements * size // 16),
        }  # fmt: skip
        for what, (came, wanted) in wide.items():
            if came < wanted:
                problems.append(f"{name}: {came} {what} of 16 bytes, expected {wanted}")
        float64 = least_float64(body) / elements
        if kind[1] == "Bfloat16" and float64 > FLOAT64:
            problems.append(f"{name}: {float64:.2f} float64 instructions per element")
    if count != 12:
        problems.append(f"{count} fast kernels of domain mixup, expected 12")
    return problems


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
    problems = mixup_problems(ptx(ROOT / "csrc/domain_mixup/cuda.cu", ARCHITECTURES[0]))
    print(f"domain mixup's instructions: {len(problems)} problems", *problems, sep="\n  ")
    return int(failures + len(problems) > 0)


if __name__ == "__main__":
    sys.exit(main())
