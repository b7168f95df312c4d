"""`make gpu-training` runs what it can, whatever else fails, and says what failed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from synface import cli
from typer.main import get_command

from benchmarks import gpu_training
from benchmarks.gpu_training import Command, commands
from benchmarks.table import page

MACHINE = {"device": "A GPU", "cuda": "13.0", "torch": "2.11", "processor": "CPU"}


def evidence(monkeypatch: pytest.MonkeyPatch, output: Path) -> tuple[str, dict[str, Any]]:
    """Make a dry run; return what it says at its end, and its results."""
    monkeypatch.setattr(sys, "argv", ["gpu_training", "--dry", "--output", str(output)])
    ended = ""
    try:
        gpu_training.main()
    except SystemExit as end:
        ended = str(end.code)
    return ended, json.loads(output.read_text())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_dry_run_measures_what_it_is_to(tmp_path, monkeypatch):
    """The first two commands; the others are parsed below, and `make stand-in` runs all."""
    few = commands(dry=True)[:2]
    monkeypatch.setattr(gpu_training, "commands", lambda dry: few)
    ended, result = evidence(monkeypatch, tmp_path / "training" / "dry.json")
    assert ended == ""
    assert result["tests"]["passed"] > 20
    assert result["tests"]["failed"] == result["tests"]["skipped"] == 0
    assert result["machine"]["torch"]
    assert [row["command"] for row in result["commands"]] == [each.title for each in few]
    for row in result["commands"]:
        assert row["seconds"] > 0
        assert row["tells"]
        assert {*row["tells"]} <= {*row["printed"]}
    assert result["commands"][0]["result"]["rates"]["synface"][0] > 0


@pytest.mark.parametrize("dry", [False, True])
def test_the_command_line_takes_the_commands(dry, tmp_path):
    (tmp_path / "run").mkdir()
    for each in commands(dry):
        command, arguments = get_command(cli.app), each.arguments(tmp_path)
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        # Parses all options and checks their types, and runs nothing.
        context = command.make_context(each.title, arguments)
        assert context.params["device"] == ("cpu" if dry else "cuda")


def test_the_commands_on_a_gpu_are_those_of_the_dry_run():
    for tiny, usual in zip(commands(dry=True), commands(dry=False), strict=True):
        assert (tiny.tells, tiny.written) == (usual.tells, usual.written)
        assert tiny.words.split()[0] == usual.words.split()[0]


def test_what_fails_leaves_the_rest(tmp_path, monkeypatch):
    found = [Command("no-such-command", 60, "x"), Command("--version", 60, "synface")]
    found += [Command("--help", 60, "no such line")]
    monkeypatch.setattr(gpu_training, "commands", lambda dry: found)
    monkeypatch.setattr(gpu_training, "TESTS", tmp_path)
    (tmp_path / "test_gpu_training.py").write_text("def test_a(): assert [1] == [2], 'planted'\n")
    ended, result = evidence(monkeypatch, tmp_path / "dry.json")
    assert ended.splitlines() == [
        "not all went well:",
        "tests: 1 tests failed",
        "synface no-such-command: the process ended with status 2",
        "synface --help: it printed no line with 'no such line'",
    ]
    assert "planted" in result["tests"]["failures"][0]["message"]
    assert result["commands"][1]["tells"][0].startswith("synface")
    assert result["sanitizer"] == {"not_measured": "a CPU has no compute-sanitizer"}


def test_no_time_is_said(tmp_path, monkeypatch):
    run = gpu_training.Run(False, tmp_path / "out.json", -1.0)
    run.command(0)
    (problem,) = run.problems
    assert problem.endswith(": no time was left")
    assert run.result["commands"][0]["not_measured"] == "no time was left"


# ---- the memory check ----------------------------------------------------------------------------


@pytest.fixture
def checker(tmp_path, monkeypatch):
    """Return a function that plants a checker of some exit status, and tests for it."""
    monkeypatch.setattr(gpu_training, "GPU_TESTS", tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def plant(tests: str, status: str = "$?") -> None:
        (tmp_path / "test_gpu_op.py").write_text(tests)
        tool = tmp_path / gpu_training.SANITIZER
        tool.write_text(
            '#!/bin/sh\necho "========= COMPUTE-SANITIZER"\nshift 4\n'
            f'"$@"\nstatus={status}\necho "========= ERROR SUMMARY: in /some/file"\nexit $status\n'
        )
        tool.chmod(0o755)

    return plant


PASSES = "def test_runs_agree_bitwise(): pass\ndef test_slow(): assert False\n"


def test_a_clean_memory_check(checker):
    checker(PASSES)
    found = gpu_training.sanitize(60)
    assert (found["passed"], found["failed"], found["problem"]) == (1, 0, None)
    assert found["reports"] == [
        "========= COMPUTE-SANITIZER", "========= ERROR SUMMARY: in file"
    ]  # fmt: skip


def test_faults_and_failures_of_a_memory_check(checker):
    checker(PASSES, str(gpu_training.FAULT))
    assert gpu_training.sanitize(60)["problem"] == "it found faults, see reports"
    checker("def test_runs_agree_bitwise(): assert False\n")
    assert gpu_training.sanitize(60)["problem"] == "1 tests failed"


def test_a_machine_without_a_checker(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu_training.sanitize(60) == {"not_measured": "compute-sanitizer is not on PATH"}


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_shows_committed_results(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_training, "FOLDER", tmp_path)
    assert gpu_training.section().endswith("On a GPU: not measured.")
    assert gpu_training.section() in page()
    counts = {"passed": 30, "skipped": 1, "failed": 0, "problem": None}
    result = {
        "date": "2026-12-01", "command": "make gpu-training", "machine": MACHINE,
        "tests": counts, "sanitizer": {"not_measured": "compute-sanitizer is not on PATH"},
        "commands": [
            {"command": "synface pack", "seconds": 12.3, "tells": ["lse: 500 steps"]},
            {"command": "synface eval", "not_measured": "no time was left"},
            {"command": "synface train", "seconds": 4, "tells": [], "problem": "status 1"},
        ],
    }  # fmt: skip
    (tmp_path / "a-gpu.json").write_text(json.dumps(result))
    (tmp_path / "ended.json").write_text(json.dumps({"machine": {"not_measured": "not reached"}}))
    shown = gpu_training.section()
    for line in (
        "**A GPU, CUDA 13.0**; torch 2.11, 2026-12-01, `make gpu-training`.",
        "| GPU tests of `synface` | 30 passed, 1 skipped, 0 failed |",
        "| GPU tests of the ops under a memory check | not measured: compute-sanitizer is not on "
        "PATH |",
        "| `synface pack` | 12.3 | lse: 500 steps |",
        "| `synface eval` |  | not measured: no time was left |",
        "| `synface train` | 4 | not measured: status 1 |",
    ):
        assert line in shown.splitlines()
