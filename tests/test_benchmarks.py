"""The benchmarks measure what they claim, and report what could not be measured."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import synface_kernels as sk
from benchmarks import (
    driver,
    gpu_evidence,
    isolated,
    machine,
    margin_peers,
    peers,
    process,
    run,
    table,
    verify,
    workloads,
)
from benchmarks.cases import (
    CASES,
    HEADLINES,
    STEPS,
    cases,
    domain_mixup,
    hypersphere_repulsion,
)
from benchmarks.peers import Peer

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
OPS = list(CASES)
MARGIN, MIXUP = "margin_cross_entropy", "domain_mixup"
REPULSION = "hypersphere_repulsion"


def dry(op: str):
    return cases("dry", op)[0]


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_cases_of_each_suite_and_peers(op):
    for suite in ("dry", "cpu", "gpu"):
        found = cases(suite, op)
        assert found
        assert len({case.name for case in found}) == len(found)
    assert peers.PEERS[op][0].name == "ours"
    assert op in workloads.WORKLOADS
    assert op in STEPS
    assert 1 <= HEADLINES[op] <= len(cases("cpu", op))


def test_margin_flops_and_bytes_are_those_of_the_three_gemms():
    case = dry(MARGIN)
    work = workloads.MarginWorkload(case, CPU)
    step = peers.find(MARGIN, "three products").build(work)
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == case.flops
    x, w = work.input.nbytes, work.weight.nbytes
    assert case.bytes == 2 * w + work.buffers["grad_weight"].nbytes + 2 * x + work.target.nbytes


OTHERS = [
    peer.name
    for peer in peers.PEERS[MARGIN]
    if peer.name not in ("three products", "F.linear_cross_entropy", "Liger", "CCE")
]
# A cosine of bfloat16 factors, each rounded once or twice, times the scale, may be off by so much.
ROUNDED = 64 * 2**-7


@pytest.mark.parametrize("case", cases("dry", MARGIN)[:4], ids=lambda case: case.name)
@pytest.mark.parametrize("name", OTHERS)
def test_margin_peers_against_float64(name, case, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    if name == "pytorch-metric-learning":
        pytest.importorskip("pytorch_metric_learning")
    work = workloads.MarginWorkload(case, CPU)
    exact = [v.detach().double().requires_grad_() for v in (work.input, work.weight)]
    margin = sk.ArcFace(peers.SCALE, peers.MARGIN)
    expected = sk.margin_cross_entropy(*exact, work.target, margin, impl="reference")
    expected.backward()
    loss = peers.find(MARGIN, name).build(work)()
    weight_grad = next(p.grad for p in reversed(work.parameters) if p.grad is not None)
    if weight_grad.shape != work.weight.shape:
        weight_grad = weight_grad.T
    exactly = case.gemm_dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), expected, rtol=1e-5, atol=1e-5 if exactly else ROUNDED
    )
    for grad, wanted in ((work.input.grad, exact[0].grad), (weight_grad, exact[1].grad)):
        error = (grad.double() - wanted).norm() / wanted.norm()
        assert error < (1e-5 if exactly else 0.1), (name, error)


def test_sampled_peers_have_the_gradient_of_the_sampled_classes():
    case = cases("dry", MARGIN)[-1]
    work = workloads.MarginWorkload(case, CPU)
    ids, labels = margin_peers.sample(work.target, len(work.weight), work.sampled)
    assert len(ids) == work.sampled == case.shape["S"]
    assert torch.equal(ids[labels], work.target)
    exact = [v.detach().double().requires_grad_() for v in (work.input, work.weight)]
    sk.margin_cross_entropy(
        *exact, labels, sk.ArcFace(), class_ids=ids, impl="reference"
    ).backward()
    margin_peers.partial_fc(work.input, work.weight, labels, ids).backward()
    torch.testing.assert_close(work.input.grad.double(), exact[0].grad, rtol=1e-4, atol=1e-6)
    dense = exact[1].grad.to_dense()
    torch.testing.assert_close(work.weight.grad.double(), dense, rtol=1e-4, atol=1e-6)
    for name in ("ours", "Partial FC's steps", "three products"):
        work.clear_gradients()
        peers.find(MARGIN, name).build(work)()
        if name != "three products":
            touched = work.weight.grad.to_dense().any(1)
            assert 0 < touched.sum() <= work.sampled
    with pytest.raises(NotImplementedError, match="all classes"):
        peers.find(MARGIN, "eager torch").build(work)


def test_chunks_of_rows_agree_with_all_rows():
    work = workloads.MarginWorkload(dry(MARGIN), CPU)
    results = []
    for rows in (1, 5, 16):
        work.clear_gradients()
        loss = margin_peers.Chunked.apply(*work.parameters, work.target, rows, torch.float32)
        (2 * loss).backward()
        results.append((loss.detach(), work.input.grad, work.weight.grad))
    for result in results[1:]:
        for mine, theirs in zip(result, results[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert margin_peers.rows_per_chunk(1_000_000) == 134
    assert margin_peers.rows_per_chunk(2**40) == 1


@pytest.mark.parametrize("case", cases("dry", "row_update"), ids=lambda case: case.name)
def test_row_update_peers_compute_what_ours_does(case, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def run(name):
        work = workloads.RowUpdateWorkload(case, CPU)
        peers.find("row_update", name).build(work)()
        return work.weight, *work.states

    tolerance = {"rtol": 2 * torch.finfo(case.torch_dtype).eps, "atol": 1e-6}
    for name in ("eager torch", "torch.compile"):
        for mine, theirs in zip(run("ours"), run(name), strict=True):
            torch.testing.assert_close(mine, theirs, **tolerance)


def test_sampling_peers_sample_what_is_asked():
    case = dry("sample_classes")
    work = workloads.SampleWorkload(case, CPU)
    for name in ("ours", "insightface's"):
        ids = peers.find("sample_classes", name).build(work)()
        assert len(ids) == len(ids.unique()) == case.shape["S"]
        assert torch.isin(work.target, ids).all()


def test_floor_reuses_its_outputs():
    work = workloads.MarginWorkload(dry(MARGIN), CPU)
    step = peers.find(MARGIN, "three products").build(work)
    step()
    before = {name: buffer.data_ptr() for name, buffer in work.buffers.items()}
    step()
    assert {name: buffer.data_ptr() for name, buffer in work.buffers.items()} == before
    torch.testing.assert_close(work.buffers["logits"], work.input.detach() @ work.weight.detach().T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("result", ["out=", "fresh"])
def test_mixup_peers_compute_what_ours_does(dtype, memory_format, result, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = domain_mixup("dry", 2, 16, dtype, memory_format, result)
    work = workloads.MixupWorkload(case, CPU)
    assert case.bytes == work.synthetic.nbytes + work.real.nbytes + work.out.nbytes
    ours = peers.find(MIXUP, "ours").build(work)()
    assert (ours is work.out) == (result == "out=")
    ours = ours.clone()
    assert ours.is_contiguous(memory_format=work.format)
    for name in ("eager torch", "torch.compile", "torch.compile, into out"):
        theirs = peers.find(MIXUP, name).build(work)()
        assert (theirs is work.out) == (name == "torch.compile, into out")
        assert theirs.is_contiguous(memory_format=work.format)
        tolerance = {"rtol": 2 * torch.finfo(theirs.dtype).eps, "atol": 1e-6}
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_mixup_floors_copy_what_they_say():
    work = workloads.MixupWorkload(dry(MIXUP), CPU)
    shares = {"copy_ that moves as many bytes": 2, "copy_ that moves twice as many": 1}
    for name, share in shares.items():
        assert peers.find(MIXUP, name).build(work)().nbytes == dry(MIXUP).bytes // share


ENERGIES = [hypersphere_repulsion("dry", 64, 16, energy) for energy in ("row-max", "log-sum-exp")]


@pytest.mark.parametrize("case", ENERGIES, ids=lambda case: case.name)
def test_repulsion_peers_compute_what_ours_does(case, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    work = workloads.RepulsionWorkload(case, CPU)

    def run(name):
        work.clear_gradients()
        return peers.find(REPULSION, name).build(work)(), work.points.grad

    loss, gradient = run("ours")
    for name in ("eager torch", "torch.compile"):
        theirs, their_gradient = run(name)
        torch.testing.assert_close(theirs, loss)
        torch.testing.assert_close(their_gradient, gradient, rtol=1e-4, atol=1e-7)
    if work.row_max:
        torch.testing.assert_close(run("ours, neighbors")[0], loss)


@pytest.mark.parametrize(("name", "module"), [("FAISS", "faiss"), ("KeOps", "pykeops")])
def test_neighbor_searches_find_what_ours_does(name, module):
    pytest.importorskip(module)
    work = workloads.RepulsionWorkload(dry(REPULSION), CPU)
    theirs = peers.find(REPULSION, name).build(work)()
    torch.testing.assert_close(theirs, peers.find(REPULSION, "ours").build(work)())


def test_half_products_are_what_a_step_must_compute():
    for case in ENERGIES:
        work = workloads.RepulsionWorkload(case, CPU)
        peers.find(REPULSION, "half products").build(work)()
        made = {name: tuple(buffer.shape) for name, buffer in work.buffers.items()}
        n, d = case.shape["N"], case.shape["D"]
        gradients = {} if work.row_max else {"rows": (n // 2, d), "columns": (n, d)}
        assert made == {"cosines": (n // 2, n)} | gradients
        assert case.flops == 2 * (n // 2) * n * d * (1 if work.row_max else 3)


def peer(name, build, needs=0):
    return Peer(name, f"label of {name}", build, lambda case: needs)


def sleeper(seconds):
    return lambda work: lambda: time.sleep(seconds)


def absent(work):
    raise ImportError("No module named 'nothing'")


def test_interleaved_times_and_reasons(monkeypatch):
    monkeypatch.setitem(
        peers.PEERS,
        MARGIN,
        [
            peer("ours", sleeper(0.02)),
            peer("slow", sleeper(0.06)),
            peer("absent", absent),
            peer("large", sleeper(0), needs=2**60),
        ],
    )
    saved = []
    result = driver.measure_time(dry(MARGIN), CPU, rounds=3, save=saved.append)
    ours, slow, missing, large = result["peers"]
    assert result["rounds"] == 3
    assert [r["rounds"] for r in saved] == [0, 1, 2, 3]
    assert ours["ratio"] == 1
    assert slow["seconds"] >= 0.06
    assert 1 < slow["ratio_range"][0] <= slow["ratio"] <= slow["ratio_range"][1]
    assert missing["not_measured"] == "ImportError: No module named 'nothing'"
    assert large["not_measured"].startswith("would need 1073741824.0 GiB")
    assert result["flops"] / slow["seconds"] / 1e12 == slow["tflop_per_second"]
    text = table.one_case(result)
    assert "not measured: ImportError" in text
    assert f"{slow['ratio']:.2f}" in text


@pytest.mark.slow
def test_a_peer_that_hangs_costs_its_time_alone(monkeypatch):
    monkeypatch.setitem(
        peers.PEERS, MARGIN, [peer("ours", sleeper(0.001)), peer("hangs", sleeper(60))]
    )
    began = time.monotonic()
    result = driver.measure_time(dry(MARGIN), CPU, rounds=2, seconds=2)
    assert time.monotonic() - began < 10
    assert result["rounds"] == 2
    assert "TimeoutError: not ready after" in result["peers"][1]["not_measured"]


def test_a_peer_that_is_too_slow_is_left_out(monkeypatch):
    slow, case = peer("slow", sleeper(0.2)), dry(MARGIN)
    found = driver.measure_memory(case, slow, rounds=7, limit=1.0)
    assert re.fullmatch(r"one step took 0\.2\d* s, limit 1 s for 7 rounds", found["not_measured"])
    found = driver.measure_memory(case, slow, rounds=7, limit=0.1)
    assert re.fullmatch(r"the first step took 0\.2\d* s, limit 0\.1 s", found["not_measured"])
    monkeypatch.setitem(peers.PEERS, MARGIN, [peer("ours", sleeper(0.001)), slow])
    announced = []
    result = driver.measure_time(
        case, CPU, rounds=2, announce=announced.append, without={"slow": "it was too slow"}
    )
    assert result["peers"][1]["not_measured"] == "it was too slow"
    assert {*announced} == {"ours"}
    assert len(announced) >= 2 + 2


@pytest.mark.slow
def test_the_suite_goes_on_without_peers_that_hang_or_crash(monkeypatch):
    names = ("ours", "holds", "crashes", "holds when timed", "absent")
    monkeypatch.setitem(peers.PEERS, MARGIN, [peer(name, absent) for name in names])
    monkeypatch.setattr(isolated, "DRIVER", "tests.helpers.stand_in_driver")
    began = time.monotonic()
    result = isolated.run_case(dry(MARGIN), 3, peer_seconds=60)
    assert time.monotonic() - began < 60  # to those that hold, their steps seem minutes old
    found = {row["peer"]: row for row in result["peers"]}
    assert tuple(found) == names
    assert found["ours"] == {"peer": "ours", "peak_bytes": 1}
    for name in ("holds", "holds when timed"):
        reason = "a step took more than 60 s, and the process was ended"
        assert found[name]["not_measured"] == reason
    assert found["crashes"]["not_measured"] == f"the process ended with status {-signal.SIGABRT}"
    assert found["absent"]["not_measured"] == "ImportError"
    assert "problem" not in result


def test_the_suite_ends_with_its_time(monkeypatch):
    monkeypatch.setitem(peers.PEERS, MARGIN, [peer("holds", absent)])
    monkeypatch.setattr(isolated, "DRIVER", "tests.helpers.stand_in_driver")
    began = time.monotonic()
    result = isolated.run_case(dry(MARGIN), 3, peer_seconds=1000, seconds=0.5)
    assert time.monotonic() - began < 10
    assert result["peers"] == []
    assert result["not_measured"] == isolated.NO_TIME
    assert "not measured: no time was left" in table.one_case(result)


def test_a_process_that_does_not_start_is_ended(monkeypatch):
    monkeypatch.setattr(process, "START_SECONDS", 0.5)
    found = process.run_child(["tests.helpers.stand_in_driver", "never", "dry", "0"], 60, 60)
    reason = "starting or stopping took more than 0.5 s, and the process was ended"
    assert found == {"not_measured": reason, "problem": reason}


def test_a_complete_result_counts_whatever_its_process_ends_with(monkeypatch):
    command = ["tests.helpers.stand_in_driver", "fails at its exit", "dry", "0"]
    assert process.run_child([*command, "--alone", "ours"], 60, 60) == {
        "peer": "ours", "peak_bytes": 1,
    }  # fmt: skip


def test_an_interrupted_run_leaves_what_it_measured(tmp_path, monkeypatch, capsys):
    output, measured = tmp_path / "new" / "result.json", []

    def run_case(case, rounds, **limits):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append({"op": case.op, "name": case.name, "peers": [], "not_measured": "no"})
        return measured[-1]

    ceilings = []
    monkeypatch.setattr(run, "run_case", run_case)
    monkeypatch.setattr(run, "require", lambda op, seconds: verify.Outcome(passed=1))
    monkeypatch.setattr(run, "run_child", lambda _, seconds: ceilings.append(seconds) or {})
    arguments = ["--suite", "dry", "--minutes", "0.5"]
    monkeypatch.setattr(sys, "argv", ["run", *arguments, "--output", str(output)])
    output.parent.mkdir()
    output.write_text("the result before")
    with pytest.raises(KeyboardInterrupt):
        run.main()
    assert output.read_text() == "the result before"
    assert json.loads(process.partial(output).read_text())["cases"] == measured
    assert 0 < ceilings[0] <= 30
    for bad, problem in ((tmp_path, "must be a file"), (output / "a.json", "cannot be created")):
        monkeypatch.setattr(sys, "argv", ["run", *arguments, f"--output={bad}"])
        with pytest.raises(SystemExit, match="2"):
            run.main()
        assert problem in capsys.readouterr().err
    assert len(ceilings) == 1
    monkeypatch.setattr(sys, "argv", ["growth", "--series", "a, b", f"--output={output}", "-x"])
    assert process.command_line("m") == "python -m m --series 'a, b' -x"


def test_tests_that_time_ends_do_not_count_as_failed(monkeypatch):
    given = []

    def ended(op, seconds):
        given.append(seconds)
        return verify.Outcome(passed=1, problem="the process was ended after 5 s")

    monkeypatch.setattr(verify, "verify", ended)
    with pytest.raises(SystemExit, match="the time was over before its tests ended"):
        verify.require(MARGIN, -5.0)
    assert given == [0.0]
    monkeypatch.setattr(verify, "verify", lambda *_: verify.Outcome(failed=1))
    with pytest.raises(SystemExit, match="its tests do not pass"):
        verify.require(MARGIN)


def test_a_run_hands_its_limits_on(tmp_path, monkeypatch, capsys):
    given, output = [], tmp_path / "result.json"

    def run_case(case, rounds, **limits):
        given.append((case, rounds, limits))
        return {"op": case.op, "name": case.name, "peers": [], "not_measured": isolated.NO_TIME}

    def require(op, seconds):
        assert seconds <= 60
        return verify.Outcome(passed=1)

    monkeypatch.setattr(run, "run_case", run_case)
    monkeypatch.setattr(run, "require", require)
    monkeypatch.setattr(run, "run_child", lambda *_: {"copy_gigabyte_per_second": 20.0})
    arguments = ["--suite", "dry", "--headline", "--rounds", "3", "--peer-seconds", "9"]
    monkeypatch.setattr(sys, "argv", ["run", *arguments, "--minutes", "1", "--output", str(output)])
    run.main()
    assert [case.op for case, _, _ in given] == [
        op for op in CASES for _ in cases("dry", op)[: HEADLINES[op]]
    ]
    for _, rounds, limits in given:
        assert rounds == 3
        assert limits["peer_seconds"] == 9
        assert 0 < limits["seconds"] <= 60
    result = json.loads(output.read_text())
    assert result["format"] == run.FORMAT
    assert result["command"] == " ".join(["python -m benchmarks.run", *arguments, "--minutes", "1"])
    assert {*result["verified"]} == {*CASES}
    assert "not measured: no time was left" in capsys.readouterr().out


@pytest.mark.slow
def test_the_driver_writes_what_the_suite_reads(tmp_path, monkeypatch):
    output = tmp_path / "result.json"
    monkeypatch.setitem(
        peers.PEERS, MARGIN, [peer("ours", sleeper(0.001)), peer("slow", sleeper(0.2))]
    )

    def run(*arguments):
        command = ["driver", MARGIN, "dry", "0", *arguments, "--output", str(output)]
        monkeypatch.setattr(sys, "argv", command)
        driver.main()
        return json.loads(output.read_text())

    assert run("--alone", "ours")["peak_bytes"] >= 0
    assert (tmp_path / process.RUNNING).read_text() == ""
    found = run("--alone", "slow", "--limit", "0.3", "--rounds", "2")
    assert found["not_measured"].endswith("limit 0.3 s for 2 rounds")
    result = run("--without", json.dumps({"slow": found["not_measured"]}), "--rounds", "2")
    assert result["rounds"] == 2
    assert result["peers"][1]["not_measured"] == found["not_measured"]


def test_peak_memory_is_what_a_step_takes():
    size = 96 << 20

    def build(work):
        def step():
            torch.ones(size, dtype=torch.uint8)
            torch.ones(size // 2, dtype=torch.uint8)  # the first is free again by now

        return step

    big = peer("big", build)
    found = driver.measure_memory(dry(MARGIN), big)
    assert size - (1 << 20) < found["peak_bytes"] < size + (16 << 20)  # Linux counts in batches
    assert "not_measured" in driver.measure_memory(dry(MARGIN), peer("absent", absent))


def test_processes_end_with_their_limit(tmp_path):
    pid = tmp_path / "pid"
    command = ["sh", "-c", f"sleep 60 & echo $! > {pid}; wait"]
    assert process.run_limited(command, 1) == "the process was ended after 1 s"
    grandchild = int(pid.read_text())
    status = Path(f"/proc/{grandchild}/status")
    deadline = time.monotonic() + 5
    while status.exists() and "zombie" not in status.read_text():
        assert time.monotonic() < deadline, "what the process started still runs"
        time.sleep(0.05)
    assert process.run_limited(["false"], 5) == "the process ended with status 1"
    assert process.run_limited(["true"], 5) is None


def test_what_a_process_leaves_running_ends_with_it(tmp_path):
    pid = tmp_path / "pid"
    assert process.run_limited(["sh", "-c", f"sleep 60 & echo $! > {pid}"], 5) is None
    status = Path(f"/proc/{int(pid.read_text())}/status")
    deadline = time.monotonic() + 5
    while status.exists() and "zombie" not in status.read_text():
        assert time.monotonic() < deadline, "what the process started still runs"
        time.sleep(0.05)


@pytest.mark.slow
def test_verification_counts_and_decides(tmp_path):
    def outcome(body):
        file = tmp_path / f"test_{MARGIN}.py"
        file.write_text("import pytest\n" + textwrap.dedent(body))
        options = ["-n", "0", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
        return verify.run_tests([str(file), *options])

    good = outcome("def test_a(): pass\n@pytest.mark.skip\ndef test_b(): pass")
    assert (good.passed, good.skipped, good.failed) == (1, 1, 0)
    assert good.speaks_for(MARGIN)
    assert not good.speaks_for("another_op")
    bad = outcome("def test_a(): pass\ndef test_b(): assert False")
    assert (bad.passed, bad.failed) == (1, 1)
    assert not bad.speaks_for(MARGIN)
    assert not outcome("import nothing_of_that_name").speaks_for(MARGIN)
    assert not outcome("@pytest.mark.skip\ndef test_a(): pass").speaks_for(MARGIN)


def test_an_op_is_verified_by_every_file_of_its_tests(monkeypatch):
    monkeypatch.setattr(verify, "run_tests", lambda files, _: [Path(file).name for file in files])
    files = verify.verify(MARGIN)
    assert {f"test_{MARGIN}.py", f"test_{MARGIN}_options.py", f"test_{MARGIN}_bf16.py"} <= {*files}
    assert verify.verify("row_update") == ["test_row_update.py"]


def test_the_machine_without_names_or_paths():
    found = machine.describe(CPU)
    assert {"processor", "cores", "instruction_set", "torch", "triton"} <= found.keys()
    text = json.dumps(found)
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text
    assert process.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    idle = machine.idle_check(0.1)
    assert idle["idle"] == (idle["busy_cores"] <= machine.BUSY_CORES_MAX + 0.005)


def test_tables_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = driver.measure_time(dry(MARGIN), CPU, rounds=0) | {"idle": True}
    case["peers"] = [
        {"peer": "ours", "seconds": 0.002, "ratio": 1.0, "peak_bytes": 3 << 20},
        {"peer": "eager", "seconds": 0.005, "ratio": 2.5, "peak_bytes": 3 << 30},
        {"peer": "absent", "not_measured": "ImportError"},
    ]
    result = {
        "machine": {"processor": "P", "cores": 8, "instruction_set": "base", "torch": "2.11"}
        | {"device": "GPU X", "cuda": "13.0"},
        "date": "2026-01-01",
        "command": "make gpu-evidence",
        "ceilings": {"copy_gigabyte_per_second": 3000.0, "product_tflop_per_second": 800.0}
        | {"product": "bfloat16", "float32_tflop_per_second": 50.0},
        "cases": [case],
    }
    case["peers"][0]["share_of_product"] = 0.625
    (tmp_path / "gpu.json").write_text(json.dumps(result))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    text = table.render()
    assert text.startswith("On a CPU: not measured.")
    shown = "1 (2 ms, 62% of the float32 product), 3 MiB"
    for part in ("GPU X", "3000 GB/s", "800 TFLOP/s, in float32 at 50.", shown):
        assert part in text
    assert "| eager | 2.50×, 3.0 GiB |" in text
    assert "`margin_cross_entropy`, forward and backward:" in text
    assert "| absent | not measured |" in text


def test_each_op_has_a_table_of_its_own(tmp_path, monkeypatch):
    rows = [{"peer": "ours", "seconds": 0.002, "ratio": 1.0}]
    shares = {"share_of_product": 0.01, "share_of_copy": 0.875}
    result = {
        "machine": {"processor": "P", "cores": 2, "instruction_set": "avx2", "torch": "2.13"},
        "date": "2026-01-01",
        "command": "make bench",
        "cases": [
            {"op": MARGIN, "name": "a", "peers": []},
            {"op": MIXUP, "name": "b", "peers": [rows[0] | shares]},
        ],
    }
    (tmp_path / "cpu.json").write_text(json.dumps(result))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    margin, mixup = table.render().split("`domain_mixup`, forward only")
    assert "| time ÷ ours, memory | a |" in margin
    assert "| time ÷ ours, memory | b |" in mixup
    assert "| ours | 1 (2 ms, 88% of the copy) |" in mixup


def test_a_run_that_ended_early_has_no_table(tmp_path, monkeypatch):
    machine = {"processor": "P", "cores": 2, "instruction_set": "avx2", "torch": "2.13"}
    result = {"machine": machine, "date": "2026-01-01", "command": "make bench", "cases": []}
    (tmp_path / "cpu.json").write_text(json.dumps(result))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    complete = table.render()
    gpu_evidence.Run(False, tmp_path / "gpu.json", 1.0).save()
    assert table.render() == complete
    assert complete.endswith("On a GPU: not measured.")
