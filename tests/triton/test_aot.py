"""Compiled without a GPU, every Triton kernel that would be launched keeps within its resources."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
OPS = sorted(file.stem.removeprefix("aot_") for file in HERE.glob("aot_*.py"))
# Shared memory that one program may use, and the GEMM's instruction for at least 64 rows.
ARCHITECTURES = {
    80: (163 * 1024, "mma.sync"),
    90: (227 * 1024, "wgmma.mma_async"),
    100: (227 * 1024, "tcgen05.mma"),
}

Reports = list[dict[str, Any]]


@pytest.fixture(scope="module", params=OPS)
def op(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def limits(op: str) -> ModuleType:
    return import_module(f"aot_{op}")


@pytest.fixture(scope="module")
def all_reports() -> Reports:
    """Compiled side by side; never in the interpreter, which compiles nothing."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "aot.py"), *OPS, str(capability)],
            cwd=HERE.parents[1], env=env, stdout=subprocess.PIPE, text=True,
        )
        for capability in ARCHITECTURES
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes)
    return [json.loads(line) for text in outputs for line in text.splitlines()]


@pytest.fixture(scope="module")
def reports(op: str, all_reports: Reports) -> Reports:
    return [compiled for compiled in all_reports if compiled["op"] == op]


@pytest.mark.slow
def test_every_kernel_is_launched(op: str, reports: Reports) -> None:
    source = HERE.parents[1] / f"synface_kernels/ops/{op}/kernel_triton.py"
    kernels = {
        line.removeprefix("def ").split("(")[0]
        for line in source.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert len(kernels) >= 2
    assert {(compiled["kernel"], compiled["capability"]) for compiled in reports} == {
        (kernel, capability) for kernel in kernels for capability in ARCHITECTURES
    }


@pytest.mark.slow
def test_shared_memory_fits(reports: Reports) -> None:
    for compiled in reports:
        assert compiled["shared"] <= ARCHITECTURES[compiled["capability"]][0], compiled


@pytest.mark.slow
def test_registers_suffice(reports: Reports, limits: ModuleType) -> None:
    for compiled in reports:
        if "PRECISION" not in compiled["config"]:
            assert compiled["registers"] <= limits.REGISTERS, compiled
        assert compiled["stack"] <= limits.STACK, compiled
        assert compiled["local"] == 0, compiled


@pytest.mark.slow
def test_nothing_is_fused_that_must_not_be(reports: Reports, limits: ModuleType) -> None:
    for compiled in reports:
        assert limits.NOT_FUSED is None or compiled["fused"][limits.NOT_FUSED] == 0, compiled


@pytest.mark.parametrize("op", ["margin_cross_entropy"], indirect=True)
@pytest.mark.slow
def test_gemms_use_tensor_cores(reports: Reports) -> None:
    kinds = set()
    for compiled in reports:
        if "PRECISION" not in compiled["config"]:
            continue
        dtype = next((p for p in ("*bf16", "*fp16") if p in compiled["pointers"]), "*fp32")
        precision = compiled["config"]["PRECISION"]
        kinds.add((compiled["capability"], dtype, precision))
        large = int(compiled["config"]["BLOCK_N"]) >= 64
        instruction = ARCHITECTURES[compiled["capability"]][1] if large else "mma.sync"
        exact = (dtype, precision) == ("*fp32", "ieee")
        assert compiled["instructions"] == ([] if exact else [instruction]), compiled
    wanted = [("*fp32", "ieee"), ("*fp32", "tf32"), ("*bf16", "ieee"), ("*fp16", "ieee")]
    assert kinds == {(capability, *kind) for capability in ARCHITECTURES for kind in wanted}


@pytest.mark.parametrize("op", ["margin_cross_entropy"], indirect=True)
@pytest.mark.slow
def test_two_gemms_fit_on_a_multiprocessor(reports: Reports) -> None:
    for compiled in reports:
        if "PRECISION" in compiled["config"]:
            shared = ARCHITECTURES[compiled["capability"]][0]
            assert 2 * compiled["shared"] <= shared, compiled
            threads = 32 * compiled["config"]["num_warps"]
            assert 2 * threads * -(-compiled["registers"] // 8) * 8 <= 65536, compiled
