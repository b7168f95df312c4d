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

from benchmarks import (
    driver,
    gpu_evidence,
    isolated,
    machine,
    peers,
    process,
    run,
    table,
    verify,
)
from benchmarks.cases import (
    CASES,
    HEADLINES,
    cases,
)
from benchmarks.peers import Peer

CPU = torch.device("cpu")
MARGIN, MIXUP = "margin_cross_entropy", "domain_mixup"


def dry(op: str):
    return cases("dry", op)[0]


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


def test_a_peer_that_fails_when_it_is_timed_leaves_the_others_timed(monkeypatch):
    ran = []

    def fails_later(work):
        def step():
            ran.append(1)
            if len(ran) == 4:
                raise MemoryError("planted")

        return step

    found = [peer("ours", sleeper(0)), peer("full", fails_later), peer("other", sleeper(0))]
    monkeypatch.setitem(peers.PEERS, MARGIN, found)
    result = driver.measure_time(dry(MARGIN), CPU, rounds=4)
    ours, full, other = result["peers"]
    assert result["rounds"] == 4
    assert full == {"peer": "full", "label": "label of full", "not_measured": "planted"}
    assert ours["ratio"] == 1
    assert other["ratio"] > 0


def test_compiled_peers_are_built_last_and_shown_in_their_place(monkeypatch):
    built = []

    def build(name):
        def make(work):
            built.append(name)
            return lambda: None

        return make

    names = ["ours", "torch.compile", "eager torch", "torch.compile, into out"]
    monkeypatch.setitem(peers.PEERS, MARGIN, [peer(name, build(name)) for name in names])
    result = driver.measure_time(dry(MARGIN), CPU, rounds=1)
    assert built == ["ours", "eager torch", "torch.compile", "torch.compile, into out"]
    assert [row["peer"] for row in result["peers"]] == names


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
