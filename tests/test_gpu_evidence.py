"""`make gpu-evidence` measures what it can, whatever else fails, and says what failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_evidence, tasks, verify, worker
from benchmarks.cases import CASES, cases
from benchmarks.compiled import SHARED_PER_PROGRAM
from benchmarks.gpu_evidence import LEAST_SECONDS, MOST_SECONDS, allowance, jobs
from benchmarks.process import ROOT, run_limited
from benchmarks.pytest_results import without_folders
from benchmarks.worker import Worker
from tools.stand_in import ABSENT, KINDS, block, unmeasured

MARGIN = "margin_cross_entropy"


def test_time_goes_to_those_who_need_it():
    assert allowance(1000, 0) == MOST_SECONDS
    assert allowance(100, 1000 // 40) == 100 - LEAST_SECONDS * 25
    assert allowance(30, 29) == 1
    assert allowance(-1, 5) < 0
    for needed in (0.5, MOST_SECONDS * 2):  # all finish early, or none does
        left, waiting = 240.0, 35
        while waiting >= 0:
            granted = allowance(left, waiting)
            assert 0 < granted <= left
            left, waiting = left - min(needed, granted), waiting - 1


@pytest.mark.parametrize("dry", [False, True])
def test_the_first_jobs_are_each_ops_first_case(dry):
    found = jobs(dry)
    suite = "dry" if dry else "gpu"
    timed = [job.case for job in found if job.task == "case"]
    assert timed[: len(CASES)] == [cases(suite, op)[0] for op in CASES]
    assert sorted(timed, key=id) == sorted(cases(suite), key=id)
    kinds = ["profile", "sweep", "blocks", "replay"]
    tasks_in_order = dict.fromkeys(job.task for job in found if job.task != "case")
    assert [*tasks_in_order] == kinds
    if not dry:
        for kind in ("profile", "blocks"):
            assert [job.case.shape["N"] for job in found if job.task == kind] == [512, 4096]
        (sweep, *_) = (job for job in found if job.task == "sweep")
        assert sweep.arguments["workspaces_mib"] == [16, 32, 64, 128, 256]


def test_gemms_are_held_against_their_own_precision():
    ceilings = {
        "product_tflop_per_second": 800.0,
        "float32_tflop_per_second": 50.0,
        "copy_gigabyte_per_second": 3000.0,
    }
    for dtype, share in (("float32", 0.5), ("bfloat16", 25 / 800), ("float16", 25 / 800)):
        row = {"tflop_per_second": 25.0, "gigabyte_per_second": 30.0}
        gpu_evidence._add_shares({"gemm_dtype": dtype, "peers": [row]}, ceilings)
        assert row["share_of_product"] == share
        assert row["share_of_copy"] == 0.01
    row = {"tflop_per_second": 0.0, "gigabyte_per_second": 30.0}
    gpu_evidence._add_shares({"gemm_dtype": "int64", "peers": [row]}, ceilings)
    assert "share_of_product" not in row


def test_published_messages_have_no_paths():
    text = 'at /a/b-c/d.py:3: 1/2 of bf16/float32, "/root/x/y.py"; no file'
    assert without_folders(text) == 'at d.py:3: 1/2 of bf16/float32, "y.py"; no file'


# ---- tests of each op ----------------------------------------------------------------------------

STUBS = {
    "domain_mixup": "def test_a(): pass",
    "hypersphere_repulsion": "import pytest\n@pytest.mark.skip\ndef test_a(): pass",
    MARGIN: "def test_a(): pass",
    f"{MARGIN}_steps": "def test_b(): pass",
    "row_update": "def test_a(): pass\ndef test_b(): assert [1] == [2], 'planted'",
    "sample_classes": "import nothing_of_that_name",
}


def stubs(folder: Path, **more: str) -> Path:
    for name, text in {**STUBS, **more}.items():
        (folder / f"test_gpu_{name}.py").write_text(text + "\n")
    return folder


def over_at_the_first_result(command: list[str], seconds: float, **options: Any) -> str | None:
    """Run a command as `run_limited` does, but end the file that hangs once a test has passed.

    However slow the machine is, the file has a result by then, and nobody waits for its limit.
    """
    if not any("hangs" in word for word in command):
        return run_limited(command, seconds, **options)
    results = Path(command[command.index("--results") + 1])

    def over() -> str | None:
        passed = results.exists() and '"passed"' in results.read_text()
        return f"the process was ended after {seconds:.0f} s" if passed else None

    return run_limited(command, seconds, over, **options)


@pytest.mark.slow
def test_each_op_has_a_verdict_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "run_limited", over_at_the_first_result)
    hangs = "def test_a(): pass\ndef test_b():\n    import time; time.sleep(600)"
    folder, reports = stubs(tmp_path, row_update_hangs=hangs), []
    outcomes = verify.run_gpu_tests(
        30, folder=folder, report=lambda found: reports.append(len(found))
    )
    assert reports[-1] == len(outcomes) == len(CASES)
    margin = outcomes[MARGIN]  # of two files
    assert (margin.passed, margin.failed, margin.problem) == (2, 0, None)
    assert outcomes["domain_mixup"].passed == 1
    assert outcomes["hypersphere_repulsion"].skipped == 1
    rows = outcomes["row_update"]
    assert (rows.passed, rows.failed) == (2, 1)  # those before the one that hangs, too
    assert "the process was ended after 30 s" in rows.problem
    (failure,) = rows.failures
    assert failure["test"].endswith("test_b")
    assert "planted" in failure["message"]
    uncollected = outcomes["sample_classes"]
    assert (uncollected.passed, uncollected.failed) == (0, 1)
    assert "No module named 'nothing_of_that_name'" in uncollected.failures[0]["message"]
    assert "/" not in uncollected.failures[0]["test"]


LOST = """
from tests.gpu import on_device
from tests.gpu.conftest import pytest_runtest_logfinish, pytest_runtest_makereport
"""
LOSES = """
from tests.gpu import on_device


