"""Compiled without a GPU, every Triton kernel that would be launched keeps within its budget.

The budgets hold for the rows of benchmarks/compiled.json, of each Triton; the slow tests compile
the kernels again with the installed one, and hold them against its rows.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compiled, costs

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
OPS = sorted(file.stem.removeprefix("aot_") for file in HERE.glob("aot_*.py"))
TRITONS = ("3.6", "3.7")

# Bytes that a thread spills where no blocks were found that do not: by Triton, and a kernel's row.
# Spilling is forgiven nowhere else, and here no more than this.
SPILLS: dict[tuple[str, str, str, str, int], int] = {
    ("3.6.0", "hypersphere_repulsion._close_kernel", "bf16, fp32, fp64", "128×512, 4 warps", 80): 8,
    ("3.6.0", "hypersphere_repulsion._close_kernel", "bf16, fp32, fp64", "128×512, 4 warps", 90): 8,
    (
        "3.6.0",
        "hypersphere_repulsion._close_kernel",
        "bf16, fp32, fp64",
        "128×512, 4 warps",
        100,
    ): 8,
    ("3.6.0", "hypersphere_repulsion._collect_kernel", "fp32", "32×32, ROOM 16, 4 warps", 80): 8,
    (
        "3.6.0",
        "hypersphere_repulsion._pairs_kernel",
        "bf16, fp32, fp64",
        "128×128×32, PRECISION ieee, 4 stages, 8 warps",
        90,
    ): 216,
    (
        "3.6.0",
        "hypersphere_repulsion._pairs_kernel",
        "bf16, fp32, fp64",
        "128×128×32, PRECISION ieee, 4 stages, 8 warps",
        100,
    ): 280,
    (
        "3.6.0",
        "hypersphere_repulsion._pairs_kernel",
        "fp32, fp64",
        "128×128×16, PRECISION ieee, 2 stages, 8 warps",
        80,
    ): 96,
    (
        "3.6.0",
        "hypersphere_repulsion._pairs_kernel",
        "fp32, fp64",
        "128×128×16, PRECISION ieee, 2 stages, 8 warps",
        90,
    ): 96,
    (
        "3.6.0",
        "hypersphere_repulsion._pairs_kernel",
        "fp32, fp64",
        "128×128×16, PRECISION ieee, 2 stages, 8 warps",
        100,
    ): 152,
    (
        "3.6.0",
        "hypersphere_repulsion._pairs_kernel",
        "fp32, fp64",
        "128×128×32, PRECISION tf32, 4 stages, 8 warps",
        100,
    ): 288,
    (
        "3.6.0",
        "margin_cross_entropy._lse_kernel",
        "fp32",
        "4×512×16, H 1, FUSED False, PRECISION ieee, 1 stages, 4 warps",
        80,
    ): 8,
    (
        "3.6.0",
        "margin_cross_entropy._target_cosines_kernel",
        "bf16, fp32, fp64",
        "512, 4 warps",
        80,
    ): 8,
    ("3.6.0", "margin_cross_entropy._target_cosines_kernel", "fp32, fp64", "512, 4 warps", 80): 8,
    (
        "3.6.0",
        "margin_cross_entropy._target_gradients_kernel",
        "bf16, fp32, fp64",
        "512, 4 warps",
        90,
    ): 8,
    (
        "3.6.0",
        "margin_cross_entropy._target_gradients_kernel",
        "bf16, fp32, fp64",
        "512, 4 warps",
        100,
    ): 8,
    ("3.6.0", "margin_cross_entropy._target_gradients_kernel", "fp32, fp64", "512, 4 warps", 90): 8,
    (
        "3.6.0",
        "margin_cross_entropy._target_gradients_kernel",
        "fp32, fp64",
        "512, 4 warps",
        100,
    ): 8,
    ("3.7.1", "hypersphere_repulsion._close_kernel", "fp16, fp32, fp64", "128×512, 4 warps", 80): 8,
    ("3.7.1", "hypersphere_repulsion._close_kernel", "fp32, fp64", "128×512, 4 warps", 80): 8,
    ("3.7.1", "hypersphere_repulsion._collect_kernel", "fp32", "32×32, ROOM 16, 4 warps", 80): 8,
    (
        "3.7.1",
        "hypersphere_repulsion._pairs_kernel",
        "bf16, fp32, fp64",
        "128×128×32, PRECISION ieee, 4 stages, 8 warps",
        90,
    ): 216,
    (
        "3.7.1",
        "hypersphere_repulsion._pairs_kernel",
        "bf16, fp32, fp64",
        "128×128×32, PRECISION ieee, 4 stages, 8 warps",
        100,
    ): 64,
    (
        "3.7.1",
        "hypersphere_repulsion._pairs_kernel",
        "fp32, fp64",
        "128×128×32, PRECISION tf32, 4 stages, 16 warps",
        80,
    ): 8,
    (
        "3.7.1",
        "hypersphere_repulsion._pairs_kernel",
        "fp32, fp64",
        "128×128×32, PRECISION tf32, 4 stages, 8 warps",
        100,
    ): 24,
    (
        "3.7.1",
        "margin_cross_entropy._target_cosines_kernel",
        "bf16, fp32, fp64",
        "512, 4 warps",
        80,
    ): 8,
    ("3.7.1", "margin_cross_entropy._target_cosines_kernel", "fp32, fp64", "512, 4 warps", 80): 8,
    (
        "3.7.1",
        "margin_cross_entropy._target_gradients_kernel",
        "bf16, fp32, fp64",
        "512, 4 warps",
        90,
    ): 8,
    ("3.7.1", "margin_cross_entropy._target_gradients_kernel", "fp32, fp64", "512, 4 warps", 90): 8,
}

Reports = list[dict[str, Any]]


def budget_problems(triton_version: str, row: dict[str, Any]) -> list[str]:
    """Return what exceeds a kernel's budget: spills, shared memory, wrong instructions."""
    problems = []
    spilled = row["stack"] + row["local"]
    forgiven = SPILLS.get((triton_version, *(row[name] for name in compiled.KEY)), 0)
    if spilled > forgiven:
        problems.append(f"spills {spilled} bytes, at most {forgiven} are forgiven")
    if row["shared"] > compiled.SHARED_PER_PROGRAM[row["capability"]]:
        problems.append(f"takes {row['shared']} bytes of shared memory")
    wanted = set()
    for dot in row["dots"]:
        rows, dtype, precision = dot.split()
        if dtype != "f32" or precision == "tf32":
            large = int(rows) >= 64
            wanted.add(compiled.INSTRUCTIONS[row["capability"]] if large else "mma.sync")
    if set(row["instructions"]) != wanted:
        problems.append(f"multiplies with {row['instructions']} rather than {sorted(wanted)}")
    return problems


