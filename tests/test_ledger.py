"""The ledger counts every kernel of every op, and docs/gpu.md shows it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import compiled, costs, devices, ledger, predict
from benchmarks.cases import CASES, Case, cases
from benchmarks.devices import DEVICES
from benchmarks.launches import Launch, Region
from benchmarks.predict import Account, Cache, account, block_clocks

ROOT = Path(__file__).resolve().parents[1]
H100 = DEVICES["H100"]


def case_of(op: str, **wanted: object) -> Case:
    """Return the first GPU case of an op that has such attributes."""
    return next(
        case
        for case in cases("gpu", op)
        if all(getattr(case, name) == value for name, value in wanted.items())
    )


def smallest(op: str) -> Case:
    return min(cases("gpu", op), key=lambda case: case.flops + case.bytes)


def flops(found: Account) -> float:
    return sum(entry.flops for entry in found.entries)


def memory(found: Account) -> float:
    return sum(entry.memory for entry in found.entries)


@pytest.mark.parametrize("op", list(CASES))
def test_every_op_has_a_ledger(op: str) -> None:
    found = account(smallest(op), H100)
    assert found.entries
    assert all(entry.seconds > 0 and entry.l2 >= 0 for entry in found.entries)
    assert all(entry.memory <= entry.l2 * (1 + 1e-9) for entry in found.entries)
    assert found.seconds >= found.floor_seconds
    assert found.seconds == max(found.device_seconds, found.host_seconds)


def test_a_margin_softmax_multiplies_four_times() -> None:
    """Two GEMMs of logits, one for each gradient."""
    case = case_of("margin_cross_entropy", shape={"N": 2048, "D": 512, "C": 100_000})
    found = account(case, H100)
    assert case.flops * 8 / 6 <= flops(found) <= 1.05 * case.flops * 8 / 6


@pytest.mark.slow
def test_a_logit_takes_at_most_8_bytes() -> None:
    for case in cases("gpu", "margin_cross_entropy"):
        if case.gemm_dtype == torch.bfloat16 and case.shape["C"] <= 1_000_000:
            per_logit = account(case, H100).bytes_per_logit
            assert per_logit is not None
            assert 2 <= per_logit <= 8, case.name


@pytest.mark.parametrize(("n", "milliseconds"), [(512, 5), (2048, 16), (4096, 32)])
def test_a_step_of_a_million_classes_keeps_its_budget_of_time(n: int, milliseconds: int) -> None:
    wanted = {"N": n, "D": 512, "C": 1_000_000}
    case = case_of("margin_cross_entropy", shape=wanted, gemm_dtype=torch.bfloat16, autocast=None)
    assert account(case, H100).seconds <= milliseconds / 1000


def test_a_mixup_moves_what_the_case_needs() -> None:
    for case in cases("gpu", "domain_mixup"):
        moved = memory(account(case, H100))
        assert case.bytes <= moved <= 1.02 * case.bytes


def test_memory_of_larger_rate_shortens_what_it_bounds() -> None:
    case = cases("gpu", "domain_mixup")[-1]
    times = [account(case, gpu).device_seconds for gpu in DEVICES.values()]
    assert times[1] < times[0]


# ---- the model -----------------------------------------------------------------------------------


def region(start: int, nbytes: int, storage: int = 0) -> Region:
    return Region(storage, start, nbytes, nbytes, (nbytes,), torch.uint8)


def test_what_stays_in_the_cache_is_not_read_or_written_again() -> None:
    page = predict.PAGE_BYTES
    cache = Cache(4 * page)
    assert cache.read(region(0, 2 * page), 2 * page) == 2 * page
    assert cache.read(region(0, 2 * page), 2 * page) == 0
    cache.write(region(0, page, 1), page, 7)
    cache.write(region(0, page, 1), page, 8)  # overwritten before it went to memory
    assert cache.read(region(0, page, 1), page) == 0
    assert cache.written == {}
    assert cache.read(region(0, 4 * page, 2), 4 * page) == 4 * page
    assert cache.written == {8: page}
    assert cache.read(region(0, 2 * page), 2 * page) == 2 * page


def test_a_block_takes_the_tensor_cores_time_or_that_of_shared_memory() -> None:
    wide = costs.Block(128, 256, 512, torch.bfloat16)
    narrow = costs.Block(128, 64, 512, torch.bfloat16)
    least = 2 * 128 * 256 * 512 / H100.tensor_flop
    assert block_clocks(wide, H100, 8) == least
    assert block_clocks(narrow, H100, 8) > least / 4
    exact = costs.Block(128, 256, 512, torch.float32, exact=True)
    assert block_clocks(exact, H100, 8) > 128 * 256 * 512 / devices.FLOAT32_LANES
    tf32 = costs.Block(128, 256, 512, torch.float32)
    assert block_clocks(tf32, H100, 8) == 2 * least


def test_measured_ceilings_take_the_place_of_assumed_ones() -> None:
    ceilings = {"copy_gigabyte_per_second": 3000.0, "product_tflop_per_second": 700.0}
    found = devices.with_ceilings(H100, {"ceilings": ceilings})
    assert (found.copy_rate, found.tensor_rate, found.measured) == (3e12, 7e14, True)
    assert devices.with_ceilings(H100, {}) == H100
    assert devices.with_ceilings(H100, None) == H100


# ---- clear errors --------------------------------------------------------------------------------


def test_a_kernel_without_a_cost_function_is_named() -> None:
    launch = Launch("op._new_kernel", {}, call=(None, (), {}))
    with pytest.raises(NotImplementedError, match=r"op\._new_kernel has no cost function"):
        costs.work_of(launch)


def test_a_kernel_without_a_compilers_report_is_named() -> None:
    launch = Launch("op._new_kernel", {"BLOCK": 3}, call=(None, (), {}))
    with pytest.raises(LookupError, match=r"op\._new_kernel.* 3 for sm_90"):
        compiled.find(launch, 90)


@pytest.mark.slow
def test_an_unknown_gpu_is_named() -> None:
    with pytest.raises(ValueError, match=r"device must be one of \['H100', 'H200'\], got 'H300'"):
        devices.device("H300")
    command = [sys.executable, "-m", "benchmarks.ledger", "--device", "H300"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "got 'H300'" in ended.stderr
    assert "Traceback" not in ended.stderr


# ---- the page ------------------------------------------------------------------------------------


def test_a_time_that_was_not_measured_says_so() -> None:
    case = smallest("domain_mixup")
    table = ledger.one_op("domain_mixup", [H100])
    assert table.count("not measured") == len(cases("gpu", "domain_mixup"))
    peers = [{"peer": "ours", "seconds": 0.00123}]
    row = {"op": case.op, "name": case.name, "peers": peers}
    result = {"machine": {"device": "NVIDIA H100 80GB HBM3"}, "cases": [row]}
    with mock.patch.object(devices, "results", return_value={"H100": result}):
        assert "1.23 ms" in ledger.one_op("domain_mixup", [H100])


def test_results_are_of_the_gpu_that_their_device_names(tmp_path: Path) -> None:
    for name, device in (("a", "NVIDIA H200"), ("b", "NVIDIA H100 PCIe"), ("c", "Intel")):
        (tmp_path / f"{name}.json").write_text(f'{{"machine": {{"device": "{device}"}}}}')
    assert [*devices.results(tmp_path)] == ["H200"]


def test_the_page_shows_every_kernel_and_case() -> None:
    text = ledger.PAGE.read_text()
    for op in CASES:
        for case in cases("gpu", op):
            assert case.name in text
    for rows in compiled.load().values():
        for row in rows:
            op, kernel = row["kernel"].split(".")
            assert f"{op}: {kernel.strip('_').removesuffix('_kernel')}" in text
    assert re.search(r"not measured|Measured: ", text)


@pytest.mark.slow
def test_the_page_is_current() -> None:
    assert ledger.PAGE.read_text() == ledger.page(ledger.gpus(DEVICES)), (
        "run python -m benchmarks.ledger --write"
    )


def test_the_newest_triton_is_the_one_of_the_greatest_number(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(compiled, "PATH", tmp_path / "compiled.json")
    try:
        for version in ("3.10.0", "3.9.1"):
            compiled.save(version, [], [])
        assert [*compiled.load()] == ["3.9.1", "3.10.0"]
        assert compiled.newest() == "3.10.0"
    finally:
        compiled.load.cache_clear()