def test_that_loses_the_gpu():
    on_device.is_lost = lambda: True
    assert [1] == [2], "planted"
"""


@pytest.mark.slow
def test_a_test_that_loses_the_gpu_fails_alone(tmp_path):
    later = "\n\ndef test_{}():\n    assert not on_device.is_lost()\n"
    (tmp_path / "conftest.py").write_text(LOST)
    file = tmp_path / "test_gpu_row_update.py"
    file.write_text(LOSES + "".join(later.format(name) for name in "abcdefgh"))
    found = verify.run_gpu_tests(120, folder=tmp_path)["row_update"]
    assert (found.passed, found.failed, found.problem) == (8, 1, None)
    assert "planted" in found.failures[0]["message"]


def test_each_op_has_gpu_tests():
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    assert {verify.op_of(file) for file in files} == {*CASES}
    assert verify.op_of(Path("test_gpu_another_op.py")) == "another_op"


# ---- the measuring process -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_outlives_failed_tasks_and_is_replaced_when_it_hangs_or_dies(monkeypatch):
    """One test, as each process takes seconds to import torch."""
    with Worker("cpu") as process:
        failed = process.run("case", 60, op=MARGIN, suite="dry", index=99, rounds=1)
        pid = process._process.pid
        assert failed == {"not_measured": "IndexError: list index out of range"}
        assert process.run("machine", 60)["torch"] == str(torch.__version__)
        assert process._process.pid == pid
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        with monkeypatch.context() as patch:
            patch.setattr(worker, "GRACE_SECONDS", 0.75)
            stopped = process.run("machine", 0.25)
        assert stopped == {"not_measured": "the process was ended after 1 s"}
        assert time.monotonic() - began < 10
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert "torch" in process.run("machine", 60)
        os.kill(process._process.pid, signal.SIGKILL)
        process._process.wait()
        assert "torch" in process.run("machine", 60)
        pid = process._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_settings_of_the_margin_softmax_are_put_back(monkeypatch):
    from synface_kernels.ops import _triton
    from synface_kernels.ops.margin_cross_entropy import config_triton

    monkeypatch.delenv(tasks.DESIGN, raising=False)
    before = _triton.WORKSPACE_BYTES, config_triton.WORKSPACE_BYTES
    with tasks.margin_settings("tiled", 16):
        assert _triton.WORKSPACE_BYTES == config_triton.WORKSPACE_BYTES == 16 << 20
        assert os.environ[tasks.DESIGN] == "tiled"
    assert before == (_triton.WORKSPACE_BYTES, config_triton.WORKSPACE_BYTES)
    assert tasks.DESIGN not in os.environ


# ---- blocks of the margin softmax's kernels ------------------------------------------------------


def test_candidates_have_room_on_a_multiprocessor_and_the_default_is_one():
    launcher = pytest.importorskip("benchmarks.blocks")
    from synface_kernels.ops._triton import Chip
    from synface_kernels.ops.margin_cross_entropy import config_triton

    gemms = config_triton.choose_gemms(torch.bfloat16, torch.bfloat16, None)
    chip = Chip(90, 132)
    logits = config_triton.block_config(gemms, 512, 1, True, chip)
    grad_weight = config_triton.grad_weight_config(gemms, logits["BLOCK_N"], 512, chip)
    for kernel, default in (("lse", logits), ("factor", logits), ("grad_weight", grad_weight)):
        found = launcher.candidates(kernel, 512, default)
        assert found[0] == default
        assert len(found) == len(launcher.CANDIDATES[kernel]) == 12
        for blocks in found:
            h, n, c, d, warps, stages = (blocks[name] for name in launcher.NAMES)
            columns, depth = (d, n) if kernel == "grad_weight" else (c, d)
            rows = c if kernel == "grad_weight" else n
            assert h * rows * columns <= 128 * 32 * warps  # sums of a thread, of its 255 registers
            assert 2 * stages * depth * (rows + h * columns) <= SHARED_PER_PROGRAM[90]
    assert {b["BLOCK_N"] for b in launcher.candidates("factor", 6, logits)[1:]} == {16}


def test_the_launcher_takes_the_blocks_of_a_candidate():
    launcher = pytest.importorskip("benchmarks.blocks")
    before = launcher.launch_triton.block_config
    with launcher._configured("block_config", {"H": 3}):
        assert launcher.launch_triton.block_config(1, 2) == {"H": 3}
    assert launcher.launch_triton.block_config is before


class FakePasses:
    """Passes that need too much with 4 stages, and are wrong with 4 warps."""

    def __init__(self, case, device):
        from benchmarks.blocks import CANDIDATES, NAMES

        values = {kernel: found[1] for kernel, found in CANDIDATES.items()}
        self.defaults = {
            kernel: dict(zip(NAMES, found, strict=True)) | {"BLOCK_N": 16}
            for kernel, found in values.items()
        }

    def of(self, kernel):
        return self.both

    def both(self, setting):
        result = torch.ones(3, 4, dtype=torch.bfloat16)
        for blocks in setting.values():
            if blocks["num_stages"] == 4:
                raise RuntimeError("out of resource: shared memory")
            if blocks["num_warps"] == 4:
                result[1] *= 1.05
        return [result]


def test_a_wrong_or_failing_candidate_is_never_the_fastest(monkeypatch):
    launcher = pytest.importorskip("benchmarks.blocks")

    def samples(steps, rounds, device):
        settings = {name: step.args[0].values() for name, step in steps.items()}
        return {name: [sum(b["BLOCK_D"] for b in each) + 1.0] for name, each in settings.items()}

    monkeypatch.setattr(launcher, "Passes", FakePasses)
    monkeypatch.setattr(launcher, "samples", samples)
    saved = []
    found = launcher.measure(
        torch.device("cpu"), save=lambda result: saved.append(len(result["settings"])),
        seconds=60, op=MARGIN, suite="dry", index=1, rounds=1,
    )  # fmt: skip
    assert saved == [12, 24, 36]
    for row in found["settings"]:
        blocks, why = row["blocks"], row.get("not_measured", "")
        assert ("out of resource" in why) == (blocks["num_stages"] == 4)
        wrong = blocks["num_warps"] == 4 and blocks["num_stages"] != 4
        assert ("a row differs from the default's by" in why) == wrong
        assert ("seconds" in row) == (not why)
    for kernel, blocks in found["fastest"].items():
        rows = [r for r in found["settings"] if r["kernel"] == kernel and "seconds" in r]
        assert blocks in [row["blocks"] for row in rows]
        assert all(blocks["BLOCK_D"] <= row["blocks"]["BLOCK_D"] for row in rows)
    assert found["together"]["default_seconds"] == 1
    assert found["together"]["ratio"] == found["together"]["seconds"]


def test_a_nan_and_a_single_wrong_row_are_differences():
    launcher = pytest.importorskip("benchmarks.blocks")
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows[3] = 0
    assert launcher.difference([rows], [rows]) is None
    for value in (float("nan"), 0.01):
        other = rows.clone()
        other[3, 2] = value
        assert launcher.difference([other], [rows]) is not None
    lse = torch.full((5,), 20.0, dtype=torch.float64)
    assert launcher.difference([lse + 1e-5], [lse]) is None
    assert launcher.difference([lse + 1e-3], [lse]) is not None


def test_settings_that_were_not_measured_are_named():
    row = {"op": MARGIN, "name": "N=6", "settings": [{"seconds": 1}, {"not_measured": "wrong"}]}
    measured = {kind: [{"op": MARGIN, "name": "N=6"}] for kind in KINDS}
    assert unmeasured({"cases": [], **measured}) == []
    assert unmeasured({"cases": [], **measured, "blocks": [row]}) == [f"{MARGIN}, N=6: wrong"]
    assert unmeasured({"cases": [], **measured, "blocks": []}) == ["blocks"]


# ---- the whole -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_dry_run_measures_every_case_of_every_op(tmp_path):
    """It runs where the packages that a GPU machine lacks cannot be imported."""
    blocked, output = block(tmp_path / "blocked"), tmp_path / "evidence.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_evidence", "--dry", "--output", str(output)],
        cwd=ROOT,
        # torch.compile would take minutes, and its times for tiny shapes do not matter.
        env={
            **os.environ,
            "PYTHONPATH": f".:python:{blocked}",
            "TORCH_COMPILE_DISABLE": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert output.exists(), done.stdout
    result = json.loads(output.read_text())
    assert done.returncode == 0, done.stdout
    assert result["build"]["problem"] is None
    assert "pytorch_metric_learning" in result["cannot_import"]
    assert set(result["tests"]["ops"]) == {*CASES}
    for outcome in result["tests"]["ops"].values():
        assert outcome["passed"] > 10
        assert outcome["failed"] == 0
    for kind in ("copy_gigabyte", "product_tflop", "float32_tflop", "tf32_tflop"):
        assert result["ceilings"][f"{kind}_per_second"] > 0
    assert [(case["op"], case["name"]) for case in result["cases"]] == [
        (case.op, case.name) for case in cases("dry")
    ]
    for case in result["cases"]:
        ours = case["peers"][0]
        assert case["rounds"] == 3
        assert ours["seconds"] > 0
        assert ours["share_of_copy"] > 0
    assert unmeasured(result) == []
    assert "unverified" not in result
    assert {row["op"] for row in result["replays"]} == {*CASES}
    for name in ABSENT:
        assert f"No module named '{name}'" not in json.dumps(result["tests"])


class InstantWorker(Worker):
    """A measuring process that answers at once, for tests of what becomes of its answers."""

    def run(self, task, seconds, **arguments):
        ours = {"peer": "ours", "label": "synface", "seconds": 1.0}
        return {"peers": [ours]} if task == "case" else {"seconds": 1.0}


@pytest.mark.slow
def test_a_failure_in_one_op_leaves_the_others_measured(tmp_path, monkeypatch):
    tests, output = tmp_path / "tests", tmp_path / "evidence.json"
    tests.mkdir()
    stubs(tests, hypersphere_repulsion="def test_a(): pass")
    monkeypatch.setattr(gpu_evidence, "Worker", InstantWorker)
    options = ["--dry", "--output", str(output), "--tests", str(tests)]
    monkeypatch.setattr(sys, "argv", ["gpu_evidence", *options])
    with pytest.raises(SystemExit) as ended:
        gpu_evidence.main()
    printed, result = str(ended.value.code), json.loads(output.read_text())
    assert printed.startswith("not all went well:")
    assert "row_update: 1 of its tests failed" in printed
    assert "sample_classes: 1 of its tests failed, none passed" in printed
    assert "domain_mixup:" not in printed
    failed = {"row_update", "sample_classes"}
    for case in result["cases"]:
        assert (case["op"] in failed) == ("not_measured" in case), case
        assert (case["op"] in failed) != bool(case["peers"])
    for kept in KINDS:
        assert result[kept]
        assert not failed & {row["op"] for row in result[kept]}
    apart = result["unverified"]["cases"]
    assert {case["op"] for case in apart} == failed
    assert all(case["peers"][0]["seconds"] > 0 for case in apart)