ROWS = [(name, row) for name, rows in compiled.load().items() for row in rows]


def test_both_tritons_and_all_architectures_were_compiled_for() -> None:
    assert [name.rpartition(".")[0] for name in compiled.load()] == [*TRITONS]
    for rows in compiled.load().values():
        found = defaultdict(set)
        for row in rows:
            found[row["kernel"]].add(row["capability"])
        assert sorted(found) == sorted(f"{op}.{kernel}" for op in OPS for kernel in kernels_of(op))
        assert all(each == {*compiled.INSTRUCTIONS} for each in found.values()), found


def test_every_kernel_keeps_within_its_budget() -> None:
    assert ROWS
    problems = [(name, row, budget_problems(name, row)) for name, row in ROWS]
    assert [each for each in problems if each[2]] == []


def test_a_budget_that_is_exceeded_is_noticed() -> None:
    row = {
        "kernel": "op._kernel", "dtypes": "bf16", "blocks": "128×128×64, 8 warps",
        "capability": 90, "instructions": ["wgmma.mma_async"], "dots": ["128 bf16 ieee"],
        "registers": 128, "shared": 1024, "stack": 0, "local": 0,
    }  # fmt: skip
    assert budget_problems("3.7.1", row) == []
    for change, word in (
        ({"stack": 8}, "spills 8"),
        ({"local": 8}, "spills 8"),
        ({"shared": 228 * 1024}, "shared"),
        ({"instructions": ["mma.sync"]}, "mma.sync"),
        ({"instructions": []}, "multiplies"),
        ({"dots": ["16 bf16 ieee"]}, "multiplies"),
        ({"dots": ["128 f32 ieee"]}, "multiplies"),
    ):
        assert word in budget_problems("3.7.1", row | change)[0]


def test_what_is_forgiven_is_needed() -> None:
    spilled = {
        (name, *(row[key] for key in compiled.KEY)): row["stack"] + row["local"]
        for name, row in ROWS
        if row["stack"] + row["local"]
    }
    assert spilled == SPILLS


def test_gemms_of_16_bits_and_tf32_use_tensor_cores_on_every_architecture() -> None:
    kinds = defaultdict(set)
    for name, row in ROWS:
        for dot in row["dots"]:
            if row["instructions"]:
                kinds[name, row["capability"]].add(tuple(dot.split()[1:]))
    wanted = {("bf16", "ieee"), ("f16", "ieee"), ("f32", "tf32")}
    assert set(kinds) == {
        (name, each) for name in compiled.load() for each in compiled.INSTRUCTIONS
    }
    assert all(found == wanted for found in kinds.values()), kinds


@pytest.mark.parametrize("op", OPS)
def test_every_launch_has_a_cost(op: str) -> None:
    for variant in import_module("aot").variants(op, 90):
        work = costs.work_of(variant.launch)
        moved = [*work.reads.values(), *work.writes.values()]
        assert min(moved) >= 0, variant.launch
        assert sum(moved) > 0, variant.launch
        assert work.programs >= 1, variant.launch
        assert min(work.again, work.flops, work.vector, work.special, work.double) >= 0


# ---- compiled again ------------------------------------------------------------------------------


def kernels_of(op: str) -> set[str]:
    source = HERE.parents[1] / f"synface_kernels/ops/{op}/kernel_triton.py"
    kernels = {
        line.removeprefix("def ").split("(")[0]
        for line in source.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert len(kernels) >= 2
    return kernels


@pytest.fixture(scope="module")
def all_reports() -> Reports:
    """Compile all kernels; never in the interpreter, which compiles nothing."""
    done = subprocess.run(
        [sys.executable, str(HERE / "aot.py")],
        cwd=HERE.parents[1],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_the_rows_are_what_is_compiled(all_reports: Reports) -> None:
    rows = compiled.rows(all_reports)
    known = compiled.load().get(triton.__version__)
    if known is None:  # another Triton, which keeps within the budgets too
        known = rows
    assert rows == known, "run python tests/triton/aot.py --write"
    assert [row for row in rows if budget_problems(triton.__version__, row)] == []


@pytest.mark.parametrize("op", OPS)
@pytest.mark.slow
def test_nothing_is_fused_that_must_not_be(op: str, all_reports: Reports) -> None:
    limits = import_module(f"aot_{op}")
    reports = [report for report in all_reports if report["op"] == op]
    assert {report["kernel"] for report in reports} >= {f"{op}.{each}" for each in kernels_of(op)}
    for report in reports:
        assert limits.NOT_FUSED is None or report["fused"][limits.NOT_FUSED] == 0, report
        if not report["dots"]:
            assert report["registers"] <= limits.REGISTERS, report
