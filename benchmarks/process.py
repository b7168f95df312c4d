"""Child processes: one for each case on the CPU, so that none affects the others.

This module does not import the library, which may not be built yet.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .cases import Case, cases

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ROUNDS = 7
# How long a process may exceed its own limit, to start and to stop, before it is killed.
GRACE_SECONDS = 15


def run_child(arguments: list[str]) -> dict[str, Any]:
    """Run ``python -m arguments --output FILE`` and return the JSON that it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, "-m", *arguments, "--output", str(output)]
        ended = run_limited(command, float("inf"), stdout=sys.stderr)
        if output.exists():
            result = json.loads(output.read_text())
            return result if ended is None else {**result, "problem": ended}
        return {"not_measured": ended or "the process wrote no result"}


def run_limited(command: list[str], seconds: float, **options: Any) -> str | None:
    """Run a command in a session of its own; return None, or how it failed."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options)
    try:
        code = process.wait(None if seconds == float("inf") else max(0.0, seconds))
        return None if code == 0 else f"the process ended with status {code}"
    except subprocess.TimeoutExpired:
        return f"the process was ended after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a file atomically, so that a killed process leaves a complete one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)


def run_case(case: Case, rounds: int) -> dict[str, Any]:
    """Time a case on the CPU in a process of its own, and measure memory in one per peer."""
    index = cases(case.suite, case.op).index(case)
    this = ["benchmarks.driver", case.op, case.suite, str(index)]
    timed = run_child([*this, "--rounds", str(rounds)])
    if "peers" not in timed:
        return {"op": case.op, "name": case.name, "peers": [], **timed}
    for row in timed["peers"]:
        if "not_measured" not in row:
            found = run_child([*this, "--memory-of", row["peer"]])
            row["peak_bytes"] = found.get("peak_bytes")
    return timed


def slug(name: str) -> str:
    """Return a file name for the results of a machine or device."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
