"""What the compiler says of every Triton kernel that would be launched, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
# Shared memory that one program may use, and the product's instruction with at least 64 rows.
ARCHITECTURES = {
    80: (163 * 1024, "mma.sync"),
    90: (227 * 1024, "wgmma.mma_async"),
    100: (227 * 1024, "tcgen05.mma"),
}
# Bytes that a thread may spill, outside of the innermost loops.
STACK = 16 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 72

Report = list[dict[str, Any]]


@pytest.fixture(scope="module")
def reports() -> dict[int, Report]:
    """By architecture, compiled side by side; never in the interpreter, which compiles nothing."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    processes = {
        capability: subprocess.Popen(
            [sys.executable, str(HERE / "aot.py"), str(capability)],
            cwd=HERE.parents[1], env=env, stdout=subprocess.PIPE, text=True,
        )
        for capability in ARCHITECTURES
    }  # fmt: skip
    outputs = {capability: process.communicate()[0] for capability, process in processes.items()}
    assert not any(process.returncode for process in processes.values())
    return {k: [json.loads(line) for line in text.splitlines()] for k, text in outputs.items()}


@pytest.fixture(params=ARCHITECTURES)
def report(request: pytest.FixtureRequest, reports: dict[int, Report]) -> Report:
    return reports[request.param]


def test_every_kernel_is_launched(report: Report) -> None:
    source = HERE.parents[1] / "synface_kernels/ops/margin_cross_entropy/kernel_triton.py"
    kernels = {
        line.removeprefix("def ").split("(")[0]
        for line in source.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert len(kernels) >= 7
    assert {compiled["kernel"] for compiled in report} == kernels


def test_products_use_tensor_cores(report: Report) -> None:
    products = [compiled for compiled in report if "PRECISION" in compiled["config"]]
    kinds = set()
    for compiled in products:
        dtype = next((p for p in ("*bf16", "*fp16") if p in compiled["pointers"]), "*fp32")
        precision = compiled["config"]["PRECISION"]
        kinds.add((dtype, precision))
        large = int(compiled["config"]["BLOCK_N"]) >= 64
        instruction = ARCHITECTURES[compiled["capability"]][1] if large else "mma.sync"
        exact = (dtype, precision) == ("*fp32", "ieee")
        assert compiled["instructions"] == ([] if exact else [instruction]), compiled
    assert kinds == {("*fp32", "ieee"), ("*fp32", "tf32"), ("*bf16", "ieee"), ("*fp16", "ieee")}


def test_shared_memory_fits(report: Report) -> None:
    for compiled in report:
        assert compiled["shared"] <= ARCHITECTURES[compiled["capability"]][0], compiled


def test_two_products_fit_on_a_multiprocessor(report: Report) -> None:
    for compiled in report:
        if "PRECISION" in compiled["config"]:
            shared = ARCHITECTURES[compiled["capability"]][0]
            assert 2 * compiled["shared"] <= shared, compiled
            threads = 32 * compiled["config"]["num_warps"]
            assert 2 * threads * -(-compiled["registers"] // 8) * 8 <= 65536, compiled


def test_next_to_nothing_spills(report: Report) -> None:
    for compiled in report:
        assert compiled["stack"] <= STACK, compiled
        assert compiled["local"] == 0, compiled
