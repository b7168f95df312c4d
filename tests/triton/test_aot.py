"""Compiled without a GPU, every Triton kernel that would be launched keeps within its budget.

The budgets hold for the rows of benchmarks/compiled.json, of each Triton. The slow tests hold the
rows against the present kernels: by what the compiler is given for each of them, and by compiling
again a few rows of each op, or with ``--pairs none`` all.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
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


# Registers of kernels beyond their op's limit, by Triton: products with few rows, on FP32 cores.
MORE_REGISTERS = {
    ("3.6.0", "margin_cross_entropy._factor_kernel"): 155,
    ("3.6.0", "margin_cross_entropy._lse_kernel"): 168,
}

Key = tuple[str, str, str, int]  # of compiled.KEY


def budget_problems(triton_version: str, row: compiled.Row) -> list[str]:
    """Return what exceeds a kernel's budget: spills, shared memory, wrong instructions."""
    problems = []
    limits = import_module(f"aot_{row['kernel'].partition('.')[0]}")
    if limits.NOT_FUSED is not None and row[f"fused_{limits.NOT_FUSED}"]:
        problems.append(f"fuses multiply-adds of {limits.NOT_FUSED}")
    most = MORE_REGISTERS.get((triton_version, row["kernel"]), limits.REGISTERS)
    if not row["dots"] and row["registers"] > most:
        problems.append(f"takes {row['registers']} registers, at most {most}")
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


def test_the_rows_of_all_tritons_are_of_the_same_kernels() -> None:
    """Only one Triton is installed, and all write the same Triton IR for a kernel."""
    digests = [
        {tuple(row[name] for name in compiled.KEY): row["digest"] for row in rows}
        for rows in compiled.load().values()
    ]
    assert all(each == digests[0] for each in digests), (
        "run python tests/triton/aot.py --write with each Triton, see CONTRIBUTING.md"
    )


def test_every_kernel_keeps_within_its_budget() -> None:
    assert ROWS
    problems = [(name, row, budget_problems(name, row)) for name, row in ROWS]
    assert [each for each in problems if each[2]] == []


def test_a_budget_that_is_exceeded_is_noticed() -> None:
    row = {
        "kernel": "row_update._kernel", "dtypes": "bf16", "blocks": "128×128×64, 8 warps",
        "capability": 90, "instructions": ["wgmma.mma_async"], "dots": ["128 bf16 ieee"],
        "registers": 255, "shared": 1024, "stack": 0, "local": 0, "fused_f32": 0, "fused_f64": 1,
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
        ({"dots": [], "instructions": []}, "takes 255 registers, at most 128"),
        ({"fused_f32": 1}, "fuses multiply-adds of f32"),
    ):
        assert word in budget_problems("3.7.1", row | change)[0]


def test_what_is_forgiven_is_needed() -> None:
    spilled = {
        (name, *(row[key] for key in compiled.KEY)): row["stack"] + row["local"]
        for name, row in ROWS
        if row["stack"] + row["local"]
    }
    assert spilled == SPILLS
    for (name, kernel), most in MORE_REGISTERS.items():
        same = [row for row in compiled.load()[name] if row["kernel"] == kernel]
        assert max(row["registers"] for row in same if not row["dots"]) == most


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


def few(rows: dict[Key, list[Any]]) -> Iterator[Key]:
    """Yield a row for each architecture, of few variants, and of another kernel where there is."""
    seen: set[str] = set()
    for capability in compiled.INSTRUCTIONS:
        of_this = [key for key in rows if key[-1] == capability]
        others = [key for key in of_this if key[0] not in seen]
        found = min(others or of_this, key=lambda key: len(rows[key]))
        seen.add(found[0])
        yield found


@pytest.mark.parametrize("op", OPS)
@pytest.mark.slow
@pytest.mark.timeout(1800)  # with --pairs none, or a Triton that there are no rows of
def test_the_rows_are_of_the_present_kernels(op: str, pytestconfig: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton's interpreter compiles nothing")
    variants = defaultdict(list)
    for capability in compiled.INSTRUCTIONS:
        for variant in import_module("aot").variants(op, capability):
            variants[variant.row(capability)].append(variant)
    assert {key[0] for key in variants} >= {f"{op}.{each}" for each in kernels_of(op)}
    rows = compiled.load().get(triton.__version__)
    again = [*variants]
    if rows is not None:
        known = {tuple(row[name] for name in compiled.KEY): row for row in rows}
        digests = {
            key: compiled.digest(variant.digest(key[-1]) for variant in same)
            for key, same in variants.items()
        }
        assert digests == {
            key: row["digest"] for key, row in known.items() if key[0].startswith(f"{op}.")
        }, "run python tests/triton/aot.py --write"
        if pytestconfig.getoption("--pairs") != "none":
            again = [*few(variants)]
    for key in again:
        (row,) = compiled.rows(variant.compile(key[-1]) for variant in variants[key])
        assert rows is None or row == known[key], "run python tests/triton/aot.py --write"
        assert budget_problems(triton.__version__, row) == []  # also of another Triton
