"""Child processes of measurements on the CPU, so that none affects the others.

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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ROUNDS = 7
# How long a process may exceed its own limit, to start and to stop, before it is killed.
GRACE_SECONDS = 15


# The file in which a child names the peer whose step begins, beside its result; empty at the end.
RUNNING = "running"
# A child's limit before its first step, to import torch and make the inputs, and after the last.
START_SECONDS = 120.0
POLL_SECONDS = 0.1


def run_child(
    arguments: list[str], seconds: float = float("inf"), step_seconds: float = float("inf")
) -> dict[str, Any]:
    """Run ``python -m arguments --output FILE`` and return the JSON that it wrote.

    Args:
        seconds: the time limit of the process.
        step_seconds: that of each step which it announces, see `RUNNING`; the first one must begin
            within `START_SECONDS`. A step that holds on inside a C++ call is ended too.

    Returns:
        The JSON, with ``problem`` where the process failed or was ended, and then ``running``, the
        peer that it had announced, if any.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, running = Path(folder) / "result.json", Path(folder) / RUNNING
        started = time.time()

        def peer() -> str:
            return running.read_text() if running.exists() else ""

        def overdue() -> str | None:
            limit = step_seconds if peer() else START_SECONDS
            began = running.stat().st_mtime if running.exists() else started
            what = "a step" if peer() else "starting or stopping"
            return None if time.time() - began < limit else f"{what} took more than {limit:.3g} s"

        command = [sys.executable, "-m", *arguments, "--output", str(output)]
        watch = overdue if step_seconds < float("inf") else None
        ended = run_limited(command, seconds, watch, stdout=sys.stderr)
        result = json.loads(output.read_text()) if output.exists() else None
        if ended is None:
            return result or {"not_measured": "the process wrote no result"}
        if peer():
            return {**(result or {}), "problem": ended, "running": peer()}
        return {**(result or {"not_measured": ended}), "problem": ended}


def run_limited(
    command: list[str],
    seconds: float,
    watch: Callable[[], str | None] | None = None,
    **options: Any,
) -> str | None:
    """Run a command in a session of its own; return None, or how it failed.

    Args:
        command: the program and its arguments.
        seconds: the time limit.
        watch: is called several times a second; the process is ended once it returns a reason.
        options: those of `subprocess.Popen`.
    """
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options)
    end = time.monotonic() + seconds
    try:
        while True:
            left = max(0.0, end - time.monotonic())
            poll = left if watch is None else min(left, POLL_SECONDS)
            try:
                code = process.wait(None if poll == float("inf") else poll)
                return None if code == 0 else f"the process ended with status {code}"
            except subprocess.TimeoutExpired:
                if time.monotonic() >= end:
                    return f"the process was ended after {seconds:.0f} s"
                reason = None if watch is None else watch()
                if reason is not None:
                    return f"{reason}, and the process was ended"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a file atomically, so that a killed process leaves a complete one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)


def command_line(module: str) -> str:
    """Return the command of this process as results name it, without the path of its output."""
    words = list(sys.argv[1:])
    while "--output" in words:
        place = words.index("--output")
        del words[place : place + 2]
    return " ".join(["python -m", module, *words])


def slug(name: str) -> str:
    """Return a file name for the results of a machine or device."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
